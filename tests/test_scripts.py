"""The two stages as users run them: in subprocesses, small."""
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image

import toyworld
from adversary import run_attacks
from attacks import image_keys, random_start
from kernels.contrastive_loss import cosine_logits
from measure import Operations
from model import ImageEncoder, load_clip


@pytest.fixture(scope="module")
def trained(run, small_clip, once):
    """A short but real adaptation of a briefly pretrained toy CLIP: (its folder, what it printed)."""
    def make(out):
        done = run("train_tecoa.py", "--pretrained", small_clip, "--tasks", "unseen,colours", "--limit", 2000, "--epochs", 4,
                   "--eval-steps", 5, "--out", out)
        Path(f"{out}.stdout").write_text(done.stdout)
    out = once("trained", make)
    return out, Path(f"{out}.stdout").read_text()


def check_schema(results, tasks):
    assert set(results["tasks"]) == set(tasks)
    for row in results["tasks"].values():
        assert {"n", "classes", "clean", "robust", "chance"} <= set(row)
        assert 0 <= row["robust"] <= row["clean"] <= 100 and row["chance"] == pytest.approx(100 / row["classes"])
    for kind in ("clean", "robust"):
        assert results["mean"][kind] == pytest.approx(np.mean([row[kind] for row in results["tasks"].values()]))


def test_training_writes_what_it_promises(trained, read_json):
    out, printed = trained
    assert {"ckpt.pt", "ckpt-previous.pt", "log.jsonl", "results.json", "results_before.json", "examples.png"} == {
        path.name for path in out.iterdir() if path.is_file()}
    for name in ("results.json", "results_before.json"):
        results = read_json(out / name)
        check_schema(results, ["unseen", "colours"])
        assert results["config"]["loss"] == "tecoa" and results["config"]["torch"] == torch.__version__
        assert results["adapted"]["seen"]["n"] == 400
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 15, 20, 30, 40, 45, 50, 60]          # and at the end of an epoch of 15
    assert all(set(line) == {"step", "epoch", "loss", "robust", "lr", "images_per_s"} for line in lines)
    assert lines[1]["lr"] < lines[2]["lr"] > lines[-1]["lr"]                             # warm-up, then cosine
    assert "| task | images | classes | chance | CLIP clean | CLIP robust | tecoa clean | tecoa robust |" in printed
    with Image.open(out / "examples.png") as picture:
        assert picture.width > 200 and np.asarray(picture.convert("L")).std() > 20


def test_training_really_makes_it_robust(trained, read_json):
    before, after = (read_json(trained[0] / name) for name in ("results_before.json", "results.json"))
    assert before["tasks"]["colours"]["clean"] > 80
    assert after["mean"]["robust"] > before["mean"]["robust"] + 8
    first, *_, last = (json.loads(line)["loss"] for line in (trained[0] / "log.jsonl").read_text().splitlines())
    assert last < first


def test_evaluating_the_checkpoint_gives_the_trainings_own_numbers(trained, run, read_json):
    out, _ = trained
    done = run("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", "colours,unseen", "--steps", 5)
    results = read_json(out / "eval-steps5" / "results.json")
    check_schema(results, ["unseen", "colours"])
    assert results["tasks"] == read_json(out / "results.json")["tasks"]
    assert results["config"]["eps"] == 8 and "| **mean of 2** |" in done.stdout


def test_evaluation_in_two_processes_and_other_batches_counts_the_same(trained, run, read_json, tmp_path):
    words = ("--ckpt", trained[0] / "ckpt.pt", "--tasks", "unseen,scans", "--limit", 101, "--steps", 3, "--norm", "l2",
             "--eps", 200)
    found = []
    for k, (processes, batch) in enumerate(((1, 256), (1, 7), (2, 30))):
        run("eval_zeroshot.py", *words, "--batch-size", batch, "--out", tmp_path / str(k), processes=processes)
        found.append(read_json(tmp_path / str(k) / "results.json"))
        check_schema(found[-1], ["unseen", "scans"])
        assert found[-1]["tasks"] == found[0]["tasks"] and found[-1]["tasks"]["scans"]["n"] == 101


