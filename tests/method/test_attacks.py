"""attacks.py: worked by hand, constraints, and independence of everything that should not matter."""
import math
import random

import pytest
import torch
from torch import nn

import attacks
from attacks import (
    ATTACKS, apgd, apgd_checkpoints, begin, bump, change_window, chessboard, cw_margin, defined,
    dlr, image_keys, leave, margin, move_mass, pgd, pgd_any, pgd_last, random_start, runners_up,
    square, stripes)
from eval_zeroshot import run_attacks
from kernels.contrastive_loss import log_odds
from kernels.random_start import uniform
from model import predict


def network(dtype=torch.float64, classes=5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 3 * 3, classes))
    return net.to(dtype).requires_grad_(False)


def log_odds_of(net):
    return lambda x, y: log_odds(net(x), y)


def test_pgd_worked_by_hand_on_a_linear_model():
    """Loss 3a − 2b + 0c from (0.50, 0.10, 0.90), ε = 0.25, steps of 0.1."""
    w = torch.tensor([3., -2., 0.])
    visited = []

    def objective(x, y):
        visited.append(x.detach().clone())
        return x @ w

    x = torch.tensor([[.5, .1, .9]])
    result = pgd(objective, x, None, eps=.25, steps=4, step_size=.1)
    # b stops at 0, a at x + ε
    expected = [[.5, .1, .9], [.6, 0., .9], [.7, 0., .9], [.75, 0., .9], [.75, 0., .9]]
    assert torch.allclose(torch.cat([*visited, result]), torch.tensor(expected), atol=1e-6)
    assert not result.requires_grad
    (l2,) = pgd(objective, x, None, eps=.13, steps=2, step_size=.065, norm="l2")
    # both steps along w
    assert torch.allclose(l2, x[0] + .13 * w / 13 ** .5, atol=1e-6)


@pytest.mark.parametrize("norm,eps", [("linf", 8 / 255), ("linf", .7), ("linf", 0.), ("l2", .5), ("l2", 30.),
                                      ("l2", 0.)])
def test_result_lies_in_the_ball_and_in_the_pixel_range(norm, eps):
    net = network(torch.float32)
    gen = torch.Generator().manual_seed(3)
    x = torch.rand(9, 3, 7, 7, generator=gen)
    x[0], x[1], x[2] = 0, 1, x[2].round()
    y = torch.randint(5, (9,), generator=gen)
    keys = image_keys(0, 0, torch.arange(9))
    for steps in (1, 5):
        x_adv = pgd(log_odds_of(net), x, y, eps=eps, steps=steps, step_size=eps / 2, norm=norm, keys=keys)
        delta = x_adv - x
        size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
        assert size.max() <= eps + 1e-6 * max(1, eps)
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        start = random_start(x, eps, norm, keys)
        # and went somewhere
        assert eps == 0 or log_odds(net(x_adv), y).mean() > log_odds(net(start), y).mean()


def test_each_image_gets_the_same_result_in_any_batch():
    net = network()
    gen = torch.Generator().manual_seed(4)
    x = torch.rand(64, 3, 7, 7, generator=gen, dtype=torch.float64)
    y = torch.randint(5, (64,), generator=gen)
    keys = image_keys(5, 1, torch.arange(64))

    def attack(some):
        return pgd(log_odds_of(net), x[some], y[some], eps=.03, steps=5, step_size=.01, keys=keys[some])

    whole = attack(slice(None))
    for size in (1, 7, 64):
        batches = torch.cat([attack(slice(i, i + size)) for i in range(0, 64, size)])
        assert torch.allclose(batches, whole, rtol=0, atol=1e-12)
    order = torch.randperm(64, generator=gen)
    assert torch.allclose(attack(order), whole[order], rtol=0, atol=1e-12)


