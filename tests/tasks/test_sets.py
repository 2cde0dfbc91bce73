"""Tiny-ImageNet, ImageNet's variants, sets without splits that are adapted on, caches of every set."""
import json
import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from in_process import here
from PIL import Image
from test_benchmarks import own_files
from torchvision import datasets, transforms
from writers import (SETS, TINY, UNSPLIT, caltech101, draw, eurosat, imagenet_r, imagenet_sketch, imagenet_v2,
                     pcam, tiny_imagenet, write, write_shards)

from prompts import clean_class_name
from tasks.benchmarks import BENCHMARKS, OWN_WORDS, find, set_of
from tasks.class_names import imagenet_class_names, own_words
from tasks.contents import differing, fingerprint, known_labels
from tasks.imagenets import folders_of
from tasks.images import Images
from tasks.make_cache import make_cache
from tasks.splits import NoSplit, held_out
from tasks.task import Task, data_set, image_numbers, load_task

__all__ = ["own_files"]                 # a fixture
SHARDED = {"imagenet-r": "wds_imagenet-r", "imagenet-a": "wds_imagenet-a",
           "imagenet-sketch": "wds_imagenet_sketch", "imagenet-v2": "wds_imagenetv2"}


def seen(task):
    """What a task's images are: [(pixels, label, number)]"""
    items = map(task.images.__getitem__, range(len(task.images)))
    return [(x.numpy().tobytes(), int(y), int(i)) for x, y, i in items]


# --------------------------------------------------------------------------------------------- Tiny-ImageNet
def test_tiny_imagenet_is_as_torchvision_reads_its_folders(tmp_path, capsys):
    """Images of 64 pixels, decoded and sorted as ImageFolder does; of boxes nothing is said."""
    folder, rng = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    write(folder / "wnids.txt", "".join(f"{name}\n" for name in reversed(TINY)))
    for name in TINY:
        for n in (0, 1, 2, 10):
            path = folder / "train" / name / "images" / f"{name}_{n}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).convert("L" if n == 2 else "RGB").save(path)
        write(folder / "train" / name / f"{name}_boxes.txt", f"{name}_0.JPEG\t0\t0\t62\t62\n")
    theirs = datasets.ImageFolder(folder / "train", transforms.PILToTensor())
    ours = load_task("tiny-imagenet", "train", size=224, resize="none", data_root=tmp_path)
    assert len(ours.images) == len(theirs) == 12 and ours.split == "train"
    assert all(torch.equal(x, x2) and y == y2 for (x, y, _), (x2, y2) in zip(ours.images, theirs))
    assert ours.class_names == [imagenet_class_names()[c] for c in theirs.classes] == [
        "goldfish", "Egyptian cat", "lemon"]
    assert ours.source == f"{folder} (3 of its 200 classes)" and capsys.readouterr().out == ""


def test_val_is_the_same_once_it_is_sorted_into_folders(tmp_path):
    """By class, and then by name; val/<class>/images/ or val/<class>/, val_annotations.txt left or not."""
    tiny_imagenet(tmp_path)
    val = tmp_path / "tiny-imagenet-200" / "val"
    rows = [line.split("\t")[:2] for line in (val / "val_annotations.txt").read_text().splitlines()]
    task = load_task("tiny-imagenet", "val", size=24, data_root=tmp_path)
    assert task.split == "val" and [os.path.basename(task.images.path(i)) for i in range(6)] == [
        file for _, file in sorted((name, file) for file, name in rows)]
    for inside in ("images", "."):
        for file, name in rows:
            there = next(val.rglob(file))
            (val / name / inside).mkdir(parents=True, exist_ok=True)
            there.rename(val / name / inside / file)
        task = load_task("tiny-imagenet", "val", size=24, data_root=tmp_path)
        assert seen(task) == seen(task_of(rows, val))
    (val / "val_annotations.txt").unlink()
    assert len(load_task("tiny-imagenet", "val", size=24, data_root=tmp_path).images) == 6


