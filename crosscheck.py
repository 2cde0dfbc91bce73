"""What an attack finds depends on how it is written: by precision and objective, and beside another implementation.

    python paper.py precision        # what attacks find in fp32, bf16 and fp16: some ten minutes, most of them fp16's
    python paper.py attacks          # the attacks against each other and against torchattacks: five minutes

Both write a table to results/. Not figures of the paper: checks of what its numbers, and anybody's, rest on.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from adversary import AUTOATTACK, run_attacks
from attacks import image_keys, pgd
from checkpoints import load_visual, read_checkpoint
from cli import DTYPES, source_version
from data import load_task, task_names
from kernels.contrastive_loss import contrast, contrastive_log_odds, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, load_clip
from prompts import encode_head

RESULTS = Path(__file__).parent / "results"


def precision(limit=100):
    """Write results/precision.md: PGD-10 on the plain toy CLIP (seed 0), its gradients computed in three precisions at
    three logit scales, following the log-odds or the cross-entropy. Whether it broke an image is judged in fp32."""
    clip, tokenizer = load_clip("toy", "seed0")
    tasks = [load_task(name, "val", limit=limit) for name in task_names("all", "toy")]
    heads = [encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks]
    judge, scales = ImageEncoder(clip), (20, 100, 1000)
    losses = {"log-odds": contrastive_log_odds,
              "cross-entropy": lambda z, head, y, scale: F.cross_entropy(cosine_logits(z, head, scale), y, reduction="none")}

    def attacked(name, loss, scale):
        """Whether each image is classified rightly clean, and attacked as well [2, N]; and whether its gradient is 0 [N]."""
        encoder, fates, zeros = ImageEncoder(clip, DTYPES[name]), [], []
        for task, head in zip(tasks, heads):
            x, y, index = torch.utils.data.default_collate(list(task.images))
            x = to_float(x)

            def loss_fn(x, y, head=head):
                return losses[loss](encoder(x), head, y, scale)
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss_fn(leaf, y).sum(), leaf)
            zeros.append((grad == 0).flatten(1).all(1))
            x_adv = pgd(loss_fn, x, y, eps=8 / 255, steps=10, step_size=2 / 255, keys=image_keys(0, 0, index))
            with torch.no_grad():
                clean, adversarial = (contrast(judge(images), head, y, 1.)[1] == y for images in (x, x_adv))
            fates.append(torch.stack([clean, clean & adversarial]))
        return torch.cat(fates, 1), torch.cat(zeros)

    settings = [(name, loss, scale) for name in DTYPES for loss in losses for scale in scales]
    found = {setting: attacked(*setting) for setting in tqdm(settings, desc="precision", unit="attack")}
    usual, _ = found["fp32", "log-odds", 100]
    lines = ["# What PGD-10 finds, by precision, objective and logit scale", "",
             f"`python paper.py precision`, toy CLIP seed 0, {usual.shape[1]} images of {len(tasks)} tasks, linf ε = 8/255, "
             f"PyTorch {torch.__version__}. Clean accuracy {100 * usual[0].float().mean():.1f} %. Robust accuracy (%), "
             "judged in fp32; in brackets the images (%) whose fate is the one that they have under the log-odds in fp32 at "
             "scale 100, and those (%) whose gradient is exactly zero in every pixel.", "",
             "| blocks in | attack follows | " + " | ".join(f"scale {scale}" for scale in scales) + " |",
             "|---|---|--:|--:|--:|"]
    for name in DTYPES:
        for loss in losses:
            cells = []
            for scale in scales:
                fates, zeros = found[name, loss, scale]
                robust, same = fates[1].float().mean(), (fates[1] == usual[1]).float().mean()
                cells.append(f"{100 * robust:.1f} ({100 * same:.1f}, {100 * zeros.float().mean():.1f})")
            lines.append(f"| {name} | {loss} | " + " | ".join(cells) + " |")
    (RESULTS / "precision.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + "\n\nwrote results/precision.md")


class Logits(torch.nn.Module):
    """x [B,3,H,W] → logits [B,K]: what other people's attacks take."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        return cosine_logits(self.encoder(x), self.head, 100.)


