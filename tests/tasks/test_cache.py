"""tasks/cache.py, tasks/make_cache.py, data.py: caches are made, resumed, verified, refused if damaged."""
import fcntl
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from writers import Malicious, bait, imagenet, imagenet_folder, png, refused

from tasks.cache import open_cache
from tasks.images import Unreadable
from tasks.loading import batches
from tasks.make_cache import make_cache
from tasks.task import load_task

folder, target = pytest.fixture(imagenet_folder), pytest.fixture(bait)


@pytest.fixture
def call(monkeypatch, capfd):
    """call(*words) → (status, stdout, stderr with the workers') of `python data.py *words`, run here."""
    def call(*words):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, words)])
        monkeypatch.setattr("sys.excepthook", sys.excepthook)
        capfd.readouterr()
        try:
            code = runpy.run_path(str(ROOT / "data.py"), run_name="__main__") and 0
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return (1, out, err + code + "\n") if isinstance(code, str) else (code, out, err)
    return call


def words_for(folder, out, *more):
    return "cache", "--dataset", f"folder:{folder}", "--out", out, "--size", 32, "--workers", 0, *more


def contents(out):
    """The bytes of a cache; nothing else may lie beside it."""
    files = {name: (out.parent / name).read_bytes() for name in (out.name, f"{out.name}.index.npz")}
    assert set(files) == {path.name for path in out.parent.iterdir()}
    return files


def killed(monkeypatch, folder, out, where, call_number, after=False):
    """`make_cache` in batches of 5, in a process that SIGKILL ends in (or after) the n-th os.<where>."""
    def child():
        calls, original = [], getattr(os, where)

        def counted(*words):
            calls.append(words)
            if len(calls) == call_number:
                if after:
                    original(*words)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*words)
        monkeypatch.setattr(os, where, counted)
        monkeypatch.setattr("tasks.make_cache.BATCH", 5)
        make_cache(f"folder:{folder}", out, size=32)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not out.exists()


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "c.npy"


