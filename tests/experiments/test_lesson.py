"""docs/lesson.ipynb, executed with small numbers, its exercises' solutions as well."""
import ast
import os
import re

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from test_house import TREES

from harness.options import Parser, add_shared_options
from model import ImageEncoder, load_clip, predict
from prompts import encode_head
from tasks.task import load_task

DEFINITIONS = ast.FunctionDef | ast.ClassDef
LESSON = ROOT / "docs" / "lesson.ipynb"
SMALL = {"ATTACK_STEPS =": "TRAINING_STEPS, IMAGES, ATTACK_STEPS = 60, 40, 8"}
KEPT = ("x y eps predicted x_adv fooled shares tables whole accuracy_of_both share_of_hearts reported needed "
        "sure").split()


def cells():
    return nbformat.read(LESSON, 4).cells


def solutions(cell):
    """The code in the folded part of a cell, a list."""
    folded = "".join(re.findall("<details>.*</details>", cell.source, re.S))
    return re.findall(r"^```python\n(.*?)\n```$", folded, re.M | re.S)


def code():
    """The syntax trees of all code cells and solutions, without IPython's magics."""
    texts = [text for cell in cells()
             for text in ([cell.source] if cell.cell_type == "code" else solutions(cell))]
    return [ast.parse(re.sub(r"^%%.*", "", text)) for text in texts]


@pytest.fixture(scope="session")
def lesson(once):
    """{name: value} of the executed notebook's namespace."""
    def execute(path):
        found = []
        for cell in cells():
            cell.source += "".join(f"\n{line}" for word, line in SMALL.items()
                                   if word in cell.source and cell.cell_type == "code")
            found += [cell, *map(nbformat.v4.new_code_cell, solutions(cell))]
        found.append(nbformat.v4.new_code_cell(
            f"torch.save({{name: globals()[name] for name in {KEPT}}}, {str(path)!r})"))
        notebook = nbformat.v4.new_notebook(cells=found)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0",
                                    "CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": f"{path}.ipython"}
        client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                                resources={"metadata": {"path": str(LESSON.parent)}})
        client.execute(env=environment)
    return torch.load(once("lesson.pt", execute), weights_only=False)


def test_zero_shot_by_hand_is_the_repositorys(lesson):
    clip, tokenizer = load_clip("toy", "seed0")
    task = load_task("shapes", "val", limit=len(lesson["x"]))
    x, y, _ = task.images[:]
    head = encode_head(clip, tokenizer, task.class_names, task.template)
    assert torch.equal((255 * lesson["x"]).round().to(torch.uint8), x) and torch.equal(lesson["y"], y)
    expected = predict(ImageEncoder(clip), head, clip.logit_scale.exp().item(), x / 255)
    assert torch.equal(lesson["predicted"], expected) and (expected == y).float().mean() > .5
    # twenty classes
    assert lesson["accuracy_of_both"] > .5


def test_the_attack_keeps_to_the_toys_eps_and_works(lesson):
    parser = Parser()
    add_shared_options(parser, training=True)
    eps = parser.settle(parser.parse_args([])).eps / 255
    change = (lesson["x_adv"] - lesson["x"]).abs()
    assert lesson["eps"] == eps and .99 * eps < change.max() <= eps + 1e-6
    assert 0 <= lesson["x_adv"].min() and lesson["x_adv"].max() <= 1
    clean, attacked = ((lesson[name] == lesson["y"]).float().mean() for name in ("predicted", "fooled"))
    assert attacked < clean - .3 and lesson["share_of_hearts"] > .3


def test_cross_entropy_goes_blind_and_log_odds_do_not(lesson):
    shares = {(name, str(dtype)): values for (name, dtype), values in lesson["shares"].items()}
    for dtype in ("torch.float32", "torch.float16"):
        assert shares["cross-entropy", dtype][-1] > .5 and not any(shares["log-odds", dtype])
    assert all(a <= b for a, b in zip(shares["cross-entropy", "torch.float32"],
                                      shares["cross-entropy", "torch.float16"]))
    assert lesson["reported"]["cross-entropy"] > lesson["reported"]["log-odds"] + .3


def test_what_training_with_and_without_texts_leaves_of_zero_shot(lesson):
    clean = {name: table["mean"]["clean"] for name, table in lesson["tables"].items()}
    assert [*clean] == ["CLIP", "ce", "tecoa", "fare"]
    assert clean["ce"] + 5 < clean["tecoa"] < clean["CLIP"]
    assert all(table["mean"]["tasks"] == 8 for table in lesson["tables"].values())
    adapted = {name: table["adapted"]["seen"]["clean"] for name, table in lesson["whole"].items()}
    assert adapted["ce"] < adapted["tecoa"]
    # ±2 points: 1.96 √(¼ / n) = 0.02
    assert abs(lesson["needed"] - 1.96 ** 2 / 4 / .02 ** 2) < 100
    rows = lesson["tables"]["fare"]["tasks"].items()
    assert lesson["sure"] == [name for name, row in rows if row["robust_interval"][0] > row["chance"]]


def test_it_has_five_solutions_and_an_attack_in_six_lines():
    assert sum(map(bool, map(solutions, cells()))) == 5
    (attack,) = (node for tree in code() for node in tree.body if getattr(node, "name", "") == "my_attack")
    assert attack.end_lineno - attack.lineno == 6


def test_it_takes_from_the_repository_what_is_there():
    """It defines no function of ours again, what it imports stays that, and no ε is written down."""
    ours = {node.name for tree in TREES.values() for node in tree.body if isinstance(node, DEFINITIONS)}
    nodes = [node for tree in code() for node in ast.walk(tree)]
    defined = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names}
    assert defined & ours == set() and (defined | assigned) & imported == set()
    assert {"load_clip", "encode_head", "predict", "pgd", "LOSSES", "evaluate_tasks"} <= imported
    assert not re.search(r"[\d.]+ ?/ ?255", "".join(cell.source for cell in cells()))


def test_what_is_shipped_is_small_and_has_no_errors():
    assert LESSON.stat().st_size < 400_000
    outputs = [output for cell in cells() if cell.cell_type == "code" for output in cell.outputs]
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)
