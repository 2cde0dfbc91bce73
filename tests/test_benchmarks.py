"""The paper's data sets, each in a few images in its real layout; shards; images of every mode; ensembles of templates."""
import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT
from PIL import Image
from torchvision.datasets import cifar, flowers102

import benchmarks
import data
from benchmarks import BENCHMARKS, how_to_get, present
from data import batches, load_task, task_names
from images import rgb
from model import load_clip
from prompts import OPENAI_TEMPLATES, clean_class_name, country_names, encode_head, imagenet_class_names, openai_templates


# An image says what it is: its label in red, its part in blue (0 is a test image), and green is its upper half.
def pixels(label, part="test", height=20, width=28):
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[:height // 2, :, 1], image[..., 2] = label % 10 * 25, 200, 0 if part == "test" else 250
    return image


def draw(path, label, part="test", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, part)).save(path, quality=95, **how)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def both(folders, labels):
    """(part, its folder, number, label) of a small set: every label once to train on, twice to test on."""
    return [(part, folder, n, label) for part, folder in zip(("train", "test"), folders)
            for n, label in enumerate(labels * (2 if part == "test" else 1))]


def write_cifar(folder, meta, key, names, names_key, files):
    (folder / "x").parent.mkdir(parents=True)
    with open(folder / meta, "wb") as file:
        pickle.dump({names_key: names}, file)
    for part, name, labels in files:
        rows = np.stack([pixels(label, part, 32, 32).transpose(2, 0, 1).reshape(-1) for label in labels])
        with open(folder / name, "wb") as file:
            pickle.dump({"data": rows, key: labels}, file)


def cifar10(root):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    write_cifar(root / "cifar-10-batches-py", "batches.meta", "labels", names, "label_names",
                [*(("train", f"data_batch_{i}", [i, 9]) for i in range(1, 6)), ("test", "test_batch", [0, 9, 9])])


def cifar100(root):
    names = ["apple", "aquarium_fish", *(f"class_{i}" for i in range(2, 99)), "worm"]
    write_cifar(root / "cifar-100-python", "meta", "fine_labels", names, "fine_label_names",
                [("train", "train", [0, 99]), ("test", "test", [0, 1, 99])])


def stl10(root):
    write(root / "stl10_binary" / "class_names.txt", "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    for part, labels in (("train", [0, 1]), ("test", [0, 5, 9])):                        # planes of columns, labels from 1
        planes = np.stack([pixels(label, part, 96, 96).transpose(2, 1, 0) for label in labels])
        planes.tofile(root / "stl10_binary" / f"{part}_X.bin")
        (np.array(labels, np.uint8) + 1).tofile(root / "stl10_binary" / f"{part}_y.bin")


def caltech101(root):
    folder = root / "caltech101" / "101_ObjectCategories"
    draw(folder / "BACKGROUND_Google" / "image_0001.jpg", 0, "train")
    for label, name in enumerate(("Faces", "accordion", "yin_yang")):
        for n in (1, 2):
            draw(folder / name / f"image_{n:04d}.jpg", label)


def caltech256(root):
    for label, name in enumerate(("001.ak47", "002.american-flag", "003.airplanes-101")):
        folder = root / "caltech256" / "256_ObjectCategories" / name
        draw(folder / f"{name[:3]}_0001.jpg", label)
        draw(folder / f"{name[:3]}_0002.jpg", label)
        write(folder / "RENAME2", "a stray file, as 198.spider has")


def pets(root):
    names, lines = ("Abyssinian", "american_bulldog", "yorkshire_terrier"), {"train": [], "test": []}
    for part, split, n, label in both(("trainval", "test"), [0, 1, 2]):
        draw(root / "oxford-iiit-pet" / "images" / f"{names[label]}_{part}{n}.jpg", label, part)
        lines[part].append(f"{names[label]}_{part}{n} {label + 1} 1 1")
        write(root / "oxford-iiit-pet" / "annotations" / f"{split}.txt", "\n".join(lines[part]))


def cars(root):
    folder, rows = root / "stanford_cars", {"train": [], "test": []}
    for part, images, n, label in both(("cars_train", "cars_test"), [0, 1, 2]):
        draw(folder / images / f"{n:05d}.jpg", label, part)
        rows[part].append((label + 1, f"{n:05d}.jpg"))
    (folder / "devkit").mkdir()
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        scipy.io.savemat(folder / file, {"annotations": np.array(rows[part], [("class", "u1"), ("fname", object)])})
    names = "AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})


def food101(root):
    names, lists = ("apple_pie", "hot_dog", "waffles"), {"train": {}, "test": {}}
    for part, split, n, label in both(("train", "test"), [2, 0, 1]):                     # meta/*.json has them in any order
        draw(root / "food-101" / "images" / names[label] / f"{part}{n}.jpg", label, part)
        lists[part].setdefault(names[label], []).append(f"{names[label]}/{part}{n}")
        write(root / "food-101" / "meta" / f"{split}.json", json.dumps(lists[part]))


def flowers(root):
    labels = [0, 101, 60, 0, 101, 60, 60, 0]                                             # of images 1 to 8
    parts = {"trnid": [2, 3], "valid": [4], "tstid": [8, 1, 5, 6, 7]}
    for n, label in enumerate(labels, 1):
        draw(root / "flowers-102" / "jpg" / f"image_{n:05d}.jpg", label, "test" if n in parts["tstid"] else "train")
    scipy.io.savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([labels], np.uint8) + 1})
    scipy.io.savemat(root / "flowers-102" / "setid.mat", {key: np.array([ids]) for key, ids in parts.items()})


