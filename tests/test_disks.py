"""Disks that fail for a moment, files that change while they are read, damaged caches; and signals to workers."""
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import test_benchmarks as sets
import torch
from test_hostile import Malicious, encoded, no_hanging, png, refused  # noqa: F401
from torch.utils.data import Dataset

import data
from data import Task, batches, load_task
from images import Images, Unreadable


@pytest.fixture
def kinds(tmp_path):
    """{kind: (a task of two images, a file it reads)}: a folder, files, shards, a cache."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.png").write_bytes(png())
    sets.write_shards(tmp_path / "wds", [0, 1], ["a", "b"], "png")
    data.make_cache(f"folder:{tmp_path / 'set'}", tmp_path / "c.npy", size=8)
    first = tmp_path / "set" / "a" / "x.png"
    files = Images("files", [(str(tmp_path / "set" / name / "x.png"), c) for c, name in enumerate("ab")], 8)
    return {"folder": (load_task(f"folder:{tmp_path / 'set'}", "val", size=8), first),
            "files": (Task("files", files, ["a", "b"], "{}"), first),
            "shards": (load_task(f"wds:{tmp_path / 'wds'}", "val", size=8), tmp_path / "wds" / "test" / "0.tar"),
            "cache": (load_task(f"cache:{tmp_path / 'c.npy'}", "val", size=8), tmp_path / "c.npy")}


KINDS = "folder", "files", "shards", "cache"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_network_disk_is_asked_again(kinds, monkeypatch, kind, call):
    (task, path), slept, failures, original = kinds[kind], [], [], getattr(os, call)
    before = task.images[0]

    def failing(*words):
        if failures:
            number = failures.pop(0)
            raise OSError(number, os.strerror(number))
        return original(*words)
    monkeypatch.setattr(os, call, failing)
    monkeypatch.setattr(time, "sleep", slept.append)
    failures += [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
    assert torch.equal(task.images[0][0], before[0]) and slept == [.5, 1, 2]
    failures += [errno.EREMOTEIO] * 4
    with pytest.raises(Unreadable, match=f"{path}: Remote I/O error") as error:
        task.images[0]
    assert slept == [.5, 1, 2] * 2 and not failures and str(error.value).isprintable()
    for number in (errno.EACCES, errno.ENOENT, errno.ENOTDIR):
        failures.append(number)
        with pytest.raises(Unreadable, match=f"{path}: {os.strerror(number)}"):
            task.images[0]
    assert len(slept) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_short_reads_and_files_that_are_cut_short(kinds, monkeypatch, kind):
    (task, path), original, cut = kinds[kind], os.preadv, []

    def short(file, buffers, offset):
        if cut:
            os.truncate(path, cut[0])
        return original(file, [buffers[0][:100]], offset)
    monkeypatch.setattr(os, "preadv", short)
    before = task.images[0]
    assert before[0].float().std() > 9                                      # all of it was read
    cut.append(140)
    with pytest.raises(Unreadable, match=f"{path}: cut short: the file ends at byte "):
        task.images[0]


def test_an_image_that_changes_is_read_as_it_is_now(kinds):
    for kind in ("folder", "files"):
        task, path = kinds[kind]
        path.write_bytes(encoded("jpeg"))                                     # longer than it was
        assert (task.images[0][0].float().mean((1, 2)) - torch.tensor([200., 100, 50])).abs().max() < 3
        path.unlink()
        with pytest.raises(Unreadable, match=f"^cannot decode {path}: No such file or directory$"):
            task.images[0]
        path.write_bytes(png())


def test_no_permission():
    """As a user whom permissions mean something to: root becomes nobody."""
    root = Path(tempfile.mkdtemp())                                           # not under pytest's, which is root's alone
    try:
        for name in "ab":
            (root / name).mkdir()
            (root / name / "x.png").write_bytes(png())
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        task = load_task(f"folder:{root}", "val", size=8)
        if os.geteuid() == 0:
            os.seteuid(65534)
        task.images[0]
        os.seteuid(os.getuid())
        (root / "a" / "x.png").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(Unreadable, match=f"^cannot decode {root}/a/x.png: Permission denied$"):
            task.images[0]
        assert task.images[1][2] == 1
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(root)


def test_a_damaged_image_in_a_cache_is_named(kinds):
    task, path = kinds["cache"]
    with open(path, "r+b") as file:
        file.seek(128 + 192 + 5)
        file.write(b"\0\1\2")
    (_, _, index, problems), = batches(task, [0, 1], 2, 0, bad="leave out")
    assert index.tolist() == [0] and problems == [(1, f"cannot decode b/x.png in {path}: damaged, its checksum is another")]
    os.replace(path, f"{path}.moved")
    with pytest.raises(Unreadable, match=f"a/x.png in {path}: No such file"):
        task.images[0]


def rewritten(path, **changed):
    with np.load(f"{path}.index.npz") as arrays:
        np.savez(f"{path}.index.npz", **{**arrays, **changed})


@pytest.mark.parametrize("changed,said", [
    ({"labels": np.array([0, 2])}, "val labels outside its 2 classes"), ({"labels": np.array([-1, 0])}, "outside its 2"),
    ({"labels": np.array([0, np.nan])}, "outside its 2"), ({"counts": np.array([1])}, "different lengths"),
    ({"crc32": np.zeros(1, np.uint32)}, "different lengths"), ({"paths": np.array([b"a"] * 3)}, "different lengths")])
def test_an_index_that_cannot_be_is_refused(kinds, changed, said):
    _, path = kinds["cache"]
    rewritten(path, **changed)
    with pytest.raises(ValueError, match=f"{path} is not a whole cache: .*{said}") as error:
        load_task(f"cache:{path}", "val", size=8)
    assert str(error.value).isprintable()


def test_no_pickle_of_a_cache_is_executed(kinds, tmp_path):
    (_, path), target = kinds["cache"], tmp_path / "executed"
    bomb = np.empty(2, object)
    bomb[:] = [Malicious(target)] * 2
    whole = path.read_bytes()
    for content in (bomb, None):
        if content is None:
            path.write_bytes(pickle.dumps(Malicious(target)))
        else:
            np.save(path, bomb, allow_pickle=True)
        assert f"{path} is not a whole cache" in refused(f"cache:{path}")
    path.write_bytes(whole)
    rewritten(path, paths=bomb)
    assert "allow_pickle" in refused(f"cache:{path}")
    with open(f"{path}.index.npz", "wb") as file:
        np.save(file, bomb, allow_pickle=True)
    assert "allow_pickle" in refused(f"cache:{path}")
    with open(f"{path}.index.npz", "wb") as file:
        pickle.dump(Malicious(target), file)
    assert "not a whole cache" in refused(f"cache:{path}")
    assert not target.exists()


# ---------------------------------------------------------------------------------------------- workers
class Slow(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        time.sleep(.02)
        return torch.full((3, 2, 2), i, dtype=torch.uint8), 1, i


SLOW = Task("slow", Slow(), ["a", "b"], "{}")


def forked(function):
    """(the process, in a group of its own, that runs function(send), the end of a pipe that receives)."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child():
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(15)                                                      # whatever happens
        function(send)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    return process, receive


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_is_the_main_process_to_answer(number):
    def main(send):
        caught, loader = [], iter(batches(SLOW, list(range(40)), 4, 2))
        signal.signal(number, lambda *_: caught.append(1))                    # the workers' own is another
        pids, found = [worker.pid for worker in loader._workers], next(loader)[2].tolist()
        send.send(pids)
        for _, _, index in loader:
            found += index.tolist()
        send.send((found, len(caught)))
    process, receive = forked(main)
    pids = receive.recv()
    os.killpg(process.pid, number)
    found, caught = receive.recv()
    process.join(30)
    assert process.exitcode == 0 and found == list(range(40)) and caught == 1 and not any(map(alive, pids))


def test_workers_end_when_an_error_ends_their_process():
    """With a loader that nobody has shut down: at once, and in no other words than the error's."""
    script = ("from test_disks import SLOW, batches; loader = iter(batches(SLOW, list(range(40)), 20, 2)); next(loader); "
              "print([worker.pid for worker in loader._workers]); raise ValueError('the last line')")
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=60, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: the last line", done.stderr
    assert len(json.loads(done.stdout)) == 2 and not any(map(alive, json.loads(done.stdout)))


def test_workers_end_with_the_process_that_they_work_for():
    def main(send):
        loader = iter(batches(SLOW, list(range(40)), 4, 2))
        next(loader)
        time.sleep(.5)                                                        # then they have nothing left to do
        send.send([worker.pid for worker in loader._workers])
        time.sleep(30)
    process, receive = forked(main)
    pids = receive.recv()
    assert len(pids) == 2 and all(map(alive, pids))
    process.kill()
    deadline = time.monotonic() + 15
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(.1)
    assert not any(map(alive, pids))
