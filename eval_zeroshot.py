"""Stage 2: clean and robust zero-shot accuracy of a checkpoint, or of a plain CLIP.

    python eval_zeroshot.py --ckpt out/toy-tecoa-full-seed0/ckpt.pt
    python eval_zeroshot.py --model ViT-B-32-quickgelu --pretrained openai --data-root DIR --attack autoattack
    torchrun --nproc_per_node=8 eval_zeroshot.py --ckpt out/RUN/ckpt.pt --data-root DIR --tasks cifar10,pets,wds:PATH

An image counts as robust if it is classified rightly when clean and at every iterate of every attack (--last-iterate: at
the end of the only one). The attacker knows everything: the gradient goes through projection, blocks, normalisation and
resize to the pixels of the data set's own resolution. A killed evaluation goes on where it was: type the command again.
"""
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from attacks import apgd, ascent, cw_margin, dlr, image_keys, margin, pgd, pgd_any, square
from benchmarks import present
from checkpoints import export_clip, load_visual, read_checkpoint
from cli import (DTYPES, RANK, WORLD, Parser, add_options, environment, first_then_others, number, start_processes,
                 writable_folder, write_json)
from data import batches, image_numbers, load_task, on_device, task_names
from journal import read_journal, remove_undone, save_adversarial, write_journal
from kernels.contrastive_loss import contrast, cosine_logits
from kernels.pgd_step import pgd_step, to_float
from model import ImageEncoder, image_size, load_clip
from prompts import encode_head
from report import draw_examples, full_table, summary

ATTACKS = ("pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "square")
AUTOATTACK = ("apgd-ce", "apgd-t", "square")          # `standard` of Croce & Hein 2020 but for FAB-T: README says why
TARGETS = 9                                           # classes that targeted attacks try, as `standard` does
EXTRA = ("country211",)                               # evaluated, but not one of the paper's sixteen: outside the mean
PROBED, PROBE = 50, {"names": ["square"], "queries": 100, "restarts": 1}


# ---------------------------------------------------------------------------------------------- attacks
def attack_list(words):
    """The attacks that `--attack` names, a comma list. ValueError: unknown."""
    names = [name for word in words.split(",") for name in (AUTOATTACK if word == "autoattack" else (word,))]
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(f"--attack {unknown[0]}: expected a comma list of autoattack, {', '.join(ATTACKS)}")
    return list(dict.fromkeys(names))


def defined(names, classes):
    """`names` where DLR is undefined: APGD-CE in its place for two classes, untargeted DLR for targeted with three."""
    if classes == 3:
        names = ["apgd-dlr" if name == "apgd-t" else name for name in names]
    elif classes < 3:
        names = ["apgd-ce" if name in ("apgd-dlr", "apgd-t") else name for name in names]
    return list(dict.fromkeys(names))


def protocol(options):
    """What was run, in words."""
    names = {"pgd": "PGD", "cw": "CW", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "square": "Square"}
    words = [f"{names[name]}-{options['queries' if name == 'square' else 'steps']}" for name in options["names"]]
    standard = [list(AUTOATTACK), 100, 5000, 1] == [options[key] for key in ("names", "steps", "queries", "restarts")]
    return ("AutoAttack standard (2020) without FAB-T: " * standard + ", ".join(words)
            + f"; {options['norm']} ε = {options['eps']:g}/255; {options['restarts']} random start(s); robust = right "
            + ("at the last iterate" if options["last_iterate"] else "at every iterate of every attack"))


def run_attacks(encoder, head, scale, x, y, index, *, names, eps, steps, step_size, norm, queries=5000, restarts=1, seed=0,
                last_iterate=False):
    """Each attack in turn on the images that still stand.

    x: uint8, or float in [0,1] [B,3,H,W], rightly classified; index: the images' numbers, from which random starts follow.
    names: of attacks; eps, step_size: in 1/255; queries: of Square. Returns (x_adv fp32 [B,3,H,W]: the first that was
    misclassified, or else the last attack's best; by int64 [B]: the number of the attack that did it, −1: none; at int64
    [B]: at which of its iterates; passes int64 [B] through the model; zero bool [B]: whether the clean image's gradient is
    exactly 0; uphill bool [B]: whether the loss does not fall a tenth of ε further along it, as it should not).
    """
    def objective_of(loss):
        def objective(x, y):
            logits = cosine_logits(encoder(x), head, scale)
            return loss(logits, y), logits.argmax(1) != y
        return objective

    def log_odds(x, y):                                 # cross-entropy is its softplus: in exact arithmetic the same attack
        m, predicted = contrast(encoder(x), head, y, scale)
        return m, predicted != y

    def targeted(x, y_and_target):
        y, target = y_and_target.unbind(1)
        return objective_of(lambda logits, y: dlr(logits, y, target))(x, y)

    def last(objective, x, y, **options):
        x_adv = pgd(lambda x, y: objective(x, y)[0], x, y, **options)
        with torch.no_grad():
            return x_adv, torch.where(objective(x_adv, y)[1], steps, -1)

    step_options = {"steps": steps, "step_size": step_size / 255}
    ways = {"pgd": (log_odds, last if last_iterate else pgd_any, step_options),
            "cw": (objective_of(cw_margin), last if last_iterate else pgd_any, step_options),
            "apgd-ce": (log_odds, apgd, {"steps": steps}), "apgd-dlr": (objective_of(dlr), apgd, {"steps": steps}),
            "apgd-t": (targeted, apgd, {"steps": steps}), "square": (objective_of(margin), square, {"queries": queries})}
    x_adv = x = to_float(x)
    by, at, passes = torch.full_like(y, -1), torch.full_like(y, -1), torch.zeros_like(y)
    zero, uphill = torch.zeros_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)
    for k, name in enumerate(names):
        objective, function, options = ways[name]
        labels = [y]
        if name == "apgd-t":                            # towards the classes that look likeliest when clean
            with torch.no_grad():
                wrong = cosine_logits(encoder(x), head, scale).scatter(1, y[:, None], float("-inf"))
            labels = [torch.stack([y, t], 1) for t in wrong.topk(min(TARGETS, len(head) - 1), 1).indices.T]
        if k == 0 and name != "square":
            loss, _, grad = ascent(objective, x, labels[0])
            zero = (grad == 0).flatten(1).all(1)
            with torch.no_grad():
                uphill = objective(pgd_step(x, grad, x, eps / 255, eps / 2550, norm), labels[0])[0] >= loss
        for restart, label in itertools.product(range(restarts), labels):
            stands = (by < 0).nonzero().squeeze(1)
            if len(stands) == 0:
                break
            found, step = function(objective, x[stands], label[stands], keys=image_keys(seed, restart, index[stands]),
                                   eps=eps / 255, norm=norm, **options)
            x_adv = x_adv.index_copy(0, stands, found)
            at[stands], by[stands] = step, torch.where(step < 0, -1, k)
            passes[stands] += torch.where(step < 0, queries if name == "square" else steps + 1, step + 1)
    return x_adv, by, at, passes, zero, uphill


