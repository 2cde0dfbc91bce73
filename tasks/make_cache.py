"""Decode every image of a data set once, into a file to use as cache:FILE (`python data.py cache`)."""
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
from torch.utils.data import ConcatDataset, TensorDataset
from tqdm import tqdm

from tasks.benchmarks import BENCHMARKS, TEMPLATE, UNSPLIT, set_of
from tasks.cache import FORMAT, RECORD, damaged, how_made, open_cache
from tasks.images import Shards
from tasks.loading import batches
from tasks.locks import lock_file
from tasks.protocols import DEFAULT, PROTOCOLS, resized
from tasks.splits import TAKEN, NoSplit
from tasks.task import image_root, load_task

BATCH = 128             # images that are decoded, written and recorded at a time


def splits_of(dataset, data_root, how):
    """The Tasks of a data set: of its train split, if it has one, and of that which is evaluated on; one of
    all images, if it is not split. What half a download lacks is said. how: of `load_task`. ValueError: it
    has neither."""
    tasks, problems = {}, []
    for split in reversed(TAKEN):
        if split == "train" and "val" in tasks and tasks["val"].split == "all":
            continue                                    # among those already
        try:
            tasks[split] = load_task(dataset, split, data_root=data_root, **how)
        except ValueError as error:
            problems.append(error)
            if not isinstance(error, NoSplit) and not (dataset in BENCHMARKS and dataset != "imagenet"):
                raise
    if not tasks:
        raise problems[0]
    for error in problems:
        if not isinstance(error, NoSplit):
            print(f"left out: {error}", flush=True)
    return [tasks[split] for split in TAKEN if split in tasks]


def facts_of(images, root):
    """(labels int64 [n], what names each image, [bytes], what tells that it is another now, [text]) of a data
    set. A label that cannot be read is −1: to decode the image says why."""
    if isinstance(images, TensorDataset):
        pixels, labels, _ = images.tensors
        names = [f"image {number}".encode() for number in range(len(labels))]
        return labels.numpy(), names, [zlib.crc32(x) for x in pixels.numpy()]
    numbers = range(len(images))
    if getattr(images, "files", None) is not None:
        paths = [images.path(number) for number in numbers]
        stats = [os.stat(path) for path in paths]
        return (images.labels, [os.fsencode(os.path.relpath(path, root)) for path in paths],
                [f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats])
    stats = [os.stat(path) for path in images.containers]
    files = " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)
    if isinstance(images, Shards):
        def label(number):
            try:
                return images.label(number)
            except (ValueError, OSError):
                return -1
        return (np.array([label(n) for n in numbers], np.int64), [os.fsencode(name) for name in images.names],
                [f"{files} {span}" for span in images.spans.tolist()])
    return images.labels, [f"image {number}".encode() for number in numbers], [files] * len(images)


def sources(dataset, data_root, size, how, words):
    """(a Task of the images of its splits, train first; {name: array} for the index). how: the resize,
    interpolation and protocol of `load_task`."""
    if dataset not in BENCHMARKS and not dataset.startswith(("folder:", "wds:")):
        raise ValueError("sets by their names (docs/data.md), folder:PATH and wds:PATH can be cached, "
                         f"not {dataset}")
    tasks = splits_of(dataset, data_root, {"size": size, "words": words, "templates": "paper", **how})
    published, known = dataset in BENCHMARKS and dataset != "imagenet", set_of(dataset)
    root = Path(data_root) if published else image_root(dataset.replace("wds:", "folder:", 1), data_root)
    rules = PROTOCOLS[how["protocol"]]
    resize = resized(how["protocol"], known or dataset, size, how["resize"])
    interpolation = how["interpolation"] or rules.interpolation
    size, *others = (task.images.tensors[0].shape[-1] if isinstance(task.images, TensorDataset) else
                     task.images.size for task in tasks)
    if {*others} > {size}:
        raise ValueError(f"{dataset} has images of {size} pixels in one split, of {others[0]} in the other")
    labels, paths, states = (sum(map(list, part), []) for part in zip(
        *(facts_of(task.images, root) for task in tasks)))
    made_of = str(root.resolve()) + f" ({dataset})" * published
    # a cache by an earlier version, which resized bicubically, goes on and is known again
    made = (f"{made_of} {size}" + f" {resize}" * (resize != round(size * 256 / 224))
            + f" {interpolation}" * (interpolation != "bicubic" and resize != "none"))
    source = [zlib.crc32(os.fsencode(f"{made} {os.fsdecode(path)} {label} {state}"))
              for path, label, state in zip(paths, labels, states)]
    known, told = known if known in BENCHMARKS else "", [*zip(*dict(words).values())]
    # a protocol's own usual prompt is put in when the cache is opened
    renamed, retold = (any(found) for found in told) if told else (False, False)
    template = TEMPLATE if tasks[0].template == rules.photo and not retold else tasks[0].template
    index = {"format": FORMAT, "made_of": made_of, "made_with": f"Pillow {PIL.__version__}", "size": size,
             "resize": str(resize), "interpolation": interpolation, "template": template, "set": known,
             "renamed": renamed, "retold": retold,
             "unsplit": bool(known) and BENCHMARKS[known].train == UNSPLIT,
             "parts": [task.split for task in tasks], "counts": [len(task.images) for task in tasks],
             **{f"{task.split}_class_names": task.class_names for task in tasks},
             **{f"{task.split}_{word}": getattr(task.images, word) for task in tasks
                for word in ("classes", "own_names") if hasattr(task.images, word)},
             "labels": labels, "paths": paths, "source": np.array(source, RECORD["source"])}
    everything = tasks[0]._replace(images=ConcatDataset([task.images for task in tasks]),
                                   class_names=max((task.class_names for task in tasks), key=len))
    return everything, {name: np.array(value) for name, value in index.items()}


