"""What the attack ascends and the update minimises: one function for each published loss.

    loss = LOSSES["tecoa"].make(encoder, head, logit_scale)
    target = loss.target(x, y, keys)
    x_adv = pgd(partial(loss.inner, loss.net), x, target, …)    # inner maximisation
    losses, predicted = loss.outer(net, x_adv, target, x)       # outer minimisation; net: loss.net or its DDP

encoder: images [B,3,H,W] in [0,1] → features z fp32 [B, D]; head: unit text embeddings [K, D]; logit_scale:
1/τ, CLIP's own, never trained. x: uint8 [B,3,H,W]; y: labels int64 [B]; keys: int64 [B], see
`attacks.image_keys`. A network is always an argument: attack, DDP, torch.compile and a frozen copy need no
special case. What a loss ascends is not always what it minimises: a cross-entropy's attack follows its
log-odds, which have the same direction and do not vanish (kernels/contrastive_loss.py). A new loss is a
function here and a line in LOSSES."""
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kernels.contrastive_loss import contrastive_log_odds, contrastive_loss, cosine_logits, log_odds
from kernels.pgd_step import to_float
from kernels.random_start import uniform


class Loss(NamedTuple):
    net: nn.Module                              # the encoder, or it and a linear head
    inner: Callable                             # (net, x_adv, target) → [B]: what the attack ascends
    outer: Callable                             # (net, x_adv, target, x) → losses [B], predicted int64 [B]
    target: Callable = lambda x, y, keys: y     # what x_adv is compared with, without a gradient
    linear_head: nn.Module = nn.Identity()      # trained beside the encoder, discarded afterwards


def tecoa(encoder, head, logit_scale):
    """against the class prompts: TeCoA (Mao et al. 2023)

    −log softmax_k(cos(z, w_k)/τ)_y over the text embeddings w_k of all classes."""
    def inner(net, x_adv, y):
        return contrastive_log_odds(net(x_adv), head, y, logit_scale)

    def outer(net, x_adv, y, x):
        return contrastive_loss(net(x_adv), head, y, logit_scale)
    return Loss(encoder, inner, outer)


def with_linear_head(encoder, head, bias, logits_of=lambda z: z):
    """Cross-entropy of logits_of(Az + b). A [K, D] and, with `bias`, b [K] start from PyTorch's seed."""
    net = nn.Sequential(encoder, nn.Linear(head.shape[1], len(head), bias).to(head.device))

    def inner(net, x_adv, y):
        return log_odds(logits_of(net(x_adv)), y)

    def outer(net, x_adv, y, x):
        logits = logits_of(net(x_adv))
        return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1)
    return Loss(net, inner, outer, linear_head=net[1])


def ce(encoder, head, logit_scale):
    """a linear head from scratch: standard adversarial training (Madry et al. 2018), Mao et al.'s baseline

    −log softmax(Az + b)_y. The paper does not say how z is read when there are no texts; we train a linear
    head A, b from scratch and discard it afterwards."""
    return with_linear_head(encoder, head, bias=True)


def coadv(encoder, head, logit_scale):
    """tecoa with one-hot vectors for the texts (Mao et al. 2023)

    −log softmax_k(cos(Pz, e_k)/τ)_y. The paper does not say how z [D] meets the one-hot e_k [K]; we train a
    linear head P from scratch, without bias. cos(Pz, e_k) is the k-th number of Pz/‖Pz‖."""
    return with_linear_head(encoder, head, False, lambda z: logit_scale * F.normalize(z.float(), dim=1))


def random_view(x, keys):
    """Random views: square crops of 36 to 100 % of the area, anywhere, half of them flipped, resampled to the
    image's own size (bilinear). x [B,3,H,W], uint8 or in [0,1] → fp32 in [0,1]; keys int64 [B]."""
    u = uniform(keys, (4,), stream=3)           # streams 0 to 2 are the attack's random start
    side, flip, zero = 1 - .4 * u[:, 0], 1 - 2 * (u[:, 3] < .5).float(), torch.zeros_like(u[:, 0])
    right, down = ((1 - side) * (2 * u[:, i] - 1) for i in (1, 2))   # the crop's centre, in [−1, 1]
    theta = torch.stack([torch.stack([side * flip, zero, right], 1), torch.stack([zero, side, down], 1)], 1)
    grid = F.affine_grid(theta, x.shape, align_corners=False)        # from theta [B, 2, 3]
    return F.grid_sample(to_float(x), grid, padding_mode="border", align_corners=False).clamp(0, 1)


def imgcoadv(encoder, head, logit_scale):
    """two views of an image against the others of the batch, without labels (Mao et al. 2023)

    −log softmax_j(cos(z_i, v_j)/τ)_i, v_j the features of a second view of image j. The paper leaves the rest
    open; our second view is a crop and flip of the clean image, the first is the image itself, and is
    attacked. The v stand where tecoa has its texts, fixed and without gradient: given v, the attack of an
    image depends on its own pixels alone. Negatives: the images of this process in this micro-batch."""
    def target(x, y, keys):
        return F.normalize(encoder(random_view(x, keys)), dim=1)

    def inner(net, x_adv, views):
        own = torch.arange(len(views), device=views.device)
        return contrastive_log_odds(net(x_adv), views, own, logit_scale)

    def outer(net, x_adv, views, x):
        z, own = net(x_adv), torch.arange(len(views), device=views.device)
        losses, _ = contrastive_loss(z, views, own, logit_scale)
        return losses, cosine_logits(z, head, logit_scale).argmax(1)
    return Loss(encoder, inner, outer, target)


