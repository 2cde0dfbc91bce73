"""paper.py: which runs a figure is made of, what it makes of them, what is not made again; cross-checks."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from in_process import here
from PIL import Image
from runs import when

from experiments import costs, crosscheck, figures, runs
from experiments.figures import FIGURES
from harness import checkpoints
from harness.evaluation import lock
from harness.files import source_version
from model import load_clip
from tasks.task import load_task
from toy import pretrain, world

NAMES = [figure.__name__ for figure in FIGURES]


@pytest.fixture
def blank(monkeypatch):
    """The toy's images cost no time: they are black; their labels are what they are."""
    monkeypatch.setattr(world, "draw", lambda objects, *_: torch.zeros(1, dtype=torch.uint8).expand(
        len(objects), 3, 32, 32))


@pytest.fixture
def command(tmp_path, monkeypatch, blank):
    """command(*words) → (what paper.py prints, the runs it made); runs are made up at once in place of the
    stages': robust accuracy is 10 · (1 + seed) on each task, 90 on the one adapted on; clean 50, and 3 more
    with --epochs 100."""
    made = []

    def call(plan, script, words, log, children):
        options = dict(zip(words[::2], words[1::2]))
        out, seed = log.parent, int(options["--seed"])
        out.mkdir(parents=True, exist_ok=True)
        made.append(" ".join([script, *words]))
        if "fare" in made[-1] and plan.args.dataset == "digits":
            raise RuntimeError("train_tecoa.py --loss fare: the loss is nan")
        if script == "train_tecoa.py":
            step = round(256 * float(options["--epochs"]))
            (out / "results.json").write_text(json.dumps({"trained": 1234 * len(words), "step": step}))
            return
        clean, tasks = 50 + 3 * (plan.args.epochs == 100), {}
        for task in options["--tasks"].split(","):
            robust = 90 if task == "seen" else 10 * (1 + seed)
            tasks[task] = {"n": 200, "clean": clean, "robust": robust, "right": 2 * clean, "warnings":
                           ["odd"] * (task == "scans"),
                           "broken_by": {"pgd": 2 * clean - 2 * robust - 4, "square": 4}}
        config = {"eps": float(options.get("--eps", 11)), "limit": int(options["--limit"]),
                  "tasks": options["--tasks"], "steps": int(options["--steps"]), "hardware": "2 CPU cores",
                  "python": "3", "torch": "2"}
        protocol = f"PGD-40; linf ε = {config['eps']:g}/255; 1 start"
        results = {"config": config, "tasks": tasks, "protocol": protocol}
        (out / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "call", call)
    monkeypatch.setattr(pretrain, "pretrained_file", lambda seed: None)

    def run(*words, status=0):
        made.clear()
        done = here("paper.py", *words, status=status)
        return (done.stderr if status else done.stdout), list(made)
    return run


def test_all_figures_of_two_seeds_and_nothing_twice(command, tmp_path):
    printed, made = command("--seeds", "0,1")
    text = (tmp_path / "results" / "paper.md").read_text()
    titles = re.findall(r"^## (.*)", text, re.M)
    assert titles == [figure.__doc__ for figure in FIGURES]
    assert all(f"## {title}" in printed for title in titles)
    for name in NAMES:
        assert f"![{name}]({name}.png)" in text
        assert f"`python paper.py {name} --seeds 0,1`, code {source_version()}; 2 CPU cores" in text
        with Image.open(tmp_path / "results" / f"{name}.png") as picture:
            assert picture.width > 400 and np.asarray(picture.convert("L")).std() > 10
    lines = [line for line in text.splitlines() if line.startswith("| TeCoA | 50.0 ± 0.0 |")]
    # 7.1: n − 1; 90, of the task adapted on, is not in the mean
    assert lines[0] == "| TeCoA | 50.0 ± 0.0 | 15.0 ± 7.1 | 50.0 ± 0.0 | 90.0 ± 0.0 |"
    # PGD to APGD-T; then Square
    (attacks,) = (line for line in lines if "17.0" in line)
    assert attacks.count("17.0 ± 7.1") == 4 and attacks.endswith("| 15.0 ± 7.1 |")
    assert "with a warning: 8 of 72, the first: CLIP, seed 0, scans: odd." in text
    assert "ε = 6, 11, 16/255" in text
    trained = [m for m in made if m.startswith("train")]
    assert len(trained) == len({*trained}) == 2 * 39 and len({*made}) == len(made)
    assert sum("--interpolate" in m for m in made) == 2 * 3
    for words in (["fig7", "losses", "stronger", "--seeds", "0,1"], ["fig4", "--seeds", 1]):
        assert command(*words)[1] == []
    base = tmp_path / "out" / "paper" / source_version() / "loss-tecoa-labels-pseudo-seed1"
    for folder in base.glob("eval*"):
        shutil.rmtree(folder)
    _, again = command("labels", "--seeds", "0,1")
    assert len(again) == 1 and again[0].startswith("eval") and "labels-pseudo-seed1/ckpt.pt" in again[0]


