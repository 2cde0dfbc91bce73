"""attacks.py: worked by hand, constraints, and independence of everything that should not matter."""
import pytest
import torch
from torch import nn

from attacks import cw, cw_margin, image_keys, pgd, random_start
from kernels.random_start import uniform
from kernels.contrastive_loss import log_odds


def network(dtype=torch.float64, classes=5):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(8 * 3 * 3, classes))
    return net.to(dtype).requires_grad_(False)


def test_pgd_worked_by_hand_on_a_linear_model():
    """Loss 3a − 2b + 0c from (0.50, 0.10, 0.90), ε = 0.25, steps of 0.1."""
    w = torch.tensor([3., -2., 0.])
    visited = []

    def loss_fn(x, y):
        visited.append(x.detach().clone())
        return x @ w

    x = torch.tensor([[.5, .1, .9]])
    result = pgd(loss_fn, x, None, eps=.25, steps=4, step_size=.1)
    expected = [[.5, .1, .9], [.6, 0., .9], [.7, 0., .9], [.75, 0., .9], [.75, 0., .9]]     # b stops at 0, a at x + ε
    assert torch.allclose(torch.cat([*visited, result]), torch.tensor(expected), atol=1e-6)
    assert not result.requires_grad
    (l2,) = pgd(loss_fn, x, None, eps=.13, steps=2, step_size=.065, norm="l2")
    assert torch.allclose(l2, x[0] + .13 * w / 13 ** .5, atol=1e-6)                         # both steps along w


@pytest.mark.parametrize("norm,eps", [("linf", 8 / 255), ("linf", .7), ("l2", .5), ("l2", 30.), ("linf", 0.), ("l2", 0.)])
def test_result_lies_in_the_ball_and_in_the_pixel_range(norm, eps):
    net = network(torch.float32)
    gen = torch.Generator().manual_seed(3)
    x = torch.rand(9, 3, 7, 7, generator=gen)
    x[0], x[1], x[2] = 0, 1, x[2].round()
    y = torch.randint(5, (9,), generator=gen)
    keys = image_keys(0, 0, torch.arange(9))
    for steps in (1, 5):
        x_adv = pgd(lambda x, y: log_odds(net(x), y), x, y, eps=eps, steps=steps, step_size=eps / 2, norm=norm, keys=keys)
        delta = x_adv - x
        size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
        assert size.max() <= eps + 1e-6 * max(1, eps)
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        start = random_start(x, eps, norm, keys)
        assert eps == 0 or log_odds(net(x_adv), y).mean() > log_odds(net(start), y).mean()  # and went somewhere


def test_each_image_gets_the_same_result_in_any_batch():
    net = network()
    gen = torch.Generator().manual_seed(4)
    x = torch.rand(64, 3, 7, 7, generator=gen, dtype=torch.float64)
    y = torch.randint(5, (64,), generator=gen)
    keys = image_keys(5, 1, torch.arange(64))

    def attack(part):
        return pgd(lambda x, y: log_odds(net(x), y), x[part], y[part], eps=.03, steps=5, step_size=.01, keys=keys[part])

    whole = attack(slice(None))
    for size in (1, 7, 64):
        parts = torch.cat([attack(slice(i, i + size)) for i in range(0, 64, size)])
        assert torch.allclose(parts, whole, rtol=0, atol=1e-12)
    order = torch.randperm(64, generator=gen)
    assert torch.allclose(attack(order), whole[order], rtol=0, atol=1e-12)


def test_the_sum_over_the_batch_is_differentiated_and_with_respect_to_the_pixels_alone():
    net = network(torch.float32).requires_grad_(True)
    x, y = torch.rand(6, 3, 7, 7), torch.arange(6) % 5
    weights_of_images = []

    def loss_fn(x, y):
        loss = log_odds(net(x), y)
        loss.register_hook(weights_of_images.append)
        return loss

    x_adv = pgd(loss_fn, x, y, eps=.03, steps=2, step_size=.01)
    assert len(weights_of_images) == 2 and all((w == 1).all() for w in weights_of_images)
    assert all(p.grad is None for p in net.parameters())
    assert not (x.requires_grad or x_adv.requires_grad)


