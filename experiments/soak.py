"""Is a long run healthy? Memory, open files and compiled code over many steps, for `bench.py --soak`."""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from harness.files import ROOT
from toy import world


def mib(pid, kind):
    """What a process occupies (kind Rss), or what it does not share with another (kind Private_), in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def health(pid, cache):
    """{what: how much} of a training process, its workers together, and the compiler's cache."""
    workers = [child for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
               if b"train_tecoa" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return {"main, MiB": mib(pid, "Rss"), "workers": len(workers),
            "workers, MiB": sum(mib(worker, "Private_") for worker in workers),
            "open files": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")),
            "compiled files": sum(len(files) for _, _, files in os.walk(cache))}


def soak(steps, compiled, images=800, batch_size=8):
    """Train the toy on PNG files for so many steps, and look at it ten times a second: ({share of the steps:
    the means of `health` over the quarter that ends there}, recompilations)."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (image, label) in enumerate(zip(*world.task("digits", "train", images))):
            path = Path(folder, "photos", "train", str(label.item()), f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        cache, out = Path(folder, "compiled"), Path(folder, "run")
        words = ["--dataset", f"folder:{folder}/photos", "--out", out, "--batch-size", batch_size, "--epochs",
                 -(-steps * batch_size // images), "--max-steps", steps, f"--{'no-' * (not compiled)}compile",
                 *"--pretrained none --tasks none --workers 2 --save-every 100 --device cpu".split()]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1",
                                    "TORCH_LOGS": "recompiles"}
        found = {share: [] for share in (.25, .5, .75, 1.)}
        with open(f"{folder}/stderr", "w+") as stderr:
            process = subprocess.Popen([sys.executable, *map(str, [ROOT / "train_tecoa.py", *words])],
                                       env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
            while process.poll() is None:
                time.sleep(.1)
                try:
                    step = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
                    sample = health(process.pid, cache)
                except (OSError, IndexError, ValueError):       # not there yet, or no more
                    continue
                if step < steps:
                    found[next(share for share in found if step < share * steps)].append(sample)
            stderr.seek(0)
            said = stderr.read()
        if process.returncode:
            raise RuntimeError(f"train_tecoa.py ended with status {process.returncode}: {said[-300:]}")
        means = {share: {what: sum(sample[what] for sample in samples) / len(samples) for what in samples[0]}
                 for share, samples in found.items() if samples}
        return means, said.count("Recompiling function")
