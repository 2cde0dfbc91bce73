"""tasks/images.py: images of every mode, disks that fail, files that change, folders."""
import errno
import io
import os
import shutil
import struct
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from writers import alarm, encoded, png, write_shards

from tasks.contents import fingerprint
from tasks.images import EXTENSIONS, Images, Unreadable, one_line, rgb, say_once, to_pixels
from tasks.make_cache import make_cache
from tasks.sampling import labels_of
from tasks.task import Task, load_task

no_hanging = pytest.fixture(alarm, autouse=True)


# --------------------------------------------------------------------------------------------- every mode
def test_every_mode_becomes_the_rgb_it_shows():
    red = Image.new("RGB", (6, 4), (204, 0, 51))
    for image in (red, red.convert("RGBA"), red.convert("P"), red.convert("CMYK"), red.convert("PA")):
        assert np.array_equal(np.asarray(rgb(image)), np.asarray(red)), image.mode
    for image in (red.convert("L"), red.convert("LA")):
        assert (np.asarray(rgb(image)) == 67).all()
    assert (np.asarray(rgb(Image.new("1", (3, 3), 1))) == 255).all()


def test_what_pil_warns_of_is_read_in_silence(monkeypatch):
    clear = io.BytesIO()
    Image.new("RGB", (20, 20), (204, 0, 51)).convert("P").save(clear, "png", transparency=bytes(256))
    # 400 pixels are large from now on: PIL would warn as they are opened, and as they are cropped
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_pixels(8)(clear).unique(dim=1)[:, 0, 0].tolist() == [204, 0, 51]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(ValueError, match="^more than 398 pixels are too many$"):
        to_pixels(8)(clear)


@pytest.mark.parametrize("dtype,mode,kind", [
    (np.uint16, "I;16", "png"), (np.uint16, "I;16", "ppm"), (">u2", "I;16B", "tiff")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype, mode, kind):
    grey = np.linspace(0, 65535, 1024).astype(dtype).reshape(32, 32)
    Image.frombytes(mode, (32, 32), grey.tobytes()).save(tmp_path / f"a.{kind}")
    assert Image.open(tmp_path / f"a.{kind}").mode.startswith("I")
    expected = np.rint(grey / 257).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.array_equal(np.asarray(rgb(tmp_path / f"a.{kind}")), expected)


def test_sixteen_bits_of_which_zero_is_white(tmp_path):
    grey = np.linspace(0, 65535, 64).astype("<u2").reshape(8, 8)
    for zero_is_white in (False, True):
        Image.frombytes("I;16", (8, 8), grey.tobytes()).save(
            tmp_path / "a.tif", tiffinfo={262: 0 if zero_is_white else 1})
        with Image.open(tmp_path / "a.tif") as image:
            assert image.tag_v2[262] == 1 - zero_is_white
        seen = np.asarray(rgb(tmp_path / "a.tif"))[..., 0]
        assert np.array_equal(seen, np.rint((65535 - grey.astype(float) if zero_is_white else grey) / 257))


def test_a_thin_image_is_its_middle(tmp_path, monkeypatch):
    resize, areas = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *words, **more: (
        areas.append(size[0] * size[1]), resize(image, size, *words, **more))[1])
    stripes = np.zeros((1, 60_000, 3), np.uint8)
    stripes[:, 30_000:] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    x, _, _ = Images("a", [(str(tmp_path / "a.png"), 0)], 32)[0]
    assert x.shape == (3, 32, 32) and x[0, 0, 0] < 128 < x[0, 0, -1] and (x[0].int().diff() >= 0).all()
    assert areas == [37 * 37 * 64]


@pytest.mark.parametrize("size,said", [(2**30 + 1, "too many"), (2**20, "cannot identify")])
def test_a_file_that_is_too_long_is_not_read(tmp_path, size, said):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=said):
        Images("a", [(str(tmp_path / "a.jpg"), 0)], 32)[0]


def test_lines_are_harmless():
    said = one_line(OSError("a\nb\x1b[31m \udcff\u202e" + 300 * "x"))
    assert said.startswith("a b\\x1b[31m \\udcff\\u202exxx")
    assert len(one_line("x" * 300)) == 200 and one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


# --------------------------------------------------------------------------------------------- disks
@pytest.fixture
def kinds(tmp_path):
    """{kind: (a task of two images, a file it reads)}: a folder, files, shards, a cache."""
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "x.png").write_bytes(png())
    write_shards(tmp_path / "wds", [0, 1], ["a", "b"], "png")
    make_cache(f"folder:{tmp_path / 'set'}", tmp_path / "c.npy", size=8)
    first = tmp_path / "set" / "a" / "x.png"
    files = Images("files", [(str(tmp_path / "set" / name / "x.png"), c) for c, name in enumerate("ab")], 8)
    shards, cache = tmp_path / "wds", tmp_path / "c.npy"
    return {"folder": (load_task(f"folder:{tmp_path / 'set'}", "val", size=8), first),
            "files": (Task("files", files, ["a", "b"], "{}"), first),
            "shards": (load_task(f"wds:{shards}", "val", size=8), shards / "test" / "0.tar"),
            "cache": (load_task(f"cache:{cache}", "val", size=8), cache)}