def test_a_new_loss_is_in_its_figure_and_drawing_leaves_matplotlib_alone(tmp_path, monkeypatch):
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []
    monkeypatch.setitem(figures.LOSSES, "trades", None)
    run = figures.losses(SimpleNamespace(out=tmp_path, robust_at="at 8/255"))
    rows = next(run)
    assert rows["trades, finetuned"].train == "--loss trades" and len(rows) == 1 + 2 * len(figures.LOSSES)
    part = {"clean": np.array([50.]), "robust": np.array([20.])}
    lines = run.send({label: {"mean": part} for label in rows})
    assert "| trades, prompts | 50.0 | 20.0 |" in lines and (tmp_path / "losses.png").exists()


def test_other_options_are_other_runs(command, tmp_path):
    """What only evaluation depends on trains nothing anew; options of equal value are not taken for one
    another."""
    kept = command("labels", "--seeds", 0)[1]
    _, made = command("labels", "--seeds", 0, "--limit", 100)
    assert sorted(m.split()[0] for m in kept) == ["eval_zeroshot.py"] * 3 + ["train_tecoa.py"] * 2
    assert len(made) == 3 and all(m.startswith("eval") and "--limit 100" in m for m in made)
    printed, made = command("labels", "--seeds", 0, "--epochs", 100)
    assert len(made) == 5 and "| true labels | 53.0 |" in printed
    _, made = command("labels", "--seeds", 0, "--max-steps", 100)
    assert len(made) == 5 and sum("--max-steps 100" in m for m in made) == 2
    text = (tmp_path / "results" / "paper.md").read_text()
    # replaced by its successor
    assert text.count("## ") == 1 and "--seeds 0 --max-steps 100`" in text
    command("fig7", "--seeds", 0)
    text = (tmp_path / "results" / "paper.md").read_text()
    assert text.count("## ") == 2 and text.index("## Pseudo") < text.index("## Figure 7")


def test_a_failed_run_leaves_the_other_figures(command, tmp_path):
    # full, and prompts
    said = "\n".join(["paper.py: train_tecoa.py --loss fare: the loss is nan"] * 2)
    command("losses", "labels", "--seeds", 0, "--dataset", "digits", status=said)
    text = (tmp_path / "results" / "paper.md").read_text()
    assert "## Pseudo" in text and "## Losses" not in text
    # `seen` is one of the zero-shot tasks now, digits is not
    assert "own classes" in text and "| 90.0" not in text
    assert "17.5" not in text and "| true labels | 50.0 | 20.0 | 50.0 | 10.0 |" in text


def plan_of(grid, **args):
    """What the figures take of a Plan."""
    return SimpleNamespace(grid=grid, train_set=load_task("toy", "train"), robust_at="",
                           args=SimpleNamespace(**{"limit": 200, "batch_size": 128, "epochs": 2} | args))


