"""Results side by side: one table of any runs and evaluations, in Markdown or LaTeX, and a picture.

    python -m experiments.compare out/A out/B                    # runs: CLIP as it was, and each afterwards
    python -m experiments.compare out/*/eval --latex --out out/compare.pdf       # evaluations
    python -m experiments.compare out/A/eval-eps4 out/A/eval-eps8 --anyway       # although ε differs

A row is a model, the seeds of one recipe together; a column is a set; the best of a column is bold. What was
measured in other ways (attack, ε, images, prompts, …) is refused, by name."""
import os
import re
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from attacks import ATTACKS
from eval_zeroshot import make_parser as evaluation_parser
from experiments.figures import COLOURS, OTHER_COLOUR, bars, spread
from harness.evaluation import read_journal
from harness.files import occupant, read_json
from harness.options import Parser, content, quarter
from harness.reports import ball, in_pipes, plain
from tasks.benchmarks import counts
from tasks.contents import digest
from tasks.images import printable
from tasks.protocols import DEFAULT, PROTOCOLS

KINDS = "clean", "robust"
# options that are no part of a protocol: the model's; those that change no number, or are noted; those of
# which each set's own row says what came of them
MODEL = {"model", "pretrained", "ckpt", "interpolate"}
NEUTRAL = {"seed", "tasks", "data_root", "device", "dtype", "compile", "kernels", "code"}
IN_ROWS = {"attack", "limit", "class_names", "template"}
# options of a training that make no other model of it
HARMLESS = NEUTRAL - {"dtype"} | {"eval_steps", "accumulate", "workers", "out", "report_to", "save_every",
                                  "max_nonfinite", "python", "torch", "hardware", "processes"}
# what a label says wherever rows differ in it; the rest where nothing else tells them apart
TELLING = {"model": "{}", "pretrained": "{}", "adapt": "{}", "dataset": "on {}", "labels": "{} labels",
           "eps": "ε = {}/255", "interpolate": "α = {}", "step": "after step {}"}
HATCHES = "", "\\\\", "..", "xx", "++", "oo"


class Set(NamedTuple):
    """What one file says of one set."""
    accuracy: dict            # {"clean", "robust": percent, or None: no image could be read}
    counts: bool              # in the mean
    facts: dict               # {what, in words: value, or None: not recorded}
    contents: dict            # {image's number: (crc32 of its pixels, its label or None)}; {}: not recorded
    warnings: list


class Result(NamedTuple):
    """One model's table in one file."""
    folder: Path
    who: dict                 # what the model is, but for its seed
    seed: int
    protocol: dict            # {option: value}, as far as recorded
    noted: dict               # what may differ: the precision, the sources
    words: str                # the protocol
    sets: dict                # {name: Set}


class Row(NamedTuple):
    label: str
    results: list             # one a seed

    def accuracy(self, name, kind):
        """One number a seed, of a set; None: there is none for some seed."""
        values = [r.sets[name].accuracy[kind] if name in r.sets else None for r in self.results]
        return None if None in values else np.array(values, float)

    def mean(self, names, kind):
        """The mean over sets, one number a seed; None: of no sets."""
        return np.mean([self.accuracy(name, kind) for name in names], 0) if names else None


# ---------------------------------------------------------------------------------------- reading
def load(path):
    """What a file holds, a dict with the accuracies in place. ValueError: something else, or not all."""
    results = read_json(path)
    try:
        rows = [*results["tasks"].values(), *results.get("adapted", {}).values()]
        numbers = [row[kind] for row in [*rows, results["mean"]] for kind in KINDS]
        foreign = not (isinstance(results["config"], dict) and all(isinstance(row["n"], int) for row in rows)
                       and all(value is None or 0 <= value <= 100 for value in numbers))
    except (AttributeError, KeyError, TypeError):
        foreign = True
    if foreign:
        raise ValueError(f"{path} " + ("is not the results of a run or an evaluation"
                                       if Path(path).is_file() else "does not exist"))
    if left := results.get("unfinished"):
        raise ValueError(f"{path} is unfinished: without {', '.join(map(str, left))}")
    return results


