"""python -m experiments.compare: tables of made-up and real results; what is refused, and by which name."""
import json
import re
from statistics import mean, stdev

import pytest
from in_process import here
from PIL import Image

from experiments import compare

CONFIG = {"model": "toy", "tasks": "all", "data_root": None, "limit": None, "norm": "linf", "eps": 11.0,
          "device": "cpu", "dtype": "fp32", "resize": None, "class_names": None, "template": None}
TRAINING = {"steps": 2, "step_size": 6.875, "dataset": "toy", "labels": "true", "adapt": "full", "lr": .01,
            "epochs": 2, "eval_steps": 40, "shots": None}
EVALUATION = {"attack": "pgd", "steps": 40, "step_size": 2.75, "queries": 500, "restarts": 1,
              "last_iterate": False, "templates": "paper", "interpolate": None}


def rows(numbers, **more):
    """{set: row of results.json}, from {set: (clean, robust)}."""
    return {name: {"n": 50, "clean": clean, "robust": robust, "classes": 3, "attacks": ["pgd"],
                   "split": "test", "template": "a {}", "class_names": ["cat", "dog", "cow"], "warnings": []}
            | more
            for name, (clean, robust) in numbers.items()}


def table(numbers, **more):
    """What a table has in results.json."""
    values = [pair for pair in numbers.values() if None not in pair]
    clean, robust = map(mean, zip(*values)) if values else (None, None)
    return {"tasks": rows(numbers, **more), "mean": {"tasks": len(values), "clean": clean, "robust": robust}}


def evaluation(folder, numbers, *, seed=0, ckpt=None, row=(), crc32=7, **config):
    """An evaluation's folder, of the plain CLIP unless ckpt, its results and its journal."""
    config = CONFIG | EVALUATION | {"seed": seed, "pretrained": f"seed{seed}", "ckpt": ckpt} | config
    identity = config | {"ckpt": ckpt and f"ckpt.pt {'0' * 64}", "code": "c0de"}
    folder.mkdir(parents=True)
    about = {"choice of images": "aa", "number of images": "50 of 50", "stamp": ""}
    lines = [{"evaluation": identity, "made_of": {name: about for name in numbers}},
             *({"task": name, "image": i, "label": i % 3, "crc32": crc32 + i} for name in numbers
               for i in range(50))]
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "results.json", {"config": config, "identity": identity,
                                    "protocol": "PGD-40; linf"} | table(numbers, **dict(row)))
    return folder


def run(folder, numbers, before=None, *, seed=0, loss="tecoa", adapted=None, **config):
    """A run's folder, with the table before if there is one."""
    config = CONFIG | TRAINING | {"seed": seed, "pretrained": f"seed{seed}", "loss": loss} | config
    folder.mkdir(parents=True)
    data = [{"choice of images": "aa", "pixels": {"0": 7, "9": 16, "20": None}} for _ in numbers]
    more = {"adapted": rows(adapted)} if adapted else {}
    facts = {"config": config, "identity": config, "code": "c0de", "trained": 5, "step": 9,
             "data": [{}, *data, *({} for _ in adapted or ())]}
    write(folder / "results.json", facts | table(numbers) | more)
    if before:
        write(folder / "results_before.json", {"config": config, "data": data} | table(before))
    return folder


def write(path, value):
    path.write_text(json.dumps(value))


def change(path, **more):
    write(path, json.loads(path.read_text()) | more)


def show(*words, status=0):
    done = here("experiments/compare.py", *words, status=status)
    assert (done.stderr.count("\n"), bool(done.stdout)) == ((1, False) if status else (0, True)), done
    return done.stderr if status else done.stdout


def parsed(text):
    """{label: [[clean, robust] for each column]} of a table in Markdown or LaTeX, and its columns' names."""
    if text.startswith("%"):
        body = text[text.index("\\toprule"):text.index("\\bottomrule")]
        head, _, *lines = [line.removesuffix(" \\\\") for line in body.splitlines()
                           if " & " in line or "multicolumn" in line]
        names = re.findall(r"\\multicolumn\{2\}\{c\}\{(.*?)\}(?: &|$)", head)
        found = [line.split(" & ") for line in lines]
        return {label: list(map(list, zip(cells[::2], cells[1::2]))) for label, *cells in found}, names
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {label: [cell.split(" / ") for cell in cells] for label, *cells in lines}, head[1:]


