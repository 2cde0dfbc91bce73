"""The paper's data sets by name, in the layouts torchvision writes or as clip-benchmark's shards.

Under --data-root a set lies where torchvision's class looks for it (the second column of BENCHMARKS), Hateful Memes as
hateful_memes/{test_seen,test_unseen}.jsonl + img/. Where it does not, the shards of huggingface.co/datasets/clip-benchmark
are looked for under their own name, say wds_cars/. Nothing is downloaded or written, and no image is decoded, on opening.
"""
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import TensorDataset
from torchvision import datasets

from images import Images, Shards, one_line
from prompts import clean_class_name, country_names, imagenet_class_names, openai_templates

TEMPLATE = "This is a photo of a {}"                 # the paper's, without a full stop
TRAIN, TEST = {"split": "train"}, {"split": "test"}


class Benchmark(NamedTuple):
    opener: type                                     # torchvision's class, with (root, **words); None: not one of its own
    folder: str                                      # under --data-root
    train: dict                                      # words for the images to adapt on; None: for evaluation only
    test: dict                                       # words for the images the paper reports on
    template: str
    shards: tuple = ()                               # clip-benchmark's names, without wds_
    source: str = "torchvision"                      # who has it today; "": only the shards


BENCHMARKS = {
    "imagenet": Benchmark(None, "imagenet", {}, {}, TEMPLATE, ("imagenet1k",),
                          "image-net.org, unpacked to train/<class>/ and val/<class>/,"),
    "cifar10": Benchmark(datasets.CIFAR10, "cifar-10-batches-py", {"train": True}, {"train": False}, TEMPLATE,
                         ("vtab-cifar10", "cifar10")),
    "cifar100": Benchmark(datasets.CIFAR100, "cifar-100-python", {"train": True}, {"train": False}, TEMPLATE,
                          ("vtab-cifar100", "cifar100")),
    "stl10": Benchmark(datasets.STL10, "stl10_binary", TRAIN, TEST, TEMPLATE, ("stl10",)),
    "caltech101": Benchmark(datasets.Caltech101, "caltech101/101_ObjectCategories", None, {}, TEMPLATE,
                            ("vtab-caltech101",)),
    "caltech256": Benchmark(datasets.Caltech256, "caltech256/256_ObjectCategories", None, {}, "A photo of a {}."),
    "pets": Benchmark(datasets.OxfordIIITPet, "oxford-iiit-pet", {"split": "trainval"}, TEST,
                      "A photo of a {}, a type of pet.", ("vtab-pets",)),
    "cars": Benchmark(datasets.StanfordCars, "stanford_cars", TRAIN, TEST, "A photo of a {}.", ("cars",), ""),
    "food101": Benchmark(datasets.Food101, "food-101", TRAIN, TEST, "A photo of {}, a type of food.", ("food101",)),
    "flowers102": Benchmark(datasets.Flowers102, "flowers-102", TRAIN, TEST, "A photo of a {}, a type of flower.",
                            ("vtab-flowers",)),
    "aircraft": Benchmark(datasets.FGVCAircraft, "fgvc-aircraft-2013b", {"split": "trainval"}, TEST,
                          "A photo of a {}, a type of aircraft.", ("fgvc_aircraft",)),
    "sun397": Benchmark(datasets.SUN397, "SUN397", None, {}, TEMPLATE, ("sun397",), ""),
    "dtd": Benchmark(datasets.DTD, "dtd/dtd", TRAIN, TEST, "A surface with a {} texture.", ("vtab-dtd",)),
    "eurosat": Benchmark(datasets.EuroSAT, "eurosat/2750", None, {}, "A centered satellite photo of {}.", ("vtab-eurosat",)),
    "pcam": Benchmark(datasets.PCAM, "pcam", TRAIN, TEST, "This is a photo of {}.", ("vtab-pcam",)),
    "hateful-memes": Benchmark(None, "hateful_memes", None, {}, "a {}.", (),
                               "hatefulmemeschallenge.com, or kaggle.com/datasets/parthplc/facebook-hateful-meme-dataset"),
    "country211": Benchmark(datasets.Country211, "country211", TRAIN, TEST, "A photo I took in {}.", ("country211",))}
NATIVE = {"cifar10": 32, "cifar100": 32, "stl10": 96}                        # attacked at the data set's own resolution

