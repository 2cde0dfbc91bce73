"""eval_zeroshot.py: attacks in turn, verdicts, signs of a broken evaluation; whose results a folder holds,
killed evaluations, saved images."""
import fcntl
import io
import itertools
import json
import os
import signal

import numpy as np
import open_clip
import pytest
import torch
from in_process import here
from PIL import Image
from runs import when
from torch.utils.data import Subset

from attacks import attack_list, defined
from eval_zeroshot import evaluate, evaluate_tasks, make_parser, run_attacks
from harness import evaluation
from harness.checkpoints import save_checkpoint
from harness.evaluation import (EvaluationRun, adversarial_folder, dtype_of, save_adversarial, settle,
                                without_unsaved)
from harness.processes import DTYPES
from harness.reports import interval, summary
from kernels.contrastive_loss import contrast, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, load_clip
from prompts import encode_head
from tasks.loading import batches
from tasks.task import load_task

PGD = {"names": ["pgd"], "eps": 8 / 255, "steps": 10, "step_size": 2 / 255, "norm": "linf"}


@pytest.fixture(scope="module")
def toy(small_clip):
    """(encoder, head, logit_scale, task) of a briefly pretrained toy CLIP on 120 images of ten colours."""
    clip, tokenizer = load_clip("toy", str(small_clip))
    task = load_task("colours", "val", limit=120)
    return ImageEncoder(clip), encode_head(clip, tokenizer, task.class_names, task.template), 100., task


def rightly(toy, count=40):
    """x, y and numbers of images that are classified rightly."""
    encoder, head, scale, task = toy
    x, y, index, _ = next(iter(batches(task, range(120), 120, 0, bad="leave out")))
    right = (contrast(encoder(to_float(x)), head, y, scale)[1] == y).nonzero().squeeze(1)[:count]
    return x[right], y[right], index[right]


# ------------------------------------------------------------------------------ attacks in turn
def test_attack_lists_and_what_is_defined_for_few_classes():
    assert attack_list("pgd,square,pgd") == ["pgd", "square"]
    assert attack_list("cw,autoattack") == ["cw", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert attack_list("autoattack-fast,pgd") == ["apgd-ce", "apgd-t", "square", "pgd"]
    with pytest.raises(ValueError, match="--attack fgsm: expected a comma list"):
        attack_list("pgd,fgsm")
    assert attack_list("cw", last_iterate=True) == ["cw"]
    with pytest.raises(ValueError, match="--last-iterate is for --attack pgd or cw alone"):
        attack_list("pgd,cw", last_iterate=True)
    names = attack_list("autoattack")
    assert defined(names, 4) == names
    assert defined(names, 3) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert defined(names, 2) == ["apgd-ce", "fab-t", "square"]
    assert defined(["apgd-dlr"], 2) == ["apgd-ce"] and defined(["apgd-dlr"], 3) == ["apgd-dlr"]


def test_each_attack_sees_only_what_the_ones_before_left_standing(toy):
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    options = {"eps": 5 / 255, "steps": 4, "step_size": 1 / 255, "norm": "linf", "queries": 30}
    standing, names = torch.ones(len(y), dtype=torch.bool), ["pgd", "apgd-ce", "apgd-t", "square"]
    x_adv, predicted, by, at, passes, *_ = run_attacks(
        encoder, head, scale, x, y, index, names=names, **options)
    spent = torch.zeros(len(y), dtype=torch.int64)
    # one by one, each on the rest, they say the same
    for k, name in enumerate(names):
        rest = (t[standing] for t in (x, y, index))
        _, _, alone, when, used, *_ = run_attacks(encoder, head, scale, *rest, names=[name], **options)
        spent[standing] += used
        fallen = standing.nonzero().squeeze(1)[alone >= 0]
        assert torch.equal((by == k).nonzero().squeeze(1), fallen)
        assert torch.equal(at[fallen], when[alone >= 0])
        standing[fallen] = False
    assert torch.equal(standing, by < 0) and 0 < standing.sum() < len(y) and torch.equal(passes, spent)
    full = 5 + 5 + 9 * 5 + 30
    assert (passes[standing] == full).all() and (passes[by == 0] <= 5).all() and passes[by == 0].min() < 5
    assert torch.equal(contrast(encoder(x_adv), head, y, scale)[1], predicted)
    assert torch.equal(predicted == y, standing)
    assert (x_adv - to_float(x)).abs().max() <= 5 / 255 + 1e-6


def test_what_a_second_look_clears_stands_and_meets_the_next_attack(toy):
    """A model that errs only where a gradient is asked for, as rounding may: no attack takes its word."""
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    used = []

    def fickle(x):
        used.append(len(x))
        z = encoder(x)
        return -z if x.requires_grad else z
    _, predicted, by, at, passes, *_ = run_attacks(fickle, head, scale, x, y, index, **PGD | {
        "names": ["pgd", "apgd-ce"], "eps": .1 / 255, "steps": 3})
    assert (by == -1).all() and (at == -1).all() and torch.equal(predicted, y) and (passes == 8).all()
    # the second attack was given all of them
    assert used.count(len(y)) == len(used) > 4


def test_restarts_only_ever_break_more_and_start_elsewhere(toy):
    encoder, head, scale, _ = toy
    x, y, index = rightly(toy)
    weak = PGD | {"eps": 6 / 255, "steps": 1, "step_size": 6 / 255}
    one, four = (run_attacks(encoder, head, scale, x, y, index, **weak, restarts=r)[2] >= 0 for r in (1, 4))
    assert (four >= one).all() and four.sum() > one.sum()


def test_the_last_iterate_breaks_no_more_than_any(toy):
    encoder, head, scale, task = toy
    x, y, index = rightly(toy, 120)
    # jumps from wall to wall
    strange = PGD | {"steps": 3, "step_size": 16 / 255}
    any_, last = (run_attacks(encoder, head, scale, x, y, index, **strange, last_iterate=last)
                  for last in (False, True))
    assert ((any_[2] >= 0) >= (last[2] >= 0)).all() and (any_[2] >= 0).sum() > (last[2] >= 0).sum()
    assert (last[4] == 4).all() and set(last[3].tolist()) == {-1, 3}
    options = strange | {"last_iterate": True}
    result = evaluate_tasks(encoder, {task.name: head}, scale, [task], options, label="",
                            batch_size=64)["tasks"]["colours"]
    assert not any("second half" in text for text in result["warnings"])


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_on_two_and_three_classes(toy, classes):
    encoder, head, scale, task = toy
    y = torch.tensor([task.images[i][1] for i in range(120)])
    few = task._replace(images=Subset(task.images, (y < classes).nonzero().flatten().tolist()))
    options = PGD | {"names": attack_list("autoattack"), "steps": 5, "queries": 20}
    row = evaluate_tasks(encoder, {task.name: head[:classes]}, scale, [few], options, label="",
                         batch_size=64)["tasks"]["colours"]
    assert row["attacks"] == ["apgd-ce", *["apgd-dlr"] * (classes == 3), "fab-t", "square"]
    assert row["n"] == len(few.images)
    assert sum(row["broken_by"].values()) + row["standing"] == row["right"] > 5


# ------------------------------------------------------------------------------ precision
def test_no_precision_and_no_scale_blinds_the_attack(toy):
    """A confident model in three precisions at three logit scales, where cross-entropy is blind."""
    encoder, head, _, _ = toy
    x, y, index = rightly(toy, 100)
    clean, fate, share = to_float(x), {}, {}
    for name, dtype in DTYPES.items():
        encoder.dtype = dtype
        for scale in (20., 100., 1000.):
            x_adv, *_, zero, uphill = run_attacks(encoder, head, scale, x, y, index, **PGD | {"steps": 5})
            assert not zero.any() and uphill.all()
            # what is reported comes from fp32
            encoder.dtype = torch.float32
            fate[name, scale] = contrast(encoder(x_adv), head, y, scale)[1] == y
            encoder.dtype = dtype
            leaf = clean.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(cosine_logits(encoder(leaf), head, scale), y)
            (grad,) = torch.autograd.grad(loss.to(dtype), leaf)
            share[name, scale] = float((grad == 0).flatten(1).all(1).float().mean())
    encoder.dtype = torch.float32
    # of a hundred
    robust = {key: int(stands.sum()) for key, stands in fate.items()}
    for scale in (20., 100., 1000.):
        counts = [robust[name, scale] for name in DTYPES]
        assert max(counts) - min(counts) <= 1, robust
    assert share["fp16", 1000.] > .3 and share["fp32", 20.] == 0


class Rounded:
    """Right in fp32, and in what stands for bf16 always wrong, with a gradient that is so too."""
    dtype = torch.bfloat16

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, x):
        return self.encoder(x) * (1 if self.dtype == torch.float32 else -1)