@pytest.mark.parametrize("latex", [False, True])
def test_numbers_means_spreads_and_the_best_in_bold(tmp_path, latex):
    """Against a computation of its own, from the numbers that were written."""
    made = {"CLIP": [{"a": (90, 5), "b": (80, 3.04)}], "ce": [{"a": (60, 20), "b": (50, 30.1)}],
            "tecoa": [{"a": (70, 22.04), "b": (80.04, 41)}, {"a": (75, 18), "b": (79.96, 43)},
                      {"a": (71, 20), "b": (80, 46.5)}]}
    run(tmp_path / "ce", made["ce"][0], made["CLIP"][0], loss="ce")
    for seed, numbers in enumerate(made["tecoa"]):
        run(tmp_path / f"t{seed}", numbers, made["CLIP"][0] if seed == 0 else None, seed=seed)
    found, columns = parsed(show(*sorted(tmp_path.iterdir()), *["--latex"] * latex))
    assert columns == ["a", "b", "mean of 2"] and [*found] == ["CLIP", "ce", "tecoa (3 seeds)"]
    wanted = {label: [[[row["a"][k] for row in seeds], [row["b"][k] for row in seeds],
                       [(row["a"][k] + row["b"][k]) / 2 for row in seeds]] for k in (0, 1)]
              for label, seeds in made.items()}
    for c in range(3):
        for k in (0, 1):
            best = max(round(mean(kinds[k][c]), 1) for kinds in wanted.values())
            for (label, kinds), cells in zip(wanted.items(), found.values()):
                values = kinds[k][c]
                text = f"{mean(values):.1f}"
                if float(text) == best:
                    text = f"\\textbf{{{text}}}" if latex else f"**{text}**"
                if len(values) > 1:
                    spread = f"{stdev(values):.1f}"
                    text += f" {{\\scriptsize$\\pm$ {spread}}}" if latex else f" ± {spread}"
                assert cells[c][k] == text, (label, c, k)
    # a tie, as printed: both
    assert all(cells[1][0].startswith(("**80.0**", "\\textbf{80.0}")) for label, cells in found.items()
               if label != "ce")
    each, _ = parsed(show(*sorted(tmp_path.iterdir()), "--each-seed"))
    assert [*each] == ["CLIP", "ce", "tecoa, seed 0", "tecoa, seed 1", "tecoa, seed 2"]
    assert each["tecoa, seed 2"][1] == ["**80.0**", "**46.5**"]


NUMBERS = {"a": (90., 5.), "b": (80., 3.)}
OTHER = {"a": (70., 25.), "b": (60., 23.)}


@pytest.mark.parametrize("said, config, row", [
    ("--eps 11 (one) / 6 (two)", {"eps": 6.}, {}), ("--norm linf (one) / l2 (two)", {"norm": "l2"}, {}),
    ("--steps 40 (one) / 20 (two)", {"steps": 20}, {}),
    ("--step-size 2.75 (one) / 1 (two)", {"step_size": 1.}, {}),
    ("--restarts 1 (one) / 5 (two)", {"restarts": 5}, {}),
    ("--last-iterate False (one) / True (two)", {"last_iterate": True}, {}),
    ("--templates paper (one) / openai (two)", {"templates": "openai"}, {}),
    ("--resize None (one) / 224 (two)", {"resize": 224}, {}),
    ("attacks pgd (one) / pgd,square (two)", {}, {"attacks": ["pgd", "square"]}),
    ("split test (one) / val (two)", {}, {"split": "val"}),
    ("template a {} (one) / a {}. (two)", {}, {"template": "a {}."}),
    ("class names cow (one) / ox (two)", {}, {"class_names": ["cat", "dog", "ox"]}),
    ("class names cat, dog, cow (one) / cat, cow, dog (two)", {}, {"class_names": ["cat", "cow", "dog"]}),
    ("classes 3 (one) / 4 (two)", {}, {"classes": 4}), ("images 50 (one) / 49 (two)", {}, {"n": 49}),
    ("contents 50 of 50 images compared (one; two)", {"crc32": 8}, {})])
