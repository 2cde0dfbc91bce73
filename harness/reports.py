"""What results look like: rows of counts and intervals, signs of a broken evaluation, tables, pictures."""
import math
import sys
import textwrap
import warnings
from pathlib import Path

from prompts import fill
from tasks.benchmarks import counts
from tasks.images import printable


def interval(count, n):
    """Wilson's 95 % interval (1927) of a share count / n, in percent: (low, high)."""
    from scipy.stats import binomtest                   # here, as it takes long to import
    low, high = binomtest(count, n).proportion_ci(method="wilson") if n else (0, 1)
    return round(100 * float(low), 2), round(100 * float(high), 2)


def summary(records, attacks, classes, half):
    """One task's row of results.json, from one record per image (of eval_zeroshot.py's `evaluate`). Of no
    image that could be read there is no accuracy: None.

    attacks: the names of those that ran, in order; half: of the gradient attacks' steps. Accuracies are in
    percent of the images that could be read. `warnings`: the signs of a broken evaluation, in words."""
    readable = [r for r in records if "error" not in r]
    right = [r for r in readable if r["clean"] == r["label"]]
    n, standing = len(readable), sum(r["by"] is None for r in right)
    row = {"n": n, "classes": classes, "clean": 100 * len(right) / n if n else None,
           "robust": 100 * standing / n if n else None, "chance": 100 / classes, "right": len(right),
           "standing": standing, "clean_interval": interval(len(right), n),
           "robust_interval": interval(standing, n), "attacks": attacks,
           "broken_by": {name: sum(r["by"] == name for r in right) for name in attacks},
           "passes": round(sum(r["passes"] for r in right) / max(1, n), 2),
           "zero_gradients": 100 * sum(r["zero"] for r in right) / max(1, len(right)),
           "left_out": len(records) - n}
    return row | {"warnings": signs_of_a_broken_evaluation(row, readable, right, half)}


def described(task):
    """What a row of results.json says of its task beside the numbers."""
    return {"source": task.source, "split": task.split, "template": task.template,
            "class_names": task.class_names}


def mean(rows):
    """The unweighted mean of tasks' rows {name: row}, of those with images that could be read; or None."""
    counted = [row for row in rows.values() if row["n"]]
    return {"tasks": len(counted)} | {kind: sum(row[kind] for row in counted) / len(counted) if counted else
                                      None for kind in ("clean", "robust")}


def outside_the_mean(names, protocol):
    """A line that says which of the sets do not count in a protocol's mean; "" if all or none do."""
    outside = [name for name in names if not counts(protocol, name)]
    return f"outside the mean of protocol {protocol}: {', '.join(outside)}\n" * (
        0 < len(outside) < len(names))


def nothing_readable(results):
    """In words, which tasks of `evaluate_tasks`'s results have no image that could be read; ""."""
    names = [name for name, row in (results["tasks"] | results.get("adapted", {})).items() if not row["n"]]
    return f"no image of {', '.join(names)} can be read: there is no accuracy" if names else ""


def guessing(row):
    """In words, that a task's clean accuracy is what guessing among its classes gives; "": it is better, in a
    one-sided binomial test at 5 %, or there are too few images for any to be."""
    from scipy.stats import binom                       # here, as it takes long to import
    n, right, p = row["n"], row["right"], row["chance"] / 100
    if not n or p ** n > .05 or binom.sf(right - 1, n, p) <= .05:
        return ""
    return (f"clean accuracy at chance: {right} of {n} images are right, and guessing among {row['classes']} "
            f"classes gives {n * p:.1f}: do class names and template say what is in the images?")


def signs_of_a_broken_evaluation(row, readable, right, half):
    """What a row, and the records of the readable and the right images, show of it, in words: a list."""
    n, n_all, left_out = row["n"], row["n"] + row["left_out"], row["left_out"]
    nan = sum(-1 in (r["clean"], r.get("adversarial")) for r in readable)
    astray = sum(not r["uphill"] for r in right)
    by_square = row["broken_by"].get("square", 0) if len(row["attacks"]) > 1 else 0
    probes = [r["probe"] for r in right if r["by"] is None and "probe" in r]
    late = sum(r["by"] not in (None, "square") and r["at"] > half for r in right)

    def images(count, of=n):
        return f"{count} images ({100 * count / max(1, of):.1f} %)"
    at_chance_when_clean = guessing(row)
    signs = [
        (at_chance_when_clean, at_chance_when_clean),
        (nan, f"the model gave NaN for {images(nan)}, which count as wrong"),
        (left_out > .01 * n_all, f"{left_out} of {n_all} images could not be read"),
        (row["zero_gradients"] > .1, f"{row['zero_gradients']:.1f} % of the input gradients are exactly zero"
         ": nothing was attacked there"),
        (astray > max(1, .02 * len(right)), f"for {images(astray, len(right))} the loss falls where its "
         "gradient says that it rises: the gradients are wrong"),
        (by_square > max(1, .01 * n), f"Square, which sees no gradients, broke {images(by_square)} that "
         "gradient attacks had left standing: gradients may be masked"),
        (sum(probes) > max(1, .02 * len(probes)), f"a probe with Square broke {sum(probes)} of {len(probes)} "
         "images that gradient attacks had left standing: gradients may be masked, or the attack is too "
         "weak"),
        (late > max(1, .01 * n), f"{images(late)} broke in the second half of the steps: more steps will "
         "break more")]
    return [text for shown, text in signs if shown]


