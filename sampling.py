"""Which images of a task are adapted on, and random views of them."""
import hashlib
import json

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset, TensorDataset
from tqdm import tqdm

from cli import RANK, WORLD
from data import Cache, batches, image_numbers
from images import Images
from kernels.pgd_step import to_float
from kernels.random_start import uniform


def labels_of(task, workers=0):
    """The label of each image, int64 [n], in the task's order: from the data set's own list, or else by decoding it once,
    and −1 for one that cannot be read."""
    images, numbers = getattr(task.images, "dataset", task.images), image_numbers(task)      # what a Subset is made of
    if isinstance(images, TensorDataset):
        labels = images.tensors[1]
    elif isinstance(images, Images | Cache) and images.labels is not None:
        labels = images.labels
    else:
        found, loader = {}, batches(task, range(len(task.images)), 256, workers, bad="leave out")
        for _, y, index, _ in tqdm(loader, desc=f"labels of {task.name}", unit="batch"):
            found |= zip(index.tolist(), y.tolist())
        return torch.tensor([found.get(number, -1) for number in numbers])
    return torch.as_tensor(labels).to(torch.int64)[list(numbers)]


def few_shots(task, shots, seed, workers=0):
    """The task with `shots` images of each class (or all that a class has), drawn by the seed; the same in any process. None
    whose label is of no class."""
    labels = labels_of(task, workers)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[(labels[order] >= 0) & (labels[order] < len(task.class_names))]
    by_class = order[labels[order].argsort(stable=True)]                 # within a class still in random order
    counts = labels[order].bincount()
    rank = torch.cat([torch.arange(count) for count in counts])          # 0, 1, … within each class
    numbers, whole = image_numbers(task), getattr(task.images, "dataset", task.images)
    return task._replace(images=Subset(whole, [numbers[i] for i in sorted(by_class[rank < shots].tolist())]))


def random_view(x, keys):
    """A random view of each image: a square crop of 36 to 100 % of its area, anywhere, half of them flipped, resampled to
    the image's own size (bilinear). x [B, 3, H, W], uint8 or in [0,1] → fp32 in [0,1]; keys int64 [B], see `image_keys`.
    """
    u = uniform(keys, (4,), stream=3)                                    # streams 0 to 2 are the attack's random start
    side, flip, zero = 1 - .4 * u[:, 0], 1 - 2 * (u[:, 3] < .5).float(), torch.zeros_like(u[:, 0])
    right, down = ((1 - side) * (2 * u[:, i] - 1) for i in (1, 2))       # the crop's centre, in [−1, 1]
    theta = torch.stack([torch.stack([side * flip, zero, right], 1), torch.stack([zero, side, down], 1)], 1)     # [B, 2, 3]
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(to_float(x), grid, padding_mode="border", align_corners=False).clamp(0, 1)


def training_order(count, batch_size, accumulate, seed, steps):
    """The positions of this process's images, a list for each part of each of the `steps`, of a data set of `count` images.

    Every epoch is a permutation by (seed, epoch), cut into batches without the ragged last one. All processes' parts of a
    step together are the same however many there are.
    """
    per_epoch, shuffled = count // batch_size, None
    for step in steps:
        if shuffled is None or step % per_epoch == 0:
            shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch))
        batch = shuffled[step % per_epoch * batch_size:][:batch_size]
        yield from batch[RANK::WORLD].view(accumulate, -1).tolist()


def fingerprint(task):
    """Identifies a task's images, of those that are used, as far as that is known without decoding any: by pixels in memory,
    by names and labels in files, by checksums in a cache; and its class names and template. 16 hex digits.
    """
    images, numbers = getattr(task.images, "dataset", task.images), image_numbers(task)
    known = [np.array(numbers)]
    if isinstance(images, TensorDataset):
        known += [tensor.numpy() for tensor in images.tensors]
    else:
        known += [vars(images)[name] for name in ("files", "labels", "crc32", "names", "spans") if name in vars(images)]
    digest = hashlib.sha256(json.dumps([task.class_names, task.template, len(images)]).encode())
    for part in known:
        digest.update(np.ascontiguousarray(part).tobytes() if part is not None else b"")
    return digest.hexdigest()[:16]