# Sets whose prompts are not made of class names: what torchvision, CLIP (hence the shards) and the paper call a class.
OWN_WORDS = {
    "eurosat": (("AnnualCrop", "annual crop land", "annual crop land"), ("Forest", "forest", "a forest"),
                ("HerbaceousVegetation", "brushland or shrubland", "brushland or shrubland"),
                ("Highway", "highway or road", "a highway or a road"),
                ("Industrial", "industrial buildings or commercial buildings", "industrial buildings"),
                ("Pasture", "pasture land", "pasture land"), ("PermanentCrop", "permanent crop land", "permanent crop land"),
                ("Residential", "residential buildings or homes or apartments", "residential buildings"),
                ("River", "river", "a river"), ("SeaLake", "lake or sea", "a sea or a lake")),
    "pcam": (("0", "lymph node", "healthy lymph node tissue"),
             ("1", "lymph node containing metastatic tumor tissue", "lymph node tumor tissue"))}


def _lines(path):
    return [line.strip() for line in path.read_text("utf-8").rstrip().splitlines()] if path.is_file() else []


def open_shards(path, part, size, native=False):
    """(Shards, class names, their own templates) of a folder by clip-benchmark, or of its folder of tars, test/. native: of
    images that have that size.

    ValueError, in one line: no such folder or part, not shards, or some of them missing or damaged.
    """
    path, part = Path(path), "test" if part == "val" else part
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    if not list(path.glob("*.tar")):
        path = path / part
    elif path.name != part and "train" in (part, path.name):
        raise ValueError(f"{path} is not the {part} part")
    tars = sorted(path.glob("*.tar"), key=lambda tar: (len(tar.name), tar.name))         # 9.tar comes before 10.tar
    classes, templates = (next(filter(None, map(_lines, (path.parent / file, path / file))), [])
                          for file in ("classnames.txt", "zeroshot_classification_templates.txt"))
    if not tars or not classes:
        raise ValueError(f"{path} is not clip-benchmark's: no {'classnames.txt beside it' if tars else '*.tar in it'}")
    expected = _lines(path / "nshards.txt")
    if expected and expected != [str(len(tars))]:
        raise ValueError(f"{path} holds {len(tars)} of {expected[0]} shards")
    return Shards(tars, size, native), classes, [line.replace("{c}", "{}") for line in templates if "{c}" in line]


def find(name, data_root, part="val"):
    """Where a set is under data_root: (its folder, False), (its folder of shards, True), or None."""
    root, benchmark = Path(data_root), BENCHMARKS[name]
    if name == "imagenet" and any((root / folder / part).is_dir() for folder in ("imagenet", "")):
        return root, False
    if name != "imagenet" and (root / benchmark.folder).is_dir():
        return root / benchmark.folder, False
    names = [f"wds_{shards}{end}" for shards in benchmark.shards for end in ("", "_test")]
    return next(((root / folder, True) for folder in names if (root / folder).is_dir()), None)


def how_to_get(name, data_root):
    """One line: the commands, or the page, that get a set to where it is looked for under data_root."""
    opener, _, _, words, _, shards, source = BENCHMARKS[name]
    if source == "torchvision":
        words = "".join(f", {key}={value!r}" for key, value in words.items())
        source = f"python -c \"import torchvision.datasets as d; d.{opener.__name__}('{data_root}'{words}, download=True)\""
    hub = [f"hf download clip-benchmark/wds_{called} --repo-type dataset --local-dir {data_root}/wds_{called}"
           for called in shards[:1]]
    return " or: ".join(filter(None, [source, *hub]))


def present(data_root):
    """(names of the sets under data_root, {name: how to get it, in words} of the others), without opening any."""
    there = [name for name in BENCHMARKS if find(name, data_root)]
    return there, {name: f"get it with {how_to_get(name, data_root)}" for name in BENCHMARKS if name not in there}


def _words(name, classes, templates):
    """A set's class names as the paper's prompts, or with templates "openai" CLIP's, need them; always by class."""
    if name in OWN_WORDS:
        known = {alias: row[1 if templates == "openai" else 2] for row in OWN_WORDS[name] for alias in row}
        strange = [c for c in classes if c not in known]
        if strange:
            raise ValueError(f"{name}: {strange[0]!r} is none of its classes")
        return [known[c] for c in classes]
    if name == "imagenet":                           # shards say "rooster" where the paper says "cock", and "missile" twice
        paper = list(imagenet_class_names().values())
        agree = sum(clean_class_name(a) == clean_class_name(b) for a, b in zip(paper, classes))
        return paper if len(classes) == len(paper) and agree > 500 else classes
    rules = {"caltech256": lambda c: c[4:].removesuffix("-101"),                         # 145.motorbikes-101
             "aircraft": lambda c: f"Boeing {c}" if c.startswith("7") else c,            # as the authors do
             "flowers102": lambda c: c.rstrip("?"),                                      # pink-yellow dahlia?
             "country211": lambda c: country_names().get(c, c)}
    return list(map(rules.get(name, str), classes))


