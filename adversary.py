"""Who attacks a zero-shot classifier: which attacks, in which order, on which images; and which images fall.

The attacks themselves are in attacks.py. Here they meet an image encoder and a head.
"""
import itertools

import torch

from attacks import apgd, ascent, cw_margin, dlr, image_keys, margin, pgd, pgd_any, square
from kernels.contrastive_loss import contrast, cosine_logits
from kernels.pgd_step import pgd_step, to_float

ATTACKS = ("pgd", "cw", "apgd-ce", "apgd-dlr", "apgd-t", "square")
AUTOATTACK = ("apgd-ce", "apgd-t", "square")          # `standard` of Croce & Hein 2020 but for FAB-T: README says why
TARGETS = 9                                           # classes that targeted attacks try, as `standard` does


def attack_list(words):
    """The attacks that `--attack` names, a comma list. ValueError: unknown."""
    names = [name for word in words.split(",") for name in (AUTOATTACK if word == "autoattack" else (word,))]
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(f"--attack {unknown[0]}: expected a comma list of autoattack, {', '.join(ATTACKS)}")
    return list(dict.fromkeys(names))


def defined(names, classes):
    """`names` where DLR is undefined: APGD-CE in its place for two classes, untargeted DLR for targeted with three."""
    if classes == 3:
        names = ["apgd-dlr" if name == "apgd-t" else name for name in names]
    elif classes < 3:
        names = ["apgd-ce" if name in ("apgd-dlr", "apgd-t") else name for name in names]
    return list(dict.fromkeys(names))


def protocol(options):
    """What was run, in words."""
    names = {"pgd": "PGD", "cw": "CW", "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "square": "Square"}
    words = [f"{names[name]}-{options['queries' if name == 'square' else 'steps']}" for name in options["names"]]
    standard = [list(AUTOATTACK), 100, 5000, 1] == [options[key] for key in ("names", "steps", "queries", "restarts")]
    return ("AutoAttack standard (2020) without FAB-T: " * standard + ", ".join(words)
            + f"; {options['norm']} ε = {options['eps']:g}/255; {options['restarts']} random start(s); robust = right "
            + ("at the last iterate" if options["last_iterate"] else "at every iterate of every attack"))


@torch.no_grad()
def predict(encoder, head, scale, x):
    """The class of each image int64 [B]; −1 where the model gives NaN."""
    z = encoder(x)
    best = contrast(z, head, torch.zeros(len(x), dtype=torch.int64, device=head.device), scale)[1]
    return torch.where(z.isfinite().all(1), best, -1)


def run_attacks(encoder, head, scale, x, y, index, *, names, eps, steps, step_size, norm, queries=5000, restarts=1, seed=0,
                last_iterate=False):
    """Each attack in turn on the images that still stand.

    x: uint8, or float in [0,1] [B,3,H,W], rightly classified; index: the images' numbers, from which random starts follow.
    names: of attacks; eps, step_size: in 1/255; queries: of Square. Returns (x_adv fp32 [B,3,H,W]: the first that was
    misclassified, or else the last attack's best; predicted int64 [B]: what it is taken for, −1 where the model gives NaN;
    by int64 [B]: the number of the attack that broke it, −1: it stands; at int64 [B]: at which of its iterates; passes int64
    [B] through the model, by attacks; zero bool [B]: whether the clean image's gradient is exactly 0; uphill bool [B]:
    whether the loss is no smaller a tenth of ε further along it).
    """
    def objective_of(loss):
        def objective(x, y):
            logits = cosine_logits(encoder(x), head, scale)
            return loss(logits, y), logits.argmax(1) != y
        return objective

    def log_odds(x, y):                                 # cross-entropy is its softplus: in exact arithmetic the same attack
        m, predicted = contrast(encoder(x), head, y, scale)
        return m, predicted != y

    def targeted(x, y_and_target):
        y, target = y_and_target.unbind(1)
        return objective_of(lambda logits, y: dlr(logits, y, target))(x, y)

    def last(objective, x, y, **options):
        x_adv = pgd(lambda x, y: objective(x, y)[0], x, y, **options)
        with torch.no_grad():
            return x_adv, torch.where(objective(x_adv, y)[1], steps, -1)

    step_options = {"steps": steps, "step_size": step_size / 255}
    ways = {"pgd": (log_odds, last if last_iterate else pgd_any, step_options),
            "cw": (objective_of(cw_margin), last if last_iterate else pgd_any, step_options),
            "apgd-ce": (log_odds, apgd, {"steps": steps}), "apgd-dlr": (objective_of(dlr), apgd, {"steps": steps}),
            "apgd-t": (targeted, apgd, {"steps": steps}), "square": (objective_of(margin), square, {"queries": queries})}
    x_adv = x = to_float(x)
    predicted, by, at, passes = y.clone(), torch.full_like(y, -1), torch.full_like(y, -1), torch.zeros_like(y)
    zero, uphill = torch.zeros_like(y, dtype=torch.bool), torch.ones_like(y, dtype=torch.bool)
    for k, name in enumerate(names):
        objective, function, options = ways[name]
        labels = [y]
        if name == "apgd-t":                            # towards the classes that look likeliest when clean
            with torch.no_grad():
                wrong = cosine_logits(encoder(x), head, scale).scatter(1, y[:, None], float("-inf"))
            labels = [torch.stack([y, t], 1) for t in wrong.topk(min(TARGETS, len(head) - 1), 1).indices.T]
        if k == 0 and name != "square":
            loss, _, grad = ascent(objective, x, labels[0])
            zero = (grad == 0).flatten(1).all(1)
            with torch.no_grad():
                uphill = objective(pgd_step(x, grad, x, eps / 255, eps / 2550, norm), labels[0])[0] >= loss
        for restart, label in itertools.product(range(restarts), labels):
            stands = (by < 0).nonzero().squeeze(1)
            if len(stands) == 0:
                break
            found, step = function(objective, x[stands], label[stands], keys=image_keys(seed, restart, index[stands]),
                                   eps=eps / 255, norm=norm, **options)
            seen = predict(encoder, head, scale, found)  # in this batch too, or the next attack takes it on
            step = torch.where(seen == y[stands], -1, step.clamp(min=0))
            x_adv = x_adv.index_copy(0, stands, found)
            predicted[stands], at[stands], by[stands] = seen, step, torch.where(step < 0, -1, k)
            passes[stands] += torch.where(step < 0, queries if name == "square" else steps + 1, step + 1)
    return x_adv, predicted, by, at, passes, zero, uphill