def aircraft(root):
    names, lines, folder = ("707-320", "A300B4", "Yak-42"), {"train": [], "test": []}, root / "fgvc-aircraft-2013b" / "data"
    write(folder / "variants.txt", "\n".join(names) + "\n")
    for part, split, n, label in both(("trainval", "test"), [0, 1, 2]):
        draw(folder / "images" / f"{part}{n}.jpg", label, part)
        lines[part].append(f"{part}{n} {names[label]}")
        write(folder / f"images_variant_{split}.txt", "\n".join(lines[part]))


def sun397(root):
    names = ("a/abbey", "a/apartment_building/outdoor", "y/youth_hostel")
    write(root / "SUN397" / "ClassName.txt", "".join(f"/{name}\n" for name in names))
    for label, name in enumerate(names):
        for n in "ab":
            draw(root / "SUN397" / name / f"sun_{n}.jpg", label)


def dtd(root):
    names, lines, folder = ("banded", "polka-dotted", "zigzagged"), {"train": [], "test": []}, root / "dtd" / "dtd"
    for part, split, n, label in both(("train", "test"), [0, 1, 2]):
        draw(folder / "images" / names[label] / f"{names[label]}_{part}{n}.jpg", label, part)
        lines[part].append(f"{names[label]}/{names[label]}_{part}{n}.jpg")
        write(folder / "labels" / f"{split}1.txt", "\n".join(lines[part]))
    write(folder / "labels" / "test2.txt", "\n".join(lines["train"]))                    # another partition


def eurosat(root):
    for label, row in enumerate(benchmarks.OWN_WORDS["eurosat"]):
        draw(root / "eurosat" / "2750" / row[0] / f"{row[0]}_1.jpg", label)


