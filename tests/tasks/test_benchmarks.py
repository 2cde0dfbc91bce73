"""tasks/benchmarks.py: the paper's data sets, each in its real layout; shards; ensembles of templates."""
import os
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar, flowers102
from writers import (PHOTO, SETS, UNSPLIT, caltech256, country211, eurosat, flowers, imagenet,
                     pcam, pets, pixels, refused, sun397, write, write_shards)

from prompts import clean_class_name, fill, openai_templates
from tasks import benchmarks
from tasks.benchmarks import BENCHMARKS, how_to_get, present
from tasks.class_names import country_names, imagenet_class_names
from tasks.images import Unreadable
from tasks.loading import batches
from tasks.protocols import PROTOCOLS
from tasks.task import load_task, task_names


@pytest.fixture(autouse=True)
def own_files(monkeypatch):
    """torchvision compares CIFAR's and Flowers-102's files with checksums; ours are others."""
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
    prompts = [fill(task.template, c) for c in task.class_names]
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
        # of a set without splits, they are among those evaluated on
        assert all(says(x) == (label % 10, name in UNSPLIT) for x, label, _ in train.images)
    few = load_task(name, "val", size=24, data_root=tmp_path, limit=2)
    assert [int(few.images[i][2]) for i in range(2)] == [0, count // 2]
    # nothing was written
    assert files(tmp_path) == before


def test_the_table_is_the_papers_and_six_more():
    assert list(SETS) == list(BENCHMARKS) and len(BENCHMARKS) == 16 + 6
    assert all({*rules.sets} < {*BENCHMARKS} for rules in PROTOCOLS.values())


def test_words_of_the_prompts(tmp_path):
    for writer in (eurosat, flowers, country211, caltech256):
        writer(tmp_path)

    def names(name):
        return load_task(name, "val", size=8, data_root=tmp_path).class_names
    assert names("eurosat")[1:5:2] == ["a forest", "a highway or a road"]
    assert names("eurosat")[4] == "industrial buildings" and names("flowers102")[59] == "pink-yellow dahlia"
    assert names("country211") == ["Andorra", "Switzerland", "Kosovo"]
    assert names("caltech256") == ["ak47", "american-flag", "airplanes"]
    countries = country_names()
    assert len(countries) == len({clean_class_name(c) for c in countries.values()}) == 211
    assert list(countries) == sorted(countries) and countries["ZW"] == "Zimbabwe"


# --------------------------------------------------------------------------------------------- missing
@pytest.mark.parametrize("name", SETS)
def test_a_missing_set_is_one_line_that_says_how_to_get_it(tmp_path, name):
    with pytest.raises(ValueError) as error:
        load_task(name, "val", data_root=tmp_path)
    assert "\n" not in str(error.value) and how_to_get(name, tmp_path) in str(error.value)
    assert str(tmp_path) in str(error.value) and BENCHMARKS[name].folder in str(error.value)
    # torchvision's Caltech makes folders
    assert files(tmp_path) == []
    with pytest.raises(ValueError, match="needs --data-root"):
        load_task(name, "val")


def test_how_to_get_names_a_download_that_exists(tmp_path):
    for name, (opener, _, _, _, _, shards, source) in BENCHMARKS.items():
        said = how_to_get(name, "DIR")
        # no set is without a way
        assert source or shards
        assert (f"d.{opener}('DIR'" in said) if source == "torchvision" else (source in said)
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
    assert missing == {name: f"get it with {how_to_get(name, tmp_path)}" for name in missing}
    assert "\n" not in "".join(missing.values())
    assert str(tmp_path) in missing["cars"] and str(tmp_path) in missing["caltech256"]
    assert task_names("all", "imagenet", tmp_path) == ["stl10", "pets", "hateful-memes"]
    assert task_names("all", "folder:/x", data_root=tmp_path) == there
    assert task_names("all", "imagenet") == ["imagenet"] and task_names("none", "imagenet", tmp_path) == []
    assert "digits" in task_names("all", "toy", tmp_path) and "pets" not in task_names("all", "toy", tmp_path)
    # DIR/val is ImageNet's as well
    (tmp_path / "imagenet" / "val").rename(tmp_path / "val")
    assert "imagenet" in present(tmp_path)[0]


# --------------------------------------------------------------------------------------------- images
def test_the_order_is_not_the_disks(tmp_path, monkeypatch):
    sun397(tmp_path)
    original, orders = Path.rglob, []
    for turn in (1, -1):
        monkeypatch.setattr(Path, "rglob", lambda path, kind, turn=turn: sorted(original(path, kind))[::turn])
        orders.append(load_task("sun397", "val", data_root=tmp_path).images)
    assert len(orders[0]) == 6 and all(orders[0].path(i) == orders[1].path(i) for i in range(6))


def test_odd_files_in_a_set(tmp_path):
    """PNGs under .jpg names are read, 16-bit grey too (Oxford Pets has such); damaged ones are named."""
    pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    breeds = "Abyssinian", "american_bulldog", "yorkshire_terrier", "Abyssinian", "american_bulldog"
    paths = [images / f"{breed}_test{i}.jpg" for i, breed in enumerate(breeds)]
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


# --------------------------------------------------------------------------------------------- shards
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
    assert load_task(f"wds:{path}", "val", size=24, templates="openai").template == ["a {c}.", "the {c}."]
    assert load_task(f"wds:{path}", "val", size=24, limit=3).images[2][2] == 16
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="not the train split"):
        load_task(f"wds:{path}", "train")


