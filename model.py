"""CLIP: loading one, the differentiable path pixels → features, which parameters train, reading and writing checkpoints."""
import hashlib
import logging
import math
import os
import warnings
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn

import toyworld


def image_size(name, pretrained=None):
    """The resolution of a CLIP in pixels; nothing is loaded yet, but that the names are known is checked: ValueError."""
    if name == "toy":
        toyworld.register()
        known = ["seed0, seed1, …"]
        found = pretrained is None or toyworld.seed_of(pretrained) is not None
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
    if not (found or pretrained == "none" or pretrained and Path(pretrained).is_file()):
        raise ValueError(f"--pretrained {pretrained} for --model {name}: expected a file, none (random weights) or one of "
                         + ", ".join(known))
    try:
        return open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    except Exception as error:                                         # only a hub, whose client raises many kinds
        raise ValueError(f"cannot reach --model {name}: {' '.join(str(error).split())[:200]}") from None


def load_clip(name, pretrained=None, device="cpu", seed=0):
    """The frozen CLIP `name` in fp32 on device, and its tokenizer.

    name: an open_clip model, `hf-hub:org/repo`, or `toy`. pretrained: an open_clip tag, a file with a state dict, or
    `none` for random weights; for `toy` the tags are seed0, seed1, … (trained here and cached on first use), and None
    is seed<seed>. Raises ValueError, in one line, if it cannot be had or is not a ViT with a class token.
    """
    image_size(name, pretrained)
    if name == "toy" and not (pretrained == "none" or pretrained and Path(pretrained).is_file()):
        pretrained = str(toyworld.pretrained_file(seed if pretrained is None else toyworld.seed_of(pretrained)))
    torch.manual_seed(seed)                                            # for random weights
    logging.disable()                                                  # open_clip's own account of what it does
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            clip = open_clip.create_model(name, None if pretrained == "none" else pretrained)
    except UserWarning as mismatch:
        raise ValueError(f"{mismatch} Weights trained with QuickGELU need the model's -quickgelu name, others the plain "
                         "one.") from None
    except Exception as error:                                         # open_clip raises many kinds, some over many lines
        raise ValueError(f"cannot load --model {name} --pretrained {pretrained}: {' '.join(str(error).split())[:200]}"
                         ) from None
    finally:
        logging.disable(logging.NOTSET)
    visual = clip.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
        raise ValueError(f"--model {name}: its image encoder is not a vision transformer with a class token")
    return clip.requires_grad_(False).eval().to(device), open_clip.get_tokenizer(name)


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
    """

    def __init__(self, clip, dtype=torch.float32):
        super().__init__()
        self.visual, self.dtype = clip.visual, dtype
        device = clip.logit_scale.device
        statistics = clip.visual.preprocess_cfg                        # of the loaded weights: CLIP's, not ImageNet's
        area = math.prod(clip.visual.patch_size)
        for name in ("mean", "std"):                                   # [3·p·p], of each pixel of a patch
            columns = torch.tensor(statistics[name], device=device).repeat_interleave(area)
            self.register_buffer(name, columns, persistent=False)

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
            first = visual.class_embedding.expand(len(x), 1, -1)
            tokens = visual.ln_pre(torch.cat([first, patches], 1) + visual.positional_embedding)
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


# ---------------------------------------------------------------------------------------------- checkpoints
FORMAT = "tecoa-1"


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
    names → fp32 tensors), and `more`. Written beside, then renamed: a killed run leaves the old file or the new one.
    """
    visual = {name: tensor.detach().cpu() for name, tensor in clip.state_dict().items() if name.startswith("visual.")}
    checkpoint = {"format": FORMAT, "model": config["model"], "pretrained": config["pretrained"],
                  "text": text_fingerprint(clip), "config": config, "visual": visual, **more}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def read_checkpoint(path):
    """The dict that `save_checkpoint` wrote. Raises ValueError, in one line, for any other file."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                            # about a TorchScript file, which is refused anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                                  # a damaged file fails in many ways
        raise ValueError(f"{path} is not a checkpoint that PyTorch can read (weights_only)") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train_tecoa.py (format {FORMAT})")
    return checkpoint


def load_visual(clip, checkpoint, path):
    """Put a checkpoint's image encoder into the CLIP that it was adapted from; strict. Raises ValueError otherwise."""
    if checkpoint["text"] != text_fingerprint(clip):
        raise ValueError(f"{path} was adapted against another text encoder than that of {checkpoint['model']} "
                         f"{checkpoint['pretrained']} here: give the original weights as --pretrained FILE")
    current = {name: tensor for name, tensor in clip.state_dict().items() if name.startswith("visual.")}
    missing, unexpected = sorted(current.keys() - checkpoint["visual"]), sorted(checkpoint["visual"].keys() - current)
    wrong = [name for name in current.keys() & checkpoint["visual"].keys()
             if current[name].shape != checkpoint["visual"][name].shape]
    if missing or unexpected or wrong:
        raise ValueError(f"{path} does not fit {checkpoint['model']}: missing {missing[:3]}, unexpected "
                         f"{unexpected[:3]}, of another shape {wrong[:3]}")
    clip.load_state_dict(checkpoint["visual"], strict=False)          # the text encoder keeps its own
