"""tasks/images.py, Shards: what tars really hold; no sample vanishes, none is counted for another."""
import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from writers import write

from tasks.images import Unreadable, say_once
from tasks.loading import batches
from tasks.task import load_task


def grey(value, kind="png"):
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, kind)
    return file.getvalue()


def shards(folder, *members, name="0.tar", classes="cat\nHot-Dog\nbird\n"):
    """A tar of (name, content) in folder/test; → what its task's images are: their grey, label, file; or what
    is wrong with them."""
    say_once.cache_clear()
    write(folder / "classnames.txt", classes)
    (folder / "test").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test" / name, "w") as tar:
        for file, content in members:
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return seen(folder)


def seen(folder):
    task, found = load_task(f"wds:{folder}", "val", size=8), []
    for i in range(len(task.images)):
        try:
            x, y, _ = task.images[i]
            found.append((int(x[0, 0, 0]), y, task.images.file(i)))
        except Unreadable as error:
            found.append(str(error).removeprefix(f"cannot decode {task.images.where(i)}: "))
    return found


def test_keys_with_dots(tmp_path, capsys):
    # webdataset's key ends at the first dot of the file's name, whatever its folder is called
    assert shards(tmp_path, ("d.1/a.png", grey(1)), ("d.1/a.cls", b"1"), ("d.2/a.png", grey(2)),
                  ("d.2/a.cls", b"2")) == [(1, 1, "0.tar/d.1/a.png"), (2, 2, "0.tar/d.2/a.png")]
    # image and label have more than that in common
    assert shards(tmp_path, *((f"a.v{i}.{kind}", content) for i in range(3) for kind, content in (
        ("png", grey(i)), ("cls", b"%d" % i)))) == [(i, i, f"0.tar/a.v{i}.png") for i in range(3)]
    assert capsys.readouterr().out == ""
    # parts of a sample that are not it
    assert shards(tmp_path, ("a.png", grey(1)), ("a.mask.png", grey(9)), ("a.cls", b"1"), ("a.json", b"{}"),
                  ("._a.png", b"x")) == [(1, 1, "0.tar/a.png")]
    assert "2 members of the shards in" in (said := capsys.readouterr().out) and "a.json of " in said
    assert shards(tmp_path, ("a.rgb.png", grey(1)), ("a.cls", b"1")) == [(1, 1, "0.tar/a.rgb.png")]
    assert shards(tmp_path, ("a.left.png", grey(1)), ("a.right.png", grey(2)), ("a.cls", b"1")) == [
        "a has 2 images and 1 labels"] * 2


def test_keys_that_occur_twice(tmp_path, capsys):
    twice = [(f"a.{kind}", content) for i in range(2) for kind, content in (
        ("png", grey(i)), ("cls", b"%d" % i))]
    assert shards(tmp_path, *twice) == [(0, 0, "0.tar/a.png"), (1, 1, "0.tar/a.png")]
    said = f"occur more than once, each time as a sample of its own: a.png of {tmp_path}/test/0.tar\n"
    assert capsys.readouterr().out.endswith(said)
    # in another tar it is another key
    assert len(shards(tmp_path, *twice[:2], name="1.tar")) == 3
    (tmp_path / "test" / "1.tar").unlink()
    # whose label is it?
    assert shards(tmp_path, *twice[:3]) == ["a has 2 images and 1 labels"] * 2
    assert shards(tmp_path, *twice[:2], ("a.jpg", grey(3, "jpeg"))) == ["a has 2 images and 1 labels"] * 2
    assert shards(tmp_path, twice[1], ("b.png", grey(1)), ("b.cls", b"2")) == [
        "a has 0 images and 1 labels", (1, 2, "0.tar/b.png")]


