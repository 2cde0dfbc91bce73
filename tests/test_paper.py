"""paper.py: what it makes of the runs' results."""
import json

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
