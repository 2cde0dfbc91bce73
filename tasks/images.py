"""Images of any mode, in folders, in files, in one file or in shards → uint8 [3,H,W], with one-line errors
that name what is damaged. Nothing in a file is executed; none takes more memory than PIL allows an image."""
import contextlib
import errno
import functools
import io
import os
import stat
import tarfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from tasks.splits import split_of, visible

FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"    # not EPS, for which PIL starts Ghostscript
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")    # torchvision's
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262                         # tags of TIFF; of the second 0: 0 is white
MOST_BYTES = 2**30                                              # of a file with one image
# what a network disk says for a moment, and how long to wait each time before asking again, in seconds
TRANSIENT = {getattr(errno, name, None) for name in (
    "EIO ESTALE ETIMEDOUT EAGAIN EBUSY EREMOTEIO ENOLINK ECOMM EPROTO ECONNRESET ECONNABORTED ECONNREFUSED "
    "ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET").split()} - {None}
PAUSES = .5, 1, 2


class Unreadable(ValueError):
    """What is wrong with an image, in one line; also from a worker, where torch makes a traceback of it."""
    def __init__(self, said):
        super().__init__(said.strip().splitlines()[-1].removeprefix(f"{__name__}.Unreadable: "))


def printable(text):
    """Text with line ends and other unprintable characters as escapes: a file's name may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error):
    """What an exception says, in one line and not too long a one."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__


@functools.cache
def say_once(text):
    """Print a line, once, and in process 0 alone; on stdout, stderr is for errors."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def retry_io(read, *words):
    """read(*words), asked again after each of PAUSES if a network disk fails in passing."""
    for pause in (*PAUSES, None):
        try:
            return read(*words)
        except OSError as error:
            if error.errno not in TRANSIENT or pause is None:
                raise
        time.sleep(pause)


def read_file(path, count=None, offset=0):
    """A file, or `count` bytes from `offset` on, as a bytearray. OSError; ValueError: no file, too long."""
    # waits for no pipe's other end; Windows, where there are none, translates line ends if not told
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status, done = os.fstat(file), 0
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        count = status.st_size - offset if count is None else count
        if count > MOST_BYTES:
            raise ValueError(f"{count:,} bytes are too many for an image")
        content = bytearray(count)
        os.lseek(file, offset, os.SEEK_SET)
        while done < count:     # where the disk fails, a map of the file would end in SIGBUS
            read = os.read(file, count - done)
            if not read:
                end = offset + done
                raise ValueError(f"cut short: the file ends at byte {end:,}, not {offset + count:,}")
            content[done:done + len(read)] = read
            done += len(read)
        return content
    finally:
        os.close(file)


def rgb(source):
    """An image of any mode (a file, an open one, or PIL's) → PIL RGB, 8 bits, as torchvision's loader makes
    it: of several frames the first, and what lies under transparency shows. But 16 bits of grey are scaled,
    which PIL clips, and what has no known white (floating point, 32 or 12 bits) is a ValueError. Raises
    whatever PIL's decoders do."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:               # its words name an address in memory
        raise ValueError(f"cannot identify the image's format, none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels are too many") from None
    with image:
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]               # of a TIFF
        if image.mode == "F" or image.mode == "I" and image.format not in ("PPM", "PNG"):
            kind = "floating-point" if image.mode == "F" else "32-bit or signed"
            raise ValueError(f"{kind} pixels, of which nobody knows what is white: save them with 8 bits")
        if image.mode.startswith("I"):           # I;16 and its byte orders; what PIL has scaled to 16 bits: I
            if bits != 16:
                raise ValueError(f"{bits}-bit pixels: save them with 8 or 16 bits")
            grey = np.rint(np.asarray(image) / 257).clip(0, 255)
            negative = image.mode != "I" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
            image = Image.fromarray((255 - grey if negative else grey).astype(np.uint8))
        return image.convert("RGB")


