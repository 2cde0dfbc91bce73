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
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

import crosscheck
import toyworld
from cli import Parser, number, source_version, writable_folder
from data import TOY_ADAPTED, load_task, task_names
from eval_zeroshot import EXTRA
from figures import ATTACKS, FIGURES, TECOA, Point
from journal import lock
from model import image_size

ROOT = Path(__file__).parent


# ---------------------------------------------------------------------------------------------- the runs
def folder(o, point, seed):
    """Where a point's training and its evaluation are."""
    words = re.sub(r"[^\w.]+", "-", (point.train or "clip").strip(" -"))
    base = o.runs / f"{words}-seed{seed}"
    return base, base / ("eval" + re.sub(r"[^\w.]+", "-", f"-{point.evaluate}" if point.evaluate else "") + o.evaluation)


def read(o, point, seed):
    """An evaluation's results; None if they are not there, not yet all, or of other tasks, images or steps."""
    path = folder(o, point, seed)[1] / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"unfinished": True}
    words = [*o.evaluate_words, *point.evaluate.split()]
    asked = dict(zip(words[::2], words[1::2]))         # the last of two wins
    same = all(str(results.get("config", {}).get(word[2:])) == asked[word] for word in asked if word in (
        "--tasks", "--limit", "--steps"))
    return results if same and "unfinished" not in results else None


def call(o, script, words, log):
    """Run a script; its output goes to a file. RuntimeError, in one line, if it fails."""
    if source_version() != o.version:
        raise RuntimeError(f"{script}: the sources have changed since this command began")
    start = [sys.executable] if o.processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.processes}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    # toy runs are single-threaded: then their numbers depend neither on --jobs nor on the machine's number of cores
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1"} if o.toy else {})
    with open(log, "w") as file:
        child = subprocess.Popen([*start, str(ROOT / script), *words], stdout=file, stderr=file, env=environment)
    o.children.append(child)
    if child.wait():
        said = [line for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if re.search(r"\w", line)]
        own = [line for line in said if line.startswith(script)]
        raise RuntimeError(f"{script} {' '.join(words)}: {[f'status {child.returncode}', *said, *own][-1]}; see {log}")


def to_do(o, seed, train, evaluations):
    """(whether this model is still to be trained, which of its evaluations are still to be made)."""
    points = [Point(train, words) for words in evaluations]
    return (train is not None and not (folder(o, points[0], seed)[0] / "results.json").exists(),
            [point for point in points if read(o, point, seed) is None])


def compute(o, seed, train, evaluations, advance):
    """One model and its evaluations, as far as they are not there; advance(share of the work) after each."""
    training, points = to_do(o, seed, train, evaluations)
    base, _ = folder(o, Point(train), seed)
    if training:
        call(o, "train_tecoa.py", ["--tasks", "none", "--out", str(base), "--seed", str(seed), *o.model_words,
                                   *o.train_words, *train.split(), "--resume"], base / "train.log")
        advance(TRAINING)
    for point in points:
        out = folder(o, point, seed)[1]
        call(o, "eval_zeroshot.py", [*(o.model_words if train is None else ["--ckpt", str(base / "ckpt.pt")]), "--seed",
                                     str(seed), "--out", str(out), *o.evaluate_words, *point.evaluate.split()], out / "log")
        advance(cost(point))


TRAINING = 4                                          # as long as four evaluations


def cost(point):
    return 6 if "square" in point.evaluate else 1


