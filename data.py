"""Tasks: a name → images, labels, class names and templates. The toy world, the paper's data sets, any folder of images.

Images are uint8 [3,H,W]; nothing here normalises. Evaluation names: `toy:digits` and its sisters (or just `digits`),
`imagenet`, `cifar10` and the others of benchmarks.py, `folder:PATH`, `wds:PATH`, `cache:FILE`; `all` stands for every task
that belongs to the model. Training takes the same names. Where decoding is what a run waits for, decode once:

    python data.py cache --dataset imagenet --data-root DIR --out FILE     # then --dataset cache:FILE
    python data.py verify FILE                                             # read it all and compare checksums
"""
import atexit
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate
from tqdm import tqdm

import toyworld
from benchmarks import BENCHMARKS, TEMPLATE, find, how_to_get, load_benchmark, present
from cache import FORMAT, RECORD, Cache, damaged, open_cache
from images import Folder, Unreadable, printable, unreadable
from prompts import imagenet_class_names, openai_templates

TOY_TRAIN, TOY_TEST = 16384, 400                     # images drawn to adapt on, and per task to evaluate on
TOY_ADAPTED = "seen"                                 # the one toy task to adapt on; the others are zero-shot
IN_A_ROW = 10                                        # images that cannot be read, until it is the disk that is gone


class Task(NamedTuple):
    name: str
    images: Dataset                                  # item i: (uint8 [3,H,W], label, i)
    class_names: list
    template: str                                    # or a list of them, an ensemble
    source: str = ""                                 # where a named set was found


def _image_root(name, data_root):
    """The folder that `imagenet` or `folder:PATH` stands for."""
    if name != "imagenet":
        return Path(name.removeprefix("folder:"))
    if data_root is None:
        raise ValueError("imagenet needs --data-root DIR with train/<class>/ and val/<class>/")
    root = Path(data_root)
    return root / "imagenet" if (root / "imagenet").is_dir() else root


def _part_folder(root, part):
    """Where a part is: root's sub-folder of that name; to evaluate on, root itself if it is a folder of classes, unsplit."""
    inside = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    split = {"train", "val"} <= inside or (inside and inside <= {"train", "val", "test"})
    return root if part == "val" and not split else root / part


def _folder_task(name, root, part, size):
    """The Task of one part of a folder."""
    folder = Folder(_part_folder(root, part), size)
    known = imagenet_class_names()
    names = [known[c] if re.fullmatch(r"n\d{8}", c) and c in known else c for c in folder.classes]
    return Task(name, folder, names, TEMPLATE)


