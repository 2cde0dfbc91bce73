"""Everything that is a prompt: class names and text templates → the zero-shot head."""
import sys
from collections import Counter

import torch
import torch.nn.functional as F

# The ensembles CLIP was published with (openai/CLIP, data/prompts.md); `*` stands for "a" and "the".
_QUALITIES = ["blurry", "black and white", "low contrast", "high contrast", "bad", "good"]
_CIFAR = ["a photo of * {}.", "a photo of * small {}.", "a photo of * big {}.",
          *(f"a {quality} photo of * {{}}." for quality in _QUALITIES)]
_RENDERINGS = ["a photo of", "a painting of", "a sculpture of", "a sketch of", "a tattoo of",
               "a rendition of", "art of", "graffiti of", "a drawing of", "a doodle of"]
_MADE_AS = ["plastic", "toy", "embroidered", "cartoon", "plushie", "origami"]
OPENAI_TEMPLATES = {
    "cifar10": _CIFAR, "cifar100": _CIFAR, "stl10": ["a photo of * {}."], "sun397": ["a photo of * {}."],
    "caltech101": [*(f"{way} * {{}}." for way in _RENDERINGS), *(f"* {kind} {{}}." for kind in _MADE_AS),
                   "* {} in a video game."],
    "pets": ["a photo of a {}, a type of pet."], "aircraft": ["a photo of * {}, a type of aircraft."],
    "flowers102": ["a photo of a {}, a type of flower."], "food101": ["a photo of {}, a type of food."],
    "cars": ["a photo of * {}.", "a photo of my {}.", "i love my {}!",
             *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old"))],
    "dtd": [f"a photo of * {{}} {noun}." for noun in ("texture", "pattern", "thing", "object")],
    "eurosat": ["a centered satellite photo of {}.", "a centered satellite photo of * {}."],
    "pcam": ["this is a photo of {}"], "hateful-memes": ["a {}."],
    "country211": ["a photo i took in {}.", "a photo i took while visiting {}.",
                   "a photo from my home country of {}.", "a photo from my visit to {}.",
                   "a photo showing the country of {}."]}


def openai_templates(name):
    """CLIP's templates for a data set, a list; ImageNet's 80 where CLIP's authors published none."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES      # here, as open_clip takes seconds
    templates = OPENAI_TEMPLATES.get(name, [template("{}") for template in OPENAI_IMAGENET_TEMPLATES])
    return list(dict.fromkeys(t.replace("*", word) for t in templates for word in ("a", "the")))


def clean_class_name(name):
    """A class name from a folder or file as English, as in the paper: lower case, spaces for `_ - /`."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").replace("/", " ").split())


@torch.no_grad()
def encode_head(clip, tokenizer, class_names, template):
    """The zero-shot head: unit text embeddings of `template.format(name)`, fp32 [K, D] on the model's device.

    template: a str, or a list of them (an ensemble): then the unit mean of their unit embeddings. Encoded
    once per task and kept: the text encoder is frozen, so the head never changes."""
    templates, heads = [template] if isinstance(template, str) else template, []
    names = [clean_class_name(name) for name in class_names]
    repeated = sorted(prompt for prompt, n in Counter(map(templates[0].format, names)).items() if n > 1)
    if repeated:
        print(f"warning: {len(repeated)} prompts stand for more than one class, which nothing can tell "
              f"apart: {repeated[:3]}", file=sys.stderr)
    device = clip.logit_scale.device
    for template in templates:
        rows = [clip.encode_text(tokenizer([template.format(name) for name in names[i:i + 256]]).to(device))
                for i in range(0, len(names), 256)]
        heads.append(F.normalize(torch.cat(rows).float(), dim=-1))
    return heads[0] if len(heads) == 1 else F.normalize(torch.stack(heads).mean(0), dim=-1)
