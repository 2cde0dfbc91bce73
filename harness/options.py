"""Options: those that both stages share, defaults that depend on others, and what a run is called.

A run's name and identity come from every option that can change a result: each option that cannot is marked
where it is added (result=False), so that a new one is part of both unless somebody says otherwise.
"""
import argparse
import math
import os
import re
import sys
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import kernels
from harness.files import sha256
from harness.processes import RANK, has_bf16
from harness.trackers import tracker_names
from model import (ADAPTATIONS, CONFIG, LOCAL_DIR, PIXELS, image_size, model_config, own_resize, plain_vit,
                   weights_in)
from tasks.class_names import own_words
from tasks.images import printable
from tasks.protocols import DEFAULT, PROTOCOLS, resized


# names of data sets that say where they lie
PLACES = re.compile(r"(?<![^,])((folder|wds|cache):[^,]*|imagenet)(?![^,])")
RESIZE, INTERPOLATIONS = "N|none|squash|longest", ("bilinear", "bicubic")


class ByModel(NamedTuple):
    """A default that is one value for real models, the paper's, and another for the toy."""
    real: float
    toy: float

    def __call__(self, args):
        return self.toy if args.model == "toy" else self.real

    def __str__(self):
        return f"{self.real:g}; toy: {self.toy:g}" if self.real != self.toy else f"{self.real:g}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with errors in one line, status 2, whose options know what they change."""

    def __init__(self, **words):
        super().__init__(**words, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.late, self.paths, self.harmless, self.resumable = {}, set(), {"help"}, set()

    def error(self, message):
        who = self.prog + (f" (process {RANK})" if RANK else "")
        print(f"{who}: {printable(message)}", file=sys.stderr, flush=True)
        if dist.is_initialized():                       # whose own tidying up may abort a process
            os._exit(2)
        self.exit(2)

    @contextmanager
    def refusing(self):
        """Inside, a ValueError or OSError ends the process with its line and status 2."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(str(error))

    def option(self, group, flag, default=None, *, help, path=False, result=True, resumable=False, **words):
        """Add an option to a group. default: a value; or a function of the options added before, which
        `settle` calls. path: it may name a file, which counts by its content. result=False: no result depends
        on it, so it is in no run's name. resumable=True: a run can go on with another value."""
        late = callable(default)
        shown = isinstance(default, ByModel) or not late and default is not None and default is not False
        if shown and "default:" not in help:
            help += f" (default: {default})"
        dest = group.add_argument(flag, default=None if late else default, help=help, **words).dest
        self.late |= {dest: default} if late else {}
        for marked, names in ((path, self.paths), (not result, self.harmless), (resumable, self.resumable)):
            names |= {dest} if marked else set()

    def settle(self, args, **known):
        """A copy of the options, with what was left open as in `known`, or else at its default."""
        args = argparse.Namespace(**vars(args))
        for word, default in self.late.items():
            if getattr(args, word) is None:
                value = known.get(word)
                setattr(args, word, default(args) if value is None else value)
        return args

    def identity(self, args):
        """{option: value} of all in settled args that can change a result; files by their content."""
        return {word: content(value, word) if word in self.paths or is_local(value) else value
                for word, value in vars(args).items() if word not in self.harmless}

    def unusual(self, args, **known):
        """The options of the identity that are not what they would be by default beside the others."""
        found = []
        for word in self.identity(args):
            others = argparse.Namespace(**vars(args) | {word: self.get_default(word)})
            try:
                usual = getattr(self.settle(others, **known), word)
            except ValueError:                          # there is no default beside these others
                usual = ...
            if usual != getattr(args, word):
                found.append(word)
        return found

    def name(self, args, always, hidden=(), **known):
        """A name for settled args: the values of `always`, then each other unusual option, if not hidden."""
        def spelled(word):
            value = getattr(args, word)
            is_file = word in self.paths and os.path.isfile(str(value))
            return spelled_path(value, word) if is_file or is_local(value) else spelled_value(value)
        words = [spelled(word) for word in always if word != "seed"]
        words += [word.replace("_", "") + spelled(word) for word in self.unusual(args, **known)
                  if word not in (*always, *hidden)]
        name = "-".join(filter(None, words)) + (f"-seed{args.seed}" if "seed" in always else "")
        # a file's name may have 255 bytes
        return name if len(name) < 200 else f"{name[:180]}-{zlib.crc32(name.encode()):08x}"

    def words(self, config):
        """The command line whose options are a checkpoint's `config`, for argparse to check."""
        flags = {action.dest: action.option_strings for action in self._actions if action.dest != "help"}
        unknown = [word for word in config if word not in flags]
        if unknown:
            raise ValueError(f"it has options that are not known here: {unknown[:3]}")
        words = []
        for word in [word for word, value in config.items() if value is not None and word != "out"]:
            (yes, *no), value = flags[word], config[word]
            words += ([yes] if value else no) if isinstance(value, bool) else [f"{yes}={value}"]
        return words


def is_local(value):
    """Whether it is a model in a folder, open_clip's local-dir:PATH."""
    return isinstance(value, str) and value.startswith(LOCAL_DIR)


def digests(path, word):
    """The sha256 of a file, or of the weights in local-dir:PATH; then, where it decides of a model's weights,
    that of the file beside them that says mean and std: a list."""
    path = weights_in(path.removeprefix(LOCAL_DIR)) if is_local(path) else Path(path)
    config = next((file for file in map(path.with_name, (CONFIG, PIXELS)) if file.is_file()), None)
    read = word in ("model", "pretrained") and config
    return [sha256(path), *([sha256(config)] if read else [])]


def content(value, word):
    """A path as the identity has it, option `word`: of a file its name and what it holds."""
    if is_local(value) or value and os.path.isfile(value):
        return " ".join([Path(value).name, *digests(value, word)])
    return str(Path(value).resolve()) if value and os.path.isdir(value) else value


def spelled_path(path, word):
    """A file, or local-dir:PATH, as a part of a folder's name."""
    stem = Path(path).name if is_local(path) else Path(path).stem
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "-", stem)[:40]
    return "-".join([plain, *(digest[:8] for digest in digests(path, word))])


