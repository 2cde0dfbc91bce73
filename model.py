"""CLIP: loading one, the differentiable path from pixels to features, and which of its numbers an adaptation trains."""
import argparse
import logging
import math
import re
import zipfile
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import nn

import toyworld
from images import say_once


def say_source(name, pretrained):
    """Say, once, where open_clip takes what is not in the repository: weights, and some models' tokenizer."""
    if name.startswith("hf-hub:"):
        places = [f"huggingface.co/{name.removeprefix('hf-hub:')}"]
    else:
        source = open_clip.get_pretrained_cfg(name, pretrained) if pretrained in (
            open_clip.list_pretrained_tags_by_model(name)) else {}
        tokenizer = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
        places = [f"huggingface.co/{source['hf_hub'].strip('/')}" if source.get("hf_hub") else source.get("url"),
                  tokenizer and f"huggingface.co/{tokenizer} (tokenizer)"]
    if any(places):
        say_once(f"{name} {pretrained or ''} is from {' and '.join(filter(None, places))}, or its copy in the cache")


def image_size(name, pretrained=None):
    """The resolution of a CLIP in pixels; nothing is loaded yet, but the names are checked: ValueError.

    They must be known, and agree on the activation: open_clip loads weights that were trained with QuickGELU into a
    model without, and only warns.
    """
    if name == "toy":
        toyworld.register()
        known = ["seed0, seed1, …"]
        found = pretrained is None or re.fullmatch(r"seed[0-9]{1,10}", pretrained)
    elif name.startswith("hf-hub:"):
        if pretrained:
            raise ValueError(f"--pretrained {pretrained}: an hf-hub: model brings its own weights")
        found = True
    elif name not in open_clip.list_models():
        raise ValueError(f"unknown model {name!r}: expected toy, hf-hub:ORG/REPO or a name from open_clip.list_models(), "
                         "such as ViT-B-32-quickgelu")
    else:
        known = open_clip.list_pretrained_tags_by_model(name)
        found = pretrained in known
        if found:
            trained = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
            if trained != bool(open_clip.get_model_config(name).get("quick_gelu")):
                raise ValueError(f"QuickGELU mismatch: the weights {pretrained} were trained "
                                 + (f"with it, which is --model {name}-quickgelu" if trained else f"without it, but {name} "
                                    "has it"))
    if not (found or pretrained == "none" or pretrained and Path(pretrained).is_file()):
        raise ValueError(f"--pretrained {pretrained} for --model {name}: expected a file, none (random weights) or one of "
                         + ", ".join(known))
    if name != "toy":
        say_source(name, pretrained)
    try:
        return open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    except Exception as error:                                         # only a hub, whose client raises many kinds
        raise ValueError(f"cannot reach --model {name}: {' '.join(str(error).split())[:200]}") from None