def pcam(root):
    (root / "pcam").mkdir()
    for part, labels in (("train", [1, 0, 1]), ("test", [0, 1, 1, 0])):
        stem = f"{root}/pcam/camelyonpatch_level_2_split_{part}"
        with h5py.File(f"{stem}_x.h5", "w") as x, h5py.File(f"{stem}_y.h5", "w") as y:
            x["x"] = np.stack([pixels(label, part, 96, 96) for label in labels])
            y["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


def hateful_memes(root):
    for part, labels in (("train", [0, 1]), ("dev_seen", [1]), ("test_seen", [0, 1]), ("test_unseen", [1, 0, 0])):
        for n, label in enumerate(labels):
            draw(root / "hateful_memes" / "img" / f"{part}{n}.png", label, part[:4])
        rows = [{"id": n, "img": f"img/{part}{n}.png", "label": label, "text": "…"} for n, label in enumerate(labels)]
        write(root / "hateful_memes" / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def country211(root):
    for part, split, n, label in both(("train", "test"), [0, 1, 2]):
        draw(root / "country211" / split / ("AD", "CH", "XK")[label] / f"{n}.jpg", label, part)


def imagenet(root):
    for part, split, n, label in both(("train", "val"), [0, 1, 2]):
        draw(root / "imagenet" / split / ("n01440764", "n01443537", "n15075141")[label] / f"{n}.JPEG", label, part)


# writer, how many to test and train on (None: refused), prompts of the first and last class, attacked at
PHOTO = "This is a photo of a "
SETS = {
    "imagenet": (imagenet, 6, 3, PHOTO + "tench", PHOTO + "toilet tissue", 24),
    "cifar10": (cifar10, 3, 10, PHOTO + "airplane", PHOTO + "truck", 32),
    "cifar100": (cifar100, 3, 2, PHOTO + "apple", PHOTO + "worm", 32),
    "stl10": (stl10, 3, 2, PHOTO + "airplane", PHOTO + "truck", 96),
    "caltech101": (caltech101, 6, None, PHOTO + "faces", PHOTO + "yin yang", 24),
    "caltech256": (caltech256, 6, None, "A photo of a ak47.", "A photo of a airplanes.", 24),
    "pets": (pets, 6, 3, "A photo of a abyssinian, a type of pet.", "A photo of a yorkshire terrier, a type of pet.", 24),
    "cars": (cars, 6, 3, "A photo of a am general hummer suv 2000.", "A photo of a smart fortwo convertible 2012.", 24),
    "food101": (food101, 6, 3, "A photo of apple pie, a type of food.", "A photo of waffles, a type of food.", 24),
    "flowers102": (flowers, 5, 2, "A photo of a pink primrose, a type of flower.",
                   "A photo of a blackberry lily, a type of flower.", 24),
    "aircraft": (aircraft, 6, 3, "A photo of a boeing 707 320, a type of aircraft.",
                 "A photo of a yak 42, a type of aircraft.", 24),
    "sun397": (sun397, 6, None, PHOTO + "abbey", PHOTO + "youth hostel", 24),
    "dtd": (dtd, 6, 3, "A surface with a banded texture.", "A surface with a zigzagged texture.", 24),
    "eurosat": (eurosat, 10, None, "A centered satellite photo of annual crop land.",
                "A centered satellite photo of a sea or a lake.", 24),
    "pcam": (pcam, 4, 3, "This is a photo of healthy lymph node tissue.", "This is a photo of lymph node tumor tissue.", 24),
    "hateful-memes": (hateful_memes, 5, None, "a meme.", "a hatespeech meme.", 24),
    "country211": (country211, 6, 3, "A photo I took in andorra.", "A photo I took in kosovo.", 24)}


@pytest.fixture(autouse=True)
def own_files(monkeypatch):
    """torchvision compares the files of CIFAR (pickles: rightly) and Flowers-102 with checksums: ours are others."""
    for module in (cifar, flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def says(x):
    """(label modulo 10, is a test image) that an image says of itself; it stands upright."""
    assert x.dtype == torch.uint8 and x[1, :3].float().mean() > 180 and x[1, -3:].float().mean() < 20
    return round(x[0].float().mean().item() / 25), x[2].float().mean().item() < 100


def files(root):
    return sorted(root.rglob("*"))


@pytest.mark.parametrize("name", SETS)
def test_every_set_in_its_layout(tmp_path, name, monkeypatch):
    writer, count, train_count, first, last, size = SETS[name]
    writer(tmp_path)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *words: pytest.fail("opening a set decodes images"))
        task = load_task(name, "val", size=24, data_root=tmp_path)
    assert task.name == name and len(task.images) == count and present(tmp_path)[0] == [name]
    prompts = [task.template.format(clean_class_name(c)) for c in task.class_names]
    assert (prompts[0], prompts[-1], len(set(prompts))) == (first, last, len(prompts))
    labels = set()
    for i, (x, label, index) in enumerate(task.images):
        assert x.shape == (3, size, size) and says(x) == (label % 10, True) and index == i
        labels.add(task.class_names[label])
    assert {task.class_names[0], task.class_names[-1]} <= labels
    if train_count is None:
        with pytest.raises(ValueError, match="for evaluation only"):
            load_task(name, "train", size=24, data_root=tmp_path)
    else:
        train = load_task(name, "train", size=24, data_root=tmp_path)
        assert len(train.images) == train_count and train.class_names == task.class_names
        assert all(says(x) == (label % 10, False) for x, label, _ in train.images)
    few = load_task(name, "val", size=24, data_root=tmp_path, limit=2)
    assert [int(few.images[i][2]) for i in range(2)] == [0, count // 2]
    assert files(tmp_path) == before                                                     # nothing was written


def test_the_table_is_the_papers_and_country_211():
    assert list(SETS) == list(BENCHMARKS) and len(BENCHMARKS) == 17


def test_words_of_the_prompts(tmp_path):
    for writer in (eurosat, flowers, country211, caltech256):
        writer(tmp_path)
    names = load_task("eurosat", "val", size=8, data_root=tmp_path).class_names
    assert names[3] == "a highway or a road" and names[1] == "a forest" and names[4] == "industrial buildings"
    assert load_task("flowers102", "val", size=8, data_root=tmp_path).class_names[59] == "pink-yellow dahlia"
    assert load_task("country211", "val", size=8, data_root=tmp_path).class_names == ["Andorra", "Switzerland", "Kosovo"]
    assert load_task("caltech256", "val", size=8, data_root=tmp_path).class_names == ["ak47", "american-flag", "airplanes"]
    countries = country_names()
    assert len(countries) == len({clean_class_name(c) for c in countries.values()}) == 211
    assert list(countries) == sorted(countries) and countries["ZW"] == "Zimbabwe"


# ---------------------------------------------------------------------------------------------- what is not there
@pytest.mark.parametrize("name", SETS)
def test_a_missing_set_is_one_line_that_says_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError) as error:
        load_task(name, "val", data_root=tmp_path)
    assert "\n" not in str(error.value) and how_to_get(name, tmp_path) in str(error.value)
    assert str(tmp_path) in str(error.value) and BENCHMARKS[name].folder in str(error.value)
    assert files(tmp_path) == []                                                         # Caltech's classes make folders
    with pytest.raises(ValueError, match="needs --data-root"):
        load_task(name, "val")


def test_how_to_get_names_a_download_that_exists(tmp_path):
    for name, (opener, _, _, _, _, shards, source) in BENCHMARKS.items():
        said = how_to_get(name, "DIR")
        assert source or shards                                                          # no set is without a way
        assert (f"d.{opener.__name__}('DIR'" in said) if source == "torchvision" else (source in said)
        assert not shards or f"clip-benchmark/wds_{shards[0]} " in said
    assert "split='test', download=True" in how_to_get("food101", "DIR")


@pytest.mark.parametrize("name", [name for name in SETS if name != "imagenet"])
def test_a_set_that_is_not_whole_is_one_line(tmp_path, name):
    (tmp_path / BENCHMARKS[name].folder).mkdir(parents=True)
    with pytest.raises(ValueError) as error:
        load_task(name, "val", data_root=tmp_path)
    assert "\n" not in str(error.value) and BENCHMARKS[name].folder in str(error.value)


def test_all_is_what_is_there_but_for_the_one_adapted_on(tmp_path):
    assert task_names("all", "cifar10", tmp_path) == ["cifar10"] == task_names("all", "cifar10")
    for name in ("imagenet", "pets", "stl10", "hateful-memes"):
        SETS[name][0](tmp_path)
    there, missing = present(tmp_path)
    assert there == ["imagenet", "stl10", "pets", "hateful-memes"] and set(missing) == set(SETS) - set(there)
    assert all(how == f"get it with {how_to_get(name, tmp_path)}" and "\n" not in how for name, how in missing.items())
    assert str(tmp_path) in missing["cars"] and str(tmp_path) in missing["caltech256"]
    assert task_names("all", "imagenet", tmp_path) == ["stl10", "pets", "hateful-memes"]
    assert task_names("all", "folder:/x", data_root=tmp_path) == there
    assert task_names("all", "imagenet") == ["imagenet"] and task_names("none", "imagenet", tmp_path) == []
    assert "digits" in task_names("all", "toy", tmp_path) and "pets" not in task_names("all", "toy", tmp_path)
    (tmp_path / "imagenet" / "val").rename(tmp_path / "val")                             # DIR/val is ImageNet's as well
    assert "imagenet" in present(tmp_path)[0]


def test_unknown_words_are_one_line():
    with pytest.raises(ValueError, match="expected .*cifar10.*wds:PATH"):
        load_task("cifar11", "val")
    with pytest.raises(ValueError, match="no such folder: /nowhere$"):
        load_task("folder:/nowhere", "val", data_root="/")
    with pytest.raises(ValueError, match="not many"):
        load_task("toy", "val", templates="many")
    with pytest.raises(ValueError, match="evaluation only"):
        load_task("cifar10", "tune", data_root=ROOT)


# ---------------------------------------------------------------------------------------------- images
def test_every_mode_becomes_the_rgb_it_shows():
    red, clear = Image.new("RGB", (6, 4), (204, 0, 51)), io.BytesIO()
    red.convert("P").save(clear, "png", transparency=bytes(256))                          # PIL warns of those
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (red, red.convert("RGBA"), red.convert("P"), red.convert("CMYK"), Image.open(clear)):
            assert np.array_equal(np.asarray(rgb(image)), np.asarray(red)), image.mode
        for image in (red.convert("L"), red.convert("LA")):
            assert (np.asarray(rgb(image)) == 67).all()
        assert (np.asarray(rgb(Image.new("1", (3, 3), 1))) == 255).all()


@pytest.mark.parametrize("dtype,mode,kind", [(np.uint16, "I;16", "png"), (np.int32, "I", "tiff"), (">u2", "I;16B", "tiff")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype, mode, kind):
    grey = np.linspace(0, 65535, 1024).astype(dtype).reshape(32, 32)
    Image.frombytes(mode, (32, 32), grey.tobytes()).save(tmp_path / f"a.{kind}")
    assert Image.open(tmp_path / f"a.{kind}").mode.startswith("I")
    expected = np.rint(grey / 257).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.array_equal(np.asarray(rgb(tmp_path / f"a.{kind}")), expected)


def test_folders_read_them_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 30), 257 * 77, np.uint16)).save(tmp_path / name / "x.png")
    assert (load_task(f"folder:{tmp_path}", "val", size=8).images[1][0] == 77).all()


