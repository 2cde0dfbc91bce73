"""Checkpoints: writing ours, reading ours and other people's, putting one into a CLIP, exporting one for open_clip.

Nothing in a file is ever executed: torch.load runs with weights_only=True. A damaged file of PyTorch's (since 1.6, a zip) is
never taken for a model: the checksum of each of its parts is compared, which torch.load does not do.
"""
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import open_clip
import safetensors.torch
import torch

from model import are_openai_weights, refuse_damaged, refuse_openai_weights_without_quickgelu

FORMAT = "tecoa-1"
# where files of others keep the weights, best first; in the TeCoA authors' own, state_dict is the border instead
PLACES = ("vision_encoder_state_dict", "state_dict", "model_state_dict", "model")
PADS = ("pad_up", "pad_down", "pad_left", "pad_right")
OPENAI = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")


# ---------------------------------------------------------------------------------------------- writing
def text_fingerprint(clip):
    """Identifies the text encoder that a checkpoint's image encoder was trained against: sha256 of its tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        if not name.startswith("visual."):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path, clip, config, **more):
    """Write the image encoder and what is needed to use it again, as a plain dict that loads with weights_only=True.

    Keys: format, model, pretrained, text (the text encoder's fingerprint), config, visual (open_clip's `visual.*`
    names → fp32 tensors), and `more`, such as step, prompts (of `ImageEncoder.prompts`) and training (of resume.py).
    Written beside, on the disk before it gets its name, and what had that name is kept as *-previous.pt: a killed run leaves
    the old file or the new one, whole. A full disk costs the previous one first. Raises OSError if there is no room then.
    """
    visual = {name: tensor.detach().cpu() for name, tensor in clip.state_dict().items() if name.startswith("visual.")}
    checkpoint = {"format": FORMAT, "model": config["model"], "pretrained": config["pretrained"],
                  "text": text_fingerprint(clip), "config": config, "visual": visual, **more}
    path, temporary = Path(path), Path(f"{path}.tmp")
    previous = path.with_stem(f"{path.stem}-previous")

    def write():
        temporary.unlink(missing_ok=True)                  # which might be a link to somewhere else
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    try:
        try:
            write()
        except (OSError, RuntimeError) as error:           # torch.save raises either when the disk is full
            if not previous.exists() or "DataLoader" in str(error):                    # whose workers' death comes any time
                raise
            previous.unlink()
            write()
        if path.exists():
            link = Path(f"{previous}.tmp")
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)                        # there is a file of this name at every moment
                os.replace(link, previous)
                link.unlink(missing_ok=True)               # still there if both were the same file, after a kill just here
            except OSError:                                # a file system without links
                os.replace(path, previous)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if "DataLoader" in str(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())[:200]} ({free / 1e6:,.1f} MB are free)") from None


def sync_folder(folder):
    """Have the names in a folder on the disk too, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def export_clip(clip, name, folder, prompts=None):
    """Write a CLIP, an open_clip `name`, as folder/open_clip_model.safetensors and open_clip_config.json.

    open_clip.create_model takes the first as `pretrained`, and the folder as `local-dir:FOLDER`. Each file is written
    beside, then renamed. Raises ValueError for a CLIP with visual prompts, for which open_clip has no place.
    """
    if prompts:
        raise ValueError(f"visual prompts ({', '.join(prompts)}) cannot be exported: open_clip has no place for them")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in clip.state_dict().items()}
    preprocess = {key: clip.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    files = {"open_clip_model.safetensors": lambda path: safetensors.torch.save_file(state, path, {"format": "pt"}),
             "open_clip_config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n")}
    for file, write in files.items():
        temporary = folder / f"{file}.tmp{os.getpid()}"
        write(temporary)
        os.replace(temporary, folder / file)


# ---------------------------------------------------------------------------------------------- reading
class Ignored:
    """Stands in for what published files hold besides tensors and Python's own types: numpy's numbers, and options.

    Their values are not needed, so none of numpy's code runs on what a file says.
    """
    NAMES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "argparse.Namespace")

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


