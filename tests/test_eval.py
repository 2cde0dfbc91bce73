"""eval_zeroshot.py: attacks in turn, verdicts, signs of a broken evaluation, killed runs, saved images."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import Subset

from adversary import attack_list, defined, run_attacks
from checkpoints import save_checkpoint
from cli import DTYPES
from data import batches, load_task
from eval_zeroshot import evaluate, evaluate_tasks, main
from journal import adversarial_folder
from kernels.contrastive_loss import contrast, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, load_clip
from prompts import encode_head
from report import interval, summary

PGD = {"names": ["pgd"], "eps": 8, "steps": 10, "step_size": 2, "norm": "linf"}


@pytest.fixture(scope="module")
def toy(small_clip):
    """(encoder, head, scale, task) of a briefly pretrained toy CLIP on 120 images of ten colours."""
    clip, tokenizer = load_clip("toy", str(small_clip))
    task = load_task("colours", "val", limit=120)
    return ImageEncoder(clip), encode_head(clip, tokenizer, task.class_names, task.template), 100., task


def rightly(toy, count=40):
    """x, y and numbers of images that are classified rightly."""
    encoder, head, scale, task = toy
    x, y, index, _ = next(iter(batches(task, range(120), 120, 0, bad="leave out")))
    right = (contrast(encoder(to_float(x)), head, y, scale)[1] == y).nonzero().squeeze(1)[:count]
    return x[right], y[right], index[right]


# ---------------------------------------------------------------------------------------------- attacks in turn
def test_attack_lists_and_what_is_defined_for_few_classes():
    assert attack_list("pgd,square,pgd") == ["pgd", "square"]
    assert attack_list("cw,autoattack") == ["cw", "apgd-ce", "apgd-t", "square"]
    with pytest.raises(ValueError, match="--attack fgsm: expected a comma list"):
        attack_list("pgd,fgsm")
    names = attack_list("autoattack")
    assert defined(names, 4) == names
    assert defined(names, 3) == ["apgd-ce", "apgd-dlr", "square"]
    assert defined(names, 2) == ["apgd-ce", "square"]
    assert defined(["apgd-dlr"], 2) == ["apgd-ce"] and defined(["apgd-dlr"], 3) == ["apgd-dlr"]


def test_each_attack_sees_only_what_the_ones_before_left_standing(toy):
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    options = {"eps": 5, "steps": 4, "step_size": 1, "norm": "linf", "queries": 30}
    standing, names = torch.ones(len(y), dtype=torch.bool), ["pgd", "apgd-ce", "apgd-t", "square"]
    x_adv, predicted, by, at, passes, *_ = run_attacks(encoder, head, scale, x, y, index, names=names, **options)
    spent = torch.zeros(len(y), dtype=torch.int64)
    for k, name in enumerate(names):                     # one by one, each on the rest, they say the same
        _, _, alone, when, used, *_ = run_attacks(encoder, head, scale, x[standing], y[standing], index[standing],
                                                  names=[name], **options)
        spent[standing] += used
        fallen = standing.nonzero().squeeze(1)[alone >= 0]
        assert torch.equal((by == k).nonzero().squeeze(1), fallen) and torch.equal(at[fallen], when[alone >= 0])
        standing[fallen] = False
    assert torch.equal(standing, by < 0) and 0 < standing.sum() < len(y) and torch.equal(passes, spent)
    full = 5 + 5 + 9 * 5 + 30
    assert (passes[standing] == full).all() and (passes[by == 0] <= 5).all() and passes[by == 0].min() < 5
    assert torch.equal(contrast(encoder(x_adv), head, y, scale)[1], predicted) and torch.equal(predicted == y, standing)
    assert (x_adv - to_float(x)).abs().max() <= 5 / 255 + 1e-6


def test_what_a_second_look_clears_stands_and_meets_the_next_attack(toy):
    """A model that errs only where a gradient is asked for, as rounding may: neither attack may take it at its word."""
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    used = []

    def fickle(x):
        used.append(len(x))
        z = encoder(x)
        return -z if x.requires_grad else z
    _, predicted, by, at, passes, *_ = run_attacks(fickle, head, scale, x, y, index, **PGD | {
        "names": ["pgd", "apgd-ce"], "eps": .1, "steps": 3})
    assert (by == -1).all() and (at == -1).all() and torch.equal(predicted, y) and (passes == 8).all()
    assert used.count(len(y)) == len(used) > 4           # the second attack was given all of them


def test_restarts_only_ever_break_more_and_start_elsewhere(toy):
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    weak = PGD | {"eps": 6, "steps": 1, "step_size": 6}
    one, four = (run_attacks(encoder, head, scale, x, y, index, **weak | {"restarts": r})[2] >= 0 for r in (1, 4))
    assert (four >= one).all() and four.sum() > one.sum()


def test_the_last_iterate_breaks_no_more_than_any(toy):
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy, 120)
    strange = PGD | {"steps": 3, "step_size": 16}        # jumps from wall to wall
    any_, last = (run_attacks(encoder, head, scale, x, y, index, **strange | {"last_iterate": last})
                  for last in (False, True))
    assert ((any_[2] >= 0) >= (last[2] >= 0)).all() and (any_[2] >= 0).sum() > (last[2] >= 0).sum()
    assert (last[4] == 4).all() and set(last[3].tolist()) == {-1, 3}
    _, head, scale, task = toy
    result = evaluate_tasks(encoder, {task.name: head}, scale, [task], strange | {"last_iterate": True}, label="",
                            batch_size=64)["tasks"]["colours"]
    assert not any("second half" in text for text in result["warnings"])


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_on_two_and_three_classes(toy, classes):
    encoder, head, scale, task = toy
    y = torch.tensor([task.images[i][1] for i in range(120)])
    few = task._replace(images=Subset(task.images, (y < classes).nonzero().flatten().tolist()))
    options = PGD | {"names": attack_list("autoattack"), "steps": 5, "queries": 20}
    result = evaluate_tasks(encoder, {task.name: head[:classes]}, scale, [few], options, label="", batch_size=64)
    row = result["tasks"]["colours"]
    assert row["attacks"] == (["apgd-ce", "square"] if classes == 2 else ["apgd-ce", "apgd-dlr", "square"])
    assert row["n"] == len(few.images) and sum(row["broken_by"].values()) + row["standing"] == row["right"] > 5


# ---------------------------------------------------------------------------------------------- precision
def test_no_precision_and_no_scale_blinds_the_attack(toy):
    """A confident model in three precisions at three logit scales; cross-entropy beside it, which is blind."""
    encoder, head, _, task = toy
    x, y, index = rightly(toy, 100)
    clean, fate, share = to_float(x), {}, {}
    for name, dtype in DTYPES.items():
        encoder.dtype = dtype
        for scale in (20., 100., 1000.):
            x_adv, *_, zero, uphill = run_attacks(encoder, head, scale, x, y, index, **PGD | {"steps": 5})
            assert not zero.any() and uphill.all()
            encoder.dtype = torch.float32                # what is reported comes from fp32
            fate[name, scale] = contrast(encoder(x_adv), head, y, scale)[1] == y
            encoder.dtype = dtype
            leaf = clean.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(cosine_logits(encoder(leaf), head, scale), y)
            (grad,) = torch.autograd.grad(loss.to(dtype), leaf)
            share[name, scale] = float((grad == 0).flatten(1).all(1).float().mean())
    encoder.dtype = torch.float32
    robust = {key: 100 * value.float().mean().item() for key, value in fate.items()}
    print({key: (round(robust[key], 1), round(100 * share[key], 1)) for key in robust})
    for scale in (20., 100., 1000.):
        values = [robust[name, scale] for name in DTYPES]
        assert max(values) - min(values) <= 1, robust
    assert share["fp16", 1000.] > .3 and share["fp32", 20.] == 0


# ---------------------------------------------------------------------------------------------- signs of a broken one
class Straight(torch.autograd.Function):
    """The same pixels, and a gradient that is nonsense or none."""
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_masked_gradients_raise_the_warnings(toy):
    encoder, head, scale, task = toy
    options = PGD | {"names": ["apgd-ce"]}

    def row(net, names=("apgd-ce",), **more):
        return evaluate_tasks(net, {task.name: head}, scale, [task], options | {"names": list(names), **more}, label="",
                              batch_size=50)["tasks"][task.name]
    honest = row(encoder, steps=40)
    assert honest["warnings"] == [] and honest["zero_gradients"] == 0
    none = row(lambda x: encoder(Straight.apply(x, 0.)))
    assert none["zero_gradients"] == 100 and none["robust"] > honest["robust"] + 20
    assert "100.0 % of the input gradients are exactly zero" in none["warnings"][0]
    backwards = row(lambda x: encoder(Straight.apply(x, -1.)))
    assert backwards["zero_gradients"] == 0 and backwards["robust"] > honest["robust"] + 20
    assert "the loss falls where its gradient says" in backwards["warnings"][0]
    assert "a probe with Square broke" in row(lambda x: encoder(Straight.apply(x, -1.)), eps=16)["warnings"][1]
    with_square = row(lambda x: encoder(Straight.apply(x, -1.)), ["apgd-ce", "square"], queries=200)
    assert any(f"Square, which sees no gradients, broke {with_square['broken_by']['square']} images" in text
               for text in with_square["warnings"]) and with_square["robust"] < backwards["robust"]
    slow = row(encoder, ["pgd"], steps=20, step_size=.3)
    assert any("broke in the second half of the steps" in text for text in slow["warnings"])


def test_summary_of_records_by_hand():
    wrong = {"image": 0, "label": 1, "clean": 0}
    right = {"label": 1, "clean": 1, "adversarial": 0, "passes": 4, "zero": False, "uphill": True}
    records = [wrong, *({"image": i, **right, "by": by, "at": at} for i, (by, at) in enumerate(
        [("pgd", 0), ("pgd", 5), ("pgd", 6), ("square", 90), (None, -1), (None, -1)], 1)), {"image": 7, "error": "gone"}]
    records[5] |= {"probe": False}
    row = summary(records, ["pgd", "square"], 4, 5)
    assert row | {"warnings": []} == {
        "n": 7, "classes": 4, "clean": 600 / 7, "robust": 200 / 7, "chance": 25, "right": 6, "standing": 2,
        "clean_interval": interval(6, 7), "robust_interval": interval(2, 7), "attacks": ["pgd", "square"],
        "broken_by": {"pgd": 3, "square": 1}, "passes": round(24 / 7, 2), "zero_gradients": 0, "left_out": 1, "warnings": []}
    assert row["warnings"] == ["1 of 8 images could not be read"]                         # one image each is no other sign
    records.pop()
    records[4] = records[4] | {"zero": True}
    assert "16.7 %" in summary(records, ["pgd", "square"], 4, 5)["warnings"][0]
    records = [record | {"uphill": "clean" not in record or k > 3} for k, record in enumerate(records)]
    assert "3 images (50.0 %)" in summary(records, ["pgd", "square"], 4, 5)["warnings"][1]
    assert summary([], ["pgd"], 2, 1)["robust"] == 0


def test_wilsons_interval():
    assert interval(0, 0) == (0, 100) and interval(0, 10) == (0, 27.75) and interval(10, 10) == (72.25, 100)
    assert interval(50, 100) == (40.38, 59.62) and interval(81, 263) == (25.53, 36.62)   # Newcombe 1998, table 1


# ---------------------------------------------------------------------------------------------- the command
@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words) → what `python eval_zeroshot.py *words` prints, run inside this process."""
    def call(*words, status=0):
        monkeypatch.setattr("sys.argv", ["eval_zeroshot.py", *map(str, words)])
        ended = 0
        try:
            main()
        except SystemExit as end:
            ended = end.code
        printed = capsys.readouterr()
        assert ended == status, printed.err
        assert not status or printed.err.count("\n") == 1
        return printed.out + printed.err * bool(status)
    return call