def test_the_sum_over_the_batch_is_differentiated_and_with_respect_to_the_pixels_alone():
    net = network(torch.float32).requires_grad_(True)
    x, y = torch.rand(6, 3, 7, 7), torch.arange(6) % 5
    weights_of_images = []

    def objective(x, y):
        loss = log_odds(net(x), y)
        loss.register_hook(weights_of_images.append)
        return loss

    x_adv = pgd(objective, x, y, eps=.03, steps=2, step_size=.01)
    assert len(weights_of_images) == 2 and all((w == 1).all() for w in weights_of_images)
    assert all(p.grad is None for p in net.parameters())
    assert not (x.requires_grad or x_adv.requires_grad)


def test_the_start_is_the_random_start_of_the_keys():
    x, keys = torch.rand(5, 3, 7, 7), image_keys(1, 2, torch.arange(5))
    net = network(torch.float32)
    for norm, eps in (("linf", .1), ("l2", 1.)):
        stayed = pgd(lambda x, y: net(x).sum(1), x, None, eps=eps, steps=1, step_size=0., norm=norm,
                     keys=keys)
        assert torch.allclose(stayed, random_start(x, eps, norm, keys), atol=1e-6)
        assert not torch.allclose(stayed, x, atol=1e-3)


def test_attack_raises_the_loss_and_more_steps_raise_it_further():
    net = network(torch.float32)
    gen = torch.Generator().manual_seed(6)
    x = torch.rand(32, 3, 7, 7, generator=gen)
    y = net(x).argmax(1)

    def loss(x):
        return log_odds(net(x), y).mean().item()

    one, ten = (loss(pgd(log_odds_of(net), x, y, eps=.05, steps=s, step_size=.1 / s)) for s in (1, 10))
    noise = loss(random_start(x, .05, "linf", image_keys(0, 0, torch.arange(32))))
    assert loss(x) - .05 < noise < one < ten + 1e-4


def test_random_start_depends_on_seed_round_and_image_alone():
    index = torch.tensor([3, 141, 1_200_000])
    keys = image_keys(7, 2, index)
    assert torch.equal(image_keys(7, 2, index[1:2]), keys[1:2])
    every = [image_keys(seed, round, torch.arange(100)) for seed in range(5) for round in range(5)]
    assert len(torch.cat(every).unique()) == 2500
    u = uniform(keys, (3, 8, 8))
    assert torch.equal(uniform(keys[1:2], (3, 8, 8)), u[1:2])
    assert not torch.equal(uniform(keys, (3, 8, 8), stream=1), u)


def test_uniform_is_uniform_and_unrelated_between_images():
    u = uniform(image_keys(0, 0, torch.arange(40)), (5000,))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    # 5 standard deviations
    assert ((counts - 10_000).abs() < 500).all()
    correlation = torch.corrcoef(u) - torch.eye(40)
    assert correlation.abs().max() < .08
    assert torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1].abs() < .02


def test_l2_start_is_uniform_in_the_ball():
    keys = image_keys(0, 0, torch.arange(20_000))
    delta = random_start(torch.full((20_000, 3), .5), .3, "l2", keys) - .5
    radius = delta.norm(dim=1) / .3
    assert radius.max() <= 1 + 1e-5
    # volume ∝ radius³
    assert ((radius < .5).float().mean() - .5 ** 3).abs() < .015
    assert (delta.mean(0).abs() < .005).all()
    # E r²/3 = ε²·(3/5)/3
    assert (delta.T @ delta / 20_000 - torch.eye(3) * .3 ** 2 / 5).abs().max() < .001


def test_cw_margin_by_hand():
    logits = torch.tensor([[10., 2., 4.], [0., 1., 99.], [-5., -6., -7.]])
    y = torch.tensor([0, 0, 2])
    # the second is broken beyond κ
    assert cw_margin(logits, y).tolist() == [-(10 - 4 + 50), -0., -(-7 + 5 + 50)]
    assert cw_margin(logits, y, kappa=0.).tolist() == [-6., 0., 0.]