def read_file(path):
    """What a file of PyTorch's or a .safetensors holds, on the CPU: a dict. Raises ValueError, in one line, for others."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        head = file.read(64)
    what = ("empty" if not head else "a git-lfs pointer, not the file itself" if head.startswith(b"version https://git-lfs")
            else "a web page" if head.lstrip().startswith(b"<") else None)
    if what:
        raise ValueError(f"{path} is not a checkpoint: it is {what}")
    refuse_damaged(path)
    try:
        if head[8:9] == b"{":                                          # .safetensors: 8 bytes of length, then JSON
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Ignored, name) for name in Ignored.NAMES]):
            warnings.simplefilter("ignore")                            # about a TorchScript file, which is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                         # a damaged file fails in many ways
        wants = re.search(r"GLOBAL (\S+)", str(error))
        how = f"weights_only; it asks for {wants[1]}" if wants else " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is damaged, or not a checkpoint that PyTorch can read ({how})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def tensors_of(state, path):
    """A state dict as {name without the wrappers' prefixes: tensor, fp32 if it is real}; ValueError if it is not one."""
    strange = [name for name, tensor in state.items() if not (isinstance(name, str) and isinstance(tensor, torch.Tensor))]
    if strange:
        raise ValueError(f"{path} is not a checkpoint that is known here: {strange[:3]} among its weights are no tensors")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in state.items()}


def read_prompts(border, tokens, path):
    """The visual prompts {"border": [1, 3, S, S], "tokens": [L, width]} (either, both or none) of the authors' state dicts.

    border: {} or pad_up, pad_down [1, 3, p, S] and pad_left, pad_right [1, 3, S−2p, p]; tokens: {} or prompt
    [1, L, width]. An L of 0, which is what finetuning writes, is none. Raises ValueError for other kinds of prompt.
    """
    if set(border) not in (set(), set(PADS)) or set(tokens) not in (set(), {"prompt"}):
        raise ValueError(f"{path} has visual prompts of another kind than border and tokens: {[*border, *tokens][:3]}")
    prompts = {}
    try:
        if border:
            up, down, left, right = (border[name] for name in PADS)
            inside = left.new_zeros(1, 3, left.shape[2], up.shape[3] - left.shape[3] - right.shape[3])
            prompts["border"] = torch.cat([up, torch.cat([left, inside, right], 3), down], 2)
        if tokens and tokens["prompt"].numel():
            (prompts["tokens"],) = tokens["prompt"]                    # [1, L, width] → [L, width]
    except (RuntimeError, IndexError, ValueError):
        raise ValueError(f"{path} has visual prompts of shapes that do not fit together: "
                         f"{ {name: tuple(t.shape) for name, t in (border | tokens).items()} }") from None
    return prompts


