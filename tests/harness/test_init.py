"""--init: training starts from a checkpoint, and the original CLIP stays what --pretrained says."""
import copy
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from in_process import here
from runs import log_of
from test_options import training

from harness.checkpoints import export_clip, read_checkpoint, save_checkpoint
from harness.training import TrainingRun, start_of
from model import ImageEncoder, adapt, load_clip
from tasks.loading import batches
from tasks.task import load_task

kept = functools.cache(lambda: load_clip("toy", "none")[0])      # to look at only
RUN = ("--dataset", "digits", "--tasks", "digits", "--limit", 32, "--batch-size", 8, "--eval-steps", 1,
       "--steps", 1, "--epochs", 1, "--warmup", 0)


@functools.cache
def moved():
    """The kept CLIP with another image encoder, as training would leave it."""
    clip = copy.deepcopy(kept())
    torch.manual_seed(5)
    for p in clip.visual.parameters():
        p.add_(.05 * torch.randn_like(p))
    return clip


def write(kind, folder):
    """A checkpoint of the moved CLIP: a file."""
    clip, path = moved(), folder / "start.pt"
    if kind == "ours":
        save_checkpoint(path, clip, {"model": "toy", "pretrained": "none"})
    elif kind == "authors":
        torch.save({"state_dict": {}, "vision_encoder_state_dict": clip.visual.state_dict()}, path)
    elif kind == "robustvlm":
        torch.save(clip.visual.state_dict(), path)
    elif kind == "whole":
        torch.save(clip.state_dict(), path)
    else:
        export_clip(clip, "toy", folder)
        return folder / "open_clip_model.safetensors"
    return path


def loaded(path, *words, clip=None):
    """What a run would start from: (its checked weights, the CLIP it has)."""
    args, _, _ = training("--init", path, "--model", "toy", "--pretrained", "none", *words)
    clip = clip or copy.deepcopy(kept())
    start, _ = start_of(args)
    return TrainingRun.weights_of_start(SimpleNamespace(args=args, clip=clip, start=start)), clip


@pytest.mark.parametrize("kind", ["ours", "authors", "robustvlm", "whole", "export"])
def test_all_that_evaluation_reads_is_a_start(kind, tmp_path):
    start, clip = loaded(write(kind, tmp_path))
    assert start.keys() == {f"visual.{name}" for name in moved().visual.state_dict()}
    for name, tensor in moved().visual.state_dict().items():
        assert torch.equal(start[f"visual.{name}"], tensor)
    for name, tensor in kept().state_dict().items():            # which stays the original
        assert torch.equal(clip.state_dict()[name], tensor)


def test_what_a_checkpoint_says_of_its_clip_is_the_default(tmp_path):
    for kind, model, expected in (("ours", None, ("toy", "none")), ("authors", "toy", ("toy", None)),
                                  ("whole", "toy", ("toy", str(tmp_path / "start.pt")))):
        args = SimpleNamespace(init=str(write(kind, tmp_path)), model=model)
        known = start_of(args)[1]
        assert (known["model"], known["pretrained"]) == expected
    with pytest.raises(ValueError, match="give --model and --pretrained"):
        start_of(SimpleNamespace(init=str(tmp_path / "start.pt"), model=None))


def test_a_start_with_another_text_encoder_is_refused(tmp_path):
    other = copy.deepcopy(kept())
    other.ln_final.bias.add_(1)
    for kind, said in (("whole", "another text encoder.*as --pretrained"), ("ours", "another text encoder")):
        with pytest.raises(ValueError, match=said):
            loaded(write(kind, tmp_path), clip=other)


