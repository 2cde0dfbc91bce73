"""kernels/: PyTorch references against independent formulas, Triton kernels against these and float64."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import kernels
from attacks import image_keys, pgd
from kernels.contrastive_loss import (
    contrast,
    contrastive_log_odds,
    contrastive_loss,
    cosine_logits,
    fused_contrast,
    log_odds,
)
from kernels.pgd_step import fused_pgd_step, l2_norm, pgd_step, reference
from kernels.random_start import linf_start, random_start, uniform


def random_case(batch, classes, width, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, width, generator=gen, dtype=dtype) * 7
    head = F.normalize(torch.randn(classes, width, generator=gen, dtype=dtype), dim=-1)
    return z, head, torch.randint(classes, (batch,), generator=gen)


def test_cosine_logits_are_scaled_cosines_whatever_the_length_of_z():
    z, head, _ = random_case(3, 5, 7)
    expected = [[20 * sum(a * b for a, b in zip(zi, w)) / math.sqrt(sum(a * a for a in zi))
                 for w in head.tolist()] for zi in z.tolist()]
    assert torch.allclose(cosine_logits(z, head, 20.), torch.tensor(expected), atol=1e-4)
    assert torch.allclose(cosine_logits(1e-3 * z, head, 20.), cosine_logits(z, head, 20.), atol=1e-4)
    assert cosine_logits(z.bfloat16(), head, 20.).dtype == torch.float32


@pytest.mark.parametrize("batch,classes", [(1, 2), (5, 3), (7, 101)])
def test_losses_against_probabilities_in_float64(batch, classes):
    z, head, y = random_case(batch, classes, 16)
    s = 30 * F.normalize(z.double(), dim=-1) @ head.double().T
    p = (s.exp() / s.exp().sum(1, keepdim=True))[range(batch), y]
    assert torch.allclose(contrastive_loss(z, head, y, 30.)[0].double(), -p.log(), atol=1e-4)
    assert torch.allclose(contrastive_log_odds(z, head, y, 30.).double(), ((1 - p) / p).log(), atol=1e-4)


def test_log_odds_gradient_by_finite_differences_and_its_relation_to_cross_entropy():
    s = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 5, 2, 2])
    torch.autograd.gradcheck(lambda s: log_odds(s, y), s)
    m = log_odds(s, y)
    cross_entropy = F.cross_entropy(s, y, reduction="none")
    assert torch.allclose(cross_entropy, F.softplus(m))
    (g_ce,), (g_m,) = (torch.autograd.grad(loss.sum(), s, retain_graph=True) for loss in (cross_entropy, m))
    assert torch.allclose(g_ce, m.sigmoid()[:, None] * g_m)


@pytest.mark.parametrize("logit_scale", [20., 100., 1000.])
def test_log_odds_do_not_saturate_where_cross_entropy_does(logit_scale):
    """On a confident prediction the gradient in fp32 is that of float64, in size and direction."""
    y = torch.tensor([1])
    cosines = torch.tensor([[-.3, .9, -.2, -.25]])

    def gradient(loss, dtype):
        s = cosines.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(logit_scale * s, y).sum(), s)[0].double()

    exact, single = (gradient(log_odds, dtype) for dtype in (torch.float64, torch.float32))
    assert (exact - single).norm() / exact.norm() < 1e-4
    assert single.abs().max() == pytest.approx(logit_scale, rel=1e-4)
    # the reason for all this: here cross-entropy gives exactly zero
    if logit_scale >= 100:
        assert gradient(F.cross_entropy, torch.float32).abs().max() == 0


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
    # far from 0 and 1: no clamp
    x = torch.rand(4, 3, 5, 5, generator=gen) * .2 + .4
    grad = torch.randn(x.shape, generator=gen) * torch.tensor([1e-30, 1., 1e12, 0.]).view(4, 1, 1, 1)
    short, long = pgd_step(x, grad, x, .5, .1, "l2"), pgd_step(x, grad, x, .1, .5, "l2")
    # along the gradient, whatever its size
    for i in range(3):
        direction = (grad[i].double() / grad[i].double().norm()).float()
        assert torch.allclose(short[i] - x[i], .1 * direction, atol=1e-6)
        # projected back onto the ball
        assert torch.allclose(long[i] - x[i], .1 * direction, atol=1e-6)
    # no gradient, no step
    assert torch.equal(short[3], x[3])
    assert torch.allclose(l2_norm(grad[1:3]).flatten(), grad[1:3].flatten(1).norm(dim=1))


# ------------------------------------------------------------------------------ the Triton kernels
def pixels(shape, device, uint8=False, seed=0):
    """An image batch, an iterate within 0.02 of it and a gradient with zeros, for a PGD step."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(256, shape, generator=gen, dtype=torch.uint8)
    start = (x / 255 + .04 * (torch.rand(shape, generator=gen) - .5)).clamp(0, 1)
    grad = torch.randn(shape, generator=gen) * (torch.rand(shape, generator=gen) > .1)
    return start.to(device), grad.to(device), (x if uint8 else x / 255).to(device)


