"""The random start of an attack: uniform noise in the ε-ball around each image, from one int64 key per image.

Why it is a kernel of its own: the noise belongs to the image (its key), not to a generator's state, so that a
start is the same in any batch, process and device. A counter-based hash gives that; but written in PyTorch it
makes some twenty passes over int64 temporaries, 8 bytes a pixel each. Here it is one pass."""
import math

import torch

from kernels import INTERPRET, fused, triton
from kernels.pgd_step import l2_norm, to_float

# splitmix64's constants (Steele et al. 2014), as signed numbers
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FACTOR1, FACTOR2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def mix(t):
    """splitmix64's finaliser on int64, whose products wrap; the masks make the shifts logical."""
    t = (t ^ ((t >> 30) & 0x3FFFFFFFF)) * FACTOR1
    t = (t ^ ((t >> 27) & 0x1FFFFFFFFF)) * FACTOR2
    return t ^ ((t >> 31) & 0x1FFFFFFFF)


def uniform(keys, shape, stream=0):
    """Uniform in [0,1): fp32 [B, *shape] from int64 keys [B]. A key's streams are independent."""
    counter = torch.arange(1, math.prod(shape) + 1, device=keys.device) * GOLDEN
    bits = mix(mix(keys + stream)[:, None] + counter)
    return (((bits >> 40) & 0xFFFFFF).float() / (1 << 24)).view(len(keys), *shape)


def random_start(x, eps, norm, keys):
    """x plus noise uniform in the ε-ball, clipped to [0,1]: fp32 (fp64 for fp64) [B, ...].

    x: uint8, or float in [0,1]. eps: a pixel fraction (linf) or L2 length (l2). keys: int64 [B]."""
    shape = x.shape[1:]
    if norm == "linf":
        if fused(x) and x.dtype != torch.float64:
            return linf_start(x, keys, eps)
        delta = (2 * uniform(keys, shape) - 1) * eps
    else:       # a direction uniform on the sphere (normal numbers by Box–Muller), a radius ∝ u^(1/dimension)
        radius, turn = 1 - uniform(keys, shape), uniform(keys, shape, stream=1)
        normal = (-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * turn)
        length = uniform(keys, (1,) * len(shape), stream=2) ** (1 / math.prod(shape))
        delta = normal / l2_norm(normal) * length * eps
    x = to_float(x)
    return (x + delta.to(x.dtype)).clamp(0, 1)


if triton is not None:
    import triton.language as tl

    from kernels.pgd_step import load_pixels

    @triton.jit
    def mix_kernel(t, FACTOR1: tl.constexpr, FACTOR2: tl.constexpr):
        t = (t ^ ((t >> 30) & 0x3FFFFFFFF)) * FACTOR1
        t = (t ^ ((t >> 27) & 0x1FFFFFFFFF)) * FACTOR2
        return t ^ ((t >> 31) & 0x1FFFFFFFF)

    @triton.jit
    def start_kernel(x_ptr, keys_ptr, out_ptr, eps, pixels, chunks, GOLDEN: tl.constexpr,
                     FACTOR1: tl.constexpr, FACTOR2: tl.constexpr, UINT8: tl.constexpr, BLOCK: tl.constexpr):
        image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
        p = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        key = mix_kernel(tl.load(keys_ptr + image), FACTOR1, FACTOR2)
        bits = mix_kernel(key + (p.to(tl.int64) + 1) * GOLDEN, FACTOR1, FACTOR2)
        u = ((bits >> 40) & 0xFFFFFF).to(tl.float32) * (1 / 16777216)
        x = load_pixels(x_ptr + image * pixels + p, inside, UINT8)
        out = tl.minimum(tl.maximum(x + (2 * u - 1) * eps, 0.), 1.)
        tl.store(out_ptr + image * pixels + p, out, mask=inside)


@torch.library.custom_op("tecoa::linf_start", mutates_args=())
def linf_start(x: torch.Tensor, keys: torch.Tensor, eps: float) -> torch.Tensor:
    """`random_start` for linf: fp32 [B, ...]; the same bits as the reference."""
    if not (x.is_cuda or INTERPRET):
        return (to_float(x) + (2 * uniform(keys, x.shape[1:]) - 1) * eps).clamp(0, 1).contiguous()
    x, keys, out = x.contiguous(), keys.contiguous(), x.new_empty(x.shape, dtype=torch.float32)
    if out.numel():
        pixels, block = x[0].numel(), 1024
        chunks = triton.cdiv(pixels, block)
        start_kernel[(len(x) * chunks,)](x, keys, out, eps, pixels, chunks, GOLDEN, FACTOR1, FACTOR2,
                                         x.dtype == torch.uint8, block, enable_fp_fusion=False)
    return out


@linf_start.register_fake
def _(x, keys, eps):
    return x.new_empty(x.shape, dtype=torch.float32)
