"""prompts.py: class names, templates and the zero-shot head."""
import torch
import torch.nn.functional as F

from model import load_clip
from prompts import OPENAI_TEMPLATES, clean_class_name, encode_head, openai_templates, prompt_warnings
from tasks.class_names import imagenet_class_names
from toy import world


def test_class_names_are_cleaned_as_in_the_paper():
    assert clean_class_name("Black-footed_Ferret") == "black footed ferret"
    assert clean_class_name("a/b") == "a b"


def test_imagenet_has_a_thousand_names_and_none_twice():
    names = imagenet_class_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert len({clean_class_name(name) for name in names.values()}) == 1000
    assert names["n01440764"] == "tench" and names["n15075141"] == "toilet tissue"
    # the two cranes
    assert names["n02012849"] != names["n03126707"]


def test_head_is_the_normalised_text_embedding_of_each_prompt(capsys):
    clip, tokenizer = load_clip("toy", "none")
    # more than one chunk
    names = [f"{('dog', 'cat')[i % 2]} {i}" for i in range(300)]
    head = encode_head(clip, tokenizer, names, "A photo of a {}.")
    assert head.shape == (300, 64) and head.dtype == torch.float32 and not head.requires_grad
    assert torch.allclose(head.norm(dim=1), torch.ones(300), atol=1e-5)
    for i in (0, 299):
        alone = clip.encode_text(tokenizer([f"A photo of a {names[i]}."]))[0]
        assert torch.allclose(head[i], alone / alone.norm(), atol=1e-5)
    assert capsys.readouterr().err == ""
    for names, warned in ((["dog 1", "dog 2"], True), (["dog 1", "cat 2"], False), (["dog", "cat"], False),
                          (["digit 1", "digit 2"], False)):
        found = prompt_warnings(tokenizer, names, "a {}")
        assert [text.startswith("all class names differ in numbers alone: 'dog 1'") for text in found] == (
            [True] if warned else [])


def test_repeated_prompts_are_reported(capsys):
    clip, tokenizer = load_clip("toy", "none")
    encode_head(clip, tokenizer, ["Hot-Dog", "hot dog", "cat"], "a {}")
    assert "tell apart: 'Hot-Dog', 'hot dog'" in capsys.readouterr().err


def test_an_ensemble_is_the_unit_mean_of_unit_embeddings():
    clip, tokenizer = load_clip("toy", "none")
    names, templates = ["Hot-Dog", "cat", "bird"], ["a photo of a {}.", "the {} on the left", "{}"]
    head = encode_head(clip, tokenizer, names, templates)
    for row, name in zip(head, ("hot dog", "cat", "bird")):
        rows = clip.encode_text(tokenizer([template.replace("{}", name) for template in templates]))
        mean = sum(r / r.norm() for r in rows) / 3
        assert torch.allclose(row, mean / mean.norm(), atol=1e-6)
        assert not torch.allclose(row, rows.mean(0) / rows.mean(0).norm(), atol=1e-6)
    # a list of one template is as that template
    alone = clip.encode_text(tokenizer([f"the {name} on the left" for name in ("hot dog", "cat", "bird")]))
    for template in (templates[1], templates[1:2]):
        assert torch.equal(encode_head(clip, tokenizer, names, template), F.normalize(alone.float(), dim=-1))


def test_clips_ensembles():
    """As many templates a data set as openai/CLIP's data/prompts.md has, and ImageNet's 80 for another."""
    counts = {"cifar10": 18, "cifar100": 18, "stl10": 2, "caltech101": 34, "pets": 1, "cars": 8, "food101": 1,
              "flowers102": 1, "aircraft": 2, "sun397": 2, "dtd": 8, "eurosat": 3, "pcam": 1,
              "hateful-memes": 1, "country211": 5}
    assert {name: len(openai_templates(name)) for name in OPENAI_TEMPLATES} == counts
    for name in (*counts, "imagenet"):
        templates = openai_templates(name)
        assert len(set(templates)) == len(templates) == counts.get(name, 80)
        assert all(t.count("{c}") == 1 and not {*"*"} & {*t} and "  " not in t for t in templates)
    caltech = {"art of the {c}.", "a origami {c}.", "the {c} in a video game."}
    assert caltech <= set(openai_templates("caltech101"))
    assert "a black and white photo of the {c}." in openai_templates("cifar10")
    assert openai_templates("imagenet")[0] == "a bad photo of a {c}."


MEANINGLESS = ["0", "17", "-3", "1.5", "class_1", "label-3", "c0", "Class 12", "n99999999", "Q146",
               "m.01g317", "d41d8cd98f00b204", "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "_", "--"]
NAMES = ["tench", "707-320", "A310", "C-130", "ak47", "Boeing 747", "BMW 3 Series 2012", "facade", "decade",
         "猫", "Aeroplane", "x-ray", "yin_yang", "beaded", "7-up", "t-shirt", "1957 chevrolet", "DC-9-30"]


def test_class_names_that_mean_nothing_are_named():
    clip, tokenizer = load_clip("toy", "none")
    for name in MEANINGLESS:
        (said,) = prompt_warnings(tokenizer, ["tench", name], "a photo of a {}")
        assert said.startswith("1 of 2 class names are ") and repr(name) in said and "tench" not in said
    assert prompt_warnings(tokenizer, NAMES, "a photo of a {}") == []
    assert prompt_warnings(tokenizer, [*"0123456789"], "a photo of the digit {}.") == []
    assert "10 of 10 class names are numbers: '0', '1', '2', '3', '4', …;" in prompt_warnings(
        tokenizer, [*"0123456789"], ["a {}", "the digit {}"])[0]


def test_tasks_of_the_toy_and_of_the_paper_are_told_apart():
    clip, tokenizer = load_clip("toy", "none")
    for class_names, template in world.TASKS.values():
        assert prompt_warnings(tokenizer, class_names, template) == []
    assert prompt_warnings(tokenizer, [*imagenet_class_names().values()], "This is a photo of a {}") == []


def test_prompts_that_differ_after_the_last_token_are_named():
    """Only those that every template of an ensemble leaves the same."""
    clip, tokenizer = load_clip("toy", "none")
    long = "very " * 100
    same, other = [f"{long}old cat", f"{long}young dog"], ["bird", f"old {long}cat"]
    # what the text encoder is given does not tell them apart
    assert torch.equal(*tokenizer([f"a {name}" for name in same]))
    head = encode_head(clip, tokenizer, [*same, *other], "a {}")
    assert torch.equal(head[0], head[1]) and not torch.equal(head[0], head[3])
    (said,) = prompt_warnings(tokenizer, [*same, *other], ["a {}", "the {}"])
    assert said.startswith("2 class names make prompts of the same tokens") and "bird" not in said
    # a template in which the difference comes too late, beside one in which it does not
    late = [long + "{}", "{}"]
    assert prompt_warnings(tokenizer, ["cat", "dog"], late) == []
    assert "same tokens" in prompt_warnings(tokenizer, ["cat", "dog"], late[:1])[0]


def test_other_braces_of_a_template_are_text():
    clip, tokenizer = load_clip("toy", "none")
    heads = [encode_head(clip, tokenizer, ["cat", "dog"], "a {} in {x} {0}"),
             encode_head(clip, tokenizer, ["cat", "dog"], "a {}")]
    alone = clip.encode_text(tokenizer(["a cat in {x} {0}", "a dog in {x} {0}"])).float()
    assert torch.equal(heads[0], F.normalize(alone, dim=-1)) and not torch.equal(*heads)
