"""The paper's comparison at toy scale: CLIP, standard adversarial training and TeCoA, over several seeds.

    python paper.py                  # Figure 1 with seeds 0, 1, 2: about half an hour on two CPU cores
    python paper.py --seeds 0        # a third of it
    python paper.py precision        # what attacks find in fp32, bf16 and fp16: some ten minutes, most of them fp16's
    python paper.py attacks          # the attacks against each other and against another implementation: five minutes

Figure 1 runs train_tecoa.py for each seed and loss and writes results/fig1.md and results/fig1.png. A seed is everything
random: the toy CLIP's own pretraining, the readout, the order of the images and the attacks' starts. The images evaluated
on are the same for all. What this very code has computed before is read from out/paper/ and not computed again.
"""
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from adversary import AUTOATTACK, run_attacks
from attacks import image_keys, pgd
from checkpoints import load_visual, read_checkpoint
from cli import DTYPES, Parser, source_version
from data import load_task, task_names
from kernels.contrastive_loss import contrast, contrastive_log_odds, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, load_clip
from prompts import encode_head

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent
# method: (options of train_tecoa.py, colour). The paper trains all losses alike; standard adversarial training is shown at
# the learning rate that suits it best as well (of 0.01, 0.05, 0.1 and 0.2, chosen on seed 0's `tune` images).
METHODS = {"CLIP": (None, "tab:gray"),
           "standard adversarial training": (["--loss", "ce"], "tab:orange"),
           "the same, learning rate 0.1": (["--loss", "ce", "--lr", "0.1"], "moccasin"),
           "TeCoA": (["--loss", "tecoa"], "tab:blue")}


def train(folder, options, seed):
    """Run train_tecoa.py unless folder holds its result; (results before, results after)."""
    if not (folder / "results.json").exists():
        command = [sys.executable, "train_tecoa.py", *options, "--seed", str(seed), "--out", str(folder)]
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"paper.py: {' '.join(command[1:])} failed")
    return [json.loads((folder / name).read_text()) for name in ("results_before.json", "results.json")]


