"""Training starved of disk, fed damaged or hostile files, its workers killed: the same bits, or one line."""
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import WORDS, assert_same, changed_copy, contents, leaves, log_of, steps_done, when

from harness.checkpoints import read_checkpoint
from losses import LOSSES
from model import ADAPTATIONS
from toy import world

EPOCHS = (*WORDS, "--epochs", 3)                            # of the run `whole`


# ------------------------------------------------------------------------------ workers of torchrun
def test_a_killed_worker_is_started_again_and_another_number_of_processes_can_go_on(forks, tmp_path):
    """Three processes (whose sums depend on their order), one of them killed: same bits as without. Then one
    process in place of three: same up to rounding."""
    whole, run, alone = (tmp_path / name for name in ("whole", "run", "alone"))
    words = (*WORDS, "--batch-size", 9, "--epochs", 5, "--save-every", 4, "--out")
    pids = forks.start_together(3, "train_tecoa.py", *words, whole, out=whole)
    assert [forks.wait(pid) for pid in pids] == [0] * 3, Path(f"{whole}.0.stderr").read_text()[-3000:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
               "--max-restarts=2", "train_tecoa.py", *map(str, words), run]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    with open(tmp_path / "stdout", "w") as stdout, open(tmp_path / "stderr", "w") as stderr:
        agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
    when(lambda: steps_done(run) >= 10, seconds=150)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    assert agent.wait() == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert "Going on after step" in (tmp_path / "stdout").read_text()
    assert_same(whole, run)

    shutil.copytree(whole, alone)
    forks.run("train_tecoa.py", "--resume", alone / "ckpt-previous.pt", out=tmp_path / "o")
    start, three, one = (torch.cat([t.flatten() for t in read_checkpoint(path)["visual"].values()])
                         for path in (whole / "ckpt-previous.pt", whole / "ckpt.pt", alone / "ckpt.pt"))
    assert 0 < (one - three).norm() < .01 * (three - start).norm()
    rows = [log_of(whole), log_of(alone)]
    assert [(row["step"], row["lr"]) for row in rows[0]] == [(row["step"], row["lr"]) for row in rows[1]]
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in zip(*rows))


