"""Measuring: FLOPs and bytes counted operator by operator, with data or without; time and memory on a device."""
import time

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from model import load_clip


FLOPS = {                                            # some versions of PyTorch do not count a CPU's attention
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
    **flop_registry}


class Operations(TorchDispatchMode):
    """Adds up the FLOPs of every matrix product and attention that runs inside, and the bytes that all operators read and
    write; views are free."""
    flops = bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator._overloadpacket in FLOPS:
            self.flops += FLOPS[operator._overloadpacket](*args, **(kwargs or {}), out_val=out)
        if not (operator.is_view or operator is torch.ops.aten._unsafe_view.default):
            self.bytes += sum(t.nbytes for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
        return out


def without_data(name):
    """The CLIP `name` with tensors that have shapes and nothing else, and the mode in which its arithmetic is not done."""
    clip, mode = load_clip(name, "none")[0], FakeTensorMode()
    for module in clip.modules():
        module._parameters = {k: p if p is None else nn.Parameter(mode.from_tensor(p.detach()))
                              for k, p in module._parameters.items()}
        module._buffers = {k: b if b is None else mode.from_tensor(b) for k, b in module._buffers.items()}
    return clip, mode


def gflop(function):
    """10⁹ floating-point operations of function()."""
    with Operations() as count:
        function()
    return count.flops / 1e9


def measure(function, device, runs):
    """(median, lowest, highest) milliseconds of `runs` calls after two that warm up, and the most MiB that the device held,
    inputs and weights included (None on a CPU)."""
    for _ in range(2):
        function()
    if device.type == "cpu":
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[runs // 2], min(times), max(times), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    return times[runs // 2], times[0], times[-1], torch.cuda.max_memory_allocated() / 2 ** 20