def test_margin_and_dlr_by_hand():
    logits = torch.tensor([[10., 2., 4., 1.], [0., 1., 5., 7.]])
    y, target = torch.tensor([0, 1]), torch.tensor([3, 2])
    assert margin(logits, y).tolist() == [-6., 6.]
    assert torch.allclose(dlr(logits, y), torch.tensor([-(10 - 4) / (10 - 2), (7 - 1) / (7 - 1)]))
    assert torch.allclose(dlr(logits, y, target), torch.tensor([-(10 - 1) / (10 - 1.5), (5 - 1) / (7 - .5)]))
    assert torch.allclose(dlr(3 * logits + 5, y), dlr(logits, y))
    for classes, given in ((2, None), (3, target % 3)):
        with pytest.raises(ValueError, match=f"fewer than {classes + 1} classes, not for {classes}"):
            dlr(logits[:, :classes], y, given)
    assert dlr(logits[:, :3], y).shape == (2,)


# ------------------------------------------------------------------------------ misclassified ones stop early
def objective_of(net, loss=log_odds):
    def objective(x, y):
        logits = net(x)
        return loss(logits, y), logits.argmax(1) != y
    return objective


def some_images(n=24, dtype=torch.float64, size=7):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return x, image_keys(3, 0, torch.arange(n))


def never_wrong(net, loss=log_odds):
    """An objective that calls no image misclassified."""
    return lambda x, y: (loss(net(x), y), torch.zeros(len(x), dtype=torch.bool))


ANY = {"pgd": lambda f, x, y, **o: pgd_any(f, x, y, steps=9, step_size=o["eps"] / 4, **o),
       "apgd": lambda f, x, y, **o: apgd(f, x, y, steps=20, **o),
       "square": lambda f, x, y, **o: square(f, x, y, queries=40, **o)}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ANY)
def test_an_image_falls_at_its_first_wrong_iterate_and_the_others_do_not_notice(name, norm):
    net, eps = network(), (.05 if name != "square" else .12) * (1 if norm == "linf" else 10)
    x, keys = some_images()
    y = net(x).argmax(1)
    visited = []

    def objective(images, labels):
        loss, wrong = objective_of(net, margin if name == "square" else log_odds)(images, labels)
        visited.append((images.detach().clone(), wrong))
        return loss, wrong

    x_adv, at = ANY[name](objective, x, y, eps=eps, norm=norm, keys=keys)
    fallen = at >= 0
    assert 3 < fallen.sum() < 21 and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert torch.equal(net(x_adv).argmax(1) != y, fallen)
    delta = (x_adv - x).flatten(1)
    assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= eps * (1 + 1e-9)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    standing = [int(((at < 0) | (at >= k)).sum()) for k in range(len(visited))]
    assert [len(images) for images, _ in visited] == standing
    # alone it meets the same fate, at the same pixels
    for k in range(len(x)):
        alone, when = ANY[name](objective, x[k:k + 1], y[k:k + 1], eps=eps, norm=norm, keys=keys[k:k + 1])
        assert when == at[k] and torch.allclose(alone[0], x_adv[k], rtol=0, atol=1e-11)


def test_any_iterate_is_judged_or_the_last_alone():
    """By hand: pixels go up by 0.1, thrice, and are misclassified between 0.32 and 0.48."""
    def objective(x, y):
        return x.sum(1), ((.32 < x) & (x < .48)).all(1)

    x, options = torch.tensor([[.05], [.15], [.2], [.35], [.6]]), {"eps": .5, "steps": 3, "step_size": .1}
    x_adv, at = pgd_last(objective, x, None, **options)
    assert torch.allclose(x_adv, x + .3) and at.tolist() == [3, 3, -1, -1, -1] and not x_adv.requires_grad
    x_adv, at = pgd_any(objective, x, torch.zeros(5), **options)
    assert torch.allclose(x_adv.T, torch.tensor([.35, .35, .4, .35, .9])) and at.tolist() == [3, 2, 2, 0, -1]


