"""Three fused operations, each a file: why it exists, the PyTorch reference, the Triton kernel, the operator.

`use` says which of the two runs. Every operator is a `torch.library.custom_op`, so torch.compile takes it into its graph
whole; without a GPU or without Triton the same functions are plain PyTorch, which torch.compile may fuse by itself.
"""
import os
import shutil

try:
    import triton
except ImportError:                                 # no Triton for this machine: the references are all there is
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"                     # Triton's own emulation on the CPU, for tests
COMPILER = any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc", "clang")))    # Triton and torch.compile need one
choice = "auto"


def use(which, device):
    """auto: Triton where it can run, else PyTorch; triton; or torch. ValueError if Triton is asked for and cannot run."""
    global choice
    missing = ("Triton is not installed" if triton is None else "they need a C compiler, such as gcc" if not COMPILER else
               "they need a GPU" if device.type != "cuda" and not INTERPRET else None)
    if which == "triton" and missing:
        raise ValueError(f"--kernels triton on {device.type}: {missing}")
    choice = which


def fused(tensor):
    """Whether the Triton kernel, rather than the reference, is to work on this tensor."""
    if triton is None or not COMPILER or choice == "torch":
        return False
    return tensor.is_cuda or INTERPRET and choice == "triton"