def ball(norm, eps, step_size, names=("pgd",), **_):
    """The ε-ball, and the steps in it of those attacks among `names` whose length is given, in words. eps,
    step_size: pixel fractions (linf) or L2 lengths."""
    unit = f" ({eps:.3g} in pixels of [0,1])" * (norm == "l2")
    steps = f", steps of {255 * step_size:g}/255" * bool({"pgd", "cw"} & {*names})
    return f"{norm} ε = {255 * eps:g}/255{unit}{steps}"


def at_chance(rows, warmup, batch_size, classes):
    """Whether the last hundred steps in a log's rows, all after the warm-up, recognise no more attacked
    images than 1/classes, by three standard deviations."""
    last = rows[-1]["step"] if rows else 0
    counted = [(batch_size * (row["step"] - before["step"]), row["robust"] / 100)
               for before, row in zip([{"step": warmup}, *rows], rows)
               if "robust" in row and row["step"] > last - 100]
    n = sum(images for images, _ in counted)
    recognised = sum(images * share for images, share in counted)
    return last >= warmup + 100 and recognised <= n / classes + 3 * math.sqrt(n / classes)


def in_pipes(lines):
    """Markdown's lines of a table, from lists of cells, which may hold any text: head, rule, rows."""
    def cell(value):
        return printable(value).replace("|", "\\|")
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def percent(value):
    """An accuracy in a table."""
    return "–" if value is None else f"{value:.1f}"


def example_prompt(row):
    """The prompt of a row's first class."""
    template = row["template"] if isinstance(row["template"], str) else row["template"][0]
    return fill(template, row["class_names"][0])


def markdown_table(results, adapted=()):
    """A Markdown table of {label: results of the same tasks}; rows of `adapted` last, not in the mean."""
    first, everyone = next(iter(results.values())), results.values()
    rows = [(name, row, [r["tasks"][name] for r in everyone]) for name, row in first["tasks"].items()]
    rows += [("**mean**", None, [r["mean"] for r in everyone])] * bool(rows)
    rows += [(f"{name} (adapted on)", first["adapted"][name], [r["adapted"][name] for r in everyone])
             for name in adapted]
    head = ["task", "images", "classes", "chance"]
    head += [f"{label} {kind}".strip() for label in results for kind in ("clean", "robust")]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for name, row, cells in rows:
        start = [row["n"], row["classes"], f"{row['chance']:.1f}"] if row else [""] * 3
        lines.append([name, *start, *(percent(cell[kind]) for cell in cells for kind in ("clean", "robust"))])
    return in_pipes(lines)


def full_table(results):
    """A Markdown table of one evaluation: per task counts, accuracies, 95 % intervals, any warnings."""
    warned = any(row["warnings"] for row in results["tasks"].values())
    head = ["task", "images", "left out", "classes", "chance", "clean %", "95 %", "count", "robust %", "95 %",
            "count", "passes/image"]
    lines = [head + ["**warnings**"] * warned, ["---"] + ["--:"] * (len(head) - 1) + ["---"] * warned]
    for name, row in results["tasks"].items():
        line = [name, row["n"], row["left_out"], row["classes"], f"{row['chance']:.1f}"]
        for kind, count in (("clean", "right"), ("robust", "standing")):
            low, high = row[f"{kind}_interval"]
            line += [percent(row[kind]), f"{low:.1f}–{high:.1f}", row[count]]
        lines.append([*line, row["passes"], *["; ".join(row["warnings"])] * warned])
    if results["tasks"]:
        count, clean, robust = (results["mean"][key] for key in ("tasks", "clean", "robust"))
        lines.append([f"**mean of {count}**", *[""] * 4, percent(clean), "", "", percent(robust),
                      *[""] * (3 + warned)])
    return in_pipes(lines)


