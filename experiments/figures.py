"""The paper's figures and tables: which runs each is made of, and how it is drawn. runs.py makes the runs.

A method has one colour in every figure; prompts are hatched, or hollow points. A value is an array with one
number a seed: what is drawn is the mean, and the standard deviation over seeds where there are several."""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.reports import in_pipes, write_figure
from losses import LOSSES
from tasks.sampling import labels_of

COLOURS = {"CLIP": "tab:gray", "tecoa": "tab:blue", "ce": "tab:orange", "ce, tuned": "moccasin",
           "coadv": "tab:red", "imgcoadv": "tab:purple", "fare": "tab:green", "pmg": "tab:brown",
           "agft": "tab:pink", "tga": "tab:cyan"}
OTHER_COLOUR = "tab:olive"
PROMPTS = " --adapt image-prompt,token-prompt"
ATTACKS = {"pgd": "PGD", "cw": "CW", "apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "square": "Square"}
BOTH = "clean", "robust"


ATTACK_STEPS = {1: "lightskyblue", 2: COLOURS["tecoa"], 5: "mediumblue", 10: "midnightblue"}   # of training


class Point(NamedTuple):
    """One model under one evaluation."""
    train: str | None         # options of train_tecoa.py; None: CLIP as it is
    evaluate: str = ""        # options of eval_zeroshot.py


class Grid(NamedTuple):
    """What the figures vary, for one kind of model."""
    eps: tuple                # in 1/255, as on a command line
    usual_eps: float          # the stages' default
    shots: tuple              # images of each class
    blocks: tuple             # the last ones of the image encoder
    tokens: tuple             # of the token prompt
    tuned_lr: float | None    # best of standard adversarial training; None: not looked for
    few: int                  # images of each task under the stronger attacks
    steps: int                # of PGD, in evaluation


CLIP, TECOA, TECOA_PROMPTS = Point(None), Point("--loss tecoa"), Point("--loss tecoa" + PROMPTS)
BORDER = Point("--loss tecoa --adapt image-prompt")
PAPER = Grid(eps=(1, 2, 4), usual_eps=1, shots=(1, 5, 50), blocks=(1, 2, 6), tokens=(5, 100, 200),
             tuned_lr=None, few=1000, steps=100)
# 400 classes of 41 images; tuned_lr is the best of 0.014, 0.05 and 0.1 on seed 0's `tune` images
TOY = Grid(eps=(6, 11, 16), usual_eps=11, shots=(1, 5, 20), blocks=(1, 2), tokens=(5, 20), tuned_lr=.05,
           few=40, steps=40)


# ---------------------------------------------------------------------------------------------- drawing
def spread(values):
    """Standard deviation over seeds; 0 with one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.


def means_and_spreads(points):
    return [np.mean(values) for values in points], [spread(values) for values in points]


def panels(plan, name, width, draw, *, label_x="", kinds=BOTH, robust_at=None, clip=None):
    """Write <name>.png, or name if it has an ending: a panel for each kind of accuracy, in percent, one above
    the other; draw(axis, kind) draws in it. clip: {kind: values} of CLIP as it is, a line across."""
    from matplotlib.figure import Figure                # here, as it takes long to import
    figure = Figure(figsize=(width, .7 + 2.1 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    names = {"clean": "clean accuracy (%)", "robust": f"robust {robust_at or plan.robust_at} (%)"}
    for axis, kind in zip(axes, kinds):
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, kind)
        if clip:
            axis.axhline(np.mean(clip[kind]), color=COLOURS["CLIP"], ls="--", linewidth=1, label="CLIP")
        axis.set(ylabel=names[kind], ylim=(0, 100 if kind == "clean" else None))
    axes[-1].set_xlabel(label_x)
    _, labels = axes[0].get_legend_handles_labels()
    legend = axes[0].legend(ncols=len(labels) if len("".join(labels)) < 10 * width else 2, frameon=False,
                            fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_figure(figure, plan.out / (name if Path(name).suffix else f"{name}.png"))


def bars(plan, name, categories, series, **more):
    """Bars, a group for each category. series: [(label, colour or one a category, hatch, {kind: [values of
    each]})]; more: of `panels`."""
    width, middle = min(.45, .82 / len(series)), (len(series) - 1) / 2

    def draw(axis, kind):
        for s, (label, colour, hatch, values) in enumerate(series):
            heights, errors = means_and_spreads(values[kind])
            axis.bar(np.arange(len(categories)) + (s - middle) * width, heights, .92 * width, label=label,
                     yerr=errors, error_kw={"elinewidth": 1}, color=colour, hatch=hatch,
                     edgecolor="white" if hatch else None)
        axis.set_xticks(range(len(categories)), categories, parse_math=False)
    group = .62 * max(1.3, .45 * len(series))
    panels(plan, name, max(5.5, group * len(categories) + 1.5), draw, **more)


def lines(plan, name, label_x, series, *, log=False, ticks=None, width=5.5, **more):
    """Lines over a quantity. series: [(label, colour, style, xs, {kind: [values of each x]})]; ticks: {x: its
    label}; width: in inches; more: of `panels`."""
    def draw(axis, kind):
        for label, colour, style, xs, values in series:
            axis.errorbar(xs, *means_and_spreads(values[kind]), color=colour, linestyle=style, marker="o",
                          markersize=4, elinewidth=1, label=label,
                          markerfacecolor="white" if style == "none" else colour)
        if log:
            axis.set_xscale("log")
        if ticks:
            axis.set_xticks([*ticks], [*ticks.values()])
            axis.minorticks_off()
    panels(plan, name, width, draw, label_x=label_x, **more)


# ---------------------------------------------------------------------------------------------- tables
def markdown(header, rows):
    return in_pipes([header, ["---", *["--:"] * (len(header) - 1)], *rows])


def cells(part, kinds=BOTH):
    """Of each kind the mean over seeds, and the standard deviation if there are several; "–" for nan."""
    return ["–" if np.isnan(part[kind]).any() else f"{part[kind].mean():.1f}"
            + (f" ± {spread(part[kind]):.1f}" if len(part[kind]) > 1 else "") for kind in kinds]


def table(found, column=()):
    """A row for each label: clean and robust accuracy, mean over the zero-shot tasks; then of the classes
    adapted on. column: (its name, {label: text}), put before these."""
    adapted = ["adapted"] * all("adapted" in part for part in found.values())
    head = ["", *column[:1], *BOTH, *["own classes: clean", "robust"] * len(adapted)]
    return markdown(head, [
        [label, *(texts.get(label, "") for texts in column[1:]),
         *(text for task in ("mean", *adapted) for text in cells(part[task]))]
        for label, part in found.items()])


def trainable(found):
    """A column for `table`: how many parameters trained."""
    return "trainable parameters", {name: f"{found[name]['trained']:,}" for name in found if name != "CLIP"}


def accuracies(parts):
    """{kind: [values of each part]}, mean over the zero-shot tasks, as `bars` and `lines` want them."""
    return {kind: [part["mean"][kind] for part in parts] for kind in BOTH}


# ---------------------------------------------------------------------------------------------- the figures
# A figure is a generator. It yields its rows, {label: Point}; it is sent what was found, {label: {task or
# "mean": {kind: one number a seed}}}, see runs.gather; it draws, and yields a table. Its title is its
# docstring. plan: a runs.Plan.
def tuned_ce(grid):
    """Standard adversarial training with the learning rate that suits it best, where that is known."""
    return Point(f"--loss ce --lr {grid.tuned_lr}" if grid.tuned_lr else "--loss ce")


def bars_of_tecoa(plan, name, rows, hatch="", column=lambda found: ()):
    """A figure of rows of TeCoA: a bar for each, and a line across for CLIP."""
    found = yield {"CLIP": CLIP} | rows
    values = accuracies([found[label] for label in rows])
    bars(plan, name, [*rows], [("TeCoA", COLOURS["tecoa"], hatch, values)], clip=found["CLIP"]["mean"])
    yield table(found, column(found))


def fig1(plan):
    """Figure 1: clean and robust accuracy, task by task"""
    rows = {"CLIP": CLIP, "standard adversarial training": Point("--loss ce"),
            "the same, its best learning rate": tuned_ce(plan.grid), "TeCoA, visual prompts": TECOA_PROMPTS,
            "TeCoA": TECOA}
    colours = dict(zip(rows, ("CLIP", "ce", "ce, tuned", "tecoa", "tecoa")))
    if plan.grid.tuned_lr is None:
        del rows["the same, its best learning rate"]
    found = yield rows
    tasks = [task for task, part in found["CLIP"].items()
             if isinstance(part, dict) and task not in ("adapted", "mean")]
    bars(plan, "fig1", [*tasks, "mean"], [
        (label, COLOURS[colours[label]], "//" * ("prompts" in label),
         {kind: [part[task][kind] for task in (*tasks, "mean")] for kind in BOTH})
        for label, part in found.items()])
    header = ["task", *(text for label in rows for text in (f"{label}: clean", "robust"))]
    yield table(found) + "\n\n" + markdown(header, [
        [task, *(text for part in found.values() for text in cells(part[task]))] for task in tasks])


def losses(plan):
    """Losses, each with finetuning and with visual prompts"""
    found = yield {"CLIP": CLIP} | {f"{loss}, {way}": Point(f"--loss {loss}{words}") for loss in LOSSES
                                    for way, words in (("finetuned", ""), ("prompts", PROMPTS))}
    bars(plan, "losses", [*LOSSES], [
        (way, [COLOURS.get(loss, OTHER_COLOUR) for loss in LOSSES], hatch,
         accuracies([found[f"{loss}, {way}"] for loss in LOSSES]))
        for way, hatch in (("finetuned", ""), ("prompts", "//"))], clip=found["CLIP"]["mean"])
    yield table(found)


def prompts(plan):
    """Kinds of visual prompts, under TeCoA"""
    rows = {"border": BORDER, "tokens": Point("--loss tecoa --adapt token-prompt")}
    return bars_of_tecoa(plan, "prompts", rows | {"border and tokens": TECOA_PROMPTS}, "//", trainable)


def labels(plan):
    """Pseudo-labels: TeCoA with what the original CLIP takes the images for"""
    rows = {"true labels": TECOA, "pseudo-labels": Point("--loss tecoa --labels pseudo")}
    return bars_of_tecoa(plan, "labels", rows)


def fig4(plan):
    """Figure 4: the size of the training set, in images of each class; the same number of updates, to \
within 4 %"""
    counts, rows, sizes = labels_of(plan.train_set).bincount(), {}, []
    for shots in plan.grid.shots:
        updates = int(counts.clamp(max=shots).sum()) // plan.args.batch_size    # in an epoch
        if updates and shots < counts.max():        # at least one batch, and less than all images
            epochs = round(plan.args.epochs * (int(counts.sum()) // plan.args.batch_size) / updates)
            rows[f"{shots}"] = Point(f"--loss tecoa --shots {shots} --epochs {epochs}")
            sizes.append(shots)
    found = yield {"CLIP": CLIP} | rows | {"all": TECOA}
    sizes.append(float(counts.float().mean()))
    _, *names = found
    values = accuracies([found[name] for name in names])
    lines(plan, "fig4", "images of each class", [("TeCoA", COLOURS["tecoa"], "-", sizes, values)], log=True,
          ticks=dict(zip(sizes, names)), clip=found["CLIP"]["mean"])
    yield table(found, ("images of each class", {n: f"{size:.3g}" for n, size in zip(names, sizes)}))


def fig5(plan):
    """Figure 5: ε, each model attacked at the ε that it was trained with"""
    grid = plan.grid
    other = {eps: f"--eps {eps:g}" for eps in grid.eps if eps != grid.usual_eps}
    found = yield {f"CLIP, ε = {eps:g}/255": Point(None, other.get(eps, "")) for eps in grid.eps} | {
        f"TeCoA, ε = {eps:g}/255": Point(f"--loss tecoa {other.get(eps, '')}".strip()) for eps in grid.eps}
    lines(plan, "fig5", "ε (1/255), in training and attack", [
        (label, COLOURS[colour], "-", grid.eps,
         accuracies([found[f"{label}, ε = {eps:g}/255"] for eps in grid.eps]))
        for label, colour in (("CLIP", "CLIP"), ("TeCoA", "tecoa"))], robust_at="at that ε",
        ticks={eps: f"{eps:g}" for eps in grid.eps})
    yield table(found)


def fig6(plan):
    """Figure 6: the number of adapted numbers, under TeCoA"""
    weights = {"linear": Point("--loss tecoa --adapt linear")} | {
        f"last {n} block{'s' * (n > 1)}": Point(f"--loss tecoa --adapt partial --last-blocks {n}")
        for n in plan.grid.blocks} | {"full": TECOA}
    visual = {f"{n} tokens": Point("--loss tecoa --adapt token-prompt" + f" --tokens {n}" * (n != 5))
              for n in plan.grid.tokens} | {"border": BORDER, "border, 5 tokens": TECOA_PROMPTS}
    found = yield {"CLIP": CLIP} | weights | visual
    parts = [sorted((found[name] for name in rows), key=lambda part: part["trained"])
             for rows in (weights, visual)]
    lines(plan, "fig6", "trainable parameters", [
        (label, COLOURS["tecoa"], style, [part["trained"] for part in some], accuracies(some))
        for label, style, some in zip(("weights", "prompts"), ("-", "none"), parts)],
        log=True, clip=found["CLIP"]["mean"])
    yield table(found, trainable(found))


def fig7(plan):
    """Figure 7: interpolation, (1 − α)·CLIP + α·TeCoA in their weights"""
    points = [CLIP, *(Point("--loss tecoa", f"--interpolate {alpha}") for alpha in (.25, .5, .75)), TECOA]
    found = yield {f"α = {alpha:g}": point for alpha, point in zip((0, .25, .5, .75, 1), points)}
    (clean, across), (robust, upright) = map(means_and_spreads, accuracies(found.values()).values())
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(clean, robust, upright, across, color=COLOURS["tecoa"], marker="o", markersize=4,
                  elinewidth=1)
    axis.plot(clean[:1], robust[:1], "o", color=COLOURS["CLIP"], markersize=8, zorder=3)
    for label, x, y in zip(("CLIP, α = 0", "0.25", "0.5", "0.75", "TeCoA, α = 1"), clean, robust):
        axis.annotate(label, (x, y), (5, 5), fontsize=9, textcoords="offset points")
    axis.set(xlabel="clean accuracy (%)", ylabel=f"robust {plan.robust_at} (%)", xmargin=.18, ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(plan.out / "fig7.png", dpi=110)
    yield table(found)


def stronger(plan):
    """Stronger attacks, each on what those before it left standing"""
    grid = plan.grid
    words = f"--attack {','.join(ATTACKS)} --limit {min(grid.few, plan.args.limit or grid.few)}"
    ce = "standard adversarial training" + ", its best learning rate" * bool(grid.tuned_lr)
    rows = {"CLIP": CLIP, ce: tuned_ce(grid), "TeCoA, visual prompts": TECOA_PROMPTS, "TeCoA": TECOA}
    found = yield {label: Point(point.train, words) for label, point in rows.items()}
    first, *others = ATTACKS.values()
    colours = ("CLIP", "ce, tuned" if grid.tuned_lr else "ce", "tecoa", "tecoa")
    bars(plan, "stronger", [first, *(f"+ {attack}" for attack in others)], [
        (label, COLOURS[colour], "//" * ("prompts" in label),
         {"robust": [part["mean"][attack] for attack in ATTACKS]})
        for (label, part), colour in zip(found.items(), colours)], kinds=("robust",))
    yield markdown(["", "clean", *ATTACKS.values()], [
        [label, *cells(part["mean"], ("clean", *ATTACKS))] for label, part in found.items()])


def passes(steps):
    """What a training step of PGD-`steps` costs, in forward passes of its batch: two for each step of the
    attack, forward and gradient to the pixels; three for the update, forward and gradient to the pixels of
    each layer and to the weights. `python bench.py` counts 7.0 for two steps of ViT-B/32."""
    return 2 * steps + 3


def cost(plan):
    """Training compute: PGD-1, 2, 5 and 10 in training, at equal updates and at equal FLOPs"""
    rows = {f"PGD-{n}, equal updates": Point("--loss tecoa" + f" --steps {n}" * (n != 2))
            for n in ATTACK_STEPS}
    for words, share in (("equal FLOPs", 1), ("half the FLOPs", .5)):
        for n in ATTACK_STEPS:
            epochs = f"{share * plan.args.epochs * passes(2) / passes(n):.4g}"
            if (n, share) != (2, 1):                    # which is there already
                rows[f"PGD-{n}, {words}"] = Point("--loss tecoa" + f" --steps {n}" * (n != 2)
                                                  + f" --epochs {epochs}")
    found = yield {"CLIP": CLIP} | rows
    usual = passes(2) * found["PGD-2, equal updates"]["updates"]
    compute = {name: passes(n) * found[name]["updates"] / usual for n in ATTACK_STEPS
               for name in rows if name.startswith(f"PGD-{n},")}

    def series(label, colour, style, names):
        names = sorted(names, key=compute.get)
        return label, colour, style, [compute[name] for name in names], accuracies([found[n] for n in names])
    lines(plan, "cost", "training compute (PGD-2 as usual = 1)", [
        series("equal updates", "silver", ":", [name for name in rows if name.endswith("updates")]),
        *(series(f"PGD-{n}", colour, "-", [name for name in rows if name.startswith(f"PGD-{n},")])
          for n, colour in ATTACK_STEPS.items())],
        log=True, ticks={.5: "½", 1: "1", 2: "2", 4: "4"}, width=7.5, clip=found["CLIP"]["mean"])
    yield table(found, ("training compute", {name: f"{value:.2f}" for name, value in compute.items()}))


FIGURES = (fig1, losses, prompts, labels, fig4, fig5, fig6, fig7, stronger, cost)
