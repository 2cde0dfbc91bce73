"""Stage 2: clean and robust zero-shot accuracy of a checkpoint, or of a plain CLIP.

    python eval_zeroshot.py --ckpt out/toy-tecoa-full-seed0/ckpt.pt
    python eval_zeroshot.py --model ViT-B-32-quickgelu --pretrained openai --data-root DIR --attack autoattack
    torchrun --nproc_per_node=8 eval_zeroshot.py --ckpt out/RUN/ckpt.pt --data-root DIR --tasks cifar10,pets
    python eval_zeroshot.py --ckpt out/RUN/ckpt.pt --interpolate 0,0.25,0.5,0.75,1

An image counts as robust if it is classified rightly when clean and at every iterate of every attack
(--last-iterate: at the end of the only one). The attacker knows everything: the gradient goes through
projection, blocks, normalisation and resize to the pixels of the data set's own resolution. After a kill the
same command goes on where it was."""
import argparse
import math
from functools import partial

from harness import spin_less

if __name__ == "__main__":              # before PyTorch is imported
    spin_less()
import torch

from attacks import ATTACKS, ENSEMBLES, attack_list, defined, image_keys, pgd_last, runners_up, slope
from harness import processes
from harness.card import write_card
from harness.checkpoints import export_clip, load_visual, read_checkpoint
from harness.evaluation import EvaluationRun, choose_examples, load_tasks, phase, progress, settle, shared
from harness.options import ByModel, Parser, add_shared_options, by_protocol, number, shares
from harness.processes import DTYPES, RANK, rank0, rank0_first
from harness.reports import ball, described, mean, summary
from kernels.contrastive_loss import contrast, cosine_logits, log_odds
from kernels.pgd_step import to_float
from model import ImageEncoder, judging, load_clip, predict
from prompts import encode_head
from tasks.benchmarks import counts
from tasks.protocols import DEFAULT
from tasks.task import image_numbers


# ------------------------------------------------------------------------------ the protocol: which attacks
TARGETS = 9                                        # classes that targeted attacks try, as `standard` does
PROBED, PROBE = 50, {"names": ["square"], "queries": 100, "restarts": 1, "last_iterate": False}


def protocol(options):
    """What was run, in words. options: of `run_attacks`."""
    words = [f"{ATTACKS[name].title}-{options[ATTACKS[name].options[0]]}" for name in options["names"]]
    standard = {"steps": 100, "queries": 5000, "restarts": 1}.items() <= options.items()
    known = [f"AutoAttack standard (2020){' without FAB-T' * (word == 'autoattack-fast')}: "
             for word, names in ENSEMBLES.items() if standard and [*names] == options["names"]]
    return ("".join(known) + ", ".join(words)
            + f"; {ball(**options)}; {options['restarts']} random start(s); "
            f"robust = right at {'the last' if options['last_iterate'] else 'every'} iterate of every attack")


