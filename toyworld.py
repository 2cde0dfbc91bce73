"""The toy world: drawn images with captions, the tasks in it, and the tiny CLIP trained on it.

Everything here stands in for what cannot be shipped: 400 million web images (`draw` and `caption`),
OpenAI's weights (`pretrain`), the sixteen test sets (`TASKS`). It is drawn from a seed, in seconds.

An image shows at most one object (shape, digit or letter; filled or only its outline; in one colour) on a
textured grey ground. Position, size, angle, hue, contrast, sharpness and noise vary.
"""
import functools
import hashlib
import logging
import math
import os
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

SIZE = 32                                       # pixels, images are [3, SIZE, SIZE]
SHAPES = "circle square triangle star cross heart ring moon arrow hourglass".split()
DIGITS = "zero one two three four five six seven eight nine".split()
LETTERS = "A E H K L M R T X Z".split()
OBJECTS = SHAPES + [f"digit {d}" for d in DIGITS] + [f"letter {c}" for c in LETTERS]
COLOURS = {"red": (.90, .10, .10), "orange": (1., .55, .0), "yellow": (.95, .90, .10), "green": (.10, .65, .15),
           "cyan": (.10, .80, .85), "blue": (.10, .20, .90), "purple": (.50, .10, .65), "pink": (1., .50, .75),
           "white": (1., 1., 1.), "black": (.03, .03, .03)}
TEXTURES = "plain stripes checks dots grid rings noise shading".split()
FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif STIXGeneral STIXGeneralBol cmss10 "
         "cmb10").split()                       # all inside matplotlib
NONE = -1                                       # "no object", and "not mentioned" in a caption


# ---------------------------------------------------------------------------------------------- drawing
@functools.cache
def masks(size=64):
    """Filled (0) and outlined (1) silhouettes, float [2, objects, fonts, size, size] in [0,1]; shapes repeat along fonts."""
    from matplotlib import get_data_path
    big = 4 * size
    half = big / 2
    radius = .42 * big                          # room for rotation

    def polygon(points):                        # points in [-1,1], y down
        draw.polygon([(half + radius * x, half + radius * y) for x, y in points], fill=255)

    def disc(x, y, r, fill=255):
        draw.ellipse([half + radius * (x - r), half + radius * (y - r),
                      half + radius * (x + r), half + radius * (y + r)], fill=fill)

    def ring(n, offset=0.):
        return [(math.sin(2 * math.pi * (i + offset) / n), -math.cos(2 * math.pi * (i + offset) / n)) for i in range(n)]

    out = np.zeros((len(OBJECTS), len(FONTS), size, size), np.float32)
    for o, name in enumerate(OBJECTS):
        for f, font in enumerate(FONTS):
            image = Image.new("L", (big, big))
            draw = ImageDraw.Draw(image)
            if name == "circle":
                disc(0, 0, .9)
            elif name == "square":
                polygon([(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)])
            elif name == "triangle":
                polygon([(0, -1), (.95, .8), (-.95, .8)])
            elif name == "star":
                tips, dents = ring(5), ring(5, .5)
                polygon([p for t, d in zip(tips, dents) for p in (t, (.42 * d[0], .42 * d[1]))])
            elif name == "cross":
                polygon([(-.3, -1), (.3, -1), (.3, 1), (-.3, 1)])
                polygon([(-1, -.3), (1, -.3), (1, .3), (-1, .3)])
            elif name == "heart":
                disc(-.45, -.35, .5)
                disc(.45, -.35, .5)
                polygon([(-.9, -.13), (0, -.35), (.9, -.13), (0, 1)])
            elif name == "ring":
                disc(0, 0, .95)
                disc(0, 0, .55, 0)
            elif name == "moon":
                disc(0, 0, .95)
                disc(.5, 0, .75, 0)
            elif name == "arrow":
                polygon([(-1, -.25), (.1, -.25), (.1, -.75), (1, 0), (.1, .75), (.1, .25), (-1, .25)])
            elif name == "hourglass":
                polygon([(-.8, -.95), (.8, -.95), (.12, 0), (.8, .95), (-.8, .95), (-.12, 0)])
            else:
                glyph = str(DIGITS.index(name[6:])) if name.startswith("digit") else name[7:]
                path = os.path.join(get_data_path(), "fonts", "ttf", font + ".ttf")
                draw.text((half, half), glyph, fill=255, anchor="mm", font=ImageFont.truetype(path, int(1.12 * big)))
            out[o, f] = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255
            if name in SHAPES:
                out[o] = out[o, 0]
                break
    out = torch.from_numpy(out)
    return torch.stack([out, out + F.max_pool2d(-out, 9, 1, 4)])                         # an outline: minus its erosion


