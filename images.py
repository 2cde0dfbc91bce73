"""Images of any mode, in files, in one file or in shards → uint8 [3,H,W], with one-line errors that name what is damaged."""
import io
import os
import tarfile

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2


def one_line(error):
    """What an exception says, in one line and not too long a one."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def rgb(source):
    """An image of any mode → PIL RGB, 8 bits. source: a file, an open one, or a PIL image.

    16 bits of grey are scaled to 8 (PIL's own conversion clips them); what lies under transparency shows.
    """
    with source if isinstance(source, Image.Image) else Image.open(source) as image:
        if image.mode.startswith("I"):               # I;16 and its byte orders, or I
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode.startswith("P"):               # straight to RGB, PIL warns of each palette with transparency
            image = image.convert("RGBA")
        return image.convert("RGB")


def to_pixels(size):
    """The transform of a PIL image to uint8 [3,H,W]: Resize(256/224·size) and CenterCrop(size), or nothing for size None."""
    resize = [v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)] if size else []
    return v2.Compose([*resize, v2.PILToTensor()])


class Images(Dataset):
    """Images of (file, label) pairs, or of a torchvision set kept in one file: item i is (uint8 [3,H,W], label, i).

    An item raises ValueError, in one line that names the file (or the set and i), where the image cannot be decoded.
    """

    def __init__(self, name, samples, size):
        self.name, self.samples, self.count, self.to_pixels = name, samples, len(samples), to_pixels(size)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)                  # ends a loop over all
        where = f"image {index} of {self.name}"
        try:
            source, label = self.samples[index]
            where = where if isinstance(source, Image.Image) else source
            return self.to_pixels(rgb(source)), int(label), index
        except Exception as error:                   # each decoder has its own kind, and few of them name the file
            raise ValueError(f"cannot decode {where}: {one_line(error)}") from None


class Shards(Dataset):
    """The samples KEY.cls + KEY.{webp,png,jpg,jpeg,img} of tars: item i is (uint8 [3,H,W], label, i), errors as in Images.

    Only the headers are read here; after that every item is read where it lies, so workers share nothing and access is
    random. ValueError, in one line, for a tar that is damaged or cut short: a part of a data set is not its accuracy.
    """

    def __init__(self, tars, classes, size):
        self.tars, self.classes, self.to_pixels = tars, classes, to_pixels(size)
        self.names, where = [], []                   # where: the tar, the image's offset and bytes, the label's
        for number, path in enumerate(tars):
            parts = {}                               # KEY → its image and its label
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        folder, file = os.path.split(member.name)
                        key, _, kind = file.partition(".")
                        kind = "image" if kind.lower() in ("webp", "png", "jpg", "jpeg", "img") else kind
                        if member.isfile() and key and kind in ("image", "cls"):
                            parts.setdefault((folder, key), {})[kind] = member
                    tar.fileobj.seek(tar.offset)     # tarfile takes any header it cannot read for the archive's end
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{path} is damaged or cut short: {one_line(error)}") from None
            for (_, key), sample in parts.items():
                if len(sample) < 2:
                    raise ValueError(f"{path}: {key} is not an image with its label in {key}.cls")
                image, label = sample["image"], sample["cls"]
                self.names.append(image.name)
                where.append((number, image.offset_data, image.size, label.offset_data, label.size))
        self.where = np.array(where, np.int64).reshape(-1, 5)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path, image_at, image_bytes, label_at, label_bytes = self.tars[self.where[index, 0]], *self.where[index, 1:].tolist()
        try:
            with open(path, "rb", buffering=0) as file:
                image = os.pread(file.fileno(), image_bytes, image_at)
                label = int(os.pread(file.fileno(), label_bytes, label_at))
            if not 0 <= label < self.classes:
                raise ValueError(f"label {label} of {self.classes} classes")
            return self.to_pixels(rgb(io.BytesIO(image))), label, index
        except Exception as error:
            raise ValueError(f"cannot decode {self.names[index]} of {path}: {one_line(error)}") from None