def run_attacks(encoder, head, logit_scale, x, y, index, *, names, eps, norm, restarts=1, seed=0,
                last_iterate=False, judge=None, **options):
    """Each attack in turn on the images that still stand.

    x: uint8, or float in [0,1] [B,3,H,W], rightly classified; index: the images' numbers, from which random
    starts follow. names: of attacks; eps: pixel fraction (linf) or L2 length; options: steps, step_size (as
    eps), queries; judge: `judging(encoder)`, which has the last word. Returns x_adv fp32 [B,3,H,W], the first
    that was misclassified, or else the last attack's best; predicted int64 [B], what it is taken for, −1:
    NaN; broken_by int64 [B], by which attack, −1: it stands; at int64 [B], at which of its iterates;
    forward_passes [B]; zero, uphill bool [B]: `slope`."""
    def objective(x, y, loss, net=encoder, sure=None):
        if loss is log_odds:                            # fused, on a GPU
            losses, best = contrast(net(x), head, y, logit_scale)
        else:
            logits = cosine_logits(net(x), head, logit_scale)
            losses, best = loss(logits, y), logits.argmax(1)
        label = y if y.ndim == 1 else y[:, 0]
        wrong = best != label
        if judge is not encoder:                        # in bf16: where fp32 is right the attack goes on
            some = (wrong if sure is None else wrong & sure).nonzero().squeeze(1)
            if len(some):
                wrong[some] = predict(judge, head, logit_scale, x[some]) != label[some]
        return losses, wrong

    judge, x = judge or judging(encoder), to_float(x)
    predicted, broken_by, at = y.clone(), torch.full_like(y, -1), torch.full_like(y, -1)
    x_adv, forward_passes, stands = x.clone(), torch.zeros_like(y), torch.arange(len(y), device=y.device)
    zero, uphill = torch.zeros_like(y).bool(), torch.ones_like(y).bool()
    for k, (name, attack) in enumerate((name, ATTACKS[name]) for name in names if len(stands)):
        ascended, targets = partial(objective, loss=attack.loss), y.new_zeros(len(y), 0)
        if attack.targeted:
            targets = y.new_zeros(len(y), min(TARGETS, len(head) - 1))
            with torch.no_grad():
                clean = cosine_logits(judge(x[stands]), head, logit_scale)
            targets[stands] = runners_up(clean, y[stands], targets.shape[1])
        if k == 0 and name != "square":
            labels = torch.cat([y[:, None], targets[:, :1]], 1).squeeze(1)
            zero, uphill = slope(ascended, x, labels, eps, norm, judged=partial(ascended, net=judge))
        search = partial(pgd_last if last_iterate else attack.search, ascended, eps=eps, norm=norm,
                         **{word: options[word] for word in attack.options})
        rows, last = max(1, targets.shape[1]), options[attack.options[0]] - (name == "square")
        for restart in range(restarts):
            todo = [(some, targets) for some in stands.split(-(-len(x) // rows))]   # a batch of rows
            for some, aims in todo:
                if not len(some := some[broken_by[some] < 0]):
                    continue
                towards = {"targets": aims[some]} if aims.shape[1] else {}
                keys = None if name == "fab-t" and not restart else image_keys(seed, restart, index[some])
                found, step = search(x[some], y[some], keys=keys, **towards)
                # what breaks an image has to break it in this batch too, or else the attacks go on
                seen = predict(judge, head, logit_scale, found)
                if aims.shape[1] > 1:
                    todo += [(some[(step >= 0) & (seen == y[some])], aim) for aim in aims.split(1, 1)]
                step = torch.where(seen == y[some], -1, step.clamp(min=0))
                x_adv[some], predicted[some], at[some] = found, seen, step
                broken_by[some] = torch.where(step < 0, -1, k)
                spent = 1 + attack.forwards * torch.where(step < 0, last, step)
                forward_passes[some] += spent * max(1, aims.shape[1])
            stands = (broken_by < 0).nonzero().squeeze(1)
    return x_adv, predicted, broken_by, at, forward_passes, zero, uphill


# ------------------------------------------------------------------------------ the protocol: what counts
def evaluate_batch(encoder, head, logit_scale, batch, options, bar=None):
    """(one record for each image, {name: tensor} of those attacked); see `evaluate`."""
    x, y, index, _ = batch
    phase(bar, "clean")
    clean = predict(options.get("judge") or judging(encoder), head, logit_scale, to_float(x))
    rows = zip(*(tensor.tolist() for tensor in (index, y, clean)))
    records = [dict(zip(("image", "label", "clean"), row)) for row in rows]
    right = clean == y
    if not right.any():                # what is wrong already cannot be robust, and is not attacked
        return records, {}
    x, y, index = to_float(x[right]), y[right], index[right]
    phase(bar, "attack")
    x_adv, *facts = run_attacks(encoder, head, logit_scale, x, y, index, **options)
    attacked = [record for record in records if record["clean"] == record["label"]]
    for record, *values in zip(attacked, *(tensor.tolist() for tensor in facts)):
        record |= dict(zip(("adversarial", "by", "at", "passes", "zero", "uphill"), values))
        record["by"] = options["names"][record["by"]] if record["by"] >= 0 else None
    return records, {"x": x, "x_adv": x_adv, "label": y, "adversarial": facts[0], "image": index}


def evaluate(encoder, head, logit_scale, task, options, *, batch_size, workers=0, bar=None, done=None,
             keep=None, probe=True):
    """One record for each image of a task, from all processes, which share them: a sorted list of dicts.

    encoder: x [B,3,H,W] → z [B,D]; head: [K,D]; options: of `run_attacks`. A record's keys: image (its
    number), label, clean (the class predicted, −1: NaN); if that is right also adversarial (likewise, of the
    attacked image), by (the attack that broke it, or None), at, passes, zero, uphill as in `run_attacks`; for
    some that gradient attacks left standing, if `probe`, probe (whether a short Square breaks them: counts
    for a warning alone); if `keep`, crc32 of its pixels. One that cannot be read has image and error alone.
    done: {number: record} of an earlier run. keep(task, records, tensors): called after each batch."""
    numbers, records = image_numbers(task), dict(done or {})
    share = partial(shared, task=task, batch_size=batch_size, workers=workers, device=head.device, keep=keep)

    def probed(batch):
        broken = run_attacks(encoder, head, logit_scale, *batch[:3], **options | PROBE)[2] >= 0
        return [{"image": i, "probe": value} for i, value in zip(batch.index.tolist(), broken.tolist())], {}

    found = share(lambda batch: evaluate_batch(encoder, head, logit_scale, batch, options, bar), bar=bar,
                  positions=[position for position, image in enumerate(numbers) if image not in records])
    records |= {record["image"]: record for record in found}
    if probe and options["names"] != ["square"]:        # does random search find what gradients do not?
        some = [(p, records[numbers[p]]) for p in range(0, len(numbers), math.ceil(len(numbers) / PROBED))]
        standing = [p for p, record in some if record.get("by", "") is None and "probe" not in record]
        phase(bar, "probe", more=len(standing))
        for record in share(probed, bar=bar, positions=standing):
            records[record["image"]] |= record
    return [records[image] for image in sorted(records)]


def evaluate_tasks(encoder, heads, logit_scale, tasks, options, *, label, protocol=DEFAULT, done=None,
                   after=None, **more):
    """`evaluate` on several tasks under one bar: {"tasks": {name: row}, "mean": {"clean", "robust"}}.

    options: of `run_attacks`; protocol: whose sets count in the mean, if some do; done: {task: {number:
    record}}; after(results, task, records): called after each task, with what there is. `more` goes to
    `evaluate`."""
    results, done = {"tasks": {}, "mean": {"clean": None, "robust": None}}, done or {}
    half = math.inf if options.get("last_iterate") else options["steps"] / 2
    judge = judging(encoder)
    with progress(encoder, tasks, done) as (bar, watched):
        options = options | {"judge": watched if judge is encoder else judge}
        for task in tasks:
            bar.set_description(f"{label}: {task.name}")
            names, head = defined(options["names"], len(heads[task.name])), heads[task.name]
            records = evaluate(watched, head, logit_scale, task, options | {"names": names}, bar=bar,
                               done=done.get(task.name), **more)
            results["tasks"][task.name] = summary(records, names, len(head), half) | described(task)
            counted = {name: row for name, row in results["tasks"].items() if counts(protocol, name)}
            results["mean"] = mean(counted or results["tasks"])
            if after is not None:
                after(results, task, records)
    return results


def attacked_examples(encoder, heads, logit_scale, tasks, options, *, chosen=None):
    """Eight attacked images, spread over the tasks, in process 0: see `choose_examples`."""
    def judge(task, batch, attack):
        names = defined(options["names"], len(task.class_names)) if attack else []
        return evaluate_batch(encoder, heads[task.name], logit_scale, batch, options | {"names": names})
    return choose_examples(judge, tasks, next(encoder.parameters()).device, chosen) if RANK == 0 else []


# ------------------------------------------------------------------------------ the command
def make_parser():
    parser = Parser(prog="eval_zeroshot.py", description=__doc__)
    add_shared_options(parser, training=False)
    option = partial(parser.option, parser.add_argument_group("evaluation"))
    option("--ckpt", metavar="FILE", path=True, help="a checkpoint, ours or a published one "
           "(docs/checkpoints.md); default: the plain CLIP")
    option("--attack", by_protocol("attack"), help=f"a comma list of {', '.join(ATTACKS)}, "
           f"autoattack (= {','.join(ENSEMBLES['autoattack'])}), autoattack-fast (without fab-t), each on "
           "the images that still stand (default: the protocol's, pgd)")
    option("--queries", ByModel(5000, 500), type=number(int, 1), help="of Square")
    option("--restarts", 1, type=number(int, 1), help="random starts of each attack")
    option("--last-iterate", False, action="store_true", help="judge PGD or CW by its last iterate alone, as "
           "older papers do (default: an image falls with any iterate)")
    option("--templates", by_protocol("templates"), choices=("paper", "openai"), help="paper: its one "
           "template a data set; openai: the average over CLIP's own several, with CLIP's own class names "
           "(default: the protocol's, paper)")
    option("--interpolate", type=shares, metavar="α,…", help="evaluate (1 − α)·CLIP + α·checkpoint, in their "
           "weights, for each α of a comma list of numbers from 0 to 1 (default: α = 1)")
    option("--examples", False, action="store_true", result=False, help="draw attacked images (default: no)")
    option("--save-adv", metavar="DIR", result=False, help="keep the attacked images in DIR/<task>/*.npz: x "
           "(uint8), x_adv (fp32), image, label, adversarial (default: no)")
    option("--export", metavar="DIR", result=False, help="write weights, configuration and a model card for "
           "open_clip, and for --model local-dir:DIR; --tasks none for that alone (default: no)")
    return parser


def evaluate_command(parser, args, device, alpha):
    """Evaluate share alpha of the checkpoint's weights, the rest CLIP's: the mean; None without tasks."""
    with parser.refusing():
        checkpoint = read_checkpoint(args.ckpt, args.model) if args.ckpt else {"config": {}}
        args, known = settle(parser, args, checkpoint, alpha)
        names = attack_list(args.attack, args.last_iterate)
        tasks, missing = load_tasks(args, checkpoint.get("adapted", ()))
        if not tasks and not args.export:
            raise ValueError(f"--tasks {args.tasks}: nothing to evaluate under {args.data_root}")
        options = {"names": names, "eps": args.eps / 255, "norm": args.norm, "restarts": args.restarts,
                   "seed": args.seed, "last_iterate": args.last_iterate, "steps": args.steps,
                   "step_size": args.step_size / 255, "queries": args.queries}
        run = EvaluationRun(parser, args, known, tasks, missing, protocol(options), device) if tasks else None
        label = args.ckpt or " ".join(filter(None, (args.model, args.pretrained)))
        label += f", α = {alpha:g}," * (alpha != 1)
        if run and run.finished and not (args.export or args.examples):
            return run.report(label, run.finished)

        seed = checkpoint["config"].get("seed", args.seed)          # of random weights
        clip, tokenizer = rank0_first(lambda: load_clip(args.model, args.pretrained, device, seed))
        if args.ckpt:
            load_visual(clip, checkpoint, args.ckpt, alpha)
        if args.export:
            rank0(lambda: export_clip(clip, args.model, args.export, checkpoint.get("prompts"), tokenizer))
            rank0(lambda: write_card(args, checkpoint))
        if run and not run.finished:
            run.begin(tokenizer)
    if not run:
        return None

    encoder = ImageEncoder(clip, DTYPES[args.dtype], checkpoint.get("prompts"))
    if args.compile:
        encoder.compile(dynamic=True)                   # the images still standing are of any number
    heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks}
    logit_scale = clip.logit_scale.exp().item()
    results = run.finished or evaluate_tasks(
        encoder, heads, logit_scale, tasks, options, label="evaluate", protocol=args.protocol, done=run.done,
        keep=run.keep, after=run.after, batch_size=args.batch_size, workers=args.workers)
    pictures = attacked_examples(encoder, heads, logit_scale, tasks, options) if args.examples else ()
    found = run.report(label, results, pictures)
    if args.export:                                     # with this table
        rank0(lambda: write_card(args, checkpoint, run.out))
    return found


def main():
    processes.begin()
    parser, means = make_parser(), {}
    args = parser.parse_args()
    alphas = args.interpolate or [1.]
    if len(alphas) > 1 and (args.save_adv or args.export):
        parser.error("--save-adv and --export take one model, not one for each α of --interpolate")
    with parser.refusing():
        device = processes.start(parser.settle(args, eps=0.))
    for alpha in alphas:
        out = {"out": f"{args.out}/interpolate{alpha:g}"} if args.out and len(alphas) > 1 else {}
        means[alpha] = evaluate_command(parser, argparse.Namespace(**vars(args) | out), device, alpha)
    if RANK == 0 and len(alphas) > 1:
        print("\n| α | clean % | robust % |\n|--:|--:|--:|")
        for alpha, found in means.items():
            print(f"| {alpha:g} | {found['clean']:.1f} | {found['robust']:.1f} |")
    processes.end()


if __name__ == "__main__":
    main()