KINDS = "folder", "files", "shards", "cache"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["open", "read"])
def test_a_network_disk_is_asked_again(kinds, monkeypatch, kind, call):
    (task, path), slept, failures, original = kinds[kind], [], [], getattr(os, call)
    before = task.images[0]

    def failing(*words):
        if failures:
            number = failures.pop(0)
            raise OSError(number, os.strerror(number))
        return original(*words)
    monkeypatch.setattr(os, call, failing)
    monkeypatch.setattr(time, "sleep", slept.append)
    failures += [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
    assert torch.equal(task.images[0][0], before[0]) and slept == [.5, 1, 2]
    failures += [errno.EREMOTEIO] * 4
    with pytest.raises(Unreadable, match=f"{path}: Remote I/O error") as error:
        task.images[0]
    assert slept == [.5, 1, 2] * 2 and not failures and str(error.value).isprintable()
    for number in (errno.EACCES, errno.ENOENT, errno.ENOTDIR):
        failures.append(number)
        with pytest.raises(Unreadable, match=f"{path}: {os.strerror(number)}"):
            task.images[0]
    assert len(slept) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_short_reads_and_files_that_are_cut_short(kinds, monkeypatch, kind):
    (task, path), original, cut = kinds[kind], os.read, []

    def short(file, count):
        if cut:
            os.truncate(path, cut[0])
        return original(file, min(count, 100))
    monkeypatch.setattr(os, "read", short)
    # all of it is read
    assert task.images[0][0].float().std() > 9
    cut.append(140)
    with pytest.raises(Unreadable, match=f"{path}: cut short: the file ends at byte "):
        task.images[0]


def test_an_image_that_changes_is_read_as_it_is_now(kinds):
    for kind in ("folder", "files"):
        task, path = kinds[kind]
        # longer than it was
        path.write_bytes(encoded("jpeg"))
        assert (task.images[0][0].float().mean((1, 2)) - torch.tensor([200., 100, 50])).abs().max() < 3
        path.unlink()
        with pytest.raises(Unreadable, match=f"^cannot decode {path}: No such file or directory$"):
            task.images[0]
        path.write_bytes(png())


def test_no_permission():
    """As a user whom permissions mean something to: root becomes nobody."""
    # not under pytest's folder, which is root's alone
    root = Path(tempfile.mkdtemp())
    try:
        for name in "ab":
            (root / name).mkdir()
            (root / name / "x.png").write_bytes(png())
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)
        task = load_task(f"folder:{root}", "val", size=8)
        if os.geteuid() == 0:
            os.seteuid(65534)
        task.images[0]
        os.seteuid(os.getuid())
        (root / "a" / "x.png").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(Unreadable, match=f"^cannot decode {root}/a/x.png: Permission denied$"):
            task.images[0]
        assert task.images[1][2] == 1
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(root)


# --------------------------------------------------------------------------------------------- folders
def test_folders_read_sixteen_bits_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 30), 257 * 77, np.uint16)).save(tmp_path / name / "x.png")
    assert (load_task(f"folder:{tmp_path}", "val", size=8).images[1][0] == 77).all()


def test_images_are_known_by_torchvisions_endings():
    assert EXTENSIONS == IMG_EXTENSIONS


def test_what_is_left_out_of_a_folder_is_said_once(tmp_path, capsys, monkeypatch):
    for name in ("a", "b/sub", "b/.hidden", ".git"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("x.png", "._x.jpg", ".DS_Store"):
            (tmp_path / name / file).write_bytes(png())
    for file in ("notes.txt", "photo.dat"):
        (tmp_path / "b" / file).write_text("x")
    (tmp_path / "loose.png").write_bytes(png())
    (tmp_path / "classes.csv").write_text("x")
    for _ in range(2):
        task = load_task(f"folder:{tmp_path}", "val", size=8)
        assert task.class_names == ["a", "b"] and [task.images.path(i) for i in range(len(task.images))] == [
            f"{tmp_path}/a/x.png", f"{tmp_path}/b/sub/x.png"]
    assert capsys.readouterr().out == (
        f"3 files under {tmp_path} are left out, they are in no class's folder, or not called like images: "
        f"{tmp_path}/loose.png, …\n")
    say_once.cache_clear()
    monkeypatch.setenv("RANK", "1")
    load_task(f"folder:{tmp_path}", "val", size=8)
    assert capsys.readouterr() == ("", "")


def test_folders_that_are_not_one(tmp_path, monkeypatch):
    def said():
        with pytest.raises(ValueError) as error:
            load_task(f"folder:{tmp_path}", "val", size=8)
        assert str(error.value).isprintable() and str(tmp_path) in str(error.value)
        return str(error.value)
    assert "no folders in it" in said()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("x")
    assert "no images in a/" in said()
    for name in ("a", "b"):
        (tmp_path / name / "x.png").write_bytes(png())
    os.symlink("..", tmp_path / "b" / "up")
    assert "the same folder twice, by a link" in said()
    (tmp_path / "b" / "up").unlink()
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", forbidden)
    assert "Permission denied" in said()


def test_names_and_labels_survive_as_arrays(tmp_path):
    names = [b"a/1.png", b"a/\xff2.png", "b/é ü.png".encode(), b"b/" + 200 * b"x" + b".png"]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png())
    task = load_task(f"folder:{tmp_path}", "val", size=8)
    found = {os.path.relpath(os.fsencode(task.images.path(i)), os.fsencode(tmp_path)) for i in range(4)}
    assert found == set(names)
    labels = [task.images[i][1] for i in range(4)]
    assert labels == task.images.labels.tolist() == labels_of(task).tolist() == [0, 0, 1, 1]
    assert isinstance(task.images.files, np.ndarray) and isinstance(task.images.labels, np.ndarray)
    there = fingerprint(task)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    again = load_task(f"folder:{moved}", "val", size=8)
    assert fingerprint(again) == there
    (moved / "a" / "1.png").rename(moved / "a" / "3.png")
    assert fingerprint(load_task(f"folder:{moved}", "val", size=8)) != fingerprint(task)


