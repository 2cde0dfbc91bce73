"""Tasks: a name → images, labels, class names and templates. Names, to train and to evaluate on: `toy:digits`
and its sisters (or just `digits`), `imagenet`, `cifar10` and the others of benchmarks.py, `folder:PATH`,
`wds:PATH`, `cache:FILE`; `all` stands for every task that belongs to the model."""
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from prompts import openai_templates
from tasks.benchmarks import BENCHMARKS, TEMPLATE, find, how_to_get, load_benchmark, present
from tasks.cache import Cache
from tasks.class_names import imagenet_class_names
from tasks.images import Folder
from toy import world

TOY_TRAIN, TOY_TEST = 16384, 400     # images drawn to adapt on, and per task to evaluate on
TOY_ADAPTED = "seen"                 # the one toy task to adapt on; the others are zero-shot


class Task(NamedTuple):
    name: str
    images: Dataset              # item i: (uint8 [3,H,W], label, its number in the data set)
    class_names: list
    template: str                # or a list of them, an ensemble
    source: str = ""             # where a named set was found


def image_root(name, data_root):
    """The folder that `imagenet` or `folder:PATH` stands for."""
    if name != "imagenet":
        return Path(name.removeprefix("folder:"))
    if data_root is None:
        raise ValueError("imagenet needs --data-root DIR with train/<class>/ and val/<class>/")
    root = Path(data_root)
    return root / "imagenet" if (root / "imagenet").is_dir() else root


def split_folder(root, split):
    """Where a split is: root's sub-folder of that name; for "val", root itself if that is not split."""
    inside = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    is_split = {"train", "val"} <= inside or (inside and inside <= {"train", "val", "test"})
    return root if split == "val" and not is_split else root / split


def load_task(name, split, *, size=224, data_root=None, limit=None, templates="paper"):
    """One Task. split: "train" (to adapt on), "val" (to evaluate on), "tune" (to choose by; the toy world's).
    size: the model's resolution in pixels, for images of no fixed one. limit: at most so many images, evenly
    spread over the set; toy sets are drawn that small. templates: the "paper"'s, or "openai": CLIP's ensemble
    for the set, if it is not a toy. ValueError, in one line: not there, or with fewer than two classes."""
    if templates not in ("paper", "openai"):
        raise ValueError(f"templates are paper or openai, not {templates}")
    toy = TOY_ADAPTED if name == "toy" else name.removeprefix("toy:")
    found = find(name, data_root, split) if name == "imagenet" and data_root is not None else None
    if toy == "scans" and split != "val":
        raise ValueError("scans are for evaluation only: all of its images are reported on")
    if toy in world.TASKS:
        count = TOY_TRAIN if split == "train" else TOY_TEST
        images, labels = world.task(toy, "test" if split == "val" else split, min(count, limit or count))
        task = Task(toy, TensorDataset(images, labels, torch.arange(len(labels))), *world.TASKS[toy])
    elif name.startswith("folder:") or name == "imagenet" and not (found and found[1]):
        try:
            folder = Folder(split_folder(image_root(name, data_root), split), size)
            task = Task(name, folder, [imagenet_class_names().get(c, c) for c in folder.classes], TEMPLATE)
        except ValueError as error:
            if name != "imagenet" or data_root is None or found:
                raise
            raise ValueError(f"{error}; get it with: {how_to_get(name, data_root)}") from None
    elif name.startswith("wds:") or name in BENCHMARKS:
        task = Task(name, *load_benchmark(name, split, size=size, data_root=data_root, templates=templates))
    elif name.startswith("cache:"):
        images = Cache(name.removeprefix("cache:"), split, size)
        task = Task(name, images, images.class_names, images.template)
    else:
        known = ", ".join((*world.TASKS, *BENCHMARKS))
        raise ValueError(f"unknown task {name!r}: expected {known}, folder:PATH, wds:PATH or cache:FILE")
    if templates == "openai" and isinstance(task.images, Folder | Cache):
        task = task._replace(template=openai_templates(name))
    if len(task.class_names) < 2:
        raise ValueError(f"{name} has only one class ({task.class_names[0]}): there is nothing to tell apart")
    if limit is None and toy == "scans":                # as many as of the tasks that are drawn
        limit = TOY_TEST
    if limit is not None and limit < len(task.images):
        n = len(task.images)
        task = task._replace(images=Subset(task.images, [i * n // limit for i in range(limit)]))
    return task


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