# ---------------------------------------------------------------------------------------------- evaluation
def judge(encoder, head, scale, x, y, index, options):
    """(one record per image, {name: tensor} of those attacked); see `evaluate`."""
    with torch.no_grad():
        clean = contrast(encoder(to_float(x)), head, y, scale)[1]
    records = [dict(zip(("image", "label", "clean"), values)) for values in zip(*(t.tolist() for t in (index, y, clean)))]
    right = clean == y
    if not right.any():                                 # what is wrong already cannot be robust, and is not attacked
        return records, {}
    x, y, index = to_float(x[right]), y[right], index[right]
    x_adv, by, *facts = run_attacks(encoder, head, scale, x, y, index, **options)
    with torch.no_grad():                               # the verdict is that of the image which is kept
        adversarial = contrast(encoder(x_adv), head, y, scale)[1]
    by = torch.where(adversarial == y, -1, by.where(by >= 0, len(options["names"]) - 1))
    attacked = [record for record in records if record["clean"] == record["label"]]
    for record, *values in zip(attacked, *(t.tolist() for t in (adversarial, by, *facts))):
        record |= dict(zip(("adversarial", "by", "at", "passes", "zero", "uphill"), values))
        record["by"] = options["names"][record["by"]] if record["by"] >= 0 else None
    return records, {"x": x, "x_adv": x_adv, "label": y, "adversarial": adversarial, "image": index}


