"""harness/checkpoints.py: ours, whole and damaged; files of other projects; exports."""
import argparse
import copy
import functools
import os
from contextlib import nullcontext

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch

from harness import checkpoints
from harness.checkpoints import export_clip, load_visual, read_checkpoint, save_checkpoint
from model import ImageEncoder, load_clip, open_clip_lists
from toy import pretrain

CONFIG = {"model": "toy", "pretrained": "none"}
# to look at only: it is shared
kept = functools.cache(lambda name, seed=0: load_clip(name, "none", seed=seed)[0])


def toy(seed=0):
    """A CLIP of the toy's architecture with random weights, to do with as one likes."""
    return copy.deepcopy(kept("toy", seed))


def test_checkpoint_round_trip_is_exact_and_plain(tmp_path):
    clip = toy()
    for p in clip.visual.parameters():
        p.add_(torch.randn_like(p))
    save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=7)
    # no temporary file is left
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 7 and all(name.startswith("visual.") for name in checkpoint["visual"])
    fresh = toy()
    load_visual(fresh, checkpoint, "ckpt.pt")
    for name, tensor in clip.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    clip = toy()
    save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=1)

    def full(value, file):
        file.write(b"half a file")
        raise OSError("No space left on device")
    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=2)
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_disk_with_room_for_two_checkpoints_loses_the_older(tmp_path, monkeypatch):
    clip, real = toy(), torch.save
    for step in (1, 2):
        save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=step)

    def small(value, file):
        if (tmp_path / "ckpt-previous.pt").exists():
            # torch.save's words for a full disk
            raise RuntimeError("unexpected pos 64 vs 0")
        real(value, file)
    monkeypatch.setattr(checkpoints.torch, "save", small)
    save_checkpoint(tmp_path / "ckpt.pt", clip, CONFIG, step=3)
    assert [read_checkpoint(tmp_path / name)["step"] for name in ("ckpt-previous.pt", "ckpt.pt")] == [2, 3]
    assert len([*tmp_path.iterdir()]) == 2


def test_wrong_checkpoints_are_refused_by_name(tmp_path):
    clip = toy()
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, clip, CONFIG)
    whole = path.read_bytes()
    good = read_checkpoint(path)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)
    for content in (whole[:1000], whole[:-500], b"", b"hello", b"<!DOCTYPE html><html>", b"<html>" * 99,
                    b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
                    b"\x10\0\0\0\0\0\0\0{\"a\":"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"ckpt\.pt is (not|damaged)"):
            read_checkpoint(path)
    for other in ({"state_dict": {}}, [1, 2], {}, Evil(), {"state_dict": {"conv1.weight": Evil()}},
                  {"format": "tecoa-1"}, {"fc.weight": torch.zeros(1), **dict.fromkeys(range(9))},
                  {"conv1.weight": torch.zeros(1), "step": 3}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"ckpt\.pt is (not|damaged)") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")

    visual = good["visual"]
    missing = {name: tensor for name, tensor in visual.items() if name != "visual.proj"}
    for bad, said in ((missing, r"missing \['visual.proj'\]"),
                      (visual | {"visual.extra": torch.zeros(1)}, "visual.extra"),
                      (visual | {"visual.proj": torch.zeros(2, 2)}, r"of another shape \['visual.proj'\]")):
        with pytest.raises(ValueError, match=said):
            load_visual(clip, good | {"visual": bad}, "ckpt.pt")
    with pytest.raises(ValueError, match="another text encoder"):
        load_visual(toy(9), good, "ckpt.pt")


# ------------------------------------------------------------------------------ files of others
PADS = {"pad_up": (1, 3, 3, 32), "pad_down": (1, 3, 3, 32),
        "pad_left": (1, 3, 26, 3), "pad_right": (1, 3, 26, 3)}


def write(path, clip, kind):
    """A toy CLIP's weights as another project would write them, by torch.save or safetensors alone."""
    everything = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    visual = {name[7:]: tensor for name, tensor in everything.items() if name.startswith("visual.")}
    finetuned = {"epoch": np.int64(10), "state_dict": {}, "add_prompter": {"prompt": torch.zeros(1, 0, 96)},
                 "vision_encoder_state_dict": visual, "best_acc1": np.float64(55.97),
                 "optimizer": torch.optim.SGD(clip.visual.parameters(), lr=.1, momentum=.9).state_dict()}
    def parallel(state):
        return {f"module.{name}": tensor for name, tensor in state.items()}

    def in_text(name):
        return name if name.startswith(("visual.", "logit")) else f"text.{name}"
    contents = {
        "tecoa": finetuned,
        "tecoa without prompters": finetuned | {"state_dict": None, "add_prompter": None},
        "tecoa in parallel": finetuned | {"vision_encoder_state_dict": parallel(visual)},
        "options": {"args": argparse.Namespace(lr=1.),
                    "model": parallel({f"visual.{name}": tensor for name, tensor in visual.items()})},
        "robustvlm": visual, "robustvlm.safetensors": visual,
        "full": everything, "full.safetensors": everything,
        "open_clip": {"epoch": 3, "name": "run", "state_dict": parallel(everything), "optimizer": {},
                      "scaler": {}},
        "custom text": {in_text(name): t.reshape(t.shape or 1) for name, t in everything.items()}}
    (safetensors.torch.save_file if kind.endswith(".safetensors") else torch.save)(contents[kind], path)