def test_what_was_measured_in_another_way_is_refused_by_name_unless_told(tmp_path, said, config, row):
    one = evaluation(tmp_path / "one", NUMBERS)
    two = evaluation(tmp_path / "two", OTHER, seed=1, row=row, **config)
    text = show(one, two, status=2)
    # and nothing else
    assert f"same way: {said}. --anyway" in text
    shown = show(one, two, "--anyway")
    for place, label in (("one", "“CLIP, seed 0”"), ("two", "“CLIP, seed 1”")):
        said = re.sub(rf"(?<=[( ]){place}(?=[);])", label, said)
    # each row has its own: no mean over seeds of two protocols
    table, _, rest = shown.partition("\n\nNot measured in the same way: ")
    assert rest.startswith(said) and len(parsed(table)[0]) == 2
    assert "PGD" not in table
    assert said[:9].replace("_", "") in show(one, two, "--anyway", "--latex").replace("\\_", "")


def test_a_field_of_another_version_counts_and_one_that_is_not_there_is_said(tmp_path):
    one = evaluation(tmp_path / "one", NUMBERS, protocol="tecoa")
    two, old = run(tmp_path / "two", OTHER, protocol="fare"), run(tmp_path / "old", OTHER, loss="ce")
    assert "--protocol tecoa (one) / fare (two)" in show(one, two, old, status=2)
    text = show(one, old)
    assert "Not recorded, and so not compared: --protocol (“ce”)" in text
    for path in (one / "results.json", old / "results.json"):
        found = json.loads(path.read_text())
        for row in found["tasks"].values():
            for word in ("split", "template", "class_names"):
                del row[word]
        write(path, found)
    (one / "images.jsonl").unlink()
    text = show(one, old)
    assert "split, template, class names (all); choice of images, contents of the images (“CLIP”)" in text


def test_what_changes_no_number_is_not_compared(tmp_path):
    """Where it ran, the seed of random starts, the queries of an attack that did not run; the precision and
    the sources are told."""
    one = evaluation(tmp_path / "one", NUMBERS)
    two = evaluation(tmp_path / "two", OTHER, ckpt="gone/best.pt", queries=9, device="cuda", dtype="bf16",
                     limit=999, data_root="/x", seed=3)
    text = show(one, two)
    assert [*parsed(text)[0]] == ["CLIP", "best"]
    assert "Also different, and never refused: --dtype fp32 (“CLIP”) / bf16 (“best”)" in text
    # of Square they count
    for name, queries in (("three", 500), ("four", 9)):
        evaluation(tmp_path / name, OTHER, queries=queries, row={"attacks": ["square"]})
    assert "--queries 500 (three) / 9 (four)" in show(tmp_path / "three", tmp_path / "four", status=2)


def test_a_run_beside_an_evaluation_of_it(tmp_path):
    """PGD-40 in steps of ε/4 is stage 1's; what is in its fingerprints is compared with the journal."""
    folder = run(tmp_path / "r", OTHER, NUMBERS, adapted={"seen": (99., 9.)})
    inside = evaluation(folder / "eval", OTHER | {"c": (10., 1.)}, ckpt="out/r/ckpt.pt")
    text = show(folder, inside)
    found, columns = parsed(text)
    assert columns == ["a", "b", "seen", "c", "mean of 2"]
    assert [*found] == ["CLIP", "tecoa, r", "tecoa, r/eval"]
    assert found["tecoa, r"][2:4] == [["**99.0**", "**9.0**"], ["–", "–"]]
    assert found["tecoa, r/eval"][2:] == [["–", "–"], ["**10.0**", "**1.0**"], ["65.0", "**24.0**"]]
    assert "Not in the mean, as not every row has it: seen, c" in text
    lines = (inside / "images.jsonl").read_text()
    (inside / "images.jsonl").write_text(lines.replace('"crc32": 16}', '"crc32": 1}'))
    text = show(folder, inside, status=2)
    assert "contents of a: 1 of 2 images compared (r; r/eval), and others of b" in text


