"""Attacks: pure functions over tensors. They take a callable, and never see CLIP, files or options.

    x_adv = pgd(loss_fn, x, y, eps=1/255, steps=2, step_size=1/255, keys=keys)          # to train with: the last iterate
    x_adv, at = apgd(objective, x, y, eps=1/255, steps=100, keys=keys)                  # to evaluate with: any iterate

`pgd` ascends loss_fn(x, y) → [B]: pass the log-odds rather than the cross-entropy (kernels/contrastive_loss.py says why).
The others ascend objective(x, y) → (loss [B], wrong bool [B]): an image that an iterate gets misclassified is broken, and
leaves the batch at once. They return fp32 [B, ...] in [0,1] within eps of x, the iterate that broke the image or else the
best that was found (`pgd_any`: the last), and int64 [B]: the number of that iterate, −1 where the image still stands.

An attack differentiates the *sum* over the batch with respect to the pixels alone, so each image gets the result that it
would get in any other batch; freeze the weights before. All randomness comes from `keys`, one number per image.
"""
import math

import torch

from kernels.pgd_step import l2_norm, pgd_step, project, to_float
from kernels.random_start import GOLDEN, mix, random_start, uniform


def image_keys(seed, round, index):
    """One int64 key per image, from the seed, the epoch or restart, and the image's number in its data set [B].

    The random start follows from it, and so depends on neither batch, process nor device.
    """
    index = index.to(torch.int64)
    key = mix(torch.full_like(index, seed) + GOLDEN)                      # on the index's device: nothing waits for it
    key = mix(key + round + GOLDEN)
    return mix(key + index * GOLDEN)


# ---------------------------------------------------------------------------------------------- what attacks ascend
def margin(logits, y):
    """max_{j≠y} s_j − s_y: [B] from logits [B, K] and labels int64 [B]. Above 0 the image is misclassified."""
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def cw_margin(logits, y, kappa=50.0):
    """Carlini & Wagner's margin as the paper uses it, −ReLU(s_y − max_{j≠y} s_j + κ): [B].

    It stops growing once the best wrong class leads by κ (in logits), when the image is broken beyond doubt.
    """
    return -torch.relu(kappa - margin(logits, y))


def dlr(logits, y, target=None):
    """The difference of logits ratio (Croce & Hein 2020, eq. 6), −(s_y − max_{j≠y} s_j) / (s_π1 − s_π3): [B].

    s_π1 ≥ s_π2 ≥ … are the sorted logits. Shift and scale of the logits do not matter, so it cannot saturate. With target
    classes int64 [B], eq. 7: −(s_y − s_t) / (s_π1 − ½(s_π3 + s_π4)). ValueError below three classes (targeted: four).
    """
    needed = 3 if target is None else 4
    if logits.shape[1] < needed:
        raise ValueError(f"{'' if target is None else 'targeted '}DLR is undefined for fewer than {needed} classes, not for "
                         f"{logits.shape[1]}: use the log-odds")
    top = logits.topk(needed, 1).values
    if target is None:
        return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)
    lead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# ---------------------------------------------------------------------------------------------- projected gradient
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


def ascent(objective, x_adv, y):
    """(loss [B], wrong [B], ∂Σloss/∂x_adv), all detached."""
    x_adv = x_adv.detach().requires_grad_()
    with torch.enable_grad():
        loss, wrong = objective(x_adv, y)
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
    return loss.detach(), wrong, grad


def pgd_any(objective, x, y, *, eps, steps, step_size, norm="linf", keys=None):
    """`pgd` whose images leave at the first iterate, of steps + 1, that is misclassified: (x_adv, at)."""
    x = to_float(x)
    x_adv = x if keys is None else random_start(x, eps, norm, keys)
    result, at, i = x_adv.clone(), torch.full((len(x),), -1, device=x.device), torch.arange(len(x), device=x.device)
    for step in range(steps + 1):
        if step < steps:
            _, wrong, grad = ascent(objective, x_adv, y)
        else:
            with torch.no_grad():
                wrong, grad = objective(x_adv, y)[1], x_adv
        result[i], at[i[wrong]] = x_adv, step
        i, x, y, x_adv, grad = (t[~wrong] for t in (i, x, y, x_adv, grad))
        if not len(i):
            break
        if step < steps:
            x_adv = pgd_step(x_adv, grad, x, eps, step_size, norm)
    return result, at