def words_for(small_clip, out, *more):
    return ["--pretrained", small_clip, "--tasks", "colours,scans", "--limit", 90, "--out", out, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("attack", ["pgd,apgd-ce,apgd-t,square"])
def test_batches_and_processes_change_nothing(run, command, small_clip, tmp_path, read_json, attack):
    more = ("--attack", attack, "--steps", 6, "--queries", 25)
    for k, (batch, processes) in enumerate([(64, 1), (1, 1), (7, 1), (30, 2)]):
        words = words_for(small_clip, tmp_path / str(k), *more, "--batch-size", batch)
        command(*words) if processes == 1 else run("eval_zeroshot.py", *words, processes=processes)
    found = [lines(tmp_path / str(k) / "images.jsonl") for k in range(4)]
    rows = [read_json(tmp_path / str(k) / "results.json")["tasks"] for k in range(4)]
    assert [row["n"] for row in rows[0].values()] == [90, 90] and len(found[0]) == 181
    for other, others_rows in zip(found[1:], rows[1:]):
        assert other == found[0] and others_rows == rows[0]
    assert {path.name for path in (tmp_path / "3").iterdir()} == {"images.jsonl", "results.json"}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(command, small_clip, tmp_path, read_json):
    words = ["--attack", "pgd,square", "--steps", 10, "--queries", 150, "--batch-size", 10, "--save-adv", tmp_path / "adv"]
    whole = command(*words_for(small_clip, tmp_path / "whole", *words[:-2]))
    out = tmp_path / "killed"
    killed = [sys.executable, "eval_zeroshot.py", *map(str, words_for(small_clip, out, *words))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = 0
    for least in (25, 110):
        process = subprocess.Popen(killed, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   text=True)
        until = time.time() + 100
        while time.time() < until and not ((out / "images.jsonl").exists()
                                           and len((out / "images.jsonl").read_text().splitlines()) > least):
            assert process.poll() is None
            time.sleep(.01)
        process.send_signal(signal.SIGKILL)
        printed = process.communicate()[0]
        assert least == 25 or f"going on: {done} of 180 images are done" in printed
        with open(out / "images.jsonl", "a") as file:
            file.write('{"task": "colours", "im')        # as if killed within a line
        done = len({(r["task"], r["image"]) for r in lines_that_are_whole(out / "images.jsonl")[1:]})
        results = json.loads((out / "results.json").read_text()) if done >= 90 else {}
        assert results.get("unfinished", ["scans"]) == ["scans"]
    finished = command(*words_for(small_clip, out, *words))
    assert f"going on: {done} of 180" in finished
    assert lines(out / "images.jsonl") == lines(tmp_path / "whole" / "images.jsonl")
    assert read_json(out / "results.json")["tasks"] == read_json(tmp_path / "whole" / "results.json")["tasks"]
    assert [line for line in finished.splitlines() if line.startswith("|")] == [
        line for line in whole.splitlines() if line.startswith("|")]
    saved = [i for path in (tmp_path / "adv" / "colours").glob("*.npz") for i in np.load(path)["image"].tolist()]
    right = [r["image"] for r in lines(out / "images.jsonl")[1:] if r["task"] == "colours" and r["clean"] == r["label"]]
    assert sorted(saved) == right                        # each once, whenever it was killed
    results = (out / "results.json").read_text()
    again = command(*words_for(small_clip, out, *words))                 # finished: nothing to do
    assert "going on: 180 of 180" in again and (out / "results.json").read_text() == results
    less = command(*words_for(small_clip, out, *words[:-2], "--tasks", "colours"))
    assert "going on: 90 of 90" in less and len(lines(out / "images.jsonl")) == 181    # scans' are kept
    saved_elsewhere = command(*words_for(small_clip, out, *words[:-1], tmp_path / "new"))
    assert f"going on: {180 - less_right(out)} of 180" in saved_elsewhere         # what is not saved is done again
    assert (out / "results.json").read_text().replace("/new", "/adv") == results
    refused = command(*words_for(small_clip, out, *words, "--eps", 4), status=2)
    assert "holds the images of another evaluation" in refused
    other = command(*words_for(small_clip, out, *words[:-2], "--eps", 4))     # another question: anew
    assert "going on" not in other


def less_right(out):
    """How many images were attacked."""
    return sum("adversarial" in record for record in lines(out / "images.jsonl"))


def test_an_unfinished_evaluation_is_not_overwritten_by_another(command, small_clip, tmp_path):
    words = words_for(small_clip, tmp_path, "--steps", 2)
    command(*words)
    (tmp_path / "results.json").unlink()                 # as if killed before its first results
    before = (tmp_path / "images.jsonl").read_bytes()
    for other in (["--eps", 4], ["--steps", 3], ["--templates", "openai"], ["--data-root", tmp_path], ["--dtype", "bf16"]):
        done = command(*words, *other, status=2)
        assert "holds an unfinished evaluation of something else" in done
    assert (tmp_path / "images.jsonl").read_bytes() == before
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    done = command(*words, status=2)
    assert "another evaluation is writing to" in done
    os.close(folder)
    command("--pretrained", small_clip, "--tasks", "none", "--export", tmp_path / "clip", "--out", tmp_path)
    assert (tmp_path / "images.jsonl").read_bytes() == before


def test_nan_is_wrong_and_warned_about(toy):
    encoder, head, scale, task = toy

    def breaks(x):                                       # where a pixel has been moved
        z = encoder(x)
        moved = (255 * x - (255 * x).round()).abs().flatten(1).amax(1) > 1e-3
        return torch.where(moved[:, None], torch.nan, z)
    (row,) = evaluate_tasks(breaks, {task.name: head}, scale, [task], PGD | {"steps": 2}, label="",
                            batch_size=64)["tasks"].values()
    assert row["robust"] == 0 and f"the model gave NaN for {row['right']} images" in row["warnings"][0]


def lines_that_are_whole(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def test_saved_images_are_what_was_judged(command, small_clip, toy, tmp_path, read_json):
    encoder, head, scale, _ = toy
    command(*words_for(small_clip, tmp_path, "--save-adv", tmp_path / "adv", "--examples", "--batch-size",
                                       32, "--steps", 10))
    row = read_json(tmp_path / "results.json")["tasks"]["colours"]
    saved = [dict(np.load(path)) for path in sorted((tmp_path / "adv" / "colours").iterdir())]
    assert all(json.loads(str(part.pop("evaluation")))["eps"] == 8 for part in saved)
    saved = {name: torch.from_numpy(np.concatenate([part[name] for part in saved])) for name in saved[0]}
    assert saved["x"].dtype == torch.uint8 and saved["x_adv"].dtype == torch.float32 and len(saved["x"]) == row["right"]
    assert (saved["x_adv"] - to_float(saved["x"])).abs().max() <= 8 / 255 + 1e-6
    predicted = contrast(encoder(saved["x_adv"]), head, saved["label"], scale)[1]
    assert torch.equal(predicted, saved["adversarial"]) and (predicted == saved["label"]).sum() == row["standing"]
    task = load_task("colours", "val", limit=90)
    assert all(torch.equal(task.images[i][0], x) for i, x in zip(saved["image"].tolist(), saved["x"]))
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width > 200 and np.asarray(picture.convert("L")).std() > 20


def test_a_tasks_name_never_leads_out_of_the_folder(tmp_path):
    names = ("folder:/etc/passwd", "folder:../../x", "..", "a/../../b", "wds:~/x", "folder:a/b", "folder:a-b", "digits")
    folders = [adversarial_folder(tmp_path, name) for name in names]
    assert all(folder.parent == tmp_path and folder.name not in ("", ".", "..") for folder in folders)
    assert len(set(folders)) == len(names) and folders[-1].name == "digits"


def test_unreadable_images_are_left_out_and_named(command, small_clip, tmp_path, read_json):
    rng = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "photos" / name / f"{k}.png")
    (tmp_path / "photos" / "red" / "1.png").write_bytes((tmp_path / "photos" / "red" / "1.png").read_bytes()[:500])
    (tmp_path / "photos" / "blue" / "0.png").write_bytes(b"")
    for k, (workers, batch) in enumerate([(0, 3), (2, 1)]):
        out = tmp_path / str(k)
        done = command("--pretrained", small_clip, "--tasks", f"folder:{tmp_path / 'photos'}", "--steps", 2,
                   "--workers", workers, "--batch-size", batch, "--examples", "--out", out)
        row = read_json(out / "results.json")["tasks"][f"folder:{tmp_path / 'photos'}"]
        assert (row["n"], row["left_out"]) == (6, 2)
        assert done.count("left out of") == 2 and "red/1.png" in done and "blue/0.png" in done


def test_all_takes_what_is_there_and_says_what_is_not(command, tmp_path, read_json):
    for name in ("n01440764", "n02012849"):
        (tmp_path / "imagenet" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "imagenet" / "val" / name / "a.png")
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat" / "2750").mkdir()              # half a download
    model = ("--model", "ViT-B-32-quickgelu", "--pretrained", "none", "--out", tmp_path / "out", "--data-root")
    done = command(*model, tmp_path, "--steps", 1, "--templates", "openai", "--workers", 0)
    assert list(read_json(tmp_path / "out" / "results.json")["tasks"]) == ["imagenet"]
    missing = [line.split(": ")[1] for line in done.splitlines() if line.startswith("not evaluated: ")]
    assert len(missing) == 16 and "imagenet" not in missing and "eurosat" in missing
    assert sorted(read_json(tmp_path / "out" / "results.json")["missing"]) == sorted(missing)
    assert "not evaluated: cars: get it with hf download clip-benchmark/wds_cars" in done
    done = command(*model, tmp_path / "eurosat", status=2)
    assert "nothing to evaluate under" in done


def test_foreign_checkpoints_and_export_through_the_command(command, small_clip, toy, tmp_path, read_json):
    """Our weights in the TeCoA authors' clothes, and out again as open_clip's, give the same numbers."""
    encoder, *_ = toy
    state = {"module." + name: tensor.half() for name, tensor in encoder.visual.state_dict().items()}
    theirs, exported = tmp_path / "theirs.pth.tar", tmp_path / "clip" / "open_clip_model.safetensors"
    torch.save({"epoch": 3, "vision_encoder_state_dict": state, "state_dict": {}, "optimizer": {}}, theirs)
    for name, words in {"a": ["--pretrained", small_clip, "--export", exported.parent],
                        "b": ["--pretrained", small_clip, "--ckpt", theirs], "c": ["--pretrained", exported],
                        "d": ["--pretrained", "none", "--ckpt", exported]}.items():
        command("--model", "toy", "--tasks", "colours", "--limit", 90, "--steps", 5, *words, "--out",
            tmp_path / name)
    rows = [read_json(tmp_path / name / "results.json")["tasks"]["colours"] for name in "abcd"]
    assert rows[0] == rows[2] == rows[3] and abs(rows[1]["clean"] - rows[0]["clean"]) < 2 and rows[0]["clean"] > 50


def test_interpolation_is_between_the_weights(command, small_clip, tmp_path, read_json):
    """α = 0 is the plain CLIP, 1 the checkpoint, to the bit; ¼ is the CLIP whose weights were mixed by hand."""
    clip, mixed = (load_clip("toy", str(small_clip))[0] for _ in range(2))
    start, gen = {name: t.clone() for name, t in clip.state_dict().items()}, torch.Generator().manual_seed(0)
    moved = {name: t + .8 * t.std() * torch.randn(t.shape, generator=gen) for name, t in start.items() if t.ndim == 2}
    clip.load_state_dict({name: t for name, t in moved.items() if name.startswith("visual.")}, strict=False)
    ckpt, by_hand = tmp_path / "run" / "ckpt.pt", tmp_path / "mixed.pt"
    ckpt.parent.mkdir()
    config = {"model": "toy", "pretrained": str(small_clip), "norm": "linf", "eps": 4.}
    save_checkpoint(ckpt, clip, config)
    mixed.load_state_dict({name: .75 * start[name] + .25 * t for name, t in clip.state_dict().items()})
    torch.save(mixed.state_dict(), by_hand)
    words = ("--tasks", "colours,textures", "--limit", 90, "--steps", 4)
    said = command("--ckpt", ckpt, *words, "--interpolate", "0,.25,1")
    command("--pretrained", small_clip, *words, "--eps", 4, "--out", tmp_path / "plain")
    command("--pretrained", by_hand, *words, "--eps", 4, "--out", tmp_path / "by_hand")
    names = {"0": "eval-steps4-limit90-interpolate0.0", "0.25": "eval-steps4-limit90-interpolate0.25",
             "1": "eval-steps4-limit90"}
    found = {alpha: read_json(ckpt.parent / name / "results.json") for alpha, name in names.items()}
    assert found["0"]["tasks"] == read_json(tmp_path / "plain" / "results.json")["tasks"]
    hand = read_json(tmp_path / "by_hand" / "results.json")
    assert all(abs(found["0.25"]["mean"][kind] - hand["mean"][kind]) < 1.5 for kind in ("clean", "robust"))
    means = [found[alpha]["mean"] for alpha in names]
    assert means[0]["clean"] > means[2]["clean"] + 4 and means[1] not in (means[0], means[2])
    for alpha, mean in zip(names, means):
        assert f"| {alpha} | {mean['clean']:.1f} | {mean['robust']:.1f} |\n" in said
    assert "180 of 180 images are done" in command("--ckpt", ckpt, *words)               # α = 1 is the checkpoint itself
    exported = tmp_path / "half"
    command("--ckpt", ckpt, "--tasks", "none", "--interpolate", ".5", "--export", exported)
    half = open_clip.create_model("toy", str(exported / "open_clip_model.safetensors")).state_dict()
    for name, t in clip.state_dict().items():
        assert torch.allclose(half[name], (start[name] + t) / 2, atol=1e-6), name
    command("--ckpt", ckpt, *words, "--interpolate", "0,.25", "--out", tmp_path / "both")
    assert read_json(tmp_path / "both" / "interpolate0.25" / "results.json")["tasks"] == found["0.25"]["tasks"]
    save_checkpoint(ckpt, clip, config, prompts={"tokens": torch.zeros(2, 96)})
    for more, why in ((("--ckpt", ckpt, "--interpolate", "1,.5"), "visual prompts"),
                      (("--interpolate", "0.5"), "give --ckpt"), (("--ckpt", ckpt, "--interpolate", "0,2"), "from 0 to 1"),
                      (("--ckpt", ckpt, "--interpolate", "half"), "--interpolate"),
                      (("--model", "toy", "--ckpt", by_hand, "--interpolate", ".5"), "a whole CLIP"),
                      (("--ckpt", ckpt, "--interpolate", "0,1", "--export", exported), "takes one model")):
        assert why in command(*more, status=2)


def test_the_openai_ensemble_is_another_head(small_clip):
    clip, tokenizer = load_clip("toy", str(small_clip))
    one = encode_head(clip, tokenizer, ["red", "blue"], "a photo of a {}")
    both = encode_head(clip, tokenizer, ["red", "blue"], ["a photo of a {}", "{}"])
    assert one.shape == both.shape and not torch.allclose(one, both, atol=1e-3)


def test_what_is_not_counted_in_the_mean(toy):
    """A set of which nothing can be read, and Country-211, which is not one of the paper's sixteen."""
    encoder, head, scale, task = toy

    class Damaged(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise ValueError(f"cannot decode {index}.png")
    tasks = [task._replace(name=name, images=images) for name, images in (
        ("pets", Subset(task.images, range(30))), ("dtd", Damaged()), ("country211", Subset(task.images, range(30, 40))))]
    result = evaluate_tasks(encoder, {task.name: head for task in tasks}, scale, tasks, PGD | {"steps": 3}, label="",
                            batch_size=16)
    rows = result["tasks"]
    assert result["mean"] == {"tasks": 1, "clean": rows["pets"]["clean"], "robust": rows["pets"]["robust"]}
    assert (rows["dtd"]["n"], rows["dtd"]["left_out"], rows["country211"]["n"]) == (0, 3, 10)
    assert rows["dtd"]["warnings"] == ["3 of 3 images could not be read"]


def test_a_plain_clip_that_withstands_apgd_is_warned_about(command, small_clip, monkeypatch, tmp_path, read_json):
    monkeypatch.setattr("eval_zeroshot.load_clip", lambda name, tag, *more: load_clip(name, str(small_clip), *more))
    words = ["--pretrained", "seed7", "--tasks", "colours", "--limit", 40, "--steps", 1]
    for name, more, warned in (("a", ["--attack", "apgd-ce"], True), ("b", ["--attack", "pgd"], False),
                               ("c", ["--attack", "apgd-ce", "--eps", 4], False)):
        printed = command(*words, *more, "--out", tmp_path / name)
        assert read_json(tmp_path / name / "results.json")["mean"]["robust"] > 10
        assert ("warning: " in printed and "never made robust" in printed) == warned
        assert ("warnings" in read_json(tmp_path / name / "results.json")) == warned


def test_evaluate_reads_each_image_once(toy):
    encoder, head, scale, task = toy
    part = load_task("colours", "val", limit=30)
    seen = []
    early = {3: {"image": 3, "label": 0, "clean": 1}, 29: {"image": 29, "error": "earlier"}}
    records = evaluate(encoder, head, scale, part, PGD, batch_size=8, done=early,
                       keep=lambda task, records, tensors: seen.extend(record["image"] for record in records))
    attacked = [image for image in seen if seen.count(image) == 1]
    assert sorted(set(seen)) == [i for i in range(30) if i not in (3, 29)] and len(attacked) > 10
    assert [r["image"] for r in records] == list(range(30)) and records[3] == {"image": 3, "label": 0, "clean": 1}
