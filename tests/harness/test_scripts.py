"""The two stages as users run them, small: in this process, or in others where that is what is tested."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from in_process import here
from PIL import Image
from runs import log_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from attacks import image_keys, random_start
from eval_zeroshot import run_attacks
from experiments.measure import FLOPS
from kernels.contrastive_loss import cosine_logits
from model import ImageEncoder, load_clip
from toy import world


CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def trained(small_clip, once):
    """A short but real adaptation of a briefly pretrained toy CLIP: (its folder, what it printed)."""
    def make(out):
        done = here("train_tecoa.py", "--pretrained", small_clip, "--tasks", "unseen,colours",
                    "--limit", 500, "--batch-size", 32, "--epochs", 4, "--warmup", 25, "--eval-steps", 5,
                    *CPU, "--out", out)
        Path(f"{out}.stdout").write_text(done.stdout)
    out = once("trained", make)
    return out, Path(f"{out}.stdout").read_text()


def check_schema(results, tasks):
    assert set(results["tasks"]) == set(tasks)
    for row in results["tasks"].values():
        assert {"n", "classes", "clean", "robust", "chance"} <= set(row)
        assert 0 <= row["robust"] <= row["clean"] <= 100
        assert row["chance"] == pytest.approx(100 / row["classes"])
    for kind in ("clean", "robust"):
        mean = np.mean([row[kind] for row in results["tasks"].values()])
        assert results["mean"][kind] == pytest.approx(mean)


def visual(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["visual"]


def assert_same_update(one, two, start, within=.02):
    """Two runs' weights differ by a small share of the way that the first came; and it moved all of them."""
    one, two, start = (visual(folder) for folder in (one, two, start))
    for name in start:
        moved = (one[name] - start[name]).norm()
        assert moved > 0 and (one[name] - two[name]).norm() < within * moved, name


