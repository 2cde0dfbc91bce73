"""Weights in files and folders: mean and std of the configuration beside them; contradictions; tokenizers."""
import copy
import functools
import json
from contextlib import nullcontext

import open_clip
import pytest
import safetensors.torch
import torch

import model
from harness.checkpoints import export_clip, load_visual, read_checkpoint, save_checkpoint
from model import CONFIG, ImageEncoder, image_size, load_clip, weights_in

kept = functools.cache(lambda: load_clip("toy", "none")[0])      # to look at only
MEAN, STD = [.5, .4, .3], [.5, .25, .2]
USUAL = {"mean": MEAN, "std": STD}


@pytest.fixture
def folder(tmp_path):
    """A CLIP of the toy's shapes, its weights and their configuration, as somebody might publish it."""
    safetensors.torch.save_file(dict(kept().state_dict()), tmp_path / "open_clip_model.safetensors")
    configure(tmp_path)
    return tmp_path


def configure(folder, preprocess=None, **changed):
    config = copy.deepcopy(open_clip.get_model_config("toy"))
    for key, value in changed.items():
        tower, _, word = key.partition("__")
        if word:
            config[tower][word] = value
        else:
            config[tower] = value
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess or USUAL}))


def normalised(x):
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    return (x - mean) / std


def features(*words):
    clip, tokenizer = load_clip(*words)
    return ImageEncoder(clip), tokenizer


def same(one, other):
    return torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))


def test_mean_and_std_are_those_of_the_configuration_beside_the_weights(folder, tmp_path, capsys):
    """Of a file, of a folder, and again of what is exported: against open_clip's own forward."""
    x, file = torch.rand(2, 3, 32, 32), folder / "open_clip_model.safetensors"
    with torch.no_grad():
        expected = kept().encode_image(normalised(x))
    for name, pretrained in (("toy", str(file)), (f"local-dir:{folder}", None)):
        encoder, tokenizer = features(name, pretrained)
        assert image_size(name, pretrained) == 32 and same(encoder(x), expected)
        assert torch.equal(tokenizer("a red star"), open_clip.get_tokenizer("toy")("a red star"))
        said = f"{file}: mean [0.5, 0.4, 0.3], std [0.5, 0.25, 0.2], as {CONFIG} beside it says"
        assert (said in capsys.readouterr().out) is (name == "toy")
        clip, _ = load_clip(name, pretrained)
        export_clip(clip, name, tmp_path / "exported")
        for again in (("toy", str(tmp_path / "exported" / file.name)), (f"local-dir:{tmp_path}/exported",)):
            assert same(features(*again)[0](x), expected)
    (folder / CONFIG).unlink()
    assert same(features("toy", str(file))[0](x), ImageEncoder(kept())(x))         # OpenAI's
    assert not same(ImageEncoder(kept())(x), expected)


def test_images_prepared_otherwise_are_said(folder, capsys):
    configure(folder, {"mean": None, "interpolation": "bilinear", "resize_mode": "squash"})
    clip, _ = load_clip(f"local-dir:{folder}")
    assert "resized otherwise (bilinear)" in capsys.readouterr().out
    assert [*clip.visual.preprocess_cfg["mean"]] == [*kept().visual.preprocess_cfg["mean"]]


@pytest.mark.parametrize("changed,said", [
    ({"quick_gelu": False}, "QuickGELU mismatch.*quick_gelu False"),
    ({"vision_cfg__image_size": 64}, r"vision_cfg.image_size 64 .*32"),
    ({"vision_cfg__head_width": 48}, "vision_cfg.head_width 48"), ({"text_cfg__hf_name": "x"}, None)])
def test_a_configuration_of_another_model_is_an_error(folder, changed, said):
    """Though every tensor would fit."""
    configure(folder, **changed)
    file = str(folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=f"{said}.*--model local-dir:{folder}") if said else nullcontext():
        image_size("toy", file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_cfg": 3}', '"model_cfg"', "\udc80",
                                  '{"model_cfg": {"vision_cfg": 1, "text_cfg": 2}}'])
def test_a_damaged_configuration_is_one_line(folder, text):
    (folder / CONFIG).write_text(text, errors="surrogateescape")
    file = str(folder / "open_clip_model.safetensors")
    for name, pretrained in (("toy", file), (f"local-dir:{folder}", None)):
        with pytest.raises(ValueError, match="is not a configuration of open_clip's"):
            image_size(name, pretrained)
    for wrong in ({"mean": [.5]}, {"std": "abc"}, {"mean": 1}):
        configure(folder, wrong)
        with pytest.raises(ValueError, match="is not a configuration of open_clip's"):
            image_size(f"local-dir:{folder}")
    for wrong in ({"mean": [123, 117, 104]}, {"std": [.2, .2, 0]}, {"std": [58, 57, 57]}):
        configure(folder, wrong)
        for name, pretrained in (("toy", file), (f"local-dir:{folder}", None)):
            with pytest.raises(ValueError, match="are not of pixels in"):
                image_size(name, pretrained)


