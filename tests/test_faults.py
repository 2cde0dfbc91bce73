"""Training is killed, stopped, starved of disk and fed damaged files, and ends with the same bits or with one line."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forks import Forks
from PIL import Image

import toyworld
from checkpoints import read_checkpoint
from cli import write_json
from data import Task
from report import at_chance
from resume import Log, known_results
from sampling import training_order

WORDS = ("--pretrained", "none", "--dataset", "digits", "--tasks", "colours", "--limit", 64, "--batch-size", 8, "--warmup",
         4, "--eval-steps", 1)


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


def tensors(value, name=""):
    """{path: tensor or plain value} of everything in a checkpoint."""
    if isinstance(value, dict):
        return {key: leaf for word, part in value.items() for key, leaf in tensors(part, f"{name}/{word}").items()}
    return {name: value}


def assert_same(one, other):
    """Two runs' folders have the same bits in their checkpoints, the same log but for its speeds, the same results."""
    a, b = (tensors(torch.load(folder / "ckpt.pt", weights_only=True)) for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("/config"):
            assert a[name] == b[name] or name.split("/")[2] in ("out", "save_every", "max_steps", "workers"), name
        elif name != "/launch":
            assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    for row in (*logs[0], *logs[1]):
        row.pop("images_per_s", None)
    assert logs[0] == logs[1]
    for name in ("results_before.json", "results.json"):
        tables = [json.loads((folder / name).read_text()) for folder in (one, other)]
        assert all(tables[0].get(key) == tables[1].get(key) for key in ("tasks", "mean", "adapted"))


@pytest.fixture(scope="module")
def whole(forks, once):
    """A run of 24 steps that nothing happened to."""
    words = (*WORDS, "--epochs", 3, "--save-every", 5, "--out")
    return once("whole", lambda out: forks.run("train_tecoa.py", *words, out, out=out))


def steps_done(out):
    """The last step in a run's log."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def when(condition, seconds=60):
    """Wait for it."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.02)


# ---------------------------------------------------------------------------------------------- killed, stopped
def test_killed_at_any_time_it_ends_with_the_same_bits(forks, whole, tmp_path):
    """SIGKILL at random times: while loading, training, saving, evaluating."""
    out, rng, kills = tmp_path / "run", random.Random(0), 0
    words = (*WORDS, "--epochs", 3, "--save-every", 1, "--out", out)
    while True:
        begun = (out / "ckpt.pt").exists()
        pid = forks.start("train_tecoa.py", *(("--resume", out) if begun else words), out=tmp_path / "run")
        if kills < 6:
            time.sleep(rng.uniform(.2, 2))
            os.kill(pid, signal.SIGKILL)
            kills += 1
        status = forks.wait(pid)
        assert status in (0, -signal.SIGKILL), Path(tmp_path / "run.stderr").read_text()
        if status == 0:
            break
    assert_same(whole, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(forks, whole, tmp_path, number):
    out = tmp_path / "run"
    pid = forks.start("train_tecoa.py", *WORDS, "--epochs", 3, "--save-every", "9m", "--out", out, out=tmp_path / "run")
    when(lambda: steps_done(out) >= 8)
    for _ in range(2):                                                           # torchrun passes on what all have got
        os.kill(pid, number)
    assert forks.wait(pid) == 128 + number
    step, said = read_checkpoint(out / "ckpt.pt")["step"], Path(tmp_path / "run.stderr").read_text()
    assert f"{signal.Signals(number).name} after step {step} of 24, saved; go on with --resume {out}\n" in said
    assert 8 <= step < 24 and "Traceback" not in said
    stdout, _ = forks.run("train_tecoa.py", "--resume", out, out=tmp_path / "run")
    assert f"Going on after step {step}" in stdout
    assert_same(whole, out)


def test_an_interrupted_evaluation_says_so_in_one_line(forks, tmp_path):
    words = ("--pretrained", "none", "--steps", 9999, "--out", tmp_path / "e")
    pid = forks.start("eval_zeroshot.py", *words, out=tmp_path / "o")
    when(lambda: (tmp_path / "e" / "images.jsonl").exists())
    os.kill(pid, signal.SIGINT)
    assert forks.wait(pid) == -signal.SIGINT
    said = (tmp_path / "o.stderr").read_text()
    assert said.endswith("eval_zeroshot.py: interrupted\n") and "Traceback" not in said


def test_the_minute_has_its_own_checkpoints(forks, tmp_path):
    out = tmp_path / "run"
    forks.run("train_tecoa.py", *WORDS, "--max-steps", 8, "--save-every", "0.0001m", "--out", out, out=tmp_path / "run")
    assert read_checkpoint(out / "ckpt-previous.pt")["step"] == 7


ADAPTATIONS = ("full", "partial", "linear", "image-prompt", "token-prompt", "image-prompt,token-prompt")
LOSSES = ("tecoa", "ce", "coadv", "imgcoadv", "fare", "pmg")


@pytest.mark.parametrize("loss,adapt", [
    *((loss, "full") for loss in LOSSES), *(("tecoa", adapt) for adapt in ADAPTATIONS[1:]), ("ce", "linear"),
    ("coadv", "image-prompt,token-prompt")])
def test_every_loss_and_adaptation_goes_on_with_the_same_bits(forks, tmp_path, loss, adapt):
    """From the checkpoint of step 3 of 5, between two lines of the log, of a step in two parts."""
    one, other = tmp_path / "one", tmp_path / "other"
    words = ("--loss", loss, "--adapt", adapt, "--accumulate", 2, "--tasks", "none", "--labels",
             "pseudo" if loss == "tecoa" else "true")
    forks.run("train_tecoa.py", *WORDS, *words, "--max-steps", 5, "--save-every", 3, "--out", one, out=one)
    assert read_checkpoint(one / "ckpt-previous.pt")["step"] == 3
    shutil.copytree(one, other)
    (other / "results.json").write_text("of step 5")                             # rewound, the run is not over any more
    forks.run("train_tecoa.py", "--resume", other / "ckpt-previous.pt", out=other)
    assert json.loads((other / "results.json").read_text())["trained"]
    a, b = (tensors(torch.load(folder / "ckpt.pt", weights_only=True)) for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))
    rows = [[json.loads(line) | {"images_per_s": 0} for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (one, other)]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 5
    if loss == "imgcoadv":                                                       # other parts would be other negatives
        _, stderr = forks.run("train_tecoa.py", "--resume", other / "ckpt-previous.pt", "--accumulate", 1, out=other,
                              status=2)
        assert "in 1 process(es), with --accumulate 2" in stderr


def torchrun(processes, *words, restarts=0, script="train_tecoa.py", out):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0",
                                "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               f"--max-restarts={restarts}", str(script), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=open(f"{out}.stdout", "w"),
                            stderr=open(f"{out}.stderr", "w"))


def test_a_killed_worker_is_started_again_and_another_number_of_processes_can_go_on(forks, tmp_path):
    """Three processes (whose sums depend on their order), one of them killed: same bits as without. Then one process in
    place of three: same up to rounding."""
    words = (*WORDS, "--tasks", "none", "--batch-size", 9, "--epochs", 12, "--save-every", 8, "--out")
    assert torchrun(3, *words, tmp_path / "whole", out=tmp_path / "whole").wait() == 0
    agent = torchrun(3, *words, tmp_path / "run", restarts=2, out=tmp_path / "run")
    when(lambda: steps_done(tmp_path / "run") >= 20)
    children = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
    os.kill(max(children), signal.SIGKILL)
    assert agent.wait() == 0, (tmp_path / "run.stderr").read_text()[-3000:]
    assert "Going on after step" in (tmp_path / "run.stdout").read_text()
    assert_same(tmp_path / "whole", tmp_path / "run")

    shutil.copytree(tmp_path / "whole", tmp_path / "alone")
    forks.run("train_tecoa.py", "--resume", tmp_path / "alone" / "ckpt-previous.pt", out=tmp_path / "alone")
    start, three, one = (torch.cat([t.flatten() for t in read_checkpoint(tmp_path / path)["visual"].values()]) for path in
                       ("whole/ckpt-previous.pt", "whole/ckpt.pt", "alone/ckpt.pt"))
    assert 0 < (one - three).norm() < .01 * (three - start).norm()
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "alone")]
    assert [(row["step"], row["lr"]) for row in rows[0]] == [(row["step"], row["lr"]) for row in rows[1]]
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in zip(*rows))


