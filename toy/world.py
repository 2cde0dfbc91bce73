"""The toy world: drawn images with captions, and the tasks in it. It stands in for what cannot be shipped:
400 million web images (`draw`, `caption`) and the sixteen test sets (`TASKS`). It is drawn from a seed.

An image shows at most one object (shape, digit or letter; filled or only its outline; in one colour) on a
textured grey ground. Position, size, angle, hue, contrast, sharpness and noise vary."""
import functools
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SIZE = 32                                       # pixels, images are [3, SIZE, SIZE]
SHAPES = "circle square triangle star cross heart ring moon arrow hourglass".split()
DIGITS = "zero one two three four five six seven eight nine".split()
LETTERS = "A E H K L M R T X Z".split()
OBJECTS = SHAPES + [f"digit {d}" for d in DIGITS] + [f"letter {c}" for c in LETTERS]
COLOURS = {"red": (.9, .1, .1), "orange": (1., .55, .0), "yellow": (.95, .9, .1), "green": (.1, .65, .15),
           "cyan": (.1, .8, .85), "blue": (.1, .2, .9), "purple": (.5, .1, .65), "pink": (1., .5, .75),
           "white": (1., 1., 1.), "black": (.03, .03, .03)}
TEXTURES = "plain stripes checks dots grid rings noise shading".split()
FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif STIXGeneral "
         "STIXGeneralBol cmss10 cmb10").split()     # all inside matplotlib
COUNTS = len(OBJECTS), len(COLOURS), len(TEXTURES)
NONE = -1                                       # "no object", and "not mentioned" in a caption
# What each shape is painted of, one over the other, in [-1,1], y down: polygons (lists of points) and discs
# (x, y, radius; where it is negative, in black).
PAINTED = {
    "circle": [(0, 0, .9)], "ring": [(0, 0, .95), (0, 0, -.55)], "moon": [(0, 0, .95), (.5, 0, -.75)],
    "square": [[(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)]], "triangle": [[(0, -1), (.95, .8), (-.95, .8)]],
    "star": [[(r * math.sin(math.pi * i / 5), r * -math.cos(math.pi * i / 5))
              for i, r in enumerate([1, .42] * 5)]],
    "cross": [[(-.3, -1), (.3, -1), (.3, 1), (-.3, 1)], [(-1, -.3), (1, -.3), (1, .3), (-1, .3)]],
    "heart": [(-.45, -.35, .5), (.45, -.35, .5), [(-.9, -.13), (0, -.35), (.9, -.13), (0, 1)]],
    "arrow": [[(-1, -.25), (.1, -.25), (.1, -.75), (1, 0), (.1, .75), (.1, .25), (-1, .25)]],
    "hourglass": [[(-.8, -.95), (.8, -.95), (.12, 0), (.8, .95), (-.8, .95), (-.12, 0)]]}


@functools.cache
def masks(size=64):
    """Filled (0) and outlined (1) silhouettes, float [2, objects, fonts, size, size] in [0,1]."""
    from matplotlib import get_data_path
    big, half, radius = 4 * size, 2 * size, .42 * 4 * size      # the radius leaves room for rotation
    out = np.zeros((len(OBJECTS), len(FONTS), size, size), np.float32)
    for o, (name, glyph) in enumerate(zip(OBJECTS, [""] * len(SHAPES) + [*"0123456789", *LETTERS])):
        for f, font in enumerate(FONTS if glyph else FONTS[:1]):
            image = Image.new("L", (big, big))
            draw = ImageDraw.Draw(image)
            for part in PAINTED.get(name, ()):
                if isinstance(part, list):
                    draw.polygon([(half + radius * x, half + radius * y) for x, y in part], fill=255)
                else:
                    x, y, r = part[0], part[1], abs(part[2])
                    box = [half + radius * side for side in (x - r, y - r, x + r, y + r)]
                    draw.ellipse(box, fill=255 if part[2] > 0 else 0)
            if glyph:
                font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{font}.ttf", int(1.12 * big))
                draw.text((half, half), glyph, fill=255, anchor="mm", font=font)
            out[o, f:] = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    out = torch.from_numpy(out)
    return torch.stack([out, out + F.max_pool2d(-out, 9, 1, 4)])            # an outline: minus its erosion