@pytest.mark.parametrize("name", ANY)
def test_everything_wrong_at_once_or_never(name):
    x, keys = some_images(5)
    calls = []

    def constant(value):
        def objective(x, y):
            calls.append(len(x))
            return x.flatten(1).sum(1), torch.full((len(x),), value)
        return objective
    x_adv, at = ANY[name](constant(True), x, torch.zeros(5), eps=.1, norm="linf", keys=keys)
    assert at.tolist() == [0] * 5 and len(calls) == 1
    x_adv, at = ANY[name](constant(False), x, torch.zeros(5), eps=.1, norm="linf", keys=keys)
    assert at.tolist() == [-1] * 5
    # the best for a sum of pixels
    assert torch.allclose(x_adv, (x + .1).clamp(max=1)) == (name != "square")


def apgd_of_the_paper(loss, x, start, eps, steps, norm):
    """Croce & Hein 2020, algorithm 1, on one image, word by word: all points looked at, and their losses."""
    def project(t):
        if norm == "linf":
            return torch.minimum(torch.maximum(t, x - eps), x + eps).clamp(0, 1)
        return (x + (t - x) * min(1, eps / float((t - x).norm()))).clamp(0, 1)

    def grad(t):
        t = t.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(t), t)
        return g.sign() if norm == "linf" else g / g.norm()

    p = [0, .22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - .03, .06))
    w = [math.ceil(round(q * steps, 9)) for q in p if q < 1]
    xs = [start, project(start + 2 * eps * grad(start))]
    f = [float(loss(t)) for t in xs]
    best = xs[f.index(max(f))]
    sizes, bests, k = {0: 2 * eps}, {0: f[0]}, 1
    size, here, before = 2 * eps, xs[1], xs[0]
    while k < steps:
        if k in w[1:]:
            j = w.index(k)
            rises = sum(f[i + 1] > f[i] for i in range(w[j - 1], k))
            sizes[k], bests[k] = size, max(f[:k + 1])
            unchanged = sizes[w[j - 1]] == size and bests[w[j - 1]] == bests[k]
            if rises < .75 * (k - w[j - 1]) or unchanged and j > 1:
                size, here = size / 2, best
        z = project(here + size * grad(here))
        here, before = project(here + .75 * (z - here) + .25 * (here - before)), here
        xs.append(here)
        f.append(float(loss(here)))
        best = xs[f.index(max(f))]
        k += 1
    return xs, f


@pytest.mark.parametrize("norm,eps", [("linf", .05), ("l2", .5)])
def test_apgd_is_the_algorithm_of_the_paper(norm, eps):
    net = network()
    x, keys = some_images(6)
    y = net(x).argmax(1)
    trace = []

    def objective(images, labels):
        trace.append(images.detach().clone())
        return never_wrong(net)(images, labels)

    steps = 50
    x_adv, _ = apgd(objective, x, y, eps=eps, steps=steps, norm=norm, keys=keys)
    start = random_start(x, eps, norm, keys)
    halved = set()
    for k in range(6):
        def loss(t, k=k):
            return log_odds(net(t[None]), y[k:k + 1])[0]
        xs, f = apgd_of_the_paper(loss, x[k], start[k], eps, steps, norm)
        same = [torch.allclose(ours[k], its, rtol=0, atol=1e-9) for ours, its in zip(trace, xs, strict=True)]
        assert all(same)
        assert torch.allclose(x_adv[k], xs[f.index(max(f))], rtol=0, atol=1e-9)
        halved |= {round(float((a - b).abs().max() / eps), 3) for a, b in zip(xs, xs[1:])}
    # step sizes of many lengths were at work
    assert len(halved) > 6