@contextmanager
def compiling_without_cpp(**config):
    """Inside, torch.compile traces, and differentiates what it has traced; turning that into C++, which takes
    a minute, is PyTorch's own work. Gives its statistics."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(**config):
        patch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield torch._dynamo.utils.counters["stats"]


# ------------------------------------------------------------------------------ a run and its evaluation
def test_training_writes_what_it_promises(trained, read_json):
    out, printed = trained
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "ckpt-previous.pt", "ckpt.pt", "curves.png", "examples.png", "log.jsonl", "results.json",
        "results_before.json"]
    for name in ("results.json", "results_before.json"):
        results = read_json(out / name)
        check_schema(results, ["unseen", "colours"])
        assert results["config"]["loss"] == "tecoa" and results["config"]["torch"] == torch.__version__
        assert results["adapted"]["seen"]["n"] == 400
    lines = log_of(out)
    # and at the end of an epoch of 15
    assert [line["step"] for line in lines] == [10, 15, 20, 30, 40, 45, 50, 60]
    assert all(set(line) == {"step", "epoch", "loss", "robust", "lr", "images_per_s"} for line in lines)
    # warm-up, then cosine
    assert lines[1]["lr"] < lines[2]["lr"] > lines[-1]["lr"]
    head = "| task | images | classes | chance | CLIP clean | CLIP robust | tecoa clean | tecoa robust |"
    assert head in printed
    for name in ("curves.png", "examples.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 200 and np.asarray(picture.convert("L")).std() > 20


def test_training_really_makes_it_robust(trained, read_json):
    before, after = (read_json(trained[0] / name) for name in ("results_before.json", "results.json"))
    assert before["tasks"]["colours"]["clean"] > 80
    assert after["mean"]["robust"] > before["mean"]["robust"] + 8
    first, *_, last = log_of(trained[0])
    assert last["loss"] < first["loss"]


def test_evaluating_the_checkpoint_gives_the_trainings_own_numbers(trained, read_json):
    out, _ = trained
    done = here("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", "colours,unseen", "--steps", 5)
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert folder.name == "eval-taskscolours,unseen-steps5"
    results = read_json(folder / "results.json")
    check_schema(results, ["unseen", "colours"])
    assert results["tasks"] == read_json(out / "results.json")["tasks"]
    assert results["config"]["eps"] == 11 and "| **mean of 2** |" in done.stdout


def test_attacks_of_the_command_line_differ(trained, read_json, tmp_path):
    robust = {}
    for name, words in {"none": ["--eps", 0], "linf": [], "weak": ["--steps", 1, "--step-size", .5],
                        "l2": ["--norm", "l2", "--eps", 128], "cw": ["--attack", "cw"]}.items():
        here("eval_zeroshot.py", "--ckpt", trained[0] / "ckpt.pt", "--tasks", "colours", "--limit", 100,
             "--steps", 4, *words, "--out", tmp_path, "--overwrite")
        row = read_json(tmp_path / "results.json")["tasks"]["colours"]
        robust[name] = row["robust"]
    assert robust["none"] == row["clean"] > robust["weak"] > robust["linf"] + 5
    assert robust["l2"] < row["clean"] and abs(robust["cw"] - robust["linf"]) < 8


def test_compiled_evaluation_counts_the_same(trained, read_json, tmp_path):
    """Compiled once, whatever number of images still stands: but for one alone, and without a gradient."""
    words = ("--ckpt", trained[0] / "ckpt.pt", "--tasks", "colours", "--limit", 150, "--batch-size", 64,
             "--steps", 2)
    here("eval_zeroshot.py", *words, "--no-compile", "--out", tmp_path / "eager")
    with compiling_without_cpp() as stats:
        here("eval_zeroshot.py", *words, "--compile", "--out", tmp_path / "compiled")
    assert 2 <= stats["unique_graphs"] <= 4
    rows = [read_json(tmp_path / name / "results.json")["tasks"]["colours"] for name in ("compiled", "eager")]
    assert all(abs(rows[0][kind] - rows[1][kind]) < 1 for kind in ("clean", "robust"))


def test_a_bf16_run_reports_fp32_accuracy(small_clip, tmp_path, read_json):
    """Its tables are those of an evaluation, in bf16; what is right when clean is so in fp32."""
    words = ("--tasks", "colours", "--limit", 128, *CPU, "--out")
    here("train_tecoa.py", "--pretrained", small_clip, "--dtype", "bf16", "--max-steps", 3, "--warmup", 0,
         "--eval-steps", 4, *words, tmp_path / "run")
    for dtype in ("bf16", "fp32"):
        here("eval_zeroshot.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--steps", 4, "--dtype", dtype,
             *words, tmp_path / dtype)
    trained, low, full = (read_json(tmp_path / name / "results.json") for name in ("run", "bf16", "fp32"))
    assert trained["tasks"] == low["tasks"] and low["protocol"].endswith("; attacked in bf16, judged in fp32")
    assert [result["config"]["dtype"] for result in (trained, low, full)] == ["bf16", "bf16", "fp32"]
    (low, full), said = (result["tasks"]["colours"] for result in (low, full)), full["protocol"]
    assert low["clean"] == full["clean"] and abs(low["robust"] - full["robust"]) < 1 and "bf16" not in said


# ------------------------------------------------------------------------------ the update
FEW = ("--pretrained", "none", "--tasks", "none", "--limit", 200, "--batch-size", 64, "--warmup", 0,
       "--lr", .02)


def test_the_update_is_that_of_an_independent_loop(tmp_path):
    """Four steps by hand: PGD on the sign of the cross-entropy's gradient, then SGD with momentum under
    warm-up and cosine."""
    here("train_tecoa.py", *FEW, *CPU, "--limit", 128, "--epochs", 3, "--max-steps", 4, "--warmup", 2,
         "--eps", 6, "--steps", 2, "--step-size", 4, "--out", tmp_path)
    clip, tokenizer = load_clip("toy", "none")
    names, template = world.TASKS["seen"]
    with torch.no_grad():
        text = clip.encode_text(tokenizer([template.format(name.lower()) for name in names]))
        text = text / text.norm(dim=-1, keepdim=True)
    images, labels = world.task("seen", "train", 128)
    constants = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in constants)

    def loss(x, y):
        z = torch.nn.functional.normalize(clip.encode_image((x - mean) / std), dim=-1)
        return torch.nn.functional.cross_entropy(clip.logit_scale.exp() * z @ text.T, y)

    (p, _), weights = clip.visual.patch_size, list(clip.visual.requires_grad_(True).parameters())
    start, velocity = [p.detach().clone() for p in weights], [torch.zeros_like(p) for p in weights]
    # 3 epochs of 2 steps, 4 of them
    for step, lr in enumerate((.01, .02, .02, .02 * (1 + np.cos(np.pi / 4)) / 2)):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(step // 2))[64 * (step % 2):][:64]
        x, y = images[order].float() / 255, labels[order]
        # the noise runs over the pixels patch by patch: [B, 3, h, p, w, p] with the patches' numbers first
        patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        x_adv = random_start(patches, 6 / 255, "linf", image_keys(0, step // 2, order))
        x_adv = x_adv.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss(x_adv.requires_grad_(), y), x_adv)
            x_adv = (x + (x_adv.detach() + 4 / 255 * grad.sign() - x).clamp(-6 / 255, 6 / 255)).clamp(0, 1)
        for weight, v, g in zip(weights, velocity, torch.autograd.grad(loss(x_adv, y), weights)):
            v.mul_(.9).add_(g)
            weight.data.sub_(lr * v)
    found = visual(tmp_path)
    for (name, p), before in zip(clip.visual.named_parameters(), start):
        assert (found["visual." + name] - p).norm() < .02 * (p - before).norm(), name


def test_two_processes_compiled_in_micro_batches_make_the_update_of_one(run, tmp_path):
    """Three steps at the same global batch, from the same random weights, the linear head's too: fp32 sums in
    another order, nothing else. It compiles once; not down to C++, which takes a minute."""
    words = (*FEW, "--loss", "ce", "--limit", 96, "--batch-size", 32, "--max-steps", 3, *CPU, "--out")
    here("train_tecoa.py", *words, tmp_path / "one", "--no-compile")
    here("train_tecoa.py", *words, tmp_path / "start", "--lr", 0)
    (tmp_path / "compiled.py").write_text(f"""
