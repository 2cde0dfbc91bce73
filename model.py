"""CLIP: loading one, the differentiable path from pixels to features, what an adaptation trains."""
import functools
import importlib
import json
import logging
import math
import os
import re
import sys
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from kernels.contrastive_loss import contrast

CONFIG, LOCAL_DIR = "open_clip_config.json", "local-dir:"           # open_clip's, beside weights in a file
PIXELS = "preprocessor_config.json"                                 # likewise, of Hugging Face transformers


# open_clip takes two seconds to import: only what computes with a model does it, so that a command line that
# is refused is refused at once
@functools.cache
def open_clip_lists():
    """({model: the file of its config}, open_clip's module `pretrained`), the toy's file among them; both
    without importing open_clip."""
    (folder,) = find_spec("open_clip").submodule_search_locations
    files = {file.stem: file for file in Path(folder, "model_configs").glob("*.json")}
    files["toy"] = Path(__file__).parent / "toy" / "toy.json"
    # a package of another name, at the same place and with nothing imported in it
    package = sys.modules["open_clip_lists"] = ModuleType("open_clip_lists")
    package.__path__ = [folder]
    return files, importlib.import_module("open_clip_lists.pretrained")


def config_beside(path):
    """What open_clip_config.json says that lies beside a file of weights, or in a folder: {"model_cfg": …,
    "preprocess_cfg": …}; None: there is none. ValueError: it says nothing of the kind."""
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        sizes = [config["model_cfg"][tower] for tower in ("vision_cfg", "text_cfg")]
        constants = config.setdefault("preprocess_cfg", {})
        mean, std = ([*map(float, constants.get(name) or [.5] * 3)] for name in ("mean", "std"))
        fine = all(isinstance(part, dict) for part in sizes) and len(mean) == len(std) == 3
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise ValueError(f"{file} is not a configuration of open_clip's, with model_cfg and preprocess_cfg")
    if not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std)):
        raise ValueError(f"{file}: mean {mean} and std {std} are not of pixels in [0,1]")
    return config


def said_beside(path):
    """What other files say of weights that lie beside them, as `config_beside` has it: open_clip_config.json;
    or else, of Hugging Face transformers' CLIP, config.json (activation and heads) and
    preprocessor_config.json (mean and std). None: there are no such files."""
    found = []
    for name in ("config.json", PIXELS):
        try:
            said = json.loads(Path(path).with_name(name).read_text())
        except (OSError, ValueError):
            said = None
        found.append(said if isinstance(said, dict) else {})
    config, pixels = found
    if config_beside(path) or not str(config.get("model_type")).startswith("clip"):
        return config_beside(path)
    vision, text = config.get("vision_config", config), config.get("text_config", {})
    model = {"quick_gelu": vision.get("hidden_act", "quick_gelu") == "quick_gelu", "vision_cfg": {},
             "text_cfg": {"heads": text["num_attention_heads"]} if "num_attention_heads" in text else {}}
    if {"hidden_size", "num_attention_heads"} <= vision.keys():
        model["vision_cfg"]["head_width"] = vision["hidden_size"] // vision["num_attention_heads"]
    return {"model_cfg": model, "preprocess_cfg": {"mean": pixels.get("image_mean"),
                                                   "std": pixels.get("image_std")}}


def weights_in(folder):
    """The file of a local-dir: model's weights, as open_clip chooses it. ValueError: none, or several."""
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
             "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
             "pytorch_model.bin", "pytorch_model.pth", "model.pth")
    found = [file for kind in ("safetensors", "bin", "pth") for file in Path(folder).glob(f"*.{kind}")]
    best = min(found, key=lambda file: [*names, file.name].index(file.name), default=None)
    if best is None or best.name not in names and len(found) > 1:
        what = f"any of {', '.join(sorted(file.name for file in found)[:5])}" if found else "no weights"
        raise ValueError(f"--model {LOCAL_DIR}{folder} has {what}: expected {names[0]}, or a single file")
    return best


