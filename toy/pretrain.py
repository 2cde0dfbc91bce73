"""The toy CLIP: contrastive pretraining on the drawn world, in the place of OpenAI's weights."""
import functools
import hashlib
import logging
import math
import os
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from toy import world

CONFIG = Path(__file__).parent / "toy.json"     # an open_clip model: ViT, 32 px, patch 8, width 96, 4 layers
CACHE = Path(__file__).parent.parent / "out" / "toy-clip"
STEPS, BATCH, LEARNING_RATE = 1600, 128, 2e-3


def register():
    """Make `toy` a model that open_clip.create_model and open_clip.get_tokenizer know."""
    if "toy" not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


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


def pretrain(seed, steps=STEPS, threads=2):
    """The toy CLIP: contrastive pretraining (Radford et al. 2021, Figure 3) on scenes drawn on the fly.
    threads: of PyTorch's, meanwhile; sums in another order make another CLIP."""
    register()
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    logging.disable()               # open_clip says "initialized randomly": we know
    model = open_clip.create_model("toy")
    logging.disable(logging.NOTSET)
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


def seed_of(tag):
    """The seed that a tag such as seed0 names, or None if it names none."""
    return int(tag[4:]) if tag.startswith("seed") and tag[4:].isdigit() else None


def pretrained_file(seed):
    """The file of the toy CLIP's state dict, by seed and sources; pretrained now if it is not there."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, world.__file__, CONFIG))
    path = CACHE / f"seed{seed}-{hashlib.sha256(sources).hexdigest()[:8]}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        torch.save(pretrain(seed).state_dict(), temporary)
        os.replace(temporary, path)
    return path