def test_the_order_is_not_the_disks(tmp_path, monkeypatch):
    sun397(tmp_path)
    original, orders = Path.rglob, []
    for turn in (1, -1):
        monkeypatch.setattr(Path, "rglob", lambda path, pattern, turn=turn: sorted(original(path, pattern))[::turn])
        orders.append(load_task("sun397", "val", data_root=tmp_path).images)
    assert len(orders[0]) == 6 and all(orders[0].path(i) == orders[1].path(i) for i in range(6))


def test_odd_files_in_a_set(tmp_path):
    """A png and a 16-bit grey one under .jpg names are read (Oxford Pets has such); damaged ones are named."""
    pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    paths = [images / name for name in ("Abyssinian_test0.jpg", "american_bulldog_test1.jpg", "yorkshire_terrier_test2.jpg",
                                        "Abyssinian_test3.jpg", "american_bulldog_test4.jpg")]
    Image.new("RGBA", (30, 30), (10, 20, 30, 0)).save(paths[0], "png")
    Image.fromarray(np.full((30, 30), 257 * 77, np.uint16)).save(paths[1], "png")
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:-200])
    paths[4].unlink()
    task = load_task("pets", "val", size=8, data_root=tmp_path)
    assert task.images[0][0][:, 0, 0].tolist() == [10, 20, 30] and (task.images[1][0] == 77).all()
    for i in (2, 3, 4):
        with pytest.raises(ValueError) as error:
            task.images[i]
        assert str(error.value).startswith(f"cannot decode {paths[i]}: ") and "\n" not in str(error.value)
    assert task.images[5][1] == 2