@pytest.mark.parametrize("norm,eps", [("linf", .05), ("l2", .5)])
def test_targets_side_by_side_are_the_targets_one_by_one(norm, eps):
    """Who falls is who falls to any; at the first step of all, to the first target of those of that step."""
    net = network()
    x, keys = some_images()
    y = net(x).argmax(1)
    targets, options = runners_up(net(x), y, 3).roll(1, 1), {"eps": eps, "steps": 12, "norm": norm}
    sizes = []

    def objective(images, labels):
        sizes.append(len(images))
        logits, (label, target) = net(images), labels.unbind(1)
        return dlr(logits, label, target), logits.argmax(1) != label
    x_adv, at = apgd(objective, x, y, targets=targets, keys=keys, **options)
    first = sizes[:13]
    alone = [apgd(objective, x, y, targets=targets[:, k:k + 1], keys=keys, **options) for k in range(3)]
    steps = torch.stack([torch.where(when < 0, 99, when) for _, when in alone])
    assert torch.equal(torch.where(at < 0, 99, at), steps.min(0).values) and 0 < (at < 0).sum() < len(x)
    which = torch.where(at < 0, 2, (steps == at).int().argmax(0))                # what stands: the last's
    assert len({*which[at >= 0].tolist()}) > 1                                   # not all to the same target
    expected = torch.stack([found for found, _ in alone])[which, torch.arange(len(x))]
    assert torch.allclose(x_adv, expected, rtol=0, atol=1e-11)
    # an image's rows leave together, and at once
    assert first == [3 * int(((at < 0) | (at >= k)).sum()) for k in range(13)]


def test_rows_leave_in_place_and_the_last_ones_fill_their_gaps():
    x, y = torch.arange(6.).view(6, 1) / 10, torch.arange(6)
    found, s = begin(x, y, .1, "linf", None)
    assert not leave(found, s, torch.tensor([0, 1, 0, 0, 1, 0]).bool(), 3)
    assert s.row.tolist() == s.y.tolist() == [0, 5, 2, 3] and torch.equal(s.x, x[s.row])
    assert found.at.tolist() == [-1, 3, -1, -1, 3, -1] and x[:, 0].tolist() == y.div(10).tolist()
    assert leave(found, s, torch.ones(4).bool(), 4) and found.at.tolist() == [4, 3, 4, 4, 3, 4]