def to_pixels(size, resize=None, interpolation="bilinear"):
    """A function: an image as `rgb` takes it → uint8 [3,size,size], by Resize(resize), None for 256/224·size,
    and CenterCrop(size); resize="squash": both sides to size; "longest": the longer one, and black bars
    beside it (these two are open_clip's resize_mode); "none": by neither, ValueError for another size.
    interpolation: bilinear or bicubic, with antialiasing, as PIL and torchvision do both."""
    resize = round(size * 256 / 224) if resize is None else resize
    if isinstance(resize, int) and resize < size:
        raise ValueError(f"--resize {resize} is less than the {size} pixels that are cropped from it")
    from torchvision.transforms.v2 import functional as F       # here, as that takes over a second

    how = Image.Resampling[interpolation.upper()]

    def pixels(source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of large images, palettes with transparency, odd metadata
            image = rgb(source)
            if resize == "none" and image.size != (size, size):
                raise ValueError(f"{image.width:,}×{image.height:,} pixels, not {size}×{size}")
            if resize == "squash":
                image = F.resize(image, [size, size], how)
            elif resize == "longest":
                sides = [round(side / (max(image.size) / size)) for side in (image.height, image.width)]
                image = F.resize(image, [max(side, 1) for side in sides], how)
                image = F.center_crop(image, [size, size])
            elif resize != "none":
                most = 64 * min(image.size)      # resized, 1×60,000 would be 256×15 million: only its middle
                image = F.center_crop(image, [min(image.height, most), min(image.width, most)])
                image = F.resize(image, resize, how)
                image = F.center_crop(image, [size, size])
            return F.pil_to_tensor(image)
    return pixels


class ImageSet(Dataset):
    """Item i is (uint8 [3,size,size], label, i), or raises Unreadable, which names the image. A kind of it
    has `count`; `where(i)`: an image's name; `file(i)`: its file's name inside the set, or None; and
    `read(i)`: (pixels, label) or any error."""
    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)              # ends a loop over all
        try:
            return *self.read(index), index
        except Exception as error:               # each decoder has its own kind, and few name the file
            said = one_line(getattr(error, "strerror", None) or error)
            raise Unreadable(f"cannot decode {printable(self.where(index))}: {said}") from None


def side(sources):
    """The side in pixels of square images of one size, as the first of `sources` that can be read has it.
    ValueError, in one line: it is no square, or none can be read."""
    for source in sources:
        with contextlib.suppress(Exception), rgb(source()) as image:
            width, height = image.size
            break
    else:
        raise ValueError("no image can be read")
    if width != height:
        raise ValueError(f"--resize none is for square images, the first is of {width:,}×{height:,} pixels")
    return width


class Images(ImageSet):
    """Images of (file, label) pairs, or of a torchvision set kept in one file. size, resize, interpolation:
    of `to_pixels`; with resize="none", size None is that of the first image, which is kept in `size`."""
    def __init__(self, name, samples, size, resize=None, interpolation="bilinear"):
        self.name, self.count = name, len(samples)
        self.samples, self.files, self.labels = samples, None, None
        if isinstance(samples, list):       # arrays: lists' reference counts would copy them to each worker
            self.start = os.path.commonprefix([file for file, _ in samples])
            self.files = np.array([os.fsencode(file[len(self.start):]) for file, _ in samples], np.bytes_)
            self.samples, self.labels = None, np.array([label for _, label in samples], np.int64)
        if size is None:
            size = side(functools.partial(self.source, i) for i in range(self.count))
        self.size, self.to_pixels = size, to_pixels(size, resize, interpolation)

    def path(self, index):
        return self.start + os.fsdecode(self.files[index])

    def where(self, index):
        return f"image {index} of {self.name}" if self.files is None else self.path(index)

    def file(self, index):
        folder = self.start[:self.start.rfind(os.sep) + 1] if self.files is not None else ""
        return self.path(index)[len(folder):] if self.files is not None else None

    def source(self, index):
        """An image as `rgb` takes it."""
        if self.files is None:
            return retry_io(self.samples.__getitem__, index)[0]
        return io.BytesIO(retry_io(read_file, self.path(index)))

    def read(self, index):
        if self.files is None:
            image, label = retry_io(self.samples.__getitem__, index)
        else:
            image, label = self.source(index), self.labels[index]
        return self.to_pixels(image), int(label)


def files_under(folder):
    """The files in a folder, at any depth, but for hidden ones, sorted as torchvision does. OSError."""
    found, seen = [], set()

    def fail(error):
        raise error
    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(where)) in seen:       # in a circle this would go on for 40 levels
            raise OSError(errno.ELOOP, "the same folder twice, by a link", where)
        seen.add(real)
        found.append((where, sorted(name for name in files if not name.startswith("."))))
    return [os.path.join(where, name) for where, names in sorted(found) for name in names]


