"""What people's folders, class names and images do to both stages: a number is right, or its condition is
said, or there is none."""
import json
from math import comb

import numpy as np
import pytest
import torch
from in_process import here
from noise import write_classes
from PIL import Image

from harness.evaluation import choose_examples
from harness.reports import guessing, in_pipes, mean, nothing_readable, summary
from prompts import warn_once
from tasks.images import say_once
from tasks.task import load_task
from toy import world

QUICK = ("--pretrained", "none", "--steps", 1, "--workers", 0)


def write_images(root, names, each=3):
    return f"folder:{write_classes(root, names, each)}"


def evaluate(*words, status=0):
    """(stdout, stderr) of an evaluation."""
    say_once.cache_clear()
    warn_once.cache_clear()
    done = here("eval_zeroshot.py", *QUICK, *words, status=status)
    return done.stdout, done.stderr


def rows_of(out):
    return json.loads((out / "results.json").read_text())["tasks"]


# --------------------------------------------------------------------------------------------- conditions
def test_an_evaluation_says_what_it_was_of(tmp_path):
    for split in ("train", "valid"):
        write_images(tmp_path / "set" / split, ["0", "1", "2"])
    name, out = f"folder:{tmp_path / 'set'}", tmp_path / "out"
    stdout, stderr = evaluate("--tasks", name, "--out", out)
    row = rows_of(out)[name]
    assert (row["n"], row["split"], row["class_names"]) == (9, "val", ["0", "1", "2"])
    assert row["template"] == "This is a photo of a {}" and row["source"] == f"{tmp_path}/set/valid"
    assert f"{name}: val images of {tmp_path}/set/valid; prompts like 'This is a photo of a 0'\n" in stdout
    said = "3 of 3 class names are numbers: '0', '1', '2'; --class-names FILE gives others"
    assert said in stderr and said in stdout and said in row["warnings"][0]
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()][1:]
    assert [line["file"] for line in lines] == [f"{c}/{i}.png" for c in range(3) for i in range(3)]
    # a finished one says it again
    assert said in evaluate("--tasks", name, "--out", out)[0]


def test_own_names_and_templates_are_other_evaluations(tmp_path, monkeypatch):
    """The numbers are those of a folder that is called so; files count by their content."""
    monkeypatch.chdir(tmp_path)
    name, other = write_images(tmp_path / "a", ["0", "1", "2"]), write_images(
        tmp_path / "b", ["black cat", "pale dog", "red bird"])
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("0\tblack cat\n1\tpale dog\n2\tred bird\n")
    templates.write_text("a {}\nthe {}\n")
    own = ("--tasks", name, "--class-names", names)
    assert "class names are numbers" not in "".join(evaluate(*own, "--out", "x"))
    evaluate("--tasks", other, "--out", "y")
    x, y = rows_of(tmp_path / "x")[name], rows_of(tmp_path / "y")[other]
    assert x["class_names"] == y["class_names"] == ["black cat", "pale dog", "red bird"]
    assert x | {"source": ""} == y | {"source": ""}
    evaluate(*own, "--template", templates)
    names.write_text("0\tcat\n1\tdog\n2\tbird\n")
    evaluate(*own, "--template", "a drawing of a {}")
    found = [rows_of(path.parent)[name] for path in (tmp_path / "out").glob("eval-*/results.json")]
    assert sorted((str(row["template"]), row["class_names"][0]) for row in found) == [
        ("['a {}', 'the {}']", "black cat"), ("a drawing of a {}", "cat")]
    for more, said in ((("--template", "a cat"), "no {} for the class name"),
                       (("--template", "{}", "--templates", "openai"), "give one of them"),
                       (("--class-names", tmp_path / "no"), "No such file"),
                       (("--resize", "some"), "--resize"), (("--resize", 8), "is less than the 32 pixels")):
        _, stderr = evaluate("--tasks", name, *more, "--out", "z", status=2)
        assert said in stderr and stderr.count("\n") == 1


