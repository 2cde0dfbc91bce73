"""Everything that is a prompt: class names and text templates → the zero-shot head."""
import functools
import os
import re
import sys
from collections import defaultdict

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
    """CLIP's templates for a data set, a list; ImageNet's 80 where CLIP's authors published none. They take
    class names as they are, for CLIP's own are curated: {c}, see `fill`."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES      # here, as open_clip takes seconds
    templates = OPENAI_TEMPLATES.get(name, [template("{}") for template in OPENAI_IMAGENET_TEMPLATES])
    templates = [t.replace("*", word).replace("{}", "{c}") for t in templates for word in ("a", "the")]
    return list(dict.fromkeys(templates))


def clean_class_name(name):
    """A class name from a folder or file as English, as in the paper: lower case, spaces for `_ - /`."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").replace("/", " ").split())


def fill(template, name):
    """A prompt: a template with a class name for its {}, by `clean_class_name`; or for its {c}, as it is."""
    if "{c}" in template:
        return name.join(template.split("{c}"))
    return clean_class_name(name).join(template.split("{}"))


# what says nothing to a text encoder, as a whole name after `clean_class_name`
MEANINGLESS = {
    "numbers": r"[-+\d.,]*\d[\d.,]*",
    "numbered, not named": r"c\d+|(cls|class|label|category|id|folder|fold|object|species) ?\d+",
    "WordNet ids, none of ImageNet's": r"n\d{8}", "ids": r"q\d+|[mg][ .]0[a-z0-9 ]+",
    "hashes": r"(?=[ a-z]*\d)(?=[ \d]*[a-f])[0-9a-f]{7,}( [0-9a-f]{4,})*",
    "without letters or digits": r"\W*"}


def prompt_warnings(tokenizer, class_names, template):
    """In words, a list: which class names say nothing to a text encoder, and which prompts it cannot tell
    apart, as no token differs among those that it reads. template: as of `encode_head`."""
    templates = [template] if isinstance(template, str) else template
    kinds = {kind: [name for name in class_names if re.fullmatch(pattern, clean_class_name(name))]
             for kind, pattern in MEANINGLESS.items()}
    if re.search(r"\b(number|digit|numeral)\b", f"{templates[0]} {class_names[0]}".lower()):   # the digit 7
        del kinds["numbers"]
    said = [f"{len(found)} of {len(class_names)} class names are {kind}: {listed(found)}; --class-names FILE "
            "gives others" for kind, found in kinds.items() if found]
    if not said and len({re.sub(r"\d+", "", name) for name in class_names}) == 1 < len(class_names) and (
            "numbers" in kinds):
        said = [f"all class names differ in numbers alone: {listed(class_names)}; --class-names FILE gives "
                "others"]
    groups = [range(len(class_names))]                  # of classes that no template so far tells apart
    for template in templates:
        parts = defaultdict(list)
        for number, group in enumerate(groups):
            prompts = [fill(template, class_names[i]) for i in group]
            for i, tokens in zip(group, tokenizer(prompts).tolist()):
                parts[number, tuple(tokens)].append(i)
        groups = [group for group in parts.values() if len(group) > 1]
    same = [class_names[i] for group in groups for i in group]
    if same:
        said.append(f"{len(same)} class names make prompts of the same tokens, which nothing can tell apart: "
                    f"{listed(same)}")
    return said


@functools.cache
def warn_once(text):
    """Print a warning, once, and in process 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def listed(names, most=5):
    """Names in a warning, one line whatever they hold."""
    return ", ".join(repr(name[:60]) for name in names[:most]) + ", …" * (len(names) > most)


@torch.no_grad()
def encode_head(clip, tokenizer, class_names, template):
    """The zero-shot head: unit text embeddings of `template` with each class name, by `fill`, fp32 [K, D] on
    the model's device.

    template: a str, or a list of them (an ensemble): then the unit mean of their unit embeddings. Encoded
    once per task and kept: the text encoder is frozen, so the head never changes."""
    templates, heads = [template] if isinstance(template, str) else template, []
    for text in prompt_warnings(tokenizer, class_names, template):
        warn_once(text)
    device = clip.logit_scale.device
    for template in templates:
        prompts = [fill(template, name) for name in class_names]
        rows = [clip.encode_text(tokenizer(prompts[i:i + 256]).to(device))
                for i in range(0, len(prompts), 256)]
        heads.append(F.normalize(torch.cat(rows).float(), dim=-1))
    return heads[0] if len(heads) == 1 else F.normalize(torch.stack(heads).mean(0), dim=-1)
