"""tasks/protocols.py: each protocol against torchvision's pipelines, as its authors' code strings them."""
import json
import os
import zlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import cifar, flowers102
from writers import aircraft, caltech101, cifar10, flowers, hateful_memes, imagenet, stl10, write_shards

from eval_zeroshot import make_parser
from harness.options import completed, data_options, differences, measured_as, protocol_words
from prompts import fill
from tasks.benchmarks import OWN_WORDS, counts
from tasks.make_cache import make_cache
from tasks.protocols import PROTOCOLS, SHARED
from tasks.task import load_task

BILINEAR, BICUBIC = transforms.InterpolationMode.BILINEAR, transforms.InterpolationMode.BICUBIC
CROP, AS_THEY_ARE = transforms.CenterCrop(224), transforms.Compose([])
# the authors' pipelines, for files, and for CIFAR and STL-10, up to ToTensor()
PEERS = {
    "tecoa": (transforms.Compose([transforms.Resize(256), CROP]), AS_THEY_ARE),
    "fare": (transforms.Compose([transforms.Resize(224, BICUBIC), CROP]), AS_THEY_ARE),
    "tga": (transforms.Compose([transforms.Resize(256), CROP]), transforms.Resize((224, 224))),
    "ttc": (transforms.Compose([transforms.Resize(256), CROP]),) * 2,
    "agft": (transforms.Compose([transforms.Resize(224), CROP]), AS_THEY_ARE)}


@pytest.fixture(autouse=True)
def own_files(monkeypatch):
    """torchvision compares CIFAR's and Flowers-102's files with checksums; ours are others."""
    for module in (cifar, flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)


def photo(width, height, seed=0):
    """An image with edges, gradients and noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * rng.uniform(.01, .9) + y * rng.uniform(.01, .9)) for _ in range(3)]
    noisy = 128 + 70 * np.stack(waves, -1) + 60 * ((x // 7 + y // 11) % 2)[..., None] + rng.normal(0, 12, (
        height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def same(x, image):
    """Whether uint8 pixels [3,H,W] are those that ToTensor() makes of PIL's image, to the bit."""
    return torch.equal(x.float() / 255, transforms.ToTensor()(image))


@pytest.fixture
def photos(tmp_path):
    for split in ("train", "val"):
        for k, size in enumerate(((500, 375), (375, 500), (224, 300), (90, 61), (256, 256), (641, 257))):
            path = tmp_path / "photos" / split / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(*size, seed=k).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_files_are_resized_as_in_the_authors_code(photos, protocol):
    task = load_task(f"folder:{photos}", "val", protocol=protocol)
    for i in range(6):
        assert same(task.images[i][0], PEERS[protocol][0](Image.open(task.images.path(i))))
    # no two protocols that say otherwise are alike
    others = [PEERS[other][0](Image.open(task.images.path(0))) for other in PEERS
              if (PROTOCOLS[other].resize, PROTOCOLS[other].interpolation)
              != (PROTOCOLS[protocol].resize, PROTOCOLS[protocol].interpolation)]
    assert others and not any(same(task.images[0][0], other) for other in others)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_where_cifars_delta_lives(tmp_path, protocol):
    cifar10(tmp_path)
    stl10(tmp_path)
    write_shards(tmp_path / "wds_cifar10", [0, 9], [*"abcdefghij"], "png", size=(32, 32))
    for name, side in (("cifar10", 32), ("stl10", 96)):
        images = load_task(name, "val", data_root=tmp_path, protocol=protocol).images
        plain = load_task(name, "val", data_root=tmp_path).images[1]
        assert plain[0].shape == (3, side, side)                        # the default: at its own size
        expected = PEERS[protocol][1](Image.fromarray(plain[0].permute(1, 2, 0).numpy()))
        x, label, index = images[1]
        assert same(x, expected) and (label, index) == plain[1:] and images.__len__() == 3
    shards = load_task(f"wds:{tmp_path}/wds_cifar10", "val", protocol=protocol).images
    files = load_task("cifar10", "val", data_root=tmp_path, protocol=protocol).images
    assert torch.equal(shards[0][0], files[0][0])