def compute_all(o, points):
    """Every point for every seed, o.jobs at a time; the errors, in one line each, of those that failed."""
    jobs = {}
    for seed in o.seeds:
        for point in points:
            jobs.setdefault((seed, point.train), dict.fromkeys([point.evaluate]))[point.evaluate] = None
    left = {job: to_do(o, *job, words) for job, words in jobs.items()}
    total = sum(TRAINING * training + sum(map(cost, evaluations)) for training, evaluations in left.values())
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    bar, pool = tqdm(total=total, desc="paper", smoothing=0, bar_format=layout), ThreadPoolExecutor(o.jobs)
    try:
        tasks = [pool.submit(compute, o, *job, words, bar.update) for job, words in jobs.items() if any(left[job])]
        waiting = set(tasks)
        while waiting:
            _, waiting = wait(waiting, timeout=5)
            bar.set_postfix_str(f"{len(tasks) - len(waiting)} of {len(tasks)} models")
        return [str(task.exception()) for task in tasks if task.exception()]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in o.children:
            child.terminate()
        bar.close()
        sys.exit("paper.py: interrupted; the same command goes on from here")
    finally:
        pool.shutdown()
        bar.close()
        os.close(o.locked)


def gather(o, point):
    """What was found of a point: {task, "adapted" (the task adapted on, of the toy's) and "mean" of the others: {"clean",
    "robust", and after each attack in turn: one number a seed}}, and "trained": how many numbers were adapted."""
    runs = [read(o, point, seed)["tasks"] for seed in o.seeds]
    found = {}
    for task in runs[0]:
        rows = [run[task] for run in runs]
        part = found["adapted" if task == o.adapted else task] = {
            kind: np.array([row[kind] for row in rows]) for kind in ("clean", "robust")}
        left = np.array([row["right"] for row in rows], float)
        for attack in ATTACKS:                             # for three classes apgd-dlr stands in for apgd-t
            names = (attack, "apgd-dlr") if attack == "apgd-t" else (attack,)
            left = left - [sum(row["broken_by"].get(name, 0) for name in names) for row in rows]
            part[attack] = 100 * left / [max(1, row["n"]) for row in rows]
    counted = [task for task in found if task != "adapted" and task not in EXTRA]
    found["mean"] = {kind: np.mean([found[task][kind] for task in counted], 0) for kind in found[counted[0]]}
    trained = folder(o, point, o.seeds[0])[0] / "results.json"
    found["trained"] = json.loads(trained.read_text())["trained"] if point.train is not None else 0
    return found


def conditions(o, points):
    """What a section's numbers were made with, in words; warnings of the evaluations."""
    runs = {point: [read(o, point, seed) for seed in o.seeds] for point in points}
    configs = [results["config"] for found in runs.values() for results in found]
    eps = ", ".join(f"{value:g}" for value in sorted({config["eps"] for config in configs}))
    protocol = re.sub(r"ε = [\d.]+", f"ε = {eps}", next(iter(runs.values()))[0]["protocol"])
    warned = [f"{' '.join(filter(None, (point.train or 'CLIP', point.evaluate)))}, seed {seed}, {task}: {text}"
              for point, found in runs.items() for seed, results in zip(o.seeds, found)
              for task, row in results["tasks"].items() for text in row["warnings"]]
    total = sum(len(results["tasks"]) for found in runs.values() for results in found)
    warned = [f"Evaluations of a task that came with a warning: {len(warned)} of {total}" + (
        f", the first: {warned[0]}." if warned else ".")]
    return (f"code {o.version}; {configs[0]['hardware']}, Python {configs[0]['python']}, PyTorch {configs[0]['torch']}. "
            f"{o.model}, adapted on {o.dataset}; {protocol}; {configs[0]['limit'] or 'all'} images a task."), warned