import functools, runpy, sys, torch
torch._dynamo.config.error_on_recompile = True
torch.compile = functools.partial(torch.compile, backend="eager")
sys.path.insert(0, "{ROOT}")
runpy.run_path("{ROOT}/train_tecoa.py", run_name="__main__")
""")
    run(tmp_path / "compiled.py", *words, tmp_path / "two", "--compile", "--accumulate", 4, processes=2)
    (one,), (two,) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert all(one[word] == pytest.approx(two[word], rel=1e-4) for word in ("loss", "robust"))
    assert_same_update(tmp_path / "one", tmp_path / "two", tmp_path / "start")


def test_compiled_training_makes_the_same_update(tmp_path):
    words = (*FEW, "--max-steps", 3, *CPU, "--out")
    here("train_tecoa.py", *words, tmp_path / "eager", "--no-compile")
    here("train_tecoa.py", *words, tmp_path / "start", "--lr", 0)
    with compiling_without_cpp(error_on_recompile=True) as stats:
        here("train_tecoa.py", *words, tmp_path / "compiled", "--compile")
    # of the attack and of the update; the target is the labels
    assert stats["unique_graphs"] == 2
    assert_same_update(tmp_path / "eager", tmp_path / "compiled", tmp_path / "start")


def test_training_with_triton_kernels_makes_the_same_update(run, tmp_path):
    """Interpreted: in another process where this one has them on a GPU."""
    words = (*FEW, "--limit", 16, "--batch-size", 8, "--max-steps", 2, *CPU, "--out")
    train = partial(here if kernels.INTERPRET else partial(run, TRITON_INTERPRET="1"), "train_tecoa.py")
    for name in ("torch", "triton"):
        train(*words, tmp_path / name, "--kernels", name)
    train(*words, tmp_path / "start", "--lr", 0)
    assert_same_update(tmp_path / "torch", tmp_path / "triton", tmp_path / "start")


@pytest.mark.cuda
@pytest.mark.parametrize("words", [["--no-compile", "--kernels", "torch"], ["--no-compile"], ["--compile"]])
def test_training_on_a_gpu_makes_the_update_of_the_cpu(tmp_path, words):
    """With Triton's kernels and without; all that differs are TF32 products and, in the second half, bf16
    blocks."""
    common = (*FEW, "--max-steps", 3, "--out")
    here("train_tecoa.py", *common, tmp_path / "cpu", *CPU)
    here("train_tecoa.py", *common, tmp_path / "start", "--lr", 0, *CPU)
    for dtype, allowed in (("fp32", .1), ("bf16", .3)):
        here("train_tecoa.py", *common, tmp_path / dtype, *words, "--dtype", dtype, "--device", "cuda")
        cpu, found, start = (torch.cat([t.flatten() for t in visual(tmp_path / name).values()])
                             for name in ("cpu", dtype, "start"))
        assert (found - cpu).norm() < allowed * (cpu - start).norm()


def test_same_seed_same_bits_and_other_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        here("train_tecoa.py", *FEW, "--max-steps", 2, "--seed", seed, *CPU, "--out", tmp_path / name)
    a, b, c = (visual(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["visual.proj"], c["visual.proj"])
    # the random text encoder is that of the checkpoint's seed, too
    here("eval_zeroshot.py", "--ckpt", tmp_path / "c" / "ckpt.pt", "--tasks", "colours", "--limit", 9,
         "--attack", "square", "--queries", 1, *CPU)


# ------------------------------------------------------------------------------ real models
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An ImageFolder with train/ and val/ of two of ImageNet's classes, two small noise images each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n02012849"):
            (root / split / name).mkdir(parents=True)
            for k in range(2):
                image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
                image.save(root / split / name / f"{k}.jpg")
    return root


def test_the_real_path_with_random_weights(photos, monkeypatch, tmp_path, read_json):
    """open_clip's smallest ViT on a folder in ImageNet's layout, then its checkpoint on another folder."""
    monkeypatch.chdir(tmp_path)
    # eight more attacks each time
    monkeypatch.setattr("eval_zeroshot.attacked_examples", lambda *_, **__: [])
    here("train_tecoa.py", "--model", "ViT-S-32-alt", "--pretrained", "none", "--dataset", "imagenet",
         "--data-root", photos, "--limit", 2, "--batch-size", 2, "--max-steps", 2, "--eval-steps", 1,
         "--workers", 1, *CPU)
    (out,) = (tmp_path / "out").iterdir()
    # what is not at its default
    assert out.name.startswith("ViT-S-32-alt-tecoa-full-pretrainednone-dataroot")
    assert out.name.endswith("-limit2-batchsize2-maxsteps2-evalsteps1-seed0")
    results = read_json(out / "results.json")
    check_schema(results, ["imagenet"])
    config = results["config"]
    papers = {"eps": 1, "steps": 2, "step_size": 1, "lr": 1e-5, "epochs": 10}
    assert config.items() >= papers.items()
    here("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", f"folder:{photos}", "--steps", 1,
         "--workers", 1, *CPU, "--out", tmp_path / "evaluation")
    assert read_json(tmp_path / "evaluation" / "results.json")["tasks"][f"folder:{photos}"]["n"] == 4


class Waits(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU."""
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return operator(*args, **(kwargs or {}))