def test_labels_say_what_differs_and_no_more(tmp_path):
    def labels(*folders):
        return [*parsed(show(*folders))[0]]
    a = run(tmp_path / "a", OTHER)
    lr, linear = run(tmp_path / "b", OTHER, lr=.05), run(tmp_path / "c", OTHER, adapt="linear")
    eps, ce = run(tmp_path / "d", OTHER, loss="ce"), run(tmp_path / "e", OTHER, loss="ce", lr=.5)
    assert labels(a) == ["tecoa"] and labels(a, lr) == ["tecoa, lr 0.01", "tecoa, lr 0.05"]
    assert labels(a, linear, eps) == ["tecoa, full", "tecoa, linear", "ce, full"]
    assert labels(a, ce) == ["tecoa", "ce"]
    few = run(tmp_path / "f", OTHER, shots=5)
    assert labels(a, few) == ["tecoa", "tecoa, shots 5"]
    # evaluations of its checkpoint, of an earlier one, of a share of it; of a file that nobody knows
    inside = [evaluation(a / name, OTHER, ckpt="x/a/ckpt.pt", interpolate=alpha)
              for name, alpha in (("eval", None), ("step30-eval", None), ("eval-i", .5))]
    unknown = evaluation(tmp_path / "g", OTHER, ckpt="x/TeCoA/ckpt.pt")
    assert labels(*inside, unknown) == ["tecoa", "tecoa, after step 30", "tecoa, α = 0.5", "TeCoA"]
    # the same recipe and seed twice: by where they are
    again = run(tmp_path / "again", OTHER)
    assert labels(a, again, a / "results.json") == ["tecoa, a", "tecoa, again"]


def test_a_checkpoint_evaluated_elsewhere_is_known_while_it_is_the_same_file(tmp_path):
    folder = run(tmp_path / "r", OTHER)
    (folder / "ckpt.pt").write_text("weights")
    there = evaluation(tmp_path / "elsewhere", OTHER, ckpt=str(folder / "ckpt.pt"))
    assert [*parsed(show(there))[0]] == ["r"]
    results = json.loads((there / "results.json").read_text())
    results["identity"]["ckpt"] = compare.content(str(folder / "ckpt.pt"), "ckpt")
    write(there / "results.json", results)
    compare.hashed.cache_clear()
    assert [*parsed(show(there))[0]] == ["tecoa"]


def test_the_plain_clip_once_and_first(tmp_path):
    one = run(tmp_path / "one", OTHER, NUMBERS)
    two = run(tmp_path / "two", {"a": (1., 1.)}, {"a": NUMBERS["a"]}, loss="ce")
    assert [*parsed(show(one, two))[0]] == ["CLIP", "tecoa", "ce"]
    # the toy's, each with its own seed's weights, whatever seed their attacks had
    toys = [evaluation(tmp_path / f"c{k}", {"a": (90. + k, 5.)}, pretrained=f"seed{k}") for k in (0, 1)]
    assert [*parsed(show(*toys))[0]] == ["CLIP (2 seeds)"]
    # another CLIP stays, though its numbers are the same
    other = evaluation(tmp_path / "other", {"a": NUMBERS["a"]}, model="ViT-B-32")
    assert [*parsed(show(one, other))[0]] == ["CLIP, toy", "CLIP, ViT-B-32", "tecoa, toy"]
    # other numbers are another measurement
    three = run(tmp_path / "three", OTHER, {"a": (90., 5.5)}, loss="fare")
    assert [*parsed(show(one, three))[0]] == ["CLIP, one", "CLIP, three", "tecoa", "fare"]


def test_sets_that_do_not_count(tmp_path):
    """Of a set without a readable image there is no accuracy; one that its protocol leaves out stays out."""
    one = evaluation(tmp_path / "one", NUMBERS | {"none": (None, None), "country211": (10., 1.)})
    results = json.loads((one / "results.json").read_text())
    results["tasks"]["none"]["n"] = 0
    change(one / "results.json", tasks=results["tasks"])
    text = show(one)
    assert parsed(text)[0] == {"CLIP": [["90.0", "5.0"], ["80.0", "3.0"], ["–", "–"], ["10.0", "1.0"],
                                        ["85.0", "4.0"]]}
    assert "as not every row has it: none\n" in text and "Not in the mean: country211\n" in text
    three = evaluation(tmp_path / "three", NUMBERS | {"country211": (10., 1.)}, protocol="ttc")
    assert "mean of 3" in show(three)
    two = evaluation(tmp_path / "two", {"z": (1., 1.)}, seed=1)
    assert [cells[-1] for cells in parsed(show(one, two))[0].values()] == [["–", "–"]] * 2


