"""data.py: tasks by name, folders in ImageNet's layout, caches of them, and their errors."""
import fcntl
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import toyworld
from data import batches, load_task, task_names


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two of ImageNet's classes and one of another name; every mode of image a real set holds."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for c, name in enumerate(("n01440764", "n02012849", "Hot-Dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for k, (mode, width, height) in enumerate((("RGB", 300, 200), ("L", 60, 90), ("P", 50, 50), ("RGBA", 41, 77),
                                                       ("CMYK", 64, 64), ("1", 9, 9))):
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
                image.save(tmp_path / part / name / f"{c}{k}.{'jpg' if mode in ('RGB', 'CMYK') else 'png'}")
    return tmp_path


def test_folder_in_imagenets_layout(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder)
    assert task.class_names == ["Hot-Dog", "tench", "crane bird"] and task.template == "This is a photo of a {}"
    assert len(task.images) == 18
    for i in range(18):
        image, label, index = task.images[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and index == i and label == i // 6
    assert load_task(f"folder:{folder}", "train", size=32).images.root.name == "train"
    assert len(load_task(f"folder:{folder / 'val'}", "val", size=32).images) == 18      # a folder of classes itself
    (folder / "imagenet").mkdir()
    for part in ("train", "val"):
        (folder / part).rename(folder / "imagenet" / part)
    assert len(load_task("imagenet", "val", size=32, data_root=folder).images) == 18    # DIR/imagenet/val as well
    (folder / "imagenet" / "devkit").mkdir()
    assert len(load_task("imagenet", "val", size=32, data_root=folder).images) == 18    # and whatever lies beside it


def test_images_are_resized_to_256_then_cropped_to_224(folder):
    image, _, _ = load_task("imagenet", "val", size=224, data_root=folder).images[6]    # 300×200 pixels, tench
    original = Image.open(folder / "val" / "n01440764" / "00.jpg").convert("RGB")
    by_hand = original.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    assert torch.equal(image, torch.from_numpy(np.asarray(by_hand).copy()).permute(2, 0, 1))


def test_a_class_may_be_called_train(folder):
    (folder / "val" / "Hot-Dog").rename(folder / "val" / "train")
    assert load_task(f"folder:{folder / 'val'}", "val", size=8).class_names == ["tench", "crane bird", "train"]
    with pytest.raises(ValueError, match="no such folder"):                              # nothing to adapt on, unsplit
        load_task(f"folder:{folder / 'val' / 'train'}", "train", size=8)


def test_limit_spreads_over_the_classes(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder, limit=3)
    assert [task.images[i][1] for i in range(3)] == [0, 1, 2]
    assert [task.images[i][2] for i in range(3)] == [0, 6, 12]                           # numbers of the whole set
    assert len(load_task("digits", "val", limit=17).images) == 17


def test_toy_tasks_by_name():
    for name in toyworld.TASKS:
        task = load_task(name, "val")
        assert task.name == name and len(task.images) == (1797 if name == "scans" else 400)
        assert len(set(task.class_names)) == len(task.class_names)
    assert load_task("toy", "train").name == load_task("toy:seen", "train").name == "seen"
    val, tune = load_task("digits", "val"), load_task("digits", "tune")
    assert not torch.equal(val.images[0][0], tune.images[0][0])


@pytest.mark.parametrize("make,said", [
    (lambda p: "nothing", "unknown task"), (lambda p: f"folder:{p / 'absent'}", "no such folder"),
    (lambda p: f"folder:{p}", "not a folder of"), (lambda p: "scans", "evaluation only"),
    (lambda p: "imagenet", "--data-root")])
def test_wrong_tasks_are_one_line_errors(tmp_path, make, said):
    with pytest.raises(ValueError, match=said) as error:
        load_task(make(tmp_path), "tune" if said == "evaluation only" else "val")
    assert "\n" not in str(error.value)


def test_empty_and_single_classes_are_errors(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat"):
        load_task(f"folder:{tmp_path}", "val")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="only one class"):
        load_task(f"folder:{tmp_path}", "val", size=8)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="dog"):
        load_task(f"folder:{tmp_path}", "val")