def test_a_damaged_image_in_one_file_is_named_by_its_number(tmp_path, monkeypatch):
    pcam(tmp_path)
    task = load_task("pcam", "val", size=8, data_root=tmp_path)
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5", "r+") as file:
        del file["x"]
    with pytest.raises(ValueError, match="cannot decode image 2 of pcam: "):
        task.images[2]


# ---------------------------------------------------------------------------------------------- shards
def write_shards(folder, labels, classes, kind="webp", tars=1, part="test", size=(40, 30), templates=("a {c}.", "the {c}.")):
    """As clip-benchmark's builder: KEY.cls and KEY.webp in part/0.tar, 1.tar, …"""
    (folder / part).mkdir(parents=True)
    write(folder / "classnames.txt", "".join(f"{c}\n" for c in classes))
    write(folder / "zeroshot_classification_templates.txt", "".join(f"{t}\n" for t in templates))
    write(folder / part / "nshards.txt", f"{tars}\n")
    for number in range(tars):
        with tarfile.open(folder / part / f"{number}.tar", "w") as tar:
            for i in range(number * len(labels) // tars, (number + 1) * len(labels) // tars):
                image = io.BytesIO()
                Image.fromarray(pixels(labels[i], part, *size)).save(image, kind, lossless=True)
                for name, content in (("cls", str(labels[i]).encode()), (kind, image.getvalue())):
                    member = tarfile.TarInfo(f"s{i:07d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("kind,tars", [("webp", 1), ("png", 12)])
def test_shards_of_any_folder(tmp_path, kind, tars):
    labels = [i % 3 for i in range(24)]
    write_shards(tmp_path / "mine", labels, ["cat", "Hot-Dog", "bird"], kind, tars)
    before = files(tmp_path)
    for path in (tmp_path / "mine", tmp_path / "mine" / "test"):
        task = load_task(f"wds:{path}", "val", size=24)
        assert task.template == PHOTO + "{}" and task.class_names == ["cat", "Hot-Dog", "bird"]
        assert [label for _, label, _ in map(task.images.__getitem__, range(24))] == labels
        assert all(x.shape == (3, 24, 24) and says(x) == (y, True) and isinstance(y, int)
                   for x, y, _ in map(task.images.__getitem__, range(24)))
    assert load_task(f"wds:{path}", "val", size=24, templates="openai").template == ["a {}.", "the {}."]
    assert load_task(f"wds:{path}", "val", size=24, limit=3).images[2][2] == 16
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="not the train part"):
        load_task(f"wds:{path}", "train")


def test_named_sets_from_shards(tmp_path):
    """The paper's template, size and words; found by clip-benchmark's name; torchvision's layout comes first."""
    write_shards(tmp_path / "wds_vtab-cifar10", [0, 9], [*"abcdefghij"], "png", size=(32, 32))
    write_shards(tmp_path / "wds_vtab-pets_test", [0, 1], ["Abyssinian", "American Bulldog"])
    own = [row[1] for row in benchmarks.OWN_WORDS["eurosat"]][::-1]                       # in another order than the paper's
    write_shards(tmp_path / "wds_vtab-eurosat", list(range(10)), own)
    write_shards(tmp_path / "wds_vtab-pcam", [0, 1], ["lymph node", "lymph node containing metastatic tumor tissue"])
    write_shards(tmp_path / "wds_fgvc_aircraft", [0, 1], ["707-320", "A310"])
    write_shards(tmp_path / "wds_cars" / "x", [0], ["a"])
    assert present(tmp_path)[0] == ["cifar10", "pets", "cars", "aircraft", "eurosat", "pcam"]
    cifar = load_task("cifar10", "val", size=24, data_root=tmp_path)
    assert cifar.images[1][0].shape == (3, 32, 32) and cifar.template == PHOTO + "{}"
    assert np.array_equal(cifar.images[1][0].permute(1, 2, 0), pixels(9, "test", 32, 32))                 # untouched
    assert load_task(f"wds:{tmp_path}/wds_vtab-cifar10/test", "val", size=24).images[1][0].shape == (3, 32, 32)
    animals = load_task("pets", "val", size=24, data_root=tmp_path)
    assert animals.template == "A photo of a {}, a type of pet." and animals.images[0][0].shape == (3, 24, 24)
    land = load_task("eurosat", "val", size=24, data_root=tmp_path)
    assert land.class_names[0] == "a sea or a lake" and land.class_names[9] == "annual crop land"         # by class
    assert land.images[0][1] == 0
    assert land.source == f"{tmp_path}/wds_vtab-eurosat (clip-benchmark's test part; the paper takes all images)"
    assert animals.source == f"{tmp_path}/wds_vtab-pets_test"
    assert load_task("eurosat", "val", size=24, data_root=tmp_path, templates="openai").class_names == own
    assert load_task("pcam", "val", size=8, data_root=tmp_path).class_names[1] == "lymph node tumor tissue"
    assert load_task("aircraft", "val", size=8, data_root=tmp_path).class_names == ["Boeing 707-320", "A310"]
    with pytest.raises(ValueError, match=r"wds_cars/test is not clip-benchmark's: no \*.tar"):
        load_task("cars", "val", data_root=tmp_path)
    pets(tmp_path)
    assert len(load_task("pets", "val", size=8, data_root=tmp_path).images) == 6
    write(tmp_path / "wds_vtab-eurosat" / "classnames.txt", "\n".join([*own[:9], "moon"]))
    with pytest.raises(ValueError, match="'moon' is none of its classes"):
        load_task("eurosat", "val", data_root=tmp_path)


def test_imagenet_from_shards_has_the_papers_names(tmp_path):
    paper = list(imagenet_class_names().values())
    write_shards(tmp_path / "wds_imagenet1k", [0, 7], ["tench", *paper[1:7], "rooster", *paper[8:]])
    task = load_task("imagenet", "val", size=24, data_root=tmp_path)
    assert task.class_names == paper and paper[7] == "cock" and len(task.images) == 2
    write(tmp_path / "wds_imagenet1k" / "classnames.txt", "\n".join(reversed(paper)))     # another order: their own
    assert load_task("imagenet", "val", size=24, data_root=tmp_path).class_names[0] == "toilet tissue"
    imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / "val")                                         # each part from where it is
    assert len(load_task("imagenet", "train", size=24, data_root=tmp_path).images) == 3
    assert len(load_task("imagenet", "val", size=24, data_root=tmp_path).images) == 2


