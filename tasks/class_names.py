"""Class names of data sets whose files have none, or others, from the *_classes.txt beside this file; and
those of --class-names and --template."""
import functools
import os
import re
from pathlib import Path

from prompts import clean_class_name
from tasks.images import printable, say_once


def class_rows(file):
    """The columns of each line of a file, such as (n01440764, tench); no class name stands twice."""
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return [tuple(line.split("\t")) for line in lines if not line.startswith("#")]


@functools.cache
def folder_names(file):
    """{folder: class name}, e.g. n01440764 → tench, or CH → Switzerland."""
    return dict(class_rows(file))


imagenet_class_names = functools.partial(folder_names, "imagenet_classes.txt")      # of its 1,000 folders
country_names = functools.partial(folder_names, "country211_classes.txt")           # of Country-211's

# what CLIP calls three of the Flowers-102 otherwise than torchvision, and sets whose own names are CLIP's to
# the letter (openai/CLIP, data/prompts.md)
CLIP_FLOWERS = {"globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia",
                "ball moss": "air plant"}
CLIP_LETTERS = "aircraft", "cars", "country211", "dtd", "flowers102", "pets"


def openai_names(name, classes):
    """CLIP's curated names of a set's classes, of ImageNet's by their WordNet ids; of a set that CLIP's
    authors published none for, or the same, its own: those of shards as they are, others as English."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES        # here, as open_clip takes seconds
    known = dict(zip(imagenet_class_names(), IMAGENET_CLASSNAMES))
    known |= {"country211": country_names(), "flowers102": CLIP_FLOWERS}.get(name, {})
    as_they_are = name in CLIP_LETTERS or name.startswith("wds:")
    return [known.get(c, c if as_they_are else clean_class_name(c)) for c in classes]


def _lines(path, option):
    """The lines of a text file, without the empty ones at its end. ValueError: it is no text, or empty."""
    try:
        lines = Path(path).read_text("utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} {path}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}"
                         ) from None
    if not lines or not all(map(str.strip, lines)):
        empty = next((f"line {n} is empty" for n, line in enumerate(lines, 1) if not line.strip()), "empty")
        raise ValueError(f"{option} {path}: {empty}")
    return lines


def read_class_names(path):
    """--class-names: [name, …], one a line, in the order of the classes; or {folder: name} of lines of
    folder<TAB>name. Lines that begin with "# " are comments. ValueError, in one line."""
    lines = [line for line in _lines(path, "--class-names") if not line.startswith("# ")]
    tabs = ["\t" in line for line in lines]
    if not any(tabs):
        return [line.strip() for line in lines]
    if not all(tabs):
        raise ValueError(f"--class-names {path}: {lines[tabs.index(False)].strip()!r} has no tab, other "
                         "lines have one")
    rows = [tuple(map(str.strip, line.split("\t")[:2])) for line in lines]
    names = dict(reversed(rows))
    twice = [folder for folder, name in rows if names[folder] != name]
    if twice:
        raise ValueError(f"--class-names {path}: {twice[0]!r} has two names")
    return names


def read_template(text):
    """--template: a text with {} or {c} for the class name, as `fill` takes it; or a file with one a line, a
    list: an ensemble. ValueError, in one line."""
    lines = _lines(text, "--template") if os.path.isfile(text) else [text]
    lines = [line.strip() for line in lines if not (os.path.isfile(text) and line.startswith("# "))]
    # without the places for the name; in a line of Python {c} is none
    rests = {line: re.sub(r"\{\}" if "lambda" in line else r"\{c?\}", "", line) for line in lines}
    wrong = [line for line, rest in rests.items() if rest == line or re.search("[{}]", rest)]
    if wrong:
        what = "" if os.path.isfile(text) else ", which is no file either"
        raise ValueError(f"--template: {printable(wrong[0])!r} has no {{}} for the class name{what}"
                         if rests[wrong[0]] == wrong[0] else
                         f"--template: {printable(wrong[0])!r} has more braces than {{}} for the class name")
    return lines if len(lines) > 1 else lines[0]


def own_words(names, class_names=None, template=None):
    """{set: (its class names, of `read_class_names`, or None; its template or None)} that --class-names and
    --template give to some of the sets `names`: to folders, shards and caches, or, if there are none of
    these, to all. ValueError, in one line: one name a line cannot be for several sets."""
    if class_names is None and template is None:
        return {}
    names = list(dict.fromkeys(names))
    own = [name for name in names if name.startswith(("folder:", "wds:", "cache:"))] or names
    found = None if class_names is None else read_class_names(class_names)
    if isinstance(found, list) and len(own) > 1:
        raise ValueError(f"--class-names {class_names}: one name a line is for one set, not for "
                         f"{', '.join(own)}; for several, give lines of folder<TAB>name")
    if len(own) < len(names):
        say_once(f"--class-names and --template are for {', '.join(own)}; the other sets keep their own")
    return dict.fromkeys(own, (found, None if template is None else read_template(template)))


def named(classes, found, name):
    """The class names of a set whose classes are called `classes` in its files. found: of
    `read_class_names`. ValueError, in one line: they do not fit."""
    if isinstance(found, list):
        if len(found) != len(classes):
            raise ValueError(f"--class-names has {len(found)} names, {name} has {len(classes)} classes: "
                             f"{printable(', '.join(classes[:5]))}{', …' * (len(classes) > 5)}")
        moved = [(c, name) for c, name in zip(classes, found) if name != c and name in classes]
        if moved:
            raise ValueError(f"--class-names gives the class {printable(moved[0][0])} the name of another, "
                             f"{printable(moved[0][1])}: for another order give lines of folder<TAB>name")
        begun = [name for c, name in zip(classes, found)
                 if re.split(r"[\s,:;]", name)[0] in {*classes} - {c} and not name.startswith(c)]
        if len(begun) > 1:
            raise ValueError(f"--class-names: {printable(begun[0])!r} begins with the name of another "
                             "folder: between folder and name stands a <TAB>")
        return found
    missing = [c for c in classes if c not in found]
    if missing:
        raise ValueError(f"--class-names has no line for {len(missing)} of the {len(classes)} classes of "
                         f"{name}: {printable(', '.join(missing[:5]))}{', …' * (len(missing) > 5)}")
    return [found[c] for c in classes]
