"""Tasks: a name → images, labels, class names and a template. The drawn toy world, ImageNet, any folder of images.

Images are uint8 [3,H,W]; nothing here normalises. Evaluation names: `toy:digits` and its sisters (or just `digits`),
`imagenet`, `folder:PATH`; `all` stands for every task that belongs to the model. Training takes the same names.
"""
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

import toyworld
from prompts import imagenet_class_names

TEMPLATE = "This is a photo of a {}"                 # the paper's, without a full stop
TOY_TRAIN, TOY_TEST = 16384, 400                     # images drawn to adapt on, and per task to evaluate on
TOY_ADAPTED = "seen"                                 # the one toy task to adapt on; the others are zero-shot


class Task(NamedTuple):
    name: str
    images: Dataset                                  # item i: (uint8 [3,H,W], label, i)
    class_names: list
    template: str


class Folder(datasets.ImageFolder):
    """PATH/<class>/<image>, whatever the images' modes: (uint8 [3, size, size], label, index)."""

    def __init__(self, path, size):
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"no such folder: {path}")
        transform = v2.Compose([v2.Resize(round(size * 256 / 224), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size),
                                v2.PILToTensor()])
        try:
            super().__init__(path, transform)        # its loader converts to RGB
        except FileNotFoundError as error:           # no class folders, or one without images
            raise ValueError(f"{path} is not a folder of <class>/<image>: {' '.join(str(error).split())[:200]}") from None

    def __getitem__(self, index):
        return *super().__getitem__(index), index


def _folder_task(name, path, part, size):
    """The Task of a folder's sub-folder `part`; to evaluate on, also that of a folder of classes that is not split."""
    path = Path(path)
    inside = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    whole = part == "val" and not (inside and inside <= {"train", "val", "test"})
    folder = Folder(path if whole else path / part, size)
    known = imagenet_class_names()
    names = [known[c] if re.fullmatch(r"n\d{8}", c) and c in known else c for c in folder.classes]
    return Task(name, folder, names, TEMPLATE)


def load_task(name, part, *, size=224, data_root=None, limit=None):
    """One Task. part: "train" (to adapt on), "val" (to evaluate on) or, in the toy world, also "tune" (to choose by).

    size: the model's resolution in pixels, for images of no fixed one. limit: at most so many images, evenly spread over
    the set; toy sets are drawn that small. Raises ValueError, in one line, for a name, folder or part that is not there
    or holds fewer than two classes.
    """
    toy = name.removeprefix("toy:")
    if name == "toy":
        toy = TOY_ADAPTED
    if toy == "scans" and part != "val":
        raise ValueError("scans are for evaluation only: all of its images are reported on")
    if toy in toyworld.TASKS:
        count = TOY_TRAIN if part == "train" else TOY_TEST
        images, labels = toyworld.task(toy, "test" if part == "val" else part, min(count, limit or count))
        task = Task(toy, TensorDataset(images, labels, torch.arange(len(labels))), *toyworld.TASKS[toy])
    elif name == "imagenet":
        if data_root is None:
            raise ValueError("imagenet needs --data-root DIR with train/<class>/ and val/<class>/")
        root = Path(data_root)
        task = _folder_task(name, root / "imagenet" if (root / "imagenet").is_dir() else root, part, size)
    elif name.startswith("folder:"):
        task = _folder_task(name, name.removeprefix("folder:"), part, size)
    else:
        raise ValueError(f"unknown task {name!r}: expected {', '.join(toyworld.TASKS)}, imagenet or folder:PATH")
    if len(task.class_names) < 2:
        raise ValueError(f"{name} has only one class ({task.class_names[0]}): there is nothing to tell apart")
    if limit is not None and limit < len(task.images):
        chosen = [i * len(task.images) // limit for i in range(limit)]
        task = task._replace(images=Subset(task.images, chosen))
    return task


def task_names(words, dataset):
    """The names that `--tasks` means: a comma list, `none`, or `all` = the toy's zero-shot tasks, or else `dataset`."""
    if words == "none":
        return []
    if words == "all":
        toy = dataset.removeprefix("toy:") in (*toyworld.TASKS, "toy")
        return [name for name in toyworld.TASKS if name not in (TOY_ADAPTED, dataset)] if toy else [dataset]
    return list(dict.fromkeys(filter(None, (word.strip() for word in words.split(",")))))


def on_device(loader, device):
    """A loader's batches on device, as lists. To a GPU they travel beside its work on the batches before."""
    if device.type != "cuda":
        yield from ([tensor.to(device) for tensor in batch] for batch in loader)
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copies):
            batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        work.wait_stream(copies)
        for tensor in batch:
            tensor.record_stream(work)                # its memory is not reused before `work` is done with it
        yield batch


def batches(task, order, batch_size, workers):
    """A DataLoader over the images of `task` in `order` (positions): uint8 [B,3,H,W], labels [B], image numbers [B].

    Workers are forked: they only decode, and any other way of starting them would run the stage script again in each.
    """
    slices = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    in_memory = isinstance(task.images, TensorDataset) or isinstance(getattr(task.images, "dataset", 0), TensorDataset)
    workers = 0 if in_memory else workers
    return DataLoader(task.images, batch_sampler=slices, num_workers=workers, pin_memory=torch.cuda.is_available(),
                      multiprocessing_context="fork" if workers else None)
