"""Nothing ends with status 0 and a number whose condition is not said: every option of both stages, and every
kind of input that docs/traps.md lists."""
import gzip
import io
import json
import random
import re
import tarfile

import pytest
import torch
from in_process import here
from noise import write_classes
from PIL import Image
from test_options import PARSERS

from model import load_clip
from prompts import warn_once
from tasks.images import say_once

TRAIN, EVALUATE = PARSERS
QUICK = {TRAIN: ("--pretrained", "none", "--dataset", "digits", "--tasks", "digits", "--limit", 16,
                 "--batch-size", 8, "--epochs", 1, "--warmup", 0, "--steps", 1, "--eval-steps", 1),
         EVALUATE: ("--pretrained", "none", "--tasks", "digits", "--limit", 16, "--steps", 1)}


def ended(script, *words, out):
    """(status, all that was printed) of a command; whatever it is, what must hold is checked."""
    say_once.cache_clear()
    warn_once.cache_clear()
    done = here(script, *QUICK[script], *words, "--workers", 0, "--out", out, status=None)
    where, said = (words, done), done.stdout + done.stderr
    assert done.status in (0, 2) and "Traceback" not in said, where
    if done.status == 2:                                    # but for bars and warnings
        lines = [line.split("\r")[-1] for line in done.stderr.split("\n")]
        lines = [line for line in lines if line.strip() and "%|" not in line and line[:8] != "warning:"]
        assert len(lines) == 1 and lines[0].startswith(f"{script}: "), where
        return 2, said
    files = [json.loads(path.read_text()) for path in out.glob("results*.json")]
    for results in files:
        for row in (results["tasks"] | results.get("adapted", {})).values():
            # what it is of: no number stands without these
            assert row["n"] > 0 and row["left_out"] >= 0, where
            assert row["split"] and row["template"] and len(row["class_names"]) == row["classes"], where
            assert 0 <= row["robust"] <= row["clean"] <= 100, where
        # what was asked for
        config = results["config"]
        assert re.search(rf"{config['norm']} ε = {config['eps']:g}/255", said), where
    warned = [line.removeprefix("warning: ") for line in done.stderr.split("\n") if line[:8] == "warning:"]
    recorded = json.dumps(files, ensure_ascii=False)
    for text in warned:
        about_a_picture = "cannot be drawn" in text
        assert about_a_picture or json.dumps(text, ensure_ascii=False)[1:-1] in recorded, (text, where)
    return 0, said


# ------------------------------------------------------------------------------ every option
# {option: (words, what is said)}: the number that would otherwise look like any other, or none
BOTH = {
    "class_names": (("--class-names", "{}/two-lines"), "2"), "data_root": (
        ("--data-root", "{}/absent", "--tasks", "imagenet"), "no such folder"),
    "device": (("--device", "cuda:99"), "device"), "dtype": (("--dtype", "int8"), "expected one of auto"),
    "interpolation": (("--interpolation", "bicubic", "--tasks", "folder:{}/digits"),
                      "protocol tecoa with --interpolation bicubic"),
    "protocol": (("--protocol", "fare"), r"protocol fare\b"),
    "eps": (("--eps", ".0314"), r"0\.0314/255, or"), "kernels": (("--kernels", "x"), "invalid choice"),
    "compile": (("--compile=3",), "ignored explicit argument"),
    "seed": (("--seed", "-1"), "expected|invalid"),
    "model": (("--model", "ViT-X"), "unknown model"), "norm": (("--norm", "l2"), "--norm l2 needs --eps"),
    "pretrained": (("--pretrained", "{}/absent"), "expected a file"),
    "resize": (("--resize", 8, "--tasks", "folder:{}/digits"), "less than the 32 pixels"),
    "step_size": (("--step-size", 1), "cannot reach"),
    "steps": (("--steps", 2, "--step-size", 1), "cannot reach.*--steps 2"),
    "tasks": (("--tasks", "digit"), "unknown task 'digit'"), "template": (("--template", "a cat"), "no {}")}