def test_the_classes_adapted_on_are_shown_and_do_not_count(tmp_path):
    text = show(run(tmp_path / "one", NUMBERS, adapted={"seen": (10., 1.)}))
    assert parsed(text) == ({"tecoa": [["90.0", "5.0"], ["80.0", "3.0"], ["10.0", "1.0"], ["85.0", "4.0"]]},
                            ["a", "b", "seen", "mean of 2"]) and "Not in the mean: seen\n" in text


def test_a_journal_of_something_else_says_nothing_of_the_images(tmp_path):
    one = evaluation(tmp_path / "one", NUMBERS)
    two = evaluation(tmp_path / "two", OTHER, ckpt="x.pt", crc32=8)
    assert "contents" in show(one, two, status=2)
    path = two / "images.jsonl"
    path.write_text(path.read_text().replace("c0de", "c1de", 1))
    assert "choice of images, contents of the images (“x”)" in show(one, two)


def test_moved_sets_have_one_column(tmp_path):
    one = evaluation(tmp_path / "one", {"folder:/x/photos": (90., 5.)})
    two = evaluation(tmp_path / "two", {"folder:/y/z/photos/": (80., 4.)}, seed=1)
    assert parsed(show(one, two, "--each-seed"))[1] == ["photos", "mean of 1"]
    both = evaluation(tmp_path / "both", {"folder:/x/photos": (90., 5.), "folder:/y/photos": (80., 4.)})
    assert parsed(show(both))[1] == ["folder:/x/photos", "folder:/y/photos", "mean of 2"]


def test_warnings_are_told(tmp_path):
    one = evaluation(tmp_path / "one", NUMBERS, row={"warnings": ["masked | gradients"]})
    assert "Warnings in these results: 2, the first: CLIP, a: masked | gradients" in show(one)


AWKWARD = r"[b]*_{x}$y$&%#~^\n|<é>"


def test_any_name_is_text_in_latex_and_in_markdown(tmp_path):
    one = evaluation(tmp_path / "one", {AWKWARD: (90., 5.)}, ckpt=f"x/{AWKWARD}.pt")
    two = evaluation(tmp_path / "two", {AWKWARD: (80., 4.)}, row={"split": AWKWARD}, dtype="bf16")
    text = show(one, two, "--latex", "--anyway")
    for line in text.splitlines():
        if line.startswith("%"):
            continue
        # what is left without TeX's own words, and characters after a backslash, has nothing special in it
        left = re.sub(r"\\text(backslash|asciitilde|asciicircum|less|greater|bar)\{\}", "", line)
        left = re.sub(r"\\[{}$&#_%]", "", left).removesuffix("{%").removesuffix("%")
        left = re.sub(r"\$\\(varepsilon|pm)\$", "", left)
        assert not re.search(r"[$#_%~^|<>]", left), line
        assert left.count("{") == left.count("}") or "resizebox" in line or line in "}%", line
        assert not re.match(r"\s*[\[*]", line)
    assert r"{[}b{]}{*}\_\{x\}\$y\$\&\%\#\textasciitilde{}\textasciicircum{}\textbackslash{}n" in text
    assert "\\\\\n" in text and text.count("\\begin{") == text.count("\\end{") == 2
    (label, *_), names = parsed(show(one, two, "--anyway").replace("\\|", "!"))
    assert label == "CLIP" and names[0] == r"[b]\*_{x}$y$&%#~^\\n!\<é>"


def test_a_picture(tmp_path, monkeypatch):
    one = run(tmp_path / "one", OTHER, NUMBERS | {AWKWARD: (50., 2.)})
    two = run(tmp_path / "two", OTHER, adapt="image-prompt", loss="ce")
    text = show(one, two, "--out", tmp_path / "new" / "picture.png")
    assert text.endswith("picture.png\n")
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        assert picture.width > 400
    show(one, "--out", tmp_path / "picture.pdf")
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")
    assert show(one, "--latex", "--out", tmp_path / "bare").endswith("\n% wrote " + f"{tmp_path}/bare.png\n")
    seen = []
    monkeypatch.setattr(compare, "bars", lambda plan, name, sets, series: seen.append((plan, sets, series)))
    rows = compare.make_rows([r for path in (one, two) for r in compare.read(path / "results.json")])
    compare.draw(tmp_path / "x.png", rows, ["a", "b"], "at 11/255")
    (_, sets, series), = seen
    assert sets == ["a", "b", AWKWARD, "mean of 2"]
    assert [(label, colour, hatch) for label, colour, hatch, _ in series] == [
        ("CLIP", "tab:gray", ""), ("tecoa, full", "tab:blue", ""), ("ce, image-prompt", "tab:orange", "//")]
    assert [value.tolist() for value in series[0][3]["robust"]] == [[5.], [3.], [2.], [4.]]