def test_damaged_shards_are_one_line_that_names_the_tar(tmp_path):
    folder = write_shards(tmp_path / "mine", [0, 1] * 6, ["cat", "dog"], "png", tars=2)
    path = folder / "test" / "1.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    in_data, at_header = members[-1].offset_data + members[-1].size // 2, members[-2].offset
    header = bytearray(whole)
    header[members[4].offset:members[4].offset + 512] = b"x" * 512
    for content in (whole[:in_data], whole[:at_header], whole[:at_header + 300], bytes(header), b"", b"no tar" * 300):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_task(f"wds:{folder}", "val")
        assert str(error.value).startswith(f"{path} is damaged or cut short: ") and "\n" not in str(error.value)
    path.write_bytes(whole)
    assert len(load_task(f"wds:{folder}", "val").images) == 12
    path.unlink()
    with pytest.raises(ValueError, match="holds 1 of 2 shards"):
        load_task(f"wds:{folder}", "val")


def test_damaged_images_and_labels_in_shards_are_named(tmp_path):
    folder = write_shards(tmp_path / "mine", [0, 1, 2, 1], ["cat", "dog"], "png")
    path = folder / "test" / "0.tar"
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    with open(path, "r+b") as file:
        file.seek(members["s0000001.png"].offset_data)
        file.write(b"no png any more")
        file.seek(members["s0000003.cls"].offset_data)
        file.write(b"x")
    task = load_task(f"wds:{folder}", "val", size=8)
    for i, said in ((1, "cannot identify"), (2, "label 2 of 2 classes"), (3, "invalid literal")):
        with pytest.raises(ValueError, match=said) as error:
            list(batches(task, [i], 1, 0))
        assert str(error.value).startswith(f"cannot decode s000000{i}.png of {path}: ") and "\n" not in str(error.value)
    assert task.images[0][1] == 0
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("s0000009.png"))
    with pytest.raises(ValueError, match=f"{path}: s0000009 is not an image with its label"):
        load_task(f"wds:{folder}", "val")