def test_a_step_costs_at_most_62_gflop_an_image_and_waits_for_nothing(monkeypatch, photos, tmp_path):
    """ViT-B/32, PGD-2. Two forwards and input gradients of the attack, one forward and backward of the
    update; the weights' gradients in the attack alone would add 17 each time."""
    marks, step, seen, forward = [], torch.optim.SGD.step, set(), ImageEncoder.forward

    def watched(self, x):
        seen.add((x.requires_grad, *{p.requires_grad for p in self.parameters()}))
        return forward(self, x)
    monkeypatch.setattr(ImageEncoder, "forward", watched)
    monkeypatch.setattr("harness.training.save_checkpoint", lambda *args, **more: None)
    flops = FlopCounterMode(display=False, custom_mapping=FLOPS)
    # as in experiments/measure.py
    flops.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda: None)
    with flops, Waits() as waits:
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: [
            step(self), marks.append((flops.get_total_flops(), waits.count))])
        here("train_tecoa.py", "--model", "ViT-B-32-quickgelu", "--pretrained", "none", "--dataset",
             f"folder:{photos}", "--batch-size", 1, "--max-steps", 3, "--tasks", "none", "--workers", 0, *CPU,
             "--out", tmp_path)
    (_, _), (flops1, waits1), (flops2, waits2) = marks
    assert 55e9 < flops2 - flops1 <= 62e9
    assert waits2 == waits1
    # gradients of the pixels or of all weights, never both
    assert seen == {(True, False), (False, True)}