def load_task(name, part, *, size=224, data_root=None, limit=None, templates="paper"):
    """One Task. part: "train" (to adapt on), "val" (to evaluate on) or, in the toy world, also "tune" (to choose by).

    size: the model's resolution in pixels, for images of no fixed one. limit: at most so many images, evenly spread over
    the set; toy sets are drawn that small. templates: the "paper"'s one of the set, or "openai": CLIP's ensemble for it,
    which the toy world does not have. Raises ValueError, in one line, for a name, folder or part that is not there or holds
    fewer than two classes.
    """
    if templates not in ("paper", "openai"):
        raise ValueError(f"templates are paper or openai, not {templates}")
    toy = name.removeprefix("toy:")
    if name == "toy":
        toy = TOY_ADAPTED
    found = find(name, data_root, part) if name == "imagenet" and data_root is not None else None
    if toy == "scans" and part != "val":
        raise ValueError("scans are for evaluation only: all of its images are reported on")
    if toy in toyworld.TASKS:
        count = TOY_TRAIN if part == "train" else TOY_TEST
        images, labels = toyworld.task(toy, "test" if part == "val" else part, min(count, limit or count))
        task = Task(toy, TensorDataset(images, labels, torch.arange(len(labels))), *toyworld.TASKS[toy])
    elif name.startswith("folder:") or name == "imagenet" and not (found and found[1]):
        try:
            task = _folder_task(name, _image_root(name, data_root), part, size)
        except ValueError as error:
            if name != "imagenet" or data_root is None or found:
                raise
            raise ValueError(f"{error}; get it with: {how_to_get(name, data_root)}") from None
    elif name.startswith("wds:") or name in BENCHMARKS:
        task = Task(name, *load_benchmark(name, part, size=size, data_root=data_root, templates=templates))
    elif name.startswith("cache:"):
        images = Cache(name.removeprefix("cache:"), part, size)
        task = Task(name, images, images.class_names, images.template)
    else:
        raise ValueError(f"unknown task {name!r}: expected {', '.join((*toyworld.TASKS, *BENCHMARKS))}, folder:PATH, "
                         "wds:PATH or cache:FILE")
    if templates == "openai" and isinstance(task.images, Folder | Cache):
        task = task._replace(template=openai_templates(name))
    if len(task.class_names) < 2:
        raise ValueError(f"{name} has only one class ({task.class_names[0]}): there is nothing to tell apart")
    if limit is not None and limit < len(task.images):
        chosen = [i * len(task.images) // limit for i in range(limit)]
        task = task._replace(images=Subset(task.images, chosen))
    return task


def task_names(words, dataset, data_root=None):
    """The names that `--tasks` means: a comma list, `none`, or `all` = the toy's zero-shot tasks or, for another dataset,
    the sets that are there under data_root but for `dataset` itself; it alone where there are no others.
    """
    if words == "none":
        return []
    if words == "all":
        toy = dataset.removeprefix("toy:") in (*toyworld.TASKS, "toy")
        names = toyworld.TASKS if toy else present(data_root)[0] if data_root is not None else []
        return [name for name in names if name not in (TOY_ADAPTED, dataset)] or [dataset]
    return list(dict.fromkeys(filter(None, (word.strip() for word in words.split(",")))))


def on_device(loader, device):
    """A loader's batches, as lists, their tensors on device. To a GPU they travel beside its work on the batches before."""
    if device.type != "cuda":
        yield from ([tensor.to(device) for tensor in batch[:3]] + batch[3:] for batch in loader)
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copies):
            tensors = [tensor.to(device, non_blocking=True) for tensor in batch[:3]]
        work.wait_stream(copies)
        for tensor in tensors:
            tensor.record_stream(work)                # its memory is not reused before `work` is done with it
        yield tensors + batch[3:]


def image_numbers(task):
    """The number of each image in its data set, in the task's order, whatever `limit` left of it."""
    return task.images.indices if isinstance(task.images, Subset) else range(len(task.images))


class Readable(Dataset):
    """The images of a task, with labels that it has a class for: item p is (uint8 [3,H,W], label, number), or what `bad` of
    `batches` makes of it: that or None, and None or (number, error)."""

    def __init__(self, task, bad):
        self.task, self.bad, self.numbers = task, bad, image_numbers(task)

    def __len__(self):
        return len(self.numbers)

    def read(self, position):
        item, classes = self.task.images[position], len(self.task.class_names)
        if not 0 <= int(item[1]) < classes:
            number, images = self.numbers[position], getattr(self.task.images, "dataset", self.task.images)
            where = images.where(number) if hasattr(images, "where") else f"image {number} of {self.task.name}"
            raise unreadable(where, f"label {int(item[1])} of {classes} classes")
        return item

    def __getitem__(self, position):
        if self.bad == "raise":
            return self.read(position)
        problem, tries = None, min(IN_A_ROW, len(self)) if self.bad == "replace" else 1
        for other in range(position, position + tries):
            try:
                return self.read(other % len(self)), problem
            except (ValueError, OSError) as error:
                last = printable(error)
                problem = problem or (self.numbers[position], last)
        if self.bad == "replace":
            raise Unreadable(f"{tries} images in a row cannot be read, the last: {last}")
        return None, problem


def collate_readable(pairs):
    """[uint8 [B,3,H,W], labels [B], numbers [B], [(number, error), …]] of `Readable`'s pairs."""
    items, problems = ([value for value in values if value is not None] for values in zip(*pairs))
    return [*(default_collate(items) if items else [torch.empty(0, dtype=torch.int64)] * 3), problems]


def leave_signals_to_the_parent(_):
    """In a worker: Ctrl-C, and the SIGTERM of a scheduler or of torchrun, reach all processes of a run, but what becomes of
    it is the main process's to say. Workers end by its message, or with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Workers that an error has left: their SIGTERM, with which Python would end them and wait for them, is ignored."""
    left = multiprocessing.active_children()
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)           # torch raises an error of its own for each
    for worker in left:
        worker.kill()


