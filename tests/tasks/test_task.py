"""tasks/task.py: tasks by name, folders in ImageNet's layout, and their errors."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from writers import imagenet_folder

from tasks.task import load_task, task_names
from toy import world

folder = pytest.fixture(imagenet_folder)


def test_folder_in_imagenets_layout(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder)
    assert task.class_names == ["Hot-Dog", "tench", "crane bird"] and len(task.images) == 18
    assert task.template == "This is a photo of a {}"
    for i in range(18):
        image, label, index = task.images[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and index == i and label == i // 6
    assert load_task(f"folder:{folder}", "train", size=32).images.root.name == "train"
    # a folder of classes itself; DIR/imagenet/val as well, whatever lies beside it
    assert len(load_task(f"folder:{folder / 'val'}", "val", size=32).images) == 18
    (folder / "imagenet").mkdir()
    for split in ("train", "val"):
        (folder / split).rename(folder / "imagenet" / split)
    assert len(load_task("imagenet", "val", size=32, data_root=folder).images) == 18
    (folder / "imagenet" / "devkit").mkdir()
    assert len(load_task("imagenet", "val", size=32, data_root=folder).images) == 18


def test_images_are_resized_to_256_then_cropped_to_224(folder):
    # 300×200 pixels, tench
    image, _, _ = load_task("imagenet", "val", size=224, data_root=folder).images[6]
    original = Image.open(folder / "val" / "n01440764" / "00.jpg").convert("RGB")
    by_hand = original.resize((384, 256), Image.Resampling.BILINEAR).crop((80, 16, 304, 240))
    assert torch.equal(image, torch.from_numpy(np.asarray(by_hand).copy()).permute(2, 0, 1))


def test_limit_spreads_over_the_classes(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder, limit=3)
    # the last are numbers of the whole set
    assert [task.images[i][1] for i in range(3)] == [0, 1, 2]
    assert [task.images[i][2] for i in range(3)] == [0, 6, 12]
    assert len(load_task("digits", "val", limit=17).images) == 17


def test_toy_tasks_by_name(monkeypatch):
    # how many are drawn; 16,384 take their time
    monkeypatch.setattr(world, "draw", lambda objects, *_: torch.zeros(len(objects), 1))
    for name in world.TASKS:
        task = load_task(name, "val")
        assert task.name == name and len(task.images) == 400
        assert len(set(task.class_names)) == len(task.class_names)
    train = load_task("toy", "train")
    assert train.name == load_task("toy:seen", "train", limit=8).name == "seen" and len(train.images) == 16384
    monkeypatch.undo()
    val, tune = load_task("digits", "val", limit=20), load_task("digits", "tune", limit=20)
    assert not torch.equal(val.images[0][0], tune.images[0][0])


@pytest.mark.parametrize("make,said", [
    (lambda p: "nothing", "unknown task"), (lambda p: f"folder:{p / 'absent'}", "no such folder"),
    (lambda p: f"folder:{p}", "not a folder of"), (lambda p: "scans", "evaluation only"),
    (lambda p: "imagenet", "--data-root")])
def test_wrong_tasks_are_one_line_errors(tmp_path, make, said):
    with pytest.raises(ValueError, match=said) as error:
        load_task(make(tmp_path), "tune" if said == "evaluation only" else "val")
    assert "\n" not in str(error.value)


def test_unknown_words_are_one_line():
    with pytest.raises(ValueError, match="expected .*cifar10.*wds:PATH"):
        load_task("cifar11", "val")
    with pytest.raises(ValueError, match="no such folder: /nowhere$"):
        load_task("folder:/nowhere", "val", data_root="/")
    with pytest.raises(ValueError, match="not many"):
        load_task("toy", "val", templates="many")
    with pytest.raises(ValueError, match="evaluation only"):
        load_task("cifar10", "tune", data_root=ROOT)


def test_empty_and_single_classes_are_errors(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat"):
        load_task(f"folder:{tmp_path}", "val")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(ValueError, match="only one class"):
        load_task(f"folder:{tmp_path}", "val", size=8)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="dog"):
        load_task(f"folder:{tmp_path}", "val")


def test_task_names():
    assert task_names("none", "toy") == []
    assert task_names("all", "toy") == [name for name in world.TASKS if name != "seen"]
    assert task_names("all", "imagenet") == ["imagenet"]
    assert task_names("all", "cache:/a/b.npy") == ["cache:/a/b.npy"]
    # adapted on: not zero-shot
    assert "digits" not in task_names("all", "digits")
    assert task_names("digits, letters,digits", "toy") == ["digits", "letters"]
