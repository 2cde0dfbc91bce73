"""FAB-T: its projection beside scipy's solvers, its steps beside the algorithm word by word, its place among
the attacks of run_attacks and in AutoAttack."""
import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize
from torch import nn

from attacks import ATTACKS, fab, image_keys, lead, runners_up, size, to_plane, total
from eval_zeroshot import run_attacks
from kernels.random_start import random_start
from model import predict

ORDER = {"linf": torch.inf, "l2": 2}


def network(classes=5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 3 * 3, classes))
    return net.double().requires_grad_(False)


def objective_of(net, trace=None):
    def objective(x, y, sure):
        logits = net(x)
        if trace is not None:
            trace.append(x.detach().clone())
        return lead(logits, *y.unbind(1)), logits.argmax(1) != y[:, 0]
    return objective


def some_images(n=24):
    x = torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (1.6 * x - .3).clamp(0, 1), image_keys(3, 0, torch.arange(n))       # some at the range's ends


# ------------------------------------------------------------------------------ the projection
def shortest(x, w, rise, norm):
    """The same by scipy, for one image: a linear or a quadratic programme."""
    bounds = list(zip(-x, 1 - x))
    if norm == "linf":                  # unknown: d and the length t; −t ≤ d_i ≤ t
        n, one = len(x), np.ones((len(x), 1))
        found = linprog([*np.zeros(n), 1], A_eq=[[*w, 0]], b_eq=[rise], bounds=[*bounds, (0, None)],
                        A_ub=np.block([[np.eye(n), -one], [-np.eye(n), -one]]), b_ub=np.zeros(2 * n))
        return found.x[-1]
    found = minimize(lambda d: d @ d, np.clip(w, *np.transpose(bounds)), jac=lambda d: 2 * d, bounds=bounds,
                     constraints={"type": "eq", "fun": lambda d: w @ d - rise, "jac": lambda d: w},
                     method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})
    return np.sqrt(found.fun)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_to_a_plane_is_the_shortest_one(norm):
    gen = torch.Generator().manual_seed(5)
    x = (1.6 * torch.rand(40, 2, 4, generator=gen, dtype=torch.float64) - .3).clamp(0, 1)
    w = torch.randn(40, 2, 4, generator=gen, dtype=torch.float64) * (torch.rand(40, 2, 4, generator=gen) < .9)
    sign = torch.where(torch.arange(40) % 2 == 0, 1, -1).view(40, 1, 1)
    reach = total((w * sign).abs() * torch.where(w * sign > 0, 1 - x, x))
    share = torch.rand(40, 1, 1, generator=gen, dtype=torch.float64)
    rise = sign * share * reach
    delta = to_plane(x, w, rise, norm)
    assert torch.allclose(total(w * delta), rise) and (w != 0)[delta != 0].all()
    assert (x + delta).min() > -1e-12 and (x + delta).max() < 1 + 1e-12
    lengths = [shortest(x[k].flatten().numpy(), w[k].flatten().numpy(), rise[k].item(), norm)
               for k in range(40)]
    assert torch.allclose(delta.flatten(1).norm(ORDER[norm], 1), torch.tensor(lengths), rtol=1e-6)
    # in most some pixels meet the range's end before the plane is reached
    assert (((x + delta) % 1 < 1e-12) & (delta != 0)).flatten(1).any(1).float().mean() > .5
    # where the plane is out of reach: the corner; no gradient: nowhere
    corner = torch.where(w * sign == 0, x, (w * sign > 0).double())
    assert torch.allclose(x + to_plane(x, w, 1.01 * sign * reach, norm), corner)
    assert (to_plane(x, 0 * w, rise, norm) == 0).all() and (to_plane(x, w, 0 * rise, norm) == 0).all()


