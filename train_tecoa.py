"""Stage 1: make CLIP robust, adversarially training its image encoder against frozen text embeddings (TeCoA, ICLR 2023).

    python train_tecoa.py                        # the toy world, minutes on a laptop
    python train_tecoa.py --loss ce              # standard adversarial training, which TeCoA is compared with
    torchrun --nproc_per_node=8 train_tecoa.py --model ViT-B-32-quickgelu --pretrained openai \\
        --dataset imagenet --data-root DIR       # the paper's recipe

Writes out/<run>/: ckpt.pt, log.jsonl, results.json (after), results_before.json and examples.png.
"""
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attacks import image_keys, pgd
from checkpoints import save_checkpoint
from cli import (DTYPES, RANK, WORLD, Parser, add_options, environment, first_then_others, number, start_processes,
                 writable_folder, write_json)
from data import batches, load_task, on_device, task_names
from eval_zeroshot import evaluate_tasks
from kernels.contrastive_loss import contrastive_log_odds, contrastive_loss, log_odds
from model import ImageEncoder, image_size, load_clip
from prompts import encode_head
from report import draw_examples, examples, markdown_table

# ---------------------------------------------------------------------------------------------- options
parser = Parser(prog="train_tecoa.py", description=__doc__)
add_options(parser, steps=(2, 2), batch_size=(256, 128), dtypes=("fp32", "bf16"), attack="in training")
group = parser.add_argument_group("training")
group.add_argument("--dataset", help="to adapt on: toy, another toy task, imagenet, folder:PATH or cache:FILE (default: "
                   "toy for the toy model, else imagenet)")
group.add_argument("--loss", choices=("tecoa", "ce"), default="tecoa", help="tecoa: against the class prompts; ce: a linear "
                   "readout from scratch, thrown away afterwards (default: %(default)s)")
group.add_argument("--adapt", choices=("full",), default="full", help="what trains: every parameter of the image encoder")
group.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N", help="split each step's batch into N parts, "
                   "one after the other, to save memory (default: %(default)s)")
parser.option(group, "--epochs", 10, 3, "passes over the data set", type=number(int, 1))
group.add_argument("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps of the same schedule")
parser.option(group, "--lr", 1e-5, 7e-3, "peak learning rate of SGD", type=number(float, 0))
parser.option(group, "--warmup", 1000, 25, "steps of linear warm-up, before the cosine to 0", type=number(int, 0))
group.add_argument("--eval-steps", type=number(int, 1), default=40, help="PGD steps, of ε/4, for the two tables "
                   "(default: %(default)s)")
args = parser.parse_args()
args.model, args.norm = args.model or "toy", args.norm or "linf"
if args.norm == "l2" and args.eps is None:
    parser.error("--norm l2 needs --eps, in 1/255")
toy = args.model == "toy"
usual = {word: values[toy] for word, values in parser.by_model.items()} | {
    "dataset": "toy" if toy else "imagenet", "norm": "linf", "step_size": None, "limit": None, "max_steps": None,
    "accumulate": 1}
args.dataset = args.dataset or usual["dataset"]
args.pretrained = args.pretrained or (f"seed{args.seed}" if toy else None)
parser.fill(args)
unusual = [f"{word.replace('_', '')}{vars(args)[word]}" for word in usual if vars(args)[word] != usual[word]]
args.step_size = args.step_size or (1 if not toy and args.norm == "linf" else 1.25 * args.eps / args.steps)

# ---------------------------------------------------------------------------------------------- data and model
device = start_processes(parser, args)
args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
name = "-".join([args.model.removeprefix("hf-hub:"), args.loss, args.adapt, *unusual, f"seed{args.seed}"])
out = Path(args.out or "out/" + name.replace("/", "-").replace(":", "-"))
args.out = str(out)
try:
    if args.batch_size % (WORLD * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared equally by {WORLD} processes"
                         f"{f' in {args.accumulate} parts' if args.accumulate > 1 else ''}")
    options = {"size": image_size(args.model, args.pretrained), "data_root": args.data_root, "limit": args.limit}
    train = load_task(args.dataset, "train", **options)
    tasks = [load_task(name, "val", **options) for name in
             task_names(args.tasks, args.dataset, args.data_root)]
    held_out = [load_task(args.dataset, "val", **options)] if tasks and train.name not in [t.name for t in tasks] else []
    if len(train.images) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train.images)} images of {args.dataset}")
    writable_folder(out)
    clip, tokenizer = first_then_others(lambda: load_clip(args.model, args.pretrained, device, args.seed))
