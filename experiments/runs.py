"""The runs that the figures are made of, for `paper.py`: which are needed, and which are there already.

A number is one run of train_tecoa.py and one of eval_zeroshot.py. Both stay in out/paper/<version of the
sources>/, and what is there is not computed again. A seed is everything random: the toy CLIP's own
pretraining, linear heads, prompts, the order of the images and the attacks' starts; the images evaluated on
are the same for all."""
import argparse
import os
import re
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from experiments import crosscheck, whole_numbers
from experiments.figures import ATTACKS, BOTH, FIGURES, PAPER, TECOA, TOY, Grid
from harness import processes
from harness.evaluation import lock
from harness.files import ROOT, read_json, source_version, writable_folder
from harness.options import ByModel, Parser, number
from model import image_size, own_resize
from tasks.benchmarks import counts
from tasks.protocols import DEFAULT
from tasks.task import TOY_ADAPTED, Task, load_task, task_names

NAMES = [figure.__name__ for figure in FIGURES]
ALONE = ["precision"], ["attacks"]        # crosscheck.py's


def plain(words):
    """Words as a part of a folder's name."""
    return re.sub(r"[^\w.]+", "-", words)


def crc32(value):
    return f"{zlib.crc32(repr(value).encode()):08x}"


def spelled(args, *names):
    """Options as on a command line; those that are None are left out."""
    return [word for name in names if getattr(args, name) is not None
            for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


class Plan(NamedTuple):
    """What one command computes; the figures take the first five."""
    args: argparse.Namespace  # its options, none of them open
    grid: Grid
    out: Path                 # for paper.md and the pictures
    train_set: Task
    robust_at: str            # the usual ε, in words
    adapted: str | None       # the toy's task that is adapted on and does not count; None: all count
    evaluate_options: list    # of eval_zeroshot.py, for every point
    version: str              # of the sources
    runs: Path                # the folder of all runs

    def run_folder(self, seed, train):
        """Where a training is; train: its options, None for CLIP as it is."""
        return self.runs / f"{plain((train or 'clip').strip(' -'))}-seed{seed}"

    def evaluation_folder(self, seed, point):
        name = plain(f"eval-{point.evaluate}-{crc32(self.evaluate_options)}")
        return self.run_folder(seed, point.train) / name

    def untrained(self, seed, train):
        return train is not None and not (self.run_folder(seed, train) / "results.json").exists()

    def read(self, seed, point):
        """An evaluation's results; None if they are not there, or not yet all."""
        results = read_json(self.evaluation_folder(seed, point) / "results.json")
        return results if results and "unfinished" not in results else None


# ---------------------------------------------------------------------------------------- the runs
class Children:
    """The processes of the runs, which an interrupt ends, those too that start just then."""

    def __init__(self):
        self.lock, self.started, self.stopped = threading.Lock(), [], False

    def start(self, *words, **more):
        with self.lock:
            if self.stopped:
                raise RuntimeError("interrupted")
            self.started.append(subprocess.Popen(*words, **more))
            return self.started[-1]

    def stop(self):
        with self.lock:
            self.stopped = True
            for child in self.started:
                child.terminate()


def call(plan, script, words, log, children):
    """Run a script; its output goes to the file log. RuntimeError, in one line, if it fails."""
    if source_version() != plan.version:
        raise RuntimeError(f"{script}: the sources have changed since this command began")
    start, environment = [sys.executable], os.environ | {"PYTHONUNBUFFERED": "1"}
    if plan.args.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={plan.args.processes}"]
    if plan.args.model == "toy":    # then the numbers depend neither on --jobs nor on the number of cores
        environment["OMP_NUM_THREADS"] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        start += [str(ROOT / script), *words]
        child = children.start(start, stdout=file, stderr=file, env=environment)
    if child.wait():
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace"))
        said = [f"status {child.returncode}", *(line for line in lines if re.search(r"\w", line))]
        last = [*said, *(line for line in said if line.startswith(script))][-1]
        raise RuntimeError(f"{script} {' '.join(words)}: {last}; see {log}")


def compute(plan, seed, train, points, children, advance):
    """One model, unless it is there, and its evaluations; advance() after each."""
    args, base = plan.args, plan.run_folder(seed, train)
    model, seeded = spelled(args, "model", "pretrained"), ["--seed", str(seed)]
    if plan.untrained(seed, train):
        options = spelled(args, "dataset", "data_root", "epochs", "batch_size", "max_steps")
        call(plan, "train_tecoa.py", ["--tasks", "none", "--out", str(base), *seeded, *model, *options,
                                      *train.split(), "--resume"], base / "train.log", children)
        advance()
    if train is not None:
        model = ["--ckpt", str(base / "ckpt.pt")]
    for point in points:
        out = plan.evaluation_folder(seed, point)
        call(plan, "eval_zeroshot.py", [*model, *seeded, "--out", str(out), *plan.evaluate_options,
                                        *point.evaluate.split()], out / "log", children)
        advance()


def compute_all(plan, seeds, points):
    """Every point for every seed, --jobs at a time; the errors, in one line each, of those that failed."""
    left, children = {}, Children()
    for seed in seeds:
        for point in dict.fromkeys(points):
            left.setdefault((seed, point.train), []).extend([] if plan.read(seed, point) else [point])
    left = {model: points for model, points in left.items() if points or plan.untrained(*model)}
    total = sum(plan.untrained(*model) + len(points) for model, points in left.items())
    bar, pool = tqdm(total=total, desc="paper", unit="run", smoothing=0), ThreadPoolExecutor(plan.args.jobs)
    try:
        tasks = [pool.submit(compute, plan, *model, points, children, bar.update)
                 for model, points in left.items()]
        # now and then it looks up: a signal that comes just before a wait begins does not end it
        while wait(tasks, timeout=1).not_done:
            bar.refresh()
        return [str(task.exception()) for task in tasks if task.exception()]
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        children.stop()
        bar.close()
        sys.exit("paper.py: interrupted; the same command goes on from here")
    finally:
        pool.shutdown()
        bar.close()


# ---------------------------------------------------------------------------------------- what they found
def gather(plan, point):
    """What was found of a point, {task: {"clean", "robust" and after each attack: one number a seed}}; nan:
    no image of it could be read. Of the toy, the task adapted on is "adapted"; "mean" is of the others that
    have numbers. No tasks: "trained", how many parameters trained, and "updates", in how many steps."""
    runs, found = [plan.read(seed, point)["tasks"] for seed in plan.args.seeds], {}
    for task in runs[0]:
        rows = [run[task] for run in runs]
        part = {kind: np.array([row[kind] for row in rows], float) for kind in BOTH}
        left = np.array([row["right"] for row in rows], float)
        for attack in ATTACKS:      # for three classes apgd-dlr stands in for apgd-t
            names = (attack, "apgd-dlr") if attack == "apgd-t" else (attack,)
            left = left - [sum(row["broken_by"].get(name, 0) for name in names) for row in rows]
            part[attack] = 100 * left / [row["n"] or np.nan for row in rows]
        found["adapted" if task == plan.adapted else task] = part
    counted = [part for task, part in found.items() if task != "adapted" and counts(DEFAULT, task)]
    readable = [part for part in counted if not np.isnan(part["clean"]).any()] or counted
    found["mean"] = {kind: np.mean([part[kind] for part in readable], 0) for kind in counted[0]}
    trained = {"trained": 0, "step": 0}
    if point.train is not None:
        trained = read_json(plan.run_folder(plan.args.seeds[0], point.train) / "results.json")
    return found | {"trained": trained["trained"], "updates": trained["step"]}


def conditions(plan, points):
    """In words: what a section's numbers were made with; how many evaluations came with a warning."""
    args = plan.args
    runs = {(point, seed): plan.read(seed, point) for point in points for seed in args.seeds}
    first, *_ = runs.values()
    protocol = first["protocol"]
    for word, name in (("ε =", "eps"), ("steps of", "step_size")):
        values = {run["config"][name] for run in runs.values() if name in run["config"]}
        values = ", ".join(f"{value:g}" for value in sorted(values))
        protocol = re.sub(rf"{word} [\d.]+", f"{word} {values}", protocol)
    made = ("code {}; {hardware}, Python {python}, PyTorch {torch}. ".format(plan.version, **first["config"])
            + f"{args.model}, adapted on {args.dataset}; {protocol}; {first['config']['limit'] or 'all'} "
            "images a task.")
    warned = [f"{point.train or 'CLIP'} {point.evaluate}".strip() + f", seed {seed}, {task}: {text}"
              for (point, seed), run in runs.items() for task, row in run["tasks"].items()
              for text in row["warnings"]]
    total = sum(len(run["tasks"]) for run in runs.values())
    return made, (f"Evaluations of a task that came with a warning: {len(warned)} of {total}"
                  + "".join(f", the first: {text}" for text in warned[:1]) + ".")


def draw(plan, figure, points, run, command):
    """Send what was found of a figure's points to its generator, which draws; print its section, and put it
    into paper.md, in place of an older one, in the order of FIGURES."""
    table = run.send({label: gather(plan, point) for label, point in points.items()})
    made, warned = conditions(plan, points.values())
    path, title, name = plan.out / "paper.md", figure.__doc__, figure.__name__
    text = path.read_text() if path.exists() else ""
    sections = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}
    sections[title] = f"{title}\n\n`{command}`, {made}\n\n{table}\n\n{warned}\n\n![{name}]({name}.png)\n\n"
    spread = "± standard deviation over seeds"
    tasks = (f"the tasks that were not adapted on, {spread}. “Own classes”: held-out images of those adapted "
             "on, not in the mean" if plan.args.model == "toy" else "the sets evaluated on, with the one "
             f"adapted on, as in the paper, those of its sixteen, {spread}")
    head = ("# The paper's figures and tables: `python paper.py`\n\nZero-shot accuracy in percent, mean over "
            f"{tasks}.\n\n")
    order = [figure.__doc__ for figure in FIGURES if figure.__doc__ in sections]
    path.write_text(head + "".join(f"## {sections[title]}" for title in order).rstrip() + "\n")
    print(f"## {title}\n\n{table}\n\n{warned}")


