"""The paper's data sets by name, in the layouts torchvision writes or as clip-benchmark's shards.

Under --data-root a set lies where torchvision's class looks for it (the second column of BENCHMARKS), Hateful
Memes as hateful_memes/{test_seen,test_unseen}.jsonl + img/, Tiny-ImageNet and ImageNet's variants as
imagenets.py says, or else as the shards of huggingface.co/datasets/clip-benchmark, say wds_cars/. On opening,
nothing is downloaded or written, and no image decoded."""
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import TensorDataset

from prompts import clean_class_name, openai_templates
from tasks.cache import set_in
from tasks.class_names import class_rows, country_names, imagenet_class_names, openai_names
from tasks.images import Images, Shards, one_line, printable
from tasks.imagenets import FOLDERS, folders_of, open_imagenet
from tasks.protocols import PHOTO as TEMPLATE
from tasks.protocols import DEFAULT, PROTOCOLS, SMALL, resized
from tasks.splits import NoSplit, split_of, splits_in, taken

# words for the images to adapt on, None: for evaluation only; and for those that the paper reports on
UNSPLIT = "unsplit"                                  # adapted on but for those of `tasks.splits.held_out`
CIFAR, ALL, EVALUATION = ({"train": True}, {"train": False}), (UNSPLIT, {}), (None, {})
MEMES = ({"files": ("train",)}, {"files": ("test_seen", "test_unseen")})
BOTH, TRAINVAL = (({"split": split}, {"split": "test"}) for split in ("train", "trainval"))


class Benchmark(NamedTuple):
    opener: str                      # torchvision's class, of (root, **words); "": it has none
    folder: str                      # under --data-root
    train: dict | str | None         # words, see above
    test: dict
    template: str
    shards: tuple = ()               # clip-benchmark's names, without wds_
    source: str = "torchvision"      # who has it today; "": only the shards


HUB = "https://huggingface.co/datasets"
BENCHMARKS = {name: Benchmark(*row) for name, *row in (
    ("imagenet", "", "imagenet", {}, {}, TEMPLATE, ("imagenet1k",),
     "image-net.org, unpacked to train/<class>/ and val/<class>/,"),
    ("cifar10", "CIFAR10", "cifar-10-batches-py", *CIFAR, TEMPLATE, ("vtab-cifar10", "cifar10")),
    ("cifar100", "CIFAR100", "cifar-100-python", *CIFAR, TEMPLATE, ("vtab-cifar100", "cifar100")),
    ("stl10", "STL10", "stl10_binary", *BOTH, TEMPLATE, ("stl10",)),
    ("caltech101", "Caltech101", "caltech101/101_ObjectCategories", *ALL, TEMPLATE, ("vtab-caltech101",)),
    ("caltech256", "Caltech256", "caltech256/256_ObjectCategories", *ALL, "A photo of a {}."),
    ("pets", "OxfordIIITPet", "oxford-iiit-pet", *TRAINVAL, "A photo of a {}, a type of pet.",
     ("vtab-pets",)),
    ("cars", "StanfordCars", "stanford_cars", *BOTH, "A photo of a {}.", ("cars",), ""),
    ("food101", "Food101", "food-101", *BOTH, "A photo of {}, a type of food.", ("food101",)),
    ("flowers102", "Flowers102", "flowers-102", *BOTH, "A photo of a {}, a type of flower.",
     ("vtab-flowers",)),
    ("aircraft", "FGVCAircraft", "fgvc-aircraft-2013b", *TRAINVAL, "A photo of a {c}, a type of aircraft.",
     ("fgvc_aircraft",)),
    ("sun397", "SUN397", "SUN397", *ALL, TEMPLATE, ("sun397",), ""),
    ("dtd", "DTD", "dtd/dtd", *BOTH, "A surface with a {} texture.", ("vtab-dtd",)),
    ("eurosat", "EuroSAT", "eurosat/2750", *ALL, "A centered satellite photo of {}.", ("vtab-eurosat",)),
    ("pcam", "PCAM", "pcam", *BOTH, "This is a photo of {}.", ("vtab-pcam",)),
    ("hateful-memes", "", "hateful_memes", *MEMES, "a {}.", (),
     "hatefulmemeschallenge.com, or kaggle.com/datasets/parthplc/facebook-hateful-meme-dataset"),
    ("country211", "Country211", "country211", *BOTH, "A photo I took in {}.", ("country211",)),
    ("tiny-imagenet", "", FOLDERS["tiny-imagenet"][0], {}, {}, TEMPLATE, (),
     "curl -O http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip -q tiny-imagenet-200.zip -d DIR"),
    ("imagenet-r", "", FOLDERS["imagenet-r"][0], *EVALUATION, TEMPLATE, ("imagenet-r",),
     "curl https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar | tar x -C DIR"),
    ("imagenet-a", "", FOLDERS["imagenet-a"][0], *EVALUATION, TEMPLATE, ("imagenet-a",),
     "curl https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar | tar x -C DIR"),
    ("imagenet-sketch", "", FOLDERS["imagenet-sketch"][0], *EVALUATION, TEMPLATE, ("imagenet_sketch",),
     f"curl -LO {HUB}/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip && unzip -q "
     "ImageNet-Sketch.zip -d DIR"),
    ("imagenet-v2", "", FOLDERS["imagenet-v2"][0], *EVALUATION, TEMPLATE, ("imagenetv2",),
     f"curl -L {HUB}/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz | tar xz -C DIR"))}

