"""Everything that is a prompt: class names and text templates → the zero-shot head."""
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def clean_class_name(name):
    """A folder's or file's class name as English, the paper's rule: lower case, `_ - /` turned into spaces."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").replace("/", " ").split())


@functools.cache
def imagenet_class_names():
    """{folder: class name} of ImageNet's 1,000 folders, e.g. n01440764 → tench; no name stands twice."""
    lines = (Path(__file__).parent / "imagenet_classes.txt").read_text().splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


@torch.no_grad()
def encode_head(clip, tokenizer, class_names, template):
    """The zero-shot head: unit text embeddings of `template.format(name)`, fp32 [K, D] on the model's device.

    Encoded once per task and kept: the text encoder is frozen, so this never changes while the images do.
    """
    prompts = [template.format(clean_class_name(name)) for name in class_names]
    repeated = sorted({p for p in prompts if prompts.count(p) > 1})
    if repeated:
        print(f"warning: {len(repeated)} prompts stand for more than one class, which nothing can tell apart: "
              f"{repeated[:3]}", file=sys.stderr)
    device = clip.logit_scale.device
    rows = [clip.encode_text(tokenizer(prompts[i:i + 256]).to(device)) for i in range(0, len(prompts), 256)]
    return F.normalize(torch.cat(rows).float(), dim=-1)
