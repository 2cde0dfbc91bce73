"""The paper's comparison at toy scale: CLIP, standard adversarial training and TeCoA, over several seeds.

    python paper.py                  # Figure 1 with seeds 0, 1, 2: about half an hour on two CPU cores
    python paper.py --seeds 0        # a third of it

Runs train_tecoa.py for each seed and loss and writes results/fig1.md and results/fig1.png. A seed is everything random:
the toy CLIP's own pretraining, the readout, the order of the images and the attacks' starts. The images evaluated on are
the same for all. What this very code has computed before is read from out/paper/ and not computed again.
"""
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from cli import Parser

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent
# method: (options of train_tecoa.py, colour). The paper trains all losses alike; standard adversarial training is shown at
# the learning rate that suits it best as well (of 0.01, 0.05, 0.1 and 0.2, chosen on seed 0's `tune` images).
METHODS = {"CLIP": (None, "tab:gray"),
           "standard adversarial training": (["--loss", "ce"], "tab:orange"),
           "the same, learning rate 0.1": (["--loss", "ce", "--lr", "0.1"], "moccasin"),
           "TeCoA": (["--loss", "tecoa"], "tab:blue")}


def source_version():
    """A hash of every source that a result depends on."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), ROOT / "toy.json"])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.name != "paper.py")).hexdigest()[:8]


def train(folder, options, seed):
    """Run train_tecoa.py unless folder holds its result; (results before, results after)."""
    if not (folder / "results.json").exists():
        command = [sys.executable, "train_tecoa.py", *options, "--seed", str(seed), "--out", str(folder)]
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"paper.py: {' '.join(command[1:])} failed")
    return [json.loads((folder / name).read_text()) for name in ("results_before.json", "results.json")]


def main():
    parser = Parser(prog="paper.py", description=__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="a comma list (default: %(default)s)")
    args = parser.parse_args()
    if not all(word.isdigit() for word in args.seeds.split(",")):
        parser.error(f"--seeds {args.seeds}: expected a comma list of whole numbers")
    seeds = list(map(int, args.seeds.split(",")))
    runs = {method: [] for method in METHODS}                              # one result a seed
    base = ROOT / "out" / "paper" / source_version()
    jobs = [(seed, method, options) for seed in seeds for method, (options, _) in METHODS.items() if options]
    for seed, method, options in tqdm(jobs, desc="paper", unit="run"):
        before, after = train(base / f"{'-'.join(options).replace('--', '')}-seed{seed}", options, seed)
        runs[method].append(after)
        if method == "TeCoA":
            runs["CLIP"].append(before)
    config = runs["TeCoA"][0]["config"]
    tasks = list(runs["CLIP"][0]["tasks"])

    def accuracy(method, task, kind):                                      # one number a seed
        return np.array([(r["mean"] if task == "mean" else r["tasks"][task])[kind] for r in runs[method]])

    lines = [f"# Figure 1 at toy scale: zero-shot accuracy (%), mean ± standard deviation over seeds {args.seeds}", "",
             f"`python paper.py --seeds {args.seeds}`, code {source_version()}; {config['hardware']}, "
             f"Python {platform.python_version()}, PyTorch {torch.__version__}. PGD-{config['eval_steps']} at linf ε = "
             f"{config['eps']:g}/255, steps of ε/4, one random start. `seen` is the task adapted on, not in the mean.", "",
             "| task | chance | " + " | ".join(f"{m}: clean | {m}: robust" for m in METHODS) + " |",
             "|---|--:|" + "--:|" * 2 * len(METHODS)]
    for task in [*tasks, "mean"]:
        chances = {name: row["chance"] for name, row in runs["CLIP"][0]["tasks"].items()}
        chance = chances.get(task, np.mean(list(chances.values())))
        cells = [f"{a.mean():.1f} ± {a.std(ddof=1):.1f}" if len(a) > 1 else f"{a[0]:.1f}"
                 for m in METHODS for a in (accuracy(m, task, "clean"), accuracy(m, task, "robust"))]
        lines.append(f"| {task} | {chance:.1f} | " + " | ".join(cells) + " |")
    adapted = [f"{np.mean([r['adapted']['seen'][k] for r in runs[m]]):.1f}" for m in METHODS for k in ("clean", "robust")]
    chance = runs["TeCoA"][0]["adapted"]["seen"]["chance"]
    lines.append(f"| seen (adapted on) | {chance:.1f} | " + " | ".join(adapted) + " |")
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "fig1.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    for axis, kind in zip(axes, ("clean", "robust")):
        for m, (method, (_, colour)) in enumerate(METHODS.items()):
            values = [accuracy(method, task, kind) for task in [*tasks, "mean"]]
            at = np.arange(len(values)) + (np.arange(len(values)) == len(tasks)) * .4 + (m - 1.5) * .21
            axis.bar(at, [v.mean() for v in values], .19, color=colour, label=method,
                     yerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in values], error_kw={"elinewidth": 1})
        axis.set(ylim=(0, 100), ylabel="clean accuracy (%)" if kind == "clean" else f"robust at {config['eps']:g}/255 (%)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=4, frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1))
    axes[1].set_xticks([*range(len(tasks)), len(tasks) + .4], [*tasks, "mean"])
    figure.savefig(ROOT / "results" / "fig1.png", dpi=110)
    shutil.copy(base / f"loss-tecoa-seed{seeds[0]}" / "examples.png", ROOT / "results" / "examples.png")
    print("\nwrote results/fig1.md, fig1.png and examples.png")


if __name__ == "__main__":
    main()