# ---------------------------------------------------------------------------------------------- damaged, foreign, in the way
@pytest.fixture
def run_copy(whole, tmp_path):
    """A copy of the whole run as if it had been killed just before its last table."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    return tmp_path / "copy"


def test_flipped_bytes_never_make_another_model(run_copy):
    """A byte flipped at each of 200 places, the file cut at each of 50 lengths: the same bits, or one line and no model."""
    path, rng, refused = run_copy / "ckpt.pt", random.Random(0), 0
    good, true = path.read_bytes(), tensors(read_checkpoint(path))
    places = [0, 1, 3, 40, len(good) - 1, len(good) - 20]                        # headers, and the end
    places += [rng.randrange(len(good)) for _ in range(144)] + [len(good) - 1 - rng.randrange(12000) for _ in range(50)]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        try:
            found = tensors(read_checkpoint(path))
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found.keys() == true.keys() and all(
                torch.equal(found[name], true[name]) if isinstance(true[name], torch.Tensor) else found[name] == true[name]
                for name in true), place
    assert refused > 150
    for length in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(47))]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="ckpt.pt"):
            read_checkpoint(path)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(forks, whole, run_copy, tmp_path):
    good = (run_copy / "ckpt.pt").read_bytes()
    (run_copy / "ckpt.pt").write_bytes(good[:len(good) // 2])
    _, stderr = forks.run("train_tecoa.py", "--resume", run_copy, out=tmp_path / "o", status=2)
    previous = run_copy / "ckpt-previous.pt"
    assert stderr.count("\n") == 1 and f"{run_copy}/ckpt.pt is damaged" in stderr
    assert f"of step 20, is whole: --resume {previous}" in stderr
    stdout, _ = forks.run("train_tecoa.py", "--resume", previous, "--save-every", 1, out=tmp_path / "o")
    assert "Going on after step 20" in stdout
    assert_same(whole, run_copy)
    assert read_checkpoint(previous)["step"] == 23                               # and not the damaged one

    (run_copy / "results.json").unlink()                                         # alone --resume takes it by itself, aloud
    (run_copy / "ckpt.pt").write_bytes(b"")
    stdout, stderr = forks.run("train_tecoa.py", *WORDS, "--epochs", 3, "--out", run_copy, "--resume", out=tmp_path / "o")
    assert "Going on after step 23" in stdout and f"warning: {run_copy}/ckpt.pt is not a checkpoint: it is empty" in stderr
    assert_same(whole, run_copy)


def test_what_cannot_go_on_says_why(forks, whole, run_copy, tmp_path):
    shutil.copy(whole / "ckpt.pt", tmp_path / "ckpt.pt")
    model = read_checkpoint(whole / "ckpt.pt")
    del model["training"]
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "noise.pt").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in run_copy.iterdir()}
    for words, said in (
            (["--resume", tmp_path / "absent"], "no checkpoint"),
            (["--resume", tmp_path / "empty"], "no checkpoint"),
            (["--resume", tmp_path / "noise.pt"], "noise.pt"), (["--resume", tmp_path / "model.pt"], "only a model"),
            (["--resume", run_copy, "--lr", .5], "--lr 0.5: the run in"),
            (["--resume", run_copy, "--loss", "ce"], "--loss ce"),
            (["--resume", run_copy, "--out", tmp_path], "--out"), (["--resume", run_copy, "--limit", 80], "--limit 80"),
            ([*WORDS, "--epochs", 3, "--out", run_copy], "add --resume to go on"),
            (["--save-every", "0"], "--save-every"), (["--save-every", "soon"], "--save-every")):
        _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
        assert stderr.count("\n") == 1 and said in stderr, (words, stderr)
    assert before == {path: path.read_bytes() for path in run_copy.iterdir()}    # nothing was touched
    stdout, _ = forks.run("train_tecoa.py", "--resume", whole, out=tmp_path / "o")
    assert "is finished, after step 24" in stdout


def test_a_restart_goes_on_with_its_own_launch_alone(run, tmp_path):
    """Not with a run that an earlier torchrun finished, which would pass its numbers off as new ones."""
    words = (*WORDS, "--tasks", "none", "--max-steps", 2, "--out", tmp_path)
    run("train_tecoa.py", *words, TORCHELASTIC_RUN_ID="one")
    for run_id, said in (("one", "is finished, after step 2"), ("two", "wrote ")):
        done = run("train_tecoa.py", *words, TORCHELASTIC_RUN_ID=run_id, TORCHELASTIC_RESTART_COUNT="1")
        assert said in done.stdout and "Going on" not in done.stdout


def test_a_table_of_other_tasks_is_not_taken_over(tmp_path):
    path, (a, b) = tmp_path / "results_before.json", (Task(name, None, [], "") for name in "ab")
    assert known_results(path, [a]) is None
    write_json(path, {"tasks": {"a": {}}, "adapted": {"b": {}}})
    assert known_results(path, [a, b])["tasks"] == {"a": {}} and known_results(path, [a]) is None
    path.write_text("half a fi")
    assert known_results(path, [a, b]) is None


def test_an_evaluation_does_not_go_on_with_other_images(forks, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    words = ("--pretrained", "none", "--tasks", f"folder:{tmp_path / 'photos'}", "--steps", 1, "--out", tmp_path / "e")
    for said in ("wrote ", "going on: 60 of 60"):
        assert said in forks.run("eval_zeroshot.py", *words, out=tmp_path / "o")[0]
    next((tmp_path / "photos" / "val").rglob("*.png")).unlink()
    _, stderr = forks.run("eval_zeroshot.py", *words, out=tmp_path / "o", status=2)
    assert stderr.count("\n") == 1 and "are not those that" in stderr


def test_one_run_at_a_time_in_a_folder(forks, tmp_path):
    words = (*WORDS, "--epochs", 2000, "--save-every", 1, "--out", tmp_path / "run")
    pid = forks.start("train_tecoa.py", *words, out=tmp_path / "first")
    when(lambda: steps_done(tmp_path / "run"))
    for more in ((), ("--resume",)):
        _, stderr = forks.run("train_tecoa.py", *words, *more, out=tmp_path / "second", status=2)
        assert stderr.count("\n") == 1 and ("another process is training in" in stderr or "unfinished" in stderr), stderr
    assert "another process" in stderr
    os.kill(pid, signal.SIGKILL)
    forks.wait(pid)
    before = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    stdout, _ = forks.run("train_tecoa.py", *words, "--resume", "--max-steps", before + 1, out=tmp_path / "second")
    assert f"Going on after step {before}" in stdout


def test_a_checkpoint_can_do_nothing_but_be_read(forks, whole, tmp_path):
    """Neither run code when it is loaded, nor choose where files are written, nor give options their values unchecked."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    checkpoint = torch.load(whole / "ckpt.pt", weights_only=True)
    cases = {"pickle": checkpoint | {"model": Evil()},
             "path": checkpoint | {"config": checkpoint["config"] | {"out": str(tmp_path / "elsewhere")}},
             "option": checkpoint | {"config": checkpoint["config"] | {"loss": "evil"}},
             "type": checkpoint | {"config": checkpoint["config"] | {"lr": [1]}},
             "shape": checkpoint | {"training": checkpoint["training"] | {"momentum": {}}},
             "unknown": checkpoint | {"config": checkpoint["config"] | {"help": True, 7: 1}},
             "nothing": checkpoint | {"training": {}},
             "model": checkpoint | {"model": 7}, "visual": checkpoint | {"visual": {"visual.proj": "none"}}}
    for name, value in cases.items():
        (tmp_path / name).mkdir()
        torch.save(value, tmp_path / name / "ckpt.pt")
        shutil.copy(whole / "log.jsonl", tmp_path / name)
        status = {"path": 0, "shape": 1}.get(name, 2)
        _, stderr = forks.run("train_tecoa.py", "--resume", tmp_path / name, "--tasks", "colours", out=tmp_path / "o",
                              status=status)
        assert "Traceback" not in stderr and (not status or stderr.splitlines()[-1]), stderr
        assert status == 0 or stderr.splitlines()[-1].startswith(("train_tecoa.py: ", "--resume: ")), stderr
        if name in ("pickle", "model", "visual"):
            _, stderr = forks.run("eval_zeroshot.py", "--ckpt", tmp_path / name / "ckpt.pt", out=tmp_path / "o", status=2)
            assert stderr.count("\n") == 1
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "pickle" / "ckpt.pt", weights_only=True)
    forks.run("train_tecoa.py", "--pretrained", tmp_path / "pickle" / "ckpt.pt", "--out", tmp_path / "new",
              out=tmp_path / "o", status=2)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "elsewhere").exists()
    for name in ("log.jsonl", "ckpt.pt.tmp"):                                    # links in a folder lead nowhere
        (tmp_path / "target").write_text("mine")
        (tmp_path / "link").mkdir()
        shutil.copy(whole / "ckpt-previous.pt", tmp_path / "link" / "ckpt.pt")
        (tmp_path / "link" / name).symlink_to(tmp_path / "target")
        forks.run("train_tecoa.py", "--resume", tmp_path / "link", out=tmp_path / "o", status=2 * (name == "log.jsonl"))
        assert (tmp_path / "target").read_text() == "mine"
        shutil.rmtree(tmp_path / "link")
    torch.load(tmp_path / "pickle" / "ckpt.pt", weights_only=False)              # it would
    assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------- not finite
