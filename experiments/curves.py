"""The curves of runs of train_tecoa.py, finished, stopped or running, from their logs.

    python -m experiments.curves out/RUN         # writes out/RUN/curves.png, as the run does when it ends
    python -m experiments.curves out/A out/B     # side by side, to out/curves.png; or --out FILE.png
"""
import argparse
import os
from pathlib import Path

from harness.files import ROOT
from harness.log import read_log
from harness.reports import draw_curves, plain


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.curves", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", metavar="FILE", help="the picture: .png, .pdf, .svg (default: curves.png "
                        "beside the log of one run, out/curves.png of several)")
    args = parser.parse_args()
    # each once; a name alone says which run it is, unless two have the same
    logs = [Path(run, "log.jsonl") if Path(run).is_dir() else Path(run) for run in dict.fromkeys(args.runs)]
    names = [log.resolve().parent.name for log in logs]
    labels = names if len({*names}) == len(names) else [str(log.parent) for log in logs]
    beside = logs[0].parent if len(logs) == 1 else ROOT / "out"
    out = Path(args.out or beside / "curves.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(out, {label: read_log(log) for label, log in zip(labels, logs)})
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {plain(error)}\n")
    print(f"wrote {plain(os.path.relpath(out))}")


if __name__ == "__main__":
    main()
