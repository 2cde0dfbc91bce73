"""Files of results: written whole or not at all, never over those of something else."""
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def writable_folder(path):
    """Make the folder if need be, and see that a file can be written there before hours of work depend on it:
    OSError."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def read_json(path):
    """What a file of `write_json` holds; None if there is none, or none that is whole."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def write_json(path, value):
    """Write value as JSON: to a temporary file, then renamed."""
    temporary = Path(f"{path}.tmp")
    temporary.unlink(missing_ok=True)                   # it might be a link to somewhere else
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def sha256(path):
    """The sha256 of a file's content, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_version():
    """A hash of every source that a result of the two stages depends on: 8 hex digits."""
    rooms = [ROOT, *(ROOT / room for room in ("kernels", "tasks", "toy", "harness"))]
    files = sorted(file for room in rooms for kind in ("*.py", "*.txt", "*.json") for file in room.glob(kind)
                   if file.name not in ("paper.py", "bench.py", "data.py", "requirements.txt"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


# ------------------------------------------------------------------------------ whose results a folder holds
def occupant(folder):
    """What a folder holds, in words: a finished or an unfinished run (of train_tecoa.py), an evaluation,
    other results; None: nothing."""
    results = read_json(folder / "results.json")
    if isinstance(results, dict) and "trained" in results:
        return "a finished run"
    if (folder / "ckpt.pt").exists() or (folder / "ckpt-previous.pt").exists():
        return "an unfinished run"
    if any(folder.glob("images*.jsonl")) or isinstance(results, dict) and "protocol" in results:
        return "an evaluation"
    return "other results" if (folder / "results.json").exists() else None


def evaluations_in(folder):
    """The folders inside one of train_tecoa.py that hold evaluations of its checkpoints."""
    return [path.parent for path in folder.glob("*/images.jsonl") if not path.parent.is_symlink()]


def remove_results(folder):
    """Remove what a run or an evaluation has left in its folder, but for the log, which is open."""
    names = ("results.json", "ckpt.pt", "ckpt-previous.pt", "results_before.json", "examples.png",
             "curves.png")
    for path in [*(folder / name for name in names), *folder.glob("images*.jsonl")]:
        path.unlink(missing_ok=True)


def remove_evaluations(folder):
    """Remove the evaluations inside a run's folder."""
    for path in evaluations_in(folder):
        shutil.rmtree(path)


def set_evaluations_aside(folder, step):
    """Rename the evaluations inside a run's folder: of its checkpoint of this step, soon replaced."""
    for path in evaluations_in(folder):
        if not re.match(r"step\d+-", path.name):
            aside = folder / f"step{step}-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
