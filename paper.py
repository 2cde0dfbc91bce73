"""The paper's figures and tables, at toy scale or on real data, each with its picture.

    python paper.py                       # all of it with seeds 0, 1, 2; --seeds 0: a third of it
    python paper.py fig4 losses           # some of it
    python paper.py fig7 --model ViT-B-32-quickgelu --pretrained openai --dataset imagenet --data-root DIR --processes 8
    python paper.py precision             # not of the paper: crosscheck.py; also: attacks

Writes results/paper.md, a section for each figure, and results/<figure>.png (for other models results/<model>/). A number
is one run of train_tecoa.py and one of eval_zeroshot.py; both stay in out/paper/<version of the sources>/, and what is
there is not computed again. A seed is everything random: the toy CLIP's own pretraining, readouts, prompts, the order of
the images and the attacks' starts; the images evaluated on are the same for all.
"""
import json
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import crosscheck
import figures
import toyworld
from cli import Parser, number, source_version, writable_folder
from data import TOY_ADAPTED, load_task, task_names
from figures import COLOURS
from model import image_size

ROOT = Path(__file__).parent
LOSSES = ("tecoa", "ce", "coadv", "imgcoadv", "fare", "pmg")
PROMPTS = " --adapt image-prompt,token-prompt"
ATTACKS = {"pgd": "PGD", "cw": "CW", "apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "square": "Square"}


class Point(NamedTuple):
    """One model under one evaluation: the options of train_tecoa.py (None: CLIP as it is) and of eval_zeroshot.py."""
    train: str | None
    evaluate: str = ""


CLIP, TECOA = Point(None), Point("--loss tecoa")

# ---------------------------------------------------------------------------------------------- the figures
# A figure is a generator. It yields its rows, {label: Point}; it is sent what was found, {label: {task or "mean": {kind:
# one number a seed}}}, see `gather`; it draws, and yields the lines of a table. `o`: the options, and what differs by model.


def table(found, *columns):
    """A row for each label: clean and robust accuracy, mean over the zero-shot tasks; then of the classes adapted on.
    columns: (name, {label: text}), put before these."""
    adapted = [TOY_ADAPTED] * all(TOY_ADAPTED in part for part in found.values())
    header = ["", *(name for name, _ in columns), "clean", "robust", *["own classes: clean", "robust"] * len(adapted)]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for label, part in found.items():
        lines.append([label, *(texts.get(label, "") for _, texts in columns),
                      *(cell(part[task][kind]) for task in ("mean", *adapted) for kind in ("clean", "robust"))])
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(values):
    return f"{values.mean():.1f}" + (f" ± {figures.spread(values):.1f}" if len(values) > 1 else "")


def kinds(parts, task="mean"):
    """{kind: [values of each part]}, as figures.py wants them."""
    return {kind: [part[task][kind] for part in parts] for kind in ("clean", "robust")}


def fig1(o):
    """Figure 1: clean and robust accuracy, task by task"""
    rows = {"CLIP": CLIP, "standard adversarial training": Point("--loss ce"),
            "the same, its best learning rate": Point(f"--loss ce --lr {o.tuned}"),
            "TeCoA, visual prompts": Point("--loss tecoa" + PROMPTS), "TeCoA": TECOA}
    if o.tuned is None:
        del rows["the same, its best learning rate"]
    colours = dict(zip(rows, ("tab:gray", "tab:orange", *["moccasin"] * (o.tuned is not None), "lightskyblue", "tab:blue")))
    found = yield rows
    tasks = [task for task in found["CLIP"] if task not in (TOY_ADAPTED, "mean", "trained")] + ["mean"]
    series = [(label, colours[label], "//" * ("prompts" in label),
               {kind: [found[label][task][kind] for task in tasks] for kind in ("clean", "robust")}) for label in rows]
    figures.bars(o.out / "fig1.png", tasks, series, o.robust_at)
    lines = ["", "| task | " + " | ".join(f"{label}: clean | robust" for label in rows) + " |",
             "|---|" + "--:|" * 2 * len(rows)]
    for task in tasks[:-1]:
        lines.append(f"| {task} | " + " | ".join(cell(found[label][task][kind]) for label in rows
                                                 for kind in ("clean", "robust")) + " |")
    yield table(found) + lines


def losses(o):
    """Losses, each with finetuning and with visual prompts"""
    found = yield {"CLIP": CLIP} | {f"{loss}, {way}": Point(f"--loss {loss}{words}") for loss in LOSSES
                                    for way, words in (("finetuned", ""), ("prompts", PROMPTS))}
    figures.bars(o.out / "losses.png", LOSSES, [
        (way, [COLOURS[loss] for loss in LOSSES], hatch, kinds([found[f"{loss}, {way}"] for loss in LOSSES]))
        for way, hatch in (("finetuned", ""), ("prompts", "//"))], o.robust_at, clip=found["CLIP"]["mean"])
    yield table(found)


def prompts(o):
    """Kinds of visual prompts, under TeCoA"""
    found = yield {"CLIP": CLIP, "border": Point("--loss tecoa --adapt image-prompt"), "tokens": Point(
        "--loss tecoa --adapt token-prompt"), "border and tokens": Point("--loss tecoa" + PROMPTS)}
    names = [*found][1:]
    figures.bars(o.out / "prompts.png", names, [("TeCoA", COLOURS["prompts"], "//", kinds([found[n] for n in names]))],
                 o.robust_at, clip=found["CLIP"]["mean"])
    yield table(found, ("numbers trained", {n: f"{found[n]['trained']:,}" for n in names}))


def labels(o):
    """Pseudo-labels: TeCoA with what the original CLIP takes the images for"""
    found = yield {"CLIP": CLIP, "true labels": TECOA, "pseudo-labels": Point("--loss tecoa --labels pseudo")}
    figures.bars(o.out / "labels.png", [*found][1:], [("TeCoA", COLOURS["tecoa"], "", kinds([found[n] for n in
                 [*found][1:]]))], o.robust_at, clip=found["CLIP"]["mean"])
    yield table(found)


def fig4(o):
    """Figure 4: the size of the training set, in images of each class; the same number of updates"""
    task = load_task(o.dataset, "train", size=o.size, data_root=o.data_root)
    images, classes = len(task.images), len(task.class_names)
    rows = {}
    for shots in o.shots:
        epochs = o.epochs * (images // o.batch) / max(1, shots * classes // o.batch)
        rows[f"{shots}"] = Point(f"--loss tecoa --shots {shots} --epochs {round(epochs)}")
    found = yield {"CLIP": CLIP} | rows | {f"all ({images / classes:.0f})": TECOA}
    names = [*found][1:]
    sizes = [*o.shots, images / classes]
    figures.lines(o.out / "fig4.png", "images of each class", [
        ("TeCoA", COLOURS["tecoa"], "-", sizes, kinds([found[n] for n in names]))], o.robust_at, log=True,
        ticks=dict(zip(sizes, names)), clip=found["CLIP"]["mean"])
    yield table(found)


def fig5(o):
    """Figure 5: ε, each model attacked at the ε that it was trained with"""
    rows = {f"{label}, ε = {eps:g}/255": (Point(None, f"--eps {eps:g}") if label == "CLIP" else
                                          Point(f"--loss tecoa --eps {eps:g}")) if eps != o.eps[o.usual] else point
            for label, point in (("CLIP", CLIP), ("TeCoA", TECOA)) for eps in o.eps}
    found = yield rows
    figures.lines(o.out / "fig5.png", "ε (1/255), in training and attack", [
        (label, COLOURS[colour], "-", o.eps, kinds([found[f"{label}, ε = {eps:g}/255"] for eps in o.eps]))
        for label, colour in (("CLIP", "CLIP"), ("TeCoA", "tecoa"))], "at that ε", ticks={e: f"{e:g}" for e in o.eps})
    yield table(found)


def fig6(o):
    """Figure 6: the number of adapted numbers, under TeCoA"""
    weights = {"linear": Point("--loss tecoa --adapt linear")} | {
        f"last {n} block{'s' * (n > 1)}": Point(f"--loss tecoa --adapt partial --last-blocks {n}") for n in o.blocks} | {
        "full": TECOA}
    prompts = {f"{n} tokens": Point(f"--loss tecoa --adapt token-prompt --tokens {n}".replace(" --tokens 5", ""))
               for n in o.tokens} | {"border": Point("--loss tecoa --adapt image-prompt"),
                                     "border, 5 tokens": Point("--loss tecoa" + PROMPTS)}
    found = yield {"CLIP": CLIP} | weights | prompts
    series = [(label, COLOURS[colour], style, [found[n]["trained"] for n in names], kinds([found[n] for n in names]))
              for label, colour, style, rows in (("weights", "tecoa", "-", weights), ("prompts", "prompts", "--", prompts))
              for names in [sorted(rows, key=lambda n: found[n]["trained"])]]
    figures.lines(o.out / "fig6.png", "numbers adapted", series, o.robust_at, log=True, clip=found["CLIP"]["mean"])
    yield table(found, ("numbers trained", {n: f"{found[n]['trained']:,}" for n in [*found][1:]}))


def fig7(o):
    """Figure 7: interpolation, (1 − α)·CLIP + α·TeCoA in their weights"""
    alphas = (0, .25, .5, .75, 1)
    found = yield {f"α = {alpha:g}": Point("--loss tecoa", f"--interpolate {alpha:g}" * (alpha != 1)) for alpha in alphas}
    figures.trade_off(o.out / "fig7.png", {alpha: [part["mean"][kind] for kind in ("clean", "robust")]
                                           for alpha, part in zip(alphas, found.values())}, o.robust_at)
    yield table(found)


def stronger(o):
    """Stronger attacks, each on what those before it left standing"""
    words = f"--attack {','.join(ATTACKS)} --limit {o.few}"
    rows = {"CLIP": CLIP, "standard adversarial training": Point(f"--loss ce --lr {o.tuned}" if o.tuned else "--loss ce"),
            "TeCoA, visual prompts": Point("--loss tecoa" + PROMPTS), "TeCoA": TECOA}
    found = yield {label: Point(point.train, words) for label, point in rows.items()}
    colours = (COLOURS["CLIP"], COLOURS["ce, tuned" if o.tuned else "ce"], COLOURS["prompts"], COLOURS["tecoa"])
    figures.bars(o.out / "stronger.png", [["", "+ "][k > 0] + name for k, name in enumerate(ATTACKS.values())], [
        (label, colour, "//" * ("prompts" in label), {"robust": [found[label]["mean"][attack] for attack in ATTACKS]})
        for label, colour in zip(rows, colours)], o.robust_at, kinds=("robust",))
    lines = ["| | clean | " + " | ".join(ATTACKS.values()) + " |", "|---|" + "--:|" * (1 + len(ATTACKS))]
    yield lines + [f"| {label} | " + " | ".join(cell(found[label]["mean"][kind]) for kind in ("clean", *ATTACKS)) + " |"
                   for label in rows]


FIGURES = (fig1, losses, prompts, labels, fig4, fig5, fig6, fig7, stronger)


# ---------------------------------------------------------------------------------------------- the runs
def folder(o, point, seed):
    """Where a point's training and its evaluation are."""
    words = re.sub(r"[^\w.]+", "-", (point.train or "clip").strip(" -"))
    base = o.runs / f"{words}{o.suffix}-seed{seed}"
    return base, base / ("eval" + re.sub(r"[^\w.]+", "-", f"-{point.evaluate}" if point.evaluate else ""))


def call(o, script, words, log):
    """Run a script; its output goes to a file. RuntimeError, in one line, if it fails."""
    start = [sys.executable] if o.processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.processes}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    # toy runs are single-threaded: then their numbers depend neither on --jobs nor on the machine's number of cores
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if o.toy else {})
    with open(log, "w") as file:
        done = subprocess.run([*start, script, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"{script} {' '.join(words)}: {last}; all it said is in {log}")


def compute(o, train, evaluations, seed, advance):
    """One model and its evaluations, of which what is there already is left alone; advance(share of the work)."""
    base, _ = folder(o, Point(train), seed)
    if train is not None:
        if not (base / "results.json").exists():
            call(o, "train_tecoa.py", ["--tasks", "none", "--out", str(base), "--seed", str(seed), *o.model_words,
                                       *o.train_words, *train.split()], base / "train.log")
        advance(TRAINING)
    which = ["--ckpt", str(base / "ckpt.pt")] if train is not None else o.model_words
    for words in evaluations:
        _, out = folder(o, Point(train, words), seed)
        if read(out) is None:
            call(o, "eval_zeroshot.py", [*which, "--seed", str(seed), "--out", str(out), *o.evaluate_words, *words.split()],
                 out / "log")
        advance(cost(words))


TRAINING = 4                                          # as long as four evaluations


def cost(words):
    return 6 if "square" in words else 1


def read(out):
    """An evaluation's results, or None if there are none, or not yet all."""
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"unfinished": True}
    return None if "unfinished" in results else results