def files_in(path):
    """The files that an argument stands for: itself; a folder's results.json, or, where that has no table,
    those of the evaluations in the folder. ValueError: there are none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    own, inside = path / "results.json", sorted(path.glob("*/results.json"))
    if own.exists() and (load(own)["tasks"] or not inside):
        inside = [own]
    if not inside:
        raise ValueError(f"{path} holds {occupant(path) or 'no results'}, and no results.json yet")
    return inside


def training_of(folder, config, identity):
    """(config, identity) of the run whose checkpoint was evaluated into `folder`; ({}, {}): not known."""
    ckpt = Path(config["ckpt"])
    above = folder.resolve().parent
    for run in (above, ckpt.parent):
        found = read_json(run / "results.json") or read_json(run / "results_before.json") or {}
        # a run's folder keeps evaluations of its own; elsewhere there may be another run by now
        if "loss" in found.get("config", ()) and (run == above and run.name == ckpt.parent.name or (
                (run / ckpt.name).is_file() and hashed(run / ckpt.name) == identity["ckpt"])):
            return found["config"], found.get("identity", found["config"])
    return {}, {}


@cache
def hashed(path):
    return content(path, "ckpt")


def model_of(config, identity, trained):
    """(what a model is, its seed). config, identity: of its training, or of the plain CLIP's evaluation."""
    seed = config.get("seed", 0)
    who = {word: value for word, value in identity.items() if word not in HARMLESS and value is not None}
    if not trained:
        who = {word: who[word] for word in ("model", "pretrained") if word in who}
        number = re.fullmatch(r"seed(\d+)", str(who.get("pretrained")))
        seed = int(number[1]) if number else seed
    if who.get("pretrained") == f"seed{seed}":          # the toy's own of that seed
        del who["pretrained"]
    return who, seed


def protocol_of(results):
    """({option: value} of what was measured, in words)."""
    config, attacks = results["config"], {name for row in results["tasks"].values()
                                          for name in row.get("attacks", ())}
    known = {action.dest for action in evaluation_parser()._actions}
    options = results["identity"] if "protocol" in results and "identity" in results else config
    options = {word: options[word] for word in options
               if word not in MODEL | NEUTRAL | IN_ROWS | evaluation_parser().harmless
               and ("protocol" in results or word in known)}
    words = results.get("protocol")
    if words is None:                                   # stage 1's two tables
        steps, eps = config.get("eval_steps"), config.get("eps")
        options |= {"restarts": 1, "last_iterate": False, "steps": steps}
        options = {"templates": PROTOCOLS[options.get("protocol", DEFAULT)].templates} | options
        if steps and eps is not None:
            options["step_size"] = quarter(eps, steps)
            words = f"PGD-{steps}; {ball(config.get('norm'), eps / 255, options['step_size'] / 255)}"
    used = {word for name in attacks if name in ATTACKS for word in ATTACKS[name].options}
    unused = {"steps", "step_size", "queries"} - used if attacks <= ATTACKS.keys() else set()
    return {word: value for word, value in options.items() if word not in unused}, words or ""


def contents_of(results, folder):
    """{set: (what is known of it as a whole, {image's number: (crc32, label)})}, as far as recorded."""
    if "protocol" in results:
        identity, images, done = read_journal(folder)
        if identity != results.get("identity"):
            return {}
        found = {}
        for name, records in done.items():
            about = images[name] if isinstance(images.get(name), dict) else {
                "choice of images": digest(np.array(sorted(records), np.int64))}
            found[name] = about, {number: (record["crc32"], record["label"])
                                  for number, record in records.items() if "crc32" in record}
        return found
    data, names = results.get("data"), [*results["tasks"], *results.get("adapted", ())]
    data = data[len(data) - len(names):] if isinstance(data, list) else []      # the first: adapted on
    return {name: (about, {int(number): (crc32, None) for number, crc32 in about.get("pixels", {}).items()
                           if crc32 is not None})
            for name, about in zip(names, data)}


def not_counted(results):
    """The sets that a table's own mean leaves out, as its protocol does."""
    protocol = results["config"].get("protocol", DEFAULT)
    outside = [name for name in results["tasks"] if not counts(protocol, name)]
    return outside if len(outside) < len(results["tasks"]) else []


def sets_of(results, folder):
    """{name: Set} of a file's table."""
    known, found, outside = contents_of(results, folder), {}, not_counted(results)
    tasks, adapted = results["tasks"], results.get("adapted", {})
    for name, row in (tasks | adapted).items():
        about, contents = known.get(name, ({}, {}))
        attacks = row.get("attacks")
        facts = {"attacks": attacks and ",".join(attacks), "split": row.get("split"),
                 "template": row.get("template"), "classes": row.get("classes"),
                 "class names": row.get("class_names"), "images": row["n"],
                 "choice of images": about.get("choice of images")}
        found[name] = Set({kind: row[kind] for kind in KINDS}, name in tasks and name not in outside, facts,
                          contents, row.get("warnings", []))
    return found


