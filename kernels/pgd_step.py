"""One step of projected gradient ascent: move, project on the ε-ball around the image, clamp to [0,1].

Why it is a kernel of its own: it touches every pixel of the batch and does next to no arithmetic, so all that
counts is how often memory is passed over. Here linf is one pass and l2 two, whatever else the program is
compiled with; plain PyTorch makes seven. The image is read as the uint8 that it came as, the gradient in its
own precision, and the model's next input is written: 13 bytes a pixel with a 4-byte gradient."""
import torch

from kernels import INTERPRET, fused, triton


def to_float(x):
    """uint8 as fp32 / 255, floats as they are. Divided by a tensor: CUDA multiplies by a number's inverse."""
    return x.float() / torch.full((), 255., device=x.device) if x.dtype == torch.uint8 else x


def l2_norm(t):
    """L2 norm of each image, [B, ...] → [B, 1, ...]. Summed in fp64: fp32's squares overflow and vanish."""
    return torch.linalg.vector_norm(t, dim=[*range(1, t.ndim)], keepdim=True, dtype=torch.float64).to(t.dtype)


def pgd_step(x_adv, grad, x, eps, step_size, norm="linf"):
    """x_adv + a step along grad, inside {x' : ‖x' − x‖ ≤ eps, 0 ≤ x' ≤ 1} (Madry et al. 2018). Any layout.

    x_adv: fp32 or fp64 [B, ...], as is what is returned; grad: any float; x: uint8, or float in [0,1]. eps,
    step_size: pixel fractions (linf) or L2 lengths (l2); step_size also as [B, 1, ...], one an image. linf
    steps along sign(grad), l2 along grad/‖grad‖; an image whose gradient is exactly zero stays."""
    if fused(x_adv) and x_adv.dtype == torch.float32 and not isinstance(step_size, torch.Tensor):
        return fused_pgd_step(x_adv, grad, x, eps, step_size, norm)
    return reference(x_adv, grad, x, eps, step_size, norm)


def reference(x_adv, grad, x, eps, step_size, norm):
    x, grad = to_float(x), grad.to(x_adv.dtype)
    if norm == "linf":
        return project(x_adv + step_size * grad.sign(), x, eps, norm)
    length = l2_norm(grad)
    direction = torch.where(length > 0, grad / length, grad)            # 0 where the gradient is 0
    return project(x_adv + step_size * direction, x, eps, norm)