@pytest.mark.parametrize("spoil,said", [
    (lambda f: os.rename(f, f"{f}2"), "no such folder"), (lambda f: (f / "classnames.txt").unlink(), "no classnames.txt"),
    (lambda f: os.rename(f / "test", f / "elsewhere"), r"no \*.tar")])
def test_what_are_not_shards_is_one_line(tmp_path, spoil, said):
    spoil(write_shards(tmp_path / "mine", [0], ["cat", "dog"]))
    with pytest.raises(ValueError, match=said) as error:
        load_task(f"wds:{tmp_path / 'mine'}", "val")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pcam", "pets", "stl10", "shards"])
def test_workers_read_what_this_process_reads(tmp_path, name):
    if name == "shards":
        task = load_task(f"wds:{write_shards(tmp_path / 'm', [0, 1, 1, 0], ['cat', 'dog'], tars=2)}", "val", size=24)
    else:
        SETS[name][0](tmp_path)
        task = load_task(name, "val", size=24, data_root=tmp_path)
    order = [2, 0, 1]
    alone = [[t.clone() for t in batch] for batch in batches(task, order, 2, 0)]
    for _ in range(2):
        for one, two in zip(alone, batches(task, order, 2, 2), strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, two))
    assert torch.cat([index for _, _, index in alone]).tolist() == order