@pytest.fixture
def whole(folder, tmp_path_factory):
    """A cache of `folder`, made without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "c.npy"
    make_cache(f"folder:{folder}", out, size=32)
    return out


# --------------------------------------------------------------------------------------------- what is in one
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_the_plain_path_bit_for_bit(folder, out, call, workers):
    # splits may differ in their classes
    shutil.copytree(folder / "val" / "Hot-Dog", folder / "val" / "Zebra")
    status, said, _ = call(*words_for(folder, out, "--dataset", "imagenet", "--data-root", folder,
                                      "--size", 48, "--workers", workers))
    assert status == 0 and "18 train + 24 val images" in said and "GB" in said
    for split in ("train", "val"):
        for limit in (None, 7):
            plain = load_task("imagenet", split, size=48, data_root=folder, limit=limit)
            cached = load_task(f"cache:{out}", split, size=48, limit=limit)
            assert len(cached.images) == len(plain.images) == (limit or {"train": 18, "val": 24}[split])
            assert (cached.class_names, cached.template) == (plain.class_names, plain.template)
            for (x, y, i), (x2, y2, i2) in zip(plain.images, cached.images):
                assert x.dtype == x2.dtype and torch.equal(x, x2) and (y, i) == (y2, i2)
    for bad in ("raise", "replace"):
        loaders = [batches(task, [5, 0, 3], 2, workers, bad) for task in (plain, cached)]
        for a, b in zip(*loaders, strict=True):
            assert a.errors == b.errors == []
            assert all(torch.equal(*two) and two[0].stride() == two[1].stride() for two in zip(a[:3], b[:3]))
    # items are copies
    cached.images[0][0].zero_()
    assert torch.equal(cached.images[0][0], plain.images[0][0])
    images, index = np.load(out, mmap_mode="r"), np.load(f"{out}.index.npz", allow_pickle=False)
    assert images.dtype == np.uint8 and images.shape == (42, 3, 48, 48)
    assert index["paths"][18] == b"val/Hot-Dog/20.jpg"
    assert index["parts"].tolist() == ["train", "val"] and index["counts"].tolist() == [18, 24]


def test_an_unsplit_folder_is_cached_to_evaluate_on(folder, out, call):
    """And is not said to be another split than it is: nor is a folder that is one itself."""
    unsplit = (folder / "val").rename(folder.parent / "unsplit")
    assert "18 unsplit images" in call(*words_for(unsplit, out))[1]
    task = load_task(f"cache:{out}", "val", size=32)
    assert len(task.images) == 18 and task.split == "all"
    with pytest.raises(ValueError, match="no train images, only unsplit ones"):
        load_task(f"cache:{out}", "train", size=32)
    out.unlink()
    call(*words_for(folder / "train", out))
    assert load_task(f"cache:{out}", "train", size=32).split == "train"
    with pytest.raises(ValueError, match="no val or test images, only train"):
        load_task(f"cache:{out}", "val", size=32)


def test_the_splits_of_a_cache_are_those_of_its_folder(folder, out):
    """train + valid + test: what is adapted on and what is evaluated on, under the names that they have."""
    (folder / "val").rename(folder / "testing")
    make_cache(f"folder:{folder}", out, size=32)
    assert open_cache(out)[1]["parts"].tolist() == ["train", "test"]
    shutil.copytree(folder / "testing" / "Hot-Dog", folder / "Valid" / "Hot-Dog")
    shutil.copytree(folder / "testing" / "Hot-Dog", folder / "Valid" / "n02012849")
    out.unlink()
    make_cache(f"folder:{folder}", out, size=32)
    index = open_cache(out)[1]
    assert index["parts"].tolist() == ["train", "val"] and index["counts"].tolist() == [18, 12]
    task = load_task(f"cache:{out}", "val", size=32)
    assert task.split == "val" and task.images.file(0) == "Valid/Hot-Dog/20.jpg"
    # own names find the folders that the cache was made of
    words = {f"cache:{out}": ({"Hot-Dog": "sausage", "n02012849": "bird", "n01440764": "fish"}, "a {}!")}
    task = load_task(f"cache:{out}", "val", size=32, words=words)
    assert task.class_names == ["sausage", "bird"] and task.template == "a {}!"


def test_images_as_they_are_in_a_cache(folder, out):
    """--resize none and N: as without a cache, and no cache passes for another."""
    for split in ("train", "val"):
        shutil.rmtree(folder / split)
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "x.png").write_bytes(png(20, 20))
    for resize, size in (("none", 20), (21, 16)):
        make_cache(f"folder:{folder}", out, size=16, resize=resize)
        plain, cached = (load_task(name, "val", size=16, resize=resize) for name in (
            f"folder:{folder}", f"cache:{out}"))
        assert plain.images[1][0].shape == (3, size, size)
        assert torch.equal(plain.images[1][0], cached.images[1][0])
        for other in (19, None):
            with pytest.raises(ValueError, match=f"made with --resize {resize}.* asked for with --resize "
                                                 f"{other or 18} --interpolation bilinear: "):
                load_task(f"cache:{out}", "val", size=16, resize=other)
        out.unlink()


def test_a_cache_has_clips_templates_too(tmp_path):
    imagenet(tmp_path)
    make_cache("imagenet", tmp_path / "c", size=8, data_root=tmp_path)
    assert load_task(f"cache:{tmp_path / 'c'}", "val", size=8).template == "This is a photo of a {}"
    assert len(load_task(f"cache:{tmp_path / 'c'}", "val", size=8, templates="openai").template) == 80


# --------------------------------------------------------------------------------------------- interrupted
def test_sigkill_and_the_same_command_again(tmp_path, call):
    """With workers, killed at some moment; then to its end: the same bytes, without decoding all again."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(200):
            noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "set" / name / f"{k}.png")
    done, out = tmp_path / "done" / "c", tmp_path / "killed" / "c"
    words = [words_for(tmp_path / "set", path, "--size", 160, "--workers", 2) for path in (done, out)]
    process = multiprocessing.get_context("fork").Process(target=call, args=words[1])
    process.start()
    marker = tmp_path / "killed" / "c.tmp.done"
    while process.is_alive() and not (marker.exists() and marker.stat().st_size):
        time.sleep(.002)
    time.sleep(float(np.random.default_rng().uniform(0, .03)))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    status, said, _ = call(*words[1])
    assert status == 0 and "going on after" in said
    assert call(*words[0])[0] == 0 and contents(done) == contents(out)


@pytest.mark.parametrize("where,call_number,after,known", [
    # images on the disk, and no record of them; then whole, verified, the index written
    ("fsync", 1, False, 0), ("fsync", 3, True, 10), ("replace", 1, False, 36)])
