"""ε and step size as people write them; steps that reach; the warm-up; what is warned about, and recorded."""
import argparse
import itertools
import json
import math
import re

import pytest
import torch
from in_process import here
from runs import log_of
from test_options import PARSERS, evaluation, training

from attacks import pgd
from harness.evaluation import settle
from harness.options import doubts, length
from harness.training import hopeless
from model import model_config

REAL = ("--model", "ViT-B-32-quickgelu", "--pretrained", "openai")


@pytest.mark.parametrize("texts,value", [
    (("8", "8.0", "8/255", "16/510", "0.03137254901960784/1", "0.0313725490196/1"), 8),
    (("127.5", "127.5/255", "0.5/1", "1/2"), 127.5), (("0.3", "0.3/255"), .3), (("0", "0/1"), 0)])
def test_a_length_is_the_same_in_every_unit(texts, value):
    """N/R: N where pixels go from 0 to R, in 1/255."""
    assert {length(0)(text) for text in texts} == {value}
    for stage in (training, evaluation):
        args, *named = zip(*(stage("--norm", "l2", "--eps", text) for text in texts))
        assert {one.eps for one in args} == {value}
        assert all(name == same[0] for same in named for name in same)
    if value:
        assert {training("--step-size", text)[0].step_size for text in texts} == {value}


@pytest.mark.parametrize("text", ["8/0", "8/", "/255", "nan/255", "8/nan", "x", "-1", "8/-255", "1/1e-30",
                                  "8/255/1", "inf", "", "1/inf", "-8/-255", "1/1e-400"])
def test_what_is_no_length(text):
    with pytest.raises(argparse.ArgumentTypeError):
        length(0)(text)


def test_numbers_in_another_unit_are_warned_about():
    for words, said in (
            (("--eps", ".0314"), "0.0314/255"), (("--eps", ".0314/1"), None), (("--eps", "8/255"), None),
            (("--eps", ".1"), None), (("--eps", "0"), None),
            (("--norm", "l2", "--eps", ".5"), r"0\.5/255, or 0\.002 .*say --eps 0\.5/1"),
            (("--norm", "l2", "--eps", "0.5/1"), None), (("--norm", "l2", "--eps", "128/255"), None),
            (("--norm", "l2", "--eps", "9.9"), "9.9/255"), (("--norm", "l2", "--eps", "10"), None),
            (("--eps", "128"), "grey.*--norm l2"), (("--eps", "127"), None),
            (("--eps", "8", "--steps", "2", "--step-size", "1"), "cannot reach.*2/255, and ε is 8/255"),
            (("--eps", "8", "--steps", "2", "--step-size", "4"), None),
            (("--eps", "8", "--step-size", "16.5"), "more than the diameter")):
        for stage in (training, evaluation):
            found = doubts(stage(*words)[0])
            assert [bool(re.search(said, text)) for text in found] == [True] if said else not found, words
    # only PGD and CW have steps of this length
    for attack, slow in (("apgd-ce,cw", True), ("autoattack,apgd-ce", False)):
        args = evaluation("--eps", "8", "--steps", "2", "--step-size", "1", "--attack", attack)[0]
        assert bool(doubts(args)) is slow


@pytest.mark.parametrize("stage", [training, evaluation])
def test_default_steps_reach_the_balls_surface(stage):
    """Ascending a slope that never changes; the paper's 1/255 at the paper's setting."""
    x = torch.full((1, 3), .5)
    for words in ((), REAL, (*REAL, "--norm", "l2")):
        for eps in (.25, 1, 2, 4, 8, 16):
            for steps in (1, 2, 3, 7, 100):
                args = stage(*words, "--eps", eps, "--steps", steps)[0]
                delta = pgd(lambda x_adv, y: x_adv.sum(1), x, None, eps=eps / 255, steps=steps,
                            step_size=args.step_size / 255, norm=args.norm) - x
                reached = delta.norm() if args.norm == "l2" else delta.abs().max()
                assert math.isclose(reached, eps / 255, rel_tol=1e-3), (words, eps, steps)
    assert stage(*REAL)[0].step_size == 1 and stage("--eps", 0, *REAL)[0].step_size > 0


def test_default_steps_in_numbers():
    for words, step_size in (((), 6.875), (("--eps", 8), 5), ((*REAL, "--eps", 4), 4),
                             ((*REAL, "--eps", 2), 2), ((*REAL, "--steps", 1), 1.25),
                             ((*REAL, "--steps", 10), .2)):
        assert training(*words)[0].step_size == step_size, words
    for words, step_size in (((), 2.75), ((*REAL, "--eps", 4), 1), ((*REAL, "--eps", 8), 2),
                             ((*REAL, "--eps", .5), .5), ((*REAL, "--norm", "l2", "--eps", 128), 32)):
        assert evaluation(*words)[0].step_size == step_size, words


