"""tasks/contents.py: which images are those of before, wherever they lie: by contents."""
import os
import shutil

import pytest
from noise import change_one_pixel, draw
from torch.utils.data import Subset

from tasks import contents
from tasks.contents import differing, fingerprint, other_contents, other_labels, stamp
from tasks.make_cache import make_cache
from tasks.task import load_task


@pytest.fixture
def photos(tmp_path):
    """train/{cat,dog}/0.png … 3.png"""
    for number in range(8):
        draw(tmp_path / "photos" / "train" / ("cat", "dog")[number // 4] / f"{number % 4}.png", number,
             size=8)
    return tmp_path / "photos"


def train_of(folder):
    return load_task(f"folder:{folder}", "train", size=8)


def copy_with_new_times(folder, to):
    shutil.copytree(folder, to)
    for path in to.rglob("*.png"):
        os.utime(path, (1, 1))
    return to


def test_moved_data_are_the_same(photos, tmp_path):
    before = fingerprint(train_of(photos))
    make_cache(f"folder:{photos}", tmp_path / "cache.npy", size=8)
    cache = load_task(f"cache:{tmp_path / 'cache.npy'}", "train", size=8)
    copied = train_of(copy_with_new_times(photos, tmp_path / "elsewhere" / "copy"))
    moved = train_of(photos.rename(tmp_path / "renamed"))
    for task in (copied, moved, cache):
        assert differing(task, before, fingerprint(task)) == differing(task, fingerprint(task), before) == []
    assert fingerprint(copied) == fingerprint(moved) == before


def test_changed_data_are_named(photos, tmp_path, monkeypatch):
    """By names, labels, sizes, words, and the pixels of a sample: with 4 of 8 images every second one."""
    monkeypatch.setattr(contents, "SAMPLE", 4)
    before = fingerprint(train_of(photos))

    def found(change):
        root = tmp_path / "changed"
        shutil.copytree(photos, root)
        change(root / "train")
        task = train_of(root)
        words = differing(task, before, fingerprint(task))
        shutil.rmtree(root)
        return [word.replace(f"{root}/train/", "") for word in words]
    assert found(lambda root: None) == []
    # three images that are not of the sample, one that is
    assert found(lambda root: [change_one_pixel(root / "cat" / f"{n}.png") for n in (1, 3)]) == []
    assert found(lambda root: [change_one_pixel(root / "cat" / f"{n}.png") for n in (0, 1)]) == [
        "other pixels in 1 of the 4 images compared: cat/0.png"]
    assert found(lambda root: [change_one_pixel(path) for path in root.rglob("*.png")]) == [
        "other pixels in 4 of the 4 images compared: cat/0.png, cat/2.png, dog/0.png, dog/2.png"]
    assert found(lambda root: (root / "dog" / "2.png").write_bytes(b"")) == [
        "other file sizes", "other pixels in 1 of the 4 images compared: dog/2.png"]
    # not of the sample
    assert found(lambda root: (root / "dog" / "3.png").open("ab").write(b"x")) == ["other file sizes"]
    assert found(lambda root: (root / "dog" / "3.png").rename(root / "dog" / "9.png")) == ["other file names"]
    assert found(lambda root: (root / "dog").rename(root / "wolf")) == [
        "other class names", "other file names"]
    assert found(lambda root: (root / "dog" / "3.png").unlink()) == [
        "number of images 7 of 7 (before: 8 of 8)"]
    assert found(lambda root: (root / "dog" / "0.png").rename(root / "cat" / "9.png")) == [
        "other file names", "other labels"]


def test_sets_in_memory_are_compared_whole():
    task = load_task("digits", "val", limit=200)
    images = task.images
    other = images.tensors[0].clone()
    other[77, 0, 0, 0] ^= 1
    changed = task._replace(images=type(images)(other, *images.tensors[1:]))
    assert differing(changed, fingerprint(task), fingerprint(changed))[0] == "other all pixels"
    assert not stamp(task) and fingerprint(task)["drawn"]
    labels = images.tensors[1].clone()
    labels[7] += 1
    others = {"labels": task._replace(images=type(images)(images.tensors[0], labels, images.tensors[2])),
              "template": task._replace(template="a {}"),
              "class names": task._replace(class_names=[*"abcdefghij"]),
              "choice of images": task._replace(images=Subset(images, [*range(1, 200)]))}
    same = task._replace(images=Subset(images, [*range(199)]))
    for word, found in others.items():
        before = fingerprint(same if word == "choice of images" else task)
        assert f"other {word}" in differing(found, before, fingerprint(found))


def test_a_stamp_changes_with_every_file_that_is_touched(photos, tmp_path):
    """A file's time of change cannot be set back; to hide it is not to hide the change."""
    make_cache(f"folder:{photos}", tmp_path / "cache.npy", size=8)

    def cached():
        return load_task(f"cache:{tmp_path / 'cache.npy'}", "train", size=8)
    before = stamp(train_of(photos)), stamp(cached())
    assert all(before) and (stamp(train_of(photos)), stamp(cached())) == before
    change_one_pixel(photos / "train" / "cat" / "1.png")
    os.utime(tmp_path / "cache.npy")
    assert stamp(train_of(photos)) != before[0] and stamp(cached()) != before[1]


def test_evaluated_images_are_compared_one_by_one(photos):
    task = train_of(photos)
    found = list(contents.checksums(task, range(8)))
    records = {number: {"image": number, "crc32": crc32, "label": label} for number, crc32, label in found}
    assert not other_contents(task, records, True) and not other_labels(task, records)
    # names alone make no other image
    for number in range(4):
        (photos / "train" / "cat" / f"{number}.png").rename(photos / "train" / "cat" / f"new{number}.png")
    change_one_pixel(photos / "train" / "dog" / "2.png")
    (photos / "train" / "dog" / "3.png").write_bytes(b"")
    task = train_of(photos)
    words, = other_contents(task, records, True)
    root = photos / "train" / "dog"
    assert words == f"2 of 8 have other contents: {root}/2.png, {root}/3.png"
    # what was not evaluated can be anything, unless it is known not to have been readable
    for number in (6, 7):
        del records[number]
    assert not other_contents(task, records, False)
    assert "1 of 8" in other_contents(task, records, True)[0]
    records[0]["label"] = 1
    assert other_labels(task, records) == [
        f"1 images have other labels: {photos}/train/cat/new0.png"]
