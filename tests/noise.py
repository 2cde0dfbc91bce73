"""Images of noise, each another, for tests that only have to tell them apart."""
import os

import numpy as np
from PIL import Image


def draw(path, seed, size=32):
    """A PNG of size×size pixels, of the same length in bytes whatever the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, compress_level=0)


def write_classes(root, names, each):
    """root/<name>/0.png …, `each` of every name: the folder root."""
    for label, name in enumerate(names):
        for i in range(each):
            draw(root / name / f"{i}.png", label * each + i)
    return root


def change_one_pixel(path):
    """And neither the file's length nor its time."""
    before, pixels = path.stat(), np.array(Image.open(path))
    pixels[3, 3] ^= 255
    Image.fromarray(pixels).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
