"""What keeps an evaluation alive: its folder, its journal, images shared among processes, saved attacks.

After each batch each process appends to its own journal, images.jsonl or images-<rank>.jsonl: first a line
that says what is evaluated, then one for each image. A killed evaluation goes on from them; a finished one
leaves images.jsonl, of which results.json is the summary."""
import json
import os
import re
import sys
import time
import zlib
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attacks import attack_list
from harness import files
from harness.options import (ByModel, data_options, differences, doubts, measured_as, placeless,
                             protocol_words, unused)
from harness.processes import DTYPES, RANK, WORLD, environment, gathered, rank0
from harness.reports import (draw_examples, example_prompt, full_table, interval, nothing_readable,
                             outside_the_mean, try_to_draw)
from kernels.pgd_step import to_float
from prompts import prompt_warnings
from tasks.benchmarks import present
from tasks.contents import about, differing, other_contents, other_labels, stamp
from tasks.loading import Batch, batches, on_device
from tasks.locks import lock_folder
from tasks.protocols import PROTOCOLS
from tasks.task import data_set, image_numbers, load_task, task_names


class EvaluationRun:
    """One evaluation, in one of its processes. done: {task: {image: record}} of an earlier call; finished:
    its whole results.json, where nothing is left to do."""

    def __init__(self, parser, args, known, tasks, missing, protocol, device):
        """args, known: of `settle`; missing: {task: why it is left out}; protocol: what runs, in words.
        ValueError: the folder holds something else, or the images have changed."""
        self.args, self.missing, self.device = args, missing, device
        self.protocol = protocol + f"; attacked in {args.dtype}, judged in fp32" * (args.dtype != "fp32")
        self.out, self.doubts = folder(parser, args, known), doubts(args) + unused(parser, args, known)
        self.save_adv = Path(args.save_adv) if args.save_adv else None
        self.identity = json.loads(json.dumps(parser.identity(args) | {"code": files.source_version()}))
        self.tasks = {task.name: task for task in tasks}
        self.images = rank0(lambda: {task.name: about(task) | {"stamp": stamp(task)} for task in tasks})
        self.counts, self.records = {task.name: len(task.images) for task in tasks}, {}
        self.parser, self.warnings, self.compared, self.notes = parser, {}, {}, []
        self.done, self.finished = rank0(self.look)

    def look(self, remove=False):
        """Of process 0: (what is done, results.json if that is all). remove: attacked images not needed."""
        there, done, results = files.occupant(self.out), {}, {}
        if there not in (None, "an evaluation"):
            raise ValueError(f"{self.out} holds {there}: --out DIR writes elsewhere")
        if there and not self.args.overwrite:
            identity, images, done = read_journal(self.out)
            results = files.read_json(self.out / "results.json") or {}
            end = "--out DIR writes elsewhere, --overwrite replaces it"
            wrong = differences(identity or {}, self.identity)
            if wrong or not identity:
                raise ValueError(f"{self.out} holds an evaluation{f', with {wrong}' * bool(identity)}: {end}")
            images, done, results = self.moved(images, done, results)
            rows = results.get("tasks", {})
            gone = [name for name in {**done, **rows} if name not in self.images]
            if gone:
                raise ValueError(f"{self.out} holds an evaluation of {', '.join(gone)} too, which is not "
                                 f"found here: {end}")
            for name in {**done, **rows}:
                changed = self.changes(name, images.get(name), done.get(name, {}), rows.get(name))
                if changed:
                    raise ValueError(f"the images of {name} are not those that {self.out} was begun with: "
                                     f"{changed}; {end}")
        if self.save_adv:
            done = {name: without_unsaved(self.save_adv, name, done.get(name, {}), self.identity, remove)
                    for name in self.counts}
        whole = results and "unfinished" not in results and all(
            name in results["tasks"] and len(done.get(name, ())) + results["tasks"][name]["left_out"] == count
            for name, count in self.counts.items())
        return done, results if whole else None

    def moved(self, images, done, results):
        """The same, of an earlier call, under the names that sets have here if they lie elsewhere now."""
        old, new = ([name for name in names if name not in others]
                    for names, others in ((images, self.images), (self.images, images)))
        called = {name: other for name, other in zip(old, new)
                  if placeless("tasks", name) == placeless("tasks", other)}
        images, done = ({called.get(name, name): value for name, value in found.items()}
                        for found in (images, done))
        if results:
            results = results | {"tasks": {called.get(name, name): row
                                           for name, row in results["tasks"].items()}}
        return images, done, results

    def changes(self, name, before, records, row):
        """In words, how the images of a task differ from those of an earlier call; "" if they do not.

        before: what its journal says of them; records: of those evaluated; row: of results.json, or None.
        Files with the same paths, sizes and times are the same. All others are read and compared."""
        task, now = self.tasks[name], self.images[name]
        if not isinstance(before, dict):
            self.notes.append(f"{name}: whether its images have changed since is not known, for the lack of "
                              "checksums")
            return ""
        known = {number: record for number, record in records.items() if "label" in record}
        whole = row is not None and len(known) + row["left_out"] == len(task.images)
        words = (differing(task, {word: before[word] for word in before if word != "stamp"}, now)
                 or other_labels(task, known))
        same = before["stamp"], len(known), whole
        unread = not now["stamp"] or before["stamp"] != now["stamp"]
        if not words and unread and self.compared.get(name) != same:
            words = other_contents(task, known, whole, self.args.workers)
            self.compared[name] = same
            if not (words or whole) and before["stamp"]:
                self.notes.append(f"{name}: its files have changed while it was evaluated; the images that "
                                  "were done are the same, of the others that is not known")
        return ", ".join(words)

    def begin(self, tokenizer):
        """Lock the folder, and open this process's journal. ValueError or OSError: somebody else is in it."""
        self.warnings = {task.name: prompt_warnings(tokenizer, task.class_names, task.template)
                         for task in self.tasks.values()}
        self.measured_as = measured_as(self.args)
        self.done = rank0(self.take_folder)
        self.journal = open(self.out / (f"images-{RANK}.jsonl" if RANK else "images.jsonl"), "a")
        if RANK:
            print(json.dumps({"evaluation": self.identity}), file=self.journal, flush=True)

    def take_folder(self):
        """Of process 0: what is done, now that nobody else writes here."""
        files.writable_folder(self.out)
        self.locked = lock(self.out)
        done, _ = self.look(remove=True)                # somebody may have been here meanwhile
        if self.args.overwrite:
            files.remove_results(self.out)
        if self.save_adv:
            files.writable_folder(self.save_adv)
        write_journal(self.out, self.identity, self.images, done)
        (self.out / "results.json").unlink(missing_ok=True)             # all of it is in the journal
        for word, how in self.missing.items():
            print(f"not evaluated: {word}: {how}")
        for text in self.doubts:                        # now, and with the results
            print(f"warning: {text}", file=sys.stderr, flush=True)
        if any(done.values()):
            count, total = sum(map(len, done.values())), sum(self.counts.values())
            print(f"going on: {count:,} of {total:,} images are done")
        return done

    def keep(self, task, records, tensors):
        """After each batch: what a killed run will not have to do again."""
        if self.save_adv and tensors:                   # before the lines that claim them
            save_adversarial(self.save_adv, task.name, tensors, self.identity)
        rows = ({"task": task.name, **record, **file_of(task, record["image"])} for record in records)
        self.journal.write("".join(json.dumps(row) + "\n" for row in rows))
        self.journal.flush()

    def after(self, results, task, records):
        """After each task: results.json, with what there is."""
        self.records[task.name] = {record["image"]: record | file_of(task, record["image"])
                                   for record in records}
        row = results["tasks"][task.name]
        gone = [name for name in attack_list(self.args.attack) if name not in row["attacks"]]
        instead = [f"{', '.join(gone)} is undefined for {row['classes']} classes: in its place "
                   f"{', '.join(row['attacks'])}"] if gone else []
        row["warnings"] = self.warnings.get(task.name, []) + instead + row["warnings"]
        if RANK == 0:
            left = [name for name in self.counts if name not in self.records]
            results["warnings"] = self.doubts + (
                [] if left else self.warning_of_a_plain_clip(results))
            more = {"missing": self.missing, "unfinished": left, "warnings": results["warnings"]}
            files.write_json(self.out / "results.json", {
                "config": vars(self.args) | environment(self.device), "protocol": self.protocol,
                "measured_as": self.measured_as, "identity": self.identity, "tasks": results["tasks"],
                "mean": results["mean"], **{word: value for word, value in more.items() if value}})

    def warning_of_a_plain_clip(self, results):
        """In words, in a list, that a CLIP that was never made robust looks robust; or []: it does not, or
        there are too few images to say so."""
        args, robust, rows = self.args, results["mean"]["robust"], results["tasks"].values()
        named = args.pretrained not in (None, "none") and not Path(args.pretrained).is_file()
        strong = any(word in args.attack for word in ("apgd", "fab", "autoattack"))
        large = args.norm == "linf" and args.eps >= ByModel(1, 11)(args)
        low, _ = interval(sum(row["standing"] for row in rows), sum(row["n"] for row in rows))
        shown = named and not args.ckpt and strong and large and low > 10 and robust > 10
        return [f"{robust:.1f} % robust for a CLIP that was never made robust: nearly 0 is expected, so the "
                "attack may be broken"] if shown else []

    def report(self, label, results, pictures=()):
        """Print table, unreadable images and warnings; draw `pictures`, of `attacked_examples`; the mean."""
        if RANK > 0:
            return results["mean"]
        if self.finished is None:
            self.journal.close()                        # Windows replaces no open file
            write_journal(self.out, self.identity, self.images, self.records)
            os.close(self.locked)
        how = protocol_words(self.args, measured_as(self.args))
        print(f"\n{label} under {how}: {self.protocol}\n\n{full_table(results)}\n"
              + outside_the_mean(results["tasks"], self.args.protocol))
        for name, row in results["tasks"].items():
            if self.tasks[name].source:                 # not the row's: they may have moved since
                print(f"{name}: {row['split']} images of {self.tasks[name].source}; prompts like "
                      f"{example_prompt(row)!r}")
            for error in [r["error"] for r in self.records.get(name, {}).values() if "error" in r]:
                print(f"left out of {name}: {error}")
        for text in results.get("warnings", ()):
            print(f"warning: {text}")
        for text in dict.fromkeys(self.notes):
            print(f"note: {text}")
        if pictures:
            label = Path(self.args.ckpt or self.args.model).stem
            pictures = try_to_draw(draw_examples, self.out / "examples.png", {label: pictures}, self.args.eps)
        print((f"{self.out} is finished: this is its table, nothing was computed" if self.finished else
               f"wrote {self.out}/results.json, images.jsonl") + ", examples.png" * bool(pictures)
              + (f"; {self.save_adv}/" if self.save_adv else ""))
        unread = nothing_readable(results)
        if unread:
            self.parser.error(unread)
        return results["mean"]


