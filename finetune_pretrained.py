# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "safetensors", "diffusers"]
# ///
"""Fine-tune published NextDiT weights, or those of our own scripts, to draw images from masks.

    python finetune_pretrained.py --weights WEIGHTS --vae sdxl-vae --data_dir DATA --time_budget 3h
    python finetune_pretrained.py                                 # try it out: a small network takes the place of the weights
    python finetune_pretrained.py --sample 4 --mask_dir MASKS     # four pictures for each mask

Published weights: consolidated_ema.00-of-01.safetensors of Alpha-VLLM/Lumina-Next-T2I (1.63 billion weights: 6.5 GB in
fp32, 3.3 GB in bf16) and stabilityai/sdxl-vae (0.33 GB). In China first set HF_ENDPOINT=https://hf-mirror.com, then
    pip install diffusers huggingface_hub
    hf download Alpha-VLLM/Lumina-Next-T2I --include "consolidated_ema*" --local-dir lumina
    hf download stabilityai/sdxl-vae config.json diffusion_pytorch_model.safetensors --local-dir sdxl-vae
The text encoder (Gemma, 5 GB) is not needed: a learned prompt takes its place. --weights also takes a run folder of
train_nextdit_fast.py or train_nextdit_ultrafast.py. The sizes follow from the numbers of weights; names as its code has them.
"""

import dataclasses
import functools
import json
import math
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

try:
    from common import (  # isort: skip
        EMA, SAMPLE_MARKS, UNREADABLE, VAE, Items, Parts, RecipeError, Run, Settings, colour, copy_rate, find_images,
        find_labels, fundus, load_tensors, main, mask_picture, mirrored, mix, open_records, opt, overlay, picture, read_image,
        read_json, read_mask, read_settings, say, square, trained_weights, uniforms, with_state, write_aside, write_weights,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py finetune_pretrained.py"
    ) from e

RECIPE = "finetune_pretrained"
BUILT_IN = 48  # images to train on where there is no --data_dir
NOISY = 12  # noisy images at each time of the held-out loss, at least
STAND_IN = 40  # updates of the network that stands for published weights where there are none
EXPORT = "merged.safetensors"


@dataclass
class Config(Settings):
    weights: str = opt("", "file or folder of pretrained weights, or a run folder of ours", everyday=True)
    vae: str = opt("", "folder of a diffusers AutoencoderKL, for weights that work on latents", everyday=True)
    mask_dir: str = opt("", "folder of masks; empty: masks/ beside images/", everyday=True)
    train: str = opt(
        "lora",
        "lora: thin additions; ends: first and last layers; all: everything",
        fixed=True,
        everyday=True,
        choices=("lora", "ends", "all"),
    )
    lora_rank: int = opt(16, "rank of the LoRA matrices", fixed=True, low=1)
    heads: int = opt(0, "attention heads; 0: as the weights tell", fixed=True, low=0)
    target_size: int = opt(0, "image size in pixels; 0: 512, or as the weights tell, or 64 for built-in", fixed=True, low=0)
    flip: str = opt("h", "mirror training images: horizontally, both ways", fixed=True, choices=("none", "h", "hv"))
    batch_size: int = opt(16, "images per forward pass and process", everyday=True, low=1)
    num_epochs: float = opt(10.0, "length of the run in passes over the data", everyday=True, low=0)
    learning_rate: float = opt(0.0, "peak learning rate; 0: 3e-4 for lora, 1e-4 for ends, 2e-5 for all", fixed=True, low=0)
    weight_decay: float = opt(0.0, "weight decay of AdamW", fixed=True, low=0)
    t_shape: str = opt(
        "stratified", "how training draws the noise levels", fixed=True, choices=("uniform", "stratified", "lognormal")
    )
    t_mean: float = opt(0.0, "for --t_shape lognormal: mean of the logit of the time; below 0: more noise", fixed=True)
    mask_drop: float = opt(0.1, "share of masks hidden in training, for guidance", fixed=True, low=0, high=1)
    checkpointing: bool | None = opt(None, "compute activations twice to save memory; default: on a GPU")
    val_images: int = opt(64, "validation images to use at most", low=1)
    sample: int = opt(0, "only draw: so many pictures for each mask of --mask_dir", everyday=True, action=True)
    merge: bool = opt(False, "only write weights that load without LoRA, as the end of a run does", action=True)
    steps: int = opt(25, "steps of the sampler", low=1)
    solver: str = opt("heun", "how the sampler steps", choices=("euler", "midpoint", "heun"))
    guidance: float = opt(1.5, "guidance over the mask; 1: none", low=0)
    shift: float = opt(1.0, "time shift of the sampler; above 1: more steps near noise", low=0.1)
    geometry: str = opt("", "the network's arguments, read from the weights", derived=True)
    predict: str = opt("v", "what the network predicts", derived=True)
    patch: int = opt(2, "patch size", derived=True)
    size: str = opt("", "name of the network's size", derived=True)
    labels: str = opt("", "the masks' values, background first", derived=True)
    channels: int = opt(3, "channels of what is modelled", derived=True)
    factor: int = opt(1, "pixels per element of what is modelled", derived=True)

    def __post_init__(self):
        settle(self)


# --- data --------------------------------------------------------------------------------------------------------------
# Copied from train_nextdit_fast.py::load_item
def load_item(path):
    """EDIT HERE: one image file -> uint8 [height, width, 3], or [height, width] for a gray one."""
    return read_image(path)


# Copied from train_nextdit_fast.py::fit_mask
def fit_mask(mask, cfg):
    """The middle square of bool [classes, h, w] at target_size: set where a quarter of what a pixel covers is, so that thin
    vessels survive."""
    return np.stack([square(np.uint8(m) * 255, cfg.target_size, Image.Resampling.BOX) >= 64 for m in mask])


# Copied from train_nextdit_fast.py::load_pair
def load_pair(record, cfg, labels):
    """(image uint8 [3, s, s], mask bool [classes, s, s] or None) of a record; its middle square, resized. ValueError where
    the two differ in shape."""
    if not isinstance(record, dict):
        image, mask = fundus(record, cfg.target_size)
        return image.transpose(2, 0, 1), mask
    image, mask = colour(load_item(record["image"]), record["image"]), None
    if labels:
        mask = read_mask(record["mask"], labels)
        h, w = image.shape[:2]
        if abs(mask.shape[1] * w - mask.shape[2] * h) > 0.02 * h * mask.shape[2]:
            raise ValueError(f"{w} x {h} pixels, and its mask {mask.shape[2]} x {mask.shape[1]}")
        mask = fit_mask(mask, cfg)
    image = square(image, cfg.target_size)
    return np.ascontiguousarray(image.transpose(2, 0, 1)), mask


