"""tasks/sampling.py: labels, few shots, other labels, the order of training."""
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from writers import png, write_shards

from tasks.cache import Cache
from tasks.contents import fingerprint
from tasks.images import Folder, Images, Unreadable
from tasks.loading import batches
from tasks.make_cache import make_cache
from tasks.sampling import few_shots, labels_of, relabelled, training_order
from tasks.task import Task, image_numbers, load_task


# --------------------------------------------------------------------------------------------- labels, shots
def counts(task):
    return labels_of(task).bincount().tolist()


def in_memory(labels, classes=4):
    """A task whose image i is of the number i."""
    n = torch.arange(len(labels))
    images = TensorDataset(n.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.tensor(labels), n)
    return Task("mine", images, [f"class {c}" for c in range(classes)], "{}")


def test_shots_are_so_many_images_of_each_class():
    # five of each
    task = in_memory([i * 7 % 40 for i in range(200)], 40)
    some, again, other = (few_shots(task, 3, seed) for seed in (0, 0, 1))
    assert counts(some) == [3] * 40 and counts(few_shots(task, 9, 0)) == [5] * 40
    assert some.images.indices == again.images.indices != other.images.indices
    assert len(set(some.images.indices)) == 120
    assert [some.images[i][1] for i in range(120)] == labels_of(some).tolist()
    # of what `limit` left, too
    within = few_shots(few_shots(task, 4, 7), 2, 8)
    assert counts(within) == [2] * 40 and {*within.images.indices} <= {*few_shots(task, 4, 7).images.indices}


class Decoded(Dataset):
    """A set with no list of its labels, of which the images before `first` cannot be read."""
    def __init__(self, first=0):
        self.first = first

    def __len__(self):
        return 7

    def __getitem__(self, i):
        if i < self.first:
            raise Unreadable("gone")
        return torch.zeros(3, 4, 4, dtype=torch.uint8), i % 3, i


def test_labels_come_without_decoding_where_the_set_lists_them(tmp_path, monkeypatch):
    for k in range(7):
        (tmp_path / "set" / "train" / f"class{k % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "train" / f"class{k % 3}" / f"{k}.png").write_bytes(png(8, 8))
    make_cache(f"folder:{tmp_path / 'set'}", tmp_path / "cache.npy", size=8)
    folder = load_task(f"folder:{tmp_path / 'set'}", "train", size=8)
    cache = load_task(f"cache:{tmp_path / 'cache.npy'}", "train", size=8)
    files = Task("files", Images("files", [(str(i), i % 3) for i in range(7)], 8), ["a", "b", "c"], "{}")
    for kind in (Folder, Images, Cache):
        monkeypatch.setattr(kind, "__getitem__", lambda self, i: pytest.fail("decodes"))
    assert labels_of(folder).tolist() == labels_of(cache).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert labels_of(files).tolist() == [0, 1, 2, 0, 1, 2, 0]
    part = folder._replace(images=Subset(folder.images, [0, 2, 3, 6]))
    assert labels_of(part).tolist() == [0, 0, 1, 2] and counts(few_shots(part, 1, 0)) == [1, 1, 1]


def test_labels_are_decoded_where_they_are_not_listed():
    task = Task("decoded", Decoded(), ["a", "b", "c"], "{}")
    assert labels_of(task).tolist() == [0, 1, 2, 0, 1, 2, 0]
    part = task._replace(images=Subset(task.images, [5, 1, 6]))
    assert labels_of(part).tolist() == [2, 1, 0]
    gone = Task("gone", Decoded(first=5), ["a", "b", "c"], "{}")
    assert labels_of(gone).tolist() == [-1] * 5 + [2, 0] and few_shots(gone, 2, 0).images.indices == [5, 6]


def test_shots_are_of_what_has_a_label_of_a_class(tmp_path):
    shards = load_task(f"wds:{write_shards(tmp_path / 'wds', [0, 7, 4], [*'abcde'], 'png')}", "val", size=8)
    for task, labels in ((in_memory([0, 7, 4], 5), [0, 7, 4]), (shards, [0, -1, 4])):
        assert labels_of(task).tolist() == labels and few_shots(task, 1, 0).images.indices == [0, 2]
        # now 4 is none either
        task.class_names.pop()
        assert few_shots(task, 1, 0).images.indices == [0]


# --------------------------------------------------------------------------------------------- other labels
def test_relabelled_images_have_the_label_of_their_number_where_it_is_one():
    task, labels = in_memory([0, 1, 2, 3, 0, 1]), torch.tensor([3, -1, 0, 0, -1, 2])
    expected = [3, 1, 0, 0, 0, 2]
    for numbers in (range(6), [4, 0, 5], [2]):
        part = task if len(numbers) == 6 else task._replace(images=Subset(task.images, numbers))
        other = relabelled(part, labels)
        loader = batches(other, range(len(numbers)), 6, workers=2)
        # in memory it is read here, by no workers
        batch, = loader
        assert loader.num_workers == 0
        assert batch.y.tolist() == [expected[i] for i in numbers] and batch.index.tolist() == list(numbers)
        assert batch.x[:, 0, 0, 0].tolist() == list(numbers) == list(image_numbers(other))
        # the rest is the data set's
        assert torch.equal(labels_of(other), labels_of(part)) and fingerprint(other) == fingerprint(part)
    shots = few_shots(relabelled(task, labels), 1, 0)
    assert counts(shots) == [1] * 4
    assert [shots.images[p][1] for p in range(4)] == [expected[i] for i in image_numbers(shots)]


def test_relabelled_images_are_checked_and_named_as_before(tmp_path):
    (tmp_path / "x.png").write_bytes(png(8, 8))
    files = [(str(tmp_path / "x.png"), label) for label in (0, 1, 9)] + [(str(tmp_path / "gone.png"), 0)]
    task = relabelled(Task("mine", Images("mine", files, 8), ["a", "b"], "{}"), torch.tensor([1, 5, -1, 1]))
    for part in (task, task._replace(images=Subset(task.images, [0, 1, 2, 3]))):
        batch, = batches(part, [0, 1, 2, 3], 4, 0, bad="leave out")
        assert batch.y.tolist() == [1] and batch.index.tolist() == [0]
        assert batch.errors == [(1, f"cannot decode {tmp_path / 'x.png'}: label 5 of 2 classes"),
                                (2, f"cannot decode {tmp_path / 'x.png'}: label 9 of 2 classes"),
                                (3, f"cannot decode {tmp_path / 'gone.png'}: No such file or directory")]
        batch, = batches(part, [3], 1, 0, bad="replace")
        assert batch.y.tolist() == [1] and batch.index.tolist() == [0]


# --------------------------------------------------------------------------------------------- order
def test_every_epoch_is_a_permutation_without_the_ragged_batch():
    steps = list(training_order(22, 5, seed=3, steps=range(12)))
    epochs = [sum(steps[i:i + 4], []) for i in (0, 4, 8)]
    for number, epoch in enumerate(epochs):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + number)
        assert epoch == torch.randperm(22, generator=generator)[:20].tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # a run that is resumed at any step goes on with the same images
    for first in range(12):
        assert list(training_order(22, 5, 3, range(first, 12))) == steps[first:]


def test_processes_share_each_step():
    alone = list(training_order(24, 8, 0, range(6)))
    for world in (2, 4):
        shares = [list(training_order(24, 8, 0, range(6), rank, world)) for rank in range(world)]
        for step, whole in enumerate(alone):
            assert [whole[rank::world] for rank in range(world)] == [share[step] for share in shares]