# ------------------------------------------------------------------------------ pictures
def plain(text):
    """Text as matplotlib takes it with parse_math=False, or else a $ would begin a formula: what cannot be
    encoded, of a file's name, as escapes."""
    return str(text).encode(errors="backslashreplace").decode()


def write_figure(figure, path):
    """Write a figure to a file of the kind that its name says, whole or not at all. ValueError: unknown."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)                   # it might be a link to somewhere else
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # about characters that the font has not
            figure.savefig(temporary, dpi=110, format=path.suffix[1:])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def try_to_draw(draw, path, *facts):
    """draw(path, *facts), or a line that says why not, as nothing else may hang on a picture: whether it is
    drawn."""
    try:
        draw(path, *facts)
        return True
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"warning: {plain(path)} cannot be drawn: {plain(said)}", file=sys.stderr)
        return False


def draw_curves(path, logs):
    """Draw to a PNG, or another picture, over the steps: loss, accuracy on the attacked batches, learning
    rate, images/s; with a cross at the foot for each step that was not finite. logs: {a run's label: rows of
    its log.jsonl}. ValueError: there is nothing to draw."""
    empty = [label for label, rows in logs.items() if not any("loss" in row for row in rows)]
    if empty:
        raise ValueError(f"the log of {empty[0]} has no steps yet")
    # here, as it takes long to import; without pyplot, which would set this process's backend
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = dict(zip(("loss", "robust", "lr", "images_per_s"), figure.subplots(2, 2, sharex=True).flat))
    titles = "loss", "accuracy on the attacked batches, %", "learning rate", "images per second"
    for (key, axis), title in zip(axes.items(), titles):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=.3)
        for number, rows in enumerate(logs.values()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            # a long run's rows in means over as many as leave 500 points
            many = math.ceil(len(points) / 500) or 1
            parts = [points[i:i + many] for i in range(0, len(points), many)]
            means = [[sum(column) / len(part) for column in zip(*part)] for part in parts]
            axis.plot(*zip(*means), color=f"C{number}", marker="." if len(means) < 20 else "")
    for number, rows in enumerate(logs.values()):
        lost = [row["step"] for row in rows if "nonfinite" in row]
        axes["loss"].plot(lost, [.02] * len(lost), "x", color=f"C{number}",
                          transform=axes["loss"].get_xaxis_transform())
        if lost:
            axes["loss"].set_title("loss (×: a step left out, not finite)", fontsize=10)
    for key in ("lr", "images_per_s"):
        axes[key].set_xlabel("step")
        axes[key].set_ylim(0, 1.05 * axes[key].dataLim.ymax or 1)
    legend = figure.legend([figure.axes[0].lines[k] for k in range(len(logs))], [*map(plain, logs)],
                           loc="outside upper center", ncols=1 if len(logs) < 4 else 2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_figure(figure, path)


def draw_examples(path, rows, eps):
    """Draw attacked images to a PNG: clean ones, and for each model δ amplified and adversarial ones, with
    the classes that it takes them for. rows: {the model's label: of `choose_examples`}, the same images for
    each; eps: in 1/255, for the label."""
    # here, as it takes long to import; without pyplot, which would set this process's backend
    from matplotlib.figure import Figure
    first = next(iter(rows.values()))
    grid = [("clean", [(e["x"], e["truth"], "black") for e in first])]
    for label, examples in rows.items():
        deltas = [e["x_adv"] - e["x"] for e in examples]
        grid += [
            (f"δ against {label}\n(amplified)",
             [(.5 + delta / (2 * delta.abs().max().clamp(min=1e-8)), "", "black") for delta in deltas]),
            (f"{label}, ε = {eps:g}/255",
             [(e["x_adv"], f"{e['clean']} → {e['adversarial']}",
               "tab:green" if e["adversarial"] == e["truth"] else "tab:red") for e in examples])]
    figure = Figure(figsize=(1.55 * len(first) + .6, 1.85 * len(grid)), layout="constrained")
    axes = figure.subplots(len(grid), len(first), squeeze=False,
                           subplot_kw={"xticks": [], "yticks": [], "frameon": False})
    for axis, example in zip(axes[0], first):
        axis.set_title(plain(example["task"]), fontsize=10, parse_math=False)
    for line, (label, cells) in zip(axes, grid):
        line[0].set_ylabel(plain(label), fontsize=9, parse_math=False)
        for axis, (image, text, colour) in zip(line, cells):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            words = "\n".join(textwrap.wrap(plain(text), 20)[:3])
            axis.set_xlabel(words, color=colour, fontsize=8, labelpad=2, parse_math=False)
    write_figure(figure, path)
