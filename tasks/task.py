"""Tasks: a name → images, labels, class names and templates. Names, to train and to evaluate on: `toy:digits`
and its sisters (or just `digits`), `imagenet`, `cifar10` and the others of benchmarks.py, `folder:PATH`,
`wds:PATH`, `cache:FILE`; `all` stands for every task that belongs to the model."""
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from prompts import openai_templates
from tasks.benchmarks import (BENCHMARKS, TEMPLATE, UNSPLIT, _words, find, how_to_get, load_benchmark,
                              present, set_of, template_of)
from tasks.cache import Cache
from tasks.class_names import imagenet_class_names, named, openai_names
from tasks.images import Folder, holds_images
from tasks.protocols import DEFAULT, PROTOCOLS, resized
from tasks.splits import NoSplit, held_out, split_of, splits_in, taken
from toy import world

TOY_TRAIN, TOY_TEST = 16384, 400     # images drawn to adapt on, and per task to evaluate on
TOY_ADAPTED = "seen"                 # the one toy task to adapt on; the others are zero-shot


class Task(NamedTuple):
    name: str
    images: Dataset              # item i: (uint8 [3,H,W], label, its number in the data set)
    class_names: list
    template: str                # or a list of them, an ensemble
    source: str = ""             # where a set that is not drawn was found
    split: str = "all"           # train, val, test, or all: of a set that is not split


def image_root(name, data_root):
    """The folder that `imagenet` or `folder:PATH` stands for."""
    if name != "imagenet":
        return Path(name.removeprefix("folder:"))
    if data_root is None:
        raise ValueError("imagenet needs --data-root DIR with train/<class>/ and val/<class>/")
    root = Path(data_root)
    return root / "imagenet" if (root / "imagenet").is_dir() else root


def split_folder(name, split, data_root=None, classes=()):
    """(the folder of <class>/<image> of `imagenet` or `folder:PATH` that holds a split, the split's name).
    classes: see `splits_in`. ValueError, in one line: there is none, or it cannot be told."""
    root = image_root(name, data_root)
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    # beside ImageNet's there may be any other set, under --data-root
    splits = splits_in(root, holds_images if name != "imagenet" else lambda folder: False, classes)
    if name == "imagenet" and "all" in splits:
        raise NoSplit(f"no such folder: {root / split}")
    if "all" in splits and split == split_of(root.name) == "train":      # a split's own folder
        return root, split
    part = taken(splits, split, root)
    return splits[part], split_of(root.name) or part if part == "all" else part


def without_training_images(task, split, name, adapted):
    """A Task of a published set that comes without splits, of which all images are evaluated on, as the part
    that is adapted on; or, for split "val" and if the set is among those adapted on, as what that leaves."""
    if task.split != "all" or getattr(BENCHMARKS.get(name), "train", None) != UNSPLIT:
        return task
    labels = getattr(task.images, "labels", None)       # shards in one folder: nobody knows their split
    if labels is None or split != "train" and name not in adapted:
        return task
    held = held_out(labels.tolist())
    numbers = [number for number, out in enumerate(held) if out != (split == "train")]
    if not numbers:
        raise ValueError(f"{task.source} holds no images to adapt on: one of each class is held out")
    part, which = ("train", "every fifth image of a class is held out") if split == "train" else (
        "test", "every fifth image of a class; the others were adapted on")
    return task._replace(images=Subset(task.images, numbers), split=part, source=f"{task.source} ({which})")


