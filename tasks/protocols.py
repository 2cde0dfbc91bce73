"""Protocols: how the literature measures, read from each work's public evaluation code (docs/evaluation.md).

Only what differs between them is here; single options (--resize, --template, --attack, …) override it."""
from typing import NamedTuple

# sets whose images are of one small size: attacked at it, and enlarged inside the model, or resized before
SMALL = {"cifar10": 32, "cifar100": 32, "stl10": 96}            # in pixels
PHOTO = "This is a photo of a {}"                               # the paper's, without a full stop

# fifteen sets that all heirs of TeCoA share
SHARED = ("imagenet", "cifar10", "cifar100", "stl10", "caltech101", "caltech256", "pets", "cars", "food101",
          "flowers102", "aircraft", "sun397", "dtd", "eurosat", "pcam")
CLIP_BENCHMARK = ("cifar10", "cifar100", "stl10", "cars", "caltech101", "pets", "flowers102", "dtd",
                  "eurosat", "aircraft", "pcam", "imagenet-r", "imagenet-sketch")


class Protocol(NamedTuple):
    source: str                      # whose code it was read from
    resize: int                      # shorter side of images in files, of 224 pixels that are cropped from it
    interpolation: str               # bilinear or bicubic, with antialiasing, as PIL does both
    small: int | None                # the same for SMALL; None: they stay as they are, δ lives there
    sets: tuple                      # that count in its mean
    attack: str                      # of eval_zeroshot.py, in its table
    steps: int
    templates: str = "paper"         # or openai: CLIP's ensembles and class names
    photo: str = PHOTO               # prompt of a set that has none of its own
    words: dict = {}                 # {set: its prompt, or several}, where it is not the paper's
    squash: tuple = ()               # sets whose images are resized to a square, whatever their shape


PROTOCOLS = {
    "tecoa": Protocol("Mao et al. 2023, cvlab-columbia/ZSRobust4FoundationModel, finetuning.py", 256,
                      "bilinear", None, (*SHARED, "hateful-memes"), "pgd", 100, squash=("hateful-memes",)),
    "fare": Protocol("Schlarmann et al. 2024, chs20/RobustVLM, CLIP_benchmark/", 224, "bicubic", None,
                     CLIP_BENCHMARK, "apgd-ce,apgd-t", 100, "openai",
                     words={"pcam": ["a histopathology slide showing {c}", "histopathology image of {c}"]}),
    "tga": Protocol("Yu et al. 2024, zhyblue424/TGA-ZSR, utils.py", 256, "bilinear", 224,
                    (*SHARED, "tiny-imagenet"), "pgd", 100),
    "ttc": Protocol("Xing et al. 2025, Sxing2/CLIP-Test-time-Counterattacks, code/utils.py", 256, "bilinear",
                    256, (*SHARED, "country211"), "pgd", 10, photo=f"{PHOTO}."),
    "agft": Protocol("YuboCui/AGFT, utils.py, clip_dataset.py", 224, "bilinear", None, SHARED, "pgd", 20,
                     photo=f"{PHOTO}.", words={"caltech101": "A photo of a {}."})}
DEFAULT = next(iter(PROTOCOLS))


def resized(protocol, name, size, resize=None):
    """What a set's images are resized to, as `to_pixels` takes it: "squash", "none", or the shorter side in
    pixels. size: the model's resolution, in pixels; resize: --resize, which has the last word but for
    SMALL."""
    rules = PROTOCOLS[protocol]
    if name in SMALL:
        return "none" if rules.small is None else round(size * rules.small / 224)
    if resize is not None:
        return resize
    return "squash" if name in rules.squash else round(size * rules.resize / 224)
