"""Result files: written whole or not at all; what a folder holds; the log of a run."""
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from runs import log_of

from harness import files
from harness.log import Log


def test_json_is_written_whole_or_not_at_all_and_never_through_a_link(tmp_path):
    path = tmp_path / "results.json"
    value = {"ε": [1, 2.5, None], "nested": {"a": True}}
    files.write_json(path, value)
    assert files.read_json(path) == value == json.loads(path.read_text()) and path.read_text().endswith("}\n")
    with pytest.raises(TypeError):
        files.write_json(path, {"no JSON": {1, 2}})
    assert files.read_json(path) == value
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "results.json.tmp").symlink_to(tmp_path / "mine")
    files.write_json(path, [])
    assert (tmp_path / "mine").read_text() == "mine" and files.read_json(path) == []
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "mine"}
    path.write_text('{"half": 1, "a fi')
    assert files.read_json(path) is files.read_json(tmp_path / "absent") is files.read_json(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path):
    files.writable_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not [*(tmp_path / "a" / "b").iterdir()]
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc")):
        with pytest.raises(OSError):
            files.writable_folder(path)


def test_the_sources_version_changes_with_each_source_that_a_result_depends_on(tmp_path, monkeypatch):
    rooms = ("kernels", "tasks", "toy", "harness")
    for room in (".", *rooms, "experiments"):
        (tmp_path / room).mkdir(exist_ok=True)
        for path in (ROOT / room).iterdir():
            if path.suffix in (".py", ".txt", ".json"):
                shutil.copy(path, tmp_path / room)
    before = files.source_version()
    assert len(before) == 8
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert files.source_version() == before
    free = {"paper.py", "bench.py", "data.py", "requirements.txt"}
    for path in sorted(tmp_path.rglob("*.*")):
        data = path.read_bytes()
        path.write_bytes(data + b"\n")
        counts = path.name not in free and path.parent.name != "experiments"
        assert (files.source_version() != before) == counts, path
        path.write_bytes(data)


def test_sha256(tmp_path):
    """Of "abc": FIPS 180-2, appendix B.1."""
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(tmp_path / "abc") == expected


def test_what_a_folder_holds(tmp_path):
    def holds(**made):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        folder.mkdir()
        for name, text in made.items():
            (folder / name.replace("__", ".").replace("_", "-")).write_text(text)
        return files.occupant(folder)

    assert holds() is holds(log__jsonl="", notes__txt="") is files.occupant(tmp_path / "absent") is None
    assert holds(results__json='{"trained": 7}', ckpt__pt="") == "a finished run"
    assert holds(ckpt__pt="") == holds(ckpt_previous__pt="") == "an unfinished run"
    assert holds(ckpt__pt="", results__json="{}") == "an unfinished run"
    assert holds(images__jsonl="") == holds(images_3__jsonl="") == "an evaluation"
    assert holds(results__json='{"protocol": "PGD-100"}') == "an evaluation"
    for text in ("", "half", "[]", "5", "null", '"trained"', '{"accuracy": 90}'):
        assert holds(results__json=text) == "other results", text


def test_evaluations_inside_a_folder_are_set_aside_or_removed_and_nothing_else(tmp_path):
    """A folder with a journal is one, whatever its name; what was set aside before keeps its step."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "eval", run / "steps100", run / "step3-eval", run / "notes", other):
        folder.mkdir(parents=True)
        (folder / ("mine.txt" if folder.name == "notes" else "images.jsonl")).write_text(folder.name)
    (run / "link").symlink_to(other)                        # not of this run
    assert {path.name for path in files.evaluations_in(run)} == {"eval", "steps100", "step3-eval"}
    files.set_evaluations_aside(run, 7)
    assert {path.name for path in run.iterdir()} == {
        "step7-eval", "step7-steps100", "step3-eval", "notes", "link"}
    assert (run / "step7-eval" / "images.jsonl").read_text() == "eval"
    (run / "eval").mkdir()
    (run / "eval" / "images.jsonl").write_text("evaluated again")
    files.set_evaluations_aside(run, 7)
    assert (run / "step7-eval" / "images.jsonl").read_text() == "evaluated again"

    for name in ("results.json", "ckpt.pt", "ckpt-previous.pt", "results_before.json", "examples.png",
                 "curves.png", "images.jsonl", "images-1.jsonl", "log.jsonl", "mine.txt"):
        (run / name).touch()
    files.remove_results(run)
    assert {path.name for path in run.iterdir() if path.is_file()} == {"log.jsonl", "mine.txt"}
    assert files.evaluations_in(run)                        # which are somebody's results too
    files.remove_evaluations(run)
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"notes", "link"}
    assert (other / "images.jsonl").exists()


def test_rows_of_the_log_wait_for_room(tmp_path, capsys):
    """A write that fails or is cut short leaves no half a row, none is lost and none stands twice."""
    log = Log(tmp_path / "log.jsonl", 0)
    real, room = log.file, [True]

    class Disk:
        def write(self, text):
            real.write(text[:len(text) if room[0] else 7])
            return len(text) if room[0] else 7

        def __getattr__(self, name):
            return getattr(real, name)
    log.file = Disk()
    for step in range(1, 6):
        room[0] = step in (1, 4, 5)
        log.write({"step": step})
        assert [row["step"] for row in log_of(tmp_path)] == ([1] if step < 4 else [*range(1, step + 1)])
    assert capsys.readouterr().err.count("warning: ") == 2
    room[0] = False
    log.write({"step": 6})
    with pytest.raises(OSError, match="No space"):
        log.sync()
    real.write(b'{"step": 7')                               # killed in the middle of a row
    real.close()
    assert [row["step"] for row in Log(tmp_path / "log.jsonl", 4).rows] == [1, 2, 3, 4]
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("rest", ['{"step": 3', "[3]\n", '{"epoch": 1}\n', "no JSON\n",
                                  '{"step": 9}\n{"step": 3}\n'])
def test_a_log_goes_on_after_its_last_row_that_counts(tmp_path, rest):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + rest)
    log = Log(path, 5)
    assert log.rows == [{"step": 1}, {"step": 2}]
    log.write({"step": 3})
    log.sync()
    log.file.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    nothing = Log(None, 0)                                  # of the processes beside the first
    nothing.write({"step": 1})
    assert nothing.rows == []