def read(path):
    """The Results in a file: of an evaluation one; of a run the plain CLIP's too. ValueError."""
    try:
        return results_in(load(path), path)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has something else in it than results have: {error}") from None


def results_in(results, path):
    config, identity = results["config"], results.get("identity", results["config"])
    if not results["tasks"]:
        raise ValueError(f"{path} has no table: it was trained with --tasks none")

    def result(results, who, seed):
        protocol, words = protocol_of(results)
        noted = {"--dtype": results["config"].get("dtype"),
                 "sources": results.get("code", identity.get("code"))}
        return Result(path.parent, who, seed, protocol, noted, words, sets_of(results, path.parent))
    if "trained" not in results and ("protocol" not in results or not config.get("ckpt")):
        return [result(results, *model_of(config, identity, trained=False))]
    if "protocol" not in results:
        before = path.with_name("results_before.json")
        clip = [load(before) | {"code": results.get("code")}] if before.exists() else []
        return [*(result(r, *model_of(config, identity, trained=False)) for r in clip),
                result(results, *model_of(config, identity, trained=True))]
    trained = training_of(path.parent, config, identity)
    who, seed = model_of(*(trained if trained[0] else (config, identity)), trained=bool(trained[0]))
    ckpt, step = Path(config["ckpt"]), re.match(r"step(\d+)-", path.parent.name)
    if not trained[0]:
        name = ckpt.stem if ckpt.stem != "ckpt" else ckpt.resolve().parent.name
        who["checkpoint"] = f"{name} {identity['ckpt'][-64:]}"
    more = {"interpolate": config.get("interpolate"), "step": int(step[1]) if step else None}
    return [result(results, who | {word: value for word, value in more.items() if value is not None}, seed)]


def short_names(results):
    """The results, with sets in files called by their folder's name alone, wherever it lies, if that is
    another in each table."""
    def short(name):
        place = re.match(r"(folder|wds|cache):(.*)", name)
        return Path(place[2]).name or name if place else name
    if any(len({*map(short, r.sets)}) < len(r.sets) for r in results):
        return results
    return [r._replace(sets={short(name): value for name, value in r.sets.items()}) for r in results]


def is_plain(who):
    return "loss" not in who and "checkpoint" not in who


def without_repeats(results):
    """The plain CLIPs first, without those of which another table has the same numbers and more."""
    kept, clips = [], [r for r in results if is_plain(r.who)]
    for r in sorted(clips, key=lambda r: -len(r.sets)):
        accuracies = {name: found.accuracy for name, found in r.sets.items()}
        if not any((r.who, r.seed, r.protocol) == (k.who, k.seed, k.protocol) and all(
                name in k.sets and k.sets[name].accuracy == value for name, value in accuracies.items())
                for k in kept):
            kept.append(r)
    return kept + [r for r in results if not is_plain(r.who)]