def test_the_start_is_the_random_start_of_the_keys():
    x, keys = torch.rand(5, 3, 7, 7), image_keys(1, 2, torch.arange(5))
    net = network(torch.float32)
    for norm, eps in (("linf", .1), ("l2", 1.)):
        stayed = pgd(lambda x, y: net(x).sum(1), x, None, eps=eps, steps=1, step_size=0., norm=norm, keys=keys)
        assert torch.allclose(stayed, random_start(x, eps, norm, keys), atol=1e-6)
        assert not torch.allclose(stayed, x, atol=1e-3)


def test_attack_raises_the_loss_and_more_steps_raise_it_further():
    net = network(torch.float32)
    gen = torch.Generator().manual_seed(6)
    x = torch.rand(32, 3, 7, 7, generator=gen)
    y = net(x).argmax(1)

    def loss(x):
        return log_odds(net(x), y).mean().item()

    one, ten = (loss(pgd(lambda x, y: log_odds(net(x), y), x, y, eps=.05, steps=s, step_size=.1 / s)) for s in (1, 10))
    noise = loss(random_start(x, .05, "linf", image_keys(0, 0, torch.arange(32))))
    assert loss(x) - .05 < noise < one < ten + 1e-4


def test_random_start_depends_on_seed_round_and_image_alone():
    index = torch.tensor([3, 141, 1_200_000])
    keys = image_keys(7, 2, index)
    assert torch.equal(image_keys(7, 2, index[1:2]), keys[1:2])
    assert len({k for s in range(5) for r in range(5) for k in image_keys(s, r, torch.arange(100)).tolist()}) == 2500
    u = uniform(keys, (3, 8, 8))
    assert torch.equal(uniform(keys[1:2], (3, 8, 8)), u[1:2])
    assert not torch.equal(uniform(keys, (3, 8, 8), stream=1), u)


def test_uniform_is_uniform_and_unrelated_between_images():
    u = uniform(image_keys(0, 0, torch.arange(40)), (5000,))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 10_000).abs() < 500).all()                                           # 5 standard deviations
    correlation = torch.corrcoef(u) - torch.eye(40)
    assert correlation.abs().max() < .08
    assert torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1].abs() < .02


def test_l2_start_is_uniform_in_the_ball():
    keys = image_keys(0, 0, torch.arange(20_000))
    delta = random_start(torch.full((20_000, 3), .5), .3, "l2", keys) - .5
    radius = delta.norm(dim=1) / .3
    assert radius.max() <= 1 + 1e-5
    assert ((radius < .5).float().mean() - .5 ** 3).abs() < .015                           # volume ∝ radius³
    assert (delta.mean(0).abs() < .005).all()
    assert (delta.T @ delta / 20_000 - torch.eye(3) * .3 ** 2 / 5).abs().max() < .001      # E r²/3 = ε²·(3/5)/3


def test_cw_margin_by_hand():
    logits = torch.tensor([[10., 2., 4.], [0., 1., 99.], [-5., -6., -7.]])
    y = torch.tensor([0, 0, 2])
    assert cw_margin(logits, y).tolist() == [-(10 - 4 + 50), -0., -(-7 + 5 + 50)]          # the second is broken beyond κ
    assert cw_margin(logits, y, kappa=0.).tolist() == [-6., 0., 0.]


def test_cw_raises_the_margin_of_the_best_wrong_class():
    net = network(torch.float32)
    x = torch.rand(16, 3, 7, 7, generator=torch.Generator().manual_seed(8))
    y = net(x).argmax(1)
    x_adv = cw(net, x, y, eps=.05, steps=5, step_size=.02, keys=image_keys(0, 0, torch.arange(16)))

    def lead(x):
        s = net(x)
        return s[range(16), y] - s.scatter(1, y[:, None], -9e9).amax(1)
    assert (lead(x_adv) < lead(x)).all()