# ------------------------------------------------------------------------------ damaged and hostile files
def test_flipped_bytes_never_make_another_model(run_copy):
    """A byte flipped at each of 200 places, the file cut at each of 50 lengths: same bits or one line."""
    path, rng, refused = run_copy / "ckpt.pt", random.Random(0), 0
    good, true = path.read_bytes(), leaves(read_checkpoint(path))
    places = [0, 1, 3, 40, len(good) - 1, len(good) - 20]   # headers, and the end
    places += [rng.randrange(len(good)) for _ in range(144)]
    places += [len(good) - 1 - rng.randrange(12000) for _ in range(50)]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        try:
            found = leaves(read_checkpoint(path))
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert found.keys() == true.keys()
            for name, value in true.items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(found[name], value), (place, name)
    assert refused > 150
    for length in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(47))]:
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="ckpt.pt"):
            read_checkpoint(path)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(forks, whole, run_copy, tmp_path):
    ckpt, previous, good = (run_copy / "ckpt.pt", run_copy / "ckpt-previous.pt",
                            (whole / "ckpt.pt").read_bytes())
    ckpt.write_bytes(good[:len(good) // 2])
    _, stderr = forks.run("train_tecoa.py", "--resume", run_copy, out=tmp_path / "o", status=2)
    assert stderr.count("\n") == 1 and f"{ckpt} is damaged" in stderr
    assert f"of step 20, is whole: --resume {previous}" in stderr
    stdout, _ = forks.run("train_tecoa.py", "--resume", previous, "--save-every", "9m", out=tmp_path / "o")
    assert "Going on after step 20" in stdout
    assert_same(whole, run_copy)
    assert read_checkpoint(previous)["step"] == 20          # and not the damaged one

    # alone --resume takes it by itself, aloud
    (run_copy / "results.json").unlink()
    ckpt.write_bytes(b"")
    stdout, stderr = forks.run("train_tecoa.py", *EPOCHS, "--out", run_copy, "--resume", out=tmp_path / "o")
    assert "Going on after step 20" in stdout
    assert f"warning: {ckpt} is not a checkpoint: it is empty" in stderr
    assert_same(whole, run_copy)

    # both damaged: it is the newer one that was asked for
    (run_copy / "results.json").unlink()
    for path in (ckpt, previous):
        path.write_bytes(b"")
    _, stderr = forks.run("train_tecoa.py", "--resume", run_copy, out=tmp_path / "o", status=2)
    assert stderr.count("\n") == 1 and f"{ckpt} is not a checkpoint: it is empty" in stderr


def test_an_evaluation_does_not_go_on_with_other_images(forks, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    words = ("--pretrained", "none", "--tasks", f"folder:{tmp_path / 'photos'}", "--steps", 1,
             "--out", tmp_path / "e")
    for said in ("wrote ", "nothing was computed"):
        assert said in forks.run("eval_zeroshot.py", *words, out=tmp_path / "o")[0]
    next((tmp_path / "photos" / "val").rglob("*.png")).unlink()
    _, stderr = forks.run("eval_zeroshot.py", *words, out=tmp_path / "o", status=2)
    assert stderr.count("\n") == 1 and "are not those that" in stderr


def test_a_checkpoint_can_do_nothing_but_be_read(forks, whole, tmp_path):
    """Neither run code when it is loaded, nor choose where files are written, nor give options their values
    unchecked."""
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    good = torch.load(whole / "ckpt-previous.pt", weights_only=True)         # with steps left to do
    config, training, state = good["config"], good["training"], good["training"]["optimizer"]["state"]
    cases = {"pickle": {"model": Evil()},
             "path": {"config": config | {"out": str(tmp_path / "elsewhere")}},
             "option": {"config": config | {"loss": "evil"}}, "type": {"config": config | {"lr": [1]}},
             "unknown": {"config": config | {"help": True, 7: 1}},
             "nothing": {"training": {}}, "model": {"model": 7},
             "visual": {"visual": {"visual.proj": "none"}}}
    optimizers = {"empty": {}, "list": {"state": []}, "shape": {"state": state | {0: {"x": torch.zeros(7)}}},
                  "more": {"state": state | {99: {}}}, "names": {"state": {"visual.proj": {}}},
                  "fewer": {"state": {0: state[0]}}, "text": {"state": dict.fromkeys(state, "momentum")}}
    cases |= {f"optimizer-{name}": {"training": training | {"optimizer": value}}
              for name, value in optimizers.items()}
    for name, change in cases.items():
        (tmp_path / name).mkdir()
        torch.save(good | change, tmp_path / name / "ckpt.pt")
        shutil.copy(whole / "log.jsonl", tmp_path / name)
        words = ("--resume", tmp_path / name)
        _, stderr = forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=0 if name == "path" else 2)
        assert "Traceback" not in stderr, stderr
        assert name == "path" or stderr.splitlines()[-1].startswith("train_tecoa.py: "), (name, stderr)
        if name in ("pickle", "model", "visual"):
            words = ("--ckpt", tmp_path / name / "ckpt.pt")
            _, stderr = forks.run("eval_zeroshot.py", *words, out=tmp_path / "o", status=2)
            assert stderr.count("\n") == 1
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "pickle" / "ckpt.pt", weights_only=True)
    words = ("--pretrained", tmp_path / "pickle" / "ckpt.pt", "--out", tmp_path / "new")
    forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "elsewhere").exists()
    for name in ("log.jsonl", "ckpt.pt.tmp"):               # links in a folder lead nowhere
        (tmp_path / "target").write_text("mine")
        (tmp_path / "link").mkdir()
        shutil.copy(whole / "ckpt-previous.pt", tmp_path / "link" / "ckpt.pt")
        (tmp_path / "link" / name).symlink_to(tmp_path / "target")
        words = ("--resume", tmp_path / "link")
        forks.run("train_tecoa.py", *words, out=tmp_path / "o", status=2 * (name == "log.jsonl"))
        assert (tmp_path / "target").read_text() == "mine"
        shutil.rmtree(tmp_path / "link")
    torch.load(tmp_path / "pickle" / "ckpt.pt", weights_only=False)         # it would
    assert (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------ disks
def test_a_full_disk_ends_the_run_in_one_line_and_harms_nothing(forks, whole, tmp_path):
    """A quota of 3 MB a file: the first checkpoint fits, those with momentum do not."""
    out = tmp_path / "run"
    words = (*EPOCHS, "--save-every", 5, "--out", out)
    _, stderr = forks.run("train_tecoa.py", *words, out=out, status=1, file_limit=3_000_000)
    assert "stopped after step 5: cannot write" in stderr.splitlines()[-1] and f"--resume {out}" in stderr
    assert "Traceback" not in stderr
    assert contents(out).keys() == {"ckpt.pt", "log.jsonl", "results_before.json"}
    assert read_checkpoint(out / "ckpt.pt")["step"] == 0
    forks.run("train_tecoa.py", "--resume", out, out=out)
    assert_same(whole, out)


MOUNTED = """
import atexit, ctypes, os, shutil, subprocess, sys
# as `unshare -rm`: a root of its own, whose mounts nobody else sees
user, group = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x10000000 | 0x20000):
    sys.exit(77)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
options, folder, keep = (os.environ[name] for name in ("DISK", "FOLDER", "KEEP"))
if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
    sys.exit(77)
atexit.register(lambda: os.path.exists(f"{folder}/run") and shutil.copytree(f"{folder}/run", keep))
"""


def test_a_small_disk_costs_the_previous_checkpoint_before_it_ends_a_run(forks, whole, tmp_path):
    """On a tmpfs of 9 MB two checkpoints fit, three do not; on one of 5 MB, not even two; on a read-only one,
    none."""
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    script = changed_copy(tmp_path / "mounted.py", ("import math\n", f"import math\n{MOUNTED}"))

    def run(options):
        shutil.rmtree(keep, ignore_errors=True)
        pid = forks.start(script, *EPOCHS, "--save-every", 5, "--out", disk / "run", out=tmp_path / "o",
                          DISK=options, FOLDER=str(disk), KEEP=str(keep))
        return forks.wait(pid), (tmp_path / "o.stderr").read_text()
    status, said = run("size=9m")
    if status == 77:
        pytest.skip("no file system can be mounted here")
    assert status == 0, said[-2000:]
    assert_same(whole, keep)
    status, said = run("size=5m")
    assert status == 1 and "cannot write" in said.splitlines()[-1] and "Traceback" not in said
    assert read_checkpoint(keep / "ckpt.pt")["step"] == 0 and not list(keep.glob("*.tmp"))
    status, said = run("ro")
    assert status == 2 and "Read-only" in said.splitlines()[0]


# ------------------------------------------------------------------------------ images, processes that decode
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 drawn digits as PNG files in a folder of classes."""
    root = tmp_path_factory.mktemp("photos")
    pixels, labels = world.task("digits", "train", 60)
    for number, (image, label) in enumerate(zip(pixels, labels.tolist())):
        path = root / "train" / f"digit {label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    shutil.copytree(root / "train", root / "val")
    return root


PHOTOS = ("--pretrained", "none", "--tasks", "none", "--batch-size", 10, "--eval-steps", 1)


def test_a_damaged_image_is_named_and_another_stands_in(forks, photos, tmp_path):
    """With and without workers the same; and one that vanishes while the run goes on is as a damaged one."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    victim = sorted((root / "train").rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:90])
    words = (*PHOTOS, "--dataset", f"folder:{root}", "--epochs", 2, "--save-every", 6)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        _, stderr = forks.run("train_tecoa.py", *words, "--workers", workers, "--out", out, out=out)
        (said,) = {line for line in stderr.splitlines() if line.startswith("warning: image 7 ")}
        assert f"cannot decode {victim}" in said and stderr.count(said) == 2         # once in each epoch
    assert_same(tmp_path / "0", tmp_path / "2")
    (tmp_path / "2" / "results.json").unlink()
    victim.unlink()                                         # another set of images: not the same run
    _, stderr = forks.run("train_tecoa.py", "--resume", tmp_path / "2", out=out, status=2)
    assert stderr.count("\n") == 1 and "are not those that the run" in stderr


def test_sigterm_to_all_processes_of_a_run_saves_as_well(forks, photos, tmp_path):
    """A scheduler signals the processes that decode, too."""
    out = tmp_path / "run"
    words = (*PHOTOS, "--dataset", f"folder:{photos}", "--epochs", 400, "--workers", 2, "--out", out)
    pid = forks.start("train_tecoa.py", *words, out=out)
    when(lambda: steps_done(out) > 5)
    workers = [int(worker) for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for process in (*workers, pid):
        os.kill(process, signal.SIGTERM)
    assert len(workers) == 2 and forks.wait(pid) == 143
    assert "SIGTERM after step" in Path(f"{out}.stderr").read_text()
    assert read_checkpoint(out / "ckpt.pt")["step"] > 5
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_killed_worker_process_ends_training_in_one_line(forks, photos, tmp_path):
    out = tmp_path / "run"
    words = (*PHOTOS, "--dataset", f"folder:{photos}", "--epochs", 400, "--workers", 1, "--save-every", 2)
    pid = forks.start("train_tecoa.py", *words, "--out", out, out=out)
    when(lambda: steps_done(out) > 5)
    (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert forks.wait(pid) == 1
    stderr = Path(f"{out}.stderr").read_text()
    assert "Traceback" not in stderr and "train_tecoa.py: DataLoader worker" in stderr
    step = read_checkpoint(out / "ckpt.pt")["step"]
    forks.run("train_tecoa.py", "--resume", out, "--max-steps", step + 1, out=out)


# ------------------------------------------------------------------------------ command lines
def options_of_random_command_lines(folder, whole):
    """{script: {option: values of every kind, some of them hostile}}."""
    numbers = ["0", "1", "2", "8", "-1", "1.5", "nan", "inf", "1e9", "", "x", "2147483647", "9" * 25, "0x10",
               "٣"]
    paths = [folder / "empty", folder / "noise", folder / "absent", whole, whole / "ckpt.pt", "/dev/null",
             "/proc", "..", "", "a\nb", "é\udc80"]
    tasks = ["toy", "digits", "all", "none", ",", "imagenet", "cifar10", "evil",
             *(f"{kind}:{path}" for kind in ("folder", "cache", "wds") for path in paths[:4])]
    both = {"--model": ["toy", "ViT-X", "RN50", "", "../x"], "--tasks": tasks, "--data-root": paths,
            "--pretrained": ["none", "seed²", "openai", *paths], "--workers": ["0", "1", "99999", "x"],
            "--norm": ["linf", "l2", "l1"], "--eps": numbers, "--steps": ["1", "2", "0", "x"],
            "--step-size": numbers, "--batch-size": numbers, "--device": ["cpu", "cuda:99", "meta", ""],
            "--dtype": ["fp32", "bf16", "int8"], "--kernels": ["auto", "triton", "torch", "x"],
            "--limit": numbers, "--out": paths, "--overwrite": [None], "--class-names": paths,
            "--template": ["a {}", "{}", "a", "{} {}", *paths], "--resize": [*numbers, "none"]}
    train = both | {"--dataset": tasks, "--loss": [*LOSSES, "x"], "--labels": ["true", "pseudo"],
                    "--adapt": [*ADAPTATIONS, "full,linear", ""], "--shots": numbers,
                    "--last-blocks": numbers, "--border": numbers, "--tokens": numbers,
                    "--accumulate": numbers, "--lr": numbers,
                    "--max-steps": ["1", "0", "x"], "--warmup": numbers, "--optimizer": ["sgd", "adamw", "x"],
                    "--weight-decay": numbers, "--save-every": [*numbers, "1m", "0m", "m"],
                    "--max-nonfinite": numbers, "--resume": [*paths, None], "--init": paths}
    evaluate = both | {"--ckpt": paths, "--attack": ["pgd", "cw", "apgd-t", "square", "x", "pgd,pgd", ""],
                       "--queries": ["1", "0"], "--restarts": ["1", "0"], "--last-iterate": [None],
                       "--templates": ["paper", "openai", "x"], "--interpolate": ["0", "0,1", "2", ""],
                       "--export": paths[:3]}
    return {"train_tecoa.py": train, "eval_zeroshot.py": evaluate}


def test_random_command_lines_end_with_0_or_with_2_and_one_line(forks, whole, tmp_path):
    """A few options with values of every kind, some of them hostile, for each stage."""
    folder = tmp_path / "a" / "b"                           # whose .. is nobody else's
    whole = shutil.copytree(whole, folder / "whole")        # which some of them overwrite
    (folder / "empty").mkdir()
    (folder / "noise").write_bytes(random.Random(0).randbytes(999))
    options, rng, statuses = options_of_random_command_lines(folder, whole), random.Random(0), set()
    for k in range(24):
        script, words = (("train_tecoa.py", ["--max-steps", "1", "--eval-steps", "1", "--dataset", "digits"]),
                         ("eval_zeroshot.py", ["--steps", "1", "--queries", "2"]))[k % 2]
        words += ["--pretrained", "none", "--limit", "16", "--batch-size", "8", "--tasks", "digits",
                  "--out", folder / str(k)]
        for option in rng.sample([*options[script]], rng.randint(1, 3)):
            value = rng.choice(options[script][option])
            words += [option] if value is None else [option, value]
        pid = forks.start(script, *words, out=tmp_path / "o", cwd=folder)
        status, said = forks.wait(pid), (tmp_path / "o.stderr").read_text(errors="replace")
        where = (words, status, said)
        assert status in (0, 2) and "Traceback" not in said, where
        lines = [line for line in said.splitlines() if line and not line.startswith("warning: ")]
        assert status == 0 or len(lines) == 1 and lines[0].startswith(script), where
        statuses.add(status)
    assert statuses == {0, 2}
