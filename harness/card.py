"""The model card that --export writes: README.md of what `hf upload ORG/REPO DIR` makes a repository of."""
import argparse
import json
import os
import re
from pathlib import Path

from harness.checkpoints import FORMAT
from harness.files import read_json
from harness.options import completed, content, differences, placeless, protocol_words, quarter
from harness.reports import ball, in_pipes, outside_the_mean, percent
from losses import LOSSES
from model import LOCAL_DIR, hub_repository
from tasks.images import printable

MARK = "<!-- made by eval_zeroshot.py --export, which replaces it -->"
LOADING = """## How to load it

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:ORG/REPO")
tokenizer = open_clip.get_tokenizer("hf-hub:ORG/REPO")
```

ORG/REPO is where this lies; of a folder, write `local-dir:DIR`. In the code that made this card:

```sh
python eval_zeroshot.py --model hf-hub:ORG/REPO --data-root DIR
```
"""


def escaped(value):
    """Any text in one line, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>#~&$])", r"\\\1", printable(value))


def without_place(value):
    """A text, of a path in it the last part alone: a repository is for others to see."""
    path = str(value).removeprefix(LOCAL_DIR)
    return Path(path).name if os.path.isabs(path) or os.path.exists(path) else value


def recipe(checkpoint):
    """[[option, value], …] with which a run of ours was trained, without where its files lie; []: unknown."""
    identity = checkpoint.get("training", {}).get("identity", {})
    return [[f"`--{word.replace('_', '-')}`", escaped(without_place(placeless(word, value)))]
            for word, value in identity.items()
            if value is not None and value is not False and word not in ("data_root", "tasks", "eval_steps")]


def about_model(args, checkpoint):
    """What the model is, in sentences."""
    base = " ".join(escaped(without_place(word)) for word in (args.model, args.pretrained) if word)
    alpha = args.interpolate
    mixed = "" if alpha is None else f" {alpha:g} of its weights are that one's, the rest the original's."
    if not args.ckpt:
        return f"A CLIP, {base}, as it is."
    if checkpoint["format"] != FORMAT:
        what = "image and text encoder" if "text_state" in checkpoint else "image encoder"
        return (f"A CLIP, {base}, with the {what} in {escaped(Path(args.ckpt).name)}, which does not say how "
                f"it was trained.{mixed}")
    loss = checkpoint["config"].get("loss")
    if loss in LOSSES:
        loss = f"{loss}: {' '.join(LOSSES[loss].make.__doc__.split(chr(10) * 2)[0].split())}"
    return (f"A CLIP, {base}, with an image encoder after {checkpoint.get('step', 0):,} steps of adversarial "
            f"training ({escaped(loss)}). The text encoder is the original's.{mixed}")


def evaluations(args, checkpoint, out):
    """[(what was measured, results)] of the training run and of all evaluations of these very weights that
    lie beside the checkpoint, and in the folder `out`."""
    found, folders, weights = [], [out] if out else [], None
    if args.ckpt:
        beside, weights = Path(args.ckpt).parent, content(args.ckpt, "ckpt").split()[-1]
        folders = [*sorted(path for path in beside.iterdir() if path.is_dir()), *folders]
        run, training = read_json(beside / "results.json"), checkpoint.get("training", {})
        mine = isinstance(run, dict) and run.get("trained") and run["step"] == checkpoint.get("step") and (
            not differences(run["identity"], training.get("identity", {})))
        if mine and run["tasks"] and args.interpolate is None:
            eps, steps, norm = (run["config"][word] for word in ("eps", "eval_steps", "norm"))
            found.append((f"PGD-{steps}; {ball(norm, eps / 255, quarter(eps / 255, steps))}; after training",
                          run))
    for folder in dict.fromkeys(Path(path).resolve() for path in folders):
        results = read_json(folder / "results.json")
        if isinstance(results, dict) and "protocol" in results and "unfinished" not in results:
            identity = results.get("identity", {})
            same = str(identity.get("ckpt")).split()[-1] == str(weights)
            if same and identity.get("interpolate") == args.interpolate:
                found.append((results["protocol"], results))
    return found


def section(measured, results):
    """A table of one evaluation, under what was measured."""
    config, mean = results["config"], results["mean"]
    named = {name: escaped(placeless("tasks", name)) for name in results["tasks"]}
    rows = [[named[name], row["n"], row["classes"], percent(row["clean"]), percent(row["robust"])]
            for name, row in results["tasks"].items()]
    rows.append([f"**mean of {mean['tasks']}**", "", "", percent(mean["clean"]), percent(mean["robust"])])
    notes = [f"- warning: {named[name]}: {escaped(text)}\n"
             for name, row in results["tasks"].items() for text in row["warnings"]]
    how = completed(config) | {"template": without_place(config.get("template"))}
    head = f"{protocol_words(argparse.Namespace(**how), results.get('measured_as'))}: {measured}"
    notes += [f"- {line}" for line in [outside_the_mean(results["tasks"], how["protocol"])] if line]
    return (f"**{escaped(head)}**, with PyTorch {escaped(config['torch'])} on "
            f"{escaped(config['hardware'])}:\n\n"
            + in_pipes([["set", "images", "classes", "clean %", "robust %"], ["---"] + ["--:"] * 4, *rows])
            + "\n\n" * bool(notes) + "".join(notes) + "\n" * (not notes))


def model_card(args, checkpoint, out=None):
    """The card's text. args: settled, of the evaluation that exports; checkpoint: of `read_checkpoint`, or of
    a plain CLIP {"config": {}}; out: the folder of an evaluation that was made just now."""
    base, trained = hub_repository(args.model, args.pretrained), recipe(checkpoint)
    facts = {"library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification",
             "tags": ["clip", "adversarial-robustness"], **({"base_model": base} if base else {})}
    front = "".join(f"{word}: {json.dumps(value)}\n" for word, value in facts.items())
    parts = [f"---\n{front}---\n{MARK}\n", f"# {escaped(without_place(args.model))}\n",
             about_model(args, checkpoint) + " No licence is stated here: see the original's.\n", LOADING]
    if trained:
        parts.append("## How it was trained\n\nOptions of `train_tecoa.py`, lengths in 1/255:\n\n"
                     + in_pipes([["option", "value"], ["---", "---"], *trained]) + "\n")
    measured = evaluations(args, checkpoint, out)
    parts.append("## Zero-shot accuracy\n\n" + (
        "Robust is what these attacks left standing; others may break more. Compare it with numbers of the "
        "same sets, images, attack and ε alone.\n" if measured else "Not measured here.\n"))
    return "\n".join([*parts, *(section(*found) for found in measured)])


def write_card(args, checkpoint, out=None):
    """Write `model_card` to README.md of the folder that --export names, unless somebody else's is there."""
    path = Path(args.export, "README.md")
    if path.exists() and MARK not in path.read_text(errors="replace"):
        print(f"{path} is not of this program, and stays as it is")
        return
    temporary = path.with_name("README.md.tmp")
    temporary.unlink(missing_ok=True)                   # it might be a link to somewhere else
    temporary.write_text(model_card(args, checkpoint, out), encoding="utf-8")
    temporary.replace(path)