def test_single_options_override_a_protocol(photos):
    x = photo(500, 375)
    name, peer = f"folder:{photos}", transforms.Resize
    for how, expected in (
            ({"resize": 240}, CROP(peer(240)(x))),
            ({"interpolation": "bicubic"}, CROP(peer(256, BICUBIC)(x))),
            ({"resize": "squash"}, peer((224, 224))(x)),
            ({"protocol": "fare", "interpolation": "bilinear"}, CROP(peer(224)(x))),
            ({"protocol": "agft", "resize": 256, "interpolation": "bicubic"}, CROP(peer(256, BICUBIC)(x)))):
        assert same(load_task(name, "val", **how).images[0][0], expected), how


def test_memes_are_squashed_by_the_authors_alone(tmp_path):
    hateful_memes(tmp_path)
    path = tmp_path / "hateful_memes" / "img" / "test_seen0.png"
    photo(300, 200).save(path)
    for protocol in PROTOCOLS:
        expected = transforms.Resize((224, 224)) if protocol == "tecoa" else PEERS[protocol][0]
        task = load_task("hateful-memes", "val", data_root=tmp_path, protocol=protocol)
        assert same(task.images[0][0], expected(Image.open(path)))


# --------------------------------------------------------------------------------------------- words
def prompts(name, root, **how):
    task = load_task(name, "val", size=8, data_root=root, **how)
    templates = [task.template] if isinstance(task.template, str) else task.template
    return [fill(templates[0], c) for c in task.class_names]


def test_prompts_of_the_protocols(tmp_path):
    for writer in (aircraft, caltech101, cifar10, imagenet, flowers):
        writer(tmp_path)
    named = "A photo of a Boeing 707-320, a type of aircraft.", "A photo of a Yak-42, a type of aircraft."
    for protocol in ("tecoa", "tga", "ttc", "agft"):
        assert prompts("aircraft", tmp_path, protocol=protocol)[::2] == [*named]
        stop = "." * (protocol in ("ttc", "agft"))
        assert prompts("cifar10", tmp_path, protocol=protocol)[0] == f"This is a photo of a airplane{stop}"
        assert prompts("imagenet", tmp_path, protocol=protocol)[0] == f"This is a photo of a tench{stop}"
    assert prompts("caltech101", tmp_path, protocol="agft")[0] == "A photo of a faces."
    assert prompts("aircraft", tmp_path, protocol="fare")[::2] == [
        "a photo of a 707-320, a type of aircraft.", "a photo of a Yak-42, a type of aircraft."]
    # --templates has the last word
    assert prompts("aircraft", tmp_path, protocol="fare", templates="paper")[0] == named[0]
    for how in ({"protocol": "fare"}, {"templates": "openai"}):
        names = load_task("imagenet", "val", size=8, data_root=tmp_path, **how).class_names
        assert names == [open_clip.IMAGENET_CLASSNAMES[i] for i in (0, 1, 999)] == ["tench", "goldfish",
                                                                                    "toilet paper"]
        found = prompts("flowers102", tmp_path, **how)
        assert found[1] == "a photo of a hard-leaved pocket orchid, a type of flower."
        assert found[59] == "a photo of a pink and yellow dahlia, a type of flower."


def test_fares_prompts_for_pcam_are_clip_benchmarks(tmp_path):
    write_shards(tmp_path / "wds_vtab-pcam", [0, 1], [row[1] for row in OWN_WORDS["pcam"]])
    assert prompts("pcam", tmp_path, protocol="fare") == [
        "a histopathology slide showing lymph node",
        "a histopathology slide showing lymph node containing metastatic tumor tissue"]
    assert prompts("pcam", tmp_path, templates="openai")[0] == "this is a photo of lymph node"


def test_a_folders_own_names_in_clips_templates_are_english(tmp_path):
    for name in ("Hot-Dog", "yin_yang", "n02012849"):
        path = tmp_path / name / "a.png"
        path.parent.mkdir()
        photo(20, 20).save(path)
    assert load_task(f"folder:{tmp_path}", "val", size=8, templates="openai").class_names == [
        "hot dog", open_clip.IMAGENET_CLASSNAMES[134], "yin yang"]


