"""No file of a data set is executed: pickles, and formats that start programs. Caches: test_cache.py."""
import io
import os
import pickle
import tarfile

import pytest
from torchvision.datasets import cifar
from writers import SETS, Malicious, alarm, bait, refused

from tasks.images import Unreadable
from tasks.loading import batches
from tasks.task import load_task

no_hanging, target = pytest.fixture(alarm, autouse=True), pytest.fixture(bait)


@pytest.mark.parametrize("name,files", [
    ("cifar10", ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]),
    ("cifar100", ["meta", "train", "test"])])
def test_no_pickle_of_cifar_is_executed_whose_checksum_is_not_the_authors(
        tmp_path, monkeypatch, target, name, files):
    """Also when it is the only one: every other file passes for genuine."""
    SETS[name][0](tmp_path / "root")
    folder = tmp_path / "root" / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    # as are all of ours
    assert "not whole" in refused(name, data_root=tmp_path / "root")
    checked = cifar.check_integrity
    for file in files:
        monkeypatch.setattr(cifar, "check_integrity",
                            lambda path, md5, file=file: not path.endswith(f"/{file}") or checked(path, md5))
        genuine = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps(Malicious(target)))
        assert "not whole" in refused(name, data_root=tmp_path / "root")
        (folder / file).write_bytes(genuine)


@pytest.mark.parametrize("name", ["stl10", "pcam", "cars", "flowers102", "caltech101"])
def test_no_other_file_of_a_set_is_a_pickle(tmp_path, target, name):
    (tmp_path / "root").mkdir()
    SETS[name][0](tmp_path / "root")
    for path in filter(os.path.isfile, (tmp_path / "root").rglob("*")):
        path.write_bytes(pickle.dumps(Malicious(target)))
    try:
        task = load_task(name, "val", size=8, data_root=tmp_path / "root")
        assert all(batch.errors for batch in batches(task, range(len(task.images)), 1, 0, bad="leave out"))
    except ValueError as error:
        assert str(error).isprintable()


def test_no_pickle_among_the_images_is_executed(tmp_path, target):
    """Nor anything else: no file's name is believed (shards), no format that starts programs is read."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", pickle.dumps(Malicious(target))), ("a.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(Unreadable, match="cannot identify"):
        load_task(f"wds:{tmp_path}", "val", size=8).images[0]