def test_what_is_no_result_is_one_line_with_status_2(tmp_path):
    good = evaluation(tmp_path / "good", NUMBERS)
    left = evaluation(tmp_path / "left", NUMBERS)
    change(left / "results.json", unfinished=["c", "d"])
    none = run(tmp_path / "none", {})
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "images.jsonl").write_text("{}\n")
    foreign = {}
    for name, text in (("text", "hello"), ("list", "[1, 2]"), ("empty", ""), ("other", '{"mean": 3}'),
                       ("odd", '{"tasks": {"a": {"n": 1, "clean": "x", "robust": 1}}}')):
        foreign[name] = tmp_path / f"{name}.json"
        foreign[name].write_text(text)
    whole = json.loads((good / "results.json").read_text())
    for name, more in (("odd config", {"config": {"ckpt": 5}}), ("odd mean", {"mean": 3}), ("nan", {
            "tasks": {"a": whole["tasks"]["a"] | {"clean": float("nan")}}}),
            ("odd attacks", {"tasks": {"a": whole["tasks"]["a"] | {"attacks": 3}}})):
        foreign[name] = tmp_path / f"{name}.json"
        write(foreign[name], whole | more)
    for path, said in ((left, "left/results.json is unfinished: without c, d"), (none, "--tasks none"),
                       (begun, "holds an evaluation, and no results.json yet"),
                       (tmp_path / "absent", "absent does not exist"), *(
                           (path, path.name) for path in foreign.values())):
        assert said in show(good, path, status=2), path
    assert "'xyz' is not supported" in show(good, "--out", tmp_path / "a.xyz", status=2)
    # a folder of evaluations stands for them
    assert len(parsed(show(tmp_path / "good"))[0]) == 1
    evaluation(none / "eval-a", NUMBERS, ckpt="x/none/ckpt.pt"), evaluation(none / "eval-b", OTHER)
    assert [*parsed(show(none))[0]] == ["CLIP", "tecoa"]


def test_a_real_run_beside_real_evaluations(tmp_path, read_json):
    """With everything recorded; and the images of a set that is drawn are the same in both stages."""
    some = ("--pretrained", "none", "--tasks", "digits,colours", "--limit", 16, "--workers", 0)
    out = tmp_path / "run"
    here("train_tecoa.py", *some, "--max-steps", 1, "--batch-size", 8, "--eval-steps", 2, "--out", out)
    here("eval_zeroshot.py", *some, "--steps", 2, "--ckpt", out / "ckpt.pt", "--out", tmp_path / "eval")
    text = show(out, tmp_path / "eval")
    found, columns = parsed(text.replace("*", ""))
    assert columns == ["digits", "colours", "seen", "mean of 2"] and "Not recorded" not in text
    assert [*found] == ["CLIP", "tecoa, run", "tecoa, eval"]
    for label, path in zip(found, ("run/results_before.json", "run/results.json", "eval/results.json")):
        results = read_json(tmp_path / path)
        for cells, row in zip(found[label], [*results["tasks"].values()] + [results["mean"]] * 2):
            assert cells == [f"{row['clean']:.1f}", f"{row['robust']:.1f}"] or cells == found[label][2]
        assert found[label][3] == [f"{results['mean'][kind]:.1f}" for kind in ("clean", "robust")]
    here("eval_zeroshot.py", *some, "--steps", 2, "--eps", 12, "--ckpt", out / "ckpt.pt", "--overwrite",
         "--out", tmp_path / "eval")
    said = show(out, tmp_path / "eval", status=2)
    assert "--eps 11 (run) / 12 (eval); --step-size 5.5 (run) / 6 (eval)" in said
