"""Checkpoints: writing ours, reading ours and others', putting one into a CLIP, exporting one for open_clip.

Nothing in a file is ever executed: torch.load runs with weights_only=True. A damaged file is never taken for
a model: the checksums of its parts are compared, which torch.load does not do.
"""
import hashlib
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch

from harness.files import write_json
from model import (CONFIG, are_openai_weights, check_file, config_beside, from_transformers, model_config,
                   plain_vit, refuse_damaged, refuse_openai_weights_without_quickgelu, resolution,
                   said_beside, said_otherwise)

FORMAT, KEYS = "tecoa-1", {"model", "pretrained", "text", "config", "visual"}      # of checkpoints of ours
# Where files of others keep the weights, best first. In the TeCoA authors' own, state_dict is the border.
PLACES = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model")
PADS = ("pad_up", "pad_down", "pad_left", "pad_right")
# the shapes of conv1.weight, positional_embedding, proj, and how many blocks, of OpenAI's ViTs
OPENAI = {((768, 3, 32, 32), (50, 768), (768, 512), 12): "ViT-B-32-quickgelu",
          ((768, 3, 16, 16), (197, 768), (768, 512), 12): "ViT-B-16-quickgelu",
          ((1024, 3, 14, 14), (257, 1024), (1024, 768), 24): "ViT-L-14-quickgelu",
          ((1024, 3, 14, 14), (577, 1024), (1024, 768), 24): "ViT-L-14-336-quickgelu"}
NOT_NEEDED = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
              "argparse.Namespace")