def fare(encoder, head, logit_scale):
    """features stay those of the original, without labels: FARE (Schlarmann et al. 2024)

    ‖z − F_original(x)‖², features not normalised. Nothing saturates, so the attack ascends it as it is. At x
    itself, the distance and its gradient are exactly 0: the random start gets the attack going."""
    original = copy.deepcopy(encoder)

    def target(x, y, keys):
        return original(to_float(x))

    def inner(net, x_adv, z_original):
        return (net(x_adv) - z_original).square().sum(1)

    def outer(net, x_adv, z_original, x):
        z = net(x_adv)
        return (z - z_original).square().sum(1), cosine_logits(z, head, logit_scale).argmax(1)
    return Loss(encoder, inner, outer, target)


def pmg(encoder, head, logit_scale):
    """tecoa near its own clean and the original's adversarial prediction: PMG-AFT (Wang et al. 2024)

    tecoa + KL(p_clean ‖ p) + KL(p_original ‖ p): p on the adversarial image, p_clean the same model's on the
    clean one, p_original the original CLIP's on the adversarial one. Directions, weights 1 and 1, gradient to
    p and p_clean, and the attack, on tecoa's term alone, are as in the authors' code. Theirs normalises the
    logit scale away, which leaves a temperature of 1, and sums over the batch; here every term has τ."""
    original, attack = copy.deepcopy(encoder), tecoa(encoder, head, logit_scale).inner

    def outer(net, x_adv, y, x):
        z, z_clean = net(torch.cat([x_adv, to_float(x)])).chunk(2)        # one pass, as DDP wants it
        losses, predicted = contrastive_loss(z, head, y, logit_scale)
        p, *others = (cosine_logits(features, head, logit_scale).log_softmax(1)
                      for features in (z, z_clean, original(x_adv)))
        return losses + sum((q.exp() * (q - p)).sum(1) for q in others), predicted
    return Loss(encoder, attack, outer)


def agft(encoder, head, logit_scale, sharper=1.8, ratio=.4):
    """what the original CLIP, softened, takes the clean image for, without labels: AGFT (Cui et al. 2026)

    −Σ_k q_k log p_k: p the softmax of cos(z, w_k)·1.8/τ on the adversarial image, q the original CLIP's of
    cos·0.4·1.8/τ on the clean one. The attack ascends the same: soft labels have no log-odds. Scales of 180
    and 72 are the command in the authors' README; their code's defaults are 100 and 100."""
    original = copy.deepcopy(encoder)

    def target(x, y, keys):
        return cosine_logits(original(to_float(x)), head, ratio * sharper * logit_scale).softmax(1)

    def outer(net, x_adv, q, x):
        logits = cosine_logits(net(x_adv), head, sharper * logit_scale)
        return F.cross_entropy(logits, q, reduction="none"), logits.argmax(1)

    def inner(net, x_adv, q):
        return outer(net, x_adv, q, None)[0]
    return Loss(encoder, inner, outer, target)


def tga(encoder, head, logit_scale, alpha=.08, beta=.05):
    """tecoa, where the true class's attention map stays the original CLIP's: TGA-ZSR (Yu et al. 2024)

    tecoa + 0.08·‖A(x_adv) − A_original(x)‖₂ + 0.05·‖A(x) − A_original(x)‖₂, norms over the map's pixels; the
    attack ascends tecoa's term alone. A: patch features times the true class's text, scaled to [0,1] in each
    image, resampled to its size. All as in the authors' code, which normalises each feature over the image's
    tokens, not each token's features; and norms of whole maps, where AGFT's copy has means over pixels."""
    if not getattr(encoder, "plain", True):
        raise ValueError("--loss tga needs a vision transformer, whose class token is read, with a token for "
                         "each patch beside it: this image encoder is none")
    original, attack = copy.deepcopy(encoder), tecoa(encoder, head, logit_scale).inner

    def attention(tokens, y):
        """Maps fp32 [B, H, W] in [0,1] of tokens [B, 1 + h·w, D] and labels [B]."""
        maps = torch.einsum("bnd,bd->bn", F.normalize(tokens, dim=1)[:, 1:], head[y].float())
        low, high = maps.aminmax(dim=1, keepdim=True)
        maps = ((maps - low) / (high - low).clamp(min=1e-12)).unflatten(1, (1, *encoder.visual.grid_size))
        return F.interpolate(maps, encoder.visual.image_size, mode="bilinear")[:, 0]

    def target(x, y, keys):
        return y, attention(original(to_float(x), all_tokens=True), y)

    def inner(net, x_adv, target):
        return attack(net, x_adv, target[0])

    def outer(net, x_adv, target, x):
        y, expected = target
        tokens = net(torch.cat([x_adv, to_float(x)]), all_tokens=True).chunk(2)    # one pass, for DDP
        adversarial, clean = ((attention(some, y) - expected).flatten(1).norm(dim=1) for some in tokens)
        losses, predicted = contrastive_loss(tokens[0][:, 0], head, y, logit_scale)
        return losses + alpha * adversarial + beta * clean, predicted
    return Loss(encoder, inner, outer, target)


class Published(NamedTuple):
    make: Callable                              # (encoder, head, logit_scale) → Loss
    lr: tuple = (1e-5, .014)                    # default peak learning rate of SGD: real models, the toy
    labels: bool = True                         # whether it uses any
    batch: bool = False                         # whether it compares an image with others of its micro-batch


LOSSES = {"tecoa": Published(tecoa), "ce": Published(ce), "coadv": Published(coadv),
          "imgcoadv": Published(imgcoadv, labels=False, batch=True),
          "fare": Published(fare, lr=(1e-5, 2e-3), labels=False),     # its distances are not in units of τ
          "pmg": Published(pmg),
          "agft": Published(agft, lr=(4e-4, .014), labels=False),     # 4e-4 and, of tga, 1e-4: the authors'
          "tga": Published(tga, lr=(1e-4, .014))}