def poisoned(path, change, when="True"):
    """A script that trains with contrastive losses `change`d in those calls, numbered from 1, in which `when` holds."""
    path.write_text(f"""
import os, runpy, sys
import kernels.contrastive_loss as module
real, calls = module.contrastive_loss, 0
def poisoned(*args):
    global calls
    calls += 1
    loss, predicted = real(*args)
    return ({change} if {when} else loss), predicted
module.contrastive_loss = poisoned
sys.argv[0] = r"{ROOT}/train_tecoa.py"
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return path


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_first_step_that_is_not_finite_ends_the_run_and_harms_nothing(forks, whole, tmp_path):
    out, script = tmp_path / "run", poisoned(tmp_path / "poisoned.py", "loss * float('nan')", "calls == 7")
    _, stderr = forks.run(script, *WORDS, "--epochs", 3, "--save-every", 5, "--out", out, out=out, status=1)
    (line,) = [line for line in stderr.splitlines() if "not finite" in line]
    assert "step 7 " in line and "--lr" in line and "log.jsonl" in line and "Traceback" not in stderr
    (batch,) = training_order(64, 8, 1, 0, [6])
    (row,) = [row for row in log_of(out) if "nonfinite" in row]
    assert row == {"step": 7, "epoch": 0, "nonfinite": sorted(batch)}
    assert read_checkpoint(out / "ckpt.pt")["step"] == 5
    forks.run("train_tecoa.py", "--resume", out, out=out)
    assert_same(whole, out)


@pytest.mark.parametrize("change", ["loss * float('nan')", "loss + float('inf')"])   # the second with a finite gradient
def test_steps_that_are_not_finite_change_nothing(forks, tmp_path, change):
    """All of three steps: the model is CLIP and the momentum zero. Some of twelve: the others train on."""
    out = tmp_path / "all"
    words = (*WORDS, "--tasks", "none", "--out", out)
    forks.run(poisoned(tmp_path / "a.py", change), *words, "--max-steps", 3, "--max-nonfinite", 9, out=out)
    start, end = (torch.load(out / name, weights_only=True) for name in ("ckpt-previous.pt", "ckpt.pt"))
    assert start["step"] == 0 and end["step"] == 3
    assert all(torch.equal(start["visual"][name], end["visual"][name]) for name in start["visual"])
    assert all(not tensor.any() for tensor in end["training"]["momentum"].values())
    assert [row["step"] for row in log_of(out)] == [1, 2, 3] and all("nonfinite" in row for row in log_of(out))

    script = poisoned(tmp_path / "b.py", change, "calls in (1, 6)")
    _, stderr = forks.run(script, *words, "--max-steps", 12, "--max-nonfinite", 3, "--save-every", 7, out=out)
    assert "step 1 is left out" in stderr and "step 6 is left out" in stderr
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 6, 8, 10, 12]                    # 6 is known when 7 is saved
    assert all(math.isfinite(row["loss"]) and row["robust"] * 48 % 100 == pytest.approx(0) for row in rows[2:3])
    assert json.loads((out / "results.json").read_text())["skipped"] == 2
    moved = torch.load(out / "ckpt.pt", weights_only=True)["visual"]
    assert all(tensor.isfinite().all() for tensor in moved.values()) and not torch.equal(
        moved["visual.proj"], start["visual"]["visual.proj"])
    (out / "results.json").unlink()
    _, stderr = forks.run(poisoned(tmp_path / "c.py", change, "calls == 2"), "--resume", out / "ckpt-previous.pt", out=out,
                          status=1)                                              # the third of the run, in another process
    assert "step 9 is left out" in stderr and [row["step"] for row in log_of(out)] == [1, 6, 8, 9]


def test_one_processs_nan_is_left_out_by_all(tmp_path):
    script = poisoned(tmp_path / "poisoned.py", "loss * float('nan')", "os.environ['RANK'] == '1' and calls > 2")
    out = tmp_path / "run"
    agent = torchrun(2, *WORDS, "--tasks", "none", "--max-steps", 3, "--max-nonfinite", 3, "--out", out, script=script,
                     out=out)
    assert agent.wait() == 0, Path(f"{out}.stderr").read_text()[-2000:]
    batches = list(training_order(64, 8, 1, 0, range(3)))
    assert [row["nonfinite"] for row in log_of(out) if "nonfinite" in row] == [sorted(batch) for batch in batches[1:]]


def test_accuracy_at_chance_for_long_is_warned_about(forks, tmp_path):
    row = {"step": 0, "robust": 0}
    for robust, expected in ((0, True), (1, True), (1.7, True), (2.2, False), (50, False)):     # 1 % ± .31 % of 1,000 images
        rows = [row | {"step": step, "robust": robust} for step in range(10, 160, 10)]
        assert at_chance(rows, 50, 10, 100) == expected
        assert not at_chance(rows, 60, 10, 100)                                  # 90 steps after the warm-up
    rows = [row | {"step": step, "robust": 9 if step < 500 else 1} for step in range(10, 1000, 10)]
    assert not at_chance(rows[:52], 0, 10, 100) and at_chance(rows[:60], 0, 10, 100)
    assert not at_chance([], 0, 10, 100)
    _, stderr = forks.run("train_tecoa.py", *WORDS, "--tasks", "none", "--lr", 0, "--epochs", 15, "--out", tmp_path / "run",
                          out=tmp_path / "run")
    assert stderr.count("at chance (10 %)") == 1


# ---------------------------------------------------------------------------------------------- disks
def test_a_full_disk_ends_the_run_in_one_line_and_harms_nothing(forks, whole, tmp_path):
    """A quota of 3 MB a file: the first checkpoint fits, those with momentum do not."""
    out = tmp_path / "run"
    _, stderr = forks.run("train_tecoa.py", *WORDS, "--epochs", 3, "--save-every", 5, "--out", out, out=out, status=1,
                          file_limit=3_000_000)
    assert "stopped after step 5: cannot write" in stderr.splitlines()[-1] and f"--resume {out}" in stderr
    assert "Traceback" not in stderr and {path.name for path in out.iterdir()} == {"ckpt.pt", "log.jsonl",
                                                                                  "results_before.json"}
    assert read_checkpoint(out / "ckpt.pt")["step"] == 0
    forks.run("train_tecoa.py", "--resume", out, out=out)
    assert_same(whole, out)


def test_a_small_disk_costs_the_previous_checkpoint_before_it_ends_a_run(whole, tmp_path):
    """On a tmpfs of 9 MB two checkpoints fit, three do not; on one of 5 MB, not even two; on a read-only one, none."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    command = [sys.executable, "train_tecoa.py", *map(str, WORDS), "--epochs", "3", "--save-every", "5", "--out",
               f"{disk}/run"]

    def run(options):
        script = (f'mount -t tmpfs -o {options} tmpfs {disk} && "$@"; status=$?; rm -rf {keep}; '
                  f'cp -r {disk}/run {keep}; exit $status')
        return subprocess.run(["unshare", "-rm", "sh", "-c", script, "-", *command], cwd=ROOT, capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                                           "TRITON_INTERPRET": "0"})
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    done = run("size=9m")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(whole, keep)
    done = run("size=5m")
    assert done.returncode == 1 and "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert read_checkpoint(keep / "ckpt.pt")["step"] == 0 and not list(keep.glob("*.tmp"))
    done = run("ro")
    assert done.returncode == 2 and done.stderr.count("\n") <= 2 and "Read-only" in done.stderr


