"""What the tests here read: data sets of a few images in their real layouts, shards, files that do harm."""
import io
import json
import os
import pickle
import signal
import tarfile

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image

from tasks import benchmarks
from tasks.task import load_task


# An image says what it is: its label in red, its split in blue (0: test), and its upper half is green.
def pixels(label, split="test", height=20, width=28):
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[:height // 2, :, 1] = label % 10 * 25, 200
    image[..., 2] = 0 if split == "test" else 250
    return image


def draw(path, label, split="test", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, split)).save(path, quality=95, **how)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def both(names, labels):
    """(split, its name, number, label) of a small set: every label once to train on, twice to test on."""
    return [(split, name, n, label) for split, name in zip(("train", "test"), names)
            for n, label in enumerate(labels * (2 if split == "test" else 1))]


def write_cifar(folder, meta, key, names, names_key, files):
    folder.mkdir(parents=True)
    with open(folder / meta, "wb") as file:
        pickle.dump({names_key: names}, file)
    for split, name, labels in files:
        rows = np.stack([pixels(label, split, 32, 32).transpose(2, 0, 1).reshape(-1) for label in labels])
        with open(folder / name, "wb") as file:
            pickle.dump({"data": rows, key: labels}, file)


def cifar10(root):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    train = [("train", f"data_batch_{i}", [i, 9]) for i in range(1, 6)]
    write_cifar(root / "cifar-10-batches-py", "batches.meta", "labels", names, "label_names",
                [*train, ("test", "test_batch", [0, 9, 9])])


def cifar100(root):
    names = ["apple", "aquarium_fish", *(f"class_{i}" for i in range(2, 99)), "worm"]
    write_cifar(root / "cifar-100-python", "meta", "fine_labels", names, "fine_label_names",
                [("train", "train", [0, 99]), ("test", "test", [0, 1, 99])])


def stl10(root):
    folder, names = root / "stl10_binary", "airplane bird car cat deer dog horse monkey ship truck".split()
    write(folder / "class_names.txt", "\n".join(names) + "\n")
    for split, labels in (("train", [0, 1]), ("test", [0, 5, 9])):
        # planes of columns, labels from 1
        planes = np.stack([pixels(label, split, 96, 96).transpose(2, 1, 0) for label in labels])
        planes.tofile(folder / f"{split}_X.bin")
        (np.array(labels, np.uint8) + 1).tofile(folder / f"{split}_y.bin")


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
    for split, name, n, label in both(("trainval", "test"), [0, 1, 2]):
        draw(root / "oxford-iiit-pet" / "images" / f"{names[label]}_{split}{n}.jpg", label, split)
        lines[split].append(f"{names[label]}_{split}{n} {label + 1} 1 1")
        write(root / "oxford-iiit-pet" / "annotations" / f"{name}.txt", "\n".join(lines[split]))


def cars(root):
    folder, rows = root / "stanford_cars", {"train": [], "test": []}
    for split, images, n, label in both(("cars_train", "cars_test"), [0, 1, 2]):
        draw(folder / images / f"{n:05d}.jpg", label, split)
        rows[split].append((label + 1, f"{n:05d}.jpg"))
    (folder / "devkit").mkdir()
    kind = [("class", "u1"), ("fname", object)]
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        scipy.io.savemat(folder / file, {"annotations": np.array(rows[split], kind)})
    names = "AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(names, object)})


def food101(root):
    names, lists = ("apple_pie", "hot_dog", "waffles"), {"train": {}, "test": {}}
    # meta/*.json has them in any order
    for split, name, n, label in both(("train", "test"), [2, 0, 1]):
        draw(root / "food-101" / "images" / names[label] / f"{split}{n}.jpg", label, split)
        lists[split].setdefault(names[label], []).append(f"{names[label]}/{split}{n}")
        write(root / "food-101" / "meta" / f"{name}.json", json.dumps(lists[split]))


def flowers(root):
    # of images 1 to 8
    labels = [0, 101, 60, 0, 101, 60, 60, 0]
    splits = {"trnid": [2, 3], "valid": [4], "tstid": [8, 1, 5, 6, 7]}
    for n, label in enumerate(labels, 1):
        split = "test" if n in splits["tstid"] else "train"
        draw(root / "flowers-102" / "jpg" / f"image_{n:05d}.jpg", label, split)
    scipy.io.savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([labels], np.uint8) + 1})
    splits = {key: np.array([ids]) for key, ids in splits.items()}
    scipy.io.savemat(root / "flowers-102" / "setid.mat", splits)


def aircraft(root):
    names, lines = ("707-320", "A300B4", "Yak-42"), {"train": [], "test": []}
    folder = root / "fgvc-aircraft-2013b" / "data"
    write(folder / "variants.txt", "\n".join(names) + "\n")
    for split, name, n, label in both(("trainval", "test"), [0, 1, 2]):
        draw(folder / "images" / f"{split}{n}.jpg", label, split)
        lines[split].append(f"{split}{n} {names[label]}")
        write(folder / f"images_variant_{name}.txt", "\n".join(lines[split]))


