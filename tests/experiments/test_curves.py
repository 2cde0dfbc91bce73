"""python -m experiments.curves, of finished, running and empty logs."""
import json

from in_process import here
from PIL import Image

from experiments import curves

ROW = json.dumps({"step": 1, "epoch": 0, "loss": 2.3, "robust": 9.5, "lr": .1, "images_per_s": 70}) + "\n"


def make(folder, text=2 * ROW):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(text)
    return folder


def test_a_picture_of_one_run_and_of_several(monkeypatch, tmp_path):
    a, b = make(tmp_path / "x" / "a"), make(tmp_path / "x" / "b")
    half = make(tmp_path / "y" / "a", ROW + ROW[:9])
    here("experiments/curves.py", a)
    with Image.open(a / "curves.png") as picture:
        assert picture.width > 200
    out, seen = tmp_path / "new" / "both.png", []
    here("experiments/curves.py", a, b / "log.jsonl", a, "--out", out)
    assert out.exists() and not (b / "curves.png").exists()

    monkeypatch.setattr(curves, "draw_curves", lambda *facts: seen.append(facts))
    monkeypatch.setattr(curves, "ROOT", tmp_path)
    for runs in ((a, b / "log.jsonl", a), (a, half)):
        monkeypatch.setattr("sys.argv", ["curves", *map(str, runs)])
        curves.main()
    row = json.loads(ROW)
    # by their folders' names, or by paths where those are the same
    assert seen == [(tmp_path / "out" / "curves.png", {"a": [row] * 2, "b": [row] * 2}),
                    (tmp_path / "out" / "curves.png", {str(a): [row] * 2, str(half): [row]})]


def test_what_cannot_be_drawn_is_one_line_with_status_2(tmp_path):
    a, empty = make(tmp_path / "a"), make(tmp_path / "empty", "")
    begun = make(tmp_path / "begun", '{"step": 1, "epoch": 0, "nonfinite": [3]}\n{"st')
    for words, said in (((empty,), "the log of empty has no steps yet"), ((a, begun), "the log of begun has"),
                        ((tmp_path,), "log.jsonl"), ((tmp_path / "absent",), "absent"),
                        ((a, "--out", a / "curves.xyz"), "'xyz' is not supported"),
                        ((a, "--out", a / "log.jsonl"), "'jsonl' is not supported"),
                        ((a, "--out", "/proc/x.png"), "/proc/x.png")):
        done = here("experiments/curves.py", *words, status=2)
        assert done.stderr.count("\n") == 1 and said in done.stderr and done.stdout == "", done.stderr
    assert {path.name for path in a.iterdir()} == {"log.jsonl"} and (a / "log.jsonl").read_text() == 2 * ROW
