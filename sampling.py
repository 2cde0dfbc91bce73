"""Which images of a task are adapted on, and random views of them."""
import torch
import torch.nn.functional as F
from torch.utils.data import Subset, TensorDataset
from tqdm import tqdm

from data import Cache, Folder, batches, image_numbers
from images import Images
from kernels.pgd_step import to_float
from kernels.random_start import uniform


def labels_of(task, workers=0):
    """The label of each image, int64 [n], in the task's order: from the data set's own list, or else by decoding it once."""
    images, numbers = getattr(task.images, "dataset", task.images), image_numbers(task)      # what a Subset is made of
    if isinstance(images, TensorDataset):
        labels = images.tensors[1]
    elif isinstance(images, Folder):
        labels = images.targets
    elif isinstance(images, Cache):
        labels = images.labels
    elif isinstance(images, Images) and isinstance(images.samples, list):
        labels = [label for _, label in images.samples]
    else:
        loader = batches(task, list(range(len(task.images))), 256, workers)
        return torch.cat([y for _, y, _ in tqdm(loader, desc=f"labels of {task.name}", unit="batch")])
    return torch.as_tensor(labels).to(torch.int64)[list(numbers)]


def few_shots(task, shots, seed, workers=0):
    """The task with `shots` images of each class (or all that a class has), drawn by the seed; the same in any process."""
    labels = labels_of(task, workers)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]                 # within a class still in random order
    counts = labels.bincount()
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
