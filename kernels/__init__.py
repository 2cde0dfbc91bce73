"""Three fused operations, each a file: why it exists, the PyTorch reference, the Triton kernel, the operator.

`use` says which of the two runs. Every operator is a `torch.library.custom_op`, so torch.compile takes it
whole into its graph. Without a GPU or without Triton all is plain PyTorch, which torch.compile may fuse."""
import os
import shutil

try:
    import triton
except ImportError:                  # no Triton for this machine: the references are all there is
    triton = None

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"    # on the CPU, for tests
COMPILER = any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "cc", "clang")))   # which Triton needs
choice = "auto"


def use(which, device):
    """auto: Triton where it can run, else PyTorch; triton: ValueError if it cannot run on device; torch."""
    global choice
    missing = ("Triton is not installed" if triton is None else
               "they need a C compiler, such as gcc" if not COMPILER else
               "they need a GPU" if device.type != "cuda" and not INTERPRET else None)
    if which == "triton" and missing:
        raise ValueError(f"--kernels triton on {device.type}: {missing}")
    choice = which


def fused(tensor):
    """Whether the Triton kernel, rather than the reference, is to work on this tensor."""
    if triton is None or not COMPILER or choice == "torch":
        return False
    return tensor.is_cuda or INTERPRET and choice == "triton"