def folder(parser, args, known):
    """Where an evaluation goes: --out, or beside its checkpoint, or a folder named after the plain CLIP."""
    if args.out:
        return Path(args.out)
    name = parser.name(args, () if args.ckpt else ("model", "pretrained"), hidden=("ckpt",), **known)
    stem = Path(args.ckpt or "").stem.removeprefix("ckpt").strip("-")[:60]
    name = "-".join(filter(None, ["eval", stem, name]))
    # a file's name may have 255 bytes, and a character of the stem up to four
    whole = os.fsencode(name)
    if len(whole) > 240:
        name = f"{whole[:180].decode(errors='ignore')}-{zlib.crc32(whole):08x}"
    return (Path(args.ckpt).parent if args.ckpt else Path("out")) / name


def dtype_of(out):
    """The --dtype of the evaluation in a folder; None: there is none, or it does not say."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(out / "images.jsonl") as journal:
        dtype = json.loads(journal.readline())["evaluation"]["dtype"]
        return dtype if dtype in [*DTYPES] else None


def settle(parser, args, checkpoint, alpha):
    """(the options of one evaluation, what the checkpoint decides of those that were left open). ValueError.
    alpha: the checkpoint's share in the weights, 1 for its own."""
    if args.interpolate and (not args.ckpt or "prompts" in checkpoint or "text_state" in checkpoint):
        what = ("give --ckpt" if not args.ckpt else f"{args.ckpt} is a whole CLIP, and does not say of which "
                "other" if "text_state" in checkpoint else f"{args.ckpt} has visual prompts")
        raise ValueError(f"--interpolate is between a CLIP and the image encoder finetuned from it: {what}")
    args = Namespace(**vars(args) | {"interpolate": None if alpha == 1 else alpha})
    known = {word: checkpoint.get(word) for word in ("model", "pretrained")}
    known["norm"] = checkpoint["config"].get("norm")
    if args.norm in (None, known["norm"]):              # each model at the ε that it trained with
        known["eps"] = checkpoint["config"].get("eps")
    settled = parser.settle(args, **known)
    if args.dtype is None and not args.overwrite:       # auto: as the evaluation that is there has it
        settled.dtype = rank0(lambda: dtype_of(folder(parser, settled, known))) or settled.dtype
    return settled, known


