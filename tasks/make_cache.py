"""Decode every image of a data set once, into a file to use as cache:FILE (`python data.py cache`)."""
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from tasks.cache import FORMAT, RECORD, damaged, how_made, open_cache
from tasks.images import Folder
from tasks.loading import batches
from tasks.locks import lock_file
from tasks.protocols import DEFAULT, PROTOCOLS, resized
from tasks.splits import TAKEN
from tasks.task import image_root, load_task, split_folder

BATCH = 128             # images that are decoded, written and recorded at a time


def splits_of(dataset, data_root, how):
    """The Tasks of a folder: of its train split, if it has one, and of that which is evaluated on. how: of
    `load_task`. ValueError: it has neither."""
    tasks, problem = [], None
    for split in TAKEN:
        try:
            split_folder(dataset, split, data_root)
        except ValueError as error:
            problem = error
            continue
        tasks.append(load_task(dataset, split, data_root=data_root, **how))
    if not tasks:
        raise problem
    return tasks


def sources(dataset, data_root, size, how):
    """(a Task of the images of its splits, train first; {name: array} for the index). how: the resize,
    interpolation and protocol of `load_task`."""
    if dataset != "imagenet" and not dataset.startswith("folder:"):
        raise ValueError(f"imagenet and folder:PATH can be cached, not {dataset}")
    root = image_root(dataset, data_root)
    tasks = splits_of(dataset, data_root, {"size": size, **how})
    resize = resized(how["protocol"], dataset, size, how["resize"])
    interpolation = how["interpolation"] or PROTOCOLS[how["protocol"]].interpolation
    if not all(isinstance(task.images, Folder) for task in tasks):
        raise ValueError(f"{dataset} is there as shards: only folders can be cached")
    size, *others = (task.images.size for task in tasks)
    if {*others} > {size}:
        raise ValueError(f"{dataset} has images of {size} pixels in one split, of {others[0]} in the other")
    labels, made_of = np.concatenate([task.images.labels for task in tasks]), str(root.resolve())
    paths = [os.path.relpath(task.images.path(i), root) for task in tasks for i in range(len(task.images))]
    # a cache by an earlier version, which resized bicubically, goes on and is known again
    made = (f"{made_of} {size}" + f" {resize}" * (resize != round(size * 256 / 224))
            + f" {interpolation}" * (interpolation != "bicubic" and resize != "none"))
    source = [zlib.crc32(os.fsencode(f"{made} {name} {label} {stat.st_size} {stat.st_mtime_ns}"))
              for name, label in zip(paths, labels) for stat in [os.stat(root / name)]]
    index = {"format": FORMAT, "made_of": made_of, "made_with": f"Pillow {PIL.__version__}", "size": size,
             "resize": str(resize), "interpolation": interpolation, "template": tasks[0].template,
             "parts": [task.split for task in tasks], "counts": [len(task.images) for task in tasks],
             **{f"{task.split}_class_names": task.class_names for task in tasks},
             **{f"{task.split}_classes": task.images.classes for task in tasks},
             "labels": labels, "paths": [os.fsencode(path) for path in paths],
             "source": np.array(source, RECORD["source"])}
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
               protocol=DEFAULT):
    """Decode every image of a data set into the file `out`, and verify it; after an interruption, the rest.
    size, resize, interpolation, protocol: of `load_task`; resize="none": the images' own size. ValueError or
    OSError if it cannot start; after that SystemExit, in one line, and what is done is kept."""
    how = {"resize": resize, "interpolation": interpolation, "protocol": protocol}
    task, index = sources(dataset, data_root, size, how)
    size = int(index["size"])
    temporary, marker, n = Path(f"{out}.tmp"), Path(f"{out}.tmp.done"), len(index["source"])
    if os.path.exists(out):
        made = open_cache(out)[1]
        if not np.array_equal(made["source"], index["source"]):
            raise ValueError(f"{out} is made of other images: {made['made_of']}, {made['size']} pixels, "
                             f"--resize {' --interpolation '.join(how_made(made))}")
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
