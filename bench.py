"""What a step costs: arithmetic, time, memory; its parts, its kernels, and the authors' recipe beside it.

    python bench.py                                        # the arithmetic of a step, and the kernels at small shapes
    python bench.py --all                                  # all of it, on a GPU with its tests: under 8 minutes
    python bench.py --models ViT-B-16 --batch-sizes 64,256 --steps 10
    python bench.py --baseline authors                     # and their recipe, on the same device in the same run
    python bench.py --soak                                 # 2,000 steps of the toy: does anything grow?

Prints Markdown and writes it to results/bench-<device>.md after every row. Weights, pixels and labels are random: none of
that changes the cost. A time is the median of --runs runs after two that are not counted, with the spread from the lowest
to the highest, by the device's own clock. GFLOP are counted operator by operator by PyTorch's flop counter, without data.
"""
import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import kernels
from attacks import image_keys, pgd
from cli import Parser, number
from data import batches, load_task, make_cache
from kernels.contrastive_loss import contrastive_log_odds, contrastive_loss
from kernels.pgd_step import pgd_step
from kernels.random_start import random_start
from measure import Operations, gflop, measure, without_data
from model import ImageEncoder, image_size, load_clip
from prompts import imagenet_class_names
from soak import soak

ROOT = Path(__file__).parent
EPS = 1 / 255
SCALE = 100.
# dense bf16 TFLOP/s with fp32 sums, from NVIDIA's data sheets of these products; the first name that fits the device's
PEAK = {"B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
        "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155}


# ---------------------------------------------------------------------------------------------- the steps
def our_step(clip, batch, steps, classes, how="eager", dtype=torch.bfloat16):
    """The loop's body of train_tecoa.py on one random batch: {part: a function that does just that part}."""
    device = clip.logit_scale.device
    encoder, size = ImageEncoder(clip, dtype), clip.visual.image_size
    head = F.normalize(torch.randn(classes, clip.visual.output_dim, device=device), dim=-1)
    x = encoder.patchify(torch.randint(256, (batch, 3, *size), dtype=torch.uint8, device=device))
    y, index = torch.randint(classes, (batch,), device=device), torch.arange(batch, device=device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-9, momentum=.9, fused=True)

    def attack_loss(x, y):
        return contrastive_log_odds(encoder(x), head, y, SCALE)

    def update_loss(x, y):
        return contrastive_loss(encoder(x), head, y, SCALE)

    if how != "eager":
        options = {"dynamic": False, "mode": "reduce-overhead" if how == "CUDA graphs" else None}
        attack_loss, update_loss = torch.compile(attack_loss, **options), torch.compile(update_loss, **options)

    def attack(steps=steps):
        encoder.requires_grad_(False)
        return pgd(attack_loss, x, y, eps=EPS, steps=steps, step_size=EPS, keys=image_keys(0, 0, index))

    def update(x_adv):
        encoder.requires_grad_(True)
        losses, _ = update_loss(x_adv, y)
        encoder.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimizer.step()

    keys, pixels = image_keys(0, 0, index), x.float() / 255
    noisy, grad = pixels.clone().requires_grad_(), torch.ones_like(pixels)

    def input_gradient():
        encoder.requires_grad_(False)
        return torch.autograd.grad(attack_loss(noisy, y).sum(), noisy)

    def forward():
        encoder.requires_grad_(False)
        return attack_loss(noisy, y)

    return {"step": lambda: update(attack()), "attack, forward": forward,
            "attack, forward and input gradient": input_gradient,
            "random start": lambda: random_start(x, EPS, "linf", keys),
            "pgd_step": lambda: pgd_step(pixels, grad, x, EPS, EPS), "update": lambda: update(pixels),
            "evaluation, PGD-100": lambda: attack(100)}


def authors_step(clip, batch, steps, tokens):
    """The authors' recipe, re-created from its description (paper.md, faults 1 to 3): all prompts encoded with gradient at
    every step of the attack, backward() into every weight, fp16 autocast, eager."""
    device = clip.logit_scale.device
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    x = torch.rand(batch, 3, *clip.visual.image_size, device=device)
    y = torch.randint(len(tokens), (batch,), device=device)
    clip.requires_grad_(True)
    optimizer = torch.optim.SGD(clip.visual.parameters(), lr=1e-9, momentum=.9)

    def loss(x):
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            image, text = clip.encode_image((x - mean) / std), clip.encode_text(tokens)
            logits = SCALE * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
            return F.cross_entropy(logits, y)

    def step():
        delta = torch.zeros_like(x).uniform_(-EPS, EPS).requires_grad_()
        for _ in range(steps):
            loss(x + delta).backward()
            with torch.no_grad():
                delta.copy_((x + (delta + EPS * delta.grad.sign()).clamp(-EPS, EPS)).clamp(0, 1) - x)
                delta.grad.zero_()
        clip.zero_grad(set_to_none=True)
        loss(x + delta.detach()).backward()
        optimizer.step()
    return {"step": step}


# ---------------------------------------------------------------------------------------------- the tables
class Report:
    """Markdown that is printed and written to a file line by line, so that a run cut short leaves what it has."""

    def __init__(self, path, first):
        self.path, self.lines = path, []
        self(first)

    def __call__(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        if self.path:
            self.path.write_text("\n".join(self.lines) + "\n")

    def table(self, title, header):
        self("", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header))

    def row(self, *cells):
        self("| " + " | ".join("–" if cell is None else f"{cell:,.4g}" if isinstance(cell, float) and abs(cell) < 1000 else
                               f"{cell:,.0f}" if isinstance(cell, int | float) else cell for cell in cells) + " |")


def counts(report, models, steps, classes):
    report.table(f"Arithmetic: GFLOP an image, batch 256, {classes} classes",
                 ["model", "PGD steps", "our step", "forward", "forward and input gradient", "update", "authors' recipe"])
    for name in models:
        clip, mode = without_data(name)
        with mode:
            tokens = torch.zeros(classes, clip.context_length, dtype=torch.int64)
            for n in steps:
                parts = our_step(clip, 256, n, classes)
                ours = [gflop(parts[part]) / 256 for part in
                        ("step", "attack, forward", "attack, forward and input gradient", "update")]
                report.row(name, n, *ours, gflop(authors_step(clip, 256, n, tokens)["step"]) / 256)


def kernel_table(report, device, shapes, image_shapes, runs):
    """Each kernel against the same in PyTorch, eager and compiled. MB: read and written, by Triton's kernels if every
    input comes from memory once, on 132 processors, and by PyTorch's operators. MiB: the most that the device held."""
    report.table("Kernels: ms (lowest–highest), and peak MiB", [
        "operation", "shape", "head / gradient", "MB, Triton", "MB, PyTorch", "Triton", "PyTorch", "PyTorch, compiled"])

    def compare(name, shape, dtype, function, moved):
        cells = [moved / 1e6, None]
        try:
            kernels.use("torch", device)
            with Operations() as count:
                function()
            cells[1] = count.bytes / 1e6
        except torch.OutOfMemoryError:
            pass                                    # its own row will say so
        for how in ("triton", "torch", "compiled"):
            if how == "triton" and device.type != "cuda":
                cells.append(None)
                continue
            kernels.use("triton" if how == "triton" else "torch", device)
            torch.compiler.reset()
            try:
                call = torch.compile(function, dynamic=False) if how == "compiled" else function
                middle, low, high, memory = measure(call, device, runs)
                cells.append(f"{middle:.3g} ({low:.3g}–{high:.3g})" + (f", {memory:,.0f} MiB" if memory is not None else ""))
            except (RuntimeError, torch.OutOfMemoryError) as error:
                cells.append(f"{type(error).__name__}: {str(error).split('.')[0][:60]}".replace("|", "/"))
        kernels.use("auto", device)
        report.row(name, shape, dtype, *cells)

    for batch, classes, width in shapes:
        z = torch.randn(batch, width, device=device, requires_grad=True)
        y = torch.randint(classes, (batch,), device=device)
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
            head = F.normalize(torch.randn(classes, width, device=device), dim=-1).to(dtype)

            def contrast(z=z, head=head, y=y):
                return contrastive_log_odds(z, head, y, SCALE)

            rows, cols = (32, 16) if dtype == torch.float32 else (64, 32)
            shares = min(-(-classes // cols), max(1, 132 // -(-batch // rows)))

            def both(contrast=contrast, z=z):
                return torch.autograd.grad(contrast().sum(), z)
            compare("log-odds and ∂z", f"B={batch:,} K={classes:,} D={width}", str(dtype).removeprefix("torch."), both,
                    head.nbytes + 4 * z.nbytes + 2 * shares * z.nbytes)         # the sums of each share of the classes
    for batch, size in image_shapes:
        x = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        x_adv, keys, count = x.float() / 255, torch.arange(batch, device=device), x.numel()
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.randn(x.shape, device=device).to(dtype)
            for norm in ("linf", "l2"):
                compare(f"pgd_step, {norm}", f"B={batch:,}, {size} px", str(dtype).removeprefix("torch."),
                        lambda x_adv=x_adv, grad=grad, x=x, norm=norm: pgd_step(x_adv, grad, x, EPS, EPS, norm),
                        count * ((5 + grad.element_size()) * (1 if norm == "linf" else 2) + 4))
        compare("random start", f"B={batch:,}, {size} px", "",
                lambda x=x, keys=keys: random_start(x, EPS, "linf", keys), 5 * count)


def steps_table(report, device, configurations, classes, peak, runs, deadline):
    """configurations: (model, batch, PGD steps, how, with parts). Compilation is outside of every time."""
    report.table("A training step", ["model", "batch", "PGD steps", "how", "part", "ms (lowest–highest)", "images/s",
                                     "GFLOP/image", "% of peak", "peak MiB"])
    name_before, clip, images_per_s, memories, notes = None, None, {}, {}, []
    for name, batch, n, how, parts in configurations:
        if time.perf_counter() > deadline:
            report.row(name, batch, n, how, "*not run: out of time*", *[None] * 5)
            continue
        if name != name_before:
            clip = None                             # its memory is free before the next one's is taken
            clip, tokenizer = load_clip(name, "none", device)
            name_before = name
        torch.compiler.reset()
        try:
            if how == "authors":
                tokens = tokenizer([f"This is a photo of a {name}" for name in imagenet_class_names().values()])
                tokens = tokens[torch.arange(classes) % len(tokens)]
                functions = authors_step(clip, batch, n, tokens.to(device))
            else:
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                functions = our_step(clip, batch, n, classes, how, dtype)
            shapes, mode = without_data(name)
            with mode:
                counted = (authors_step(shapes, batch, n, torch.zeros(classes, shapes.context_length, dtype=torch.int64))
                           if how == "authors" else our_step(shapes, batch, n, classes))
                work = {part: gflop(counted[part]) / batch for part in functions
                        if part == "step" or parts and "100" not in part}
            work["evaluation, PGD-100"] = 100 * work.get("attack, forward and input gradient", 0)
            if device.type == "cpu":
                functions.pop("evaluation, PGD-100", None)
            if device.type == "cuda" and how == "compiled":
                functions["step"]()
                torch.cuda.set_sync_debug_mode("error")                     # from here on, waiting for the GPU is one
                try:
                    functions["step"]()
                except RuntimeError as error:
                    notes.append(f"{name}, batch {batch}: a step waits for the GPU: {str(error).splitlines()[0]}")
                torch.cuda.set_sync_debug_mode("default")
            for part, function in functions.items():
                if part == "step" or parts:
                    middle, low, high, memory = measure(function, device, max(3, runs // 4) if "100" in part else runs)
                    share = 100 * work[part] * batch / middle / peak if peak and work[part] else None
                    report.row(name, batch, n, how, part, f"{middle:.4g} ({low:.4g}–{high:.4g})", 1e3 * batch / middle,
                               work[part], share, memory)
                    if part == "step":
                        images_per_s[name, batch, n, how], memories[name, batch, n, how] = 1e3 * batch / middle, memory
        except (RuntimeError, torch.OutOfMemoryError) as error:
            report.row(name, batch, n, how, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}".replace("|", "/"),
                       *[None] * 5)
        clip.zero_grad(set_to_none=True)
        functions = None
    report("", *(notes or ["No compiled step waited for the GPU."] if device.type == "cuda" else []))
    for (name, batch, n, how), theirs in images_per_s.items():
        best = max(((rate, way) for (*key, way), rate in images_per_s.items()
                    if key == [name, batch, n] and way != "authors"), default=None)
        if how == "authors" and best:
            ours, other = (memories[name, batch, n, way] for way in (best[1], how))
            report("", f"{name}, batch {batch}, PGD-{n}: ours ({best[1]}) makes {best[0] / theirs:.1f} times the images a "
                   "second of the authors' recipe" + (f", in {ours / other:.2f} of its memory." if other else "."))


def data_table(report, workers):
    """400 drawn JPEGs of ImageNet's usual size, as a folder and as a cache, through the loader that training has."""
    rng, count = np.random.default_rng(0), 400
    with tempfile.TemporaryDirectory() as folder:
        for k in range(count):
            path = Path(folder, "images", "ab"[k % 2], f"{k}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
            grain = rng.normal(0, 6, (375, 500, 3))
            Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        jpeg = np.mean([path.stat().st_size for path in Path(folder).glob("images/*/*")])
        with contextlib.redirect_stdout(None):
            make_cache(f"folder:{folder}/images", f"{folder}/cache.npy", workers=workers)
        report.table(f"Data: images/s through the loader, {workers} processes, the files in memory", [
            "from", "bytes an image", "images/s", "images/s a process"])
        for name, size in ((f"folder:{folder}/images", jpeg), (f"cache:{folder}/cache.npy", 3 * 224 * 224)):
            task, rates = load_task(name, "val"), []
            for _ in range(3):
                start = time.perf_counter()
                for _ in batches(task, list(range(count)) * 4, 128, workers):
                    pass
                rates.append(4 * count / (time.perf_counter() - start))
            report.row(name.split(":")[0], size, sorted(rates)[1], sorted(rates)[1] / workers)


def soak_table(report, steps):
    """Means over each quarter of a run of so many steps, as PyTorch is and compiled."""
    report("", f"PyTorch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPU cores. The toy on "
           "800 PNG files, batch 8, two workers that decode, a checkpoint every 100 steps. MiB: of the main process all "
           "that it holds, of the workers together what they do not share with it.")
    for compiled in (False, True) if kernels.COMPILER else (False,):
        means, recompiled = soak(steps, compiled)
        report.table(f"{steps:,} steps, {'compiled' if compiled else 'eager'}: {recompiled} recompilations",
                     ["steps", *next(iter(means.values()))])
        for share, row in means.items():
            report.row(f"{(share - .25) * steps:,.0f}–{share * steps:,.0f}", *row.values())


def numbers(text):
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text}")
    return values


def main():
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every table; on a GPU the tests marked cuda as well")
    parser.add_argument("--models", default="ViT-B-32-quickgelu,ViT-B-16,ViT-L-14", help="a comma list of open_clip names "
                        "(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=numbers, default=[], metavar="LIST", help="time training steps of these "
                        "batches, a comma list (default: none, but some with --all)")
    parser.add_argument("--steps", type=numbers, default=[2, 10], metavar="LIST", help="PGD steps, a comma list "
                        "(default: 2,10)")
    parser.add_argument("--classes", type=number(int, 2), default=1000, help="class prompts (default: %(default)s)")
    parser.add_argument("--compile", choices=("eager", "compiled", "both"), default="both", help="(default: %(default)s)")
    parser.add_argument("--baseline", choices=("authors",), help="also time the authors' recipe, re-created")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--runs", type=number(int, 1), help="timed runs of each row (default: 20; on a CPU 3)")
    parser.add_argument("--minutes", type=number(float, 0), default=5.5, help="start no further row of the steps after so "
                        "many (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="(default: results/bench-<device>.md with --all, else none)")
    parser.add_argument("--soak", nargs="?", type=number(int, 40), const=2000, metavar="N", help="only this: memory, open "
                        "files and compiled code over N toy steps on the CPU (default: no; N: 2000)")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.soak:
        path = Path(args.out) if args.out else ROOT / "results" / "soak.md"
        return soak_table(Report(path, f"# A long run: `python {' '.join(sys.argv)}`"), args.soak)
    try:
        models = [name for name in args.models.split(",") if image_size(name, "none")]
        device = torch.device(args.device)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])
    if args.baseline and not args.batch_sizes:
        parser.error("--baseline needs --batch-sizes")
    gpu, steps, batches = device.type == "cuda", args.steps, args.batch_sizes
    hardware = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    peak = next((tflops for name, tflops in PEAK.items() if re.search(rf"\b{name}\b", hardware)), None)
    runs = args.runs or (20 if gpu else 3)
    path = Path(args.out) if args.out else ROOT / "results" / f"bench-{hardware.split(',')[0].replace(' ', '-')}.md"
    versions = f"PyTorch {torch.__version__}, Triton {kernels.triton.__version__ if kernels.triton else 'none'}, Python " \
               f"{platform.python_version()}"
    report = Report(path if args.all or args.out else None, f"# {hardware}: `python {' '.join(sys.argv)}`")
    report("", f"{versions}. {runs} runs a row. " + (f"Peak: {peak} TFLOP/s dense bf16, by the data sheet. " if peak else "")
           + "Pixels, patch embedding and loss in fp32 (TF32 products), blocks in bf16."  if gpu else f"{versions}.")
    torch.set_float32_matmul_precision("high")

    counts(report, models, steps, args.classes)
    if gpu:
        shapes = [(256, 1000, 512), (1024, 21_841, 512), (1024, 1_000_000, 512)], [(256, 224), (256, 336)]
    else:
        shapes = [(64, 1000, 512), (256, 1000, 512)], [(16, 224)]
    kernel_table(report, device, *shapes, runs)
    ways = {"eager": ["eager"], "compiled": ["compiled"], "both": ["eager", "compiled"]}[args.compile]
    if args.all and not batches:
        first, *others = models
        rows = [(first, 256, 2, "compiled", True), (first, 256, 2, "authors", False), (first, 256, 2, "eager", False),
                (first, 256, 10, "compiled", False), (first, 64, 2, "eager", False), (first, 64, 2, "compiled", False),
                (first, 64, 2, "CUDA graphs", False), (first, 1024, 2, "eager", False), (first, 1024, 2, "compiled", False),
                *((name, 256, 2, how, False) for name in others for how in ("eager", "compiled"))]
        if not gpu:                                 # a CPU is here to see that it all runs, and for the ratios
            rows = [(first, 4, 2, "eager", True), (first, 4, 2, "compiled", False)]
    else:
        rows = [(name, batch, n, how, batch == batches[0] and n == steps[0] and how == ways[-1])
                for name in models for batch in batches for n in steps
                for how in [*ways, *(["authors"] if args.baseline else [])]]
    if args.all:
        data_table(report, min(8, os.cpu_count()))
    if rows:
        steps_table(report, device, rows, args.classes, peak, runs, started + 60 * args.minutes)
    if args.all and gpu:                            # last, and not for longer than there is
        try:
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-o", "addopts="], cwd=ROOT,
                                  capture_output=True, text=True, timeout=max(60, started + 465 - time.perf_counter()))
            report("", f"Tests on this GPU (`pytest -m cuda`): {done.stdout.strip().splitlines()[-1]}")
            print(done.stdout[-5000:] if done.returncode else "", flush=True)
        except subprocess.TimeoutExpired as late:
            report("", "Tests on this GPU (`pytest -m cuda`): not done in time; run them by themselves.")
            print((late.stdout or b"").decode()[-5000:], flush=True)
    report("", f"{time.perf_counter() - started:.0f} seconds in all.")


if __name__ == "__main__":
    main()
