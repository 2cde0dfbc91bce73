"""paper.py and figures.py: which runs a figure is made of, what it makes of them, and what is not computed again."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from matplotlib import pyplot
from PIL import Image

import crosscheck
import figures
import paper
import toyworld
from data import load_task

load_task = functools.cache(load_task)                  # 16,384 images are drawn once
NAMES = [figure.__name__ for figure in figures.FIGURES]
TASKS = [*toyworld.TASKS]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words) → (what paper.py prints, the runs it made); runs are made up at once in place of the stages': robust
    accuracy is 10 · (1 + seed) on each task, 90 on the one adapted on; clean 50, and 3 more with --epochs."""
    made = []

    def call(o, script, words, log):
        options = dict(zip(words[::2], words[1::2]))
        out, seed = log.parent, int(options["--seed"])
        out.mkdir(parents=True, exist_ok=True)
        made.append(" ".join([script, *words]))
        if "fare" in made[-1] and o.dataset == "digits":
            raise RuntimeError("train_tecoa.py --loss fare: the loss is nan")
        if script == "train_tecoa.py":
            (out / "results.json").write_text(json.dumps({"trained": 1234 * len(words)}))
            return
        clean, tasks = 50 + 3 * ("--epochs" in o.train_words), {}
        for task in options["--tasks"].split(","):
            robust = 90 if task == "seen" else 10 * (1 + seed)
            tasks[task] = {"n": 200, "clean": clean, "robust": robust, "right": 2 * clean, "warnings":
                           ["odd"] * (task == "scans"), "broken_by": {"pgd": 2 * clean - 2 * robust - 4, "square": 4}}
        config = {"eps": float(options.get("--eps", 8)), "limit": int(options["--limit"]), "tasks": options["--tasks"],
                  "steps": int(options["--steps"]), "hardware": "2 CPU cores", "python": "3", "torch": "2"}
        (out / "results.json").write_text(json.dumps({"config": config, "tasks": tasks, "protocol":
                                                      f"PGD-40; linf ε = {config['eps']:g}/255; 1 start"}))
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper, "call", call)
    monkeypatch.setattr(paper, "load_task", load_task)
    monkeypatch.setattr(toyworld, "pretrained_file", lambda seed: None)

    def run(*words, status=None):
        made.clear()
        monkeypatch.setattr("sys.argv", ["paper.py", *map(str, words)])
        if status is None:
            paper.main()
        else:
            with pytest.raises(SystemExit) as end:
                paper.main()
            assert (end.value.code if isinstance(end.value.code, int) else 1) == status
            return str(end.value.code) if status == 1 else capsys.readouterr().err, list(made)
        return capsys.readouterr().out, list(made)
    return run


def test_all_figures_of_two_seeds_and_nothing_twice(command, tmp_path):
    printed, made = command("--seeds", "0,1")
    text = (tmp_path / "results" / "paper.md").read_text()
    titles = re.findall(r"^## (.*)", text, re.M)
    assert titles == [figure.__doc__ for figure in figures.FIGURES] and all(f"## {title}" in printed for title in titles)
    for name in NAMES:
        assert f"![{name}]({name}.png)" in text
        assert f"`python paper.py {name} --seeds 0,1`, code {paper.source_version()}; 2 CPU cores" in text
        with Image.open(tmp_path / "results" / f"{name}.png") as picture:
            assert picture.width > 400 and np.asarray(picture.convert("L")).std() > 10
    assert pyplot.get_fignums() == []
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| TeCoA | 50")]
    assert cells[0] == ["TeCoA", "50.0 ± 0.0", "15.0 ± 7.1", "50.0 ± 0.0", "90.0 ± 0.0"]      # 7.1: n − 1; 90 is not in it
    (attacks,) = (line for line in text.splitlines() if line.startswith("| TeCoA | 50.0 ± 0.0 | 17"))
    assert attacks.count("17.0 ± 7.1") == 4 and attacks.endswith("| 15.0 ± 7.1 |")       # PGD to APGD-T; then Square
    assert "with a warning: 8 of 72, the first: CLIP, seed 0, scans: odd." in text and "ε = 4, 8, 16/255" in text
    trained = [m for m in made if m.startswith("train")]
    assert len(trained) == len({*trained}) == 2 * 25 and len({*made}) == len(made)
    assert sum("--interpolate" in m for m in made) == 2 * 3
    assert command("fig7", "losses", "stronger", "--seeds", "0,1")[1] == command("fig4", "--seeds", 1)[1] == []
    shutil.rmtree(tmp_path / "out" / "paper" / paper.source_version() / "loss-tecoa-labels-pseudo-seed1" / "eval")
    _, again = command("labels", "--seeds", "0,1")
    assert len(again) == 1 and again[0].startswith("eval") and "labels-pseudo-seed1/ckpt.pt" in again[0]