# where prompts are not made of class names: rows of what torchvision, CLIP and the paper call a class
OWN_WORDS = {name: class_rows(f"{name}_classes.txt") for name in ("eurosat", "pcam", "caltech101")}
BACKGROUND = "BACKGROUND_Google"         # of Caltech-101: a class in CLIP's list, not in the paper's


def counts(protocol, name):
    """Whether a set counts in a protocol's mean; a folder of one's own and a toy task always do."""
    return name not in BENCHMARKS or name in PROTOCOLS[protocol].sets


def _lines(path):
    return [line.strip() for line in path.read_text("utf-8").rstrip().splitlines()] if path.is_file() else []


def listed_tars(folder):
    """The tars in a folder, 9.tar before 10.tar. ValueError, in one line: some are compressed."""
    files = [file for file in folder.iterdir() if file.name[0] != "."]
    packed = [file for file in files
              if re.search(r"\.(tar\.(gz|bz2|xz|zst|lz4|z|br)|tgz|tbz2?|txz|tzst)$", file.name.lower())]
    if packed:
        raise ValueError(f"{printable(packed[0])} is compressed: unpack it, with gunzip or the like; images "
                         "are read in any order")
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    return sorted(tars, key=lambda tar: (len(tar.name), tar.name))


def split_of_tar(tar):
    """The split that a tar's name says, as x-train-00.tar does; or None."""
    return next(filter(None, map(split_of, re.split("[^A-Za-z]+", tar.name))), None)


def tars_of(path, split):
    """(the folder with a split's tars, they, the split's name) of a folder of shards: of the tars in it, by
    the splits in their names (x-train-00.tar) or in its own; or of its folders test/, train/, …"""
    tars = listed_tars(path)
    if not tars:
        found = splits_in(path, listed_tars)
        part = taken(found, split, path) if "all" not in found else split
        path = found.get(part, path / "test")
        tars = listed_tars(path) if path.is_dir() else []
        strange = [tar for tar in tars if split_of_tar(tar) not in (None, part)]
        if strange and part in found:
            raise ValueError(f"{path} holds {strange[0].name}, of another split by its name")
        return path, tars, part
    of_tar = {tar: split_of_tar(tar) for tar in tars}
    if len({*of_tar.values()}) == 1:
        part = of_tar[tars[0]] or split_of(path.name) or "all"
        if split == "train" != part:
            raise NoSplit(f"{path} is not the train split")
        return path, tars, part
    if None in of_tar.values():
        named = [tar.name for tar in tars if of_tar[tar]]
        raise ValueError(f"{path} holds {named[0]}, of a split by its name, beside other shards: give each "
                         "split a folder of its own")
    part = taken({*of_tar.values()}, split, path)
    return path, [tar for tar in tars if of_tar[tar] == part], part


