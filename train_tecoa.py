"""Stage 1: adversarial training of CLIP's image encoder against frozen text embeddings (TeCoA, ICLR 2023).

    python train_tecoa.py                        # the toy world, minutes on a laptop
    python train_tecoa.py --loss ce              # standard adversarial training, which TeCoA is compared with
    python train_tecoa.py --adapt image-prompt,token-prompt      # train visual prompts, leave CLIP as it is
    torchrun --nproc_per_node=8 train_tecoa.py --model ViT-B-32-quickgelu --pretrained openai \\
        --dataset imagenet --data-root DIR       # the paper's recipe
    python train_tecoa.py --resume out/RUN       # go on with a run that was killed, to the same bits

Writes out/<run>/: ckpt.pt and ckpt-previous.pt, log.jsonl, results_before.json, results.json, and then
curves.png and examples.png. Ends with status 0; 2 if it cannot start; 143 or 130 if SIGTERM or SIGINT
stopped it, saved; 1 for other reasons.
"""
import math
from functools import partial

from harness import spin_less

if __name__ == "__main__":              # before PyTorch is imported
    spin_less()
import torch

from attacks import image_keys, pgd
from eval_zeroshot import attacked_examples, evaluate, evaluate_tasks
from harness.options import ByModel, Parser, adaptation, add_shared_options, cadence, number, passes
from harness.processes import DTYPES, WORLD, rank0_first
from harness.reports import ball
from harness.training import TrainingRun, load_data
from losses import LOSSES
from model import ImageEncoder, adapt, check_adaptation, freeze, image_size, load_clip, projection, unfreeze
from prompts import encode_head
from tasks.sampling import relabelled

# ------------------------------------------------------------------------------ options
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=.9, fused=True),           # the paper's
              "adamw": partial(torch.optim.AdamW, fused=True)}                    # FARE's


def weights_lr(args):
    return ByModel(*LOSSES[args.loss].lr)(args) if args.optimizer == "sgd" else ByModel(1e-5, 5e-4)(args)


def prompts_lr(args):
    return ByModel(40., 10.)(args) if args.optimizer == "sgd" else .1


parser = Parser(prog="train_tecoa.py", description=__doc__)
add_shared_options(parser, training=True)
option = partial(parser.option, parser.add_argument_group("training"))
option("--dataset", lambda args: "toy" if args.model == "toy" else "imagenet", help="to adapt on: toy, "
       "another toy task, a set by its name (docs/data.md), folder:PATH, wds:PATH or cache:FILE (default: "
       "toy for the toy model, or imagenet)")
option("--loss", next(iter(LOSSES)), choices=LOSSES, help="; ".join(
    f"{name}: {' '.join(loss.make.__doc__.split(chr(10) * 2)[0].split())}" for name, loss in LOSSES.items()))
option("--labels", "true", choices=("true", "pseudo"), help="pseudo: what the original CLIP takes images for")
option("--shots", type=number(int, 1), metavar="K", help="adapt on K images of each class (default: on all)")
option("--adapt", "full", type=adaptation, help="what trains. full: the image encoder; partial: its last "
       "blocks, ln_post and proj; linear: its projection, or the loss's linear head alone; image-prompt: a "
       "border of pixels; token-prompt: tokens beside the patches; or image-prompt,token-prompt")
option("--last-blocks", lambda args: 2 if "partial" in args.adapt else None, type=number(int, 1), metavar="N",
       help="of --adapt partial (default: 2)")
option("--border", lambda args: round(30 / 224 * image_size(args.model, args.pretrained))
       if "image-prompt" in args.adapt else None, type=number(int, 1), metavar="P",
       help="width of the image prompt in the model's pixels (default: 30 of 224, in proportion; toy: 4)")
option("--tokens", lambda args: 5 if "token-prompt" in args.adapt else None, type=number(int, 1, most=4097),
       metavar="L", help="of the token prompt (default: 5)")
option("--accumulate", 1, type=number(int, 1), metavar="N", resumable=True, help="split each step's batch "
       "into N micro-batches, one after the other, to save memory")
option("--epochs", ByModel(10, 2), type=passes, help="passes over the data set, whole or not")
option("--max-steps", type=number(int, 1), metavar="N", resumable=True, help="stop after N steps of the same "
       "schedule")
option("--optimizer", "sgd", choices=OPTIMIZERS, help="sgd has momentum 0.9")
option("--lr", lambda args: prompts_lr(args) if "prompt" in args.adapt else weights_lr(args),
       type=number(float, 0), help="peak learning rate (default: the loss's own in losses.py, mostly 1e-05, "
       "toy: 0.014; adamw: 1e-05, toy: 0.0005; prompts: 40, toy: 10, adamw: 0.1)")