def sun397(root):
    names = ("a/abbey", "a/apartment_building/outdoor", "y/youth_hostel")
    write(root / "SUN397" / "ClassName.txt", "".join(f"/{name}\n" for name in names))
    for label, name in enumerate(names):
        for n in "ab":
            draw(root / "SUN397" / name / f"sun_{n}.jpg", label)


def dtd(root):
    names, lines = ("banded", "polka-dotted", "zigzagged"), {"train": [], "test": []}
    folder = root / "dtd" / "dtd"
    for split, name, n, label in both(("train", "test"), [0, 1, 2]):
        draw(folder / "images" / names[label] / f"{names[label]}_{split}{n}.jpg", label, split)
        lines[split].append(f"{names[label]}/{names[label]}_{split}{n}.jpg")
        write(folder / "labels" / f"{name}1.txt", "\n".join(lines[split]))
    # another partition
    write(folder / "labels" / "test2.txt", "\n".join(lines["train"]))


def eurosat(root):
    for label, row in enumerate(benchmarks.OWN_WORDS["eurosat"]):
        for n in (1, 2):
            draw(root / "eurosat" / "2750" / row[0] / f"{row[0]}_{n}.jpg", label)


def pcam(root):
    (root / "pcam").mkdir()
    for split, labels in (("train", [1, 0, 1]), ("test", [0, 1, 1, 0])):
        stem = f"{root}/pcam/camelyonpatch_level_2_split_{split}"
        with h5py.File(f"{stem}_x.h5", "w") as x, h5py.File(f"{stem}_y.h5", "w") as y:
            x["x"] = np.stack([pixels(label, split, 96, 96) for label in labels])
            y["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


def hateful_memes(root):
    files = {"train": [0, 1], "dev_seen": [1], "test_seen": [0, 1], "test_unseen": [1, 0, 0]}
    for name, labels in files.items():
        rows = [{"id": n, "img": f"img/{name}{n}.png", "label": y, "text": "…"} for n, y in enumerate(labels)]
        for row in rows:
            draw(root / "hateful_memes" / row["img"], row["label"], name[:4])
        write(root / "hateful_memes" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def country211(root):
    for split, name, n, label in both(("train", "test"), [0, 1, 2]):
        draw(root / "country211" / name / ("AD", "CH", "XK")[label] / f"{n}.jpg", label, split)


def imagenet(root):
    classes = "n01440764", "n01443537", "n15075141"
    for split, name, n, label in both(("train", "val"), [0, 1, 2]):
        draw(root / "imagenet" / name / classes[label] / f"{n}.JPEG", label, split)


TINY = "n01443537", "n02124075", "n07749582"


def tiny_imagenet(root):
    """Its wnids.txt is in no order, and boxes lie beside the images."""
    folder, lines = root / "tiny-imagenet-200", []
    write(folder / "wnids.txt", "".join(f"{TINY[label]}\n" for label in (1, 2, 0)))
    write(folder / "words.txt", "n00001740\tentity\n")
    for split, name, n, label in both(("train", "val"), [2, 0, 1]):
        if name == "train":
            draw(folder / name / TINY[label] / "images" / f"{TINY[label]}_{n}.JPEG", label, split)
            boxes = f"{TINY[label]}_{n}.JPEG\t0\t0\t9\t9"
            write(folder / name / TINY[label] / f"{TINY[label]}_boxes.txt", boxes)
        else:
            draw(folder / "val" / "images" / f"val_{n}.JPEG", label)
            lines.append(f"val_{n}.JPEG\t{TINY[label]}\t0\t0\t62\t62\n")
    write(folder / "val" / "val_annotations.txt", "".join(lines))


def of_imagenet(folder, classes):
    """A writer of folder/<class>/ with two images each, and what archives hold beside them."""
    def writer(root):
        for label, name in classes.items():
            for n in range(2):
                draw(root / folder / name / f"{n}.JPEG", label)
        write(root / folder / "README.txt", "who made it")
    return writer


imagenet_r = of_imagenet("imagenet-r", {0: "n01443537", 1: "n01484850", 2: "n12267677"})
imagenet_a = of_imagenet("imagenet-a", {0: "n01498041", 1: "n01531178", 2: "n12267677"})
imagenet_sketch = of_imagenet("sketch", {0: "n01440764", 1: "n01443537", 2: "n15075141"})
imagenet_v2 = of_imagenet("imagenetv2-matched-frequency-format-val", {n: str(n) for n in (0, 2, 10, 999)})


# writer, how many to test and train on (None: refused), prompts of the first and last class, attacked at
PHOTO = "This is a photo of a "
SETS = {
    "imagenet": (imagenet, 6, 3, PHOTO + "tench", PHOTO + "toilet tissue", 24),
    "cifar10": (cifar10, 3, 10, PHOTO + "airplane", PHOTO + "truck", 32),
    "cifar100": (cifar100, 3, 2, PHOTO + "apple", PHOTO + "worm", 32),
    "stl10": (stl10, 3, 2, PHOTO + "airplane", PHOTO + "truck", 96),
    "caltech101": (caltech101, 6, 3, PHOTO + "faces", PHOTO + "yin yang", 24),
    "caltech256": (caltech256, 6, 3, "A photo of a ak47.", "A photo of a airplanes.", 24),
    "pets": (pets, 6, 3, "A photo of a abyssinian, a type of pet.",
             "A photo of a yorkshire terrier, a type of pet.", 24),
    "cars": (cars, 6, 3, "A photo of a am general hummer suv 2000.",
             "A photo of a smart fortwo convertible 2012.", 24),
    "food101": (food101, 6, 3, "A photo of apple pie, a type of food.",
                "A photo of waffles, a type of food.", 24),
    "flowers102": (flowers, 5, 2, "A photo of a pink primrose, a type of flower.",
                   "A photo of a blackberry lily, a type of flower.", 24),
    "aircraft": (aircraft, 6, 3, "A photo of a Boeing 707-320, a type of aircraft.",
                 "A photo of a Yak-42, a type of aircraft.", 24),
    "sun397": (sun397, 6, 3, PHOTO + "abbey", PHOTO + "youth hostel", 24),
    "dtd": (dtd, 6, 3, "A surface with a banded texture.", "A surface with a zigzagged texture.", 24),
    "eurosat": (eurosat, 20, 10, "A centered satellite photo of annual crop land.",
                "A centered satellite photo of a sea or a lake.", 24),
    "pcam": (pcam, 4, 3, "This is a photo of healthy lymph node tissue.",
             "This is a photo of lymph node tumor tissue.", 24),
    "hateful-memes": (hateful_memes, 5, 2, "a meme.", "a hatespeech meme.", 24),
    "country211": (country211, 6, 3, "A photo I took in andorra.", "A photo I took in kosovo.", 24),
    "tiny-imagenet": (tiny_imagenet, 6, 3, PHOTO + "goldfish", PHOTO + "lemon", 24),
    "imagenet-r": (imagenet_r, 6, None, PHOTO + "goldfish", PHOTO + "acorn", 24),
    "imagenet-a": (imagenet_a, 6, None, PHOTO + "stingray", PHOTO + "acorn", 24),
    "imagenet-sketch": (imagenet_sketch, 6, None, PHOTO + "tench", PHOTO + "toilet tissue", 24),
    "imagenet-v2": (imagenet_v2, 8, None, PHOTO + "tench", PHOTO + "toilet tissue", 24)}
UNSPLIT = "caltech101", "caltech256", "sun397", "eurosat"


def write_shards(folder, labels, classes, kind="webp", tars=1, size=(40, 30)):
    """As clip-benchmark's builder: KEY.cls and KEY.webp in test/0.tar, 1.tar, …; size: height, width."""
    write(folder / "classnames.txt", "".join(f"{c}\n" for c in classes))
    write(folder / "zeroshot_classification_templates.txt", "a {c}.\nthe {c}.\n")
    write(folder / "test" / "nshards.txt", f"{tars}\n")
    for number in range(tars):
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as tar:
            for i in range(number * len(labels) // tars, (number + 1) * len(labels) // tars):
                image = io.BytesIO()
                Image.fromarray(pixels(labels[i], "test", *size)).save(image, kind, lossless=True)
                for name, content in (("cls", str(labels[i]).encode()), (kind, image.getvalue())):
                    member = tarfile.TarInfo(f"s{i:07d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def png(width=20, height=20, mode="RGB", **how):
    """The bytes of a PNG of noise."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "png", **how)
    return file.getvalue()


def encoded(kind, mode="RGB", size=(60, 40)):
    """The bytes of an image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(file, kind)
    return file.getvalue()


def imagenet_folder(tmp_path):
    """A fixture: train/ and val/ of two of ImageNet's classes and another; every mode that real sets hold."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate(("n01440764", "n02012849", "Hot-Dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for k, (mode, width, height) in enumerate((("RGB", 300, 200), ("L", 60, 90), ("P", 50, 50),
                                                       ("RGBA", 41, 77), ("CMYK", 64, 64), ("1", 9, 9))):
                noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                image = Image.fromarray(noise).convert(mode)
                image.save(tmp_path / split / name / f"{c}{k}.{'jpg' if mode in ('RGB', 'CMYK') else 'png'}")
    return tmp_path


# --------------------------------------------------------------------------------------------- what does harm
def alarm():
    """A fixture: a test that hangs fails, by a signal; pytest.fail is caught by no `except Exception`."""
    usual = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


class Malicious:
    """A pickle that makes the folder `target` when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def bait(tmp_path):
    """A fixture: the folder that a Malicious would make; nothing may."""
    # it would work
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))
    (tmp_path / "executed").rmdir()
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def refused(name, **words):
    """What the error of a task that cannot be had says, in one line."""
    with pytest.raises(ValueError) as error:
        load_task(name, "val", size=8, **words)
    assert str(error.value).isprintable()
    return str(error.value)