def open_shards(path, split, size, resize=None, interpolation="bilinear", classes=None):
    """(Shards, class names, their own templates, the split's name) of clip-benchmark's folder, or of its
    folder of tars, test/. size, resize, interpolation: of `Images`; classes: their names, if there is no
    classnames.txt. ValueError, in one line: not there, not shards, some missing or damaged."""
    if not Path(path).is_dir():
        raise ValueError(f"no such folder: {path}")
    path, tars, part = tars_of(Path(path), split)
    own, templates = (next(filter(None, map(_lines, (path.parent / file, path / file))), [])
                      for file in ("classnames.txt", "zeroshot_classification_templates.txt"))
    classes = own or classes
    if not tars or not classes:
        missing = "classnames.txt beside it, and no --class-names" if tars else "*.tar in it"
        raise ValueError(f"{path} is not clip-benchmark's: no {missing}")
    expected = _lines(path / "nshards.txt")
    if expected and expected != [str(len(tars))]:
        raise ValueError(f"{path} holds {len(tars)} of {expected[0]} shards")
    templates = [line for line in templates if "{c}" in line]
    return Shards(tars, size, classes, resize, interpolation), classes, templates, part


def find(name, data_root, split="val"):
    """Where a set is under data_root: (its folder, False), (its folder of shards, True), or None."""
    root, benchmark = Path(data_root), BENCHMARKS[name]
    if name == "imagenet" and any(split_of(entry.name) == split and entry.is_dir() for folder in
                                  (root / "imagenet", root) if folder.is_dir() for entry in folder.iterdir()):
        return root, False
    for folder in FOLDERS.get(name, (benchmark.folder,)):
        if name != "imagenet" and (root / folder).is_dir():
            return root / folder, False
    names = [f"wds_{shards}{end}" for shards in benchmark.shards for end in ("", "_test")]
    return next(((root / folder, True) for folder in names if (root / folder).is_dir()), None)


def how_to_get(name, data_root, split="val"):
    """One line: the commands, or the page, that get a set to where it is looked for under data_root."""
    opener, _, train, words, _, shards, source = BENCHMARKS[name]
    if source == "torchvision":
        words = train if split == "train" and isinstance(train, dict) else words
        words = "".join(f", {key}={value!r}" for key, value in words.items())
        call = f"d.{opener}('{data_root}'{words}, download=True)"
        source = f'python -c "import torchvision.datasets as d; {call}"'
    source = source.replace("DIR", str(data_root))
    hub = [f"hf download clip-benchmark/wds_{called} --repo-type dataset --local-dir {data_root}/wds_{called}"
           for called in shards[:1]]
    return " or: ".join(filter(None, [source, *hub]))


def present(data_root):
    """(names of the sets under data_root, {name: how to get it} of the others), without opening any."""
    there = [name for name in BENCHMARKS if find(name, data_root)]
    others = [name for name in BENCHMARKS if name not in there]
    return there, {name: f"get it with {how_to_get(name, data_root)}" for name in others}


def plain(name):
    return " ".join(name.lower().split())