# ------------------------------------------------------------------------------ the attack
def test_by_hand_between_two_classes_of_a_linear_model():
    """s = (0, z₁ + 2z₂ − 2) at (0.4, 0.2): linf distance 0.4, l2 distance 1.2/√5. The first step goes 1.05 of
    the way; then back to 0.945, and 1.05 of the rest: 1.00275, mixed with 1.05 by 0.055/1.055. No later
    iterate is as near."""
    def objective(x, y, sure):
        logits = torch.stack([0 * x[:, 0], x @ torch.tensor([1., 2.]).double() - 2], 1)
        return lead(logits, *y.unbind(1)), logits.argmax(1) != y[:, 0]
    x, y, target = torch.tensor([[.4, .2]], dtype=torch.float64), torch.tensor([0]), torch.tensor([[1]])
    second = 1.00275 + .055 / 1.055 * (1.05 - 1.00275)
    for norm, far, along in (("linf", .4, [1, 1]), ("l2", 1.2 / 5 ** .5, [1 / 5 ** .5, 2 / 5 ** .5])):
        for share, at in ((1.051, 1), (1.049, 2), (second + 1e-9, 2), (second - 1e-9, -1)):
            x_adv, found = fab(objective, x, y, eps=share * far, steps=40, norm=norm, targets=target)
            assert found.item() == at, (norm, share)
            if at > 0:
                step = (1.05 if at == 1 else second) * far
                assert torch.allclose(x_adv, x + step * torch.tensor(along).double(), atol=1e-12)
        assert torch.equal(x_adv, x)                # what stands
    # an image that is wrong from the start
    assert fab(objective, x, torch.tensor([1]), eps=.1, steps=3, targets=target - 1)[1].item() == 0


