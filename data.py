"""Decode a data set once, where decoding is what a run waits for.

    python data.py cache --dataset imagenet --data-root DIR --out FILE     # or another set; then cache:FILE
    python data.py verify FILE                                             # compare it with its checksums"""
import os
from pathlib import Path

from harness import spin_less

if __name__ == "__main__":              # before PyTorch is imported
    spin_less()
from harness import processes
from harness.files import writable_folder
from harness.options import INTERPOLATIONS, RESIZE, Parser, number, resizing
from tasks.cache import damaged, open_cache
from tasks.class_names import own_words
from tasks.make_cache import make_cache
from tasks.protocols import DEFAULT, PROTOCOLS


def main():
    processes.begin()
    parser = Parser(prog="data.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("cache", help="decode a data set into a file, to use as cache:FILE")
    command.add_argument("--dataset", required=True, help="a set by its name (docs/data.md), folder:PATH or "
                         "wds:PATH: what is adapted on and what is evaluated on")
    command.add_argument("--data-root", metavar="DIR", help="the folder with the data sets")
    command.add_argument("--out", required=True, metavar="FILE", help="to write; beside it, FILE.index.npz")
    command.add_argument("--size", type=number(int, 1), default=224, help="in pixels (default: %(default)s)")
    command.add_argument("--protocol", default=DEFAULT, choices=PROTOCOLS, help="whose way to resize "
                         "(docs/evaluation.md; default: %(default)s)")
    command.add_argument("--resize", type=resizing, metavar=RESIZE, help="of the shorter side, before the "
                         "centre is cropped (default: the protocol's); squash, longest, none: as of "
                         "training and evaluation")
    command.add_argument("--interpolation", choices=INTERPOLATIONS, help="(default: the protocol's)")
    command.add_argument("--class-names", metavar="FILE", help="one a line, in the order of the classes; or "
                         "folder<TAB>name (default: as the folders are called, or in the set's own words)")
    command.add_argument("--template", metavar="TEXT|FILE", help="prompt, {} for the class name; a file has "
                         "one a line (default: the set's, or This is a photo of a {})")
    command.add_argument("--workers", type=number(int, 0), default=os.cpu_count() or 1,
                         help="processes that decode (default: one per core, %(default)s)")
    command = commands.add_parser("verify", help="compare the images in a cache with their checksums")
    command.add_argument("file", metavar="FILE")
    args = parser.parse_args()
    try:
        if args.command == "cache":
            writable_folder(Path(args.out).parent)
            words = own_words([args.dataset], args.class_names, args.template)
            make_cache(args.dataset, args.out, size=args.size, data_root=args.data_root, workers=args.workers,
                       resize=args.resize, interpolation=args.interpolation, protocol=args.protocol,
                       words=words)
        else:
            images, index = open_cache(args.file)
            bad, words = damaged(args.file, images.offset, index)
            if bad:
                raise ValueError(f"{args.file}: {words}")
            print(f"{args.file} is whole: {len(images):,} images of {index['size']}×{index['size']} pixels")
    except (ValueError, OSError) as error:
        found = args.command == "verify" and os.path.isfile(args.file)       # not whole; else a wrong command
        command.exit(1 if found else 2, f"data.py {args.command}: {error}\n")


if __name__ == "__main__":
    main()
