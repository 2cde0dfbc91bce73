"""tasks/class_names.py: the class names and templates that a user gives."""
import pytest
from conftest import ROOT
from writers import imagenet_folder, write_shards

from tasks.class_names import imagenet_class_names, own_words, read_class_names, read_template
from tasks.task import load_task

folder = pytest.fixture(imagenet_folder)                # its classes: Hot-Dog, n01440764, n02012849


@pytest.fixture
def file(tmp_path_factory):
    """file(content) → the path of a file that holds it."""
    def make(content):
        path = tmp_path_factory.mktemp("words") / "words.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    return make


def test_files_of_class_names(file):
    assert read_class_names(file("\ufeffcat\n  dog \r\nsea lion\n\n\n")) == ["cat", "dog", "sea lion"]
    assert read_class_names(file("# a comment\n0\tcat\n1\tgreat white shark\n")) == {
        "0": "cat", "1": "great white shark"}
    assert read_class_names(ROOT / "tasks" / "imagenet_classes.txt") == imagenet_class_names()
    for content, said in (("", "empty"), ("cat\n\ndog\n", "line 2 is empty"), ("a\tb\ncat", "'cat' has no"),
                          ("a\tb\na\tc\n", "'a' has two names"), (b"\xff\xfe\x00", "not a text in UTF-8")):
        with pytest.raises(ValueError, match=said) as error:
            read_class_names(file(content))
        assert str(error.value).startswith("--class-names /") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--class-names /nowhere: No such file"):
        read_class_names("/nowhere")


def test_templates(file):
    assert read_template("a {} 100 %") == "a {} 100 %"
    assert read_template(file("# of a paper {}\na {}.\n")) == "a {}."
    for text in ("a {} {x}", "a {}, class {0}", "{{}}", "lambda c: f'a {c} {}.',", '{"a {}"'):
        with pytest.raises(ValueError, match="more braces than {} for"):
            read_template(text)
    assert read_template(file("a {}.\nthe {c}.\n")) == ["a {}.", "the {c}."]
    assert read_template(file("a {}.\n")) == "a {}."
    for text in ("a photo of a cat", "/nowhere.txt"):
        with pytest.raises(ValueError, match="which is no file either"):
            read_template(text)
    with pytest.raises(ValueError, match="'the dog' has no {} for the class name$"):
        read_template(file("a {}\nthe dog\n"))


def test_whose_words_they_are(file, capsys):
    """Those of folders, shards and caches; of all sets where there are none of these."""
    one_a_line, by_folder = file("cat\ndog\n"), file("a\tcat\nb\tdog\n")
    assert own_words(["cifar10", "folder:x"]) == {}
    assert own_words(["cifar10", "pets"], template="{}") == {"cifar10": (None, "{}"), "pets": (None, "{}")}
    assert capsys.readouterr().out == ""
    assert own_words(["pets", "folder:x"], one_a_line) == {"folder:x": (["cat", "dog"], None)}
    assert "are for folder:x; the other sets keep their own" in capsys.readouterr().out
    both = own_words(["folder:x", "wds:y", "folder:x"], by_folder, "a {}")
    assert both == dict.fromkeys(("folder:x", "wds:y"), ({"a": "cat", "b": "dog"}, "a {}"))
    with pytest.raises(ValueError, match="is for one set, not for folder:x, wds:y"):
        own_words(["folder:x", "wds:y"], one_a_line)


def test_names_of_a_folder(folder, file):
    name = f"folder:{folder}"

    def names(content, **more):
        words = own_words([name], file(content))
        return [load_task(name, split, size=8, words=words, **more).class_names for split in ("train", "val")]
    # in the order of the folders
    assert names("sausage\nfish\nbird\n", limit=2) == [["sausage", "fish", "bird"]] * 2
    lines = "n02012849\tbird\nHot-Dog\tsausage\nn01440764\tfish\nn01443537\tgold\n"
    assert names(lines) == [["sausage", "fish", "bird"]] * 2
    with pytest.raises(ValueError, match="2 names, folder:.* has 3 classes: Hot-Dog, n01440764, n02012849$"):
        names("sausage\nfish\n")
    with pytest.raises(ValueError, match="no line for 1 of the 3 classes of folder:.*: n02012849$"):
        names("Hot-Dog\tsausage\nn01440764\tfish\n")
    # the folders' own names, in another order; and no tab
    for content in ("n01440764\nHot-Dog\nn02012849\n", "n02012849 bird\nHot-Dog sausage\nn01440764 fish\n",
                    "n02012849,bird\nHot-Dog,sausage\nn01440764,fish\n"):
        with pytest.raises(ValueError, match="<TAB>"):
            names(content)
    assert names("Hot-Dog\nfish\nbird\n")[0] == ["Hot-Dog", "fish", "bird"]
    words = {name: (None, ["a {}", "the {}"])}
    task = load_task(name, "val", size=8, words=words)
    assert task.template == ["a {}", "the {}"] and task.class_names[1] == "tench"


def test_names_of_shards(tmp_path, file):
    """They may stand in for a classnames.txt that is not there; text labels are the files' own."""
    write_shards(tmp_path, [0, 1], ["n01440764", "dog"], "png")
    name = f"wds:{tmp_path}"
    assert load_task(name, "val", size=8).class_names == ["tench", "dog"]
    for content in ("cat\nhound\n", "tench\tcat\ndog\thound\n"):
        words = own_words([name], file(content))
        assert load_task(name, "val", size=8, words=words).class_names == ["cat", "hound"]
    (tmp_path / "classnames.txt").unlink()
    words = own_words([name], file("cat\nhound\n"))
    assert load_task(name, "val", size=8, words=words).class_names == ["cat", "hound"]
    with pytest.raises(ValueError, match="no classnames.txt beside it, and no --class-names"):
        load_task(name, "val", size=8)