option("--weight-decay", lambda args: 0. if args.optimizer == "sgd" else 1e-4, type=number(float, 0),
       help="of what trains (default: 0; adamw: 1e-4, FARE's)")
option("--warmup", type=number(int, 0), metavar="N", help="steps of linear warm-up, then cosine to 0 "
       "(default: 1000, the paper's; toy: 25; at most a tenth of the run)")
option("--init", metavar="FILE", path=True, help="train from the image encoder or visual prompts of this "
       "checkpoint, ours or a published one (docs/checkpoints.md); --pretrained stays the original CLIP "
       "(default: from that)")
option("--eval-steps", 40, type=number(int, 1), help="PGD steps, of ε/4, for the two tables")
option("--save-every", "5m", type=cadence, metavar="N|Nm", result=False, help="write ckpt.pt every N steps, "
       "or every N minutes; and at the end")
option("--max-nonfinite", 1, type=number(int, 1), metavar="N", result=False, help="stop at the N-th step of "
       "which the loss or gradient is not finite; such steps change nothing")
option("--resume", nargs="?", const="", metavar="RUN", result=False, help="go on with the run in this "
       "folder, or from its checkpoint; alone: with the run of this command line, if it has begun (default: "
       "a new run)")

run = TrainingRun(parser)
args, device = run.args, run.device                     # settled: nothing below changes them

# ------------------------------------------------------------------------------ data, model, loss
# a ValueError or OSError in here is one line and status 2
with run.refusing():
    for word, method in (("last_blocks", "partial"), ("border", "image-prompt"), ("tokens", "token-prompt")):
        if getattr(args, word) and method not in args.adapt.split(","):
            raise ValueError(f"--{word.replace('_', '-')} belongs to --adapt {method}, not to {args.adapt}")
    if args.labels == "pseudo" and not LOSSES[args.loss].labels:
        raise ValueError(f"--labels pseudo: --loss {args.loss} uses no labels")
    if args.batch_size % (WORLD * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared equally by {WORLD} process(es), "
                         f"in {args.accumulate} micro-batch(es) each")
    if LOSSES[args.loss].batch and args.batch_size == WORLD * args.accumulate:
        raise ValueError(f"--loss {args.loss} contrasts the images of a batch: one alone has no others")
    check_adaptation(args.adapt.split(","), args.model, last_blocks=args.last_blocks, border=args.border)
    train, tasks, held_out = load_data(args, run.adapted)
    # the ragged last batch is left out
    steps_per_epoch = len(train.images) // args.batch_size
    if not steps_per_epoch:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train.images)} images of "
                         f"{train.name}")
    schedule_steps = max(1, round(args.epochs * steps_per_epoch))
    warmup = min(ByModel(1000, 25)(args), schedule_steps // 10) if args.warmup is None else args.warmup

    clip, tokenizer = rank0_first(lambda: load_clip(args.model, args.pretrained, device, args.seed))
    encoder = ImageEncoder(clip, DTYPES[args.dtype])                        # F_θ: x [B,3,H,W] → z [B,D]
    logit_scale = clip.logit_scale.exp().item()                             # 1/τ, never trained
    head = encode_head(clip, tokenizer, train.class_names, train.template)  # [K, D], encoded once
    torch.manual_seed(args.seed)                                            # of a linear head
    loss = LOSSES[args.loss].make(encoder, head, logit_scale)
    linear_head = {f"linear_head.{name}": p for name, p in loss.linear_head.named_parameters()}
    if args.adapt == "linear" and not (linear_head or projection(clip.visual)):
        raise ValueError(f"--adapt linear: the image encoder of {args.model} ends without a projection")
    run.claim(clip, tokenizer, train, [*tasks, *held_out], schedule_steps, warmup,
              compares_images=LOSSES[args.loss].batch)

# ------------------------------------------------------------------------------ the table before
heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template)
         for task in [*tasks, *held_out]}
attack = {"names": ["pgd"], "eps": args.eps / 255, "steps": args.eval_steps, "norm": args.norm,
          "step_size": args.eps / min(4, args.eval_steps) / 255, "seed": args.seed}


def zero_shot_table(label):
    """Clean and robust accuracy, zero-shot; under "adapted" on held-out images of the task adapted on."""
    results, adapted = (evaluate_tasks(
        encoder, heads, logit_scale, some, attack, label=label, protocol=args.protocol, batch_size=256,
        workers=args.workers, probe=False) for some in (tasks, held_out))
    return results | ({"adapted": adapted["tasks"]} if held_out else {})


