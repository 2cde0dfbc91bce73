"""What a step costs: arithmetic, time, memory; its parts, its kernels, and the authors' recipe beside it."""
import contextlib
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import kernels
from attacks import ATTACKS, ENSEMBLES, image_keys, pgd
from eval_zeroshot import TARGETS, run_attacks
from experiments import whole_numbers
from experiments.measure import Bytes, gflop, measure, without_data
from experiments.soak import soak
from harness import processes
from harness.files import ROOT
from harness.options import Parser, number
from harness.processes import DTYPES, has_bf16
from harness.reports import in_pipes
from kernels.contrastive_loss import contrastive_log_odds
from kernels.pgd_step import pgd_step
from kernels.random_start import random_start
from losses import LOSSES
from model import ImageEncoder, freeze, image_size, load_clip, model_config, predict, resolution, unfreeze
from tasks.class_names import imagenet_class_names
from tasks.loading import batches
from tasks.make_cache import make_cache
from tasks.task import load_task

EPS, LOGIT_SCALE = 1 / 255, 100.
# dense bf16 TFLOP/s with fp32 sums, by NVIDIA's data sheets; the first name that fits the device's
PEAK = {"B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
        "L4": 121, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155}


# ---------------------------------------------------------------------------------------- the steps
class Row(NamedTuple):
    """A step to time."""
    model: str
    batch: int
    steps: int                # of PGD
    how: str                  # eager, compiled, CUDA graphs; or authors
    parts: bool = False       # its parts as well
    dtype: str = "auto"       # of the blocks; auto: bf16 on a GPU, else fp32


def width(clip, name):
    """D of a CLIP's features; timm's image encoders do not say it."""
    return getattr(clip.visual, "output_dim", None) or model_config(name)["embed_dim"]


def our_step(clip, row, tokens):
    """The loop's body of train_tecoa.py on one random batch: {part: a function that does just that part}."""
    device, batch, classes = clip.logit_scale.device, row.batch, len(tokens)
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = ImageEncoder(clip, DTYPES.get(row.dtype, usual))
    head = F.normalize(torch.randn(classes, width(clip, row.model), device=device), dim=-1)
    x = torch.randint(256, (batch, 3, *encoder.size), dtype=torch.uint8, device=device)
    x, y = encoder.patchify(x), torch.randint(classes, (batch,), device=device)
    keys, pixels = image_keys(0, 0, torch.arange(batch, device=device)), x.float() / 255
    noisy, grad = pixels.clone().requires_grad_(), torch.ones_like(pixels)
    loss = next(iter(LOSSES.values())).make(encoder, head, LOGIT_SCALE)
    trainable = dict(encoder.named_parameters())
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-9, momentum=.9, fused=True)
    if row.how != "eager":
        how = {"dynamic": False, "mode": "reduce-overhead" if row.how == "CUDA graphs" else None}
        loss = loss._replace(inner=torch.compile(loss.inner, **how), outer=torch.compile(loss.outer, **how))

    def attack(steps):
        freeze(encoder)
        return pgd(partial(loss.inner, encoder), x, y, eps=EPS, steps=steps, step_size=EPS, keys=keys)

    def update(x_adv):
        unfreeze(trainable)
        losses, _ = loss.outer(encoder, x_adv, y, x)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward():
        freeze(encoder)
        return loss.inner(encoder, noisy, y)
    return {"step": lambda: update(attack(row.steps)), "attack, forward": forward,
            "attack, forward and input gradient": lambda: torch.autograd.grad(forward().sum(), noisy),
            "random start": lambda: random_start(x, EPS, "linf", keys),
            "pgd_step": lambda: pgd_step(pixels, grad, x, EPS, EPS), "update": lambda: update(pixels),
            "evaluation, PGD-100": lambda: attack(100)}