def refuse_damaged(path):
    """ValueError if a file of PyTorch's, a zip, is cut short or a part has not its checksum: torch.load looks at none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
    except Exception as error:                                         # zipfile raises many kinds
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:100]}") from None
    if bad:
        raise ValueError(f"{path} is damaged: its part {bad} does not have its checksum")


def load_clip(name, pretrained=None, device="cpu", seed=0):
    """The frozen CLIP `name` in fp32 on device, and its tokenizer.

    name: an open_clip model, `hf-hub:org/repo`, or `toy`. pretrained: an open_clip tag, a file (a state dict, alone,
    as .safetensors or inside open_clip's training checkpoint), or `none` for random weights; for `toy` the tags are
    seed0, seed1, … (trained here and cached on first use), and None is seed<seed>. Raises ValueError, in one line, if
    it cannot be had, is not a ViT with a class token, or has not the activation that its weights were trained with.
    """
    image_size(name, pretrained)
    if name == "toy" and not (pretrained == "none" or pretrained and Path(pretrained).is_file()):
        pretrained = str(toyworld.pretrained_file(seed if pretrained is None else toyworld.seed_of(pretrained)))
    if pretrained and Path(pretrained).is_file():
        refuse_damaged(pretrained)
    torch.manual_seed(seed)                                            # for random weights
    logging.disable()                                                  # open_clip's own account of what it does
    try:
        clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
    except Exception as error:                                         # open_clip raises many kinds, some over many lines
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"cannot load --model {name} --pretrained {pretrained}: {said}") from None
    finally:
        logging.disable(logging.NOTSET)
    visual = clip.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
        raise ValueError(f"--model {name}: its image encoder is not a vision transformer with a class token")
    refuse_openai_weights_without_quickgelu(clip, clip.state_dict(), f"--pretrained {pretrained}", name)
    return clip.requires_grad_(False).eval().to(device), open_clip.get_tokenizer(name)


def are_openai_weights(state):
    """Whether a CLIP's text tower, {open_clip's name: tensor}, is OpenAI's, which was trained with QuickGELU.

    No state dict says its activation, but OpenAI's files have a mark of their own (an observation of ours): the linear
    weights are stored in half precision and the token embedding in single. ViT-B-32.pt shows it by its 354 MB: 151 M
    parameters at 2 bytes, and 2 more for the 25 M of the embedding. So, whatever type they were saved in since, the
    linear weights are numbers that fp16 holds exactly and the embedding is not. Weights trained elsewhere have fp32
    masters in both. A file that was rounded to fp16 as a whole tells nothing. The text tower, because TeCoA freezes it.
    """
    linear = [t for name, t in state.items() if t.ndim == 2 and re.match(r"(text\.)?transformer\.resblocks\..*weight", name)]
    embedding = [t for name, t in state.items() if re.fullmatch(r"(text\.)?token_embedding\.weight", name)]
    half = [all(torch.equal(t.float(), t.half().float()) for t in tensors) for tensors in (linear, embedding)]
    return bool(linear and embedding) and half == [True, False]


def refuse_openai_weights_without_quickgelu(clip, state, source, name):
    """ValueError, naming the source, if `state` is OpenAI's and clip, an open_clip `name`, computes another activation.

    Not the other way around: MetaCLIP and DFN used QuickGELU as well.
    """
    quick = any(isinstance(module, QuickGELU) for module in clip.visual.modules())
    if not quick and are_openai_weights(state):
        raise ValueError(f"QuickGELU mismatch: the text encoder of {source} is OpenAI's, trained with QuickGELU, which "
                         f"--model {name} lacks: take --model {name}-quickgelu")


def run_block(block, x, count=None):
    """open_clip's residual attention block on tokens x [B, N, width] → the first `count` of its outputs (None: all).

    The block's own forward computes all, and puts the tokens before the batch, where a product with frozen weights
    falls apart into N small ones.
    """
    attention, h = block.attn, block.ln_1(x)
    weight, bias, width, heads = attention.in_proj_weight, attention.in_proj_bias, x.shape[2], attention.num_heads
    q = F.linear(h[:, :count], weight[:width], bias[:width])
    k, v = F.linear(h, weight[width:], bias[width:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))                 # [B, heads, N, width/heads]
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x[:, :count] + block.ls_1(attention.out_proj(h))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class ImageEncoder(nn.Module):
    """F_θ, the differentiable path from pixels to features: resize, normalise, patch embedding, blocks, projection.

    forward: x fp32 [B, 3, H, W] in [0,1], at the data set's own resolution, or fp32 [B, h·w, 3·p·p] from `patchify`
    → z fp32 [B, D], not normalised.
    Everything up to the tokens is fp32, because bf16 rounds a pixel by up to half of 1/255; the blocks run in `dtype`.

    prompts: visual prompts, {"border": [1, 3, S, S], "tokens": [L, width]}, either or both. The border (zero inside) is
    added after resize and normalisation and not clipped, S being the model's resolution; the tokens follow the patches,
    before ln_pre, without positions, the same for every image. Both are frozen parameters of this module; of the border
    only the pixels that are not zero, so that its inside can never change.
    """

    def __init__(self, clip, dtype=torch.float32, prompts=None):
        super().__init__()
        self.visual, self.dtype = clip.visual, dtype
        device = clip.logit_scale.device
        statistics = clip.visual.preprocess_cfg                        # of the loaded weights: CLIP's, not ImageNet's
        area = math.prod(clip.visual.patch_size)
        for name in ("mean", "std"):                                   # [3·p·p], of each pixel of a patch
            columns = torch.tensor(statistics[name], device=device).repeat_interleave(area)
            self.register_buffer(name, columns, persistent=False)
        self.set_prompts(**prompts or {})

    def set_prompts(self, border=None, tokens=None):
        """Take these visual prompts, [1, 3, S, S] and [L, width], in place of those that were there."""
        frame = None
        if border is not None:
            pixels = border[0].flatten(1)                              # [3, S·S]
            frame = pixels.any(0).nonzero()[:, 0]                      # which of them, [n]
            border, frame = pixels[:, frame], frame.to(self.mean.device)                        # [3, n]
        self.register_buffer("frame", frame, persistent=False)
        for name, prompt in (("border", border), ("tokens", tokens)):
            prompt = None if prompt is None else nn.Parameter(prompt.float().to(self.mean.device), requires_grad=False)
            self.register_parameter(name, prompt)

    def whole_border(self):
        """The border as an image of the model's resolution, zero inside: [1, 3, S, S]."""
        height, width = self.visual.image_size
        pixels = self.border.new_zeros(3, height * width).index_copy(1, self.frame, self.border)
        return pixels.view(1, 3, height, width)

    def prompts(self):
        """The visual prompts as `ImageEncoder` and checkpoints take them, on the CPU: {} without any."""
        found = {"border": None if self.border is None else self.whole_border(), "tokens": self.tokens}
        return {name: prompt.detach().cpu().clone() for name, prompt in found.items() if prompt is not None}

    def patchify(self, x):
        """[B, 3, H, W] → [B, h·w, 3·p·p], any dtype: what the patch embedding multiplies. H, W: the model's own.

        An attack that stays in this layout never rearranges a pixel: its gradient comes out of a matrix product just
        as its next input goes into one.
        """
        (h, w), (p, q) = self.visual.grid_size, self.visual.patch_size
        return x.reshape(len(x), 3, h, p, w, q).permute(0, 2, 4, 1, 3, 5).reshape(len(x), h * w, 3 * p * q)

    def forward(self, x):
        visual, device = self.visual, x.device.type
        with torch.autocast(device, enabled=False):
            if x.ndim == 4:
                if x.shape[-2:] != visual.image_size:
                    x = F.interpolate(x, visual.image_size, mode="bicubic", antialias=True)
                x = self.patchify(x)
            # conv1((x − mean) / std): its stride is its size, so it is a product; normalising goes into its weights
            weight = visual.conv1.weight.flatten(1) / self.std                                  # [width, 3·p·p]
            patches = F.linear(x, weight, -(weight * self.mean).sum(1))                         # [B, h·w, width]
            if self.border is not None:                                # conv1 is linear: the same for every image
                patches = patches + F.linear(self.patchify(self.whole_border()), visual.conv1.weight.flatten(1))
            first = visual.class_embedding.expand(len(x), 1, -1)
            tokens = torch.cat([first, patches], 1) + visual.positional_embedding
            if self.tokens is not None:
                tokens = torch.cat([tokens, self.tokens.expand(len(x), -1, -1)], 1)
            tokens = visual.ln_pre(tokens)
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            blocks = visual.transformer.resblocks
            if all(type(block) is ResidualAttentionBlock for block in blocks):
                for block in blocks:                                   # the features are the class token's, and of the
                    tokens = run_block(block, tokens, 1 if block is blocks[-1] else None)   # last block nothing else is used
            else:
                tokens = visual.transformer(tokens)
            z = visual.ln_post(tokens[:, 0])
            if visual.proj is not None:
                z = z @ visual.proj
        return z.float()