def textures(kind, u, v, gen):
    """The ground, float [N,H,W] in [-1,1], from numbers in TEXTURES [N] and coordinates in pixels [N,H,W]."""
    n = len(kind)
    period = torch.empty(n, 1, 1).uniform_(7, 10, generator=gen)
    phase = torch.empty(2, n, 1, 1).uniform_(0, 2 * math.pi, generator=gen)
    sin_u = torch.sin(2 * math.pi * u / period + phase[0])
    sin_v = torch.sin(2 * math.pi * v / period + phase[1])
    noise = F.interpolate(torch.rand(n, 1, 16, 16, generator=gen), scale_factor=2.)[:, 0] * 2 - 1
    rings = torch.sin(2 * math.pi * torch.sqrt((u - phase[0]) ** 2 + (v - phase[1]) ** 2) / period)
    # [N, textures, H, W], in the order of TEXTURES
    patterns = torch.stack([torch.zeros_like(u), sin_u * 3, sin_u * sin_v * 6, (sin_u + sin_v - .9) * 5,
                            (torch.maximum(sin_u, sin_v) - .75) * 8, rings * 3, noise * 1.4, u / 16], 1)
    return patterns[torch.arange(n), kind].clamp(-1, 1)


def draw(objects, colours, kinds, outline, seed):
    """Scenes, uint8 [N, 3, SIZE, SIZE]; the same seed draws the same images. objects, colours, kinds: int64
    [N], numbers in OBJECTS (or NONE), COLOURS, TEXTURES; outline: bool [N]."""
    gen, n = torch.Generator().manual_seed(seed), len(objects)

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=gen)

    # the object: silhouette → random similarity transform → [N,1,H,W]
    font = torch.randint(len(FONTS), (n,), generator=gen)
    alpha = masks()[outline.long(), objects.clamp(min=0), font][:, None]
    angle, size = uniform(-.25, .25), uniform(.95, 1.3)                     # radians; 22–34 px of the mask
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    shift = uniform(-.15, .15, 2) * size[:, None]
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    alpha = F.grid_sample(alpha, grid, align_corners=False) * (objects != NONE)[:, None, None, None]
    # its colour, and a grey level for the ground that differs from it
    ink = (torch.tensor(list(COLOURS.values()))[colours] + uniform(-.08, .08, 3)).clamp(0, 1)
    luminance, grey = ink @ torch.tensor([.3, .59, .11]), uniform(.05, .95)
    grey = torch.where((grey - luminance).abs() < .3, (grey + .5) % 1, grey)
    tint = uniform(-.06, .06, 3)
    # the ground: two shades of that grey in a pattern
    centred = torch.arange(SIZE) - SIZE / 2 + .5
    yy, xx = torch.meshgrid(centred, centred, indexing="ij")
    turn = uniform(0, 2 * math.pi, 1, 1)
    cos, sin = torch.cos(turn), torch.sin(turn)
    pattern = textures(kinds, xx * cos + yy * sin, yy * cos - xx * sin, gen)
    ground = (grey[:, None, None] + pattern * uniform(.15, .3, 1, 1))[:, None] + tint[:, :, None, None]
    image = ground + alpha * (ink[:, :, None, None] - ground)
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, soft, uniform(0, 1, 1, 1, 1)) + .02 * torch.randn(image.shape, generator=gen)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


# (shape, colour) pairs to adapt on (True) and to keep unseen (False): five of each for each of the other
COMBINATIONS = {seen: [(s, c) for s in range(10) for c in range(10) if ((3 * s + c) % 10 < 5) == seen]
                for seen in (True, False)}
SEEN, UNSEEN = ([f"{list(COLOURS)[c]} {SHAPES[s]}" for s, c in pairs] for pairs in COMBINATIONS.values())
# task: (class names, template). `seen` is adapted on; the others are only ever evaluated.
TASKS = {
    "seen": ([f"{n} on a background of {t}" for n in SEEN for t in TEXTURES], "This is a photo of a {}"),
    "unseen": (UNSEEN, "This is a photo of a {}"), "shapes": (SHAPES, "A picture of a {}."),
    "outlines": (SHAPES, "A drawing of the outline of a {}."), "colours": (list(COLOURS), "Something {}."),
    "textures": (TEXTURES, "A background of {}."), "digits": (DIGITS, "A photo of the digit {}."),
    "letters": (LETTERS, "A photo of the letter {}."), "scans": (DIGITS, "A photo of the digit {}.")}


