"""The attacks: pure functions over tensors. They take a callable, and never see CLIP, files or options.

    x_adv = pgd(objective, x, y, eps=1/255, steps=2, step_size=1/255, keys=keys)  # to train with
    x_adv, at = apgd(objective, x, y, eps=1/255, steps=100, keys=keys)            # to evaluate with

`pgd` takes objective(x, y) → loss [B] and returns the last iterate. For the others it is → (loss [B], wrong
bool [B]), and misclassified images stop early: x_adv is then the iterate that broke the image, at int64 [B]
its number; or else x_adv is the best iterate (of `pgd_any` the last, of `fab` x), at −1. It is detached, in
[0,1] and within eps of x; fp32, or fp64 for an x in fp64. Pass the log-odds: cross-entropy saturates. The
*sum* over the batch is differentiated, with respect to the pixels alone: an image gets the same result in any
batch. Freeze the weights before. All randomness comes from `keys`."""
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.contrastive_loss import log_odds
from kernels.pgd_step import l2_norm, pgd_step, project, to_float
from kernels.random_start import GOLDEN, mix, random_start, uniform


def image_keys(seed, round, index):
    """One int64 key an image [B], from the seed, the epoch or restart, and the images' numbers int64 [B]. The
    random start follows from it, and so depends on neither batch, process nor device."""
    key = mix(torch.full_like(index, seed) + GOLDEN)        # on the index's device: nothing waits for it
    return mix(mix(key + round + GOLDEN) + index * GOLDEN)


def margin(logits, y):
    """max_{j≠y} s_j − s_y: [B] from logits [B, K], labels int64 [B]. Above 0 the image is misclassified."""
    return logits.scatter(1, y[:, None], float("-inf")).amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def cw_margin(logits, y, kappa=50.0):
    """Carlini & Wagner's −ReLU(s_y − max_{j≠y} s_j + κ): [B]. Being wrong by κ (in logits) is enough."""
    return -torch.relu(kappa - margin(logits, y))