def test_other_options_are_other_runs(command, tmp_path):
    """What only evaluation depends on trains nothing anew; options of equal value are not taken for one another."""
    kept = command("labels", "--seeds", 0)[1]
    _, made = command("labels", "--seeds", 0, "--limit", 100)
    assert sorted(m.split()[0] for m in kept) == ["eval_zeroshot.py"] * 3 + ["train_tecoa.py"] * 2
    assert len(made) == 3 and all(m.startswith("eval") and "--limit 100" in m for m in made)
    printed, made = command("labels", "--seeds", 0, "--epochs", 100)
    assert len(made) == 5 and "| true labels | 53.0 |" in printed
    _, made = command("labels", "--seeds", 0, "--max-steps", 100)
    assert len(made) == 5 and sum("--max-steps 100" in m for m in made) == 2
    text = (tmp_path / "results" / "paper.md").read_text()
    assert text.count("## ") == 1 and "--seeds 0 --max-steps 100`" in text               # replaced by its successor
    command("fig7", "--seeds", 0)
    text = (tmp_path / "results" / "paper.md").read_text()
    assert text.count("## ") == 2 and text.index("## Pseudo") < text.index("## Figure 7")


def test_a_failed_run_leaves_the_other_figures(command, tmp_path):
    said, made = command("losses", "labels", "--seeds", 0, "--dataset", "digits", status=1)
    assert said.splitlines() == ["paper.py: train_tecoa.py --loss fare: the loss is nan"] * 2      # full, and prompts
    text = (tmp_path / "results" / "paper.md").read_text()
    assert "## Pseudo" in text and "## Losses" not in text
    assert "own classes" in text and "| 90.0" not in text           # `seen` is one of the zero-shot tasks now, digits is not
    assert "17.5" not in text and "| true labels | 50.0 | 20.0 | 50.0 | 10.0 |" in text


def test_a_figures_training_sets_have_the_same_number_of_updates():
    o = SimpleNamespace(train_set=load_task("toy", "train"), shots=(1, 5, 20, 40, 50), batch=128, epochs=2)
    rows = next(figures.fig4(o))
    found = {label: dict(zip(*[iter(point.train.split())] * 2)) for label, point in rows.items() if point.train}
    assert [*rows] == ["CLIP", "1", "5", "20", "40", "all"]         # no class has 50
    for shots in (1, 5, 20, 40):
        updates = int(found[f"{shots}"]["--epochs"]) * (400 * shots // 128)
        assert abs(updates - 2 * 128) <= .04 * 256, (shots, updates)
    o.batch = 512
    assert [*next(figures.fig4(o))] == ["CLIP", "5", "20", "40", "all"]                  # one of each class is no batch
    assert figures.fig4.__doc__.endswith("within 4 %")


def test_the_stages_know_every_option(run, monkeypatch):
    """With the real models' grid as well; and the defaults that paper.py repeats are the stage's."""
    texts = {script: run(script, "--help").stdout for script in ("train_tecoa.py", "eval_zeroshot.py")}
    toy = dict(eps=(4, 8, 16), usual=1, shots=(1, 5), blocks=(1, 2), tokens=(5, 20), tuned=.1, few=40, limit=200, batch=128,
               epochs=2, train_set=load_task("toy", "train"))
    real = toy | dict(eps=(1, 2, 4), usual=0, tuned=None, few=1000, limit=None)
    for options in (toy, real):
        for figure in figures.FIGURES:
            for point in next(figure(SimpleNamespace(**options))).values():
                for script, words in zip(texts, (point.train or "", point.evaluate)):
                    for word in re.findall(r"--[a-z-]+", words):
                        assert f"  {word} " in texts[script] or f"  {word}\n" in texts[script], word
    flat = " ".join(texts["train_tecoa.py"].split())
    assert "passes over the data set (default: 10; toy: 2)" in flat
    assert "images, over all processes (default: 256; toy: 128)" in flat


def test_a_script_that_fails_is_reported_in_one_line(tmp_path, monkeypatch):
    o = SimpleNamespace(version=paper.source_version(), processes=1, toy=True, children=[])
    with pytest.raises(RuntimeError, match=r"--lr 2: train_tecoa.py: .*--bogus.*; see .*log$") as error:
        paper.call(o, "train_tecoa.py", ["--bogus", "1", "--lr", "2"], tmp_path / "x" / "log")
    assert "\n" not in str(error.value)
    o.version = "other"
    with pytest.raises(RuntimeError, match="sources have changed"):
        paper.call(o, "train_tecoa.py", [], tmp_path / "log")


@pytest.fixture
def runs():
    """Where this test's real runs are: removed before and after."""
    def remove():
        for path in (ROOT / "out" / "paper").glob(f"{paper.source_version()}-*"):
            shutil.rmtree(path)
    remove()
    yield ROOT / "out" / "paper"
    remove()


REAL = ("--seeds", "0", "--pretrained", "none", "--max-steps", "1", "--limit", "6", "--tasks", "digits,seen")


def test_the_real_command_draws_a_figure(run, runs, tmp_path, read_json):
    done = run("paper.py", "labels", *REAL, "--out", tmp_path)
    assert "## Pseudo-labels" in done.stdout and "3 of 3 models" in done.stderr
    (folder,) = runs.glob(f"{paper.source_version()}-*")
    for point in ("clip", "loss-tecoa", "loss-tecoa-labels-pseudo"):
        (path,) = folder.glob(f"{point}-seed0/eval*/results.json")
        tasks = read_json(path)["tasks"]
        assert "{clean:.1f} | {robust:.1f} | ".format(**tasks["digits"]) + f"{tasks['seen']['clean']:.1f}" in done.stdout
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.width > 400
    log = (folder / "loss-tecoa-labels-pseudo-seed0" / "train.log").read_text()
    assert "of the pseudo-labels are the true ones" in log


def test_an_interrupt_stops_what_runs_and_what_waits(runs, tmp_path):
    process = subprocess.Popen([sys.executable, "paper.py", "losses", *REAL, "--jobs", "1", "--out", tmp_path], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))      # a nohup's is ignored
    started = time.monotonic()
    while not [*runs.glob(f"{paper.source_version()}-*/clip-seed0/eval*/log")] and time.monotonic() < started + 100:
        time.sleep(.2)
    os.kill(process.pid, signal.SIGINT)                  # it alone, not its children
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.rstrip().endswith("interrupted; the same command goes on from here"), err
    assert len([*runs.glob(f"{paper.source_version()}-*/*")]) == 1
    with pytest.raises(ProcessLookupError):              # nobody of its session is left
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(.1)