def is_image(name):
    return name.lower().endswith(EXTENSIONS)


def holds_images(folder):
    """Whether there is an image in a folder, at any depth, by their names."""
    return any(is_image(name) and name[0] != "." for _, _, names in os.walk(folder) for name in names)


class Folder(Images):
    """PATH/<class>/<image>, images as torchvision's ImageFolder finds them, but for hidden ones; how many
    files are left out because of their names is said. ValueError, in one line: no such folder, or another."""
    def __init__(self, path, size, resize=None, interpolation="bilinear"):
        self.root, shown, samples, others = Path(path), printable(path), [], []
        if not self.root.is_dir():
            raise ValueError(f"no such folder: {shown}")
        try:
            with os.scandir(self.root) as entries:
                entries = [*entries]
            self.classes = sorted(entry.name for entry in entries if visible(entry))
            # beside the classes: of no class
            others += [entry.path for entry in entries if entry.is_file() and is_image(entry.name)]
            for label, name in enumerate(self.classes):
                files = files_under(self.root / name)
                images = [(file, label) for file in files if is_image(file)]
                if not images:
                    raise ValueError(f"no images in {name}/")
                start = len(os.path.join(self.root, name, ""))
                inside = {file[start:].partition(os.sep)[0] for file, _ in images if os.sep in file[start:]}
                if any(map(split_of, inside)):
                    raise ValueError(f"{name}/ has {', '.join(sorted(inside)[:5])} in it, names of splits")
                samples += images
                others += [file for file in files if not is_image(file)]
            if not samples:
                raise ValueError("no folders in it")
        except (ValueError, OSError) as error:
            raise ValueError(f"{shown} is not a folder of <class>/<image>: {one_line(error)}") from None
        if others:
            say_once(f"{len(others):,} files under {shown} are left out, they are in no class's folder, or "
                     f"not called like images: {printable(others[0])}{', …' if len(others) > 1 else ''}")
        super().__init__(path, samples, size, resize, interpolation)

    def file(self, index):
        return os.path.relpath(self.path(index), self.root)


LABELS = ("cls", "txt")                  # a sample's label is in the first of these that it has
SHARDS_KINDS = {**dict.fromkeys((*(e[1:] for e in EXTENSIONS), "gif", "img"), "image"),
                **dict.fromkeys(LABELS, "label")}


def samples_of(tar):
    """What an open tar holds: ([(name, image's TarInfo, label's TarInfo or None, what is wrong or ""), …],
    names of the members that are neither images nor labels).

    A key is what stands before the first dot of a file's name, as in webdataset, or before the last one where
    image and label have that in common (a.v2.jpg, a.v2.cls). A key that occurs n times, with n images and n
    labels, is n samples; where the numbers differ nobody knows which belong together."""
    keys, others = {}, []
    for member in tar:
        folder, file = os.path.split(member.name)
        kind = SHARDS_KINDS.get(file.rpartition(".")[2].lower()) if "." in file[1:] else None
        if member.isdir() or file.startswith("."):
            continue
        if not member.isreg() or kind is None:
            others.append(member.name)
            continue
        keys.setdefault((folder, file.rpartition(".")[0]), {"image": [], "label": []})[kind].append(member)
    whole = {key for key, parts in keys.items() if parts["image"] and parts["label"]}
    for folder, key in [key for key in keys if key not in whole]:
        first = folder, key.partition(".")[0]
        if first in keys and first != (folder, key):
            parts = keys.pop((folder, key))
            if first in whole:                              # a.seg.png, beside a.png and a.cls
                others += [member.name for member in parts["image"] + parts["label"]]
            else:                                           # a.rgb.png, a.cls
                for kind, members in parts.items():
                    keys[first][kind] += members
    found = []
    for (_, key), parts in keys.items():
        images, labels = parts["image"], parts["label"]
        first = next((e for e in LABELS if any(m.name.lower().endswith(e) for m in labels)), "")
        labels = [member for member in labels if member.name.lower().endswith(first)]
        if len(images) == len(labels):
            found += [(image.name, image, label, "") for image, label in zip(images, labels)]
        else:
            wrong = f"{key} has {len(images)} images and {len(labels)} labels"
            found += [(member.name, member, None, wrong) for member in images or labels]
    return found, others


