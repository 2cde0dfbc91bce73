"""--report-to with the real packages, offline: the curves are the log's, also of a run that goes on, and no
bit of a result changes."""
import json
import struct
import sys
from types import SimpleNamespace

import pytest
from in_process import here
from runs import WORDS, assert_same, log_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from harness.trackers import Trackers, tracker_names

KEYS = ("loss", "robust", "lr", "images_per_s")
TABLE = {"tasks": {"a/b $": {"clean": 90., "robust": 40.}, "mean": {"clean": 80., "robust": 30.}},
         "mean": {"clean": 85., "robust": 35.}, "adapted": {"seen": {"clean": 99., "robust": 60.}}}
FLAT = {"val/clean": 85., "val/robust": 35., "val/clean/a/b $": 90., "val/robust/a/b $": 40.,
        "val/clean/mean": 80., "val/robust/mean": 30., "val/clean/seen": 99., "val/robust/seen": 60.}


def tensorboard_of(out):
    """({tag: [(step, value), …]}, what the options are in words), as TensorBoard itself reads them."""
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, [e.tensor_proto.string_val[0].decode() for e in events.Tensors("config/text_summary")]


def leveldb_records(content):
    """The records of a log of LevelDB's: blocks of 32 KiB, in them (checksum, length, kind of part, part)."""
    at, record = 7, b""                                     # after wandb's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768                        # no header fits there
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):                                  # the whole, or the last part of one
            yield record
            record = b""


def wandb_of(folder):
    """({key: [(step, value), …]}, {option: value}) of an offline run's file."""
    (path,), found, config = folder.glob("*.wandb"), {}, {}
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in record.history.item:
            key = "/".join(item.nested_key) or item.key
            found.setdefault(key, []).append((record.history.step.num, json.loads(item.value_json)))
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return found, config


def assert_curves_are_the_logs(scalars, rows):
    for key in KEYS:
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]
        assert scalars[f"train/{key}"] == expected, key


def test_both_have_the_curves_of_a_run_that_goes_on(forks, whole, tmp_path):
    """From the checkpoint of step 20 of 24, and from 5 steps before; and then another run in that folder."""
    out, words = tmp_path / "run", (*WORDS, "--epochs", 3, "--save-every", 5, "--report-to", "all")
    offline = {"WANDB_MODE": "offline"}
    forks.run("train_tecoa.py", *words, "--out", out, out=out, **offline)
    assert_same(whole, out)
    (first,) = (out / "wandb").glob("offline-run-*")
    assert_curves_are_the_logs(tensorboard_of(out)[0], log_of(out))
    found, config = wandb_of(first)
    assert_curves_are_the_logs(found, log_of(out))
    assert config["epochs"] == 3 and config["loss"] == "tecoa" and config["processes"] == 1

    forks.run("train_tecoa.py", "--resume", out / "ckpt-previous.pt", out=out, **offline)
    assert_same(whole, out)
    scalars, texts = tensorboard_of(out)
    assert_curves_are_the_logs(scalars, log_of(out))
    assert len(texts) == 2 and all("    epochs: 3\n" in text for text in texts)
    (second,) = {*(out / "wandb").glob("offline-run-*")} - {first}
    assert first.name.split("-")[-1] == second.name.split("-")[-1]
    assert_curves_are_the_logs(wandb_of(second)[0], [row for row in log_of(out) if row["step"] > 20])

    forks.run("train_tecoa.py", *words, "--max-steps", 8, "--overwrite", "--out", out, out=out, **offline)
    scalars, texts = tensorboard_of(out)
    assert [row["step"] for row in log_of(out)] == [8]
    assert_curves_are_the_logs(scalars, log_of(out))
    assert len({folder.name.split("-")[-1] for folder in (out / "wandb").glob("offline-run-*")}) == 2


def test_one_process_reports_of_two(forks, tmp_path):
    words = (*WORDS, "--max-steps", 8, "--report-to", "tensorboard", "--out", tmp_path / "run")
    pids = forks.start_together(2, "train_tecoa.py", *words, out=tmp_path / "o")
    assert [forks.wait(pid) for pid in pids] == [0, 0], (tmp_path / "o.0.stderr").read_text()
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1
    assert_curves_are_the_logs(tensorboard_of(tmp_path / "run")[0], log_of(tmp_path / "run"))


# wandb takes its settings once a process
ALONE = """
from pathlib import Path
from harness.trackers import Trackers
trackers = Trackers({names!r})
trackers.start(Path({out!r}), {{"eps": 8.}}, 0, False)
trackers.tell("log", 7, {{"train/loss": 1.5}})
trackers.report(7, {table})
"""


def alone(names, out):
    script = out / "script.py"
    script.write_text(ALONE.format(names=names, out=str(out), table=TABLE))
    return script


def test_the_table_is_reported_at_the_end(forks, tmp_path):
    forks.run(alone("tensorboard,wandb", tmp_path), out=tmp_path / "o", WANDB_MODE="offline")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    expected = {name: [(7, value)] for name, value in (FLAT | {"train/loss": 1.5}).items()}
    assert tensorboard_of(tmp_path)[0] == expected
    found, config = wandb_of(folder)
    assert {name: values for name, values in found.items() if name[0] != "_"} == expected
    assert config["eps"] == 8


def test_names_of_trackers():
    assert [tracker_names(text) for text in ("none", "", "wandb", "wandb,tensorboard,wandb", "all")] == [
        "none", "none", "wandb", "tensorboard,wandb", "tensorboard,wandb"]


@pytest.mark.parametrize("name,module", [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_before_anything_is_computed(monkeypatch, tmp_path, name, module):
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    words = (*WORDS, "--out", tmp_path / "run", "--report-to")
    done = here("train_tecoa.py", *words, f"{name}", status=2)
    assert done.stderr == f"train_tecoa.py: --report-to {name}: pip install {name} first\n"
    assert done.stdout == "" and not (tmp_path / "run").exists()


def test_a_tracker_that_fails_is_closed_with_a_warning_and_the_others_go_on(capsys):
    trackers, told = Trackers("none"), []

    def fail(*facts):
        raise OSError("no space\nleft")
    trackers.open = {"bad": SimpleNamespace(log=fail), "good": SimpleNamespace(log=lambda *f: told.append(f))}
    trackers.tell("log", 1, {"a": 2})
    trackers.tell("log", 2, {"a": 3})
    assert told == [(1, {"a": 2}), (2, {"a": 3})]
    assert capsys.readouterr().err == "\nwarning: --report-to bad ends here: no space left\n"
