"""What a command line means: defaults, a run's identity, its name; of every option that either stage has."""
import argparse
import itertools
import json
import os
import re

import pytest
import torch
from conftest import ROOT

from eval_zeroshot import make_parser
from harness.evaluation import EvaluationRun, settle
from harness.options import Parser, adaptation, cadence, differences, number, shares
from harness.processes import has_bf16
from harness.training import NAME


def parser_of_training():
    """train_tecoa.py trains when it is imported: its parser comes of what stands before its run begins."""
    options, _ = (ROOT / "train_tecoa.py").read_text().split("\nrun = TrainingRun(parser)\n")
    scope = {"__name__": "train_tecoa"}
    exec(compile(options, "train_tecoa.py", "exec"), scope)
    return scope["parser"]


PARSERS = {"train_tecoa.py": parser_of_training(), "eval_zeroshot.py": make_parser()}


def training(*words):
    """(options, name, identity) of a command line of train_tecoa.py."""
    parser = PARSERS["train_tecoa.py"]
    args = parser.settle(parser.parse_args([*map(str, words)]))
    return args, parser.name(args, NAME), parser.identity(args)


class Named(EvaluationRun):
    def look(self):                                         # whatever is in the folder
        return {}, None


def evaluation(*words):
    """The same of eval_zeroshot.py; a checkpoint is one of the toy."""
    parser = PARSERS["eval_zeroshot.py"]
    args = parser.parse_args([*map(str, words)])
    checkpoint = {"config": {}}
    if args.ckpt:
        checkpoint = {"model": "toy", "pretrained": "seed3", "config": {"eps": 4., "norm": "linf"}}
    alpha, *_ = args.interpolate or [1.]
    args, known = settle(parser, args, checkpoint, alpha)
    run = Named(parser, args, known, [], {}, "", torch.device("cpu"))
    return args, run.out.name, run.identity


STAGES = {"train_tecoa.py": training, "eval_zeroshot.py": evaluation}
TEXTS = ("a", "A", "a/b", "a-b", "a_b", "a,b", "a+b", "a b", "a\tb", " a", "a ", "a-", "a:b", "hf-hub:a/b",
         "/a", "./a", "../a", "..", "", "é", "e", "É", "a\nb", "\udc80", "x" * 300, "x" * 299 + "y",
         "y" * 300, "None")
NUMBERS = ("1", "2", "3", "11", "0.25", "0.3", "0.30000001", "1.0000001", "1e-05", "123456.7", "123456.8")
OTHERS = ("bf16", "linear", "partial", "image-prompt", "token-prompt", "token-prompt,image-prompt", "7m",
          "0.7m", "tensorboard", "wandb,tensorboard")


def values_of(parser, action):
    """[[word], …]: each gives the option another value than the others, on a command line."""
    flag, *negative = action.option_strings
    if action.nargs == 0:
        return [[flag]] + [[text] for text in negative]
    found = {}
    for text in map(str, action.choices or TEXTS + NUMBERS + OTHERS):
        try:
            found.setdefault(repr(parser._get_value(action, text)), [f"{flag}={text}"])
        except argparse.ArgumentError:
            pass
    return [*found.values()]


ALL = [(script, action.dest) for script, parser in PARSERS.items() for action in parser._actions
       if action.dest != "help"]


@pytest.mark.parametrize("script,dest", ALL)
def test_lines_that_differ_in_one_option_differ_in_name_and_identity(script, dest, tmp_path, monkeypatch):
    """But for options of which no result depends: those change neither. Names are short, one folder each."""
    monkeypatch.chdir(tmp_path)
    parser = PARSERS[script]
    (action,) = [action for action in parser._actions if action.dest == dest]
    (tmp_path / "clip.pt").write_bytes(b"clip")
    # --norm l2 wants an ε; between a CLIP and a checkpoint lies nothing without one
    base = ["--eps=8"] + ["--ckpt=clip.pt"] * (dest == "interpolate")
    seen = {}
    for words in [[], *values_of(parser, action)]:
        args, name, identity = STAGES[script](*base, *words)
        seen.setdefault(repr(getattr(args, dest)), (name, identity))
        # as it comes back from results.json
        assert json.loads(json.dumps(identity)) == identity
        # a user's own name for the folder or the checkpoint is left alone
        if dest not in ("out", "ckpt"):
            assert len(os.fsencode(name)) <= 255 and re.fullmatch(r"[A-Za-z0-9_.,+-]+", name), name
        before = argparse.Namespace(**vars(args))
        assert parser.identity(args) == parser.identity(before) and args == before
    assert len(seen) > 1, "give this option values here"
    if dest in parser.harmless:
        for other, same in seen.values():
            assert same == identity and (other == name or dest == "out")
    else:
        for (one, a), (other, b) in itertools.combinations(seen.values(), 2):
            # the evaluation of a checkpoint lies beside it
            assert a != b and (one != other or dest == "ckpt"), (one, a, b)