def attacks(checkpoint, limit=100, steps=50, queries=500):
    """Write results/attacks.md: what each attack leaves of the plain toy CLIP and of TeCoA's (seed 0), which is in the file
    checkpoint; and what those of torchattacks leave, a port of the original AutoAttack code, if it is there (pip install
    --no-deps torchattacks)."""
    try:
        import torchattacks
    except ImportError:
        torchattacks = None
    rows = [(f"PGD-{steps}, last iterate", ["pgd"], ("PGD", {"alpha": 2 / 255, "steps": steps})),      # ours, and theirs
            (f"PGD-{steps}", ["pgd"], None), (f"CW-{steps}", ["cw"], None),
            (f"APGD-CE-{steps}", ["apgd-ce"], ("APGD", {"loss": "ce", "steps": steps})),
            (f"APGD-DLR-{steps}", ["apgd-dlr"], ("APGD", {"loss": "dlr", "steps": steps})),
            (f"APGD-T-{steps}", ["apgd-t"], ("APGDT", {"steps": steps})),
            (f"Square-{queries}", ["square"], ("Square", {"n_queries": queries})),
            (f"APGD-CE-{steps}, APGD-T-{steps}, Square-{queries} in turn", list(AUTOATTACK), None),
            (f"what these leave, under FAB-T-{steps}", None, ("FAB", {"steps": steps, "multi_targeted": True}))]
    counts, total = {}, 0
    with tqdm(total=2 * 3 * len(rows), desc="attacks", unit="attack") as bar:
        for model in ("CLIP", "TeCoA"):
            clip, tokenizer = load_clip("toy", "seed0")
            if model == "TeCoA":
                load_visual(clip, read_checkpoint(checkpoint), checkpoint)
            encoder = ImageEncoder(clip)
            for task in [load_task(name, "val", limit=limit) for name in ("unseen", "digits", "textures")]:
                head = encode_head(clip, tokenizer, task.class_names, task.template)
                logits = Logits(encoder, head).eval()
                x, y, index = torch.utils.data.default_collate(list(task.images))
                total += len(y) / 2
                right = logits(to_float(x)).argmax(1) == y
                x, y, index = to_float(x[right]), y[right], index[right]
                for label, ours, theirs in rows:
                    count = counts.setdefault((label, model), {"ours": 0, "theirs": 0, "passes": 0})
                    if ours:
                        _, _, by, _, passes, *_ = run_attacks(
                            encoder, head, 100., x, y, index, names=ours, eps=8, steps=steps, step_size=2, norm="linf",
                            queries=queries, last_iterate="last" in label)
                        count["ours"] += int((by < 0).sum())
                        count["passes"] += int(passes.sum())
                    else:                                                  # after all of ours
                        x, y = x[by < 0], y[by < 0]
                    if torchattacks and theirs and len(y):
                        kind, options = theirs
                        options = options | ({"n_classes": min(10, len(head))} if kind in ("APGDT", "FAB") else {})
                        found = getattr(torchattacks, kind)(logits, eps=8 / 255, **options)(x, y)
                        inside = ((found - x).abs() <= 8 / 255 + 1e-6).flatten(1).all(1)
                        count["theirs"] += int(((logits(found).argmax(1) == y) | ~inside).sum())
                    bar.update()
    lines = ["# Attacks on the plain toy CLIP and on TeCoA's: robust accuracy (%)", "",
             f"`python paper.py attacks`, code {source_version()}, seed 0; {total:.0f} images of unseen, digits and "
             f"textures, linf ε = 8/255, PyTorch {torch.__version__}. Theirs: torchattacks "
             f"{torchattacks.__version__ if torchattacks else '(not installed)'}, same images, steps, queries and restarts "
             "(one), other random starts. Passes: ours through the model, for each image.", "",
             "| attack | CLIP: ours | theirs | passes | TeCoA: ours | theirs | passes |", "|---|" + "--:|" * 6]
    for label, ours, theirs in rows:
        cells = []
        for model in ("CLIP", "TeCoA"):
            count = {who: n / total for who, n in counts[label, model].items()}
            cells += [f"{100 * count['ours']:.1f}" if ours else "", f"{100 * count['theirs']:.1f}" if theirs and torchattacks
                      else "", f"{count['passes']:.1f}" if ours else ""]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (RESULTS / "attacks.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + "\n\nwrote results/attacks.md")