def gather(o, point):
    """What was found of a point: {task, and "mean": {"clean", "robust", and after each attack in turn: one number a seed}}
    and "trained": how many numbers were adapted. The mean is over the tasks that were not adapted on."""
    runs = [read(folder(o, point, seed)[1])["tasks"] for seed in o.seeds]
    found = {}
    for task in runs[0]:
        rows = [run[task] for run in runs]
        part = found[task] = {kind: np.array([row[kind] for row in rows]) for kind in ("clean", "robust")}
        left = np.array([row["right"] for row in rows], float)
        for attack in ATTACKS:
            left = left - [row["broken_by"].get(attack, 0) for row in rows]
            part[attack] = 100 * left / [max(1, row["n"]) for row in rows]
    zero_shot = [task for task in found if not (o.toy and task == TOY_ADAPTED)]
    found["mean"] = {kind: np.mean([found[task][kind] for task in zero_shot], 0) for kind in found[zero_shot[0]]}
    trained = folder(o, point, o.seeds[0])[0] / "results.json"
    found["trained"] = json.loads(trained.read_text())["trained"] if point.train is not None else 0
    return found


def compute_all(o, points):
    """Every point for every seed, o.jobs at a time."""
    jobs = {}
    for seed in o.seeds:
        for point in points:
            jobs.setdefault((seed, point.train), dict.fromkeys([point.evaluate]))[point.evaluate] = None
    total = sum(TRAINING * (train is not None) + sum(map(cost, words)) for (_, train), words in jobs.items())
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    with tqdm(total=total, desc="paper", smoothing=0, bar_format=layout) as bar, ThreadPoolExecutor(o.jobs) as pool:
        tasks = [pool.submit(compute, o, train, words, seed, bar.update) for (seed, train), words in jobs.items()]
        waiting = set(tasks)
        while waiting:
            done, waiting = wait(waiting, timeout=5, return_when=FIRST_EXCEPTION)
            failed = [task.exception() for task in done if task.exception()]
            if failed:
                pool.shutdown(wait=False, cancel_futures=True)
                raise failed[0]
            bar.set_postfix_str(f"{len(tasks) - len(waiting)} of {len(tasks)} models")