def contradictions(one, other, start=""):
    """What two configs of models say otherwise, in words: a list. What one does not say is not compared."""
    found = []
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found += contradictions(one[key], other[key], f"{start}{key}.")
        elif one[key] != other[key] and not key.startswith("hf_"):
            found.append(f"{start}{key} {one[key]} (--model has {other[key]})")
    return sorted(found)


def said_otherwise(clip, config):
    """What `said_beside` says of preprocessing and a CLIP does not have: {name: value}."""
    said, here = (config or {}).get("preprocess_cfg", {}), clip.visual.preprocess_cfg
    # as JSON, which has no tuples
    return {name: said[name] for name in ("mean", "std", "interpolation", "resize_mode")
            if said.get(name) is not None and json.dumps(said[name]) != json.dumps(here[name])}


@functools.cache
def say(text):
    """Print it, once and in process 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def model_config(name):
    """open_clip's config of a model that has a file, or that is in a folder or on a hub: a dict. ValueError:
    there is no such model."""
    if name.startswith(LOCAL_DIR):
        config = config_beside(name.removeprefix(LOCAL_DIR))
        if config is None:
            raise ValueError(f"--model {name}: there is no {CONFIG}")
        return config["model_cfg"]
    if name.startswith("hf-hub:"):
        import open_clip
        return open_clip.get_model_config(name)
    files, _ = open_clip_lists()
    if name not in files:
        raise ValueError(f"unknown model {name!r}: expected toy, local-dir:PATH, hf-hub:ORG/REPO or a name "
                         "from open_clip.list_models(), such as ViT-B-32-quickgelu")
    return json.loads(files[name].read_text())


def hub_repository(name, pretrained):
    """ORG/REPO on Hugging Face's hub that a CLIP is from; None: it is from elsewhere."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    found = open_clip_lists()[1].get_pretrained_cfg(name, pretrained or "").get("hf_hub", "")
    return found.strip("/") or None


def own_vit(vision):
    """Whether a config's vision_cfg is of open_clip's own vision transformers, not a ResNet or timm's."""
    return not vision.get("timm_model_name") and isinstance(vision.get("layers", 12), int)


def plain_vit(vision):
    """Whether it is one that is read at its class token alone, the only kind that takes token prompts."""
    token = not vision.get("attentional_pool") and vision.get("pool_type", "tok") == "tok"
    return own_vit(vision) and token


def own_resize(name, pretrained=None):
    """How a CLIP's own images were made square, where that was not by the shorter side: "squash" or
    "longest", of `to_pixels`; or None. Nothing is loaded yet but a hub's configuration. ValueError."""
    if name.startswith("hf-hub:"):
        from open_clip.pretrained import download_pretrained_from_hf
        file = download_pretrained_from_hf(name.removeprefix("hf-hub:"), filename=CONFIG)
        said = json.loads(Path(file).read_text()).get("preprocess_cfg", {})
    elif name.startswith(LOCAL_DIR) or pretrained and os.path.isfile(pretrained):
        beside = config_beside(name.removeprefix(LOCAL_DIR) if name.startswith(LOCAL_DIR) else pretrained)
        said = (beside or {}).get("preprocess_cfg", {})
    else:
        said = open_clip_lists()[1].get_pretrained_cfg(name, pretrained or "")
    mode = said.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash", "longest"):
        raise ValueError(f"--model {name}: its {CONFIG} has resize_mode {mode!r}, not one of open_clip's")
    if mode == "shortest":
        return None
    say(f"{name} {pretrained or ''}: images in files are resized as its own were, by {mode}, unless --resize "
        "says otherwise")
    return mode