def test_attacks_of_the_command_line_differ(trained, run, read_json, tmp_path):
    robust = {}
    for name, words in {"none": ["--eps", 0], "linf": ["--steps", 4], "weak": ["--steps", 1, "--step-size", .5],
                        "l2": ["--norm", "l2", "--eps", 128], "cw": ["--attack", "cw", "--steps", 4]}.items():
        run("eval_zeroshot.py", "--ckpt", trained[0] / "ckpt.pt", "--tasks", "colours", "--limit", 200, *words, "--out",
            tmp_path)
        row = read_json(tmp_path / "results.json")["tasks"]["colours"]
        robust[name] = row["robust"]
    assert robust["none"] == row["clean"] > robust["weak"] > robust["linf"] + 5
    assert robust["l2"] < row["clean"] and abs(robust["cw"] - robust["linf"]) < 8


def visual(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["visual"]


@pytest.mark.parametrize("loss", ["tecoa", "ce"])
def test_two_processes_make_the_update_of_one(run, tmp_path, loss):
    """Three steps at the same global batch, from the same random weights; ce's in four parts of each process's share.
    fp32 sums in another order, nothing else."""
    words = ("--pretrained", "none", "--loss", loss, "--tasks", "none", "--limit", 200, "--batch-size", 64, "--max-steps", 3,
             "--warmup", 0, "--lr", .05)
    for processes in (1, 2):
        parts = 4 if loss == "ce" and processes == 2 else 1
        run("train_tecoa.py", *words, "--accumulate", parts, "--out", tmp_path / str(processes), processes=processes)
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in "12"]
    assert all(logs[0][word] == pytest.approx(logs[1][word], rel=1e-4) for word in ("loss", "robust"))
    start = run("train_tecoa.py", *words, "--lr", 0, "--out", tmp_path / "start") and visual(tmp_path / "start")
    one, two = visual(tmp_path / "1"), visual(tmp_path / "2")
    for name in start:
        moved = (one[name] - start[name]).norm()
        assert moved > 0, name
        assert (one[name] - two[name]).norm() < .02 * moved, name


def test_the_update_is_that_of_an_independent_loop(run, tmp_path):
    """Four steps by hand: PGD on the cross-entropy's sign, then SGD with momentum under warm-up and cosine."""
    run("train_tecoa.py", "--pretrained", "none", "--tasks", "none", "--limit", 128, "--batch-size", 64, "--epochs", 3,
        "--max-steps", 4, "--warmup", 2, "--lr", .02, "--eps", 6, "--steps", 2, "--step-size", 4, "--out", tmp_path)
    clip, tokenizer = load_clip("toy", "none")
    names, template = toyworld.TASKS["seen"]
    with torch.no_grad():
        text = clip.encode_text(tokenizer([template.format(name.lower()) for name in names]))
        text = text / text.norm(dim=-1, keepdim=True)
    images, labels = toyworld.task("seen", "train", 128)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def loss(x, y):
        z = torch.nn.functional.normalize(clip.encode_image((x - mean) / std), dim=-1)
        return torch.nn.functional.cross_entropy(clip.logit_scale.exp() * z @ text.T, y)

    (p, _), weights = clip.visual.patch_size, list(clip.visual.requires_grad_(True).parameters())
    start, velocity = [p.detach().clone() for p in weights], [torch.zeros_like(p) for p in weights]
    for step, lr in enumerate((.01, .02, .02, .02 * (1 + np.cos(np.pi / 4)) / 2)):        # 3 epochs of 2 steps, 4 of them
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


@pytest.mark.parametrize("loss,processes", [("tecoa", 1), ("ce", 2)])
def test_compiled_training_makes_the_same_update_and_compiles_once(run, tmp_path, loss, processes):
    words = ("--pretrained", "none", "--loss", loss, "--tasks", "none", "--limit", 200, "--batch-size", 64, "--max-steps", 5,
             "--warmup", 0, "--lr", .02)
    eager, compiled, start = ("--no-compile",), ("--compile",), ("--lr", 0)
    for name, more in (("eager", eager), ("compiled", compiled), ("start", start)):
        done = run("train_tecoa.py", *words, *more, "--out", tmp_path / name, processes=processes,
                   TORCH_LOGS="recompiles")                                   # says so whenever it does
        assert "Recompiling" not in done.stderr
    eager, compiled, start = (visual(tmp_path / name) for name in ("eager", "compiled", "start"))
    for name in start:
        moved = (eager[name] - start[name]).norm()
        assert moved > 0 and (eager[name] - compiled[name]).norm() < .02 * moved, name
    assert not all(torch.equal(eager[name], compiled[name]) for name in start)    # other arithmetic did run