except (ValueError, OSError) as error:
    parser.error(str(error))

encoder = ImageEncoder(clip, DTYPES[args.dtype])                           # F_θ: x [B,3,H,W] → z [B,D]
scale = clip.logit_scale.exp().item()                                      # 1/τ, never trained
head = encode_head(clip, tokenizer, train.class_names, train.template)    # [K, D], encoded once
heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in [*tasks, *held_out]}


# ---------------------------------------------------------------------------------------------- tables before and after
def zero_shot_results(label):
    """Clean and robust accuracy on the zero-shot tasks and on held-out images of the task adapted on; and pictures."""
    precision, encoder.dtype = encoder.dtype, torch.float32                # what is reported comes from an fp32 forward
    attack = {"names": ["pgd"], "eps": args.eps, "steps": args.eval_steps, "step_size": args.eps / 4,
              "norm": args.norm, "seed": args.seed}
    results, adapted = (evaluate_tasks(encoder, heads, scale, part, attack, label=label, batch_size=256,
                                       workers=args.workers, probe=False) for part in (tasks, held_out))
    if held_out:
        results["adapted"] = adapted["tasks"]
    pictures = examples(encoder, heads, scale, tasks, attack, chosen=before_pictures) if RANK == 0 else []
    encoder.dtype = precision
    return results, pictures


if RANK == 0:
    print(f"{args.model} {args.pretrained or ''} on {device}, {WORLD} process(es). Adapting on {train.name}: "
          f"{len(train.images):,} images, {len(train.class_names)} classes; {args.loss}, PGD-{args.steps}, {args.norm} "
          f"ε = {args.eps:g}/255.", flush=True)
    for name in ("ckpt.pt", "results.json", "results_before.json", "examples.png"):    # of an earlier run
        (out / name).unlink(missing_ok=True)
before_pictures = None
before, before_pictures = zero_shot_results("CLIP")
if RANK == 0:
    if tasks:
        print("\n" + markdown_table({"CLIP": before}, before.get("adapted", ())) + "\n")
    write_json(out / "results_before.json", {"config": vars(args) | environment(device), **before})

# ---------------------------------------------------------------------------------------------- loss
# Each loss says what the update minimises, `loss_fn`, and what its attack ascends, `attacked`: both [B], from net(x).
# The attack maximises the same loss, but follows its log-odds (kernels/contrastive_loss.py says why). `loss_fn` also
# gives the predicted classes [B], for the log.
if args.loss == "tecoa":                                                   # Mao et al. 2023
    net = encoder

    def loss_fn(z, y):
        return contrastive_loss(z, head, y, scale)

    def attacked(z, y):
        return contrastive_log_odds(z, head, y, scale)
elif args.loss == "ce":                                                    # standard adversarial training
    torch.manual_seed(args.seed)
    net = nn.Sequential(encoder, nn.Linear(head.shape[1], len(head)).to(device))

    def loss_fn(logits, y):
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1)

    attacked = log_odds

net.requires_grad_(True)
trained = {id(p) for p in net.parameters()}
optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=.9, fused=True)
ddp = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None) if WORLD > 1 else net


def attack_loss(x, y):                                                     # past DDP, which has nothing to share here
    return attacked(net(x), y)


def update_loss(x, y):
    return loss_fn(ddp(x), y)


if args.compile:
    attack_loss, update_loss = torch.compile(attack_loss), torch.compile(update_loss)

