"""What keeps a training run alive: folder, checkpoints, log, signals, non-finite steps, other processes.

train_tecoa.py calls the methods of one TrainingRun in the order in which they stand here. A run that is
killed at any time goes on to the same bits: what its checkpoint does not hold follows from seed and step.
"""
import argparse
import copy
import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from tqdm import tqdm

from harness import files, processes
from harness.checkpoints import FORMAT, load_visual, read_checkpoint, save_checkpoint
from harness.log import Log
from harness.options import (completed, data_options, differences, doubts, measured_as, protocol_words,
                             quarter)
from harness.processes import DTYPES, LAUNCH, RANK, RESTARTS, WORLD, environment, gathered, rank0
from harness.reports import (at_chance, ball, draw_curves, draw_examples, guessing, markdown_table,
                             nothing_readable, outside_the_mean, try_to_draw)
from harness.trackers import Trackers
from model import parts_of, resolution
from prompts import prompt_warnings
from tasks.benchmarks import BENCHMARKS, set_of
from tasks.contents import differing, fingerprint
from tasks.images import say_once
from tasks.loading import batches, on_device
from tasks.sampling import few_shots, training_order
from tasks.task import data_set, load_task, task_names

NAME = ("model", "loss", "adapt", "seed")               # what the name of every run says
PROMPTS = {"image-prompt": "border", "token-prompt": "tokens"}          # {--adapt: name in ImageEncoder}


