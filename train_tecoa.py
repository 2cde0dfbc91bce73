"""Stage 1: make CLIP robust, adversarially training its image encoder against frozen text embeddings (TeCoA, ICLR 2023).

    python train_tecoa.py                        # the toy world, minutes on a laptop
    python train_tecoa.py --loss ce              # standard adversarial training, which TeCoA is compared with
    python train_tecoa.py --adapt image-prompt,token-prompt        # train visual prompts, leave CLIP as it is
    torchrun --nproc_per_node=8 train_tecoa.py --model ViT-B-32-quickgelu --pretrained openai \\
        --dataset imagenet --data-root DIR       # the paper's recipe
    python train_tecoa.py --resume out/RUN       # go on with a run that was killed, to the bits it would have ended with

Writes out/<run>/: ckpt.pt and ckpt-previous.pt, log.jsonl, results.json (after), results_before.json and examples.png.
Ends with status 0; 2 if it cannot start; 143 or 130 if SIGTERM or SIGINT stopped it, saved; 1 for what else stopped it.
"""
import copy
import math
import signal
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
from cli import (DTYPES, RANK, WORLD, Parser, add_options, cadence, end_processes, environment, first_then_others, gathered,
                 number, settle_training, start_processes, writable_folder, write_json)
from data import batches, load_task, on_device, task_names
from eval_zeroshot import evaluate_tasks, pseudo_labels
from kernels.contrastive_loss import contrastive_log_odds, contrastive_loss, cosine_logits, log_odds
from kernels.pgd_step import to_float
from model import (ImageEncoder, adapt, adaptation, adaptation_sizes, check_adaptation, check_gradients, image_size,
                   load_clip, parts_of)
from prompts import encode_head
from report import at_chance, draw_examples, examples, markdown_table
from resume import (catch_signals, claim_folder, known_results, log_nonfinite, parse_resumable, restore, save_run,
                    wishes)
from sampling import few_shots, fingerprint, random_view, training_order

# ---------------------------------------------------------------------------------------------- options
parser = Parser(prog="train_tecoa.py", description=__doc__)
add_options(parser, steps=(2, 2), batch_size=(256, 128), dtypes=("fp32", "bf16"), attack="in training")
group = parser.add_argument_group("training")
group.add_argument("--dataset", help="to adapt on: toy, another toy task, imagenet, folder:PATH or cache:FILE (default: "
                   "toy for the toy model, else imagenet)")
group.add_argument("--loss", choices=("tecoa", "ce", "coadv", "imgcoadv", "fare", "pmg"), default="tecoa",
                   help="tecoa: against the class prompts; ce: a linear readout from scratch, thrown away afterwards; "
                   "coadv: tecoa with one-hot vectors for the texts; imgcoadv: two views of an image against the others; "
                   "fare: features stay those of the original; pmg: tecoa that stays near the original (default: tecoa)")
group.add_argument("--labels", choices=("true", "pseudo"), default="true", help="pseudo: what the original CLIP takes the "
                   "clean images for (default: %(default)s)")
group.add_argument("--shots", type=number(int, 1), metavar="K", help="adapt on K images of each class (default: on all)")
group.add_argument("--adapt", type=adaptation, default="full", help="what trains. full: the image encoder; partial: its "
                   "last blocks, ln_post and proj; linear: proj (ce, coadv: the discarded readout alone); image-prompt: a "
                   "border of pixels; token-prompt: tokens beside the patches; or image-prompt,token-prompt (default: "
                   "%(default)s)")
group.add_argument("--last-blocks", type=number(int, 1), metavar="N", help="of --adapt partial (default: 2)")
group.add_argument("--border", type=number(int, 1), metavar="P", help="width of the image prompt in the model's pixels "
                   "(default: 30 of 224, in proportion; toy: 4)")
group.add_argument("--tokens", type=number(int, 1, most=4097), metavar="L", help="of the token prompt (default: 5)")
group.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N", help="split each step's batch into N parts, "
                   "one after the other, to save memory (default: %(default)s)")
parser.option(group, "--epochs", 10, 2, "passes over the data set", type=number(int, 1))
group.add_argument("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps of the same schedule")
parser.option(group, "--lr", 1e-5, 7e-3, "peak learning rate of SGD; prompts: 40, toy: 10; fare: 1e-5, toy: 2e-3",
              type=number(float, 0))
