"""This process among those of a torchrun: how they start and end together, and errors in one line."""
import os
import platform
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from tasks.images import Unreadable, printable

# what torchrun tells each of its processes: numbers, but for the address
TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"


def told(name, otherwise):
    """A number among torchrun's variables; `start` refuses what is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


RANK, WORLD, LOCAL = told("RANK", 0), told("WORLD_SIZE", 1), told("LOCAL_RANK", 0)
# of torchrun --max-restarts, after a crash
RESTARTS = told("TORCHELASTIC_RESTART_COUNT", 0)
# of torchrun; --standalone makes a new one each time
LAUNCH = os.environ.get("TORCHELASTIC_RUN_ID", "")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device):
    """Whether products in bf16 are faster than in fp32 on a device, in words (cpu, cuda, cuda:N), as far as
    PyTorch says: on a CPU with AVX512-BF16, AMX or ARM's bf16, of which versions before 2.11 say nothing."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    # oneDNN has the products: without it they are slower than in fp32
    return torch.backends.mkldnn.is_available() and any(
        has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def begin():
    """Of a command: from now on uncaught errors end in one line, and any name of a file can be printed."""
    sys.excepthook = end_in_one_line
    for stream in (sys.stdout, sys.stderr):             # whose encoding may not have what a file's name has
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def end_in_one_line(kind, error, trace):
    """sys.excepthook: what machine or user did ends in one line on stderr; a bug, in its traceback."""
    where = traceback.extract_tb(trace)[-1:]
    said = printable(" ".join(str(error).split()))[:300] or kind.__name__
    if issubclass(kind, KeyboardInterrupt):
        said = "interrupted"
    elif issubclass(kind, Unreadable) or re.search("DataLoader worker .*(killed by|exited unexpect)", said):
        pass
    elif issubclass(kind, torch.OutOfMemoryError | MemoryError):
        said = f"out of memory: {said}; a smaller --batch-size needs less, in training --accumulate 2 as well"
    elif WORLD > 1 and issubclass(kind, RuntimeError) and ("gloo" in said or "NCCL" in said):
        said = f"lost another process: {said}"
    elif issubclass(kind, OSError) and where:
        said += f" ({Path(where[0].filename).name}:{where[0].lineno})"
    else:
        return sys.__excepthook__(kind, error, trace)
    who = Path(sys.argv[0]).name + (f" (process {RANK})" if RANK else "")
    print(f"{who}: {said}", file=sys.stderr, flush=True)


def check_environment():
    """ValueError if some of torchrun's variables are set, and others not, or make no sense together."""
    there = {name: os.environ[name] for name in TORCHRUN if os.environ.get(name)}
    numbers = {name: told(name, -1) for name in TORCHRUN[:4] if name in there}
    wrong = [name for name, number in numbers.items() if number < 0]
    alone = numbers.get("RANK", 0) == numbers.get("LOCAL_RANK", 0) == 0 and numbers.get("WORLD_SIZE", 1) == 1
    lacking = [name for name in TORCHRUN if name not in there]
    if wrong:
        said = f"{wrong[0]}={there[wrong[0]]} is no number"
    elif not alone and lacking:
        said = f"{', '.join(lacking)} not set, but {', '.join(f'{name}={there[name]}' for name in there)}"
    elif RANK >= WORLD or LOCAL >= WORLD:
        said = f"RANK={RANK} and LOCAL_RANK={LOCAL} of WORLD_SIZE={WORLD}"
    else:
        return
    raise ValueError(f"the environment is half of a torchrun's: {said}; start with torchrun, or unset "
                     f"{' '.join(there)}")


def start(args):
    """Join the other processes of a torchrun, if any, and take args.kernels: the device of this one.
    ValueError: args.device, args.compile or args.kernels cannot be had here, or torchrun's variables are not
    whole."""
    check_environment()
    try:
        device = torch.device(args.device)
        if device.type == "cuda":
            device = torch.device("cuda", LOCAL if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.compile and not kernels.COMPILER:
        raise ValueError("--compile needs a C compiler, such as gcc")
    kernels.use(args.kernels, device)
    torch.backends.cudnn.allow_tf32 = False             # fp32 is fp32 in convolutions too, to report with
    if WORLD > 1:
        store, *_ = next(dist.rendezvous("env://"))
        # on one machine torchrun's restarts are counted alike: what killed processes left there stays theirs
        if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):
            store = dist.PrefixStore(f"start{RESTARTS}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # the images of one process may stand attacks far longer than those of another
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD, timeout=timedelta(days=7))
    return device


def end(status=0):
    """End this process together with the others; without PyTorch's own tidying up, in which gloo aborts a
    process now and then (2.14: "terminate called without an active exception")."""
    if WORLD > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def gathered(value):
    """The value that each process has here, in all of them: a list, by rank."""
    everyone = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everyone, value)
    return everyone


def rank0(function):
    """What function() returns in process 0, in all; a ValueError or OSError there is raised in all."""
    result, problem = None, None
    if RANK == 0:
        try:
            result = function()
        except (ValueError, OSError) as error:
            problem = str(error)
    (result, problem), *_ = gathered((result, problem))
    if problem:
        raise ValueError(problem)
    return result


def rank0_first(function):
    """function(), in process 0 before all others, so that what it trains or downloads is there for them."""
    result = []
    rank0(lambda: result.append(function()))
    return result[0] if RANK == 0 else function()


def environment(device):
    """Versions and hardware, for the record of a result."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"python": platform.python_version(), "torch": torch.__version__, "hardware": hardware,
            "processes": WORLD}