# ---------------------------------------------------------------------------------------------- templates
def test_an_ensemble_is_the_unit_mean_of_unit_embeddings():
    clip, tokenizer = load_clip("toy", "none")
    names, templates = ["Hot-Dog", "cat", "bird"], ["a photo of a {}.", "the {} on the left", "{}"]
    head = encode_head(clip, tokenizer, names, templates)
    for row, name in zip(head, ("hot dog", "cat", "bird")):
        rows = clip.encode_text(tokenizer([template.replace("{}", name) for template in templates]))
        mean = sum(r / r.norm() for r in rows) / 3
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
        assert not torch.allclose(row, rows.mean(0) / rows.mean(0).norm(), atol=1e-6)
    names = [f"class {i}" for i in range(200)]                                           # one template is as without any
    alone = clip.encode_text(tokenizer([f"the {name} on the left" for name in names])).float()
    for template in (templates[1], templates[1:2]):
        assert torch.equal(encode_head(clip, tokenizer, names, template), torch.nn.functional.normalize(alone, dim=-1))


def test_clips_ensembles(tmp_path):
    counts = {"cifar10": 18, "cifar100": 18, "stl10": 2, "caltech101": 34, "pets": 1, "cars": 8, "food101": 1,
              "flowers102": 1, "aircraft": 2, "sun397": 2, "dtd": 8, "eurosat": 3, "pcam": 1, "hateful-memes": 1,
              "country211": 5}
    assert {name: len(openai_templates(name)) for name in OPENAI_TEMPLATES} == counts
    for name in SETS:
        templates = openai_templates(name)
        assert len(set(templates)) == len(templates) == counts.get(name, 80)
        assert all(t.count("{}") == 1 and "*" not in t and "  " not in t and t.format("x") for t in templates)
    assert {"art of the {}.", "a origami {}.", "the {} in a video game."} <= set(openai_templates("caltech101"))
    assert "a black and white photo of the {}." in openai_templates("cifar10")
    for name in ("cifar10", "eurosat", "imagenet", "caltech256"):
        SETS[name][0](tmp_path)
        assert load_task(name, "val", size=8, data_root=tmp_path, templates="openai").template == openai_templates(name)
    assert load_task("eurosat", "val", data_root=tmp_path, templates="openai").class_names[3] == "highway or road"
    folder = load_task(f"folder:{tmp_path / 'imagenet'}", "val", size=8, templates="openai")
    assert len(folder.template) == 80 and folder.template[0] == "a bad photo of a {}."
    assert load_task("digits", "val", templates="openai").template == load_task("digits", "val").template


def test_a_cache_has_them_too(tmp_path):
    imagenet(tmp_path)
    data.make_cache("imagenet", tmp_path / "c", size=8, data_root=tmp_path)
    assert load_task(f"cache:{tmp_path / 'c'}", "val", size=8).template == PHOTO + "{}"
    assert len(load_task(f"cache:{tmp_path / 'c'}", "val", size=8, templates="openai").template) == 80