# Copied from train_nextdit_fast.py::Pairs
class Pairs(torch.utils.data.Dataset):
    """Images with their masks, mirrored at random; an epoch holds each once. `latents` [images, mirrorings, c, h, w] stand in
    for the images where the model works on those."""

    def __init__(self, items, cfg, latents=None):
        self.items, self.cfg, self.cached, self.latents = items, cfg, items.cached, latents

    def __len__(self):
        return len(self.items)

    def name(self, index):
        """The file of a sample, for messages."""
        record = self.items.paths[index]
        return record["image"] if isinstance(record, dict) else record

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out.

        image: uint8 [n, 3, s, s], or latents [n, c, h, w]; mask: uint8 [n, classes, s, s], 0 or 1; index: [n].
        """
        images, masks = [], []
        for epoch, i in keys:
            turn = int(uniforms(self.cfg.seed, epoch, [i], 1)[0, 0] * {"none": 1, "h": 2, "hv": 4}[self.cfg.flip])
            image, mask = self.items[i]
            flip = (slice(None), slice(None, None, -1 if turn & 2 else 1), slice(None, None, -1 if turn & 1 else 1))
            images.append(image[flip] if self.latents is None else self.latents[i, turn].numpy())
            masks += [] if mask is None else [mask[flip]]
        batch = {"image": np.stack(images), "index": np.array([i for _, i in keys])}
        batch |= {"mask": np.stack(masks).astype(np.uint8)} if masks else {}
        return {k: torch.from_numpy(a) for k, a in batch.items()}


def settle(cfg):
    """Fill what 0 leaves to the script. RecipeError for a call that cannot work."""
    if cfg.sample or cfg.merge:
        return  # the run's own settings count
    if cfg.data_dir and not cfg.weights:
        raise RecipeError("--weights is missing: a file or folder of pretrained NextDiT weights; --help says where.", 2)
    ours = run_settings(cfg.weights) if cfg.weights else {}
    cfg.target_size = cfg.target_size or ours.get("target_size") or (512 if cfg.data_dir else 64)
    cfg.vae = cfg.vae or ours.get("vae", "")
    if not cfg.weights and cfg.target_size % 4:
        raise RecipeError(f"--target_size is {cfg.target_size}; without --weights it takes a multiple of 4.", 2)
    cfg.learning_rate = cfg.learning_rate or {"lora": 3e-4, "ends": 1e-4, "all": 2e-5}[cfg.train]


# Copied from train_nextdit_fast.py::Pixels
class Pixels:
    """Images as they are, in -1..1."""

    channels, factor = 3, 1

    def prepare(self, items, cfg, run):
        """Nothing: pixels are cached as they are."""

    def encode(self, images):
        return images.float() / 127.5 - 1

    def decode(self, x):
        return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def open_codec(cfg, run):
    """What turns uint8 images [n, 3, s, s] into what is modelled and back: pixels, or the latents of --vae."""
    codec = VAE(cfg.vae, run.device) if cfg.vae else Pixels()
    cfg.channels, cfg.factor = codec.channels, codec.factor
    return codec


# Copied from train_nextdit_fast.py::to_masks
def to_masks(masks, cfg):
    """uint8 or bool masks [n, classes, s, s] -> -1 or 1 [n, classes * factor^2, s / factor, s / factor]."""
    return F.pixel_unshuffle(masks.float() * 2 - 1, cfg.factor)


# Copied from train_nextdit_fast.py::open_data
def open_data(cfg, run, codec):
    """(training pairs, held-out namespace) of the folders, or of built-in images without any; writes data.png.

    Held out: `images` uint8 [n, 3, s, s], `x` what is modelled, `mask` as the network takes it, or None; `thumbs` the
    training images at 32 x 32 with their mirrorings [n, mirrorings, 3, 32, 32], for `copy_rate`.
    """
    labels = []
    if cfg.data_dir:
        sets = zip(("training", "validation"), open_records(cfg), (cfg.data_dir, cfg.val_dir or cfg.data_dir))
        train, held = (run.fix_files(*s) for s in sets)
        masks = [r["mask"] for r in train + held if r.get("mask")]
        if masks and len(masks) < len(train + held):
            without = [str(r["image"]) for r in train + held if not r.get("mask")]
            say(f"{len(without)} images have no mask and are left out: {', '.join(without[:5])}")
            train, held = ([r for r in s if r.get("mask")] for s in (train, held))
        if masks:
            labels = [int(v) for v in run.settings.get("settings", {}).get("labels", "").split()] or find_labels(
                masks, run.check
            )
        else:
            say("No masks (no folder masks beside images, no --mask_dir): training on images alone, which no mask can steer.")
    else:
        say("No --data_dir: training on built-in images like fundus photographs; for yours add --data_dir FOLDER.")
        train, held, labels = [f"train {i}" for i in range(BUILT_IN)], [f"val {i}" for i in range(6)], [0, 1]
    if len(held) > cfg.val_images:
        say(f"Validating on {cfg.val_images} of {len(held)} held-out images, evenly chosen; --val_images changes that.")
    if not held or not train:
        raise RecipeError("No validation image has a mask: give --val_dir images and masks, or leave it away.", 2)
    held = held if len(held) <= cfg.val_images else [held[i * len(held) // cfg.val_images] for i in range(cfg.val_images)]
    cfg.labels = " ".join(map(str, labels))
    load = functools.partial(load_pair, cfg=cfg, labels=labels)
    items, val = Items(train, load, check=run.check), list(Items(held, load, "validation", run.check))
    data = Pairs(items, cfg, codec.prepare(items, cfg, run))
    images = torch.from_numpy(np.stack([image for image, _ in val]))
    masks = [mask for _, mask in val]
    few = [items[i * len(items) // min(2000, len(items))][0] for i in range(min(2000, len(items)))]
    thumbs = mirrored(
        torch.cat([F.interpolate(torch.from_numpy(a[None]).float(), (32, 32), mode="area") for a in few]), cfg.flip
    )
    x = torch.cat([codec.encode(part.to(run.device)).cpu() for part in images.split(4)])
    val = types.SimpleNamespace(images=images, x=x, thumbs=thumbs, masks=masks, mask=None, codec=codec)
    if labels:
        val.mask = to_masks(torch.from_numpy(np.stack(masks)), cfg)
    shown = [items[i * len(items) // 8] for i in range(8)]
    zoom = max(1, 192 // cfg.target_size)
    rows = [sum(([image.transpose(1, 2, 0), overlay(image, m)] for image, m in shown[r : r + 4]), []) for r in (0, 4)]
    if run.main:
        sheet = picture(rows, ["image", "with its mask"] * 4 if labels else ["image", "image"] * 4, zoom)
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return data, val


# --- model: NextDiT with the names and shapes of the published weights (Lumina-T2X, Gao et al., 2024) ------------------
# Copied from train_nextdit_fast.py::ScaledNorm
class ScaledNorm(torch.autograd.Function):
    """x [n, tokens, dim] over its root mean square, times scale [n or 1, 1, dim]; half of autograd's time on a processor."""

    @staticmethod
    def forward(ctx, x, scale, eps):
        exact = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square() / x.shape[-1]
        rate, scale = (square + eps).rsqrt().to(x.dtype), scale.to(x.dtype)
        out = x * rate
        ctx.save_for_backward(out, rate, scale)
        return out * scale

    @staticmethod
    def backward(ctx, grad):
        out, rate, scale = ctx.saved_tensors
        inner, own = grad * scale, (grad * out).sum_to_size(scale.shape)
        return torch.addcmul(inner, out, (inner * out).mean(-1, True), value=-1) * rate, own, None


# Copied from train_nextdit_fast.py::RMSNorm
class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis (Zhang and Sennrich, 2019), times its weight and a scale from outside."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x, scale=1.0):
        scale = self.weight * scale
        return ScaledNorm.apply(x, scale if scale.ndim == 3 else scale.view(1, 1, -1), self.eps)