def test_apgd_halves_its_step_size_by_the_papers_two_conditions(monkeypatch):
    """By hand, for prescribed losses: the sizes of 16 steps; checkpoints at 4, 7, 10, 12, 13, 14, 15, 16."""
    assert sorted(apgd_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    # the best is 10 until step 15; between checkpoints the loss rises 3 times of 4, then always, at 14 never
    losses = iter([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9.5, 9.6, 9.7, 9.8, 9.7, 11, 10])
    sizes, step = [], attacks.pgd_step

    def recorded(x_adv, grad, x, eps, step_size, norm):
        sizes.append(step_size.item() / eps)
        return step(x_adv, grad, x, eps, step_size, norm)
    monkeypatch.setattr(attacks, "pgd_step", recorded)
    x, never = torch.full((1, 3), .5), torch.tensor([False])
    apgd(lambda x, y: (0 * x.sum(1) + next(losses), y), x, never, eps=.25, steps=16)
    # halved at 7, 12 and 14: not at 4, the first checkpoint, nor at 10 and 13, right after it was halved
    assert sizes == [2] * 7 + [1] * 5 + [.5] * 2 + [.25] * 2


def test_apgd_beats_pgd_of_the_same_budget():
    net = network()
    x, keys = some_images(40)
    y = net(x).argmax(1)
    options = {"eps": .05, "keys": keys, "steps": 20}
    auto, plain = (log_odds(net(t), y).mean() for t in (
        apgd(never_wrong(net), x, y, **options)[0],
        pgd_any(never_wrong(net), x, y, step_size=.0125, **options)[0]))
    assert auto > plain > log_odds(net(x), y).mean()


@pytest.mark.parametrize("norm,eps", [("linf", .05), ("l2", .5)])
def test_square_never_goes_back_and_needs_no_gradient(norm, eps):
    net = network()
    x, keys = some_images(10)
    y = net(x).argmax(1)
    losses = []

    # nothing to differentiate
    def stepped(images):
        return (net(images) * 50).round() / 50

    def objective(images, labels):
        assert not torch.is_grad_enabled()
        loss, wrong = never_wrong(stepped, margin)(images, labels)
        losses.append(loss)
        return loss, wrong
    x_adv, _ = square(objective, x, y, eps=eps, queries=300, norm=norm, keys=keys)
    best = torch.stack(losses).cummax(0).values
    assert torch.equal(margin(stepped(x_adv), y), best[-1])
    assert (best[-1] > best[0]).sum() > 4 and len(losses) == 300
    again, _ = square(objective, x, y, eps=eps, queries=300, norm=norm, keys=keys)
    other, _ = square(objective, x, y, eps=eps, queries=300, norm=norm, keys=keys + 1)
    assert torch.equal(again, x_adv) and not torch.equal(other, x_adv)
    # what does not raise the loss is undone
    flat, _ = square(lambda x, y: (0. * y, y < 0), x, y, eps=eps, queries=20, norm=norm, keys=keys)
    assert torch.equal(flat, (stripes if norm == "linf" else chessboard)(x, eps, keys))


def test_the_windows_of_square_shrink_as_in_the_paper():
    """p = 0.8, halved at 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000 queries (linf)."""
    x = torch.full((1, 1, 64, 64), .5)
    seen = []

    # nothing but the start is ever kept
    def objective(images, labels):
        seen.append(images.clone())
        return torch.tensor([-float(len(seen))]), torch.zeros(1, dtype=torch.bool)
    square(objective, x, torch.zeros(1), eps=.1, queries=2000, keys=torch.tensor([5]))
    for query, share in ((1, .8), (2, .8), (3, .4), (10, .4), (11, .2), (41, .1), (101, .05), (201, .025),
                         (401, .0125), (801, .00625), (1201, .003125), (1601, .0015625)):
        sides = []
        for image in seen[query:query + 40] if query in (801, 1201, 1601) else seen[query:query + 1]:
            changed = (image != seen[0])[0, 0]
            places = (changed.any(1).nonzero(), changed.any(0).nonzero())
            sides += [int(t.max() - t.min()) + 1 for t in places if len(t)]
        side = round(math.sqrt(share * 64 * 64))
        # stripes may hide a window's edge
        assert not sides or side - 3 <= max(sides) <= side, (query, max(sides), side)


def test_proposals_of_square():
    gen = torch.Generator().manual_seed(1)
    x = .3 + .4 * torch.rand(6, 3, 23, 20, generator=gen, dtype=torch.float64)
    keys, eps = image_keys(0, 0, torch.arange(6)), .1
    first = stripes(x, eps, keys)
    assert torch.allclose((first - x).abs(), torch.full_like(x, eps)) and (first - x).std(2).max() < 1e-12
    u = torch.rand(6, 8, generator=gen)
    new = change_window(first, x, eps, 5, u)
    changed = (new != first).any(1)
    assert all(c.any(1).sum() <= 5 and c.any(0).sum() <= 5 for c in changed) and changed.any()
    assert torch.allclose((new - x).abs(), torch.full_like(x, eps))
    board = chessboard(x, eps, keys)
    assert torch.allclose((board - x).flatten(1).norm(dim=1), torch.full((6,), eps, dtype=x.dtype))
    # 5 × 5 bumps of 4 pixels
    outside = torch.ones(23, dtype=torch.bool).index_fill(0, torch.arange(1, 21), 0)
    assert (board == x)[:, :, outside].all() and (board != x)[:, :, ~outside].float().mean() > .8
    new = move_mass(board, x, eps, 5, u)
    assert torch.allclose((new - x).flatten(1).norm(dim=1), torch.full((6,), eps, dtype=x.dtype))
    def norm(t):
        return t.flatten(1).norm(dim=1).view(3, 1, 1)
    # one image after the other: Andriushchenko et al. 2020, algorithm 3
    for k, (here, there) in enumerate(zip(u[:, :2].tolist(), u[:, 2:4].tolist())):
        delta = (board - x)[k]
        filled, emptied = ((slice(None), *(slice(int(v * (n - 4)), int(v * (n - 4)) + 5)
                                           for v, n in zip(place, (23, 20)))) for place in (here, there))
        expected, untouched = delta.clone(), delta.clone()
        expected[emptied] = untouched[emptied] = untouched[filled] = 0
        sign = torch.where(u[k, 5:] < .5, -1, 1).view(3, 1, 1)
        pattern = sign * (bump(5, x).T if u[k, 4] < .5 else bump(5, x))
        added = pattern + delta[filled] / norm(delta[filled])
        unused = max(eps ** 2 - delta.norm() ** 2, 0) / 3
        budget = unused + norm(delta) ** 2 - norm(untouched) ** 2
        expected[filled] = added / norm(added) * budget.sqrt()
        assert torch.allclose(new[k], x[k] + eps * expected / expected.norm(), rtol=0, atol=1e-9)
    pattern = bump(7, x)
    assert pattern.norm() == pytest.approx(1) and pattern[:3].min() > 0 > pattern[3:].max()
    assert pattern[1].argmax() == 3 and torch.allclose(pattern, pattern.flip(1))


def test_one_pixel_images_and_two_classes():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).double().requires_grad_(False)
    x, keys = torch.rand(4, 3, 1, 1, dtype=torch.float64), image_keys(0, 0, torch.arange(4))
    y = net(x).argmax(1)
    for attack in ANY.values():
        for norm in ("linf", "l2"):
            x_adv, at = attack(objective_of(net, margin), x, y, eps=.3, norm=norm, keys=keys)
            assert torch.isfinite(x_adv).all() and torch.equal(net(x_adv).argmax(1) != y, at >= 0)


