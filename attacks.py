"""Attacks: pure functions over tensors. They take a callable, and never see CLIP, files or options.

    x_adv = pgd(loss_fn, x, y, eps=1/255, steps=10, step_size=1/255, keys=image_keys(seed, 0, index))

loss_fn(x, y) → [B]: one loss per image, to be maximised. Pass the log-odds rather than the cross-entropy
(kernels/contrastive_loss.py says why). An attack differentiates the *sum* over the batch with respect to the pixels
alone, so each image gets the result that it would get in any other batch; freeze the weights before.
All randomness comes from `keys`, one number per image.
"""
import math

import torch

from kernels.pgd_step import l2_norm, pgd_step

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)              # splitmix64's increment, as a signed number


def _mix(t):
    """splitmix64's finaliser (Steele et al. 2014) on int64, whose products wrap: neighbours come out unrelated."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        t = t ^ ((t >> shift) & (MASK64 >> shift))  # a logical shift
        t = t * (factor if factor < 1 << 63 else factor - (1 << 64))
    return t


def image_keys(seed, round, index):
    """One int64 key per image, from the seed, the epoch or restart, and the image's number in its data set [B].

    The random start follows from it, and so depends on neither batch, process nor device.
    """
    key = _mix(torch.as_tensor(seed, dtype=torch.int64) + GOLDEN)
    key = _mix(key + round + GOLDEN)
    return _mix(key.to(index.device) + index.to(torch.int64) * GOLDEN)


def uniform(keys, shape, stream=0):
    """Uniform in [0,1): fp32 [B, *shape] from int64 keys [B]. Other streams of the same keys are independent."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, device=keys.device) * GOLDEN
    bits = _mix(_mix(keys + stream)[:, None] + counter)
    return (((bits >> 40) & 0xFFFFFF).float() / (1 << 24)).view(len(keys), *shape)


def random_start(x, eps, norm, keys):
    """x plus noise uniform in the ε-ball, clipped to [0,1]; float like x [B, ...]."""
    shape = x.shape[1:]
    if norm == "linf":
        delta = (2 * uniform(keys, shape) - 1) * eps
    else:                                           # a direction uniform on the sphere, a radius ∝ u^(1/dimension)
        radius, turn = 1 - uniform(keys, shape), uniform(keys, shape, stream=1)
        normal = (-2 * radius.log()).sqrt() * torch.cos(2 * math.pi * turn)                 # Box–Muller
        length = uniform(keys, (1,) * len(shape), stream=2) ** (1 / math.prod(shape))
        delta = normal / l2_norm(normal) * length * eps
    return (x + delta.to(x.dtype)).clamp(0, 1)


def pgd(loss_fn, x, y, *, eps, steps, step_size, norm="linf", keys=None):
    """Projected gradient ascent on loss_fn (Madry et al. 2018); the last iterate, detached.

    x: float [B, ...] in [0,1]; y: whatever loss_fn takes. eps, step_size: fractions of the pixel range (linf) or L2
    lengths (l2). keys: int64 [B] for a random start (`image_keys`); None starts at x.
    The result lies in [0,1] and within eps of x.
    """
    x_adv = x if keys is None else random_start(x, eps, norm, keys)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_fn(x_adv, y).sum(), x_adv)
        x_adv = pgd_step(x_adv.detach(), grad, x, eps, step_size, norm)
    return x_adv.detach()


def cw_margin(logits, y, kappa=50.0):
    """Carlini & Wagner's margin, −ReLU(s_y − max_{j≠y} s_j + κ): [B] from logits [B, K] and labels int64 [B].

    It stops growing once the best wrong class leads by κ (in logits), when the image is broken beyond doubt.
    """
    right = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], float("-inf")).amax(1)
    return -torch.relu(right - wrong + kappa)


def cw(logits_fn, x, y, **options):
    """The PGD loop on `cw_margin` (the paper's CW). logits_fn(x) → [B, K]; options as for `pgd`."""
    return pgd(lambda x, y: cw_margin(logits_fn(x), y), x, y, **options)