def test_importing_leaves_pils_own_limit():
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 12


# --------------------------------------------------------------------------------------------- pixels
@pytest.mark.parametrize("dtype,mode,values,said", [
    (np.float32, "F", (0, .5, 1), "floating-point"), (np.float32, "F", (0, 100, 255), "floating-point"),
    (np.int32, "I", (0, 2**30, 2**31 - 1), "32-bit or signed"), (np.int32, "I", (0, 9, 65535), "32-bit")])
def test_pixels_without_a_known_white_are_refused_by_name(tmp_path, dtype, mode, values, said):
    """PIL clips them to black or white."""
    pixels = np.array([values] * 3, dtype)
    Image.frombytes(mode, (3, 3), pixels.tobytes()).save(tmp_path / "a.tiff")
    with pytest.raises(Unreadable, match=f"^cannot decode {tmp_path}/a.tiff: {said}.*8 bits$"):
        Images("a", [(str(tmp_path / "a.tiff"), 0)], 8)[0]


def test_twelve_bits_are_not_read_as_sixteen(tmp_path):
    """White, 4095, would be 16 of 255."""
    # of an uncompressed TIFF, by hand: two pixels of 12 bits each, 0 and 4095
    tags = ((256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 3))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries
    (tmp_path / "a.tif").write_bytes(data + bytes(4))
    assert Image.open(tmp_path / "a.tif").mode == "I;16"
    with pytest.raises(ValueError, match="12-bit pixels"):
        rgb(tmp_path / "a.tif")


def torchvisions(path):
    return np.asarray(pil_loader(path))


@pytest.mark.parametrize("kind,mode", [
    *(("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")), ("gif", "P"), ("gif", "RGB"),
    *(("tiff", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")),
    *(("jpeg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")), ("webp", "RGBA"), ("bmp", "RGB")])
def test_what_torchvision_shows_of_an_image(tmp_path, kind, mode):
    """Its pil_loader, bit for bit: alpha, palettes, and of several frames the first."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 4), np.uint8)
    first, second = (Image.fromarray(frame, "RGBA") for frame in noise)
    frames = [frame if mode == "RGBA" else frame.convert("RGB").convert(mode) for frame in (first, second)]
    several = {"save_all": True, "append_images": frames[1:]} if kind in ("gif", "tiff", "webp") else {}
    frames[0].save(tmp_path / f"a.{kind}", **several)
    expected = torchvisions(tmp_path / f"a.{kind}")
    assert np.array_equal(np.asarray(rgb(tmp_path / f"a.{kind}")), expected)
    # and --resize none leaves them so
    x, _, _ = Images("a", [(str(tmp_path / f"a.{kind}"), 0)], None, "none")[0]
    assert np.array_equal(x.permute(1, 2, 0), expected)


def test_images_are_left_alone_or_resized_as_is_said(tmp_path):
    for name, (width, height) in {"a": (24, 24), "b": (24, 24), "c": (24, 23)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(width, height))
    name, x = f"folder:{tmp_path}", np.asarray(Image.open(tmp_path / "a" / "x.png"))
    none = load_task(name, "val", size=32, resize="none")
    assert np.array_equal(none.images[1][0].permute(1, 2, 0), x)
    with pytest.raises(Unreadable, match="c/x.png: 24×23 pixels, not 24×24"):
        none.images[2]
    # by hand: torchvision's Resize(40) and CenterCrop(32)
    by_hand = Image.fromarray(x).resize((40, 40), Image.Resampling.BILINEAR).crop((4, 4, 36, 36))
    some = load_task(name, "val", size=32, resize=40)
    assert np.array_equal(some.images[0][0].permute(1, 2, 0), np.asarray(by_hand))
    with pytest.raises(ValueError, match="--resize 31 is less than the 32 pixels"):
        load_task(name, "val", size=32, resize=31)
    (tmp_path / "a" / "x.png").write_bytes(png(24, 23))
    with pytest.raises(ValueError, match="--resize none is for square images, the first is of 24×23"):
        load_task(name, "val", size=32, resize="none")