def text_fingerprint(clip):
    """Identifies the text encoder that an image encoder was trained against: sha256 of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        if not name.startswith(("visual.", "text_decoder.")):           # CoCa's writes captions
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def constants(clip):
    """What an image encoder computes with and its tensors do not say: {"mean", "std", "quick_gelu"}."""
    from open_clip.transformer import QuickGELU         # here, as it takes seconds to import
    known = {name: [*map(float, clip.visual.preprocess_cfg[name])] for name in ("mean", "std")}
    return known | {"quick_gelu": QuickGELU in map(type, clip.visual.modules())}


def save_checkpoint(path, clip, config, **more):
    """Write the image encoder and what is needed to use it again: a dict that loads with weights_only=True.

    Keys: format, model, pretrained, text (the text encoder's fingerprint), constants, config, visual
    (open_clip's `visual.*` names → fp32 tensors), and `more`: step, prompts (of `ImageEncoder.prompts`),
    adapted (the names of the published sets adapted on), training (of harness/training.py). Written to a
    temporary file, fsynced, renamed; what had the name is kept as *-previous.pt, unless the disk is full.
    OSError if there is no room then either."""
    visual = {name: t.detach().cpu() for name, t in clip.state_dict().items() if name.startswith("visual.")}
    checkpoint = {"format": FORMAT, "model": config["model"], "pretrained": config["pretrained"],
                  "text": text_fingerprint(clip), "constants": constants(clip), "config": config,
                  "visual": visual, **more}
    path, temporary = Path(path), Path(f"{path}.tmp")
    previous = path.with_stem(f"{path.stem}-previous")
    try:
        try:
            write_synced(checkpoint, temporary)
        # torch.save raises either when the disk is full; a DataLoader's worker may also die just now
        except (OSError, RuntimeError) as error:
            if not previous.exists() or "DataLoader" in str(error):
                raise
            previous.unlink()
            write_synced(checkpoint, temporary)
        if path.exists():
            keep_as(previous, path)
        os.replace(temporary, path)
        with suppress(OSError):                         # the names on the disk too, where that can be done
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if "DataLoader" in str(error):
            raise
        said, free = " ".join(str(error).split())[:200], shutil.disk_usage(path.parent).free / 1e6
        raise OSError(f"cannot write {path}: {said} ({free:,.1f} MB are free)") from None


def write_synced(checkpoint, path):
    """Write a checkpoint to a new file, and wait until it is on the disk."""
    path.unlink(missing_ok=True)                        # it might be a link to somewhere else
    with open(path, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def keep_as(previous, path):
    """Give the file `path` the name `previous` as well, so that there is a `path` at every moment."""
    link = Path(f"{previous}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
        os.replace(link, previous)
        link.unlink(missing_ok=True)                    # still there if a kill just here made both one file
    except (OSError, AttributeError):                   # a file system or a system without links
        os.replace(path, previous)


def export_clip(clip, name, folder, prompts=None, tokenizer=None):
    """Write a CLIP, an open_clip `name`, as folder/open_clip_model.safetensors and open_clip_config.json:
    open_clip.create_model takes the first as `pretrained`, the folder as `local-dir:FOLDER`. There it looks
    for the tokenizer as well, if that is one of transformers. ValueError for visual prompts, for which
    open_clip has no place."""
    if prompts:
        raise ValueError(f"visual prompts ({', '.join(prompts)}) cannot be exported: open_clip has no place "
                         "for them")
    weights = Path(folder, "open_clip_model.safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in clip.state_dict().items()}
    safetensors.torch.save_file(state, f"{weights}.tmp", {"format": "pt"})
    os.replace(f"{weights}.tmp", weights)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(weights.parent)
    kept = ("mean", "std", "interpolation", "resize_mode")
    write_json(weights.with_name(CONFIG), {
        "model_cfg": model_config(name),
        "preprocess_cfg": {key: clip.visual.preprocess_cfg[key] for key in kept}})
    print(f"wrote {weights} and {CONFIG}: --model local-dir:{weights.parent}")


class Ignored:
    """Stands in for numpy's numbers and options in published files, so that no code runs on what they say."""
    def __init__(self, *_):
        pass
    __setstate__ = __init__


def read_file(path):
    """What a file of PyTorch's or a .safetensors holds, on the CPU: a dict. ValueError for others."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        head = file.read(64)
    what = ("empty" if not head else
            "a git-lfs pointer, not the file itself" if head.startswith(b"version https://git-lfs") else
            "a web page" if head.lstrip().startswith(b"<") else None)
    if what:
        raise ValueError(f"{path} is not a checkpoint: it is {what}")
    refuse_damaged(path)
    try:
        if head[8:9] == b"{":                           # .safetensors: 8 bytes of length, then JSON
            return safetensors.torch.load_file(path)
        ignored = torch.serialization.safe_globals([(Ignored, name) for name in NOT_NEEDED])
        with warnings.catch_warnings(), ignored:
            warnings.simplefilter("ignore")             # about a TorchScript file, which is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                          # a damaged file fails in many ways
        wants = re.search(r"GLOBAL (\S+)", str(error))
        how = f"weights_only; it asks for {wants[1]}" if wants else " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is damaged, or not a checkpoint that PyTorch can read ({how})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def unknown(path, why):
    """The ValueError for a file that is no checkpoint of a kind that is read here."""
    return ValueError(f"{path} is not a checkpoint that is known here: {why}")


def tensors_of(state, path):
    """A state dict as {name without wrappers' prefixes: tensor, fp32 if real}; ValueError for others."""
    strange = [name for name, t in state.items() if not (isinstance(name, str) and torch.is_tensor(t))]
    if strange:
        raise unknown(path, f"{strange[:3]} among its weights are no tensors")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): t.float() if t.is_floating_point() else t
            for name, t in state.items()}


def read_prompts(border, tokens, path):
    """{"border": [1, 3, S, S], "tokens": [L, width]}, either, both or none, of the authors' state dicts.

    border: {} or pad_up, pad_down [1, 3, p, S] and pad_left, pad_right [1, 3, S−2p, p]; tokens: {} or prompt
    [1, L, width], L = 0 after finetuning. ValueError for other kinds of prompt."""
    if set(border) not in (set(), set(PADS)) or set(tokens) not in (set(), {"prompt"}):
        raise ValueError(f"{path} has visual prompts of another kind than border and tokens: "
                         f"{[*border, *tokens][:3]}")
    prompts = {}
    try:
        if border:
            up, down, left, right = (border[name] for name in PADS)
            inside = left.new_zeros(1, 3, left.shape[2], up.shape[3] - left.shape[3] - right.shape[3])
            prompts["border"] = torch.cat([up, torch.cat([left, inside, right], 3), down], 2)
        if tokens and tokens["prompt"].numel():
            (prompts["tokens"],) = tokens["prompt"]     # [1, L, width] → [L, width]
    except (RuntimeError, IndexError, ValueError):
        raise ValueError(f"{path} has visual prompts of shapes that do not fit together: "
                         f"{ {name: tuple(t.shape) for name, t in (border | tokens).items()} }") from None
    return prompts


def openai_model(visual):
    """The open_clip name of that of OpenAI's ViTs whose image encoder has these shapes; None if none has."""
    named = (f"visual.{name}" for name in ("conv1.weight", "positional_embedding", "proj"))
    shapes = [visual[name].shape if name in visual else None for name in named]
    return OPENAI.get((*shapes, sum(name.endswith(".ln_2.weight") for name in visual)))


def check_ours(content, path):
    """ValueError if something in a checkpoint of ours is of another kind than `save_checkpoint` writes."""
    kinds = {"model": str, "pretrained": str | None, "config": dict, "visual": dict, "text": str,
             "constants": dict, "prompts": dict, "step": int, "training": dict, "adapted": list}
    wrong = [key for key, kind in kinds.items() if key in content and not isinstance(content[key], kind)]
    if not wrong:
        config = content["config"]
        norm, eps = config.get("norm", "linf"), config.get("eps", None if "norm" in config else 1)
        fine = norm in ("linf", "l2") and isinstance(eps, int | float)
        wrong = [] if fine and isinstance(config.get("seed", 0), int) else ["config"]
    if wrong:
        raise unknown(path, f"its {', '.join(wrong)} is of another kind than ours")
    tensors_of(content["visual"] | content.get("prompts", {}), path)


def weights_and_prompts(content, path):
    """(weights {open_clip's name: tensor}, visual prompts) in another project's file; ValueError: neither."""
    def has_encoder(state):                             # timm's are in `trunk`
        return any(re.search(r"conv1\.weight|(^|\.)(visual|trunk)\.", str(name)) for name in state)
    sections = {key: content[key] for key in (*PLACES, "add_prompter") if isinstance(content.get(key), dict)}
    place = next((key for key in PLACES if has_encoder(sections.get(key, {}))), None)
    bare = place is None and has_encoder(content)
    weights = tensors_of(content if bare else sections.get(place, {}), path)
    of_the_authors = place == PLACES[0] or place is None and "add_prompter" in content
    border = tensors_of(sections.get("state_dict", {}) if of_the_authors else {}, path)
    prompts = read_prompts(border, tensors_of(sections.get("add_prompter", {}), path), path)
    if not weights and not prompts:
        found = ", ".join(map(str, [*content][:4])) + ", …" * (len(content) > 4) or "nothing"
        raise unknown(path, f"it has {found}, and neither an image encoder nor visual prompts")
    if not any(name.startswith("visual.") for name in weights):             # an image encoder alone
        weights = {f"visual.{name}": tensor for name, tensor in weights.items()}
    return weights, prompts


def read_checkpoint(path, model=None):
    """A checkpoint, ours or another project's (docs/checkpoints.md lists them), as one dict. ValueError for
    anything else. model: the open_clip name, where neither the file says it nor its shapes.

    Keys: format (tecoa-1, or visual, full, prompts: what the file holds), model, pretrained (where the text
    encoder comes from: openai for an image encoder that fits, none for OpenAI's whole CLIP, None: unknown),
    config, visual ({visual.*: fp32}), text (ours: its fingerprint), text_state (full: all other tensors),
    prompts (see `read_prompts`)."""
    content = read_file(path)
    if content.get("format") == FORMAT and content.keys() >= KEYS:
        check_ours(content, path)
        return content
    state = from_transformers(content)
    if state is not content and "visual.proj" not in state:
        raise unknown(path, "it is a CLIPVisionModel of transformers', without the projection that goes with "
                      "it: save its CLIPVisionModelWithProjection")
    weights, prompts = weights_and_prompts(state, path)
    visual, text = ({name: t for name, t in weights.items() if name.startswith("visual.") == wanted}
                    for wanted in (True, False))
    kind = "full" if text else "visual" if visual else "prompts"
    inferred = openai_model(visual) if not text or are_openai_weights(text) else None
    if not (model or inferred):
        found = {"full": "a whole CLIP that is not known to be OpenAI's", "prompts": "visual prompts alone",
                 "visual": "an image encoder of another shape than OpenAI's"}[kind]
        local = f", or --model local-dir:{Path(path).parent} alone" * bool(text and config_beside(path))
        raise ValueError(f"{path} has {found}, and does not say for which model: give --model and "
                         f"--pretrained{local}")
    pretrained = ("none" if text else "openai") if inferred and model in (None, inferred) else None
    more = {key: value for key, value in (("text_state", text), ("prompts", prompts)) if value}
    return {"format": kind, "model": model or inferred, "pretrained": pretrained, "config": {},
            "visual": visual, "text": None, **more}


def load_visual(clip, checkpoint, path, alpha=1.):
    """Put a checkpoint's weights into the CLIP that it was adapted from, or (1 − alpha)·CLIP's + alpha·them.
    ValueError if they do not fit. Visual prompts are only checked: ImageEncoder takes them."""
    text, prompts = (checkpoint.get(key, {}) for key in ("text_state", "prompts"))
    model, visual = checkpoint["model"], checkpoint["visual"]
    if checkpoint["text"] and checkpoint["text"] != text_fingerprint(clip):
        raise ValueError(f"{path} was adapted against another text encoder than that of {model} "
                         f"{checkpoint['pretrained']} here: give the original weights as --pretrained FILE")
    said, here = checkpoint.get("constants"), constants(clip)
    if said and repr(said) != repr(here):
        raise ValueError(f"{path} was adapted with {said}, and {model} {checkpoint['pretrained']} here has "
                         f"{here}: give the original weights as --pretrained FILE, beside their {CONFIG}")
    config = said_beside(path) if checkpoint["format"] != FORMAT else None
    if config:
        check_file(model, path)
    other = said_otherwise(clip, config)
    if {"mean", "std"} & {*other}:
        own = f"--model local-dir:{Path(path).parent}" if config_beside(path) else f"--pretrained {path}"
        raise ValueError(f"the configuration beside {path} says {other}, which is not the normalisation of "
                         f"{model} {checkpoint['pretrained'] or ''} here: a whole CLIP is taken with its own "
                         f"by {own}, without --ckpt or --init")
    refuse_openai_weights_without_quickgelu(clip, text, path, model)
    current = {name: t.shape for name, t in clip.state_dict().items() if text or name.startswith("visual.")}
    names = {name.removeprefix("text."): name for name in current}          # text.*: some of open_clip's
    weights = {names.get(name.removeprefix("text."), name): t for name, t in (visual | text).items()}
    for name in ("logit_scale", "logit_bias"):          # numbers, of shape [] or [1]
        if name in weights and name in current and weights[name].numel() == 1:
            weights[name] = weights[name].reshape(current[name])
    expected, given = {} if checkpoint["format"] == "prompts" else current, weights | prompts
    sizes = {"border": (1, 3, *resolution(clip.visual))}
    if "tokens" in prompts and plain_vit(model_config(model)["vision_cfg"]):
        sizes["tokens"] = len(prompts["tokens"]), clip.visual.conv1.out_channels
    expected = expected | {name: size for name, size in sizes.items() if name in prompts}
    missing, unexpected = sorted(expected.keys() - given), sorted(given.keys() - expected)
    wrong = sorted(name for name in expected.keys() & given if expected[name] != given[name].shape)
    if missing or unexpected or wrong:
        raise ValueError(f"{path} does not fit {model}: missing {missing[:3]}, unexpected {unexpected[:3]}, "
                         f"of another shape {wrong[:3]}")
    broken = [name for name, tensor in given.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has NaN or infinite numbers in {broken[:3]}")
    for name, tensor in clip.state_dict().items():
        if name in weights:                             # batch norm's count of batches has nothing between
            between = alpha < 1 and tensor.is_floating_point()
            tensor.copy_(torch.lerp(tensor, weights[name].to(tensor), alpha) if between else weights[name])
