"""Pictures say what the log says, draw names as they are, and cost no result."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import WORDS, changed_copy, log_of

from harness import reports
from harness.log import read_log
from harness.reports import draw_curves, draw_examples, try_to_draw

NAMES = ("two $ in $a name", r"$\frac$", "_under", "日本", "line\nend", "\udc80")


def row(step, **more):
    found = {"step": step, "epoch": 0, "loss": 1 / step, "robust": step % 7, "lr": .1, "images_per_s": 9}
    return found | more


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of files."""
    figures = []
    monkeypatch.setattr(reports, "write_figure", lambda figure, path: figures.append(figure))
    return figures


def test_the_curves_are_the_logs(drawn):
    short = [row(10), row(12, robust=50.), {"step": 13, "epoch": 0, "nonfinite": [4, 2]}, row(20, lr=0.)]
    long = [row(step) for step in range(1, 1201)]
    draw_curves("curves.png", {"short": short, "long": long})
    for axis, key in zip(drawn[0].axes, ("loss", "robust", "lr", "images_per_s"), strict=True):
        first, second, *lost = axis.lines
        assert first.get_xdata().tolist() == [10, 12, 20]
        assert first.get_ydata().tolist() == [short[k][key] for k in (0, 1, 3)]
        # of 1,200 rows the means of each three
        assert np.allclose(second.get_xdata(), np.arange(2, 1200, 3))
        assert np.allclose(second.get_ydata(), np.reshape([r[key] for r in long], (400, 3)).mean(1))
        assert [line.get_xdata().tolist() for line in lost] == ([[13], []] if key == "loss" else [])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["short", "long"]
    with pytest.raises(ValueError, match="the log of short has no steps yet"):
        draw_curves("curves.png", {"short": short[2:3]})


def test_names_are_drawn_as_they_are(drawn, monkeypatch, tmp_path):
    x = torch.rand(3, 8, 8)
    example = {"x": x, "x_adv": 1 - x, "position": 0}
    examples = [example | dict.fromkeys(("task", "truth", "clean", "adversarial"), name) for name in NAMES]
    draw_curves("", {name: [row(1)] for name in NAMES})
    draw_examples("", {NAMES[0]: examples}, 8)
    escaped = [*NAMES[:-1], "\\udc80"]
    legend = drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in legend] == escaped
    axes = drawn[1].axes
    titles, truths = [axis.title for axis in axes[:6]], [axis.xaxis.label for axis in axes[:6]]
    assert [text.get_text() for text in titles] == escaped
    # on a line of their own words
    assert [text.get_text() for text in truths] == [name.replace("\n", " ") for name in escaped]
    label = axes[-6].yaxis.label
    assert NAMES[0] in label.get_text()
    assert not any(text.get_parse_math() for text in (*legend, *titles, *truths, label))
    monkeypatch.undo()
    draw_curves(tmp_path / "curves.png", {name: [row(1), row(2)] for name in NAMES})
    draw_examples(tmp_path / "examples.png", {NAMES[0]: examples}, 8)
    for name in ("curves.png", "examples.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_a_picture_is_whole_or_not_there(monkeypatch, tmp_path, capsys):
    from matplotlib.figure import Figure

    def half(self, path, **options):
        path.write_bytes(b"half a pic")
        raise OSError("no space left")
    (tmp_path / "curves.png").write_bytes(b"of before")
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "curves.png.tmp").symlink_to("mine")
    monkeypatch.setattr(Figure, "savefig", half)
    assert try_to_draw(draw_curves, tmp_path / "curves.png", {"a": [row(1)]}) is False
    assert capsys.readouterr().err == f"warning: {tmp_path}/curves.png cannot be drawn: no space left\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "curves.png": b"of before", "mine": b"mine"}
    monkeypatch.undo()
    assert try_to_draw(draw_curves, tmp_path / "curves.png", {"a": [row(1)]}) is True
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


def test_a_log_that_is_being_written_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps(row(1)).encode(), b'{"step": 2, "loss": NaN}', b'{"loss": 1}', b"[3]", b'"step"',
             b'{"step": "4"}', b"\xff\x00", b'{"step": 5, "nonfinite": [1]}', b'{"step": 6, "epoch": 0, "lo']
    path.write_bytes(b"\n".join(lines))
    assert read_log(path) == [row(1), {"step": 5, "nonfinite": [1]}]


BEFORE = """
from harness import training
def refuse(path, *facts):
    assert (run.out / "results.json").exists(), "results come first"
    raise RuntimeError(f"no {path.name} today")
training.draw_curves = training.draw_examples = refuse
examples, attacked_examples = [1], lambda *_, **more: [1]
run.finish("""


def test_no_picture_loses_a_result(forks, tmp_path):
    script, out = changed_copy(tmp_path / "script.py", ("\nrun.finish(", BEFORE)), tmp_path / "run"
    _, stderr = forks.run(script, *WORDS, "--max-steps", 4, "--out", out, out=out)
    for name in ("curves.png", "examples.png"):
        assert f"warning: {out}/{name} cannot be drawn: no {name} today\n" in stderr
    assert json.loads((out / "results.json").read_text())["step"] == 4 == log_of(out)[-1]["step"]
