"""How a command starts: what it imports to say what is wrong, and how its threads will wait."""
import json
import os
import subprocess
import sys

from conftest import ROOT
from runs import WORDS

COMMANDS = ("train_tecoa.py", "eval_zeroshot.py", "data.py", "paper.py", "bench.py")
# all that takes long to import, but for PyTorch itself
HEAVY = ("open_clip", "torchvision", "timm", "torch._dynamo", "sympy", "matplotlib", "scipy", "sklearn")
CALL = """
import json, os, runpy, sys
def call(words):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
"""
LIGHT = CALL + """
lines, heavy = json.loads(sys.argv[1])
print("\\n" + json.dumps([(call(line), [name for name in heavy if name in sys.modules]) for line in lines]))
"""
SPIN = CALL + """
class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            found.append(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, NoTorch())
found, (commands, settings) = [], json.loads(sys.argv[1])
for command in commands:
    for setting in settings:
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            os.environ.pop(name, None)
        os.environ.update(setting)
        call([command, "--help"])
print(json.dumps(found))
"""


def python(code, *value, **environment):
    """What code prints in a new process in the repository, which gets value in JSON: (stdout, stderr)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(value)], cwd=ROOT, text=True,
                          capture_output=True, env=clean | {"PYTHONPATH": str(ROOT)} | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_help_errors_and_finished_runs_import_nothing_heavy(whole, tmp_path):
    """And GNU's OpenMP, if that is what PyTorch has, says itself that it has read how long to spin."""
    real = "--model ViT-B-32 --pretrained laion2b_s34b_b79k"
    refused = {
        "train_tecoa.py": (
            "--nix", "--lr -1", "--resume nix", "--resume nix --overwrite", "--model nix", "--pretrained nix",
            "--model ViT-B-32 --pretrained openai", "--dataset nix", "--dataset folder:nix", "--tasks nix",
            "--dataset wds:nix --tasks none", f"{real}", f"{real} --data-root {tmp_path}",
            f"{real} --dataset cifar10 --data-root nix --tasks cache:nix", "--adapt partial --last-blocks 5",
            "--adapt image-prompt --border 16", "--batch-size 3 --accumulate 2", "--norm l2",
            "--init nix", "--model local-dir:nix"),
        "eval_zeroshot.py": (
            "--nix", "--ckpt nix", "--attack nix", "--tasks nix", "--model nix", "--interpolate .5",
            f"{real} --data-root {tmp_path} --tasks pets", f"{real} --data-root {tmp_path}"),
        "data.py": ("nix", "cache --dataset folder:nix --out nix/nix", "verify nix"),
        "paper.py": ("nix", "--model nix", "--seeds -1", f"{real} --data-root {tmp_path}"),
        "bench.py": ("--nix", "--models nix", "--baseline authors")}
    lines = [[command, *words.split()] for command in refused for words in refused[command]]
    finished = ["train_tecoa.py", *map(str, WORDS), "--epochs", "3", "--out", str(whole)]
    shown = [finished, *([command, "--help"] for command in COMMANDS)]
    out, err = python(LIGHT, lines + shown, HEAVY, OMP_DISPLAY_ENV="verbose", CUDA_VISIBLE_DEVICES="")
    for line, (status, heavy) in zip(lines + shown, json.loads(out.splitlines()[-1])):
        assert status == (2 if line in lines else 0) and heavy == [], (line, status, heavy)
    assert "GOMP_SPINCOUNT = '2000'" in err or "GOMP_SPINCOUNT" not in err


def test_threads_spin_less_from_before_pytorch_on_unless_the_user_says_how():
    settings = {}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}
    out, _ = python(SPIN, COMMANDS, settings)
    assert json.loads(out) == ["2000", "7", None] * len(COMMANDS)