def pseudo_labels():
    """What CLIP takes the images to adapt on for: int64, by image number; −1 for those it cannot tell."""
    no_attack = {"names": [], "eps": 0., "norm": "linf"}
    records = evaluate(encoder, head, logit_scale, train, no_attack, batch_size=256 * WORLD,
                       workers=args.workers, probe=False)
    found = {record["image"]: record["clean"] for record in records if "error" not in record}
    right = sum(found.get(record["image"], -1) == record.get("label") for record in records)
    run.print(f"{100 * right / max(1, len(found)):.1f} % of the pseudo-labels are the true ones")
    return torch.tensor([found.get(image, -1) for image in range(1 + records[-1]["image"])])


run.print(f"{args.model} {args.pretrained or ''} on {device} in {args.dtype}, {WORLD} process(es). Adapting "
          f"on {train.name}: {len(train.images):,} images, {len(train.class_names)} classes; {args.loss}, "
          f"PGD-{args.steps}, {ball(args.norm, args.eps / 255, args.step_size / 255)}; {schedule_steps:,} "
          f"steps of training, {warmup:,} of warm-up.")
before = run.table_before([*heads], lambda: zero_shot_table("CLIP"))
examples = attacked_examples(encoder, heads, logit_scale, tasks, attack)
if args.labels == "pseudo":
    train = relabelled(train, run.once("pseudo_labels", pseudo_labels))

# ------------------------------------------------------------------------------ what trains
weights = {} if linear_head and args.adapt == "linear" else adapt(
    encoder, args.adapt.split(","), last_blocks=args.last_blocks, border=args.border, tokens=args.tokens,
    seed=args.seed)
trainable = weights | linear_head                       # {name: parameter}; all else is frozen
unfreeze(trainable)
# no linear head survives the learning rate of prompts
head_lr = weights_lr(args) if "prompt" in args.adapt else args.lr
groups = [{"params": [*weights.values()], "peak_lr": args.lr},
          {"params": [*linear_head.values()], "peak_lr": head_lr}]
optimizer = OPTIMIZERS[args.optimizer](groups, lr=args.lr, weight_decay=args.weight_decay)
run.begin(encoder, trainable, optimizer)
net = run.ddp(loss.net)
if args.compile:
    loss = loss._replace(inner=torch.compile(loss.inner), outer=torch.compile(loss.outer),
                         target=torch.compile(loss.target))


def lr_at(step):
    """The learning rate as a share of its peak: linear warm-up, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (schedule_steps - warmup))) / 2


# ------------------------------------------------------------------------------ training loop
torch.set_float32_matmul_precision("high")              # TF32 is fine to train with, not to report with
for step, batch in enumerate(run.batches(train), run.first_step):
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step) * group["peak_lr"]
    for micro, (x, y, index) in enumerate(batch.split(args.accumulate), 1):
        # x uint8 [B,3,H,W], y labels [B], index image numbers [B]; an image's random start is its own
        keys = image_keys(args.seed, step // steps_per_epoch, index)
        with torch.no_grad():
            # y itself, unless the loss compares with something else
            target = loss.target(x, y, keys)
        x = encoder.patchify(x)                         # [B,h·w,3·p·p], once for all attack steps

        # 1. inner maximisation: x_adv = argmax of the loss over ‖x_adv − x‖ ≤ ε; gradient to the pixels only
        freeze(loss.net)
        x_adv = pgd(partial(loss.inner, loss.net), x, target, eps=args.eps / 255, steps=args.steps,
                    step_size=args.step_size / 255, norm=args.norm, keys=keys)

        # 2. outer minimisation: the gradient of the loss at x_adv, now for the trainable parameters
        unfreeze(trainable)
        with run.sync_gradients(net, last=micro == args.accumulate):
            losses, predicted = loss.outer(net, x_adv, target, x)
            (losses.mean() / args.accumulate).backward()
        run.count(losses, predicted == y)

    run.skip_if_nonfinite()                             # then step() changes nothing
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.after_step(step + 1, lr_at(step) * args.lr, batch.index)      # log, save, stop if asked to

# ------------------------------------------------------------------------------ the table after
torch.set_float32_matmul_precision("highest")
freeze(loss.net)
after = zero_shot_table(args.loss)
run.finish(before, after, examples, lambda: attacked_examples(encoder, heads, logit_scale, tasks, attack,
                                                              chosen=examples))
