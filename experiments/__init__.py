"""The paper's figures, cross-checks, what a step costs: behind `paper.py` and `bench.py`."""
import argparse


def whole_numbers(least):
    """A type for argparse: a comma list of whole numbers, each at least `least` and below 2³¹."""
    def parse(text):
        if not all(word.isdecimal() and least <= int(word) < 2**31 for word in text.split(",")):
            raise argparse.ArgumentTypeError(f"expected a comma list of whole numbers from {least} on, "
                                             f"below {2**31}, got {text}")
        return list(dict.fromkeys(map(int, text.split(","))))
    return parse