def spelled_value(value):
    """Another option's value as a part of a folder's name, as it is if possible; no two look the same."""
    text = "" if value is None or value is True else str(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        text = f"{value:g}"
    plain = re.sub(r"[^A-Za-z0-9_.,+-]+", "-", text.removeprefix("hf-hub:"))
    return text if text == plain else f"{plain[-40:].strip('-')}-{zlib.crc32(os.fsencode(text)):08x}"


def placeless(word, value):
    """An option's value but for where data lie, which makes no other result: what lies there is compared
    itself, by its contents."""
    if word == "data_root":
        return None
    return PLACES.sub("images", str(value)) if word in ("dataset", "tasks") else value


def completed(options):
    """A config or an identity, also of an earlier version, which knew no protocols and resized all images in
    files bicubically; a toy run has none."""
    if "protocol" in options:
        return options
    files = options.get("data_root") or any(PLACES.search(str(options.get(word)))
                                            for word in ("dataset", "tasks"))
    return options | {"protocol": DEFAULT, "interpolation": "bicubic" if files else "bilinear"}


def differences(one, other, ignoring=()):
    """In words, which options of two identities differ: "--lr 0.1 (here 0.2), …"; "" if none. Data may lie
    elsewhere: see `placeless`."""
    one, other = completed(one), completed(other)
    words = sorted(word for word in {*one, *other} - {*ignoring}
                   if placeless(word, one.get(word)) != placeless(word, other.get(word)))
    called = {word: "sources" if word == "code" else f"--{word.replace('_', '-')}" for word in words}
    return ", ".join(f"{called[word]} {one.get(word)} (here {other.get(word)})" for word in words)


# ------------------------------------------------------------------------------ types of values, for argparse
def number(kind, least, strict=False, most=2**31):
    """An int or float that is at least (strict: above) `least`, and below `most`."""
    def parse(text):
        value = kind(text)
        if not (value > least if strict else value >= least) or value >= most:
            above, below = "above" if strict else "of at least", f" and below {most}" if value >= most else ""
            raise argparse.ArgumentTypeError(f"expected a number {above} {least}{below}, got {text}")
        return value
    parse.__name__ = kind.__name__                  # argparse names it when the text is no number at all
    return parse


def length(least, strict=False):
    """A length in 1/255: a bare number; or N/R, which is N where pixels go from 0 to R: 8/255, or 0.5/1."""
    plain = number(float, least, strict)

    def parse(text):
        above, slash, below = text.partition("/")
        try:
            # N * (255 / 255) is N to the bit; else 0.0313725490196/1 is 8 as well
            times = 255 / float(below) if slash else 1
            if not 0 < times < math.inf:
                raise ValueError
            return plain(float(above) if times == 1 else float(f"{float(above) * times:.12g}"))
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"expected a number in 1/255, as 8, or with its unit, as 8/255 "
                                             f"or 0.5/1, got {text}") from None
    return parse