def test_task_names():
    assert task_names("none", "toy") == []
    assert task_names("all", "toy") == [name for name in toyworld.TASKS if name != "seen"]
    assert task_names("all", "imagenet") == ["imagenet"]
    assert task_names("all", "cache:/a/b.npy") == ["cache:/a/b.npy"]
    assert "digits" not in task_names("all", "digits")                                   # adapted on: not zero-shot
    assert task_names("digits, letters,digits", "toy") == ["digits", "letters"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order(folder, workers):
    task = load_task("imagenet", "val", size=16, data_root=folder)
    order = [17, 0, 5, 9, 2]
    found = list(batches(task, order, 2, workers))
    assert [len(y) for _, y, _ in found] == [2, 2, 1]
    assert torch.cat([index for _, _, index in found]).tolist() == order
    assert found[0][0].dtype == torch.uint8


# ---------------------------------------------------------------------------------------------- caches
@pytest.fixture
def call(monkeypatch, capsys):
    """call(*words) → (status, stdout, what it says on stderr) of `python data.py *words`, in this process."""
    def call(*words):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, words)])
        capsys.readouterr()
        try:
            code = data.main() or 0
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
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
    """`make_cache` in batches of 5, in a process of its own that SIGKILL ends in (or after) the n-th call of os.<where>."""
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
        monkeypatch.setattr(data, "batches", lambda task, order, size, workers: batches(task, order, 5, workers))
        data.make_cache(f"folder:{folder}", out, size=32)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not out.exists()


@pytest.fixture
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "c.npy"


@pytest.fixture
def whole(folder, tmp_path_factory, call):
    """A cache of `folder`, made without an interruption."""
    out = tmp_path_factory.mktemp("whole") / "c.npy"
    assert call(*words_for(folder, out))[0] == 0
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_the_plain_path_bit_for_bit(folder, out, call, workers):
    shutil.copytree(folder / "val" / "Hot-Dog", folder / "val" / "Zebra")                # parts may differ in their classes
    status, said, _ = call("cache", "--dataset", "imagenet", "--data-root", folder, "--out", out, "--size", 48, "--workers",
                           workers)
    assert status == 0 and "18 train + 24 val images" in said and "GB" in said
    for part in ("train", "val"):
        for limit in (None, 7):
            plain = load_task("imagenet", part, size=48, data_root=folder, limit=limit)
            cached = load_task(f"cache:{out}", part, size=48, limit=limit)
            assert len(cached.images) == len(plain.images) == (limit or {"train": 18, "val": 24}[part])
            assert (cached.class_names, cached.template) == (plain.class_names, plain.template)
            for (x, y, i), (x2, y2, i2) in zip(plain.images, cached.images):
                assert x.dtype == x2.dtype and torch.equal(x, x2) and (y, i) == (y2, i2)
    for a, b in zip(*(list(batches(task, [5, 0, 3], 2, workers)) for task in (plain, cached))):
        assert all(torch.equal(*pair) and pair[0].stride() == pair[1].stride() for pair in zip(a, b))
    cached.images[0][0].zero_()
    assert torch.equal(cached.images[0][0], plain.images[0][0])                          # items are copies
    images, index = np.load(out, mmap_mode="r"), np.load(f"{out}.index.npz", allow_pickle=False)
    assert images.dtype == np.uint8 and images.shape == (42, 3, 48, 48) and index["paths"][18] == b"val/Hot-Dog/20.jpg"
    assert index["parts"].tolist() == ["train", "val"] and index["counts"].tolist() == [18, 24]


def test_an_unsplit_folder_is_cached_to_evaluate_on(folder, out, call):
    (folder / "val" / "Hot-Dog").rename(folder / "val" / "train")                        # a class, not a part
    assert call(*words_for(folder / "val", out))[0] == 0
    assert len(load_task(f"cache:{out}", "val", size=32).images) == 18
    with pytest.raises(ValueError, match="no train images, only val"):
        load_task(f"cache:{out}", "train", size=32)


