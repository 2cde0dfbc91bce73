"""Files of Hugging Face transformers' CLIP, made by it: --ckpt, --init and --pretrained read them."""
import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from in_process import here
from test_init import loaded
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from harness.checkpoints import load_visual, read_checkpoint
from harness.options import content
from harness.training import start_of
from model import CONFIG, ImageEncoder, check_pretrained, load_clip, open_clip_lists

# the toy's architecture, with GELU or QuickGELU
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 49408, "max_position_embeddings": 18, "bos_token_id": 49406, "eos_token_id": 49407}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3,
          "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def theirs():
    """A CLIP of transformers' with large random weights, its biases too."""
    torch.manual_seed(4)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=64)
    clip = CLIPModel(config).eval().requires_grad_(False)
    for p in clip.parameters():
        p.add_(.05 * torch.randn(p.shape))
    return clip


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    """saved(kind) → a file of weights that transformers wrote, its config.json beside it."""
    def call(kind):
        folder, tower = tmp_path_factory.mktemp(kind.replace(" ", "-")), None
        if kind in ("vision", "no projection"):
            cls = CLIPVisionModelWithProjection if kind == "vision" else CLIPVisionModel
            vision = theirs.config.vision_config
            vision.projection_dim = 64
            tower = cls(vision)
            missing, _ = tower.load_state_dict(
                {name.removeprefix("vision_model." * (kind != "vision")): t
                 for name, t in theirs.state_dict().items()}, strict=False)
            assert not missing
        (tower or theirs).save_pretrained(folder)
        if kind != "bin":
            return folder / "model.safetensors"
        # as versions before 4.31 wrote it
        state = theirs.state_dict() | {f"{tower}_model.embeddings.position_ids": torch.arange(n)[None]
                                       for tower, n in (("text", 18), ("vision", 17))}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder / "pytorch_model.bin"
    return call


def pixels_and_words():
    torch.manual_seed(1)
    words = torch.randint(1, 49406, (3, 18))
    words[:, 0] = 49406
    for i, end in enumerate((5, 17, 9)):
        words[i, end] = 49407
        words[i, end + 1:] = 0
    return torch.rand(2, 3, 32, 32), words


def features(clip, theirs):
    """{which: (features here, transformers')} of images and texts."""
    x, words = pixels_and_words()
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    z = theirs.get_image_features((x - mean) / std), theirs.get_text_features(words)
    z = [found if torch.is_tensor(found) else found.pooler_output for found in z]
    return {"image": (ImageEncoder(clip)(x), z[0]), "text": (clip.encode_text(words), z[1])}


def same(pair):
    return torch.allclose(*pair, atol=1e-4 * pair[1].abs().max().item())


@pytest.mark.parametrize("kind", ["whole", "bin", "vision"])
def test_checkpoints_have_transformers_features(kind, saved, theirs):
    """--ckpt; a vision tower leaves the text encoder as it is."""
    path, clip = saved(kind), load_clip("toy", "none")[0]
    before = features(clip, theirs)
    assert not same(before["image"]) and not same(before["text"])
    load_visual(clip, read_checkpoint(path, "toy"), path)
    after = features(clip, theirs)
    assert same(after["image"]) and same(after["text"]) == (kind != "vision")
    assert torch.equal(after["text"][0], before["text"][0]) == (kind == "vision")
    if kind != "vision":
        assert torch.equal(clip.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("kind", ["whole", "bin"])
def test_whole_ones_are_pretrained_files(kind, saved, theirs):
    clip, _ = load_clip("toy", str(saved(kind)))
    assert all(map(same, features(clip, theirs).values()))
    assert torch.equal(clip.logit_scale, theirs.logit_scale)


def test_training_starts_from_them(saved, theirs):
    """A whole one is its own original."""
    start, clip = loaded(saved("vision"))
    for name, tensor in clip.state_dict().items():
        if name in start:
            tensor.copy_(start[name])
    assert same(features(clip, theirs)["image"])
    path = str(saved("whole"))
    assert start_of(SimpleNamespace(init=path, model="toy"))[1] == {"model": "toy", "pretrained": path}


def test_a_whole_one_is_evaluated_by_a_command(saved, tmp_path, read_json):
    words = ("--model", "toy", "--tasks", "digits", "--limit", 8, "--steps", 1, "--out")
    here("eval_zeroshot.py", *words, tmp_path / "one", "--pretrained", saved("whole"))
    here("eval_zeroshot.py", *words, tmp_path / "two", "--pretrained", "none", "--ckpt", saved("whole"))
    one, two = (read_json(tmp_path / name / "results.json")["tasks"]["digits"] for name in ("one", "two"))
    assert one == two


def test_a_tower_without_projection_is_refused(saved):
    """Its prefix is that of transformers before version 5, or none."""
    path = saved("no projection")
    for prefix in ("", "vision_model."):
        state = {f"{prefix}{name.removeprefix('vision_model.')}": t.clone()
                 for name, t in read_as_it_is(path).items()}
        torch.save(state, path.with_name("tower.bin"))
        with pytest.raises(ValueError, match="of transformers', without the projection") as error:
            read_checkpoint(path.with_name("tower.bin"), "toy")
        assert "\n" not in str(error.value)


def read_as_it_is(path):
    import safetensors.torch
    return safetensors.torch.load_file(path)


def test_what_does_not_fit_is_one_line(saved, tmp_path):
    """Layers that are missing, q without k, names that are no text."""
    path, state = tmp_path / "changed.bin", read_as_it_is(saved("vision"))
    layer = "vision_model.encoder.layers.3."
    for changed, said in (
            ({name: t for name, t in state.items() if not name.startswith(layer)}, "missing.*resblocks.3"),
            ({name: t for name, t in state.items() if name != f"{layer}self_attn.k_proj.bias"},
             "unexpected.*resblocks.3.attn.q_proj.bias"),
            (state | {f"{layer}self_attn.v_proj.weight": torch.zeros(96, 90)}, "unexpected.*v_proj.weight"),
            (state | {"vision_model.head.weight": torch.zeros(1)}, "unexpected.*head.weight"),
            (state | {3: torch.zeros(1)}, "is not a checkpoint"),
            (state | {"epoch": 3}, "is not a checkpoint")):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=said) as error:
            load_visual(load_clip("toy", "none")[0], read_checkpoint(path, "toy"), path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="an image encoder alone, is given as --ckpt"):
        load_clip("toy", str(saved("vision")))


