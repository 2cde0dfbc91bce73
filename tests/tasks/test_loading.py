"""tasks/loading.py: batches in order, what cannot be read, and workers."""
import atexit
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin
from torch.utils.data import Dataset, Subset, TensorDataset, _utils
from writers import SETS, alarm, encoded, imagenet_folder, png, write_shards

from tasks import images
from tasks.images import Images, Unreadable
from tasks.loading import Batch, batches, end_workers, on_device
from tasks.task import Task, load_task

no_hanging, folder = pytest.fixture(alarm, autouse=True), pytest.fixture(imagenet_folder)


# --------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order(folder, workers):
    task = load_task("imagenet", "val", size=16, data_root=folder)
    order = [17, 0, 5, 9, 2]
    found = list(batches(task, order, 2, workers))
    assert all(isinstance(batch, Batch) and batch.errors == [] for batch in found)
    assert [len(batch.y) for batch in found] == [2, 2, 1]
    assert torch.cat([batch.index for batch in found]).tolist() == order
    assert torch.cat([batch.y for batch in found]).tolist() == [i // 6 for i in order]
    assert found[0].x.dtype == torch.uint8 and found[0].y.dtype == found[0].index.dtype == torch.int64


@pytest.mark.parametrize("name", ["pcam", "pets", "stl10", "shards"])
def test_workers_read_what_this_process_reads(tmp_path, name):
    if name == "shards":
        write_shards(tmp_path / "m", [0, 1, 1, 0], ["cat", "dog"], tars=2)
        task = load_task(f"wds:{tmp_path / 'm'}", "val", size=24)
    else:
        SETS[name][0](tmp_path)
        task = load_task(name, "val", size=24, data_root=tmp_path)
    order = [2, 0, 1]
    alone = list(batches(task, order, 2, 0))
    for _ in range(2):
        assert same(alone, list(batches(task, order, 2, 2)))
    assert torch.cat([batch.index for batch in alone]).tolist() == order


def numbered(count):
    """A batch that says which image is which."""
    numbers = torch.arange(count)
    x = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Batch(x, numbers + 100, numbers + 200, [(7, "bad")])


def test_micro_batches_are_equal_consecutive_slices():
    batch = numbered(12)
    for n, size in ((1, 12), (3, 4), (12, 1)):
        parts = list(batch.split(n))
        assert len(parts) == n and all(len(tensor) == size for part in parts for tensor in part)
        assert all(torch.equal(torch.cat(slices), whole) for slices, whole in zip(zip(*parts), batch[:3]))
    with pytest.raises(RuntimeError):
        list(batch.split(5))


def test_on_a_device_they_are_the_same(monkeypatch):
    batch, = on_device([numbered(3)], torch.device("cpu"))
    assert isinstance(batch, Batch) and same([batch], [numbered(3)])
    # what a DataLoader does to pin them, where there is a GPU
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    pinned = _utils.pin_memory.pin_memory(numbered(3))
    assert isinstance(pinned, Batch) and same([pinned], [numbered(3)])


@pytest.mark.cuda
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_they_are_the_same(corpus, workers):
    task, _ = corpus
    order, device = [*range(len(task.images))], torch.device("cuda")
    alone = list(batches(task, order, 4, 0, "leave out"))
    loader = batches(task, order, 4, workers, "leave out")
    assert all(tensor.is_pinned() for batch in loader for tensor in batch[:3] if len(tensor))
    found = list(on_device(loader, device))
    assert all(tensor.is_cuda for batch in found for tensor in batch[:3])
    assert same(alone, [Batch(*(tensor.cpu() for tensor in batch[:3]), batch.errors) for batch in found])


# --------------------------------------------------------------------------------------------- unreadable
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
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png()[:33] + chunk + png()[33:]


grey16 = io.BytesIO()
Image.fromarray(np.full((30, 30), 257 * 77, np.uint16)).save(grey16, "png")
GOOD = {"png.jpg": png(), "cmyk.jpg": encoded("jpeg", "CMYK"), "gif.jpg": encoded("gif", "P"),
        "grey16.png": grey16.getvalue(), "la.png": png(mode="LA"), "palette.png": png(mode="P"),
        "onebit.png": png(mode="1"), "dot.png": png(1, 1), "thin.png": png(1, 5000),
        "thinner.png": png(60_000, 1), "webp.webp": encoded("webp"), "plain.jpg": encoded("jpeg")}
# PIL would warn of the size of half-a-bomb
BAD = {"bomb.png": (claims(50_000, 50_000), "more than 178,956,970 pixels are too many"),
       "half-a-bomb.png": (claims(12_000, 12_000), "truncated"),
       "chunk-bomb.png": (chunk_bomb(), "too large"), "text-bomb.png": (text_bomb(), "too large"),
       "empty.jpg": (b"", "cannot identify"), "text.jpg": (b"not an image\n" * 50, "cannot identify"),
       "eps.jpg": (encoded("eps"), "cannot identify"), "truncated.jpg": (encoded("jpeg")[:-100], "truncated"),
       "truncated.png": (png()[:-100], "truncated"),
       "noise.jpg": (encoded("jpeg")[:30] + bytes(range(256)) * 9, ""),
       "one\nline\x1b[31m.jpg": (b"", "one\\nline\\x1b[31m.jpg: cannot identify")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(a task of every kind of image, in two classes, {number: what is said} of the unreadable ones)."""
    root = tmp_path_factory.mktemp("corpus")
    said = {name: words for name, (_, words) in BAD.items()}
    said |= {"pipe.jpg": "not a regular", "zero.jpg": "not a regular"}
    said |= {"dangling.jpg": "No such file", "vanishes.jpg": "No such file"}
    # a folder: no image, not even a bad one
    (root / "a" / "x.jpg").mkdir(parents=True)
    (root / "b").mkdir()
    for k, name in enumerate(sorted({**said, **GOOD})):
        path = root / "ab"[k % 2] / name
        if name in ("dangling.jpg", "zero.jpg"):
            os.symlink("/dev/zero" if name == "zero.jpg" else "nowhere", path)
        elif name == "pipe.jpg":
            os.mkfifo(path)
        else:
            path.write_bytes(GOOD.get(name) or BAD.get(name, [png()])[0])
    task = load_task(f"folder:{root}", "val", size=32)
    numbers = {os.path.basename(task.images.path(i)): i for i in range(len(task.images))}
    assert numbers.keys() == said.keys() | GOOD.keys()
    os.unlink(task.images.path(numbers["vanishes.jpg"]))
    return task, {numbers[name]: words for name, words in said.items()}


def same(one, two):
    return len(one) == len(two) and all(torch.equal(*pair) if torch.is_tensor(pair[0]) else pair[0] == pair[1]
                                        for a, b in zip(one, two) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize("bad", ["leave out", "replace"])
def test_what_cannot_be_read_is_named_and_the_rest_is_read(corpus, bad):
    task, said = corpus
    order = [*range(len(task.images))][::-1]
    found = list(batches(task, order, 4, 0, bad))
    errors = dict(error for batch in found for error in batch.errors)
    assert errors.keys() == said.keys() and sum(len(batch.errors) for batch in found) == len(said)
    for number, error in errors.items():
        assert error.startswith(f"cannot decode {images.printable(task.images.path(number))}: ")
        assert said[number] in error and error.isprintable() and "0x" not in error and len(error) < 400
    numbers = torch.cat([batch.index for batch in found]).tolist()
    if bad == "leave out":
        assert numbers == [i for i in order if i not in said]
        return
    n = len(order)
    assert numbers == [next(j % n for j in range(i, i + n) if j % n not in said) for i in order]
    for x, y, index, _ in found:
        for k, i in enumerate(index.tolist()):
            assert torch.equal(x[k], task.images[i][0]) and y[k] == task.images[i][1]


@pytest.mark.parametrize("bad", ["leave out", "replace"])
def test_workers_and_turns_make_no_difference(corpus, bad):
    task, _ = corpus
    orders = [[0, 20, 1], [13, 22, 2], [3], [*range(12, 18)]]
    found = [list(batches(task, iter(orders), None, workers, bad)) for workers in (0, 2, 2)]
    assert same(found[0], found[1]) and same(found[0], found[2])
    if bad == "replace":
        assert [len(batch.x) for batch in found[0]] == [3, 3, 1, 6]
    assert same(found[0], list(batches(task, orders, None, 0, bad)))


def test_the_next_one_is_also_found_at_the_tasks_end_and_in_a_part_of_it(corpus):
    task, said = corpus
    good, bad = next(i for i in range(len(task.images)) if i not in said), min(said)
    part, label = task._replace(images=Subset(task.images, [good, bad])), task.images[good][1]
    batch, = batches(part, [1, 0], 2, 0, bad="replace")
    assert batch.index.tolist() == [good] * 2 and batch.y.tolist() == [label] * 2
    assert [number for number, _ in batch.errors] == [bad]


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
    iterator = iter(loader)
    with pytest.raises(ValueError) as error:
        next(iterator)
    if loader.num_workers:
        # else after 5 s, when the garbage is collected
        iterator._shutdown_workers()
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_ten_in_a_row_are_the_disk(workers):
    task = Task("gone", Gone(10), ["a", "b"], "{}")
    batch, = batches(task, [0], 1, workers, bad="replace")
    assert batch.index.tolist() == [9] and batch.errors == [(0, "cannot decode 0.png: gone")]
    said = "10 images in a row cannot be read, the last: cannot decode 9.png: gone"
    assert ended_with(batches(task._replace(images=Gone(11)), [0], 1, workers, bad="replace")) == said
    assert len(list(batches(task._replace(images=Gone(5)), [0], 1, workers, bad="replace"))) == 1
    # this one has no more
    part = task._replace(images=Subset(Gone(9), [0, 1]))
    said = ended_with(batches(part, [0], 1, workers, bad="replace"))
    assert said.startswith("2 images in a row cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_from_a_worker_too(corpus, workers):
    task, said = corpus
    error = ended_with(batches(task, [max(said)], 1, workers))
    assert error.startswith("cannot decode /") and error.isprintable()


def test_what_is_no_image_is_not_asked_again(corpus, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    assert len(list(batches(corpus[0], [*corpus[1]], 1, 0, bad="leave out"))) == len(corpus[1])


def strange(kind, tmp_path):
    """A task of three images, the second of which has label 7 of 5 classes; and what an error calls it."""
    labels, file = [0, 7, 4], str(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(png(8, 8))
    if kind == "memory":
        x = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
        made = TensorDataset(x, torch.tensor(labels), torch.arange(3))
        return Task("mine", made, [*"abcde"], "{}"), "image 1 of mine"
    if kind == "files":
        return Task("mine", Images("mine", [(file, label) for label in labels], 8), [*"abcde"], "{}"), file
    folder = write_shards(tmp_path / "wds", labels, [*"abcde"], "png")
    return load_task(f"wds:{folder}", "val", size=8), f"s0000001.png of {folder / 'test' / '0.tar'}"


@pytest.mark.parametrize("kind", ["memory", "files", "shards"])
def test_labels_beyond_the_classes(tmp_path, kind):
    task, called = strange(kind, tmp_path)
    expected = f"cannot decode {called}: label 7 of 5 classes"
    for numbers, position in (([0, 1, 2], 1), ([2, 0, 1], 2)):
        part = task._replace(images=Subset(task.images, numbers)) if position == 2 else task
        assert ended_with(batches(part, [position], 1, 0)) == expected
        for bad, index in (("replace", [2, numbers[0]]), ("leave out", [numbers[0]])):
            batch, = batches(part, [position, 0], 2, 0, bad)
            assert batch.errors == [(1, expected)] and batch.index.tolist() == index


def test_labels_below_the_classes():
    images = TensorDataset(torch.zeros(1, 3, 8, 8), torch.tensor([-1]), torch.arange(1))
    task = Task("mine", images, ["a", "b"], "{}")
    assert ended_with(batches(task, [0], 1, 0)) == "cannot decode image 0 of mine: label -1 of 2 classes"


# --------------------------------------------------------------------------------------------- workers
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
        # whatever happens
        signal.alarm(15)
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
        # the workers' own is another
        signal.signal(number, lambda *_: caught.append(1))
        pids, found = [worker.pid for worker in loader._workers], next(loader).index.tolist()
        send.send(pids)
        for batch in loader:
            found += batch.index.tolist()
        send.send((found, len(caught)))
    process, receive = forked(main)
    pids = receive.recv()
    os.killpg(process.pid, number)
    found, caught = receive.recv()
    process.join(30)
    assert process.exitcode == 0 and found == list(range(40)) and caught == 1 and not any(map(alive, pids))


def test_workers_end_when_an_error_ends_their_process():
    """With a loader that nobody has shut down: at once, and in no other words than the error's."""
    script = ("import time, torch; from tasks.loading import batches; from tasks.task import Task\n"
              "class Slow(torch.utils.data.Dataset):\n"
              "    def __len__(self): return 40\n"
              "    def __getitem__(self, i): time.sleep(.02); return torch.zeros(3, 2, 2), 1, i\n"
              "loader = iter(batches(Task('slow', Slow(), ['a', 'b'], '{}'), list(range(40)), 20, 2))\n"
              "next(loader); print([worker.pid for worker in loader._workers])\n"
              "raise ValueError('the last line')")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: the last line", done.stderr
    assert len(json.loads(done.stdout)) == 2 and not any(map(alive, json.loads(done.stdout)))


def test_exit_handlers_are_set_with_the_first_workers_and_once(monkeypatch):
    called = []

    def unregister(function):
        called[:] = [other for other in called if other != function]
    monkeypatch.setattr(atexit, "register", called.append)
    monkeypatch.setattr(atexit, "unregister", unregister)
    batches(SLOW, [0], 1, 0)
    assert called == []
    for _ in range(3):
        batches(SLOW, [0], 1, 2)
    assert called == [end_workers]


def test_workers_end_with_the_process_that_they_work_for(monkeypatch):
    # how often torch's workers look, in seconds
    monkeypatch.setattr(_utils.worker, "MP_STATUS_CHECK_INTERVAL", .2)

    def main(send):
        loader = iter(batches(SLOW, list(range(40)), 4, 2))
        next(loader)
        # then they have nothing left to do
        time.sleep(.5)
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
