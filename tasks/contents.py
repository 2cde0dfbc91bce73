"""Whether a task's images are those of before, wherever they lie and whatever their times: contents decide.

A set to adapt on is known by its `fingerprint`: names, labels, sizes, and the pixels of a sample. Of a set
that is evaluated the checksum of each image is kept, and `about` says the rest of it; `stamp` tells cheaply
that no file can have changed."""
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch.utils.data import TensorDataset
from tqdm import tqdm

from tasks.images import printable
from tasks.loading import batches
from tasks.task import data_set, image_numbers
from toy import world

SAMPLE = 64             # images whose pixels are in a fingerprint, evenly spread
ASKED = 200_000         # files at most that are asked for size and time; on a network disk more take minutes


def digest(*values):
    """16 hex digits of bytes, arrays or whatever JSON has."""
    found = hashlib.sha256()
    for value in values:
        found.update(value if isinstance(value, bytes | np.ndarray) else json.dumps(value).encode())
    return found.hexdigest()[:16]


def about(task):
    """{what, in words: a text} that a task is besides its images: how many, which of them, and the words."""
    numbers = np.asarray(image_numbers(task), np.int64)
    return {"number of images": f"{len(numbers):,} of {len(data_set(task)):,}",
            "choice of images": digest(numbers), "class names": digest(task.class_names),
            "template": digest(task.template)}


def known_labels(task):
    """The labels of a task's images, int64 [n], as far as they need no reading; or None."""
    images = data_set(task)
    labels = images.tensors[1] if isinstance(images, TensorDataset) else getattr(images, "labels", None)
    return None if labels is None else np.asarray(labels, np.int64)[list(image_numbers(task))]


def files_of(task):
    """The paths of the files that hold a task's images; []: they are in memory, or nobody knows."""
    images = data_set(task)
    if getattr(images, "files", None) is not None:
        return [images.path(number) for number in image_numbers(task)]
    return [str(path) for path in getattr(images, "containers", ())]


def stats_of(paths):
    """os.stat of each, None for one that is not there; several at a time, for network disks."""
    def stat(path):
        try:
            return os.stat(path)
        except OSError:
            return None
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(stat, paths, chunksize=64))


def stamp(task):
    """A text that is the same as long as the files have the same paths, sizes, times and inodes, of which the
    time of the last change cannot be set back; "": there are no files, or too many to ask."""
    paths = files_of(task)
    if not 0 < len(paths) <= ASKED:
        return ""
    return digest(*([path, *(s and (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) or ())]
                    for path, s in zip(map(os.path.abspath, paths), stats_of(paths))))


def names_of(task):
    """The names of a task's images but for where they lie, as bytes; None: they have none."""
    images = data_set(task)
    names = next((getattr(images, name) for name in ("files", "paths", "names")
                  if getattr(images, name, None) is not None), None)
    if names is None:
        return None
    names = names.tolist() if isinstance(names, np.ndarray) else [os.fsencode(name) for name in names]
    start = len(os.path.commonprefix(names))            # the folder of a split, in a cache
    return b"\0".join(names[number][start:] for number in image_numbers(task))


def checksums(task, positions, workers=0):
    """Yields (number, crc32 of the pixels as uint8 [3,H,W], label) of the images at these positions; crc32
    and label are None for one that cannot be read."""
    with tqdm(total=len(positions), desc=f"compare {task.name}", unit="image", leave=False, delay=2) as bar:
        for batch in batches(task, positions, 64, workers, bad="leave out"):
            for number, x, label in zip(batch.index.tolist(), batch.x.numpy(), batch.y.tolist()):
                yield number, zlib.crc32(x), label
            yield from ((number, None, None) for number, _ in batch.errors)
            bar.update(len(batch.y) + len(batch.errors))


def fingerprint(task):
    """What identifies a task's images, class names and template, wherever they lie: {what, in words: a text,
    or None if that would need all of them to be read}; of a folder the same as of its cache.

    pixels: {number: crc32, or None if it cannot be read} of SAMPLE images, at positions i·n // SAMPLE;
    all pixels: of a set in memory; drawn: a task of the toy world, which the sources say."""
    images, numbers = data_set(task), image_numbers(task)
    n, labels, names, sizes = len(numbers), known_labels(task), names_of(task), None
    if getattr(images, "files", None) is not None and n <= ASKED:
        sizes = digest([s and s.st_size for s in stats_of(files_of(task))])
    some = [i * n // SAMPLE for i in range(SAMPLE)] if n > SAMPLE else range(n)
    found = list(checksums(task, list(some)))
    labels = labels if labels is not None else [label for *_, label in found]
    known = about(task) | {"file names": names and digest(names), "file sizes": sizes,
                           "labels": digest(labels),
                           "pixels": {str(number): crc32 for number, crc32, _ in found}}
    if isinstance(images, TensorDataset):
        known["all pixels"] = zlib.crc32(np.ascontiguousarray(images.tensors[0].numpy()[list(numbers)]))
    return known | {"drawn": task.name in world.TASKS}


def where(task, numbers):
    """The names of images by their numbers, the first five: "a/1.png, a/7.png, …"."""
    images = data_set(task)
    names = [images.where(number) if hasattr(images, "where") else f"image {number}"
             for number in numbers[:5]]
    return ", ".join([*map(printable, names), *["…"] * (len(numbers) > 5)])


def differing(task, before, now):
    """In words, in a list, in what two fingerprints, or two of `about`, differ. task: that of `now`."""
    words = [word for word in before if None not in (before[word], now.get(word))
             and before[word] != now[word] and word not in ("pixels", "drawn")]
    if "number of images" in words:
        words = [word for word in words if word in ("number of images", "class names", "template")]
    found = [f"{word} {now[word]} (before: {before[word]})" if word == "number of images" else f"other {word}"
             for word in words]
    pixels, others = before.get("pixels"), now.get("pixels")
    if pixels is not None and others is not None and not {*words} & {"number of images", "file names"}:
        changed = [int(number) for number in pixels if pixels[number] != others.get(number)]
        if changed:
            found.append(f"other pixels in {len(changed)} of the {len(pixels)} images compared: "
                         f"{where(task, changed)}")
    return found


def other_labels(task, records):
    """In words, in a list, which images {number: record} have another label now, if that needs no reading."""
    labels, numbers = known_labels(task), list(image_numbers(task))
    changed = [number for number, label in zip(numbers, [] if labels is None else labels.tolist())
               if number in records and records[number]["label"] != label]
    return [f"{len(changed)} images have other labels: {where(task, changed)}"] if changed else []


def other_contents(task, records, whole, workers=0):
    """In words, in a list, which images {number: record with crc32 and label} have other pixels, or another
    label, or cannot be read now. whole: those without a record could not be read, and shall not be now."""
    places = [p for p, number in enumerate(image_numbers(task)) if whole or number in records]
    changed, nothing = [], {"crc32": None, "label": None}
    for number, crc32, label in checksums(task, places, workers):
        record = records.get(number, nothing)
        if (record.get("crc32"), record["label"]) != (crc32, label):
            changed.append(number)
    if not changed:
        return []
    return [f"{len(changed)} of {len(places)} have other contents: {where(task, sorted(changed))}"]