def test_training_from_a_cache_is_training_from_the_folder(folder, whole, monkeypatch, tmp_path, read_json):
    """The same checkpoint, log and tables; the run's default folder has the file's name in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for dataset in (f"folder:{folder}", f"cache:{whole}"):
        monkeypatch.setattr("sys.argv", [
            "train_tecoa.py", "--pretrained", "none", "--dataset", dataset, "--tasks", "all", "--batch-size", "8",
            "--warmup", "0", "--max-steps", "2", "--eval-steps", "1", "--device", "cpu", "--workers", "0"])
        runpy.run_path(str(ROOT / "train_tecoa.py"), run_name="__main__")
    runs = [path for kind in ("folder", "cache") for path in (tmp_path / "out").iterdir() if f"dataset{kind}-" in path.name]
    states = [torch.load(path / "ckpt.pt", weights_only=True)["visual"] for path in runs]
    assert len(states) == 2 and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name in ("results_before.json", "results.json"):
        (one,), (two,) = (read_json(path / name)["tasks"].values() for path in runs)
        assert one == two and one["n"] == 18


def test_sigkill_and_the_same_command_again(tmp_path, call):
    """A real command with workers, killed at some moment; then to its end: the same bytes, without decoding all again."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(500):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "set" / name / f"{k}.png")
    done, out = tmp_path / "done" / "c", tmp_path / "killed" / "c"
    words = [words_for(tmp_path / "set", path, "--size", 160, "--workers", 2) for path in (done, out)]
    process = subprocess.Popen([sys.executable, ROOT / "data.py", *map(str, words[1])], stderr=subprocess.DEVNULL)
    marker = tmp_path / "killed" / "c.tmp.done"
    while process.poll() is None and not (marker.exists() and marker.stat().st_size):
        time.sleep(.002)
    time.sleep(float(np.random.default_rng().uniform(0, .03)))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    status, said, _ = call(*words[1])
    assert status == 0 and "going on after" in said
    assert call(*words[0])[0] == 0 and contents(done) == contents(out)


@pytest.mark.parametrize("where,call_number,after,known", [
    ("fsync", 1, False, 0), ("fsync", 3, True, 10),                       # images on the disk, and no record of them
    ("replace", 1, False, 36)])                                           # whole, verified, the index written
def test_killed_at_the_worst_moments(folder, whole, monkeypatch, out, call, where, call_number, after, known):
    killed(monkeypatch, folder, out, where, call_number, after)
    marker, temporary = (out.parent / f"c.npy.tmp{end}" for end in (".done", ""))
    if known == 10:
        assert temporary.stat().st_size == 128 + 15 * 3 * 32 * 32 and marker.stat().st_size == 8 * 10
        with open(marker, "ab") as file:
            file.write(b"half")                                           # of a record
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
    killed(monkeypatch, folder, out, "fsync", 3)                          # 10 of train's 18 are done
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
        folder = shutil.move(folder, fresh.parent.parent / f"{fresh.parent.name}-moved")  # the same images, but who knows
    if change == "later":
        Image.new("RGB", (30, 30), "red").save(last)
    if change == "gone later":
        last.unlink()
    status, said, _ = call(*words_for(folder, out, *more))
    assert status == 0
    assert said.count("starting anew: ") == ("later" not in change) and ("going on after 10" in said) == ("later" in change)
    assert call(*words_for(folder, fresh, *more))[0] == 0 and contents(out) == contents(fresh)


def test_the_last_image_goes_after_all_were_decoded(folder, monkeypatch, out, tmp_path_factory, call):
    fresh = tmp_path_factory.mktemp("fresh") / "c.npy"
    killed(monkeypatch, folder, out, "replace", 1)
    (folder / "val" / "n02012849" / "15.png").unlink()
    assert "going on after 35" in call(*words_for(folder, out))[1]
    assert call(*words_for(folder, fresh))[0] == 0 and contents(out) == contents(fresh)


def test_verify_names_what_is_damaged(whole, call):
    assert call("verify", whole)[:2] == (0, f"{whole} is whole: 36 images of 32×32 pixels\n")
    original = whole.read_bytes()
    damaged = bytearray(original)
    for number in (3, 20):
        damaged[128 + number * 3072 + 1000] ^= 1
    whole.write_bytes(damaged)
    status, out, err = call("verify", whole)
    assert (status, out) == (1, "") and "Traceback" not in err
    assert err.splitlines()[-1].endswith("2 of 36 images are damaged: train/Hot-Dog/23.png, val/Hot-Dog/22.png")
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
    assert status == 1 and not out.exists() and "1 of 36 images are damaged: val/Hot-Dog/22.png" in err.splitlines()[-1]
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and contents(out) == contents(whole)


def test_an_image_that_cannot_be_decoded_is_named(folder, whole, monkeypatch, out, run, call):
    broken = folder / "val" / "n01440764" / "00.jpg"
    original = broken.read_bytes()
    broken.write_bytes(original[:2000])
    with pytest.raises(ValueError, match=f"cannot decode {broken}: .*truncated"):        # the plain path
        load_task("imagenet", "val", size=32, data_root=folder).images[6]
    done = run("data.py", *words_for(folder, out, "--workers", 2), status=1)
    monkeypatch.setattr(data, "batches", lambda task, order, size, workers: batches(task, order, 5, workers))
    for err in (done.stderr, call(*words_for(folder, out))[2]):
        assert "Traceback" not in err and not out.exists()
        assert err.splitlines()[-1].startswith(f"data.py cache: cannot decode {broken}: image file is truncated")
    broken.write_bytes(original)
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and out.read_bytes() == whole.read_bytes()