@functools.cache
def say_source(name, pretrained):
    """Print, once and in process 0 alone, where open_clip takes weights and some tokenizers from."""
    if name.startswith(LOCAL_DIR):
        return
    if name.startswith("hf-hub:"):
        weights, text = {"hf_hub": name.removeprefix("hf-hub:")}, {}
    else:
        weights = open_clip_lists()[1].get_pretrained_cfg(name, pretrained or "")
        text = model_config(name)["text_cfg"]
    source = f"huggingface.co/{weights['hf_hub'].strip('/')}" if weights.get("hf_hub") else weights.get("url")
    parts = {"tokenizer": text.get("hf_tokenizer_name"), "text encoder": text.get("hf_model_name")}
    others = [f"huggingface.co/{place} ({part})" for part, place in parts.items() if place]
    places = " and ".join(filter(None, [source, *others]))
    if places:
        say(f"{name} {pretrained or ''} is from {places}, or its copy in the cache")


def check_pretrained(name, pretrained):
    """ValueError if name or pretrained are unknown, or differ in QuickGELU, of which open_clip only warns."""
    for kind in [kind for kind in ("hf-hub:", LOCAL_DIR) if name.startswith(kind)]:
        if pretrained:
            raise ValueError(f"--pretrained {pretrained}: an {kind} model brings its own weights")
        if kind == LOCAL_DIR:
            check_tokenizer(name)
            weights_in(name.removeprefix(LOCAL_DIR))
        return
    _, lists = open_clip_lists()
    if name == "toy":
        tags, known = "seed0, seed1, …", pretrained is None or re.fullmatch(r"seed[0-9]{1,10}", pretrained)
    else:
        model_config(name)                              # is there
        tags = lists.list_pretrained_tags_by_model(name)
        tags, known = ", ".join(tags), pretrained in tags
    if not (known or pretrained == "none" or pretrained and os.path.isfile(pretrained)):
        raise ValueError(f"--pretrained {pretrained} for --model {name}: expected a file, none (random "
                         f"weights) or one of {tags}")
    if known and name != "toy":
        quick = bool(lists.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
        if quick != bool(model_config(name).get("quick_gelu")):
            how = f"with it, which is --model {name}-quickgelu" if quick else f"without it, but {name} has it"
            raise ValueError(f"QuickGELU mismatch: the weights {pretrained} were trained {how}")
    elif pretrained != "none" and not known:
        check_file(name, pretrained)
    check_tokenizer(name)


def check_file(name, path):
    """ValueError if what is said beside a file of weights is of another model than `name`."""
    config = said_beside(path)
    if name != "toy" and not (config_beside(path) or config and config["preprocess_cfg"]["mean"]):
        say(f"{path} has no {CONFIG} beside it: mean and std are OpenAI's")
    if config is None:
        return
    wrong = contradictions(*({"quick_gelu": False} | one
                             for one in (config["model_cfg"], model_config(name))))
    if wrong:
        what = "QuickGELU mismatch: " * any(text.startswith("quick_gelu") for text in wrong)
        ours = config_beside(path)
        raise ValueError(f"{what}{CONFIG if ours else 'config.json'} beside {path} says "
                         f"{', '.join(wrong[:3])}: take " + (f"--model {LOCAL_DIR}{Path(path).parent} instead"
                                                             if ours else "a --model that has the same"))


def check_tokenizer(name):
    """ValueError if a model's tokenizer or text encoder needs a package that is not there."""
    text = model_config(name)["text_cfg"]
    if find_spec("transformers") is None:
        for word, what in (("hf_tokenizer_name", "tokenizer"), ("hf_model_name", "text encoder")):
            if text.get(word):
                raise ValueError(f"the {what} of --model {name}, {text[word]} of huggingface.co, needs the "
                                 "package transformers: pip install transformers")


def image_size(name, pretrained=None):
    """The resolution of a CLIP in pixels. Nothing is loaded yet, but the names are checked: ValueError."""
    check_pretrained(name, pretrained)
    say_source(name, pretrained)
    try:
        size = model_config(name)["vision_cfg"].get("image_size", 224)
    except Exception as error:                  # only a hub can fail here; its client raises many kinds
        raise ValueError(f"cannot reach --model {name}: {' '.join(str(error).split())[:200]}") from None
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"--model {name} takes images of {height}×{width} pixels: only square ones are made")
    return height