# Copied from train_nextdit_fast.py::rope_table
def rope_table(head_dim, rows, cols, linear=1.0, ntk=1.0, device=None):
    """cos and sin [rows * cols, head_dim / 2] of a 2-D rotary embedding (Su et al., 2021): pairs of channels turn by the row
    and by the column alternately. For larger grids than trained on: `linear` divides positions, `ntk` stretches theta."""
    speed = (1e4 * ntk) ** (-torch.arange(0, head_dim, 4, device=device).float() / head_dim)
    row, col = ((torch.arange(n, device=device) / linear)[:, None] * speed for n in (rows, cols))
    angle = torch.stack([row[:, None].expand(rows, cols, -1), col[None].expand(rows, cols, -1)], -1)
    angle = angle.reshape(rows * cols, head_dim // 2)
    return angle.cos(), angle.sin()


# Copied from train_nextdit_fast.py::rotate
def rotate(x, table):
    """Turn the neighbouring pairs of channels of x [n, tokens, heads, head_dim] by the angles of `rope_table`, in fp32."""
    cos, sin = (a.unsqueeze(-2) for a in table)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # complex numbers take a third of the time there
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


# Copied from train_nextdit_fast.py::attend
def attend(q, k, v, mask=None, scale=None):
    """Attention of q [n, tokens, heads, head_dim] to k, v [n, keys, kv heads, head_dim]; mask [n, keys] is True where a key
    counts. Without a mask the flash kernels run; `Attention.flash` is flash-attn's, where that is installed."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms may have made them fp32
    if Attention.flash and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return Attention.flash(q, k, v, softmax_scale=scale)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (a.repeat_interleave(groups, 1) if groups > 1 else a for a in (k, v))
    small = q.dtype is torch.bfloat16 and mask is None and q.shape[2] * k.shape[2] <= 512**2
    if small and Attention.products and q.device.type == "cpu":
        # on processors PyTorch's kernel takes twice the time of plain products in bf16
        weights = torch.bmm((q * (scale or q.shape[-1] ** -0.5)).flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
        return torch.bmm(weights, v.flatten(0, 1)).view(q.shape).transpose(1, 2)
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


# Copied from train_nextdit_fast.py::Attention
class Attention(nn.Module):
    """Self-attention with grouped keys, QK-norm and RoPE; plus gated attention to the caption y where there is one."""

    flash, products = None, True  # a run planned for a card has no products

    def __init__(self, dim, heads, kv_heads, qk_norm, y_dim):
        super().__init__()
        self.heads, self.head_dim, kv = heads, dim // heads, dim // heads * kv_heads
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = nn.Linear(dim, kv, bias=False), nn.Linear(dim, kv, bias=False)
        norm = nn.LayerNorm if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(dim), norm(kv)
        if y_dim:
            self.wk_y, self.wv_y = nn.Linear(y_dim, kv, bias=False), nn.Linear(y_dim, kv, bias=False)
            self.ky_norm, self.gate = norm(kv), nn.Parameter(torch.zeros(heads))

    def forward(self, x, table, pad, y, y_mask, scale):
        def split(a):
            return a.unflatten(-1, (-1, self.head_dim))

        q, k = (rotate(split(a), table) for a in (self.q_norm(self.wq(x)), self.k_norm(self.wk(x))))
        out = attend(q, k, split(self.wv(x)), pad, scale)
        if y is not None:  # the keys of a caption are not turned, but the queries are
            extra = attend(q, split(self.ky_norm(self.wk_y(y))), split(self.wv_y(y)), y_mask)
            out = out + extra * self.gate.tanh().to(out.dtype)[:, None]
        return self.wo(out.flatten(2))


# Copied from train_nextdit_fast.py::FeedForward
class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


# Copied from train_nextdit_fast.py::Block
class Block(nn.Module):
    """A transformer block between two norms each (sandwich), scaled and gated by the condition c."""

    def __init__(self, dim, heads, kv_heads, hidden, eps, qk_norm, y_dim, cond):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads, kv_heads, qk_norm, y_dim), FeedForward(dim, hidden)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, 4 * dim))
        if y_dim:
            self.attention_y_norm = RMSNorm(y_dim, eps)

    def forward(self, x, c, table, pad, y, y_mask, scale):
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(4, -1)
        y = None if y is None else self.attention_y_norm(y)
        h = self.attention(self.attention_norm1(x, 1 + scale1), table, pad, y, y_mask, scale)
        x = x + self.attention_norm2(h, gate1.tanh())
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x, 1 + scale2)), gate2.tanh())


# Copied from train_nextdit_fast.py::TimeEmbedder
class TimeEmbedder(nn.Module):
    """A time in 0..1 [n] -> [n, dim] by sinusoids and two layers."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angle = t.float()[:, None] * torch.exp(-math.log(1e4) / 128 * torch.arange(128, device=t.device))
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


# Copied from train_nextdit_fast.py::FinalLayer
class FinalLayer(nn.Module):
    """Norm, scale by the condition, and a linear map to the patches."""

    def __init__(self, dim, out, cond):
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6), nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond, dim))

    def forward(self, x, c):
        return self.linear(self.norm_final(x) * (1 + self.adaLN_modulation(c).unsqueeze(1)))


