"""Image towers without a patch space, small ones: their forward, what they can train, files, commands."""
import copy
import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from in_process import here
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from runs import log_of

import model
from eval_zeroshot import run_attacks
from harness.checkpoints import export_clip, load_visual, read_checkpoint, save_checkpoint, text_fingerprint
from kernels.contrastive_loss import cosine_logits, log_odds
from model import (CONFIG, ImageEncoder, adapt, check_adaptation, image_size, load_clip, model_config,
                   own_resize, own_vit, plain_vit, predict, projection,
                   refuse_openai_weights_without_quickgelu, unfreeze)
from tasks.images import to_pixels

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
OWN = {"image_size": 64, "layers": 2, "width": 48, "head_width": 24, "patch_size": 16}


def timm(name, size, pool, proj=None):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


# {name: (vision_cfg, more, what `projection` is, how many batch norms)}
TOWERS = {
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}, {},
               ["attnpool.c_proj.weight", "attnpool.c_proj.bias"], 19),
    "convnext": (timm("test_convnext", 64, "", "linear"), {}, ["head.proj.weight"], 0),
    "convnext-mlp": (timm("test_convnext", 64, "", "mlp"), {}, ["head.mlp.fc2.weight"], 0),
    "map": (timm("test_vit3", 160, "map", "none"), {"embed_dim": 96, "init_logit_bias": -10}, [], 0),
    "eva": (timm("eva02_tiny_patch14_224", 224, "token"), {}, ["trunk.head.weight", "trunk.head.bias"], 0),
    "mobileclip": (timm("fastvit_mci0", 64, "avg"), {}, ["trunk.head.fc.weight", "trunk.head.fc.bias"], 114),
    "mobileclip-vit": (timm("test_vit", 160, "token"), {}, ["trunk.head.weight", "trunk.head.bias"], 0),
    "relpos": (timm("test_vit_relpos", 160, "", "linear"), {}, ["head.proj.weight"], 0),
    "batch-norm": (timm("test_resnet", 64, "avg", "linear"), {}, ["head.proj.weight"], 15),
    "coca": (OWN | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
             {"multimodal_cfg": TEXT | {"dim_head": 8, "n_queries": 4, "attn_pooler_heads": 2}}, ["proj"], 0),
    "clipa": (OWN | {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}, {}, ["proj"], 0),
    "average": (OWN | {"pool_type": "avg"}, {}, ["proj"], 0),
    "plain": (OWN, {}, ["proj"], 0)}


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """Their configs, by the names toy-<tower>, as those of open_clip's own models."""
    folder = tmp_path_factory.mktemp("configs")
    with pytest.MonkeyPatch.context() as patch:
        for name, (vision, more, *_) in TOWERS.items():
            file = folder / f"toy-{name}.json"
            text = TEXT | ({"embed_cls": True, "output_tokens": True} if name == "coca" else {})
            custom = {"custom_text": True} if "timm_model_name" in vision or name == "coca" else {}
            config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text} | custom | more
            file.write_text(json.dumps(config))
            patch.setitem(model.open_clip_lists()[0], file.stem, file)
        open_clip.add_model_config(folder)
        yield


def moved(name, seed=1):
    """A tower with weights and statistics as after some training: none is zero, none the identity."""
    clip, gen = load_clip(f"toy-{name}", "none")[0], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in clip.visual.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, .1, generator=gen)
                module.running_var.uniform_(.5, 2, generator=gen)
        for p in clip.visual.parameters():
            p.add_(.05 * torch.randn(p.shape, generator=gen))
    if hasattr(clip, "text_decoder"):           # which open_clip leaves as the memory was
        clip.text_decoder.text_projection.zero_()
    return clip