def refuse_damaged(path):
    """ValueError if a file of PyTorch's, a zip, is cut short or a part has not its checksum."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
        try:
            bad = zipped and zipfile.ZipFile(file).testzip()
        except Exception as error:              # zipfile raises many kinds
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:100]}") from None
    if bad:
        raise ValueError(f"{path} is damaged: its part {bad} does not have its checksum")


def load_clip(name, pretrained=None, device="cpu", seed=0):
    """The frozen CLIP `name` in fp32 on device, and its tokenizer.

    name: an open_clip model, `local-dir:PATH`, `hf-hub:org/repo`, or `toy`. pretrained: an open_clip tag, a
    file (a state dict, alone, as .safetensors or inside open_clip's training checkpoint, or Hugging Face
    transformers'; mean and std are those `said_beside` it, or else OpenAI's), or `none` for random weights,
    drawn by the seed; of `toy` seed0, seed1, … (pretrained on first use), None: seed<seed>. ValueError if it
    cannot be had, or has not the activation of its weights."""
    image_size(name, pretrained)
    import open_clip

    from toy import pretrain
    if name == "toy":
        pretrain.register()
    if name == "toy" and pretrained and Path(pretrained).resolve().parent == Path(pretrain.__file__).parent:
        pretrained = Path(pretrained).stem      # of those that ship, which are packed
    if name == "toy" and not (pretrained == "none" or pretrained and os.path.isfile(pretrained)):
        pretrained = str(pretrain.pretrained_file(pretrain.seed_of(pretrained) if pretrained else seed))
    file = weights_in(name.removeprefix(LOCAL_DIR)) if name.startswith(LOCAL_DIR) else pretrained
    file = file if file and os.path.isfile(file) else None
    if file:
        refuse_damaged(file)
    theirs = weights_of_transformers(file) if file and pretrained else None
    torch.manual_seed(seed)
    logging.disable()                           # open_clip logs what it does
    what = "the tokenizer of "                  # some are downloaded, whatever the weights are
    try:
        tokenizer = open_clip.get_tokenizer(name)
        what = ""
        clip = open_clip.create_model(name, None if theirs or pretrained == "none" else pretrained)
        if theirs:
            clip.load_state_dict(theirs)
    except Exception as error:                  # open_clip raises many kinds, some over many lines
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if "weights_only" in said:              # PyTorch's advice is to run the code in it
            said = "it is no file of weights, or has more in it than those"
        other = (". A checkpoint of a training run, or an image encoder alone, is given as --ckpt, in "
                 "training as --init") * bool(pretrained and file)
        given = f" --pretrained {pretrained}" * bool(pretrained)
        raise ValueError(f"cannot load {what}--model {name}{given}: {said}{other}") from None
    finally:
        logging.disable(logging.NOTSET)
    visual = clip.visual
    refuse_openai_weights_without_quickgelu(clip, clip.state_dict(), file or f"--pretrained {pretrained}",
                                            name)
    if file and not theirs and not str(file).endswith(".npz"):          # of big_vision's
        check_positions(clip, file)
    if file and pretrained:                     # then open_clip knows nothing of it
        changed = said_otherwise(clip, said_beside(file))
        visual.preprocess_cfg |= changed
        if changed:
            say(f"{file}: {', '.join(f'{name} {value}' for name, value in changed.items())}, as "
                f"{CONFIG if config_beside(file) else PIXELS} beside it says")
    if visual.preprocess_cfg["interpolation"] != "bicubic":
        say(f"{name} {pretrained or ''} was trained on images resized otherwise "
            f"({visual.preprocess_cfg['interpolation']}): here as --protocol and --interpolation say")
    return clip.requires_grad_(False).eval().to(device), tokenizer


# names of transformers' CLIP, and open_clip's
RENAMED = ((r"^vision_model\.", "visual."), (r"^text_model\.", ""),
           (r"^visual_projection.weight", "visual.proj"),
           (r"^text_projection.weight", "text_projection"), (r"embeddings\.patch_embedding", "conv1"),
           (r"embeddings\.class_", "class_"), (r"embeddings\.token_", "token_"),
           (r"embeddings\.position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
           ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"),
           (r"encoder\.layers", "transformer.resblocks"), ("self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"),
           (r"mlp\.fc2", "mlp.c_proj"))


def from_transformers(state):
    """A state dict of Hugging Face transformers' CLIPModel or CLIPVisionModelWithProjection under open_clip's
    names: q, k, v in one, projections transposed. Others are returned as they are."""
    known = any(str(name).endswith("pre_layrnorm.weight") for name in state)        # sic
    if not known or not all(isinstance(name, str) and torch.is_tensor(t) for name, t in state.items()):
        return state
    renamed = {}
    for name, tensor in state.items():
        if not name.endswith("position_ids"):           # of older versions: 0, 1, 2, …
            for theirs, ours in RENAMED:
                name = re.sub(theirs, ours, name)
            renamed[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if len({renamed[part].shape if part in renamed else None for part in parts}) == 1:      # as they are
            renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def weights_of_transformers(path):
    """`from_transformers` of the state dict in a file; None: it is another's, or unreadable."""
    import safetensors.torch
    try:
        with open(path, "rb") as file:
            file.seek(8)
            safe = file.read(1) == b"{"                 # 8 bytes of length, then JSON
        state = safetensors.torch.load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        found = from_transformers(state)
    except Exception:                                   # open_clip says of others what is wrong with them
        return None
    return None if found is state else found


