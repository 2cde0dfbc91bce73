"""What an attack finds depends on how it is written: on precision, objective, implementation.

    python paper.py precision        # what PGD finds in fp32, bf16 and fp16: twelve minutes, most are fp16's
    python paper.py attacks          # the attacks, each other's and torchattacks': five minutes

Both write a table to results/: no figures of the paper, but what its numbers, and anybody's, rest on."""
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attacks import ENSEMBLES, image_keys, pgd
from eval_zeroshot import run_attacks
from harness.checkpoints import load_visual, read_checkpoint
from harness.files import ROOT, source_version
from harness.processes import DTYPES
from harness.reports import in_pipes
from kernels.contrastive_loss import contrast, contrastive_log_odds, cosine_logits
from kernels.pgd_step import to_float
from model import ImageEncoder, load_clip, predict
from prompts import encode_head
from tasks.task import load_task, task_names

RESULTS = ROOT / "results"
EPS, STEP_SIZE, LOGIT_SCALE = 11 / 255, 11 / 4 / 255, 100.          # the toy's


def write(name, title, *parts):
    """A file of results/: texts and tables."""
    text = "\n\n".join([f"# {title}", *(p if isinstance(p, str) else in_pipes(p) for p in parts)]) + "\n"
    (RESULTS / name).write_text(text)
    print(f"{text}\nwrote results/{name}")


# ---------------------------------------------------------------------------------------- precision
OBJECTIVES = {"log-odds": contrastive_log_odds, "cross-entropy": lambda z, head, y, logit_scale:
              F.cross_entropy(cosine_logits(z, head, logit_scale), y, reduction="none")}


def fates(clip, tasks, heads, dtype, objective, logit_scale):
    """Under PGD-10 on the objective, blocks in dtype: whether each image is classified rightly clean, and
    attacked as well [2, N], in fp32; and whether its gradient is 0 [N]."""
    encoder, judge, found, zeros = ImageEncoder(clip, dtype), ImageEncoder(clip), [], []
    for task, head in zip(tasks, heads):
        x, y, index = torch.utils.data.default_collate(list(task.images))
        x = to_float(x)

        def loss(x, y, head=head):
            return objective(encoder(x), head, y, logit_scale)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
        zeros.append((grad == 0).flatten(1).all(1))
        x_adv = pgd(loss, x, y, eps=EPS, steps=10, step_size=STEP_SIZE, keys=image_keys(0, 0, index))
        with torch.no_grad():
            clean, adversarial = (contrast(judge(images), head, y, 1.)[1] == y for images in (x, x_adv))
        found.append(torch.stack([clean, clean & adversarial]))
    return torch.cat(found, 1), torch.cat(zeros)