def apgd(objective, x, y, *, eps, steps, norm="linf", keys=None, alpha=.75, rho=.75):
    """Auto-PGD (Croce & Hein 2020, algorithm 1): momentum, and step sizes of its own, from 2ε down: (x_adv, at).

    At the checkpoints w_j an image's step is halved, and it goes back to its best iterate, if the loss rose in fewer than
    ρ of the steps since the last one, or if neither step nor best loss have changed since. Arguments as for `pgd_any`.
    """
    shares = [0., .22]                                                    # p_{j+1} = p_j + max(p_j − p_{j−1} − 0.03, 0.06)
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - .03, .06))
    checkpoints = sorted({math.ceil(p * steps - 1e-9) for p in shares[1:] if p < 1})        # p is a sum of rounded terms
    x, last = to_float(x), 0
    x_adv = x if keys is None else random_start(x, eps, norm, keys)
    result, at = x_adv.clone(), torch.full((len(x),), -1, device=x.device)
    one = (-1,) + (1,) * (x.ndim - 1)                                     # [B] → [B, 1, ...]
    # of each image still in: its place in the batch, its pixels now, before and at its best (with loss and gradient there),
    # its step size, and of the time since the last checkpoint how often the loss rose, and what was so at its beginning
    s = {"i": torch.arange(len(x), device=x.device), "x": x, "y": y, "x_adv": x_adv, "before": x_adv,
         "size": x.new_full((len(x),), 2 * eps), "halved": torch.ones(len(x), dtype=torch.bool, device=x.device)}
    for step in range(steps + 1):
        if step:
            x, x_adv, before = s["x"], s["x_adv"], s["before"]
            z = pgd_step(x_adv, s["grad"], x, eps, s["size"].view(one), norm)
            a = alpha if step > 1 else 1.
            s["before"], s["x_adv"] = x_adv, project(x_adv + a * (z - x_adv) + (1 - a) * (x_adv - before), x, eps, norm)
        loss, wrong, s["grad"] = ascent(objective, s["x_adv"], s["y"])
        if step == 0:
            s |= {"best": loss, "best_x": s["x_adv"], "best_grad": s["grad"], "best_then": loss, "loss": loss,
                  "rises": torch.zeros_like(loss)}
        s["rises"], s["loss"] = s["rises"] + (loss > s["loss"]), loss
        better = loss > s["best"]
        s["best"] = torch.where(better, loss, s["best"])
        for name, now in (("best_x", s["x_adv"]), ("best_grad", s["grad"])):
            s[name] = torch.where(better.view(one), now, s[name])
        result[s["i"][wrong]], at[s["i"][wrong]] = s["x_adv"][wrong], step
        if step in checkpoints:
            halve = (s["rises"] < rho * (step - last)) | (~s["halved"] & (s["best"] == s["best_then"]))
            s["size"] = torch.where(halve, s["size"] / 2, s["size"])
            s["x_adv"] = torch.where(halve.view(one), s["best_x"], s["x_adv"])
            s["grad"] = torch.where(halve.view(one), s["best_grad"], s["grad"])
            s |= {"halved": halve, "best_then": s["best"], "rises": torch.zeros_like(loss)}
            last = step
        if wrong.any():
            s = {name: t[~wrong] for name, t in s.items()}
        if not len(s["i"]):
            return result, at
    result[s["i"]] = s["best_x"]
    return result, at