def fab_of_the_paper(net, x, y, target, steps, norm, start=None):
    """Croce & Hein 2020, algorithm 1, on one image, towards one target: all points looked at, with the
    distance of those that are misclassified, others inf."""
    def project(point, w, rise):
        w, rise = (w, rise) if rise >= 0 else (-w, -rise)
        room = np.where(w > 0, 1 - point, point)
        speed = np.ones_like(w) if norm == "linf" else np.abs(w)

        def step(length):
            return np.sign(w) * np.minimum(length * speed, room)
        if w @ step(1e9) <= rise:
            return step(1e9)
        return step(brentq(lambda length: w @ step(length) - rise, 0, 1e9, xtol=1e-18, rtol=1e-14))

    def norm_of(t):
        return np.linalg.norm(t.ravel(), ORDER[norm])

    def wrong(point):
        return net(torch.tensor(point).view(1, *x.shape)).argmax() != y
    origin, seen = x.flatten().numpy(), []
    here = origin if start is None else start.flatten().numpy()
    for _ in range(steps):
        leaf = torch.tensor(here).requires_grad_()
        logits = net(leaf.view(1, *x.shape))[0]
        f = logits[target] - logits[y]
        w, f = torch.autograd.grad(f, leaf)[0].numpy(), f.item()
        d1, d2 = project(here, w, -f), project(origin, w, -f - w @ (origin - here))
        alpha = min(norm_of(d1) / (norm_of(d1) + norm_of(d2)), .1)
        here = np.clip((1 - alpha) * (here + 1.05 * d1) + alpha * (origin + 1.05 * d2), 0, 1)
        seen.append((here, norm_of(here - origin) if wrong(here) else np.inf))
        if wrong(here):
            here = .1 * origin + .9 * here
    return seen


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_is_the_algorithm_of_the_paper(norm):
    """Never within ε = 0 all iterates are the same; within ε it says of the same images that they fall."""
    net, steps, (x, _) = network(), 12, some_images(12)
    y = net(x).argmax(1)
    targets = runners_up(net(x), y, 3).roll(1, 1)
    alone = [[fab_of_the_paper(net, x[k], y[k], t, steps, norm) for t in targets[k]] for k in range(12)]
    trace = []
    x_adv, at = fab(objective_of(net, trace), x, y, eps=0., steps=steps, norm=norm, targets=targets)
    looks = torch.stack(trace[::2][1:])             # between them the gradients
    assert torch.equal(x_adv, x) and (at == -1).all() and len(trace) == 2 * steps + 1
    expected = torch.tensor(np.array([[p for p, _ in one] for image in alone for one in image]))
    assert torch.allclose(looks.flatten(2), expected.transpose(0, 1), rtol=0, atol=1e-6)

    best = torch.tensor([min(d for one in image for _, d in one) for image in alone])
    eps = 1.0001 * best.median().item()
    x_adv, at = fab(objective_of(net), x, y, eps=eps, steps=steps, norm=norm, targets=targets)
    assert torch.equal(at >= 0, best <= eps) and (at >= 0).sum() == 6
    # at its first misclassified iterate within ε, towards whichever target
    first = [min([k for one in image for k, (_, d) in enumerate(one, 1) if d <= eps], default=-1)
             for image in alone]
    assert at.tolist() == first and max(first) > 1
    assert torch.equal(net(x_adv).argmax(1) != y, at >= 0)
    assert size(x_adv - x, norm).max() <= eps and x_adv.min() >= 0 and x_adv.max() <= 1
    # in a batch of its own it meets the same fate, at the same pixels
    for k in range(12):
        one = slice(k, k + 1)
        pixels, when = fab(objective_of(net), x[one], y[one], eps=eps, steps=steps, norm=norm,
                           targets=targets[one])
        assert when == at[k] and torch.allclose(pixels[0], x_adv[k], rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_lies_within_half_of_eps_and_steps_are_biased_towards_x(norm):
    """From there plane and x are as far from each other as from the start: the bias is at its most."""
    net, trace, (x, keys) = network(), [], some_images(4)
    y, eps = net(x).argmax(1), .01 if norm == "linf" else .1
    targets, start = runners_up(net(x), y, 1), random_start(x, eps / 2, norm, keys)
    fab(objective_of(net, trace), x, y, eps=eps, steps=1, norm=norm, keys=keys, targets=targets)
    assert torch.allclose(trace[0], start) and (start != x).any() and len(trace) == 3
    for k in range(4):
        ((expected, _),) = fab_of_the_paper(net, x[k], y[k], targets[k, 0], 1, norm, start[k])
        assert torch.allclose(trace[2][k].flatten(), torch.tensor(expected), rtol=0, atol=1e-8)
    # without a gradient there is no plane: a tenth of the way to x
    flat = objective_of(lambda images: 0 * net(images), trace)
    fab(flat, x, 0 * y, eps=eps, steps=1, norm=norm, keys=keys, targets=targets)
    assert torch.allclose(trace[-1], .9 * start + .1 * x)


# ------------------------------------------------------------------------------ among the others
def features(x):
    """A small smooth model in fp32: x [B, 3, 4, 4] → [B, 10]."""
    weights = torch.randn(48, 10, generator=torch.Generator().manual_seed(2))
    return torch.tanh((x - .5).flatten(1) @ weights) + .1


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_its_targets_and_its_passes(classes):
    """min(9, K − 1) targets; each iterate after the first takes two forward passes, one of them with back."""
    head, x = torch.eye(10)[:classes], torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y, made, asked = predict(features, head, 10., x), [], []

    def counted(x):
        made.append(len(x) * (x.requires_grad and torch.is_grad_enabled()))
        asked.append(len(x))
        return features(x)
    options = {"names": ["fab-t"], "norm": "linf", "steps": 7}
    _, _, by, at, passes, *_ = run_attacks(counted, head, 10., x, y, torch.arange(12), eps=0., **options)
    targets = classes - 1
    assert (by < 0).all() and (passes == targets * 15).all()
    # beside them: the targets, the verdict, and the slope's three, of them one with back
    assert sum(asked) == passes.sum() + 5 * 12 and sum(made) == 12 * 7 * targets + 12
    _, _, by, at, passes, *_ = run_attacks(features, head, 10., x, y, torch.arange(12), eps=.05, **options)
    assert 0 < (by >= 0).sum() < 12 and torch.equal(passes, targets * (1 + 2 * torch.where(by < 0, 7, at)))


def test_only_restarts_start_at_random(monkeypatch):
    x, starts = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)), []

    def recorded(objective, x, y, *, keys, **options):
        starts.append(keys)
        return x, torch.full_like(y, -1)
    monkeypatch.setitem(ATTACKS, "fab-t", ATTACKS["fab-t"]._replace(search=recorded))
    run_attacks(features, torch.eye(10), 10., x, predict(features, torch.eye(10), 10., x), torch.arange(3),
                names=["fab-t"], eps=.1, norm="linf", steps=3, restarts=3)
    assert starts[:3] == [None] * 3 and len(starts) == 9        # nine rows an image, one image in a batch
    assert torch.equal(torch.cat(starts[3:]), torch.cat([image_keys(0, k, torch.arange(3)) for k in (1, 2)]))


def test_in_bf16_the_judge_has_the_last_word_and_is_asked_only_within_eps():
    """A misclassified iterate further away decides nothing but where the attack goes on."""
    head, x = torch.eye(10), torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y, asked = predict(features, head, 10., x), []

    def judge(z):
        asked.append(z.detach().clone())
        return features(z)
    options = {"names": ["fab-t"], "norm": "linf", "steps": 9, "judge": judge}
    _, _, by, *_ = run_attacks(features, head, 10., x, y, torch.arange(6), eps=.02, **options)
    away = [min(float((one - image).abs().max()) for image in x) for one in torch.cat(asked)]
    assert .001 < max(away) <= .02 and 0 < (by >= 0).sum() < 6
    # what calls every image wrong breaks none, and each attack goes on to its end
    _, _, by, _, passes, *_ = run_attacks(lambda x: -features(x), head, 10., x, y, torch.arange(6), eps=.002,
                                          **options)
    assert (by == -1).all() and (passes == 9 * 19).all()