def test_positions_of_another_resolution_are_an_error(folder):
    """open_clip would interpolate them, of a whole model in a folder too."""
    load_clip(f"local-dir:{folder}")
    for changed, said in (({"vision_cfg__image_size": 64}, r"visual.positional_embedding of \(17, .*\(65"),
                          ({"text_cfg__context_length": 20}, "positional_embedding of")):
        configure(folder, **changed)
        with pytest.raises(ValueError, match=said):
            load_clip(f"local-dir:{folder}")


def test_a_folders_weights_are_those_that_open_clip_takes(tmp_path):
    for names in (["a.bin"], ["model.pth", "model.safetensors"], ["x.safetensors", "pytorch_model.bin"],
                  ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "a.safetensors"], ["a.pth"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        assert str(weights_in(folder)) == open_clip.factory._find_checkpoint_in_dir(folder)
    for names, said in (([], "no weights"), (["a.pth", "b.bin"], "any of a.pth, b.bin")):
        folder = tmp_path / said[:2]
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(ValueError, match=said):
            weights_in(folder)


@pytest.mark.parametrize("name,pretrained,said", [
    ("local-dir:nix", None, "there is no open_clip_config"), ("local-dir:nix", "openai", "its own weights")])
def test_folders_that_are_none_are_one_line(name, pretrained, said):
    with pytest.raises(ValueError, match=said) as error:
        image_size(name, pretrained)
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_not_evaluated_on_a_clip_that_normalises_otherwise(folder, tmp_path):
    file = folder / "open_clip_model.safetensors"
    clip, _ = load_clip("toy", str(file))
    save_checkpoint(tmp_path / "ckpt.pt", clip, {"model": "toy", "pretrained": str(file)})
    ours, theirs = read_checkpoint(tmp_path / "ckpt.pt"), read_checkpoint(file, "toy")
    load_visual(load_clip("toy", str(file))[0], ours, "ckpt.pt")
    load_visual(load_clip("toy", str(file))[0], theirs, file)
    plain = copy.deepcopy(kept())
    with pytest.raises(ValueError, match="was adapted with .*0.5, 0.4, 0.3.*0.48145466"):
        load_visual(plain, ours, "ckpt.pt")
    with pytest.raises(ValueError, match=f"not the normalisation of toy.*--model local-dir:{folder}"):
        load_visual(plain, theirs, file)
    configure(folder, quick_gelu=False)
    with pytest.raises(ValueError, match="QuickGELU mismatch"):
        load_visual(load_clip("toy", "none")[0], theirs, file)
    # one of ours from before that was recorded
    load_visual(plain, {key: value for key, value in ours.items() if key != "constants"}, "ckpt.pt")


def test_a_training_checkpoint_as_pretrained_is_one_line(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, kept(), {"model": "toy", "pretrained": "none"})
    for content in (None, {"vision_encoder_state_dict": kept().visual.state_dict(), "state_dict": {}},
                    kept().visual.state_dict()):
        if content:
            torch.save(content, path)
        with pytest.raises(ValueError, match="is given as --ckpt, in training as --init") as error:
            load_clip("toy", str(path))
        assert "\n" not in str(error.value)


def test_a_tokenizer_that_needs_another_package_is_one_line_before_a_download(monkeypatch):
    def find_spec(name):
        return None if name == "transformers" else real(name)
    real = model.find_spec
    monkeypatch.setattr(model, "find_spec", find_spec)
    monkeypatch.setattr(open_clip, "create_model", lambda *_: pytest.fail("loads"))
    for name, pretrained in (("xlm-roberta-base-ViT-B-32", "laion5b_s13b_b90k"),
                             ("roberta-ViT-B-32", "none")):
        with pytest.raises(ValueError, match="tokenizer .*pip install transformers") as error:
            load_clip(name, pretrained)
        assert "\n" not in str(error.value)

    def get_tokenizer(name):
        raise ImportError("T5TokenizerFast requires\nthe protobuf library")
    monkeypatch.setattr(open_clip, "get_tokenizer", get_tokenizer)
    with pytest.raises(ValueError, match="T5TokenizerFast requires the protobuf") as error:
        load_clip("toy", "none")
    assert "\n" not in str(error.value)
