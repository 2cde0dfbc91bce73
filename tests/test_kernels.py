"""kernels/: the PyTorch references, against independent formulas."""
import math

import pytest
import torch

from kernels.contrastive_loss import contrastive_log_odds, contrastive_loss, cosine_logits, log_odds
from kernels.pgd_step import l2_norm, pgd_step


def random_case(batch, classes, width, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, width, generator=gen, dtype=dtype) * 7
    head = torch.nn.functional.normalize(torch.randn(classes, width, generator=gen, dtype=dtype), dim=-1)
    return z, head, torch.randint(classes, (batch,), generator=gen)


def test_cosine_logits_are_scaled_cosines_whatever_the_length_of_z():
    z, head, _ = random_case(3, 5, 7)
    expected = [[20 * sum(a * b for a, b in zip(zi, w)) / math.sqrt(sum(a * a for a in zi)) for w in head.tolist()]
                for zi in z.tolist()]
    assert torch.allclose(cosine_logits(z, head, 20.), torch.tensor(expected), atol=1e-4)
    assert torch.allclose(cosine_logits(1e-3 * z, head, 20.), cosine_logits(z, head, 20.), atol=1e-4)
    assert cosine_logits(z.bfloat16(), head, 20.).dtype == torch.float32


@pytest.mark.parametrize("batch,classes", [(1, 2), (5, 3), (7, 101)])
def test_losses_against_probabilities_in_float64(batch, classes):
    z, head, y = random_case(batch, classes, 16)
    s = 30 * torch.nn.functional.normalize(z.double(), dim=-1) @ head.double().T
    p = (s.exp() / s.exp().sum(1, keepdim=True))[range(batch), y]
    assert torch.allclose(contrastive_loss(z, head, y, 30.).double(), -p.log(), atol=1e-4)
    assert torch.allclose(contrastive_log_odds(z, head, y, 30.).double(), ((1 - p) / p).log(), atol=1e-4)


def test_log_odds_gradient_by_finite_differences_and_its_relation_to_cross_entropy():
    s = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 5, 2, 2])
    torch.autograd.gradcheck(lambda s: log_odds(s, y), s)
    m = log_odds(s, y)
    cross_entropy = torch.nn.functional.cross_entropy(s, y, reduction="none")
    assert torch.allclose(cross_entropy, torch.nn.functional.softplus(m))
    (g_ce,), (g_m,) = (torch.autograd.grad(loss.sum(), s, retain_graph=True) for loss in (cross_entropy, m))
    assert torch.allclose(g_ce, m.sigmoid()[:, None] * g_m)


@pytest.mark.parametrize("scale", [20., 100., 1000.])
def test_log_odds_do_not_saturate_where_cross_entropy_does(scale):
    """On a confident prediction the gradient in fp32 is that of float64, in size and direction, at every scale."""
    y = torch.tensor([1])
    cosines = torch.tensor([[-.3, .9, -.2, -.25]])

    def gradient(loss, dtype):
        s = cosines.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(scale * s, y).sum(), s)[0].double()

    exact, single = (gradient(log_odds, dtype) for dtype in (torch.float64, torch.float32))
    assert (exact - single).norm() / exact.norm() < 1e-4
    assert single.abs().max() == pytest.approx(scale, rel=1e-4)
    if scale >= 100:                                # the reason for all this: here cross-entropy gives exactly zero
        assert gradient(torch.nn.functional.cross_entropy, torch.float32).abs().max() == 0


def test_linf_step_pixel_by_pixel():
    gen = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 5, 7, generator=gen)
    x_adv = (x + .1 * (torch.rand(x.shape, generator=gen) - .5)).clamp(0, 1)
    grad = torch.randn(x.shape, generator=gen)
    grad[0, 0] = 0
    got = pgd_step(x_adv, grad, x, .05, .02)
    for a, g, o, r in zip(*(t.flatten().tolist() for t in (x_adv, grad, x, got))):
        step = a + .02 * ((g > 0) - (g < 0))
        assert r == pytest.approx(min(max(min(max(step, o - .05), o + .05), 0), 1), abs=1e-6)


def test_l2_step_image_by_image():
    gen = torch.Generator().manual_seed(2)
    x = torch.rand(4, 3, 5, 5, generator=gen) * .2 + .4                     # far from 0 and 1: no clamp
    grad = torch.randn(x.shape, generator=gen) * torch.tensor([1e-30, 1., 1e12, 0.]).view(4, 1, 1, 1)
    short, long = pgd_step(x, grad, x, .5, .1, "l2"), pgd_step(x, grad, x, .1, .5, "l2")
    for i in range(3):                                                       # along the gradient, whatever its size
        direction = (grad[i].double() / grad[i].double().norm()).float()
        assert torch.allclose(short[i] - x[i], .1 * direction, atol=1e-6)
        assert torch.allclose(long[i] - x[i], .1 * direction, atol=1e-6)     # projected back onto the ball
    assert torch.equal(short[3], x[3])                                       # no gradient, no step
    assert torch.allclose(l2_norm(grad[1:3]).flatten(), grad[1:3].flatten(1).norm(dim=1))
