"""docs/method.md: the command lines of other papers' recipes, option by option."""
import re

import pytest
from conftest import ROOT
from test_options import training

from tasks.protocols import PROTOCOLS


def recipe(loss):
    """The settled options of the one command in docs/method.md that trains with a loss."""
    text = (ROOT / "docs" / "method.md").read_text().replace("\\\n", " ")
    commands = [line.split() for line in re.findall(r"^torchrun \S+ train_tecoa\.py (.*)", text, re.M)]
    (words,) = [words for words in commands if words[words.index("--loss") + 1] == loss]
    return training(*words)[0]


def test_fares_recipe_is_the_one_of_its_authors():
    """train/adversarial_training_clip.py of RobustVLM, as its README calls it for FARE⁴."""
    args = recipe("fare")
    assert (args.model, args.pretrained, args.dataset) == ("ViT-L-14-quickgelu", "openai", "imagenet")
    assert (args.optimizer, args.lr, args.weight_decay) == ("adamw", 1e-5, 1e-4)
    assert (args.norm, args.eps, args.steps, args.step_size) == ("linf", 4, 10, 1)
    assert (args.epochs, args.batch_size, args.warmup, args.adapt) == (2, 128, 1400, "full")
    # about 20,000 steps
    assert args.epochs * (1_281_167 // args.batch_size) == 20_018
    assert PROTOCOLS[args.protocol].resize == 224 and args.interpolation == "bicubic"


@pytest.mark.parametrize("loss,lr,batch_size", [("pmg", 5e-5, 256), ("agft", 4e-4, 256), ("tga", 1e-4, 128)])
def test_the_other_heirs_recipes(loss, lr, batch_size):
    args = recipe(loss)
    assert (args.optimizer, args.lr, args.weight_decay) == ("sgd", lr, 0)
    assert (args.model, args.eps, args.steps, args.step_size) == ("ViT-B-32-quickgelu", 1, 2, 1)
    assert (args.epochs, args.batch_size, args.adapt) == (10, batch_size, "full")