def test_training_with_triton_kernels_makes_the_same_update(run, tmp_path):
    words = ("--pretrained", "none", "--tasks", "none", "--limit", 16, "--batch-size", 8, "--max-steps", 2, "--warmup", 0,
             "--lr", .02)
    for name in ("torch", "triton"):
        run("train_tecoa.py", *words, "--kernels", name, "--out", tmp_path / name, TRITON_INTERPRET="1")
    run("train_tecoa.py", *words, "--lr", 0, "--out", tmp_path / "start")
    plain, fused, start = (visual(tmp_path / name) for name in ("torch", "triton", "start"))
    for name in start:
        moved = (plain[name] - start[name]).norm()
        assert moved > 0 and (plain[name] - fused[name]).norm() < .02 * moved, name


@pytest.mark.cuda
@pytest.mark.parametrize("words", [["--no-compile", "--kernels", "torch"], ["--no-compile"], ["--compile"]])
def test_training_on_a_gpu_makes_the_update_of_the_cpu(run, tmp_path, words):
    """With Triton's kernels and without; TF32 products and, in the second half, bf16 blocks are all that differs."""
    common = ("--pretrained", "none", "--tasks", "none", "--limit", 200, "--batch-size", 64, "--max-steps", 3, "--warmup", 0,
              "--lr", .02)
    run("train_tecoa.py", *common, "--device", "cpu", "--out", tmp_path / "cpu")
    run("train_tecoa.py", *common, "--lr", 0, "--device", "cpu", "--out", tmp_path / "start")
    for dtype, allowed in (("fp32", .1), ("bf16", .3)):
        run("train_tecoa.py", *common, *words, "--dtype", dtype, "--device", "cuda", "--out", tmp_path / dtype,
            CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
        cpu, found, start = (torch.cat([t.flatten() for t in visual(tmp_path / name).values()]) for name in
                             ("cpu", dtype, "start"))
        assert (found - cpu).norm() < allowed * (cpu - start).norm()


def test_compiled_evaluation_counts_the_same(trained, run, read_json, tmp_path):
    words = ("--ckpt", trained[0] / "ckpt.pt", "--tasks", "colours", "--limit", 150, "--batch-size", 64, "--steps", 2)
    for name in ("--compile", "--no-compile"):
        run("eval_zeroshot.py", *words, name, "--out", tmp_path / name)
    rows = [read_json(tmp_path / name / "results.json")["tasks"]["colours"] for name in ("--compile", "--no-compile")]
    assert all(abs(rows[0][kind] - rows[1][kind]) < 1 for kind in ("clean", "robust"))


def test_same_seed_same_bits_and_other_seed_others(run, tmp_path):
    words = ("--pretrained", "none", "--tasks", "none", "--limit", 128, "--batch-size", 64, "--max-steps", 2, "--warmup", 0)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train_tecoa.py", *words, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (visual(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["visual.proj"], c["visual.proj"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An ImageFolder with train/ and val/ of two of ImageNet's classes, four small noise images each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("n01440764", "n02012849"):
            (root / part / name).mkdir(parents=True)
            for k in range(4):
                Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / part / name / f"{k}.jpg")
    return root


def test_the_real_path_with_random_weights(run, photos, tmp_path, read_json):
    """ViT-B/32 on a folder in ImageNet's layout, then its checkpoint on another folder."""
    model = ("--model", "ViT-B-32-quickgelu", "--pretrained", "none", "--device", "cpu", "--workers", 1)
    run(ROOT / "train_tecoa.py", *model, "--dataset", "imagenet", "--data-root", photos, "--batch-size", 4, "--max-steps", 2,
        "--eval-steps", 1, cwd=tmp_path)
    out = tmp_path / "out" / "ViT-B-32-quickgelu-tecoa-full-batchsize4-maxsteps2-seed0"   # what is not the default
    results = read_json(out / "results.json")
    check_schema(results, ["imagenet"])
    config = results["config"]
    assert (config["eps"], config["steps"], config["step_size"], config["lr"], config["warmup"], config["epochs"]) == (
        1, 2, 1, 1e-5, 1000, 10)
    run("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", f"folder:{photos}", "--steps", 1, "--device", "cpu")
    assert read_json(out / "eval-steps1" / "results.json")["tasks"][f"folder:{photos}"]["n"] == 8