def write_section(o, name, title, lines):
    """Put a section into paper.md in place of the one of that title; sections stand in the order of FIGURES."""
    path = o.out / "paper.md"
    text = path.read_text() if path.exists() else ""
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}
    sections[title] = f"{title}\n\n" + "\n".join(lines) + f"\n\n![{name}]({name}.png)\n\n"
    order = [figure.__doc__ for figure in FIGURES]
    tasks = ("the tasks that were not adapted on, ± standard deviation over seeds. “Own classes”: held-out images of those "
             "adapted on, not in the mean" if o.toy else "the sets evaluated on, with the one adapted on, as in the paper, "
             f"but without {', '.join(EXTRA)}, ± standard deviation over seeds")
    head = f"# The paper's figures and tables: `python paper.py`\n\nZero-shot accuracy in percent, mean over {tasks}.\n\n"
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
                                   "max_steps", "processes") if given[word] != parser.get_default(word)]
    o.toy, o.seeds, o.children = o.model == "toy", list(dict.fromkeys(map(int, o.seeds.split(",")))), []
    if max(o.seeds) >= 2**31:
        parser.error(f"--seeds: expected numbers below {2**31}")
    if o.what in (["precision"], ["attacks"]) and (passed_on or o.out):
        parser.error(f"{o.what[0]} is of the toy alone, and takes no options")
    evaluation = [(word, given[word]) for word in passed_on if word in ("tasks", "limit")]
    training = [(word, given[word]) for word in passed_on if word not in ("tasks", "limit")]
    o.evaluation, of_training = (f"-{zlib.crc32(repr(key).encode()):08x}" if key else "" for key in (evaluation, training))
    o.version = source_version()
    o.runs = ROOT / "out" / "paper" / (o.version + of_training)
    o.jobs = o.jobs or (min(8, os.cpu_count() or 1) if o.toy else 1)
    o.out = Path(o.out or ROOT / "results" / ("" if o.toy else re.sub(r"[^\w.]+", "-", o.model)))
    o.dataset = o.dataset or ("toy" if o.toy else "imagenet")
    # the paper counts ImageNet, which it adapts on, as one of its sixteen sets; the toy's mean is of the others alone
    o.adapted = (TOY_ADAPTED if o.dataset == "toy" else o.dataset.removeprefix("toy:")) if o.toy else None
    # The paper's grid; and the toy's, whose ε is eight times as large and whose 400 classes have 41 images each. `tuned`:
    # the learning rate that suits standard adversarial training best, of 0.05, 0.1 and 0.2 on seed 0's `tune` images.
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
    o.batch, o.epochs = o.batch_size or (128 if o.toy else 256), o.epochs or (2 if o.toy else 10)      # train_tecoa.py's
    try:
        options = {"size": image_size(o.model, o.pretrained), "data_root": o.data_root}
        tasks = [load_task(name, "val", limit=1, **options).name for name in task_names(o.tasks, "toy", o.data_root)
                 ] if o.tasks != "all" else ["all"]
        if set(tasks) <= {o.adapted, *EXTRA}:
            raise ValueError(f"--tasks {o.tasks}: nothing to evaluate but what is adapted on")
        o.train_set = load_task(o.dataset, "train", **options)
        writable_folder(o.out)
        writable_folder(o.runs)
        if o.what == ["precision"]:
            return crosscheck.precision()
        o.locked = lock(o.runs)
        for seed in o.seeds if o.toy and not o.pretrained else ():
            toyworld.pretrained_file(seed)             # before several runs look for it
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if o.what == ["attacks"]:
        errors = compute_all(o, [TECOA])
        return sys.exit(f"paper.py: {errors[0]}") if errors else crosscheck.attacks(folder(o, TECOA, 0)[0] / "ckpt.pt")
    chosen = {figure: figure(o) for figure in FIGURES if figure.__name__ in (o.what or names)}
    rows = {figure: next(run) for figure, run in chosen.items()}
    errors = compute_all(o, [point for points in rows.values() for point in points.values()])
    for figure, run in chosen.items():
        points = rows[figure]
        if any(read(o, point, seed) is None for point in points.values() for seed in o.seeds):
            continue                                   # one of its runs failed
        lines = run.send({label: gather(o, point) for label, point in points.items()})
        command = " ".join(["python paper.py", figure.__name__, *(f"--{word.replace('_', '-')} {given[word]}"
                                                                  for word in ("seeds", *passed_on))])
        said, warned = conditions(o, points.values())
        write_section(o, figure.__name__, figure.__doc__, [f"`{command}`, {said}", "", *lines, "", *warned])
        print("\n".join([f"## {figure.__doc__}", "", *lines, "", *warned]))
    if errors:
        sys.exit("\n".join(f"paper.py: {error}" for error in errors))
    print(f"wrote {o.out}/paper.md and a picture for each figure")


if __name__ == "__main__":
    main()
