"""The house's measures (design.md's rooms): files, imports, side effects, lengths, words."""
import ast
import json
import os
import subprocess
import sys

from conftest import ROOT

from losses import LOSSES

# in the order of their imports: a file imports from its own floor or from a lower one
FLOORS = (("kernels",), ("attacks", "losses", "prompts", "model"), ("tasks",), ("harness",),
          ("eval_zeroshot", "train_tecoa"), ("experiments",), ("data", "paper", "bench"))
SOURCES = sorted([*ROOT.glob("*.py"), *(path for room in ("kernels", "tasks", "toy", "harness", "experiments")
                                        for path in (ROOT / room).glob("*.py"))])
# {module: its syntax tree}
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
         ast.parse(path.read_text()) for path in SOURCES}


def room(module):
    return module.split(".")[0]


ROOMS = {room(module) for module in TREES}


def imported(module, lazily=True):
    """The modules that a module's text imports, ours and others'; lazily: in its functions as well."""
    nodes, found = list(ast.walk(TREES[module])), set()
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    late = set() if lazily else {id(node) for function in functions for node in ast.walk(function)}
    for node in [node for node in nodes if id(node) not in late]:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            # a name may be a module of a room
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in TREES else node.module
                      for alias in node.names}
    return found


def test_nine_files_at_the_top():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == [
        "attacks", "bench", "data", "eval_zeroshot", "losses", "model", "paper", "prompts", "train_tecoa"]


def test_imports_run_one_way():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for module in TREES:
        for other in imported(module):
            if room(other) == "toy":
                assert room(module) in ("toy", "tasks", "model", "experiments"), (module, other)
            elif room(other) in floor:
                assert room(module) != "toy" and floor[room(other)] <= floor[room(module)], (module, other)


def test_no_module_imports_itself_around_a_corner():
    above = {module: {other for other in imported(module) if other in TREES} for module in TREES}
    while free := {module for module, others in above.items() if not others & above.keys()}:
        above = {module: others for module, others in above.items() if module not in free}
    assert not above, f"a circle among {sorted(above)}"


STATE = """
import atexit, contextlib, importlib, json, logging, os, random, signal, sys, threading, warnings
def state():
    import matplotlib, numpy, open_clip, PIL.Image, PIL.ImageFile, torch
    return {"excepthook": sys.excepthook, "unraisablehook": sys.unraisablehook, "path": [*sys.path],
            "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
            "streams": [(s.errors, s.encoding) for s in (sys.stdout, sys.stderr)],
            "atexit": atexit._ncallbacks(), "pixels": PIL.Image.MAX_IMAGE_PIXELS,
            "truncated": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
            "matplotlib": {k: dict.__getitem__(matplotlib.rcParams, k) for k in matplotlib.rcParams.keys()},
            "pyplot": "matplotlib.pyplot" in sys.modules, "models": open_clip.list_models(),
            "torch": (torch.get_num_threads(), torch.get_float32_matmul_precision(),
                      torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
                      torch.multiprocessing.get_sharing_strategy()),
            "rng": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
            "logging": (logging.root.manager.disable, [*logging.root.handlers], logging.root.level),
            "warnings": [*warnings.filters], "environ": dict(os.environ), "folder": os.getcwd(),
            "threads": threading.active_count()}
theirs, ours = json.loads(sys.argv[1])
for name in theirs:
    with contextlib.suppress(ImportError):              # Triton is not for every machine
        importlib.import_module(name)
before = state()
for name in ours:
    importlib.import_module(name)
    after = state()
    assert after == before, (name, [key for key in before if before[key] != after[key]])
"""


def test_importing_changes_nothing_in_the_process():
    """One process imports what we import of others, then our modules one by one; but stage 1, a script."""
    ours = [module for module in TREES if module != "train_tecoa"]
    theirs = {other for module in ours for other in imported(module, lazily=False)}
    names = json.dumps([sorted(other for other in theirs if room(other) not in ROOMS), ours])
    done = subprocess.run([sys.executable, "-c", STATE, names], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_packages_for_some_runs_alone_are_imported_in_those_alone():
    for module in TREES:
        some = {"matplotlib", "scipy", "tensorboard", "wandb", "torch.utils.tensorboard"}
        early = {name for name in imported(module, lazily=False) if {name, room(name)} & some}
        assert not early or module == "experiments.figures", (module, early)


def test_no_function_is_longer_than_60_lines():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (module, node.name)


def test_the_stages_are_short():
    lines = (ROOT / "train_tecoa.py").read_text().splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("for step, batch in "))
    # to the first line that is not indented
    loop = next(n for n, line in enumerate(lines[first + 1:], 1) if line and not line.startswith(" "))
    names = [alias.name for node in TREES["train_tecoa"].body if isinstance(node, ast.ImportFrom)
             and room(node.module) in ROOMS for alias in node.names]
    assert len(lines) <= 250 and loop <= 45 and len(names) <= 30, (len(lines), loop, len(names))
    assert len((ROOT / "eval_zeroshot.py").read_text().splitlines()) <= 300


def test_no_loss_is_named_outside_losses():
    """A new one touches one place. Figures may give it a colour; torchattacks calls its cross-entropy ce; the
    protocols bear the names of the papers too."""
    for module, tree in TREES.items():
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & LOSSES.keys()
        if module not in ("losses", "experiments.figures", "tasks.protocols"):
            assert named <= ({"ce"} if module == "experiments.crosscheck" else set()), (module, named)


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_lines_have_110_columns():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{path.relative_to(ROOT)}:{number}"
