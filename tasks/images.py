"""Images of any mode, in folders, in files, in one file or in shards → uint8 [3,H,W], with one-line errors
that name what is damaged. Nothing in a file is executed; none takes more memory than PIL allows an image."""
import errno
import functools
import io
import os
import stat
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"    # not EPS, for which PIL starts Ghostscript
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")    # torchvision's
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
    """An image of any mode (a file, an open one, or PIL's) → PIL RGB, 8 bits. 16 bits of grey are scaled (PIL
    clips them); what lies under transparency shows. Raises whatever PIL's decoders do, or ValueError."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except UnidentifiedImageError:               # its words name an address in memory
        raise ValueError(f"cannot identify the image's format, none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels are too many") from None
    with image:
        if image.mode.startswith("I"):           # I;16 and its byte orders, or I
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def to_pixels(size, native=False):
    """A function: an image as `rgb` takes it → uint8 [3,size,size], by Resize(256/224·size) and
    CenterCrop(size); native: by neither, ValueError for another size."""
    from torchvision.transforms.v2 import functional as F       # here, as that takes over a second
    def pixels(source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of large images, palettes with transparency, odd metadata
            image = rgb(source)
            if native and image.size != (size, size):
                raise ValueError(f"{image.width:,}×{image.height:,} pixels, not {size}×{size}")
            if not native:
                most = 64 * min(image.size)      # resized, 1×60,000 would be 256×15 million: only its middle
                image = F.center_crop(image, [min(image.height, most), min(image.width, most)])
                image = F.resize(image, round(size * 256 / 224), Image.Resampling.BICUBIC)
                image = F.center_crop(image, [size, size])
            return F.pil_to_tensor(image)
    return pixels


class ImageSet(Dataset):
    """Item i is (uint8 [3,size,size], label, i), or raises Unreadable, which names the image. A kind of it
    has `count`, `where(i)`: an image's name, and `read(i)`: (pixels, label) or any error."""
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


class Images(ImageSet):
    """Images of (file, label) pairs, or of a torchvision set kept in one file."""
    def __init__(self, name, samples, size):
        self.name, self.count, self.to_pixels = name, len(samples), to_pixels(size)
        self.samples, self.files, self.labels = samples, None, None
        if isinstance(samples, list):       # arrays: lists' reference counts would copy them to each worker
            self.start = os.path.commonprefix([file for file, _ in samples])
            self.files = np.array([os.fsencode(file[len(self.start):]) for file, _ in samples], np.bytes_)
            self.samples, self.labels = None, np.array([label for _, label in samples], np.int64)

    def path(self, index):
        return self.start + os.fsdecode(self.files[index])

    def where(self, index):
        return f"image {index} of {self.name}" if self.files is None else self.path(index)

    def read(self, index):
        if self.files is None:
            image, label = retry_io(self.samples.__getitem__, index)
        else:
            image, label = io.BytesIO(retry_io(read_file, self.path(index))), self.labels[index]
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


class Folder(Images):
    """PATH/<class>/<image>, images as torchvision's ImageFolder finds them, but for hidden ones; how many
    files are left out because of their names is said. ValueError, in one line: no such folder, or another."""
    def __init__(self, path, size):
        self.root, shown, samples, others = Path(path), printable(path), [], []
        if not self.root.is_dir():
            raise ValueError(f"no such folder: {shown}")
        try:
            with os.scandir(self.root) as entries:
                self.classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            for label, name in enumerate(self.classes):
                files = files_under(self.root / name)
                images = [(file, label) for file in files if file.lower().endswith(EXTENSIONS)]
                if not images:
                    raise ValueError(f"no images in {name}/")
                samples += images
                others += [file for file in files if not file.lower().endswith(EXTENSIONS)]
            if not samples:
                raise ValueError("no folders in it")
        except (ValueError, OSError) as error:
            raise ValueError(f"{shown} is not a folder of <class>/<image>: {one_line(error)}") from None
        if others:
            say_once(f"{len(others):,} files under {shown} are left out, their names are not those of "
                     f"images: {printable(others[0])}{', …' if len(others) > 1 else ''}")
        super().__init__(path, samples, size)


class Shards(ImageSet):
    """The samples of tars, KEY.{webp,png,jpg,jpeg,img} + KEY.cls. Only headers are read here, items later, in
    any order; workers share nothing. ValueError, in one line, for a damaged tar: a part is no accuracy."""
    def __init__(self, tars, size, native=False):
        self.tars, self.to_pixels = tars, to_pixels(size, native)
        self.containers = tars
        self.names, spans = [], []      # int64 [count, 5]: the tar; the image's offset and bytes; its label's
        for number, path in enumerate(tars):
            samples = {}
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        folder, file = os.path.split(member.name)
                        key, _, kind = file.partition(".")
                        kind = "image" if kind.lower() in ("webp", "png", "jpg", "jpeg", "img") else kind
                        if member.isfile() and key and kind in ("image", "cls"):
                            samples.setdefault((folder, key), {})[kind] = member
                    tar.fileobj.seek(tar.offset)     # tarfile ends at any header that it cannot read
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
            except (tarfile.TarError, OSError) as error:
                raise ValueError(f"{printable(path)} is damaged or cut short: {one_line(error)}") from None
            for (_, key), sample in samples.items():
                if len(sample) < 2:
                    raise ValueError(printable(f"{path}: {key} is not an image with its label in {key}.cls"))
                image, label = sample["image"], sample["cls"]
                self.names.append(image.name)
                spans.append((number, image.offset_data, image.size, label.offset_data, label.size))
        self.count, self.spans = len(spans), np.array(spans, np.int64).reshape(-1, 5)

    def where(self, index):
        return f"{self.names[index]} of {self.tars[self.spans[index, 0]]}"

    def read(self, index):
        tar, *spans = self.spans[index].tolist()
        image, label = (retry_io(read_file, self.tars[tar], spans[i + 1], spans[i]) for i in (0, 2))
        return self.to_pixels(io.BytesIO(image)), int(label)
