"""The text-guided contrastive loss: image features against the class prompts (TeCoA, Mao et al. 2023).

    s_k = logit_scale · cos(z, w_k)                 logits over all K class prompts
    cross-entropy  L = −log softmax(s)_y            what the outer minimisation descends
    log-odds       m = log Σ_{j≠y} exp(s_j) − s_y   what the inner maximisation ascends; L = log(1 + exp(m))

Both have the same gradient direction in exact arithmetic, ∂L = sigmoid(m)·∂m. In floating point they do not:
for an image that CLIP is sure of, ∂L is (p_y − 1)·w_y + Σ p_j·w_j with every coefficient rounding to 0, and
the attack is handed zeros or noise. ∂m keeps its size, because it never forms p_y: it is Σ_{j≠y} q_j·w_j −
w_y, with q the softmax over the wrong classes alone.

Why it is a kernel of its own: log-odds, their gradient and the prediction come out of *one* sweep over the
classes, with a running maximum as in FlashAttention (Dao et al. 2022; the head is both keys and values).
Neither logits nor probabilities [B, K] ever exist: with B = 1024 and K = 1,000,000 those are 4 GB each."""
import torch
import torch.nn.functional as F

from kernels import INTERPRET, fused, triton


def cosine_logits(z, head, logit_scale):
    """logit_scale · cos(z, w_k): fp32 [B, K] from features z [B, D] of any length and unit rows [K, D]."""
    return logit_scale * F.normalize(z.float(), dim=-1) @ head.float().T


def log_odds(logits, y):
    """m = logsumexp over wrong classes − s_y: [B] from logits [B, K], labels int64 [B]. m > 0 if p_y < ½."""
    wrong = torch.zeros_like(logits).scatter(1, y[:, None], float("-inf"))
    return (logits + wrong).logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def contrast(z, head, y, logit_scale):
    """Log-odds fp32 [B], predicted classes int64 [B] of features z [B, D] against a head of unit rows [K, D].

    z, head: any float, K ≥ 2; y: int64 [B]; logit_scale: a number. Of equal best classes the lowest is
    predicted; NaN gives NaN. Differentiable once, in z; a head that requires a gradient has the reference."""
    if fused(z) and not head.requires_grad:
        m, predicted, _ = fused_contrast(z, head, y, logit_scale, z.requires_grad and torch.is_grad_enabled())
        return m, predicted
    logits = cosine_logits(z, head, logit_scale)
    return log_odds(logits, y), logits.argmax(1)


def contrastive_log_odds(z, head, y, logit_scale):
    """Log-odds of each image against its class prompt fp32 [B]: for the inner maximisation."""
    return contrast(z, head, y, logit_scale)[0]


def contrastive_loss(z, head, y, logit_scale):
    """Mao et al.'s TeCoA loss, each image's cross-entropy with its class prompt fp32 [B]; predictions [B]."""
    m, predicted = contrast(z, head, y, logit_scale)
    return F.softplus(m), predicted


# ------------------------------------------------------------------------------ the Triton kernels
if triton is not None:
    import triton.language as tl

    @triton.jit
    def sweep_kernel(z_ptr, head_ptr, y_ptr, top_ptr, best_ptr, sum_ptr, true_ptr, acc_ptr, logit_scale,
                     B, K, D, PER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
                     GRAD: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
        """One block of images against one share of the classes, PER blocks of COLS. Of the wrong ones among
        them: the best logit and its class, Σ exp(s − best), Σ exp(s − best)·w. And the true class's logit."""
        rows, d, share = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.program_id(1)
        inside = (rows[:, None] < B) & (d[None, :] < D)
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.).to(tl.float32)
        z = (z * (logit_scale / tl.maximum(tl.sqrt(tl.sum(z * z, 1)), 1e-12))[:, None]).to(DTYPE)
        y = tl.load(y_ptr + rows, mask=rows < B, other=-1)
        top, best = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.int32)
        total, s_true = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        for block in range(PER):
            first = (share * PER + block) * COLS
            k = first + tl.arange(0, COLS)
            exists = (k[:, None] < K) & (d[None, :] < D)
            w = tl.load(head_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=exists, other=0.).to(DTYPE)
            s = tl.dot(z, tl.trans(w), input_precision=PRECISION)
            is_true = k[None, :] == y[:, None]
            s_true += tl.sum(tl.where(is_true, s, 0.), 1)
            s = tl.where(is_true | (k[None, :] >= K), float("-inf"), s)
            peak = tl.max(s, 1)
            best = tl.where(peak > top, first + tl.argmax(s, 1), best)
            new = tl.maximum(top, peak)
            shift = tl.where(new == float("-inf"), 0., new)     # only the true class so far: no inf − inf
            fade, p = tl.exp(top - shift), tl.exp(s - shift[:, None])
            total = total * fade + tl.sum(p, 1)
            if GRAD:
                acc = tl.dot(p.to(DTYPE), w, acc * fade[:, None], input_precision=PRECISION)
            top = new
        at = share.to(tl.int64) * B + rows
        tl.store(top_ptr + at, top, mask=rows < B)
        tl.store(best_ptr + at, best, mask=rows < B)
        tl.store(sum_ptr + at, total, mask=rows < B)
        tl.store(true_ptr + at, s_true, mask=rows < B)
        if GRAD:
            tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=inside)

    @triton.jit
    def combine_kernel(z_ptr, head_ptr, y_ptr, top_ptr, best_ptr, sum_ptr, true_ptr, acc_ptr, m_ptr,
                       predicted_ptr, grad_ptr, logit_scale, B, D, SHARES: tl.constexpr, WIDTH: tl.constexpr,
                       GRAD: tl.constexpr):
        """One image: its shares of the classes together; the gradient back through the normalisation of z."""
        row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        top, best, s_true = tl.load(top_ptr + row), tl.load(best_ptr + row), tl.load(true_ptr + row)
        for share in range(1, SHARES):
            other = tl.load(top_ptr + share * B + row)
            best = tl.where(other > top, tl.load(best_ptr + share * B + row), best)
            top = tl.maximum(top, other)
            s_true += tl.load(true_ptr + share * B + row)
        total = 0.
        acc = tl.zeros([WIDTH], tl.float32)
        for share in range(SHARES):
            weight = tl.exp(tl.load(top_ptr + share * B + row) - top)
            total += weight * tl.load(sum_ptr + share * B + row)
            if GRAD:
                acc += weight * tl.load(acc_ptr + (share * B + row) * D + d, mask=d < D, other=0.)
        y = tl.load(y_ptr + row)
        tl.store(m_ptr + row, top + tl.log(total) - s_true)
        right = (s_true > top) | ((s_true == top) & (y < best))
        tl.store(predicted_ptr + row, tl.where(right, y, best.to(tl.int64)))
        if GRAD:
            w_true = tl.load(head_ptr + y * D + d, mask=d < D, other=0.).to(tl.float32)
            g = logit_scale * (acc / total - w_true)
            z = tl.load(z_ptr + row * D + d, mask=d < D, other=0.).to(tl.float32)
            length = tl.maximum(tl.sqrt(tl.sum(z * z)), 1e-12)
            unit = z / length
            g = (g - unit * tl.sum(unit * g)) / length
            tl.store(grad_ptr + row * D + d, g, mask=d < D)


