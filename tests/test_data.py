"""data.py: tasks by name, folders in ImageNet's layout, and their errors."""
import numpy as np
import pytest
import torch
from PIL import Image

import toyworld
from data import batches, load_task, task_names


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with two of ImageNet's classes and one of another name; every mode of image a real set holds."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for c, name in enumerate(("n01440764", "n02012849", "Hot-Dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for k, (mode, width, height) in enumerate((("RGB", 300, 200), ("L", 60, 90), ("P", 50, 50), ("RGBA", 41, 77),
                                                       ("CMYK", 64, 64), ("1", 9, 9))):
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
                image.save(tmp_path / part / name / f"{c}{k}.{'jpg' if mode in ('RGB', 'CMYK') else 'png'}")
    return tmp_path


def test_folder_in_imagenets_layout(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder)
    assert task.class_names == ["Hot-Dog", "tench", "crane bird"] and task.template == "This is a photo of a {}"
    assert len(task.images) == 18
    for i in range(18):
        image, label, index = task.images[i]
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and index == i and label == i // 6
    assert load_task(f"folder:{folder}", "train", size=32).images.root.name == "train"
    assert len(load_task(f"folder:{folder / 'val'}", "val", size=32).images) == 18      # a folder of classes itself
    (folder / "imagenet").mkdir()
    for part in ("train", "val"):
        (folder / part).rename(folder / "imagenet" / part)
    assert len(load_task("imagenet", "val", size=32, data_root=folder).images) == 18    # DIR/imagenet/val as well


def test_images_are_resized_to_256_then_cropped_to_224(folder):
    image, _, _ = load_task("imagenet", "val", size=224, data_root=folder).images[6]    # 300×200 pixels, tench
    original = Image.open(folder / "val" / "n01440764" / "00.jpg").convert("RGB")
    by_hand = original.resize((384, 256), Image.Resampling.BICUBIC).crop((80, 16, 304, 240))
    assert torch.equal(image, torch.from_numpy(np.asarray(by_hand).copy()).permute(2, 0, 1))


def test_a_class_may_be_called_train(folder):
    (folder / "val" / "Hot-Dog").rename(folder / "val" / "train")
    assert load_task(f"folder:{folder / 'val'}", "val", size=8).class_names == ["tench", "crane bird", "train"]
    with pytest.raises(ValueError, match="no such folder"):                              # nothing to adapt on, unsplit
        load_task(f"folder:{folder / 'val' / 'train'}", "train", size=8)


def test_limit_spreads_over_the_classes(folder):
    task = load_task("imagenet", "val", size=32, data_root=folder, limit=3)
    assert [task.images[i][1] for i in range(3)] == [0, 1, 2]
    assert [task.images[i][2] for i in range(3)] == [0, 6, 12]                           # numbers of the whole set
    assert len(load_task("digits", "val", limit=17).images) == 17


def test_toy_tasks_by_name():
    for name in toyworld.TASKS:
        task = load_task(name, "val")
        assert task.name == name and len(task.images) == (1797 if name == "scans" else 400)
        assert len(set(task.class_names)) == len(task.class_names)
    assert load_task("toy", "train").name == load_task("toy:seen", "train").name == "seen"
    val, tune = load_task("digits", "val"), load_task("digits", "tune")
    assert not torch.equal(val.images[0][0], tune.images[0][0])


@pytest.mark.parametrize("make,said", [
    (lambda p: "nothing", "unknown task"), (lambda p: f"folder:{p / 'absent'}", "no such folder"),
    (lambda p: f"folder:{p}", "not a folder of"), (lambda p: "scans", "evaluation only"),
    (lambda p: "imagenet", "--data-root")])
def test_wrong_tasks_are_one_line_errors(tmp_path, make, said):
    with pytest.raises(ValueError, match=said) as error:
        load_task(make(tmp_path), "tune" if said == "evaluation only" else "val")
    assert "\n" not in str(error.value)


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
    assert task_names("all", "toy") == [name for name in toyworld.TASKS if name != "seen"]
    assert task_names("all", "imagenet") == ["imagenet"]
    assert "digits" not in task_names("all", "digits")                                   # adapted on: not zero-shot
    assert task_names("digits, letters,digits", "toy") == ["digits", "letters"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_order(folder, workers):
    task = load_task("imagenet", "val", size=16, data_root=folder)
    order = [17, 0, 5, 9, 2]
    found = list(batches(task, order, 2, workers))
    assert [len(y) for _, y, _ in found] == [2, 2, 1]
    assert torch.cat([index for _, _, index in found]).tolist() == order
    assert found[0][0].dtype == torch.uint8