@pytest.mark.parametrize("kind", [
    "tecoa", "tecoa without prompters", "tecoa in parallel", "options", "robustvlm", "robustvlm.safetensors",
    "full", "full.safetensors", "open_clip", "custom text"])
def test_files_of_other_projects_give_their_own_features(kind, tmp_path):
    theirs, ours, x, words = kept("toy", 1), toy(2), torch.rand(1, 3, 32, 32), torch.arange(18)[None]
    write(tmp_path / kind, theirs, kind)
    checkpoint = read_checkpoint(tmp_path / kind, "toy")
    whole = kind in ("full", "full.safetensors", "open_clip", "custom text")
    assert (checkpoint["format"], checkpoint["model"]) == ("full" if whole else "visual", "toy")
    assert checkpoint["pretrained"] is None and checkpoint["config"] == {} and "prompts" not in checkpoint
    load_visual(ours, checkpoint, kind)
    assert torch.equal(ImageEncoder(ours)(x), ImageEncoder(theirs)(x))
    assert torch.equal(ours.encode_text(words), (theirs if whole else kept("toy", 2)).encode_text(words))
    # and as --pretrained FILE
    if kind in ("full", "full.safetensors", "open_clip"):
        assert torch.equal(load_clip("toy", str(tmp_path / kind))[0].encode_image(x), theirs.encode_image(x))


def test_half_precision_files_are_read_as_fp32(tmp_path):
    clip = toy()
    visual = {name: tensor.half() for name, tensor in clip.visual.state_dict().items()}
    torch.save(visual, tmp_path / "fp16.pt")
    read = read_checkpoint(tmp_path / "fp16.pt", "toy")["visual"]
    for name, tensor in read.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, visual[name[7:]].float())


@pytest.mark.parametrize("with_encoder", [True, False])
def test_visual_prompts_of_the_authors(with_encoder, tmp_path):
    clip = toy()
    pads, path = {name: torch.randn(shape) for name, shape in PADS.items()}, tmp_path / "prompts.pth.tar"
    content = {"epoch": 1, "state_dict": pads, "add_prompter": {"prompt": torch.randn(1, 5, 96)},
               "best_acc1": 1.}
    content |= {"vision_encoder_state_dict": clip.visual.state_dict()} if with_encoder else {}
    torch.save(content, path)
    checkpoint = read_checkpoint(path, "toy")
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    load_visual(clip, checkpoint, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    border, tokens = checkpoint["prompts"]["border"], checkpoint["prompts"]["tokens"]
    assert torch.equal(tokens, content["add_prompter"]["prompt"][0]) and (border[:, :, 3:-3, 3:-3] == 0).all()
    assert torch.equal(border[:, :, :3], pads["pad_up"]) and torch.equal(border[:, :, -3:], pads["pad_down"])
    assert torch.equal(border[:, :, 3:-3, :3], pads["pad_left"])
    assert torch.equal(border[:, :, 3:-3, -3:], pads["pad_right"])
    with pytest.raises(ValueError, match="prompts.*cannot be exported"):
        export_clip(clip, "toy", tmp_path, checkpoint["prompts"])

    def tokens_of(tensor):
        return {"add_prompter": {"prompt": tensor}}
    for changed, said in (
            ({"state_dict": {"patch": torch.zeros(1, 3, 5, 5)}}, "another kind"),
            ({"state_dict": pads | {"pad_up": torch.zeros(1, 3, 3, 30)}}, "shapes that do not fit"),
            (tokens_of(torch.zeros(2, 5, 96)), "shapes that do not fit"),
            (tokens_of(torch.zeros(1, 5, 90)), r"of another shape \['tokens'\]"),
            (tokens_of(torch.full((1, 5, 96), torch.nan)), r"NaN.*\['tokens'\]")):
        torch.save(content | changed, path)
        with pytest.raises(ValueError, match=said):
            load_visual(clip, read_checkpoint(path, "toy"), path)
    if not with_encoder:
        with pytest.raises(ValueError, match="visual prompts alone.*give --model and --pretrained"):
            read_checkpoint(path)


def test_whole_foreign_files_are_strict_as_well(tmp_path):
    clip = toy()
    state, path = clip.state_dict(), tmp_path / "full.pt"
    nan = state["ln_final.weight"].clone().fill_(torch.nan)
    for changed, said in (({"ln_final.weight": None}, r"missing \['ln_final.weight'\]"),
                          ({"more": nan}, r"unexpected \['more'\]"),
                          ({"text_projection": torch.zeros(2, 2)}, r"of another shape \['text_projection'\]"),
                          ({"ln_final.weight": nan}, r"NaN or infinite numbers in \['ln_final.weight'\]"),
                          ({"visual.ln_post.bias": -torch.ones(96) / 0}, r"\['visual.ln_post.bias'\]")):
        torch.save({name: tensor for name, tensor in (state | changed).items() if tensor is not None}, path)
        with pytest.raises(ValueError, match=said):
            load_visual(clip, read_checkpoint(path, "toy"), path)


def shaped(name):
    """The state dict of an open_clip model, zeros of the right shapes that take no room."""
    with torch.device("meta"):
        state = open_clip.model.CLIP(**open_clip.get_model_config(name)).state_dict()
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name,layers", [("ViT-B-32", 12), ("ViT-B-16", 12), ("ViT-L-14", 24),
                                         ("ViT-L-14-336", 24)])