def precision(limit=100):
    """Write results/precision.md: PGD-10 on the plain toy CLIP (seed 0), its gradients computed in three precisions at
    three logit scales, following the log-odds or the cross-entropy. Whether it broke an image is judged in fp32."""
    clip, tokenizer = load_clip("toy", "seed0")
    tasks = [load_task(name, "val", limit=limit) for name in task_names("all", "toy")]
    heads = [encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks]
    judge, scales = ImageEncoder(clip), (20, 100, 1000)
    losses = {"log-odds": contrastive_log_odds,
              "cross-entropy": lambda z, head, y, scale: F.cross_entropy(cosine_logits(z, head, scale), y, reduction="none")}

    def attacked(name, loss, scale):
        """Whether each image is classified rightly clean, and attacked as well [2, N]; and whether its gradient is 0 [N]."""
        encoder, fates, zeros = ImageEncoder(clip, DTYPES[name]), [], []
        for task, head in zip(tasks, heads):
            x, y, index = torch.utils.data.default_collate(list(task.images))
            x = to_float(x)

            def loss_fn(x, y, head=head):
                return losses[loss](encoder(x), head, y, scale)
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss_fn(leaf, y).sum(), leaf)
            zeros.append((grad == 0).flatten(1).all(1))
            x_adv = pgd(loss_fn, x, y, eps=8 / 255, steps=10, step_size=2 / 255, keys=image_keys(0, 0, index))
            with torch.no_grad():
                clean, adversarial = (contrast(judge(images), head, y, 1.)[1] == y for images in (x, x_adv))
            fates.append(torch.stack([clean, clean & adversarial]))
        return torch.cat(fates, 1), torch.cat(zeros)

    settings = [(name, loss, scale) for name in DTYPES for loss in losses for scale in scales]
    found = {setting: attacked(*setting) for setting in tqdm(settings, desc="precision", unit="attack")}
    usual, _ = found["fp32", "log-odds", 100]
    lines = ["# What PGD-10 finds, by precision, objective and logit scale", "",
             f"`python paper.py precision`, toy CLIP seed 0, {usual.shape[1]} images of {len(tasks)} tasks, linf ε = 8/255, "
             f"PyTorch {torch.__version__}. Clean accuracy {100 * usual[0].float().mean():.1f} %. Robust accuracy (%), "
             "judged in fp32; in brackets the images (%) whose fate is the one that they have under the log-odds in fp32 at "
             "scale 100, and those (%) whose gradient is exactly zero in every pixel.", "",
             "| blocks in | attack follows | " + " | ".join(f"scale {scale}" for scale in scales) + " |",
             "|---|---|--:|--:|--:|"]
    for name in DTYPES:
        for loss in losses:
            cells = []
            for scale in scales:
                fates, zeros = found[name, loss, scale]
                robust, same = fates[1].float().mean(), (fates[1] == usual[1]).float().mean()
                cells.append(f"{100 * robust:.1f} ({100 * same:.1f}, {100 * zeros.float().mean():.1f})")
            lines.append(f"| {name} | {loss} | " + " | ".join(cells) + " |")
    (ROOT / "results" / "precision.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + "\n\nwrote results/precision.md")


class Logits(torch.nn.Module):
    """x [B,3,H,W] → logits [B,K]: what other people's attacks take."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return cosine_logits(self.encoder(x), self.head, 100.)


def attacks(limit=100, steps=50, queries=500):
    """Write results/attacks.md: what each attack leaves of the plain toy CLIP and of TeCoA's (seed 0); and what those of
    torchattacks leave, a port of the original AutoAttack code, if it is there (pip install --no-deps torchattacks)."""
    try:
        import torchattacks
    except ImportError:
        torchattacks = None
    folder = ROOT / "out" / "paper" / source_version() / "loss-tecoa-seed0"
    train(folder, ["--loss", "tecoa"], 0)
    rows = [(f"PGD-{steps}, last iterate", ["pgd"], ("PGD", {"alpha": 2 / 255, "steps": steps})),      # ours, and theirs
            (f"PGD-{steps}", ["pgd"], None), (f"CW-{steps}", ["cw"], None),
            (f"APGD-CE-{steps}", ["apgd-ce"], ("APGD", {"loss": "ce", "steps": steps})),
            (f"APGD-DLR-{steps}", ["apgd-dlr"], ("APGD", {"loss": "dlr", "steps": steps})),
            (f"APGD-T-{steps}", ["apgd-t"], ("APGDT", {"steps": steps})),
            (f"Square-{queries}", ["square"], ("Square", {"n_queries": queries})),
            (f"APGD-CE-{steps}, APGD-T-{steps}, Square-{queries} in turn", list(AUTOATTACK), None),
            (f"what these leave, under FAB-T-{steps}", None, ("FAB", {"steps": steps, "multi_targeted": True}))]
    counts, total = {}, 0
    with tqdm(total=2 * 3 * len(rows), desc="attacks", unit="attack") as bar:
        for model in ("CLIP", "TeCoA"):
            clip, tokenizer = load_clip("toy", "seed0")
            if model == "TeCoA":
                load_visual(clip, read_checkpoint(folder / "ckpt.pt"), folder)
            encoder = ImageEncoder(clip)
            for task in [load_task(name, "val", limit=limit) for name in ("unseen", "digits", "textures")]:
                head = encode_head(clip, tokenizer, task.class_names, task.template)
                logits = Logits(encoder, head).eval()
                x, y, index = torch.utils.data.default_collate(list(task.images))
                total += len(y) / 2
                right = logits(to_float(x)).argmax(1) == y
                x, y, index = to_float(x[right]), y[right], index[right]
                for label, ours, theirs in rows:
                    count = counts.setdefault((label, model), {"ours": 0, "theirs": 0, "passes": 0})
                    if ours:
                        _, _, by, _, passes, *_ = run_attacks(
                            encoder, head, 100., x, y, index, names=ours, eps=8, steps=steps, step_size=2, norm="linf",
                            queries=queries, last_iterate="last" in label)
                        count["ours"] += int((by < 0).sum())
                        count["passes"] += int(passes.sum())
                    else:                                                  # after all of ours
                        x, y = x[by < 0], y[by < 0]
                    if torchattacks and theirs and len(y):
                        kind, options = theirs
                        options = options | ({"n_classes": min(10, len(head))} if kind in ("APGDT", "FAB") else {})
                        found = getattr(torchattacks, kind)(logits, eps=8 / 255, **options)(x, y)
                        inside = ((found - x).abs() <= 8 / 255 + 1e-6).flatten(1).all(1)
                        count["theirs"] += int(((logits(found).argmax(1) == y) | ~inside).sum())
                    bar.update()
    lines = ["# Attacks on the plain toy CLIP and on TeCoA's: robust accuracy (%)", "",
             f"`python paper.py attacks`, code {source_version()}, seed 0; {total:.0f} images of unseen, digits and "
             f"textures, linf ε = 8/255, PyTorch {torch.__version__}. Theirs: torchattacks "
             f"{torchattacks.__version__ if torchattacks else '(not installed)'}, same images, steps, queries and restarts "
             "(one), other random starts. Passes: ours through the model, for each image.", "",
             "| attack | CLIP: ours | theirs | passes | TeCoA: ours | theirs | passes |", "|---|" + "--:|" * 6]
    for label, ours, theirs in rows:
        cells = []
        for model in ("CLIP", "TeCoA"):
            count = {who: n / total for who, n in counts[label, model].items()}
            cells += [f"{100 * count['ours']:.1f}" if ours else "", f"{100 * count['theirs']:.1f}" if theirs and torchattacks
                      else "", f"{count['passes']:.1f}" if ours else ""]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (ROOT / "results" / "attacks.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + "\n\nwrote results/attacks.md")


def figure1(args):
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
             f"{config['eps']:g}/255, steps of ε/4, one random start, any iterate. `seen` is the task adapted on, not in "
             "the mean.", "",
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


def main():
    parser = Parser(prog="paper.py", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("fig1", "precision", "attacks"), default="fig1",
                        help="(default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of fig1, a comma list (default: %(default)s)")
    args = parser.parse_args()
    if not all(word.isdigit() for word in args.seeds.split(",")):
        parser.error(f"--seeds {args.seeds}: expected a comma list of whole numbers")
    if args.what == "fig1":
        figure1(args)
    else:
        {"precision": precision, "attacks": attacks}[args.what]()


if __name__ == "__main__":
    main()