# ---------------------------------------------------------------------------------------------- gradient-free
def square(objective, x, y, *, eps, queries, norm="linf", keys, p=.8):
    """Square attack (Andriushchenko et al. 2020): random search that only ever asks for predictions: (x_adv, at).

    Each query changes one square window of each image; what does not raise the loss is undone. Gradients that are masked
    do not protect from it. The window's share p of the pixels shrinks as in the paper. x: uint8, or float in [0,1],
    [B, C, H, W]; the loss should be `margin`. `at` counts queries.
    """
    x, (height, width) = to_float(x), x.shape[-2:]
    result, at = x.clone(), torch.full((len(x),), -1, device=x.device)
    i, best = torch.arange(len(x), device=x.device), x.new_full((len(x),), -math.inf)
    x_adv, new = x, (stripes if norm == "linf" else chessboard)(x, eps, keys)
    for query in range(queries):
        with torch.no_grad():
            loss, wrong = objective(new, y)
        better = (loss > best) | wrong
        best, x_adv = torch.where(better, loss, best), torch.where(better.view(-1, 1, 1, 1), new, x_adv)
        result[i[wrong]], at[i[wrong]] = x_adv[wrong], query
        i, x, y, x_adv, best, keys = (t[~wrong] for t in (i, x, y, x_adv, best, keys))
        if not len(i):
            break
        halvings = sum(10_000 * (query + 1) / queries > n for n in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = max(round(math.sqrt(p / 2 ** halvings * height * width)), 1)
        u = uniform(keys, (5 + x.shape[1],), stream=query + 1)
        new = (change_window if norm == "linf" else move_mass)(x_adv, x, eps, side, u)
    result[i] = x_adv
    return result, at


def stripes(x, eps, keys):
    """Square's start in linf: ±ε for each column and channel."""
    return (x + eps * signs(uniform(keys, (x.shape[1], 1, x.shape[3])), x)).clamp(0, 1)


def change_window(x_adv, x, eps, side, u):
    """Square's proposal in linf: a window of one colour, ±2ε a channel, projected."""
    _, _, inside = window(u[:, 0], u[:, 1], min(side, *x.shape[-2:]), x)
    return torch.where(inside, project(x_adv + 2 * eps * signs(u[:, 5:, None, None], x), x, eps, "linf"), x_adv)


def chessboard(x, eps, keys):
    """Square's start in l2: 5 × 5 bumps, each with a sign a channel, scaled to length ε."""
    side = max(min(x.shape[-2:]) // 5, 1)
    rows, columns = (torch.arange(n, device=x.device) - (n - 5 * side) // 2 for n in x.shape[-2:])
    inside = ((rows >= 0) & (rows < 5 * side))[:, None] & (columns >= 0) & (columns < 5 * side)
    pattern = inside * bump(side, x)[(rows % side)[:, None], columns % side]
    row, column = (t.div(side, rounding_mode="floor").clamp(0, 4) for t in (rows, columns))
    return at_distance(pattern * signs(uniform(keys, (x.shape[1], 25)), x)[:, :, 5 * row[:, None] + column], x, eps)


def move_mass(x_adv, x, eps, side, u):
    """Square's proposal in l2: one window is emptied, and its squared length goes into a bump in another."""
    side, delta, tiny = min(max(side, 3) | 1, *x.shape[-2:]), x_adv - x, 1e-12
    rows, columns, inside = window(u[:, 0], u[:, 1], side, x)
    _, _, other = window(u[:, 2], u[:, 3], side, x)

    def length(t):                                                        # of each channel [B, C, 1, 1]
        return torch.linalg.vector_norm(t, dim=(2, 3), keepdim=True)
    turned = (u[:, 4] < .5)[:, None, None]
    r, c = rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]
    pattern = bump(side, x)[torch.where(turned, c, r), torch.where(turned, r, c)][:, None]
    added = inside * (pattern * signs(u[:, 5:, None, None], x) + delta / (length(delta * inside) + tiny))
    unused = (eps ** 2 - l2_norm(delta) ** 2).clamp(min=0) / x.shape[1]
    budget = (unused + length(delta * (inside | other)) ** 2).sqrt()
    return at_distance(torch.where(inside, added / (length(added) + tiny) * budget, delta * ~other), x, eps)


def signs(u, like):
    """−1 where u < ½, else 1."""
    return torch.where(u < .5, -1., 1.).to(like.dtype)


def window(u, v, side, x):
    """A window at a place of each image's own: its rows [B, H] and columns [B, W] counted from it, its mask [B, 1, H, W]."""
    rows, columns = (torch.arange(n, device=x.device) - (t * (n - side + 1)).long()[:, None]
                     for n, t in zip(x.shape[-2:], (u, v)))
    inside_rows, inside_columns = ((t >= 0) & (t < side) for t in (rows, columns))
    return rows, columns, (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def bump(side, like):
    """Square's l2 pattern: two opposite bumps, Σ 1/k² over growing squares around each centre; unit length [side, side]."""
    halves = []
    for height in (side // 2, side - side // 2):
        half = like.new_zeros(height, side)
        for k in range(side // 2 + 1):
            half[max(height // 2 - k, 0):height // 2 + k + 1, max(side // 2 - k, 0):side // 2 + k + 1] += 1 / (k + 1) ** 2
        halves.append(half / half.norm())
    both = torch.cat([halves[0], -halves[1]])
    return both / both.norm()


def at_distance(delta, x, eps):
    """x + δ with δ scaled to L2 length ε, clamped to [0,1]."""
    return (x + delta * (eps / l2_norm(delta).clamp(min=1e-12))).clamp(0, 1)