ADAPTATIONS = ("full", "partial", "linear", "image-prompt", "token-prompt")


def adaptation(text):
    """An argparse type: one of ADAPTATIONS, or both prompts, in alphabetical order."""
    methods = ",".join(sorted(text.split(",")))
    if methods not in (*ADAPTATIONS, "image-prompt,token-prompt"):
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(ADAPTATIONS)}, or image-prompt,token-prompt")
    return methods


def adaptation_sizes(methods, size, last_blocks, border, tokens):
    """{"last_blocks", "border", "tokens"}: as given, or the defaults of `methods` for a model of `size` pixels; None where
    they play no part. ValueError: the border covers everything."""
    border = border or (round(30 / 224 * size) if "image-prompt" in methods else None)
    if border and 2 * border >= size:
        raise ValueError(f"--border {border} leaves nothing inside, the model takes {size} pixels")
    return {"last_blocks": last_blocks or (2 if "partial" in methods else None), "border": border,
            "tokens": tokens or (5 if "token-prompt" in methods else None)}


def check_adaptation(clip, methods, last_blocks, name, has_readout):
    """ValueError: the image encoder of clip, an open_clip `name`, has not what the methods train."""
    if "linear" in methods and not has_readout and clip.visual.proj is None:
        raise ValueError(f"--adapt linear: the image encoder of {name} has no proj")
    if "partial" in methods and last_blocks > len(clip.visual.transformer.resblocks):
        raise ValueError(f"--last-blocks {last_blocks}: {name} has {len(clip.visual.transformer.resblocks)}")


