"""bench.py and measure.py: counts against arithmetic by hand, and the command as users run it, small."""
import os
import re
import sys

import pytest
import torch

from bench import our_step
from measure import Operations, gflop, measure, without_data


def test_flops_and_bytes_of_operators_by_hand():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    with Operations() as count:
        (a @ b).T.contiguous()[:2]                  # a copy between two views, which do nothing
    assert count.flops == 2 * 3 * 5 * 7
    assert count.bytes == 4 * (3 * 5 + 5 * 7 + 3 * 7) + 4 * 2 * 3 * 7


def test_gflop_of_a_step_by_hand():
    """ViT-B/32: 49 patches and a class token of width 768, 12 blocks of which the last computes one token."""
    tokens, width, classes = 50, 768, 1000
    block = 24 * tokens * width ** 2 + 4 * tokens ** 2 * width
    last = (4 * tokens + 20) * width ** 2 + 4 * tokens * width              # keys and values of all, the rest of one
    forward = 2 * 49 * 3072 * width + 11 * block + last + 2 * width * 512 + 2 * 512 * classes
    clip, mode = without_data("ViT-B-32-quickgelu")
    with mode:
        parts = our_step(clip, 2, 2, classes)
        once, back, step = (gflop(parts[name]) / 2 for name in (
            "attack, forward", "attack, forward and input gradient", "step"))
    assert once == pytest.approx(forward / 1e9, rel=1e-3)
    assert back == pytest.approx(2 * forward / 1e9, rel=.02)                # attention's is a bit more
    assert step == pytest.approx(7 * forward / 1e9, rel=.02)


def test_measure_reports_the_middle_of_its_runs():
    calls = []
    middle, low, high, memory = measure(lambda: calls.append(1), torch.device("cpu"), 5)
    assert len(calls) == 7 and 0 <= low <= middle <= high and memory is None


def test_the_command_times_both_recipes_and_writes_its_table(run, tmp_path):
    path = tmp_path / "bench.md"
    done = run("bench.py", "--models", "ViT-B-32-quickgelu", "--batch-sizes", 1, "--steps", 1, "--compile", "eager",
               "--classes", 5, "--baseline", "authors", "--runs", 1, "--out", path)
    text = path.read_text()
    assert text.strip() == done.stdout.strip()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ViT")]
    ours, theirs = (next(float(row[8]) for row in rows if row[4:6] == [how, "step"]) for how in ("eager", "authors"))
    assert 40 < ours < 42                           # PGD-1: 8.2 + 8.3 of the attack, 24.5 of the update
    assert 200 < theirs < 250                       # and five prompts for one image, twice, with gradient
    assert re.search(r"ours \(eager\) makes \d+\.\d times the images a second of the authors' recipe", text)
    assert "| pgd_step |" in text and "| update |" in text and text.count("| random start |") == 2


@pytest.mark.parametrize("words,said", [(["--models", "ViT-X"], "unknown model"), (["--steps", "0"], "--steps"),
                                        (["--batch-sizes", "a"], "--batch-sizes"), (["--device", "tpu"], "tpu"),
                                        (["--baseline", "authors"], "--batch-sizes")])
def test_bad_options_end_in_one_line(run, words, said):
    done = run("bench.py", *words, status=2)
    assert done.stderr.count("\n") == 1 and said in done.stderr and done.stdout == ""


def test_a_long_run_is_looked_at(run, tmp_path):
    """Without a compiler to be short: four rows of numbers that are there, two workers in each."""
    run("bench.py", "--soak", 200, "--out", tmp_path / "soak.md", PATH=os.path.dirname(sys.executable), CC="gcc")
    rows = [line.split(" | ") for line in (tmp_path / "soak.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| 0–50", "| 50–100", "| 100–150", "| 150–200"]
    for row in rows:
        main, workers, theirs, files, threads, compiled = (float(cell.strip(" |").replace(",", "")) for cell in row[1:])
        assert main > 200 and workers == 2 and 1 < theirs < main and files > 5 and threads >= 1 and compiled == 0