def dlr(logits, y, target=None):
    """The difference of logits ratio (Croce & Hein 2020, eq. 6), −(s_y − max_{j≠y} s_j) / (s_π1 − s_π3): [B].

    s_π1 ≥ s_π2 ≥ … are the sorted logits; their shift and scale do not matter, so it cannot saturate. With a
    target int64 [B], eq. 7: −(s_y − s_t) / (s_π1 − ½(s_π3 + s_π4)). ValueError for K < 3, targeted K < 4."""
    needed, name = (3, "DLR") if target is None else (4, "targeted DLR")
    if logits.shape[1] < needed:
        raise ValueError(f"{name} is undefined for fewer than {needed} classes, not for {logits.shape[1]}: "
                         "use the log-odds")
    top = logits.topk(needed, 1).values
    if target is None:
        return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)
    return lead(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def lead(logits, y, target):
    """s_t − s_y, of a target int64 [B]: [B]."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def runners_up(logits, y, count):
    """The `count` wrong classes of the highest logits, the highest first: int64 [B, count]."""
    return logits.scatter(1, y[:, None], float("-inf")).topk(count, 1).indices


def pgd(objective, x, y, *, eps, steps, step_size, norm="linf", keys=None):
    """Projected gradient ascent on objective (Madry et al. 2018): the last iterate.

    x: float [B, ...] in [0,1], or uint8; y: whatever objective takes, which gets float x. eps, step_size:
    pixel fractions (linf) or L2 lengths (l2). keys: int64 [B] for a random start, None: starts at x."""
    x_adv = to_float(x) if keys is None else random_start(x, eps, norm, keys)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(x_adv, y).sum(), x_adv)
        x_adv = pgd_step(x_adv.detach(), grad, x, eps, step_size, norm)
    return x_adv.detach()


def on_the_way(flags):
    """Begins to copy flags, bool [n], to the CPU: a function that returns them there. It waits for them
    alone, not for what the device was given to do after them."""
    if not flags.is_cuda:
        return flags.cpu
    copy = flags.to("cpu", non_blocking=True)               # into pinned memory
    copied = torch.cuda.current_stream(flags.device).record_event()
    return lambda: copied.synchronize() or copy


def ascent(objective, x_adv, y, back=True, **more):
    """(loss [B], `on_the_way`: wrong bool [B], ∂Σloss/∂x_adv [B, ...], None unless back), all detached.
    more: for the objective."""
    x_adv = x_adv.detach().requires_grad_(back)
    with torch.set_grad_enabled(back):
        loss, wrong = objective(x_adv, y, **more)
        wrong = on_the_way(wrong)                           # while the device goes back through the model
        (grad,) = torch.autograd.grad(loss.sum(), x_adv) if back else (None,)
    return loss.detach(), wrong, grad


def slope(objective, x, y, eps, norm, judged):
    """Of the images as they are, bool [B] each: the gradient of objective is 0; the loss, of `judged`, is no
    smaller a tenth of ε further along it."""
    *_, grad = ascent(objective, x, y)
    with torch.no_grad():
        loss, further = (judged(image, y)[0] for image in (x, pgd_step(x, grad, x, eps, eps / 10, norm)))
    return (grad == 0).flatten(1).all(1), further >= loss


# ------------------------------------------------------------------------------ who still stands
def begin(x, y, eps, norm, keys):
    """(found, s) of an attack. found: of all images x_adv and, on the CPU, at: `leave` and `ended` fill them.
    s: of each image that stands a row in x, x_adv and y, copies; and, on the CPU, in `row` its number."""
    x = to_float(x)
    start = x if keys is None else random_start(x, eps, norm, keys)
    found = SimpleNamespace(x_adv=start.clone(), at=torch.full((len(x),), -1), each=1)
    return found, SimpleNamespace(row=torch.arange(len(x)), x=x.clone(), x_adv=start.clone(), y=y.clone())


def side_by_side(found, s, targets):
    """s with a row for each of an image's targets int64 [B, T], and in y int64 [B·T, 2] label and target."""
    found.each = targets.shape[1]
    s = SimpleNamespace(**{name: t.repeat_interleave(found.each, 0) for name, t in vars(s).items()})
    s.row, s.y = torch.arange(len(s.row)), torch.stack([s.y, targets.flatten()], 1)
    return s


def leave(found, s, wrong, step):
    """Take out of s the images that are wrong, bool [n] on the CPU. Whether that were the last.

    In place: the last rows that stay fill the gaps, and no other is copied. found.each rows in a row of s are
    one image's, which leaves with any of them: its x_adv is that of the first."""
    rows = wrong.nonzero()[:, 0]
    if len(rows):
        rows = rows[s.row[rows].argsort()]
        image = s.row[rows] // found.each
        first = image.diff(prepend=image.new_tensor([-1])) > 0
        found.at[image[first]] = step
        copy_rows(found.x_adv, image[first], s.x_adv, rows[first])
        gone = found.at[s.row // found.each] >= 0
        n = len(gone) - int(gone.sum())
        gaps, fill = gone[:n].nonzero()[:, 0], (~gone[n:]).nonzero()[:, 0] + n
        for name, t in vars(s).items():
            t = t.contiguous()                              # of a sum the gradient is one number, expanded
            copy_rows(t, gaps, t, fill)
            setattr(s, name, t[:n])
    return len(s.row) == 0


def copy_rows(to, places, source, rows):
    """to[places] = source[rows], both int64 on the CPU."""
    if len(rows):
        places, rows = (t.to(to.device, non_blocking=True) for t in (places, rows))
        to.index_copy_(0, places, source.index_select(0, rows))


def ended(found, s, x_adv):
    """(x_adv, at) of all images; x_adv: the rows of s, or the last of an image's rows, that still stand."""
    last = (s.row % found.each == found.each - 1).nonzero()[:, 0]
    copy_rows(found.x_adv, s.row[last] // found.each, x_adv, last)
    return found.x_adv, found.at.to(x_adv.device)


def pgd_any(objective, x, y, *, eps, steps, step_size, norm="linf", keys=None):
    """`pgd`, but each of its steps + 1 iterates may break the image: (x_adv, at)."""
    found, s = begin(x, y, eps, norm, keys)
    for step in range(steps + 1):
        _, wrong, s.grad = ascent(objective, s.x_adv, s.y, step < steps)
        if step == steps:                                   # no step follows the last iterate
            del s.grad
        if leave(found, s, wrong(), step) or step == steps:
            return ended(found, s, s.x_adv)
        s.x_adv = pgd_step(s.x_adv, s.grad, s.x, eps, step_size, norm)


def pgd_last(objective, x, y, *, steps, **options):
    """`pgd`, whose last iterate alone may break the image: (x_adv, at), at is steps or −1."""
    x_adv = pgd(lambda x, y: objective(x, y)[0], x, y, steps=steps, **options)
    with torch.no_grad():
        return x_adv, torch.where(objective(x_adv, y)[1], steps, -1)


def apgd_checkpoints(steps):
    """The steps w_j = ⌈p_j · steps⌉ after which APGD may halve its step size, p = 0.22, 0.41, 0.57, … < 1."""
    shares = [0., .22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - .03, .06))
    return {math.ceil(share * steps - 1e-9) for share in shares[1:] if share < 1}     # sums of rounded terms


def apgd(objective, x, y, *, eps, steps, norm="linf", keys=None, targets=None, alpha=.75, rho=.75):
    """Auto-PGD (Croce & Hein 2020, algorithm 1): momentum, and its own step sizes, from 2ε down: (x_adv, at).

    At a checkpoint an image's step size is halved, and the image goes back to its best iterate, if
    1. the loss rose in fewer than ρ of the steps since the last checkpoint, or
    2. neither step size nor best loss have changed since then. Arguments as for `pgd_any`.

    targets int64 [B, T]: each image is attacked towards each of them, side by side, T rows in a batch, until
    one breaks it: most that fall do so in a few steps, but towards a target that nobody knows before. The
    objective's y is then int64 [n, 2], label and target; at: its step. What stands: the last's best."""
    found, s = begin(x, y, eps, norm, keys)
    if targets is not None:
        s = side_by_side(found, s, targets)
    checkpoints, last = apgd_checkpoints(steps), 0
    one = (-1, *(1,) * (s.x.ndim - 1))                      # [n] → [n, 1, ...]
    s.previous, s.step_size = s.x_adv, s.x.new_full((len(s.x),), 2 * eps)
    s.halved = torch.ones_like(s.step_size).bool()          # so that condition 2 cannot hold at the first one
    for step in range(steps + 1):
        if step:
            moved = pgd_step(s.x_adv, s.grad, s.x, eps, s.step_size.view(one), norm)
            a = alpha if step > 1 else 1.                   # no momentum yet: nothing came before
            mixed = s.x_adv + a * (moved - s.x_adv) + (1 - a) * (s.x_adv - s.previous)
            s.previous, s.x_adv = s.x_adv, project(mixed, s.x, eps, norm)
        loss, wrong, grad = ascent(objective, s.x_adv, s.y, step < steps)
        if step == 0:
            s.loss = s.best_loss = s.best_before = loss
            s.best_x, s.best_grad, s.rises = s.x_adv, grad, torch.zeros_like(loss)
        s.rises, s.loss = s.rises + (loss > s.loss), loss
        better = loss > s.best_loss
        s.best_loss = torch.where(better, loss, s.best_loss)
        s.best_x = torch.where(better.view(one), s.x_adv, s.best_x)
        if step < steps:                                    # no step follows the last iterate
            s.grad, s.best_grad = grad, torch.where(better.view(one), grad, s.best_grad)
        if leave(found, s, wrong(), step):
            break
        if step in checkpoints:
            s.halved = (s.rises < rho * (step - last)) | (~s.halved & (s.best_loss == s.best_before))
            s.step_size = torch.where(s.halved, s.step_size / 2, s.step_size)
            s.x_adv = torch.where(s.halved.view(one), s.best_x, s.x_adv)
            s.grad = torch.where(s.halved.view(one), s.best_grad, s.grad)
            s.best_before, s.rises, last = s.best_loss, torch.zeros_like(s.rises), step
    return ended(found, s, s.best_x)


# ------------------------------------------------------------------------------ the nearest boundary: FAB
def fab(objective, x, y, *, eps, steps, norm="linf", keys=None, targets, alpha_max=.1, eta=1.05, beta=.9):
    """FAB-T (Croce & Hein 2020, "Minimally distorted adversarial examples …", algorithm 1): (x_adv, at).

    As AutoAttack has it, without the final search along a line. It looks for the misclassified point nearest
    to x, anywhere in [0,1], and takes the boundary between label and target for a plane. A step goes eta of
    the way to the point of the plane nearest to the iterate, mixed with at most alpha_max of the way from x
    to the one nearest to x. If the result is misclassified, the next step begins at beta of its distance
    from x. Only points within eps count: an image falls with the first. (The original goes on to nearer
    ones, and says the same of it: the nearest lies within eps or does not.) What stands is x. Arguments as
    for `pgd_any`; but keys are for a start within ε/2, which AutoAttack has not. targets int64 [B, T], side
    by side as in `apgd`.

    objective(x, y int64 [n, 2], sure=bool [n]) → (s_t − s_y [n], wrong bool [n], a guess where not sure)."""
    found, s = begin(x, y, eps / 2, norm, keys)
    s = side_by_side(found, s, targets)
    for step in range(steps + 1):
        near = size(s.x_adv - s.x, norm) <= eps             # [n, 1, ...]
        with torch.no_grad():
            wrong = objective(s.x_adv, s.y, sure=near.flatten())[1].view_as(near)
        fallen = on_the_way((wrong & near).flatten())
        s.x_adv = torch.where(wrong & ~near, s.x + beta * (s.x_adv - s.x), s.x_adv)
        if leave(found, s, fallen(), step) or step == steps:
            return ended(found, s, s.x)
        ahead, _, grad = ascent(objective, s.x_adv, s.y, sure=s.y[:, 0] < 0)        # nowhere
        ahead = ahead.view(-1, *(1,) * (s.x.ndim - 1))
        here = to_plane(s.x_adv, grad, -ahead, norm)
        there = to_plane(s.x, grad, total(grad * (s.x_adv - s.x)) - ahead, norm)
        near_plane, far = (size(delta, norm).clamp(min=1e-8) for delta in (here, there))
        alpha = (near_plane / (near_plane + far)).clamp(max=alpha_max)
        s.x_adv = ((1 - alpha) * (s.x_adv + eta * here) + alpha * (s.x + eta * there)).clamp(0, 1)


def total(t):
    """The sum of each image, [B, ...] → [B, 1, ...]."""
    return t.sum([*range(1, t.ndim)], keepdim=True)


def size(delta, norm):
    """The length of each image's δ in the norm, [B, ...] → [B, 1, ...]."""
    return delta.abs().amax([*range(1, delta.ndim)], keepdim=True) if norm == "linf" else l2_norm(delta)


def to_plane(x, grad, rise, norm, rounds=10):
    """The shortest δ in the norm with grad·δ = rise [B, 1, ...] and x + δ in [0,1]; where no such δ exists,
    the one whose grad·δ comes nearest.

    All pixels move, in linf by the same length, in l2 by length · |grad|, until they meet the range's end:
    what those cannot give the others have to, by a greater length, with which more may meet it. A round is a
    Newton step on a concave function of one number, piecewise linear."""
    grad, rise = grad * rise.sign(), rise.abs()
    speed = torch.ones_like(grad) if norm == "linf" else grad.abs()
    room = torch.where(grad > 0, 1 - x, x)
    # what a pixel gives to grad·δ at the range's end, and before it for a unit of length
    full, slope_of, free = grad.abs() * room, grad.abs() * speed, room > 0
    for _ in range(rounds):
        length = (rise - total(full * ~free)) / total(slope_of * free)
        free = length * speed < room
    return grad.sign() * torch.where(free, length * speed, room)


# ------------------------------------------------------------------------------ without gradients: Square
def square(objective, x, y, *, eps, queries, norm="linf", keys, p=.8):
    """Square attack (Andriushchenko et al. 2020): random search that only asks for predictions: (x_adv, at).

    Each query changes one square window of each image; what does not raise the loss is undone. The window's
    share p of the pixels shrinks as in the paper. x [B, C, H, W]; the loss should be `margin`; `at` counts
    queries. Masked gradients do not protect from it."""
    found, s = begin(x, y, eps, norm, None)
    start, propose = (stripes, change_window) if norm == "linf" else (chessboard, move_mass)
    s.best_loss, s.proposal = s.x.new_full((len(x),), -math.inf), start(s.x, eps, keys)
    s.keys = keys.clone()
    channels, height, width = x.shape[1:]
    for query in range(1, queries + 1):
        with torch.no_grad():
            loss, wrong = objective(s.proposal, s.y)
        seen = on_the_way(wrong)
        better = (loss > s.best_loss) | wrong
        s.best_loss = torch.where(better, loss, s.best_loss)
        s.x_adv = torch.where(better.view(-1, 1, 1, 1), s.proposal, s.x_adv)
        if query < queries:     # before it is known who stands: meanwhile the device has something to do
            # p is halved at these of the paper's 10,000 queries; other numbers of queries are scaled to that
            halvings = sum(10_000 * query / queries > n
                           for n in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
            side = max(round(math.sqrt(p / 2 ** halvings * height * width)), 1)
            chances = uniform(s.keys, (5 + channels,), stream=query)
            s.proposal = propose(s.x_adv, s.x, eps, side, chances)
        if leave(found, s, seen(), query - 1):
            break
    return ended(found, s, s.x_adv)


# A proposal takes its chances from u, uniform in [0,1) [B, 5 + C]: the window's place 0:2, the other window's
# place 2:4, whether the pattern is turned 4, and a sign for each channel 5:.
def signs(u, like):
    """−1 where u < ½, else 1."""
    return torch.where(u < .5, -1., 1.).to(like.dtype)


def window(place, side, x):
    """A window at each image's place [B, 2] in [0,1): rows [B, H, 1] and columns [B, 1, W] counted from
    it and clamped to it, and its mask [B, 1, H, W]."""
    rows, columns = (torch.arange(n, device=x.device) - (t * (n - side + 1)).long()[:, None]
                     for n, t in zip(x.shape[-2:], place.T))
    r, c = rows.clamp(0, side - 1), columns.clamp(0, side - 1)
    return r[:, :, None], c[:, None, :], ((r == rows)[:, :, None] & (c == columns)[:, None, :])[:, None]


def stripes(x, eps, keys):
    """Square's start in linf: ±ε for each column and channel."""
    return (x + eps * signs(uniform(keys, (x.shape[1], 1, x.shape[3])), x)).clamp(0, 1)


def change_window(x_adv, x, eps, side, u):
    """Square's proposal in linf: a window of one colour, ±2ε a channel, projected."""
    *_, inside = window(u[:, :2], min(side, *x.shape[-2:]), x)
    changed = project(x_adv + 2 * eps * signs(u[:, 5:, None, None], x), x, eps, "linf")
    return torch.where(inside, changed, x_adv)


def chessboard(x, eps, keys):
    """Square's start in l2: 5 × 5 bumps, each with a sign a channel, scaled to length ε."""
    side = max(min(x.shape[-2:]) // 5, 1)
    board = torch.kron(signs(uniform(keys, (x.shape[1], 5, 5)), x), bump(side, x))
    # in the middle; images below 5 pixels get its middle
    rest = (n - 5 * side for n in (x.shape[-1], x.shape[-2]))
    return at_distance(F.pad(board, [pad for n in rest for pad in (n // 2, n - n // 2)]), x, eps)


def move_mass(x_adv, x, eps, side, u):
    """Square's proposal in l2: one window is emptied, and its squared length goes into a bump in another."""
    side, delta, tiny = min(max(side, 3) | 1, *x.shape[-2:]), x_adv - x, 1e-12
    r, c, inside = window(u[:, :2], side, x)
    *_, emptied = window(u[:, 2:4], side, x)
    length = partial(torch.linalg.vector_norm, dim=(2, 3), keepdim=True)      # of each channel [B, C, 1, 1]
    turned = (u[:, 4] < .5)[:, None, None]
    pattern = bump(side, x)[torch.where(turned, c, r), torch.where(turned, r, c)][:, None]
    added = inside * (pattern * signs(u[:, 5:, None, None], x) + delta / (length(delta * inside) + tiny))
    unused = (eps ** 2 - l2_norm(delta) ** 2).clamp(min=0) / x.shape[1]
    budget = (unused + length(delta * (inside | emptied)) ** 2).sqrt()
    return at_distance(torch.where(inside, added / (length(added) + tiny) * budget, delta * ~emptied), x, eps)


def bump(side, like):
    """Square's l2 pattern [side, side] of length 1: two opposite bumps, Σ 1/k² over squares around each."""
    both, middle = like.new_zeros(side, side), side // 2
    for half in (both[:middle], both[middle:]):
        row = len(half) // 2
        for k in range(middle + 1):
            half[max(row - k, 0):row + k + 1, max(middle - k, 0):middle + k + 1] += 1 / (k + 1) ** 2
        half /= half.norm()
    both[middle:] *= -1
    return both / both.norm()


def at_distance(delta, x, eps):
    """x + δ with δ scaled to L2 length ε, clamped to [0,1]."""
    return (x + delta * (eps / l2_norm(delta).clamp(min=1e-12))).clamp(0, 1)


# ------------------------------------------------------------------------------ by name
class Attack(NamedTuple):
    title: str
    search: Callable
    loss: Callable                     # (logits [B,K], y) → [B], what it ascends
    options: tuple = ("steps",)        # of the search
    targeted: bool = False             # y: label and target
    forwards: int = 1                  # passes of an iterate after the first


ATTACKS = {"pgd": Attack("PGD", pgd_any, log_odds, ("steps", "step_size")),
           "cw": Attack("CW", pgd_any, cw_margin, ("steps", "step_size")),
           "apgd-ce": Attack("APGD-CE", apgd, log_odds),           # cross-entropy is their softplus
           "apgd-dlr": Attack("APGD-DLR", apgd, dlr),
           "apgd-t": Attack("APGD-T", apgd, lambda logits, y: dlr(logits, *y.unbind(1)), targeted=True),
           "fab-t": Attack("FAB-T", fab, lambda logits, y: lead(logits, *y.unbind(1)), targeted=True,
                           forwards=2),
           "square": Attack("Square", square, margin, ("queries",))}
ENSEMBLES = {"autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),        # `standard` of Croce & Hein 2020
             "autoattack-fast": ("apgd-ce", "apgd-t", "square")}            # without FAB-T


def attack_list(words, last_iterate=False):
    """The attacks of `--attack`, a comma list. ValueError: unknown, or not for --last-iterate."""
    names = [name for word in words.split(",") for name in ENSEMBLES.get(word, (word,))]
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(f"--attack {unknown[0]}: expected a comma list of "
                         f"{', '.join([*ENSEMBLES, *ATTACKS])}")
    if last_iterate and names not in (["pgd"], ["cw"]):
        raise ValueError("--last-iterate is for --attack pgd or cw alone")
    return list(dict.fromkeys(names))


def defined(names, classes):
    """`names` where DLR is undefined: APGD-CE for two classes, untargeted in place of targeted for three."""
    instead = {3: {"apgd-t": "apgd-dlr"}, 2: {"apgd-dlr": "apgd-ce", "apgd-t": "apgd-ce"}}.get(classes, {})
    return list(dict.fromkeys(instead.get(name, name) for name in names))