def test_a_checkpoints_options_mean_the_same_when_they_are_typed():
    """ε = 0 too, of which a step size of 0 would be refused."""
    parser = PARSERS["train_tecoa.py"]
    for words in (("--eps", 0), ("--eps", "0.5/1", "--norm", "l2"), (*REAL, "--eps", "4/255")):
        args, name, identity = training(*words)
        assert training(*parser.words(vars(args)))[1:] == (name, identity)


RUN = ("--pretrained", "none", "--dataset", "digits", "--tasks", "none", "--limit", 64, "--batch-size", 8,
       "--eval-steps", 1, "--epochs", 5, "--steps", 1)


def test_the_warm_up_is_a_tenth_of_a_short_run(tmp_path, read_json):
    """Of 40 steps, 4: the learning rates of the log, by the formula."""
    done = here("train_tecoa.py", *RUN, "--out", tmp_path / "run")
    assert "PGD-1, linf ε = 11/255, steps of 13.75/255; 40 steps of training, 4 of warm-up" in done.stdout
    assert "warning" not in done.stderr
    results, peak = read_json(tmp_path / "run" / "results.json"), .014
    assert "warnings" not in results and results["config"]["warmup"] is None
    rates = {row["step"]: row["lr"] for row in log_of(tmp_path / "run")}
    assert len(rates) == 8                              # 8, 10, 16, 20, …
    for step, rate in rates.items():
        assert math.isclose(rate, peak * (1 + math.cos(math.pi * (step - 1 - 4) / 36)) / 2)


def test_what_trains_nothing_is_said_and_recorded(tmp_path, read_json):
    words = (*RUN, "--warmup", 50, "--max-steps", 2, "--step-size", 1, "--out", tmp_path / "run")
    done = here("train_tecoa.py", *words)
    warned = read_json(tmp_path / "run" / "results.json")["warnings"]
    assert len(warned) == 2 and "cannot reach" in warned[0]
    assert "after 2 steps, inside its warm-up of 50" in warned[1] and "4 % of --lr" in warned[1]
    again = here("train_tecoa.py", *words)              # its table alone
    for text in warned:
        assert f"warning: {text}" in done.stderr and f"warning: {text}" in again.stderr
    args = training("--lr", 0)[0]
    assert hopeless(args, 100, 10) == ["--lr 0: nothing is trained"]
    args.lr = .1
    assert hopeless(args, 10, 10) == [] and "90 % of" in hopeless(args, 9, 10)[0]


def test_an_evaluation_says_unit_and_step_and_what_may_not_be_meant(tmp_path, read_json):
    words = ("--pretrained", "none", "--tasks", "digits", "--limit", 4, "--steps", 1, "--out", tmp_path)
    done = here("eval_zeroshot.py", *words, "--norm", "l2", "--eps", .5)
    results = read_json(tmp_path / "results.json")
    (warned,) = results["warnings"]
    assert f"warning: {warned}" in done.stderr and f"warning: {warned}" in done.stdout
    assert results["protocol"].startswith("PGD-1; l2 ε = 0.5/255 (0.00196 in pixels of [0,1]), steps of "
                                          "0.5/255; 1 random")
    assert json.dumps(results["config"]["eps"]) == "0.5"
    done = here("eval_zeroshot.py", *words, "--norm", "l2", "--eps", "0.5/1", "--attack", "apgd-ce",
                "--overwrite")
    results = read_json(tmp_path / "results.json")
    assert "warning" not in done.stderr and "warnings" not in results
    assert "l2 ε = 127.5/255 (0.5 in pixels of [0,1]); 1 random" in results["protocol"]


def test_a_checkpoints_own_eps_is_kept():
    """In any of its spellings."""
    parser = PARSERS["eval_zeroshot.py"]
    for norm, eps in (("linf", 4.), ("l2", 127.5)):
        checkpoint = {"model": "toy", "pretrained": "seed3", "config": {"eps": eps, "norm": norm}}
        args, _ = settle(parser, parser.parse_args(["--ckpt", "x"]), checkpoint, 1.)
        assert (args.norm, args.eps, args.step_size) == (norm, eps, eps / 4)


def test_weights_and_the_configuration_beside_them_count_by_content(tmp_path):
    """Of a file and of a folder; wherever it is."""
    configs = [json.dumps({"model_cfg": model_config("toy"), "preprocess_cfg": {"mean": [mean] * 3}})
               for mean in (.4, .5)]
    for words in (("--pretrained", "{}/model.pth"), ("--model", "local-dir:{}")):
        for stage in (training, evaluation):
            found, several = {}, itertools.product((b"one", b"two"), [*configs, configs[0]])
            for number, (weights, config) in enumerate(several):
                folder = tmp_path / str(number) / "clip"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "model.pth").write_bytes(weights)
                (folder / "open_clip_config.json").write_text(config)
                _, *named = stage(*(word.format(folder) for word in words))
                found.setdefault((weights, config), []).append(named)
                assert str(tmp_path) not in str(named)
            assert [len(same) for same in found.values()] == [2, 1, 2, 1]
            assert all(name == same[0] for same in found.values() for name in same)
            for part in (0, 1):
                assert len({str(same[0][part]) for same in found.values()}) == 4