def test_only_what_cannot_change_a_result_is_left_out_of_the_identity():
    """Written down once more, so that nobody adds to these by mistake."""
    train, evaluate = PARSERS.values()
    both = {"help", "workers", "out", "overwrite"}
    assert train.harmless == both | {"save_every", "max_nonfinite", "resume", "report_to"}
    assert evaluate.harmless == both | {"batch_size", "examples", "save_adv", "export"}
    assert train.resumable == {"data_root", "device", "compile", "kernels", "accumulate", "max_steps"}


@pytest.mark.parametrize("script", STAGES)
def test_a_default_that_is_typed_changes_nothing(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser, stage = PARSERS[script], STAGES[script]
    for words in ([], ["--model=ViT-B-32-quickgelu", "--pretrained=openai"], ["--norm=l2", "--eps=128"]):
        args, *usual = stage(*words)
        for dest, value in vars(args).items():
            if value is not None and dest not in parser.harmless:
                assert [*stage(*words, *parser.words({dest: value}))[1:]] == usual, dest
        # all at once, as a checkpoint has them
        assert stage(*parser.words(vars(args)))[0] == args
    with pytest.raises(ValueError, match="not known here: .'epsilon'"):
        parser.words({"epsilon": 1})


def test_names_say_what_is_unusual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "my clip.pt"
    weights.write_bytes(b"abc")                             # whose sha256 begins with ba7816bf
    for words, name in (
            ([], "toy-tecoa-full-seed0"), (["--eps", 11], "toy-tecoa-full-seed0"),
            (["--eps", 4, "--lr", .1, "--seed", 3], "toy-tecoa-full-eps4-lr0.1-seed3"),
            (["--loss", "fare", "--optimizer", "adamw"], "toy-fare-full-optimizeradamw-seed0"),
            (["--adapt", "token-prompt,image-prompt"], "toy-tecoa-image-prompt,token-prompt-seed0"),
            (["--pretrained", weights], "toy-tecoa-full-pretrainedmy-clip-ba7816bf-seed0"),
            (["--model", "ViT-B-32-quickgelu", "--pretrained", "openai"],
             "ViT-B-32-quickgelu-tecoa-full-pretrainedopenai-seed0")):
        assert training(*words)[1] == name
    (tmp_path / "ckpt.pt").write_bytes(b"abc")
    (tmp_path / "ckpt-previous.pt").write_bytes(b"abc")
    for words, name in (
            ([], "eval-toy-seed0"),
            (["--attack", "cw", "--restarts", 3], "eval-toy-seed0-attackcw-restarts3"),
            (["--model", "ViT-B-16", "--pretrained", "openai"], "eval-ViT-B-16-openai"),
            # the second has the ε that it trained with
            (["--ckpt", "ckpt.pt"], "eval"), (["--ckpt", "ckpt.pt", "--eps", 4], "eval"),
            (["--ckpt", "ckpt-previous.pt", "--last-iterate"], "eval-previous-lastiterate"),
            (["--ckpt", "ckpt.pt", "--interpolate", "0.25"], "eval-interpolate0.25"),
            (["--ckpt", "ckpt.pt", "--tasks", "cifar10,pets"], "eval-taskscifar10,pets")):
        assert evaluation(*words)[1] == name


def test_files_count_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, data in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "clip.pt").write_bytes(data)
    for stage in STAGES.values():
        (_, name, identity), other, same = (stage("--pretrained", f"{folder}/clip.pt") for folder in "abc")
        assert name != other[1] and identity != other[2]
        assert (name, identity) == same[1:]
        assert "a/clip.pt" not in str(identity)             # it may be moved
        (_, _, a), (_, _, b), (_, _, c) = (stage("--data-root", folder) for folder in ("a", "b", "./a"))
        assert a != b and a == c
    (_, _, a), (_, _, b), (_, _, c) = (evaluation("--ckpt", f"{folder}/clip.pt") for folder in "abc")
    assert a != b and a == c