def openai_model(visual):
    """The open_clip name of the one of OpenAI's ViTs that has an image encoder of these shapes; None if none has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in visual.items()}
    for name in OPENAI:
        config = open_clip.get_model_config(f"{name}-quickgelu")
        vision = config["vision_cfg"]
        width, patch, layers = vision["width"], vision["patch_size"], vision["layers"]
        expected = {"conv1.weight": (width, 3, patch, patch), "proj": (width, config["embed_dim"]),
                    "positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
                    f"transformer.resblocks.{layers - 1}.ln_2.weight": (width,),
                    f"transformer.resblocks.{layers}.ln_2.weight": None}
        if all(shapes.get(f"visual.{key}") == shape for key, shape in expected.items()):
            return f"{name}-quickgelu"


def read_checkpoint(path, model=None):
    """A checkpoint, ours or another project's, as one dict. Raises ValueError, in one line, for anything else.

    Read are: ours; the TeCoA authors' .pth.tar and those of their heirs (vision_encoder_state_dict, or only visual
    prompts: state_dict and add_prompter); state dicts of the image encoder alone, as RobustVLM's, or of a whole CLIP,
    as open_clip's, bare, under a key of PLACES, or as .safetensors; with or without `module.`; of any precision.
    model: the open_clip name where the file does not say it; by default it is inferred from the shapes.

    Keys: format (tecoa-1, or visual, full, prompts: what the file holds), model, pretrained (where text encoder and
    constants come from: openai for an image encoder that fits, none for OpenAI's whole CLIP, None if that cannot be
    told), config, visual ({visual.*: fp32}), text (ours: its fingerprint), text_state (full: all other tensors),
    prompts (if there are any, see `read_prompts`).
    """
    content = read_file(path)
    if content.get("format") == FORMAT and {"model", "pretrained", "config", "visual", "text"} <= content.keys():
        kinds = {"model": str, "pretrained": str | None, "config": dict, "visual": dict, "text": str, "prompts": dict,
                 "step": int, "training": dict}
        wrong = [key for key, kind in kinds.items() if key in content and not isinstance(content[key], kind)]
        config = content["config"] if not wrong else {}
        if wrong or not (config.get("norm", "linf") in ("linf", "l2") and ("norm" in config) <= ("eps" in config)
                         and isinstance(config.get("eps", 1), int | float) and isinstance(config.get("seed", 0), int)):
            raise ValueError(f"{path} is not a checkpoint that is known here: its {', '.join(wrong or ['config'])} is of "
                             "another kind than ours")
        tensors_of(content["visual"] | content.get("prompts", {}), path)
        return content
    sections = {key: content[key] for key in (*PLACES, "add_prompter") if isinstance(content.get(key), dict)}
    place = next((key for key in PLACES if any("conv1.weight" in str(name) for name in sections.get(key, {}))), None)
    bare = place is None and any("conv1.weight" in str(name) for name in content)
    weights = tensors_of(content if bare else sections.get(place, {}), path)
    border = sections.get("state_dict", {}) if place == PLACES[0] or place is None and "add_prompter" in content else {}
    prompts = read_prompts(tensors_of(border, path), tensors_of(sections.get("add_prompter", {}), path), path)
    if not weights and not prompts:
        found = ", ".join(map(str, [*content][:4])) + ", …" * (len(content) > 4) or "nothing"
        raise ValueError(f"{path} is not a checkpoint that is known here: it has {found}, and neither a ViT's image encoder "
                         "nor visual prompts")
    if not any(name.startswith("visual.") for name in weights):
        weights = {f"visual.{name}": tensor for name, tensor in weights.items()}
    visual = {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}
    text = {name: tensor for name, tensor in weights.items() if not name.startswith("visual.")}
    inferred = openai_model(visual) if not text or are_openai_weights(text) else None
    kind = "full" if text else "visual" if visual else "prompts"
    if not (model or inferred):
        found = {"full": "a whole CLIP that is not known to be OpenAI's", "visual": "an image encoder of another shape than "
                 "OpenAI's", "prompts": "visual prompts alone"}[kind]
        raise ValueError(f"{path} has {found}, and does not say for which model: give --model and --pretrained")
    pretrained = ("none" if text else "openai") if inferred and model in (None, inferred) else None
    checkpoint = {"format": kind, "model": model or inferred, "pretrained": pretrained, "config": {}, "visual": visual,
                  "text": None}
    return checkpoint | ({"text_state": text} if text else {}) | ({"prompts": prompts} if prompts else {})


def load_visual(clip, checkpoint, path):
    """Put a checkpoint's weights into the CLIP that it was adapted from, strictly. Raises ValueError if they do not fit.

    Ours and image encoders alone leave clip its text encoder, a whole CLIP brings its own. Visual prompts are only
    checked: they belong to `ImageEncoder(clip, prompts=checkpoint.get("prompts"))`.
    """
    if checkpoint["text"] and checkpoint["text"] != text_fingerprint(clip):
        raise ValueError(f"{path} was adapted against another text encoder than that of {checkpoint['model']} "
                         f"{checkpoint['pretrained']} here: give the original weights as --pretrained FILE")
    text = checkpoint.get("text_state", {})
    refuse_openai_weights_without_quickgelu(clip, text, path, checkpoint["model"])
    current = {name: tensor for name, tensor in clip.state_dict().items() if text or name.startswith("visual.")}
    names = {name.removeprefix("text."): name for name in current}     # text.*: some of open_clip's classes
    state = {names.get(name.removeprefix("text."), name): tensor for name, tensor in (checkpoint["visual"] | text).items()}
    for name in ("logit_scale", "logit_bias"):                         # a number, of shape [] or [1]
        if name in state and name in current and state[name].numel() == 1:
            state[name] = state[name].reshape(current[name].shape)
    if checkpoint["format"] == "prompts":
        current = {}
    prompts, (height, width) = checkpoint.get("prompts", {}), clip.visual.image_size
    if "border" in prompts:
        current, state = current | {"border": torch.empty(1, 3, height, width)}, state | {"border": prompts["border"]}
    if "tokens" in prompts:
        expected = torch.empty(len(prompts["tokens"]), clip.visual.conv1.out_channels)
        current, state = current | {"tokens": expected}, state | {"tokens": prompts["tokens"]}
    missing, unexpected = sorted(current.keys() - state), sorted(state.keys() - current)
    wrong = sorted(name for name in current.keys() & state.keys() if current[name].shape != state[name].shape)
    if missing or unexpected or wrong:
        raise ValueError(f"{path} does not fit {checkpoint['model']}: missing {missing[:3]}, unexpected "
                         f"{unexpected[:3]}, of another shape {wrong[:3]}")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has NaN or infinite numbers in {broken[:3]}")
    clip.load_state_dict({name: tensor for name, tensor in state.items() if name not in prompts}, strict=False)