parser.option(group, "--warmup", 1000, 25, "steps of linear warm-up, before the cosine to 0", type=number(int, 0))
group.add_argument("--eval-steps", type=number(int, 1), default=40, help="PGD steps, of ε/4, for the two tables "
                   "(default: %(default)s)")
group.add_argument("--save-every", type=cadence, default="5m", metavar="N|Nm", help="write ckpt.pt every N steps, or "
                   "every N minutes; and at the end (default: %(default)s)")
group.add_argument("--max-nonfinite", type=number(int, 1), default=1, metavar="N", help="stop at the N-th step of which the "
                   "loss or gradient is not finite; such steps change nothing (default: %(default)s)")
group.add_argument("--resume", nargs="?", const="", metavar="RUN", help="go on with the run in this folder, or from "
                   "its checkpoint; alone: with the run of this command line, if there is one (default: a new run)")
args, checkpoint, again = parse_resumable(parser)
methods, finetuning_lr, name = settle_training(parser, args)

# ---------------------------------------------------------------------------------------------- data and model
device = start_processes(parser, args)
args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
out = Path(args.out or f"out/{name}")
args.out = str(out)
try:
    if args.batch_size % (WORLD * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared equally by {WORLD} processes"
                         f"{f' in {args.accumulate} parts' if args.accumulate > 1 else ''}")
    if args.loss == "imgcoadv" and args.batch_size == WORLD * args.accumulate:
        raise ValueError("--loss imgcoadv contrasts the images of a batch: one alone has no others")
    size = image_size(args.model, args.pretrained)
    sizes = adaptation_sizes(methods, size, args.last_blocks, args.border, args.tokens)
    vars(args).update(sizes)
    options = {"size": size, "data_root": args.data_root, "limit": args.limit}
    train = load_task(args.dataset, "train", **options)
    train = few_shots(train, args.shots, args.seed, args.workers) if args.shots else train
    tasks = [load_task(name, "val", **options) for name in
             task_names(args.tasks, args.dataset, args.data_root)]
    held_out = [load_task(args.dataset, "val", **options)] if tasks and train.name not in [t.name for t in tasks] else []
    if len(train.images) < args.batch_size:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train.images)} images of {args.dataset}")
    writable_folder(out)
    clip, tokenizer = first_then_others(lambda: load_clip(args.model, args.pretrained, device, args.seed))
    check_adaptation(clip, methods, args.last_blocks, args.model, has_readout=args.loss in ("ce", "coadv"))
    made_of, per_epoch = fingerprint(train), len(train.images) // args.batch_size      # the ragged last batch is left out
    schedule_steps = args.epochs * per_epoch
    total = min(schedule_steps, args.max_steps or schedule_steps)
    checkpoint, log = claim_folder(out, vars(args), checkpoint, again, made_of, total, clip)
except (ValueError, OSError) as error:
    parser.error(str(error))
first, state = (checkpoint["step"], checkpoint["training"]) if checkpoint else (0, {})
step = first

encoder = ImageEncoder(clip, DTYPES[args.dtype])                           # F_θ: x [B,3,H,W] → z [B,D]
scale = clip.logit_scale.exp().item()                                      # 1/τ, never trained
head = encode_head(clip, tokenizer, train.class_names, train.template)    # [K, D], encoded once
heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in [*tasks, *held_out]}


# ---------------------------------------------------------------------------------------------- tables before and after
def zero_shot_results(label, results=None):
    """Clean and robust accuracy on the zero-shot tasks and on held-out images of the task adapted on, unless they are known;
    and pictures."""
    precision, encoder.dtype = encoder.dtype, torch.float32                # what is reported comes from an fp32 forward
    attack = {"names": ["pgd"], "eps": args.eps, "steps": args.eval_steps, "step_size": args.eps / 4,
              "norm": args.norm, "seed": args.seed}
    if results is None:
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
before_pictures = None
known = known_results(out / "results_before.json", [*tasks, *held_out]) if checkpoint else None
before, before_pictures = zero_shot_results("CLIP", known)
if RANK == 0:
    if tasks:
        print("\n" + markdown_table({"CLIP": before}, before.get("adapted", ())) + "\n")
    write_json(out / "results_before.json", {"config": vars(args) | environment(device), **before})

# ---------------------------------------------------------------------------------------------- loss
original = copy.deepcopy(encoder) if args.loss in ("fare", "pmg") else None                  # frozen, as encoder still is
pseudo = state["pseudo"].to(device) if "pseudo" in state else (
    pseudo_labels(encoder, head, scale, train, args.workers) if args.labels == "pseudo" else None)