@pytest.mark.parametrize("templates,classes", [("paper", ["Faces", "accordion", "yin_yang"]),
                                               ("openai", ["background", "off-center face", "accordion",
                                                           "yin and yang symbol"])])
def test_caltech101_is_the_same_from_files_and_from_shards(tmp_path, templates, classes):
    """VTAB's order, CLIP's names, and the background, which is a class in CLIP's list alone."""
    caltech101(tmp_path)
    vtab = ["accordion", "background", "off-center face", "yin and yang symbol"]
    write_shards(tmp_path / "shards" / "wds_vtab-caltech101", [3, 1, 0, 2, 1, 3], vtab, "png")
    files, shards = (load_task("caltech101", "val", size=8, data_root=root, templates=templates)
                     for root in (tmp_path, tmp_path / "shards"))
    assert files.class_names == classes and sorted(shards.class_names) == sorted(classes)
    assert files.template == shards.template
    named = [shards.class_names[label] for _, label, _ in shards.images]
    yin, back = classes[-1], ["background"] * (templates == "openai")
    assert named == [yin, *back, "accordion", shards.class_names[2 - (not back)], *back, yin]
    assert [index for *_, index in shards.images] == [*range(len(named))]
    # an image says its label in red, of the four classes of the shards: it has moved along with it
    reds = [round(x[0].float().mean().item() / 25) for x, _, _ in shards.images]
    assert reds == [label for label in (3, 1, 0, 2, 1, 3) if back or label != 1]
    labels = [label for _, label, _ in files.images]
    assert labels == ([0, 1, 1, 2, 2, 3, 3] if back else [0, 0, 1, 1, 2, 2])


def test_caltech101_has_102_classes_in_clips_list_and_101_in_the_papers():
    rows = OWN_WORDS["caltech101"]
    assert len({folder for folder, *_ in rows}) == len({clip for _, clip, _ in rows}) == len(rows) == 102
    assert rows[0] == ("BACKGROUND_Google", "background", "BACKGROUND_Google")
    some = ("car_side", "side of a car", "car_side"), ("Faces_easy", "centered face", "Faces_easy")
    assert {*some} < {*rows}


# --------------------------------------------------------------------------------------------- means, options
def test_the_sets_that_count():
    """As the authors' lists of sets have them; folders and toy tasks always count."""
    sets = {name: {*rules.sets} for name, rules in PROTOCOLS.items()}
    assert {name: len(some) for name, some in sets.items()} == {"tecoa": 16, "fare": 13, "tga": 16, "ttc": 16,
                                                                "agft": 15}
    assert sets["tecoa"] - {*SHARED} == {"hateful-memes"} and sets["tga"] - {*SHARED} == {"tiny-imagenet"}
    assert sets["ttc"] - {*SHARED} == {"country211"} and sets["agft"] == {*SHARED}
    assert sets["fare"] - {*SHARED} == {"imagenet-r", "imagenet-sketch"} and "imagenet" not in sets["fare"]
    for name in ("digits", "folder:/x", "wds:/x"):
        assert all(counts(protocol, name) for protocol in PROTOCOLS)
    assert [counts(protocol, "country211") for protocol in PROTOCOLS] == [False, False, False, True, False]


def settled(*words):
    parser = make_parser()
    return parser, parser.settle(parser.parse_args(words))


def test_what_a_protocol_sets_and_what_overrides_it():
    real = "--model", "ViT-B-32", "--pretrained", "none"
    attacks = {"tecoa": ("pgd", 100), "fare": ("apgd-ce,apgd-t", 100), "tga": ("pgd", 100),
               "ttc": ("pgd", 10), "agft": ("pgd", 20)}
    for protocol, (attack, steps) in attacks.items():
        parser, args = settled(*real, "--protocol", protocol)
        assert (args.attack, args.steps, args.step_size) == (attack, steps, 1.)
        assert parser.unusual(args) == ["model", "pretrained", *["protocol"] * (protocol != "tecoa")]
        found = json.loads(json.dumps(measured_as(args)))
        assert (found["protocol"], found["attack"], found["steps"]) == (protocol, attack, steps)
        assert found["resize"] == {"fare": 224, "agft": 224}.get(protocol, 256) and found["source"]
        assert protocol_words(args) == f"protocol {protocol}"
    parser, args = settled(*real, "--protocol", "fare", "--steps", "7", "--attack", "cw", "--resize", "230",
                           "--interpolation", "bilinear", "--templates", "paper")
    assert (args.attack, args.steps, args.templates) == ("cw", 7, "paper")
    others = "--resize 230 --interpolation bilinear --templates paper"
    assert protocol_words(args) == f"protocol fare with {others}"
    found = measured_as(args)
    assert (found["resize"], found["interpolation"], found["templates"]) == (230, "bilinear", "paper")
    assert {"interpolation", "resize", "steps"} < {*parser.unusual(args)}