def passes(text):
    """A number of passes over a data set, above 0: an int if it is whole."""
    value = number(float, 0, strict=True, most=10**6)(text)
    return int(value) if value == int(value) else value


def cadence(text):
    """A number of steps, or of minutes with an m."""
    (number(float, 0, strict=True) if text.endswith("m") else number(int, 1))(text.removesuffix("m"))
    return text


def resizing(text):
    """A number of pixels, or a way of `to_pixels`."""
    return text if text in ("none", "squash", "longest") else number(int, 1, most=2**14)(text)


def adaptation(text):
    """One of ADAPTATIONS, or both prompts, in alphabetical order."""
    methods = ",".join(sorted(text.split(",")))
    if methods not in (*ADAPTATIONS, "image-prompt,token-prompt"):
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(ADAPTATIONS)}, or "
                                         "image-prompt,token-prompt")
    return methods


def precision(*names):
    """One of names; auto is None, an option that was left open."""
    def parse(text):
        if text not in ("auto", *names):
            raise argparse.ArgumentTypeError(f"{text}: expected one of auto, {', '.join(names)}")
        return None if text == "auto" else text
    return parse


def shares(text):
    """A comma list of numbers from 0 to 1, each once."""
    values = list(dict.fromkeys(float(word) for word in text.split(",")))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected a comma list of numbers from 0 to 1, got {text}")
    return values


# ------------------------------------------------------------------------------ what both stages share
def default_eps(args):
    """ε in 1/255: the paper's in linf; there is no usual one in l2."""
    if args.norm == "l2":
        raise ValueError("--norm l2 needs --eps, such as 128/255, or 0.5/1 where pixels are in [0,1]")
    return ByModel(1., 11.)(args)


def quarter(eps, steps):
    """A quarter of ε, the length of a PGD step; of fewer than four steps ε / steps, which reaches as far.
    So it is in the two tables of train_tecoa.py, too."""
    return eps / min(4, steps)


def default_step_size(args, training):
    """In 1/255. Real models in linf: at ε = 1 the paper's 1, in training of 2 steps; with another ε or other
    steps what reaches the ball's surface. The toy, and any model in l2: in proportion to ε."""
    ours, eps = args.model == "toy" or args.norm == "l2", args.eps
    if not eps:                                         # any will do
        return 1.
    if training:
        return 1.25 * eps / args.steps if ours else eps * min(1.25, 2 / args.steps)
    least = quarter(eps, args.steps)
    return least if ours else max(least, min(1., eps))


def doubts(args):
    """What may not be meant in settled args' ε and step size, in words: a list."""
    norm, eps, step, found = args.norm, args.eps, args.step_size, []
    if 0 < eps < (.1 if norm == "linf" else 10):
        found.append(f"--norm {norm} --eps {eps:g} is {eps:g}/255, or {eps / 255:.2g} in pixels of [0,1]; if "
                     f"{eps:g} in pixels of [0,1] is meant, as in RobustBench, say --eps {eps:g}/1")
    if norm == "linf" and eps >= 127.5:
        found.append(f"--eps {eps:g}: within 127.5/255 every image can be made the same grey; an L2 length "
                     "needs --norm l2")
    if {"pgd", "cw"} & {*getattr(args, "attack", "pgd").split(",")}:
        if args.steps * step < eps * (1 - 1e-9):
            found.append(f"PGD cannot reach the surface of the ε-ball: --steps {args.steps} times "
                         f"--step-size {step:g} is {args.steps * step:g}/255, and ε is {eps:g}/255")
        if step > 2 * eps > 0:
            found.append(f"--step-size {step:g} is more than the diameter of the ball, {2 * eps:g}/255")
    return found