def _samples(dataset):
    """The (file, label) pairs of a torchvision set, or the set itself where it is kept in one file."""
    if hasattr(dataset, "y"):                                                            # Caltech
        folder, form = (("101_ObjectCategories", "image_{i:04d}.jpg") if isinstance(dataset, datasets.Caltech101) else
                        ("256_ObjectCategories", "{c:03d}_{i:04d}.jpg"))
        return [(os.path.join(dataset.root, folder, dataset.categories[y], form.format(c=y + 1, i=i)), y)
                for i, y in zip(dataset.index, dataset.y)]
    for pairs in ("samples", "_samples"):
        if hasattr(dataset, pairs):
            return [(file, int(label)) for file, label in getattr(dataset, pairs)]
    files = getattr(dataset, "_image_files", None) or getattr(dataset, "_images", None)
    pairs = [(str(file), label) for file, label in zip(files or (), getattr(dataset, "_labels", ()))]
    return (sorted(pairs) if isinstance(dataset, datasets.SUN397) else pairs) or dataset  # SUN397: in the disk's order


def _memes(folder):
    """(file, label) pairs of Hateful Memes' two test parts."""
    lines = [json.loads(line) for part in ("test_seen", "test_unseen") for line in _lines(folder / f"{part}.jsonl")]
    if not lines:
        raise FileNotFoundError("no test_seen.jsonl and test_unseen.jsonl")
    return [(str(folder / line["img"]), line["label"]) for line in lines]


def _open_files(name, part, data_root, size):
    """(images, class names as the files have them) of a set in torchvision's layout."""
    opener, folder, train, test = BENCHMARKS[name][:4]
    if opener is None:
        return Images(name, _memes(Path(data_root) / folder), size), ["meme", "hatespeech meme"]
    if opener is datasets.STL10:                     # its checksums would read 2.6 GB that nothing here uses
        opener = type("STL10", (opener,), {"_check_integrity": lambda self: True})
    dataset = opener(str(data_root), **(train if part == "train" else test))
    if name in NATIVE:
        images = torch.from_numpy(np.ascontiguousarray(dataset.data))
        images = images.permute(0, 3, 1, 2).contiguous() if images.shape[3] == 3 else images                # [N,3,H,W]
        labels = torch.tensor(dataset.labels if name == "stl10" else dataset.targets, dtype=torch.int64)
        return TensorDataset(images, labels, torch.arange(len(labels))), dataset.classes
    classes = [row[0] for row in OWN_WORDS["pcam"]] if name == "pcam" else getattr(dataset, "classes", None)
    return Images(name, _samples(dataset), size), classes or dataset.categories


def load_benchmark(name, part, *, size, data_root=None, templates="paper"):
    """(images, class names, template, source) of one of BENCHMARKS, or of shards: wds:PATH. part: "train" or "val".

    size: the model's resolution; CIFAR and STL-10 stay at their own. ImageNet's folders are data.py's, its shards are opened
    here. ValueError, in one line: not there (it says how to get it), not whole, or without that part.
    """
    path = Path(name.removeprefix("wds:"))
    if name.startswith("wds:"):
        called = {f"wds_{shards}": known for known, benchmark in BENCHMARKS.items() for shards in benchmark.shards}
        folder = path.parent if path.name in ("train", "test") else path
        name, where = called.get(folder.name.removesuffix("_test"), name), (path, True)
    elif data_root is None:
        raise ValueError(f"{name} needs --data-root DIR with {BENCHMARKS[name].folder}/")
    else:
        where = find(name, data_root)
    if part not in ("train", "val") or part == "train" and where and not where[1] and BENCHMARKS[name].train is None:
        raise ValueError(f"{name} is for evaluation only: it has no images to {'adapt on' if part == 'train' else part}")
    if where is None:
        folders = " or ".join([BENCHMARKS[name].folder, *(f"wds_{shards}" for shards in BENCHMARKS[name].shards)])
        raise ValueError(f"{name} is not under {data_root} as {folders}; get it with: {how_to_get(name, data_root)}")
    own = []
    if where[1]:
        images, classes, own = open_shards(where[0], part, NATIVE.get(name, size), name in NATIVE)
    else:
        try:
            images, classes = _open_files(name, part, data_root, size)
        except Exception as error:                   # torchvision's classes raise what the first missing file makes them
            how = how_to_get(name, data_root)
            raise ValueError(f"{where[0]} is not whole: {one_line(error)}; get it with: {how}") from None
    if not len(images):
        raise ValueError(f"{where[0]} holds no images")
    source = str(where[0])
    if name not in BENCHMARKS:
        return images, classes, (own or openai_templates(name)) if templates == "openai" else TEMPLATE, source
    if where[1] and BENCHMARKS[name].train is None:  # paper: all of it
        source += " (clip-benchmark's test part; the paper takes all images)"
    template = openai_templates(name) if templates == "openai" else BENCHMARKS[name].template
    return images, _words(name, classes, templates), template, source