def normalised(clip, x):
    mean, std = (torch.tensor(clip.visual.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


def open_clips_own(clip, image):
    """encode_image, not normalised, which CoCa's does by default."""
    return clip.encode_image(image, normalize=False)


@pytest.mark.parametrize("name", TOWERS)
def test_features_and_gradients_are_open_clips_and_autograds(name):
    clip, gen = moved(name), torch.Generator().manual_seed(0)
    size, (_, _, _, norms) = image_size(f"toy-{name}", "none"), TOWERS[name]
    x = torch.rand(2, 3, size, size, generator=gen).requires_grad_()
    expected = open_clips_own(clip, normalised(clip, x))
    w = torch.randn(expected.shape, generator=gen)
    (grad,) = torch.autograd.grad((expected * w).sum(), x)

    encoder, before = ImageEncoder(clip), copy.deepcopy(clip.state_dict())
    z = encoder(encoder.patchify(x))
    assert z.shape == (2, model_config(f"toy-{name}")["embed_dim"]) and z.dtype == torch.float32
    assert torch.allclose(z, expected, atol=1e-5 * float(expected.abs().max()))
    (found,) = torch.autograd.grad((z * w).sum(), x)
    assert torch.allclose(found, grad, atol=1e-5 * float(grad.abs().max())) and grad.abs().max() > 0
    assert encoder.plain == (name == "plain") == plain_vit(TOWERS[name][0])
    assert encoder.plain or encoder.patchify(x) is x

    # of another resolution: resized inside the differentiated function
    small = x[:, :, :30, :40].detach().requires_grad_()
    resized = F.interpolate(small, (size, size), mode="bicubic")
    assert torch.allclose(encoder(small), encoder(resized), atol=1e-5 * float(expected.abs().max()))
    assert torch.autograd.grad((encoder(small) * w).sum(), small)[0].shape == small.shape

    # every parameter of it has a part in the features, and batch norm's statistics stay
    unfreeze(adapt(encoder, ["full"]))
    (encoder(x.detach()) * w).sum().backward()
    assert all(p.grad is not None for p in clip.visual.parameters()) and not clip.visual.training
    assert all(torch.equal(t, before[key]) for key, t in clip.state_dict().items())
    kinds = [type(module) for module in clip.visual.modules()]
    assert sum(issubclass(kind, torch.nn.modules.batchnorm._BatchNorm) for kind in kinds) == norms


@pytest.mark.parametrize("name", ["resnet", "convnext", "map", "clipa", "coca"])
def test_low_precision_starts_after_the_first_convolution(name):
    clip, seen = moved(name), {}
    size = image_size(f"toy-{name}", "none")
    encoder, x = ImageEncoder(clip, torch.bfloat16), torch.rand(2, 3, size, size)
    convolutions = [m for m in clip.visual.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels == 3]
    for module in clip.visual.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, o: seen.update({m: (i[0].dtype, o.dtype)}))
    for lowered in (False, True):               # nor can a caller lower it
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            z = encoder(x)
        assert z.dtype == torch.float32
        assert [seen.pop(m) for m in convolutions] == [(torch.float32, torch.float32)] * len(convolutions)
        assert len(seen) > 3 and {out for _, out in seen.values()} == {torch.bfloat16}
    exact = model.judging(encoder)(x)
    assert torch.equal(exact, open_clips_own(clip, normalised(clip, x))) and not torch.equal(z, exact)
    assert F.cosine_similarity(z, exact).min() > .99
    # a frozen copy, such as fare's, is as the first
    assert torch.equal(copy.deepcopy(encoder)(x), encoder(x))


@pytest.mark.parametrize("name", ["resnet", "map", "coca"])
def test_a_border_is_added_to_the_normalised_image(name):
    clip, size = moved(name), image_size(f"toy-{name}", "none")
    encoder, x = ImageEncoder(clip), torch.rand(2, 3, size, size)
    trained = adapt(encoder, ["image-prompt"], border=5)
    border = encoder.prompts()["border"]
    assert [*trained] == ["border"] and trained["border"].shape == (3, size**2 - (size - 10)**2)
    expected = open_clips_own(clip, normalised(clip, x) + border)
    assert torch.allclose(encoder(x), expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(expected, open_clips_own(clip, normalised(clip, x)), rtol=1e-3)
    unfreeze(trained)
    assert torch.autograd.grad(encoder(x).sum(), trained["border"])[0].abs().max() > 0
    again = ImageEncoder(clip, prompts={"border": border})
    assert torch.allclose(again(x), expected, atol=1e-5 * float(expected.abs().max()))


def test_what_a_tower_can_train():
    for name, (vision, _, last, _) in TOWERS.items():
        if name in ("eva", "mobileclip"):    # others end likewise, and are made faster
            continue
        clip, label = load_clip(f"toy-{name}", "none")[0], f"toy-{name}"
        encoder = ImageEncoder(clip)
        assert projection(clip.visual) == last
        assert [*adapt(encoder, ["linear"])] == [f"visual.{part}" for part in last]
        assert [*adapt(encoder, ["full"])] == [f"visual.{part}" for part, _ in clip.visual.named_parameters()]
        own, sizes = "timm_model_name" not in vision and name != "resnet", {"last_blocks": 1, "border": 4}
        assert own_vit(vision) == own
        check_adaptation(["full"], label, **sizes)
        check_adaptation(["image-prompt"], label, **sizes)
        with pytest.raises(ValueError, match="leaves nothing inside"):
            check_adaptation(["image-prompt"], label, last_blocks=None, border=vision["image_size"] // 2)
        for method, can in (("token-prompt", name == "plain"), ("partial", own)):
            if can:
                check_adaptation([method], label, **sizes)
            else:
                with pytest.raises(ValueError, match=f"--adapt {method}: .* is no vision transf") as error:
                    check_adaptation([method], label, **sizes)
                assert "\n" not in str(error.value)
        if own:
            unfreeze(adapt(encoder, ["partial"], last_blocks=1))
            encoder(torch.rand(2, 3, 64, 64)).sum().backward()
            trained = {part for part, p in clip.visual.named_parameters() if p.grad is not None}
            starts = ("transformer.resblocks.1.", "attn_pool.", "ln_post.", "proj")
            assert trained == {part for part, _ in clip.visual.named_parameters() if part.startswith(starts)}
            with pytest.raises(ValueError, match="--last-blocks 3: toy-.* has 2"):
                check_adaptation(["partial"], label, last_blocks=3, border=4)


def test_a_shift_of_all_logits_changes_nothing():
    """SigLIP's logit_bias: open_clip's logits have it, ours are cosines times the scale."""
    clip = moved("map")
    clip.logit_scale.fill_(3.)
    x = torch.rand(3, 3, 160, 160)
    text = open_clip.get_tokenizer("toy-map")(["a", "red", "house by the sea"])
    theirs, _ = clip.get_logits(normalised(clip, x), text)
    head, scale = F.normalize(clip.encode_text(text), dim=1), clip.logit_scale.exp().item()
    z, y = ImageEncoder(clip)(x), torch.tensor([0, 1, 2])
    ours = cosine_logits(z, head, scale)
    assert torch.allclose(theirs, ours - 10, atol=1e-4)
    assert torch.allclose(log_odds(theirs, y), log_odds(ours, y), atol=1e-4)
    assert torch.equal(predict(ImageEncoder(clip), head, scale, x), theirs.argmax(1))


@pytest.mark.parametrize("name", ["resnet", "map"])
def test_attacks_reach_pixels_of_any_resolution(name):
    clip, gen = moved(name), torch.Generator().manual_seed(0)
    encoder, width = ImageEncoder(clip), model_config(f"toy-{name}")["embed_dim"]
    head = F.normalize(torch.randn(5, width, generator=gen), dim=1)
    x = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=gen)
    y = predict(encoder, head, 100., x / 255)
    options = {"names": ["pgd", "square"], "eps": 8 / 255, "norm": "linf", "steps": 3, "step_size": 4 / 255,
               "queries": 3, "seed": 0}
    for given in (x, x / 255):
        x_adv, predicted, broken_by, *_, zero, uphill = run_attacks(encoder, head, 100., given, y,
                                                                    torch.arange(4), **options)
        assert x_adv.shape == x.shape and not zero.any() and uphill.all()
        assert ((x_adv - x / 255).abs() <= 8 / 255 + 1e-6).all()
        assert torch.equal(predict(encoder, head, 100., x_adv), predicted)
        assert torch.equal(predicted != y, broken_by >= 0)


# ------------------------------------------------------------------------------ files
@pytest.mark.parametrize("name", ["resnet", "map", "batch-norm", "coca"])
def test_checkpoints_hold_batch_norms_statistics(name, tmp_path):
    clip, other = moved(name), moved(name, seed=2)
    for key, t in clip.state_dict().items():
        if key.endswith("num_batches_tracked"):
            t.fill_(7)
    assert text_fingerprint(clip) == text_fingerprint(other)
    path, config = tmp_path / "ckpt.pt", {"model": f"toy-{name}", "pretrained": "none"}
    save_checkpoint(path, clip, config)
    checkpoint, start = read_checkpoint(path), copy.deepcopy(other.state_dict())
    assert checkpoint["visual"].keys() == {key for key in start if key.startswith("visual.")}
    half = copy.deepcopy(other)
    for target, alpha in ((half, .5), (other, 1.)):
        load_visual(target, checkpoint, path, alpha)
        for key, t in target.state_dict().items():
            whole = clip.state_dict()[key]
            between = t.is_floating_point() and alpha < 1
            expected = (start[key] + whole) / 2 if between else whole
            assert torch.allclose(t, expected, atol=1e-6), key

    # files of others: the image encoder alone, and the whole
    for content in (clip.visual.state_dict(), clip.state_dict()):
        torch.save({"state_dict": {f"module.{key}": t for key, t in content.items()}}, path)
        with pytest.raises(ValueError, match="does not say for which model"):
            read_checkpoint(path)
        fresh = moved(name, seed=2)
        load_visual(fresh, read_checkpoint(path, f"toy-{name}"), path)
        assert all(torch.equal(t, clip.state_dict()[key]) for key, t in fresh.state_dict().items())
    tokens = {"format": "prompts", "model": f"toy-{name}", "pretrained": None, "config": {}, "visual": {},
              "text": None, "prompts": {"tokens": torch.zeros(2, 48)}}
    with pytest.raises(ValueError, match=r"unexpected \['tokens'\]"):
        load_visual(other, tokens, path)
    with torch.no_grad():
        text = clip.text.token_embedding if hasattr(clip, "text") else clip.token_embedding
        text.weight[5, 5] += 1
    assert text_fingerprint(clip) != text_fingerprint(other)


def test_a_resnet_with_openais_weights_has_quickgelu_in_its_text_encoder_alone(tmp_path):
    config = model_config("toy-resnet")
    plain, quick = (open_clip.model.CLIP(**config, quick_gelu=value) for value in (False, True))
    state = quick.state_dict()
    for name, t in state.items():               # as OpenAI's are: linear weights in half precision
        if t.ndim == 2 and "resblocks" in name:
            t.copy_(t.half().float())
    refuse_openai_weights_without_quickgelu(quick, state, "file", "RN50-quickgelu")
    with pytest.raises(ValueError, match="QuickGELU mismatch"):
        refuse_openai_weights_without_quickgelu(plain, state, "file", "RN50")


def folder_of(name, path, preprocess):
    """A tower with moved weights in a folder, as --model local-dir:."""
    clip = moved(name)
    path.mkdir()
    state = {key: t.contiguous() for key, t in clip.state_dict().items()}
    safetensors.torch.save_file(state, path / "open_clip_model.safetensors")
    (path / CONFIG).write_text(json.dumps({"model_cfg": model_config(f"toy-{name}"),
                                           "preprocess_cfg": preprocess}))
    return f"local-dir:{path}"


@pytest.mark.parametrize("name,loss,dtype", [("resnet", "tecoa", "bf16"), ("map", "fare", "fp32")])
def test_from_training_to_open_clip(name, loss, dtype, tmp_path, read_json):
    """Two steps of training, evaluation, export, and what open_clip and we load from that."""
    preprocess = {"mean": [.5, .4, .3], "std": [.5, .5, .25], "interpolation": "bicubic",
                  "resize_mode": "squash"}
    base, run = folder_of(name, tmp_path / "base", preprocess), tmp_path / "run"
    clip, _ = load_clip(base)
    model_words, start = ("--model", base), copy.deepcopy(clip.state_dict())
    small = ("--tasks", "digits", "--limit", 10, "--eps", 8, "--device", "cpu", "--dtype", dtype)
    done = here("train_tecoa.py", *model_words, *small, "--dataset", "digits", "--loss", loss, "--lr", .01,
                "--batch-size", 4, "--warmup", 0, "--max-steps", 2, "--eval-steps", 1, "--out", run)
    count = sum(p.numel() for p in clip.visual.parameters())
    assert f"--adapt full trains {count:,} parameters" in done.stdout and log_of(run)[-1]["step"] == 2
    checkpoint = read_checkpoint(run / "ckpt.pt")
    still = {key for key, t in checkpoint["visual"].items() if torch.equal(t, start[key])}
    ends = "running_mean", "running_var", "num_batches_tracked"
    statistics = {key for key in checkpoint["visual"] if key.endswith(ends)}
    assert statistics <= still and len(still - statistics) < .1 * len(checkpoint["visual"])
    assert checkpoint["constants"]["mean"] == [.5, .4, .3] and (run / "examples.png").exists()

    exported = tmp_path / "exported"
    words = ("--attack", "pgd,square", "--steps", 2, "--queries", 2)
    here("eval_zeroshot.py", "--ckpt", run / "ckpt.pt", *small, *words, "--export", exported,
         "--out", tmp_path / "a")
    here("eval_zeroshot.py", "--model", f"local-dir:{exported}", *small, *words, "--out", tmp_path / "b")
    a, b = (read_json(tmp_path / out / "results.json")["tasks"] for out in "ab")
    assert a == b and 0 <= a["digits"]["robust"] <= a["digits"]["clean"] and a["digits"]["clean"] > 0
    theirs = open_clip.create_model(f"local-dir:{exported}").eval()
    for key, t in theirs.state_dict().items():
        assert torch.equal(t, checkpoint["visual"].get(key, start[key])), key
    assert [*theirs.visual.preprocess_cfg["mean"]] == [.5, .4, .3]
    assert theirs.visual.preprocess_cfg["resize_mode"] == "squash" == own_resize(f"local-dir:{exported}")

    for method, why in (("token-prompt", "no vision transf"), ("partial", "no vision transf"),
                        ("linear", "ends without a projection")):
        if (name, method) != ("resnet", "linear"):
            words = (*model_words, *small, "--dataset", "digits", "--adapt", method, "--batch-size", 4)
            error = here("train_tecoa.py", *words, "--out", tmp_path / "no", status=2).stderr.strip()
            assert why in error and error.startswith("train_tecoa.py: --adapt ") and "\n" not in error


@pytest.mark.parametrize("method,loss", [("linear", "tecoa"), ("linear", "ce"), ("image-prompt", "tecoa")])
def test_what_trains_of_a_tower_changes_alone(method, loss, tmp_path):
    base, run = folder_of("batch-norm", tmp_path / "base", {}), tmp_path / "run"
    start = load_clip(base)[0].state_dict()
    here("train_tecoa.py", "--model", base, "--tasks", "none", "--dataset", "digits", "--limit", 8,
         "--adapt", method, "--loss", loss, "--batch-size", 4, "--lr", .01, "--warmup", 0, "--epochs", 1,
         "--eval-steps", 1, "--device", "cpu", "--out", run)
    checkpoint = read_checkpoint(run / "ckpt.pt")
    changed = {key for key, t in checkpoint["visual"].items() if not torch.equal(t, start[key])}
    assert changed == ({"visual.head.proj.weight"} if (method, loss) == ("linear", "tecoa") else set())
    assert checkpoint.get("prompts", {}).keys() == ({"border"} if method == "image-prompt" else set())


# ------------------------------------------------------------------------------ images, tokenizers
@pytest.mark.parametrize("size", [(90, 61), (40, 97), (64, 64), (200, 3)])
@pytest.mark.parametrize("mode", ["squash", "longest"])
def test_images_are_made_square_as_open_clip_does(mode, size):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    config = PreprocessCfg(size=64, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, fill_color=0)
    theirs = (255 * image_transform_v2(config, is_train=False)(image)).round().to(torch.uint8)
    assert torch.equal(to_pixels(64, mode, "bicubic")(image), theirs)


def test_the_mode_is_the_models_own(tmp_path):
    for name, tag, mode in (("ViT-B-16-SigLIP", "webli", "squash"), ("ViT-B-32", "openai", None),
                            ("MobileCLIP-S1", "datacompdr", None), ("ViT-L-14-CLIPA", "datacomp1b", "squash"),
                            ("RN50", "none", None), ("toy", "seed0", None)):
        assert own_resize(name, tag) == mode
        if tag not in ("none", "seed0"):
            assert (open_clip.get_pretrained_cfg(name, tag)["resize_mode"] == "squash") == (mode == "squash")
    file = tmp_path / "weights.pt"
    file.touch()
    assert own_resize("toy", str(file)) is None
    for said, mode in (("longest", "longest"), ("shortest", None), (None, None)):
        config = {"model_cfg": model_config("toy-resnet"), "preprocess_cfg": {"resize_mode": said}}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        assert own_resize(f"local-dir:{tmp_path}") == own_resize("toy-resnet", str(file)) == mode
    (tmp_path / CONFIG).write_text(json.dumps(config | {"preprocess_cfg": {"resize_mode": "crop"}}))
    with pytest.raises(ValueError, match="resize_mode 'crop'"):
        own_resize(f"local-dir:{tmp_path}")


def test_a_folder_of_images_is_squashed_for_a_model_that_was_trained_so(tmp_path, read_json):
    """Stripes at the ends of wide images, which cropping the centre would lose."""
    for split in ("train", "val"):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            image = Image.new("RGB", (300, 60), (128, 128, 128))
            image.paste(colour, (0, 0, 60, 60))
            image.save(tmp_path / split / name / "a.png")
    seen = {}
    for mode in ("shortest", "squash"):
        base = folder_of("convnext", tmp_path / mode, {"resize_mode": mode})
        out = tmp_path / f"out-{mode}"
        done = here("eval_zeroshot.py", "--model", base, "--tasks", f"folder:{tmp_path}", "--steps", 1,
                    "--workers", 0, "--device", "cpu", "--save-adv", out / "adv", "--out", out)
        assert ("by squash, unless --resize" in done.stdout) == (mode == "squash")
        seen[mode] = [np.load(file)["x"] for file in sorted((out / "adv").rglob("*.npz"))]
    coloured = {mode: any(np.ptp(x, axis=1).max() > 100 for x in images) for mode, images in seen.items()}
    assert coloured == {"shortest": False, "squash": True}


def test_images_that_are_not_square_are_refused(tmp_path):
    config = {"model_cfg": model_config("toy-plain"), "preprocess_cfg": {}}
    (tmp_path / "model.pth").touch()
    for size, said in (([64, 64], 64), ([64, 32], None)):
        config["model_cfg"]["vision_cfg"]["image_size"] = size
        (tmp_path / CONFIG).write_text(json.dumps(config))
        if said:
            assert image_size(f"local-dir:{tmp_path}") == said
        else:
            with pytest.raises(ValueError, match="images of 64×32 pixels"):
                image_size(f"local-dir:{tmp_path}")


def test_a_tokenizer_that_must_be_downloaded_is_named_and_offline_it_is_one_line(monkeypatch, capsys):
    def from_pretrained(name, **_):
        raise OSError(f"We couldn't connect to 'https://huggingface.co'\nto load {name}")
    stub = SimpleNamespace(AutoTokenizer=SimpleNamespace(from_pretrained=from_pretrained),
                           __spec__=ModuleSpec("transformers", None))
    monkeypatch.setitem(sys.modules, "transformers", stub)
    model.say_source.cache_clear()
    model.say.cache_clear()
    said = "cannot load the tokenizer of --model ViT-B-16-SigLIP .*couldn't connect"
    with pytest.raises(ValueError, match=said) as error:
        load_clip("ViT-B-16-SigLIP", "webli")
    assert "\n" not in str(error.value)
    assert "huggingface.co/timm/ViT-B-16-SigLIP (tokenizer)" in capsys.readouterr().out
    image_size("roberta-ViT-B-32", "none")
    assert "huggingface.co/roberta-base (text encoder)" in capsys.readouterr().out


def test_an_export_brings_its_tokenizer_where_open_clip_looks_for_it(tmp_path):
    saved = []
    tokenizer = SimpleNamespace(save_pretrained=saved.append)
    clip = load_clip("toy-map", "none")[0]
    export_clip(clip, "toy-map", tmp_path, None, tokenizer)
    export_clip(clip, "toy-map", tmp_path, None, open_clip.get_tokenizer("toy-map"))
    assert saved == [tmp_path]