def test_a_figures_training_sets_have_the_same_number_of_updates(blank):
    plan = plan_of(figures.TOY._replace(shots=(1, 5, 20, 40, 50)))
    rows = next(figures.fig4(plan))
    found = {label: dict(zip(*[iter((point.train or "").split())] * 2)) for label, point in rows.items()}
    # no class has 50
    assert [*rows] == ["CLIP", "1", "5", "20", "40", "all"]
    for shots in (1, 5, 20, 40):
        updates = int(found[f"{shots}"]["--epochs"]) * (400 * shots // 128)
        assert abs(updates - 2 * 128) <= .04 * 256, (shots, updates)
    plan.args.batch_size = 512
    # one of each class is no batch
    assert [*next(figures.fig4(plan))] == ["CLIP", "5", "20", "40", "all"]
    assert figures.fig4.__doc__.endswith("within 4 %")


def test_training_compute_at_equal_updates_and_at_equal_flops(command, tmp_path):
    """The rule that a step of PGD-n costs 2n + 3 forward passes, beside FLOPs counted operator by operator;
    and the runs' compute, from the steps that they made."""
    step = {}
    for n in (1, 2, 5, 10):
        step[n], forward = costs.counted(costs.Row("toy", 8, n, "eager"), 50, ("step", "attack, forward"))
        assert figures.passes(n) == pytest.approx(step[n] / forward, rel=.02)
    printed, made = command("cost", "--seeds", 0)
    words = [" ".join(m.split("--loss tecoa ")[1:]) for m in made if m.startswith("train")]
    trainings = {}
    for n, epochs in re.findall(r"(?:--steps (\d+) )?(?:--epochs ([\d.]+) )?--resume", "\n".join(words)):
        trainings.setdefault(int(n or 2), []).append(256 * float(epochs or 2) * step[int(n or 2)])
    assert {n: len(found) for n, found in trainings.items()} == {1: 3, 2: 2, 5: 3, 10: 3}
    for n, found in trainings.items():
        # GFLOP an image in all: half of the usual, the usual, as many updates as usual
        wanted = [256 * step[2], 512 * step[2], 512 * step[n]][:len(found)]
        assert sorted(found) == pytest.approx(sorted(wanted), rel=.02)
    rows = dict(re.findall(r"^\| (PGD-.*?) \| ([\d.]+) \| 50.0 \| 10.0 \| 50.0 \| 90.0 \|$", printed, re.M))
    assert len(rows) == 11 and rows["PGD-10, equal updates"] == f"{23 / 7:.2f}" == "3.29"
    assert {rows[f"PGD-{n}, equal FLOPs"] for n in (1, 5, 10)} == {rows["PGD-2, equal updates"]} == {"1.00"}
    assert {rows[f"PGD-{n}, half the FLOPs"] for n in (1, 2, 5, 10)} == {"0.50"}
    assert (tmp_path / "results" / "cost.png").exists()


def test_a_set_that_cannot_be_read_is_a_dash_and_not_in_the_mean(command, tmp_path):
    """Whatever the seed; the other sets' numbers are what they were."""
    command("stronger", "labels", "--seeds", "0,1")
    folder = tmp_path / "out" / "paper" / source_version()
    for path in folder.glob("*seed1/eval*/results.json"):
        results = json.loads(path.read_text())
        row = results["tasks"]["digits"]
        results["tasks"]["digits"] = row | {"n": 0, "right": 0, "clean": None, "robust": None, "broken_by": {
            name: 0 for name in row["broken_by"]}}
        for other in set(results["tasks"]) - {"digits"}:
            results["tasks"][other]["robust"] += 5
        path.write_text(json.dumps(results))
    printed, made = command("stronger", "labels", "fig1", "--seeds", "0,1")
    # (10 + 25) / 2
    assert "| true labels | 50.0 ± 0.0 | 17.5 ± 10.6 |" in printed
    assert "| digits | – | – |" in printed and "nan" not in printed
    def read(seed, point):
        (path,) = folder.glob(f"loss-tecoa-seed{seed}/eval-????????/results.json")
        return json.loads(path.read_text())
    plan = SimpleNamespace(args=SimpleNamespace(seeds=[0, 1]), adapted="seen", read=read,
                           run_folder=lambda seed, train: folder / "loss-tecoa-seed0")
    found = runs.gather(plan, figures.TECOA)
    assert np.isnan(found["digits"]["pgd"]).tolist() == [False, True]
    assert found["mean"]["pgd"].tolist() == [12, 22]


def test_the_stages_know_every_option(blank):
    """With the real models' grid as well; and the defaults that paper.py repeats are the stage's."""
    texts = {script: here(script, "--help").stdout for script in ("train_tecoa.py", "eval_zeroshot.py")}
    for plan in (plan_of(figures.TOY), plan_of(figures.PAPER, limit=None)):
        for figure in FIGURES:
            for point in next(figure(plan)).values():
                for script, words in zip(texts, (point.train or "", point.evaluate)):
                    for word in re.findall(r"--[a-z-]+", words):
                        assert f"  {word} " in texts[script] or f"  {word}\n" in texts[script], word
    flat = " ".join(texts["train_tecoa.py"].split())
    assert "passes over the data set, whole or not (default: 10; toy: 2)" in flat
    assert re.search(r"--batch-size [^-]*\(default: 256; toy: 64\)", flat)


def test_a_script_that_fails_is_reported_in_one_line(tmp_path):
    plan = SimpleNamespace(version=source_version(), args=SimpleNamespace(model="toy", processes=1))
    call = partial(runs.call, plan, "train_tecoa.py", ["--bogus", "1", "--lr", "2"], tmp_path / "x" / "log")
    with pytest.raises(RuntimeError, match=r"--lr 2: train_tecoa.py: .*--bogus.*; see .*log$") as error:
        call(runs.Children())
    assert "\n" not in str(error.value)
    plan.version = "other"
    with pytest.raises(RuntimeError, match="sources have changed"):
        call(runs.Children())


def test_nothing_starts_after_an_interrupt():
    children = runs.Children()
    running = children.start([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    children.stop()
    assert running.wait(60) == -signal.SIGTERM
    with pytest.raises(RuntimeError, match="interrupted"):
        children.start(["true"])


@pytest.fixture
def real(tmp_path):
    """The options of small real runs, which adapt on eight photos."""
    for k in range(8):
        path = tmp_path / "photos" / "train" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * k, 0, 0)).save(path)
    return [*"--seeds 0 --pretrained none --max-steps 1 --limit 6 --tasks digits,seen --batch-size 8".split(),
            "--jobs", "1", "--dataset", f"folder:{tmp_path}/photos", "--out", f"{tmp_path}/results"]


def test_the_real_stages_draw_a_figure_once(real, forks, tmp_path, monkeypatch, read_json):
    def call(plan, script, words, log, children):
        log.parent.mkdir(parents=True, exist_ok=True)
        made.append(script)
        forks.run(script, *words, out=log)
    made = []
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "call", call)
    done = here("paper.py", "labels", *real)
    assert "## Pseudo-labels" in done.stdout and len(made) == 5
    (folder,) = (tmp_path / "out" / "paper").glob(f"{source_version()}-*")
    for point in ("clip", "loss-tecoa", "loss-tecoa-labels-pseudo"):
        (path,) = folder.glob(f"{point}-seed0/eval*/results.json")
        clean, robust = (np.mean([row[kind] for row in read_json(path)["tasks"].values()])
                         for kind in ("clean", "robust"))
        assert f"| {clean:.1f} | {robust:.1f} |" in done.stdout
    with Image.open(tmp_path / "results" / "labels.png") as picture:
        assert picture.width > 400
    log = (folder / "loss-tecoa-labels-pseudo-seed0" / "train.log.stdout").read_text()
    assert "of the pseudo-labels are the true ones" in log
    assert here("paper.py", "labels", *real).stdout == done.stdout and len(made) == 5