def check_positions(clip, file):
    """ValueError if the positional embeddings in a file of weights are of another shape than the CLIP's, as
    of another resolution: open_clip interpolates them, and says so nowhere."""
    from open_clip.factory import load_state_dict
    state, here = load_state_dict(file), clip.state_dict()
    for name in ("visual.positional_embedding", "positional_embedding"):
        saved, wanted = (tuple(s[name].shape) if name in s else None for s in (state, here))
        if saved and wanted and saved != wanted:
            raise ValueError(f"{file} has a {name} of {saved}, and its configuration wants {wanted}: of "
                             "another resolution or length of text")


def are_openai_weights(state):
    """Whether a CLIP's text tower, {open_clip's name: tensor}, is OpenAI's, which was trained with QuickGELU.

    No state dict says its activation, but OpenAI's files have a mark of their own (an observation of ours):
    linear weights in half precision, the token embedding in single. So, whatever type they were saved in
    since, fp16 holds the first exactly and not the second. Others have fp32 masters of both; a file that was
    rounded as a whole tells nothing. The text tower, because TeCoA freezes it."""
    matrices = {name.removeprefix("text."): t for name, t in state.items() if t.ndim == 2}
    linear = [t for name, t in matrices.items() if re.match(r"transformer\.resblocks\..*weight", name)]
    embedding = [t for name, t in matrices.items() if name == "token_embedding.weight"]
    half = [all(torch.equal(t.float(), t.half().float()) for t in tensors) for tensors in (linear, embedding)]
    return bool(linear and embedding) and half == [True, False]


def refuse_openai_weights_without_quickgelu(clip, state, source, name):
    """ValueError, naming the source, if `state` is OpenAI's and clip, an open_clip `name`, computes another
    activation. Not the other way around: MetaCLIP and DFN used QuickGELU as well."""
    from open_clip.transformer import QuickGELU
    # in the whole CLIP: a ResNet's image encoder has none
    if QuickGELU not in map(type, clip.modules()) and are_openai_weights(state):
        raise ValueError(f"QuickGELU mismatch: the text encoder of {source} is OpenAI's, trained with "
                         f"QuickGELU, which --model {name} lacks: " + (
                             f"say quick_gelu in its {CONFIG}" if name.startswith(LOCAL_DIR) else
                             f"take --model {name}-quickgelu"))


