"""Measuring: FLOPs, with data or without; bytes, operator by operator; time and memory on a device."""
import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import load_clip

# PyTorch (2.14) counts the attention of a GPU, not that of a CPU; for FlopCounterMode's custom_mapping
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_shape=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, q, k, v)}


class Bytes(TorchDispatchMode):
    """Adds up the bytes that every operator inside reads and writes; views are free."""
    total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not (operator.is_view or operator is torch.ops.aten._unsafe_view.default):
            self.total += sum(t.nbytes for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
        return out


@functools.cache
def without_data(name):
    """The CLIP `name` with tensors that have shapes and no data, and the mode that does no arithmetic."""
    clip, mode = load_clip(name, "none")[0], FakeTensorMode()
    for module in clip.modules():
        module._parameters = {k: p if p is None else nn.Parameter(mode.from_tensor(p.detach()))
                              for k, p in module._parameters.items()}
        module._buffers = {k: b if b is None else mode.from_tensor(b) for k, b in module._buffers.items()}
    return clip, mode


def gflop(function):
    """10⁹ floating-point operations of function()."""
    count = FlopCounterMode(display=False, custom_mapping=FLOPS)
    # what it needs to count by module as well forbids a gradient to a module's input, as attacks take it
    count.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda: None)
    with count:
        function()
    return count.get_total_flops() / 1e9


def measure(function, device, seconds):
    """Milliseconds of function() in each of several timings, sorted; and the most MiB that the device held,
    inputs and weights included (None on a CPU). Two calls come first that count for nothing: compilation,
    caches. PyTorch's timer decides how many calls a timing is the mean of. It takes four or more, until half
    of them lie within 10 %, for at most `seconds`."""
    from torch.utils.benchmark import Timer     # here, as it prints a warning where there is nvcc and no GPU
    function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timer.adaptive_autorange(min_run_time=min(.2, seconds), max_run_time=seconds).times
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else None
    return sorted(1e3 * time for time in times), peak