def test_the_text_encoder_runs_once_per_task_not_per_step(monkeypatch, tmp_path):
    calls = []
    encode_text = open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text",
                        lambda self, *args: calls.append(1) or encode_text(self, *args))
    here("train_tecoa.py", "--pretrained", "none", "--dataset", "digits", "--tasks", "unseen,colours",
         "--limit", 64, "--batch-size", 32, "--max-steps", 4, "--eval-steps", 1, *CPU, "--out", tmp_path)
    # digits to train on, the two tasks, held-out digits: one chunk each
    assert len(calls) == 4


# ------------------------------------------------------------------------------ command lines
def test_bad_input_ends_in_one_line_and_status_2(run, forks, monkeypatch, tmp_path):
    empty, single = tmp_path / "empty", tmp_path / "single"
    empty.mkdir()
    (single / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(single / "cat" / "a.png")
    shutil.copytree(single, tmp_path / "split" / "train")
    two = tmp_path / "two"
    for name in ("cat", "dog"):
        shutil.copytree(single / "cat", two / name)
    foreign, garbage, script_file = tmp_path / "foreign.pt", tmp_path / "garbage.pt", tmp_path / "script.pt"
    torch.save({"state_dict": {}}, foreign)
    torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)).save(script_file)
    garbage.write_bytes(b"not a checkpoint")
    cases = [("train_tecoa.py", words, said) for words, said in (
        ("--model ViT-X-99 --pretrained openai", "unknown model"),
        ("--model ViT-B-32-quickgelu", "--pretrained"), ("--dataset imagenet", "--data-root"),
        (f"--dataset imagenet --data-root {tmp_path / 'absent'}", "no such folder"),
        (f"--dataset folder:{empty}", "empty"), ("--eps -1", "--eps"),
        (f"--dataset folder:{tmp_path / 'split'} --tasks none", "only one class"),
        ("--eps nan", "--eps"), ("--steps 0", "--steps"), ("--steps 1.5", "--steps"), ("--bogus", "--bogus"),
        ("--report-to mlflow", "tensorboard, wandb"),
        ("--loss mse", "--loss"), ("--lim 3", "--lim"), ("--device tpu9", "--device"),
        ("--tasks digit --limit 9", "unknown task"),
        ("--batch-size 90 --limit 89", "--batch-size"), (f"--pretrained {garbage}", "cannot load"),
        ("--pretrained none --limit 128 --out /proc/nothing", "/proc/nothing"),
        ("--pretrained none --limit 128 --out /proc", "/proc"),
        ("--device meta", "--device"), ("--seed 99999999999", "--seed"), ("--norm l2", "--eps"),
        ("--dataset scans", "scans"), (f"--dataset folder:{two}", "train"))]
    cases += [("eval_zeroshot.py", words, said) for words, said in (
        (f"--ckpt {tmp_path / 'absent.pt'}", "no checkpoint"), (f"--ckpt {foreign}", "foreign.pt"),
        (f"--ckpt {garbage}", "garbage.pt"), (f"--ckpt {script_file}", "script.pt"),
        (f"--tasks folder:{empty}", "empty"), (f"--tasks folder:{single}", "only one class"),
        ("--tasks none", "nothing to evaluate"), ("--attack fgsm", "--attack"),
        ("--step-size 0", "--step-size"))]

    def check(done, said):
        assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""

    # for the folders that --out is made of
    monkeypatch.chdir(tmp_path)
    for script, words, said in cases:
        check(here(script, *words.split(), status=2), said)
    # processes of their own
    for words, said in ((("--attack", "fgsm"), "--attack"),
                        (("--kernels", "triton", "--device", "cpu"), "need a GPU")):
        stdout, stderr = forks.run("eval_zeroshot.py", *words, out=tmp_path / "printed", status=2)
        check(SimpleNamespace(stdout=stdout, stderr=stderr), said)
    done = run("train_tecoa.py", "--compile", status=2, PATH=os.path.dirname(sys.executable), CC="gcc")
    check(done, "C compiler")