def test_defaults_depend_on_other_options():
    """As the paper and the authors of FARE have them; for the toy, ours."""
    real = ("--model", "ViT-B-32-quickgelu", "--pretrained", "openai")
    for words, expected in (
            ((), {"eps": 11, "steps": 2, "step_size": 6.875, "lr": .014, "weight_decay": 0, "epochs": 2,
                  "batch_size": 64, "pretrained": "seed0", "dataset": "toy", "dtype": "fp32"}),
            (("--seed", 5), {"pretrained": "seed5"}), (("--eps", 4, "--steps", 5), {"step_size": 1}),
            (real, {"eps": 1, "steps": 2, "step_size": 1, "lr": 1e-5, "epochs": 10, "warmup": None,
                    "batch_size": 256, "pretrained": "openai", "dataset": "imagenet"}),
            ((*real, "--norm", "l2", "--eps", 128), {"step_size": 80}),
            (("--optimizer", "adamw"), {"lr": 5e-4, "weight_decay": 1e-4}),
            ((*real, "--optimizer", "adamw"), {"lr": 1e-5, "weight_decay": 1e-4}),
            (("--loss", "fare"), {"lr": 2e-3}), (("--loss", "fare", "--optimizer", "adamw"), {"lr": 5e-4}),
            ((*real, "--adapt", "image-prompt"), {"lr": 40, "border": 30, "tokens": None}),
            (("--adapt", "token-prompt,image-prompt"), {"lr": 10, "border": 4, "tokens": 5}),
            (("--adapt", "token-prompt", "--optimizer", "adamw"), {"lr": .1}),
            (("--adapt", "partial"), {"last_blocks": 2, "lr": .014}),
            (("--device", "cuda"), {"dtype": "bf16"})):
        found = vars(training(*words)[0])
        assert {word: found[word] for word in expected} == expected, words
    with pytest.raises(ValueError, match="--norm l2 needs --eps"):
        training("--norm", "l2")


def test_bf16_for_real_models_where_the_processor_has_it(monkeypatch):
    real = ("--model", "ViT-B-32-quickgelu", "--pretrained", "openai", "--device", "cpu")
    for has, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("harness.options.has_bf16", lambda device, has=has: has)
        for stage in STAGES.values():
            (open_, *named), auto = stage(*real), stage(*real, "--dtype", "auto")
            assert open_.dtype == dtype and [auto[0], *auto[1:]] == [open_, *named]     # as if not said
            assert named[1]["dtype"] == dtype and "dtype" not in named[0]
            assert stage("--device", "cpu")[0].dtype == "fp32"                      # of the toy
            assert stage(*real, "--dtype", "fp32")[0].dtype == "fp32"
        # on a GPU training is in bf16, of any model
        assert training("--device", "cuda")[0].dtype == "bf16"
        assert evaluation("--device", "cuda")[0].dtype == "fp32"
        assert evaluation(*real[:-1], "cuda")[0].dtype == dtype


def test_which_processors_have_bf16(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has, expected in (({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True),
                          ({"architecture": "arm64", "bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert has_bf16("cpu") is expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bf16("cpu")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bf16("cpu")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert has_bf16("cuda:1") is has


def test_a_new_option_is_in_the_identity_unless_it_says_otherwise():
    parser = Parser(prog="new")
    group = parser.add_argument_group("new")
    parser.option(group, "--seed", 0, type=int, help="")
    parser.option(group, "--temperature", 1., type=float, help="")
    parser.option(group, "--colour", lambda args: "red" if args.temperature > 1 else "blue", help="")
    parser.option(group, "--verbose", False, action="store_true", result=False, help="")
    for words, name in ((["--temperature", "2"], "temperature2-seed0"),
                        (["--colour", "red"], "colourred-seed0"),
                        (["--temperature", "2", "--colour", "blue"], "temperature2-colourblue-seed0"),
                        (["--verbose"], "-seed0"), (["--seed", "4"], "-seed4")):
        args = parser.parse_args(words)
        settled = parser.settle(args)
        assert parser.name(settled, ("seed",)) == name
        assert parser.identity(settled).keys() == {"seed", "temperature", "colour"}
        assert args.colour is None or "--colour" in words   # what was parsed stays as it is
        assert parser.parse_args(parser.words(vars(settled))) == settled


def test_differences_are_named():
    assert differences({"lr": .1, "eps": 8}, {"lr": .1, "eps": 8}) == ""
    assert differences({"max_steps": 1, "eps": 8}, {"max_steps": 1, "eps": 4, "code": "ab"}) == (
        "sources None (here ab), --eps 8 (here 4)")
    assert differences({"eps": 8}, {"eps": 4}, ignoring=("eps",)) == ""


@pytest.mark.parametrize("kind,good,bad", [
    (number(int, 1), {"1": 1, "2147483647": 2147483647}, ["0", "2147483648", "1.5", "x", ""]),
    (number(float, 0), {"0": 0, "1e-5": 1e-5}, ["-1", "nan", "inf", "1e10"]),
    (number(float, 0, strict=True), {"1e-9": 1e-9}, ["0", "-0.0"]),
    (cadence, {"5m": "5m", "0.1m": "0.1m", "7": "7"}, ["0", "0m", "m", "1.5", "5s", "nanm"]),
    (adaptation, {"full": "full", "token-prompt,image-prompt": "image-prompt,token-prompt"},
     ["full,linear", "", "image-prompt,image-prompt"]),
    (shares, {"0,0.5,1": [0, .5, 1], "1,1": [1]}, ["2", "-0.1", "", "nan"])])
def test_types_of_values(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            kind(text)
