"""Training that is killed, stopped or typed again goes on to the same bits and writes over nothing."""
import contextlib
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process import here
from runs import WORDS, assert_same, changed_copy, contents, leaves, log_of, steps_done, when

from harness import training
from harness.checkpoints import read_checkpoint
from harness.files import write_json
from harness.reports import at_chance
from harness.training import TrainingRun
from losses import LOSSES
from model import ADAPTATIONS
from tasks.sampling import training_order

EPOCHS = (*WORDS, "--epochs", 3)                            # of the run `whole`


# ------------------------------------------------------------------------------ killed, stopped
def test_killed_at_any_time_it_ends_with_the_same_bits(forks, whole, tmp_path):
    """SIGKILL at random times: while loading, training, saving, evaluating."""
    out, rng, kills = tmp_path / "run", random.Random(0), 0
    while True:
        begun = (out / "ckpt.pt").exists()
        again = ("--resume", out) if begun else (*EPOCHS, "--save-every", 1, "--out", out)
        pid = forks.start("train_tecoa.py", *again, out=tmp_path / "run")
        if kills < 7:
            time.sleep(rng.uniform(.1, 1.2))
            os.kill(pid, signal.SIGKILL)
            kills += 1
        status = forks.wait(pid)
        assert status in (0, -signal.SIGKILL), Path(tmp_path / "run.stderr").read_text()
        if status == 0:
            break
    assert_same(whole, out)
    # pictures come after results.json, with which the run is over: a kill between them costs those
    files = [{path.name for path in folder.iterdir() if path.suffix != ".png"} for folder in (out, whole)]
    assert files[0] == files[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(forks, whole, tmp_path, number):
    out = tmp_path / "run"
    pid = forks.start("train_tecoa.py", *EPOCHS, "--save-every", "9m", "--out", out, out=out)
    when(lambda: steps_done(out) >= 8)
    os.kill(pid, number)
    assert forks.wait(pid) == 128 + number
    step, said = read_checkpoint(out / "ckpt.pt")["step"], Path(f"{out}.stderr").read_text()
    name = signal.Signals(number).name
    assert f"{name} after step {step} of 24, saved; go on with --resume {out}\n" in said
    assert (out / "curves.png").exists()
    assert 8 <= step < 24 and "Traceback" not in said
    stdout, _ = forks.run("train_tecoa.py", "--resume", out, out=out)
    assert f"Going on after step {step}" in stdout
    assert_same(whole, out)


def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_first_passed_on(monkeypatch):
    """torchrun passes on to its processes what they may have got from the scheduler as well."""
    run, clock, killed, handlers = TrainingRun.__new__(TrainingRun), SimpleNamespace(now=100.), [], {}
    run.stopped = []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(training.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(training.signal, "signal", handlers.__setitem__)
    for clock.now, count in ((100., 0), (101.9, 0), (102.1, 1)):
        run.finish_the_step(signal.SIGTERM, None)
        assert len(killed) == count
    assert killed == [(os.getpid(), signal.SIGTERM)] and handlers == {signal.SIGTERM: signal.SIG_DFL}
    assert run.stopped[0] == (signal.SIGTERM, 100.)


def test_an_interrupted_evaluation_says_so_in_one_line(forks, tmp_path):
    words = ("--pretrained", "none", "--tasks", "digits", "--steps", 9999, "--out", tmp_path / "e")
    pid = forks.start("eval_zeroshot.py", *words, out=tmp_path / "o")
    when(lambda: (tmp_path / "e" / "images.jsonl").exists())
    os.kill(pid, signal.SIGINT)
    assert forks.wait(pid) == -signal.SIGINT
    said = (tmp_path / "o.stderr").read_text()
    assert said.endswith("eval_zeroshot.py: interrupted\n") and "Traceback" not in said


def test_the_minute_has_its_own_checkpoints(forks, tmp_path):
    out = tmp_path / "run"
    forks.run("train_tecoa.py", *WORDS, "--max-steps", 8, "--save-every", "0.0001m", "--out", out, out=out)
    assert read_checkpoint(out / "ckpt-previous.pt")["step"] == 7


@pytest.mark.parametrize("loss,adapt", [
    *((loss, "full") for loss in LOSSES), *(("tecoa", adapt) for adapt in ADAPTATIONS if adapt != "full"),
    ("ce", "linear"), ("coadv", "image-prompt,token-prompt")])
def test_every_loss_and_adaptation_goes_on_with_the_same_bits(forks, tmp_path, loss, adapt):
    """From the checkpoint of step 3 of 5, between two lines of the log, of a step in two micro-batches."""
    one, other = tmp_path / "one", tmp_path / "other"
    words = ("--loss", loss, "--adapt", adapt, "--accumulate", 2, "--max-steps", 5, "--save-every", 3,
             "--labels", "pseudo" if loss == "tecoa" else "true")
    forks.run("train_tecoa.py", *WORDS, *words, "--out", one, out=one)
    assert read_checkpoint(one / "ckpt-previous.pt")["step"] == 3
    shutil.copytree(one, other)
    # rewound, the run is not over any more
    stdout, _ = forks.run("train_tecoa.py", "--resume", other / "ckpt-previous.pt", out=other)
    assert "Going on after step 3" in stdout
    assert_same(one, other)
    assert [row["step"] for row in log_of(other)] == [5]
    if loss == "imgcoadv":                                  # other micro-batches would be other negatives
        words = ("--resume", other / "ckpt-previous.pt", "--accumulate", 1)
        _, stderr = forks.run("train_tecoa.py", *words, out=other, status=2)
        assert "in 1 process(es), with --accumulate 2" in stderr


# ------------------------------------------------------------------------------ any optimizer
OPTIMIZERS = {"sgd": lambda parameters: torch.optim.SGD(parameters, .01, momentum=.9, weight_decay=1),
              "adamw": lambda parameters: torch.optim.AdamW(parameters, .01, weight_decay=1),
              "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, .01, weight_decay=1),
              "adagrad": lambda parameters: torch.optim.Adagrad(parameters, .01, weight_decay=1)}
RECORDED = """
import atexit
at_first, gradients = [p.detach().clone() for p in trainable.values()], []
optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in trainable.values()
                                                              if p.grad is not None]))
atexit.register(lambda: torch.save([at_first, gradients, [p.data for p in trainable.values()]],
                                   f"{args.out}/recorded.pt"))
"""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_makes_pytorchs_update_and_goes_on_with_the_same_bits(forks, tmp_path, name):
    """Of six steps, the first and the fourth are not finite, and change nothing: neither weights nor the
    optimizer's state. The last two here are not fused, and so never look at found_inf."""
    one, other, begin = tmp_path / "one", tmp_path / "other", "run.begin(encoder, trainable, optimizer)\n"
    more = 'OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad, '
    changes = [("OPTIMIZERS = {", more), (begin, begin + RECORDED)]
    script = changed_copy(tmp_path / "whole.py", *changes, loss="loss * float('nan')", when="calls in (1, 4)")
    words = (*WORDS, "--optimizer", name, "--lr", .01, "--weight-decay", 1, "--epochs", 1, "--max-steps", 6,
             "--save-every", 3, "--max-nonfinite", 9, "--out", one)
    forks.run(script, *words, out=one)
    shutil.copytree(one, other)
    script = changed_copy(tmp_path / "rest.py", *changes, loss="loss * float('nan')", when="calls == 1")
    forks.run(script, "--resume", other / "ckpt-previous.pt", out=other)
    assert_same(one, other)
    assert json.loads((other / "results.json").read_text())["skipped"] == 2

    parameters, gradients, found = torch.load(one / "recorded.pt", weights_only=True)
    optimizer, sound = OPTIMIZERS[name](parameters), (1, 2, 4, 5)
    for step in sound:
        for p, gradient in zip(parameters, gradients[step], strict=True):
            p.grad = gradient
        # linear over 4 steps, then cosine to 0 at step 8
        share = (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / (8 - 4))) / 2
        optimizer.param_groups[0]["lr"] = .01 * share
        optimizer.step()
    for expected, tensor in zip(parameters, found, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ finished, typed again
@pytest.fixture(scope="module")
def small(forks, tmp_path_factory):
    """The folder of a finished run of two steps, with an evaluation in it."""
    out = tmp_path_factory.mktemp("small") / "run"
    forks.run("train_tecoa.py", *SMALL, "--out", out, out=out)
    forks.run("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", *EVALUATION, out=f"{out}-evaluation")
    return out


SMALL = (*WORDS, "--limit", 32, "--max-steps", 2, "--lr", .01)
EVALUATION = ("--tasks", "colours", "--limit", 8, "--steps", 1)


def evaluations(out):
    return {path.name for path in out.iterdir() if path.is_dir()}


def test_a_finished_run_is_shown_again_and_nothing_is_computed(forks, tmp_path):
    out = tmp_path / "run"
    typed = (*SMALL, "--tasks", "colours", "--out", out)
    stdout, _ = forks.run("train_tecoa.py", *typed, out=tmp_path / "o")
    before, table = contents(out), stdout.split("\n\n")[-2]
    assert table.startswith("| task |") and "| colours | 32 |" in table
    for words in (typed, (*typed, "--save-every", 1, "--workers", 1, "--max-nonfinite", 2),
                  (*typed, "--resume"), ("--resume", out), ("--resume", out / "ckpt.pt"),
                  ("--resume", out, "--max-steps", 1)):
        stdout, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o")
        assert f"{out} is finished, after step 2: this is its table, nothing was computed" in stdout
        assert table in stdout and contents(out) == before, words
        # as the first time
        (line,) = stderr.splitlines()
        assert line.startswith("warning: the run ends after 2 steps, inside its warm-up of 4"), words
    (out / "results_before.json").unlink()                  # a table that is lost is no reason to fail
    assert "nothing was computed" in forks.run("train_tecoa.py", *typed, out=tmp_path / "o")[0]


def test_a_run_keeps_its_dtype_on_another_processor(tmp_path, monkeypatch, read_json):
    """--dtype auto is bf16 where the run begins and fp32 where it goes on and is shown again."""
    words, more = (*WORDS, "--device", "cpu", "--save-every", 1), ("--max-steps", 2)
    monkeypatch.setattr("harness.options.default_dtype", lambda args, training: "bf16")
    for name in ("whole", "a", "b", "c"):
        steps = more if name == "whole" else ("--max-steps", 1)
        here("train_tecoa.py", *words, *steps, "--out", tmp_path / name)
    monkeypatch.setattr("harness.options.default_dtype", lambda args, training: "fp32")
    here("train_tecoa.py", "--resume", tmp_path / "a", *more)
    here("train_tecoa.py", "--resume", tmp_path / "b", *more, "--dtype", "auto")
    here("train_tecoa.py", *words, *more, "--resume", "--out", tmp_path / "c")
    for name in "abc":
        assert_same(tmp_path / "whole", tmp_path / name, log=False)
    said = here("train_tecoa.py", *words, *more, "--out", tmp_path / "whole").stdout
    assert "is finished" in said and read_json(tmp_path / "c" / "results.json")["identity"]["dtype"] == "bf16"
    for again in (("--out", tmp_path / "whole"), ("--resume", tmp_path / "whole")):
        assert "--dtype bf16 (here fp32)" in here("train_tecoa.py", *words, *more, *again, "--dtype", "fp32",
                                                  status=2).stderr
    here("train_tecoa.py", *words, *more, "--overwrite", "--out", tmp_path / "whole")
    assert read_json(tmp_path / "whole" / "results.json")["config"]["dtype"] == "fp32"


def test_another_command_in_a_folder_says_what_is_there(forks, small, tmp_path):
    out = shutil.copytree(small, tmp_path / "run")
    before, ways = contents(out), ("--resume goes on with a run, --out DIR writes elsewhere, --overwrite "
                                   "replaces what is there\n")
    for words, said in (
            (["--lr", .5], f"{out} holds a finished run, with --lr 0.01 (here 0.5): {ways}"),
            (["--eps", 4], f"with --eps 11.0 (here 4.0), --step-size 6.875 (here 2.5): {ways}"),
            (["--lr", .5, "--resume"], f"the run in {out} has --lr 0.01 (here 0.5)\n"),
            (["--resume", "--overwrite"], "--resume goes on with a run, --overwrite replaces it: give one of "
                                          "them\n"),
            (["--resume", out, "--overwrite"], "give one of them\n")):
        typed = (*SMALL, "--out", out, *words)
        _, stderr = forks.run("train_tecoa.py", *typed, out=tmp_path / "o", status=2)
        (line,) = stderr.splitlines(keepends=True)
        assert line.startswith("train_tecoa.py: ") and line.endswith(said), stderr
    assert contents(out) == before


def test_overwrite_replaces_all_that_was_there(forks, small, tmp_path):
    out = shutil.copytree(small, tmp_path / "run")
    (aside,) = evaluations(out)
    shutil.copytree(out / aside, out / f"step1-{aside}")
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    words = (*SMALL, "--lr", .5)
    # as soon as it has begun, nothing is left of the other, in case it is killed
    heads = "heads = {task.name"
    script = changed_copy(tmp_path / "ends.py", (heads, f"import os\nos._exit(9)\n{heads}"))
    forks.run(script, *words, "--overwrite", "--out", out, out=tmp_path / "o", status=9)
    assert contents(out).keys() == {"ckpt.pt", "log.jsonl", "notes/mine.txt"}
    assert read_checkpoint(out / "ckpt.pt")["config"]["lr"] == .5 and not log_of(out)
    out = shutil.copytree(small, tmp_path / "again")
    forks.run("train_tecoa.py", *words, "--overwrite", "--out", out, out=tmp_path / "o")
    forks.run("train_tecoa.py", *words, "--out", tmp_path / "new", out=tmp_path / "o")
    assert_same(out, tmp_path / "new")
    assert read_checkpoint(out / "ckpt-previous.pt")["step"] == 0
    assert not evaluations(out)
    # it is a run like others: --overwrite is no part of it
    assert "nothing was computed" in forks.run("train_tecoa.py", *words, "--out", out, out=tmp_path / "o")[0]


def test_going_on_sets_evaluations_of_the_older_checkpoint_aside(forks, small, tmp_path):
    """And one that goes back to the checkpoint before sets aside what was evaluated after it."""
    out = shutil.copytree(small, tmp_path / "run")
    (name,) = evaluations(out)
    kept = contents(out / name)
    forks.run("train_tecoa.py", "--resume", out, "--max-steps", 4, out=tmp_path / "o")
    forks.run("train_tecoa.py", *SMALL, "--max-steps", 4, "--out", tmp_path / "new", out=tmp_path / "o")
    assert_same(out, tmp_path / "new", log=False)           # which has a line for step 2, the end at first
    assert evaluations(out) == {f"step2-{name}"} and contents(out / f"step2-{name}") == kept
    forks.run("eval_zeroshot.py", "--ckpt", out / "ckpt.pt", *EVALUATION, out=tmp_path / "o")
    forks.run("train_tecoa.py", "--resume", out / "ckpt-previous.pt", "--max-steps", 3, out=tmp_path / "o")
    assert evaluations(out) == {f"step2-{name}", f"step4-{name}"} and contents(out / f"step2-{name}") == kept


def test_nothing_is_trained_over_what_is_of_something_else(forks, small, run_copy, tmp_path):
    """An evaluation, foreign results, damaged or old checkpoints, an unfinished run: --overwrite alone
    replaces them. A run that has done no step is nothing, and an evaluation beside it stays."""
    (evaluation,) = evaluations(small)
    old = json.loads((small / "results.json").read_text())
    results = {"evaluation": "an evaluation", "ours, before identities": "a finished run"} | dict.fromkeys(
        ["foreign", "list", "number", "text", "identity"], "other results")
    values = {"foreign": {"accuracy": 1}, "list": ["identity"], "number": 5, "identity": {"identity": "mine"},
              "ours, before identities": {key: old[key] for key in ("config", "trained", "tasks", "mean")}}
    shutil.copytree(small / evaluation, tmp_path / "evaluation")
    for name in results:
        (tmp_path / name).mkdir(exist_ok=True)
        if name in values:
            write_json(tmp_path / name / "results.json", values[name])
    (tmp_path / "text" / "results.json").write_text("of another program")
    checkpoints = {"noise": random.Random(0).randbytes(5000), "empty": b"",
                   "half": (small / "ckpt.pt").read_bytes()[:9999]}
    for name, data in checkpoints.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ckpt.pt").write_bytes(data)
    (tmp_path / "previous").mkdir()
    shutil.copy(run_copy / "ckpt-previous.pt", tmp_path / "previous")
    folders = results | dict.fromkeys([*checkpoints, "previous", "copy"], "an unfinished run")
    for name, there in folders.items():
        before, words = contents(tmp_path / name), (*SMALL, "--out", tmp_path / name)
        _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
        *warnings, line = stderr.splitlines()
        assert line.startswith(f"train_tecoa.py: {tmp_path / name} holds {there}"), stderr
        assert "--overwrite replaces" in line and len(warnings) == (name == "previous")
        assert contents(tmp_path / name) == before
    for name in ("evaluation", "foreign", "noise"):
        forks.run("train_tecoa.py", *SMALL, "--overwrite", "--out", tmp_path / name, out=tmp_path / "o")
        assert not (tmp_path / name / "images.jsonl").exists()
        assert json.loads((tmp_path / name / "results.json").read_text())["identity"]["lr"] == .01

    out = tmp_path / "begun"
    out.mkdir()
    shutil.copy(small / "ckpt-previous.pt", out / "ckpt.pt")
    shutil.copytree(small / evaluation, out / "plain")      # which may be of the plain CLIP
    forks.run("train_tecoa.py", *SMALL, "--lr", .5, "--out", out, out=tmp_path / "o")
    assert contents(out / "step0-plain") == contents(small / evaluation) and not (out / "plain").exists()


def test_what_another_process_finished_meanwhile_is_not_written_over(forks, whole, tmp_path):
    """Between the look into the folder and the first write there, a real data set is loaded."""
    claim, out = "    run.claim(", tmp_path / "run"
    copied = f"    import shutil\n    shutil.copytree({str(whole)!r}, run.out)\n"
    script = changed_copy(tmp_path / "slow.py", (claim, copied + claim))
    _, stderr = forks.run(script, *EPOCHS, "--lr", .1, "--out", out, out=tmp_path / "o", status=2)
    assert "holds a finished run, with --lr 0.014 (here 0.1)" in stderr
    assert_same(whole, out)
    assert contents(whole).keys() == contents(out).keys()


def test_what_cannot_go_on_says_why(forks, whole, run_copy, tmp_path):
    model = read_checkpoint(whole / "ckpt.pt")
    del model["training"]
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "noise.pt").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "empty").mkdir()
    before = contents(run_copy)
    for words, said in (
            (["--resume", tmp_path / "absent"], "no checkpoint"),
            (["--resume", tmp_path / "empty"], "no checkpoint"),
            (["--resume", tmp_path / "noise.pt"], "noise.pt"),
            (["--resume", tmp_path / "model.pt"], "only a model"),
            (["--resume", run_copy, "--lr", .5], f"the run in {run_copy} has --lr 0.014 (here 0.5)"),
            (["--resume", run_copy, "--loss", "ce"], "--loss tecoa (here ce)"),
            (["--resume", run_copy, "--limit", 80], "--limit 64 (here 80)"),
            (["--resume", run_copy, "--optimizer", "adamw"], "--optimizer sgd (here adamw)"),
            (["--resume", run_copy, "--out", tmp_path], "--resume goes on in its own folder"),
            ([*EPOCHS, "--out", run_copy], "holds an unfinished run: --resume goes on with a run"),
            (["--save-every", "0"], "--save-every"), (["--save-every", "soon"], "--save-every")):
        _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
        assert stderr.count("\n") == 1 and said in stderr, (words, stderr)
    assert contents(run_copy) == before


