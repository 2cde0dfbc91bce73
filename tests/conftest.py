import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():                   # then Triton's kernels are tested in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"            # before anything imports them

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)                           # the tests run in two processes, see pyproject.toml


def pytest_collection_modifyitems(config, items):
    """`-m cuda` are the tests that need a GPU; without one they are left out."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("cuda")])
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def triton_on(request):
    """The device, with its Triton kernels chosen for the duration of a test: interpreted, or on the GPU."""
    import kernels
    if request.param == "cuda" or kernels.INTERPRET:
        kernels.use("triton", torch.device(request.param))
    yield request.param
    kernels.use("auto", torch.device(request.param))


@pytest.fixture(scope="session")
def run():
    """run(script, *words) → CompletedProcess of a real command in the repository; processes=N: torchrun."""
    def call(script, *words, processes=1, cwd=ROOT, status=0, **environment):
        start = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                                    "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"} | environment
        done = subprocess.run([*start, script, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                              timeout=300, env=environment)
        assert done.returncode == status, done.stderr[-3000:]
        return done
    return call


@pytest.fixture(scope="session")
def read_json():
    return lambda path: json.loads(Path(path).read_text())


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) → a path that make(path) filled, in whichever process of the tests came first."""
    def call(name, make):
        base = tmp_path_factory.getbasetemp()
        path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not Path(f"{path}.made").exists():
                make(path)
                Path(f"{path}.made").touch()
        return path
    return call


@pytest.fixture(scope="session")
def small_clip(once):
    """A file with a toy CLIP that is pretrained for 200 steps: it knows colours, and some shapes."""
    from toy.pretrain import pretrain
    return once("toy200.pt", lambda path: torch.save(pretrain(0, steps=200).state_dict(), path))


@pytest.fixture(scope="session")
def forks():
    """See tests/forks.py."""
    from forks import Forks
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def whole(forks, once):
    """The folder of a run of 24 steps that nothing happened to."""
    from runs import WORDS
    words = (*WORDS, "--epochs", 3, "--save-every", 5, "--out")
    return once("whole", lambda out: forks.run("train_tecoa.py", *words, out, out=out))


@pytest.fixture
def run_copy(whole, tmp_path):
    """A copy of the whole run as if it had been killed just before its last table."""
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "results.json").unlink()
    return tmp_path / "copy"
