"""Caches of decoded images, which `python data.py cache` makes: their files, opened, read and verified.

FILE is a plain .npy of uint8 [N,3,S,S]; FILE.index.npz says what its images are, with a crc32 of each. While
it is made, FILE.tmp holds the images, FILE.tmp.done a record of each: its crc32, its file's fingerprint."""
import os
import zlib

import numpy as np
import torch
from tqdm import tqdm

from tasks.images import ImageSet, one_line, printable, read_file, retry_io
from tasks.splits import taken

FORMAT = "TeCoA image cache 1"
RECORD = np.dtype([("crc32", "<u4"), ("source", "<u4")])


def open_cache(path):
    """(uint8 [N,3,S,S], mapped, not read; {name: array} of the index). ValueError, in one line: not whole."""
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path}")
    try:
        with np.load(f"{path}.index.npz") as arrays:                    # which unpickles nothing
            index = dict(arrays)
        if index.get("format") != FORMAT:
            raise ValueError("its index is of another format")
        images, length = np.load(path, mmap_mode="r"), os.path.getsize(path)    # ValueError: too short
        shape = len(index["labels"]), 3, int(index["size"]), int(index["size"])
        if (images.dtype, images.shape, images.offset + images.nbytes) != (np.uint8, shape, length):
            raise ValueError(f"its {length:,} bytes are not the uint8 {list(shape)} of its index")
        if not len(images) == index["counts"].sum() == len(index["crc32"]) == len(index["paths"]):
            raise ValueError("its index has parts of different lengths")
        for split, labels in zip(index["parts"], np.split(index["labels"], index["counts"].cumsum()[:-1])):
            classes = len(index[f"{split}_class_names"])
            if not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"its index has {split} labels outside its {classes} classes")
    except Exception as error:          # NumPy and zip have a kind of their own for each damage
        raise ValueError(f"{path} is not a whole cache: {one_line(error)}") from None
    return images, index


def set_in(path):
    """The name of the published set that a cache is of; "": of none, or there is no cache."""
    try:
        with np.load(f"{path}.index.npz") as arrays:    # of which this reads one
            return str(arrays["set"]) if "set" in arrays else ""
    except Exception:                                   # to open it says what is wrong
        return ""


def damaged(path, offset, index):
    """The images in the file that do not have the crc32 of the index: (their numbers, a line about them)."""
    with open(path, "rb") as file, tqdm(index["crc32"].tolist(), desc="verify", unit="image") as bar:
        if hasattr(os, "posix_fadvise"):       # read the disk, not memory's copy
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(offset)
        count = 3 * int(index["size"]) ** 2
        bad = [i for i, crc32 in enumerate(bar) if zlib.crc32(file.read(count)) != crc32]
    first = [printable(os.fsdecode(path)) for path in index["paths"][bad[:5]]] + ["…"] * (len(bad) > 5)
    return bad, f"{len(bad):,} of {len(index['labels']):,} images are damaged: {', '.join(first)}"


def how_made(index):
    """How the images of a cache were resized: (--resize, --interpolation), as texts. An index without these
    is of an earlier version, which resized to 256/224 of the size and bicubically, if not told otherwise."""
    resize = str(index.get("resize", "")) or str(round(int(index["size"]) * 256 / 224))
    return resize, str(index.get("interpolation", "bicubic"))


def check_made(path, index, size, resize, interpolation):
    """ValueError, in one line, if a cache was made for another size, or resized otherwise."""
    made, wanted = how_made(index), (str(resize), interpolation)
    if index["size"] != size and "none" not in (made[0], wanted[0]):
        raise ValueError(f"{path} is of {index['size']} pixels, not {size}: make one with --size {size}")
    if made != wanted and not made[0] == wanted[0] == "none":
        made, wanted = (f"--resize {r}" + f" --interpolation {i}" * (r != "none") for r, i in (made, wanted))
        raise ValueError(f"{path} was made with {made}, and is asked for with {wanted}: make one so with "
                         f"data.py cache, or give {made}")


class Cache(ImageSet):
    """One split of a file by `python data.py cache`; an item is compared with its checksum. resize,
    interpolation: of `to_pixels`. set: the published set that it is of, or ""; renamed, retold: whether its
    class names and its template are a user's. ValueError, in one line: not a whole cache, made for another
    size or resized otherwise, or without that split."""
    def __init__(self, path, split, size, resize, interpolation):
        images, index = open_cache(path)
        check_made(path, index, size, resize, interpolation)
        splits, counts = index["parts"].tolist(), index["counts"]
        # of a set that comes without splits, all is there, and what is adapted on is part of it
        unsplit = splits == ["all"] and bool(index.get("unsplit"))
        size, split = int(index["size"]), "all" if unsplit else taken(splits, split, path)
        start, self.count = int(counts[:splits.index(split)].sum()), int(counts[splits.index(split)])
        self.path, self.split, self.size, self.offset = path, split, size, images.offset + start * 3 * size**2
        self.labels, self.paths, self.crc32 = (
            index[name][start:start + self.count] for name in ("labels", "paths", "crc32"))
        self.containers = path, f"{path}.index.npz"
        self.class_names, self.template = index[f"{split}_class_names"].tolist(), index["template"].tolist()
        self.set = str(index.get("set", ""))
        self.renamed, self.retold = bool(index.get("renamed")), bool(index.get("retold"))
        if f"{split}_own_names" in index:       # of a published set
            self.own_names = index[f"{split}_own_names"].tolist()
        if f"{split}_classes" in index:         # what their folders are called
            self.classes = index[f"{split}_classes"].tolist()

    def where(self, index):
        return f"{self.file(index)} in {self.path}"

    def file(self, index):
        return os.fsdecode(self.paths[index])

    def read(self, index):
        label, count = int(self.labels[index]), 3 * self.size ** 2
        pixels = retry_io(read_file, self.path, count, self.offset + index * count)
        if zlib.crc32(pixels) != self.crc32[index]:
            raise ValueError("damaged, its checksum is another")
        return torch.frombuffer(pixels, dtype=torch.uint8).view(3, self.size, self.size), label