# ---------------------------------------------------------------------------------------- the command
def make_parser(description):
    parser = Parser(prog="paper.py", description=description)
    option = partial(parser.option, parser, result=False)
    option("what", nargs="*", help=f"{', '.join(NAMES)}; or precision, attacks, which stand alone (default: "
           "every figure)")
    option("--seeds", "0,1,2", type=whole_numbers(0), help="a comma list")
    option("--jobs", lambda args: min(8, os.cpu_count() or 1) if args.model == "toy" else 1,
           type=number(int, 1), help="runs at a time (default: toy: one a core, at most 8; else 1)")
    option("--out", metavar="DIR", help="folder for paper.md and the pictures (default: results, or "
           "results/<model> for another than the toy)")
    option = partial(parser.option, parser.add_argument_group("passed on to the stages, with their defaults"))
    option("--model", "toy", help="")
    option("--pretrained", path=True, help="an open_clip tag or file (default: toy: of the seed)")
    option("--dataset", lambda args: "toy" if args.model == "toy" else "imagenet",
           help="to adapt on (default: toy, or imagenet)")
    option("--data-root", metavar="DIR", help="the folder with the data sets")
    option("--tasks", "all", help="to evaluate on")
    option("--limit", lambda args: 200 if args.model == "toy" else None, type=number(int, 1), metavar="N",
           help="images of each task (default: toy: 200; else all)")
    option("--epochs", ByModel(10, 2), type=number(int, 1), help="of each training")
    option("--batch-size", ByModel(256, 64), type=number(int, 1), help="in training")
    option("--max-steps", type=number(int, 1), metavar="N", help="stop each training after N steps")
    option("--processes", 1, type=number(int, 1), help="of torchrun, for each run")
    return parser


