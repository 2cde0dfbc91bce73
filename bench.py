"""What a step costs: arithmetic, time, memory; its parts, its kernels, and the authors' recipe beside it.

    python bench.py                              # the arithmetic of a step, and the kernels at small shapes
    python bench.py --all                        # all of it, on a GPU with its tests: under 8 minutes
    python bench.py --models ViT-B-16 --batch-sizes 64,256 --steps 10
    python bench.py --baseline authors --batch-sizes 256       # and their recipe, on the same device
    python bench.py --evaluation                 # passes and seconds of each attack, beside bare passes
    python bench.py --soak                       # 2,000 steps of the toy: does anything grow?

Prints Markdown; with --all or --out it is written to a file, line by line. Weights, pixels and labels are
random: none of that changes the cost. A time is the median of several timings by PyTorch's own timer, with
the lowest and the highest, after calls that do not count. GFLOP are counted by PyTorch, without data."""
from harness import spin_less

if __name__ == "__main__":
    spin_less()             # before PyTorch is imported
    from experiments.costs import main
    main(__doc__)
