"""Images of any mode, in folders, in files, in one file or in shards → uint8 [3,H,W], with one-line errors that name what is
damaged. Nothing in a file is executed, and none takes more memory than PIL allows an image."""
import errno
import functools
import io
import os
import stat
import tarfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"     # whatever a file is called; for EPS PIL starts Ghostscript
MOST_PIXELS, MOST_BYTES = 178_956_970, 2**30                     # of an image, the first is where PIL refuses one
Image.MAX_IMAGE_PIXELS = None                                    # `rgb` refuses instead: PIL warns of each from the half on
# What a network disk says for a moment, and how long to wait each time before asking again, in seconds
TRANSIENT = {getattr(errno, name, None) for name in (
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ENOLINK", "ECOMM", "EPROTO", "ECONNRESET", "ECONNABORTED",
    "ECONNREFUSED", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET")} - {None}
PAUSES = .5, 1, 2


class Unreadable(ValueError):
    """What is wrong with an image, in one line; also from a worker, where torch makes a traceback of it."""

    def __init__(self, said):
        super().__init__(said.strip().splitlines()[-1].removeprefix("images.Unreadable: "))


def printable(text):
    """Text with line ends, control and other unprintable characters written as escapes: a file's name may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error):
    """What an exception says, in one line and not too long a one."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__


def unreadable(what, error):
    """The Unreadable that names an image and says what is wrong with it."""
    return Unreadable(f"cannot decode {printable(what)}: {one_line(getattr(error, 'strerror', None) or error)}")


@functools.cache
def say_once(text):
    """Print a line, once, and in process 0 alone; on stdout, stderr is for errors."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def patiently(read, *words):
    """read(*words), asked again after each of PAUSES if a network disk fails in passing."""
    for pause in (*PAUSES, None):
        try:
            return read(*words)
        except OSError as error:
            if error.errno not in TRANSIENT or pause is None:
                raise
        time.sleep(pause)


def read_file(path, count=None, offset=0):
    """A file as a bytearray, or `count` bytes of it from `offset` on. OSError; ValueError: no file, too long, cut short."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)         # which does not wait for a pipe's other end
    try:
        status, done = os.fstat(file), 0
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        count = status.st_size - offset if count is None else count
        if count > MOST_BYTES:
            raise ValueError(f"{count:,} bytes are too many for an image")
        content = bytearray(count)
        while done < count:
            read = os.preadv(file, [memoryview(content)[done:]], offset + done)          # a map would end in SIGBUS
            if not read:
                raise ValueError(f"cut short: the file ends at byte {offset + done:,}, not {offset + count:,}")
            done += read
        return content
    finally:
        os.close(file)


def rgb(source):
    """An image of any mode → PIL RGB, 8 bits. source: a file, an open one, or a PIL image.

    16 bits of grey are scaled to 8 (PIL's own conversion clips them); what lies under transparency shows. Raises whatever
    PIL's decoders do; ValueError: of no format that is known, or of more than MOST_PIXELS.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    except PIL.UnidentifiedImageError:               # its words name an address in memory
        raise ValueError(f"cannot identify the image's format, none of {', '.join(FORMATS)}") from None
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width:,}×{image.height:,} pixels are too many")
        if image.mode.startswith("I"):               # I;16 and its byte orders, or I
            image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode.startswith("P"):               # straight to RGB, PIL warns of each palette with transparency
            image = image.convert("RGBA")
        return image.convert("RGB")


def to_pixels(size, native=False):
    """The transform of a PIL image to uint8 [3,size,size]: Resize(256/224·size) and CenterCrop(size); native: no change, but
    ValueError for an image of another size."""
    resize = v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)

    def check(image):
        if native and image.size != (size, size):
            raise ValueError(f"{image.width:,}×{image.height:,} pixels, not {size}×{size}")
        most = 64 * min(image.size)                  # 1×60,000 resized would be 256×15 million: only its middle is needed
        return v2.functional.center_crop(image, [min(image.height, most), min(image.width, most)])
    return v2.Compose([check, *(() if native else resize), v2.PILToTensor()])


class Images(Dataset):
    """Images of (file, label) pairs, or of a torchvision set kept in one file: item i is (uint8 [3,size,size], label, i).

    An item raises Unreadable, which names the file (or the set and i), where the image cannot be read or decoded.
    """

    def __init__(self, name, samples, size):
        self.name, self.count, self.to_pixels = name, len(samples), to_pixels(size)
        self.samples, self.files, self.labels = samples, None, None
        if isinstance(samples, list):                # no lists: their reference counts would copy them into every worker
            self.start = os.path.commonprefix([file for file, _ in samples])             # of the name of each file
            self.files = np.array([os.fsencode(file[len(self.start):]) for file, _ in samples], np.bytes_)
            self.samples, self.labels = None, np.array([label for _, label in samples], np.int64)

    def __len__(self):
        return self.count

    def path(self, index):
        return self.start + os.fsdecode(self.files[index])

    def where(self, index):
        return f"image {index} of {self.name}" if self.files is None else self.path(index)

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)                  # ends a loop over all
        try:
            if self.files is None:
                image, label = patiently(self.samples.__getitem__, index)
            else:
                image, label = io.BytesIO(patiently(read_file, self.path(index))), self.labels[index]
            return self.to_pixels(rgb(image)), int(label), index
        except Exception as error:                   # each decoder has its own kind, and few of them name the file
            raise unreadable(self.where(index), error) from None


def files_under(folder):
    """The files in a folder, at any depth, without hidden files and folders, sorted as torchvision does. OSError."""
    found, seen = [], set()

    def fail(error):
        raise error
    for where, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        real = os.path.realpath(where)
        if real in seen:                             # in a circle this would go on for 40 levels
            raise OSError(errno.ELOOP, "the same folder twice, by a link", where)
        seen.add(real)
        found.append((where, sorted(name for name in files if not name.startswith("."))))
    return [os.path.join(where, name) for where, names in sorted(found) for name in names]


class Folder(Images):
    """PATH/<class>/<image>, images as torchvision's ImageFolder finds them, but for hidden ones; how many files in them are
    left out because of their names is said.

    ValueError, in one line: no such folder, or not a folder of that kind.
    """

    def __init__(self, path, size):
        self.root, samples, others = Path(path), [], []
        if not self.root.is_dir():
            raise ValueError(f"no such folder: {printable(path)}")
        try:
            with os.scandir(self.root) as entries:
                self.classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            for label, name in enumerate(self.classes):
                files = files_under(self.root / name)
                images = [(file, label) for file in files if file.lower().endswith(IMG_EXTENSIONS)]
                if not images:
                    raise ValueError(f"no images in {name}/")
                samples += images
                others += [file for file in files if not file.lower().endswith(IMG_EXTENSIONS)]
            if not samples:
                raise ValueError("no folders in it")
        except (ValueError, OSError) as error:
            raise ValueError(f"{printable(path)} is not a folder of <class>/<image>: {one_line(error)}") from None
        if others:
            say_once(f"{len(others):,} files under {printable(path)} are left out, their names are not those of images: "
                     f"{printable(others[0])}{', …' if len(others) > 1 else ''}")
        super().__init__(path, samples, size)


class Shards(Dataset):
    """The samples KEY.cls + KEY.{webp,png,jpg,jpeg,img} of tars: item i is (uint8 [3,size,size], label, i), errors as in
    Images.

    Only the headers are read here; after that every item is read where it lies, so workers share nothing and access is
    random. ValueError, in one line, for a tar that is damaged or cut short: a part of a data set is not its accuracy.
    """

    def __init__(self, tars, size, native=False):
        self.tars, self.to_pixels = tars, to_pixels(size, native)
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
                raise ValueError(f"{printable(path)} is damaged or cut short: {one_line(error)}") from None
            for (_, key), sample in parts.items():
                if len(sample) < 2:
                    raise ValueError(printable(f"{path}: {key} is not an image with its label in {key}.cls"))
                image, label = sample["image"], sample["cls"]
                self.names.append(image.name)
                where.append((number, image.offset_data, image.size, label.offset_data, label.size))
        self.spans = np.array(where, np.int64).reshape(-1, 5)

    def __len__(self):
        return len(self.names)

    def where(self, index):
        return f"{self.names[index]} of {self.tars[self.spans[index, 0]]}"

    def __getitem__(self, index):
        path, spans = self.tars[self.spans[index, 0]], self.spans[index, 1:].reshape(2, 2).tolist()
        try:
            image, label = (patiently(read_file, path, count, offset) for offset, count in spans)
            return self.to_pixels(rgb(io.BytesIO(image))), int(label), index
        except Exception as error:
            raise unreadable(self.where(index), error) from None