@pytest.mark.parametrize("kind", ["whole", "vision"])
def test_the_activation_is_that_of_config_json(kind, saved, monkeypatch, tmp_path):
    """And the number of heads, which no shape says. Without a config, or with another model's, it does not
    count; open_clip_config.json comes first."""
    path = saved(kind)
    whole = json.loads((path.parent / "config.json").read_text())
    gelu = tmp_path / "toy-gelu.json"
    config = json.loads(open_clip_lists()[0]["toy"].read_text()) | {"quick_gelu": False}
    gelu.write_text(json.dumps(config))
    monkeypatch.setitem(open_clip_lists()[0], "toy-gelu", gelu)

    def written(**changes):
        part = whole["vision_config"] if kind == "whole" else whole
        config = whole | {"vision_config": part | changes} if kind == "whole" else whole | changes
        (path.parent / "config.json").write_text(json.dumps(config))

    def check(model, said=None):
        refused = pytest.raises(ValueError, match=said) if said else nullcontext()
        with refused:
            check_pretrained(model, str(path))
        clip = load_clip("toy", "none")[0]
        if model == "toy":                              # open_clip knows no toy-gelu
            with pytest.raises(ValueError, match=said) if said else nullcontext():
                load_visual(clip, read_checkpoint(path, model), path)
    check("toy")
    check("toy-gelu", "QuickGELU mismatch: config.json beside.*quick_gelu True.*take a --model")
    written(hidden_act="gelu")
    check("toy", "QuickGELU mismatch: config.json beside.*quick_gelu False.*take a --model")
    check("toy-gelu")
    written(num_attention_heads=6)
    check("toy", "head_width 16")
    (path.parent / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu"}))
    check("toy")
    (path.parent / "config.json").write_text("[")
    check("toy")
    os.remove(path.parent / "config.json")
    check("toy")


def test_mean_and_std_are_those_of_preprocessor_config_json(saved, theirs):
    path = saved("whole")
    before = content(str(path), "pretrained")
    path.with_name("preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [.5, .4, .3], "image_std": [.5, .25, .2], "resample": 3}))
    clip, _ = load_clip("toy", str(path))
    assert clip.visual.preprocess_cfg["mean"] == [.5, .4, .3] and same(features(clip, theirs)["image"])
    # it is in the identity
    assert content(str(path), "pretrained") != before
    with pytest.raises(ValueError, match=r"\[0.5, 0.4, 0.3\].*by --pretrained .*model.safetensors"):
        load_visual(load_clip("toy", "none")[0], read_checkpoint(path, "toy"), path)
    config = {"model_cfg": json.loads(open_clip_lists()[0]["toy"].read_text()), "preprocess_cfg": {}}
    path.with_name(CONFIG).write_text(json.dumps(config))
    assert load_clip("toy", str(path))[0].visual.preprocess_cfg["mean"] != [.5, .4, .3]