def decode(task, index, file, records, workers):
    """Decode the images into the file, with a record of each once it is on the disk; those that a call before
    did are kept, if the data set is the same. → where they start in the file, in bytes. ValueError."""
    source, size, there = index["source"], int(index["size"]), os.fstat(file.fileno()).st_size
    shape, image_bytes = (len(source), 3, size, size), 3 * size * size
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    records.seek(0)
    offset, known = file.tell(), records.read()         # a killed run's last record may be half a one
    known = np.frombuffer(known, RECORD, len(known) // RECORD.itemsize)["source"][:len(source)]
    same = known == source[:len(known)]
    done = min(len(known), max(0, there - offset) // image_bytes) if same.all() else 0
    if not same.all():
        first = os.fsdecode(index["paths"][same.argmin()])
        print(f"starting anew: data set, size or files have changed, from {first} on", flush=True)
    elif done:
        print(f"going on after {done:,}", flush=True)
    records.truncate(done * RECORD.itemsize)
    file.truncate(file.seek(offset + done * image_bytes))
    with tqdm(total=len(source), initial=done, desc="decode", unit="image") as bar:
        for batch in batches(task, range(done, len(source)), BATCH, workers, bad="leave out"):
            if batch.errors:
                raise ValueError(batch.errors[0][1])
            images = batch.x.numpy()
            file.write(images)
            file.flush()
            os.fsync(file.fileno())
            new = list(zip(map(zlib.crc32, images), source[done:]))
            records.write(np.array(new, RECORD).tobytes())
            done += len(new)
            bar.update(len(new))
    return offset


def make_cache(dataset, out, *, size=224, data_root=None, workers=0, resize=None, interpolation=None,
               protocol=DEFAULT, words=()):
    """Decode every image of a data set into the file `out`, and verify it; after an interruption, the rest.
    size, resize, interpolation, protocol: of `load_task`; resize="none": the images' own size; words: of
    `own_words`. ValueError or OSError if it cannot start; after that SystemExit, in one line, and what is
    done is kept."""
    how = {"resize": resize, "interpolation": interpolation, "protocol": protocol}
    task, index = sources(dataset, data_root, size, how, words)
    size = int(index["size"])
    temporary, marker, n = Path(f"{out}.tmp"), Path(f"{out}.tmp.done"), len(index["source"])
    if os.path.exists(out):
        made = open_cache(out)[1]
        if not np.array_equal(made["source"], index["source"]):
            raise ValueError(f"{out} is made of other images: {made['made_of']}, {made['size']} pixels, "
                             f"--resize {' --interpolation '.join(how_made(made))}")
        other = [word for word in index if (word == "template" or word.endswith("class_names"))
                 and not np.array_equal(made[word], index[word])]
        if other:
            raise ValueError(f"{out} is made of these images with another {other[0].replace('_', ' ')}")
        marker.unlink(missing_ok=True)
        print(f"{out} is there already, made of these {n:,} images")
        return
    there = temporary.stat().st_size if temporary.exists() else 0
    needed = n * 3 * size * size + sum(array.nbytes for array in index.values())
    more, free = needed - there, shutil.disk_usage(Path(out).parent).free
    if more > free:
        raise ValueError(f"{out} needs {more / 1e9:,.3f} GB more, the disk has {free / 1e9:,.3f} GB free")
    temporary.touch()
    try:
        with open(marker, "a+b", buffering=0) as records, open(temporary, "r+b") as file:
            lock_file(records)
            counts = " + ".join(f"{count:,} {split}" for count, split in zip(index["counts"], index["parts"]))
            counts = counts.replace("all", "unsplit")
            print(f"{dataset}: {counts} images of {size}×{size} pixels, {needed / 1e9:,.3f} GB", flush=True)
            offset = decode(task, index, file, records, workers)
            records.seek(0)
            index["crc32"] = np.frombuffer(records.read(), RECORD)["crc32"]
            bad, words = damaged(temporary, offset, index)
            if bad:
                records.truncate(bad[0] * RECORD.itemsize)
                raise OSError(words)
            with open(f"{out}.index.npz", "wb") as index_file:
                np.savez(index_file, **index)
                index_file.flush()
                os.fsync(index_file.fileno())
            file.close()                        # Windows renames no open file
            os.replace(temporary, out)          # last: FILE is there when all of it is
    except BlockingIOError:
        raise ValueError(f"another process is writing {temporary}") from None
    except (ValueError, OSError, RuntimeError) as error:
        problem = str(error).strip().splitlines()[-1]       # torch's has several, of a worker that was killed
        sys.exit(f"data.py cache: {problem}; the same command goes on from what is in {temporary}")
    marker.unlink()
    print(f"wrote {out} and {out}.index.npz, verified")
