"""losses.py: each loss against its formula; and what an adaptation trains, which labels it is given."""
import copy

import open_clip
import pytest
import torch
from in_process import here
from runs import log_of
from torch import nn

from attacks import image_keys
from harness.checkpoints import load_visual, read_checkpoint, save_checkpoint, text_fingerprint
from losses import LOSSES, Published, random_view
from model import ImageEncoder, adapt, freeze, load_clip, parts_of
from prompts import encode_head
from toy import world

TINY = ("--pretrained", "none", "--tasks", "none", "--limit", 32, "--batch-size", 8, "--warmup", 0,
        "--device", "cpu")


@pytest.fixture(scope="module")
def noisy_clip(tmp_path_factory):
    """A file with a CLIP of large random weights: it tells images apart, as open_clip's small ones do not."""
    path, (clip, _) = tmp_path_factory.mktemp("clip") / "noisy.pt", load_clip("toy", "none")
    disturb(clip.visual, .3)
    torch.save(clip.state_dict(), path)
    return path


@torch.no_grad()
def disturb(module, size, seed=0):
    """Move every parameter, as training would."""
    gen = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(size * torch.randn(p.shape, generator=gen))


@pytest.fixture
def train(tmp_path):
    """train(*words) → (the checkpoint that a run of train_tecoa.py ends with, what it printed)."""
    def call(*words, out=tmp_path / "run"):
        printed = here("train_tecoa.py", *TINY, "--out", out, "--overwrite", *words).stdout
        return read_checkpoint(out / "ckpt.pt"), printed
    return call


def seen(count=6):
    images, labels = world.task("seen", "train", 32)
    return images[:count], labels[:count], image_keys(0, 0, torch.arange(count))


def open_clips_features(clip, x):
    constants = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in constants)
    with torch.no_grad():
        return clip.encode_image((x - mean) / std)


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------ losses
SCALE = 7.
OTHERS = [name for name in LOSSES if name not in ("agft", "tga")]       # those are in test_heirs.py


class Small(nn.Module):
    """An image encoder that is cheap in float64: [B,3,8,8] → [B,16]."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x):
        return self.layers(x)


def formula(name, z, z_clean, z_original, head, y, target):
    """(outer, inner, logits that predict) in float64 by probabilities. z: of net at x_adv, for ce and coadv
    through the linear head; z_clean: of net at x; z_original: of the original encoder at x_adv."""
    def probabilities(z):
        s = z if name == "ce" else SCALE * unit(z)
        if name not in ("ce", "coadv"):
            s = s @ (target.double() if name == "imgcoadv" else head).T
        return s.exp() / s.exp().sum(1, keepdim=True)

    def kl(q):
        """As in PMG-AFT's code: nn.KLDivLoss takes log-probabilities first, and is KL(second ‖ first)."""
        return nn.KLDivLoss(reduction="none")(p.log(), q).sum(1)
    if name == "fare":
        distance = torch.stack([sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(z, target)])
        return distance, distance, unit(z) @ head.T
    p = probabilities(z)
    true = p[torch.arange(len(y)), torch.arange(len(y)) if name == "imgcoadv" else y]
    outer, inner = -true.log(), ((1 - true) / true).log()
    if name == "pmg":
        outer = outer + kl(probabilities(z_clean)) + kl(probabilities(z_original))
    return outer, inner, p if name != "imgcoadv" else unit(z) @ head.T


