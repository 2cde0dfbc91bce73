"""Batches of a task's images: read by workers, damaged ones named, copied to the device while it works."""
import atexit
import multiprocessing
import os
import signal
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from tasks.images import Unreadable, printable, say_once
from tasks.task import data_set, image_numbers

IN_A_ROW = 10                    # images that cannot be read, until it is the disk that is gone


class Batch(NamedTuple):
    x: torch.Tensor              # uint8 [B,3,H,W]
    y: torch.Tensor              # int64 [B], labels
    index: torch.Tensor          # int64 [B], each image's number in its data set
    errors: list                 # (number, what is wrong with it) of the images that could not be read

    def split(self, n):
        """n micro-batches (x, y, index): equal, consecutive slices. RuntimeError: n does not divide B."""
        return zip(*(tensor.unflatten(0, (n, -1)) for tensor in self[:3]))


def on_device(loader, device):
    """A loader's batches, on device. To a GPU they are copied while it works on the ones before."""
    if device.type != "cuda":
        yield from (Batch(*(tensor.to(device) for tensor in batch[:3]), batch.errors) for batch in loader)
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in loader:
        with torch.cuda.stream(copies):
            tensors = [tensor.to(device, non_blocking=True) for tensor in batch[:3]]
        work.wait_stream(copies)
        for tensor in tensors:
            tensor.record_stream(work)       # its memory is not reused before `work` is done with it
        yield Batch(*tensors, batch.errors)


class Readable(Dataset):
    """The images of a task, with labels that it has a class for. Item p is a pair: (uint8 [3,H,W], label,
    number), None if it is left out; and (number, error), None if it can be read. bad: see `batches`."""
    def __init__(self, task, bad):
        self.task, self.bad, self.numbers = task, bad, image_numbers(task)

    def __len__(self):
        return len(self.numbers)

    def read(self, position):
        item, classes = self.task.images[position], len(self.task.class_names)
        if not 0 <= int(item[1]) < classes:
            number, images = self.numbers[position], data_set(self.task)
            unnamed = f"image {number} of {self.task.name}"
            where = printable(images.where(number) if hasattr(images, "where") else unnamed)
            raise Unreadable(f"cannot decode {where}: label {int(item[1])} of {classes} classes")
        return item

    def __getitem__(self, position):
        problem, tries = None, min(IN_A_ROW, len(self)) if self.bad == "replace" else 1
        for other in range(position, position + tries):
            try:
                return self.read(other % len(self)), problem
            except (ValueError, OSError) as error:
                if self.bad == "raise":
                    raise
                last = printable(error)
                problem = problem or (self.numbers[position], last)
        if self.bad == "replace":
            raise Unreadable(f"{tries} images in a row cannot be read, the last: {last}")
        return None, problem


def collate(pairs):
    """The Batch of `Readable`'s pairs."""
    items, problems = ([value for value in values if value is not None] for values in zip(*pairs))
    nothing = torch.empty(0, dtype=torch.uint8), *torch.empty(2, 0, dtype=torch.int64)
    return Batch(*(default_collate(items) if items else nothing), problems)


def leave_signals_to_the_parent(_):
    """In a worker: Ctrl-C and SIGTERM reach it too, but what they mean is the main process's to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """Kill the workers that an error has left: they ignore SIGTERM, with which Python would end them."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # torch raises an error of its own for each
        worker.kill()


def batches(task, order, batch_size, workers, bad="raise"):
    """A DataLoader of a Batch each over the images of `task` in `order`.

    order: a list of positions, cut into batches; with batch_size None an iterable, perhaps a generator, of
    lists of positions, one a batch. An image that cannot be read, or whose label is of no class, raises
    ValueError, in one line that names it. bad="leave out": it is left out; "replace": the next image of the
    task that can be read stands in its place, ValueError if IN_A_ROW cannot; it is among the batch's errors.
    Workers are forked: any other way of starting them would run the stage script again in each. A system that
    cannot fork has none."""
    if batch_size is not None:
        order = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if isinstance(data_set(task), TensorDataset):
        workers = 0
    if workers and not hasattr(os, "fork"):
        say_once("this system cannot fork: images are decoded in the main process; a cache (docs/data.md) "
                 "needs no decoding")
        workers = 0
    if workers:
        atexit.unregister(end_workers)       # once, however many loaders there are
        atexit.register(end_workers)
    return DataLoader(Readable(task, bad), batch_sampler=order, collate_fn=collate, num_workers=workers,
                      multiprocessing_context="fork" if workers else None,
                      worker_init_fn=leave_signals_to_the_parent, pin_memory=torch.cuda.is_available())