# Each loss says what the update minimises, `loss_fn`, and what its attack ascends, `attacked`: both [B], from z = net(x) and
# y, which is `targets(x, y, keys)`: the labels, unless a loss replaces them, once per batch and without a gradient.
# The attack maximises the same loss, but follows its log-odds (kernels/contrastive_loss.py says why). `loss_fn` also
# gives the predicted classes [B], for the log. τ is CLIP's own throughout.
net = encoder
torch.manual_seed(args.seed)                                               # of the readouts


def targets(x, y, keys):
    return y


if args.loss == "tecoa":
    def loss_fn(z, y):
        """−log softmax_k(cos(z, w_k)/τ)_y over the texts w_k of all classes: TeCoA (Mao et al. 2023)."""
        return contrastive_loss(z, head, y, scale)

    def attacked(z, y):
        return contrastive_log_odds(z, head, y, scale)
elif args.loss == "ce":
    net = nn.Sequential(encoder, nn.Linear(head.shape[1], len(head)).to(device))

    def loss_fn(logits, y):
        """−log softmax(Az + b)_y: standard adversarial training (Madry et al. 2018), what Mao et al. 2023 compare with.

        Open: how z is read when there are no texts. Ours: a linear readout A, b from scratch, discarded afterwards.
        """
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1)

    attacked = log_odds
elif args.loss == "coadv":
    net = nn.Sequential(encoder, nn.Linear(head.shape[1], len(head), bias=False).to(device))

    def loss_fn(projected, y):
        """−log softmax_k(cos(Pz, e_k)/τ)_y: tecoa with the one-hot e_k in place of the text w_k (Mao et al. 2023).

        Open: how z [D] meets e_k [K]. Ours: a linear P from scratch, without bias, trained beside the encoder and discarded
        afterwards. cos(Pz, e_k) is the k-th number of Pz/‖Pz‖.
        """
        logits = scale * F.normalize(projected.float(), dim=1)
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1)

    def attacked(projected, y):
        return log_odds(scale * F.normalize(projected.float(), dim=1), y)
elif args.loss == "imgcoadv":
    def targets(x, y, keys):
        return F.normalize(encoder(random_view(x, keys)), dim=1)

    def attacked(z, views):
        return contrastive_log_odds(z, views, torch.arange(len(z), device=z.device), scale)

    def loss_fn(z, views):
        """−log softmax_j(cos(z_i, v_j)/τ)_i, v_j the features of a second view of image j: image to image (Mao et al. 2023).

        Open, and ours: that view is a crop and flip of the clean image, the first is the image itself, and is attacked; the
        v stand where tecoa has its texts, fixed and without gradient, in attack and update alike, so that given v the attack
        of an image depends on its own pixels alone. Negatives: the images of this process in this part of the batch.
        """
        loss, _ = contrastive_loss(z, views, torch.arange(len(z), device=z.device), scale)
        return loss, cosine_logits(z, head, scale).argmax(1)
elif args.loss == "fare":
    def targets(x, y, keys):
        return original(to_float(x))

    def attacked(z, z_original):
        return (z - z_original).square().sum(1)

    def loss_fn(z, z_original):
        """‖z − F_original(x)‖², features not normalised, no labels: FARE (Schlarmann et al. 2024).

        Nothing saturates, so the attack ascends it as it is; but in the first step, at x itself, the distance and its
        gradient are exactly 0: the random start gets the attack going.
        """
        return attacked(z, z_original), cosine_logits(z, head, scale).argmax(1)
elif args.loss == "pmg":
    def loss_fn(z, y, z_clean, z_original):
        """tecoa + KL(p ‖ p_clean) + KL(p ‖ p_original): PMG-AFT (Wang et al. 2024).

        p on the adversarial image, p_clean the same model's on the clean one, p_original the original CLIP's on the
        adversarial one. Directions, weights 1 and 1, gradient to p and p_clean, and the attack, on tecoa's term alone, are
        as in the authors' code (hence log-odds, no saturation). Open: the temperature. Their code normalises the logit
        scale away, which leaves 1; here every term has τ.
        """
        loss, predicted = contrastive_loss(z, head, y, scale)
        p, *others = (cosine_logits(features, head, scale).log_softmax(1) for features in (z, z_clean, z_original))
        return loss + sum((p.exp() * (p - q)).sum(1) for q in others), predicted

    def attacked(z, y):
        return contrastive_log_odds(z, head, y, scale)

