"""losses.py: the losses of AGFT and TGA-ZSR, each against its formula in NumPy and in the form of its
authors' code; the features of all tokens."""
import copy
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from in_process import here
from runs import log_of
from test_losses import TINY, disturb, unit
from torch import nn

from attacks import image_keys
from harness.checkpoints import read_checkpoint
from losses import LOSSES
from model import ImageEncoder, adapt, load_clip
from prompts import encode_head
from toy import world


# ------------------------------------------------------------------------------ features of all tokens
def open_clips_tokens(clip, x):
    """Features of the class token and of each patch, [B, 1 + h·w, D], as open_clip computes them."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN,
                                                         open_clip.OPENAI_DATASET_STD))
    visual = copy.deepcopy(clip.visual)
    visual.output_tokens = True
    with torch.no_grad():
        z, tokens = visual((x - mean) / std)
        return torch.cat([z[:, None], tokens @ visual.proj], 1)


@pytest.mark.parametrize("usual", [True, False])
def test_features_of_all_tokens_are_open_clips(usual):
    clip, x = load_clip("toy", "none")[0], torch.rand(2, 3, 32, 32)
    disturb(clip.visual, .1)
    encoder = ImageEncoder(clip)
    encoder.usual = usual
    found = encoder(x, all_tokens=True)
    assert found.shape == (2, 17, 64)
    assert torch.allclose(found, open_clips_tokens(clip, x), atol=1e-4)
    assert torch.allclose(found[:, 0], encoder(x), atol=1e-5)


def test_tokens_of_a_prompt_are_left_out():
    clip, x = load_clip("toy", "none")[0], torch.rand(2, 3, 32, 32)
    disturb(clip.visual, .1)
    encoder = ImageEncoder(clip)
    plain = encoder(x, all_tokens=True)
    adapt(encoder, ["token-prompt"], tokens=5)
    found = encoder(x, all_tokens=True)
    assert found.shape == plain.shape and (found - plain).abs().max() > .01
    assert torch.allclose(found[:, 0], encoder(x), atol=1e-5)
    encoder.usual = False                               # which leaves them out after the blocks
    assert torch.allclose(encoder(x, all_tokens=True), found, atol=1e-4)


# ------------------------------------------------------------------------------ the losses
class Small(nn.Module):
    """An image encoder that is cheap in float64: [B, 3, 8, 8] → [B, 16], or [B, 1 + 2·3, 16]."""
    visual = SimpleNamespace(grid_size=(2, 3), image_size=(8, 8))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 7 * 16))

    def forward(self, x, all_tokens=False):
        tokens = self.layers(x).view(len(x), 7, 16)
        return tokens if all_tokens else tokens[:, 0]


def case(name, scale):
    """A loss whose encoder has moved on since it was made, a network that has moved further, and images."""
    gen = torch.Generator().manual_seed(1)
    encoder, head = Small(), unit(torch.randn(5, 16, generator=gen))
    loss, original = LOSSES[name].make(encoder, head, scale), copy.deepcopy(encoder).double()
    disturb(encoder, .1, seed=2)
    net = copy.deepcopy(encoder)
    disturb(net, .1, seed=3)
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8, generator=gen)
    x_adv = (x / 255 + .1 * torch.randn(x.shape, generator=gen)).clamp(0, 1)
    y = torch.tensor([0, 4, 4, 2, 1, 3])
    with torch.no_grad():
        target = loss.target(x, y, image_keys(0, 0, torch.arange(6)))
    return loss, net, original, head.double(), x, x_adv, y, target


def assert_loss_and_gradient(loss, net, exact, target, x, x_adv, expected):
    """The mean of a loss is `expected`, computed through the network `exact`; the gradients agree."""
    losses, predicted = loss.outer(net, x_adv, target, x)
    assert losses.shape == (6,) and losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    losses.mean().backward()
    expected.backward()
    for p, q in zip(net.parameters(), exact.parameters()):
        assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm()
    assert all(p.grad is None for p in loss.net.parameters())
    return predicted


def test_agft_is_a_cross_entropy_with_the_originals_soft_labels():
    """The scales are 180 and 0.4 of it in the authors' command, where 1/τ is 100; here all are a tenth."""
    loss, net, original, head, x, x_adv, y, q = case("agft", 10.)
    exact = copy.deepcopy(net).double()
    s = 18 * .4 * unit(original(x.double() / 255)) @ head.T
    labels = s.softmax(dim=1).detach()
    assert torch.allclose(q.double(), labels, atol=1e-5) and .05 < (1 - labels.amax(1)).mean()
    logits = 18 * unit(exact(x_adv.double())) @ head.T
    inner = loss.inner(net, x_adv, q)
    expected = np.array([-sum(q * (s - np.logaddexp.reduce(row_s)) for q, s in zip(row_q, row_s))
                         for row_q, row_s in zip(labels.numpy(), logits.detach().numpy())])
    assert np.allclose(inner.detach().numpy(), expected, rtol=1e-4)
    predicted = assert_loss_and_gradient(loss, net, exact, q, x, x_adv, nn.CrossEntropyLoss()(logits, labels))
    assert torch.equal(predicted, logits.argmax(1))
    # and at its defaults
    plain = LOSSES["agft"].make(Small(), head.float(), 10., sharper=1., ratio=1.)
    expected = (10 * unit(original(x.double() / 255)) @ head.T).softmax(1)
    assert torch.allclose(plain.target(x, y, None).double(), expected, atol=1e-5)


def resampled(size, small):
    """[size, small], what each pixel takes from a row of values: bilinear, each value in the middle of its
    share of the row, and constant beyond the outer ones."""
    at = ((np.arange(size) + .5) * small / size - .5).clip(0, small - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(small)))


