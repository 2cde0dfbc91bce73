"""One step of projected gradient ascent: move, project on the ε-ball around the image, clamp to [0,1].

Why it is a kernel of its own: it touches every pixel of the batch three times (image, iterate, gradient) and does
next to no arithmetic, so it is worth one pass over memory. This is the PyTorch reference of that pass.
"""
import torch


def l2_norm(t):
    """Per-image L2 norm of t [B, ...], as [B, 1, ...]; of whatever magnitude: squares neither overflow nor vanish."""
    dims = tuple(range(1, t.ndim))
    largest = t.abs().amax(dims, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny)
    return (t / largest).square().sum(dims, keepdim=True).sqrt() * largest


def pgd_step(x_adv, grad, x, eps, step_size, norm="linf"):
    """x_adv + step along the ascent direction of grad, inside {x' : ‖x' − x‖ ≤ eps, 0 ≤ x' ≤ 1} (Madry et al. 2018).

    x_adv, grad, x: float [B, ...], x in [0,1]. eps, step_size: in pixel fractions (linf) or L2 length (l2).
    linf steps along sign(grad), l2 along grad/‖grad‖; an image whose gradient is exactly zero stays where it is.
    """
    if norm == "linf":
        x_adv = x_adv + step_size * grad.sign()
        return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    delta = x_adv - x + step_size * grad / l2_norm(grad).clamp(min=torch.finfo(grad.dtype).tiny)
    length = l2_norm(delta)
    delta = delta * torch.where(length > eps, eps / length, 1)
    return (x + delta).clamp(0, 1)                  # the clamp only shortens δ: x itself lies in [0,1]