def load_tasks(args, adapted=()):
    """([Task, …], {name: why it is left out}) that --tasks names. adapted: of `load_task`. ValueError."""
    everything = args.tasks == "all" and args.model != "toy" and args.data_root
    default, tasks = "toy" if args.model == "toy" else "imagenet", []
    names, missing = present(args.data_root) if everything else (task_names(args.tasks, default), {})
    if args.template and args.templates != PROTOCOLS[args.protocol].templates:
        raise ValueError(f"--template and --templates {args.templates}: give one of them")
    options = data_options(args, names) | {"templates": args.templates, "adapted": adapted}
    for name in names:
        try:
            tasks.append(load_task(name, "val", **options))
        except ValueError as error:
            if not everything:
                raise
            missing[name] = str(error)                  # half a download does not stop the others
    return tasks, missing


def phase(bar, name, more=0):
    """Say in a bar, if there is one, which phase begins: clean, attack or probe. more: images in it that the
    bar's total does not count yet."""
    if bar is not None:
        bar.phase, bar.total = name, bar.total + more
        bar.set_postfix_str(name)


@contextmanager
def progress(encoder, tasks, done):
    """(a progress bar over the images of the tasks, the encoder, which says in it where a long attack is)."""
    total, shown = sum(len(task.images) for task in tasks), 0.
    with tqdm(total=total, initial=sum(map(len, done.values())), unit="image",
              disable=RANK > 0 or not tasks) as bar:
        def watched(x):
            nonlocal shown
            if time.perf_counter() > shown + 1:
                bar.set_postfix_str(f"{bar.phase}, {len(x)} images")
                shown = time.perf_counter()
            return encoder(x)
        yield bar, watched


