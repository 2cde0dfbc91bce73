"""bench.py, costs.py, measure.py and soak.py: counts against arithmetic by hand, and the commands, small."""
import contextlib
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from in_process import here

import kernels
from experiments import costs
from experiments.costs import Report, Row, counted, kernel_table
from experiments.measure import Bytes, gflop, measure
from kernels.pgd_step import pgd_step
from model import load_clip


def test_flops_and_bytes_of_operators_by_hand():
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)

    def function():
        # a copy between two views, which do nothing
        return (a @ b).T.contiguous()[:2]
    with Bytes() as count:
        function()
    assert gflop(function) == 2 * 3 * 5 * 7 / 1e9
    assert count.total == 4 * (3 * 5 + 5 * 7 + 3 * 7) + 4 * 2 * 3 * 7


def test_flops_of_a_gradient_to_a_modules_own_input():
    """As attacks take it, through a CPU's attention, by hand: of q, k and v [1, 2, 3, 8], two products in
    each of two heads; backwards, the five that FlashAttention makes."""
    x = torch.zeros(1, 2, 3, 8, requires_grad=True)
    layer = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)

    def attention():
        h = layer(x)
        return torch.nn.functional.scaled_dot_product_attention(h, h, h).sum()
    product = 2 * 2 * 3 * 8 * 3
    assert gflop(attention) == pytest.approx((2 * 6 * 8 * 8 + 2 * product) / 1e9)
    back = gflop(lambda: torch.autograd.grad(attention(), x))
    assert back == pytest.approx((2 * 2 * 6 * 8 * 8 + 7 * product) / 1e9)


def block(tokens, width):
    """FLOPs of a transformer's block."""
    return 24 * tokens * width ** 2 + 4 * tokens ** 2 * width


def encode(width, layers, dim, classes, tokens=50):
    """FLOPs of our encoder, with patches of 32 × 32 and a class token, and of the logits."""
    # the last block computes the class token alone: keys and values of all, the rest of one
    last = (4 * tokens + 20) * width ** 2 + 4 * tokens * width
    return (2 * 49 * 3072 * width + (layers - 1) * block(tokens, width) + last + 2 * width * dim
            + 2 * dim * classes)


def test_gflop_of_a_step_by_hand():
    forward = encode(768, 12, 512, 1000) / 1e9
    once, back, step = counted(Row("ViT-B-32-quickgelu", 2, 2, "eager"), 1000, (
        "attack, forward", "attack, forward and input gradient", "step"))
    assert once == pytest.approx(forward, rel=1e-3)
    # attention's is a bit more
    assert back == pytest.approx(2 * forward, rel=.02)
    assert step == pytest.approx(7 * forward, rel=.02)


def test_measure_takes_several_timings_after_calls_that_do_not_count():
    calls = []

    def wait():
        calls.append(1)
        # the first compiles
        time.sleep(.3 if len(calls) == 1 else .02)
    times, memory = measure(wait, torch.device("cpu"), 1.)
    assert 4 <= len(times) <= len(calls) - 2 and memory is None
    assert 20 <= times[0] and times == sorted(times) and times[-1] < 300


def test_a_kernel_beside_pytorch_and_compiled(tmp_path, monkeypatch):
    """A row: what PyTorch moves and how long it takes, compiled too."""
    x = torch.zeros(1, 3, 8, 8)
    monkeypatch.setattr(costs, "kernel_calls", lambda device: [
        ("pgd_step", "8 px", x.dtype, partial(pgd_step, x, x, x, .1, .1, "linf"), 2e6)])
    kernel_table(Report(tmp_path / "table.md", "# Kernels"), torch.device("cpu"), .01)
    cells = (tmp_path / "table.md").read_text().splitlines()[-1].strip("| ").split(" | ")
    assert cells[:4] == ["pgd_step", "8 px", "float32", "2"] and float(cells[4]) > 4 * x.nbytes / 1e6
    time = r"\d\S* \(\S+–\S+ of \d+\)"
    assert cells[5] == "–" and re.fullmatch(time, cells[6])
    assert re.fullmatch(time, cells[7]) or not kernels.COMPILER


def test_the_command_times_both_recipes_and_writes_its_table(tmp_path, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no|compiler\nat all")
    monkeypatch.setattr(torch, "compile", no_compiler)
    path = tmp_path / "bench.md"
    done = here("bench.py", "--models", "ViT-S-32-alt", "--batch-sizes", 1, "--steps", 1, "--classes", 5,
                "--compile", "eager", "--baseline", "authors", "--seconds", .01, "--device", "cpu",
                "--out", path)
    text = path.read_text()
    assert text == done.stdout
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ViT")]
    ours, theirs = (next(float(row[7]) for row in rows if row[3:5] == [how, "step"])
                    for how in ("eager", "authors"))
    # PGD-1: forward and back in the attack; in the update back to the weights, too
    assert ours == pytest.approx(5 * encode(384, 12, 256, 5) / 1e9, rel=.02)
    # all weights in both, and five prompts for one image
    both = 12 * block(50, 384) + 2 * 49 * 3072 * 384 + 5 * 10 * block(77, 256)
    assert theirs == pytest.approx(2 * 3 * both / 1e9, rel=.02)
    assert re.search(r"ours \(eager\) makes \d+\.\d times the images a second of the authors' recipe", text)
    assert "| pgd_step |" in text and "| update |" in text and text.count("| random start |") == 2
    assert text.count("| RuntimeError: no/compiler |") == 7


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch):
    """Nor does a kernel of which the compiler fails in a way of its own; status 1."""
    class CompilationError(Exception):
        pass

    def fails(*_):
        raise CompilationError
    monkeypatch.setattr(costs, "counts", fails)
    monkeypatch.setattr(costs, "kernel_calls", lambda device: [
        (name, "", "", function, 1e6) for name, function in (("bad", fails), ("good", lambda: None))])
    monkeypatch.setattr(costs, "Bytes", lambda: contextlib.nullcontext(SimpleNamespace(total=0)))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    done = here("bench.py", "--seconds", .01, "--device", "cpu", "--out", tmp_path / "bench.md", status=1)
    text = (tmp_path / "bench.md").read_text()
    assert text == done.stdout and "*This part failed: CompilationError: *" in text
    assert "| good |" in text and "seconds in all" in text and "Traceback" in done.stderr


