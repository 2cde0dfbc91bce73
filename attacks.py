"""Attacks: pure functions over tensors. They take a callable, and never see CLIP, files or options.

    x_adv = pgd(loss_fn, x, y, eps=1/255, steps=10, step_size=1/255, keys=image_keys(seed, 0, index))

loss_fn(x, y) → [B]: one loss per image, to be maximised. Pass the log-odds rather than the cross-entropy
(kernels/contrastive_loss.py says why). An attack differentiates the *sum* over the batch with respect to the pixels
alone, so each image gets the result that it would get in any other batch; freeze the weights before.
All randomness comes from `keys`, one number per image.
"""
import torch

from kernels.pgd_step import pgd_step, to_float
from kernels.random_start import GOLDEN, mix, random_start


def image_keys(seed, round, index):
    """One int64 key per image, from the seed, the epoch or restart, and the image's number in its data set [B].

    The random start follows from it, and so depends on neither batch, process nor device.
    """
    index = index.to(torch.int64)
    key = mix(torch.full_like(index, seed) + GOLDEN)                      # on the index's device: nothing waits for it
    key = mix(key + round + GOLDEN)
    return mix(key + index * GOLDEN)


def pgd(loss_fn, x, y, *, eps, steps, step_size, norm="linf", keys=None):
    """Projected gradient ascent on loss_fn (Madry et al. 2018); the last iterate, detached.

    x: float [B, ...] in [0,1], or uint8; y: whatever loss_fn takes, which gets float x. eps, step_size: fractions of the
    pixel range (linf) or L2 lengths (l2). keys: int64 [B] for a random start (`image_keys`); None starts at x.
    The result lies in [0,1] and within eps of x; fp32, or fp64 for an x in fp64.
    """
    x_adv = to_float(x) if keys is None else random_start(x, eps, norm, keys)
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