def test_bad_input_ends_in_one_line_and_status_2(run, monkeypatch, capsys, tmp_path):
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
        ("--model ViT-X-99 --pretrained openai", "unknown model"), ("--model ViT-B-32-quickgelu", "--pretrained"),
        ("--dataset imagenet", "--data-root"), (f"--dataset imagenet --data-root {tmp_path / 'absent'}", "no such folder"),
        (f"--dataset folder:{empty}", "empty"), ("--eps -1", "--eps"),
        (f"--dataset folder:{tmp_path / 'split'}", "only one class"),
        ("--eps nan", "--eps"), ("--steps 0", "--steps"), ("--steps 1.5", "--steps"), ("--bogus", "--bogus"),
        ("--loss mse", "--loss"), ("--lim 3", "--lim"), ("--device tpu9", "--device"), ("--tasks digit", "unknown task"),
        ("--batch-size 90000 --pretrained none", "--batch-size"), (f"--pretrained {garbage}", "cannot load"),
        ("--pretrained none --out /proc/nothing", "/proc/nothing"), ("--pretrained none --out /proc", "/proc"),
        ("--device meta", "--device"), ("--seed 99999999999", "--seed"), ("--norm l2", "--eps"),
        ("--dataset scans", "scans"), (f"--dataset folder:{two}", "train"))]
    cases += [("eval_zeroshot.py", words, said) for words, said in (
        (f"--ckpt {tmp_path / 'absent.pt'}", "no checkpoint"), (f"--ckpt {foreign}", "foreign.pt"),
        (f"--ckpt {garbage}", "garbage.pt"), (f"--ckpt {script_file}", "script.pt"),
        (f"--tasks folder:{empty}", "empty"), (f"--tasks folder:{single}", "only one class"),
        ("--tasks none", "nothing to evaluate"), ("--attack fgsm", "--attack"), ("--step-size 0", "--step-size"))]

    def check(stdout, stderr, said):
        assert stderr.count("\n") == 1 and said in stderr and "Traceback" not in stderr, stderr
        assert stdout == ""

    monkeypatch.chdir(tmp_path)                     # for the folders that --out is made of
    for script, words, said in cases:
        with pytest.raises(SystemExit) as end:
            in_process(monkeypatch, script, *words.split())
        assert end.value.code == 2
        check(*capsys.readouterr(), said)
    for script, words, said in (cases[0], cases[-1], ("train_tecoa.py", "--kernels triton --device cpu", "need a GPU")):
        done = run(script, *words.split(), status=2)
        check(done.stdout, done.stderr, said)
    done = run("train_tecoa.py", "--compile", status=2, PATH=os.path.dirname(sys.executable), CC="gcc")
    check(done.stdout, done.stderr, "C compiler")


def test_help_explains_every_option_and_its_default(run):
    for script in ("train_tecoa.py", "eval_zeroshot.py"):
        _, *entries = re.split(r"\n  (?=--)", run(script, "--help").stdout.split("model:\n")[1])
        for entry in entries:
            assert "default" in entry or entry.split()[0] in ("--pretrained", "--data-root", "--limit", "--adapt",
                                                              "--max-steps", "--model"), entry
            assert len(entry.split()) > 4, entry


def in_process(monkeypatch, script, *words):
    """Run a script inside this process, where its calls can be watched."""
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    return runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_text_encoder_runs_once_per_task_not_per_step(monkeypatch, tmp_path):
    calls = []
    encode_text = open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text", lambda self, *a: calls.append(1) or encode_text(self, *a))
    in_process(monkeypatch, "train_tecoa.py", "--pretrained", "none", "--dataset", "digits", "--tasks", "unseen,colours",
               "--limit", 64, "--batch-size", 32, "--max-steps", 4, "--eval-steps", 1, "--device", "cpu", "--out", tmp_path)
    assert len(calls) == 4                          # digits to train on, the two tasks, held-out digits: one chunk each


class Watched(Operations):
    """Counts the FLOPs of all that runs inside, and what would make the CPU wait for a GPU."""
    waits = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out, packet = super().__torch_dispatch__(operator, types, args, kwargs), operator._overloadpacket
        by_mask = packet is torch.ops.aten.index and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += by_mask or packet.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return out


