"""What both stages share around the method: the common options, one-line errors, devices and processes, result files."""
import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from images import Unreadable, printable

RANK, WORLD, LOCAL = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))     # of torchrun --max-restarts, after a crash
LAUNCH = os.environ.get("TORCHELASTIC_RUN_ID", "")                  # of torchrun; --standalone makes a new one each time


def end_in_one_line(kind, error, trace):
    """sys.excepthook: what the machine or the user did ends in one line on stderr; a bug, in its traceback."""
    where = traceback.extract_tb(trace)[-1:]
    said = printable(" ".join(str(error).split()))[:300] or kind.__name__
    if issubclass(kind, KeyboardInterrupt):
        said = "interrupted"
    elif issubclass(kind, Unreadable) or re.search("DataLoader worker .*(killed by signal|exited unexpectedly)", said):
        pass
    elif issubclass(kind, torch.OutOfMemoryError | MemoryError):
        said = f"out of memory: {said}; a smaller --batch-size needs less, in training --accumulate 2 as well"
    elif WORLD > 1 and issubclass(kind, RuntimeError) and ("gloo" in said or "NCCL" in said):
        said = f"lost another process: {said}"
    elif issubclass(kind, OSError) and where:
        said += f" ({Path(where[0].filename).name}:{where[0].lineno})"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}{f' (process {RANK})' if RANK else ''}: {said}", file=sys.stderr, flush=True)


sys.excepthook = end_in_one_line
for stream in (sys.stdout, sys.stderr):                # a file's name may hold what the terminal's encoding cannot
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit status 2; and with options that have one default for real
    models (the paper's) and one for the toy."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.by_model = {}

    def error(self, message):
        self.exit(2, f"{self.prog}{f' (process {RANK})' if RANK else ''}: {printable(message)}\n")

    def words(self, config):
        """The command line whose options are `config`, of a checkpoint: argparse shall check what a file says."""
        unknown = [word for word in config if word not in {action.dest for action in self._actions} - {"help"}]
        if unknown:
            raise ValueError(f"it has options that are not known here: {unknown[:3]}")
        flags = {word: f"--{'no-' * (value is False)}{word.replace('_', '-')}" for word, value in config.items()}
        return [flag if isinstance(config[word], bool) else f"{flag}={config[word]}" for word, flag in flags.items()
                if config[word] is not None and word != "out"]

    def option(self, group, flag, real, toy, help, **options):
        """Add an option to group whose default is `real`, or `toy` for the toy model; see `fill`."""
        words = f"default: {real:g}; toy: {toy:g}" if real != toy else f"default: {real:g}"
        self.by_model[group.add_argument(flag, help=f"{help} ({words})", **options).dest] = real, toy

    def fill(self, args, **known):
        """Set what the command line left open: from `known`, or the default that belongs to args.model."""
        for name, (real, toy) in self.by_model.items():
            if getattr(args, name) is None:
                setattr(args, name, known.get(name, toy if args.model == "toy" else real))


def number(kind, least, strict=False, most=2**31):
    """An argparse type: an int or float that is at least (strict: above) `least`, and below `most`."""
    def parse(text):
        value = kind(text)
        if not (value > least if strict else value >= least) or value >= most:
            raise argparse.ArgumentTypeError(f"expected a number {'above' if strict else 'of at least'} {least}"
                                             f"{f' and below {most}' if value >= most else ''}, got {text}")
        return value
    parse.__name__ = kind.__name__                  # argparse names it when the text is no number at all
    return parse


def cadence(text):
    """An argparse type: a number of steps, or of minutes with an m."""
    (number(float, 0, strict=True) if text.endswith("m") else number(int, 1))(text.removesuffix("m"))
    return text


def add_options(parser, *, steps, batch_size, dtypes, attack):
    """The options that both stages share; steps and batch_size are (default, default for the toy)."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="an open_clip name, hf-hub:ORG/REPO, or toy (default: toy)")
    group.add_argument("--pretrained", help="an open_clip tag, a file, or none; for the toy: seedN, trained on first use")
    group = parser.add_argument_group("data")
    group.add_argument("--tasks", default="all", help="to evaluate on: a comma list of toy tasks, data sets (README), "
                       "folder:PATH, wds:PATH, cache:FILE; all: the toy's zero-shot tasks, or what is under --data-root; "
                       "none (default: %(default)s)")
    group.add_argument("--data-root", metavar="DIR", help="the folder with the data sets, as torchvision lays them out; or "
                       "with ImageNet's train/<class>/ and val/<class>/")
    group.add_argument("--limit", type=number(int, 1), metavar="N", help="use at most N images of each set")
    group.add_argument("--workers", type=number(int, 0, most=257), default=min(8, os.cpu_count() or 1),
                       help="processes that decode images (default: %(default)s)")
    group = parser.add_argument_group(f"attack {attack}")
    group.add_argument("--norm", choices=("linf", "l2"), help="of the ε-ball; l2 wants --eps (default: linf)")
    parser.option(group, "--eps", 1, 8, "radius of the ball in 1/255", type=number(float, 0))
    parser.option(group, "--steps", *steps, "gradient steps", type=number(int, 1))
    group.add_argument("--step-size", type=number(float, 0, strict=True), help="length of a step in 1/255 (default: 1, the "
                       "paper's; toy and l2: 1.25 ε / steps in training, ε / 4 in evaluation)")
    group = parser.add_argument_group("run")
    parser.option(group, "--batch-size", *batch_size, "images, over all processes", type=number(int, 1))
    group.add_argument("--seed", type=number(int, 0), default=0, help="of everything random (default: %(default)s)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       help="cpu, cuda or cuda:N (default: %(default)s)")
    group.add_argument("--dtype", choices=dtypes, help="of the transformer blocks; pixels and patch embedding are fp32 "
                       + ("(default: bf16 on a GPU, else fp32)" if attack == "in training" else "(default: fp32)"))
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile "
                       + ("the attack and the update" if attack == "in training" else "the image encoder")
                       + ", a minute at the start (default: on a GPU)")
    group.add_argument("--kernels", choices=("auto", "triton", "torch"), default="auto", help="auto: Triton on a GPU, else "
                       "the same in PyTorch (default: %(default)s)")
    group.add_argument("--out", metavar="DIR", help="folder to write to (default: a name under out/)")


def settle_training(parser, args):
    """Fill in what training's command line left open: ([a method of --adapt, …], the learning rate of a readout beside
    prompts, the run's name, which has what is not the default). Ends the process where options exclude each other."""
    args.model, args.norm = args.model or "toy", args.norm or "linf"
    if args.norm == "l2" and args.eps is None:
        parser.error("--norm l2 needs --eps, in 1/255")
    toy, methods, finetuning_lr = args.model == "toy", args.adapt.split(","), parser.by_model["lr"][args.model == "toy"]
    for word, method in (("last_blocks", "partial"), ("border", "image-prompt"), ("tokens", "token-prompt")):
        if vars(args)[word] is not None and method not in methods:
            parser.error(f"--{word.replace('_', '-')} belongs to --adapt {method}, not to {args.adapt}")
    if args.labels == "pseudo" and args.loss in ("imgcoadv", "fare"):
        parser.error(f"--labels pseudo: --loss {args.loss} uses no labels")
    if "prompt" in args.adapt or args.loss == "fare":                      # fare's distances are not in units of τ
        parser.by_model["lr"] = (40, 10) if "prompt" in args.adapt else (1e-5, 2e-3)
    usual = {word: values[toy] for word, values in parser.by_model.items()} | {
        "dataset": "toy" if toy else "imagenet", "norm": "linf", "step_size": None, "limit": None, "max_steps": None,
        "accumulate": 1, "labels": "true", "shots": None, "last_blocks": None, "border": None, "tokens": None}
    args.dataset = args.dataset or usual["dataset"]
    args.pretrained = args.pretrained or (f"seed{args.seed}" if toy else None)
    parser.fill(args)
    unusual = [f"{word.replace('_', '')}{vars(args)[word]}" for word in usual if vars(args)[word] != usual[word]]
    args.step_size = args.step_size or (1 if not toy and args.norm == "linf" else 1.25 * args.eps / args.steps)
    name = "-".join([args.model.removeprefix("hf-hub:"), args.loss, args.adapt, *unusual, f"seed{args.seed}"])
    return methods, finetuning_lr, name.replace("/", "-").replace(":", "-").replace(",", "-")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_processes(parser, args):
    """Join the other processes of a torchrun, if any; the device of this one. Settles --compile and --kernels."""
    try:
        device = torch.device(args.device)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.compile is None:
        args.compile = device.type == "cuda" and kernels.COMPILER
    elif args.compile and not kernels.COMPILER:
        parser.error("--compile needs a C compiler, such as gcc")
    try:
        kernels.use(args.kernels, device)
    except ValueError as error:
        parser.error(str(error))
    if WORLD > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):        # one machine: torchrun's restarts are counted alike
            store = dist.PrefixStore(f"start{RESTARTS}", store)     # and what killed processes left there stays theirs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=RANK,
                                world_size=WORLD, timeout=timedelta(days=7))   # images of one may stand attacks far longer
    return device