def test_rows_of_the_log_wait_for_room(tmp_path, capsys):
    """A write that fails or is cut short leaves no half a row, none is lost and none stands twice."""
    log = Log(tmp_path / "log.jsonl", 0)
    real, room = log.file, [True]

    class Disk:
        def write(self, text):
            real.write(text[:len(text) if room[0] else 7])
            return len(text) if room[0] else 7

        def __getattr__(self, name):
            return getattr(real, name)
    log.file = Disk()
    for step in range(1, 6):
        room[0] = step in (1, 4, 5)
        log.write({"step": step})
        assert [row["step"] for row in log_of(tmp_path)] == ([1] if step < 4 else [*range(1, step + 1)])
    assert capsys.readouterr().err.count("warning: ") == 2
    room[0] = False
    log.write({"step": 6})
    with pytest.raises(OSError, match="No space"):
        log.sync()
    real.write(b'{"step": 7')                                                    # killed in the middle of a row
    real.close()
    assert [row["step"] for row in Log(tmp_path / "log.jsonl", 4).rows] == [1, 2, 3, 4]
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------- images, command lines
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 drawn digits as PNG files in a folder of classes."""
    root = tmp_path_factory.mktemp("photos")
    pixels, labels = toyworld.task("digits", "train", 60)
    for number, (image, label) in enumerate(zip(pixels, labels.tolist())):
        path = root / "train" / f"class {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    shutil.copytree(root / "train", root / "val")
    return root


def test_a_damaged_image_is_named_and_another_stands_in(forks, photos, tmp_path):
    """With and without workers the same; and one that vanishes while the run goes on is as a damaged one."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    victim = sorted((root / "train").rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:90])
    words = ("--pretrained", "none", "--dataset", f"folder:{root}", "--tasks", "none", "--batch-size", 10, "--epochs", 2,
             "--save-every", 6)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        _, stderr = forks.run("train_tecoa.py", *words, "--workers", workers, "--out", out, out=out)
        (said,) = {line for line in stderr.splitlines() if line.startswith("warning: image 7 ")}
        assert f"cannot decode {victim}" in said and stderr.count(said) == 2          # once in each epoch
    assert_same(tmp_path / "0", tmp_path / "2")
    (tmp_path / "2" / "results.json").unlink()
    victim.unlink()                                                              # another set of images: not the same run
    _, stderr = forks.run("train_tecoa.py", "--resume", tmp_path / "2", out=out, status=2)
    assert stderr.count("\n") == 1 and "are not those that the run" in stderr