def make_plan(parser, args):
    """The Plan of a command line. ValueError: its model, data or tasks are not there."""
    grid, adapted, tasks, folder = PAPER, None, args.tasks, plain(args.model)
    if args.model == "toy":
        # the paper counts ImageNet, which it adapts on; the toy's mean is of the other tasks alone
        grid, adapted = TOY, TOY_ADAPTED if args.dataset == "toy" else args.dataset.removeprefix("toy:")
        tasks = ",".join([*task_names("all", "toy"), TOY_ADAPTED]) if tasks == "all" else tasks
        folder = ""
    where = {"size": image_size(args.model, args.pretrained), "data_root": args.data_root,
             "resize": own_resize(args.model, args.pretrained)}
    if tasks != "all":
        names = {load_task(name, "val", limit=1, **where).name
                 for name in task_names(tasks, "toy", args.data_root)}
        if not any(name != adapted and counts(DEFAULT, name) for name in names):
            raise ValueError(f"--tasks {tasks}: nothing to evaluate but what is adapted on")
    version, identity = source_version(), parser.identity(args)
    training = [(word, identity[word]) for word in parser.unusual(args) if word not in ("tasks", "limit")]
    return Plan(args, grid, Path(args.out or ROOT / "results" / folder),
                load_task(args.dataset, "train", **where), f"at {grid.usual_eps:g}/255", adapted,
                ["--tasks", tasks, *spelled(args, "data_root", "limit"), "--steps", str(grid.steps)], version,
                ROOT / "out" / "paper" / (version + f"-{crc32(training)}" * bool(training)))