def test_killed_at_the_worst_moments(folder, whole, monkeypatch, out, call, where, call_number, after, known):
    killed(monkeypatch, folder, out, where, call_number, after)
    marker, temporary = (out.parent / f"c.npy.tmp{end}" for end in (".done", ""))
    if known == 10:
        assert temporary.stat().st_size == 128 + 15 * 3 * 32 * 32 and marker.stat().st_size == 8 * 10
        # half a record
        with open(marker, "ab") as file:
            file.write(b"half")
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and contents(out) == contents(whole)
    assert f"going on after {known}" in said if known else "going on" not in said
    assert "anew" not in said


def test_records_of_images_that_are_not_there_are_not_believed(folder, whole, monkeypatch, out, call):
    killed(monkeypatch, folder, out, "fsync", 3)
    os.truncate(out.parent / "c.npy.tmp", 128 + 7 * 3 * 32 * 32 + 5)
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 7\n" in said and contents(out) == contents(whole)


def test_killed_after_the_last_rename(folder, whole, call):
    (whole.parent / "c.npy.tmp.done").write_bytes(b"left behind")
    status, said, _ = call(*words_for(folder, whole))
    assert status == 0 and "there already" in said and said.count("\n") == 1
    assert len(contents(whole)) == 2


@pytest.mark.parametrize("change", ["time", "name", "content", "size", "data set", "later", "gone later"])
def test_a_changed_source_starts_anew(folder, monkeypatch, out, tmp_path_factory, call, change):
    fresh = tmp_path_factory.mktemp("fresh") / "c.npy"
    # 10 of train's 18 are done
    killed(monkeypatch, folder, out, "fsync", 3)
    first, last = folder / "train" / "Hot-Dog" / "20.jpg", folder / "val" / "n02012849" / "15.png"
    more = ()
    if change == "time":
        os.utime(first, ns=(1, first.stat().st_mtime_ns + 1))
    if change == "name":
        first.rename(first.parent / "1.jpg")
    if change == "content":
        keep = first.stat().st_mtime_ns
        Image.new("RGB", (30, 30), "red").save(first)
        os.utime(first, ns=(keep, keep))
    if change == "size":
        more = ("--size", 16)
    if change == "data set":
        # the same images, but who knows
        folder = shutil.move(folder, fresh.parent.parent / f"{fresh.parent.name}-moved")
    if change == "later":
        Image.new("RGB", (30, 30), "red").save(last)
    if change == "gone later":
        last.unlink()
    status, said, _ = call(*words_for(folder, out, *more))
    assert status == 0 and said.count("starting anew: ") == ("later" not in change)
    assert ("going on after 10" in said) == ("later" in change)
    assert call(*words_for(folder, fresh, *more))[0] == 0 and contents(out) == contents(fresh)


def test_the_last_image_goes_after_all_were_decoded(folder, monkeypatch, out, tmp_path_factory, call):
    fresh = tmp_path_factory.mktemp("fresh") / "c.npy"
    killed(monkeypatch, folder, out, "replace", 1)
    (folder / "val" / "n02012849" / "15.png").unlink()
    assert "going on after 35" in call(*words_for(folder, out))[1]
    assert call(*words_for(folder, fresh))[0] == 0 and contents(out) == contents(fresh)


# --------------------------------------------------------------------------------------------- damaged
def test_verify_names_what_is_damaged(whole, call):
    assert call("verify", whole)[:2] == (0, f"{whole} is whole: 36 images of 32×32 pixels\n")
    original = whole.read_bytes()
    damaged = bytearray(original)
    for number in (3, 20):
        damaged[128 + number * 3072 + 1000] ^= 1
    whole.write_bytes(damaged)
    status, out, err = call("verify", whole)
    assert (status, out) == (1, "") and "Traceback" not in err
    said = "2 of 36 images are damaged: train/Hot-Dog/23.png, val/Hot-Dog/22.png"
    assert err.splitlines()[-1].endswith(said)
    whole.write_bytes(original[:-1])
    status, out, err = call("verify", whole)
    assert status == 1 and err.count("\n") == 1
    whole.write_bytes(original)
    assert call("verify", whole)[0] == 0 and call("verify", f"{whole}.absent")[0] == 2