def _words(name, classes, templates):
    """A set's classes, in its order, in the words that the paper's prompts need, or CLIP's ("openai"); the
    WordNet ids of ImageNet's, wherever they stand, in ImageNet's."""
    if name in OWN_WORDS:
        known = {plain(alias): row[1 if templates == "openai" else 2]
                 for row in OWN_WORDS[name] for alias in row}
        strange = [c for c in classes if plain(c) not in known]
        if strange:
            raise ValueError(f"{name}: {strange[0]!r} is none of its classes")
        return [known[plain(c)] for c in classes]
    if name == "caltech256":                                                    # 145.motorbikes-101
        classes = [c[4:].removesuffix("-101") for c in classes]
    if name == "imagenet" or name in FOLDERS:   # shards say "rooster" where the paper says "cock"
        folders = folders_of(name)
        agree = sum(clean_class_name(imagenet_class_names()[folder]) == clean_class_name(c)
                    for folder, c in zip(folders, classes))
        classes = folders if len(classes) == len(folders) and agree > len(folders) / 2 else classes
    if templates == "openai":
        return openai_names(name, classes)
    rules = {"aircraft": lambda c: f"Boeing {c}" if c.startswith("7") else c,       # as all published code
             "flowers102": lambda c: c.rstrip("?"),                                 # pink-yellow dahlia?
             "country211": lambda c: country_names().get(c, c)}
    return list(map(rules.get(name, lambda c: imagenet_class_names().get(c, c)), classes))


def _samples(dataset):
    """The (file, label) pairs of a torchvision set, or the set itself where it is kept in one file."""
    opener = type(dataset).__name__
    if kind := {"Caltech101": 101, "Caltech256": 256}.get(opener):
        return [(os.path.join(dataset.root, f"{kind}_ObjectCategories", dataset.categories[y],
                              f"{'image' if kind == 101 else f'{y + 1:03d}'}_{i:04d}.jpg"), y)
                for i, y in zip(dataset.index, dataset.y)]
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None) or ()
    pairs = [(str(file), int(label)) for file, label in pairs or zip(files, getattr(dataset, "_labels", ()))]
    return (sorted(pairs) if opener == "SUN397" else pairs) or dataset  # SUN397: in the disk's order


def _open_files(name, split, folder, data_root, how, templates):
    """(images, class names as the files have them) of a set in torchvision's layout or its own, in folder.
    how: the size, resize and interpolation of `Images`."""
    opener, _, train, test = BENCHMARKS[name][:4]
    words = test if split != "train" or train == UNSPLIT else train
    if name in FOLDERS:
        samples, classes = open_imagenet(name, split, folder)
        return Images(name, samples, *how), classes
    if name == "hateful-memes":
        rows = [json.loads(line) for file in words["files"] for line in _lines(folder / f"{file}.jsonl")]
        if not rows:
            raise FileNotFoundError(f"no {' and '.join(f'{file}.jsonl' for file in words['files'])}")
        samples = [(str(folder / row["img"]), row["label"]) for row in rows]
        return Images(name, samples, *how), ["meme", "hatespeech meme"]
    from torchvision import datasets        # here, as it takes more than a second to import
    opener = getattr(datasets, opener)
    if name == "stl10":         # its checksums would read 2.6 GB that nothing here uses
        opener = type("STL10", (opener,), {"_check_integrity": lambda self: True})
    dataset = opener(str(data_root), **words)
    if name in SMALL and how[1] == "none":
        images = torch.from_numpy(np.ascontiguousarray(dataset.data))
        images = images.permute(0, 3, 1, 2).contiguous() if images.shape[3] == 3 else images    # [N,3,H,W]
        labels = torch.tensor(dataset.labels if name == "stl10" else dataset.targets, dtype=torch.int64)
        return TensorDataset(images, labels, torch.arange(len(labels))), dataset.classes
    classes = [row[0] for row in OWN_WORDS["pcam"]] if name == "pcam" else getattr(dataset, "classes", None)
    samples, classes = _samples(dataset), classes or dataset.categories
    if name == "caltech101" and templates == "openai":
        others = sorted(Path(dataset.root, "101_ObjectCategories", BACKGROUND).glob("*.jpg"))
        samples = [*((str(file), 0) for file in others), *((file, label + 1) for file, label in samples)]
        classes = [BACKGROUND, *classes]
    images = Images(name, samples, *how)
    if name == "pcam":          # its labels are in a small file of their own
        paths = [dataset._base_folder / file for file, *_ in dataset._FILES[dataset._split].values()]
        with dataset.h5py.File(paths[1]) as file:
            images.labels, images.containers = np.asarray(file["y"], np.int64).reshape(-1), paths
    return images, classes


