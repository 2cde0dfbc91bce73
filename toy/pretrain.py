"""The toy CLIP: contrastive pretraining on the drawn world, in the place of OpenAI's weights.

    python -m toy.pretrain --seed 0              # make toy/seed0.safetensors again: 18 minutes on one core
    python -m toy.pretrain --seed 0 --compare    # pretrain, and say how far the file that is there is from it

Seeds 0, 1 and 2 are shipped; others are pretrained on first use and kept in out/toy-clip/."""
import argparse
import functools
import hashlib
import inspect
import logging
import math
import os
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from toy import world

HERE = Path(__file__).parent
CONFIG = HERE / "toy.json"                      # an open_clip model: ViT, 32 px, patch 8, width 96, 4 layers
CACHE = HERE.parent / "out" / "toy-clip"
STEPS, BATCH, LEARNING_RATE = 4800, 128, 2e-3
EMBEDDING = "token_embedding.weight"            # [49408, 64]: captions use some hundred of its rows


def register():
    """Make `toy` a model that open_clip.create_model and open_clip.get_tokenizer know."""
    if "toy" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


def new_model(seed):
    """The toy CLIP with the random weights that pretraining starts from."""
    register()
    torch.manual_seed(seed)
    logging.disable()                           # open_clip says "initialized randomly": we know
    try:
        return open_clip.create_model("toy")
    finally:
        logging.disable(logging.NOTSET)


def clip_loss(model, tokenize, scene, images, gen):
    """The symmetric contrastive loss of B images [B,3,H,W] in [0,1] with two captions each, of scenes [B,4].
    A caption of another image that is true of this one too is no negative: it is left out of the softmax."""
    # what the captions say, [2B, 4], and the captions; each sentence is encoded once
    said = torch.cat([world.mention(scene, 0, gen), world.mention(scene, 1, gen)])
    wrappers = torch.randint(len(world.WRAPPERS), (len(said),), generator=gen)
    texts = [world.caption(*pair) for pair in zip(said.tolist(), wrappers.tolist())]
    unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    tokens = torch.cat([tokenize(text) for text in unique])
    x = normalize(images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    z = F.normalize(model.encode_image(x), dim=-1).repeat(2, 1)
    w = F.normalize(model.encode_text(tokens), dim=-1)[[unique[text] for text in texts]]
    # bool [2B, 2B]: caption j fits image i, though it is another's
    true = ((said == world.NONE) | (said == scene.repeat(2, 1)[:, None])).all(-1).fill_diagonal_(False)
    logits = (model.logit_scale.exp() * z @ w.T).masked_fill(true, -math.inf)
    target = torch.arange(len(said))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(seed, steps=STEPS):
    """The toy CLIP: contrastive pretraining (Radford et al. 2021, Figure 3) on scenes drawn on the fly.
    In one thread, because two sum in another order, which makes another CLIP."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    model = new_model(seed)
    gen = torch.Generator().manual_seed(seed)
    tokenize = functools.cache(open_clip.get_tokenizer("toy"))
    # Muon on the blocks' matrices: 50 % zero-shot after 300 steps, where AdamW alone is at 30 %
    matrices = [p for name, p in model.named_parameters() if "resblocks" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not ("resblocks" in name and p.ndim == 2)]
    optimizers = [torch.optim.Muon(matrices, weight_decay=.05, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, weight_decay=.05, betas=(.9, .98), fused=True)]
    bar = tqdm(range(steps), desc=f"pretrain the toy CLIP, seed {seed}", unit="step")
    for step in bar:
        scene = world.scenes(BATCH, gen)
        images = world.draw(*scene[:, :3].T, scene[:, 3] == 1, seed * 1_000_003 + step).float() / 255
        loss = clip_loss(model, tokenize, scene, images, gen)
        model.zero_grad(set_to_none=True)
        loss.backward()
        warmup, cosine = min(1, (step + 1) / 100), 1 + math.cos(math.pi * step / steps)
        for optimizer, rate in zip(optimizers, (2 * LEARNING_RATE, LEARNING_RATE)):     # of Muon, of AdamW
            optimizer.param_groups[0]["lr"] = rate * warmup * cosine / 2
            optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    torch.set_num_threads(usual)
    return model.eval()


# ------------------------------------------------------------------------------ its files
def recipe():
    """A hash of all that pretraining follows: the world, the model, the code above."""
    sources = [file.read_text("utf-8") for file in (Path(world.__file__), CONFIG)]
    sources += [inspect.getsource(function) for function in (new_model, clip_loss, pretrain)]
    return hashlib.sha256("".join([*sources, f"{STEPS} {BATCH} {LEARNING_RATE}"]).encode()).hexdigest()[:16]


def tokens_used():
    """The tokens of all captions, class names and templates, sorted: int64 [N]."""
    said = [*world.WRAPPERS, *world.OBJECTS, *world.COLOURS, *world.TEXTURES, "something", "outline of a",
            "on a background of"]
    for names, template in world.TASKS.values():
        said += [template, *names, *(name.lower() for name in names)]
    register()
    tokenize = open_clip.get_tokenizer("toy")
    # word by word, as the tokenizer goes; 0 pads
    return torch.cat([tokenize(word) for text in said for word in text.replace("{}", " ").split()]).unique()


def pack(path, model, seed):
    """Write what pretraining made, in half precision; of the token embedding the rows of `tokens_used`."""
    tensors = {name: t.half() if t.ndim else t for name, t in model.state_dict().items()}
    rows = tokens_used()
    tensors |= {EMBEDDING: tensors[EMBEDDING][rows].contiguous(), "tokens": rows}
    temporary = Path(f"{path}.tmp{os.getpid()}")
    save_file(tensors, temporary, {"seed": str(seed), "recipe": recipe()})
    os.replace(temporary, path)


def unpack(path):
    """The state dict in a file of `pack`, fp32: the other rows of the embedding are as its seed drew them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys() if name != "tokens"}
        rows, seed = file.get_tensor("tokens"), int(file.metadata()["seed"])
    embedding = new_model(seed).state_dict()[EMBEDDING]
    return tensors | {EMBEDDING: embedding.index_copy(0, rows, tensors[EMBEDDING])}