def test_checkpoints_of_the_old_format_evaluate_and_export_but_do_not_go_on(forks, small, tmp_path):
    """As written before the optimizer's state was its own: momentum by name, no identity, fewer options."""
    old = torch.load(small / "ckpt.pt", weights_only=True)
    for word in ("optimizer", "weight_decay"):
        del old["config"][word]
    state = old["training"]["optimizer"]["state"]
    names = [name for name in old["visual"] if "mask" not in name]
    for name, step, goes_on_with in (
            ("ckpt.pt", 2, {"others": {}, "data": "a640bf4214e42f5b", "skipped": 0, "window": [[0., 0., 0.]],
                            "momentum": {name: state[i]["momentum_buffer"] for i, name in enumerate(names)}}),
            ("ckpt-previous.pt", 0, {})):
        torch.save(old | {"step": step, "training": goes_on_with}, tmp_path / name)
    for words in (("--resume", tmp_path), ("--resume", tmp_path / "ckpt.pt"),
                  (*SMALL, "--out", tmp_path, "--resume")):
        _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
        assert f"{tmp_path / 'ckpt.pt'} was written by an earlier version: it evaluates and exports" in stderr
        assert stderr.splitlines()[-1].startswith("train_tecoa.py: ") and stderr.count("\n") <= 2
    words = ("--resume", tmp_path / "ckpt-previous.pt")
    _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
    assert stderr.count("\n") == 1 and "has not all that training goes on from" in stderr

    tables = []
    for ckpt, out in ((small / "ckpt.pt", "new"), (tmp_path / "ckpt.pt", "old")):
        words = ("--ckpt", ckpt, *EVALUATION, "--export", tmp_path / f"{out}-clip", "--out", tmp_path / out)
        forks.run("eval_zeroshot.py", *words, out=tmp_path / "o")
        tables.append(json.loads((tmp_path / out / "results.json").read_text())["tasks"])
    assert tables[0] == tables[1]
    assert contents(tmp_path / "new-clip").keys() == contents(tmp_path / "old-clip").keys() != set()