def task_of(rows, val):
    """The same images, labelled here: by val_annotations.txt."""
    pairs = sorted((sorted(TINY).index(name), file) for file, name in rows)
    return Task("", Images("", [(str(next(val.rglob(file))), label) for label, file in pairs], 24), [], "")


@pytest.mark.parametrize("spoil,said", [
    (lambda val: (val / "val_annotations.txt").unlink(), "no val/val_annotations.txt"),
    (lambda val: (val / "images" / "val_3.JPEG").unlink(), "val/images/ lacks 1 files .*, val_3.JPEG"),
    (lambda val: write(val / "val_annotations.txt", "val_0.JPEG\tn15075141\t0\n"), "n15075141 of val_annot"),
    (lambda val: [os.renames(val / "images" / f"val_{n}.JPEG", val / TINY[label] / f"val_{n}.JPEG")
                  for n, label in enumerate((2, 0, 1))], "val/ has 3 images in folders .* has 6"),
    (lambda val: (val.parent / "wnids.txt").unlink(), "wnids.txt")])
def test_half_a_tiny_imagenet_is_one_line(tmp_path, spoil, said):
    tiny_imagenet(tmp_path)
    spoil(tmp_path / "tiny-imagenet-200" / "val")
    with pytest.raises(ValueError, match=f"tiny-imagenet-200 is not whole: .*{said}") as error:
        load_task("tiny-imagenet", "val", size=8, data_root=tmp_path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------- variants
def test_the_classes_of_imagenet_a_and_r_are_those_of_their_authors():
    """Their numbers among the 1,000: the first and last, and sums of all, in the code that evaluates them."""
    ids = [*imagenet_class_names()]
    for name, first, last, total in (("imagenet-r", [1, 2, 4, 6, 8], [967, 980, 981, 983, 988], 86135),
                                     ("imagenet-a", [6, 11, 13, 15, 17], [981, 984, 986, 987, 988], 102178)):
        numbers = [ids.index(folder) for folder in folders_of(name)]
        assert len(numbers) == 200 and numbers == sorted(numbers), name
        assert (numbers[:5], numbers[-5:], sum(numbers)) == (first, last, total), name
    assert folders_of("imagenet-sketch") == folders_of("imagenet-v2") == ids


def test_variants_are_for_evaluation_only(tmp_path):
    for name in SHARDED:
        SETS[name][0](tmp_path)
        with pytest.raises(NoSplit, match=f"^{name} is for evaluation only: it has no train images$"):
            load_task(name, "train", size=8, data_root=tmp_path)
        assert load_task(name, "val", size=8, data_root=tmp_path).split == "all"
        write_shards(tmp_path / SHARDED[name], [0, 1], ["a", "b"])
        with pytest.raises(NoSplit, match="for evaluation only"):
            load_task(f"wds:{tmp_path / SHARDED[name]}", "train", size=8)


def test_numbers_of_folders_are_those_of_classes(tmp_path):
    """Not their places in the alphabet, where 10 stands before 2; the head has all thousand classes."""
    imagenet_v2(tmp_path)
    task = load_task("imagenet-v2", "val", size=8, data_root=tmp_path)
    assert task.images.labels.tolist() == [0, 0, 2, 2, 10, 10, 999, 999]
    assert task.class_names == [*imagenet_class_names().values()]
    assert task.class_names[10] == "brambling" and task.source.endswith("-format-val")


def test_a_head_over_a_sets_own_classes(tmp_path):
    """What is not all of a set says so; folders of other classes are not of it."""
    imagenet_r(tmp_path)
    draw(tmp_path / "imagenet-r" / "n01440764" / "0.JPEG", 0)          # tench: not in ImageNet-R
    task = load_task("imagenet-r", "val", size=8, data_root=tmp_path)
    assert task.class_names == ["goldfish", "great white shark", "acorn"] and len(task.images) == 6
    assert task.source == f"{tmp_path}/imagenet-r (3 of its 200 classes)"
    for folder in folders_of("imagenet-r"):
        draw(tmp_path / "imagenet-r" / folder / "0.JPEG", 0)
    task = load_task("imagenet-r", "val", size=8, data_root=tmp_path)
    assert len({*task.class_names}) == 200 and task.source == f"{tmp_path}/imagenet-r"


@pytest.mark.parametrize("folder", ["sketch", "imagenet-sketch", "imagenet-sketch/sketch",
                                    "imagenet-sketch/images"])
def test_imagenet_sketch_wherever_it_was_unpacked(tmp_path, folder):
    imagenet_sketch(tmp_path)
    os.renames(tmp_path / "sketch", tmp_path / folder)
    assert find("imagenet-sketch", tmp_path) == (tmp_path / folder, False)
    assert len(load_task("imagenet-sketch", "val", size=8, data_root=tmp_path).images) == 6


def test_shards_of_the_variants_have_the_same_names(tmp_path):
    """Whatever clip-benchmark calls them: "missile" twice among the thousand."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    ids = [*imagenet_class_names()]
    for name, folder in SHARDED.items():
        theirs = [IMAGENET_CLASSNAMES[ids.index(wnid)] for wnid in folders_of(name)]
        write_shards(tmp_path / folder, [0, len(theirs) - 1], theirs, "png")
        named = load_task(name, "val", size=8, data_root=tmp_path)
        given = load_task(f"wds:{tmp_path / folder}", "val", size=8)
        ours = [imagenet_class_names()[wnid] for wnid in folders_of(name)]
        assert named.class_names == given.class_names == ours != theirs
        assert named.images[1][1] == len(ours) - 1


# --------------------------------------------------------------------------------------------- Caltech-101
def test_caltech101_is_the_same_from_files_and_from_shards(tmp_path):
    """101 classes, in one order, in one set of words; VTAB's background, among its 102, is no class."""
    rows = OWN_WORDS["caltech101"]
    folders = tmp_path / "files" / "caltech101" / "101_ObjectCategories"
    for folder, _, _ in rows:
        draw(folders / folder / "image_0001.jpg", len(folder))
    files = load_task("caltech101", "val", size=8, data_root=tmp_path / "files")
    # tensorflow_datasets' order, whatever the case
    vtab = [row[1] for row in sorted(rows, key=lambda row: row[0].lower())]
    assert vtab[:5] == ["accordion", "airplane", "anchor", "ant", "background"] and len(vtab) == 102
    write_shards(tmp_path / "shards" / "wds_vtab-caltech101", range(102), vtab, "png")
    shards = load_task("caltech101", "val", size=8, data_root=tmp_path / "shards")
    assert len(files.class_names) == 101 and files.class_names[:5] == [
        "Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion"]
    assert sorted(shards.class_names) == sorted(files.class_names) and len(shards.images) == 101
    assert [shards.class_names[shards.images[i][1]] for i in range(101)] == [
        row[2] for row in sorted(rows, key=lambda row: row[0].lower()) if row[1] != "background"]
    # an image says which label its file has: modulo 10
    assert round(shards.images[4][0][0].float().mean().item() / 25) == 5
    assert shards.images.where(4).startswith("s0000005.png of ") and shards.images[4][1] == 4


# --------------------------------------------------------------------------------------------- without splits
def test_every_fifth_image_of_a_class_is_held_out():
    labels = np.random.default_rng(0).integers(0, 7, 200)
    expected = np.zeros(200, bool)
    for label in range(7):
        expected[np.flatnonzero(labels == label)[::5]] = True
    assert held_out(labels.tolist()) == expected.tolist() and held_out([3, 1]) == [True, True]


def many_eurosat(root):
    """Seven images of each class, of another grey each."""
    for row in OWN_WORDS["eurosat"]:
        for n in range(7):
            path = root / "eurosat" / "2750" / row[0] / f"{row[0]}_{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (n, len(row[0]), 0)).save(path)


def test_a_set_without_splits_is_never_evaluated_on_what_it_adapts_on(tmp_path):
    many_eurosat(tmp_path)
    make_cache("eurosat", tmp_path / "c.npy", size=8, data_root=tmp_path)
    for name in ("eurosat", f"cache:{tmp_path / 'c.npy'}"):
        how = {"size": 8, "data_root": tmp_path}
        whole, train = (load_task(name, split, **how) for split in ("val", "train"))
        held = load_task(name, "val", adapted=["eurosat"], **how)
        assert [(len(task.images), task.split) for task in (whole, train, held)] == [
            (70, "all"), (50, "train"), (20, "test")]
        # an image has one number, whatever it is for
        numbers = [{*image_numbers(task)} for task in (whole, train, held)]
        assert not numbers[1] & numbers[2] and numbers[1] | numbers[2] == numbers[0] == {*range(70)}
        assert numbers[2] == {7 * c + n for c in range(10) for n in (0, 5)}
        assert {int(x[0, 0, 0]) for x, _, _ in held.images} == {0, 5}
        assert all(i in numbers[1] for _, _, i in train.images)
        assert "the others were adapted on" in held.source and "held out" in train.source
        few = load_task(name, "val", adapted=["eurosat"], limit=4, **how)
        assert [*image_numbers(few)] == [[*image_numbers(held)][i] for i in (0, 5, 10, 15)]
        assert data_set(few) is few.images.dataset
        assert len(load_task(name, "val", adapted=["dtd"], **how).images) == 70
        assert known_labels(held).tolist() == [int(y) for _, y, _ in held.images]


def test_shards_without_a_split_are_all_evaluated_on(tmp_path):
    """Their own builder's split is not known; they cannot be adapted on."""
    folder = write_shards(tmp_path / "wds_sun397", [0, 1, 1], ["abbey", "river"], "png")
    for path in (folder / "test").iterdir():
        path.rename(folder / path.name)
    (folder / "test").rmdir()
    task = load_task("sun397", "val", size=8, data_root=tmp_path, adapted=["sun397"])
    assert (len(task.images), task.split) == (3, "all")
    with pytest.raises(NoSplit, match="is not the train split"):
        load_task("sun397", "train", size=8, data_root=tmp_path)


def test_one_image_of_each_class_leaves_none_to_adapt_on(tmp_path):
    for row in OWN_WORDS["eurosat"]:
        draw(tmp_path / "eurosat" / "2750" / row[0] / "1.jpg", 0)
    with pytest.raises(ValueError, match="holds no images to adapt on"):
        load_task("eurosat", "train", size=8, data_root=tmp_path)


def test_what_a_name_is_of(tmp_path):
    eurosat(tmp_path)
    make_cache("eurosat", tmp_path / "c", size=8, data_root=tmp_path)
    for name, known in ((f"cache:{tmp_path}/c", "eurosat"), ("wds:/x/wds_vtab-eurosat/test", "eurosat"),
                        ("wds:wds_sun397_test", "sun397"), ("wds:/x/mine", ""), ("cache:/nowhere", ""),
                        ("pets", "pets")):
        assert set_of(name) == known, name


def test_runs_and_evaluations_of_a_set_without_splits(tmp_path):
    """The checkpoint knows what was adapted on, also before --init; so does what evaluates it."""
    many_eurosat(tmp_path)
    tiny_imagenet(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    where = "--pretrained", "none", "--data-root", tmp_path, "--workers", 0
    words = (*where, "--batch-size", 2, "--max-steps", 1, "--eval-steps", 1)
    here("train_tecoa.py", *words, "--dataset", "eurosat", "--tasks", "eurosat,tiny-imagenet", "--out", one)
    results = json.loads((one / "results.json").read_text())
    rows = results["tasks"]
    assert [(row["split"], row["n"]) for row in rows.values()] == [("test", 20), ("val", 6)]
    # Tiny-ImageNet is not in the paper's mean
    assert results["mean"]["clean"] == rows["eurosat"]["clean"] and results["mean"]["tasks"] == 1
    here("train_tecoa.py", *words, "--dataset", "tiny-imagenet", "--tasks", "none", "--init", one / "ckpt.pt",
         "--out", two)
    saved = torch.load(two / "ckpt.pt", weights_only=True)["adapted"]
    assert saved == ["eurosat", "tiny-imagenet"]
    for words, split, count in ((["--ckpt", two / "ckpt.pt"], "test", 20), ([], "all", 70)):
        out = tmp_path / split
        here("eval_zeroshot.py", *where, *words, "--tasks", "eurosat", "--steps", 1, "--out", out)
        row = json.loads((out / "results.json").read_text())["tasks"]["eurosat"]
        assert (row["split"], row["n"]) == (split, count)


# --------------------------------------------------------------------------------------------- caches
@pytest.mark.parametrize("name", SETS)
def test_a_cache_of_every_set_is_the_set(tmp_path, name):
    """Pixels, labels, names, template (also CLIP's), splits and fingerprint, at the same size."""
    SETS[name][0](tmp_path)
    out = tmp_path / "cache" / "c.npy"
    out.parent.mkdir()
    make_cache(name, out, size=16, data_root=tmp_path)
    os.rename(out.parent, tmp_path / "moved")
    cache, how = f"cache:{tmp_path / 'moved' / 'c.npy'}", {"size": 16, "data_root": tmp_path}
    for split in ("val", "train"):
        if split == "train" and SETS[name][2] is None:
            with pytest.raises(NoSplit, match="has no train images, only unsplit ones"):
                load_task(cache, split, size=16)
            continue
        for templates in ("openai", "paper"):
            if (name, templates) == ("caltech101", "openai"):           # whose background is not in the cache
                with pytest.raises(ValueError, match="has the paper's 101 classes, CLIP's list 102"):
                    load_task(cache, split, size=16, templates=templates)
                continue
            plain = load_task(name, split, templates=templates, **how)
            cached = load_task(cache, split, size=16, templates=templates)
            assert (cached.class_names, cached.template, cached.split) == (
                plain.class_names, plain.template, plain.split)
        assert seen(plain) == seen(cached) and plain.images[0][0].shape == cached.images[0][0].shape
        assert differing(cached, fingerprint(plain), fingerprint(cached)) == []
        assert [*image_numbers(cached)] == [*image_numbers(plain)]
        # those of one small size have it whatever the model's, and whatever --resize says
        if name in ("cifar10", "cifar100", "stl10"):
            assert cached.images[0][0].shape[-1] == SETS[name][5]
            assert len(load_task(cache, split, size=224, resize=99).images) == len(plain.images)


def test_caches_of_shards(tmp_path):
    folder = write_shards(tmp_path / "wds_vtab-pets", [0, 2, 1, 1], ["Abyssinian", "beagle", "pug"], "png", 2)
    make_cache("pets", tmp_path / "named", size=8, data_root=tmp_path)
    make_cache(f"wds:{folder}", tmp_path / "given", size=8)
    plain = load_task("pets", "val", size=8, data_root=tmp_path)
    for file in ("named", "given"):
        cached = load_task(f"cache:{tmp_path / file}", "val", size=8)
        assert seen(cached) == seen(plain) and cached.template == "A photo of a {}, a type of pet."
        assert (cached.class_names, cached.split) == (plain.class_names, "test")
    # other tars under the same names
    os.utime(folder / "test" / "1.tar", ns=(1, 1))
    with pytest.raises(ValueError, match="made of other images"):
        make_cache("pets", tmp_path / "named", size=8, data_root=tmp_path)


def test_a_cache_of_images_in_memory_knows_them_again(tmp_path):
    """By their pixels, as they have no files of their own."""
    SETS["cifar10"][0](tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    make_cache("cifar10", tmp_path / "c", data_root=tmp_path)
    make_cache("cifar10", tmp_path / "c", data_root=tmp_path)
    batch = pickle.loads(path.read_bytes())
    batch["data"][2, 1234] ^= 1
    path.write_bytes(pickle.dumps(batch))
    with pytest.raises(ValueError, match="made of other images"):
        make_cache("cifar10", tmp_path / "c", data_root=tmp_path)


def test_what_half_a_download_lacks_is_said(tmp_path, capsys):
    """PCAM's train images are a download of their own."""
    pcam(tmp_path)
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5").unlink()
    make_cache("pcam", tmp_path / "c", size=8, data_root=tmp_path)
    said = capsys.readouterr().out
    assert "left out: " in said and "pcam is not whole" in said and "4 test images" in said
    assert f"d.PCAM('{tmp_path}', split='train', download=True)" in said
    with pytest.raises(ValueError, match="no train images, only test"):
        load_task(f"cache:{tmp_path / 'c'}", "train", size=8)


def test_pcams_labels_need_no_decoding(tmp_path, monkeypatch):
    pcam(tmp_path)
    task = load_task("pcam", "val", size=8, data_root=tmp_path)
    with h5py.File(tmp_path / "pcam" / "camelyonpatch_level_2_split_test_x.h5", "r+") as file:
        del file["x"]
    assert known_labels(task).tolist() == [0, 1, 1, 0]


def test_own_words_in_a_cache(tmp_path):
    """They are what it is opened with; another set of words for the same file is refused."""
    names, templates = tmp_path / "names.txt", tmp_path / "templates.txt"
    names.write_text("".join(f"{row[0]}\tland {n}\n" for n, row in enumerate(OWN_WORDS["eurosat"])))
    templates.write_text("a {}\nthe {}\n")
    eurosat(tmp_path)
    where = {"size": 8, "data_root": tmp_path}
    by_name = own_words(["eurosat"], None, str(templates))
    make_cache("eurosat", tmp_path / "c", words=by_name, **where)
    cached = load_task(f"cache:{tmp_path / 'c'}", "val", size=8)
    assert cached.template == ["a {}", "the {}"] and cached.class_names[1] == "a forest"
    with pytest.raises(ValueError, match="made of these images with another template"):
        make_cache("eurosat", tmp_path / "c", **where)
    # a user's names stay, whose templates ever
    (tmp_path / "list.txt").write_text("".join(f"land {n}\n" for n in range(10)))
    make_cache("eurosat", tmp_path / "n", words=own_words(["eurosat"], str(tmp_path / "list.txt")), **where)
    for how in ("paper", "openai"):
        assert load_task(f"cache:{tmp_path / 'n'}", "val", size=8, templates=how).class_names[3] == "land 3"
    folder = tmp_path / "eurosat" / "2750"
    words = own_words([f"folder:{folder}"], str(names), "land: {}")
    make_cache(f"folder:{folder}", tmp_path / "f", size=8, words=words)
    cached = load_task(f"cache:{tmp_path / 'f'}", "val", size=8)
    assert cached.class_names == [f"land {n}" for n in range(10)] and cached.template == "land: {}"
    assert load_task(f"cache:{tmp_path / 'f'}", "val", size=8, templates="openai").class_names[3] == "land 3"
    with pytest.raises(ValueError, match="with another (template|all class names)"):
        make_cache(f"folder:{folder}", tmp_path / "f", size=8)
    here("data.py", "cache", "--dataset", f"folder:{folder}", "--out", tmp_path / "d", "--size", 8,
         "--workers", 0, "--class-names", names, "--template", "land: {}")
    assert load_task(f"cache:{tmp_path / 'd'}", "val", size=8)[2:4] == cached[2:4]


def test_names_without_repeats_in_every_set(tmp_path):
    assert {*UNSPLIT} == {name for name, row in BENCHMARKS.items() if row.train == "unsplit"}
    caltech101(tmp_path)
    names = load_task("caltech101", "val", size=8, data_root=tmp_path, templates="openai").class_names
    assert names == ["background", "off-center face", "accordion", "yin and yang symbol"]
    for rows in OWN_WORDS.values():
        assert all(len({clean_class_name(row[k]) for row in rows}) == len(rows) for k in range(3))