# ---------------------------------------------------------------------------------------------- what trains
readout = {} if net is encoder else {f"readout.{name}": p for name, p in net[1].named_parameters()}
trained = {} if readout and args.adapt == "linear" else adapt(encoder, methods, seed=args.seed, **sizes)
groups = [{"params": [*trained.values()], "peak": args.lr},                # no readout survives the rate of prompts
          {"params": [*readout.values()], "peak": finetuning_lr if "prompt" in args.adapt else args.lr}]
trained |= readout
for p in trained.values():
    p.requires_grad_(True)
optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=.9, fused=True)
for p in trained.values():                                                 # SGD's own start, were step 1 not left out
    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
window, skipped = state.get("window", []), state.get("skipped", 0)
if step:
    restore(checkpoint, clip, trained, optimizer)
checkpoint = state = None                                                  # as large as the model, or three times so
ddp = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None) if WORLD > 1 else net
if RANK == 0:
    print(f"--adapt {args.adapt} trains {sum(p.numel() for p in trained.values()):,} numbers: {parts_of(trained)}"
          + ", not the encoder" * (trained == readout), flush=True)


def attack_loss(x, y):                                                     # past DDP, which has nothing to share here
    return attacked(net(x), y)


def update_loss(x_adv, y, x):
    if args.loss != "pmg":
        return loss_fn(ddp(x_adv), y)
    z, z_clean = ddp(torch.cat([x_adv, to_float(x)])).chunk(2)             # one pass, as DDP wants it
    return loss_fn(z, y, z_clean, original(x_adv))


if args.compile:
    attack_loss, update_loss, targets = map(torch.compile, (attack_loss, update_loss, targets))

# ---------------------------------------------------------------------------------------------- training loop
bar = tqdm(total=total, initial=step, desc=f"{args.loss} on {train.name}", unit="step", disable=RANK > 0)


def warn(text):
    bar.write(f"warning: {text}", file=sys.stderr)


def say(text):
    """What ends the run, in a line, once."""
    bar.close()
    if RANK == 0:
        print(f"{parser.prog}: {text}", file=sys.stderr, flush=True)


def look_for_nonfinite():
    """Log the steps since the last call that were left out, and their images; the --max-nonfinite-th ends the run."""
    global skipped
    for done in log_nonfinite(log, fresh, per_epoch):
        skipped += 1
        said = f"step {done} is left out, its loss or gradient is not finite; its images are in {out}/log.jsonl"
        if skipped >= args.max_nonfinite:
            say(f"stopped: {said}; ckpt.pt is from before. Is --lr too large, or --warmup too short?")
            sys.exit(1)
        warn(said)
    fresh.clear()


def save():
    """Put on the disk all that the run goes on from; ends it if that cannot be done."""
    look_for_nonfinite()
    try:
        save_run(out, clip, vars(args), log, step, trained, optimizer, encoder.prompts(), data=made_of, skipped=skipped,
                 window=gathered(sums.tolist()), pseudo=pseudo)
    except OSError as error:
        say(f"stopped after step {step}: {error}; what was saved before is whole: make room, then --resume {out}")
        sys.exit(1)


