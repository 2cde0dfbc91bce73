"""Tiny-ImageNet, ImageNet-A, -R, -Sketch and -V2 in the layouts that they are published in.

Their classes are among ImageNet's 1,000, so that one list (imagenet_classes.txt) names them all. A set's head
has its own classes alone: 200 of Tiny-ImageNet, -A and -R, as in the literature, else 1,000."""
import os

from tasks.class_names import class_rows, imagenet_class_names
from tasks.images import files_under, is_image

# ImageNet-Sketch's archive unpacks to sketch/, which many put elsewhere
FOLDERS = {"tiny-imagenet": ("tiny-imagenet-200",), "imagenet-r": ("imagenet-r",),
           "imagenet-a": ("imagenet-a",),
           "imagenet-sketch": ("sketch", *(f"imagenet-sketch{end}" for end in ("/sketch", "/images", ""))),
           "imagenet-v2": ("imagenetv2-matched-frequency-format-val",)}


def folders_of(name):
    """The folders (WordNet ids) of ImageNet's classes that a set has, sorted: the order of its labels. Of
    Tiny-ImageNet its own wnids.txt says them."""
    some = [folder for folder, *sets in class_rows("imagenet_subsets.txt") if name in sets]
    return some or [*imagenet_class_names()]


def lines_of(path):
    """The lines of a text file, of which there may be none."""
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def in_folders(root, labels):
    """(file, label) pairs of the images in root/<folder>, at any depth, as torchvision's ImageFolder sorts
    them. labels: {folder: label}. OSError: a folder is not there."""
    return [(file, label) for folder, label in labels.items() for file in files_under(root / folder)
            if is_image(file)]


def tiny_imagenet(root, split):
    """(pairs, folders of the classes) of tiny-imagenet-200/. Its val/ is as it comes, val/images/ with
    val_annotations.txt, or sorted into val/<class>/ since; either way by class, then by file name."""
    folders = sorted(lines_of(root / "wnids.txt"))
    labels = {folder: label for label, folder in enumerate(folders)}
    if split == "train":
        return in_folders(root / "train", labels), folders
    annotations, images = root / "val" / "val_annotations.txt", root / "val" / "images"
    rows = [line.split("\t")[:2] for line in lines_of(annotations)] if annotations.is_file() else []
    if any((root / "val" / folder).is_dir() for folder in folders):
        pairs = in_folders(root / "val", labels)
        if rows and len(pairs) != len(rows):            # a script that was stopped on its way
            raise ValueError(f"val/ has {len(pairs):,} images in folders of classes, val_annotations.txt has "
                             f"{len(rows):,}")
        return pairs, folders
    strange = [folder for _, folder in rows if folder not in labels]
    missing = {file for file, _ in rows} - {*os.listdir(images)}
    if strange or missing or not rows:
        raise ValueError(f"{strange[0]} of val_annotations.txt is not in wnids.txt" if strange else
                         f"val/images/ lacks {len(missing):,} files of val_annotations.txt, "
                         f"{min(missing)}" if missing else "no val/val_annotations.txt")
    rows = sorted((labels[folder], file) for file, folder in rows)
    return [(str(images / file), label) for label, file in rows], folders


def open_imagenet(name, split, root):
    """(pairs, folders of the classes) of one of FOLDERS that lies in root. OSError or ValueError."""
    if name == "tiny-imagenet":
        return tiny_imagenet(root, split)
    known, there = folders_of(name), {entry.name for entry in root.iterdir() if entry.is_dir()}
    if name == "imagenet-v2":       # folders 0 … 999 are the numbers of classes; as texts, 10 is before 2
        labels = {str(number): number for number in range(len(known)) if str(number) in there}
    else:
        known = [folder for folder in known if folder in there]
        labels = {folder: label for label, folder in enumerate(known)}
    if not labels:
        raise ValueError(f"no folders like {'0' if name == 'imagenet-v2' else folders_of(name)[0]}/ in it")
    return in_folders(root, labels), known