def test_help_explains_every_option_and_its_default():
    for script in ("train_tecoa.py", "eval_zeroshot.py"):
        _, *entries = re.split(r"\n  (?=--)", here(script, "--help").stdout.split("model:\n")[1])
        for entry in entries:
            assert "default" in entry or entry.split()[0] in (
                "--pretrained", "--data-root", "--limit", "--adapt", "--max-steps", "--model"), entry
            assert len(entry.split()) > 4, entry


def test_the_command_lines_attack_is_not_blinded_by_confidence():
    """A model that is sure beyond fp32's reach: cross-entropy has no gradient at all, the attack goes on."""
    head = torch.eye(2)
    x, y, scale = torch.tensor([[.9, .1]]), torch.tensor([0]), 1000.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(cosine_logits(x, head, scale), y), x)
    assert grad.abs().max() == 0
    x_adv, _, by, _, _, zero, _ = run_attacks(
        torch.nn.Identity(), head, scale, x.detach(), y, torch.arange(1), names=["pgd"], eps=.5, steps=5,
        step_size=.2, norm="linf", last_iterate=True)
    assert torch.allclose(x_adv, torch.tensor([[.4, .6]]), atol=1e-6)
    assert cosine_logits(x_adv, head, scale).argmax(1) != y and by == 0 and not zero


# ------------------------------------------------------------------------------ the README
def test_the_readme_shows_the_loop_as_it_is():
    """Each line of its excerpt stands in train_tecoa.py, in that order."""
    (excerpt,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    source = iter([line.strip() for line in (ROOT / "train_tecoa.py").read_text().splitlines()])
    for line in excerpt.splitlines():
        # the iterator goes on from there
        assert line.strip() in source, line


def test_the_readmes_fork_trains_and_is_trades(run, tmp_path):
    """Its diff applies to a copy of the sources; the loss that it adds trains, and is Zhang et al.'s."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    added = [line[1:] for line in diff.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert set(re.findall(r"^\+\+\+ b/(.*)", diff, re.M)) == {"losses.py"}
    assert len(added) <= 15 and max(map(len, added)) <= 110
    fork = tmp_path / "fork"
    for path in [*ROOT.glob("*.py"), *(ROOT / room for room in ("kernels", "tasks", "toy", "harness"))]:
        fork.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, fork / path.name)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=fork, check=True)
    run(fork / "train_tecoa.py", *FEW, *CPU, "--limit", 32, "--batch-size", 16, "--loss", "trades",
        "--max-steps", 2, "--out", tmp_path / "out", cwd=fork)
    (last,) = log_of(tmp_path / "out")
    assert last["step"] == 2 and torch.load(tmp_path / "out" / "ckpt.pt")["step"] == 2

    spec = importlib.util.spec_from_file_location("fork_losses", fork / "losses.py")
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    torch.manual_seed(0)
    encoder, net = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)
    head = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    x, x_adv = torch.randint(256, (5, 8), dtype=torch.uint8), torch.rand(5, 8)
    y = torch.tensor([0, 3, 3, 1, 2])
    loss = losses.LOSSES["trades"].make(encoder, head, 9.)
    target = loss.target(x, y, None)
    outer, predicted = loss.outer(net, x_adv, target, x)

    def p(model, x):
        z = torch.nn.functional.normalize(model.double()(x.double()), dim=1)
        return (9 * z @ head.double().T).softmax(1)
    p_adv, p_clean, p_before = p(net, x_adv), p(net, x / 255), p(encoder, x / 255)
    kl = (p_clean * (p_clean / p_adv).log()).sum(1)
    assert torch.allclose(outer.double(), 6 * kl - p_clean[torch.arange(5), y].log(), rtol=1e-4)
    assert torch.equal(predicted, p_adv.argmax(1))
    inner = loss.inner(net.float(), x_adv, target)
    assert torch.allclose(inner.double(), (p_before * (p_before / p_adv).log()).sum(1), rtol=1e-4)