def check_gradients(parameters, trained):
    """RuntimeError, with their names, if some of parameters, (name, parameter) pairs, have a gradient and are not among
    `trained`, or are and have none."""
    wrong = [name for name, p in parameters if (p.grad is not None) != any(p is q for q in trained)]
    if wrong:
        raise RuntimeError(f"meant to train but without a gradient, or the other way round: {wrong}")


def parts_of(names):
    """The parts of an image encoder that parameters belong to, in words: "visual.ln_post, visual.proj"."""
    pattern = r"(visual\.transformer\.resblocks\.\d+|visual\.\w+|\w+)"
    parts = [*dict.fromkeys(re.match(pattern, name)[0].replace("visual.transformer.", "") for name in names)]
    return ", ".join(parts if len(parts) < 8 else [*parts[:4], "…", *parts[-3:]])


def adapt(encoder, methods, *, last_blocks=2, border=30, tokens=5, seed=0):
    """{name: parameter of encoder} that the methods train (Mao et al. 2023, Figure 2); they give it the prompts they need.

    full: every parameter of the image encoder. partial: the last `last_blocks` transformer blocks, ln_post and proj, by
    name: the last tensors of a state dict would not have proj among them. linear: proj alone. image-prompt: a border of
    `border` pixels; token-prompt: `tokens` tokens; both drawn from normal(0, 1) by the seed, and trained together or alone.
    """
    visual, gen, prompts = encoder.visual, torch.Generator().manual_seed(seed), {}
    if "image-prompt" in methods:
        prompts["border"] = torch.randn(1, 3, *visual.image_size, generator=gen)
        prompts["border"][:, :, border:-border, border:-border] = 0
    if "token-prompt" in methods:
        prompts["tokens"] = torch.randn(tokens, visual.conv1.out_channels, generator=gen)
    if prompts:
        encoder.set_prompts(**prompts)
    blocks = len(visual.transformer.resblocks)
    last = [f"visual.transformer.resblocks.{i}." for i in range(blocks)][-(last_blocks or 0):]
    starts = {"full": ["visual."], "partial": [*last, "visual.ln_post.", "visual.proj"], "linear": ["visual.proj"],
              "image-prompt": ["border"], "token-prompt": ["tokens"]}
    wanted = tuple(start for method in methods for start in starts[method])
    return {name: p for name, p in encoder.named_parameters() if name.startswith(wanted)}
