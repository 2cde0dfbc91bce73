"""What an evaluation has done so far, so that a killed one goes on where it was: images*.jsonl, and --save-adv's files.

Each process appends to a file of its own, after each batch: first a line that says what is evaluated, then one per image.
A finished evaluation leaves one images.jsonl, of which results.json is the summary.
"""
import fcntl
import json
import os
import re
import zlib

import numpy as np


def lock(out):
    """Keep other evaluations out of a folder, until the file descriptor returned is closed. ValueError: one is in there."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ValueError(f"another evaluation is writing to {out}") from None
    except OSError:                                     # some network file systems lock no folders
        pass
    return folder


def read_journal(out, identity):
    """({task: {number: record}}, {task: fingerprint of its images}) that an evaluation of this identity left in
    out/images*.jsonl, killed or finished.

    ValueError: an unfinished evaluation of something else is there, which writing here would destroy.
    """
    done, made_of = {}, {}
    for path in out.glob("images*.jsonl"):
        lines = []
        for line in path.read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:                          # a killed run's last line may be half a one
                continue
        if lines and lines[0].get("evaluation") == identity:
            made_of |= lines[0].get("made_of", {})
            for record in lines[1:]:
                images = done.setdefault(record.pop("task"), {})
                images[record["image"]] = images.get(record["image"], {}) | record
        elif len(lines) > 1:
            results = out / "results.json"
            if not results.exists() or "unfinished" in json.loads(results.read_text()):
                raise ValueError(f"{out} holds an unfinished evaluation of something else: give another --out, or delete it")
    return {task: {image: record for image, record in records.items() if "error" not in record}  # may be readable now
            for task, records in done.items()}, made_of


def write_journal(out, identity, made_of, done):
    """Make out/images.jsonl hold exactly `made_of` and `done`, as `read_journal` gives them; and remove what other processes
    wrote beside."""
    records = [{"task": task, **record} for task in done for record in done[task].values()]
    lines = [{"evaluation": identity, "made_of": made_of}, *records]
    temporary = out / "images.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(out / "images.jsonl")
    for path in out.glob("images-*.jsonl"):
        path.unlink()


def adversarial_folder(root, task):
    """Where --save-adv keeps the images of a task, whose name may be a path but must not lead out of root."""
    plain = re.sub(r"[^\w-]+", "-", task)
    return root / (plain if plain == task else f"{plain.strip('-')}-{zlib.crc32(task.encode()):08x}")


def save_adversarial(root, task, tensors, identity, rank):
    """Write a batch of attacked images: <number of its first image>.npz, which holds x (uint8) and x_adv (fp32)
    [B,3,H,W], image, label and adversarial (the class predicted) [B], and what was evaluated, in JSON."""
    folder = adversarial_folder(root, task)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["x"] = np.rint(255 * arrays["x"]).astype(np.uint8)
    temporary = folder / f"{rank}.tmp"
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays, evaluation=json.dumps(identity))
    temporary.replace(folder / f"{arrays['image'][0]:07d}.npz")


def without_unsaved(root, task, records, identity):
    """Those of a task's records whose attacked images, if there are any, are saved; other files' images are removed.

    ValueError: the folder holds the images of another evaluation.
    """
    folder, saved = adversarial_folder(root, task), set()
    for path in [*folder.glob("*.tmp"), *folder.glob("[0-9]*.npz")]:
        images = []
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                if json.loads(str(arrays["evaluation"])) != identity:
                    raise ValueError(f"{folder} holds the images of another evaluation: give another --save-adv")
                images = arrays["image"].tolist()
        if images and set(images) <= records.keys():
            saved |= set(images)
        else:
            path.unlink()
    return {image: record for image, record in records.items() if image in saved or "adversarial" not in record}
