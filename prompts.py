"""Everything that is a prompt: class names and text templates → the zero-shot head."""
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

# The ensembles CLIP was published with (openai/CLIP, data/prompts.md); `*` stands for "a" and "the".
_CIFAR = ["a photo of * {}.", "a photo of * small {}.", "a photo of * big {}.",
          *(f"a {kind} photo of * {{}}." for kind in ("blurry", "black and white", "low contrast", "high contrast", "bad",
                                                      "good"))]
_RENDERINGS = ["a photo of", "a painting of", "a sculpture of", "a sketch of", "a tattoo of", "a rendition of", "art of",
               "graffiti of", "a drawing of", "a doodle of"]
_MADE_AS = ["plastic", "toy", "embroidered", "cartoon", "plushie", "origami"]
OPENAI_TEMPLATES = {
    "cifar10": _CIFAR, "cifar100": _CIFAR, "stl10": ["a photo of * {}."], "sun397": ["a photo of * {}."],
    "caltech101": [*(f"{way} * {{}}." for way in _RENDERINGS), *(f"* {kind} {{}}." for kind in _MADE_AS),
                   "* {} in a video game."],
    "pets": ["a photo of a {}, a type of pet."], "food101": ["a photo of {}, a type of food."],
    "flowers102": ["a photo of a {}, a type of flower."], "aircraft": ["a photo of * {}, a type of aircraft."],
    "cars": ["a photo of * {}.", "a photo of my {}.", "i love my {}!",
             *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old"))],
    "dtd": [f"a photo of * {{}} {noun}." for noun in ("texture", "pattern", "thing", "object")],
    "eurosat": ["a centered satellite photo of {}.", "a centered satellite photo of * {}."],
    "pcam": ["this is a photo of {}"], "hateful-memes": ["a {}."],
    "country211": ["a photo i took in {}.", "a photo i took while visiting {}.", "a photo from my home country of {}.",
                   "a photo from my visit to {}.", "a photo showing the country of {}."]}


def openai_templates(name):
    """CLIP's templates for a data set; ImageNet's 80 for one that CLIP's authors published none for."""
    if name not in OPENAI_TEMPLATES:
        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return list(dict.fromkeys(t.replace("*", word) for t in OPENAI_TEMPLATES[name] for word in ("a", "the")))


def clean_class_name(name):
    """A folder's or file's class name as English, the paper's rule: lower case, `_ - /` turned into spaces."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").replace("/", " ").split())


def _folder_names(file):
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


@functools.cache
def imagenet_class_names():
    """{folder: class name} of ImageNet's 1,000 folders, e.g. n01440764 → tench; no name stands twice."""
    return _folder_names("imagenet_classes.txt")


@functools.cache
def country_names():
    """{folder: country} of Country-211, e.g. CH → Switzerland; no name stands twice."""
    return _folder_names("country211_classes.txt")


@torch.no_grad()
def encode_head(clip, tokenizer, class_names, template):
    """The zero-shot head: unit text embeddings of `template.format(name)`, fp32 [K, D] on the model's device.

    template: a str, or a list of them (an ensemble): then the unit mean of their unit embeddings.
    Encoded once per task and kept: the text encoder is frozen, so this never changes while the images do.
    """
    templates, heads = [template] if isinstance(template, str) else template, []
    names = [clean_class_name(name) for name in class_names]
    prompts = [templates[0].format(name) for name in names]
    repeated = sorted({p for p in prompts if prompts.count(p) > 1})
    if repeated:
        print(f"warning: {len(repeated)} prompts stand for more than one class, which nothing can tell apart: "
              f"{repeated[:3]}", file=sys.stderr)
    device = clip.logit_scale.device
    for template in templates:
        prompts = [template.format(name) for name in names]
        rows = [clip.encode_text(tokenizer(prompts[i:i + 256]).to(device)) for i in range(0, len(prompts), 256)]
        heads.append(F.normalize(torch.cat(rows).float(), dim=-1))
    return heads[0] if len(heads) == 1 else F.normalize(torch.stack(heads).mean(0), dim=-1)