def batches(task, order, batch_size, workers, bad="raise"):
    """A DataLoader over the images of `task` in `order`: uint8 [B,3,H,W], labels [B], image numbers [B].

    order: a list of positions, cut into batches; with batch_size None an iterable, perhaps a generator, of lists of
    positions, one a batch. An image that cannot be read, or whose label is of no class, raises ValueError, in one line that
    names it. bad="leave out": it is left out; "replace": the next image of the task that can be read stands in its place,
    ValueError if IN_A_ROW cannot. With either, each batch has a fourth item, the (number, error) of those images.
    Workers are forked: they only decode, and any other way of starting them would run the stage script again in each.
    """
    slices = order if batch_size is None else [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    in_memory = isinstance(task.images, TensorDataset) or isinstance(getattr(task.images, "dataset", 0), TensorDataset)
    workers = 0 if in_memory else workers
    return DataLoader(Readable(task, bad), batch_sampler=slices, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      multiprocessing_context="fork" if workers else None, worker_init_fn=leave_signals_to_the_parent,
                      collate_fn=None if bad == "raise" else collate_readable)


# ---------------------------------------------------------------------------------------------- decode once
def _sources(dataset, data_root, size):
    """(one Task over the images of all parts, train first; {name: array} for the index, with a fingerprint per image)."""
    if dataset != "imagenet" and not dataset.startswith("folder:"):
        raise ValueError(f"imagenet and folder:PATH can be cached, not {dataset}")
    root = _image_root(dataset, data_root)
    split = _part_folder(root, "val") != root
    parts = [part for part in ("train", "val") if split and (root / part).is_dir()] or ["val"]
    tasks = [load_task(dataset, part, size=size, data_root=data_root) for part in parts]
    if not all(isinstance(task.images, Folder) for task in tasks):
        raise ValueError(f"{dataset} is there as shards: only folders can be cached")
    labels, made_of = np.concatenate([task.images.labels for task in tasks]), str(root.resolve())
    paths = [os.path.relpath(task.images.path(i), root) for task in tasks for i in range(len(task.images))]
    source = [zlib.crc32(os.fsencode(f"{made_of} {size} {name} {label} {stat.st_size} {stat.st_mtime_ns}"))
              for name, label in zip(paths, labels) for stat in [os.stat(root / name)]]
    index = {"format": FORMAT, "made_of": made_of, "made_with": f"Pillow {PIL.__version__}", "size": size,
             "template": tasks[0].template, "parts": parts, "counts": [len(task.images) for task in tasks],
             **{f"{part}_class_names": task.class_names for part, task in zip(parts, tasks)},
             "labels": labels, "paths": [os.fsencode(path) for path in paths],
             "source": np.array(source, RECORD["source"])}
    everything = tasks[0]._replace(images=ConcatDataset([task.images for task in tasks]),
                                   class_names=max((task.class_names for task in tasks), key=len))
    return everything, {name: np.array(value) for name, value in index.items()}


def make_cache(dataset, out, *, size=224, data_root=None, workers=0):
    """Decode every image of a data set into the file `out` and verify it; goes on where an interrupted call was.

    ValueError or OSError if it cannot start; after that SystemExit, in one line, and what is done is kept for the next call.
    """
    task, index = _sources(dataset, data_root, size)
    source, paths, n, image_bytes = index["source"], index["paths"], len(index["paths"]), 3 * size * size
    temporary, marker = Path(f"{out}.tmp"), Path(f"{out}.tmp.done")
    if os.path.exists(out):
        made = open_cache(out)[1]
        if not np.array_equal(made["source"], source):
            raise ValueError(f"{out} exists, made of other images ({made['made_of']}, {made['size']} pixels): left alone")
        marker.unlink(missing_ok=True)
        print(f"{out} is there already, made of these {n:,} images")
        return
    there = temporary.stat().st_size if temporary.exists() else 0
    needed, free = n * image_bytes + sum(array.nbytes for array in index.values()), shutil.disk_usage(Path(out).parent).free
    if needed - there > free:
        raise ValueError(f"{out} needs {(needed - there) / 1e9:,.3f} GB more, the disk has {free / 1e9:,.3f} GB free")
    temporary.touch()
    try:
        with open(marker, "a+b", buffering=0) as records, open(temporary, "r+b") as file:
            fcntl.lockf(records, fcntl.LOCK_EX | fcntl.LOCK_NB)              # of this process, not of its workers
            records.seek(0)
            known = records.read()                                           # a killed run's last record may be half a one
            known = np.frombuffer(known, RECORD, len(known) // RECORD.itemsize)["source"][:n]
            same = known == source[:len(known)]
            if not same.all():
                print(f"starting anew: data set, size or files have changed, from {os.fsdecode(paths[same.argmin()])} on")
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (n, 3, size, size)})
            offset = file.tell()
            done = min(len(known), max(0, there - offset) // image_bytes) if same.all() else 0
            records.truncate(done * RECORD.itemsize)
            file.truncate(file.seek(offset + done * image_bytes))
            counts = " + ".join(f"{count:,} {part}" for count, part in zip(index["counts"], index["parts"]))
            print(f"{dataset}: {counts} images of {size}×{size} pixels, {needed / 1e9:,.3f} GB"
                  + (f"; going on after {done:,}" if done else ""), flush=True)
            with tqdm(total=n, initial=done, desc="decode", unit="image") as bar:
                for images, _, _ in batches(task, range(done, n), 128, workers):
                    file.write(images.numpy())
                    file.flush()
                    os.fsync(file.fileno())                                  # on the disk before a record claims it
                    new = list(zip(map(zlib.crc32, images.numpy()), source[done:]))
                    records.write(np.array(new, RECORD).tobytes())
                    done += len(new)
                    bar.update(len(new))
            records.seek(0)
            index["crc32"] = np.frombuffer(records.read(), RECORD)["crc32"]
            bad, words = damaged(temporary, offset, index)
            if bad:
                records.truncate(bad[0] * RECORD.itemsize)
                raise OSError(words)
            with open(f"{out}.index.npz", "wb") as file_of_index:
                np.savez(file_of_index, **index)
                file_of_index.flush()
                os.fsync(file_of_index.fileno())
            os.replace(temporary, out)                                       # last: FILE is there when all of it is
    except BlockingIOError:
        raise ValueError(f"another process is writing {temporary}") from None
    except (ValueError, OSError, RuntimeError) as error:                     # a worker's is a traceback, ending in the error
        problem = str(error).strip().splitlines()[-1]
        sys.exit(f"data.py cache: {problem}; what is done is kept in {temporary} for the same command to go on from")
    marker.unlink()
    print(f"wrote {out} and {out}.index.npz, verified")


def main():
    from cli import Parser, number, writable_folder                          # the stages need none of this
    parser = Parser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("cache", help="decode a data set into a file that trains and evaluates as cache:FILE")
    command.add_argument("--dataset", required=True, help="imagenet or folder:PATH: what it has of train and val")
    command.add_argument("--data-root", metavar="DIR", help="the folder with ImageNet's train/<class>/ and val/<class>/")
    command.add_argument("--out", required=True, metavar="FILE", help="file to write; its index will be FILE.index.npz")
    command.add_argument("--size", type=number(int, 1), default=224, help="the model's resolution (default: %(default)s)")
    command.add_argument("--workers", type=number(int, 0), default=os.cpu_count() or 1,
                         help="processes that decode (default: one per core, %(default)s)")
    command = commands.add_parser("verify", help="compare the images in a cache with their checksums")
    command.add_argument("file", metavar="FILE")
    args = parser.parse_args()
    try:
        if args.command == "cache":
            writable_folder(Path(args.out).parent)
            make_cache(args.dataset, args.out, size=args.size, data_root=args.data_root, workers=args.workers)
        else:
            images, index = open_cache(args.file)
            bad, words = damaged(args.file, images.offset, index)
            if bad:
                raise ValueError(f"{args.file}: {words}")
            print(f"{args.file} is whole: {len(images):,} images of {index['size']}×{index['size']} pixels")
    except (ValueError, OSError) as error:
        found = args.command == "verify" and os.path.isfile(args.file)       # not whole, rather than wrongly called
        command.exit(1 if found else 2, f"data.py {args.command}: {error}\n")


if __name__ == "__main__":
    main()
