"""Caches of decoded images, which `python data.py cache` makes: their files, opened, read and verified.

FILE is a plain .npy of uint8 [N,3,S,S]; FILE.index.npz says what its images are, with a crc32 of each. While it is made,
FILE.tmp holds the images, and FILE.tmp.done one record per image: its crc32 and a fingerprint of the file it came from.
"""
import os
import zlib

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from images import one_line, patiently, printable, read_file, unreadable

FORMAT = "TeCoA image cache 1"
RECORD = np.dtype([("crc32", "<u4"), ("source", "<u4")])


def open_cache(path):
    """(uint8 [N,3,S,S], mapped, not read; {name: array} of the index). ValueError, in one line: not a whole cache."""
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path}")
    try:
        with np.load(f"{path}.index.npz") as arrays:                         # which unpickles nothing
            index = dict(arrays)
        if index.get("format") != FORMAT:
            raise ValueError("its index is of another format")
        images, length = np.load(path, mmap_mode="r"), os.path.getsize(path)  # says so if it is too short
        shape = len(index["labels"]), 3, int(index["size"]), int(index["size"])
        if (images.dtype, images.shape, images.offset + images.nbytes) != (np.uint8, shape, length):
            raise ValueError(f"its {length:,} bytes are not the uint8 {list(shape)} of its index")
        if not len(images) == index["counts"].sum() == len(index["crc32"]) == len(index["paths"]):
            raise ValueError("its index has parts of different lengths")
        for part, labels in zip(index["parts"], np.split(index["labels"], index["counts"].cumsum()[:-1])):
            classes = len(index[f"{part}_class_names"])
            if not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"its index has {part} labels outside its {classes} classes")
    except Exception as error:                       # NumPy and zip have a kind of their own for each damage
        raise ValueError(f"{path} is not a whole cache: {one_line(error)}") from None
    return images, index


def damaged(path, offset, index):
    """Which images in the file do not have the crc32 of the index: (their numbers, how many and where in words)."""
    with open(path, "rb") as file, tqdm(index["crc32"].tolist(), desc="verify", unit="image") as bar:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)        # read the disk, not what memory has of it
        file.seek(offset)
        bad = [i for i, crc32 in enumerate(bar) if zlib.crc32(file.read(3 * int(index["size"]) ** 2)) != crc32]
    first = ", ".join(printable(os.fsdecode(path)) for path in index["paths"][bad[:5]])
    return bad, f"{len(bad):,} of {len(index['labels']):,} images are damaged: {first}{', …' if len(bad) > 5 else ''}"


class Cache(Dataset):
    """One part of a file by `python data.py cache`, with Folder's items: (uint8 [3, size, size], label, index).

    ValueError, in one line: not a whole cache, made for another size, or without that part. An item raises Unreadable, which
    names the image and the file, where its bytes cannot be read or do not have their checksum.
    """

    def __init__(self, path, part, size):
        images, index = open_cache(path)
        parts, counts = index["parts"].tolist(), index["counts"]
        if index["size"] != size:
            raise ValueError(f"{path} is of {index['size']} pixels, the model takes {size}: make one with --size {size}")
        if part not in parts:
            raise ValueError(f"{path} has no {part} images, only {' and '.join(parts)}")
        start = counts[:parts.index(part)].sum()
        mine = slice(start, start + counts[parts.index(part)])
        self.file, self.size, self.offset = path, size, images.offset + int(start) * 3 * size * size
        self.labels, self.paths, self.crc32 = (index[name][mine] for name in ("labels", "paths", "crc32"))
        self.class_names, self.template = index[f"{part}_class_names"].tolist(), str(index["template"])

    def __len__(self):
        return len(self.labels)

    def where(self, index):
        return f"{os.fsdecode(self.paths[index])} in {self.file}"

    def __getitem__(self, index):
        label, count = int(self.labels[index]), 3 * self.size ** 2
        try:
            pixels = patiently(read_file, self.file, count, self.offset + index * count)     # a map of it may end in SIGBUS
            if zlib.crc32(pixels) != self.crc32[index]:
                raise ValueError("damaged, its checksum is another")
        except (ValueError, OSError) as error:
            raise unreadable(self.where(index), error) from None
        return torch.frombuffer(pixels, dtype=torch.uint8).view(3, self.size, self.size), label, index