def end_processes(status=0):
    """End this process together with the others, if there are any, all being done; without PyTorch's own tidying up, in
    which gloo aborts a process now and then (2.14: "terminate called without an active exception")."""
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def gathered(value):
    """The value that each process has here, in all of them: a list, by rank."""
    everyone = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def first_then_others(function):
    """Call function in process 0, then in all the others, so that what it trains or downloads once is there for all.

    A ValueError or OSError in process 0 is raised in all.
    """
    result, problem = None, [None]
    if RANK == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = [str(error)]
    if WORLD > 1:
        dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise ValueError(problem[0])
    return result if RANK == 0 else function()


def writable_folder(path):
    """Make the folder if need be, and see that a file can be written there before hours of work depend on it: OSError."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def source_version():
    """A hash of every source that a result of the stages depends on."""
    root = Path(__file__).parent
    files = sorted([*root.glob("*.py"), *root.glob("kernels/*.py"), *root.glob("*_classes.txt"), root / "toy.json"])
    files = [f for f in files if f.stem not in ("paper", "figures", "crosscheck", "bench", "measure", "soak")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]


def environment(device):
    """Versions and hardware, for the record of a result."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"python": platform.python_version(), "torch": torch.__version__, "hardware": hardware, "processes": WORLD}


def read_json(path):
    """What a file of `write_json` holds; None if there is none, or none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path, value):
    """Write value as JSON: beside, then renamed."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)                               # which might be a link to somewhere else
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