def test_sigterm_to_all_processes_of_a_run_saves_as_well(forks, photos, tmp_path):
    """A scheduler signals the processes that decode, too."""
    out = tmp_path / "run"
    words = ("--pretrained", "none", "--dataset", f"folder:{photos}", "--tasks", "none", "--batch-size", 10, "--epochs", 400,
             "--workers", 2, "--out", out)
    pid = forks.start("train_tecoa.py", *words, out=out)
    when(lambda: steps_done(out) > 5)
    workers = [int(worker) for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for process in (*workers, pid):
        os.kill(process, signal.SIGTERM)
    assert len(workers) == 2 and forks.wait(pid) == 143
    assert "SIGTERM after step" in Path(f"{out}.stderr").read_text() and read_checkpoint(out / "ckpt.pt")["step"] > 5
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_killed_worker_process_ends_training_in_one_line(forks, photos, tmp_path):
    out = tmp_path / "run"
    words = ("--pretrained", "none", "--dataset", f"folder:{photos}", "--tasks", "none", "--batch-size", 10, "--epochs", 400,
             "--workers", 1, "--save-every", 2, "--out", out)
    pid = forks.start("train_tecoa.py", *words, out=out)
    when(lambda: steps_done(out) > 5)
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert forks.wait(pid) == 1
    stderr = Path(f"{out}.stderr").read_text()
    assert "Traceback" not in stderr and "train_tecoa.py: DataLoader worker" in stderr
    forks.run("train_tecoa.py", "--resume", out, "--max-steps", read_checkpoint(out / "ckpt.pt")["step"] + 1, out=out)


def test_random_command_lines_end_with_0_or_with_2_and_one_line(forks, whole, tmp_path):
    """A few options with values of every kind, some of them hostile, for each stage."""
    whole = shutil.copytree(whole, tmp_path / "whole")                           # which some of them overwrite
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(999))
    numbers = ["0", "1", "2", "8", "-1", "1.5", "nan", "inf", "1e9", "", "x", "2147483647", "9" * 25, "0x10", "٣"]
    paths = [tmp_path / "empty", tmp_path / "noise", tmp_path / "absent", whole, whole / "ckpt.pt", "/dev/null", "/proc",
             "..", "", "a\nb", "é\udc80"]
    tasks = ["toy", "digits", "all", "none", ",", "imagenet", "cifar10", "evil", *(f"{kind}:{path}" for kind in
             ("folder", "cache", "wds") for path in paths[:4])]
    both = {"--model": ["toy", "ViT-X", "RN50", "", "../x"], "--pretrained": ["none", "seed²", "openai", *paths],
            "--tasks": tasks, "--data-root": paths, "--limit": numbers, "--workers": ["0", "1", "99999", "x"],
            "--norm": ["linf", "l2", "l1"], "--eps": numbers, "--steps": ["1", "2", "0", "x"], "--step-size": numbers,
            "--batch-size": numbers, "--device": ["cpu", "cuda:99", "meta", ""], "--dtype": ["fp32", "bf16", "int8"],
            "--kernels": ["auto", "triton", "torch", "x"], "--out": paths}
    train = both | {"--dataset": tasks, "--loss": [*LOSSES, "x"], "--labels": ["true", "pseudo"], "--shots": numbers,
                    "--adapt": [*ADAPTATIONS, "full,linear", ""], "--last-blocks": numbers, "--border": numbers,
                    "--tokens": numbers, "--accumulate": numbers, "--max-steps": ["1", "0", "x"], "--lr": numbers,
                    "--warmup": numbers, "--save-every": [*numbers, "1m", "0m", "m"], "--max-nonfinite": numbers,
                    "--resume": [*paths, None]}
    evaluate = both | {"--ckpt": paths, "--attack": ["pgd", "cw", "apgd-t", "square", "x", "pgd,pgd", ""],
                       "--queries": ["1", "0"], "--restarts": ["1", "0"], "--last-iterate": [None],
                       "--templates": ["paper", "openai", "x"], "--interpolate": ["0", "0,1", "2", ""],
                       "--export": paths[:3]}
    rng, statuses = random.Random(0), set()
    for k in range(24):
        script, options, words = (
            ("train_tecoa.py", train, ["--max-steps", "1", "--eval-steps", "1", "--dataset", "digits"]) if k % 2 else
            ("eval_zeroshot.py", evaluate, ["--steps", "1", "--queries", "2"]))
        words += ["--pretrained", "none", "--limit", "16", "--batch-size", "8", "--tasks", "digits", "--out",
                  tmp_path / str(k)]
        for option in rng.sample([*options], rng.randint(1, 3)):
            value = rng.choice(options[option])
            words += [option] if value is None else [option, value]
        pid = forks.start(script, *words, out=tmp_path / "o", cwd=tmp_path)
        status, said = forks.wait(pid), (tmp_path / "o.stderr").read_text(errors="replace")
        where = (words, status, said)
        assert status in (0, 2) and "Traceback" not in said, where
        lines = [line for line in said.splitlines() if line and not line.startswith("warning: ")]
        assert status == 0 or len(lines) == 1 and lines[0].startswith(script), where
        statuses.add(status)
    assert statuses == {0, 2}