def test_what_the_disk_changed_is_found_before_the_file_gets_its_name(folder, whole, monkeypatch, out, call):
    killed(monkeypatch, folder, out, "replace", 1)
    temporary = out.parent / "c.npy.tmp"
    damaged = bytearray(temporary.read_bytes())
    damaged[128 + 20 * 3072 + 1000] ^= 1
    temporary.write_bytes(damaged)
    status, _, err = call(*words_for(folder, out))
    assert status == 1 and not out.exists()
    assert "1 of 36 images are damaged: val/Hot-Dog/22.png" in err.splitlines()[-1]
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and contents(out) == contents(whole)


def test_an_image_that_cannot_be_decoded_is_named(folder, whole, monkeypatch, out, call):
    broken = folder / "val" / "n01440764" / "00.jpg"
    original = broken.read_bytes()
    broken.write_bytes(original[:2000])
    # the plain path
    with pytest.raises(ValueError, match=f"cannot decode {broken}: .*truncated"):
        load_task("imagenet", "val", size=32, data_root=folder).images[6]
    monkeypatch.setattr("tasks.make_cache.BATCH", 5)
    for workers in (2, 0):
        status, _, err = call(*words_for(folder, out, "--workers", workers))
        assert status == 1 and "Traceback" not in err and not out.exists()
        said = f"data.py cache: cannot decode {broken}: image file is truncated"
        assert err.splitlines()[-1].startswith(said)
    broken.write_bytes(original)
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and out.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_line(folder, whole, monkeypatch, out, call):
    monkeypatch.setattr("tasks.make_cache.BATCH", 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # which says so as a full disk does
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 22 * 3072 + 5, limits[1]))
    try:
        status, _, err = call(*words_for(folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "File too large" in err.splitlines()[-1] and "Traceback" not in err
    assert not out.exists()
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and contents(out) == contents(whole)


def test_a_damaged_image_in_a_cache_is_named(whole):
    task = load_task(f"cache:{whole}", "val", size=32)
    with open(whole, "r+b") as file:
        file.seek(128 + 19 * 3072 + 5)
        file.write(b"\0\1\2")
    batch, = batches(task, [0, 1], 2, 0, bad="leave out")
    said = f"cannot decode val/Hot-Dog/21.png in {whole}: damaged, its checksum is another"
    assert batch.index.tolist() == [0] and batch.errors == [(1, said)]
    os.replace(whole, f"{whole}.moved")
    with pytest.raises(Unreadable, match=f"val/Hot-Dog/20.jpg in {whole}: No such file"):
        task.images[0]


# --------------------------------------------------------------------------------------------- refused
def test_refused_before_any_work(folder, whole, out, monkeypatch, call):
    before = contents(whole)
    empty, garbage = out.parent / "empty", out.parent / "garbage.npy"
    garbage.write_bytes(b"not a cache")
    os.mkdir(empty)
    cases = [(words_for(folder, out, *more), said) for more, said in (
        (("--dataset", "toy"), "not toy"), (("--dataset", f"cache:{whole}"), "not cache:"),
        (("--dataset", "imagenet"), "--data-root"), (("--dataset", f"folder:{out}-absent"), "no such folder"),
        (("--size", 0), "--size"),
        (("--dataset", f"folder:{empty}"), "not a folder of"), (("--out", "/proc/c.npy"), "/proc"),
        (("--lim", 3), "--lim"), (("--out", garbage), "garbage"),
        (("--out", whole, "--size", 16), "made of other"), (("--workers", -1), "--workers"),
        (("--out", whole, "--dataset", f"folder:{folder / 'val'}"), str(folder)),
        (("--out", empty), "no such file"))]
    cases += [((), "COMMAND"), (("cache",), "--dataset"), (("verify",), "FILE"), (("bogus",), "bogus")]
    for words, said in cases:
        status, printed, err = call(*words)
        assert (status, printed, err.count("\n")) == (2, "", 1) and said in err, err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**7))
    status, printed, err = call(*words_for(folder, out, "--size", 640))
    assert (status, printed, err.count("\n")) == (2, "", 1)
    assert "0.044 GB more" in err and "0.010 GB free" in err
    assert contents(whole) == before and garbage.read_bytes() == b"not a cache"
    assert {path.name for path in out.parent.iterdir()} == {"empty", "garbage.npy"}


