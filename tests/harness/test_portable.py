"""A system without fcntl, fork, hard links and what else POSIX has trains and evaluates; half a torchrun."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from harness import processes
from toy import world

# before anything of ours, or of others, is imported
HIDE = """
import json, multiprocessing, os, runpy, signal, sys
class Hidden:
    def find_spec(self, name, *_):
        if name in ("fcntl", "resource", "pwd", "grp", "termios"):
            raise ImportError(name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for name in ("fork", "forkpty", "link", "pread", "preadv", "readv", "posix_fadvise", "O_NOFOLLOW",
             "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "fchmod", "geteuid", "killpg", "mkfifo"):
    delattr(os, name)
for name in ("SIGCHLD", "SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn", force=True)
for name in ("fork", "forkserver"):
    multiprocessing.context._concrete_contexts.pop(name)
real = os.open
def opened(path, flags, *more, **words):
    if not isinstance(path, int) and os.path.isdir(path) and not flags & getattr(os, "O_TMPFILE", 0):
        raise PermissionError(13, "Permission denied", path)
    return real(path, flags, *more, **words)
os.open, rename = opened, os.replace
def replaced(source, target):
    for fd in os.listdir("/proc/self/fd"):              # Windows replaces no file that is open
        path = os.path.realpath(f"/proc/self/fd/{fd}")
        if path in (os.path.realpath(source), os.path.realpath(target)):
            raise PermissionError(13, "in use", path)
    rename(source, target)
os.replace = replaced
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_a_system_that_is_not_posix_trains_and_evaluates(tmp_path):
    from PIL import Image
    for number, image in enumerate(world.task("digits", "train", 12)[0]):
        folder = tmp_path / "photos" / ("train", "val")[number % 2] / f"class {number // 2 % 2}"
        path = folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    photos, out = f"folder:{tmp_path / 'photos'}", tmp_path / "run"
    training = ("train_tecoa.py", "--pretrained", "none", "--dataset", photos, "--tasks", "digits",
                "--limit", 6, "--batch-size", 2, "--max-steps", 3, "--save-every", 1,
                "--eval-steps", 1, "--workers", 2, "--device", "cpu", "--out", out)
    evaluation = ("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", "--tasks", f"digits,{photos}", "--limit", 6,
                  "--steps", 1, "--workers", 2, "--device", "cpu", "--save-adv", tmp_path / "adv")
    lines = (training, evaluation, evaluation, (*training, "--resume"),
             ("data.py", "cache", "--dataset", photos, "--out", tmp_path / "c.npy", "--size", 32),
             ("data.py", "verify", tmp_path / "c.npy"))
    done = subprocess.run([sys.executable, "-c", HIDE, json.dumps([[*map(str, line)] for line in lines])],
                          cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                            "USERNAME": "somebody"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("this system cannot fork: images are decoded in the main process") == 1
    assert done.stdout.count("nothing was computed") == 2 and "c.npy is whole: 12 images" in done.stdout
    assert {path.name for path in out.iterdir()} >= {"ckpt.pt", "ckpt-previous.pt", "results.json"}


# ------------------------------------------------------------------------------ half a torchrun
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
NONE = dict.fromkeys(WHOLE)


@pytest.mark.parametrize("change,said", [
    ({}, None), (NONE, None), (NONE | {"RANK": "0", "MASTER_ADDR": "h"}, None),
    (NONE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
    ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
    ({"RANK": None, "LOCAL_RANK": None}, "RANK, LOCAL_RANK not set"),
    ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_PORT, MASTER_ADDR not set"),
    (NONE | {"RANK": "3"}, "WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR not set, but RANK=3"),
    ({"RANK": "one"}, "RANK=one is no number"), ({"WORLD_SIZE": ""}, "WORLD_SIZE not set, but RANK="),
    ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1 is no number"),
    ({"RANK": "2"}, "RANK=2 and LOCAL_RANK=1 of WORLD_SIZE=2")])
def test_half_of_torchruns_variables_are_named(monkeypatch, change, said):
    for name, text in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    for variable, name, otherwise in (("RANK", "RANK", 0), ("WORLD", "WORLD_SIZE", 1),
                                      ("LOCAL", "LOCAL_RANK", 0)):
        monkeypatch.setattr(processes, variable, processes.told(name, otherwise))
    if said is None:
        return processes.check_environment()
    with pytest.raises(ValueError, match=said):
        processes.check_environment()


def test_a_command_says_so_in_one_line(run):
    done = run("eval_zeroshot.py", "--tasks", "digits", status=2, RANK="1")
    assert done.stderr.count("\n") == 1 and "start with torchrun, or unset RANK" in done.stderr
