"""model.py: the path from pixels to features, and checkpoints."""
import os

import open_clip
import pytest
import torch

import checkpoints
from checkpoints import load_visual, read_checkpoint, save_checkpoint
from model import ImageEncoder, image_size, load_clip

CONFIG = {"model": "toy", "pretrained": "none"}


@pytest.mark.parametrize("name", ["toy", "ViT-B-32-quickgelu"])
def test_features_are_open_clips_own(name):
    """Ours, from pixels in [0,1], against open_clip's encoder on images normalised by CLIP's published constants."""
    clip, _ = load_clip(name, "none")
    size = image_size(name, "none")
    x = torch.rand(2, 3, size, size)
    mean, std = torch.tensor([.48145466, .4578275, .40821073]), torch.tensor([.26862954, .26130258, .27577711])
    with torch.no_grad():
        expected = clip.encode_image((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert torch.allclose(ImageEncoder(clip)(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_openai_architecture_is_quickgelu():
    clip, _ = load_clip("ViT-B-32-quickgelu", "none")
    assert type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


def test_other_resolutions_are_resized_inside_the_differentiated_function():
    clip, _ = load_clip("toy", "none")
    encoder = ImageEncoder(clip)
    x = torch.rand(2, 3, 20, 24, requires_grad=True)
    resized = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True)
    assert torch.allclose(encoder(x), encoder(resized), atol=1e-6)
    (grad,) = torch.autograd.grad(encoder(x).sum(), x)
    assert grad.shape == x.shape and (grad != 0).float().mean() > .99


def test_low_precision_starts_after_the_patch_embedding():
    clip, _ = load_clip("toy", "none")
    encoder = ImageEncoder(clip, torch.bfloat16)
    seen, x = {}, torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    patches = clip.visual.conv1((x - mean) / std).flatten(2).transpose(1, 2)
    clip.visual.ln_pre.register_forward_hook(lambda m, i, o: seen.update(tokens=i[0]))
    clip.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda m, i, o: seen.update(block=o.dtype))
    for lowered in (False, True):                                                         # nor can a caller lower it
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            assert encoder(x).dtype == torch.float32
        found = seen["tokens"] - clip.visual.positional_embedding
        assert torch.allclose(found[:, 1:], patches, atol=1e-5) and seen["tokens"].dtype == torch.float32
    assert seen["block"] == torch.bfloat16


def test_loaded_clip_is_frozen_and_random_weights_follow_the_seed():
    a, b, c = (load_clip("toy", "none", seed=seed)[0] for seed in (1, 1, 2))
    assert not any(p.requires_grad for p in a.parameters()) and not a.training
    assert torch.equal(a.visual.proj, b.visual.proj) and not torch.equal(a.visual.proj, c.visual.proj)


@pytest.mark.parametrize("name,pretrained,said", [
    ("ViT-Q-32", "openai", "unknown model"), ("ViT-B-32", None, "openai"), ("ViT-B-32", "nothing", "expected a file"),
    ("toy", "seedling", "seed0"), ("toy", "no/such/file.pt", "expected a file"), ("hf-hub:a/b", "openai", "its own weights"),
    ("RN50", "none", "vision transformer")])
def test_unknown_names_are_one_line_errors(name, pretrained, said):
    with pytest.raises(ValueError, match=said) as error:
        load_clip(name, pretrained)
    assert "\n" not in str(error.value)


def test_quickgelu_mismatch_of_which_open_clip_only_warns_is_an_error(monkeypatch):
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: "/nowhere")
    with pytest.raises(ValueError, match="QuickGELU mismatch"):
        load_clip("ViT-B-32", "openai")


def test_checkpoint_round_trip_is_exact_and_plain(tmp_path):
    clip, _ = load_clip("toy", "none")
    for p in clip.visual.parameters():
        p.add_(torch.randn_like(p))
    save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=7)
    assert os.listdir(tmp_path) == ["ckpt.pt"]                                            # no temporary file is left
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 7 and all(name.startswith("visual.") for name in checkpoint["visual"])
    fresh, _ = load_clip("toy", "none")
    load_visual(fresh, checkpoint, "ckpt.pt")
    for name, tensor in clip.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    clip, _ = load_clip("toy", "none")
    save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=1)

    def full(value, path):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")
    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=2)
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 1


def test_wrong_checkpoints_are_refused_by_name(tmp_path):
    clip, _ = load_clip("toy", "none")
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, clip, CONFIG)
    whole = path.read_bytes()
    good = read_checkpoint(path)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)
    for content in (whole[:1000], whole[:-500], b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"ckpt\.pt is not"):
            read_checkpoint(path)
    for other in ({"state_dict": {}}, [1, 2], Evil()):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"ckpt\.pt is not"):
            read_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")

    visual = good["visual"]
    missing = {name: tensor for name, tensor in visual.items() if name != "visual.proj"}
    for bad, said in ((missing, r"missing \['visual.proj'\]"), (visual | {"visual.extra": torch.zeros(1)}, "visual.extra"),
                      (visual | {"visual.proj": torch.zeros(2, 2)}, r"of another shape \['visual.proj'\]")):
        with pytest.raises(ValueError, match=said):
            load_visual(clip, good | {"visual": bad}, "ckpt.pt")
    with pytest.raises(ValueError, match="another text encoder"):
        load_visual(load_clip("toy", "none", seed=9)[0], good, "ckpt.pt")
