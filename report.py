"""What results look like: rows of counts and intervals, signs of a broken evaluation, Markdown tables, pictures."""
import math
import textwrap

from adversary import defined, predict, run_attacks
from data import batches, image_numbers, on_device
from kernels.pgd_step import to_float


def interval(count, n):
    """Wilson's 95 % interval of a share count / n, in percent: (low, high)."""
    if not n:
        return 0., 100.
    z, p = 1.959964, count / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return tuple(round(100 * (centre + sign * half) / (1 + z * z / n), 2) for sign in (-1, 1))


def summary(records, attacks, classes, half):
    """One task's row of results.json, from one record per image (eval_zeroshot.py's `evaluate` says what is in it).

    attacks: the names of those that ran, in order; half: of the gradient attacks' steps. Accuracies in percent, of the
    images that could be read. `warnings` are the signs of a broken evaluation that this row shows, in words.
    """
    seen = [r for r in records if "error" not in r]
    n, right = len(seen), [r for r in seen if r["clean"] == r["label"]]
    standing = [r for r in right if r["by"] is None]
    late = sum(r["by"] is not None and r["by"] != "square" and r["at"] > half for r in right)
    by_square = sum(r["by"] == "square" for r in right)
    probes = [r["probe"] for r in standing if "probe" in r]
    zeros, astray = sum(r["zero"] for r in right), sum(not r["uphill"] for r in right)
    share = {name: sum(r["by"] == name for r in right) for name in attacks}
    row = {"n": n, "classes": classes, "clean": 100 * len(right) / max(1, n), "robust": 100 * len(standing) / max(1, n),
           "chance": 100 / classes, "right": len(right), "standing": len(standing),
           "clean_interval": interval(len(right), n), "robust_interval": interval(len(standing), n), "attacks": attacks,
           "broken_by": share, "passes": round(sum(r["passes"] for r in right) / max(1, n), 2),
           "zero_gradients": 100 * zeros / max(1, len(right)), "left_out": len(records) - n}
    warnings, nan = [], sum(-1 in (r["clean"], r.get("adversarial")) for r in seen)
    if nan:
        warnings.append(f"the model gave NaN for {nan} images ({100 * nan / n:.1f} %), which count as wrong")
    if row["left_out"] > .01 * len(records):
        warnings.append(f"{row['left_out']} of {len(records)} images could not be read")
    if row["zero_gradients"] > .1:
        warnings.append(f"{row['zero_gradients']:.1f} % of the input gradients are exactly zero: nothing was attacked there")
    if astray > max(1, .02 * len(right)):
        warnings.append(f"for {astray} images ({100 * astray / len(right):.1f} %) the loss falls where its gradient says "
                        "that it rises: the gradients are wrong")
    if len(attacks) > 1 and by_square > max(1, .01 * n):
        warnings.append(f"Square, which sees no gradients, broke {by_square} images ({100 * by_square / n:.1f} %) that "
                        "gradient attacks had left standing: gradients may be masked")
    if sum(probes) > max(1, .02 * len(probes)):
        warnings.append(f"a probe with Square broke {sum(probes)} of {len(probes)} images that gradient attacks had left "
                        "standing: gradients may be masked, or the attack is too weak")
    if late > max(1, .01 * n):
        warnings.append(f"{late} images ({100 * late / n:.1f} %) broke in the second half of the steps: more steps will "
                        "break more")
    return row | {"warnings": warnings}


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


def full_table(results):
    """A Markdown table of one evaluation: per task the counts, accuracies and their 95 % intervals, and the warnings."""
    warned = any(row["warnings"] for row in results["tasks"].values())
    header = ["task", "images", "left out", "classes", "chance", "clean %", "95 %", "count", "robust %", "95 %", "count",
              "passes/image"]
    lines = [header + ["**warnings**"] * warned, ["---"] + ["--:"] * (len(header) - 1) + ["---"] * warned]
    for name, row in results["tasks"].items():
        cells = [cell for kind, count in (("clean", "right"), ("robust", "standing")) for cell in
                 (f"{row[kind]:.1f}", "{:.1f}–{:.1f}".format(*row[f"{kind}_interval"]), row[count])]
        lines.append([name, row["n"], row["left_out"], row["classes"], f"{row['chance']:.1f}", *cells, row["passes"]]
                     + ["; ".join(row["warnings"])] * warned)
    if results["tasks"]:
        count, clean, robust = (results["mean"][key] for key in ("tasks", "clean", "robust"))
        lines.append([f"**mean of {count}**", *[""] * 4, f"{clean:.1f}", "", "", f"{robust:.1f}", *[""] * (3 + warned)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def examples(encoder, heads, scale, tasks, options, *, chosen=None):
    """Eight attacked images, spread over the tasks: [{"task", "position", "x", "x_adv", "truth", "clean", "adversarial"}].

    chosen: an earlier result, for the same images again; by default ones that are classified rightly when clean.
    """
    found = []
    share = max(1, 8 // max(1, len(tasks)))
    places = [(task, range(i * len(task.images) // share, len(task.images))[:32]) for task in tasks[:8]
              for i in range(share)]
    if chosen is not None:
        places = [(task, [example["position"]]) for example in chosen for task in tasks if task.name == example["task"]]
    for task, positions in places:
        head = heads[task.name]
        x, y, index, _ = next(on_device(batches(task, list(positions), 32, 0, bad="leave out"), head.device))
        if len(y) == 0:
            continue                                    # none of these can be read
        clean = predict(encoder, head, scale, to_float(x))
        k = int((clean == y).int().argmax())
        x, y, clean = to_float(x[k:k + 1]), y[k:k + 1], clean[k:k + 1]
        position = next(p for p in positions if image_numbers(task)[p] == index[k])
        x_adv, adversarial, *_ = run_attacks(encoder, head, scale, x, y, index[k:k + 1],
                                             **options | {"names": defined(options["names"], len(head))})
        names = [task.class_names[int(label)] for label in (y, clean, adversarial)]
        found.append({"task": task.name, "position": position, "x": x[0].cpu(), "x_adv": x_adv[0].cpu(),
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


def at_chance(rows, warmup, batch_size, classes):
    """Whether the last hundred steps in a log, all after the warm-up, are at chance: they recognise no more attacked images
    than 1/classes, by three standard deviations."""
    last = rows[-1]["step"] if rows else 0
    steps = [warmup, *(row["step"] for row in rows)]
    recent = [(row["robust"] / 100, row["step"] - before) for before, row in zip(steps, rows)
              if "robust" in row and row["step"] > max(warmup, last - 100)]
    n = batch_size * sum(count for _, count in recent)
    return (last >= warmup + 100 and
            batch_size * sum(share * count for share, count in recent) <= n / classes + 3 * math.sqrt(n / classes))