def task(name, split, n):
    """Images uint8 [n, 3, SIZE, SIZE] and labels int64 [n] of one task. split: "train" (to adapt on), "tune"
    (to choose settings on) or "test" (to report): other images, same classes. `scans` is real: scikit-learn's
    1,797 handwritten digits, 8×8, enlarged, whatever split and n."""
    if name == "scans":
        from sklearn.datasets import load_digits
        scans, labels = load_digits(return_X_y=True)
        scans = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        images = F.pad(F.interpolate(scans, size=28, mode="bilinear"), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        return (images * 255).round().to(torch.uint8), torch.tensor(labels)
    seed = int.from_bytes(hashlib.sha256(f"{name} {split}".encode()).digest()[:6], "big")
    gen, classes = torch.Generator().manual_seed(seed), len(TASKS[name][0])
    y = torch.arange(n) % classes if n >= classes else torch.arange(n) * classes // n    # balanced
    y = y[torch.randperm(n, generator=gen)]
    objects, colours, kinds = (torch.randint(count, (n,), generator=gen) for count in COUNTS)
    if name == "seen":
        objects, colours = torch.tensor(COMBINATIONS[True])[y // len(TEXTURES)].T
        kinds = y % len(TEXTURES)
    elif name == "unseen":
        objects, colours = torch.tensor(COMBINATIONS[False])[y].T
    elif name == "colours":         # of digits and letters
        objects, colours = len(SHAPES) + objects % (len(OBJECTS) - len(SHAPES)), y
    elif name == "textures":
        objects, kinds = torch.full((n,), NONE), y
    else:
        objects = y + {"digits": len(SHAPES), "letters": len(SHAPES + DIGITS)}.get(name, 0)
    return draw(objects, colours, kinds, torch.full((n,), name == "outlines"), seed), y


# --------------------------------------------------------------------------------------------- captions
WRAPPERS = ("{}", "a {}", "a photo of the {}", "this is a photo of a {}", "a picture of a {}.")
# What a caption mentions, and how often in the first and in the second caption of an image. With too few
# captions about the object, a CLIP this small learns colours and never looks at form.
FORMS = {"object": (.5, .25), "object, colour": (.5, .25), "colour": (0, .15), "texture": (0, .25),
         "object, colour, texture": (0, .1)}


def scenes(n, gen):
    """n random scenes, int64 [n, 4]: numbers in OBJECTS (or NONE), COLOURS, TEXTURES; 1 for an outline."""
    scene = torch.stack([torch.randint(count, (n,), generator=gen) for count in (*COUNTS, 1)], 1)
    chance = torch.rand(2, n, generator=gen)
    scene[chance[0] < .4, 2] = 0                                            # many plain grounds
    scene[(chance[1] < .25) & (scene[:, 0] < len(SHAPES)), 3] = 1           # shapes as outlines
    scene[chance[1] > .92, 0] = NONE                                        # the ground only
    return scene


def mention(scene, which, gen):
    """What the first (0) or second (1) caption of each scene says: int64 [n, 4], NONE where it is silent."""
    shares = torch.tensor([weights[which] for weights in FORMS.values()])
    form = torch.multinomial(shares, len(scene), replacement=True, generator=gen)
    attributes = "object", "colour", "texture", "outline"
    mentions = torch.tensor([[a in f for a in attributes] for f in FORMS])[form]            # bool [n, 4]
    mentions[:, 3] = mentions[:, 0] & (scene[:, 3] == 1) & (torch.rand(len(scene), generator=gen) < .5)
    mentions[scene[:, 0] == NONE] = torch.tensor([False, False, True, False])   # only the ground to speak of
    return scene.where(mentions, torch.full_like(scene, NONE))


def caption(said, wrapper):
    """One sentence about (object, colour, texture, outline), NONE: left out; wrapper: int, in WRAPPERS."""
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