restore_signals = catch_signals()
torch.set_float32_matmul_precision("high")                                # TF32 is fine to train with, not to report with
# sums since the last line of the log, and of a step: loss, right, images. A resumed run's are in `window`, by process
own = window[RANK] if len(window) == WORLD else [sum(c) for c in zip(*window)] if window and RANK == 0 else [0.] * 3
sums, step_sums = torch.tensor([own, [0.] * 3], device=device)
fresh, index_of_step, seen, warned, since = [], [], 0, False, time.perf_counter()
saved = since
order = training_order(len(train.images), args.batch_size, args.accumulate, args.seed, range(first, total))
loader = batches(train, order, None, args.workers, bad="replace")
for part, (x, y, index, errors) in enumerate(on_device(loader, device), 1):
    for image, error in errors:
        warn(f"image {image} is left out, the next one stands in: {error}")
    epoch = step // per_epoch
    keys, label = image_keys(args.seed, epoch, index), y
    if pseudo is not None:
        label = pseudo[index].where(pseudo[index] >= 0, y)                 # −1: could not be read then
    with torch.no_grad():
        y = targets(x, label, keys)
    if x.shape[-2:] == encoder.visual.image_size:                          # uint8 → [B,h·w,3·p·p], for all of the step
        x = encoder.patchify(x)
    warm = step < args.warmup                                              # linear warm-up, then cosine to 0
    schedule = ((step + 1) / args.warmup if warm else
                (1 + math.cos(math.pi * (step - args.warmup) / (schedule_steps - args.warmup))) / 2)
    for group in optimizer.param_groups:
        group["lr"] = schedule * group["peak"]

    # 1. attack: x_adv = argmax over ‖δ‖ ≤ ε of the loss, weights frozen, gradient to the pixels alone
    net.requires_grad_(False)
    x_adv = pgd(attack_loss, x, y, eps=args.eps / 255, steps=args.steps, step_size=args.step_size / 255, norm=args.norm,
                keys=keys)
    for p in trained.values():
        p.requires_grad_(True)

    # 2. update: minimise the loss on the adversarial images alone
    if WORLD > 1 and part == 1:                                            # DDP's first backward sets its order of sums: be
        update_loss(x_adv, y, x)[0].mean().backward()                      # done with that, so that resuming changes nothing
        net.zero_grad()
    last = part % args.accumulate == 0                                     # only then do processes share their gradients
    with nullcontext() if last or WORLD == 1 else ddp.no_sync():
        losses, predicted = update_loss(x_adv, y, x)
        (losses.mean() / args.accumulate).backward()
    step_sums += torch.stack([losses.detach().sum(), (predicted == label).sum(), losses.new_full((), len(x))])
    index_of_step.append(index)
    if not last:
        continue
    if step == first:
        check_gradients([*net.named_parameters(), *clip.named_parameters(), *trained.items()], [*trained.values()])
    norm = nn.utils.get_total_norm([p.grad for p in trained.values()])
    finite = torch.stack([norm, step_sums[0]]).isfinite().all().float()
    if WORLD > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    optimizer.found_inf = 1 - finite                                       # then step() does nothing, and nobody has to wait
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    step, seen = step + 1, seen + args.batch_size
    sums += step_sums.where(finite > 0, 0)
    fresh.append((step, finite, index_of_step))
    index_of_step, step_sums = [], torch.zeros_like(sums)
    bar.update()
    if step % 10 == 0 or step % per_epoch == 0 or step == total:
        look_for_nonfinite()
        if WORLD > 1:
            dist.all_reduce(sums)
        loss, accuracy, count = sums.tolist()
        if count:
            rate = seen / (time.perf_counter() - since)
            bar.set_postfix(loss=f"{loss / count:.3f}", robust=f"{100 * accuracy / count:.1f}%", images_per_s=f"{rate:.0f}")
            log.write({"step": step, "epoch": epoch, "loss": loss / count, "robust": 100 * accuracy / count,
                       "lr": schedule * args.lr, "images_per_s": round(rate, 1)})
            if not warned and at_chance(log.rows, args.warmup, args.batch_size, len(head)):
                warned = True
                warn(f"accuracy on attacked images at chance ({100 / len(head):.2g} %) for 100 steps: is --lr or --eps too "
                     "large?")
        since, seen = time.perf_counter(), 0
        sums.zero_()
    due, signalled = wishes(step, args.save_every, saved)
    if due or signalled or step == total:
        save()
        saved = time.perf_counter()
    if signalled:
        name, status = signal.Signals(signalled).name, 128 + signalled
        say(f"{name} after step {step} of {total}, saved; go on with --resume {out}")
        end_processes(status)
        sys.exit(status)
bar.close()
restore_signals()

# ---------------------------------------------------------------------------------------------- after
net.requires_grad_(False)
torch.set_float32_matmul_precision("highest")
after, after_pictures = zero_shot_results(args.loss)
if RANK == 0:
    if before_pictures:
        draw_examples(out / "examples.png", {"CLIP": before_pictures, args.loss: after_pictures}, args.eps)
    facts = {"config": vars(args) | environment(device), "trained": sum(p.numel() for p in trained.values())}
    write_json(out / "results.json", facts | ({"skipped": skipped} if skipped else {}) | after)  # last: then the run is over
    if tasks:
        print(f"\nPGD-{args.eval_steps}, {args.norm} ε = {args.eps:g}/255\n")
        print(markdown_table({"CLIP": before, args.loss: after}, after.get("adapted", ())))
    print(f"\nwrote {out}/: " + ", ".join(path.name for path in sorted(out.iterdir()) if path.is_file()))
end_processes()
