"""tasks/splits.py: which images are adapted on and which evaluated on, whatever the splits are called."""
import pytest
from PIL import Image
from writers import write_shards

from tasks.task import load_task


def write_classes(folder, value, classes=("cat", "dog")):
    """folder/<class>/x.png, all of one grey `value`: of which split they are, the pixels tell."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), value).save(folder / name / "x.png")


def greys(name, split, **more):
    """The greys of a task's images, its class names, what it says of its split."""
    task = load_task(name, split, size=8, **more)
    return {int(x[0, 0, 0]) for x, _, _ in task.images}, task.class_names, task.split


@pytest.mark.parametrize("names,evaluated,split", [
    (("train", "valid"), 1, "val"), (("train", "val", "test"), 1, "val"),
    (("train", "valid", "test"), 1, "val"),
    (("Training", "VALIDATION"), 1, "val"), (("TRAIN", "Dev", "Testing"), 1, "val"),
    (("train", "test"), 1, "test"), (("training", "testing"), 1, "test"),
    (("train_set", "test_set"), 1, "test"), (("train2017", "val2017"), 1, "val"),
    (("Train Images", "Test-Data"), 1, "test"), (("trn", "eval"), 1, "val"), (("train ", "val "), 1, "val")])
def test_the_usual_names_of_splits_are_no_classes(tmp_path, names, evaluated, split):
    for value, name in enumerate(names):
        write_classes(tmp_path / name, value)
    # what is there beside them and holds no images
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.xml").write_text("<a/>")
    (tmp_path / "classes.txt").write_text("cat")
    write_classes(tmp_path / "__MACOSX", 9)
    assert greys(f"folder:{tmp_path}", "val") == ({evaluated}, ["cat", "dog"], split)
    assert greys(f"folder:{tmp_path}", "train") == ({0}, ["cat", "dog"], "train")


def test_what_is_not_split_can_be_evaluated_on_alone(tmp_path):
    write_classes(tmp_path / "all", 7, ("attrain", "cat", "validate"))
    write_classes(tmp_path / "set" / "train", 8)
    write_classes(tmp_path / "tests" / "testing", 9)
    assert greys(f"folder:{tmp_path / 'all'}", "val") == ({7}, ["attrain", "cat", "validate"], "all")
    # a split's own folder was asked for
    assert greys(f"folder:{tmp_path / 'set' / 'train'}", "val") == ({8}, ["cat", "dog"], "train")
    assert greys(f"folder:{tmp_path / 'tests'}", "val") == ({9}, ["cat", "dog"], "test")
    assert greys(f"folder:{tmp_path / 'set' / 'train'}", "train") == ({8}, ["cat", "dog"], "train")
    for name, split, said in (("all", "train", "no train images, only unsplit ones"),
                              ("set", "val", "no val or test images, only train"),
                              ("tests", "train", "no train images, only test")):
        with pytest.raises(ValueError, match=f"^{tmp_path / name} has {said}$"):
            load_task(f"folder:{tmp_path / name}", split, size=8)


@pytest.mark.parametrize("names,said", [
    (("train", "val", "validation"), "train/, val/, validation/"),
    (("Train", "train", "val"), "Train/, train/, val/, of which two"),
    (("train", "val", "cat"), "train/, val/, beside what looks like classes, cat/"),
    (("cat", "dog", "train"), "train/, beside what looks like classes, cat/, dog/"),
    (("test", *(f"class{i}" for i in range(9))), "class5/ and 3 more")])
def test_what_cannot_be_told_is_an_error_that_lists_what_is_there(tmp_path, names, said):
    for name in names:
        write_classes(tmp_path / name, 0)
    for split in ("val", "train"):
        with pytest.raises(ValueError) as error:
            load_task(f"folder:{tmp_path}", split, size=8)
        assert said in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_class_called_train_is_one_if_the_class_names_say_so(tmp_path):
    write_classes(tmp_path, 5, ("bus", "train"))
    name = f"folder:{tmp_path}"
    with pytest.raises(ValueError, match="--class-names"):
        load_task(name, "val", size=8)
    words = {name: ({"bus": "bus", "train": "railway train"}, None)}
    assert greys(name, "val", words=words) == ({5}, ["bus", "railway train"], "all")


def test_splits_inside_classes_are_an_error(tmp_path):
    for name in ("cat", "dog"):
        write_classes(tmp_path / name, 0, ("train", "test"))
    with pytest.raises(ValueError, match="cat/ has test, train in it, names of splits"):
        load_task(f"folder:{tmp_path}", "val", size=8)


def test_imagenet_lies_beside_other_sets(tmp_path):
    """Which are no classes of it, and it is not them."""
    write_classes(tmp_path / "food", 1)
    write_classes(tmp_path / "pets", 1)
    with pytest.raises(ValueError, match="no such folder"):
        load_task("imagenet", "val", size=8, data_root=tmp_path)
    for value, split in enumerate(("training", "Validation", "test")):
        write_classes(tmp_path / split, value, ("n01440764", "n01443537"))
    assert greys("imagenet", "val", data_root=tmp_path) == ({1}, ["tench", "goldfish"], "val")
    assert greys("imagenet", "train", data_root=tmp_path) == ({0}, ["tench", "goldfish"], "train")


def test_splits_of_shards(tmp_path):
    """In folders of any usual name, or in the names of the tars; labels tell which were read."""
    write_shards(tmp_path / "mine", [0, 0], ["cat", "dog"])
    (tmp_path / "mine" / "test").rename(tmp_path / "mine" / "Training")

    def labels(split, path=tmp_path / "mine"):
        task = load_task(f"wds:{path}", split, size=8)
        return [y for _, y, _ in task.images], task.split
    assert labels("train") == ([0, 0], "train")
    with pytest.raises(ValueError, match="no val or test images, only train"):
        labels("val")
    write_shards(tmp_path / "mine", [1, 1], ["cat", "dog"])
    assert labels("val") == ([1, 1], "test")
    write_shards(tmp_path / "other", [0, 1], ["cat", "dog"])
    (tmp_path / "other" / "test").rename(tmp_path / "mine" / "valid")
    assert labels("val") == ([0, 1], "val")
    # all in one folder
    flat = tmp_path / "flat"
    for split, new in (("Training", "x-train-0.tar"), ("valid", "x-validation-0.tar")):
        flat.mkdir(exist_ok=True)
        (tmp_path / "mine" / split / "0.tar").rename(flat / new)
    (flat / "classnames.txt").write_text("cat\ndog\n")
    assert labels("train", flat) == ([0, 0], "train") and labels("val", flat) == ([0, 1], "val")
    (tmp_path / "mine" / "test" / "0.tar").rename(flat / "more.tar")
    with pytest.raises(ValueError, match="x-train-0.tar, of a split by its name, beside other shards"):
        labels("val", flat)
    # in the folder of another
    (flat / "x-train-0.tar").rename(tmp_path / "mine" / "valid" / "train-0.tar")
    with pytest.raises(ValueError, match="valid holds train-0.tar, of another split by its name"):
        labels("val")
