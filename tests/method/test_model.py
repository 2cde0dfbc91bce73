"""model.py: loading a CLIP, and the path from pixels to features."""
import copy
import functools
import math

import open_clip
import pytest
import torch

from model import ImageEncoder, image_size, judging, load_clip, model_config, open_clip_lists
from toy import pretrain

# to look at only: it is shared
kept = functools.cache(lambda name, seed=0: load_clip(name, "none", seed=seed)[0])


def toy(seed=0):
    """A CLIP of the toy's architecture with random weights, to do with as one likes."""
    return copy.deepcopy(kept("toy", seed))


@pytest.mark.parametrize("name", ["toy", "ViT-B-32-quickgelu"])
def test_features_are_open_clips_own(name):
    """Ours, from pixels in [0,1], against open_clip's on images normalised by CLIP's published constants."""
    clip, size = kept(name), image_size(name, "none")
    x = torch.rand(2, 3, size, size)
    mean = torch.tensor([.48145466, .4578275, .40821073]).view(3, 1, 1)
    std = torch.tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = clip.encode_image((x - mean) / std)
        assert torch.allclose(ImageEncoder(clip)(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_openai_architecture_is_quickgelu():
    clip = kept("ViT-B-32-quickgelu")
    assert type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_other_resolutions_are_resized_inside_the_differentiated_function():
    clip, _ = load_clip("toy", "none")
    encoder = ImageEncoder(clip)
    for height, width in ((20, 24), (12, 12), (50, 64)):
        # Keys' kernel with a = −0.75 as two matrices, clamped at the edge; no antialiasing, larger or not
        x = torch.rand(2, 3, height, width, dtype=torch.float64)
        rows, columns = keys_matrix(height, 32), keys_matrix(width, 32)
        expected = rows @ x @ columns.T
        x = x.float().requires_grad_()
        assert torch.allclose(encoder(x), encoder(expected.float()), atol=1e-5)
        (grad,) = torch.autograd.grad(encoder(x).sum(), x)
        assert grad.shape == x.shape and (grad != 0).float().mean() > (.99 if height < 32 else .7)


def keys_matrix(old, new):
    """Keys' cubic convolution (1981) with a = −0.75 from `old` to `new` samples, centres at ½: [new, old]."""
    def kernel(t, a=-.75):
        t = abs(t)
        inner, outer = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        return inner if t <= 1 else outer if t < 2 else 0.
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + .5) * old / new - .5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel(centre - j)
    return matrix


def test_low_precision_starts_after_the_patch_embedding():
    clip, _ = load_clip("toy", "none")
    encoder = ImageEncoder(clip, torch.bfloat16)
    seen, x = {}, torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    patches = clip.visual.conv1((x - mean) / std).flatten(2).transpose(1, 2)
    clip.visual.ln_pre.register_forward_hook(lambda m, i, o: seen.update(tokens=i[0]))
    hidden = clip.visual.transformer.resblocks[0].mlp.c_fc
    hidden.register_forward_hook(lambda m, i, o: seen.update(block=o.dtype))
    # nor can a caller lower it
    for lowered in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            assert encoder(x).dtype == torch.float32
        found = seen["tokens"] - clip.visual.positional_embedding
        assert torch.allclose(found[:, 1:], patches, atol=1e-5) and seen["tokens"].dtype == torch.float32
    assert seen["block"] == torch.bfloat16


def test_verdicts_are_in_fp32_whatever_the_encoder():
    clip, _ = load_clip("toy", "none")
    exact, low, x = ImageEncoder(clip), ImageEncoder(clip, torch.bfloat16), torch.rand(5, 3, 32, 32)
    before = low(x)
    torch.set_float32_matmul_precision("high")
    assert torch.equal(judging(low)(x), exact(x)) and not torch.equal(before, exact(x))
    # and then it is what it was
    assert torch.equal(low(x), before) and torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert judging(exact) is exact and judging(len) is len


def test_loaded_clip_is_frozen_and_random_weights_follow_the_seed():
    a, b, c = (load_clip("toy", "none", seed=seed)[0] for seed in (1, 1, 2))
    assert not any(p.requires_grad for p in a.parameters()) and not a.training
    assert torch.equal(a.visual.proj, b.visual.proj) and not torch.equal(a.visual.proj, c.visual.proj)


@pytest.mark.parametrize("name,pretrained,said", [
    ("ViT-Q-32", "openai", "unknown model"), ("ViT-B-32", None, "openai"),
    ("ViT-B-32", "nothing", "expected a file"), ("toy", "seedling", "seed0"),
    ("toy", "no/such/file.pt", "expected a file"), ("hf-hub:a/b", "openai", "its own weights")])
def test_unknown_names_are_one_line_errors(name, pretrained, said):
    with pytest.raises(ValueError, match=said) as error:
        load_clip(name, pretrained)
    assert "\n" not in str(error.value)


def test_names_tags_and_configs_are_open_clips():
    """Which are read without importing it."""
    files, lists = open_clip_lists()
    names = [name for name in open_clip.list_models() if not name.startswith("toy")]
    assert sorted(files) == sorted([*names, "toy"]) and files["toy"] == pretrain.CONFIG
    assert lists.list_pretrained() == open_clip.list_pretrained()
    for name, tag in lists.list_pretrained():
        assert lists.get_pretrained_cfg(name, tag) == open_clip.get_pretrained_cfg(name, tag)
    assert all(model_config(name) == open_clip.get_model_config(name) for name in names)


def test_quickgelu_mismatch_of_which_open_clip_only_warns_is_an_error_before_a_download(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(ValueError, match="QuickGELU mismatch.*--model ViT-B-32-quickgelu"):
        load_clip("ViT-B-32", "openai")
    assert image_size("ViT-B-32-quickgelu", "openai") == image_size("ViT-B-32", "laion2b_s34b_b79k") == 224


@pytest.mark.parametrize("names", [(), ("border",), ("tokens",), ("border", "tokens")])
def test_visual_prompts_against_open_clips_own_modules(names):
    """Added to the normalised image, and appended to its tokens, in a forward of open_clip's modules."""
    clip = toy()
    visual, x = clip.visual, torch.rand(2, 3, 32, 32)
    prompts = {"border": torch.randn(1, 3, 32, 32), "tokens": torch.randn(5, 96)}
    prompts["border"][:, :, 3:-3, 3:-3] = 0
    encoder = ImageEncoder(clip, prompts={name: prompts[name] for name in names})
    mean, std = (torch.tensor(visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        image = (x - mean) / std + (prompts["border"] if "border" in names else 0)
        patches = visual.conv1(image).flatten(2).transpose(1, 2)
        h = torch.cat([visual.class_embedding.expand(2, 1, 96), patches], 1)
        h = h + visual.positional_embedding
        h = torch.cat([h, prompts["tokens"].repeat(2, 1, 1)], 1) if "tokens" in names else h
        expected = visual.ln_post(visual.transformer(visual.ln_pre(h)))[:, 0] @ visual.proj
        for given in (x, encoder.patchify(x)):
            assert torch.allclose(encoder(given), expected, atol=1e-5 * float(expected.abs().max()))
    assert {name for name, p in encoder.named_parameters() if not name.startswith("visual.")} == set(names)
    assert not any(p.requires_grad for p in encoder.parameters())