@pytest.fixture
def real_runs():
    """Where a real command's runs are: removed before and after."""
    def remove():
        for path in (ROOT / "out" / "paper").glob(f"{source_version()}-*"):
            shutil.rmtree(path)
    remove()
    yield ROOT / "out" / "paper"
    remove()


def test_an_interrupt_stops_what_runs_and_what_waits(real, real_runs):
    # SIGINT as a terminal has it: under nohup it is ignored
    process = subprocess.Popen([sys.executable, "paper.py", "losses", *real], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    when(lambda: [*real_runs.glob(f"{source_version()}-*/clip-seed0/eval*/log")], seconds=100)
    # it alone, not its children
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.rstrip().endswith("interrupted; the same command goes on from here"), err
    made = [str(path) for path in real_runs.glob(f"{source_version()}-*/*/*")]
    assert len(made) == 1 and not [*Path(made[0]).glob("results.json")], made
    # nobody of its session is left
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(.1)


def test_two_commands_do_not_make_the_same_runs(command, tmp_path):
    folder = tmp_path / "out" / "paper" / source_version()
    folder.mkdir(parents=True)
    locked = lock(folder)
    said, made = command("labels", "--seeds", 0, status=2)
    assert f"is writing to {folder}" in said and made == []
    os.close(locked)
    for _ in range(2):
        command("labels", "--seeds", 0)


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
    """The table with a checkpoint that is the plain CLIP, so both halves are the same, beside attacks that do
    nothing."""
    def idle(logits, **options):
        return lambda x, y: x
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(
        __version__="0", **{name: idle for name in ("PGD", "APGD", "APGDT", "Square", "FAB")}))
    clip, _ = load_clip("toy", str(small_clip))
    monkeypatch.setattr(crosscheck, "RESULTS", tmp_path)
    monkeypatch.setattr(crosscheck, "load_clip", lambda name, tag: load_clip("toy", str(small_clip)))
    checkpoints.save_checkpoint(tmp_path / "ckpt.pt", clip, {"model": "toy", "pretrained": "none"})
    crosscheck.attacks(tmp_path / "ckpt.pt", limit=12, steps=3, queries=4)
    text = (tmp_path / "attacks.md").read_text()
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line)
    rows = {name: numbers for name, *numbers in cells if name[0] in "PCAFSa" and name != "attack"}
    assert "36 images" in text and text in capsys.readouterr().out
    robust = {name: float(cells[0]) for name, cells in rows.items()}
    assert len(rows) == 10 and all(cells[0] == cells[3] and cells[2] == cells[5] for cells in rows.values())
    whole, fast = (f"{word}, of 3 steps and 4 queries" for word in ("autoattack", "autoattack-fast"))
    assert robust[whole] <= min(robust.values()) and robust["PGD-3"] < robust["Square-4"]
    # the same, where FAB-T finds nothing standing
    assert robust[whole] <= robust[fast] and float(rows[whole][2]) >= float(rows[fast][2])
    # theirs are given all images that are right when clean
    clean = {cells[1] for cells in rows.values() if cells[1]}
    assert len(clean) == 1 and float(*clean) >= max(robust.values())