def test_both_recipes_in_two_precisions_in_turn(tmp_path, monkeypatch, capsys):
    """By a clock of its own: the second round takes twice as long as the first that counts, which changes no
    ratio; then the time is over."""
    clock, ran = [0.], []
    seconds = {("eager", "fp32"): 6, ("eager", "bf16"): 2, ("authors", "fp32"): 24, ("authors", "bf16"): 12}

    def step(clip, row, tokens):
        def run():
            ran.append((row.how, row.dtype))
            clock[0] += seconds[row.how, row.dtype] * (1, 1, 2)[(len(ran) - 1) // 4]
        assert tokens.shape == (100, 77) and row[:3] == ("ViT-S-32-alt", 16, 2)
        return {"step": run}
    monkeypatch.setattr(costs, "our_step", step)
    monkeypatch.setattr(costs, "authors_step", step)
    monkeypatch.setattr(costs, "counted", lambda row, _: [5. if row.how == "eager" else 1600 / row.batch])
    monkeypatch.setattr(costs, "has_bf16", lambda device: True)
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    costs.in_turn_table(Report(None, "#"), "ViT-S-32-alt", seconds=100)
    assert ran == [*seconds] * 3
    said = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in said.splitlines()[-6:-2]]
    ratio = "{0:.2f} ({0:.2f}–{0:.2f})".format
    assert rows == [
        ["ours", "fp32", "9000 (6000–1.2e+04 of 2)", "1.778", "5", "–", ratio(4), ratio(4)],
        ["ours", "bf16", "3000 (2000–4000 of 2)", "5.333", "5", ratio(3), ratio(6), ratio(12)],
        ["the authors'", "fp32", "3.6e+04 (2.4e+04–4.8e+04 of 2)", "0.4444", "100", "–", "–", "–"],
        ["the authors'", "bf16", "1.8e+04 (1.2e+04–2.4e+04 of 2)", "0.8889", "100", ratio(2), "–", ratio(2)]]
    assert "theirs is 20.0 times as much arithmetic as ours at batch 16, and 1.2 times at 256" in said


def test_both_recipes_run_in_the_precision_that_they_say():
    """In bf16 the blocks' products are: ours by ImageEncoder, theirs by autocast, of the texts as well."""
    clip, _ = load_clip("ViT-S-32-alt", "none")
    seen, tokens = {}, torch.ones(2, clip.context_length, dtype=torch.int64)
    for tower, encoder in (("image", clip.visual), ("text", clip)):
        hidden = encoder.transformer.resblocks[0].mlp.c_fc
        hidden.register_forward_hook(lambda m, i, out, tower=tower: seen.update({tower: out.dtype}))
    for step, towers in ((costs.our_step, {"image"}), (costs.authors_step, {"image", "text"})):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("auto", torch.float32)):
            seen.clear()
            step(clip, Row("", 1, 1, "eager", dtype=name), tokens)["step"]()
            assert seen == dict.fromkeys(towers, dtype)


@pytest.mark.parametrize("words,said", [
    ("--models ViT-X", "unknown model"), ("--steps 0", "--steps"), ("--batch-sizes a", "--batch-sizes"),
    ("--device tpu", "tpu"), ("--baseline authors", "--batch-sizes")])
def test_bad_options_end_in_one_line(words, said):
    done = here("bench.py", *words.split(), status=2)
    assert done.stderr.count("\n") == 1 and said in done.stderr and done.stdout == ""


def test_a_command_imports_in_silence(run):
    done = run("bench.py", "--steps", 0, status=2)
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_long_run_is_looked_at(tmp_path, monkeypatch):
    """Eager alone to be short: four rows of numbers that are there, two workers in each."""
    monkeypatch.setattr(kernels, "COMPILER", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here("bench.py", "--soak", 100, "--out", tmp_path / "soak.md")
    lines = [line for line in (tmp_path / "soak.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line.replace(",", "").strip("| ").split(" | ") for line in lines[1:]]
    assert [row[0] for row in rows] == ["0–25", "25–50", "50–75", "75–100"]
    for row in rows:
        main, workers, theirs, files, threads, compiled = map(float, row[1:])
        assert main > 200 and workers == 2 and 1 < theirs < main and files > 5 and threads >= 1
        assert compiled == 0