def textures(kind, u, v, gen):
    """The ground's pattern, float [N,H,W] in [-1,1], from texture numbers [N] and coordinates [N,H,W] in pixels."""
    n = len(kind)
    period = torch.empty(n, 1, 1).uniform_(7, 10, generator=gen)
    phase = torch.empty(2, n, 1, 1).uniform_(0, 2 * math.pi, generator=gen)
    sin_u = torch.sin(2 * math.pi * u / period + phase[0])
    sin_v = torch.sin(2 * math.pi * v / period + phase[1])
    noise = F.interpolate(torch.rand(n, 1, 16, 16, generator=gen), scale_factor=2.)[:, 0] * 2 - 1
    distance = torch.sqrt((u - phase[0]) ** 2 + (v - phase[1]) ** 2)
    patterns = torch.stack([torch.zeros_like(u), sin_u * 3, sin_u * sin_v * 6, (sin_u + sin_v - .9) * 5,
                            (torch.maximum(sin_u, sin_v) - .75) * 8, torch.sin(2 * math.pi * distance / period) * 3,
                            noise * 1.4, u / 16], 1)                                     # [N, textures, H, W]
    return patterns[torch.arange(n), kind].clamp(-1, 1)


def draw(objects, colours, kinds, outline, seed):
    """Draw scenes.

    objects, colours, kinds: int64 [N], numbers in OBJECTS (or NONE), COLOURS, TEXTURES; outline: bool [N].
    Returns uint8 [N, 3, SIZE, SIZE]; the same seed draws the same images.
    """
    gen = torch.Generator().manual_seed(seed)
    n = len(objects)

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=gen)

    # the object: silhouette → random similarity transform → [N,1,H,W]
    font = torch.randint(len(FONTS), (n,), generator=gen)
    alpha = masks()[outline.long(), objects.clamp(min=0), font][:, None]
    angle, size = uniform(-.25, .25), uniform(.95, 1.3)                                 # radians; 22–34 px masks
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    shift = uniform(-.15, .15, 2) * size[:, None]
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    alpha = F.grid_sample(alpha, F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False), align_corners=False)
    alpha = alpha * (objects != NONE)[:, None, None, None]

    # its colour, and a grey level for the ground that differs from it
    palette = torch.tensor(list(COLOURS.values()))
    ink = (palette[colours] + uniform(-.08, .08, 3)).clamp(0, 1)
    luminance = ink @ torch.tensor([.3, .59, .11])
    grey = uniform(.05, .95)
    grey = torch.where((grey - luminance).abs() < .3, (grey + .5) % 1, grey)
    tint = uniform(-.06, .06, 3)

    # the ground: two shades of that grey in a pattern
    yy, xx = torch.meshgrid(torch.arange(SIZE) - SIZE / 2 + .5, torch.arange(SIZE) - SIZE / 2 + .5, indexing="ij")
    turn = uniform(0, 2 * math.pi, 1, 1)
    pattern = textures(kinds, xx * torch.cos(turn) + yy * torch.sin(turn), yy * torch.cos(turn) - xx * torch.sin(turn), gen)
    ground = (grey[:, None, None] + pattern * uniform(.15, .3, 1, 1))[:, None] + tint[:, :, None, None]

    image = ground + alpha * (ink[:, :, None, None] - ground)
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, soft, uniform(0, 1, 1, 1, 1)) + .02 * torch.randn(image.shape, generator=gen)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------- tasks
# (shape, colour) pairs to adapt on (True) and to keep unseen (False): five colours for each shape and five
# shapes for each colour.
COMBINATIONS = {seen: [(s, c) for s in range(10) for c in range(10) if ((3 * s + c) % 10 < 5) == seen]
                for seen in (True, False)}


def _names(seen):
    return [f"{list(COLOURS)[c]} {SHAPES[s]}" for s, c in COMBINATIONS[seen]]


