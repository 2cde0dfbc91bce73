"""What an evaluation has done so far, so that a killed one goes on where it was: images*.jsonl, and --save-adv's files.

Each process appends to a file of its own, after each batch: first a line that says what is evaluated, then one per image.
A finished evaluation leaves one images.jsonl, of which results.json is the summary.
"""
import json
import re

import numpy as np


def read_journal(out, identity):
    """{task: {number: record}} of an unfinished evaluation in out/images*.jsonl, if it is the same one; else {}."""
    try:
        if "unfinished" not in json.loads((out / "results.json").read_text()):
            return {}                                   # it is done: the same command computes it again
    except (OSError, ValueError):
        pass                                            # killed before its first results
    done = {}
    for path in out.glob("images*.jsonl"):
        lines = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:                          # a killed run's last line may be half a one
                continue
        if lines and lines[0] == {"evaluation": identity}:
            for record in lines[1:]:
                images = done.setdefault(record.pop("task"), {})
                images[record["image"]] = images.get(record["image"], {}) | record
    return done


def write_journal(out, identity, done):
    """Make out/images.jsonl hold exactly `done`, {task: {number: record}}; and remove what other processes wrote beside."""
    lines = [{"evaluation": identity}, *({"task": task, **record} for task in done for record in done[task].values())]
    temporary = out / "images.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(out / "images.jsonl")
    for path in out.glob("images-*.jsonl"):
        path.unlink()


def adversarial_folder(root, task):
    """Where --save-adv keeps the images of a task, whose name may be a path but must not lead out of root."""
    return root / (re.sub(r"[^\w.-]+", "-", task).strip("-.") or "task")


def save_adversarial(root, task, tensors, rank):
    """Write a batch of attacked images: <number of its first image>.npz, which holds x (uint8) and x_adv (fp32)
    [B,3,H,W], image, label and adversarial (the class predicted) [B]."""
    folder = adversarial_folder(root, task)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["x"] = np.rint(255 * arrays["x"]).astype(np.uint8)
    temporary = folder / f"writing{rank}.npz"
    np.savez_compressed(temporary, **arrays)
    temporary.replace(folder / f"{arrays['image'][0]:07d}.npz")


def remove_undone(root, task, done):
    """Remove a task's saved images of earlier runs, but for the files whose images are all in `done`."""
    for path in adversarial_folder(root, task).glob("[0-9]*.npz"):
        with np.load(path) as arrays:
            known = set(arrays["image"].tolist()) <= done.keys()
        if not known:
            path.unlink()