def test_a_models_own_squashing_goes_before_a_protocols_shorter_side():
    siglip = "--model", "ViT-B-16-SigLIP", "--pretrained", "webli", "--protocol", "fare"
    args = settled(*siglip)[1]
    assert data_options(args, [])["resize"] == measured_as(args)["resize"] == "squash"
    assert protocol_words(args, measured_as(args)) == "protocol fare with the model's own --resize squash"
    args = settled(*siglip, "--resize", "224")[1]
    assert data_options(args, [])["resize"] == measured_as(args)["resize"] == 224
    assert protocol_words(args, measured_as(args)) == "protocol fare with --resize 224"


def test_runs_of_earlier_versions_were_bicubic():
    """But for the toy's, which read no files: those are what they would be now."""
    now = vars(settled()[1])
    before = {word: value for word, value in now.items() if word not in ("protocol", "interpolation")}
    assert differences(before, now) == ""
    for words in ({"data_root": "/d"}, {"dataset": "imagenet"}, {"tasks": "digits,folder:/x"}):
        said = differences(before | words, now | words)
        assert said == "--interpolation bicubic (here bilinear)"
        assert differences(before | words, now | words | {"interpolation": "bicubic"}) == ""
    assert completed(now) is now


# --------------------------------------------------------------------------------------------- caches
def test_a_cache_is_of_one_way_to_resize(photos, tmp_path):
    folder, out = f"folder:{photos}", tmp_path / "c.npy"
    make_cache(folder, out, protocol="fare")
    cached, plain = (load_task(name, "val", protocol="fare") for name in (f"cache:{out}", folder))
    assert all(torch.equal(cached.images[i][0], plain.images[i][0]) for i in range(6))
    said = "was made with --resize 224 --interpolation bicubic, and is asked for with --resize 256 "
    with pytest.raises(ValueError, match=f"{said}--interpolation bilinear: ") as error:
        load_task(f"cache:{out}", "val")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="asked for with --resize 224 --interpolation bilinear"):
        load_task(f"cache:{out}", "val", protocol="agft")
    told = load_task(f"cache:{out}", "val", resize=224, interpolation="bicubic")
    assert torch.equal(told.images[0][0], plain.images[0][0])
    with pytest.raises(ValueError, match="is made of other images: .*--resize 224 --interpolation bicubic"):
        make_cache(folder, out)


def test_a_cache_without_a_record_is_bicubic(photos, tmp_path):
    """As earlier versions wrote it; and `data.py cache` knows it again."""
    folder, out = f"folder:{photos}", tmp_path / "c.npy"
    make_cache(folder, out, interpolation="bicubic")
    with np.load(f"{out}.index.npz") as index:
        name, label = os.fsdecode(index["paths"][0]), index["labels"][0]
        stat = os.stat(photos / name)
        as_before = f"{photos.resolve()} 224 {name} {label} {stat.st_size} {stat.st_mtime_ns}"
        assert index["source"][0] == zlib.crc32(os.fsencode(as_before))
        old = {name: value for name, value in index.items() if name != "interpolation"}
    np.savez(f"{out}.index.npz", **old | {"resize": np.array("")})
    with pytest.raises(ValueError, match="made with --resize 256 --interpolation bicubic, and is asked for"):
        load_task(f"cache:{out}", "val")
    again = load_task(f"cache:{out}", "val", interpolation="bicubic").images
    assert same(again[0][0], CROP(transforms.Resize(256, BICUBIC)(photo(500, 375))))
    make_cache(folder, out, interpolation="bicubic")                    # it is there already: no error