def seed_of(tag):
    """The seed that a tag such as seed0 names, or None if it names none."""
    return int(tag[4:]) if tag.startswith("seed") and tag[4:].isdigit() else None


def packed_file(seed):
    """The file of `pack` for a seed: the shipped one if it is of this recipe, or else one in the cache."""
    shipped = HERE / f"seed{seed}.safetensors"
    if shipped.exists():
        with safe_open(shipped, "pt") as file:
            if file.metadata()["recipe"] == recipe():
                return shipped
    path = CACHE / f"seed{seed}-{recipe()}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pack(path, pretrain(seed), seed)
    return path


def pretrained_file(seed):
    """The file of the toy CLIP's state dict, as open_clip loads it; pretrained now if there is none."""
    packed = packed_file(seed)
    name = f"seed{seed}-{hashlib.sha256(packed.read_bytes()).hexdigest()[:16]}.pt"
    path = CACHE / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        torch.save(unpack(packed), temporary)
        os.replace(temporary, path)
    return path


def main():
    parser = argparse.ArgumentParser(prog="python -m toy.pretrain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and captions (default: 0)")
    parser.add_argument("--compare", action="store_true", help="write nothing; say how far the new weights "
                        "are from those that are there")
    args = parser.parse_args()
    path = HERE / f"seed{args.seed}.safetensors"
    if not args.compare:
        pack(path, pretrain(args.seed), args.seed)
        return print(f"wrote {path}, {path.stat().st_size:,} bytes")
    made = CACHE / f"compare{args.seed}.safetensors"
    made.parent.mkdir(parents=True, exist_ok=True)
    pack(made, pretrain(args.seed), args.seed)
    new, there = unpack(made), unpack(path)
    apart = {name: (new[name] - there[name]).abs().max().item() for name in there}
    name = max(apart, key=apart.get)
    print(f"{name} differs by up to {apart[name]:g}" if apart[name] else "the same bits")


if __name__ == "__main__":
    main()
