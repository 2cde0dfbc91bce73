"""How paper.py's figures look: grouped bars, lines over a quantity, and a path from CLIP to the robust model.

A method has one colour in every figure; prompts are hatched or dashed. A value is an array with one number a seed: what is
drawn is the mean, and the standard deviation over seeds where there are several.
"""
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"CLIP": "tab:gray", "tecoa": "tab:blue", "ce": "tab:orange", "ce, tuned": "moccasin", "coadv": "tab:red",
           "imgcoadv": "tab:purple", "fare": "tab:green", "pmg": "tab:brown", "prompts": "lightskyblue"}


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
    next(iter(axes.values())).legend(ncols=columns, frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(path, categories, series, robust_at, *, kinds=("clean", "robust"), clip=None):
    """Bars, a group for each category. series: [(label, colour or one a category, hatch, {kind: [values of each category, or
    None]})]; clip: {kind: values}, a line across."""
    width = .82 / len(series)
    figure, axes = panels(kinds, robust_at, max(5.5, .62 * len(categories) * max(1.3, .45 * len(series)) + 1.5))
    for kind, axis in axes.items():
        for s, (label, colour, hatch, values) in enumerate(series):
            there = [c for c, v in enumerate(values[kind]) if v is not None]
            at = np.array(there) + (s - (len(series) - 1) / 2) * width
            heights = [values[kind][c] for c in there]
            colours = colour if isinstance(colour, str) else [colour[c] for c in there]
            axis.bar(at, [np.mean(v) for v in heights], .92 * width, color=colours, label=label, hatch=hatch,
                     edgecolor="white" if hatch else None, yerr=[spread(v) for v in heights], error_kw={"elinewidth": 1})
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
                          linestyle=style, marker="o", markersize=4, elinewidth=1, label=label)
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
