"""What keeps a run alive: options, processes, checkpoints, resume, evaluation, reports, files."""
import os


def spin_less():
    """Of a command, before it imports PyTorch: a thread that waits for others looks 2,000 times before it
    sleeps, in place of 300,000, in which a second program on the same cores could work. What the user has set
    stays. GNU's OpenMP reads this once, as PyTorch is loaded; others ignore it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