class Shards(ImageSet):
    """The samples of tars, an image and its label each: see `samples_of`. A label is a class's number or its
    name among `classes`. Only headers are read here, items later, in any order; workers share nothing. What
    has no label, or more than one, is an item that cannot be read; how many members are neither images nor
    labels, and which keys occur twice, is said. ValueError, in one line, for a damaged tar: a part is no
    accuracy."""
    def __init__(self, tars, size, classes, resize=None, interpolation="bilinear"):
        self.tars, self.containers, self.names, self.wrong, self.left_out = tars, tars, [], {}, None
        names = [*enumerate(classes)]
        self.numbers = {" ".join(name.lower().split()): number for number, name in reversed(names)}
        spans, others, twice = [], [], []   # spans [count, 5]: the tar; image's offset and bytes; label's
        for number, path in enumerate(tars):
            with open(path, "rb") as file:
                if file.read(2) == b"\x1f\x8b":
                    raise ValueError(f"{printable(path)} is compressed: unpack it with gunzip; images are "
                                     "read in any order")
            try:
                with tarfile.open(path, "r:") as tar:
                    found, strange = samples_of(tar)
                    tar.fileobj.seek(tar.offset)     # tarfile ends at any header that it cannot read
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{printable(path)} is damaged or cut short: {one_line(error)}") from None
            others += [f"{name} of {path}" for name in strange]
            count = Counter(name for name, _, _, wrong in found if not wrong)
            twice += [f"{name} of {path}" for name in count if count[name] > 1]
            for name, image, label, wrong in found:
                if wrong:
                    self.wrong[len(spans)] = wrong
                self.names.append(name)
                label = label or image
                spans.append((number, image.offset_data, image.size, label.offset_data, label.size))
        for names, what in ((others, "are left out, they are neither images nor labels"),
                            (twice, "occur more than once, each time as a sample of its own")):
            if names:
                say_once(f"{len(names):,} members of the shards in {printable(Path(tars[0]).parent)} {what}: "
                         f"{printable(names[0])}{', …' * (len(names) > 1)}")
        self.count, self.spans = len(spans), np.array(spans, np.int64).reshape(-1, 5)
        if size is None:
            size = side(functools.partial(self.source, i) for i in range(self.count) if i not in self.wrong)
        self.size, self.to_pixels = size, to_pixels(size, resize, interpolation)

    def without(self, label):
        """The same, but for the images of a class; the classes after it move up by one. Reads all labels."""
        def kept(index):
            try:
                return index in self.wrong or self.label(index) != label
            except (ValueError, OSError):               # an image that will be named when it is its turn
                return True
        some = [index for index in range(self.count) if kept(index)]
        self.wrong = {i: self.wrong[index] for i, index in enumerate(some) if index in self.wrong}
        self.names, self.spans = [self.names[index] for index in some], self.spans[some]
        self.count, self.left_out = len(some), label
        return self

    def where(self, index):
        return f"{self.names[index]} of {self.tars[self.spans[index, 0]]}"

    def file(self, index):
        return f"{Path(self.tars[self.spans[index, 0]]).name}/{self.names[index]}"

    def source(self, index, part=0):
        """The file with an image, or, part=1, with its label."""
        tar, *spans = self.spans[index].tolist()
        return io.BytesIO(retry_io(read_file, self.tars[tar], spans[2 * part + 1], spans[2 * part]))

    def label(self, index):
        """ValueError: it is neither a number nor the name of a class."""
        text = " ".join(self.source(index, 1).read().decode("utf-8", "replace").split())
        number = text.lstrip("-").isdecimal()
        label = int(text) if number else self.numbers.get(text.lower())
        if number and self.numbers.get(text, label) != label:
            raise ValueError(f"its label {text} is a class's number and another class's name")
        if label is None:
            raise ValueError(f"its label {printable(text[:60])!r} is neither a number nor one of the classes")
        return label - (self.left_out is not None and label > self.left_out)

    def read(self, index):
        if index in self.wrong:
            raise ValueError(self.wrong[index])
        return self.to_pixels(self.source(index)), self.label(index)
