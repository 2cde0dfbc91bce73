"""Class names of data sets whose files have none, or others, from the *_classes.txt beside this file."""
import functools
from pathlib import Path


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