def main(description=None):
    processes.begin()
    parser = make_parser(description)
    with parser.refusing():
        args = parser.settle(parser.parse_args())
        alone = args.what in ALONE
        if unknown := [word for word in args.what if word not in NAMES and not alone]:
            raise ValueError(f"{unknown[0]}: expected some of {', '.join(NAMES)}; or precision or attacks "
                             "alone")
        if alone and (parser.unusual(args) or args.out):
            raise ValueError(f"{args.what[0]} is of the toy alone, and takes no options")
    seeds = [0] if alone else args.seeds
    with parser.refusing():
        plan = make_plan(parser, args)
        writable_folder(plan.out)
        writable_folder(plan.runs)
        locked = lock(plan.runs)
        from toy import pretrain                    # here, as it imports open_clip, which takes seconds
        for seed in seeds if args.model == "toy" and not args.pretrained else ():
            pretrain.pretrained_file(seed)          # before several runs look for it
    drawing = {figure: figure(plan) for figure in FIGURES if figure.__name__ in (args.what or NAMES)}
    points = {figure: next(run) for figure, run in drawing.items()}
    try:
        needed = [point for rows in points.values() for point in rows.values()]
        errors = compute_all(plan, seeds, needed or [TECOA])
    finally:
        os.close(locked)
    if alone and not errors:
        return getattr(crosscheck, args.what[0])(plan.run_folder(0, TECOA.train) / "ckpt.pt")
    options = " ".join(["--seeds", ",".join(map(str, args.seeds)), *spelled(args, *parser.unusual(args))])
    for figure, run in drawing.items():             # without those of which a run failed
        if all(plan.read(seed, point) for point in points[figure].values() for seed in args.seeds):
            draw(plan, figure, points[figure], run, f"python paper.py {figure.__name__} {options}")
    if errors:
        sys.exit("\n".join(f"paper.py: {error}" for error in errors))
    print(f"wrote {plan.out}/paper.md and a picture for each figure")
