"""The paper's figures and tables: of each which runs it is made of, and how it is drawn. paper.py makes the runs.

A method has one colour in every figure; prompts are hatched, or hollow points. A value is an array with one number a seed:
what is drawn is the mean, and the standard deviation over seeds where there are several.
"""
from typing import NamedTuple

import matplotlib
import numpy as np

from sampling import labels_of

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"CLIP": "tab:gray", "tecoa": "tab:blue", "ce": "tab:orange", "ce, tuned": "moccasin", "coadv": "tab:red",
           "imgcoadv": "tab:purple", "fare": "tab:green", "pmg": "tab:brown"}
LOSSES = ("tecoa", "ce", "coadv", "imgcoadv", "fare", "pmg")
PROMPTS = " --adapt image-prompt,token-prompt"
ATTACKS = {"pgd": "PGD", "cw": "CW", "apgd-ce": "APGD-CE", "apgd-t": "APGD-T", "square": "Square"}


class Point(NamedTuple):
    """One model under one evaluation: the options of train_tecoa.py (None: CLIP as it is) and of eval_zeroshot.py."""
    train: str | None
    evaluate: str = ""


CLIP, TECOA = Point(None), Point("--loss tecoa")


# ---------------------------------------------------------------------------------------------- drawing
def spread(values):
    """Standard deviation over seeds; 0 with one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.


def panels(kinds, robust_at, width):
    """One panel above the other, sharing x: clean and robust accuracy, in percent."""
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(width, .7 + 2.1 * len(kinds)), sharex=True, squeeze=False,
                                   layout="constrained")
    for axis, kind in zip(axes[:, 0], kinds):
        axis.set_ylabel("clean accuracy (%)" if kind == "clean" else f"robust {robust_at} (%)")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, dict(zip(kinds, axes[:, 0]))


def save(figure, axes, path, columns):
    for kind, axis in axes.items():
        axis.set_ylim(0, 100 if kind == "clean" else None)
    top = next(iter(axes.values()))
    letters = sum(len(label) for label in top.get_legend_handles_labels()[1])
    top.legend(ncols=columns if letters < 10 * figure.get_figwidth() else 2, frameon=False, fontsize=9, loc="lower left",
               bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(path, categories, series, robust_at, *, kinds=("clean", "robust"), clip=None):
    """Bars, a group for each category. series: [(label, colour or one a category, hatch, {kind: [values of each]})];
    clip: {kind: values}, a line across."""
    width = min(.45, .82 / len(series))
    figure, axes = panels(kinds, robust_at, max(5.5, .62 * len(categories) * max(1.3, .45 * len(series)) + 1.5))
    for kind, axis in axes.items():
        for s, (label, colour, hatch, values) in enumerate(series):
            at = np.arange(len(categories)) + (s - (len(series) - 1) / 2) * width
            axis.bar(at, [np.mean(v) for v in values[kind]], .92 * width, color=colour, label=label, hatch=hatch,
                     edgecolor="white" if hatch else None, yerr=[spread(v) for v in values[kind]],
                     error_kw={"elinewidth": 1})
        if clip:
            axis.axhline(np.mean(clip[kind]), color=COLOURS["CLIP"], linestyle="--", linewidth=1, label="CLIP")
        axis.set_xticks(range(len(categories)), categories)
    save(figure, axes, path, len(series) + 1)


def lines(path, label_x, series, robust_at, *, log=False, ticks=None, clip=None):
    """Lines over a quantity. series: [(label, colour, style, xs, {kind: [values of each x]})]; ticks: {x: its label}; clip:
    {kind: values}, a line across."""
    figure, axes = panels(("clean", "robust"), robust_at, 5.5)
    for kind, axis in axes.items():
        for label, colour, style, xs, values in series:
            axis.errorbar(xs, [np.mean(v) for v in values[kind]], [spread(v) for v in values[kind]], color=colour,
                          linestyle=style, marker="o", markersize=4, elinewidth=1, label=label,
                          markerfacecolor="white" if style == "none" else colour)
        if clip:
            axis.axhline(np.mean(clip[kind]), color=COLOURS["CLIP"], linestyle="--", linewidth=1, label="CLIP")
        if log:
            axis.set_xscale("log")
    if ticks:
        axis.set_xticks([*ticks], [*ticks.values()])
        axis.minorticks_off()
    axis.set_xlabel(label_x)
    save(figure, axes, path, len(series) + 1)


def trade_off(path, points, robust_at):
    """Robust over clean accuracy along {α: (clean values, robust values)}."""
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    clean, robust = np.array([[np.mean(values) for values in pair] for pair in points.values()]).T
    errors = np.array([[spread(values) for values in pair] for pair in points.values()]).T
    axis.errorbar(clean, robust, errors[1], errors[0], color=COLOURS["tecoa"], marker="o", markersize=4, elinewidth=1)
    axis.plot(clean[:1], robust[:1], "o", color=COLOURS["CLIP"], markersize=8, zorder=3)
    for alpha, x, y in zip(points, clean, robust):
        axis.annotate({0: "CLIP, α = 0", 1: "TeCoA, α = 1"}.get(alpha, f"{alpha:g}"), (x, y), (5, 5), fontsize=9,
                      textcoords="offset points")
    axis.set(xlabel="clean accuracy (%)", ylabel=f"robust {robust_at} (%)")
    axis.set_ylim(0)
    axis.margins(x=.18)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------- the figures
# A figure is a generator. It yields its rows, {label: Point}; it is sent what was found, {label: {task or "mean": {kind:
# one number a seed}}}, see `gather`; it draws, and yields the lines of a table. `o`: the options, and what differs by model.


def table(found, *columns):
    """A row for each label: clean and robust accuracy, mean over the zero-shot tasks; then of the classes adapted on.
    columns: (name, {label: text}), put before these."""
    adapted = ["adapted"] * all("adapted" in part for part in found.values())
    header = ["", *(name for name, _ in columns), "clean", "robust", *["own classes: clean", "robust"] * len(adapted)]
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    for label, part in found.items():
        lines.append([label, *(texts.get(label, "") for _, texts in columns),
                      *(cell(part[task][kind]) for task in ("mean", *adapted) for kind in ("clean", "robust"))])
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(values):
    return f"{values.mean():.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")


def kinds(parts, task="mean"):
    """{kind: [values of each part]}, as `bars` and `lines` want them."""
    return {kind: [part[task][kind] for part in parts] for kind in ("clean", "robust")}


def fig1(o):
    """Figure 1: clean and robust accuracy, task by task"""
    rows = {"CLIP": CLIP, "standard adversarial training": Point("--loss ce"),
            "the same, its best learning rate": Point(f"--loss ce --lr {o.tuned}"),
            "TeCoA, visual prompts": Point("--loss tecoa" + PROMPTS), "TeCoA": TECOA}
    if o.tuned is None:
        del rows["the same, its best learning rate"]
    colours = dict(zip(rows, ("CLIP", "ce", *["ce, tuned"] * (o.tuned is not None), "tecoa", "tecoa")))
    found = yield rows
    tasks = [task for task in found["CLIP"] if task not in ("adapted", "mean", "trained")] + ["mean"]
    series = [(label, COLOURS[colours[label]], "//" * ("prompts" in label),
               {kind: [found[label][task][kind] for task in tasks] for kind in ("clean", "robust")}) for label in rows]
    bars(o.out / "fig1.png", tasks, series, o.robust_at)
    text = ["", "| task | " + " | ".join(f"{label}: clean | robust" for label in rows) + " |",
            "|---|" + "--:|" * 2 * len(rows)]
    for task in tasks[:-1]:
        text.append(f"| {task} | " + " | ".join(cell(found[label][task][kind]) for label in rows
                                                for kind in ("clean", "robust")) + " |")
    yield table(found) + text


def losses(o):
    """Losses, each with finetuning and with visual prompts"""
    found = yield {"CLIP": CLIP} | {f"{loss}, {way}": Point(f"--loss {loss}{words}") for loss in LOSSES
                                    for way, words in (("finetuned", ""), ("prompts", PROMPTS))}
    bars(o.out / "losses.png", LOSSES, [
        (way, [COLOURS[loss] for loss in LOSSES], hatch, kinds([found[f"{loss}, {way}"] for loss in LOSSES]))
        for way, hatch in (("finetuned", ""), ("prompts", "//"))], o.robust_at, clip=found["CLIP"]["mean"])
    yield table(found)


def prompts(o):
    """Kinds of visual prompts, under TeCoA"""
    found = yield {"CLIP": CLIP, "border": Point("--loss tecoa --adapt image-prompt"), "tokens": Point(
        "--loss tecoa --adapt token-prompt"), "border and tokens": Point("--loss tecoa" + PROMPTS)}
    names = [*found][1:]
    bars(o.out / "prompts.png", names, [("TeCoA", COLOURS["tecoa"], "//", kinds([found[n] for n in names]))], o.robust_at,
         clip=found["CLIP"]["mean"])
    yield table(found, ("numbers trained", {n: f"{found[n]['trained']:,}" for n in names}))


def labels(o):
    """Pseudo-labels: TeCoA with what the original CLIP takes the images for"""
    found = yield {"CLIP": CLIP, "true labels": TECOA, "pseudo-labels": Point("--loss tecoa --labels pseudo")}
    names = [*found][1:]
    bars(o.out / "labels.png", names, [("TeCoA", COLOURS["tecoa"], "", kinds([found[n] for n in names]))], o.robust_at,
         clip=found["CLIP"]["mean"])
    yield table(found)


def fig4(o):
    """Figure 4: the size of the training set, in images of each class; the same number of updates, to within 4 %"""
    counts = labels_of(o.train_set).bincount()
    rows, sizes = {}, []
    for shots in o.shots:
        per_epoch = int(counts.clamp(max=shots).sum()) // o.batch
        if per_epoch and shots < counts.max():                             # at least a batch, and less than all
            epochs = round(o.epochs * (int(counts.sum()) // o.batch) / per_epoch)
            rows[f"{shots}"] = Point(f"--loss tecoa --shots {shots} --epochs {epochs}")
            sizes.append(shots)
    found = yield {"CLIP": CLIP} | rows | {"all": TECOA}
    sizes.append(float(counts.float().mean()))
    names = [*found][1:]
    lines(o.out / "fig4.png", "images of each class", [
        ("TeCoA", COLOURS["tecoa"], "-", sizes, kinds([found[n] for n in names]))], o.robust_at, log=True,
        ticks=dict(zip(sizes, names)), clip=found["CLIP"]["mean"])
    yield table(found, ("images of each class", {n: f"{size:.3g}" for n, size in zip(names, sizes)}))


def fig5(o):
    """Figure 5: ε, each model attacked at the ε that it was trained with"""
    rows = {f"{label}, ε = {eps:g}/255": (Point(None, f"--eps {eps:g}") if label == "CLIP" else
                                          Point(f"--loss tecoa --eps {eps:g}")) if eps != o.eps[o.usual] else point
            for label, point in (("CLIP", CLIP), ("TeCoA", TECOA)) for eps in o.eps}
    found = yield rows
    lines(o.out / "fig5.png", "ε (1/255), in training and attack", [
        (label, COLOURS[colour], "-", o.eps, kinds([found[f"{label}, ε = {eps:g}/255"] for eps in o.eps]))
        for label, colour in (("CLIP", "CLIP"), ("TeCoA", "tecoa"))], "at that ε", ticks={e: f"{e:g}" for e in o.eps})
    yield table(found)


def fig6(o):
    """Figure 6: the number of adapted numbers, under TeCoA"""
    weights = {"linear": Point("--loss tecoa --adapt linear")} | {
        f"last {n} block{'s' * (n > 1)}": Point(f"--loss tecoa --adapt partial --last-blocks {n}") for n in o.blocks} | {
        "full": TECOA}
    visual = {f"{n} tokens": Point("--loss tecoa --adapt token-prompt" + f" --tokens {n}" * (n != 5))
              for n in o.tokens} | {"border": Point("--loss tecoa --adapt image-prompt"),
                                    "border, 5 tokens": Point("--loss tecoa" + PROMPTS)}
    found = yield {"CLIP": CLIP} | weights | visual
    series = [(label, COLOURS["tecoa"], style, [found[n]["trained"] for n in names], kinds([found[n] for n in names]))
              for label, style, rows in (("weights", "-", weights), ("prompts", "none", visual))
              for names in [sorted(rows, key=lambda n: found[n]["trained"])]]
    lines(o.out / "fig6.png", "numbers adapted", series, o.robust_at, log=True, clip=found["CLIP"]["mean"])
    yield table(found, ("numbers trained", {n: f"{found[n]['trained']:,}" for n in [*found][1:]}))


def fig7(o):
    """Figure 7: interpolation, (1 − α)·CLIP + α·TeCoA in their weights"""
    alphas = (0, .25, .5, .75, 1)
    found = yield {f"α = {alpha:g}": CLIP if alpha == 0 else Point("--loss tecoa", f"--interpolate {alpha:g}" * (alpha != 1))
                   for alpha in alphas}
    trade_off(o.out / "fig7.png", {alpha: [part["mean"][kind] for kind in ("clean", "robust")]
                                   for alpha, part in zip(alphas, found.values())}, o.robust_at)
    yield table(found)


def stronger(o):
    """Stronger attacks, each on what those before it left standing"""
    words = f"--attack {','.join(ATTACKS)} --limit {min(o.few, o.limit or o.few)}"
    ce = Point(f"--loss ce --lr {o.tuned}" if o.tuned else "--loss ce")
    rows = {"CLIP": CLIP, "standard adversarial training" + ", its best learning rate" * bool(o.tuned): ce,
            "TeCoA, visual prompts": Point("--loss tecoa" + PROMPTS), "TeCoA": TECOA}
    found = yield {label: Point(point.train, words) for label, point in rows.items()}
    colours = [COLOURS[name] for name in ("CLIP", "ce, tuned" if o.tuned else "ce", "tecoa", "tecoa")]
    bars(o.out / "stronger.png", [["", "+ "][k > 0] + name for k, name in enumerate(ATTACKS.values())], [
        (label, colour, "//" * ("prompts" in label), {"robust": [found[label]["mean"][attack] for attack in ATTACKS]})
        for label, colour in zip(rows, colours)], o.robust_at, kinds=("robust",))
    text = ["| | clean | " + " | ".join(ATTACKS.values()) + " |", "|---|" + "--:|" * (1 + len(ATTACKS))]
    yield text + [f"| {label} | " + " | ".join(cell(found[label]["mean"][kind]) for kind in ("clean", *ATTACKS)) + " |"
                   for label in rows]


FIGURES = (fig1, losses, prompts, labels, fig4, fig5, fig6, fig7, stronger)
