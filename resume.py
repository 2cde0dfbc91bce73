"""What a killed training goes on from, out/<run>/ckpt.pt and log.jsonl; and the signals that stop one gently."""
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints import FORMAT, load_visual, read_checkpoint, save_checkpoint
from cli import LAUNCH, RANK, RESTARTS, WORLD, end_processes, gathered, read_json

# What may differ on resuming. The second line changes no more than rounding, the first nothing that is computed.
FREE = ("out", "data_root", "workers", "max_steps", "save_every", "max_nonfinite",
        "accumulate", "device", "compile", "kernels")
STOPPED = []                                            # (signal, when) of those that asked the loop to stop


# ---------------------------------------------------------------------------------------------- going on
def read_run(path):
    """A checkpoint that training goes on from, its file's name in `file`, and what it goes on with in `training`: {} at step
    0, else what `save_run` says.

    Raises ValueError for another file or a damaged one, which names the checkpoint before it if that is whole.
    """
    path = Path(path)
    previous = path.with_name("ckpt-previous.pt")
    try:
        checkpoint = read_checkpoint(path)
        if checkpoint["format"] != FORMAT or not {"training", "step"} <= checkpoint.keys():
            raise ValueError(f"{path} has nothing that training could go on from, only a model")
        kinds = {"momentum": dict, "others": dict, "window": list, "skipped": int, "data": str}
        if checkpoint["step"] and not all(isinstance(checkpoint["training"].get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{path} has not all that training goes on from")
        return checkpoint | {"file": str(path)}
    except ValueError as error:
        if path == previous or not previous.exists():
            raise
        step = read_run(previous)["step"]
        raise ValueError(f"{error}; the checkpoint before it, of step {step:,}, is whole: --resume {previous}") from None


def newest_run(folder):
    """`read_run` of a folder's ckpt.pt, or, if that is damaged, of the one before, which is said; None without any."""
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


def parse_resumable(parser):
    """(options, their checkpoint or None, whether to go on if something is there). With --resume RUN the options are those
    of the run, but for those that the command line has now."""
    args, checkpoint = parser.parse_args(), None
    again = args.resume is not None
    if args.resume:
        file = Path(args.resume, "ckpt.pt") if Path(args.resume).is_dir() else Path(args.resume)
        if args.out and Path(args.out) != file.parent:
            parser.error(f"--out {args.out}: --resume goes on in its own folder, {file.parent}")
        try:
            checkpoint = newest_run(file.parent) if RESTARTS else read_run(file)
            words = parser.words(checkpoint["config"])
        except (ValueError, OSError) as error:
            parser.error(f"--resume {args.resume}: {error}")
        args = parser.parse_args(words + sys.argv[1:])
        args.out = str(file.parent)
    del args.resume                                     # from here on args is what the run is
    return args, checkpoint, again


def claim_folder(out, config, checkpoint, again, made_of, total, clip):
    """(checkpoint to go on from or None, the folder's Log): of this run alone, without what is of an earlier one; a new
    run's has a checkpoint of step 0. Ends the process if the run is over, all its `total` steps and its last table.

    made_of: the images' fingerprint. Raises ValueError: another run is there, unfinished or being written; options or images
    are not those of the checkpoint; processes see different ones.
    """
    checkpoint = checkpoint or (newest_run(out) if again or RESTARTS else None)
    if checkpoint and not again and checkpoint.get("launch") != LAUNCH:              # of an earlier torchrun
        checkpoint = None
    if checkpoint:
        for word, value in checkpoint["config"].items():
            if word not in FREE and config.get(word) != value:
                raise ValueError(f"--{word.replace('_', '-')} {config.get(word)}: the run in {out} has {value}")
        parts = len(checkpoint["training"].get("window", [0] * WORLD)), checkpoint["config"]["accumulate"]
        if config["loss"] == "imgcoadv" and parts != (WORLD, config["accumulate"]):
            raise ValueError("--loss imgcoadv contrasts the images of one process and part: go on in {} process(es), with "
                             "--accumulate {}".format(*parts))
        if checkpoint["training"].get("data", made_of) != made_of:
            raise ValueError(f"the images of {config['dataset']} are not those that the run in {out} began with")
    elif RANK == 0 and (out / "ckpt.pt").exists() and not (out / "results.json").exists():
        if read_run(out / "ckpt.pt")["step"]:
            raise ValueError(f"{out} holds an unfinished run: add --resume to go on with it, or delete it")
    over = checkpoint and checkpoint["step"] >= total and (out / "results.json").exists()
    if len({*gathered(checkpoint and checkpoint["step"])}) > 1:
        raise ValueError(f"the processes see different checkpoints in {out}: it must be one folder for all machines")
    if over:
        if RANK == 0:
            print(f"{out} is finished, after step {checkpoint['step']:,}: nothing to go on with")
        end_processes()
        sys.exit()
    if RANK > 0:
        return checkpoint, Log(None, 0)
    log = Log(out / "log.jsonl", checkpoint["step"] if checkpoint else 0)
    of_an_earlier_run = ("ckpt.pt", "ckpt-previous.pt", "results_before.json", "examples.png") if not checkpoint else ()
    for name in ("results.json", *of_an_earlier_run):
        (out / name).unlink(missing_ok=True)
    if checkpoint and Path(checkpoint["file"]) != out / "ckpt.pt":                   # that one is damaged
        shutil.copyfile(checkpoint["file"], out / "ckpt.pt.tmp")
        os.replace(out / "ckpt.pt.tmp", out / "ckpt.pt")
    if not checkpoint:                                  # from here on there is something to go on from
        save_checkpoint(out / "ckpt.pt", clip, config, step=0, training={}, launch=LAUNCH)
    else:
        print(f"Going on after step {checkpoint['step']:,}, from {checkpoint['file']}.", flush=True)
    return checkpoint, log


def known_results(path, tasks):
    """The table of a run that goes on, in all processes; None if there is none yet, or if it is of other tasks."""
    (known, *_) = gathered(read_json(path) if RANK == 0 else None)
    names = {*known["tasks"], *known.get("adapted", ())} if known else None
    return known if names == {task.name for task in tasks} else None


def restore(checkpoint, clip, trained, optimizer):
    """Put a checkpoint's numbers into model, prompts, readout and optimizer; ends the run if they do not fit."""
    try:
        load_visual(clip, checkpoint, checkpoint["file"])
    except ValueError as error:
        sys.exit(f"--resume: {error}")
    momentum = {name: optimizer.state[p]["momentum_buffer"] for name, p in trained.items()}
    others = {name: p for name, p in trained.items() if not name.startswith("visual.")}
    for kind, tensors in (("momentum", momentum), ("others", others)):
        saved = checkpoint["training"][kind]
        if {name: getattr(t, "shape", None) for name, t in saved.items()} != {name: t.shape for name, t in tensors.items()}:
            sys.exit(f"--resume: {checkpoint['file']} has the {kind} of another model")
        for name, tensor in tensors.items():
            tensor.data.copy_(saved[name])


def save_run(out, clip, config, log, step, trained, optimizer, prompts, *, pseudo=None, **more):
    """Process 0 writes ckpt.pt: what `save_checkpoint` does, and in `training` what the run goes on with. OSError.

    training: momentum {name: tensor}, others {name: tensor} (what is trained beside `visual`: prompts, readout) and `more`:
    data (`sampling.fingerprint`), window (sums of each process, for the next line of the log), skipped (steps left out so
    far), and pseudo, labels by image number, if they are. log: on the disk before the checkpoint that says it is there.
    """
    if RANK > 0:
        return
    more |= {} if pseudo is None else {"pseudo": pseudo.cpu()}
    momentum = {name: optimizer.state[p]["momentum_buffer"].cpu() for name, p in trained.items()}
    others = {name: p.detach().cpu() for name, p in trained.items() if not name.startswith("visual.")}
    log.sync()
    save_checkpoint(out / "ckpt.pt", clip, config, step=step, launch=LAUNCH, **({"prompts": prompts} if prompts else {}),
                    training={"momentum": momentum, "others": others} | more)


# ---------------------------------------------------------------------------------------------- the log
class Log:
    """log.jsonl, which belongs to this process until it ends; rows beyond `step` are cut off. path None: a log of nothing.

    rows: all there is, a list of dicts. ValueError: another process is training into it.
    """

    def __init__(self, path, step):
        self.rows, self.waiting, self.file = [], [], path and open(
            path, "a+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
        if not path:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)     # not flock, which workers inherit: they may end later
        except BlockingIOError:
            raise ValueError(f"another process is training in {path.parent}") from None
        except OSError:                                 # some network file systems lock nothing
            pass
        self.file.seek(0)
        end = 0
        for line in self.file.read().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:                          # a killed run's last line may be half a one
                break
            if not line.endswith(b"\n") or not isinstance(row, dict) or not row.get("step", math.inf) <= step:
                break
            self.rows.append(row)
            end += len(line)
        self.file.truncate(end)

    def write(self, row):
        """Append a row. On a full disk it waits for the next one, and for `sync`: a log alone ends no run."""
        if self.file:
            self.rows.append(row)
            self.waiting.append(row)
            try:
                self.flush()
            except OSError as error:
                print(f"\nwarning: {error}; the log will be written later", file=sys.stderr)

    def flush(self):
        end, text = self.file.seek(0, os.SEEK_END), "".join(json.dumps(row) + "\n" for row in self.waiting).encode()
        try:
            if self.file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        except OSError:
            self.file.truncate(end)                     # all of it or nothing
            raise
        self.waiting.clear()

    def sync(self):
        """Have every row on the disk: OSError."""
        self.flush()
        os.fsync(self.file.fileno())


def log_nonfinite(log, steps, per_epoch):
    """Write a row for each of these steps, (number, flag, [image numbers, …]), whose flag is 0: its loss or gradient was not
    finite. Returns their numbers. The flags are read, for which a GPU is waited for; all processes call this alike."""
    finite = torch.stack([flag for _, flag, _ in steps]).tolist() if steps else []
    bad = [(number, index) for (number, _, index), fine in zip(steps, finite) if not fine]
    for number, index in bad:
        images = sorted(sum(gathered(torch.cat(index).tolist()), []))
        log.write({"step": number, "epoch": (number - 1) // per_epoch, "nonfinite": images})
    return [number for number, _ in bad]


# ---------------------------------------------------------------------------------------------- stopping gently
def finish_the_step(signum, _):
    """A signal handler: the loop looks at STOPPED after each step. Another signal two seconds later (sooner, it is torchrun
    that passes on what its processes have got as well) ends the process at once."""
    if STOPPED and time.monotonic() > STOPPED[0][1] + 2:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    STOPPED.append((signum, time.monotonic()))


def catch_signals():
    """From now on SIGTERM and SIGINT let the loop finish its step, unless they are ignored, as under nohup; returns a
    function that undoes this."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in usual.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, finish_the_step)

    def restore_signals():
        for number, handler in usual.items():
            signal.signal(number, handler)
        if STOPPED:                                     # after the loop's last look
            os.kill(os.getpid(), STOPPED[0][0])
    return restore_signals


def wishes(step, save_every, saved):
    """(whether to save now, the number of the signal to stop at or 0), the same in all processes.

    save_every: "N" steps or "Nm" minutes, after `saved`, of time.perf_counter(); each process has a clock and signals of
    its own.
    """
    often = float(save_every.removesuffix("m"))
    due = time.perf_counter() - saved >= 60 * often if save_every.endswith("m") else step % often == 0
    wanted = torch.tensor([due, max((number for number, _ in STOPPED), default=0)])
    if WORLD > 1:
        dist.all_reduce(wanted, dist.ReduceOp.MAX)      # gloo, past the GPUs
    return wanted.tolist()