def test_a_restart_goes_on_with_its_own_launch_alone(forks, run_copy, tmp_path):
    """Not with a run that an earlier torchrun left, whose numbers it would pass off as new ones."""
    launch = {"TORCHELASTIC_RUN_ID": "two", "TORCHELASTIC_RESTART_COUNT": "1"}
    words = (*EPOCHS, "--out", run_copy)
    _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2, **launch)
    assert "holds an unfinished run" in stderr
    words = (*SMALL, "--out", tmp_path / "run")
    forks.run("train_tecoa.py", *words, out=tmp_path / "o", TORCHELASTIC_RUN_ID="two")
    done = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()            # killed before its last table
    # --overwrite was for what the first start of this launch found
    stdout, _ = forks.run("train_tecoa.py", *words, "--overwrite", out=tmp_path / "o", **launch)
    assert "Going on after step 2" in stdout
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == done
    stdout, _ = forks.run("train_tecoa.py", *words, "--overwrite", out=tmp_path / "o", **launch)
    assert "nothing was computed" in stdout
    launch["TORCHELASTIC_RUN_ID"] = "three"
    stdout, _ = forks.run("train_tecoa.py", *words, "--overwrite", out=tmp_path / "o", **launch)
    assert "Going on" not in stdout and "wrote " in stdout