@pytest.mark.parametrize("name,passes", [("pgd", 4), ("apgd-ce", 4), ("apgd-t", 9 * 4), ("square", 6)])
def test_what_is_wrong_in_bf16_alone_does_not_count(toy, name, passes):
    """The attack goes on to its end: the verdict is of fp32, when clean, at each iterate, and at last."""
    encoder, head, scale, task = toy
    x, y, index = rightly(toy, 120)
    options = PGD | {"names": [name], "eps": .1 / 255, "steps": 3, "queries": 6}
    _, predicted, by, at, spent, _, uphill = run_attacks(
        Rounded(encoder), head, scale, x, y, index, **options)
    assert torch.equal(predicted, y) and (by == -1).all() and (at == -1).all() and (spent == passes).all()
    # where its gradient points the loss in fp32 falls
    assert name == "square" or uphill.float().mean() < .2
    low, full = (evaluate_tasks(net, {task.name: head}, scale, [task], options, label="", batch_size=120,
                                probe=False) for net in (Rounded(encoder), encoder))
    assert low["mean"] == full["mean"] and full["mean"]["robust"] > 50


# ------------------------------------------------------------------------------ signs of a broken one
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
    task = task._replace(images=Subset(task.images, range(36)))

    def row(net, names=("apgd-ce",), **more):
        options = PGD | {"names": list(names), **more}
        return evaluate_tasks(net, {task.name: head}, scale, [task], options, label="",
                              batch_size=50)["tasks"][task.name]

    def backwards(x):
        return encoder(Straight.apply(x, -1.))
    honest = row(encoder, steps=40)
    assert honest["warnings"] == [] and honest["zero_gradients"] == 0
    none = row(lambda x: encoder(Straight.apply(x, 0.)))
    assert none["zero_gradients"] == 100 and none["robust"] > honest["robust"] + 20
    assert "100.0 % of the input gradients are exactly zero" in none["warnings"][0]
    wrong = row(backwards)
    assert wrong["zero_gradients"] == 0 and wrong["robust"] > honest["robust"] + 20
    assert "the loss falls where its gradient says" in wrong["warnings"][0]
    assert "a probe with Square broke" in row(backwards, eps=16 / 255)["warnings"][1]
    with_square = row(backwards, ["apgd-ce", "square"], queries=200)
    said = f"Square, which sees no gradients, broke {with_square['broken_by']['square']} images"
    assert any(said in text for text in with_square["warnings"]) and with_square["robust"] < wrong["robust"]
    slow = row(encoder, ["pgd"], steps=20, step_size=.3 / 255)
    assert any("broke in the second half of the steps" in text for text in slow["warnings"])


