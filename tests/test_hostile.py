"""Images and data sets that are damaged, hostile or gone, by a fault of the disk or of whoever made them; and workers."""
import errno
import io
import os
import pickle
import signal
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
import test_benchmarks as sets
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import cifar

import images
from data import Task, batches, load_task
from images import Images, Unreadable, one_line
from sampling import few_shots, fingerprint, labels_of


@pytest.fixture(autouse=True)
def no_hanging():
    usual = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))      # which no `except Exception` catches
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


def png(width=20, height=20, mode="RGB", **how):
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "png", **how)
    return file.getvalue()


def encoded(kind, mode="RGB", size=(60, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(file, kind)
    return file.getvalue()


def claims(width, height):
    """A PNG whose header says that it is so large; there is hardly anything in it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


def text_bomb():
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "x" * 10**7, zip=True)
    return png(pnginfo=text)


def chunk_bomb():
    body = b"iCCP" + b"x\0\0" + zlib.compress(bytes(10**7))
    return png()[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png()[33:]


grey16 = io.BytesIO()
Image.fromarray(np.full((30, 30), 257 * 77, np.uint16)).save(grey16, "png")
GOOD = {"png.jpg": png(), "cmyk.jpg": encoded("jpeg", "CMYK"), "gif.jpg": encoded("gif", "P"),
        "grey16.png": grey16.getvalue(), "la.png": png(mode="LA"), "palette.png": png(mode="P"),
        "onebit.png": png(mode="1"), "dot.png": png(1, 1), "thin.png": png(1, 5000), "thinner.png": png(60_000, 1),
        "webp.webp": encoded("webp"), "plain.jpg": encoded("jpeg")}
BAD = {"bomb.png": (claims(50_000, 50_000), "50,000×50,000 pixels are too many"),
       "half-a-bomb.png": (claims(12_000, 12_000), "truncated"),             # PIL would warn of its size
       "chunk-bomb.png": (chunk_bomb(), "too large"), "text-bomb.png": (text_bomb(), "too large"),
       "empty.jpg": (b"", "cannot identify"), "text.jpg": (b"not an image\n" * 50, "cannot identify"),
       "eps.jpg": (encoded("eps"), "cannot identify"), "truncated.jpg": (encoded("jpeg")[:-100], "truncated"),
       "truncated.png": (png()[:-100], "truncated"), "noise.jpg": (encoded("jpeg")[:30] + bytes(range(256)) * 9, ""),
       "one\nline\x1b[31m.jpg": (b"", "one\\nline\\x1b[31m.jpg: cannot identify")}


@pytest.fixture
def corpus(tmp_path):
    """(a task with every kind of image, in two classes, {number: what is said of it} of those that cannot be read)."""
    said = {name: words for name, (_, words) in BAD.items()} | {"pipe.jpg": "not a regular", "zero.jpg": "not a regular"} | {
        f"{word}.jpg": "No such file" for word in ("dangling", "vanishes")}
    (tmp_path / "set" / "a" / "x.jpg").mkdir(parents=True)                # a folder: no image, not even a bad one
    (tmp_path / "set" / "b").mkdir()
    for k, name in enumerate(sorted({**said, **GOOD})):
        path = tmp_path / "set" / "ab"[k % 2] / name
        if name in ("dangling.jpg", "zero.jpg"):
            os.symlink("/dev/zero" if name == "zero.jpg" else "nowhere", path)
        elif name == "pipe.jpg":
            os.mkfifo(path)
        else:
            path.write_bytes(GOOD.get(name) or BAD.get(name, [png()])[0])
    task = load_task(f"folder:{tmp_path / 'set'}", "val", size=32)
    numbers = {os.path.basename(task.images.path(i)): i for i in range(len(task.images))}
    assert numbers.keys() == said.keys() | GOOD.keys()
    os.unlink(task.images.path(numbers["vanishes.jpg"]))
    return task, {numbers[name]: words for name, words in said.items()}


def same(one, two):
    return len(one) == len(two) and all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1]
                                        for a, b in zip(one, two) for pair in zip(a, b))


@pytest.mark.parametrize("bad", ["leave out", "replace"])
def test_what_cannot_be_read_is_named_and_the_rest_is_read(corpus, bad):
    task, said = corpus
    order = [*range(len(task.images))][::-1]
    found = list(batches(task, order, 4, 0, bad))
    errors = {number: error for *_, problems in found for number, error in problems}
    assert errors.keys() == said.keys() and sum(len(problems) for *_, problems in found) == len(said)
    for number, error in errors.items():
        assert error.startswith(f"cannot decode {images.printable(task.images.path(number))}: ") and said[number] in error
        assert error.isprintable() and "0x" not in error and len(error) < 400
    numbers = torch.cat([index for _, _, index, _ in found]).tolist()
    if bad == "leave out":
        assert numbers == [i for i in order if i not in said]
        return
    n = len(order)
    assert numbers == [next(j % n for j in range(i, i + n) if j % n not in said) for i in order]
    for x, y, index, _ in found:
        assert all(torch.equal(x[k], task.images[i][0]) and y[k] == task.images[i][1] for k, i in enumerate(index.tolist()))


@pytest.mark.parametrize("bad", ["leave out", "replace"])
def test_workers_and_turns_make_no_difference(corpus, bad):
    task, _ = corpus
    orders = [[0, 20, 1], [13, 22, 2], [3], [*range(12, 18)]]
    found = [list(batches(task, iter(orders), None, workers, bad)) for workers in (0, 2, 2)]
    assert same(found[0], found[1]) and same(found[0], found[2])
    if bad == "replace":
        assert [len(x) for x, *_ in found[0]] == [3, 3, 1, 6]
    assert same(found[0], list(batches(task, orders, None, 0, bad)))


def test_the_next_one_is_also_found_at_the_tasks_end_and_in_a_part_of_it(corpus):
    task, said = corpus
    good, bad = (next(i for i in range(len(task.images)) if (i in said) == wanted) for wanted in (False, True))
    part, label = task._replace(images=Subset(task.images, [good, bad])), task.images[good][1]
    (_, y, index, problems), = batches(part, [1, 0], 2, 0, bad="replace")
    assert index.tolist() == [good] * 2 and y.tolist() == [label] * 2 and [number for number, _ in problems] == [bad]


class Gone(Dataset):
    """A set of which only the last image can be read."""
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i < self.count - 1:
            raise Unreadable(f"cannot decode {i}.png: gone")
        return torch.zeros(3, 4, 4, dtype=torch.uint8), 1, i


def ended_with(loader):
    """What a loader's error says."""
    batches = iter(loader)
    with pytest.raises(ValueError) as error:
        next(batches)
    if loader.num_workers:
        batches._shutdown_workers()                                         # else after 5 s, when the garbage is collected
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_ten_in_a_row_are_the_disk(workers):
    task = Task("gone", Gone(10), ["a", "b"], "{}")
    (_, _, index, problems), = batches(task, [0], 1, workers, bad="replace")
    assert index.tolist() == [9] and problems == [(0, "cannot decode 0.png: gone")]
    for count, said in ((11, "10 images in a row cannot be read, the last: cannot decode 9.png: gone"), (5, None)):
        task = task._replace(images=Gone(count))
        if said:
            assert ended_with(batches(task, [0], 1, workers, bad="replace")) == said
        else:
            assert len(list(batches(task, [0], 1, workers, bad="replace"))) == 1
    part = task._replace(images=Subset(Gone(9), [0, 1]))                    # has no more
    assert ended_with(batches(part, [0], 1, workers, bad="replace")).startswith("2 images in a row cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_from_a_worker_too(corpus, workers):
    task, said = corpus
    error = ended_with(batches(task, [max(said)], 1, workers))
    assert error.startswith("cannot decode /") and error.isprintable()


def test_what_is_no_image_is_not_asked_again(corpus, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    assert len(list(batches(corpus[0], [*corpus[1]], 1, 0, bad="leave out"))) == len(corpus[1])


def test_lines_are_harmless():
    assert one_line(OSError("a\nb\x1b[31m \udcff\u202e" + 300 * "x")).startswith("a b\\x1b[31m \\udcff\\u202exxx")
    assert len(one_line("x" * 300)) == 200 and one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_thin_image_is_its_middle(tmp_path, monkeypatch):
    resize, areas = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *words, **more: (
        areas.append(size[0] * size[1]), resize(image, size, *words, **more))[1])
    stripes = np.zeros((1, 60_000, 3), np.uint8)
    stripes[:, 30_000:] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    x, _, _ = Images("a", [(str(tmp_path / "a.png"), 0)], 32)[0]
    assert x.shape == (3, 32, 32) and x[0, 0, 0] < 128 < x[0, 0, -1] and (x[0].int().diff() >= 0).all()
    assert areas == [37 * 37 * 64]


@pytest.mark.parametrize("size,said", [(2**30 + 1, "too many"), (2**20, "cannot identify")])
def test_a_file_that_is_too_long_is_not_read(tmp_path, size, said):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=said):
        Images("a", [(str(tmp_path / "a.jpg"), 0)], 32)[0]


# ---------------------------------------------------------------------------------------------- folders
def test_what_is_left_out_of_a_folder_is_said_once(tmp_path, capsys, monkeypatch):
    for name in ("a", "b/sub", "b/.hidden", ".git"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("x.png", "._x.jpg", ".DS_Store"):
            (tmp_path / name / file).write_bytes(png())
    for file in ("notes.txt", "photo.dat"):
        (tmp_path / "b" / file).write_text("x")
    for _ in range(2):
        task = load_task(f"folder:{tmp_path}", "val", size=8)
        assert task.class_names == ["a", "b"] and [task.images.path(i) for i in range(len(task.images))] == [
            f"{tmp_path}/a/x.png", f"{tmp_path}/b/sub/x.png"]
    assert capsys.readouterr().out == (f"2 files under {tmp_path} are left out, their names are not those of images: "
                                       f"{tmp_path}/b/notes.txt, …\n")
    images.say_once.cache_clear()
    monkeypatch.setenv("RANK", "1")
    load_task(f"folder:{tmp_path}", "val", size=8)
    assert capsys.readouterr() == ("", "")


def test_folders_that_are_not_one(tmp_path, monkeypatch):
    def said():
        with pytest.raises(ValueError) as error:
            load_task(f"folder:{tmp_path}", "val", size=8)
        assert str(error.value).isprintable() and str(tmp_path) in str(error.value)
        return str(error.value)
    assert "no folders in it" in said()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("x")
    assert "no images in a/" in said()
    for name in ("a", "b"):
        (tmp_path / name / "x.png").write_bytes(png())
    os.symlink("..", tmp_path / "b" / "up")
    assert "the same folder twice, by a link" in said()
    (tmp_path / "b" / "up").unlink()
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    assert "Permission denied" in said()


def test_names_and_labels_survive_as_arrays(tmp_path):
    names = [b"a/1.png", b"a/\xff2.png", "b/é ü.png".encode(), b"b/" + 200 * b"x" + b".png"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png())
    task = load_task(f"folder:{tmp_path}", "val", size=8)
    assert {os.path.relpath(os.fsencode(task.images.path(i)), os.fsencode(tmp_path)) for i in range(4)} == set(names)
    assert [task.images[i][1] for i in range(4)] == task.images.labels.tolist() == labels_of(task).tolist() == [0, 0, 1, 1]
    assert isinstance(task.images.files, np.ndarray) and isinstance(task.images.labels, np.ndarray)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = load_task(f"folder:{moved}", "val", size=8)
    assert fingerprint(again) == fingerprint(task)
    (moved / "a" / "1.png").rename(moved / "a" / "3.png")
    assert fingerprint(load_task(f"folder:{moved}", "val", size=8)) != fingerprint(task)


# ---------------------------------------------------------------------------------------------- labels
def strange(kind, tmp_path):
    """A task of three images, the second of which has label 7 of 5 classes; and what an error calls it."""
    labels, file = [0, 7, 4], str(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(png(8, 8))
    if kind == "memory":
        made = TensorDataset(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor(labels), torch.arange(3))
        return Task("mine", made, [*"abcde"], "{}"), "image 1 of mine"
    if kind == "files":
        return Task("mine", Images("mine", [(file, label) for label in labels], 8), [*"abcde"], "{}"), file
    sets.write_shards(tmp_path / "wds", labels, [*"abcde"], "png")
    return load_task(f"wds:{tmp_path / 'wds'}", "val", size=8), f"s0000001.png of {tmp_path / 'wds' / 'test' / '0.tar'}"


@pytest.mark.parametrize("kind", ["memory", "files", "shards"])
def test_labels_beyond_the_classes(tmp_path, kind):
    task, called = strange(kind, tmp_path)
    expected = f"cannot decode {called}: label 7 of 5 classes"
    for numbers, position in (([0, 1, 2], 1), ([2, 0, 1], 2)):
        part = task._replace(images=Subset(task.images, numbers)) if position == 2 else task
        assert ended_with(batches(part, [position], 1, 0)) == expected
        (_, y, index, problems), = batches(part, [position, 0], 2, 0, bad="replace")
        assert problems == [(1, expected)] and index.tolist() == [2, numbers[0]]
        (_, _, index, problems), = batches(part, [position, 0], 2, 0, bad="leave out")
        assert problems == [(1, expected)] and index.tolist() == [numbers[0]]
    assert few_shots(task, 1, 0).images.indices == [0, 2]
    assert labels_of(task).tolist() == ([0, -1, 4] if kind == "shards" else [0, 7, 4])
    task.class_names.pop()                                                  # now 4 is none either
    assert few_shots(task, 1, 0).images.indices == [0]


def test_labels_below_the_classes():
    task = Task("mine", TensorDataset(torch.zeros(1, 3, 8, 8), torch.tensor([-1]), torch.arange(1)), ["a", "b"], "{}")
    assert ended_with(batches(task, [0], 1, 0)) == "cannot decode image 0 of mine: label -1 of 2 classes"


def test_few_shots_of_what_can_be_read(tmp_path):
    task = Task("gone", Gone(9), ["a", "b"], "{}")
    assert labels_of(task).tolist() == [-1] * 8 + [1] and few_shots(task, 2, 0).images.indices == [8]


def test_native_sets_are_of_one_size(tmp_path):
    sets.write_shards(tmp_path / "wds_cifar10", [0, 1], [*"abcdefghij"], "png", size=(32, 32))
    assert load_task("cifar10", "val", size=8, data_root=tmp_path).images[1][0].shape == (3, 32, 32)
    (tmp_path / "wds_cifar10" / "test").rename(tmp_path / "old")
    sets.write_shards(tmp_path / "wds_cifar10", [0], [*"abcdefghij"], "png", size=(32, 31))
    with pytest.raises(Unreadable, match="31×32 pixels, not 32×32"):
        load_task("cifar10", "val", size=8, data_root=tmp_path).images[0]


# ---------------------------------------------------------------------------------------------- what would be executed
class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture
def target(tmp_path):
    """A folder that a pickle makes when it is loaded; nothing may."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))
    (tmp_path / "executed").rmdir()                                           # it would work
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def refused(name, **words):
    with pytest.raises(ValueError) as error:
        load_task(name, "val", size=8, **words)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("name,files", [
    ("cifar10", ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]),
    ("cifar100", ["meta", "train", "test"])])
def test_no_pickle_of_cifar_is_executed_whose_checksum_is_not_the_authors(tmp_path, monkeypatch, target, name, files):
    """Also when it is the only one: every other file passes for genuine."""
    getattr(sets, name)(tmp_path / "root")
    folder = tmp_path / "root" / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    assert "not whole" in refused(name, data_root=tmp_path / "root")        # as are all of ours
    checked = cifar.check_integrity
    for file in files:
        monkeypatch.setattr(cifar, "check_integrity",
                            lambda path, md5, file=file: not path.endswith(f"/{file}") or checked(path, md5))
        genuine = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps(Malicious(target)))
        assert "not whole" in refused(name, data_root=tmp_path / "root")
        (folder / file).write_bytes(genuine)


@pytest.mark.parametrize("name", ["stl10", "pcam", "cars", "flowers102", "caltech101"])
def test_no_other_file_of_a_set_is_a_pickle(tmp_path, target, name):
    (tmp_path / "root").mkdir()
    sets.SETS[name][0](tmp_path / "root")
    for path in filter(os.path.isfile, (tmp_path / "root").rglob("*")):
        path.write_bytes(pickle.dumps(Malicious(target)))
    try:
        task = load_task(name, "val", size=8, data_root=tmp_path / "root")
        assert all(problems for *_, problems in batches(task, range(len(task.images)), 1, 0, bad="leave out"))
    except ValueError as error:
        assert str(error).isprintable()


def test_no_pickle_among_the_images_is_executed(tmp_path, target):
    """Nor anything else: a file's end is not believed (shards), and formats that start programs are not read."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", pickle.dumps(Malicious(target))), ("a.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(Unreadable, match="cannot identify"):
        load_task(f"wds:{tmp_path}", "val", size=8).images[0]
