"""prompts.py: class names and the zero-shot head."""
import torch

from model import load_clip
from prompts import clean_class_name, encode_head, imagenet_class_names


def test_class_names_are_cleaned_as_in_the_paper():
    assert clean_class_name("Black-footed_Ferret") == "black footed ferret"
    assert clean_class_name("a/b") == "a b"


def test_imagenet_has_a_thousand_names_and_none_twice():
    names = imagenet_class_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert len({clean_class_name(name) for name in names.values()}) == 1000
    assert names["n01440764"] == "tench" and names["n15075141"] == "toilet tissue"
    assert names["n02012849"] != names["n03126707"]                                      # the two cranes


def test_head_is_the_normalised_text_embedding_of_each_prompt(capsys):
    clip, tokenizer = load_clip("toy", "none")
    names = [f"class {i}" for i in range(300)]                                           # more than one chunk
    head = encode_head(clip, tokenizer, names, "A photo of a {}.")
    assert head.shape == (300, 64) and head.dtype == torch.float32 and not head.requires_grad
    assert torch.allclose(head.norm(dim=1), torch.ones(300), atol=1e-5)
    for i in (0, 299):
        alone = clip.encode_text(tokenizer([f"A photo of a class {i}."]))[0]
        assert torch.allclose(head[i], alone / alone.norm(), atol=1e-5)
    assert capsys.readouterr().err == ""


def test_repeated_prompts_are_reported(capsys):
    clip, tokenizer = load_clip("toy", "none")
    encode_head(clip, tokenizer, ["Hot-Dog", "hot dog", "cat"], "a {}")
    assert "a hot dog" in capsys.readouterr().err