def test_images_of_which_none_can_be_read_are_an_error(tmp_path):
    """Not an accuracy of 0.0; what else was evaluated stands."""
    name, out = write_images(tmp_path / "set", ["cat", "dog"], each=2), tmp_path / "out"
    for path in (tmp_path / "set").rglob("*.png"):
        path.write_bytes(b"no image")
    stdout, stderr = evaluate("--tasks", name, "--out", tmp_path / "alone", status=2)
    assert f"no image of {name} can be read: there is no accuracy" in stderr.splitlines()[-1]
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert results["mean"] == {"tasks": 0, "clean": None, "robust": None} and "| – | 0.0–100.0 |" in stdout
    for _ in range(2):
        stdout, stderr = evaluate("--tasks", f"colours,{name}", "--limit", 12, "--out", out, status=2)
        assert rows_of(out)["colours"]["n"] == 12 and rows_of(out)[name]["clean"] is None
        assert "| **mean of 1** |" in stdout and "no image of folder" in stderr
    done = here("train_tecoa.py", "--pretrained", "none", "--dataset", "digits", "--tasks", name, "--limit",
                8, "--batch-size", 8, "--eval-steps", 1, "--out", tmp_path / "run", status=2)
    assert "there is no accuracy" in done.stderr and not (tmp_path / "run" / "results.json").exists()


# --------------------------------------------------------------------------------------------- chance
def test_guessing_is_what_a_binomial_says():
    """Against its sum by hand: the probability of as many right answers or more."""
    def p_value(right, n, classes):
        return sum(comb(n, k) * (classes - 1) ** (n - k) for k in range(right, n + 1)) / classes ** n
    for n, classes in ((200, 10), (40, 2), (1000, 1000), (9, 3)):
        for right in range(0, min(n, 60) + 1):
            row = {"n": n, "right": right, "chance": 100 / classes, "classes": classes}
            assert bool(guessing(row)) == (p_value(right, n, classes) > .05), (n, classes, right)
    assert guessing({"n": 200, "right": 13, "chance": 10, "classes": 10}).startswith(
        "clean accuracy at chance: 13 of 200 images are right, and guessing among 10 classes gives 20.0")
    # too few to tell from chance whatever they are taken for
    assert guessing({"n": 4, "right": 4, "chance": 50, "classes": 2}) == ""
    assert guessing({"n": 0, "right": 0, "chance": 50, "classes": 2}) == ""


def test_a_table_without_numbers():
    row = summary([{"image": 0, "error": "gone"}], ["pgd"], 2, 1)
    assert row["clean"] is row["robust"] is None
    assert mean({"a": row}) == {"tasks": 0, "clean": None, "robust": None}
    assert "of a, b can be read" in nothing_readable({"tasks": {"a": row}, "adapted": {"b": row}})
    assert in_pipes([["a|b", "c\nd"]]) == "| a\\|b | c\\nd |"


# --------------------------------------------------------------------------------------------- pictures
def test_an_image_that_gives_nan_is_drawn_as_that():
    def judge(task, batch, attack):
        return [{"image": 0, "label": 1, "clean": -1}], {}
    task = load_task("digits", "val", limit=1)
    example, *_ = choose_examples(judge, [task], torch.device("cpu"))
    assert (example["clean"], example["truth"]) == ("NaN", world.TASKS["digits"][0][1])


# --------------------------------------------------------------------------------------------- own size
def test_small_images_of_a_folder_are_attacked_at_their_own_size(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    evaluate("--tasks", f"folder:{tmp_path / 'set'}", "--resize", "none", "--save-adv", tmp_path / "adv",
             "--out", tmp_path / "out")
    (saved,) = (tmp_path / "adv").rglob("*.npz")
    with np.load(saved) as arrays:
        assert arrays["x_adv"].shape[1:] == (3, 20, 20)
        for number, x in zip(arrays["image"] % 6, arrays["x"]):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
            assert np.array_equal(x.transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("resize", ["none", "40"])
def test_training_takes_the_same_options(tmp_path, resize):
    write_images(tmp_path / "set" / "Train", ["0", "1"], each=4)
    name = write_images(tmp_path / "set" / "testing", ["0", "1"], each=2).removesuffix("/testing")
    (tmp_path / "names").write_text("cat\ndog\n")
    here("train_tecoa.py", "--pretrained", "none", "--dataset", name, "--tasks", name, "--batch-size", 4,
         "--epochs", 1, "--eval-steps", 1, "--workers", 0, "--out", tmp_path / "run", "--resize", resize,
         "--class-names", tmp_path / "names", "--template", "a {}")
    for table in ("results_before.json", "results.json"):
        row = json.loads((tmp_path / "run" / table).read_text())["tasks"][name]
        assert (row["class_names"], row["template"], row["split"]) == (["cat", "dog"], "a {}", "test")
