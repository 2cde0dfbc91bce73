"""paper.py: what it makes of the runs' results."""
import json
import sys
from types import SimpleNamespace

import pytest

import paper


def result(clean, robust):
    row = {"n": 10, "classes": 4, "clean": clean, "robust": robust, "chance": 25.0}
    return {"config": {"hardware": "2 CPU cores", "eval_steps": 10, "eps": 8.0}, "tasks": {"digits": row, "scans": row},
            "mean": {"clean": clean, "robust": robust}, "adapted": {"seen": row}}


def test_table_and_figure_of_two_seeds(tmp_path, monkeypatch, capsys):
    runs = []

    def run(command, cwd, stdout):
        """In place of training: TeCoA has 80 and 84 clean, the others 30; CLIP 90."""
        folder, seed = tmp_path / command[command.index("--out") + 1], int(command[command.index("--seed") + 1])
        runs.append(" ".join(command[2:4]))
        folder.mkdir(parents=True)
        (folder / "results_before.json").write_text(json.dumps(result(90, 5)))
        (folder / "results.json").write_text(json.dumps(result(80 + 4 * seed if "tecoa" in command else 30, 20)))
        (folder / "examples.png").write_bytes(b"picture")
        return type("Done", (), {"returncode": 0})
    (tmp_path / "toy.json").write_text("{}")
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["paper.py", "--seeds", "0,1"])
    paper.main()
    table = (tmp_path / "results" / "fig1.md").read_text()
    (mean,) = [line for line in table.splitlines() if line.startswith("| mean")]
    cells = [cell.strip() for cell in mean.split("|")[2:-1]]
    assert cells == ["25.0", "90.0 ± 0.0", "5.0 ± 0.0", "30.0 ± 0.0", "20.0 ± 0.0", "30.0 ± 0.0", "20.0 ± 0.0",
                     "82.0 ± 2.8", "20.0 ± 0.0"]                                          # 2.8: n − 1 in the denominator
    assert (tmp_path / "results" / "fig1.png").stat().st_size > 5000
    assert len(runs) == 6 and table in capsys.readouterr().out
    paper.main()
    assert len(runs) == 6                                                                 # nothing is computed twice


def test_wrong_seeds_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["paper.py", "--seeds", "0,x"])
    with pytest.raises(SystemExit) as end:
        paper.main()
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_attacks_are_counted_on_the_same_images(tmp_path, monkeypatch, capsys, small_clip):
    """The table with a checkpoint that is the plain CLIP, so both halves are the same, beside attacks that do nothing."""
    import checkpoints
    import model

    def idle(logits, **options):
        return lambda x, y: x
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(
        __version__="0", **{name: idle for name in ("PGD", "APGD", "APGDT", "Square", "FAB")}))
    clip, _ = model.load_clip("toy", str(small_clip))
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper, "load_clip", lambda name, tag: model.load_clip("toy", str(small_clip)))
    folder = tmp_path / "out" / "paper" / paper.source_version() / "loss-tecoa-seed0"
    folder.mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for name in ("results.json", "results_before.json"):
        (folder / name).write_text("{}")
    checkpoints.save_checkpoint(folder / "ckpt.pt", clip, {"model": "toy", "pretrained": "none"})
    paper.attacks(limit=12, steps=3, queries=4)
    text = (tmp_path / "results" / "attacks.md").read_text()
    rows = {cells[1]: cells[2:-1] for cells in ([c.strip() for c in line.split("|")] for line in text.splitlines())
            if len(cells) == 9 and cells[1][0] in "PCASw"}
    fab = rows.pop("what these leave, under FAB-T-3")
    assert "36 images" in text and text in capsys.readouterr().out
    robust = {name: float(cells[0]) for name, cells in rows.items()}
    assert len(rows) == 8 and all(cells[0] == cells[3] and cells[2] == cells[5] for cells in rows.values())
    in_turn = "APGD-CE-3, APGD-T-3, Square-4 in turn"
    assert robust[in_turn] <= min(robust.values()) and robust["PGD-3"] < robust["Square-4"]
    clean = {cells[1] for cells in rows.values() if cells[1]}
    assert len(clean) == 1 and float(*clean) >= max(robust.values())                      # theirs are given all of them
    assert fab[1] == fab[4] == rows[in_turn][0]                                           # but for the last: what is left