def test_named_sets_from_shards(tmp_path):
    """The paper's template, size and words; by clip-benchmark's names; torchvision's layout comes first."""
    write_shards(tmp_path / "wds_vtab-cifar10", [0, 9], [*"abcdefghij"], "png", size=(32, 32))
    write_shards(tmp_path / "wds_vtab-pets_test", [0, 1], ["Abyssinian", "American Bulldog"])
    # in another order than the paper's
    own = [row[1] for row in benchmarks.OWN_WORDS["eurosat"]][::-1]
    write_shards(tmp_path / "wds_vtab-eurosat", list(range(10)), own)
    write_shards(tmp_path / "wds_vtab-pcam", [0, 1], [row[1] for row in benchmarks.OWN_WORDS["pcam"]])
    write_shards(tmp_path / "wds_fgvc_aircraft", [0, 1], ["707-320", "A310"])
    write_shards(tmp_path / "wds_cars" / "x", [0], ["a"])
    assert present(tmp_path)[0] == ["cifar10", "pets", "cars", "aircraft", "eurosat", "pcam"]
    cifar = load_task("cifar10", "val", size=24, data_root=tmp_path)
    assert cifar.images[1][0].shape == (3, 32, 32) and cifar.template == PHOTO + "{}"
    # untouched
    assert np.array_equal(cifar.images[1][0].permute(1, 2, 0), pixels(9, "test", 32, 32))
    cifar = load_task(f"wds:{tmp_path}/wds_vtab-cifar10/test", "val", size=24)
    assert cifar.images[1][0].shape == (3, 32, 32)
    animals = load_task("pets", "val", size=24, data_root=tmp_path)
    assert animals.template == "A photo of a {}, a type of pet." and animals.images[0][0].shape == (3, 24, 24)
    land = load_task("eurosat", "val", size=24, data_root=tmp_path)
    # by class
    assert land.class_names[0] == "a sea or a lake" and land.class_names[9] == "annual crop land"
    assert land.images[0][1] == 0
    said = "(clip-benchmark's test split; the paper takes all images)"
    assert land.source == f"{tmp_path}/wds_vtab-eurosat {said}"
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
    # another order: their own
    write(tmp_path / "wds_imagenet1k" / "classnames.txt", "\n".join(reversed(paper)))
    assert load_task("imagenet", "val", size=24, data_root=tmp_path).class_names[0] == "toilet tissue"
    imagenet(tmp_path)
    # each split from where it is
    shutil.rmtree(tmp_path / "imagenet" / "val")
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
    cuts = whole[:in_data], whole[:at_header], whole[:at_header + 300]
    for content in (*cuts, bytes(header), b"", b"no tar" * 300):
        path.write_bytes(content)
        assert refused(f"wds:{folder}").startswith(f"{path} is damaged or cut short: ")
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
    for i, said in ((1, "cannot identify"), (2, "label 2 of 2 classes"), (3, "label 'x' is neither")):
        with pytest.raises(ValueError, match=f"^cannot decode s000000{i}.png of {path}: .*{said}") as error:
            list(batches(task, [i], 1, 0))
        assert "\n" not in str(error.value)
    assert task.images[0][1] == 0
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("s0000009.png"))
    task = load_task(f"wds:{folder}", "val", size=8)
    with pytest.raises(ValueError, match=f"s0000009.png of {path}: s0000009 has 1 images and 0 labels"):
        task.images[4]


@pytest.mark.parametrize("spoil,said", [
    (lambda f: os.rename(f, f"{f}2"), "no such folder"),
    (lambda f: (f / "classnames.txt").unlink(), "no classnames.txt"),
    (lambda f: os.rename(f / "test", f / "elsewhere"), r"no \*.tar")])
def test_what_are_not_shards_is_one_line(tmp_path, spoil, said):
    spoil(write_shards(tmp_path / "mine", [0], ["cat", "dog"]))
    with pytest.raises(ValueError, match=said) as error:
        load_task(f"wds:{tmp_path / 'mine'}", "val")
    assert "\n" not in str(error.value)


def test_native_sets_are_of_one_size(tmp_path):
    write_shards(tmp_path / "wds_cifar10", [0, 1], [*"abcdefghij"], "png", size=(32, 32))
    assert load_task("cifar10", "val", size=8, data_root=tmp_path).images[1][0].shape == (3, 32, 32)
    (tmp_path / "wds_cifar10" / "test").rename(tmp_path / "old")
    write_shards(tmp_path / "wds_cifar10", [0], [*"abcdefghij"], "png", size=(32, 31))
    with pytest.raises(Unreadable, match="31×32 pixels, not 32×32"):
        load_task("cifar10", "val", size=8, data_root=tmp_path).images[0]


# --------------------------------------------------------------------------------------------- templates
def test_clips_templates_are_taken_instead_of_the_papers(tmp_path):
    for name in ("cifar10", "imagenet", "caltech256", "eurosat"):
        SETS[name][0](tmp_path)
        task = load_task(name, "val", size=8, data_root=tmp_path, templates="openai")
        assert task.template == openai_templates(name)
    assert task.class_names[3] == "highway or road"
    folder = load_task(f"folder:{tmp_path / 'imagenet'}", "val", size=8, templates="openai")
    assert len(folder.template) == 80 and folder.template[0] == "a bad photo of a {c}."
    assert load_task("digits", "val", templates="openai").template == load_task("digits", "val").template