# ---------------------------------------------------------------------------------------- what differs
def several(names):
    """Names in a line: each once, at most three."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def places(results):
    """{id of a result: its folder, as far as it tells it from the others}."""
    folders = [os.path.abspath(r.folder) for r in results]
    above = os.path.commonpath(folders)
    above = os.path.dirname(above) if above in folders else above
    return {id(r): os.path.relpath(folder, above) for r, folder in zip(results, folders)}


def by_value(pairs):
    """[(value, [name, …])], from pairs of both, in their order; values that are equal together."""
    found = []
    for value, name in pairs:
        known = next((names for other, names in found if other == value), None)
        known.append(name) if known else found.append((value, [name]))
    return found


def versus(groups):
    """What `by_value` found, in words; of lists what is in one and not in the others."""
    def shown(value):
        if not isinstance(value, list):
            return f"{value:g}" if isinstance(value, float) else str(value)
        others = [other if isinstance(other, list) else [other] for other, _ in groups if other != value]
        own = [word for word in value if any(word not in other for other in others)] or value
        return ", ".join(map(str, own[:3])) + ", …" * (len(own) > 3)
    return " / ".join(f"{shown(value)} ({several(names)})" for value, names in groups)


def other_pixels(found):
    """In words, whether images have other pixels or labels than in the first, of [(contents, name)]; ""."""
    (first, of_first), *others = found
    for contents, name in others:
        common = first.keys() & contents.keys()
        changed = sum(any(None not in pair and pair[0] != pair[1]
                          for pair in zip(first[number], contents[number])) for number in common)
        if changed:
            return f"{changed} of {len(common)} images compared ({of_first}; {name})"
    return ""


def compared(results, names):
    """(what differs, what is not recorded and so not compared), a list of lines each. names: one a result."""
    different, unknown = [], {}
    for word in dict.fromkeys(word for r in results for word in r.protocol):
        flag = f"--{word.replace('_', '-')}"
        groups = by_value((r.protocol[word], name) for r, name in zip(results, names) if word in r.protocol)
        different += [f"{flag} {versus(groups)}"] if len(groups) > 1 else []
        unknown |= {flag: without} if (without := [name for r, name in zip(results, names)
                                                   if word not in r.protocol]) else {}
    found, sets = {}, dict.fromkeys(name for r in results for name in r.sets)
    for task in sets:
        pairs = [(r.sets[task], name) for r, name in zip(results, names) if task in r.sets]
        for what in pairs[0][0].facts:
            groups = by_value((s.facts[what], name) for s, name in pairs if s.facts[what] is not None)
            # other numbers of images are other choices
            if len(groups) > 1 and not (what == "choice of images" and task in found.get("images", ())):
                found.setdefault(what, {})[task] = versus(groups)
            if without := [name for s, name in pairs if s.facts[what] is None]:
                unknown.setdefault(what, []).extend(without)
        said = other_pixels([(s.contents, name) for s, name in pairs])
        if said:
            found.setdefault("contents", {})[task] = said
        if without := [name for s, name in pairs if not s.contents]:
            unknown.setdefault("contents of the images", []).extend(without)
    for what, by_task in found.items():
        (first, said), *others = by_task.items()
        everywhere = len(by_task) == len(sets) and len({*by_task.values()}) == 1
        different.append(f"{what} {said}" if everywhere else f"{what} of {first}: {said}" + (
            f", and others of {several(task for task, _ in others)}" if others else ""))
    lacking = by_value(({*without}, what) for what, without in unknown.items())
    return different, [f"{', '.join(what)} ({'all' if without == {*names} else several(sorted(without))})"
                       for without, what in lacking]


# ---------------------------------------------------------------------------------------- rows
def spelled(word, value):
    """An option's value in a label."""
    value = f"{value:g}" if isinstance(value, float) else name_of(value)
    return TELLING.get(word, f"{word.replace('_', ' ')} {{}}").replace("{}", value)


def name_of(value):
    """Of a file as an identity has it, its name without its sha256."""
    return re.sub(r" [0-9a-f]{64}", "", str(value))


def make_rows(results, each_seed=False):
    """[Row]: the seeds of one recipe, measured in the same way, together, unless each_seed."""
    groups = []
    for r in results:
        group = next((group for group in groups if not each_seed and r.who == group[0].who
                      and r.seed not in [other.seed for other in group] and {*r.sets} == {*group[0].sets}
                      and not compared([group[0], r], ["", ""])[0]), None)
        group.append(r) if group else groups.append([r])
    whos = [group[0].who for group in groups]

    def values(word, some):
        return [value for value, _ in by_value((who.get(word), None) for who in some)]
    telling = [word for word in TELLING if word in ("interpolate", "step")
               or len([v for v in values(word, whos) if v is not None]) > 1]
    labels = [", ".join([who.get("loss") or name_of(who.get("checkpoint", "CLIP")),
                         *(spelled(word, who[word]) for word in telling if word in who)]) for who in whos]

    def tell_apart(more):
        for label in {label for label in labels if labels.count(label) > 1}:
            same = [k for k, other in enumerate(labels) if other == label]
            for k, words in zip(same, more(same)):
                labels[k] = ", ".join([label, *words])

    def by_options(same):
        words = [w for w in dict.fromkeys(word for k in same for word in whos[k])
                 if w not in (*telling, "checkpoint") and len(values(w, [whos[k] for k in same])) > 1]
        return [[spelled(word, whos[k][word]) for word in words if word in whos[k]] for k in same]
    tell_apart(by_options)
    tell_apart(lambda same: [[f"seed {groups[k][0].seed}"] * (len({groups[j][0].seed for j in same}) > 1)
                             for k in same])
    where = places(results)
    tell_apart(lambda same: [[where[id(groups[k][0])]] for k in same])
    return [Row(label + f" ({len(group)} seeds)" * (len(group) > 1), group)
            for label, group in zip(labels, groups)]


