"""Which images of a task are adapted on, in which order, under which labels."""
import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from tasks.contents import known_labels
from tasks.loading import batches
from tasks.task import data_set, image_numbers


def labels_of(task, workers=0):
    """The data set's own label of each image, int64 [n], in the task's order: from its list, or else by
    decoding it once, −1 for one that cannot be read."""
    images, numbers, labels = data_set(task), list(image_numbers(task)), known_labels(task)
    if labels is not None:
        return torch.from_numpy(labels)
    found, own = {}, task._replace(images=Subset(images, numbers))
    for batch in tqdm(batches(own, range(len(numbers)), 256, workers, bad="leave out"),
                      desc=f"labels of {task.name}", unit="batch"):
        found |= zip(batch.index.tolist(), batch.y.tolist())
    return torch.tensor([found.get(number, -1) for number in numbers])


def few_shots(task, shots, seed, workers=0):
    """The task with `shots` images of each class (or all that a class has), drawn by the seed; the same in
    any process. None whose label is of no class."""
    labels, numbers = labels_of(task, workers), image_numbers(task)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[(labels[order] >= 0) & (labels[order] < len(task.class_names))]
    # by class, and within a class still in random order; rank counts 0, 1, … within each class
    by_class = order[labels[order].argsort(stable=True)]
    rank = torch.cat([torch.arange(count) for count in labels[order].bincount()])
    chosen = sorted(by_class[rank < shots].tolist())
    whole = task.images.dataset if isinstance(task.images, Subset) else task.images
    return task._replace(images=Subset(whole, [numbers[i] for i in chosen]))


class Relabelled(Dataset):
    """A data set under other labels: see `relabelled`."""
    def __init__(self, dataset, labels):
        self.dataset, self.labels = dataset, labels

    def __getitem__(self, index):
        x, y, number = self.dataset[index]
        label = int(self.labels[number])
        return x, label if label >= 0 else int(y), int(number)


def relabelled(task, labels):
    """The task whose image of each number has the label labels[number], such as a pseudo-label; its own where
    that is negative. labels: int64 [numbers], on the CPU."""
    whole = task.images.dataset if isinstance(task.images, Subset) else task.images
    return task._replace(images=Subset(Relabelled(whole, labels), image_numbers(task)))


def training_order(count, batch_size, seed, steps, rank=0, world=1):
    """The positions that process `rank` of `world` trains on, a list for each of `steps`, of `count` images.
    Every epoch is a permutation by (seed, epoch), cut into batches without the ragged last one. The
    processes' shares of a step together are the same images however many there are."""
    per_epoch, shuffled = count // batch_size, None
    for step in steps:
        if shuffled is None or step % per_epoch == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
            shuffled = torch.randperm(count, generator=generator)
        yield shuffled[step % per_epoch * batch_size:][:batch_size][rank::world].tolist()