def test_a_table_of_other_tasks_is_not_taken_over(tmp_path):
    run = TrainingRun.__new__(TrainingRun)
    run.out, run.checkpoint, run.device = tmp_path, {"step": 1}, torch.device("cpu")
    run.args, run.data, run.measured_as = SimpleNamespace(seed=0), ["of train", "of b", "of a"], None
    run.refusing = contextlib.nullcontext
    row = {"n": 4, "right": 4, "chance": 50}
    made = {"tasks": {"b": row}}
    write_json(tmp_path / "results_before.json", {"tasks": {"a": {}}, "adapted": {"b": {}}})
    assert run.table_before(["b", "a"], None)["tasks"] == {"a": {}}
    assert run.table_before(["b"], lambda: made) == made
    assert json.loads((tmp_path / "results_before.json").read_text())["tasks"] == {"b": row}
    run.measured_as = {"interpolation": "bilinear"}         # as an earlier version did not say
    assert run.table_before(["b"], lambda: made | {"new": True})["new"]
    assert run.table_before(["b"], lambda: made)["new"]
    run.data = ["of train", "of other images of b", "of a"]
    assert run.table_before(["b"], lambda: made | {"new": True})["new"]
    (tmp_path / "results_before.json").write_text("half a fi")
    assert run.table_before(["b"], lambda: made) == made
    run.checkpoint = None                                   # a new run takes none
    assert run.table_before(["b"], lambda: made | {"new": True})["new"]