# task: (class names, template). `seen` is adapted on; the others are only ever evaluated.
TASKS = {
    "seen": ([f"{name} on a background of {t}" for name in _names(True) for t in TEXTURES], "This is a photo of a {}"),
    "unseen": (_names(False), "This is a photo of a {}"),
    "shapes": (SHAPES, "A picture of a {}."),
    "outlines": (SHAPES, "A drawing of the outline of a {}."),
    "colours": (list(COLOURS), "Something {}."),
    "textures": (TEXTURES, "A background of {}."),
    "digits": (DIGITS, "A photo of the digit {}."),
    "letters": (LETTERS, "A photo of the letter {}."),
    "scans": (DIGITS, "A photo of the digit {}."),
}


def task(name, split, n):
    """Images uint8 [n, 3, SIZE, SIZE] and labels int64 [n] of one task.

    split "train" (to adapt on), "tune" (to choose settings on) or "test" (to report): other images, same classes.
    `scans` is real: scikit-learn's 1,797 handwritten digits, 8×8, enlarged; all of them are for "test", and n is ignored.
    """
    if name == "scans":
        from sklearn.datasets import load_digits
        scans, labels = load_digits(return_X_y=True)
        images = F.interpolate(torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 16, size=28, mode="bilinear")
        images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        return (images * 255).round().to(torch.uint8), torch.tensor(labels)
    seed = int.from_bytes(hashlib.sha256(f"{name} {split}".encode()).digest()[:6], "big")
    gen = torch.Generator().manual_seed(seed)
    classes = len(TASKS[name][0])
    y = torch.arange(n) % classes if n >= classes else torch.arange(n) * classes // n     # balanced, then shuffled
    y = y[torch.randperm(n, generator=gen)]
    objects, colours, kinds = [torch.randint(len(v), (n,), generator=gen) for v in (OBJECTS, COLOURS, TEXTURES)]
    outline = torch.full((n,), name == "outlines")
    if name == "seen":
        objects, colours = torch.tensor(COMBINATIONS[True])[y // len(TEXTURES)].T
        kinds = y % len(TEXTURES)
    elif name == "unseen":
        objects, colours = torch.tensor(COMBINATIONS[False])[y].T
    elif name in ("shapes", "outlines"):
        objects = y
    elif name == "colours":
        objects, colours = len(SHAPES) + objects % (len(OBJECTS) - len(SHAPES)), y       # coloured digits and letters
    elif name == "textures":
        objects, kinds = torch.full((n,), NONE), y
    elif name == "digits":
        objects = len(SHAPES) + y
    elif name == "letters":
        objects = len(SHAPES) + len(DIGITS) + y
    return draw(objects, colours, kinds, outline, seed), y


# ---------------------------------------------------------------------------------------------- captions
WRAPPERS = ("{}", "a {}", "a photo of the {}", "this is a photo of a {}", "a picture of a {}.")
# What a caption mentions, and how often in the first and in the second caption of an image. Every attribute needs its
# share: with too few captions about the object, a CLIP this small learns colours and never looks at form.
FORMS = {("object",): (.5, .25), ("object", "colour"): (.5, .25), ("colour",): (0, .15), ("texture",): (0, .25),
         ("object", "colour", "texture"): (0, .1)}
ATTRIBUTES = ("object", "colour", "texture", "outline")


def scenes(n, gen):
    """n random scenes, int64 [n, 4]: number in OBJECTS or NONE, in COLOURS, in TEXTURES, and 1 for an outline."""
    scene = torch.stack([torch.randint(len(v), (n,), generator=gen) for v in (OBJECTS, COLOURS, TEXTURES, "_")], 1)
    chance = torch.rand(2, n, generator=gen)
    scene[chance[0] < .4, 2] = 0                                                         # many plain grounds
    scene[(chance[1] < .25) & (scene[:, 0] < len(SHAPES)), 3] = 1                        # shapes as outlines
    scene[chance[1] > .92, 0] = NONE                                                     # ground only
    return scene


def mention(scene, which, gen):
    """What the first (0) or second (1) caption of each scene mentions: the scene [n, 4] with NONE where it is silent."""
    n = len(scene)
    form = torch.multinomial(torch.tensor([weights[which] for weights in FORMS.values()]), n, True, generator=gen)
    mentions = torch.tensor([[a in f for a in ATTRIBUTES] for f in FORMS])[form]         # [n, 4]
    mentions[:, 3] = mentions[:, 0] & (scene[:, 3] == 1) & (torch.rand(n, generator=gen) < .5)
    mentions[scene[:, 0] == NONE] = torch.tensor([False, False, True, False])            # only a ground to speak of
    return scene.where(mentions, torch.full_like(scene, NONE))


def caption(said, wrapper):
    """One sentence that mentions (object, colour, texture, outline), NONE: left out; wrapper: number in WRAPPERS."""
    thing, colour, texture, outline = said
    ground = "" if texture == NONE else f"background of {TEXTURES[texture]}"
    if thing == colour == NONE:
        return WRAPPERS[wrapper].format(ground)
    colour = "" if colour == NONE else list(COLOURS)[colour]
    if thing == NONE:
        return f"something {colour}"
    noun = f"{colour} {OBJECTS[thing]}".strip()
    text = WRAPPERS[wrapper].format("outline of a " + noun if outline == 1 else noun)
    return f"{text} on a {ground}" if ground else text


# ---------------------------------------------------------------------------------------------- the toy CLIP
CONFIG = Path(__file__).parent / "toy.json"          # an open_clip model: ViT, 32 px, patch 8, width 96, 4 layers
CACHE = Path(__file__).parent / "out" / "toy-clip"
STEPS, BATCH, LEARNING_RATE = 1600, 128, 2e-3


def register():
    """Make `toy` a model that open_clip.create_model and open_clip.get_tokenizer know."""
    if "toy" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


def pretrain(seed, steps=STEPS):
    """The toy CLIP: contrastive pretraining (Radford et al. 2021, Figure 3) on scenes drawn on the fly, two captions each.

    A caption of another image that is true of this image as well is no negative: it is left out of the softmax.
    """
    register()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)                         # sums in another order would make another CLIP
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    logging.disable()                                                                    # "initialized randomly": we know
    model = open_clip.create_model("toy")
    logging.disable(logging.NOTSET)
    tokenize = functools.cache(open_clip.get_tokenizer("toy"))
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    # Muon on the blocks' matrices: 50 % zero-shot after 300 steps, where AdamW alone is at 30 %.
    matrices = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not ("resblocks" in name and p.ndim == 2)]
    optimizers = [torch.optim.Muon(matrices, 2 * LEARNING_RATE, weight_decay=.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, LEARNING_RATE, weight_decay=.05, betas=(.9, .98), fused=True)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    target = torch.arange(2 * BATCH)
    bar = tqdm(range(steps), desc=f"pretrain the toy CLIP, seed {seed}", unit="step")
    for step in bar:
        scene = scenes(BATCH, gen)
        images = draw(*scene[:, :3].T, scene[:, 3] == 1, seed * 1_000_003 + step).float() / 255
        said = torch.cat([mention(scene, 0, gen), mention(scene, 1, gen)])               # [2B, 4]
        wrappers = torch.randint(len(WRAPPERS), (len(said),), generator=gen)
        texts = [caption(s, w) for s, w in zip(said.tolist(), wrappers.tolist())]
        unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}                # each sentence encoded once
        tokens = torch.cat([tokenize(text) for text in unique])
        z = F.normalize(model.encode_image((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)), dim=-1).repeat(2, 1)
        w = F.normalize(model.encode_text(tokens), dim=-1)[[unique[text] for text in texts]]
        true = ((said == NONE) | (said == scene.repeat(2, 1)[:, None])).all(-1)          # [i, j]: caption j fits image i
        logits = (model.logit_scale.exp() * z @ w.T).masked_fill(true.fill_diagonal_(False), -math.inf)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    torch.set_num_threads(threads)
    return model.eval()


def seed_of(tag):
    """The seed that a tag such as seed0 names, or None if it names none."""
    return int(tag[4:]) if tag.startswith("seed") and tag[4:].isdigit() else None


def pretrained_file(seed):
    """The cached state dict of the toy CLIP of this seed and this very toyworld.py; pretrained now if it is not there."""
    version = hashlib.sha256(Path(__file__).read_bytes() + CONFIG.read_bytes()).hexdigest()[:8]
    path = CACHE / f"seed{seed}-{version}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = pretrain(seed)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        torch.save(model.state_dict(), temporary)
        os.replace(temporary, path)
    return path