def test_precisions_are_compared_on_the_same_images(tmp_path, monkeypatch, small_clip):
    """fp32 beside itself in place of the others has the same table, and at scale 100 the same fate of all."""
    monkeypatch.setattr(crosscheck, "RESULTS", tmp_path)
    monkeypatch.setattr(crosscheck, "load_clip", lambda name, tag: load_clip("toy", str(small_clip)))
    monkeypatch.setattr(crosscheck, "task_names", lambda *_: ["digits", "colours"])
    monkeypatch.setattr(crosscheck, "DTYPES", {"fp32": torch.float32, "again": torch.float32})
    clip, _ = load_clip("toy", str(small_clip))
    checkpoints.save_checkpoint(tmp_path / "ckpt.pt", clip, {"model": "toy", "pretrained": "none"})
    crosscheck.precision(tmp_path / "ckpt.pt", limit=8, steps=2)
    text = (tmp_path / "precision.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| fp", "| ag"))]
    assert [row[:2] for row in rows] == [[name, loss] for name in ("fp32", "again")
                                         for loss in ("log-odds", "cross-entropy")]
    assert rows[0][2:] == rows[2][2:] and rows[1][2:] == rows[3][2:] and "(100.0, 0.0)" in rows[0][3]
    # of images that CLIP is sure of, the gradient of the cross-entropy vanishes
    assert float(rows[1][4].split()[-1].strip(")")) > 0
    # a checkpoint that is the plain CLIP evaluates as it does; in bf16 nearly all signs stay, not quite all
    (_, *plain), (_, *again), (_, *random) = (line.strip("| ").split(" | ") for line in text.splitlines()
                                              if line.startswith(("| toy", "| Te", "| Vi")))
    assert plain == again and plain[0] == "16" and float(plain[2]) < float(plain[1])
    assert random[1:5] == ["–"] * 4
    for signs, size in (plain[5:], random[5:]):
        assert 97 < float(signs) < 100 and 99.5 < float(size) <= 100


def test_kept_signs_by_hand(monkeypatch):
    """Two pixels of four keep theirs, with 5 of 8 of the gradient's size."""
    slopes = {torch.float32: [[1., -2, 4, 1]], torch.bfloat16: [[9., 2, 4, -1]]}
    monkeypatch.setattr(crosscheck, "ImageEncoder",
                        lambda clip, dtype: lambda x: x * torch.tensor(slopes[dtype]))
    monkeypatch.setattr(crosscheck, "contrastive_log_odds", lambda z, *_: z.sum(1))
    assert crosscheck.signs_kept(None, None, torch.zeros(1, 4), None).tolist() == [[.5], [5 / 8]]