# Copied from train_nextdit_fast.py::NextDiT
class NextDiT(nn.Module):
    """NextDiT: x [n, channels, h, w] or a list of [channels, h, w], t [n] in 0..1 -> the same shape as x.

    Names and shapes are those of the published weights. cap_feats [n, tokens, cap_feat_dim] and cap_mask [n, tokens] are the
    features of a caption of one token at least, for a network with cap_feat_dim; mask [n, mask_channels, h, w] is embedded
    by `mask_embedder`, which starts at zero, so that a pretrained network's output stays as it is. scaling: (linear, ntk) of
    `rope_table`; scale: of the attention logits.
    """

    def __init__(self, patch_size=2, in_channels=4, dim=2304, n_layers=24, n_heads=32, n_kv_heads=None, multiple_of=256,
                 ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=False, cap_feat_dim=0,
                 mask_channels=0):  # fmt: skip
        super().__init__()
        cond, hidden = min(dim, 1024), multiple_of * -(-int((ffn_dim_multiplier or 1) * int(8 * dim / 3)) // multiple_of)
        self.patch_size, self.head_dim, self.learn_sigma, self.checkpointing = patch_size, dim // n_heads, learn_sigma, False
        self.in_channels, self.cap_feat_dim, area = in_channels, cap_feat_dim, patch_size**2
        self.x_embedder, self.t_embedder = nn.Linear(area * in_channels, dim), TimeEmbedder(cond)
        if mask_channels:
            self.mask_embedder = nn.Linear(area * mask_channels, dim)
        if cap_feat_dim:
            self.cap_embedder = nn.Sequential(nn.LayerNorm(cap_feat_dim), nn.Linear(cap_feat_dim, cond))
            self.pad_token = nn.Parameter(0.02 * torch.randn(dim))
        block = (dim, n_heads, n_kv_heads or n_heads, hidden, norm_eps, qk_norm, cap_feat_dim, cond)
        self.layers = nn.ModuleList(Block(*block) for _ in range(n_layers))
        self.final_layer = FinalLayer(dim, area * in_channels * (2 if learn_sigma else 1), cond)
        zero = {self.final_layer.linear, getattr(self, "mask_embedder", None)}
        zero |= {m[1] for m in self.modules() if isinstance(m, nn.Sequential) and m is not self.t_embedder.mlp}
        for m in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.zeros_(m.weight) if m in zero else nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias) if m.bias is not None else None
        for i in (0, 2):
            nn.init.normal_(self.t_embedder.mlp[i].weight, std=0.02)

    def patches(self, x):
        """[n, c, h, w] -> [n, tokens, c * p * p]."""
        return F.pixel_unshuffle(x, self.patch_size).flatten(2).mT.contiguous()

    def images(self, x, rows, cols):
        """[n, tokens, p * p * c] -> [n, c, rows * p, cols * p]; unlike in `patches` the channel comes last."""
        x = x.unflatten(-1, (self.patch_size**2, -1)).transpose(-1, -2).flatten(-2)
        x = F.pixel_shuffle(x.mT.unflatten(-1, (rows, cols)), self.patch_size)
        return x.chunk(2, 1)[0] if self.learn_sigma else x

    def forward(self, x, t, cap_feats=None, cap_mask=None, mask=None, scaling=(1.0, 1.0), scale=None):
        many = isinstance(x, (list, tuple))
        sizes = [tuple(n // self.patch_size for n in a.shape[-2:]) for a in (x if many else [x])]
        tables = [rope_table(self.head_dim, *size, *scaling, t.device) for size in sizes]
        pad, table = None, tables[0]
        if many:
            tokens = [self.x_embedder(self.patches(a[None]))[0] for a in x]
            longest = max(map(len, tokens))
            x = torch.stack([torch.cat([a, self.pad_token.to(a.dtype).expand(longest - len(a), -1)]) for a in tokens])
            table = [torch.stack([F.pad(a, (0, 0, 0, longest - len(a))) for a in part]) for part in zip(*tables)]
            if any(len(a) < longest for a in tokens):
                pad = torch.stack([torch.arange(longest, device=t.device) < len(a) for a in tokens])
        else:
            x = self.x_embedder(self.patches(x))
        x = x if mask is None else x + self.mask_embedder(self.patches(mask))
        c = self.t_embedder(t)
        if cap_feats is not None:
            weight = cap_mask.float().unsqueeze(-1)
            c = c + self.cap_embedder((cap_feats * weight).sum(1) / weight.sum(1))
            cap_mask = cap_mask.bool()
        for layer in self.layers:
            args = (x, c, table, pad, cap_feats, cap_mask, scale)
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, *args, use_reentrant=False) if again else layer(*args)
        x = self.final_layer(x, c)
        if not many:
            return self.images(x, *sizes[0])
        return [self.images(a[None, : rows * cols], rows, cols)[0] for a, (rows, cols) in zip(x, sizes)]

    def forward_with_cfg(self, x, t, cap_feats, cap_mask, cfg_scale, scale_factor=1.0, scale_watershed=1.0, base_seqlen=None,
                         proportional_attn=False, guided=3):  # fmt: skip
        """Guidance over the caption: the first half of x twice, with the captions of both halves. As in the published code
        only the first three channels are `guided`, and below the time scale_watershed RoPE stretches linearly, above by NTK."""
        scaling = (scale_factor, 1.0) if float(t[0]) < scale_watershed else (1.0, scale_factor)
        tokens = x.shape[-2] * x.shape[-1] // self.patch_size**2
        scale = math.sqrt(math.log(tokens, base_seqlen) / self.head_dim) if proportional_attn else None
        out = self(x[: len(x) // 2].repeat(2, 1, 1, 1), t, cap_feats, cap_mask, scaling=scaling, scale=scale)
        with_caption, without = out[:, :guided].chunk(2)
        mixed = without + cfg_scale * (with_caption - without)
        return torch.cat([mixed.repeat(2, 1, 1, 1), out[:, guided:]], 1)


# Copied from train_nextdit_fast.py::LinearDenoiser
class LinearDenoiser(nn.Module):
    """The best stationary linear denoiser of the training images: a Wiener filter per spatial frequency, across channels,
    around their mean image. In closed form, so that training starts from it and is judged against it."""

    def __init__(self, channels, size):
        super().__init__()
        half = (size, size // 2 + 1)
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("basis", torch.zeros(channels, channels, *half, 2))  # eigenvectors of the spectrum, complex
        self.register_buffer("power", torch.zeros(channels, *half))
        self.register_buffer("table", torch.ones(257))  # root mean square error at time k / 256

    @torch.no_grad()
    def fit(self, batches):
        """Take mean and spectrum of what batches() yields, [n, channels, size, size]; it is called twice."""
        count, total = 0, 0
        for x in batches():
            count, total = count + len(x), total + x.sum(0).float()
        self.mean.copy_(total / count)
        transformed = (torch.fft.rfft2(x.float() - self.mean, norm="ortho") for x in batches())
        spectrum = sum(torch.einsum("nchw,ndhw->hwcd", f, f.conj()) for f in transformed) / count
        power, basis = torch.linalg.eigh(spectrum.cpu().to(torch.complex128))
        self.power.copy_(power.clamp(min=0).permute(2, 0, 1))
        self.basis.copy_(torch.view_as_real(basis.permute(2, 3, 0, 1)))
        t = torch.linspace(0, 1, 257, dtype=torch.float64)[:, None, None, None]
        twice = torch.full((self.power.shape[-1],), 2.0, dtype=torch.float64)
        twice[0], twice[-1] = 1, 1 if self.mean.shape[-1] % 2 == 0 else 2
        power = power.clamp(min=0).permute(2, 0, 1)
        for k, at in enumerate(t):
            error = power * (1 - at) ** 2 / (at**2 * power + (1 - at) ** 2 + 1e-12)
            self.table[k] = ((error * twice).sum() / self.mean.numel()).sqrt()

    @torch.no_grad()
    def forward(self, z, t):
        """z = t x + (1 - t) noise [n, channels, size, size], t [n] -> the estimate of x."""
        t, basis = t.view(-1, 1, 1, 1), torch.view_as_complex(self.basis)
        f = torch.fft.rfft2(z.float() - t * self.mean, norm="ortho")
        gain, out = t * self.power / (t**2 * self.power + (1 - t) ** 2 + 1e-12), 0
        for k in range(len(self.mean)):  # along each eigenvector; loops over channels beat many tiny products
            part = sum(b.conj() * f[:, c] for c, b in enumerate(basis[:, k])) * gain[:, k]
            out = out + part[:, None] * basis[:, k]
        return torch.fft.irfft2(out, self.mean.shape[-2:], norm="ortho") + self.mean

    def error(self, t):
        """The root mean square of what the estimate leaves, [n, 1, 1, 1] at times t [n]."""
        return self.table[(t * 256).round().long().clamp(0, 256)].view(-1, 1, 1, 1)


# Copied from train_nextdit_fast.py::Velocity
class Velocity(nn.Module):
    """The velocity x - noise of the flow z = t x + (1 - t) noise, from noise at t = 0 to images at t = 1: z [n, c, s, s],
    t [n], mask or None -> [n, c, s, s]. The network predicts it as it is (v), or x (Li and He, "Back to basics", 2025), or
    what the linear denoiser leaves of x, in units of its error (residual)."""

    def __init__(self, net, predict, size):
        super().__init__()
        self.net, self.predict, self.linear = net, predict, LinearDenoiser(net.in_channels, size)
        self.fitted = False  # whether the weights brought their linear denoiser
        if net.cap_feat_dim:  # a learned prompt keeps the caption branch of published weights alive
            self.prompt = nn.Parameter(torch.randn(1, 8, net.cap_feat_dim))

    def forward(self, z, t, mask=None):
        words = {}
        if self.net.cap_feat_dim:
            words = {"cap_feats": self.prompt.expand(len(z), -1, -1), "cap_mask": torch.ones(len(z), 8, device=z.device)}
        out = self.net(z, t, mask=mask, **words).float()
        if self.predict == "v":
            return out
        x = self.linear(z, t) + self.linear.error(t) * out if self.predict == "residual" else out
        return (x - z) / (1 - t.view(-1, 1, 1, 1)).clamp(min=1e-3)


# --- pretrained weights ------------------------------------------------------------------------------------------------
def run_settings(place):
    """The settings of the run folder of ours that --weights is, or lies in; {} for other weights. RecipeError for a run of
    this script, whose weights are --merge's."""
    place = Path(place).expanduser()
    about = read_settings(place if place.is_dir() else place.parent)
    if about.get("recipe") == RECIPE and place.name != "merged.safetensors":
        raise RecipeError(
            f"{place} is a run of this script: add --merge to its --out_dir, then give its merged.safetensors.", 2
        )
    ours = about.get("settings", {}) if str(about.get("recipe")).startswith(("nextdit", RECIPE)) else {}
    kinds = (("target_size", int), ("vae", str), ("predict", str))
    return ours if all(isinstance(ours.get(k, kind()), kind) for k, kind in kinds) else {}


def predicted(place):
    """What a .safetensors of ours says that its network predicts; "" for other files."""
    if not place or not (files := [p for p in weight_files(place) if p.suffix == ".safetensors"]):
        return ""
    from safetensors import safe_open

    with safe_open(files[0], "pt") as f:
        return (f.metadata() or {}).get("predict", "")


WRAPPERS = ("module.", "_orig_mod.", "net.", "model.", "diffusion_model.")  # what training programs put before names


def weight_files(place):
    """The files of --weights: the file itself; of a folder, the shards of EMA weights, else of what is there."""
    place = Path(place).expanduser()
    if place.is_file() and place.name == "model.safetensors" and (place.parent / "best.pt").exists():
        place = place.parent  # it lacks the linear denoiser, which belongs to it
    if place.is_file():
        more = place.with_name("merged-extras.safetensors")
        return [place, more] if place.name == "merged.safetensors" and more.exists() else [place]
    kinds = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
    names = ("optim", "rng", "args", "latents", "next.pt", "previous.pt", "last.pt")
    files = [p for p in sorted(place.glob("*")) if p.suffix in kinds and not any(n in p.name for n in names)]
    best = [p for p in files if p.name == "best.pt"]  # a run folder of ours: the averaged weights
    averaged = [p for p in files if "ema" in p.name.lower()]
    files = best or averaged or files
    files = [p for p in files if p.suffix == ".safetensors"] or files
    if not files:
        there = ", ".join(sorted(p.name for p in place.iterdir())[:5]) if place.is_dir() else "there is no such file or folder"
        raise RecipeError(f"--weights {place}: no {' '.join(kinds)} in it ({there}).", 2)
    return files


def read_weights(place):
    """The tensors of --weights by their published names, shards joined. Pickled code is never run; RecipeError says what is
    wrong with a file."""
    tensors = {}
    for path in weight_files(place):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except ImportError:
            raise RecipeError("This file needs safetensors: pip install safetensors", 2) from None
        except Exception as e:
            why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise RecipeError(
                f"{path} holds something other than tensors, or is damaged; nothing in it was run ({why[:150]}). Give a "
                "file of plain weights, best a .safetensors.", 2
            ) from None  # fmt: skip
        for name in ("ema", "model_ema", "state_dict", "model"):  # a checkpoint around the weights
            state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, torch.Tensor) and isinstance(key, str):
                plain = value.layout is torch.strided and not value.is_meta
                if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
                    raise RecipeError(f"{key} in {path} is no plain tensor; save the weights anew, e.g. as .safetensors.", 2)
                while key.startswith(WRAPPERS):
                    key = key.split(".", 1)[1]
                if key in tensors:
                    raise RecipeError(f"{key} is in more than one file of {place}: parts of one tensor each are not joined. "
                        "Convert them to one file first.", 2)  # fmt: skip
                tensors[key] = value
    return tensors


def read_geometry(state, cfg):
    """The arguments of `NextDiT` that the weights themselves tell. RecipeError where they are not a NextDiT's."""

    def shape(name):
        return tuple(state[name].shape) if name in state else ()

    layers = {int(k.split(".")[1]) for k in state if k.startswith("layers.") and k.split(".")[1].isdecimal()}
    needed = [f"{n}.weight" for n in ("x_embedder", "final_layer.linear", "layers.0.attention.wk", "layers.0.feed_forward.w1")]
    if any(name not in state for name in needed):
        raise RecipeError(f"--weights {cfg.weights} is no NextDiT of this kind: {next(n for n in needed if n not in state)} is "
            f"missing; it has {', '.join(list(state)[:3])} ... ({len(state)} tensors).", 2)  # fmt: skip
    if odd := next((n for n in needed if len(shape(n)) != 2 or 0 in shape(n)), ""):
        raise RecipeError(f"--weights {cfg.weights} is no NextDiT of this kind: {odd} has the shape {shape(odd)}.", 2)
    (dim, area), hidden, kv = shape(needed[0]), shape(needed[3])[0], shape(needed[2])[0]
    ours = run_settings(cfg.weights) if cfg.weights else {}
    heads = cfg.heads or (shape("layers.0.attention.gate") or (HEADS.get(dim, 0),))[0]
    patch = math.isqrt(area // cfg.channels)
    if not heads or dim % heads or kv % (dim // heads):
        raise RecipeError(f"The weights do not tell the number of heads of {dim} channels; add --heads N.", 2)
    if patch**2 * cfg.channels != area:
        raise RecipeError(f"The weights take {area} numbers a patch: no square patch of {cfg.channels} channels. "
            + ("They are another VAE's." if cfg.vae else "Published ones work on latents: add --vae FOLDER."), 2)  # fmt: skip
    known = ours.get("predict", "v") if cfg.weights else "residual"  # the stand-in's
    cfg.predict, cfg.patch, cfg.size = predicted(cfg.weights) or known, patch, f"{dim} x {len(layers)}"
    side = cfg.target_size // cfg.factor
    if cfg.target_size % cfg.factor or side % patch:
        raise RecipeError(f"--target_size is {cfg.target_size}; it takes a multiple of {patch * cfg.factor}.", 2)
    return {
        "patch_size": patch, "in_channels": cfg.channels, "dim": dim, "n_layers": len(layers), "n_heads": heads,
        "n_kv_heads": kv // (dim // heads), "multiple_of": hidden, "ffn_dim_multiplier": min(1.0, hidden / int(8 * dim / 3)),
        "learn_sigma": shape(needed[1])[0] == 2 * area, "qk_norm": "layers.0.attention.q_norm.weight" in state,
        "cap_feat_dim": (shape("cap_embedder.0.weight") or (0,))[0],
    }  # fmt: skip


PUBLISHED = {"patch_size": 2, "in_channels": 4, "dim": 2304, "n_layers": 24, "n_heads": 32, "n_kv_heads": 8, "qk_norm": True,
    "cap_feat_dim": 2048}  # fmt: skip
HEADS = {192: 3, 768: 12, 1280: 20, 1792: 28, 2304: 32, 1536: 32}  # of networks without a gate that tells: ours, and the 600M


def load_into(velocity, state, where):
    """Copy the tensors into the network, say what was loaded and what not, and refuse below 90 %."""
    mine = velocity.net.state_dict()
    fits = {k: v for k, v in state.items() if k in mine and mine[k].shape == v.shape}
    missing = [k for k in mine if k not in state and not k.startswith("mask_embedder")]
    other = [k for k in state if k in mine and k not in fits]
    mismatched = [f"{k} {tuple(state[k].shape)} instead of {tuple(mine[k].shape)}" for k in other]
    own = [k for k in state if k.startswith("linear.") or k == "prompt"]
    unexpected = [k for k in state if k not in mine and k not in own]
    lines = [f"{len(fits)} tensors loaded from {where}"]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names:
            lines.append(f"{len(names)} {what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
    told = "; ".join(lines)
    wanted = [k for k in mine if not k.startswith("mask_embedder")]
    share = min(len(set(wanted) & set(fits)) / len(wanted), sum(v.numel() for k, v in fits.items() if k in wanted)
        / sum(mine[k].numel() for k in wanted))  # fmt: skip
    if share < 0.9:
        raise RecipeError(f"Only {share:.0%} of the network would start from these weights, and the rest from scratch: {told}. "
            "Nothing was trained. Are they a NextDiT's, whole, and with its names?", 2)  # fmt: skip
    say(f"{share:.1%} of the network: {told}.")
    velocity.net.load_state_dict(fits, strict=False)
    theirs = {k: state[k] for k in own if k in velocity.state_dict() and velocity.state_dict()[k].shape == state[k].shape}
    velocity.load_state_dict(theirs, strict=False)
    return theirs


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices, which starts at zero (Hu et al., 2021)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    def merged(self):
        """The weight [out, in] of the one layer that does the same."""
        return (self.base.weight.float() + self.up.float() @ self.down.float()).to(self.base.weight.dtype)


def freeze(velocity, cfg, dtype):
    """Leave open what --train names, put LoRA matrices in, and hold the frozen rest in half precision."""
    open_names = {"lora": ("mask_embedder", "prompt", "norm", "gate"), "all": ("",),
        "ends": ("mask_embedder", "prompt", "x_embedder", "final_layer", "norm", "gate", "t_embedder")}[cfg.train]  # fmt: skip
    for name, p in velocity.named_parameters():
        p.requires_grad_(any(part in name for part in open_names) and not name.endswith("pad_token"))  # nothing is padded
        if not p.requires_grad and p.ndim > 1 and dtype is not torch.float32:
            p.data = p.data.to(dtype)
    for block in velocity.net.layers if cfg.train == "lora" else ():
        for part in (block.attention, block.feed_forward):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, LoRA(layer, cfg.lora_rank))
    velocity.trained = {name for name, p in velocity.named_parameters() if p.requires_grad}


def merge(velocity):
    """The network's tensors under the published names, without LoRA."""
    state = {k: v for k, v in velocity.net.state_dict().items() if not k.endswith((".up", ".down", ".base.weight"))}
    state |= {f"{name}.weight": m.merged() for name, m in velocity.net.named_modules() if isinstance(m, LoRA)}
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def make_model(cfg, ready=True):
    """The network of `cfg.geometry`; `ready`: as it is trained, with LoRA matrices in it."""
    classes = max(0, len(cfg.labels.split()) - 1 + cfg.labels.startswith("-"))
    net = NextDiT(**json.loads(cfg.geometry), mask_channels=classes * cfg.factor**2)
    velocity = Velocity(net, cfg.predict, cfg.target_size // cfg.factor)
    if ready:
        freeze(velocity, cfg, torch.float32)
    return velocity


# --- flow --------------------------------------------------------------------------------------------------------------
# Copied from train_nextdit_fast.py::to_flow
def to_flow(batch, cfg, run):
    """A batch of `Pairs` -> {z, v, t, mask}: noisy inputs, their velocities, times, and masks of which some are hidden."""
    x = batch["image"]
    x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
    noise, t, n = run.draw("randn", x.shape), run.draw("rand", (len(x),)), len(x)
    if cfg.t_shape == "stratified":  # one time in each n-th of 0..1: the gradient varies less
        t = (torch.arange(n, device=t.device) + run.rank * n + t) / (n * run.world)
    if cfg.t_shape == "lognormal":
        t = (run.draw("randn", (n,)) + cfg.t_mean).sigmoid()
    u = t.view(-1, 1, 1, 1)
    out = {"z": u * x + (1 - u) * noise, "v": x - noise, "t": t}
    if "mask" in batch:
        seen = run.draw("rand", (n,)) >= cfg.mask_drop
        out["mask"] = to_masks(batch["mask"], cfg) * seen.view(-1, 1, 1, 1)
    return out


# Copied from train_nextdit_fast.py::heldout_loss
@torch.no_grad()
def heldout_loss(velocity, x, mask, run, times=16):
    """Mean squared error of the velocity over x [n, c, s, s] on a uniform grid of times with fixed noise; at least NOISY
    images a time, whatever n is."""
    own, total, repeats = torch.Generator().manual_seed(0), 0.0, -(-NOISY // len(x))
    x, mask = x.repeat(repeats, 1, 1, 1), None if mask is None else mask.repeat(repeats, 1, 1, 1)
    for k in range(times):
        for at in range(0, len(x), 32):
            run.check()
            x1 = x[at : at + 32].to(run.device)
            noise = torch.randn(x1.shape, generator=own).to(run.device)
            t = torch.full((len(x1),), (k + 0.5) / times, device=run.device)
            u = t.view(-1, 1, 1, 1)
            with run.autocast():
                v = velocity(u * x1 + (1 - u) * noise, t, None if mask is None else mask[at : at + 32].to(run.device))
            total += float((v - x1 + noise).square().mean((1, 2, 3)).sum())
    return total / (times * len(x))


# Copied from train_nextdit_fast.py::assess
def assess(velocity, val, run):
    """{heldout_loss, linear_loss of the linear denoiser, mask_gap: the loss with other images' masks minus that with own};
    keeps the best weights."""
    linear = velocity.linear
    metrics = {"heldout_loss": heldout_loss(velocity, val.x, val.mask, run)}
    if not hasattr(val, "linear_loss"):
        val.linear_loss = heldout_loss(lambda z, t, _: (linear(z, t) - z) / (1 - t.view(-1, 1, 1, 1)), val.x, None, run)
    metrics["linear_loss"] = val.linear_loss
    if val.mask is not None:
        others = val.mask.roll(1, 0) if len(val.mask) > 1 else val.mask.flip(3)
        metrics["mask_gap"] = heldout_loss(velocity, val.x, others, run) - metrics["heldout_loss"]
    run.judge("heldout_loss", metrics, velocity.state_dict(), higher=False)
    return metrics


# Copied from train_nextdit_fast.py::draw_samples
@torch.no_grad()
def draw_samples(velocity, noise, mask, cfg, run, steps=0):
    """Follow the flow from noise [n, c, s, s] to what is modelled, with --solver, --steps, --guidance and --shift."""
    z, times = noise.to(run.device), torch.linspace(0, 1, (steps or cfg.steps) + 1)
    mask = None if mask is None else mask.to(run.device)
    times = (times / (times + cfg.shift * (1 - times))).tolist()

    def v(z, t):
        run.check()
        t = torch.full((len(z),), t, device=z.device)
        with run.autocast():
            if mask is None or cfg.guidance == 1 or cfg.mask_drop == 0:  # then there is no network without a mask
                return velocity(z, t, mask)
            seen, blind = velocity(z.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([mask, 0 * mask])).chunk(2)
        return blind + cfg.guidance * (seen - blind)

    for t, after in zip(times, times[1:]):
        step, now = after - t, v(z, t)
        if cfg.solver == "midpoint":
            now = v(z + step / 2 * now, t + step / 2)
        elif cfg.solver == "heun" and after < 1:
            now = (now + v(z + step * now, after)) / 2
        z = z + step * now
    return z


# Copied from train_nextdit_fast.py::own_noise
def own_noise(cfg, *key):
    """Noise [c, s, s] that depends on the seed and the key alone, so that a sample is the same in any company."""
    side = cfg.target_size // cfg.factor
    return torch.randn(cfg.channels, side, side, generator=torch.Generator().manual_seed(mix(cfg.seed, *key)))


# Copied from train_nextdit_fast.py::show
def show(velocity, val, cfg, run, count=8, steps=0):
    """Write sample-<update>.png: mask, sample, real image of held-out pairs; returns the samples, uint8 [n, 3, s, s]."""
    n = min(count, len(val.x)) if val.mask is not None else count
    noise = torch.stack([own_noise(cfg, "show", i) for i in range(n)])
    mask = None if val.mask is None else val.mask[:n]
    out = val.codec.decode(draw_samples(velocity, noise, mask, cfg, run, steps)).cpu()
    cells = []
    for i in range(n):
        mask = [] if val.mask is None else [mask_picture(val.masks[i])]
        cells.append([*mask, *(a.numpy().transpose(1, 2, 0) for a in (out[i], val.images[i % len(val.images)]))])
    rows = [sum(cells[r : r + 2], []) for r in range(0, n - n % 2, 2)] or [cells[0]]
    names = ["mask"] * (val.mask is not None)
    sheet = picture(rows, [*names, "sample", "real"] * min(2, n), max(1, 192 // cfg.target_size))
    write_aside(run.folder / f"sample-{run.step:06d}.png", lambda f: sheet.save(f, "PNG"))
    return out


# --- training ----------------------------------------------------------------------------------------------------------
# Copied from train_nextdit_fast.py::pick_attention
def pick_attention(run):
    """Take flash-attn where it is installed and the card has it; else PyTorch's attention. Returns the choice as a text."""
    Attention.flash, name = None, "PyTorch's, which chooses the kernel (nothing is padded)"
    Attention.products = run.kind == "cpu"
    if (
        run.kind == "cuda"
        and not run.planned
        and run.dtype is not torch.float32
        and torch.cuda.get_device_capability(run.device) >= (8, 0)
    ):
        try:
            from flash_attn import flash_attn_func as kernel

            Attention.flash, name = kernel, "flash-attn"
        except ImportError:
            name += "; flash-attn is not installed and not needed"
    return name if run.kind != "cpu" else "products in bf16" if run.dtype is torch.bfloat16 else "PyTorch's"


def build(cfg, run):
    """Model with the pretrained weights, EMA of what is trained, and AdamW with its state, on the run's device."""
    torch.manual_seed(cfg.seed)
    state = None
    if run.planned and not cfg.geometry:  # as the published weights
        cfg.geometry, cfg.channels, cfg.factor = json.dumps(PUBLISHED), 4, 8
    if not cfg.geometry:
        old = run.settings.get("settings", {})
        if old.get("geometry"):  # a run that has begun holds its weights
            cfg.geometry, cfg.predict, cfg.patch, cfg.size = (old[k] for k in ("geometry", "predict", "patch", "size"))
        else:
            state = read_weights(cfg.weights) if cfg.weights else stand_in(cfg, run)
            cfg.geometry = json.dumps(read_geometry(state, cfg))
    with run.device:
        model = make_model(cfg, ready=False)
    if state:
        theirs = load_into(model, state, cfg.weights or "the stand-in")
        model.fitted = "linear.mean" in theirs and cfg.predict == "residual"
    freeze(model, cfg, run.dtype)
    model.net.checkpointing = cfg.checkpointing if cfg.checkpointing is not None else run.kind == "cuda"
    groups = [{"params": [p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == two]} for two in (True, False)]
    groups[1]["weight_decay"] = 0.0
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if run.kind == "cuda" and not run.planned and 20 * size > torch.cuda.get_device_properties(run.device).total_memory:
        raise RecipeError(f"--train {cfg.train} takes {20 * size / 2**30:.0f} GB before the first image, more than there is. "
            "--train lora takes a tenth of that.", 2)  # fmt: skip
    opt = torch.optim.AdamW(groups, 0.0, (0.9, 0.99), weight_decay=cfg.weight_decay, fused=run.kind in ("cuda", "cpu"))
    parts = Parts(model=model, ema=EMA(model, 0.999), opt=with_state(opt))
    pick_attention(run)
    run.compile(model.net)
    return parts


def stand_in(cfg, run):
    """Weights for a try-out: a small network that learns for seconds to draw built-in images without masks."""
    say(f"No --weights: a small network, trained for {STAND_IN} updates on built-in images, stands for published ones.")
    net = NextDiT(4, 3, 192, 6, 3, learn_sigma=False, qk_norm=True)
    velocity = Velocity(net, "residual", cfg.target_size).to(run.device)
    images = torch.from_numpy(np.stack([fundus(f"stand-in {i}", cfg.target_size)[0] for i in range(BUILT_IN)])).permute(
        0, 3, 1, 2
    )
    opt, x = torch.optim.AdamW(net.parameters(), 1e-3, (0.9, 0.99)), Pixels().encode(images).to(run.device)
    velocity.linear.fit(lambda: [x])
    own = torch.Generator().manual_seed(cfg.seed)
    for k in range(STAND_IN):
        run.check()
        part = x[torch.randperm(len(x), generator=own)[:16].to(run.device)]
        t, noise = torch.rand(len(part), generator=own).to(run.device), torch.randn(part.shape, generator=own).to(run.device)
        u = t.view(-1, 1, 1, 1)
        opt.param_groups[0]["lr"] = 1e-3 * min(1, (k + 1) / 10)
        opt.zero_grad()
        with run.autocast():
            v = velocity(u * part + (1 - u) * noise, t)
        (v - part + noise).square().mean().backward()
        opt.step()
    return {k.removeprefix("net."): v.detach() for k, v in velocity.state_dict().items()}


# Copied from train_nextdit_fast.py::example_batch
def example_batch(cfg, run):
    """A random batch of the shapes and types that `Pairs` makes."""
    n, side, classes = cfg.batch_size * cfg.accumulate, cfg.target_size // cfg.factor, len(cfg.labels.split()) - 1
    batch = {"image": torch.randint(256, (n, 3, side, side), dtype=torch.uint8, device=run.device)}
    if cfg.factor > 1:
        batch["image"] = torch.randn(n, cfg.channels, side, side, device=run.device).half()
    if cfg.labels:
        shape = (n, classes + cfg.labels.startswith("-"), cfg.target_size, cfg.target_size)
        batch["mask"] = torch.randint(2, shape, dtype=torch.uint8, device=run.device)
    return batch | {"index": torch.zeros(n, dtype=torch.int64, device=run.device)}


# Copied from train_nextdit_fast.py::train_step
def train_step(parts, batch, cfg, run):
    """One update from a batch of `Pairs`; returns `loss` and `norm` as scalar tensors."""
    run.anneal(parts.opt)
    net = run.net(parts.model)

    def loss_fn(part):
        v = net(part["z"], part["t"], part.get("mask"))
        # EDIT HERE: the loss, that of the velocity; where almost no noise is left, predictions of x would blow it up
        weight = 1.0 if cfg.predict == "v" else ((1 - part["t"]) / (1 - part["t"]).clamp(min=0.05)).view(-1, 1, 1, 1)
        return ((weight * (v - part["v"])) ** 2).mean()

    return run.update(loss_fn, to_flow(batch, cfg, run), parts.opt, parts.model, parts.ema)


# Copied from train_nextdit_fast.py::eval_step
@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation: 32 velocities, which is what evaluating and guided sampling take at once."""
    n, side = 32, cfg.target_size // cfg.factor
    z, t = torch.zeros(n, cfg.channels, side, side, device=run.device), torch.full((n,), 0.5, device=run.device)
    width = parts.ema.model.net.mask_embedder.in_features // cfg.patch**2 if cfg.labels else 0
    with run.autocast():
        return parts.ema.model(z, t, torch.zeros(n, width, side, side, device=run.device) if width else None)


# Copied from train_nextdit_fast.py::wrap_up
def wrap_up(parts, val, cfg, run):
    """The ending, rehearsed before update 1: evaluate, sample, save and export the averaged weights. Returns the metrics."""
    model = parts.ema.model
    with run.ending():
        metrics = assess(model, val, run)
        run.save()
        if run.main:
            metrics["copy_rate"] = copy_rate(show(model, val, cfg, run), val.thumbs)
            with run.results() as folder:
                export(model, folder)
    return metrics


def export(model, folder):
    """Write merged.safetensors, the averaged network under the published names without LoRA, and merged-extras.safetensors:
    the learned prompt and the linear denoiser, which --weights takes with it."""
    write_weights(folder / EXPORT, merge(model), {"predict": model.predict})
    extras = {k: v for k, v in model.state_dict().items() if not k.startswith("net.")}
    write_weights(folder / "merged-extras.safetensors", extras)


# Copied from train_nextdit_fast.py::describe
def describe(velocity, cfg, run):
    """The line that says what is trained, and by which attention."""
    weights, tokens = sum(p.numel() for p in velocity.net.parameters()), (cfg.target_size // cfg.factor // cfg.patch) ** 2
    size = f"NextDiT {cfg.size}: {weights / 1e6:.1f} million weights, {tokens} tokens an image"
    return f"{size}; predicts {cfg.predict}. Attention: {pick_attention(run)}"


# Copied from train_nextdit_fast.py::verdict
def verdict(metrics, start, val):
    """One line at 5 % of the run: does it learn, does it follow the mask, and what to change if not."""
    loss, before, linear = metrics["heldout_loss"], start["heldout_loss"], metrics["linear_loss"]
    text = f"5 % of the run: held-out loss {loss:.4f}, at the start {before:.4f}, linear denoiser {linear:.4f}."
    if loss > 1.02 * before:
        text += " It rises: if that goes on, start over with --fresh and a third of the learning rate in log.jsonl."
    elif loss > linear:
        text += " (the best linear filter of your images: a network worth its time gets below it; give it more updates)"
    if val.mask is not None:
        gap = metrics["mask_gap"]
        used = gap > 0.002 * loss
        text += f" The mask is {'used' if used else 'not used yet'} (gap {gap:+.5f})."
        text += "" if used else " If that stays so: do masks and images fit in data.png?"
    return text


# Copied from train_nextdit_fast.py::train
def train(cfg):
    """The whole run; returns the metrics of the averaged weights: heldout_loss, linear_loss, mask_gap, copy_rate and others."""
    for f in (f for f in dataclasses.fields(cfg) if "derived" in f.metadata):
        setattr(cfg, f.name, f.default)  # this run's data and weights decide anew
    with Run(cfg, RECIPE) as run:
        codec = open_codec(cfg, run)
        data, val = open_data(cfg, run, codec)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {run.finished}. A longer --num_epochs or --time_budget continues it, --fresh starts over.")
            return run.finished
        if run.saved < 0:
            fit_linear(parts, data, cfg)
        say(describe(parts.model, cfg, run))
        metrics = start = wrap_up(parts, val, cfg, run)
        say(f"Before: held-out loss {start['heldout_loss']:.4f}, linear denoiser {start['linear_loss']:.4f}")
        if cfg.data_dir and run.planned_steps < 1000:
            say(f"Only {run.planned_steps} updates, few for a network from scratch; --time_budget 6h makes use of your time.")
        for batch in run.batches():
            run.advance(train_step(parts, batch, cfg, run))
            if run.due(every=0.1 if cfg.patience else 0.2, at=(0.05,)) and not run.over:
                metrics = assess(parts.ema.model, val, run)
                gap = f", mask gap {metrics['mask_gap']:+.5f}" if "mask_gap" in metrics else ""
                say(f"step {run.step}: held-out loss {metrics['heldout_loss']:.4f}{gap}")
                if run.due(at=(0.05,)):
                    say(verdict(metrics, start, val))
            if run.due(at=SAMPLE_MARKS):
                run.write(lambda: show(parts.ema.model, val, cfg, run, 4, min(cfg.steps, 10)))
        metrics = run.finish(wrap_up(parts, val, cfg, run))
        if run.best["heldout_loss"] < 0.99 * metrics["heldout_loss"]:
            say(f"It was better before, {run.best['heldout_loss']:.4f} at update {run.best['step']}: best.pt holds that. "
                "--patience 3 ends earlier, a smaller --preset learns less by heart.")  # fmt: skip
        say(
            f"Held-out loss {metrics['heldout_loss']:.4f} (linear denoiser {metrics['linear_loss']:.4f}) after {run.step} "
            f"updates; {metrics.get('copy_rate', 0):.0%} copies. Weights ({EXPORT}) and samples are in {run.folder}"
        )
        return metrics


# Copied from train_nextdit_fast.py::fit_linear
def fit_linear(parts, data, cfg):
    """Fit the linear denoiser on up to 2,000 training images, for the model and its average; before update 1."""
    if parts.model.fitted:
        return
    few, linear = [i * len(data) // min(2000, len(data)) for i in range(min(2000, len(data)))], parts.model.linear

    def batches():
        for part in (few[k : k + 16] for k in range(0, len(few), 16)):
            if data.latents is None:
                x = mirrored(Pixels().encode(torch.from_numpy(np.stack([data.items[i][0] for i in part]))), cfg.flip)
            else:
                x = data.latents[part].float()
            yield x.flatten(0, 1).to(linear.mean.device)

    linear.fit(batches)
    parts.ema.model.linear.load_state_dict(linear.state_dict())


# --- using the result --------------------------------------------------------------------------------------------------
# Copied from train_nextdit_fast.py::load
def load(run_dir, device="cpu"):
    """The trained (EMA) `Velocity` of a run folder in eval mode; its settings are in `.cfg`."""
    with trained_weights(run_dir, RECIPE, Config, "last.pt", "best.pt") as (cfg, path):
        model, state = make_model(cfg), torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if "parts" in state and read_json(Path(run_dir) / "metrics.json").get("steps") == state["step"]:
            model.load_state_dict(state["parts"]["ema"]["model"])
        else:
            say(f"The run in {run_dir} has not finished; these are its best weights so far.") if "parts" in state else None
            model.load_state_dict(load_tensors(Path(run_dir) / "best.pt")["model"])
    model.cfg = cfg
    return model.to(device).eval()


# Copied from train_nextdit_fast.py::run_folder
def run_folder(cfg):
    """The folder of the run to use: --out_dir, else the one of your data, else the try-out's."""
    folder = Path(cfg.out_dir or f"results/{RECIPE}").expanduser()
    return folder if cfg.out_dir or (folder / "last.pt").exists() else folder.with_name(folder.name + "-demo")


# Copied from train_nextdit_fast.py::sample
def sample(cfg):
    """Draw --sample pictures for each mask of --mask_dir (or without masks) into <run folder>/samples; returns their paths."""
    folder = run_folder(cfg)
    model = load(folder)
    own, jobs, paths = model.cfg, [], []
    for name in ("steps", "solver", "guidance", "shift", "seed", "use_amp", "amp_dtype", "vae"):
        if name in getattr(cfg, "given", ()) or getattr(cfg, name, None) not in (None, getattr(Config, name, None)):
            setattr(own, name, getattr(cfg, name))
    own.device = cfg.device
    run, labels = Run(own, RECIPE), [int(v) for v in own.labels.split()]
    model, codec, out = model.to(run.device), open_codec(own, run), folder / "samples"
    say(f"Sampling with the model in {folder}: {own.solver}, {own.steps} steps, guidance {own.guidance:g}.")
    pick_attention(run)
    if cfg.mask_dir and not labels:
        raise RecipeError(f"The model in {folder} was trained without masks; leave --mask_dir away.", 2)
    if labels and not cfg.mask_dir:
        say("No --mask_dir: samples without a mask.")
    for path in find_images(cfg.mask_dir, "masks") if cfg.mask_dir else [None]:
        try:
            mask = fit_mask(read_mask(path, labels), own) if path else None
        except UNREADABLE as e:
            say(f"Left out {path}: {e}")
            continue
        name = "-".join(path.relative_to(Path(cfg.mask_dir).expanduser()).with_suffix("").parts) if path else "sample"
        jobs += [(f"{name}-{own.seed}-{i}.png", mask, own_noise(own, path.stem if path else "", i)) for i in range(cfg.sample)]
    if not jobs:
        raise RecipeError(f"Nothing drawn: {cfg.mask_dir} holds no mask that fits.")
    for name in ("images", "masks") if cfg.mask_dir else ("images",):
        (out / name).mkdir(parents=True, exist_ok=True)
    for part in (jobs[k : k + 16] for k in range(0, len(jobs), 16)):
        masks = np.stack([m for _, m, _ in part]) if cfg.mask_dir else None
        mask = to_masks(torch.from_numpy(masks), own) if cfg.mask_dir else None
        if labels and not cfg.mask_dir:  # a hidden mask, as in training
            mask = torch.zeros(len(part), model.net.mask_embedder.in_features // own.patch**2, *part[0][2].shape[1:])
            own.guidance = 1.0
        x = draw_samples(model, torch.stack([noise for *_, noise in part]), mask, own, run)
        for image, (name, m, _) in zip(codec.decode(x).cpu().numpy(), part):
            files = [(out / "images" / name, image.transpose(1, 2, 0))]
            if m is not None:  # with the values of the training's masks, where a byte holds them
                known = labels if 0 <= min(labels) and max(labels) < 256 else [0, 255] if len(m) == 1 else range(len(m) + 1)
                values = np.full(m.shape[1:], known[0], np.uint8)
                for inside, value in zip(m, known[1:]):
                    values[inside] = value
                files.append((out / "masks" / name, values))
            for path, array in files:
                write_aside(path, lambda f, array=array: Image.fromarray(array).save(f, "PNG"))
            paths.append(files[0][0])
    say(f"{len(paths)} pictures are in {out / 'images'}")
    return paths


def write_merged(cfg):
    """--merge: `export` of a run as it stands, finished or not; returns the path of the weights."""
    folder = run_folder(cfg)
    export(load(folder), folder)
    say(f"{folder / EXPORT} holds the network under the published names, without LoRA.")
    return folder / EXPORT


if __name__ == "__main__":
    main(lambda cfg: write_merged(cfg) if cfg.merge else sample(cfg) if cfg.sample else train(cfg), Config, __doc__)