def set_of(name):
    """The name in BENCHMARKS of the set that wds:PATH, by its folder's name, or cache:FILE is of; of others
    the name itself; "": it is of none."""
    if name.startswith("wds:"):
        path = Path(name.removeprefix("wds:"))
        folder = path.parent if path.name in ("train", "test") else path
        called = {f"wds_{shards}": known for known, row in BENCHMARKS.items() for shards in row.shards}
        return called.get(folder.name.removesuffix("_test"), "")
    return set_in(name.removeprefix("cache:")) if name.startswith("cache:") else name


def without_background(shards, classes):
    """(shards, class names) of Caltech-101 without the class that torchvision and the paper leave out."""
    names = {plain(alias) for row in OWN_WORDS["caltech101"] if row[0] == BACKGROUND for alias in row}
    number = next((i for i, name in enumerate(classes) if plain(name) in names), None)
    if number is None:
        return shards, classes
    return shards.without(number), [*classes[:number], *classes[number + 1:]]


def template_of(name, templates, protocol, own=()):
    """The prompt of a set, or several. own: those that shards have of their own."""
    template = BENCHMARKS[name].template if name in BENCHMARKS else TEMPLATE
    if templates == "openai":
        template = name not in BENCHMARKS and own or openai_templates(name)
    rules = PROTOCOLS[protocol]
    return rules.words.get(name, template) if templates == rules.templates else template


def load_benchmark(name, split, *, size, data_root=None, templates="paper", resize=None,
                   interpolation="bilinear", protocol=DEFAULT, classes=None):
    """(images, class names, template, source, split) of one of BENCHMARKS, but for ImageNet's folders, or of
    shards, wds:PATH. split: "train" or "val". size, interpolation: of `Images`; resize, protocol: of
    `resized`. classes: of `open_shards`. ValueError, in one line: not there (it says how to get it), not
    whole, or without that split."""
    if name.startswith("wds:"):
        path, are_shards, name = Path(name.removeprefix("wds:")), True, set_of(name) or name
    elif data_root is None:
        raise ValueError(f"{name} needs --data-root DIR with {BENCHMARKS[name].folder}/")
    else:
        path, are_shards = find(name, data_root) or (None, False)
        how = f"get it with: {how_to_get(name, data_root, split)}"
    benchmark, own = BENCHMARKS.get(name, Benchmark("", "", {}, {}, TEMPLATE)), []
    if split not in ("train", "val") or split == "train" and benchmark.train is None:
        raise NoSplit(f"{name} is for evaluation only: it has no {split} images")
    if path is None:
        folders = " or ".join([benchmark.folder, *(f"wds_{shards}" for shards in benchmark.shards)])
        raise ValueError(f"{name} is not under {data_root} as {folders}; {how}")
    part = ("all" if benchmark.train in (None, UNSPLIT) else "train" if split == "train" else
            "val" if name == "tiny-imagenet" else "test")
    resize = resized(protocol, name, size, resize)
    size = SMALL.get(name) if resize == "none" else size
    how_read = size, resize, interpolation
    if are_shards:
        images, classes, own, part = open_shards(path, split, *how_read, classes)
        if name == "caltech101" and templates == "paper":
            images, classes = without_background(images, classes)
    else:
        try:
            images, classes = _open_files(name, split, path, data_root, how_read, templates)
        except Exception as error:      # torchvision's classes raise what the first missing file makes them
            raise ValueError(f"{path} is not whole: {one_line(error)}; {how}") from None
    if not len(images):
        raise ValueError(f"{path} holds no images")
    source, template = str(path), template_of(name, templates, protocol, own)
    if are_shards and benchmark.train == UNSPLIT and split == "val":
        source += " (clip-benchmark's test split; the paper takes all images)"
    whole = 200 if name == "tiny-imagenet" else len(folders_of(name))
    if name in FOLDERS and len(classes) != whole:
        source += f" ({len(classes)} of its {whole:,} classes)"
    images.own_names = classes          # of the classes, as the files have them
    return images, _words(name, classes, templates), template, source, part