# options that change nothing but for one of these attacks
USED_WITH = {"queries": ("square", "autoattack", "autoattack-fast"), "step_size": ("pgd", "cw")}


def unused(parser, args, known):
    """What was asked for beside attacks of which it changes nothing, in words: a list. args, known:
    of `settle`."""
    idle = [word for word, names in USED_WITH.items() if not {*args.attack.split(",")} & {*names}]
    return [f"--{word.replace('_', '-')} {getattr(args, word)} changes nothing: it is for --attack "
            f"{' or '.join(USED_WITH[word])}" for word in parser.unusual(args, **known) if word in idle]


def default_dtype(args, training):
    """bf16 where it is fast; not for the toy, which is too small to gain from it but in training on a GPU."""
    gpu = args.device.startswith("cuda")
    return "bf16" if gpu and training or args.model != "toy" and has_bf16(args.device) else "fp32"


def default_compile(args):
    """On a GPU; but of vision transformers with a class token alone, with which it is tried."""
    if not (args.device.startswith("cuda") and kernels.COMPILER):
        return False
    image_size(args.model, args.pretrained)             # ValueError: no such model
    return plain_vit(model_config(args.model)["vision_cfg"])


def data_options(args, names):
    """What `load_task` is told of the sets `names` of one command. ValueError."""
    return {"size": image_size(args.model, args.pretrained), "data_root": args.data_root, "limit": args.limit,
            "protocol": args.protocol, "resize": args.resize or own_resize(args.model, args.pretrained),
            "interpolation": args.interpolation, "words": own_words(names, args.class_names, args.template)}


def by_protocol(word):
    """A default that the protocol sets."""
    return lambda args: getattr(PROTOCOLS[args.protocol], word)


def measured_as(args):
    """What settled options make of the protocol, for results.json: a dict. Sizes are in pixels."""
    rules, size = PROTOCOLS[args.protocol], image_size(args.model, args.pretrained)
    small = resized(args.protocol, "cifar10", size)
    resize = args.resize or own_resize(args.model, args.pretrained)
    return {"protocol": args.protocol, "source": rules.source,
            "resize": resized(args.protocol, "", size, resize), "interpolation": args.interpolation,
            "cifar10, cifar100, stl10": "their own size, enlarged in the model" if small == "none" else small,
            "squashed": rules.squash if resize is None else (),
            "templates": getattr(args, "templates", rules.templates), "photo": rules.photo,
            "sets in the mean": rules.sets, "attack": getattr(args, "attack", "pgd"),
            "steps": getattr(args, "eval_steps", args.steps)}


def protocol_words(args, measured=None):
    """The name of the protocol, and what options beside it, or the model, set otherwise, for a table's head.
    measured: of `measured_as`, if it was recorded."""
    rules = PROTOCOLS[args.protocol]
    usual = {"resize": None, "interpolation": rules.interpolation, "templates": rules.templates,
             "template": None}
    values = [(word, getattr(args, word, value)) for word, value in usual.items()]
    others = [f"--{word} {value}" for word, value in values if value != usual[word]]
    own = (measured or {}).get("resize")
    if own in ("squash", "longest") and args.resize is None:
        others.append(f"the model's own --resize {own}")
    return f"protocol {args.protocol}" + f" with {' '.join(others)}" * bool(others)