def signs_kept(clip, head, x, y):
    """Of the log-odds' gradients to the pixels x, for each image: the share whose sign is the same in bf16 as
    in fp32; and the share of the sum of |gradient| that these have [2, B]."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf, encoder = x.clone().requires_grad_(), ImageEncoder(clip, dtype)
        losses = contrastive_log_odds(encoder(leaf), head, y, LOGIT_SCALE)
        grads += torch.autograd.grad(losses.sum(), leaf)
    kept, size = ((grads[0].sign() == grads[1].sign()).flatten(1), grads[0].abs().flatten(1))
    return torch.stack([kept.float().mean(1), (kept * size).sum(1) / size.sum(1)])


def evaluated(clip, tasks, heads, steps):
    """As eval_zeroshot.py judges, attacked by PGD in fp32 and in bf16: whether images are right when clean,
    robust in fp32, robust in bf16; and `signs_kept` of them all. [3, N], [2, N]"""
    found, signs = [], []
    for task, head in zip(tasks, heads):
        x, y, index = torch.utils.data.default_collate(list(task.images))
        x = to_float(x)
        signs.append(signs_kept(clip, head, x, y))
        right = predict(ImageEncoder(clip), head, LOGIT_SCALE, x) == y
        found.append(right.repeat(3, 1))
        for row, dtype in enumerate((torch.float32, torch.bfloat16), 1):
            broken_by = run_attacks(
                ImageEncoder(clip, dtype), head, LOGIT_SCALE, x[right], y[right], index[right], names=["pgd"],
                eps=EPS, steps=steps, step_size=STEP_SIZE, norm="linf")[2]
            found[-1][row, right] = broken_by < 0
    return torch.cat(found, 1), torch.cat(signs, 1)


def bf16_rows(checkpoint, tasks, steps):
    """The table of what bf16 changes: on the toy CLIP, on the one in the file checkpoint, and of the signs
    alone on a ViT-B/32 with random weights and a random head, which sees the same images enlarged."""
    rows = []
    for name, file in (("toy CLIP", None), ("TeCoA's", checkpoint)):
        clip, tokenizer = load_clip("toy", "seed0")
        if file:
            load_visual(clip, read_checkpoint(file), file)
        heads = [encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks]
        (clean, *robust), signs = evaluated(clip, tasks, heads, steps)
        shares = clean, *robust, robust[0] == robust[1], *signs
        rows.append([name, len(clean), *(f"{100 * share.float().mean():.2f}" for share in shares)])
    clip, _ = load_clip("ViT-B-32-quickgelu", "none")
    x = to_float(torch.stack([task.images[i][0] for task in tasks for i in range(4)]))
    gen = torch.Generator().manual_seed(0)
    head = F.normalize(torch.randn(1000, clip.visual.output_dim, generator=gen), dim=-1)
    signs = signs_kept(clip, head, x, torch.randint(1000, (len(x),), generator=gen))
    rows.append(["ViT-B/32, random weights", len(x), *["–"] * 4, *(f"{100 * s.mean():.2f}" for s in signs)])
    return rows


def precision(checkpoint, limit=100, steps=100):
    """Write results/precision.md: PGD-10 on the plain toy CLIP (seed 0), its gradients computed in three
    precisions at three logit scales, following the log-odds or the cross-entropy; and what an evaluation with
    --dtype bf16 says of it and of TeCoA's, in the file checkpoint."""
    clip, tokenizer = load_clip("toy", "seed0")
    tasks = [load_task(name, "val", limit=limit) for name in task_names("all", "toy")]
    heads = [encode_head(clip, tokenizer, task.class_names, task.template) for task in tasks]
    scales = 20, 100, 1000
    settings = tqdm([*product(DTYPES, OBJECTIVES, scales)], desc="precision", unit="attack")
    found = {(dtype, name, scale): fates(clip, tasks, heads, DTYPES[dtype], OBJECTIVES[name], scale)
             for dtype, name, scale in settings}
    usual, _ = found["fp32", "log-odds", 100]

    def cell(fates, zeros):
        values = fates[1], fates[1] == usual[1], zeros
        return "{:.1f} ({:.1f}, {:.1f})".format(*(100 * value.float().mean() for value in values))
    write("precision.md", "What PGD-10 finds, by precision, objective and logit scale",
          f"`python paper.py precision`, toy CLIP seed 0, {usual.shape[1]} images of {len(tasks)} tasks, "
          f"linf ε = {255 * EPS:g}/255, PyTorch {torch.__version__}. Clean accuracy "
          f"{100 * usual[0].float().mean():.1f} %. Robust accuracy (%), judged in fp32; in brackets the "
          "images (%) whose fate is the one that they have under the log-odds in fp32 at scale 100, and "
          "those (%) whose gradient is exactly zero in every pixel.",
          [["blocks in", "attack follows", *(f"scale {scale}" for scale in scales)],
           ["---", "---", "--:", "--:", "--:"],
           *([*way, *(cell(*found[(*way, scale)]) for scale in scales)]
             for way in product(DTYPES, OBJECTIVES))],
          f"## An evaluation in bf16\n\nPGD-{steps} as eval_zeroshot.py runs it, with `--dtype fp32` and "
          "`bf16`, where every verdict is of an fp32 forward: accuracies (%); the images (%) that meet the "
          "same fate in both; the pixels (%) at which the log-odds' gradient at the clean image has the same "
          "sign in both; and the share (%) that these have of the sum of |gradient|.",
          [["model", "images", "clean", "robust, fp32", "robust, bf16", "same fate", "signs kept", "by size"],
           ["---", *["--:"] * 7], *bf16_rows(checkpoint, tasks, steps)])