def test_labels_that_are_texts(tmp_path):
    texts = {"a": b"Hot-Dog\n", "b": b"hot-dog", "c": b" 2\n", "d": b"a photo of a cat", "e": b"\xff"}
    expected = [(0, 1, "0.tar/a.png"), (0, 1, "0.tar/b.png"), (0, 2, "0.tar/c.png")]
    for kind in ("cls", "txt", "CLS"):
        found = shards(tmp_path, *((f"{key}.{ext}", content) for key, text in texts.items()
                                   for ext, content in (("png", grey(0)), (kind, text))))
        assert found[:3] == expected
        assert found[3] == "its label 'a photo of a cat' is neither a number nor one of the classes"
        assert all("is neither a number" in said for said in found[4:])
    # a caption beside a label
    assert shards(tmp_path, ("a.png", grey(3)), ("a.txt", b"two birds"), ("a.cls", b"2")) == [
        (3, 2, "0.tar/a.png")]


def test_a_label_of_two_meanings_is_left_out(tmp_path):
    members = [member for i in range(3) for member in ((f"{i}.png", grey(i)), (f"{i}.txt", b"%d" % i))]
    (first, *others) = shards(tmp_path, *members, classes="0\n2\n1\n")
    assert first == (0, 0, "0.tar/0.png")
    assert others == [f"its label {i} is a class's number and another class's name" for i in (1, 2)]
    assert shards(tmp_path, *members, classes="0\n1\n2\n")[2] == (2, 2, "0.tar/2.png")


@pytest.mark.parametrize("kind,ext", [("png", "PNG"), ("tiff", "tif"), ("ppm", "pgm"), ("bmp", "bmp"),
                                      ("gif", "gif"), ("jpeg", "JPEG"), ("webp", "webp"), ("png", "img")])
def test_every_kind_of_image(tmp_path, kind, ext):
    (value, label, file), = shards(tmp_path, (f"a.{ext}", grey(200, kind)), ("a.cls", b"1"))
    assert abs(value - 200) < 3 and (label, file) == (1, f"0.tar/a.{ext}")


def test_compressed_shards_are_refused_by_name(tmp_path):
    shards(tmp_path, ("a.png", grey(1)), ("a.cls", b"1"))
    tar = tmp_path / "test" / "0.tar"
    for name in ("1.tar.gz", "1.tgz", "1.tar.zst", "1.TAR.XZ"):
        (tmp_path / "test" / name).write_bytes(gzip.compress(tar.read_bytes()))
        with pytest.raises(ValueError, match=f"{tmp_path}/test/{name} is compressed: unpack it"):
            seen(tmp_path)
        (tmp_path / "test" / name).unlink()
    for name in ("0.tar.md5", "0.tar.idx", "readme.md"):    # beside them, and of no account
        (tmp_path / "test" / name).write_text("x")
    tar.rename(tar.with_suffix(".TAR"))
    assert seen(tmp_path) == [(1, 1, "0.TAR/a.png")]
    tar.with_suffix(".TAR").rename(tar)
    # whatever it is called
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ValueError, match=f"{tar} is compressed: unpack it with gunzip"):
        seen(tmp_path)


def test_what_is_wrong_is_left_out_by_name(tmp_path):
    shards(tmp_path, ("a.png", grey(1)), ("a.cls", b"1"), ("b.png", grey(2)), ("c.png", grey(3)),
           ("c.cls", b"dodo"))
    task = load_task(f"wds:{tmp_path}", "val", size=8)
    (batch,) = batches(task, [0, 1, 2], 3, 0, bad="leave out")
    assert batch.index.tolist() == [0] and [number for number, _ in batch.errors] == [1, 2]
    assert "b.png of" in batch.errors[0][1] and "c.png of" in batch.errors[1][1]


def test_shards_as_they_are(tmp_path):
    shards(tmp_path, ("a.png", b"no image"), ("a.cls", b"0"), ("b.png", grey(2)), ("b.cls", b"1"))
    task = load_task(f"wds:{tmp_path}", "val", size=32, resize="none")
    assert np.array_equal(task.images[1][0], np.full((3, 8, 8), 2))
