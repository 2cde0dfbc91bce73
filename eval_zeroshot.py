"""Stage 2: clean and robust zero-shot accuracy of a checkpoint, or of a plain CLIP.

    python eval_zeroshot.py --ckpt out/toy-tecoa-full-seed0/ckpt.pt
    python eval_zeroshot.py --model ViT-B-32-quickgelu --pretrained openai --data-root DIR --attack autoattack
    torchrun --nproc_per_node=8 eval_zeroshot.py --ckpt out/RUN/ckpt.pt --data-root DIR --tasks cifar10,pets,wds:PATH
    python eval_zeroshot.py --ckpt out/RUN/ckpt.pt --interpolate 0,0.25,0.5,0.75,1

An image counts as robust if it is classified rightly when clean and at every iterate of every attack (--last-iterate: at
the end of the only one). The attacker knows everything: the gradient goes through projection, blocks, normalisation and
resize to the pixels of the data set's own resolution. A killed evaluation goes on where it was: type the command again.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from adversary import ATTACKS, AUTOATTACK, attack_list, defined, predict, protocol, run_attacks
from benchmarks import present
from checkpoints import export_clip, load_visual, read_checkpoint
from cli import (DTYPES, RANK, WORLD, Parser, add_options, end_processes, environment, first_then_others, gathered, number,
                 source_version, start_processes, writable_folder, write_json)
from data import batches, image_numbers, load_task, on_device, task_names
from journal import lock, read_journal, save_adversarial, without_unsaved, write_journal
from kernels.pgd_step import to_float
from model import ImageEncoder, image_size, load_clip
from prompts import encode_head
from report import draw_examples, examples, full_table, summary
from sampling import fingerprint

EXTRA = ("country211",)                               # evaluated, but not one of the paper's sixteen: outside the mean
PROBED, PROBE = 50, {"names": ["square"], "queries": 100, "restarts": 1}


def judge(encoder, head, scale, x, y, index, options):
    """(one record per image, {name: tensor} of those attacked); see `evaluate`."""
    clean = predict(encoder, head, scale, to_float(x))
    records = [dict(zip(("image", "label", "clean"), values)) for values in zip(*(t.tolist() for t in (index, y, clean)))]
    right = clean == y
    if not right.any():                                 # what is wrong already cannot be robust, and is not attacked
        return records, {}
    x, y, index = to_float(x[right]), y[right], index[right]
    x_adv, *facts = run_attacks(encoder, head, scale, x, y, index, **options)
    attacked = [record for record in records if record["clean"] == record["label"]]
    for record, *values in zip(attacked, *(t.tolist() for t in facts)):
        record |= dict(zip(("adversarial", "by", "at", "passes", "zero", "uphill"), values))
        record["by"] = options["names"][record["by"]] if record["by"] >= 0 else None
    return records, {"x": x, "x_adv": x_adv, "label": y, "adversarial": facts[0], "image": index}


def evaluate(encoder, head, scale, task, options, *, batch_size, workers=0, bar=None, done=None, keep=None,
             probe=True):
    """One record per image of one task, from all processes, which share the images, none twice: a sorted list of dicts.

    encoder: x [B,3,H,W] → z [B,D]; head: [K,D]; options: of `run_attacks`. A record's keys: image (its number), label,
    clean (the class predicted, −1: NaN); if that is right also adversarial (likewise, of the attacked image), by (the attack
    that broke it, or None), at, passes, zero and uphill as in `run_attacks`; for some that gradient attacks left standing,
    probe (whether a short Square breaks them, which leads to a warning and counts for nothing else). An image that cannot be
    read has image and error alone. probe: whether to look for that. done: {number: record} of an earlier run, not done
    again. keep(task, records, tensors) is called after each batch.
    """
    numbers = image_numbers(task)

    def over(positions, function):
        """function's records of the images at these positions, shared by all processes; then those of all of them."""
        mine = []
        for x, y, index, errors in on_device(batches(task, positions[RANK::WORLD], max(1, batch_size // WORLD), workers,
                                                     bad="leave out"), head.device):
            records, tensors = function(x, y, index) if len(y) else ([], {})
            records += [{"image": image, "error": error} for image, error in errors]
            if keep is not None:
                keep(task, records, tensors)
            if bar is not None and function is attacked:
                bar.update(len(records) * WORLD)
            mine += records
        return sum(gathered(mine), [])

    def attacked(x, y, index):
        return judge(encoder, head, scale, x, y, index, options)

    def probed(x, y, index):
        broken = run_attacks(encoder, head, scale, x, y, index, **options | PROBE)[2] >= 0
        return [{"image": image, "probe": value} for image, value in zip(index.tolist(), broken.tolist())], {}

    records = dict(done or {})
    records |= {record["image"]: record for record in over([p for p, i in enumerate(numbers) if i not in records], attacked)}
    if probe and options["names"] != ["square"]:        # does random search find what gradients do not?
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
            half = math.inf if options.get("last_iterate") else options["steps"] / 2
            results["tasks"][task.name] = summary(records, names, len(head), half) | {"source": task.source}
            counted = [row for name, row in results["tasks"].items() if row["n"] and (name not in EXTRA or len(tasks) == 1)]
            results["mean"] = {"tasks": len(counted)} | {kind: sum(row[kind] for row in counted) / max(1, len(counted))
                                                         for kind in ("clean", "robust")}
            if after is not None:
                after(results, task, records)
    return results


def pseudo_labels(encoder, head, scale, task, workers=0):
    """What the encoder takes the task's clean images for: int64, by image number, from all processes, the same in each; −1
    for those that cannot be read, which training leaves out as well."""
    loader = batches(task, [*range(len(task.images))][RANK::WORLD], 256, workers, bad="leave out")
    precision, encoder.dtype, found = encoder.dtype, torch.float32, [torch.empty(3, 0, dtype=torch.int64)]
    for x, y, index, errors in tqdm(on_device(loader, head.device), desc="pseudo-labels", unit="batch", total=len(loader),
                                    disable=RANK > 0):
        for image, error in errors:
            tqdm.write(f"warning: image {image} gets no pseudo-label: {error}", file=sys.stderr)
        if len(y):
            found.append(torch.stack([index, y, predict(encoder, head, scale, to_float(x))]).cpu())
    encoder.dtype = precision
    index, y, guessed = torch.cat(gathered(torch.cat(found, 1)), 1)
    if RANK == 0:
        print(f"{100 * (guessed == y).float().mean():.1f} % of the pseudo-labels are the true ones", flush=True)
    labels = torch.full((max(image_numbers(task)) + 1,), -1)
    return labels.index_copy(0, index, guessed).to(head.device)


def shares(text):
    """An argparse type: a comma list of numbers from 0 to 1, each once."""
    values = list(dict.fromkeys(float(word) for word in text.split(",")))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected a comma list of numbers from 0 to 1, got {text}")
    return values


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
    group.add_argument("--interpolate", type=shares, metavar="α,…", help="evaluate (1 − α)·CLIP + α·checkpoint, in their "
                       "weights, for each α of a comma list of numbers from 0 to 1 (default: the checkpoint, α = 1)")
    group.add_argument("--examples", action="store_true", help="draw examples.png, a page of attacked images (default: no)")
    group.add_argument("--save-adv", metavar="DIR", help="keep the attacked images in DIR/<task>/*.npz: x (uint8), x_adv "
                       "(fp32), image, label, adversarial (default: no)")
    group.add_argument("--export", metavar="DIR", help="write the CLIP to DIR/open_clip_model.safetensors, which open_clip "
                       "loads; --tasks none for that alone (default: no)")
    args = parser.parse_args()
    alphas, means = args.interpolate or [1.], {}
    if len(alphas) > 1 and (args.save_adv or args.export):
        parser.error(f"--{'save-adv' if args.save_adv else 'export'} takes one model, not --interpolate's {len(alphas)}")
    device = start_processes(parser, args)
    for alpha in alphas:
        out = {"out": f"{args.out}/interpolate{alpha:g}"} if args.out and len(alphas) > 1 else {}
        means[alpha] = evaluate_command(parser, argparse.Namespace(**vars(args) | out), device, alpha)
    if RANK == 0 and len(alphas) > 1 and means[alpha]:
        print("\n| α | clean % | robust % |\n|--:|--:|--:|")
        for alpha, mean in means.items():
            print(f"| {alpha:g} | {mean['clean']:.1f} | {mean['robust']:.1f} |")
    end_processes()


def evaluate_command(parser, args, device, alpha):
    """What the command line asks for, of the model that has share alpha of the checkpoint's weights and the rest of CLIP's;
    prints it and writes its files. Returns {"clean", "robust"}, the mean over the tasks; None without any.
    """
    interpolated, args.interpolate = bool(args.interpolate), None if alpha == 1 else alpha
    given = {word: vars(args)[word] for word in ("attack", "norm", "eps", "steps", "step_size", "queries", "restarts",
                                                 "last_iterate", "templates", "dtype", "limit", "seed", "interpolate")}
    locked = None
    try:
        names = attack_list(args.attack)
        if args.last_iterate and names not in (["pgd"], ["cw"]):
            raise ValueError("--last-iterate is for --attack pgd or cw alone")
        checkpoint = read_checkpoint(args.ckpt, args.model) if args.ckpt else {"config": {}}
        if interpolated and (not args.ckpt or "prompts" in checkpoint or "text_state" in checkpoint):
            raise ValueError("--interpolate is between a CLIP and the image encoder that was finetuned from it: "
                             + (f"{args.ckpt} has visual prompts" if "prompts" in checkpoint else f"{args.ckpt} is a whole "
                                "CLIP, and does not say of which other" if args.ckpt else "give --ckpt"))
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
        unusual = "".join(f"-{word.replace('_', '') if word != 'attack' else ''}{'' if value is True else value}"
                          for word, value in given.items() if value != parser.get_default(word)).replace(",", "-")
        args.out = args.out or str(Path(args.ckpt).parent / "eval" if args.ckpt else Path("out") / name) + unusual
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
        seed = trained.get("seed", args.seed)                                  # of random weights
        clip, tokenizer = first_then_others(lambda: load_clip(args.model, args.pretrained, device, seed))
        if args.ckpt:
            original = copy.deepcopy(clip.visual.state_dict())
            load_visual(clip, checkpoint, args.ckpt)
            for name, tensor in clip.visual.state_dict().items():              # exactly one of the two at α = 0 and 1
                tensor.copy_(torch.lerp(original[name], tensor, alpha))
        if args.export and RANK == 0:
            export_clip(clip, args.model, args.export, checkpoint.get("prompts"))
            print(f"wrote {args.export}/open_clip_model.safetensors and open_clip_config.json")
        if not tasks:
            return None
        options = {"names": names, "eps": args.eps, "steps": args.steps, "step_size": args.step_size, "norm": args.norm,
                   "queries": args.queries, "restarts": args.restarts, "seed": args.seed, "last_iterate": args.last_iterate}
        files = {word: hashlib.sha256(Path(path).read_bytes()).hexdigest() for word, path in
                 (("ckpt", args.ckpt), ("pretrained", args.pretrained)) if path and Path(path).is_file()}
        identity = json.loads(json.dumps(                                      # what the numbers depend on
            {"code": source_version(), "model": args.model, "pretrained": args.pretrained, **files, **options, "dtype":
             args.dtype, "templates": args.templates, "limit": args.limit, "interpolate": alpha,
             "data_root": args.data_root and str(Path(args.data_root).resolve())}))
        done, counts, made_of = {}, {task.name: len(task.images) for task in tasks}, {t.name: fingerprint(t) for t in tasks}
        if RANK == 0:
            writable_folder(out)
            locked = lock(out)
            done, known = read_journal(out, identity)
            changed = [name for name in done if known.get(name) != made_of.get(name, known.get(name))]
            if changed:
                raise ValueError(f"the images of {', '.join(changed)} are not those that {out} was begun with: give another "
                                 "--out, or delete it")
            if save_adv:
                writable_folder(save_adv)
                done |= {name: without_unsaved(save_adv, name, done.get(name, {}), identity) for name in counts}
    except (ValueError, OSError) as error:
        if locked is not None:
            os.close(locked)
        parser.error(str(error))

    elsewhere = {name: records for name, records in done.items() if name not in counts}    # of tasks not asked for now
    shared = [{name: records for name, records in done.items() if name in counts}]
    if RANK == 0:
        made_of = known | made_of
        write_journal(out, identity, made_of, done)
        (out / "results.json").unlink(missing_ok=True)                         # all of it is in the journal
        for word, how in missing.items():
            print(f"not evaluated: {word}: {how}")
        if any(shared[0].values()):
            print(f"going on: {sum(map(len, shared[0].values())):,} of {sum(counts.values()):,} images are done")
    if WORLD > 1:
        dist.broadcast_object_list(shared, 0)
    journal = open(out / (f"images-{RANK}.jsonl" if RANK else "images.jsonl"), "a")
    if RANK:
        print(json.dumps({"evaluation": identity}), file=journal, flush=True)

    encoder = ImageEncoder(clip, DTYPES[args.dtype], checkpoint.get("prompts"))
    if args.compile:
        encoder.compile(dynamic=True)                                          # the images still standing are of any number
    scale = clip.logit_scale.exp().item()
    heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks}
    finished = {}

    def keep(task, records, tensors):
        """What a killed run will not have to do again, after each batch; the images before the lines that claim them."""
        if save_adv and tensors:
            save_adversarial(save_adv, task.name, tensors, identity, RANK)
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
            write_json(out / "results.json", {"config": vars(args) | environment(device), "protocol": protocol(options)}
                       | results | {word: value for word, value in (("missing", missing), ("unfinished", left)) if value})

    results = evaluate_tasks(encoder, heads, scale, tasks, options, label="evaluate", done=shared[0], keep=keep, after=after,
                             batch_size=args.batch_size, workers=args.workers)
    if RANK == 0:
        write_journal(out, identity, made_of, elsewhere | finished)
        label = (args.ckpt or f"{args.model} {args.pretrained}") + f", α = {alpha:g}," * (alpha != 1)
        print(f"\n{label} under {protocol(options)}\n\n{full_table(results)}\n")
        for name in finished:
            if " (" in results["tasks"][name]["source"]:
                print(f"{name} was read from {results['tasks'][name]['source']}")
            for record in finished[name].values():
                if "error" in record:
                    print(f"left out of {name}: {record['error']}")
        pictures = examples(encoder, heads, scale, tasks, options) if args.examples else []
        if pictures:
            draw_examples(out / "examples.png", {Path(args.ckpt or args.model).stem: pictures}, args.eps)
        for text in results.get("warnings", ()):
            print(f"warning: {text}")
        print(f"wrote {out}/results.json, images.jsonl" + ", examples.png" * bool(pictures)
              + (f"; {save_adv}/" if save_adv else ""))
        os.close(locked)
    return results["mean"]


if __name__ == "__main__":
    main()