def choose_examples(judge, tasks, device, chosen=None):
    """Eight attacked images, spread over the tasks: [{"task", "position", "x", "x_adv", "truth", "clean",
    "adversarial"}], x and x_adv fp32 [3,H,W], the last three names of classes. judge(task, batch, attack) →
    (records, tensors) of `evaluate_batch`. chosen: an earlier result, for the same images; by default
    rightly classified ones. What is wrong when clean is not attacked: x_adv is x."""
    found, share = [], max(1, 8 // max(1, len(tasks)))
    places = [(task, [*range(i * len(task.images) // share, len(task.images))[:32]])
              for task in tasks[:8] for i in range(share)]
    if chosen is not None:
        by_name = {task.name: task for task in tasks}
        places = [(by_name[example["task"]], [example["position"]]) for example in chosen]
    for task, positions in places:
        batch = next(on_device(batches(task, positions, 32, 0, bad="leave out"), device))
        if len(batch.y) > 0:                            # one of them can be read
            records, _ = judge(task, batch, False)
            k = next((k for k, record in enumerate(records) if record["clean"] == record["label"]), 0)
            one = Batch(*(tensor[k:k + 1] for tensor in batch[:3]), [])
            (record,), tensors = judge(task, one, True)
            x, seen = to_float(one.x)[0].cpu(), record.get("adversarial", record["clean"])
            words = {"truth": record["label"], "clean": record["clean"], "adversarial": seen}
            found.append({"task": task.name, "x": x, "x_adv": tensors["x_adv"][0].cpu() if tensors else x,
                          "position": next(p for p in positions if image_numbers(task)[p] == record["image"]),
                          **{word: task.class_names[number] if number >= 0 else "NaN"
                             for word, number in words.items()}})
    return found


def shared(judge, task, positions, *, batch_size, workers, device, keep=None, bar=None):
    """The records of the images at these positions, in all processes, which share them, none twice. One that
    cannot be read has image and error. judge(batch) → (records, {name: tensor}); keep(task, records,
    tensors): called after each batch."""
    mine, size, left = [], max(1, batch_size // WORLD), len(positions)
    for batch in on_device(batches(task, positions[RANK::WORLD], size, workers, bad="leave out"), device):
        records, tensors = judge(batch) if len(batch.y) else ([], {})
        if keep is not None:                            # by which a later call knows these images again
            for record, x in zip(records, batch.x.cpu().numpy()):
                record["crc32"] = zlib.crc32(x)
        records += [{"image": image, "error": error} for image, error in batch.errors]
        if keep is not None:
            keep(task, records, tensors)
        if bar is not None:
            bar.update(min(len(records) * WORLD, left))
        left -= min(len(records) * WORLD, left)
        mine += records
    if WORLD > 1:
        phase(bar, "waits for other processes")
    return sum(gathered(mine), [])


def file_of(task, number):
    """{"file": its name} of an image that has one, inside its data set; {} of another."""
    images = data_set(task)
    name = images.file(number) if hasattr(images, "file") else None
    return {} if name is None else {"file": name}


# ------------------------------------------------------------------------------ the folder's files
def lock(out):
    """Keep others out of a folder until the file descriptor returned is closed. ValueError: one is in."""
    try:
        return lock_folder(out)
    except BlockingIOError:
        raise ValueError(f"another evaluation is writing to {out}") from None


def read_journal(out):
    """(identity, {task: what is known of its images}, {task: {image: record}}) that out/images*.jsonl hold,
    of an evaluation that was killed or finished; identity None: there is none."""
    identity, images, done = None, {}, {}
    for path in sorted(out.glob("images*.jsonl"), key=lambda path: path.name != "images.jsonl"):
        here = None
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):                  # a killed run's last line may be half a one
                row = json.loads(line)
                if "evaluation" in row:
                    here = row["evaluation"]
                    identity = identity or here
                    images |= row.get("made_of", {}) if here == identity else {}
                elif here and here == identity and "error" not in row:          # may be readable now
                    known = done.setdefault(row.pop("task"), {})
                    known[row["image"]] = known.get(row["image"], {}) | row
    return identity, images, done


def write_journal(out, identity, images, done):
    """Make out/images.jsonl hold exactly these, as `read_journal` gives them, and no other file."""
    lines = [{"evaluation": identity, "made_of": images},
             *({"task": task, **record} for task in done for record in done[task].values())]
    (out / "images.tmp").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "images.tmp").replace(out / "images.jsonl")
    for path in out.glob("images-*.jsonl"):
        path.unlink()


def adversarial_folder(root, task):
    """Where --save-adv keeps the images of a task, whose name may be a path of any length but must not lead
    out of root."""
    plain = re.sub(r"[^\w-]+", "-", task)
    if plain == task and len(os.fsencode(plain)) < 200:
        return root / plain
    return root / f"{plain[-40:].strip('-')}-{zlib.crc32(os.fsencode(task)):08x}"


def save_adversarial(root, task, tensors, identity):
    """Write a batch of attacked images, <number of its first image>.npz: x (uint8) and x_adv (fp32)
    [B,3,H,W], image, label, adversarial (the class predicted) [B], and what was evaluated, in JSON."""
    folder = adversarial_folder(root, task)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    arrays["x"] = np.rint(255 * arrays["x"]).astype(np.uint8)
    with open(folder / f"{RANK}.tmp", "wb") as file:
        np.savez_compressed(file, **arrays, evaluation=json.dumps(identity))
    (folder / f"{RANK}.tmp").replace(folder / f"{arrays['image'][0]:07d}.npz")


def without_unsaved(root, task, records, identity, remove):
    """Those of a task's records whose attacked images, if there are any, are saved. ValueError: the folder
    holds the images of another evaluation. remove: images of no record."""
    folder, saved = adversarial_folder(root, task), set()
    for path in [*folder.glob("*.tmp"), *folder.glob("[0-9]*.npz")]:
        images = set()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                if differences(json.loads(str(arrays["evaluation"])), identity):
                    raise ValueError(f"{folder} holds images of another evaluation: give another --save-adv")
                images = {*arrays["image"].tolist()}
        if images and images <= records.keys():
            saved |= images
        elif remove:
            path.unlink()
    return {image: r for image, r in records.items() if image in saved or "adversarial" not in r}
