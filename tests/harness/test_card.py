"""The model card of --export: it says what the model is, how it was trained and how it did, and no more."""
import json
import re
from types import SimpleNamespace

import open_clip
import pytest
import torch
import yaml
from in_process import here

from harness.card import MARK, model_card
from harness.checkpoints import export_clip, save_checkpoint
from model import load_clip

RUN = ("--pretrained", "seed0", "--dataset", "digits", "--tasks", "digits,colours", "--limit", 16,
       "--batch-size", 8, "--epochs", 1, "--eval-steps", 1, "--steps", 1, "--warmup", 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(the folder of a small run, that of its export, which evaluates as well): made by the commands."""
    root = tmp_path_factory.mktemp("card")
    here("train_tecoa.py", *RUN, "--out", root / "run")
    words = ("--ckpt", root / "run" / "ckpt.pt", "--limit", 16, "--steps", 2, "--tasks")
    here("eval_zeroshot.py", *words, "letters")
    here("eval_zeroshot.py", *words, "colours,textures", "--out", root / "elsewhere", "--export",
         root / "export")
    return root


def parts(card):
    """(front matter, text) of a card."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text):
    """{first cell: other cells} of all tables' lines."""
    lines = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [(line[0], line[1:]) for line in lines]


def test_the_export_loads_in_open_clip_as_a_folder_and_as_a_repository(exported, monkeypatch):
    """With its card in it. A repository: as `hf download` would have left it in the cache."""
    clip = open_clip.create_model(f"local-dir:{exported / 'export'}").eval()
    snapshot = exported / "hub" / "models--org--repo" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(exported / "export")
    (exported / "hub" / "models--org--repo" / "refs").mkdir()
    (exported / "hub" / "models--org--repo" / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(exported / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = open_clip.create_model("hf-hub:org/repo").eval()
    ours, tokenizer = load_clip("hf-hub:org/repo")
    x, words = torch.rand(2, 3, 32, 32), tokenizer(["a red star"])
    run = load_clip("toy", "seed0")[0]
    run.load_state_dict(torch.load(exported / "run" / "ckpt.pt", weights_only=True)["visual"], strict=False)
    for found in (clip, hub, ours):
        assert all(torch.equal(t, found.state_dict()[name]) for name, t in run.state_dict().items())
        with torch.no_grad():
            assert torch.allclose(found.encode_image(x), run.encode_image(x), atol=1e-5)
            assert torch.allclose(found.encode_text(words), run.encode_text(words), atol=1e-5)


def test_the_card_has_the_numbers_of_all_results(exported, read_json):
    front, text = parts((exported / "export" / "README.md").read_text())
    assert front == {"library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification",
                     "tags": ["clip", "adversarial-robustness"]}
    (beside,) = exported.glob("run/eval*/results.json")
    tables = [read_json(path) for path in (exported / "run" / "results.json", beside,
                                           exported / "elsewhere" / "results.json")]
    sections = text.split("## Zero-shot accuracy")[1].split("\n**")[1:]
    assert len(sections) == 3
    for section, results in zip(sections, tables):
        found = dict(rows(section))
        for name, row in results["tasks"].items():
            assert found[name] == [str(row["n"]), str(row["classes"]), *map("{:.1f}".format, (
                row["clean"], row["robust"]))]
        mean = found[f"**mean of {len(results['tasks'])}**"][2:]
        assert mean == [f"{results['mean'][kind]:.1f}" for kind in ("clean", "robust")]
        assert section.count("- warning: ") == sum(len(row["warnings"]) for row in results["tasks"].values())
    assert "PGD-1; linf ε = 11/255" in sections[0]
    assert all(section.startswith("protocol tecoa: ") for section in sections)
    assert all(table["protocol"] in section for table, section in zip(tables[1:], sections[1:]))

    options = dict(rows(text.split("## How it was trained")[1].split("## ")[0]))
    assert [options[f"`--{word}`"] for word in ("loss", "eps", "limit", "dataset", "warmup")] == [
        ["tecoa"], ["11.0"], ["16"], ["digits"], ["0"]] and "`--data-root`" not in options
    assert "2 steps of adversarial training" in text and "TeCoA (Mao et al. 2023)" in text
    # no path of this machine
    assert str(exported) not in text and "hf-hub:ORG/REPO" in text


def card_of(tmp_path, checkpoint, out=None, ckpt=True, **words):
    """A card; the checkpoint's file is written too, and counts by its content."""
    clip = load_clip("toy", "none")[0]
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, clip, {"model": "toy", "pretrained": "none"})
    args = {"model": "toy", "pretrained": "none", "ckpt": str(path) if ckpt else None, "interpolate": None}
    return parts(model_card(SimpleNamespace(**args | words), checkpoint, out))


OURS = {"format": "tecoa-1", "config": {"loss": "tecoa"}, "step": 3}


def test_what_is_not_known_is_not_said(tmp_path):
    for checkpoint, words, said in (
            ({"config": {}}, {"ckpt": False}, "A CLIP, toy none, as it is."),
            ({"format": "visual", "config": {}}, {}, "the image encoder in ckpt.pt, which does not say how"),
            ({"format": "full", "config": {}, "text_state": {}}, {}, "the image and text encoder in ckpt.pt"),
            (OURS, {"interpolate": .25}, "0.25 of its weights are that one's, the rest the original's")):
        front, text = card_of(tmp_path, checkpoint, **words)
        assert said in text and "Not measured here." in text and "How it was trained" not in text
        assert "base_model" not in front and "license" not in front
    front, text = card_of(tmp_path, OURS, model="ViT-B-32-quickgelu", pretrained="openai")
    # as open_clip's list has it
    assert front["base_model"] == "timm/vit_base_patch32_clip_224.openai"
    front, _ = card_of(tmp_path, OURS, model="hf-hub:org/repo", pretrained=None)
    assert front["base_model"] == "org/repo"


def results_of(path, weights, **words):
    """An evaluation's results.json, of weights with this sha256."""
    row = {"n": 7, "classes": 3, "clean": 71.43, "robust": 14.29, "warnings": []}
    content = {"protocol": "PGD-9", "config": {"torch": "2", "hardware": "cpu"},
               "identity": {"ckpt": f"ckpt.pt {weights}", "interpolate": None}, "tasks": {"a": row},
               "mean": {"tasks": 1, "clean": 71.43, "robust": 14.29}} | words
    path.mkdir()
    (path / "results.json").write_text(json.dumps(content))


def test_only_whole_evaluations_of_these_weights_count(tmp_path):
    from harness.files import sha256
    card_of(tmp_path, OURS)
    weights = sha256(tmp_path / "ckpt.pt")
    results_of(tmp_path / "eval-other", "0" * 64)
    results_of(tmp_path / "eval-half", weights, unfinished=["b"])
    results_of(tmp_path / "eval-mixed", weights,
               identity={"ckpt": f"ckpt.pt {weights}", "interpolate": .5})
    (tmp_path / "eval-broken").mkdir()
    (tmp_path / "eval-broken" / "results.json").write_text("{")
    # of a run that is not this one
    (tmp_path / "results.json").write_text(json.dumps({"trained": 3, "step": 3, "identity": {"lr": 1}}))
    assert "Not measured here." in card_of(tmp_path, OURS)[1]
    assert "| a | 7 | 3 | 71.4 | 14.3 |" in card_of(tmp_path, OURS, interpolate=.5)[1]
    results_of(tmp_path / "eval", weights)
    assert card_of(tmp_path, OURS)[1].count("| a | 7 | 3 | 71.4 | 14.3 |") == 1
    # the same folder once
    assert card_of(tmp_path, OURS, out=tmp_path / "eval")[1].count("| a | 7 |") == 1


def test_no_text_becomes_markup_and_no_place_is_told(tmp_path):
    from harness.files import sha256
    card_of(tmp_path, OURS)
    row = {"n": 7, "classes": 3, "clean": None, "robust": None, "warnings": ["<b>*odd*|\n# x"]}
    results_of(tmp_path / "eval", sha256(tmp_path / "ckpt.pt"), protocol="PGD_9 [x](y)",
               tasks={"folder:/home/me/secret": row, "a|b": row},
               mean={"tasks": 0, "clean": None, "robust": None})
    identity = {"loss": "x|`y`", "dataset": "folder:/home/me/secret", "data_root": "/home/me",
                "init": "/home/me/start", "class_names": "names.txt 0123", "shots": None}
    checkpoint = OURS | {"training": {"identity": identity}, "config": {"loss": "<script>"}}
    model = f"local-dir:{tmp_path}"
    front, text = card_of(tmp_path, checkpoint, model=model, pretrained=None)
    assert "/home/me" not in text and str(tmp_path) not in text and "secret" not in text
    assert r"\<b\>\*odd\*|\\n\# x" in text and r"PGD\_9 \[x\](y)" in text
    found = rows(text)
    assert ("`--loss`", [r"x\|\`y\`"]) in found and (r"a\|b", ["7", "3", "–", "–"]) in found
    assert ("images", ["7", "3", "–", "–"]) in found and ("`--init`", ["start"]) in found
    assert r"\<script\>" in text and "<script" not in text.replace(r"\<script", "")
    assert not {"`--shots`", "`--data-root`"} & {name for name, _ in found}
    assert f"# {tmp_path.name.replace('_', chr(92) + '_')}\n" in text


def test_somebody_elses_readme_stays(exported, tmp_path, capsys):
    export_clip(load_clip("toy", "none")[0], "toy", tmp_path)
    words = ("--pretrained", "none", "--tasks", "none", "--export", tmp_path)
    here("eval_zeroshot.py", *words)
    assert MARK in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    assert "README.md is not of this program" in here("eval_zeroshot.py", *words).stdout
    assert (tmp_path / "README.md").read_text() == "mine"