def means(rows):
    """(the sets in the mean: all rows have them, and count them; in words, which are not)."""
    sets = dict.fromkeys(name for row in rows for name in row.results[0].sets)
    everywhere = [name for name in sets if all(row.accuracy(name, kind) is not None
                                               for row in rows for kind in KINDS)]
    counted = [name for name in everywhere if all(r.sets[name].counts for row in rows for r in row.results)]
    missing, uncounted = ([name for name in sets if name not in some] for some in (everywhere, counted))
    uncounted = [name for name in uncounted if name not in missing]
    return counted, ([f"Not in the mean, as not every row has it: {', '.join(missing)}"] * bool(missing)
                     + [f"Not in the mean: {', '.join(uncounted)}"] * bool(uncounted))


# ---------------------------------------------------------------------------------------- tables
def cells(rows, counted):
    """{set, or None for the mean: for each row (clean, robust): (mean over seeds, spread or None, whether it
    is the best), or None}. The best: as printed, with one digit; of several rows."""
    sets = dict.fromkeys(name for row in rows for name in row.results[0].sets)
    found = {}
    for name in [*sets, None]:
        columns = []
        for kind in KINDS:
            values = [row.mean(counted, kind) if name is None else row.accuracy(name, kind) for row in rows]
            shown = [None if v is None else f"{v.mean():.1f}" for v in values]
            best = max((float(text) for text in shown if text), default=None)
            columns.append([None if v is None else (
                text, f"{spread(v):.1f}" if len(v) > 1 else None, len(rows) > 1 and float(text) == best)
                for v, text in zip(values, shown)])
        found[name] = list(zip(*columns))
    return found


def markdown(rows, counted):
    """The table in Markdown."""
    def text(cell):
        if cell is None:
            return "–"
        value, spread, best = cell
        return (f"**{value}**" if best else value) + (f" ± {spread}" if spread else "")

    def literally(name):
        return re.sub(r"([\\`*<])", r"\\\1", name)
    table = cells(rows, counted)
    head = ["clean / robust", *(literally(name) for name in table if name), f"mean of {len(counted)}"]
    return in_pipes([head, ["---", *["--:"] * len(table)], *(
        [literally(row.label), *(" / ".join(map(text, column[k])) for column in table.values())]
        for k, row in enumerate(rows))])


TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
       "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}",
       "ε": r"$\varepsilon$", "α": r"$\alpha$", "±": r"$\pm$", "−": "$-$", "–": "--", "…": r"\dots{}",
       "“": "``", "”": "''", '"': "''", **{c: f"\\{c}" for c in "{}$&#_%"}}


def tex(text):
    """Text for LaTeX, whatever it holds. A [ or * at the start of a row would belong to the \\\\ before."""
    return "".join(TEX.get(c, c) for c in printable(text))


def latex(rows, counted, caption):
    """The table in LaTeX, with booktabs: two columns a set."""
    def text(cell):
        if cell is None:
            return "--"
        value, spread, best = cell
        more = f" {{\\scriptsize$\\pm$ {spread}}}" if spread else ""
        return (f"\\textbf{{{value}}}" if best else value) + more
    table = cells(rows, counted)
    names = [tex(name) for name in table if name] + [f"mean of {len(counted)}"]
    wide = len(table) > 4
    return "\n".join([
        "% \\usepackage{booktabs,graphicx}", "\\begin{table}[t]", "\\centering",
        f"\\caption{{{tex(caption)}}}", *["\\resizebox{\\linewidth}{!}{%"] * wide,
        f"\\begin{{tabular}}{{l{'rr' * len(table)}}}", "\\toprule",
        " & " + " & ".join(f"\\multicolumn{{2}}{{c}}{{{name}}}" for name in names) + " \\\\",
        " ".join(f"\\cmidrule(lr){{{2 * k + 2}-{2 * k + 3}}}" for k in range(len(names))),
        " & " + " & ".join(KINDS * len(names)) + " \\\\", "\\midrule",
        *(" & ".join([tex(row.label), *(text(cell) for column in table.values() for cell in column[k])])
          + " \\\\" for k, row in enumerate(rows)),
        "\\bottomrule", "\\end{tabular}" + "%" * wide, *["}"] * wide, "\\end{table}"])