@torch.library.custom_op("tecoa::contrast", mutates_args=())
def fused_contrast(z: torch.Tensor, head: torch.Tensor, y: torch.Tensor, logit_scale: float, with_grad: bool
                   ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`contrast` as one operator: log-odds fp32 [B], predictions int64 [B], ∂m/∂z fp32 [B, D] or empty.

    The head's dtype is that of the products; those of an fp32 head are TF32 where
    torch.set_float32_matmul_precision allows it. Sums are fp32. Features too wide for the GPU's shared memory
    take the reference: with an fp32 head D > 1024 on an H100, D > 512 on an A100."""
    (B, D), K = z.shape, len(head)
    width = max(16, 1 << (D - 1).bit_length())
    tile = blocks(head, width) if z.is_cuda or INTERPRET else None
    if tile is None:
        logits, grad = cosine_logits(z, head, logit_scale), z.new_empty(0, dtype=torch.float32)
        if with_grad:                                           # by hand: an operator has no autograd inside
            length, head = z.float().norm(dim=1, keepdim=True).clamp(min=1e-12), head.float()
            unit, wrong = z.float() / length, logits.scatter(1, y[:, None], float("-inf")).softmax(1)
            grad = logit_scale * (wrong @ head - head[y])
            grad = (grad - unit * (unit * grad).sum(1, keepdim=True)) / length
        return log_odds(logits, y), logits.argmax(1), grad
    z, head, y = z.contiguous(), head.contiguous(), y.contiguous()
    m, predicted, grad = outputs(z, head, y, logit_scale, with_grad)
    if not B:
        return m, predicted, grad
    rows, cols = tile
    processors = torch.cuda.get_device_properties(z.device).multi_processor_count if z.is_cuda else 4
    groups = triton.cdiv(B, rows)
    per = triton.cdiv(triton.cdiv(K, cols), max(1, processors // groups))       # one share a processor
    shares = triton.cdiv(K, cols * per)
    best = z.new_empty(shares, B, dtype=torch.int32)
    top, total, s_true = z.new_empty(3, shares, B, dtype=torch.float32)
    acc = z.new_empty((shares, B, D) if with_grad else (0,), dtype=torch.float32)
    # the interpreter emulates bf16 wrongly
    dtype = tl.float32 if INTERPRET else getattr(tl, str(head.dtype).removeprefix("torch."))
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    sweep_kernel[groups, shares](
        z, head, y, top, best, total, s_true, acc, logit_scale, B, K, D, per, rows, cols, width, with_grad,
        dtype, precision, num_warps=8, num_stages=1 if head.element_size() == 4 else 2, enable_fp_fusion=True)
    combine_kernel[(B,)](z, head, y, top, best, total, s_true, acc, m, predicted, grad, logit_scale, B, D,
                         shares, width, with_grad, enable_fp_fusion=True)
    return m, predicted, grad


def blocks(head, width):
    """(images, classes) that one program works on at a time, which fits into its shared memory, or None."""
    memory, size = 1 << 17, head.element_size()
    if head.is_cuda:
        memory = torch.cuda.get_device_properties(head.device).shared_memory_per_block_optin
    for rows, cols in ((64, 32), (32, 32), (32, 16), (16, 16)):
        # the accumulator [rows, width] lives in registers; features and, in two layouts, classes in memory
        if rows * width <= 1 << 15 and cols * size <= 64 and (rows + 2 * cols) * width * size <= memory:
            return rows, cols
    return None


@fused_contrast.register_fake
def outputs(z, head, y, logit_scale, with_grad):
    grad = z.new_empty(z.shape if with_grad else (0,), dtype=torch.float32)
    return z.new_empty(len(z), dtype=torch.float32), torch.empty_like(y), grad


def setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def backward(ctx, grad_m, _predicted, _grad):
    return (grad_m[:, None] * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None, None


fused_contrast.register_autograd(backward, setup_context=setup_context)