def test_openai_models_are_known_by_their_shapes(name, layers, tmp_path):
    """An image encoder of such a shape needs OpenAI's text encoder, unless another base is given."""
    visual = {key[7:]: tensor for key, tensor in shaped(name).items() if key.startswith("visual.")}
    torch.save(visual, tmp_path / "theirs.pt")
    found = [read_checkpoint(tmp_path / "theirs.pt", given) for given in (None, f"{name}-quickgelu", name)]
    assert [(c["model"], c["pretrained"]) for c in found] == [
        (f"{name}-quickgelu", "openai"), (f"{name}-quickgelu", "openai"), (name, None)]
    for other in ({f"transformer.resblocks.{layers}.ln_2.weight": torch.zeros(1)},
                  {"proj": torch.zeros(768, 640)}):
        torch.save(visual | other, tmp_path / "theirs.pt")
        with pytest.raises(ValueError, match="of another shape than OpenAI's.*give --model and --pretrained"):
            read_checkpoint(tmp_path / "theirs.pt")


def test_a_whole_clip_is_inferred_only_if_it_is_openais(tmp_path):
    """LAION's ViT-B-32 has the same shapes and another activation."""
    # which fp16 rounds
    state, third = shaped("ViT-B-32"), torch.tensor(1 / 3)
    embedding = {"token_embedding.weight": third.expand(state["token_embedding.weight"].shape)}
    linear = {"transformer.resblocks.3.mlp.c_fc.weight": third.expand(2048, 512)}
    for changed in ({}, linear, embedding | linear, embedding):
        torch.save(state | changed, tmp_path / "whole.pt")
        if changed is embedding:
            found = read_checkpoint(tmp_path / "whole.pt")
            assert (found["model"], found["pretrained"]) == ("ViT-B-32-quickgelu", "none")
        else:
            with pytest.raises(ValueError, match="not known to be OpenAI's.*give --model and --pretrained"):
                read_checkpoint(tmp_path / "whole.pt")
        assert read_checkpoint(tmp_path / "whole.pt", "ViT-B-32")["pretrained"] is None


def test_openai_weights_without_quickgelu_are_an_error(tmp_path, monkeypatch):
    """In a whole file as --ckpt and as --pretrained FILE; not if all of it is rounded, which says nothing."""
    config, path = tmp_path / "toy-gelu.json", tmp_path / "full.pt"
    config.write_text(pretrain.CONFIG.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    open_clip.add_model_config(config)
    monkeypatch.setitem(open_clip_lists()[0], "toy-gelu", config)
    plain, state = load_clip("toy-gelu", "none")[0], toy().state_dict()
    halves = {name: tensor.half().float() for name, tensor in state.items()}
    linear = {name: t for name, t in halves.items() if name.startswith("transformer") and t.ndim == 2}
    for rounded, refused in (({}, False), (linear, True), (halves, False)):
        torch.save(state | rounded, path)
        # with QuickGELU all are right
        load_visual(toy(), read_checkpoint(path, "toy"), path)
        mismatch = pytest.raises(ValueError, match="QuickGELU mismatch.*toy-gelu-quickgelu")
        for call in (lambda: load_visual(plain, read_checkpoint(path, "toy-gelu"), path),
                     lambda: load_clip("toy-gelu", str(path))):
            with mismatch if refused else nullcontext():
                call()


def test_export_gives_open_clip_the_same_features(tmp_path):
    clip, folder = kept("toy"), tmp_path / "new" / "folder"
    export_clip(clip, "toy", folder)
    assert sorted(os.listdir(folder)) == ["open_clip_config.json", "open_clip_model.safetensors"]
    x, words = torch.rand(1, 3, 32, 32), open_clip.get_tokenizer(f"local-dir:{folder}")("a red star")
    for found in (open_clip.create_model("toy", pretrained=str(folder / "open_clip_model.safetensors")),
                  open_clip.create_model(f"local-dir:{folder}")):
        found.eval()
        with torch.no_grad():
            assert torch.equal(found.encode_image(x), clip.encode_image(x))
            assert torch.equal(found.encode_text(words), clip.encode_text(words))
        # JSON has no tuples
        constants, expected = (str(model.visual.preprocess_cfg).replace("[", "(").replace("]", ")")
                               for model in (found, clip))
        assert constants == expected