def authors_step(clip, row, tokens):
    """The authors' recipe, re-created from its description (paper.md, faults 1 to 3): all prompts encoded
    with gradient at every step of the attack, backward() into every weight, fp16 autocast on a GPU, eager."""
    dtype = DTYPES.get(row.dtype, torch.float16 if clip.logit_scale.is_cuda else torch.float32)
    device, normalisation = clip.logit_scale.device, clip.visual.preprocess_cfg
    mean, std = (torch.tensor(normalisation[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    x = torch.rand(row.batch, 3, *resolution(clip.visual), device=device)
    y = torch.randint(len(tokens), (row.batch,), device=device)
    clip.requires_grad_(True)
    optimizer = torch.optim.SGD(clip.visual.parameters(), lr=1e-9, momentum=.9)

    def loss(x):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            image, text = clip.encode_image((x - mean) / std), clip.encode_text(tokens)
            return F.cross_entropy(LOGIT_SCALE * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T, y)

    def step():
        delta = torch.zeros_like(x).uniform_(-EPS, EPS).requires_grad_()
        for _ in range(row.steps):
            loss(x + delta).backward()
            with torch.no_grad():
                delta.copy_((x + (delta + EPS * delta.grad.sign()).clamp(-EPS, EPS)).clamp(0, 1) - x)
                delta.grad.zero_()
        clip.zero_grad(set_to_none=True)
        loss(x + delta.detach()).backward()
        optimizer.step()
    return {"step": step}


def counted(row, classes, parts=("step",)):
    """GFLOP an image of these parts of a step, counted without data."""
    (clip, mode), step = without_data(row.model), authors_step if row.how == "authors" else our_step
    with mode:
        tokens = torch.zeros(classes, clip.context_length, dtype=torch.int64)
        functions = step(clip, row._replace(how="eager"), tokens)
        return [gflop(functions[part]) / row.batch for part in parts]


# ---------------------------------------------------------------------------------------- the tables
class Report:
    """Markdown that is printed and written to a file line by line: a run cut short leaves what it has."""

    def __init__(self, path, first):
        self.streams, self.failed = [sys.stdout, *([open(path, "w")] if path else [])], False
        self(first)

    def __call__(self, *lines):
        for stream in self.streams:
            print(*lines, sep="\n", file=stream, flush=True)

    @contextlib.contextmanager
    def part(self):
        """What fails inside costs the rest of this part alone: it is said; its traceback goes to stderr."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self("", f"*This part failed: {failure(error)}*")

    def table(self, title, *header):
        self("", f"## {title}", "", in_pipes([header]), "|" + "---|" * len(header))

    def row(self, *cells):
        self(in_pipes([[
            "–" if cell is None else cell if isinstance(cell, str) else
            f"{cell:,.4g}" if isinstance(cell, float) and abs(cell) < 1000 else f"{cell:,.0f}"
            for cell in cells]]))


def spread(times):
    return f"{median(times):.4g} ({times[0]:.4g}–{times[-1]:.4g} of {len(times)})"


def failure(error):
    return f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])[:60]}".replace("|", "/")


def counts(report, models, steps, classes):
    report.table(f"Arithmetic: GFLOP an image, batch 256, {classes} classes", "model", "PGD steps",
                 "our step", "forward", "forward and input gradient", "update", "authors' recipe")
    parts = "step", "attack, forward", "attack, forward and input gradient", "update"
    for row in (Row(name, 256, n, "eager") for name in models for n in steps):
        theirs = counted(row._replace(how="authors"), classes)
        report.row(row.model, row.steps, *counted(row, classes, parts), *theirs)


def kernel_calls(device):
    """Each kernel at its shapes: (operation, shape, type, a function that calls it, the bytes that Triton's
    moves on 132 processors, if every input comes from memory once)."""
    gpu = device.type == "cuda"
    shapes = ((256, 1000), (1024, 21_841), (1024, 1_000_000)) if gpu else ((64, 1000), (256, 1000))
    for batch, classes in shapes:
        z = torch.randn(batch, 512, device=device, requires_grad=True)
        y = torch.randint(classes, (batch,), device=device)
        for dtype, rows, cols in ((torch.float32, 32, 16), (torch.bfloat16, 64, 32))[:1 + gpu]:
            head = F.normalize(torch.randn(classes, 512, device=device), dim=-1).to(dtype)
            # each share of the classes writes its sums, and they are read
            shares = min(-(-classes // cols), max(1, 132 // -(-batch // rows)))

            def gradient(z=z, head=head, y=y):
                return torch.autograd.grad(contrastive_log_odds(z, head, y, LOGIT_SCALE).sum(), z)
            yield ("log-odds and ∂z", f"B={batch:,} K={classes:,} D=512", dtype, gradient,
                   head.nbytes + (4 + 2 * shares) * z.nbytes)
    for batch, size in ((256, 224), (256, 336)) if gpu else ((16, 224),):
        x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        x_adv, keys, shape = x.float() / 255, torch.arange(batch, device=device), f"B={batch:,}, {size} px"
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.randn(x.shape, device=device).to(dtype)
            for norm, readings in (("linf", 1), ("l2", 2)):
                yield (f"pgd_step, {norm}", shape, dtype, partial(pgd_step, x_adv, grad, x, EPS, EPS, norm),
                       x.numel() * ((5 + grad.element_size()) * readings + 4))
        yield "random start", shape, "", partial(random_start, x, EPS, "linf", keys), 5 * x.numel()


def kernel_table(report, device, seconds, deadline=math.inf):
    """Each kernel against the same in PyTorch, eager and compiled. MB: read and written; of PyTorch, by its
    operators. MiB: the most that the device held."""
    report.table("Kernels: ms (lowest–highest of n timings), and peak MiB", "operation", "shape",
                 "head / gradient", "MB, Triton", "MB, PyTorch", "Triton", "PyTorch", "PyTorch, compiled")
    no_triton = device.type != "cuda"
    for name, shape, dtype, function, moved in kernel_calls(device):
        if time.perf_counter() > deadline:
            report.row(name, shape, str(dtype).removeprefix("torch."), "*not run: out of time*", *[None] * 4)
            continue
        cells = [moved / 1e6, None, *[None] * no_triton]
        kernels.use("torch", device)
        with contextlib.suppress(Exception), Bytes() as count:      # its own cell will say so
            function()
            cells[1] = count.total / 1e6
        for which, compiled in (("triton", False), ("torch", False), ("torch", True))[no_triton:]:
            kernels.use(which, device)
            torch.compiler.reset()
            try:
                call = torch.compile(function, dynamic=False) if compiled else function
                times, memory = measure(call, device, seconds)
                cells.append(spread(times) + (f", {memory:,.0f} MiB" if memory is not None else ""))
            except Exception as error:              # of Triton's compiler too, which has kinds of its own
                cells.append(failure(error))
        kernels.use("auto", device)
        report.row(name, shape, str(dtype).removeprefix("torch."), *cells)


def waits_for_the_gpu(step):
    """What PyTorch says of a step in which the CPU waits for the GPU; None if it never does."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def time_step(report, row, clip, tokens, peak, seconds):
    """Time one step, and its parts if the row says so. ((images/s, MiB), of `waits_for_the_gpu`)."""
    device, gpu = clip.logit_scale.device, clip.logit_scale.is_cuda
    functions = (authors_step if row.how == "authors" else our_step)(clip, row, tokens)
    some = [part for part in functions if part == "step" or row.parts and "100" not in part]
    work = dict(zip(some, counted(row, len(tokens), some)))
    if row.parts and gpu:
        work["evaluation, PGD-100"] = 100 * work["attack, forward and input gradient"]
    waits = waits_for_the_gpu(functions["step"]) if gpu and row.how == "compiled" else None
    for part, gflops in work.items():
        times, memory = measure(functions[part], device, seconds)
        rate = 1e3 * row.batch / median(times)
        share = gflops * rate / peak / 10 if peak and gflops else None      # GFLOP/s, in % of TFLOP/s
        report.row(*row[:4], part, spread(times), rate, gflops, share, memory)
        if part == "step":
            found = rate, memory
    return found, waits


def steps_table(report, device, rows, classes, peak, seconds, deadline):
    """A line for each Row, and for each part that it wants. Compilation is outside of every time."""
    report.table("A training step", "model", "batch", "PGD steps", "how", "part",
                 "ms (lowest–highest of n timings)", "images/s", "GFLOP/image", "% of peak", "peak MiB")
    model, clip, found, notes = None, None, {}, []
    for row in rows:
        if time.perf_counter() > deadline:
            report.row(*row[:4], "*not run: out of time*", *[None] * 5)
            continue
        if row.model != model:
            clip = None                             # its memory is free before the next one's is taken
            model, (clip, tokenizer) = row.model, load_clip(row.model, "none", device)
            tokens = class_prompts(tokenizer, classes).to(device)
        torch.compiler.reset()
        try:
            found[row[:4]], waits = time_step(report, row, clip, tokens, peak, seconds)
            notes += [f"{model}, batch {row.batch}: a step waits for the GPU: {waits}"] if waits else []
        except Exception as error:
            report.row(*row[:4], failure(error), *[None] * 5)
        clip.zero_grad(set_to_none=True)
    report("", *(notes or ["No compiled step waited for the GPU."] if device.type == "cuda" else []))
    for (name, batch, n, how), (rate, memory) in found.items():
        ours = {key[3]: found[key] for key in found if key[:3] == (name, batch, n) and key[3] != "authors"}
        if how == "authors" and ours:
            best = max(ours, key=ours.get)
            less = f", in {ours[best][1] / memory:.2f} of its memory" if memory else ""
            report("", f"{name}, batch {batch}, PGD-{n}: ours ({best}) makes {ours[best][0] / rate:.1f} "
                   f"times the images a second of the authors' recipe{less}.")


def class_prompts(tokenizer, classes):
    """The tokens of so many prompts, of ImageNet's classes again and again: int64 [classes, 77]."""
    texts = [f"This is a photo of a {name}" for name in imagenet_class_names().values()]
    return tokenizer([texts[k % len(texts)] for k in range(classes)])


def in_turn_table(report, name, seconds, batch=16, prompts=100):
    """On a CPU: a PGD-2 step, ours and the authors', in fp32 and bf16. In each round every one runs once, so
    that another busy process slows all of them; a ratio is of two times of one round. The first round does
    not count; two or more follow, for `seconds`."""
    clip, tokenizer = load_clip(name, "none")
    tokens, dtypes = class_prompts(tokenizer, prompts), ["fp32", *["bf16"] * has_bf16("cpu")]
    rows = {(how, dtype): Row(name, batch, 2, how, dtype=dtype)
            for how in ("eager", "authors") for dtype in dtypes}
    # each is made just before it runs: they set which weights of the one CLIP get gradients
    steps, rounds = {"eager": our_step, "authors": authors_step}, []
    while len(rounds) < 3 or sum(sum(one.values()) for one in rounds[1:]) < seconds:
        rounds.append({})
        for key, row in rows.items():
            step = steps[row.how](clip, row, tokens)["step"]
            start = time.perf_counter()
            step()
            rounds[-1][key] = time.perf_counter() - start
            clip.zero_grad(set_to_none=True)

    def times(key, other):
        ratios = sorted(one[other] / one[key] for one in rounds[1:])
        return None if other == key else f"{median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    report.table(f"{name}, PGD-2, batch {batch}, {prompts} prompts, in turn: a step", "recipe", "blocks in",
                 "ms (lowest–highest of n timings)", "images/s", "GFLOP/image", "times as fast as in fp32",
                 "as the authors' in the same", "as the authors' in fp32")
    work = {how: [counted(Row(name, size, 2, how), prompts)[0] for size in (batch, 256)] for how in steps}
    for how, dtype in rows:
        ms, others = sorted(1e3 * one[how, dtype] for one in rounds[1:]), [(how, "fp32"), ("authors", dtype)]
        report.row("ours" if how == "eager" else "the authors'", dtype, spread(ms), 1e3 * batch / median(ms),
                   work[how][0], *(times((how, dtype), other) for other in [*others, ("authors", "fp32")]))
    here, usual = (theirs / ours for ours, theirs in zip(work["eager"], work["authors"]))
    report("", f"Counted, theirs is {here:.1f} times as much arithmetic as ours at batch {batch}, and "
           f"{usual:.1f} times at 256: the prompts are encoded for a batch, however small it is.")
    if len(dtypes) == 1:
        report("", "No bf16: this processor has no instructions for it.")


def evaluation_table(report, name, device, images, classes, seconds):
    """Each attack of AutoAttack on random images and weights: eps 0 breaks none, so that all
    of its passes are made, and 64/255 breaks what it can. Beside it as many bare forwards and input gradients
    (Square: forwards; FAB-T: every other one). 11 queries or iterates: a pass costs the same at any number.
    Below it the forward passes of the whole for an image that stands."""
    clip, _ = load_clip(name, "none", device)
    encoder, steps = ImageEncoder(clip), 10
    freeze(encoder)
    head = F.normalize(torch.randn(classes, width(clip, name), device=device), dim=-1)
    x = torch.rand(images, 3, *encoder.size, device=device)
    y, index = predict(encoder, head, LOGIT_SCALE, x), torch.arange(images, device=device)
    report.table(f"Evaluation: {name}, {images} images, {classes} classes, fp32", "attack", "norm", "ε · 255",
                 "passes an image", "in full", "ms (lowest–highest of n timings)", "× bare passes")

    def bare(passes, back):
        for _ in range(passes):
            with torch.set_grad_enabled(back):
                leaf = x.clone().requires_grad_(back)
                loss = contrastive_log_odds(encoder(leaf), head, y, LOGIT_SCALE).sum()
                if back:
                    torch.autograd.grad(loss, leaf)

    def whole(attack, last):
        targets = min(TARGETS, classes - 1) if ATTACKS[attack].targeted else 1
        return targets * (1 + ATTACKS[attack].forwards * last)
    passing = {back: median(measure(partial(bare, 1, back), device, seconds)[0]) for back in (False, True)}
    backs = {"square": [False], "fab-t": [False, True]}
    for attack, norm, eps in product(ENSEMBLES["autoattack"], ("linf", "l2"), (0, 64)):
        def call(attack=attack, norm=norm, eps=eps):
            return run_attacks(encoder, head, LOGIT_SCALE, x, y, index, names=[attack], eps=eps / 255,
                               norm=norm, steps=steps, queries=steps + 1, step_size=eps / 1020)
        passes = call()[4].double().mean().item()
        times, _ = measure(call, device, seconds)
        report.row(attack, norm, eps, passes, whole(attack, steps), spread(times),
                   median(times) / (passes * fmean(passing[back] for back in backs.get(attack, [True]))))
    passes = {attack: whole(attack, 4999 if attack == "square" else 100)
              for attack in ENSEMBLES["autoattack"]}
    report("", f"AutoAttack's `standard`, of an image that stands: {sum(passes.values()):,} forward passes: "
           + ", ".join(f"{attack} {n:,}" for attack, n in passes.items()) + ".")


def data_table(report, workers, count=400):
    """Drawn JPEGs of ImageNet's usual size, as a folder and as a cache, through training's loader."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            path = Path(folder, "images", "ab"[k % 2], f"{k}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            picture = picture.resize((500, 375), Image.BICUBIC) + rng.normal(0, 6, (375, 500, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        jpeg = np.mean([path.stat().st_size for path in Path(folder).glob("images/*/*")])
        with contextlib.redirect_stdout(None):
            make_cache(f"folder:{folder}/images", f"{folder}/cache.npy", workers=workers)
        report.table(f"Data: images/s through the loader, {workers} processes, the files in memory",
                     "from", "bytes an image", "images/s", "images/s a process")
        for name, size in ((f"folder:{folder}/images", jpeg), (f"cache:{folder}/cache.npy", 3 * 224 * 224)):
            task, rates = load_task(name, "val"), []
            for _ in range(3):
                start = time.perf_counter()
                for _ in batches(task, list(range(count)) * 4, 128, workers):
                    pass
                rates.append(4 * count / (time.perf_counter() - start))
            report.row(name.split(":")[0], size, median(rates), median(rates) / workers)


def soak_table(report, steps):
    """Means over each quarter of a run of so many steps, as PyTorch is and compiled."""
    report("", f"PyTorch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU "
           "cores. The toy on 800 PNG files, batch 8, two workers that decode, a checkpoint every 100 steps. "
           "MiB: of the main process all that it holds, of the workers together what they do not share with "
           "it.")
    for how in ("eager", "compiled") if kernels.COMPILER else ("eager",):
        means, recompiled = soak(steps, how == "compiled")
        first, *_ = means.values()
        report.table(f"{steps:,} steps, {how}: {recompiled} recompilations", "steps", *first)
        for share, row in means.items():
            report.row(f"{(share - .25) * steps:,.0f}–{share * steps:,.0f}", *row.values())


def gpu_tests(report, seconds):
    """The tests that need a GPU, for so long at most."""
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts="],
                              cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        said, output = done.stdout.strip().splitlines()[-1], done.stdout if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        said, output = "not done in time; run them by themselves.", (late.stdout or b"").decode()
    report("", f"Tests on this GPU (`pytest -m cuda`): {said}")
    print(output[-5000:], flush=True)


# ---------------------------------------------------------------------------------------- the command
def make_parser(description):
    parser = Parser(prog="bench.py", description=description)
    option = partial(parser.option, parser)
    option("--all", action="store_true", help="every table; on a GPU the tests marked cuda as well")
    option("--models", "ViT-B-32-quickgelu,ViT-B-16,ViT-L-14", help="a comma list of open_clip names")
    option("--batch-sizes", [], type=whole_numbers(1), metavar="LIST", help="time training steps of these "
           "batches, a comma list (default: none, but some with --all)")
    option("--steps", "2,10", type=whole_numbers(1), metavar="LIST", help="PGD steps, a comma list")
    option("--classes", 1000, type=number(int, 2), help="class prompts")
    option("--compile", "both", choices=("eager", "compiled", "both"), help="which of our steps")
    option("--baseline", choices=("authors",), help="also time the authors' recipe, re-created")
    option("--device", "cuda" if torch.cuda.is_available() else "cpu", help="where")
    option("--seconds", 5., type=number(float, 0, strict=True), help="time each row for so long at most")
    option("--minutes", 4., type=number(float, 0), help="start no further row of the steps after so many; "
           "with --all on a GPU, none of the kernels two later")
    option("--out", type=Path, metavar="FILE", help="(default: --all: results/bench-<device>.md; else none)")
    option("--soak", nargs="?", type=number(int, 40), const=2000, metavar="N", help="only this: memory, open "
           "files and compiled code over N toy steps on the CPU (default: no; N: 2000)")
    option("--evaluation", nargs="?", type=number(int, 1), const=16, metavar="N", help="only this: "
           "AutoAttack on N images of the first of --models, passes and times (default: no; N: 16)")
    return parser


def rows_to_time(args, models, gpu):
    """The Rows of --batch-sizes, or those of --all. On a CPU they show that it all runs, and the ratios."""
    hows = {"eager": ["eager"], "compiled": ["compiled"], "both": ["eager", "compiled"]}[args.compile]
    if args.batch_sizes or not args.all:
        first = args.batch_sizes[:1], args.steps[:1], hows[-1]
        return [Row(name, batch, n, how, parts=([batch], [n], how) == first)
                for name in models for batch in args.batch_sizes for n in args.steps
                for how in [*hows, *(["authors"] if args.baseline else [])]]
    if not gpu:
        return [Row(models[0], 4, 2, "eager", parts=True), Row(models[0], 4, 2, "compiled")]
    rows = [(256, 2, "compiled", True), (256, 2, "authors"), (256, 2, "eager"), (256, 10, "compiled"),
            (64, 2, "CUDA graphs"), *((batch, 2, how) for batch in (64, 1024) for how in hows)]
    return [Row(models[0], *row) for row in rows] + [
        Row(name, 256, 2, how) for name in models[1:] for how in hows]


def main(description=None):
    processes.begin()
    started, parser = time.perf_counter(), make_parser(description)
    args, command = parser.parse_args(), f"`python {' '.join(sys.argv)}`"
    if args.soak:
        report = Report(args.out or ROOT / "results" / "soak.md", f"# A long run: {command}")
        return soak_table(report, args.soak)
    with parser.refusing():
        models = [name for name in args.models.split(",") if image_size(name, "none")]
        device = processes.start(SimpleNamespace(device=args.device, compile=False, kernels="auto"))
        if args.baseline and not args.batch_sizes:
            raise ValueError("--baseline needs --batch-sizes")
    gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    peak = next((tflops for name, tflops in PEAK.items() if re.search(rf"\b{name}\b", hardware)), None)
    usual = ROOT / "results" / f"bench-{hardware.split(',')[0].replace(' ', '-')}.md" if args.all else None
    report = Report(args.out or usual, f"# {hardware}: {command}")
    triton = kernels.triton.__version__ if kernels.triton else "none"
    report("", f"PyTorch {torch.__version__}, Triton {triton}, Python {platform.python_version()}."
           + f" Peak: {peak} TFLOP/s dense bf16, by the data sheet." * bool(peak)
           + " Pixels, patch embedding and loss in fp32 (TF32 products), blocks in bf16." * gpu)
    if args.evaluation:
        return evaluation_table(report, models[0], device, args.evaluation, args.classes, args.seconds)
    torch.set_float32_matmul_precision("high")
    late, rows = started + 60 * args.minutes, rows_to_time(args, models, gpu)
    with report.part():
        counts(report, models, args.steps, args.classes)
    with report.part():
        if rows:
            steps_table(report, device, rows, args.classes, peak, args.seconds, late)
    with report.part():
        if args.all and not gpu:
            in_turn_table(report, models[0], 60)
    with report.part():
        kernel_table(report, device, args.seconds, late + 120 if args.all and gpu else math.inf)
    with report.part():
        if args.all:
            data_table(report, min(8, os.cpu_count()))
    with report.part():
        if args.all and gpu:                        # last, and not for longer than there is
            gpu_tests(report, max(60, started + 465 - time.perf_counter()))
    report("", f"{time.perf_counter() - started:.0f} seconds in all.")
    if report.failed:
        sys.exit(1)