SAID = {
    TRAIN: BOTH | {
        "limit": (("--limit", 4), "more than the 4 images"),
        "accumulate": (("--accumulate", 3), "--batch-size 8"),
        "adapt": (("--adapt", "full,linear"), "one of"),
        "batch_size": (("--batch-size", 17), "more than the 16 images"),
        "border": (("--border", 3), "belongs to --adapt image-prompt"),
        "last_blocks": (("--last-blocks", 1), "belongs to --adapt partial"),
        "tokens": (("--tokens", 3), "belongs to --adapt token-prompt"),
        "dataset": (("--dataset", "folder:{}/one"), "only one class|no train images"),
        "epochs": (("--epochs", 0), "above 0"), "eval_steps": (("--eval-steps", 3), r"PGD-3, linf"),
        "init": (("--init", "{}/two-lines"), "is not a checkpoint|damaged"),
        "labels": (("--labels", "pseudo"), "% of the pseudo-labels are the true ones"),
        "loss": (("--loss", "imgcoadv", "--accumulate", 8), "one alone has no others"),
        "lr": (("--lr", 0), "nothing is trained"),
        "max_steps": (("--max-steps", 1, "--warmup", 2), "inside its warm-up"),
        "optimizer": (("--optimizer", "adam"), "invalid choice"),
        "shots": (("--shots", 1), "Adapting on digits: 10 images"),
        "warmup": (("--warmup", 9), "inside its warm-up of 9"),
        "weight_decay": (("--weight-decay", "nan"), "at least 0")},
    EVALUATE: BOTH | {
        "limit": (("--limit", 1), r"\| digits \| 1 \|"),
        "attack": (("--attack", "apgd-dlr", "--tasks", "folder:{}/digits"),
                   "apgd-dlr is undefined for 2 classes: in its place apgd-ce"),
        "ckpt": (("--ckpt", "{}/two-lines"), "is not a checkpoint|damaged"),
        "interpolate": (("--interpolate", .5), "give --ckpt"),
        "last_iterate": (("--attack", "apgd-ce", "--last-iterate"), "for --attack pgd or cw alone"),
        "queries": (("--queries", 7), "--queries 7 changes nothing"),
        "restarts": (("--restarts", 2), r"2 random start\(s\)"),
        "templates": (("--templates", "openai", "--template", "a {}"), "give one of them")}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the options above name."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "two-lines").write_text("cat\ndog\n")
    write_classes(root / "digits" / "val", ["one", "two"], 4)
    write_classes(root / "one" / "train", ["cat"], 4)
    return root


@pytest.mark.parametrize("script", PARSERS)
def test_every_option_that_can_change_a_number_says_so(script, inputs, tmp_path):
    """Whoever adds an option says here what its trap is."""
    options = {action.dest for action in PARSERS[script]._actions} - PARSERS[script].harmless
    assert {*SAID[script]} == options
    for option, (words, said) in SAID[script].items():
        words = [str(word).replace("{}", str(inputs)) if "{}/" in str(word) else word for word in words]
        _, printed = ended(script, *words, out=tmp_path / option)
        assert re.search(said, printed), (option, printed)


@pytest.mark.parametrize("script", PARSERS)
def test_values_of_every_kind_for_every_option(script, inputs, monkeypatch, tmp_path):
    """One for each, drawn once: a number whose condition is said, or status 2 and one line."""
    monkeypatch.chdir(tmp_path)                             # some of them are folders to write to
    values = ["0", "1", "3", "-1", "0.5", "nan", "1e9", "", "x", "8/255", "a\nb", "$$", "none", "all", "auto",
              f"{inputs}", f"{inputs}/two-lines", f"folder:{inputs}/digits", "/dev/null", "fp32", "a {} {}"]
    rng, statuses = random.Random(1), set()
    for action in PARSERS[script]._actions:
        for value in rng.sample(values, 1) if action.dest not in ("help", "out", "workers") else ():
            words = [action.option_strings[0], *([] if action.nargs == 0 else [value])]
            statuses.add(ended(script, *words, out=tmp_path / f"{action.dest}-{len(statuses)}")[0])
    assert statuses == {0, 2}


# ------------------------------------------------------------------------------ every kind of input
def tar(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent.parent / "classnames.txt").write_text("cat\ndog\n")
    with tarfile.open(path, "w") as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def png(mode="RGB", value=7):
    file = io.BytesIO()
    Image.new(mode, (32, 32), value).save(file, "PNG" if mode == "RGB" else "TIFF")
    return file.getvalue()


def folder_of(names, each=4):
    return lambda root: ("--tasks", f"folder:{write_classes(root / 'set', names, each)}")


def splits(*names):
    def make(root):
        for name in names:
            write_classes(root / "set" / name, ["cat", "dog"], each=2)
        return "--tasks", f"folder:{root / 'set'}"
    return make


def shards(*members):
    def make(root):
        tar(root / "wds_x" / "test" / "0.tar", *members)
        return "--tasks", f"wds:{root / 'wds_x'}"
    return make


def spoilt(content, name="0.png"):
    def make(root):
        write_classes(root / "set", ["cat", "dog"], each=2)
        for folder in ("cat", "dog"):
            (root / "set" / folder / name).write_bytes(content)
        return "--tasks", f"folder:{root / 'set'}"
    return make


def compressed(root):
    words = shards(("a.png", png()), ("a.cls", b"0"))(root)
    path = root / "wds_x" / "test" / "0.tar"
    path.with_name("1.tar").write_bytes(gzip.compress(path.read_bytes()))
    return words


def twins(root):
    long = " ".join(["word"] * 40)
    return "--tasks", f"folder:{write_classes(root / 'set', [f'{long} cat', f'{long} dog'], 4)}"


def training_checkpoint(root):
    clip, _ = load_clip("toy", "none")
    torch.save({"epoch": 3, "state_dict": {}, "vision_encoder_state_dict": clip.visual.state_dict()},
               root / "t.pt")
    return "--pretrained", root / "t.pt"


# name: (what to make, status, what is said). Status 0 with a warning, or with the condition in the table
KINDS = {
    "train and valid": (splits("train", "valid"), 0, r"val images of .*/set/valid"),
    "three splits": (splits("Train", "Validation", "Test"), 0, r"val images of .*/set/Validation"),
    "train and test": (splits("training", "testing"), 0, r"test images of .*/set/testing"),
    "train alone": (splits("train"), 2, "no val or test images, only train"),
    "two of one split": (splits("val", "valid"), 2, "two are the same split"),
    "splits beside classes": (splits("train", "cat"), 2, "splits, train/, beside"),
    "classes of splits": (lambda root: ("--tasks", f"folder:{root / 'set'}") * bool(
        [write_classes(root / "set" / name, ["train", "test"], 4) for name in ("cat", "dog")]), 2, "set"),
    "digits": (folder_of(["0", "1", "2"]), 0, "3 of 3 class names are numbers: '0', '1', '2'"),
    "WordNet ids": (folder_of(["n99999998", "n99999999"]), 0, "WordNet ids, none of ImageNet's"),
    "the same prompts": (twins, 0, "2 class names make prompts of the same tokens"),
    "the same names": (folder_of(["hot_dog", "hot-dog"]), 0, "2 class names make prompts of the same tokens"),
    "chance": (folder_of(["cat", "dog"], each=8), 0, "clean accuracy at chance: "),
    "dotted keys": (shards(*((f"a.v{i}.{kind}", content) for i in range(4) for kind, content in (
        ("png", png()), ("cls", b"%d" % (i % 2))))), 0, r"\| wds:\S+ \| 4 \| 0 \|"),
    "keys twice": (shards(("a.png", png()), ("a.cls", b"0"), ("b.png", png()), ("b.cls", b"1"),
                          ("a.png", png()), ("a.cls", b"1")), 0, r"\| wds:\S+ \| 3 \| 0 \|"),
    "labels as text": (shards(("a.png", png()), ("a.txt", b"dog"), ("b.png", png()), ("b.txt", b"bird")), 0,
                       "1 of 2 images could not be read"),
    "no label": (shards(("a.png", png()), ("a.cls", b"0"), ("b.png", png())), 0,
                 "1 of 2 images could not be read"),
    "no label at all": (shards(("a.png", png()), ("b.png", png())), 2, "there is no accuracy|no image"),
    "gzip": (compressed, 2, "is compressed"),
    "floats": (spoilt(png("F", .5)), 0, "2 of 4 images could not be read"),
    "32 bits": (spoilt(png("I", 70000)), 0, "2 of 4 images could not be read"),
    "unreadable": (spoilt(b"no image"), 0, "2 of 4 images could not be read"),
    "dollars": (folder_of(["$a$", r"\frac{$"]), 0, r"\$a\$"),
    "pipes": (folder_of(["a|b", "c"]), 0, "images of"),
    "half of a checkpoint": (training_checkpoint, 2, "--ckpt"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input(kind, tmp_path):
    """In evaluation; and shown again it says the same. In training, its table says so too."""
    make, status, said = KINDS[kind]
    words = make(tmp_path)
    for _ in range(1 + (status == 0)):
        found, printed = ended(EVALUATE, *words, out=tmp_path / "e")
        assert found == status and re.search(said, printed), printed
    found, printed = ended(TRAIN, *words, out=tmp_path / "t")
    assert found == status, printed


def test_half_of_torchruns_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    for script in PARSERS:
        status, printed = ended(script, out=tmp_path / "out")
        assert status == 2 and "half of a torchrun's" in printed


def test_no_picture_costs_a_result(monkeypatch, tmp_path, read_json):
    """Neither drawing nor what is drawn."""
    def fail(*_, **how):
        assert not how, "out of memory"
        return [{"task": "digits", "position": 0}]
    monkeypatch.setattr("eval_zeroshot.attacked_examples", fail)
    status, printed = ended(TRAIN, out=tmp_path / "run")
    assert status == 0 and read_json(tmp_path / "run" / "results.json")["mean"]["clean"] >= 0
    assert "examples.png cannot be drawn: out of memory" in printed
