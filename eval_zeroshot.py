"""Stage 2: clean and robust zero-shot accuracy of a checkpoint, or of a plain CLIP.

    python eval_zeroshot.py --ckpt out/toy-tecoa-full-seed0/ckpt.pt
    python eval_zeroshot.py --model ViT-B-32-quickgelu --pretrained openai --tasks folder:PATH
    torchrun --nproc_per_node=8 eval_zeroshot.py --ckpt out/RUN/ckpt.pt --tasks imagenet --data-root DIR

An image counts as robust if it is classified rightly both clean and attacked. The attacker knows everything: the
gradient goes through projection, blocks, normalisation and resize to the pixels of the data set's own resolution.
"""
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from attacks import cw, image_keys, pgd
from checkpoints import load_visual, read_checkpoint
from cli import (DTYPES, RANK, WORLD, Parser, add_options, environment, first_then_others, start_processes, writable_folder,
                 write_json)
from data import batches, load_task, on_device, task_names
from kernels.contrastive_loss import contrast, contrastive_log_odds, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, image_size, load_clip
from prompts import encode_head

# ---------------------------------------------------------------------------------------------- evaluation
def make_attack(name, *, eps, steps, step_size, norm):
    """attack(encoder, head, scale, x, y, keys) → x_adv from the command line's words; eps and step_size in 1/255."""
    options = {"eps": eps / 255, "steps": steps, "step_size": step_size / 255, "norm": norm}

    def attack(encoder, head, scale, x, y, keys):
        if name == "cw":
            return cw(lambda x: cosine_logits(encoder(x), head, scale), x, y, keys=keys, **options)
        return pgd(lambda x, y: contrastive_log_odds(encoder(x), head, y, scale), x, y, keys=keys, **options)
    return attack