def attention(tokens, text):
    """The attention map [8, 8] of an image's tokens [7, 16], in NumPy."""
    features = tokens / np.sqrt((tokens ** 2).sum(axis=0))              # over the tokens, the class token too
    a = np.array([features[n] @ text for n in range(1, 7)])
    a = (a - a.min()) / (a.max() - a.min())
    return resampled(8, 2) @ a.reshape(2, 3) @ resampled(8, 3).T


def their_attention(tokens, text):
    """The same of a batch in PyTorch, which is differentiable, in the steps of the authors' code."""
    tokens = tokens / tokens.norm(dim=1, keepdim=True)
    a = tokens[:, 1:, :] @ text.unsqueeze(-1)
    a = (a - a.min(1, keepdim=True)[0]) / (a.max(1, keepdim=True)[0] - a.min(1, keepdim=True)[0])
    a = a.reshape(len(a), 2, 3, -1).permute(0, 3, 1, 2)
    return nn.Upsample((8, 8), mode="bilinear")(a).view(len(a), -1)


def test_tga_is_tecoa_and_two_distances_of_attention_maps():
    loss, net, original, head, x, x_adv, y, target = case("tga", 100.)
    exact, text = copy.deepcopy(net).double(), head[y]
    adversarial, clean = (exact(pixels.double(), True) for pixels in (x_adv, x / 255))
    expected = their_attention(original(x.double() / 255, True), text).detach()
    logits = 100 * unit(adversarial[:, 0]) @ head.T
    apart = [torch.mean(torch.norm(their_attention(tokens, text) - expected, dim=1, p=2))
             for tokens in (adversarial, clean)]
    total = nn.CrossEntropyLoss()(logits, y) + .08 * apart[0] + .05 * apart[1]
    # the maps, from scratch
    tokens = [some.detach().numpy() for some in (adversarial, original(x.double() / 255, True))]
    maps = [[attention(some[i], text[i].numpy()) for i in range(6)] for some in tokens]
    assert np.allclose(target[1].numpy(), maps[1], atol=1e-5) and target[0] is y
    distances = [np.sqrt(((a - b) ** 2).sum()) for a, b in zip(*maps)]
    assert apart[0].item() == pytest.approx(np.mean(distances), rel=1e-6) and min(distances) > 1

    # the attack: tecoa's alone
    inner, tecoa = loss.inner(net, x_adv, target), LOSSES["tecoa"].make(Small(), head.float(), 100.)
    assert torch.equal(inner, tecoa.inner(net, x_adv, y))
    predicted = assert_loss_and_gradient(loss, net, exact, target, x, x_adv, total)
    assert torch.equal(predicted, logits.argmax(1))


def test_an_attention_map_that_is_the_same_everywhere_is_finite():
    """Of equal patches, as an untrained or a dead encoder may give."""
    class Flat(Small):
        def forward(self, x, all_tokens=False):
            return super().forward(x, True)[:, :1].expand(-1, 7, -1) if all_tokens else super().forward(x)
    encoder, head = Flat(), unit(torch.randn(5, 16))
    loss, x, y = LOSSES["tga"].make(encoder, head, 7.), torch.rand(4, 3, 8, 8), torch.arange(4)
    losses, _ = loss.outer(encoder, x, loss.target(x, y, None), x)
    losses.sum().backward()
    assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in encoder.parameters())


def test_an_encoder_without_patch_tokens_is_refused():
    encoder = Small()
    encoder.plain = False
    with pytest.raises(ValueError, match="--loss tga needs.*a token for each patch.*is none") as error:
        LOSSES["tga"].make(encoder, torch.eye(16)[:5], 7.)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ in training
@pytest.mark.parametrize("name", ["agft", "tga"])
def test_both_are_traced_whole(name):
    """torch.compile meets nothing that it has to leave out, and finds the same."""
    clip, tokenizer = load_clip("toy", "seed0")
    encoder, (images, labels) = ImageEncoder(clip, torch.bfloat16), world.task("seen", "train", 4)
    loss = LOSSES[name].make(encoder, encode_head(clip, tokenizer, *world.TASKS["seen"]), 47.)
    disturb(clip.visual, .01)
    target, x = loss.target(images, labels, None), encoder.patchify(images)
    x_adv = x / 255 + .02 * torch.randn(x.shape)
    outer, inner = (torch.compile(f, backend="eager", fullgraph=True) for f in (loss.outer, loss.inner))
    assert torch.equal(outer(encoder, x_adv, target, x)[0], loss.outer(encoder, x_adv, target, x)[0])
    assert torch.equal(inner(encoder, x_adv, target), loss.inner(encoder, x_adv, target))


def test_two_processes_and_micro_batches_train_as_one(run, tmp_path):
    """With visual prompts and pseudo-labels, in bf16."""
    words = (*TINY, "--pretrained", "seed0", "--loss", "tga", "--adapt", "image-prompt,token-prompt",
             "--labels", "pseudo", "--dtype", "bf16", "--limit", 64, "--batch-size", 32, "--max-steps", 2,
             "--lr", .5)
    run("train_tecoa.py", *words, "--accumulate", 2, "--out", tmp_path / "two", processes=2)
    here("train_tecoa.py", *words, "--out", tmp_path / "one")
    (one,), (two,) = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert one["loss"] == pytest.approx(two["loss"], rel=.02) and one["loss"] > .1
    one, two = (read_checkpoint(tmp_path / out / "ckpt.pt")["prompts"]["border"] for out in ("one", "two"))
    before = ImageEncoder(load_clip("toy", "none")[0])
    adapt(before, ["image-prompt", "token-prompt"], border=4)
    assert (one - two).norm() < .2 * (one - before.prompts()["border"]).norm()