SHAPES = [(1, 3, 5, 7), (3, 3, 33, 31), (2, 49, 75), (5, 1), (0, 3, 4, 4), (1, 3, 40, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("uint8", [False, True])
def test_linf_kernel_gives_the_references_bits(triton_on, shape, uint8):
    x_adv, grad, x = pixels(shape, triton_on, uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = pgd_step(x_adv, grad.to(dtype), x, 8 / 255, .013)
        assert torch.equal(got, reference(x_adv, grad.to(dtype), x, 8 / 255, .013, "linf"))
        assert got.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_l2_kernel_against_the_reference_in_float64(triton_on, shape):
    for eps, step_size in ((.5, .1), (.1, .5), (30., 7.), (0., .1)):
        for uint8 in (False, True):
            x_adv, grad, x = pixels(shape, triton_on, uint8)
            exact = x.double() / 255 if uint8 else x.double()
            truth = reference(x_adv.double(), grad.double(), exact, eps, step_size, "l2")
            got = pgd_step(x_adv, grad, x, eps, step_size, "l2").double()
            assert torch.allclose(got, truth, rtol=0, atol=3e-7)


def test_l2_kernel_on_gradients_of_any_size(triton_on):
    x_adv, grad, x = pixels((5, 3, 9, 9), triton_on)
    sizes = torch.tensor([1e-30, 1., 1e30, 0., 1e-4]).view(-1, 1, 1, 1).to(triton_on)
    unit = pgd_step(x_adv, grad, x, .5, .1, "l2")
    got = pgd_step(x_adv, grad * sizes, x, .5, .1, "l2")
    assert torch.allclose(got[[0, 1, 2, 4]], unit[[0, 1, 2, 4]], rtol=0, atol=1e-6)
    assert torch.equal(got[3], pgd_step(x_adv[3:4], 0 * grad[3:4], x[3:4], .5, .1, "l2")[0])
    # no gradient, no step
    assert torch.allclose(got[3], x_adv[3], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
# numpy's, in the interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_in_the_gradient_is_not_hidden(triton_on, norm):
    x_adv, grad, x = pixels((2, 3, 4, 4), triton_on)
    grad[1, 2, 3, 3] = math.nan
    got = pgd_step(x_adv, grad, x, .1, .05, norm)
    assert got[1, 2, 3, 3].isnan() and not got[0].isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("uint8", [False, True])
def test_random_start_kernel_gives_the_references_bits(triton_on, shape, uint8):
    x = pixels(shape, triton_on, uint8)[2]
    keys = image_keys(3, 1, torch.arange(len(x), device=triton_on) * 1000)
    noise = (2 * uniform(keys, shape[1:]) - 1) * (8 / 255)
    expected = ((x.float() / 255 if uint8 else x) + noise).clamp(0, 1)
    got = random_start(x, 8 / 255, "linf", keys)
    assert torch.equal(got, expected) and got.dtype == torch.float32
    assert len(x) == 0 or not torch.equal(got, x)


def test_kernels_on_strided_inputs(triton_on):
    x_adv, grad, x = pixels((4, 3, 6, 10), triton_on)
    expected = {norm: pgd_step(x_adv, grad, x, .03, .01, norm) for norm in ("linf", "l2")}
    keys = image_keys(0, 0, torch.arange(4, device=triton_on))
    start = random_start(x, .03, "linf", keys)
    # stride 2
    wide = torch.stack([keys, keys], 1)[:, 0]
    for way in (lambda t: t.contiguous(memory_format=torch.channels_last),
                lambda t: t.repeat(1, 1, 1, 2)[..., :10],
                lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), lambda t: t.flip(0).flip(0)):
        for norm, result in expected.items():
            assert torch.equal(pgd_step(way(x_adv), grad, way(x), .03, .01, norm), result)
            assert torch.equal(pgd_step(x_adv, way(grad), x, .03, .01, norm), result)
        assert torch.equal(random_start(way(x), .03, "linf", wide), start)
    z, head, y = (t.to(triton_on) for t in random_case(6, 9, 20))
    result = contrast(z, head, y, 50.)
    strided = contrast(z.T.contiguous().T, head.repeat(1, 2)[:, :20], torch.stack([y, y], 1)[:, 1], 50.)
    assert all(map(torch.equal, strided, result))
    assert torch.equal(contrast(z[:1].expand(3, 20), head, y[:1].expand(3), 50.)[0], result[0][:1].expand(3))


@pytest.mark.parametrize("batch,classes,width", [(1, 2, 16), (5, 3, 7), (37, 101, 33), (33, 16, 64),
                                                 (2, 700, 512), (3, 40, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contrast_kernel_against_float64(triton_on, batch, classes, width, dtype):
    # the interpreter, which is slow, computes in fp32 whatever the dtype
    for logit_scale in (20., 100., 1000.) if triton_on == "cuda" or dtype == torch.float32 else (100.,):
        z, head, y = random_case(batch, classes, width, seed=classes)
        z, head, y = z.to(triton_on, dtype).requires_grad_(), head.to(triton_on, dtype), y.to(triton_on)
        exact = z.detach().double().requires_grad_()
        logits = logit_scale * F.normalize(exact, dim=-1) @ head.double().T
        truth = log_odds(logits, y)
        (true_grad,) = torch.autograd.grad(truth.sum(), exact)
        m, predicted = contrast(z, head, y, logit_scale)
        (grad,) = torch.autograd.grad(m.sum(), z)
        # nothing to differentiate: the same numbers
        with torch.no_grad():
            without = contrast(z, head, y, logit_scale)
        assert torch.equal(without[0], m) and torch.equal(without[1], predicted)
        # no worse than the same arithmetic in PyTorch
        if triton_on == "cuda" and dtype != torch.float32:
            plain = (F.normalize(z.detach(), dim=-1) @ head.T).double() * logit_scale
            allowed = 1.5 * (log_odds(plain, y) - truth).abs().max() + 1e-3 * logit_scale
            assert (m - truth).abs().max() <= allowed
            assert (grad - true_grad).norm() / true_grad.norm() < .05
            continue
        assert (m - truth).abs().max() < 1e-6 * logit_scale + 1e-5
        assert (predicted == logits.argmax(1)).all() and predicted.dtype == torch.int64
        # of the gradient itself
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -10}[dtype]
        assert (grad - true_grad).norm() / true_grad.norm() < rounding and grad.dtype == dtype


def test_contrast_kernel_saves_what_backward_needs_per_image(triton_on):
    z, head, y = (t.to(triton_on) for t in random_case(9, 12, 24))
    weights = torch.linspace(-1, 2, 9, device=triton_on)
    assert not fused_contrast(z.clone().requires_grad_(), head, y, 30., True)[2].requires_grad
    grads = []
    for which in ("triton" if kernels.choice == "triton" else "auto", "torch"):
        kernels.use(which, torch.device(triton_on))
        leaf = z.clone().requires_grad_()
        loss, predicted = contrastive_loss(leaf, head, y, 30.)
        (weights * loss).sum().backward()
        grads.append(leaf.grad)
        logits = cosine_logits(z, head, 30.)
        assert torch.allclose(loss, F.cross_entropy(logits, y, reduction="none"), atol=1e-4)
        assert torch.equal(predicted, logits.argmax(1))
    assert torch.allclose(*grads, atol=1e-5)


def test_contrast_kernel_predicts_the_lowest_of_equal_classes(triton_on):
    # several blocks to each share, several shares
    z, head, _ = (t.to(triton_on) for t in random_case(4, 400, 16))
    head[[5, 30, 90, 390]] = F.normalize(z[0], dim=-1)
    for y in (0, 5, 30, 90, 390):
        _, predicted = contrast(z[:1], head, torch.tensor([y], device=triton_on), 100.)
        assert predicted.item() == 5


def test_contrast_kernel_where_a_block_holds_the_true_class_alone(triton_on):
    z, head, _ = (t.to(triton_on) for t in random_case(2, 65, 16))
    for classes in (17, 33, 65):
        y = torch.full((2,), classes - 1, device=triton_on)
        m, _ = contrast(z, head[:classes], y, 50.)
        assert torch.allclose(m, log_odds(cosine_logits(z, head[:classes], 50.), y), atol=1e-4)


def test_a_head_that_trains_gets_its_gradient(triton_on):
    z, head, y = (t.to(triton_on) for t in random_case(3, 5, 16))
    head.requires_grad_()
    (grad,) = torch.autograd.grad(contrastive_log_odds(z, head, y, 10.).sum(), head)
    assert grad.isfinite().all() and grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_contrast_kernel_on_features_that_are_zero_or_nan(triton_on):
    z, head, y = (t.to(triton_on) for t in random_case(3, 5, 16))
    z[1], z[2, 3] = 0, math.nan
    z.requires_grad_()
    m, _ = contrast(z, head, y, 10.)
    (grad,) = torch.autograd.grad(m.sum(), z)
    assert m[1].item() == pytest.approx(math.log(4), abs=1e-5)
    assert grad[:2].isfinite().all() and grad[1].abs().max() > 0
    assert m[2].isnan() and grad[2].isnan().all() and m[0].isfinite()


def test_contrast_on_features_too_wide_for_a_processor(triton_on):
    z, head, y = (t.to(triton_on) for t in random_case(3, 5, 5000))
    m, predicted = contrast(z, head, y, 10.)
    logits = cosine_logits(z, head, 10.)
    assert torch.allclose(m, log_odds(logits, y), atol=1e-5) and torch.equal(predicted, logits.argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_whole_attack_is_the_same_with_kernels_and_without(triton_on, norm):
    torch.manual_seed(0)
    w = torch.randn(48, 20, device=triton_on)
    x = pixels((7, 3, 4, 4), triton_on, uint8=True)[2]
    head, index = F.normalize(torch.randn(6, 20, device=triton_on), dim=-1), torch.arange(7, device=triton_on)
    found = []

    def objective(x, y):
        return contrastive_log_odds(x.flatten(1) @ w, head, y, 100.)
    for which in (kernels.choice, "torch"):
        kernels.use(which, torch.device(triton_on))
        found.append(pgd(objective, x, index % 6, eps=.1, steps=5, step_size=.03, norm=norm,
                         keys=image_keys(0, 0, index)))
    assert torch.allclose(*found, atol=1e-5) and (found[0] - x / 255).abs().max() > .03


@pytest.mark.parametrize("with_triton", [True, False])
def test_operators_pass_opcheck(triton_on, with_triton, monkeypatch):
    if not with_triton:
        triton_on = "cpu"
        for module in ("contrastive_loss", "pgd_step", "random_start"):
            monkeypatch.setattr(f"kernels.{module}.INTERPRET", False)
    x_adv, grad, x = pixels((3, 3, 5, 6), triton_on, uint8=True)
    keys = torch.arange(3, device=triton_on)
    z, head, y = (t.to(triton_on) for t in random_case(5, 7, 20))
    for norm in ("linf", "l2"):
        images = [t.transpose(2, 3) for t in (x_adv, grad, x)]
        torch.library.opcheck(fused_pgd_step, (*images, .1, .1, norm))
    torch.library.opcheck(linf_start, (x.transpose(2, 3), keys, .1))
    for leaf in (z.clone().requires_grad_(), z.bfloat16().requires_grad_()):
        torch.library.opcheck(fused_contrast, (leaf, head.T.contiguous().T, y, 50., True))
    torch.library.opcheck(fused_contrast, (z, head, y, 50., False))


def test_operators_compile_into_one_graph(triton_on):
    x_adv, _, x = pixels((4, 3, 4, 4), triton_on)
    head = F.normalize(torch.randn(6, 48, device=triton_on), dim=-1)
    y, keys = torch.arange(4, device=triton_on), torch.arange(4, device=triton_on)

    # operators alone: nothing for a C++ compiler, which takes ten seconds
    def step(x, y, keys):
        start = random_start(x, .1, "linf", keys)
        m, predicted = contrast(start.flatten(1), head, y, 50.)
        return pgd_step(start, x, x, .1, .03), m, predicted

    compiled = torch.compile(step, fullgraph=True)
    for left, right in zip(compiled(x, y, keys), step(x, y, keys)):
        assert torch.allclose(left, right, atol=1e-5)

    def log_odds_of(z):
        return contrastive_log_odds(2 * z, head, y, 50.)
    backend = "inductor" if triton_on == "cuda" else "aot_eager"
    compiled, z = torch.compile(log_odds_of, fullgraph=True, backend=backend), x.flatten(1).requires_grad_()
    (grad,), (expected,) = (torch.autograd.grad(f(z).sum(), z) for f in (compiled, log_odds_of))
    assert torch.allclose(grad, expected, atol=1e-4)


@pytest.mark.cuda
def test_a_sweep_over_many_classes_never_holds_their_logits():
    batch, classes, width = 512, 200_000, 64
    z = torch.randn(batch, width, device="cuda").requires_grad_()
    head = torch.randn(classes, width, device="cuda")
    y = torch.arange(batch, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contrastive_log_odds(z, head, y, 100.).sum().backward()
    # a quarter of the logits in fp32
    assert torch.cuda.max_memory_allocated() - before < batch * classes


COMPILE = """
import torch, triton, triton.language as tl
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import contrastive_loss as c, pgd_step as p, random_start as r

def compiled(kernel, capability, types, stages=1, **constants):
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32")
                 for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    options = {"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

types = {"y_ptr": "*i64", "best_ptr": "*i32", "logit_scale": "fp32"}

def tile(size):
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(shared_memory_per_block_optin=memory)
    return c.blocks(SimpleNamespace(is_cuda=True, device=None, element_size=lambda: size), 512)

def sweep(head, dtype, rows, cols, precision="tf32", grad=True, stages=1):
    k = compiled(c.sweep_kernel, capability, types | {"head_ptr": head}, stages, PER=4, ROWS=rows, COLS=cols,
                 WIDTH=512, GRAD=grad, DTYPE=dtype, PRECISION=precision)
    assert k.metadata.shared <= memory, (capability, head, precision, grad, k.metadata.shared)
    return k.asm["ptx"]

# shared memory per block: CUDA programming guide
for capability, memory in ((80, 166_912), (86, 101_376), (90, 232_448)):
    single = sweep("*fp32", tl.float32, *tile(4))
    mixed = sweep("*bf16", tl.bfloat16, *tile(2), stages=2)
    assert "mma" in single and "mma" in mixed, "not on the tensor cores"

# the rest where there is the least memory
capability, memory = 86, 101_376
sweep("*fp32", tl.float32, 16, 16, precision="ieee")
sweep("*fp16", tl.float16, 16, 16, stages=2)
sweep("*fp32", tl.float32, 16, 16, grad=False)
compiled(c.combine_kernel, capability, types | {"predicted_ptr": "*i64"}, SHARES=4, WIDTH=512, GRAD=True)
steps = {"x_ptr": "*u8", "eps": "fp32", "step_size": "fp32", "grad_ptr": "*bf16", "sums_ptr": "*fp64"}
compiled(p.linf_kernel, capability, steps, UINT8=True, BLOCK=1024)
compiled(p.l2_sums_kernel, capability, steps, UINT8=True, BLOCK=4096)
compiled(p.l2_step_kernel, capability, steps, UINT8=True, BLOCK=4096, CHUNKS=64)
compiled(r.start_kernel, capability, steps | {"keys_ptr": "*i64"}, GOLDEN=r.GOLDEN, FACTOR1=r.FACTOR1,
         FACTOR2=r.FACTOR2, UINT8=True, BLOCK=1024)
print("compiled")
"""


def test_kernels_compile_for_gpus_that_are_not_here():
    """For an A100, an RTX 30, an H100: to machine code, on the tensor cores, within their shared memory."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


def test_the_choice_of_kernels():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    try:
        kernels.use("torch", cpu)
        assert not kernels.fused(torch.zeros(1))
        kernels.use("triton", gpu)
        kernels.use("auto", cpu)
        # interpreted only when asked for
        assert not kernels.fused(torch.zeros(1))
    finally:
        kernels.use("auto", cpu)