def test_summary_of_records_by_hand():
    wrong = {"image": 0, "label": 1, "clean": 0}
    right = {"label": 1, "clean": 1, "adversarial": 0, "passes": 4, "zero": False, "uphill": True}
    fates = [("pgd", 0), ("pgd", 5), ("pgd", 6), ("square", 90), (None, -1), (None, -1)]
    records = [wrong, *({"image": i, **right, "by": by, "at": at} for i, (by, at) in enumerate(fates, 1)),
               {"image": 7, "error": "gone"}]
    records[5] |= {"probe": False}
    row = summary(records, ["pgd", "square"], 4, 5)
    assert row | {"warnings": []} == {
        "n": 7, "classes": 4, "clean": 600 / 7, "robust": 200 / 7, "chance": 25, "right": 6, "standing": 2,
        "clean_interval": interval(6, 7), "robust_interval": interval(2, 7), "attacks": ["pgd", "square"],
        "broken_by": {"pgd": 3, "square": 1}, "passes": round(24 / 7, 2), "zero_gradients": 0, "left_out": 1,
        "warnings": []}
    # one image each is no other sign
    assert row["warnings"] == ["1 of 8 images could not be read"]
    records.pop()
    records[4] = records[4] | {"zero": True}
    assert "16.7 %" in summary(records, ["pgd", "square"], 4, 5)["warnings"][0]
    records = [record | {"uphill": "clean" not in record or k > 3} for k, record in enumerate(records)]
    assert "3 images (50.0 %)" in summary(records, ["pgd", "square"], 4, 5)["warnings"][1]
    assert summary([], ["pgd"], 2, 1)["robust"] is None


def test_wilsons_interval():
    assert interval(0, 0) == (0, 100) and interval(0, 10) == (0, 27.75) and interval(10, 10) == (72.25, 100)
    # Newcombe 1998, table 1
    assert interval(50, 100) == (40.38, 59.62) and interval(81, 263) == (25.53, 36.62)


def test_nan_is_wrong_and_warned_about(toy):
    encoder, head, scale, task = toy

    def breaks(x):
        """NaN where a pixel has been moved."""
        z = encoder(x)
        moved = (255 * x - (255 * x).round()).abs().flatten(1).amax(1) > 1e-3
        return torch.where(moved[:, None], torch.nan, z)
    (row,) = evaluate_tasks(breaks, {task.name: head}, scale, [task], PGD | {"steps": 2}, label="",
                            batch_size=64)["tasks"].values()
    assert row["robust"] == 0 and f"the model gave NaN for {row['right']} images" in row["warnings"][0]


def test_what_is_not_counted_in_the_mean(toy):
    """A set of which nothing can be read, and Country-211, which is not one of the paper's sixteen."""
    encoder, head, scale, task = toy

    class Damaged(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise ValueError(f"cannot decode {index}.png")
    sets = {"pets": Subset(task.images, range(30)), "dtd": Damaged(),
            "country211": Subset(task.images, range(30, 40))}
    tasks = [task._replace(name=name, images=images) for name, images in sets.items()]
    heads = {name: head for name in sets}
    result = evaluate_tasks(encoder, heads, scale, tasks, PGD | {"steps": 3}, label="", batch_size=16)
    rows = result["tasks"]
    assert result["mean"] == {"tasks": 1, "clean": rows["pets"]["clean"], "robust": rows["pets"]["robust"]}
    assert (rows["dtd"]["n"], rows["dtd"]["left_out"], rows["country211"]["n"]) == (0, 3, 10)
    assert rows["dtd"]["warnings"] == ["3 of 3 images could not be read"]


def test_evaluate_reads_each_image_once(toy):
    encoder, head, scale, _ = toy
    some, seen = load_task("colours", "val", limit=30), []
    early = {3: {"image": 3, "label": 0, "clean": 1}, 29: {"image": 29, "error": "earlier"}}
    records = evaluate(encoder, head, scale, some, PGD, batch_size=8, done=early,
                       keep=lambda task, records, tensors: seen.extend(record["image"] for record in records))
    attacked = [image for image in seen if seen.count(image) == 1]
    assert sorted(set(seen)) == [i for i in range(30) if i not in (3, 29)] and len(attacked) > 10
    assert [r["image"] for r in records] == list(range(30))
    assert records[3] == {"image": 3, "label": 0, "clean": 1}


def test_the_bar_names_its_phase_and_is_full_only_when_all_is_done(toy, monkeypatch):
    """What it says at each forward pass: of 20 images in batches of eight, then of a probe of those that
    stand. One image is known from before."""
    encoder, head, scale, _ = toy
    task, said, bars = load_task("colours", "val", limit=20), [], []

    class Bar(evaluation.tqdm):
        def __init__(self, **words):
            super().__init__(**words, file=io.StringIO(), mininterval=0)
            bars.append(self)

    class Watched(torch.nn.Module):
        def forward(self, x):
            said.append((bars[0].postfix.split(",")[0], bars[0].n, bars[0].total))
            return encoder(x)
    net = Watched()
    net.clip = encoder
    monkeypatch.setattr(evaluation, "tqdm", Bar)
    early = {"colours": {7: {"image": 7, "label": 0, "clean": 1}}}
    results = evaluate_tasks(net, {"colours": head}, scale, [task], PGD | {"eps": 1 / 255, "steps": 2},
                             label="x", batch_size=8, done=early)
    standing = results["tasks"]["colours"]["standing"]
    assert [phase for phase, group in itertools.groupby(word for word, *_ in said)] == [
        "clean", "attack"] * 3 + ["probe"]
    assert {(n, total) for word, n, total in said if word != "probe"} == {(1, 20), (9, 20), (17, 20)}
    assert {n for word, n, _ in said if word == "probe"} == {*range(20, 20 + standing, 8)}
    assert {total for word, _, total in said if word == "probe"} == {20 + standing} and standing > 8
    assert bars[0].n == bars[0].total


def test_processes_share_the_images_none_twice(toy, monkeypatch):
    encoder, head, scale, _ = toy
    some, seen = load_task("colours", "val", limit=10), []
    monkeypatch.setattr("harness.evaluation.WORLD", 3)
    monkeypatch.setattr("harness.evaluation.gathered", lambda value: [value])
    for rank in range(3):
        monkeypatch.setattr("harness.evaluation.RANK", rank)
        records = evaluate(encoder, head, scale, some, PGD | {"names": []}, batch_size=6, probe=False)
        seen += [record["image"] for record in records]
    assert seen == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]