# ---------------------------------------------------------------------------------------------- training loop
per_epoch = len(train.images) // args.batch_size                           # the ragged last batch is left out
schedule_steps = args.epochs * per_epoch
total = min(schedule_steps, args.max_steps or schedule_steps)
log = open(out / "log.jsonl", "w") if RANK == 0 else None
bar = tqdm(total=total, desc=f"{args.loss} on {train.name}", unit="step", disable=RANK > 0)
torch.set_float32_matmul_precision("high")                                # TF32 is fine to train with, not to report with
step, since, seen, sums = 0, time.perf_counter(), 0, torch.zeros(2, device=device)   # since the last line of the log
for epoch in range(args.epochs):
    gen = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
    order = torch.randperm(len(train.images), generator=gen)[:per_epoch * args.batch_size]
    mine = order.view(per_epoch, args.batch_size)[:, RANK::WORLD].flatten().tolist()
    loader = batches(train, mine, args.batch_size // (WORLD * args.accumulate), args.workers)
    for part, (x, y, index) in enumerate(on_device(loader, device), 1):
        if x.shape[-2:] == encoder.visual.image_size:                      # uint8 → [B,h·w,3·p·p], for all of the step
            x = encoder.patchify(x)
        warm = step < args.warmup                                          # linear warm-up, then cosine to 0
        lr = args.lr * ((step + 1) / args.warmup if warm else
                        (1 + math.cos(math.pi * (step - args.warmup) / (schedule_steps - args.warmup))) / 2)
        optimizer.param_groups[0]["lr"] = lr

        # 1. attack: x_adv = argmax over ‖δ‖ ≤ ε of the loss, weights frozen, gradient to the pixels alone
        net.requires_grad_(False)
        x_adv = pgd(attack_loss, x, y, eps=args.eps / 255, steps=args.steps, step_size=args.step_size / 255, norm=args.norm,
                    keys=image_keys(args.seed, epoch, index))
        net.requires_grad_(True)

        # 2. update: minimise the loss on the adversarial images alone
        last = part % args.accumulate == 0                                 # only then do processes share their gradients
        with nullcontext() if last or WORLD == 1 else ddp.no_sync():
            losses, predicted = update_loss(x_adv, y)
            (losses.mean() / args.accumulate).backward()
        sums += torch.stack([losses.detach().sum(), (predicted == y).sum()])
        if not last:
            continue
        if step == 0:
            wrong = [name for name, p in [*net.named_parameters(), *clip.named_parameters()]
                     if (p.grad is not None) != (id(p) in trained)]
            if wrong:
                raise RuntimeError(f"meant to train but without a gradient, or the other way round: {wrong}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        step, seen = step + 1, seen + args.batch_size
        bar.update()
        if step % 10 == 0 or step % per_epoch == 0 or step == total:
            if WORLD > 1:
                dist.all_reduce(sums)
            loss, accuracy = (sums / seen).tolist()                        # the one place where the GPU is waited for
            rate = seen / (time.perf_counter() - since)
            since, seen = time.perf_counter(), 0
            sums.zero_()
            bar.set_postfix(loss=f"{loss:.3f}", robust=f"{100 * accuracy:.1f}%", images_per_s=f"{rate:.0f}")
            if RANK == 0:
                print(json.dumps({"step": step, "epoch": epoch, "loss": loss, "robust": 100 * accuracy, "lr": lr,
                                  "images_per_s": round(rate, 1)}), file=log, flush=True)
            if not math.isfinite(loss):
                sys.exit(f"{parser.prog}: the loss is {loss} at step {step}; try a smaller --lr")
        if step == total:
            break
    if RANK == 0:
        save_checkpoint(out / "ckpt.pt", clip, vars(args), step=step)
    if step == total:
        break
bar.close()

# ---------------------------------------------------------------------------------------------- after
net.requires_grad_(False)
torch.set_float32_matmul_precision("highest")
after, after_pictures = zero_shot_results(args.loss)
if RANK == 0:
    write_json(out / "results.json", {"config": vars(args) | environment(device), **after})
    if tasks:
        print(f"\nPGD-{args.eval_steps}, {args.norm} ε = {args.eps:g}/255\n")
        print(markdown_table({"CLIP": before, args.loss: after}, after.get("adapted", ())))
        draw_examples(out / "examples.png", {"CLIP": before_pictures, args.loss: after_pictures}, args.eps)
    print(f"\nwrote {out}/: ckpt.pt, log.jsonl, results.json" + (", results_before.json, examples.png" if tasks else ""))
if WORLD > 1:
    dist.destroy_process_group()