def test_prompts_start_from_a_checkpoints(tmp_path):
    """Those of --adapt; what it has no place for is an error."""
    torch.manual_seed(3)
    border = torch.randn(1, 3, 32, 32)
    border[:, :, 3:-3, 3:-3] = 0
    prompts, path = {"border": border, "tokens": torch.randn(5, 96)}, tmp_path / "start.pt"
    save_checkpoint(path, moved(), {"model": "toy", "pretrained": "none"}, prompts=prompts)
    words = ("--adapt", "image-prompt,token-prompt", "--border", 3, "--tokens", 5)
    start, clip = loaded(path, *words)
    encoder = ImageEncoder(clip)
    others = adapt(encoder, ["image-prompt", "token-prompt"], border=3, tokens=5)
    TrainingRun.take_start(SimpleNamespace(clip=clip, encoder=encoder, others=others, start=start))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder(x), ImageEncoder(moved(), prompts=prompts)(x))
    for some, lost in ((("--adapt", "full"), "border, tokens"), (("--adapt", "token-prompt"), "border"),
                       ((*words[:2], "--border", 2), "border"), ((*words, "--tokens", 4), "tokens")):
        with pytest.raises(ValueError, match=rf"visual prompts \({lost}\)"):
            loaded(path, *some)


def test_a_run_from_a_checkpoint(tmp_path, read_json):
    """Without a step that moves it: its tables are those of the CLIP, and of the checkpoint as evaluation has
    it. With steps it goes on after a kill, though the checkpoint is gone."""
    path, still = write("ours", tmp_path), tmp_path / "still"
    done = here("train_tecoa.py", *RUN, "--init", path, "--lr", 0, "--out", still)
    assert "--lr 0: nothing is trained" in done.stderr
    visual = read_checkpoint(still / "ckpt.pt")["visual"]
    for name, tensor in moved().visual.state_dict().items():
        assert torch.equal(visual[f"visual.{name}"], tensor)
    here("train_tecoa.py", *RUN, "--pretrained", "none", "--lr", 0, "--out", tmp_path / "plain")
    before, after = (read_json(still / name) for name in ("results_before.json", "results.json"))
    plain = read_json(tmp_path / "plain" / "results.json")
    assert before["tasks"] == plain["tasks"] and after["tasks"] != plain["tasks"]
    here("eval_zeroshot.py", "--ckpt", still / "ckpt.pt", "--tasks", "digits", "--limit", 32, "--steps", 1)
    (evaluated,) = still.glob("eval*/results.json")
    rows = [results["tasks"]["digits"] for results in (after, read_json(evaluated))]
    assert rows[0]["clean"] == rows[1]["clean"] and rows[0]["standing"] == rows[1]["standing"]
    assert json.loads(json.dumps(after["identity"]))["init"].startswith("start.pt ")

    words, parts = ("train_tecoa.py", *RUN, "--init", path), tmp_path / "parts"
    here(*words, "--out", tmp_path / "whole")
    here(*words, "--out", parts, "--max-steps", 2)
    # as if it had been killed before its first step, and again later
    (parts / "results.json").unlink()
    (parts / "ckpt-previous.pt").replace(parts / "ckpt.pt")
    here("train_tecoa.py", "--resume", parts, "--max-steps", 2)
    path.unlink()
    here("train_tecoa.py", "--resume", parts, "--max-steps", 4)
    one, other = (read_checkpoint(tmp_path / name / "ckpt.pt")["visual"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert log_of(tmp_path / "parts")[-1]["step"] == 4
    assert not torch.equal(one["visual.proj"], visual["visual.proj"])


def test_fares_original_is_not_the_start(tmp_path):
    """Without attack or step its loss is the squared distance of the start's features from CLIP's."""
    here("train_tecoa.py", *RUN, "--loss", "fare", "--init", write("ours", tmp_path), "--eps", 0, "--lr", 0,
         "--out", tmp_path / "run")
    task = load_task("digits", "train", size=32, limit=32)
    x = torch.cat([batch.x for batch in batches(task, [*range(32)], 32, 0, bad="leave out")]) / 255
    apart = (ImageEncoder(moved())(x) - ImageEncoder(kept())(x)).square().sum(1)
    (row,) = log_of(tmp_path / "run")                   # one line, of all four steps
    assert abs(row["loss"] / apart.mean().item() - 1) < 1e-3