def test_one_run_at_a_time_in_a_folder(forks, tmp_path):
    words = (*WORDS, "--epochs", 2000, "--save-every", 1, "--out", tmp_path / "run")
    pid = forks.start("train_tecoa.py", *words, out=tmp_path / "first")
    when(lambda: steps_done(tmp_path / "run"))
    for more, said in (((), "unfinished"), (("--resume",), "another process is training in"),
                       (("--overwrite",), "another process is training in")):
        _, stderr = forks.run("train_tecoa.py", *words, *more, out=tmp_path / "second", status=2)
        assert stderr.count("\n") == 1 and said in stderr, stderr
    os.kill(pid, signal.SIGKILL)
    forks.wait(pid)
    before = read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    words = (*words, "--resume", "--max-steps", before + 1)
    stdout, _ = forks.run("train_tecoa.py", *words, out=tmp_path / "second")
    assert f"Going on after step {before}" in stdout


# ------------------------------------------------------------------------------ not finite
def test_the_first_step_that_is_not_finite_ends_the_run_and_harms_nothing(forks, whole, tmp_path):
    out = tmp_path / "run"
    script = changed_copy(tmp_path / "poisoned.py", loss="loss * float('nan')", when="calls == 7")
    _, stderr = forks.run(script, *EPOCHS, "--save-every", 5, "--out", out, out=out, status=1)
    (line,) = [line for line in stderr.splitlines() if "not finite" in line]
    assert "step 7 " in line and "--lr" in line and "log.jsonl" in line and "Traceback" not in stderr
    (batch,) = training_order(64, 8, 0, [6])
    (row,) = [row for row in log_of(out) if "nonfinite" in row]
    assert row == {"step": 7, "epoch": 0, "nonfinite": sorted(batch)}
    assert read_checkpoint(out / "ckpt.pt")["step"] == 5
    forks.run("train_tecoa.py", "--resume", out, out=out)
    assert_same(whole, out)