def write_section(path, name, title, lines):
    """Put a section into a Markdown file in place of the one of that name; sections stand in the order of FIGURES."""
    text = path.read_text() if path.exists() else ""
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}
    sections[title] = f"{title}\n\n" + "\n".join(lines) + f"\n\n![{name}]({name}.png)\n\n"
    order = [figure.__doc__ for figure in FIGURES]
    head = ("# The paper's figures and tables: `python paper.py`\n\nZero-shot accuracy in percent, mean over the tasks that "
            "were not adapted on, ± standard deviation over seeds. “Own classes”: held-out images of those adapted on, "
            "not in the mean.\n\n")
    path.write_text(head + "".join(f"## {sections[title]}" for title in order if title in sections).rstrip() + "\n")


def main():
    parser = Parser(prog="paper.py", description=__doc__)
    names = [figure.__name__ for figure in FIGURES]
    parser.add_argument("what", nargs="*", help=f"{', '.join(names)}; or precision, attacks, which stand alone (default: "
                        "every figure)")
    parser.add_argument("--seeds", default="0,1,2", help="a comma list (default: %(default)s)")
    parser.add_argument("--jobs", type=number(int, 1), help="runs at a time (default: toy: one a core, at most 8; else 1)")
    parser.add_argument("--processes", type=number(int, 1), default=1, help="of torchrun, for each run (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="folder for paper.md and the pictures (default: results, or "
                        "results/<model> for another than the toy)")
    group = parser.add_argument_group("passed on to both stages")
    group.add_argument("--model", default="toy", help="(default: %(default)s)")
    group.add_argument("--pretrained", help="an open_clip tag or file (default: toy: of the seed)")
    group.add_argument("--dataset", help="to adapt on (default: toy, or imagenet)")
    group.add_argument("--data-root", metavar="DIR", help="the folder with the data sets")
    group.add_argument("--tasks", default="all", help="to evaluate on (default: %(default)s)")
    group.add_argument("--limit", type=number(int, 1), metavar="N", help="images of each task (default: toy: 200; else all)")
    group.add_argument("--epochs", type=number(int, 1), help="(default: train_tecoa.py's)")
    group.add_argument("--batch-size", type=number(int, 1), help="in training (default: train_tecoa.py's)")
    group.add_argument("--max-steps", type=number(int, 1), metavar="N", help="stop each training after N steps")
    o = parser.parse_args()
    if not all(word.isdigit() for word in o.seeds.split(",")):
        parser.error(f"--seeds {o.seeds}: expected a comma list of whole numbers")
    unknown = [word for word in o.what if word not in names and o.what not in (["precision"], ["attacks"])]
    if unknown:
        parser.error(f"{unknown[0]}: expected some of {', '.join(names)}; or precision or attacks alone")

    given = dict(vars(o))
    passed_on = [word for word in ("model", "pretrained", "dataset", "data_root", "tasks", "limit", "epochs", "batch_size",
                                   "max_steps") if vars(o)[word] != parser.get_default(word)]
    o.suffix = f"-{zlib.crc32(repr([vars(o)[word] for word in passed_on]).encode()):08x}" if passed_on else ""
    o.runs = ROOT / "out" / "paper" / source_version()
    o.seeds, o.toy = list(dict.fromkeys(map(int, o.seeds.split(",")))), o.model == "toy"
    o.jobs = o.jobs or (min(8, os.cpu_count() or 1) if o.toy else 1)
    o.out = Path(o.out or ROOT / "results" / ("" if o.toy else re.sub(r"[^\w.]+", "-", o.model)))
    o.dataset = o.dataset or ("toy" if o.toy else "imagenet")
    # The paper's grid; and the toy's, whose ε is eight times as large and whose 400 classes have 41 images each. `tuned`:
    # the learning rate that suits standard adversarial training best, of 0.01, 0.05, 0.1 and 0.2 on seed 0's `tune` images.
    o.eps, o.usual, o.shots, o.blocks, o.tokens, o.tuned, o.few, steps = (
        ((4, 8, 16), 1, (1, 5, 20), (1, 2), (5, 20), .1, 40, 40) if o.toy else
        ((1, 2, 4), 0, (1, 5, 50), (1, 2, 6), (5, 100, 200), None, 1000, 100))
    o.robust_at = f"at {o.eps[o.usual]}/255"
    o.limit = o.limit or (200 if o.toy else None)
    o.tasks = ",".join([*task_names("all", "toy"), TOY_ADAPTED]) if o.toy and o.tasks == "all" else o.tasks

    def words(*names):
        return [part for name in names if vars(o)[name] is not None for part in (f"--{name.replace('_', '-')}",
                                                                                 str(vars(o)[name]))]
    o.model_words = words("model", "pretrained")
    o.train_words = words("dataset", "data_root", "epochs", "batch_size", "max_steps")
    o.evaluate_words = [*words("tasks", "data_root", "limit"), "--steps", str(steps)]
    o.batch, o.epochs = o.batch_size or (128 if o.toy else 256), o.epochs or (2 if o.toy else 10)
    try:
        o.size = image_size(o.model, o.pretrained)
        writable_folder(o.out)
        if o.what == ["precision"]:
            return crosscheck.precision()
        for seed in o.seeds if o.toy and not o.pretrained else ():
            toyworld.pretrained_file(seed)             # before several runs look for it
        if o.what == ["attacks"]:
            compute(o, TECOA.train, [], 0, lambda work: None)
            return crosscheck.attacks(folder(o, TECOA, 0)[0] / "ckpt.pt")
        chosen = {figure: figure(o) for figure in FIGURES if figure.__name__ in (o.what or names)}
        rows = {figure: next(run) for figure, run in chosen.items()}
        compute_all(o, [point for points in rows.values() for point in points.values()])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        sys.exit(f"paper.py: {error}")
    for figure, run in chosen.items():
        lines = run.send({label: gather(o, point) for label, point in rows[figure].items()})
        config = read(folder(o, [*rows[figure].values()][0], o.seeds[0])[1])["config"]
        options = " ".join(f"--{word.replace('_', '-')} {given[word]}" for word in ("seeds", *passed_on))
        write_section(o.out / "paper.md", figure.__name__, figure.__doc__, [
            f"`python paper.py {figure.__name__} {options}`, code {source_version()}; {config['hardware']}, Python "
            f"{config['python']}, PyTorch {config['torch']}. {o.model}, adapted on {o.dataset}; PGD-{steps}, linf, any "
            f"iterate, one random start, {o.limit or 'all'} images a task.", "", *lines])
        print(f"## {figure.__doc__}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