def test_wrong_options_are_one_line(command):
    for words, said in (
            ("--seeds 0,x", "whole numbers"), ("fig9", "expected some of fig1"), ("fig1 attacks", "alone"),
            ("attacks --max-steps 5", "takes no options"), ("fig1 --tasks typo", "unknown task"),
            ("fig1 --tasks none", "nothing to evaluate"), ("fig1 --tasks seen", "nothing to evaluate"),
            ("--dataset typo", "unknown task"), (f"--seeds {2**31}", "below"), ("--limit 0", "--limit"),
            ("--model ViT-X", "unknown model"), ("--out /proc/x", "/proc/x"),
            ("--model ViT-B-32-quickgelu --pretrained none", "--data-root")):
        err, made = command(*words.split(), status=2)
        assert err.count("\n") == 1 and said in err and made == [], (words, err)


def test_attacks_are_counted_on_the_same_images(tmp_path, monkeypatch, capsys, small_clip):
    """The table with a checkpoint that is the plain CLIP, so both halves are the same, beside attacks that do nothing."""
    import checkpoints
    import model

    def idle(logits, **options):
        return lambda x, y: x
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(
        __version__="0", **{name: idle for name in ("PGD", "APGD", "APGDT", "Square", "FAB")}))
    clip, _ = model.load_clip("toy", str(small_clip))
    monkeypatch.setattr(crosscheck, "RESULTS", tmp_path)
    monkeypatch.setattr(crosscheck, "load_clip", lambda name, tag: model.load_clip("toy", str(small_clip)))
    checkpoints.save_checkpoint(tmp_path / "ckpt.pt", clip, {"model": "toy", "pretrained": "none"})
    crosscheck.attacks(tmp_path / "ckpt.pt", limit=12, steps=3, queries=4)
    text = (tmp_path / "attacks.md").read_text()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in text.splitlines())
            if len(cells) == 9 and cells[1][0] in "PCASw"}
    fab = rows.pop("what these leave, under FAB-T-3")
    assert "36 images" in text and text in capsys.readouterr().out
    robust = {name: float(cells[0]) for name, cells in rows.items()}
    assert len(rows) == 8 and all(cells[0] == cells[3] and cells[2] == cells[5] for cells in rows.values())
    in_turn = "APGD-CE-3, APGD-T-3, Square-4 in turn"
    assert robust[in_turn] <= min(robust.values()) and robust["PGD-3"] < robust["Square-4"]
    clean = {cells[1] for cells in rows.values() if cells[1]}
    assert len(clean) == 1 and float(*clean) >= max(robust.values())                      # theirs are given all of them
    assert fab[1] == fab[4] == rows[in_turn][0]                                           # but for the last: what is left