# ---------------------------------------------------------------------------------------- attacks
def attack_task(clip, tokenizer, task, rows, options, torchattacks, bar):
    """For each row, as images [rows, 3]: that are right clean and under our attack; and under theirs; and
    forward passes of ours."""
    encoder, head = ImageEncoder(clip), encode_head(clip, tokenizer, task.class_names, task.template)
    # what other people's attacks take: a module, images [B,3,H,W] → logits [B, K]
    logits = torch.nn.Sequential(encoder).eval()
    logits.register_forward_hook(lambda module, x, z: cosine_logits(z, head, LOGIT_SCALE))
    x, y, index = torch.utils.data.default_collate(list(task.images))
    right, counts = logits(to_float(x)).argmax(1) == y, np.zeros((len(rows), 3))
    x, y, index = to_float(x[right]), y[right], index[right]
    for count, (label, ours, theirs) in zip(counts, rows):
        _, _, by, _, passes, *_ = run_attacks(encoder, head, LOGIT_SCALE, x, y, index, names=ours,
                                              last_iterate="last" in label, **options)
        count[[0, 2]] = (by < 0).sum(), passes.sum()
        if torchattacks and theirs and len(y):
            kind, words = theirs
            classes = {"n_classes": min(10, len(head))} if kind in ("APGDT", "FAB") else {}
            found = getattr(torchattacks, kind)(logits, eps=EPS, **words, **classes)(x, y)
            outside = ((found - x).abs() > EPS + 1e-6).flatten(1).any(1)
            count[1] = ((logits(found).argmax(1) == y) | outside).sum()
        bar.update()
    return counts


def attacks(checkpoint, limit=100, steps=50, queries=500):
    """Write results/attacks.md: what each attack leaves of the plain toy CLIP and of TeCoA's (seed 0, in the
    file checkpoint); and what those of torchattacks leave, a port of the original AutoAttack code, if it is
    there (pip install --no-deps torchattacks)."""
    try:
        import torchattacks
    except ImportError:
        torchattacks = None
    options = {"eps": EPS, "steps": steps, "step_size": STEP_SIZE, "norm": "linf", "queries": queries}
    # (label, our attacks, theirs)
    rows = [(f"PGD-{steps}, last iterate", ["pgd"], ("PGD", {"alpha": STEP_SIZE, "steps": steps})),
            (f"PGD-{steps}", ["pgd"], None), (f"CW-{steps}", ["cw"], None),
            (f"APGD-CE-{steps}", ["apgd-ce"], ("APGD", {"loss": "ce", "steps": steps})),
            (f"APGD-DLR-{steps}", ["apgd-dlr"], ("APGD", {"loss": "dlr", "steps": steps})),
            (f"APGD-T-{steps}", ["apgd-t"], ("APGDT", {"steps": steps})),
            (f"FAB-T-{steps}", ["fab-t"], ("FAB", {"steps": steps, "multi_targeted": True})),
            (f"Square-{queries}", ["square"], ("Square", {"n_queries": queries})),
            *((f"{word}, of {steps} steps and {queries} queries", [*names], None)
              for word, names in ENSEMBLES.items())]
    tasks = [load_task(name, "val", limit=limit) for name in ("unseen", "digits", "textures")]
    table, total = [[label] for label, *_ in rows], sum(len(task.images) for task in tasks)
    with tqdm(total=2 * len(tasks) * len(rows), desc="attacks", unit="attack") as bar:
        for attacked in (None, checkpoint):
            clip, tokenizer = load_clip("toy", "seed0")
            if attacked:
                load_visual(clip, read_checkpoint(attacked), attacked)
            counts = sum(attack_task(clip, tokenizer, task, rows, options, torchattacks, bar)
                         for task in tasks)
            for row, (*_, theirs), (left, left_by_theirs, passes) in zip(table, rows, counts / total):
                row += [f"{100 * left:.1f}",
                        f"{100 * left_by_theirs:.1f}" if theirs and torchattacks else "",
                        f"{passes:.1f}"]
    version = torchattacks.__version__ if torchattacks else "(not installed)"
    write("attacks.md", "Attacks on the plain toy CLIP and on TeCoA's: robust accuracy (%)",
          f"`python paper.py attacks`, code {source_version()}, seed 0; {total} images of unseen, digits and "
          f"textures, linf ε = {255 * EPS:g}/255, PyTorch {torch.__version__}. Theirs: torchattacks "
          f"{version}, same images, steps, queries and restarts (one), other random starts. Passes: ours "
          "through the model, for each image.",
          [["attack", "CLIP: ours", "theirs", "passes", "TeCoA: ours", "theirs", "passes"],
           ["---", *["--:"] * 6], *table])