# ------------------------------------------------------------------------------ pixels → features
def resolution(visual):
    """(height, width) of the images that an image encoder of open_clip's takes."""
    size = visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def run_block(block, x, count=None):
    """open_clip's attention block on tokens x [B, N, width] → the first `count` of its outputs (None: all).
    Its own forward puts the tokens before the batch: a product with frozen weights falls apart into N."""
    attention, width, h = block.attn, x.shape[2], block.ln_1(x)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = F.linear(h[:, :count], weight[:width], bias[:width])
    k, v = F.linear(h, weight[width:], bias[width:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B,heads,N,…]
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x[:, :count] + block.ls_1(attention.out_proj(h))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class PixelConv2d(nn.Conv2d):
    """The convolution that reads pixels, in fp32 whatever autocast says."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class ImageEncoder(nn.Module):
    """F_θ, from pixels to features: resize, normalise, patch embedding, blocks, projection.

    forward: x fp32 [B, 3, H, W] in [0,1], at the data set's own resolution, or fp32 [B, h·w, 3·p·p] from
    `patchify` → z fp32 [B, D], not normalised; all_tokens: of the class token and of each patch, fp32
    [B, 1 + h·w, D]. Everything up to the tokens is fp32, because bf16 rounds a pixel by up to half of 1/255;
    the blocks run in `dtype`. That is for vision transformers that are read at their class token. All other
    towers of open_clip's (ResNets, timm's, other pooling) keep their own forward under autocast, but for the
    first convolution; `patchify` leaves their images as they are, and all_tokens is not for them.

    prompts: visual prompts, {"border": [1, 3, S, S], "tokens": [L, width]}, either or both; S is the model's
    resolution. The border, zero inside, is added after resize and normalisation and not clipped. The tokens
    follow the patches, before ln_pre, without positions, the same for every image. Both are frozen parameters
    of this module; of the border only the pixels that are not zero, so that its inside can never change."""

    def __init__(self, clip, dtype=torch.float32, prompts=None):
        super().__init__()
        from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
        self.visual, self.dtype, self.size = clip.visual, dtype, resolution(clip.visual)
        self.plain = (isinstance(self.visual, VisionTransformer) and self.visual.attn_pool is None
                      and self.visual.pool_type == "tok")
        # whether `run_block` knows them
        self.usual = self.plain and all(type(block) is ResidualAttentionBlock
                                        for block in self.visual.transformer.resblocks)
        for name in ("mean", "std"):            # of each number in a patch, [3·p·p]: CLIP's, not ImageNet's
            channels = torch.tensor(clip.visual.preprocess_cfg[name], device=clip.logit_scale.device)
            columns = (channels.repeat_interleave(math.prod(clip.visual.patch_size)) if self.plain else
                       channels.view(3, 1, 1))
            self.register_buffer(name, columns, persistent=False)
        for module in self.visual.modules() if not self.plain else ():
            if type(module) is nn.Conv2d and module.in_channels == 3:
                module.__class__ = PixelConv2d  # another class, not another module: names stay
        self.set_prompts(**prompts or {})

    def set_prompts(self, border=None, tokens=None):
        """Take these visual prompts, [1, 3, S, S] and [L, width], in place of those that were there."""
        frame, device = None, self.mean.device
        if border is not None:                  # its n pixels that are not zero: numbers [n], values [3, n]
            pixels = border[0].flatten(1)
            frame = pixels.any(0).nonzero()[:, 0]
            border, frame = pixels[:, frame], frame.to(device)
        self.register_buffer("frame", frame, persistent=False)
        for name, prompt in (("border", border), ("tokens", tokens)):
            if prompt is not None:
                prompt = nn.Parameter(prompt.float().to(device), requires_grad=False)
            self.register_parameter(name, prompt)

    def whole_border(self):
        """The border as an image of the model's resolution, zero inside: [1, 3, S, S]."""
        height, width = self.size
        pixels = self.border.new_zeros(3, height * width).index_copy(1, self.frame, self.border)
        return pixels.view(1, 3, height, width)

    def prompts(self):
        """The visual prompts as `ImageEncoder` and checkpoints take them, on the CPU: {} without any."""
        found = {"border": None if self.border is None else self.whole_border(), "tokens": self.tokens}
        return {name: prompt.detach().cpu().clone() for name, prompt in found.items() if prompt is not None}

    def patchify(self, x):
        """[B, 3, S, S] → [B, h·w, 3·p·p], any dtype: what the patch embedding multiplies; an attack in this
        layout never rearranges a pixel. Images of another size stay as they are: `forward` resizes."""
        if not self.plain or x.shape[-2:] != self.size:
            return x
        (h, w), (p, q) = self.visual.grid_size, self.visual.patch_size
        return x.reshape(len(x), 3, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(len(x), h * w, 3 * p * q)

    def forward(self, x, all_tokens=False):
        visual, device = self.visual, x.device.type
        with torch.autocast(device, enabled=False):
            if x.ndim == 4 and x.shape[-2:] != self.size:
                # as published code does: without antialiasing, which would weaken δ on its way
                x = F.interpolate(x, self.size, mode="bicubic", align_corners=False)
            if not self.plain:
                return self.through_tower(x)
            x = self.patchify(x)                # patches stay as they are
            # conv1((x − mean) / std): its stride is its size: a product; normalising goes into its weights
            conv1 = visual.conv1.weight.flatten(1)                      # [width, 3·p·p]
            weight = conv1 / self.std
            patches = F.linear(x, weight, -(weight * self.mean).sum(1))          # [B, h·w, width]
            if self.border is not None:         # conv1 is linear: what it adds is the same for every image
                patches = patches + F.linear(self.patchify(self.whole_border()), conv1)
            first = visual.class_embedding.expand(len(x), 1, -1)
            tokens = torch.cat([first, patches], 1) + visual.positional_embedding
            if self.tokens is not None:
                tokens = torch.cat([tokens, self.tokens.expand(len(x), -1, -1)], 1)
            tokens = visual.ln_pre(tokens)
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            blocks = visual.transformer.resblocks
            # of the last block's tokens a prompt's are never used
            count = first.shape[1] + patches.shape[1] if all_tokens else 1
            if self.usual:
                for block in blocks:
                    tokens = run_block(block, tokens, count if block is blocks[-1] else None)
            else:
                tokens = visual.transformer(tokens)
            z = visual.ln_post(tokens[:, :count] if all_tokens else tokens[:, 0])
            return (z if visual.proj is None else z @ visual.proj).float()

    def through_tower(self, x):
        """Images of the tower's own size through its own forward: z fp32 [B, D]."""
        x = (x - self.mean) / self.std
        if self.border is not None:
            x = x + self.whole_border()
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            z = self.visual(x)
            return (z[0] if isinstance(z, tuple) else z).float()                # CoCa's has its tokens too


@torch.no_grad()
def predict(encoder, head, logit_scale, x):
    """The class of each image x fp32 [B, 3, H, W], int64 [B]; −1: NaN. head: unit rows [K, D]."""
    z = encoder(x)
    best = contrast(z, head, z.new_zeros(len(z), dtype=torch.int64), logit_scale)[1]    # whatever the labels
    return torch.where(z.isfinite().all(1), best, -1)


@contextmanager
def full_precision(encoder):
    """Inside, an ImageEncoder computes in fp32, without TF32."""
    before = encoder.dtype, torch.get_float32_matmul_precision()
    encoder.dtype = torch.float32
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        encoder.dtype = before[0]
        torch.set_float32_matmul_precision(before[1])


def judging(encoder):
    """An encoder as verdicts ask it: what is reported comes from an fp32 forward. Itself if it is in fp32."""
    if getattr(encoder, "dtype", torch.float32) == torch.float32:
        return encoder

    def judge(x):
        with full_precision(encoder):
            return encoder(x)
    return judge


# ------------------------------------------------------------------------------ what trains
ADAPTATIONS = ("full", "partial", "linear", "image-prompt", "token-prompt")


def check_adaptation(methods, name, *, last_blocks, border):
    """ValueError if the image encoder of the model `name` has no blocks or tokens that could train, or fewer
    than `last_blocks`, or `border` covers all of an image. Nothing is loaded yet."""
    vision = model_config(name)["vision_cfg"]
    if "token-prompt" in methods and not plain_vit(vision):
        raise ValueError(f"--adapt token-prompt: the image encoder of {name} is no vision transformer that "
                         "is read at its class token")
    if "partial" in methods and not own_vit(vision):
        raise ValueError(f"--adapt partial: the image encoder of {name} is no vision transformer of "
                         "open_clip's own")
    if "partial" in methods and last_blocks > vision.get("layers", 12):
        raise ValueError(f"--last-blocks {last_blocks}: {name} has {vision.get('layers', 12)}")
    size = vision.get("image_size", 224)
    size = size if isinstance(size, int) else min(size)
    if "image-prompt" in methods and 2 * border >= size:
        raise ValueError(f"--border {border} leaves nothing inside, the model takes {size} pixels")


def projection(visual):
    """The last linear map of an image encoder: the names of its parameters in it, []: it has none."""
    if hasattr(visual, "trunk"):                # timm's: its classifier, or what open_clip has put behind it
        linear = [module for part in (visual.trunk.get_classifier(), visual.head)
                  for module in part.modules() if isinstance(module, nn.Linear)]
        last = [*linear[-1].parameters()] if linear else []
    else:
        last = [*visual.attnpool.c_proj.parameters()] if hasattr(visual, "attnpool") else [visual.proj]
    return [name for name, p in visual.named_parameters() if any(p is other for other in last)]


def adapt(encoder, methods, *, last_blocks=2, border=30, tokens=5, seed=0):
    """{name: parameter} of encoder that the methods train (Mao et al. 2023, Figure 2); it gets their prompts.

    full: every parameter of the image encoder. partial: the last `last_blocks` blocks, attention pooling
    behind them, ln_post and proj. linear: its `projection` alone. image-prompt: a border of `border` pixels;
    token-prompt: `tokens` tokens; both drawn from normal(0, 1) by the seed, alone or together. A size that
    plays no part may be None."""
    visual, gen, prompts = encoder.visual, torch.Generator().manual_seed(seed), {}
    if "image-prompt" in methods:
        prompts["border"] = torch.randn(1, 3, *encoder.size, generator=gen)
        prompts["border"][:, :, border:-border, border:-border] = 0
    if "token-prompt" in methods:
        prompts["tokens"] = torch.randn(tokens, visual.conv1.out_channels, generator=gen)
    if prompts:
        encoder.set_prompts(**prompts)
    starts = {"full": ["visual."], "image-prompt": ["border"], "token-prompt": ["tokens"]}
    if "linear" in methods:
        starts["linear"] = [f"visual.{name}" for name in projection(visual)]
    if "partial" in methods:
        count = len(visual.transformer.resblocks)
        last = [f"visual.transformer.resblocks.{i}." for i in range(count - last_blocks, count)]
        starts["partial"] = [*last, "visual.attn_pool", "visual.ln_post.", "visual.proj"]
    wanted = tuple(start for method in methods for start in starts[method])
    return {name: p for name, p in encoder.named_parameters() if name.startswith(wanted)}


def parts_of(names):
    """The parts of an image encoder that parameters belong to, in words: "visual.ln_post, visual.proj"."""
    pattern = r"(visual\.transformer\.resblocks\.\d+|visual\.\w+|\w+)"
    parts = [*dict.fromkeys(re.match(pattern, name)[0].replace("visual.transformer.", "") for name in names)]
    return ", ".join(parts if len(parts) < 8 else [*parts[:4], "…", *parts[-3:]])


def freeze(module):
    """Before the inner maximisation: no parameter of the module gets a gradient, the pixels alone do."""
    module.requires_grad_(False)


def unfreeze(parameters):
    """Before the outer minimisation: of a frozen network exactly these {name: parameter} get a gradient."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