class TrainingRun:
    """One run of train_tecoa.py, in one of its processes: args, settled; device; out, its folder;
    first_step, the step to begin with, 0 in a new run."""

    def __init__(self, parser):
        """Parse the command line, join the other processes, look into the folder. Ends the process where the
        run is finished, with its table, and where something else is there, with one line and status 2."""
        processes.begin()
        self.parser, self.refusing, args = parser, parser.refusing, parser.parse_args()
        self.again, self.overwrite, self.checkpoint = args.resume is not None, args.overwrite, None
        with self.refusing():
            if self.again and self.overwrite:
                raise ValueError("--resume goes on with a run, --overwrite replaces it: give one of them")
            if args.resume:
                args, self.checkpoint = options_of_run(parser, args)
            begun = self.checkpoint is not None and self.checkpoint["step"] > 0         # --init is not needed
            self.start, known = start_of(args) if args.init and not begun else (None, {})
            self.args, self.left_open = parser.settle(args, **known), args.dtype is None
            del self.args.resume, self.args.overwrite
            # the published sets adapted on, here and before --init: none of these images are evaluated on
            before = (self.start or self.checkpoint or {}).get("adapted", ())
            self.adapted = sorted({set_of(self.args.dataset), *before} & {*BENCHMARKS})
            self.out = Path(args.out or f"out/{parser.name(self.args, NAME, **known)}")
            self.args.out, self.identity = str(self.out), parser.identity(self.args)
            self.warnings = doubts(self.args)
            if begun and args.init and not Path(args.init).exists():
                self.identity["init"] = self.checkpoint["training"]["identity"].get("init")
            self.device = processes.start(self.args)
            self.look()
            self.trackers = Trackers(self.args.report_to)
        self.first_step = self.checkpoint["step"] if self.checkpoint else 0
        training = self.checkpoint["training"] if self.first_step else {}
        self.kept, self.skipped = training.get("kept", {}), training.get("skipped", 0)

    def look(self):
        """What is in the folder decides: begin, go on from its checkpoint, show its table, or ValueError."""
        if not self.checkpoint and (self.again or RESTARTS):
            self.checkpoint = newest_run(self.out)
            if self.checkpoint and not self.again and self.checkpoint["launch"] != LAUNCH:
                self.checkpoint = None                  # of an earlier torchrun, which this one did not begin
        results = rank0(lambda: files.read_json(self.out / "results.json"))
        if self.left_open:
            self.args.dtype = rank0(lambda: self.dtype_of_the_run(results))
            self.identity = self.identity | {"dtype": self.args.dtype}
        there = results.get("identity") if isinstance(results, dict) else None
        finished = isinstance(there, dict) and not differences(there, self.identity)
        if finished and not self.overwrite and (
                not self.checkpoint or self.checkpoint["step"] == results["step"]):
            self.show_finished(elsewhere=there != self.identity)
        if not self.checkpoint:
            rank0(self.refuse_to_overwrite)
            return
        wrong = differences(self.checkpoint["training"]["identity"], self.identity, self.parser.resumable)
        if wrong:
            raise ValueError(f"the run in {self.out} has {wrong}")

    def dtype_of_the_run(self, results):
        """What --dtype auto means: as the run that is there has it, whatever this processor would take."""
        there = self.checkpoint["training"] if self.checkpoint else results
        there = there.get("identity") if isinstance(there, dict) and not self.overwrite else None
        dtype = there.get("dtype") if isinstance(there, dict) else None
        return dtype if dtype in [*DTYPES] else self.args.dtype

    def refuse_to_overwrite(self):
        """ValueError if a new run would write over something; a run that has done no step is nothing."""
        there = None if self.overwrite else files.occupant(self.out)
        if there and not (there == "an unfinished run" and self.steps_done() == 0):
            results = files.read_json(self.out / "results.json")
            before = results.get("identity") if isinstance(results, dict) else None
            wrong = differences(before, self.identity) if isinstance(before, dict) else ""
            raise ValueError(f"{self.out} holds {there}{f', with {wrong}' * bool(wrong)}: --resume goes on "
                             "with a run, --out DIR writes elsewhere, --overwrite replaces what is there")

    def steps_done(self):
        """After how many steps the checkpoint in the folder was written; 0: there is none; −1: damaged."""
        try:
            return (newest_run(self.out) or {"step": 0})["step"]
        except ValueError:
            return -1

    def show_finished(self, elsewhere=False):
        """Print the table of the run that is there, and end the process. elsewhere: the command line names
        other places for the data than the run. ValueError: there are other images at those."""
        after = rank0(lambda: files.read_json(self.out / "results.json"))
        changed = rank0(lambda: self.changes_since(after))
        if changed and elsewhere:
            raise ValueError(f"{self.out} holds a finished run; at other places than its own for the images, "
                             f"{changed}; --out DIR writes elsewhere, --overwrite replaces it")
        if RANK == 0:
            print(f"{self.out} is finished, after step {after['step']:,}: this is its table, nothing was "
                  "computed")
            self.print_tables(files.read_json(self.out / "results_before.json"), after)
            if after["code"] != files.source_version():
                print("\nwarning: the sources have changed since then; --overwrite trains anew")
            if changed:
                print(f"\nwarning: {changed}")
        processes.end()

    def changes_since(self, results):
        """In words, how the images of a finished run have changed since, or why that is not known; or ""."""
        before = results.get("data")
        if not before:
            return ("whether its images have changed since is not known: it was written before that was "
                    "recorded")
        if all(found["drawn"] for found in before):
            return ""                                   # by the sources
        try:
            train, *others = load_data(self.args, self.adapted)
        except (ValueError, OSError) as error:
            return f"whether its images have changed since is not known: {error}"
        tasks = [train, *sum(others, [])]
        if len(tasks) != len(before):
            return f"its images have changed since: they were of {len(before)} sets, now of {len(tasks)}"
        words = [f"{task.name}: {', '.join(found)}" for task, old in zip(tasks, before)
                 if (found := differing(task, old, fingerprint(task)))]
        return f"its images have changed since then: {'; '.join(words)}" if words else ""

    def claim(self, clip, tokenizer, train, others, schedule_steps, warmup, *, compares_images):
        """Make the folder this run's alone, with a checkpoint to go on from. Ends the process if no step is
        left. train: the Task adapted on; others: those evaluated on; schedule_steps, warmup: steps of the
        whole schedule, and of its warm-up. compares_images: the loss compares an image with the others of its
        micro-batch, which must stay as they are. ValueError or OSError."""
        total_steps = min(schedule_steps, self.args.max_steps or schedule_steps)
        self.clip, self.total_steps, self.warmup = clip, total_steps, warmup
        self.data = rank0(lambda: [fingerprint(task) for task in (train, *others)])
        self.measured_as = json.loads(json.dumps(measured_as(self.args)))
        self.classes, self.per_epoch = len(train.class_names), len(train.images) // self.args.batch_size
        before = self.checkpoint or {"training": {}, "config": vars(self.args)}
        parts = len(before["training"].get("window", [0] * WORLD)), before["config"]["accumulate"]
        if compares_images and parts != (WORLD, self.args.accumulate):
            raise ValueError(f"--loss {self.args.loss} contrasts the images of a micro-batch: go on in "
                             f"{parts[0]} process(es), with --accumulate {parts[1]}")
        images = data_set(train)
        side = images.tensors[0].shape[-1] if isinstance(images, TensorDataset) else images.size
        if "protocol" not in before["config"] and side != resolution(clip.visual)[0]:
            raise ValueError(f"the run in {self.out} was begun by an earlier version, which enlarged images "
                             f"of {side} pixels with antialiasing: it cannot go on; --out DIR begins another")
        data = before["training"].get("data")
        if isinstance(data, str):
            self.print(f"note: whether the images of {train.name} are those that the run began with is not "
                       "known: its checkpoint was written before their contents were recorded")
        elif data and (changed := differing(train, data, self.data[0])):
            raise ValueError(f"the images of {train.name} are not those that the run in {self.out} began "
                             f"with: {', '.join(changed)}; --out DIR begins another, --overwrite replaces it")
        if len({*gathered(self.first_step)}) > 1:
            raise ValueError(f"the processes see different checkpoints in {self.out}: it must be one folder "
                             "for all machines")
        if self.first_step >= total_steps and files.read_json(self.out / "results.json"):
            self.show_finished()
        if self.start and not self.first_step:
            self.start = self.weights_of_start()
        rank0(self.take_folder)
        self.warnings += hopeless(self.args, total_steps, warmup)
        if RANK == 0:
            print_warnings(self.warnings)
        # printed when the prompts were encoded
        self.warnings += dict.fromkeys(f"{task.name}: {text}" for task in (train, *others) for text in
                                       prompt_warnings(tokenizer, task.class_names, task.template))
        config = vars(self.args) | environment(self.device)
        rank0(lambda: self.trackers.start(self.out, config, self.first_step, bool(self.checkpoint)))
        if RANK > 0:
            self.log = Log(None, 0)

    def weights_of_start(self):
        """What --init begins with, checked: {name in the image encoder: tensor} and, under names of
        `ImageEncoder`, visual prompts. The CLIP stays the original. ValueError."""
        args, before = self.args, copy.deepcopy(self.clip.state_dict())
        load_visual(self.clip, self.start, args.init)
        start = copy.deepcopy(self.clip.state_dict())
        self.clip.load_state_dict(before)
        if not all(torch.equal(start[name], before[name]) for name in start if name[:7] != "visual."):
            raise ValueError(f"--init {args.init} has another text encoder than --model {args.model} "
                             f"--pretrained {args.pretrained}, which is the original CLIP: give a whole CLIP "
                             "as --pretrained")
        prompts = self.start.get("prompts", {})
        lost = {*prompts} - {PROMPTS[method] for method in args.adapt.split(",") if method in PROMPTS}
        if not lost and "border" in prompts:
            inside = prompts["border"][:, :, args.border:-args.border, args.border:-args.border]
            lost = {"border"} if inside.any() else set()
        if "tokens" in prompts and len(prompts["tokens"]) != args.tokens:
            lost.add("tokens")
        if lost:
            raise ValueError(f"--init {args.init} has visual prompts ({', '.join(sorted(lost))}) that do not "
                             f"fit into --adapt {args.adapt}, its --border or its --tokens")
        return {name: t for name, t in start.items() if name.startswith("visual.")} | prompts

    def take_start(self):
        """Put what --init begins with into the image encoder, and in place of the prompts that are drawn."""
        for name, tensor in self.clip.state_dict().items():
            if name in self.start:
                tensor.copy_(self.start[name])
        for name in [name for name in PROMPTS.values() if name in self.start]:
            prompt = self.start[name]
            if name == "border":
                prompt = prompt[0].flatten(1)[:, self.encoder.frame.cpu()]
            self.others[name].data.copy_(prompt)

    def take_folder(self):
        """Of process 0: lock it, and leave nothing in it that is of another run or of a later checkpoint."""
        files.writable_folder(self.out)
        if not self.checkpoint:
            self.refuse_to_overwrite()                  # again: somebody may have finished here meanwhile
        self.log = Log(self.out / "log.jsonl", self.first_step)
        if self.overwrite and not self.checkpoint:
            files.remove_evaluations(self.out)
        elif files.evaluations_in(self.out):
            files.set_evaluations_aside(self.out, self.steps_done())
        if not self.checkpoint:
            files.remove_results(self.out)
            save_checkpoint(self.out / "ckpt.pt", self.clip, vars(self.args), step=0, launch=LAUNCH,
                            training={"identity": self.identity}, adapted=self.adapted)
            return
        print(f"Going on after step {self.first_step:,}, from {self.checkpoint['file']}.", flush=True)
        (self.out / "results.json").unlink(missing_ok=True)
        if Path(self.checkpoint["file"]) != self.out / "ckpt.pt":                   # that one is damaged
            shutil.copyfile(self.checkpoint["file"], self.out / "ckpt.pt.tmp")
            os.replace(self.out / "ckpt.pt.tmp", self.out / "ckpt.pt")

    def table_before(self, names, make):
        """The table in results_before.json, of the tasks `names`: as this run has made it, or make()."""
        path = self.out / "results_before.json"
        known = rank0(lambda: files.read_json(path)) if self.checkpoint else None
        if known and {*known["tasks"], *known.get("adapted", ())} == {*names} and (
                known.get("data", self.data[1:]) == self.data[1:]
                and known.get("measured_as") == self.measured_as):
            return known
        results = make()
        with self.refusing():
            if nothing_readable(results):
                raise ValueError(nothing_readable(results))
        for name, row in (results["tasks"] | results.get("adapted", {})).items():
            if guessing(row):
                self.print(f"warning: {name}: {guessing(row)}")
        if RANK == 0:
            files.write_json(path, {"config": vars(self.args) | environment(self.device),
                                    "data": self.data[1:], "measured_as": self.measured_as, **results})
        return results

    def once(self, name, make):
        """The tensor make(), made when the run begins and kept in its checkpoints."""
        if name not in self.kept:
            self.kept[name] = make().cpu()
        return self.kept[name]

    def begin(self, encoder, trainable, optimizer):
        """Take what is saved from here on; put a checkpoint's numbers, if there is one, into it."""
        self.encoder, self.trainable, self.optimizer = encoder, trainable, optimizer
        count = sum(p.numel() for p in trainable.values())
        self.print(f"--adapt {self.args.adapt} trains {count:,} parameters: {parts_of(trainable)}")
        self.others = {name: p for name, p in trainable.items() if not name.startswith("visual.")}
        window = []
        if self.first_step:
            with self.refusing():
                window = self.restore()
        elif self.start:
            self.take_start()
        self.checkpoint = self.start = None             # as large as the model, or three times so
        # Sums since the last line of the log, and of this step: loss, right, images. A checkpoint has those
        # of each process; where there were others, process 0 takes them all.
        if len(window) != WORLD:
            window = [[sum(column) for column in zip([0.] * 3, *window)]] + [[0.] * 3] * (WORLD - 1)
        self.sums, self.step_sums = torch.tensor([window[RANK], [0.] * 3], device=self.device)
        self.unread, self.stopped, self.images = [], [], 0
        self.warned = self.checked = False

    def restore(self):
        """What `begin` says, checked. ValueError: the checkpoint is of another model."""
        training, file = self.checkpoint["training"], self.checkpoint["file"]
        load_visual(self.clip, self.checkpoint, file)
        shapes = [{name: getattr(t, "shape", None) for name, t in tensors.items()}
                  for tensors in (training["others"], self.others)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{file} has prompts or a linear head of another model")
        for name, p in self.others.items():
            p.data.copy_(training["others"][name])
        # the state alone: what the groups are is said by the command line
        state, parameters = training["optimizer"].get("state"), [*self.trainable.values()]
        try:
            # all have one, or none as long as no step was finite
            if state and {*state} != {*range(len(parameters))}:
                raise ValueError("of other parameters")
            for index, tensors in state.items():
                shape = parameters[index].shape
                for tensor in tensors.values():
                    if torch.is_tensor(tensor) and torch.broadcast_shapes(tensor.shape, shape) != shape:
                        raise ValueError("of another shape")
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        except Exception:                               # a hostile file may have anything there
            raise ValueError(f"{file} has the optimizer's state of another model") from None
        return training["window"]

    def ddp(self, net):
        """net, sharing gradients with other processes if there are any. DDP's first backward sets the order
        of its sums: that is done here, with nothing, so that a resumed run sums as an unbroken one."""
        if WORLD == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(net, device_ids=devices)
        wrapped(torch.zeros(1, 3, *self.encoder.size, device=self.device)).sum().backward()
        net.zero_grad()
        return wrapped

    # -------------------------------------------------------------------------- in the loop
    def batches(self, task):
        """The Batch of each step that is left, on the device, of this process's images. Meanwhile SIGTERM and
        SIGINT let the loop finish its step."""
        order = training_order(len(task.images), self.args.batch_size, self.args.seed,
                               range(self.first_step, self.total_steps), RANK, WORLD)
        loader = batches(task, order, None, self.args.workers, bad="replace")
        self.bar = tqdm(total=self.total_steps, initial=self.first_step, unit="step", disable=RANK > 0,
                        desc=f"{self.args.loss} on {task.name}")
        usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        # as under nohup
        for number in [number for number, handler in usual.items() if handler != signal.SIG_IGN]:
            signal.signal(number, self.finish_the_step)
        self.logged = self.saved = time.perf_counter()
        for batch in on_device(loader, self.device):
            for image, error in batch.errors:
                self.warn(f"image {image} is left out, the next one stands in: {error}")
            yield batch
        self.bar.close()
        for number, handler in usual.items():
            signal.signal(number, handler)
        if self.stopped:                                # after the loop's last look
            os.kill(os.getpid(), self.stopped[0][0])

    def finish_the_step(self, signum, _):
        """A signal handler. A second signal ends the process; within two seconds, it is torchrun that passes
        on what its processes have got as well."""
        if self.stopped and time.monotonic() > self.stopped[0][1] + 2:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.stopped.append((signum, time.monotonic()))

    def sync_gradients(self, net, last):
        """A context for a micro-batch's backward: processes share gradients in a step's last one alone."""
        return nullcontext() if last or WORLD == 1 else net.no_sync()

    def count(self, losses, right):
        """Count a micro-batch: losses [B], and which images are recognised, bool [B]."""
        self.step_sums += torch.stack([losses.detach().sum(), right.sum(), losses.new_full((), len(losses))])

    def skip_if_nonfinite(self):
        """Let optimizer.step() change nothing if the loss or a gradient is not finite in any process."""
        if not self.checked:
            self.check_gradients()
            self.checked = True
        norm = nn.utils.get_total_norm([p.grad for p in self.trainable.values()])
        self.finite = torch.stack([norm, self.step_sums[0]]).isfinite().all().float()
        if WORLD > 1:
            dist.all_reduce(self.finite, dist.ReduceOp.MIN)
        if self.optimizer.state and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = 1 - self.finite  # a fused optimizer's: nobody waits for the GPU
        elif not self.finite:                           # the first step makes its state, and must be sound
            for p in self.trainable.values():
                p.grad = None

    def check_gradients(self):
        """RuntimeError, with their names, if not exactly the trainable parameters have a gradient."""
        named = dict(self.clip.named_parameters()) | dict(self.encoder.named_parameters()) | self.trainable
        wanted = {id(p) for p in self.trainable.values()}
        wrong = [name for name, p in named.items() if (p.grad is not None) != (id(p) in wanted)]
        if wrong:
            raise RuntimeError(f"meant to train but without a gradient, or the other way round: {wrong}")

    def after_step(self, step, lr, index):
        """Log every tenth of the steps done, save if due, stop if asked to. index: the step's images."""
        self.images += self.args.batch_size
        self.sums += self.step_sums.where(self.finite > 0, 0)
        self.step_sums.zero_()
        self.unread.append((step, self.finite, index))
        self.bar.update()
        if step % 10 == 0 or step % self.per_epoch == 0 or step == self.total_steps:
            self.write_log(step, lr)
        due, signalled = self.wishes(step)
        if due or signalled or step == self.total_steps:
            self.save(step)
        if signalled:
            self.stop(f"{signal.Signals(signalled).name} after step {step} of {self.total_steps}, saved; go "
                      f"on with --resume {self.out}", lambda: processes.end(128 + signalled))

    def write_log(self, step, lr):
        """A line of log.jsonl: means since the last one, over all processes."""
        self.look_for_nonfinite()
        if WORLD > 1:
            dist.all_reduce(self.sums)
        loss, right, count = self.sums.tolist()
        if count:
            rate, epoch = self.images / (time.perf_counter() - self.logged), (step - 1) // self.per_epoch
            self.bar.set_postfix(loss=f"{loss / count:.3f}", robust=f"{100 * right / count:.1f}%",
                                 images_per_s=f"{rate:.0f}")
            row = {"loss": loss / count, "robust": 100 * right / count, "lr": lr,
                   "images_per_s": round(rate, 1)}
            self.log.write({"step": step, "epoch": epoch, **row})
            self.trackers.tell("log", step, {f"train/{word}": value for word, value in row.items()})
            args = self.args
            if not self.warned and at_chance(self.log.rows, self.warmup, args.batch_size, self.classes):
                self.warned = True
                self.warn(f"accuracy on attacked images at chance ({100 / self.classes:.2g} %) for 100 "
                          "steps: is --lr or --eps too large?")
        self.logged, self.images = time.perf_counter(), 0
        self.sums.zero_()

    def look_for_nonfinite(self):
        """Log the steps since the last call that changed nothing, and their images; the --max-nonfinite-th
        ends the run. The flags are read, for which a GPU is waited for."""
        finite = torch.stack([flag for _, flag, _ in self.unread]).tolist() if self.unread else []
        for (step, _, index), fine in zip(self.unread, finite):
            if fine:
                continue
            images = sorted(sum(gathered(index.tolist()), []))
            self.log.write({"step": step, "epoch": (step - 1) // self.per_epoch, "nonfinite": images})
            self.skipped += 1
            said = (f"step {step} is left out, its loss or gradient is not finite; its images are in "
                    f"{self.out}/log.jsonl")
            if self.skipped >= self.args.max_nonfinite:
                self.stop(f"stopped: {said}; ckpt.pt is from before. Is --lr too large, or --warmup too "
                          "short?")
            self.warn(said)
        self.unread.clear()

    def wishes(self, step):
        """(whether to save now, the number of the signal to stop at or 0), the same in all processes."""
        often = float(self.args.save_every.removesuffix("m"))
        due = (time.perf_counter() - self.saved >= 60 * often if self.args.save_every.endswith("m") else
               step % often == 0)
        wanted = torch.tensor([due, max((number for number, _ in self.stopped), default=0)])
        if WORLD > 1:
            dist.all_reduce(wanted, dist.ReduceOp.MAX)  # gloo, past the GPUs
        return wanted.tolist()

    def save(self, step):
        """Put on the disk all that the run goes on from; ends it if that cannot be done."""
        self.look_for_nonfinite()
        window = gathered(self.sums.tolist())
        if RANK == 0:
            prompts = self.encoder.prompts()
            training = {"identity": self.identity, "data": self.data[0], "window": window,
                        "skipped": self.skipped, "kept": self.kept, "optimizer": self.optimizer.state_dict(),
                        "others": {name: p.detach().cpu() for name, p in self.others.items()}}
            try:
                self.log.sync()
                self.trackers.tell("flush")
                save_checkpoint(self.out / "ckpt.pt", self.clip, vars(self.args), step=step, launch=LAUNCH,
                                training=training, adapted=self.adapted,
                                **({"prompts": prompts} if prompts else {}))
            except OSError as error:
                self.stop(f"stopped after step {step}: {error}; what was saved before is whole: make room, "
                          f"then --resume {self.out}", draw=False)
        self.saved = time.perf_counter()

    def warn(self, text):
        self.bar.write(f"warning: {text}", file=sys.stderr)

    def stop(self, text, end=lambda: sys.exit(1), draw=True):
        """End the run, and say why in a line, once; draw: there is room for curves.png."""
        self.bar.close()
        if RANK == 0:
            print(f"{self.parser.prog}: {text}", file=sys.stderr, flush=True)
            self.trackers.tell("close", 1)
            if draw:
                self.draw_curves()
        end()

    def print(self, text):
        if RANK == 0:
            print(text, flush=True)

    def draw_curves(self):
        """curves.png, if a step was logged."""
        if any("loss" in row for row in self.log.rows):
            try_to_draw(draw_curves, self.out / "curves.png", {self.out.resolve().name: self.log.rows})

    def finish(self, before, after, examples, attacked):
        """Write results.json, with which the run is over, print the tables, draw curves.png and examples.png,
        end the process. before, after: of `evaluate_tasks`; examples: of CLIP's `attacked_examples`,
        attacked() → of the trained encoder's, called when no result hangs on it any more."""
        if RANK == 0:
            facts = {"config": vars(self.args) | environment(self.device), "identity": self.identity,
                     "code": files.source_version(), "data": self.data, "step": self.total_steps,
                     "measured_as": self.measured_as,
                     "trained": sum(p.numel() for p in self.trainable.values())}
            more = {"skipped": self.skipped, "warnings": self.warnings}
            after = facts | {word: value for word, value in more.items() if value} | after
            files.write_json(self.out / "results.json", after)
            self.print_tables(before, after)
            self.trackers.report(self.total_steps, after)
            self.draw_curves()
            if examples:
                def draw(path):
                    draw_examples(path, {"CLIP": examples, self.args.loss: attacked()}, self.args.eps)
                try_to_draw(draw, self.out / "examples.png")
            print(f"\nwrote {self.out}/: " + ", ".join(path.name for path in sorted(self.out.iterdir())
                                                       if path.is_file()))
        processes.end()

    def print_tables(self, before, after):
        config = after["config"]
        if after["tasks"]:
            steps, eps = config["eval_steps"], config["eps"] / 255
            how = protocol_words(argparse.Namespace(**completed(config)), after.get("measured_as"))
            print(f"\n{how}: PGD-{steps}, {ball(config['norm'], eps, quarter(eps, steps))}\n")
            tables = ({"CLIP": before} if before else {}) | {config["loss"]: after}
            print(markdown_table(tables, after.get("adapted", ())))
            if outside := outside_the_mean(after["tasks"], completed(config)["protocol"]):
                print(f"\n{outside}", end="")
        print_warnings(after.get("warnings", ()))


def load_data(args, adapted=()):
    """(the Task to adapt on, [those to evaluate on], [held-out images of the first, if not among these]).
    adapted: of `load_task`."""
    names = task_names(args.tasks, args.dataset, args.data_root)
    where = data_options(args, [args.dataset, *names]) | {"adapted": adapted}
    tasks = [load_task(name, "val", **where) for name in names]
    # a protocol's ensembles are for the tables
    train = load_task(args.dataset, "train", **where, templates="paper")
    train = few_shots(train, args.shots, args.seed, args.workers) if args.shots else train
    seen = not tasks or train.name in [task.name for task in tasks]
    return train, tasks, [] if seen else [load_task(args.dataset, "val", **where)]


def start_of(args):
    """(the checkpoint of --init, what it decides of the options that are left open). ValueError."""
    start = read_checkpoint(args.init, args.model)
    known = {word: start[word] for word in ("model", "pretrained")}
    # a whole CLIP is its own original
    return start, known | ({"pretrained": args.init} if "text_state" in start else {})


def hopeless(args, total_steps, warmup):
    """What keeps a run from training, in words: a list."""
    found = [] if args.lr else ["--lr 0: nothing is trained"]
    if total_steps < warmup:
        found.append(f"the run ends after {total_steps:,} steps, inside its warm-up of {warmup:,}: the "
                     f"learning rate gets to {100 * total_steps / warmup:.3g} % of --lr")
    return found


def print_warnings(texts):
    for text in texts:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def options_of_run(parser, args):
    """(options, checkpoint) of the run that --resume names; the command line stands in place of its own."""
    file = Path(args.resume, "ckpt.pt") if Path(args.resume).is_dir() else Path(args.resume)
    if args.out and Path(args.out) != file.parent:
        raise ValueError(f"--out {args.out}: --resume goes on in its own folder, {file.parent}")
    try:
        checkpoint = newest_run(file.parent) if RESTARTS else read_run(file)
        config = completed(checkpoint["config"])
        options = parser.parse_args(parser.words(config) + sys.argv[1:])
    except (ValueError, OSError) as error:
        raise ValueError(f"--resume {args.resume}: {error}") from None
    options.out = str(file.parent)
    if config["interpolation"] != checkpoint["config"].get("interpolation", "bilinear"):
        say_once(f"note: {args.resume} was begun by an earlier version, which resized images bicubically: it "
                 "goes on so, with --interpolation bicubic")
    return options, checkpoint


def read_run(path):
    """A checkpoint that training goes on from, its file's name in `file`; `training` is what TrainingRun.save
    says, at step 0 the identity alone. ValueError: another file, or a damaged one; then the checkpoint
    before it is named, if that is whole."""
    path = Path(path)
    previous = path.with_name("ckpt-previous.pt")
    kinds = {"identity": dict, "data": dict | str, "optimizer": dict, "others": dict, "window": list,
             "skipped": int, "kept": dict}
    try:
        checkpoint = read_checkpoint(path)
        training = checkpoint.get("training")
        if checkpoint["format"] != FORMAT or training is None or "step" not in checkpoint:
            raise ValueError(f"{path} has nothing that training could go on from, only a model")
        if "momentum" in training:
            raise ValueError(f"{path} was written by an earlier version: it evaluates and exports, but "
                             "training cannot go on from it")
        needed = kinds if checkpoint["step"] else {"identity": dict}
        if not all(isinstance(training.get(key), kind) for key, kind in needed.items()):
            raise ValueError(f"{path} has not all that training goes on from")
        return {"launch": None, **checkpoint, "file": str(path)}
    except ValueError as error:
        if path == previous or not previous.exists():
            raise
        try:
            step = read_run(previous)["step"]
        except ValueError:
            raise error from None
        raise ValueError(f"{error}; the checkpoint before it, of step {step:,}, is whole: --resume {previous}"
                         ) from None


def newest_run(folder):
    """`read_run` of a folder's ckpt.pt, or, which is said, of the one before; None without any."""
    newest, previous = Path(folder, "ckpt.pt"), Path(folder, "ckpt-previous.pt")
    if not (newest.exists() or previous.exists()):
        return None
    try:
        return read_run(newest)
    except ValueError as error:
        if not previous.exists():
            raise
        print(f"warning: {error}", file=sys.stderr)
        return read_run(previous)