@pytest.mark.parametrize("seed", range(30))
def test_any_attack_on_anything_keeps_its_promises(seed):
    """Random sizes, classes, balls, steps and attacks; networks that are smooth, flat, steep or blind; images
    at the edges of the pixel range: inside the ball and [0,1], the facts true of the pixels, x as it was, the
    same twice."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    n, classes, (h, w) = rng.randint(1, 6), rng.randint(2, 7), (rng.randint(1, 9), rng.randint(1, 9))
    norm, names = rng.choice(["linf", "l2"]), rng.sample([*ATTACKS], rng.randint(1, 3))
    eps = rng.choice([0., .5, 8., 60., 255., 900.]) / 255
    weights = torch.randn(3 * h * w, classes, generator=gen) * rng.choice([0, 1e-8, 1, 1e4])
    # sign: no gradient anywhere
    kink = rng.choice([torch.tanh, torch.relu, lambda z: z, torch.sign])

    def net(x):
        return kink((x - .5).flatten(1) @ weights) + .1
    x = (torch.rand(n, 3, h, w, generator=gen) * rng.choice([1, 3]) - rng.choice([0, 1])).clamp(0, 1)
    head, index, before = torch.eye(classes), torch.randint(9999, (n,), generator=gen), x.clone()
    y = predict(net, head, 10., x)
    options = {"names": defined(names, classes), "eps": eps, "steps": rng.randint(1, 12), "norm": norm,
               "step_size": rng.choice([.0004, eps / 3 + .0004, 4]), "queries": rng.randint(1, 15),
               "restarts": rng.randint(1, 2)}
    x_adv, predicted, broken_by, at, forward_passes, *_ = run_attacks(net, head, 10., x, y, index, **options)
    assert torch.equal(x, before) and x_adv.shape == x.shape and x_adv.dtype == torch.float32
    assert x_adv.isfinite().all() and 0 <= x_adv.min() and x_adv.max() <= 1 and not x_adv.requires_grad
    delta = (x_adv.double() - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps * (1 + 1e-5) + 1e-7).all()
    assert torch.equal(predicted, predict(net, head, 10., x_adv))
    assert torch.equal(broken_by >= 0, predicted != y)
    assert torch.equal(at >= 0, broken_by >= 0) and (forward_passes >= 1).all()
    again = run_attacks(net, head, 10., x, y, index, **options)
    assert torch.equal(x_adv, again[0]) and torch.equal(broken_by, again[2])