def add_data_options(parser, *, training):
    """Add the options that say which images both stages take, and how."""
    option = partial(parser.option, parser.add_argument_group("data"))
    option("--protocol", DEFAULT, choices=PROTOCOLS, help="whose way of measuring: how images are resized, "
           "prompts, which sets count in the mean"
           + ", attack and steps" * (not training) + "; other options override it (docs/evaluation.md)")
    option("--tasks", "all", help="to evaluate on: a comma list of toy tasks, data sets (docs/data.md), "
           "folder:PATH, wds:PATH, cache:FILE; all: the toy's zero-shot ones, or what is under --data-root; "
           "none")
    option("--data-root", metavar="DIR", path=True, resumable=True, help="the folder with the data sets, as "
           "torchvision lays them out; or with ImageNet's train/<class>/ and val/<class>/")
    option("--limit", type=number(int, 1), metavar="N", help="use at most N images of each set")
    option("--class-names", metavar="FILE", path=True, help="of a folder, shards or cache: one a line, in "
           "the order of its classes; or folder<TAB>name (default: as its folders are called)")
    option("--template", metavar="TEXT|FILE", path=True, help="prompt of a folder, shards or cache, {} for "
           "the class name, {c} for it as it is; a file has one a line, of which the average is taken "
           "(default: the protocol's, This is a photo of a {})")
    option("--resize", type=resizing, metavar=RESIZE, help="of the shorter side of images in files, before "
           "the centre is cropped (default: the protocol's, 256/224 of the model's resolution; or as the "
           "model was trained, if otherwise); squash: of both, to a square; longest: of the longer one, the "
           "rest is black; none: images that are all of one size stay as they are, and are attacked at it")
    option("--interpolation", by_protocol("interpolation"), choices=INTERPOLATIONS,
           help="of images in files, when they are resized (default: the protocol's, bilinear)")
    option("--workers", min(8, os.cpu_count() or 1), type=number(int, 0, most=257), result=False,
           help="processes that decode images")


def add_shared_options(parser, *, training):
    """Add the options that both stages have, with the defaults of this stage."""
    option = partial(parser.option, parser.add_argument_group("model"))
    option("--model", lambda args: "toy", help="an open_clip name, local-dir:PATH, hf-hub:ORG/REPO, or toy "
           "(default: toy)")
    option("--pretrained", lambda args: f"seed{args.seed}" if args.model == "toy" else None, path=True,
           help="an open_clip tag, a file, or none; for the toy: seedN, trained on first use")
    add_data_options(parser, training=training)
    option = partial(parser.option, parser.add_argument_group(
        f"attack in {'training' if training else 'evaluation'}"))
    option("--norm", lambda args: "linf", choices=("linf", "l2"), help="of the ε-ball; l2 wants --eps "
           "(default: linf)")
    option("--eps", default_eps, type=length(0), metavar="N|N/R", help="radius of the ball: 8 or 8/255, in "
           "1/255; 0.5/1, where pixels are in [0,1] (default: 1; toy: 11)")
    option("--steps", 2 if training else by_protocol("steps"), type=number(int, 1),
           help="gradient steps" + " (default: the protocol's, 100)" * (not training))
    option("--step-size", partial(default_step_size, training=training), type=length(0, strict=True),
           metavar="N|N/R", help="length of a step, as --eps (default: " + (
               "ε · 2 / steps, at most 1.25 ε; toy and l2: 1.25 ε / steps)" if training else
               "1, at most ε and at least ε / 4; toy and l2: ε / 4; of few steps ε / steps)"))
    option = partial(parser.option, parser.add_argument_group("run"))
    option("--batch-size", ByModel(256, 64) if training else 256, type=number(int, 1), result=training,
           help="images, over all processes")
    option("--seed", 0, type=number(int, 0), help="of everything random")
    option("--device", "cuda" if torch.cuda.is_available() else "cpu", resumable=True,
           help="cpu, cuda or cuda:N")
    dtypes = ("fp32", "bf16") if training else ("fp32", "bf16", "fp16")
    option("--dtype", partial(default_dtype, training=training), type=precision(*dtypes),
           metavar=f"{{auto,{','.join(dtypes)}}}", help="of the transformer blocks when attacked or trained; "
           "pixels and patch embedding are fp32, and what is reported comes from an fp32 forward. auto: bf16 "
           "for real models where GPU or CPU has it, else fp32; a run that is there keeps its own (default: "
           "auto)")
    option("--compile", default_compile, resumable=True, action=argparse.BooleanOptionalAction,
           help=f"torch.compile {'attack and update' if training else 'the encoder'}, a minute at the start "
           "(default: on a GPU, of vision transformers with a class token)")
    option("--kernels", "auto", choices=("auto", "triton", "torch"), resumable=True,
           help="auto: Triton on a GPU, else the same in PyTorch")
    option("--out", metavar="DIR", result=False, help="folder to write to (default: a name under out/)")
    if training:
        option("--report-to", "none", type=tracker_names, metavar="WHERE", result=False, help="log to "
               "tensorboard, wandb, or tensorboard,wandb as well; all: both")
    option("--overwrite", False, action="store_true", result=False,
           help="replace what is in that folder (default: never)")