def limited(task, limit):
    """The task with at most so many of its images, evenly spread."""
    numbers, n = image_numbers(task), len(task.images)
    return task if limit >= n else task._replace(
        images=Subset(data_set(task), [numbers[i * n // limit] for i in range(limit)]))


def worded(task, known, templates, protocol):
    """The task of a set `known` in the words of a protocol: of files and caches with CLIP's ("openai"), and
    with the protocol's photo for the paper's usual prompt. What a cache was told by a user stays."""
    images = task.images
    if isinstance(images, Cache) and known and not images.retold:
        if known == "caltech101" and templates == "openai":
            raise ValueError(f"{task.name} has the paper's 101 classes, CLIP's list 102: for CLIP's names "
                             "take caltech101 itself")
        task = task._replace(template=template_of(known, templates, protocol))
    elif templates == "openai" and isinstance(images, Folder | Cache):
        task = task._replace(template=openai_templates(known))
    if templates == "openai" and isinstance(images, Folder | Cache) and not getattr(images, "renamed", ""):
        called = getattr(images, "own_names", getattr(images, "classes", task.class_names))
        names = _words(known, called, templates) if known in BENCHMARKS else openai_names(task.name, called)
        task = task._replace(class_names=names)
    return task._replace(template=PROTOCOLS[protocol].photo) if task.template == TEMPLATE else task


def load_task(name, split, *, size=224, data_root=None, limit=None, templates=None, resize=None,
              interpolation=None, protocol=DEFAULT, words=(), adapted=()):
    """One Task. split: "train" (to adapt on), "val" (to evaluate on), "tune" (to choose by; the toy world's).
    size: the model's resolution in pixels, for images of no fixed one. limit: at most so many images, evenly
    spread over the set; toy sets are drawn that small. protocol: one of PROTOCOLS, of which the next three
    are if they are None. templates: the "paper"'s, or "openai": CLIP's ensemble and class names for the set,
    if it is not a toy. resize, interpolation: of images in files, see `to_pixels`. words: of `own_words`.
    adapted: the sets, of `set_of`, that a model was adapted on: "val" has none of the images that it saw.
    ValueError, in one line: not there, or with fewer than two classes."""
    rules = PROTOCOLS[protocol]
    templates, interpolation = templates or rules.templates, interpolation or rules.interpolation
    if templates not in ("paper", "openai"):
        raise ValueError(f"templates are paper or openai, not {templates}")
    toy = TOY_ADAPTED if name == "toy" else name.removeprefix("toy:")
    found = find(name, data_root, split) if name == "imagenet" and data_root is not None else None
    classes, template = dict(words).get(name, (None, None))
    if toy == "scans" and split != "val":
        raise ValueError("scans are for evaluation only: all of its images are reported on")
    if toy in world.TASKS:
        count = TOY_TRAIN if split == "train" else TOY_TEST
        part = "test" if split == "val" else split
        images, labels = world.task(toy, part, min(count, limit or count))
        images = TensorDataset(images, labels, torch.arange(len(labels)))
        task = Task(toy, images, *world.TASKS[toy], split=part)
    elif name.startswith("folder:") or name == "imagenet" and not (found and found[1]):
        try:
            path, part = split_folder(name, split, data_root, classes if isinstance(classes, dict) else ())
            folder = Folder(path, None if resize == "none" else size,
                            resized(protocol, name, size, resize), interpolation)
            called = [imagenet_class_names().get(c, c) for c in folder.classes]
            task = Task(name, folder, called, TEMPLATE, str(path), part)
        except ValueError as error:
            if name != "imagenet" or data_root is None or found:
                raise
            raise type(error)(f"{error}; get it with: {how_to_get(name, data_root)}") from None
    elif name.startswith("wds:") or name in BENCHMARKS:
        task = Task(name, *load_benchmark(
            name, split, size=size, resize=resize, interpolation=interpolation, protocol=protocol,
            data_root=data_root, templates=templates, classes=classes if isinstance(classes, list) else None))
    elif name.startswith("cache:"):
        images = Cache(name.removeprefix("cache:"), split, size,
                       resized(protocol, set_of(name) or name, size, resize), interpolation)
        task = Task(name, images, images.class_names, images.template, images.path, images.split)
    else:
        known = ", ".join((*world.TASKS, *BENCHMARKS))
        raise ValueError(f"unknown task {name!r}: expected {known}, folder:PATH, wds:PATH or cache:FILE")
    known = task.images.set if isinstance(task.images, Cache) else set_of(name)
    if toy not in world.TASKS:
        task = worded(task, known, templates, protocol)
    if classes is not None:
        called = getattr(task.images, "classes", task.class_names)
        task = task._replace(class_names=named(called, classes, name))
    task = task._replace(template=template or task.template)
    task = without_training_images(task, split, known, adapted)
    if len(task.class_names) < 2:
        raise ValueError(f"{name} has only one class ({task.class_names[0]}): there is nothing to tell apart")
    if limit is None and toy == "scans":                # as many as of the tasks that are drawn
        limit = TOY_TEST
    return task if limit is None else limited(task, limit)


def task_names(words, dataset, data_root=None):
    """The names that `--tasks` means: a comma list, `none`, or `all` = the toy's zero-shot tasks or, for
    another dataset, the sets under data_root but for `dataset` itself; it alone where there are no others."""
    if words == "none":
        return []
    if words == "all":
        toy = dataset.removeprefix("toy:") in (*world.TASKS, "toy")
        names = world.TASKS if toy else present(data_root)[0] if data_root is not None else []
        return [name for name in names if name not in (TOY_ADAPTED, dataset)] or [dataset]
    return list(dict.fromkeys(filter(None, (word.strip() for word in words.split(",")))))


def image_numbers(task):
    """The number of each image in its data set, in the task's order, whatever `limit` left of it."""
    return task.images.indices if isinstance(task.images, Subset) else range(len(task.images))


def data_set(task):
    """The data set that a task's images are from: what a Subset, or `sampling.Relabelled`, was made of."""
    images = task.images
    while hasattr(images, "dataset"):
        images = images.dataset
    return images