def project(x_adv, x, eps, norm):
    """The nearest point of the ε-ball around x to x_adv, clamped to [0,1]. x: float in [0,1]."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x
    length = l2_norm(delta)
    delta = delta * torch.where(length > eps, eps / length, 1)
    return (x + delta).clamp(0, 1)          # the clamp only shortens δ: x itself lies in [0,1]


# ------------------------------------------------------------------------------ the Triton kernels
if triton is not None:
    import triton.language as tl

    @triton.jit
    def load_pixels(pointers, inside, UINT8: tl.constexpr):
        x = tl.load(pointers, mask=inside, other=0).to(tl.float32)
        if UINT8:
            x = tl.math.div_rn(x, 255.)     # rounded as `to_float` is; a plain / is not
        return x

    @triton.jit
    def clamp(x, low, high):
        x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)       # a NaN stays one, to be found
        return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def linf_kernel(x_adv_ptr, grad_ptr, x_ptr, out_ptr, eps, step_size, pixels, UINT8: tl.constexpr,
                    BLOCK: tl.constexpr):
        p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        x = load_pixels(x_ptr + p, inside, UINT8)
        g = tl.load(grad_ptr + p, mask=inside, other=0).to(tl.float32)
        sign = tl.where(g > 0, 1., tl.where(g < 0, -1., g))             # ±0 and NaN are their own signs
        moved = tl.load(x_adv_ptr + p, mask=inside, other=0) + step_size * sign
        tl.store(out_ptr + p, clamp(clamp(moved, x - eps, x + eps), 0., 1.), mask=inside)

    @triton.jit
    def load_chunk(x_adv_ptr, grad_ptr, x_ptr, image, chunk, pixels, UINT8: tl.constexpr,
                   BLOCK: tl.constexpr):
        """Of one chunk of one image: x; fp64 d = x_adv − x and gradient g; where they are; which exist."""
        p = chunk * BLOCK + tl.arange(0, BLOCK)
        inside, at = p < pixels, image * pixels + p
        x = load_pixels(x_ptr + at, inside, UINT8)
        d = (tl.load(x_adv_ptr + at, mask=inside, other=0) - x).to(tl.float64)
        return x, d, tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float64), at, inside

    @triton.jit
    def l2_sums_kernel(x_adv_ptr, grad_ptr, x_ptr, sums_ptr, pixels, chunks, UINT8: tl.constexpr,
                       BLOCK: tl.constexpr):
        """Of one chunk of one image: Σ g², Σ d·g and Σ d²."""
        image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
        x, d, g, at, inside = load_chunk(x_adv_ptr, grad_ptr, x_ptr, image, chunk, pixels, UINT8, BLOCK)
        sums = sums_ptr + image * 3 * chunks + chunk
        tl.store(sums, tl.sum(g * g))
        tl.store(sums + chunks, tl.sum(d * g))
        tl.store(sums + 2 * chunks, tl.sum(d * d))

    @triton.jit
    def l2_step_kernel(x_adv_ptr, grad_ptr, x_ptr, sums_ptr, out_ptr, eps, step_size, pixels, chunks,
                       UINT8: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
        image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
        c = tl.arange(0, CHUNKS)
        sums = sums_ptr + image * 3 * chunks + c
        gg = tl.sum(tl.load(sums, mask=c < chunks, other=0.))
        dg = tl.sum(tl.load(sums + chunks, mask=c < chunks, other=0.))
        dd = tl.sum(tl.load(sums + 2 * chunks, mask=c < chunks, other=0.))
        # the step d + α·g/‖g‖ has length² ‖d‖² + 2α d·g/‖g‖ + α²: known before it is made
        a = tl.where(gg == 0, 0., step_size / tl.sqrt(tl.where(gg == 0, 1., gg)))
        length = tl.sqrt(tl.maximum(dd + 2 * a * dg + a * a * gg, 0., propagate_nan=tl.PropagateNan.ALL))
        shrink = tl.where(length > eps, eps / length, 1.)
        x, d, g, at, inside = load_chunk(x_adv_ptr, grad_ptr, x_ptr, image, chunk, pixels, UINT8, BLOCK)
        moved = x + (shrink * (d + a * g)).to(tl.float32)
        tl.store(out_ptr + at, clamp(moved, 0., 1.), mask=inside)


@torch.library.custom_op("tecoa::pgd_step", mutates_args=())
def fused_pgd_step(x_adv: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, eps: float, step_size: float,
                   norm: str) -> torch.Tensor:
    """`pgd_step` as one operator: fp32 [B, ...]. linf gives the same bits as the reference."""
    if not (x_adv.is_cuda or INTERPRET):
        return reference(x_adv, grad, x, eps, step_size, norm).contiguous()
    x_adv, grad, x, out = x_adv.contiguous(), grad.contiguous(), x.contiguous(), x_adv.new_empty(x_adv.shape)
    if not out.numel():
        return out
    uint8, block = x.dtype == torch.uint8, 4096 if norm == "l2" else 1024
    if norm == "linf":
        linf_kernel[(triton.cdiv(out.numel(), block),)](
            x_adv, grad, x, out, eps, step_size, out.numel(), uint8, block, enable_fp_fusion=False)
        return out
    pixels = x[0].numel()
    chunks = triton.cdiv(pixels, block)
    sums = x.new_empty(len(x), 3, chunks, dtype=torch.float64)
    options = {"num_warps": 8, "enable_fp_fusion": True}
    l2_sums_kernel[(len(x) * chunks,)](x_adv, grad, x, sums, pixels, chunks, uint8, block, **options)
    l2_step_kernel[(len(x) * chunks,)](x_adv, grad, x, sums, out, eps, step_size, pixels, chunks, uint8,
                                       block, triton.next_power_of_2(chunks), **options)
    return out


@fused_pgd_step.register_fake
def _(x_adv, grad, x, eps, step_size, norm):
    return x_adv.new_empty(x_adv.shape)