def evaluate(encoder, head, scale, task, attack, *, batch_size, seed, workers=0, bar=None):
    """Clean and robust accuracy of one task: {"n", "classes", "clean", "robust", "chance"}, in percent.

    encoder: x [B,3,H,W] → z [B,D]; head: [K,D]. Processes share the images, none twice. Images that are wrong when
    clean cannot be robust and are not attacked.
    """
    device = head.device
    mine = range(RANK, len(task.images), WORLD)
    counts = torch.zeros(3, dtype=torch.int64, device=device)           # images, clean, robust

    @torch.no_grad()
    def classified_rightly(x, y):
        return contrast(encoder(x), head, y, scale)[1] == y

    for x, y, index in on_device(batches(task, list(mine), max(1, batch_size // WORLD), workers), device):
        right = classified_rightly(to_float(x), y)
        survives = right.clone()
        if right.any():
            x_adv = attack(encoder, head, scale, x[right], y[right], image_keys(seed, 0, index[right]))
            survives[right] = classified_rightly(x_adv, y[right])
        counts += torch.stack([right.new_tensor(len(y), dtype=torch.int64), right.sum(), survives.sum()])
        if bar is not None:
            bar.update(len(y) * WORLD)
    if WORLD > 1:
        dist.all_reduce(counts)
    n, clean, robust = counts.tolist()
    return {"n": n, "classes": len(head), "clean": 100 * clean / n, "robust": 100 * robust / n, "chance": 100 / len(head)}


def evaluate_tasks(encoder, heads, scale, tasks, attack, *, label, **options):
    """`evaluate` on several tasks under one progress bar: {"tasks": {name: row}, "mean": {"clean", "robust"}}."""
    rows = {}
    with tqdm(total=sum(len(task.images) for task in tasks), unit="image", disable=RANK > 0 or not tasks) as bar:
        for task in tasks:
            bar.set_description(f"{label}: {task.name}")
            rows[task.name] = evaluate(encoder, heads[task.name], scale, task, attack, bar=bar, **options)
    mean = {kind: sum(row[kind] for row in rows.values()) / len(rows) if rows else None for kind in ("clean", "robust")}
    return {"tasks": rows, "mean": mean}


def markdown_table(results, adapted=()):
    """A Markdown table of {label: results of the same tasks}; rows named in `adapted` come last, outside the mean."""
    first = next(iter(results.values()))
    header = ["task", "images", "classes", "chance"]
    header += [f"{label} {kind}".strip() for label in results for kind in ("clean", "robust")]
    lines = [header, ["---"] + ["--:"] * (len(header) - 1)]

    def add(name, row, cells):
        start = [row["n"], row["classes"], f"{row['chance']:.1f}"] if row else [""] * 3
        lines.append([name, *start, *(f"{cell[kind]:.1f}" for cell in cells for kind in ("clean", "robust"))])

    for name, row in first["tasks"].items():
        add(name, row, [r["tasks"][name] for r in results.values()])
    if first["tasks"]:
        add("**mean**", None, [r["mean"] for r in results.values()])
    for name in adapted:
        add(f"{name} (adapted on)", first["adapted"][name], [r["adapted"][name] for r in results.values()])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def examples(encoder, heads, scale, tasks, attack, *, seed, chosen=None):
    """Eight attacked images, spread over the tasks: [{"task", "position", "x", "x_adv", "truth", "clean", "adversarial"}].

    chosen: an earlier result, for the same images again; by default ones that are classified rightly when clean.
    """
    found = []
    share = max(1, 8 // max(1, len(tasks)))
    places = [(task, range(i * len(task.images) // share, len(task.images))[:32]) for task in tasks[:8]
              for i in range(share)]
    if chosen is not None:
        places = [(task, [example["position"]]) for (task, _), example in zip(places, chosen)]
    for task, positions in places:
        head = heads[task.name]
        x, y, index = torch.utils.data.default_collate([task.images[p] for p in positions])
        x, y, index = to_float(x.to(head.device)), y.to(head.device), index.to(head.device)
        with torch.no_grad():
            clean = contrast(encoder(x), head, y, scale)[1]
        k = int((clean == y).int().argmax())
        x, y, clean = x[k:k + 1], y[k:k + 1], clean[k:k + 1]
        x_adv = attack(encoder, head, scale, x, y, image_keys(seed, 0, index[k:k + 1]))
        with torch.no_grad():
            adversarial = contrast(encoder(x_adv), head, y, scale)[1]
        names = [task.class_names[int(label)] for label in (y, clean, adversarial)]
        found.append({"task": task.name, "position": positions[k], "x": x[0].cpu(), "x_adv": x_adv[0].cpu(),
                      **dict(zip(("truth", "clean", "adversarial"), names))})
    return found


def draw_examples(path, rows, eps):
    """Draw {model's label: its `examples`} to a PNG: per model clean / δ amplified / adversarial, and what it sees."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(next(iter(rows.values())))
    figure, axes = pyplot.subplots(1 + 2 * len(rows), columns, figsize=(1.55 * columns + .6, 1.85 * (1 + 2 * len(rows))),
                                   squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)

    def show(axis, image, text, colour="black"):
        axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_xlabel("\n".join(textwrap.wrap(text, 20)[:3]), color=colour, fontsize=8, labelpad=2)

    for column, example in enumerate(next(iter(rows.values()))):
        axes[0, column].set_title(example["task"], fontsize=10)
        show(axes[0, column], example["x"], example["truth"])
    axes[0, 0].set_ylabel("clean", fontsize=9)
    for r, (label, found) in enumerate(rows.items()):
        for column, example in enumerate(found):
            delta = example["x_adv"] - example["x"]
            show(axes[1 + 2 * r, column], .5 + delta / (2 * delta.abs().max().clamp(min=1e-8)), "")
            right = example["adversarial"] == example["truth"]
            show(axes[2 + 2 * r, column], example["x_adv"], f"{example['clean']} → {example['adversarial']}",
                 "tab:green" if right else "tab:red")
        axes[1 + 2 * r, 0].set_ylabel(f"δ against {label}\n(amplified)", fontsize=9)
        axes[2 + 2 * r, 0].set_ylabel(f"{label}, ε = {eps:g}/255", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = Parser(prog="eval_zeroshot.py", description=__doc__)
    parser.add_argument("--ckpt", metavar="FILE", help="a ckpt.pt of train_tecoa.py; without one, the plain CLIP")
    add_options(parser, steps=(100, 10), batch_size=(256, 256), dtypes=("fp32", "bf16", "fp16"), attack="in evaluation")
    parser.add_argument("--attack", choices=("pgd", "cw"), default="pgd", help="pgd ascends the log-odds, cw the margin "
                        "of Carlini & Wagner (default: %(default)s)")
    args = parser.parse_args()
    device = start_processes(parser, args)
    try:
        checkpoint = read_checkpoint(args.ckpt) if args.ckpt else {"config": {}}
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
        args.out = args.out or str(Path(args.ckpt).parent / "eval" if args.ckpt else Path("out") / name)
        names = task_names(args.tasks, "toy" if args.model == "toy" else "imagenet")
        if not names:
            raise ValueError(f"--tasks {args.tasks}: nothing to evaluate")
        size = image_size(args.model, args.pretrained)
        tasks = [load_task(name, "val", size=size, data_root=args.data_root, limit=args.limit) for name in names]
        writable_folder(Path(args.out))
        seed = trained.get("seed", args.seed)                                  # of random weights
        clip, tokenizer = first_then_others(lambda: load_clip(args.model, args.pretrained, device, seed))
        if args.ckpt:
            load_visual(clip, checkpoint, args.ckpt)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    encoder = ImageEncoder(clip, DTYPES[args.dtype])
    if args.compile:
        encoder.compile(dynamic=True)                                          # the images still standing are of any number
    scale = clip.logit_scale.exp().item()
    heads = {task.name: encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks}
    attack = make_attack(args.attack, eps=args.eps, steps=args.steps, step_size=args.step_size, norm=args.norm)
    results = evaluate_tasks(encoder, heads, scale, tasks, attack, label="evaluate", batch_size=args.batch_size,
                             seed=args.seed, workers=args.workers)
    if RANK == 0:
        print(f"\n{args.ckpt or f'{args.model} {args.pretrained}'} under {args.attack.upper()}-{args.steps}, {args.norm} "
              f"ε = {args.eps:g}/255\n\n{markdown_table({'': results})}")
        write_json(Path(args.out) / "results.json", {"config": vars(args) | environment(device), **results})
        print(f"\nwrote {args.out}/results.json")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