def draw(path, rows, counted, robust_at):
    """The picture: bars for each set and the mean, each method in its colour of the other figures."""
    sets = dict.fromkeys(name for row in rows for name in row.results[0].sets)
    series, seen = [], []
    for row in rows:
        who = row.results[0].who
        colour = COLOURS["CLIP"] if is_plain(who) else COLOURS.get(who.get("loss"), OTHER_COLOUR)
        hatch = "//" * ("prompt" in who.get("adapt", ""))
        seen.append((colour, hatch))
        values = {kind: [row.accuracy(name, kind) for name in sets] + [row.mean(counted, kind)]
                  for kind in KINDS}
        values = {kind: [np.array([np.nan]) if v is None else v for v in some]
                  for kind, some in values.items()}
        hatch += HATCHES[(seen.count(seen[-1]) - 1) % len(HATCHES)]
        series.append((plain(row.label), colour, hatch, values))
    path.parent.mkdir(parents=True, exist_ok=True)
    bars(SimpleNamespace(out=path.parent, robust_at=robust_at), path.name,
         [*map(plain, sets), f"mean of {len(counted)}"], series)


# ---------------------------------------------------------------------------------------- the command
def notes_on(rows, results):
    """What stands under a table, two lists of lines: what has to be said with it; what else is known."""
    labels = {id(r): row.label for row in rows for r in row.results}
    quoted = [f"“{labels[id(r)]}”" for r in results]
    different, unknown = compared(results, quoted)
    noted = {what: by_value((r.noted[what], label) for r, label in zip(results, quoted) if r.noted[what])
             for what in results[0].noted}
    also = [f"{what} {versus(groups)}" for what, groups in noted.items() if len(groups) > 1]
    warned = [f"{labels[id(r)]}, {name}: {text}" for r in results for name, found in r.sets.items()
              for text in found.warnings]
    return (["±: standard deviation over seeds"] * any(len(row.results) > 1 for row in rows)
            + [f"Not measured in the same way: {text}" for text in different],
            [f"Also different, and never refused: {'; '.join(also)}"] * bool(also)
            + [f"Not recorded, and so not compared: {'; '.join(unknown)}"] * bool(unknown)
            + [f"Warnings in these results: {len(warned)}, the first: {warned[0]}" for _ in warned[:1]])


def main():
    parser = Parser(prog="python -m experiments.compare", description=__doc__)
    option = partial(parser.option, parser)
    option("results", nargs="+", metavar="RUN_OR_EVAL", help="a folder of train_tecoa.py or of "
           "eval_zeroshot.py, one with evaluations in it, or a results.json")
    option("--latex", False, action="store_true", help="LaTeX, with booktabs (default: Markdown)")
    option("--out", metavar="FILE", help="a picture as well: .png, .pdf, .svg (default: none)")
    option("--each-seed", False, action="store_true", help="a row for each seed (default: one for all seeds "
           "of a recipe, mean ± standard deviation)")
    option("--anyway", False, action="store_true", help="also what was not measured in the same way; what "
           "differs then stands under the table (default: refused)")
    args = parser.parse_args()
    with parser.refusing():
        files = {file.resolve(): file for argument in args.results for file in files_in(argument)}
        results = short_names(without_repeats([r for file in files.values() for r in read(file)]))
        different, _ = compared(results, [*places(results).values()])
        if different and not args.anyway:
            raise ValueError(f"not measured in the same way: {'; '.join(different)}. --anyway shows them "
                             "side by side, and this under the table")
        rows = make_rows(results, args.each_seed)
        counted, left_out = means(rows)
        title = ("Zero-shot accuracy (%), clean / robust"
                 + f": {results[0].words}" * bool(results[0].words and not different))
        notes, more = notes_on(rows, results)
        if args.out:
            out, eps = Path(args.out), {r.protocol.get("eps") for r in results} - {None}
            out = out if out.suffix else out.with_name(f"{out.name}.png")
            draw(out, rows, counted, "at {:g}/255".format(*eps) if len(eps) == 1 else "at different ε")
        if args.latex:
            print(latex(rows, counted, ". ".join([title, *left_out, *notes]) + "."),
                  *(f"% {printable(text)}" for text in more), sep="\n")
        else:
            print(title, markdown(rows, counted), *map(printable, [*left_out, *notes, *more]), sep="\n\n")
        if args.out:
            print(("% " if args.latex else "\n") + f"wrote {printable(out)}")


if __name__ == "__main__":
    main()