@pytest.mark.parametrize("change", ["loss * float('nan')",
                                    "loss + float('inf')"])         # with a finite gradient
def test_steps_that_are_not_finite_change_nothing(forks, tmp_path, change):
    """All of three steps: the model is CLIP, the optimizer as new. Some of twelve: the others train on."""
    out, some = tmp_path / "all", tmp_path / "some"
    script = changed_copy(tmp_path / "a.py", loss=change)
    forks.run(script, *WORDS, "--max-steps", 3, "--max-nonfinite", 9, "--out", out, out=out)
    start, end = (torch.load(out / name, weights_only=True) for name in ("ckpt-previous.pt", "ckpt.pt"))
    assert start["step"] == 0 and end["step"] == 3
    assert all(torch.equal(start["visual"][name], end["visual"][name]) for name in start["visual"])
    assert not leaves(end["training"]["optimizer"]["state"])
    assert [row["step"] for row in log_of(out) if "nonfinite" in row] == [1, 2, 3] and len(log_of(out)) == 3

    script, out = changed_copy(tmp_path / "b.py", loss=change, when="calls in (1, 6)"), some
    words = (*WORDS, "--max-steps", 12, "--max-nonfinite", 3, "--save-every", 7, "--out", out)
    _, stderr = forks.run(script, *words, out=out)
    assert "step 1 is left out" in stderr and "step 6 is left out" in stderr
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 6, 8, 10, 12]       # 6 is known when 7 is saved
    assert math.isfinite(rows[2]["loss"]) and rows[2]["robust"] * 48 % 100 == pytest.approx(0)
    assert json.loads((out / "results.json").read_text())["skipped"] == 2
    moved = torch.load(out / "ckpt.pt", weights_only=True)["visual"]
    assert all(tensor.isfinite().all() for tensor in moved.values()) and not torch.equal(
        moved["visual.proj"], start["visual"]["visual.proj"])
    (out / "results.json").unlink()
    script = changed_copy(tmp_path / "c.py", loss=change, when="calls == 2")
    _, stderr = forks.run(script, "--resume", out / "ckpt-previous.pt", out=out, status=1)
    # the third of the run, in another process
    assert "step 9 is left out" in stderr and [row["step"] for row in log_of(out)] == [1, 6, 8, 9]