@pytest.mark.parametrize("name", OTHERS)
def test_losses_are_their_formulas_of_whatever_network_is_given(name):
    """A copy of the network that was trained further, and the gradient to its weights: through its prediction
    on clean images as well, through the original's none."""
    gen = torch.Generator().manual_seed(1)
    encoder, original, head = Small(), Small(), unit(torch.randn(5, 16, generator=gen))
    loss = LOSSES[name].make(encoder, head, SCALE)
    disturb(loss.net, .1, seed=2)
    net = copy.deepcopy(loss.net)
    disturb(net, .1, seed=3)
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=gen)
    x_adv = (x / 255 + .1 * torch.randn(x.shape, generator=gen)).clamp(0, 1)
    y, keys = torch.tensor([0, 4, 4, 2, 1, 3]), image_keys(0, 0, torch.arange(6))
    target = loss.target(x, y, keys).detach()

    exact = copy.deepcopy(net).double()
    z, z_clean, z_original = exact(x_adv.double()), exact(x.double() / 255), original.double()(x_adv.double())
    outer, inner, logits = formula(name, z, z_clean, z_original.detach(), head.double(), y, target)
    found, predicted = loss.outer(net, x_adv, target, x)
    assert torch.allclose(found.double(), outer, rtol=1e-4)
    assert torch.allclose(loss.inner(net, x_adv, target).double(), inner, rtol=1e-4, atol=1e-4)
    assert torch.equal(predicted, logits.argmax(1))

    found.sum().backward()
    outer.sum().backward()
    for p, q in zip(net.parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() < 1e-3 * q.grad.norm()
    assert all(p.grad is None for p in loss.net.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_the_attack_follows_its_gradient_to_the_pixels_of_each_image(name):
    """By finite differences through CLIP, its pixels in patches as in training, its weights frozen."""
    (images, labels, keys), (clip, tokenizer) = seen(), load_clip("toy", "none")
    encoder, scale = ImageEncoder(clip), clip.logit_scale.exp().item()
    loss = LOSSES[name].make(encoder, encode_head(clip, tokenizer, *world.TASKS["seen"]), scale)
    freeze(loss.net)
    target = loss.target(images, labels, keys)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    x = (images / 255 + .02 * noise).clamp(0, 1)
    x = encoder.patchify(x).requires_grad_()
    (grad,) = torch.autograd.grad(loss.inner(loss.net, x, target).sum(), x)
    for i in range(len(x)):
        # one image moves: its loss along its gradient, no other's at all
        step = torch.zeros_like(x)
        step[i] = .02 * grad[i] / grad[i].norm()
        with torch.no_grad():
            rise = (loss.inner(loss.net, x + step, target) - loss.inner(loss.net, x - step, target)) / .04
        assert float(rise[i]) == pytest.approx(float(grad[i].norm()), rel=.03)
        assert rise[torch.arange(6) != i].abs().max() < 1e-3 * rise[i]


def test_what_x_adv_is_compared_with():
    """fare: the original CLIP's features of the clean image, whatever the encoder has become; imgcoadv: unit
    features of another view, of the encoder as it is now; the others: the label."""
    (images, labels, keys), (clip, tokenizer) = seen(), load_clip("toy", "none")
    before, encoder = open_clips_features(clip, images / 255), ImageEncoder(clip)
    head = encode_head(clip, tokenizer, *world.TASKS["seen"])
    targets = {name: LOSSES[name].make(encoder, head, 100.).target for name in OTHERS}
    disturb(clip.visual, .1)
    targets = {name: target(images, labels, keys) for name, target in targets.items()}
    now = open_clips_features(clip, random_view(images, keys))
    assert torch.allclose(targets.pop("fare"), before, atol=1e-5)
    assert torch.allclose(targets.pop("imgcoadv"), unit(now), atol=1e-5)
    assert (open_clips_features(clip, images / 255) - before).norm() > .1 and (unit(now) - now).norm() > .1
    assert all(target is labels for target in targets.values())
    assert {name for name, published in LOSSES.items() if not published.labels} == {
        "agft", "fare", "imgcoadv"}


def test_linear_heads_are_trained_and_start_from_pytorchs_seed():
    head = unit(torch.randn(5, 16))
    for name, biased in {"ce": True, "coadv": False, "tecoa": None, "fare": None}.items():
        torch.manual_seed(3)
        encoder = Small()
        loss = LOSSES[name].make(encoder, head, SCALE)
        torch.manual_seed(3)
        Small()
        own = {n: p for n, p in loss.linear_head.named_parameters()}
        if biased is None:
            assert not own and loss.net is encoder
            continue
        expected = nn.Linear(16, 5, bias=biased)
        assert own.keys() == dict(expected.named_parameters()).keys()
        assert all(torch.equal(p, own[n]) for n, p in expected.named_parameters())
        together = [*encoder.parameters(), *own.values()]
        assert all(p is q for p, q in zip(loss.net.parameters(), together, strict=True))


def test_random_views_are_square_crops_of_the_image_that_belongs_to_the_key():
    """Of an image whose red is the column and whose green is the row, a view tells where it was cut."""
    size, n = 32, 400
    ramp = torch.arange(size) + .5
    columns, rows = ramp.expand(size, size), ramp[:, None].expand(size, size)
    image = torch.stack([columns, rows, torch.zeros(size, size)]) / size
    keys = image_keys(0, 0, torch.arange(n))
    views = random_view(image.expand(n, -1, -1, -1), keys) * size
    assert views.shape == (n, 3, size, size) and views.min() >= 0 and views.max() <= size
    # away from the padded rim
    middle = slice(8, 24)
    red, green = views[:, 0, 16, middle].diff(dim=1), views[:, 1, middle, 16].diff(dim=1)
    # 1: the whole image
    width, height = red.abs().mean(1), green.mean(1)
    assert torch.allclose(width, height, atol=.02) and (green > 0).all()
    assert .59 < width.min() < .65 and .95 < width.max() < 1.01
    flipped = (red < 0).float().mean()
    assert .4 < flipped < .6
    centre = views[:, 0, 15:17, 15:17].mean((1, 2))
    assert (centre - 16).abs().max() > 4 and ((centre - 16).abs() <= size * (1 - width) / 2 + .3).all()
    torch.manual_seed(5)
    some = [7, 3, 9]
    assert torch.equal(random_view(image.expand(3, -1, -1, -1), keys[some]) * size, views[some])
    assert not torch.equal(random_view(image[None], image_keys(0, 1, torch.tensor([7])))[0] * size, views[7])


# ------------------------------------------------------------------------------ what trains
# tensors of a transformer block
BLOCK = 12
# (method, options): (tensors, numbers) of the toy, then of ViT-B/32
COUNTS = {
    ("full", ()): ((56, 474_048), (152, 87_849_216)),
    ("partial", (("last_blocks", 2),)): ((2 * BLOCK + 3, 230_016), (2 * BLOCK + 3, 14_570_496)),
    ("partial", (("last_blocks", 1),)): ((BLOCK + 3, 118_176), (BLOCK + 3, 7_482_624)),
    ("linear", ()): ((1, 96 * 64), (1, 768 * 512)),
    ("image-prompt", (("border", 4),)): ((1, 3 * (32**2 - 24**2)), (1, 3 * (224**2 - 216**2))),
    ("token-prompt", (("tokens", 5),)): ((1, 5 * 96), (1, 5 * 768)),
    ("image-prompt,token-prompt", (("border", 10), ("tokens", 200))): (
        (2, 3 * (32**2 - 12**2) + 200 * 96), (2, 3 * (224**2 - 204**2) + 200 * 768))}


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
        # 1 is not among 10 and 11
        assert "visual.transformer.resblocks.1.ln_1.weight" not in trained


def test_prompts_start_from_the_seed_as_normal_numbers_with_nothing_inside():
    clip = load_clip("toy", "none")[0]
    one, same, other = (ImageEncoder(clip) for _ in range(3))
    for encoder, seed in ((one, 0), (same, 0), (other, 1)):
        adapt(encoder, ["image-prompt", "token-prompt"], border=4, tokens=50, seed=seed)
    a, b, c = (encoder.prompts() for encoder in (one, same, other))
    for name in ("border", "tokens"):
        assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert a["border"].shape == (1, 3, 32, 32) and a["tokens"].shape == (50, 96)
    assert (a["border"][:, :, 4:-4, 4:-4] == 0).all() and (a["border"] != 0).sum() == 3 * (32**2 - 24**2)
    for numbers in (a["border"][a["border"] != 0], a["tokens"]):
        assert abs(numbers.mean()) < .1 and abs(numbers.std() - 1) < .1


RUNS = [("partial", "tecoa", ("--last-blocks", 1)), ("linear", "tecoa", ()), ("linear", "fare", ()),
        ("linear", "coadv", ()), ("image-prompt", "tecoa", ("--border", 3)),
        ("token-prompt,image-prompt", "pmg", ("--tokens", 3)),
        ("token-prompt", "ce", ()), ("full", "imgcoadv", ())]


@pytest.mark.parametrize("method,loss,more", RUNS)
def test_three_steps_change_what_trains_and_not_one_bit_of_the_rest(method, loss, more, train):
    checkpoint, printed = train("--adapt", method, "--loss", loss, *more, "--max-steps", 3)
    clip = load_clip("toy", "none")[0]
    start = {name: t for name, t in clip.state_dict().items() if name.startswith("visual.")}
    changed = {name for name, tensor in checkpoint["visual"].items() if not torch.equal(tensor, start[name])}
    last = ("visual.transformer.resblocks.3.", "visual.ln_post.", "visual.proj")
    assert changed == {"partial": {name for name in start if name.startswith(last)},
                       "linear": set() if loss == "coadv" else {"visual.proj"},
                       "full": {*start}}.get(method, set())
    assert checkpoint["text"] == text_fingerprint(clip)

    fresh = ImageEncoder(clip)
    adapt(fresh, method.split(","), last_blocks=1, border=3 if "--border" in more else 4,
          tokens=3 if "--tokens" in more else 5)
    prompts, before = checkpoint.get("prompts", {}), fresh.prompts()
    assert prompts.keys() == before.keys()
    for name, prompt in prompts.items():
        assert prompt.shape == before[name].shape and torch.equal(prompt != 0, before[name] != 0)
        assert ((prompt != before[name]) == (before[name] != 0)).float().mean() > .99

    others, optimizer = checkpoint["training"]["others"], checkpoint["training"]["optimizer"]
    head = {name: t.numel() for name, t in others.items() if name not in ("border", "tokens")}
    weight, bias = {"linear_head.weight": 400 * 64}, {"linear_head.bias": 400}
    assert head == {"ce": weight | bias, "coadv": weight}.get(loss, {})
    trained = sum(start[name].numel() for name in changed)
    trained += sum(int((p != 0).sum()) for p in prompts.values())
    assert f"--adapt {method_in_order(method)} trains {trained + sum(head.values()):,} parameters" in printed
    # the linear head's, beside prompts as well
    assert optimizer["param_groups"][1]["peak_lr"] == {"fare": 2e-3}.get(loss, .014)
    assert len(optimizer["param_groups"][1]["params"]) == len(head)
    assert (checkpoint["config"]["lr"] == 10) == ("prompt" in method)


def method_in_order(method):
    return ",".join(sorted(method.split(",")))


def test_the_first_step_refuses_what_trains_by_mistake(train, monkeypatch):
    """What is meant to train and is not part of what the loss is made of is named."""
    monkeypatch.setattr("model.adapt", lambda *args, **options: adapt(*args, **options) | {
        "extra": nn.Parameter(torch.zeros(1))})
    with pytest.raises(RuntimeError, match=r"without a gradient.*\['extra'\]"):
        train("--max-steps", 1)


def test_prompts_survive_the_checkpoint(tmp_path):
    encoder = ImageEncoder(load_clip("toy", "none")[0])
    adapt(encoder, ["image-prompt", "token-prompt"], border=4, tokens=5)
    disturb(encoder, .3)
    clip = load_clip("toy", "none")[0]
    clip.visual.load_state_dict(encoder.visual.state_dict())
    config = {"model": "toy", "pretrained": "none"}
    save_checkpoint(tmp_path / "ckpt.pt", clip, config, prompts=encoder.prompts())
    checkpoint, fresh = read_checkpoint(tmp_path / "ckpt.pt"), load_clip("toy", "none")[0]
    load_visual(fresh, checkpoint, "ckpt.pt")
    x = seen()[0] / 255
    with torch.no_grad():
        z = ImageEncoder(fresh, prompts=checkpoint["prompts"])(x)
        assert torch.equal(z, encoder(x)) and (z - ImageEncoder(fresh)(x)).abs().max() > .01


def test_trained_prompts_evaluate_to_the_runs_own_numbers(train, tmp_path, read_json, noisy_clip):
    out = tmp_path / "prompted"
    train("--adapt", "image-prompt,token-prompt", "--pretrained", noisy_clip, "--max-steps", 2, "--tasks",
          "colours", "--limit", 64, "--eval-steps", 2, "--eps", 1, "--lr", .5, out=out)
    here("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", "colours", "--limit", 64, "--steps", 2,
         "--device", "cpu", "--out", tmp_path / "evaluation")
    before, after, found = (read_json(path)["tasks"]["colours"] for path in (
        out / "results_before.json", out / "results.json", tmp_path / "evaluation" / "results.json"))
    # a run looks for no signs of masked gradients
    assert found | {"warnings": []} == after | {"warnings": []} and after != before


# ------------------------------------------------------------------------------ labels
def test_pseudo_labels_are_the_original_clips(train, monkeypatch, noisy_clip):
    given = []

    def watched(encoder, head, logit_scale):
        """tecoa, which remembers what it is given"""
        loss = LOSSES["tecoa"].make(encoder, head, logit_scale)
        return loss._replace(target=lambda x, y, keys: given.append((x, y)) or y)
    monkeypatch.setitem(LOSSES, "watched", Published(watched))
    checkpoint, printed = train("--labels", "pseudo", "--adapt", "token-prompt", "--pretrained", noisy_clip,
                                "--max-steps", 2, "--dataset", "digits", "--loss", "watched")
    clip, tokenizer = load_clip("toy", str(noisy_clip))
    names, template = world.TASKS["digits"]
    text = clip.encode_text(tokenizer([template.format(name.lower()) for name in names]))
    images, labels = world.task("digits", "train", 32)
    expected = (unit(open_clips_features(clip, images / 255)) @ unit(text).T).argmax(1)
    assert torch.equal(checkpoint["training"]["kept"]["pseudo_labels"], expected)
    assert 0 < (expected == labels).sum() < 32
    assert f"{100 * (expected == labels).float().mean():.1f} % of the pseudo-labels" in printed

    # what the two steps were given, image by image
    x, y = (torch.cat(parts) for parts in zip(*given))
    numbers = [(images == image).flatten(1).all(1).nonzero()[0].item() for image in x]
    assert len(numbers) == 16 and torch.equal(y, expected[numbers]) and not torch.equal(y, labels[numbers])


def test_two_processes_agree_on_pseudo_labels_shots_and_update(run, train, tmp_path):
    """400 images, one a class, shared by two processes make the update of one."""
    words = ("--limit", 800, "--labels", "pseudo", "--shots", 1, "--loss", "pmg", "--adapt", "image-prompt",
             "--batch-size", 64, "--max-steps", 2, "--lr", .5)
    done = run("train_tecoa.py", *TINY, *words, "--out", tmp_path / "two", processes=2)
    checkpoint, printed = train(*words, out=tmp_path / "one")
    assert "400 images, 400 classes" in printed and "400 images, 400 classes" in done.stdout
    (one,), (two,) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert all(one[word] == pytest.approx(two[word], rel=1e-4) for word in ("loss", "robust"))
    other = read_checkpoint(tmp_path / "two" / "ckpt.pt")
    assert torch.equal(*(found["training"]["kept"]["pseudo_labels"] for found in (checkpoint, other)))
    one, two = checkpoint["prompts"]["border"], other["prompts"]["border"]
    before = ImageEncoder(load_clip("toy", "none")[0])
    adapt(before, ["image-prompt"], border=4)
    assert (one - two).norm() < .02 * (one - before.prompts()["border"]).norm()


# ------------------------------------------------------------------------------ options
def test_bad_combinations_end_in_one_line(tmp_path):
    for words, said in (
            ("--adapt most", "--adapt: most: expected one of full"), ("--adapt full,linear", "--adapt"),
            ("--adapt image-prompt,partial", "--adapt"), ("--adapt token-prompt,token-prompt", "--adapt"),
            ("--last-blocks 2", "partial"), ("--adapt token-prompt --border 3", "image-prompt"),
            ("--adapt image-prompt --tokens 3", "token-prompt"),
            ("--adapt partial --last-blocks 5", "toy has 4"),
            ("--adapt partial --last-blocks 0", "--last-blocks"),
            ("--adapt image-prompt --border 16", "nothing inside"),
            ("--loss fare --labels pseudo", "uses no labels"),
            ("--loss imgcoadv --labels pseudo", "uses no labels"),
            ("--loss agft --labels pseudo", "uses no labels"),
            ("--loss imgcoadv --batch-size 1", "no others"), ("--loss imgcoadv --accumulate 8", "no others"),
            ("--shots 0", "--shots"), ("--labels soft", "--labels"), ("--loss trades", "--loss")):
        done = here("train_tecoa.py", *TINY, "--out", tmp_path / "run", *words.split(), status=2)
        assert done.stdout == "" and done.stderr.count("\n") == 1 and said in done.stderr, (words, done)


def test_unusual_options_are_in_the_folders_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here("train_tecoa.py", *TINY, "--max-steps", 1, "--adapt", "token-prompt,image-prompt", "--tokens", 7,
         "--labels", "pseudo", "--shots", 2)
    (out,) = (tmp_path / "out").iterdir()
    assert out.name.startswith("toy-tecoa-image-prompt,token-prompt-") and out.name.endswith("-seed0")
    unusual = ("pretrainednone", "limit32", "batchsize8", "warmup0", "maxsteps1", "labelspseudo", "shots2",
               "tokens7")
    assert all(f"-{word}-" in out.name for word in unusual) and "border" not in out.name
    assert read_checkpoint(out / "ckpt.pt")["config"]["border"] == 4
