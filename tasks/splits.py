"""Splits: which part of a data set is adapted on, and which is evaluated on."""
import re
from collections import defaultdict
from itertools import count

NAMES = {"train": ("train", "training", "trn"), "val": ("val", "valid", "validation", "dev", "eval"),
         "test": ("test", "testing")}
OF_NAME = {name: split for split, names in NAMES.items() for name in names}
# what may follow: train_images, val2017
MORE = re.compile(r"[ _-]?(set|split|data|images?|imgs?)?[ _-]?(\d{4})?")
FIFTH = 5
# "all": of what is not split, which can be evaluated on and never trained on
TAKEN = {"train": ("train",), "val": ("val", "test", "all")}


class NoSplit(ValueError):
    """A data set is there, and has not the split that was asked for."""


def held_out(labels):
    """bool [n]: which images of a set that comes without splits are kept from a model that adapts on it. Of
    each class the 1st, 6th, 11th, … in the order of the set: a fifth, and one of each class at least.
    labels: int [n]."""
    places = defaultdict(count)
    return [next(places[label]) % FIFTH == 0 for label in labels]


def split_of(name):
    """The split that a folder of this name holds, "train", "val" or "test"; None: it is no split's name."""
    name = name.strip().lower()
    return next((OF_NAME[word] for word in sorted(OF_NAME, key=len, reverse=True)
                 if name.startswith(word) and MORE.fullmatch(name, len(word))), None)


def visible(entry):
    """Whether an entry is a folder that somebody made: hidden ones, and __MACOSX of a Mac's zips, are not."""
    return entry.is_dir() and entry.name[0] != "." and entry.name != "__MACOSX"


def listed(names, most=6):
    """Names in a message: the first few, as folders."""
    return ", ".join(f"{name}/" for name in names[:most]) + f" and {len(names) - most} more" * (
        len(names) > most)


def splits_in(root, holds_images, classes=()):
    """{split: its folder} of the sub-folders of root; {"all": root} if none has a split's name.

    holds_images(folder): whether one that has no split's name could be a class. classes: the names of folders
    that are classes whatever they are called. ValueError, in one line that lists what is there: two folders
    of one split, or splits beside classes."""
    folders = sorted(entry.name for entry in root.iterdir() if visible(entry))
    splits = [name for name in folders if split_of(name) and name not in classes]
    found = {split_of(name): root / name for name in splits}
    others = [name for name in folders if name not in splits and holds_images(root / name)] if splits else ()
    if others:
        raise ValueError(f"{root} holds what looks like splits, {listed(splits)}, beside what looks like "
                         f"classes, {listed(others)}: take one kind away, or say which folders are classes "
                         "in --class-names, one folder<TAB>name a line")
    if len(found) < len(splits):
        raise ValueError(f"{root} holds {listed(splits)}, of which two are the same split: take one away, or "
                         "name the folder that is meant")
    return found or {"all": root}


def taken(splits, split, root):
    """The name of the split, among `splits`, that is evaluated on ("val": val, else test, else what is not
    split) or adapted on ("train"). ValueError, in one line: there is none."""
    name = next((name for name in TAKEN.get(split, (split,)) if name in splits), None)
    if name is None:
        wanted = " or ".join(name for name in TAKEN.get(split, (split,)) if name != "all")
        there = " and ".join("unsplit ones" if name == "all" else name for name in splits)
        raise NoSplit(f"{root} has no {wanted} images, only {there}")
    return name