def test_the_openai_ensemble_is_another_head(small_clip):
    clip, tokenizer = load_clip("toy", str(small_clip))
    one = encode_head(clip, tokenizer, ["red", "blue"], "a photo of a {}")
    both = encode_head(clip, tokenizer, ["red", "blue"], ["a photo of a {}", "{}"])
    assert one.shape == both.shape and not torch.allclose(one, both, atol=1e-3)


# ------------------------------------------------------------------------------ the command
def command(*words, status=0):
    """What `python eval_zeroshot.py *words` prints; of an error its one line alone."""
    done = here("eval_zeroshot.py", *words, "--device", "cpu", status=status)
    assert not status or done.stderr.count("\n") == 1 and not done.stdout
    return done.stdout or done.stderr


def words_for(small_clip, out, *more):
    return ["--pretrained", small_clip, "--tasks", "colours,scans", "--limit", 90, "--out", out, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batches_and_processes_change_nothing(run, small_clip, tmp_path, read_json):
    """Two processes share an odd number of images."""
    more = ("--limit", 21, "--attack", "pgd,apgd-ce,apgd-t,square", "--steps", 3, "--queries", 15, "--eps", 8)
    for k, (batch, processes) in enumerate([(64, 1), (1, 1), (7, 1), (10, 2)]):
        words = words_for(small_clip, tmp_path / str(k), *more, "--batch-size", batch)
        command(*words) if processes == 1 else run("eval_zeroshot.py", *words, processes=processes)
    found = [lines(tmp_path / str(k) / "images.jsonl") for k in range(4)]
    rows = [read_json(tmp_path / str(k) / "results.json")["tasks"] for k in range(4)]
    assert [row["n"] for row in rows[0].values()] == [21, 21] and len(found[0]) == 43
    assert 0 < rows[0]["colours"]["standing"] < rows[0]["colours"]["right"]
    for other, others_rows in zip(found[1:], rows[1:]):
        assert other == found[0] and others_rows == rows[0]
    assert {path.name for path in (tmp_path / "3").iterdir()} == {"images.jsonl", "results.json"}


def test_all_takes_what_is_there_and_says_what_is_not(tmp_path, read_json):
    for name in ("n01440764", "n02012849"):
        (tmp_path / "imagenet" / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "imagenet" / "val" / name / "a.png")
    # half a download
    (tmp_path / "eurosat" / "2750").mkdir(parents=True)
    model = ("--model", "ViT-S-32-alt", "--pretrained", "none", "--out", tmp_path / "out", "--data-root")
    done = command(*model, tmp_path, "--steps", 1, "--templates", "openai", "--workers", 0)
    assert list(read_json(tmp_path / "out" / "results.json")["tasks"]) == ["imagenet"]
    missing = [line.split(": ")[1] for line in done.splitlines() if line.startswith("not evaluated: ")]
    assert len(missing) == 21 and "imagenet" not in missing and "eurosat" in missing
    assert sorted(read_json(tmp_path / "out" / "results.json")["missing"]) == sorted(missing)
    assert "not evaluated: cars: get it with hf download clip-benchmark/wds_cars" in done
    assert "nothing to evaluate under" in command(*model, tmp_path / "eurosat", status=2)


def test_foreign_checkpoints_and_export_through_the_command(small_clip, toy, tmp_path, read_json):
    """Our weights in the TeCoA authors' clothes, and out again as open_clip's, give the same numbers."""
    encoder, *_ = toy
    state = {"module." + name: tensor.half() for name, tensor in encoder.visual.state_dict().items()}
    theirs, exported = tmp_path / "theirs.pth.tar", tmp_path / "clip" / "open_clip_model.safetensors"
    torch.save({"epoch": 3, "vision_encoder_state_dict": state, "state_dict": {}, "optimizer": {}}, theirs)
    for name, words in {"a": ["--pretrained", small_clip, "--export", exported.parent],
                        "b": ["--pretrained", small_clip, "--ckpt", theirs], "c": ["--pretrained", exported],
                        "d": ["--pretrained", "none", "--ckpt", exported]}.items():
        command("--model", "toy", "--tasks", "colours", "--limit", 90, "--steps", 5, *words,
                "--out", tmp_path / name)
    a, b, c, d = (read_json(tmp_path / name / "results.json")["tasks"]["colours"] for name in "abcd")
    # theirs is in half precision
    assert a == c == d and abs(b["clean"] - a["clean"]) < 2 and a["clean"] > 50


def test_interpolation_is_between_the_weights(small_clip, tmp_path, read_json):
    """α = 0 is the plain CLIP, 1 the checkpoint, to the bit; ¼ is a CLIP whose weights were mixed by hand."""
    clip, mixed = (load_clip("toy", str(small_clip))[0] for _ in range(2))
    start, gen = {name: t.clone() for name, t in clip.state_dict().items()}, torch.Generator().manual_seed(0)
    for t in clip.visual.parameters():
        if t.ndim == 2:
            t.add_(.8 * t.std() * torch.randn(t.shape, generator=gen))
    ckpt, by_hand = tmp_path / "run" / "ckpt.pt", tmp_path / "mixed.pt"
    ckpt.parent.mkdir()
    config = {"model": "toy", "pretrained": str(small_clip), "norm": "linf", "eps": 4.}
    save_checkpoint(ckpt, clip, config)
    mixed.load_state_dict({name: .75 * start[name] + .25 * t for name, t in clip.state_dict().items()})
    torch.save(mixed.state_dict(), by_hand)
    words = ("--tasks", "colours,textures", "--limit", 60, "--attack", "square", "--queries", 9)
    said = command("--ckpt", ckpt, *words, "--interpolate", "0,.25,1")
    command("--pretrained", small_clip, *words, "--eps", 4, "--out", tmp_path / "plain")
    command("--pretrained", by_hand, *words, "--eps", 4, "--out", tmp_path / "by_hand")
    names = {"0": "eval-taskscolours,textures-limit60-attacksquare-queries9-interpolate0",
             "0.25": "eval-taskscolours,textures-limit60-attacksquare-queries9-interpolate0.25",
             "1": "eval-taskscolours,textures-limit60-attacksquare-queries9"}
    assert {path.name for path in ckpt.parent.iterdir()} == {*names.values(), "ckpt.pt"}
    found = {alpha: read_json(ckpt.parent / name / "results.json") for alpha, name in names.items()}
    assert found["0"]["tasks"] == read_json(tmp_path / "plain" / "results.json")["tasks"]
    hand = read_json(tmp_path / "by_hand" / "results.json")
    assert all(abs(found["0.25"]["mean"][kind] - hand["mean"][kind]) < 1.7 for kind in ("clean", "robust"))
    means = [found[alpha]["mean"] for alpha in names]
    assert means[0]["clean"] > means[2]["clean"] + 4 and means[1] not in (means[0], means[2])
    for alpha, mean in zip(names, means):
        assert f"| {alpha} | {mean['clean']:.1f} | {mean['robust']:.1f} |\n" in said
    # α = 1 is the checkpoint itself
    assert "nothing was computed" in command("--ckpt", ckpt, *words)
    exported = tmp_path / "half"
    command("--ckpt", ckpt, "--tasks", "none", "--interpolate", ".5", "--export", exported)
    half = open_clip.create_model("toy", str(exported / "open_clip_model.safetensors")).state_dict()
    for name, t in clip.state_dict().items():
        assert torch.allclose(half[name], (start[name] + t) / 2, atol=1e-6), name
    command("--ckpt", ckpt, *words, "--interpolate", "0,.25", "--out", tmp_path / "both")
    inside = read_json(tmp_path / "both" / "interpolate0.25" / "results.json")
    assert inside["tasks"] == found["0.25"]["tasks"]
    save_checkpoint(ckpt, clip, config, prompts={"tokens": torch.zeros(2, 96)})
    for more, why in ((("--ckpt", ckpt, "--interpolate", "1,.5"), "visual prompts"),
                      (("--interpolate", "0.5"), "give --ckpt"),
                      (("--ckpt", ckpt, "--interpolate", "0,2"), "from 0 to 1"),
                      (("--ckpt", ckpt, "--interpolate", "half"), "--interpolate"),
                      (("--model", "toy", "--ckpt", by_hand, "--interpolate", ".5"), "a whole CLIP"),
                      (("--ckpt", ckpt, "--interpolate", "0,1", "--export", exported), "take one model")):
        assert why in command(*more, status=2)


def test_a_plain_clip_that_withstands_apgd_is_warned_about(small_clip, monkeypatch, tmp_path, read_json):
    monkeypatch.setattr("model.load_clip", lambda name, tag, *more: load_clip(name, str(small_clip), *more))
    monkeypatch.setattr("harness.evaluation.ByModel", lambda real, toy: lambda args: 8.)
    words = ["--pretrained", "seed7", "--tasks", "colours", "--limit", 40, "--steps", 1, "--eps", 8]
    for name, more, warned in (("a", ["--attack", "apgd-ce"], True), ("b", ["--attack", "pgd"], False),
                               ("c", ["--attack", "apgd-ce", "--eps", 4], False)):
        printed = command(*words, *more, "--out", tmp_path / name)
        results = read_json(tmp_path / name / "results.json")
        assert results["mean"]["robust"] > 10 and ("warnings" in results) == warned
        assert ("warning: " in printed and "never made robust" in printed) == warned


def test_saved_images_are_what_was_judged(small_clip, toy, tmp_path, read_json):
    encoder, head, scale, _ = toy
    command(*words_for(small_clip, tmp_path, "--save-adv", tmp_path / "adv", "--examples", "--batch-size", 32,
                       "--steps", 10))
    row = read_json(tmp_path / "results.json")["tasks"]["colours"]
    saved = [dict(np.load(path)) for path in sorted((tmp_path / "adv" / "colours").iterdir())]
    assert all(json.loads(str(batch.pop("evaluation")))["eps"] == 11 for batch in saved)
    saved = {name: torch.from_numpy(np.concatenate([batch[name] for batch in saved])) for name in saved[0]}
    assert saved["x"].dtype == torch.uint8 and saved["x_adv"].dtype == torch.float32
    assert len(saved["x"]) == row["right"]
    assert (saved["x_adv"] - to_float(saved["x"])).abs().max() <= 11 / 255 + 1e-6
    predicted = contrast(encoder(saved["x_adv"]), head, saved["label"], scale)[1]
    assert torch.equal(predicted, saved["adversarial"])
    assert (predicted == saved["label"]).sum() == row["standing"]
    task = load_task("colours", "val", limit=90)
    assert all(torch.equal(task.images[i][0], x) for i, x in zip(saved["image"].tolist(), saved["x"]))
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width > 200 and np.asarray(picture.convert("L")).std() > 20


def test_attacked_images_count_as_saved_with_all_the_lines_that_claim_them(tmp_path):
    """A kill comes between the two: a whole file of images is done again where a line is missing."""
    identity, x = {"eps": 8}, torch.rand(2, 3, 4, 4)
    for first in (0, 2):
        numbers = torch.tensor([first, first + 1])
        save_adversarial(tmp_path, "digits", {"x": x, "x_adv": x, "image": numbers}, identity)
    (tmp_path / "digits" / "1.tmp").touch()
    # image 3 has no line yet; 4 was wrong, and not attacked; the file of 5 is not there
    records = {image: {"image": image, "adversarial": 7} for image in (0, 1, 2, 5)} | {4: {"image": 4}}
    for remove, files in ((False, ["0000000.npz", "0000002.npz", "1.tmp"]), (True, ["0000000.npz"])):
        kept = without_unsaved(tmp_path, "digits", records, identity, remove)
        assert kept == {image: records[image] for image in (0, 1, 4)}
        assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == files
    with pytest.raises(ValueError, match="holds images of another evaluation: give another --save-adv"):
        without_unsaved(tmp_path, "digits", records, {"eps": 4}, False)
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["0000000.npz"]


def test_a_tasks_name_never_leads_out_of_the_folder(tmp_path):
    names = ("folder:/etc/passwd", "folder:../../x", "..", "a/../../b", "wds:~/x", "folder:a/b", "folder:a-b",
             "digits", f"folder:{'a/' * 500}b", f"folder:{'a/' * 500}c", "x" * 300)
    folders = [adversarial_folder(tmp_path, name) for name in names]
    assert all(folder.parent == tmp_path and folder.name not in ("", ".", "..") for folder in folders)
    assert len(set(folders)) == len(names) and folders[names.index("digits")].name == "digits"
    assert all(len(folder.name) < 255 for folder in folders)


# ------------------------------------------------------------------------------ whose results a folder holds
def run_of(*words, checkpoint=None, alpha=1):
    """The EvaluationRun of a command line; checkpoint: what --ckpt would hold."""
    parser = make_parser()
    args, known = settle(parser, parser.parse_args([*map(str, words)]), checkpoint or {"config": {}}, alpha)
    return EvaluationRun(parser, args, known, [], {}, "", torch.device("cpu"))


def test_what_came_into_the_folder_while_the_model_loaded_is_not_overwritten(tmp_path):
    """Not even with --overwrite: the second look, under the lock, comes before anything is removed."""
    run = run_of("--out", tmp_path, "--overwrite")
    (tmp_path / "ckpt.pt").write_bytes(b"of a training run that has begun meanwhile")
    with pytest.raises(ValueError, match="holds an unfinished run"):
        run.begin(None)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    os.close(run.locked)


def test_a_plain_clip_of_whose_images_none_can_be_read_is_not_robust(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = run_of("--pretrained", "seed0", "--attack", "apgd-ce")
    for robust, standing, n, warned in ((None, 0, 0, 0), (20., 20, 100, 1), (5., 5, 100, 0), (12.5, 1, 8, 0)):
        results = {"mean": {"robust": robust}, "tasks": {"a": {"standing": standing, "n": n}}}
        assert len(run.warning_of_a_plain_clip(results)) == warned


def test_every_option_that_can_change_a_result_has_a_folder_of_its_own(monkeypatch, tmp_path):
    """And an identity; one that cannot change it has neither."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.pt").write_bytes(name.encode())
    other = {"model": "ViT-B-32", "pretrained": "none", "tasks": "digits", "data_root": tmp_path, "limit": 3,
             "norm": "l2", "eps": 4, "steps": 7, "step_size": .5, "seed": 1, "dtype": "bf16",
             "kernels": "torch", "device": "cuda:7", "compile": None, "attack": "cw", "queries": 7,
             "restarts": 2, "last_iterate": None, "templates": "openai", "interpolate": None, "ckpt": None,
             "class_names": "names.txt", "template": "a {}", "resize": "none", "protocol": "ttc",
             "interpolation": "bicubic"}
    same = {"workers": 1, "batch_size": 7, "out": "elsewhere", "overwrite": None, "examples": None,
            "save_adv": "adv", "export": "clip"}
    assert {*other, *same} == {action.dest for action in make_parser()._actions} - {"help"}
    usual = ("--eps", 11, "--device", "cpu", "--pretrained", "seed0")
    one = run_of(*usual)
    assert one.out.name == "eval-toy-seed0" and "ckpt" in one.identity
    runs = {"": one}
    for word, value in (other | same).items():
        if word in ("ckpt", "interpolate"):
            continue
        flag = "--" + word.replace("_", "-")
        runs[word] = run_of(*usual, flag, *[value] * (value is not None))
        assert (runs[word].identity == one.identity) == (word in same), word
        assert (runs[word].out == one.out) == (word in same and word != "out"), word
    runs = {word: run for word, run in runs.items() if word not in same}
    for name in ("a", "b"):
        runs[name] = run_of(*usual[:-1], f"{name}/clip.pt")
    assert len({run.out for run in runs.values()}) == len(runs)
    assert len({json.dumps(run.identity) for run in runs.values()}) == len(runs)


def test_an_evaluation_keeps_its_dtype_on_another_processor(tmp_path, monkeypatch):
    words = ("--model", "ViT-B-32-quickgelu", "--pretrained", "none", "--device", "cpu", "--out", tmp_path)
    monkeypatch.setattr("harness.options.has_bf16", lambda device: True)
    one = run_of(*words)
    one.begin(None)
    os.close(one.locked)
    monkeypatch.setattr("harness.options.has_bf16", lambda device: False)
    for more in ((), ("--dtype", "auto"), ("--dtype", "bf16")):
        again = run_of(*words, *more)
        assert again.args.dtype == "bf16" and again.identity == one.identity
    with pytest.raises(ValueError, match=r"holds an evaluation, with --dtype bf16 \(here fp32\)"):
        run_of(*words, "--dtype", "fp32")
    assert run_of(*words, "--overwrite").args.dtype == "fp32"
    for strange in ('{"evaluation": 3}', '{"evaluation": {"dtype": ["bf16"]}}', "", "{"):
        (tmp_path / "images.jsonl").write_text(strange)
        assert dtype_of(tmp_path) is None


def test_evaluations_of_a_checkpoint_lie_beside_it_by_name_and_content(tmp_path):
    """What the checkpoint says is usual: the CLIP that it was adapted from, the ε that it trained with."""
    checkpoint = {"model": "toy", "pretrained": "seed3", "config": {"norm": "linf", "eps": 4.}}

    def at(name, *more, **kinds):
        return run_of("--ckpt", tmp_path / name, "--device", "cpu", *more, checkpoint=checkpoint, **kinds)
    for name in ("ckpt.pt", "ckpt-previous.pt", "theirs.pth"):
        (tmp_path / name).write_bytes(name.encode())
    names = {"ckpt.pt": "eval", "ckpt-previous.pt": "eval-previous", "theirs.pth": "eval-theirs"}
    assert {name: at(name).out for name in names} == {name: tmp_path / out for name, out in names.items()}
    assert at("ckpt.pt").args.eps == 4
    assert at("ckpt.pt", "--eps", 4, "--pretrained", "seed3").out == at("ckpt.pt").out
    assert at("ckpt.pt", "--eps", 8).out.name == "eval-eps8"
    assert at("ckpt.pt", "--pretrained", "seed4").out.name == "eval-pretrainedseed4"
    assert at("ckpt.pt", alpha=.5).out.name == "eval-interpolate0.5"
    # a file's name may have 255 bytes
    (tmp_path / f"{'é' * 120}.pt").write_bytes(b"long")
    long = {at(f"{'é' * 120}.pt", "--tasks", f"{'x,' * 80}{last}", "--steps", 7).out.name for last in "ab"}
    assert len(long) == 2 and all(len(os.fsencode(name)) < 255 for name in long)
    before = at("ckpt.pt").identity
    (tmp_path / "ckpt.pt").write_bytes(b"another")
    after = at("ckpt.pt").identity
    assert {word for word in before if before[word] != after[word]} == {"ckpt"}


def test_the_same_command_again_shows_its_table_and_any_other_is_refused(small_clip, monkeypatch, tmp_path,
                                                                             read_json):
    """Finished or not: what would be overwritten is named, and how to go on."""
    out, words = tmp_path / "out", words_for(small_clip, tmp_path / "out", "--steps", 2)
    first = command(*words)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    assert kept.keys() == {"images.jsonl", "results.json"}

    def unchanged():
        return kept == {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("model.load_clip", lambda *_: pytest.fail("computes"))
    again = command(*words, "--batch-size", 3)
    assert f"{out} is finished: this is its table, nothing was computed" in again and unchanged()
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert table and table == [line for line in again.splitlines() if line.startswith("|")]
    monkeypatch.undo()

    # somebody has a hand on it
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    assert "another evaluation is writing to" in command(*words, "--overwrite", status=2) and unchanged()
    os.close(folder)

    others = {"--eps": 4, "--steps": 3, "--templates": "openai", "--dtype": "bf16", "--tasks": "colours"}
    for flag, value in others.items():
        refused = command(*words, flag, value, status=2)
        assert f"{out} holds an evaluation, with " in refused and f"{flag} " in refused and "--out" in refused
        assert "--overwrite replaces it" in refused and unchanged()

    # as if killed before its first results
    (out / "results.json").unlink()
    kept.pop("results.json")
    assert "with --eps" in command(*words, "--eps", 4, status=2) and unchanged()
    monkeypatch.setattr("harness.files.source_version", lambda: "0123abcd")
    assert "with sources" in command(*words, status=2) and unchanged()
    monkeypatch.undo()
    # writes no results
    command("--pretrained", small_clip, "--tasks", "none", "--export", tmp_path / "clip", "--out", out)
    assert unchanged()
    assert "going on: 180 of 180" in command(*words)
    mean = read_json(out / "results.json")["mean"]
    assert mean["robust"] < mean["clean"]
    command(*words, "--eps", 0, "--overwrite")
    mean = read_json(out / "results.json")["mean"]
    assert mean["robust"] == mean["clean"] and len(lines(out / "images.jsonl")) == 181


def test_a_training_runs_folder_is_never_written_to(small_clip, tmp_path):
    """Finished or not, its folder is no place for an evaluation's results."""
    out = tmp_path / "run"
    here("train_tecoa.py", "--pretrained", small_clip, "--tasks", "none", "--limit", 16, "--batch-size", 8,
         "--max-steps", 1, "--device", "cpu", "--out", out)
    words = ("--ckpt", out / "ckpt.pt", "--tasks", "colours", "--limit", 9, "--steps", 1)
    for what in ("a finished run", "an unfinished run"):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for more in ((), ("--overwrite",)):
            refused = command(*words, "--out", out, *more, status=2)
            assert f"{out} holds {what}: --out DIR writes elsewhere" in refused
        assert before == {path.name: path.read_bytes() for path in out.iterdir()}
        (out / "results.json").unlink(missing_ok=True)
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        (out / name).unlink()
    (out / "results.json").write_text("{}")
    refused = command("--pretrained", small_clip, "--tasks", "colours", "--out", out, "--overwrite", status=2)
    assert f"{out} holds other results" in refused


def test_unreadable_images_are_left_out_and_named_and_changed_ones_refused(small_clip, tmp_path, read_json):
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    for name in ("red", "blue"):
        (photos / name).mkdir(parents=True)
        for k in range(4):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(photos / name / f"{k}.png")
    (photos / "red" / "1.png").write_bytes((photos / "red" / "1.png").read_bytes()[:500])
    (photos / "blue" / "0.png").write_bytes(b"")
    words = ("--pretrained", small_clip, "--tasks", f"folder:{photos}", "--steps", 2, "--examples")
    for out, workers, batch in (("a", 0, 3), ("b", 2, 1)):
        done = command(*words, "--workers", workers, "--batch-size", batch, "--out", tmp_path / out)
        row = read_json(tmp_path / out / "results.json")["tasks"][f"folder:{photos}"]
        assert (row["n"], row["left_out"]) == (6, 2)
        assert done.count("left out of") == 2 and "red/1.png" in done and "blue/0.png" in done
    # two that cannot be read are no reason to begin again
    assert "nothing was computed" in command(*words[:-1], "--out", tmp_path / "a")
    (photos / "red" / "2.png").rename(photos / "red" / "9.png")
    refused = command(*words, "--out", tmp_path / "a", status=2)
    assert f"the images of folder:{photos} are not those" in refused and "--overwrite" in refused
    command(*words, "--workers", 0, "--out", tmp_path / "a", "--overwrite")


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_numbers(forks, small_clip, tmp_path, read_json):
    words = ["--attack", "pgd,square", "--steps", 8, "--queries", 60, "--batch-size", 10]
    whole = command(*words_for(small_clip, tmp_path / "whole", *words))
    out, adv = tmp_path / "killed", tmp_path / "adv"
    words = words_for(small_clip, out, *words, "--save-adv", adv, "--device", "cpu")
    done, journal = 0, out / "images.jsonl"
    for least in (25, 110):
        pid = forks.start("eval_zeroshot.py", *words, out=tmp_path / "printed")
        when(lambda least=least: journal.exists() and journal.read_text().count("\n") > least + 1)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait(pid) == -signal.SIGKILL
        printed = (tmp_path / "printed.stdout").read_text()
        assert least == 25 or f"going on: {done} of 180 images are done" in printed
        # as if killed within a line
        with open(journal, "a") as file:
            file.write('{"task": "colours", "im')
        whole_lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
        done = len({(r["task"], r["image"]) for r in map(json.loads, whole_lines[1:])})
        results = read_json(out / "results.json") if done >= 90 else {}
        assert results.get("unfinished", ["scans"]) == ["scans"]
    finished = command(*words)
    assert f"going on: {done} of 180" in finished
    assert lines(out / "images.jsonl")[1:] == lines(tmp_path / "whole" / "images.jsonl")[1:]
    tables = [read_json(folder / "results.json")["tasks"] for folder in (out, tmp_path / "whole")]
    assert tables[0] == tables[1]
    assert [line for line in finished.splitlines() if line.startswith("|")] == [
        line for line in whole.splitlines() if line.startswith("|")]

    def saved_in(folder):
        paths = (folder / "colours").glob("*.npz")
        return sorted(image for path in paths for image in np.load(path)["image"].tolist())
    records = lines(out / "images.jsonl")[1:]
    right = [r["image"] for r in records if r["task"] == "colours" and r["clean"] == r["label"]]
    # each once, whenever it was killed
    assert saved_in(adv) == right
    results = (out / "results.json").read_text()
    assert "nothing was computed" in command(*words) and (out / "results.json").read_text() == results
    # what is not saved is done again
    new, attacked = tmp_path / "new", sum("adversarial" in record for record in records)
    assert f"going on: {180 - attacked} of 180" in command(*words, "--save-adv", new)
    assert read_json(out / "results.json")["tasks"] == tables[0] and saved_in(new) == right
    # another evaluation's images are neither mixed with nor replaced, wherever its results go
    for more in (("--out", tmp_path / "fresh"), ("--overwrite",)):
        assert "holds images of another evaluation" in command(*words, "--eps", 4, *more, status=2)
    assert saved_in(adv) == right
