"""train_tecoa.py: the losses, what trains, pseudo-labels and few shots. Tiny runs of the real script, in this process."""
import json
import math
import runpy

import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import Dataset, Subset

import data
import toyworld
from attacks import image_keys
from checkpoints import load_visual, read_checkpoint
from data import Folder, Task, load_task
from images import Images
from model import ImageEncoder, adapt, load_clip, parts_of
from sampling import few_shots, labels_of, random_view

TINY = ("--pretrained", "none", "--tasks", "none", "--limit", 32, "--batch-size", 8, "--warmup", 0, "--device", "cpu")
LOSSES = ("tecoa", "ce", "coadv", "imgcoadv", "fare", "pmg")


@pytest.fixture(scope="module")
def noisy_clip(tmp_path_factory):
    """A file with a CLIP of large random weights, that tells images apart as open_clip's small ones do not."""
    path, (clip, _) = tmp_path_factory.mktemp("clip") / "noisy.pt", load_clip("toy", "none")
    torch.manual_seed(0)
    for p in clip.visual.parameters():
        p.add_(.3 * torch.randn_like(p))
    torch.save(clip.state_dict(), path)
    return path


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(*words) → the globals of train_tecoa.py after a run with these options; its folder is "out" among them."""
    def call(*words, script="train_tecoa.py", out=tmp_path / "run"):
        monkeypatch.setattr("sys.argv", [script, *map(str, (*TINY, "--out", out, *words))])
        return runpy.run_path(str(ROOT / script), run_name="__main__")
    return call


def plain():
    """The CLIP that the runs start from, and the head of the set they adapt on, by open_clip alone."""
    clip, tokenizer = load_clip("toy", "none")
    names, template = toyworld.TASKS["seen"]
    with torch.no_grad():
        text = clip.encode_text(tokenizer([template.format(name.lower()) for name in names]))
    return clip, (text / text.norm(dim=1, keepdim=True)).double()


def open_clips_features(clip, x):
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        return clip.encode_image((x - mean) / std)


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


def entropy_terms(s, y):
    """(cross-entropy, log-odds) in float64 from logits, by probabilities."""
    p = s.exp() / s.exp().sum(1, keepdim=True)
    p = p[torch.arange(len(y)), y]
    return -p.log(), ((1 - p) / p).log()


def seen(count=6):
    images, labels = toyworld.task("seen", "train", 32)
    return images[:count], labels[:count], image_keys(0, 0, torch.arange(count))


# ---------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_formulas_and_attacks_follow_their_gradient(loss, train):
    """After two steps, on features that are random; then down to the pixels, by finite differences."""
    run = train("--loss", loss, "--max-steps", 2)
    clip, head = plain()
    scale, gen = math.exp(float(clip.logit_scale)), torch.Generator().manual_seed(1)
    z, z_clean, z_original = torch.randn(3, 6, 400 if loss in ("ce", "coadv") else 64, generator=gen).double()
    y, places = torch.tensor([0, 5, 5, 399, 17, 3]), torch.arange(6)
    s = {"tecoa": lambda z: scale * unit(z) @ head.T, "ce": lambda z: z, "coadv": lambda z: scale * unit(z),
         "imgcoadv": lambda z: scale * unit(z) @ unit(z_clean).T}.get(loss if loss != "pmg" else "tecoa")
    given = {"imgcoadv": unit(z_clean), "fare": z_original}.get(loss, y)
    given = given.float() if loss in ("imgcoadv", "fare") else given
    if loss == "fare":
        expected = attacked = torch.stack([sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(z, z_original)])
    else:
        expected, attacked = entropy_terms(s(z), places if loss == "imgcoadv" else y)
    if loss == "pmg":
        p, p_clean, p_original = (s(t).softmax(1) for t in (z, z_clean, z_original))
        expected = expected + (p * (p / p_clean).log()).sum(1) + (p * (p / p_original).log()).sum(1)
    more = (z_clean.float(), z_original.float()) if loss == "pmg" else ()
    found, predicted = run["loss_fn"](z.float(), given, *more)
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    assert torch.allclose(run["attacked"](z.float(), given).double(), attacked, rtol=1e-4, atol=1e-4)
    rows = z if loss in ("ce", "coadv") else unit(z) @ head.T
    assert torch.equal(predicted, rows.argmax(1))

    images, labels, keys = seen()
    with torch.no_grad():
        target = run["targets"](images, labels, keys)
    x = (images / 255 + .02 * torch.randn(images.shape, generator=gen)).clamp(0, 1).requires_grad_()
    run["net"].requires_grad_(False)
    (grad,) = torch.autograd.grad(run["attack_loss"](x, target).sum(), x)
    for i in range(len(x)):                             # one image moves: its loss along its gradient, no other's at all
        step = torch.zeros_like(x)
        step[i] = .02 * grad[i] / grad[i].norm()
        rise = (run["attack_loss"](x + step, target) - run["attack_loss"](x - step, target)).detach() / .04
        assert float(rise[i]) == pytest.approx(float(grad[i].norm()), rel=.03)
        assert rise[places != i].abs().max() < 1e-3 * rise[i]


def test_losses_that_need_more_than_labels_get_it(train, noisy_clip):
    """fare: features of the original on clean images; pmg: of both on both; imgcoadv: of a second view. After two steps the
    trained encoder is no longer the original."""
    (clip, head), (images, labels, keys) = plain(), seen()
    x, x_adv, scale = images / 255, (images / 255 + .05).clamp(0, 1), math.exp(float(clip.logit_scale))

    def log_p(z):
        return (scale * unit(z.double()) @ head.T).log_softmax(1)
    run = train("--loss", "fare", "--max-steps", 2)
    target = run["targets"](images, labels, keys)
    assert torch.allclose(target, open_clips_features(clip, x), atol=1e-5)
    now = open_clips_features(run["clip"], x_adv)
    assert (now - open_clips_features(clip, x_adv)).norm() > 1e-3                        # it did train
    losses, _ = run["update_loss"](x_adv, target, images)
    assert torch.allclose(losses, (now - open_clips_features(clip, x)).square().sum(1), rtol=1e-3)

    clip.load_state_dict(torch.load(noisy_clip))                                         # tells the images apart
    run, x_adv = train("--loss", "pmg", "--max-steps", 2, "--lr", .1, "--pretrained", noisy_clip), x.flip(0)
    head = run["head"].double()
    scale = run["scale"]
    now, now_clean, before, before_clean = (log_p(open_clips_features(model, image).double())
                                            for model in (run["clip"], clip) for image in (x_adv, x))

    def loss(p, *others):
        return -p[torch.arange(6), labels] + sum((p.exp() * (p - q)).sum(1) for q in others)
    expected = loss(now, now_clean, before)
    for wrong in ((now, now_clean, before_clean), (now, before_clean, before), (now, before), (now, now_clean)):
        assert ((loss(*wrong) - expected).abs() / expected).max() > .01                  # so that each of them would show
    run["net"].requires_grad_(True)
    losses, _ = run["update_loss"](x_adv, labels, images)
    assert torch.allclose(losses.double(), expected, rtol=1e-3)
    losses.sum().backward()
    assert all(p.grad is not None for p in run["net"].parameters())
    assert all(p.grad is None for p in run["original"].parameters())

    run = train("--loss", "imgcoadv", "--max-steps", 2)
    target = run["targets"](images, None, keys)
    assert torch.allclose(target, unit(open_clips_features(run["clip"], random_view(images, keys))), atol=1e-5)


def test_random_views_are_square_crops_of_the_image_that_belongs_to_the_key():
    """Of an image whose red is the column and whose green is the row, in pixels, a view tells where it was cut."""
    size, n = 32, 400
    ramp = torch.arange(size) + .5
    image = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size)]) / size
    keys = image_keys(0, 0, torch.arange(n))
    views = random_view(image.expand(n, -1, -1, -1), keys) * size
    assert views.shape == (n, 3, size, size) and views.min() >= 0 and views.max() <= size
    middle = slice(8, 24)                                                                # away from the padded rim
    red, green = views[:, 0, 16, middle].diff(dim=1), views[:, 1, middle, 16].diff(dim=1)
    width, height = red.abs().mean(1), green.mean(1)                                     # 1: the whole image
    assert torch.allclose(width, height, atol=.02) and (green > 0).all()
    assert .59 < width.min() < .65 and .95 < width.max() < 1.01
    flipped = (red < 0).float().mean()
    assert .4 < flipped < .6
    centre = views[:, 0, 15:17, 15:17].mean((1, 2))
    assert (centre - 16).abs().max() > 4 and ((centre - 16).abs() <= size * (1 - width) / 2 + .3).all()
    torch.manual_seed(5)
    assert torch.equal(random_view(image[None].expand(3, -1, -1, -1), keys[[7, 3, 9]]) * size, views[[7, 3, 9]])
    assert not torch.equal(random_view(image[None], image_keys(0, 1, torch.tensor([7])))[0] * size, views[7])


# ---------------------------------------------------------------------------------------------- what trains
BLOCK = 12                                                                               # tensors of a transformer block
COUNTS = {  # (method, options): (tensors, numbers) of the toy, then of ViT-B/32
    ("full", ()): ((56, 474_048), (152, 87_849_216)),
    ("partial", (("last_blocks", 2),)): ((2 * BLOCK + 3, 230_016), (2 * BLOCK + 3, 14_570_496)),
    ("partial", (("last_blocks", 1),)): ((BLOCK + 3, 118_176), (BLOCK + 3, 7_482_624)),
    ("linear", ()): ((1, 96 * 64), (1, 768 * 512)),
    ("image-prompt", (("border", 4),)): ((1, 3 * (32**2 - 24**2)), (1, 3 * (224**2 - 216**2))),
    ("token-prompt", (("tokens", 5),)): ((1, 5 * 96), (1, 5 * 768)),
    ("image-prompt,token-prompt", (("border", 10), ("tokens", 200))): ((2, 3 * (32**2 - 12**2) + 200 * 96),
                                                                       (2, 3 * (224**2 - 204**2) + 200 * 768))}


def meta_clip(name):
    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config(name)).requires_grad_(False)
    clip.visual.preprocess_cfg = load_clip("toy", "none")[0].visual.preprocess_cfg
    return clip


@pytest.mark.parametrize("name", ["toy", "ViT-B-32-quickgelu"])
def test_what_trains_is_counted(name):
    clip = meta_clip(name) if name != "toy" else load_clip("toy", "none")[0]
    for (methods, options), expected in COUNTS.items():
        trained = adapt(ImageEncoder(clip), methods.split(","), **dict(options))
        found = len(trained), sum(p.numel() for p in trained.values())
        assert found == expected[name != "toy"], (methods, options)
        assert not any(p.requires_grad for p in trained.values())
    if name != "toy":
        trained = adapt(ImageEncoder(clip), ["image-prompt", "token-prompt"], border=40, tokens=200)
        assert {n: p.numel() for n, p in trained.items()} == {"border": 88_320, "tokens": 153_600}
        trained = adapt(ImageEncoder(clip), ["partial"], last_blocks=2)
        assert parts_of(trained) == "visual.proj, resblocks.10, resblocks.11, visual.ln_post"
        assert "visual.transformer.resblocks.1.ln_1.weight" not in trained               # 1 is not among 10 and 11


def test_prompts_start_from_the_seed_as_normal_numbers_with_nothing_inside():
    clip = load_clip("toy", "none")[0]
    one, same, other = (ImageEncoder(clip) for _ in range(3))
    for encoder, seed in ((one, 0), (same, 0), (other, 1)):
        adapt(encoder, ["image-prompt", "token-prompt"], border=4, tokens=50, seed=seed)
    a, b, c = (encoder.prompts() for encoder in (one, same, other))
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name]) for name in ("border", "tokens"))
    assert a["border"].shape == (1, 3, 32, 32) and a["tokens"].shape == (50, 96)
    assert (a["border"][:, :, 4:-4, 4:-4] == 0).all() and (a["border"] != 0).sum() == 3 * (32**2 - 24**2)
    for numbers in (a["border"][a["border"] != 0], a["tokens"]):
        assert abs(numbers.mean()) < .1 and abs(numbers.std() - 1) < .1


RUNS = [("partial", "tecoa", ("--last-blocks", 1)), ("linear", "tecoa", ()), ("linear", "fare", ()), ("linear", "coadv", ()),
        ("image-prompt", "tecoa", ("--border", 3)), ("token-prompt,image-prompt", "pmg", ("--tokens", 3)),
        ("token-prompt", "ce", ()), ("full", "imgcoadv", ())]


@pytest.mark.parametrize("method,loss,more", RUNS)
def test_three_steps_change_what_trains_and_not_one_bit_of_the_rest(method, loss, more, train, capsys):
    run = train("--adapt", method, "--loss", loss, *more, "--max-steps", 3)
    start, checkpoint = plain()[0].state_dict(), read_checkpoint(run["out"] / "ckpt.pt")
    changed = {name for name, tensor in checkpoint["visual"].items() if not torch.equal(tensor, start[name])}
    assert changed == {
        "partial": {n for n in start if n.startswith(("visual.transformer.resblocks.3.", "visual.ln_post.", "visual.proj"))},
        "linear": set() if loss == "coadv" else {"visual.proj"}, "full": {n for n in start if n.startswith("visual.")}
    }.get(method, set())
    assert all(torch.equal(tensor, start[name]) for name, tensor in run["clip"].state_dict().items() if name not in changed)
    fresh = ImageEncoder(plain()[0])
    adapt(fresh, method.split(","), last_blocks=1, border=3 if "--border" in more else 4,
          tokens=3 if "--tokens" in more else 5)
    prompts, before = checkpoint.get("prompts", {}), fresh.prompts()
    assert prompts.keys() == before.keys()
    for name, prompt in prompts.items():
        assert prompt.shape == before[name].shape and torch.equal(prompt != 0, before[name] != 0)
        assert ((prompt != before[name]) == (before[name] != 0)).float().mean() > .99
    readout = run["net"][1].weight.numel() if loss in ("ce", "coadv") else 0
    said = sum(p.numel() for p in run["trained"].values())
    assert said >= readout and f"trains {said:,} numbers" in capsys.readouterr().out
    if readout:
        (slow,) = (g["peak"] for g in run["optimizer"].param_groups if any(p is run["net"][1].weight for p in g["params"]))
        assert slow == 7e-3                                                              # beside prompts as well
    assert (run["args"].lr == 10) == ("prompt" in method)


def test_the_first_step_refuses_what_trains_by_mistake(train, monkeypatch):
    """What is meant to train and is not part of what the loss is made of is named."""
    monkeypatch.setattr("model.adapt", lambda *args, **options: adapt(*args, **options) | {
        "extra": torch.nn.Parameter(torch.zeros(1))})
    with pytest.raises(RuntimeError, match=r"without a gradient.*\['extra'\]"):
        train("--max-steps", 1)


def test_prompts_survive_the_checkpoint_and_evaluate_to_equal_numbers(train, monkeypatch, tmp_path, read_json, noisy_clip):
    out = tmp_path / "prompted"
    run = train("--adapt", "image-prompt,token-prompt", "--pretrained", noisy_clip, "--max-steps", 2, "--tasks", "colours",
                "--limit", 64, "--eval-steps", 2, "--eps", 1, "--lr", .5, out=out)
    checkpoint = read_checkpoint(out / "ckpt.pt")
    clip = load_clip("toy", str(noisy_clip))[0]
    load_visual(clip, checkpoint, "ckpt.pt")
    x = seen()[0] / 255
    with torch.no_grad():
        z = ImageEncoder(clip, prompts=checkpoint["prompts"])(x)
        assert torch.equal(z, run["encoder"](x)) and (z - ImageEncoder(clip)(x)).abs().max() > .01
    words = ("--ckpt", out / "ckpt.pt", "--tasks", "colours", "--limit", 64, "--steps", 2, "--device", "cpu",
             "--out", out / "e")
    monkeypatch.setattr("sys.argv", ["eval_zeroshot.py", *map(str, words)])
    runpy.run_path(str(ROOT / "eval_zeroshot.py"), run_name="__main__")
    after, before = (read_json(out / name)["tasks"]["colours"] for name in ("results.json", "results_before.json"))
    assert read_json(out / "e" / "results.json")["tasks"]["colours"] == after != before


# ---------------------------------------------------------------------------------------------- labels
def test_pseudo_labels_are_the_original_clips(train, capsys, noisy_clip):
    run = train("--labels", "pseudo", "--adapt", "token-prompt", "--pretrained", noisy_clip, "--max-steps", 2, "--dataset",
                "digits")
    clip, tokenizer = load_clip("toy", str(noisy_clip))
    names, template = toyworld.TASKS["digits"]
    text = clip.encode_text(tokenizer([template.format(name.lower()) for name in names]))
    images, labels = toyworld.task("digits", "train", 32)
    expected = (unit(open_clips_features(clip, images / 255)) @ unit(text).T).argmax(1)
    assert torch.equal(run["pseudo"], expected) and 0 < (expected == labels).sum() < 32
    assert f"{100 * (expected == labels).float().mean():.1f} % of the pseudo-labels" in capsys.readouterr().out
    assert torch.equal(run["y"], expected[run["index"]])                                 # what the last step was given
    assert not torch.equal(run["y"], labels[run["index"]])


def test_two_processes_agree_on_pseudo_labels_shots_and_update(run, train, tmp_path):
    """400 images are one a class; shared by two processes they make the update of one. Three passes in one backward."""
    words = (*TINY, "--limit", 4000, "--labels", "pseudo", "--shots", 1, "--loss", "pmg", "--adapt", "image-prompt",
             "--batch-size", 64, "--max-steps", 2, "--lr", .5)
    done = run("train_tecoa.py", *words, "--out", tmp_path / "two", processes=2)
    alone = train(*words[len(TINY):], out=tmp_path / "one")
    assert len(alone["train"].images) == 400 and "400 images, 400 classes" in done.stdout
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text()) for name in ("one", "two")]
    assert all(logs[0][word] == pytest.approx(logs[1][word], rel=1e-4) for word in ("loss", "robust"))
    one, two = (read_checkpoint(tmp_path / name / "ckpt.pt")["prompts"]["border"] for name in ("one", "two"))
    before = ImageEncoder(plain()[0])
    adapt(before, ["image-prompt"], border=4)
    assert 0 < (one - two).norm() < .02 * (one - before.prompts()["border"]).norm() or torch.equal(one, two)


def counts(task):
    return labels_of(task).bincount().tolist()


def test_shots_are_so_many_images_of_each_class():
    task = load_task("seen", "train", limit=2000)                                        # five of each
    some, again, other = (few_shots(task, 3, seed) for seed in (0, 0, 1))
    assert counts(some) == [3] * 400 and counts(few_shots(task, 9, 0)) == [5] * 400
    assert some.images.indices == again.images.indices != other.images.indices
    assert len(set(some.images.indices)) == 1200
    assert all(some.images[i][1] == label for i, label in zip(range(50), labels_of(some)))
    within = few_shots(few_shots(task, 4, 7), 2, 8)                                      # of what --limit left, too
    assert counts(within) == [2] * 400 and {*within.images.indices} <= {*few_shots(task, 4, 7).images.indices}


class Decoded(Dataset):
    """A set with no list of its labels."""
    def __len__(self):
        return 7

    def __getitem__(self, i):
        if i >= 7:
            raise IndexError
        return torch.zeros(3, 4, 4, dtype=torch.uint8), i % 3, i


def test_labels_come_without_decoding_where_the_set_lists_them(tmp_path, monkeypatch):
    for k in range(7):
        (tmp_path / "set" / "train" / f"class{k % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / "train" / f"class{k % 3}" / f"{k}.png")
    data.make_cache(f"folder:{tmp_path / 'set'}", tmp_path / "cache.npy", size=8, data_root=None, workers=0)
    folder, cache = (load_task(f"{kind}:{tmp_path / name}", "train", size=8) for kind, name in (
        ("folder", "set"), ("cache", "cache.npy")))
    files = Task("files", Images("files", [(str(i), i % 3) for i in range(7)], 8), ["a", "b", "c"], "{}")
    assert labels_of(Task("decoded", Decoded(), ["a", "b", "c"], "{}")).tolist() == [0, 1, 2, 0, 1, 2, 0]
    for kind in (Folder, Images, data.Cache):
        monkeypatch.setattr(kind, "__getitem__", lambda self, i: pytest.fail("decodes"))
    assert labels_of(folder).tolist() == labels_of(cache).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert labels_of(files).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert counts(few_shots(folder._replace(images=Subset(folder.images, [0, 2, 3, 6])), 1, 0)) == [1, 1, 1]


# ---------------------------------------------------------------------------------------------- options
def test_bad_combinations_end_in_one_line(train, capsys, tmp_path, monkeypatch):
    for words, said in (
            ("--adapt most", "--adapt: most: expected one of full"), ("--adapt full,linear", "--adapt"),
            ("--adapt image-prompt,partial", "--adapt"), ("--adapt token-prompt,token-prompt", "--adapt"),
            ("--last-blocks 2", "belongs to --adapt partial"), ("--adapt token-prompt --border 3", "image-prompt"),
            ("--adapt image-prompt --tokens 3", "token-prompt"), ("--adapt partial --last-blocks 5", "toy has 4"),
            ("--adapt partial --last-blocks 0", "--last-blocks"), ("--adapt image-prompt --border 16", "nothing inside"),
            ("--loss fare --labels pseudo", "uses no labels"), ("--loss imgcoadv --labels pseudo", "uses no labels"),
            ("--loss imgcoadv --batch-size 1", "no others"), ("--loss imgcoadv --accumulate 8", "no others"),
            ("--shots 0", "--shots"), ("--labels soft", "--labels"), ("--loss trades", "--loss")):
        with pytest.raises(SystemExit) as end:
            train(*words.split())
        stdout, stderr = capsys.readouterr()
        assert end.value.code == 2 and stdout == "" and stderr.count("\n") == 1 and said in stderr, (words, stderr)


def test_unusual_options_are_in_the_folders_name(train, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("--max-steps", 1, "--adapt", "token-prompt,image-prompt", "--tokens", 7, "--labels", "pseudo", "--shots", 2)
    monkeypatch.setattr("sys.argv", ["train_tecoa.py", *map(str, (*TINY, *words))])
    run = runpy.run_path(str(ROOT / "train_tecoa.py"), run_name="__main__")
    assert run["out"].name == ("toy-tecoa-image-prompt-token-prompt-batchsize8-warmup0-limit32-maxsteps1-labelspseudo-"
                               "shots2-tokens7-seed0")
    assert run["args"].border == 4 and (tmp_path / run["out"] / "ckpt.pt").exists()