def test_one_processs_infinity_is_left_out_by_all(forks, tmp_path):
    """Also one whose gradient is finite, so that the others know of it in no other way."""
    script = changed_copy(tmp_path / "poisoned.py", loss="loss + float('inf')",
                          when="os.environ['RANK'] == '1' and calls > 1")
    out = tmp_path / "run"
    words = (*WORDS, "--max-steps", 3, "--max-nonfinite", 3, "--out", out)
    pids = forks.start_together(2, script, *words, out=out)
    assert [forks.wait(pid) for pid in pids] == [0, 0], Path(f"{out}.0.stderr").read_text()[-2000:]
    batches = list(training_order(64, 8, 0, range(3)))
    assert [row["nonfinite"] for row in log_of(out) if "nonfinite" in row] == [sorted(b) for b in batches[1:]]


def test_accuracy_at_chance_for_long_is_warned_about(forks, tmp_path):
    row = {"step": 0, "robust": 0}
    # 1 % ± .31 % of 1,000 images
    for robust, expected in ((0, True), (1, True), (1.7, True), (2.2, False), (50, False)):
        rows = [row | {"step": step, "robust": robust} for step in range(10, 160, 10)]
        assert at_chance(rows, 50, 10, 100) == expected
        assert not at_chance(rows, 60, 10, 100)             # 90 steps after the warm-up
    rows = [row | {"step": step, "robust": 9 if step < 500 else 1} for step in range(10, 1000, 10)]
    assert not at_chance(rows[:52], 0, 10, 100) and at_chance(rows[:60], 0, 10, 100)
    assert not at_chance([], 0, 10, 100)
    words = (*WORDS, "--lr", 0, "--steps", 1, "--epochs", 15, "--out", tmp_path / "run")
    _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "run")
    assert stderr.count("at chance (10 %)") == 1