def evaluate(encoder, head, scale, task, options, *, batch_size, workers=0, bar=None, done=None, keep=None):
    """One record per image of one task, from all processes, which share the images, none twice: a sorted list of dicts.

    encoder: x [B,3,H,W] → z [B,D]; head: [K,D]; options: of `run_attacks`. A record's keys: image (its number), label,
    clean (the class predicted); if that is right also adversarial (the class predicted), by (the attack that broke it, or
    None), at, passes, zero and uphill as in `run_attacks`; for some that gradient attacks left standing, probe (whether a
    short Square breaks them, which leads to a warning and counts for nothing else). An image that cannot be read has image
    and error alone. done: {number: record} of an earlier run, not done again. keep(task, records, tensors): for each batch.
    """
    numbers = image_numbers(task)

    def over(positions, function):
        """function's records of the images at these positions, shared by all processes; then those of all of them."""
        mine = []
        for x, y, index, errors in on_device(batches(task, positions[RANK::WORLD], max(1, batch_size // WORLD), workers,
                                                     tolerant=True), head.device):
            records, tensors = function(x, y, index) if len(y) else ([], {})
            records += [{"image": image, "error": error} for image, error in errors]
            if keep is not None:
                keep(task, records, tensors)
            if bar is not None and function is attacked:
                bar.update(len(records) * WORLD)
            mine += records
        everyone = [mine]
        if WORLD > 1:
            everyone = [None] * WORLD
            dist.all_gather_object(everyone, mine)
        return [record for records in everyone for record in records]

    def attacked(x, y, index):
        return judge(encoder, head, scale, x, y, index, options)

    def probed(x, y, index):
        broken = run_attacks(encoder, head, scale, x, y, index, **options | PROBE)[1] >= 0
        return [{"image": image, "probe": value} for image, value in zip(index.tolist(), broken.tolist())], {}

    records = dict(done or {})
    records |= {record["image"]: record for record in over([p for p, i in enumerate(numbers) if i not in records], attacked)}
    if options["names"] != ["square"]:                  # does random search find what gradients do not?
        some = [p for p in range(0, len(numbers), math.ceil(len(numbers) / PROBED))
                if records[numbers[p]].get("by", "") is None and "probe" not in records[numbers[p]]]
        for record in over(some, probed):
            records[record["image"]] |= record
    return [records[image] for image in sorted(records)]


def evaluate_tasks(encoder, heads, scale, tasks, options, *, label, done=None, after=None, **more):
    """`evaluate` on several tasks under one progress bar: {"tasks": {name: row}, "mean": {"clean", "robust"}}.

    options: of `run_attacks`; done: {task: {number: record}}; after(results, records): called after each task, with what
    there is. `more` goes to `evaluate`.
    """
    results, done = {"tasks": {}, "mean": {"clean": None, "robust": None}}, done or {}
    total = sum(len(task.images) for task in tasks)
    with tqdm(total=total, initial=sum(map(len, done.values())), unit="image", disable=RANK > 0 or not tasks) as bar:
        clock = [0.]

        def watched(x):                                 # long attacks: say where they are before a batch is done
            if time.perf_counter() > clock[0] + 1:
                bar.set_postfix_str(f"{len(x)} in attack")
                clock[0] = time.perf_counter()
            return encoder(x)
        for task in tasks:
            bar.set_description(f"{label}: {task.name}")
            head = heads[task.name]
            names = defined(options["names"], len(head))
            records = evaluate(watched, head, scale, task, options | {"names": names}, bar=bar, done=done.get(task.name),
                               **more)
            results["tasks"][task.name] = summary(records, names, len(head), options["steps"])
            counted = [row for name, row in results["tasks"].items() if name not in EXTRA or len(tasks) == 1]
            results["mean"] = {kind: sum(row[kind] for row in counted) / max(1, len(counted))
                               for kind in ("clean", "robust")}
            if after is not None:
                after(results, task, records)
    return results


def examples(encoder, heads, scale, tasks, options, *, chosen=None):
    """Eight attacked images, spread over the tasks: [{"task", "position", "x", "x_adv", "truth", "clean", "adversarial"}].

    chosen: an earlier result, for the same images again; by default ones that are classified rightly when clean.
    """
    found = []
    share = max(1, 8 // max(1, len(tasks)))
    places = [(task, range(i * len(task.images) // share, len(task.images))[:32]) for task in tasks[:8]
              for i in range(share)]
    if chosen is not None:
        places = [(task, [example["position"]]) for example in chosen for task in tasks if task.name == example["task"]]
    for task, positions in places:
        head = heads[task.name]
        x, y, index, _ = next(on_device(batches(task, list(positions), 32, 0, tolerant=True), head.device))
        if len(y) == 0:
            continue                                    # none of these can be read
        with torch.no_grad():
            clean = contrast(encoder(to_float(x)), head, y, scale)[1]
        k = int((clean == y).int().argmax())
        x, y, clean = to_float(x[k:k + 1]), y[k:k + 1], clean[k:k + 1]
        position = next(p for p in positions if image_numbers(task)[p] == index[k])
        x_adv, *_ = run_attacks(encoder, head, scale, x, y, index[k:k + 1],
                                **options | {"names": defined(options["names"], len(head))})
        with torch.no_grad():
            adversarial = contrast(encoder(x_adv), head, y, scale)[1]
        names = [task.class_names[int(label)] for label in (y, clean, adversarial)]
        found.append({"task": task.name, "position": position, "x": x[0].cpu(), "x_adv": x_adv[0].cpu(),
                      **dict(zip(("truth", "clean", "adversarial"), names))})
    return found


def main():
    parser = Parser(prog="eval_zeroshot.py", description=__doc__)
    add_options(parser, steps=(100, 100), batch_size=(256, 256), dtypes=("fp32", "bf16", "fp16"), attack="in evaluation")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--ckpt", metavar="FILE", help="a checkpoint, of train_tecoa.py or a published one (README: "
                       "Published checkpoints); default: the plain CLIP")
    group.add_argument("--attack", default="pgd", help=f"a comma list of {', '.join(ATTACKS)} and autoattack (= "
                       f"{','.join(AUTOATTACK)}), each on the images that still stand (default: %(default)s)")
    parser.option(group, "--queries", 5000, 500, "of Square", type=number(int, 1))
    group.add_argument("--restarts", type=number(int, 1), default=1,
                       help="random starts of each attack (default: %(default)s)")
    group.add_argument("--last-iterate", action="store_true", help="older papers' protocol: judge PGD or CW by its "
                       "last iterate alone (default: an image falls with any iterate)")
    group.add_argument("--templates", choices=("paper", "openai"), default="paper", help="paper: its one template a data "
                       "set; openai: the average over CLIP's own several (default: %(default)s)")
    group.add_argument("--examples", action="store_true", help="draw examples.png, a page of attacked images (default: no)")
    group.add_argument("--save-adv", metavar="DIR", help="keep the attacked images in DIR/<task>/*.npz: x (uint8), x_adv "
                       "(fp32), image, label, adversarial (default: no)")
    group.add_argument("--export", metavar="DIR", help="write the CLIP to DIR/open_clip_model.safetensors, which open_clip "
                       "loads; --tasks none for that alone (default: no)")
    args = parser.parse_args()
    device = start_processes(parser, args)
    try:
        names = attack_list(args.attack)
        if args.last_iterate and names not in (["pgd"], ["cw"]):
            raise ValueError("--last-iterate is for --attack pgd or cw alone")
        checkpoint = read_checkpoint(args.ckpt, args.model) if args.ckpt else {"config": {}}
        args.model = args.model or checkpoint.get("model", "toy")
        args.pretrained = args.pretrained or checkpoint.get("pretrained")
        if args.model == "toy" and args.pretrained is None:
            args.pretrained = f"seed{args.seed}"
        trained = checkpoint["config"]                                         # each model at the ε that it trained with
        args.norm = args.norm or trained.get("norm", "linf")
        if args.norm == trained.get("norm"):
            args.eps = trained["eps"] if args.eps is None else args.eps
        elif args.norm == "l2" and args.eps is None:
            raise ValueError("--norm l2 needs --eps, in 1/255")
        parser.fill(args)
        args.step_size = args.step_size or (1 if args.model != "toy" and args.norm == "linf" else args.eps / 4)
        args.dtype = args.dtype or "fp32"
        name = f"eval-{args.model.removeprefix('hf-hub:').replace('/', '-')}-{Path(args.pretrained or 'hub').stem}"
        args.out = args.out or str(Path(args.ckpt).parent / "eval" if args.ckpt else Path("out") / name) + (
            "" if args.attack == "pgd" else f"-{args.attack.replace(',', '-')}")
        everything = args.tasks == "all" and args.model != "toy" and args.data_root
        words, missing = present(args.data_root) if everything else (
            task_names(args.tasks, "toy" if args.model == "toy" else "imagenet"), {})
        size, tasks = image_size(args.model, args.pretrained), []
        for word in words:
            try:
                tasks.append(load_task(word, "val", size=size, data_root=args.data_root, limit=args.limit,
                                       templates=args.templates))
            except ValueError as error:
                if not everything:
                    raise
                missing[word] = str(error)                                     # half a download does not stop the others
        if not tasks and not args.export:
            raise ValueError(f"--tasks {args.tasks}: nothing to evaluate" + f" under {args.data_root}" * bool(everything))
        out, save_adv = Path(args.out), Path(args.save_adv) if args.save_adv else None
        for folder in filter(None, (out, save_adv)):
            writable_folder(folder)
        seed = trained.get("seed", args.seed)                                  # of random weights
        clip, tokenizer = first_then_others(lambda: load_clip(args.model, args.pretrained, device, seed))
        if args.ckpt:
            load_visual(clip, checkpoint, args.ckpt)
        if args.export and RANK == 0:
            export_clip(clip, args.model, args.export, checkpoint.get("prompts"))
            print(f"wrote {args.export}/open_clip_model.safetensors and open_clip_config.json")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if RANK == 0:
        for word, how in missing.items():
            print(f"not evaluated: {word}: {how}")

    encoder = ImageEncoder(clip, DTYPES[args.dtype], checkpoint.get("prompts"))
    if args.compile:
        encoder.compile(dynamic=True)                                          # the images still standing are of any number
    scale = clip.logit_scale.exp().item()
    heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks}
    options = {"names": names, "eps": args.eps, "steps": args.steps, "step_size": args.step_size, "norm": args.norm,
               "queries": args.queries, "restarts": args.restarts, "seed": args.seed, "last_iterate": args.last_iterate}

    digest = hashlib.sha256(Path(args.ckpt).read_bytes()).hexdigest() if args.ckpt else None
    identity = json.loads(json.dumps({**options, "model": args.model, "pretrained": args.pretrained, "ckpt": digest,
                                      "dtype": args.dtype, "limit": args.limit, "templates": args.templates}))
    done = [None]
    if RANK == 0:
        done = [{task: records for task, records in read_journal(out, identity).items() if task in heads}]
        write_journal(out, identity, done[0])
        (out / "results.json").unlink(missing_ok=True)
        for task in tasks if save_adv else ():
            remove_undone(save_adv, task.name, done[0].get(task.name, {}))
    if WORLD > 1:
        dist.broadcast_object_list(done, 0)
    done = done[0]
    if RANK == 0 and done:
        print(f"going on: {sum(map(len, done.values())):,} of {sum(len(task.images) for task in tasks):,} images are done")
    journal = open(out / (f"images-{RANK}.jsonl" if RANK else "images.jsonl"), "a")
    if RANK:
        print(json.dumps({"evaluation": identity}), file=journal, flush=True)

    def keep(task, records, tensors):
        """What a killed run will not have to do again, after each batch; the images before the lines that claim them."""
        if save_adv and tensors:
            save_adversarial(save_adv, task.name, tensors, RANK)
        journal.write("".join(json.dumps({"task": task.name, **record}) + "\n" for record in records))
        journal.flush()

    def after(results, task, records):
        if RANK == 0:
            finished[task.name] = {record["image"]: record for record in records}
            left = [task.name for task in tasks if task.name not in finished]
            usual, robust = parser.by_model["eps"][args.model == "toy"], results["mean"]["robust"]
            plain = not args.ckpt and args.pretrained not in (None, "none") and not Path(args.pretrained).is_file()
            if (plain and not left and any(name.startswith("apgd") for name in names) and args.norm == "linf"
                    and args.eps >= usual and robust > 10):
                results["warnings"] = [f"{robust:.1f} % robust for a CLIP that was never made robust: nearly 0 is expected, "
                                       "so the attack may be broken"]
            write_json(out / "results.json", {"config": vars(args) | environment(device), **results} |
                       ({"unfinished": left} if left else {}))

    finished = {}
    results = evaluate_tasks(encoder, heads, scale, tasks, options, label="evaluate", done=done, keep=keep, after=after,
                             batch_size=args.batch_size, workers=args.workers)
    if RANK == 0:
        write_journal(out, identity, finished)
        print(f"\n{args.ckpt or f'{args.model} {args.pretrained}'} under {protocol(options)}\n\n{full_table(results)}\n")
        for name in finished:
            for record in finished[name].values():
                if "error" in record:
                    print(f"left out of {name}: {record['error']}")
        if args.examples:
            draw_examples(out / "examples.png", {Path(args.ckpt or args.model).stem: examples(
                encoder, heads, scale, tasks, options)}, args.eps)
        for text in results.get("warnings", ()):
            print(f"warning: {text}")
        print(f"wrote {out}/results.json, images.jsonl" + ", examples.png" * args.examples
              + (f"; {save_adv}/" if save_adv else ""))
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
