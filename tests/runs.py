"""Small runs of train_tecoa.py, and what two of them, or two looks at one, have in common."""
import json
import time

import torch
from conftest import ROOT

# 8 steps an epoch; evaluated on the digits alone
WORDS = ("--pretrained", "none", "--dataset", "digits", "--tasks", "none", "--limit", 64, "--batch-size", 8,
         "--warmup", 4, "--eval-steps", 1)
# options that may differ in runs to the same bits
FREE = ("out", "save_every", "max_steps", "workers", "report_to", "dataset", "file sizes")


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def steps_done(out):
    """The last step in a run's log."""
    return log_of(out)[-1]["step"] if (out / "log.jsonl").exists() and log_of(out) else 0


def when(condition, seconds=60):
    """Wait for it."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.02)


def contents(folder):
    """{name: (when it was written, its bytes)} of all files in a folder."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
            for path in folder.rglob("*") if path.is_file()}


def leaves(value, name=""):
    """{path: tensor or plain value} of everything in a checkpoint."""
    if isinstance(value, dict):
        inside = [leaves(part, f"{name}/{word}") for word, part in value.items()]
        return {key: leaf for part in inside for key, leaf in part.items()}
    return {name: value}


def assert_same(one, other, log=True):
    """Two runs' folders have the same bits in their checkpoints, the same results and, if `log`, the same log
    but for its speeds."""
    a, b = (leaves(torch.load(folder / "ckpt.pt", weights_only=True)) for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], torch.Tensor):
            assert torch.equal(a[name], b[name]), name
        else:
            assert a[name] == b[name] or name == "/launch" or name.split("/")[-1] in FREE, name
    logs = [[row | {"images_per_s": 0} for row in log_of(folder)] for folder in (one, other)]
    assert not log or logs[0] == logs[1]
    for name in ("results_before.json", "results.json"):
        tables = [json.loads((folder / name).read_text()) for folder in (one, other)]
        for key in ("tasks", "mean", "adapted", "skipped"):
            assert tables[0].get(key) == tables[1].get(key)


def changed_copy(path, *changes, loss=None, when="True"):
    """A copy of train_tecoa.py with each (old, new) piece of its text exchanged, as somebody would who tries
    something.

    loss: what the contrastive losses of the update become, an expression in `loss`, in those of its calls,
    numbered from 1, for which `when`, an expression in `calls`, holds.
    """
    source = (ROOT / "train_tecoa.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    before = "" if loss is None else f"""
import os
import losses
real, calls = losses.contrastive_loss, 0
def poisoned(*args):
    global calls
    calls += 1
    loss, predicted = real(*args)
    return ({loss} if {when} else loss), predicted
losses.contrastive_loss = poisoned
"""
    # after the docstring, of which __doc__ is made
    head, rest = source.split('"""\n', 1)
    path.write_text(f'{head}"""\n{before}{rest}')
    return path