def test_what_is_there_already_needs_no_space(folder, whole, monkeypatch, out, call):
    killed(monkeypatch, folder, out, "replace", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 5000))
    assert call(*words_for(folder, out))[0] == 0 and contents(out) == contents(whole)


def test_one_writer_at_a_time(folder, out, call):
    marker, context = open(f"{out}.tmp.done", "ab"), multiprocessing.get_context("fork")
    held = context.Event()

    def other():
        fcntl.lockf(marker, fcntl.LOCK_EX)
        held.set()
        time.sleep(60)
    process = context.Process(target=other)
    process.start()
    held.wait()
    status, _, err = call(*words_for(folder, out))
    process.kill()
    process.join()
    assert status == 2 and "another process" in err and call(*words_for(folder, out))[0] == 0


@pytest.mark.parametrize("spoil,split,size,said", [
    (lambda out: out.unlink(), "val", 32, "no such file"),
    (lambda out: (out.parent / "c.npy.index.npz").unlink(), "val", 32, "index.npz"),
    (lambda out: out.write_bytes(b"not a cache"), "val", 32, "not a whole cache"),
    (lambda out: (out.parent / "c.npy.index.npz").write_bytes(b"no index"), "val", 32, "not a whole"),
    (lambda out: np.savez(f"{out}.index.npz", labels=np.zeros(36)), "val", 32, "another format"),
    (lambda out: np.save(out, np.zeros((36, 3, 32, 32), np.int8)), "val", 32, "of its index"),
    (lambda out: np.save(out, np.zeros((35, 3, 32, 32), np.uint8)), "val", 32, "of its index"),
    (lambda out: os.truncate(out, out.stat().st_size - 1), "val", 32, "not a whole cache"),
    (lambda out: os.truncate(out, out.stat().st_size + 1), "val", 32, "of its index"),
    (lambda out: None, "val", 224, "--size 224"),
    (lambda out: None, "tune", 32, "no tune images, only train and val")])
def test_what_is_not_a_whole_cache_is_a_one_line_error(whole, spoil, split, size, said):
    spoil(whole)
    with pytest.raises(ValueError, match=said) as error:
        load_task(f"cache:{whole}", split, size=size)
    assert "\n" not in str(error.value) and str(whole) in str(error.value)


@pytest.fixture
def pair(tmp_path):
    """A cache of two images to evaluate on."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.png").write_bytes(png())
    make_cache(f"folder:{tmp_path / 'set'}", tmp_path / "c.npy", size=8)
    return tmp_path / "c.npy"


def rewritten(path, **changed):
    np.savez(f"{path}.index.npz", **{**open_cache(path)[1], **changed})


@pytest.mark.parametrize("changed,said", [
    ({"labels": np.array([0, 2])}, "all labels outside its 2 classes"),
    ({"labels": np.array([-1, 0])}, "outside its 2"), ({"labels": np.array([0, np.nan])}, "outside its 2"),
    ({"counts": np.array([1])}, "different lengths"),
    ({"crc32": np.zeros(1, np.uint32)}, "different lengths"),
    ({"paths": np.array([b"a"] * 3)}, "different lengths")])
def test_an_index_that_cannot_be_is_refused(pair, changed, said):
    rewritten(pair, **changed)
    with pytest.raises(ValueError, match=f"{pair} is not a whole cache: .*{said}") as error:
        load_task(f"cache:{pair}", "val", size=8)
    assert str(error.value).isprintable()


def test_no_pickle_of_a_cache_is_executed(pair, target):
    bomb = np.empty(2, object)
    bomb[:] = [Malicious(target)] * 2
    whole = pair.read_bytes()
    np.save(pair, bomb, allow_pickle=True)
    assert f"{pair} is not a whole cache" in refused(f"cache:{pair}")
    pair.write_bytes(pickle.dumps(Malicious(target)))
    assert f"{pair} is not a whole cache" in refused(f"cache:{pair}")
    pair.write_bytes(whole)
    rewritten(pair, paths=bomb)
    assert "allow_pickle" in refused(f"cache:{pair}")
    with open(f"{pair}.index.npz", "wb") as file:
        np.save(file, bomb, allow_pickle=True)
    assert "allow_pickle" in refused(f"cache:{pair}")
    with open(f"{pair}.index.npz", "wb") as file:
        pickle.dump(Malicious(target), file)
    assert "not a whole cache" in refused(f"cache:{pair}")