def test_a_step_costs_at_most_62_gflop_an_image_and_waits_for_nothing(monkeypatch, photos, tmp_path):
    """ViT-B/32, PGD-2. Two forwards and input gradients of the attack, one forward and backward of the update; the
    weights' gradients in the attack alone would add 17 each time."""
    marks, step, seen, forward = [], torch.optim.SGD.step, set(), ImageEncoder.forward

    def watched(self, x):
        seen.add((x.requires_grad, *{p.requires_grad for p in self.parameters()}))
        return forward(self, x)
    monkeypatch.setattr(ImageEncoder, "forward", watched)
    with Watched() as count:
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: [step(self), marks.append((count.flops, count.waits))])
        in_process(monkeypatch, "train_tecoa.py", "--model", "ViT-B-32-quickgelu", "--pretrained", "none", "--dataset",
                   f"folder:{photos}", "--batch-size", 1, "--max-steps", 3, "--tasks", "none", "--workers", 0, "--device",
                   "cpu", "--out", tmp_path)
    (_, _), (flops1, waits1), (flops2, waits2) = marks
    assert 55e9 < flops2 - flops1 <= 62e9
    assert waits2 == waits1
    assert seen == {(True, False), (False, True)}   # gradients of the pixels or of all weights, never both


def test_a_bf16_run_reports_fp32_accuracy(run, small_clip, tmp_path, read_json):
    run("train_tecoa.py", "--pretrained", small_clip, "--dtype", "bf16", "--tasks", "colours", "--limit", 200, "--max-steps",
        3, "--warmup", 0, "--eval-steps", 4, "--out", tmp_path)
    run("eval_zeroshot.py", "--ckpt", tmp_path / "ckpt.pt", "--dtype", "fp32", "--tasks", "colours", "--limit", 200,
        "--steps", 4)
    (evaluated,) = (tmp_path / name / "results.json" for name in os.listdir(tmp_path) if name.startswith("eval"))
    assert evaluated.parent.name == "eval-steps4-dtypefp32-limit200"
    assert read_json(evaluated)["tasks"] == read_json(tmp_path / "results.json")["tasks"]


def test_the_command_lines_attack_is_not_blinded_by_confidence():
    """A model that is sure beyond fp32's reach: cross-entropy has no gradient at all, the attack finds its way."""
    head = torch.eye(2)
    x, y, scale = torch.tensor([[.9, .1]]), torch.tensor([0]), 1000.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(cosine_logits(x, head, scale), y), x)
    assert grad.abs().max() == 0
    x_adv, _, by, _, _, zero, _ = run_attacks(torch.nn.Identity(), head, scale, x.detach(), y, torch.arange(1),
                                              names=["pgd"], eps=127.5, steps=5, step_size=51, norm="linf",
                                              last_iterate=True)
    assert torch.allclose(x_adv, torch.tensor([[.4, .6]]), atol=1e-6) and cosine_logits(x_adv, head, scale).argmax(1) != y
    assert by == 0 and not zero


def test_the_readme_shows_the_loop_as_it_is():
    """Each line of its excerpt stands in train_tecoa.py, in that order."""
    (excerpt,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    source = iter([line.strip() for line in (ROOT / "train_tecoa.py").read_text().splitlines()])
    for line in excerpt.splitlines():
        assert line.strip() in source, line                # the iterator goes on from there


def test_the_readmes_ten_line_fork_trains(run, tmp_path):
    """The diff in the README applies to the scripts as they are, and the loss that it adds trains."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    fork = tmp_path / "fork"
    shutil.copytree(ROOT / "kernels", fork / "kernels")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.json"), *ROOT.glob("*.txt")]:
        shutil.copy(path, fork)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=fork, check=True)
    assert 5 <= len(re.findall(r"^[+-](?![+-])", diff, re.M)) <= 14
    new = re.search(r'args\.loss == "(\w+)"', "".join(re.findall(r"^\+.*\n", diff, re.M))).group(1)
    run("train_tecoa.py", "--pretrained", "none", "--loss", new, "--limit", 128, "--batch-size", 64, "--max-steps", 2,
        "--tasks", "none", "--out", tmp_path / "out", cwd=fork)
    assert (tmp_path / "out" / "ckpt.pt").exists()
