"""--epochs that are not whole: as many steps, and the schedule ends with them."""
import math
from argparse import ArgumentTypeError

import pytest
from in_process import here
from runs import WORDS, log_of

from harness.options import passes


def test_passes_over_the_data_set():
    for text, value in (("2", 2), ("2.0", 2), ("0.5", .5), ("1e1", 10)):
        # an int as before, by which a run's name and identity say the same
        assert passes(text) == value and type(passes(text)) is type(value)
    for text in ("0", "-1", "nan", "inf", "1e9", "x"):
        with pytest.raises((ArgumentTypeError, ValueError)):
            passes(text)


def test_a_run_of_one_and_a_half(tmp_path, read_json):
    """12 steps of 8 an epoch, the learning rate by the cosine of 12; a part of a step is a step."""
    here("train_tecoa.py", *WORDS, "--epochs", 1.5, "--workers", 0, "--out", tmp_path / "run")
    rows = {row["step"]: row["lr"] / .014 for row in log_of(tmp_path / "run")}
    # at the tenth and at the last step; warm-up of 4
    assert rows.keys() >= {10, 12} and read_json(tmp_path / "run" / "results.json")["step"] == 12
    for step in (10, 12):
        assert rows[step] == pytest.approx(.5 + .5 * math.cos(math.pi * (step - 1 - 4) / 8))
    here("train_tecoa.py", *WORDS, "--epochs", .01, "--warmup", 0, "--workers", 0, "--out", tmp_path / "one")
    assert read_json(tmp_path / "one" / "results.json")["step"] == 1