def test_refused_before_any_work(folder, whole, out, monkeypatch, call):
    before = contents(whole)
    empty, garbage = out.parent / "empty", out.parent / "garbage.npy"
    garbage.write_bytes(b"not a cache")
    os.mkdir(empty)
    cases = [(words_for(folder, out, *more), said) for more, said in (
        (("--dataset", "toy"), "not toy"), (("--dataset", f"cache:{whole}"), "not cache:"), (("--size", 0), "--size"),
        (("--dataset", "imagenet"), "--data-root"), (("--dataset", f"folder:{out}-absent"), "no such folder"),
        (("--dataset", f"folder:{empty}"), "not a folder of"), (("--out", "/proc/c.npy"), "/proc"), (("--lim", 3), "--lim"),
        (("--out", garbage), "garbage"), (("--out", whole, "--size", 16), "made of other"), (("--workers", -1), "--workers"),
        (("--out", whole, "--dataset", f"folder:{folder / 'val'}"), str(folder)), (("--out", empty), "no such file"))]
    cases += [((), "COMMAND"), (("cache",), "--dataset"), (("verify",), "FILE"), (("bogus",), "bogus")]
    for words, said in cases:
        status, printed, err = call(*words)
        assert (status, printed, err.count("\n")) == (2, "", 1) and said in err, err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**7, 10**7))
    status, printed, err = call(*words_for(folder, out, "--size", 640))
    assert (status, printed, err.count("\n")) == (2, "", 1) and "0.044 GB more" in err and "0.010 GB free" in err
    assert contents(whole) == before and garbage.read_bytes() == b"not a cache"
    assert {path.name for path in out.parent.iterdir()} == {"empty", "garbage.npy"}


def test_what_is_there_already_needs_no_space(folder, whole, monkeypatch, out, call):
    killed(monkeypatch, folder, out, "replace", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert call(*words_for(folder, out))[0] == 0 and contents(out) == contents(whole)


def test_a_full_disk_is_one_line(folder, whole, monkeypatch, out, call):
    monkeypatch.setattr(data, "batches", lambda task, order, size, workers: batches(task, order, 5, workers))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 22 * 3072 + 5, limits[1]))          # which says so as a full disk does
    try:
        status, _, err = call(*words_for(folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "File too large" in err.splitlines()[-1] and "Traceback" not in err and not out.exists()
    status, said, _ = call(*words_for(folder, out))
    assert status == 0 and "going on after 20" in said and contents(out) == contents(whole)


def test_one_writer_at_a_time(folder, out, call):
    marker, context = open(f"{out}.tmp.done", "ab"), multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=lambda: (fcntl.lockf(marker, fcntl.LOCK_EX), held.set(), time.sleep(60)))
    process.start()
    held.wait()
    status, _, err = call(*words_for(folder, out))
    process.kill()
    process.join()
    assert status == 2 and "another process" in err and call(*words_for(folder, out))[0] == 0


@pytest.mark.parametrize("spoil,part,size,said", [
    (lambda out: out.unlink(), "val", 32, "no such file"),
    (lambda out: (out.parent / "c.npy.index.npz").unlink(), "val", 32, "index.npz"),
    (lambda out: out.write_bytes(b"not a cache"), "val", 32, "not a whole cache"),
    (lambda out: (out.parent / "c.npy.index.npz").write_bytes(b"not an index"), "val", 32, "not a whole cache"),
    (lambda out: np.savez(f"{out}.index.npz", labels=np.zeros(36)), "val", 32, "another format"),
    (lambda out: np.save(out, np.zeros((36, 3, 32, 32), np.int8)), "val", 32, "of its index"),
    (lambda out: np.save(out, np.zeros((35, 3, 32, 32), np.uint8)), "val", 32, "of its index"),
    (lambda out: os.truncate(out, out.stat().st_size - 1), "val", 32, "not a whole cache"),
    (lambda out: os.truncate(out, out.stat().st_size + 1), "val", 32, "of its index"),
    (lambda out: None, "val", 224, "--size 224"), (lambda out: None, "tune", 32, "no tune images, only train and val")])
def test_what_is_not_a_whole_cache_is_a_one_line_error(whole, spoil, part, size, said):
    spoil(whole)
    with pytest.raises(ValueError, match=said) as error:
        load_task(f"cache:{whole}", part, size=size)
    assert "\n" not in str(error.value) and str(whole) in str(error.value)
