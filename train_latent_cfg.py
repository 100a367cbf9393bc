# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib"]
# ///
"""Train a class-conditional latent diffusion model on a folder per class, with classifier-free guidance, by your deadline.

python train_latent_cfg.py --data_dir DATA --time_budget 2h        # DATA/<class>/*.jpg
python train_latent_cfg.py                                         # try it out on built-in shapes
python train_latent_cfg.py --sample 50 --classes cat,dog           # a folder of 50 pictures per class

Measured (two cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-21; not yet on a GPU): 20 minutes on 1,550 images
of 31 classes at 64 px end at a held-out loss of 0.696 (guessing zero: 1). A classifier of the real images is right on 94 % of
samples and on 58 % of held-out real images; no sample is a copy. An update takes 1/2.29 of the time of the update of
denoising-diffusion-pytorch.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

try:
    from common import (  # isort: skip
        EMA, SAMPLE_MARKS, UNREADABLE, VAE, Items, Parts, RecipeError, Run, Settings, cached_latents, colour, copy_rate,
        evenly, load_tensors, main, mirrored, mix, open_records, opt, picture, read_image, save_tensors, say, square,
        trained_weights, uniforms, with_state, write_aside,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py train_latent_cfg.py"
    ) from e

RECIPE = "latent_cfg"
SHAPES = ("disc", "ring", "square", "cross", "triangle", "stripes")  # the built-in classes
BUILT_IN = 40  # built-in images of a class to train on
JUDGED = 310  # samples that the classifier judges at the end, about
IGNORED = 1e-3  # a class moves at least this share of a prediction's square, and another is five times so much worse
EPOCHS = 40  # passes over the data that the classifier takes


@dataclass
class Config(Settings):
    stage: str = opt("all", "what is trained", fixed=True, choices=("all", "encoder", "diffusion"))
    encoder: str = opt(
        "vae", "latents by a small VAE trained first, or by PCA", fixed=True, everyday=True, choices=("vae", "pca")
    )
    encoder_weights: str = opt("", "an encoder.pt of an earlier run, instead of training a VAE", fixed=True)
    encoder_share: float = opt(0.15, "share of the run that trains the VAE", fixed=True, low=0.01, high=0.9)
    vae: str = opt("", "folder of a diffusers AutoencoderKL, instead of an encoder of our own")
    target_size: int = opt(0, "image size in pixels; 0: 64, built-in images 32", fixed=True, everyday=True, low=0)
    factor: int = opt(0, "pixels per latent position; 0: 2, 4 or 8 by size", fixed=True, low=0)
    latent_channels: int = opt(0, "channels of a latent; 0: 4", fixed=True, low=0)
    flip: str = opt("h", "mirror training images: horizontally, both ways", fixed=True, choices=("none", "h", "hv"))
    dim: int = opt(48, "width of the UNet; less learns less by heart", fixed=True, everyday=True, low=8)
    mults: str = opt("1,2,4", "widths of its levels, in units of dim", fixed=True)
    dropout: float = opt(0.0, "dropout in the UNet", fixed=True, low=0, high=0.9)
    batch_size: int = opt(16, "images per forward pass and process", everyday=True, low=1)
    num_epochs: float = opt(0.0, "length of the run in passes over the data, instead of num_steps", low=0)
    num_steps: int = opt(150_000, "length of the run in updates; without data 600", everyday=True, low=0)
    learning_rate: float = opt(
        0.0, "peak rate of AdamW; 0: 1e-3, without a time limit from 50,000 updates on 1e-4", fixed=True, everyday=True, low=0
    )
    objective: str = opt("edm", "noise levels and weights: EDM's, or v with min-SNR", fixed=True, choices=("edm", "v"))
    class_drop: float = opt(0.1, "share of training images whose class is hidden, for guidance", fixed=True, low=0, high=1)
    model_every: int = opt(2000, "updates between two model-N.pt and sample-N.png", low=1)
    keep: int = opt(5, "how many model-N.pt to keep", low=1)
    val_images: int = opt(128, "held-out images in the held-out loss, at most", low=1)
    sample: int = opt(0, "only draw: so many pictures for each class", everyday=True, action=True)
    classes: str = opt("", "for --sample: names of classes with commas between; empty: all")
    model: str = opt("", "for --sample: a model-N.pt of the run; empty: the finished average")
    steps: int = opt(20, "steps of the sampler (DPM-Solver++)", low=2)
    guidance: float = opt(2.0, "guidance towards the class; 1: none", everyday=True, low=0)
    guidance_low: float = opt(0.2, "guide where the noise is at least so many times the signal", low=0)
    guidance_high: float = opt(10.0, "and at most so many times", low=0)
    rescale: float = opt(0.7, "how far guidance keeps the contrast of plain samples", low=0, high=1)
    names: str = opt("", "the classes, as JSON", derived=True)
    channels: int = opt(0, "channels of a latent, of whatever encoder", derived=True)

    def __post_init__(self):
        settle(self)


def settle(cfg):
    """Fill what 0 leaves to the script. RecipeError for settings that do not fit each other."""
    cfg.target_size = cfg.target_size or (64 if cfg.data_dir else 32)
    cfg.factor = cfg.factor or (8 if cfg.target_size >= 128 or cfg.vae else 4 if cfg.target_size >= 32 else 2)
    cfg.latent_channels = cfg.latent_channels or 4
    if cfg.num_steps == Config.num_steps and cfg.num_epochs != Config.num_epochs:
        cfg.num_steps = 0
    elif cfg.num_steps == Config.num_steps and not (cfg.data_dir or cfg.time_budget or cfg.deadline):
        cfg.num_steps = 600  # enough for the built-in shapes
    if not re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2}){0,7}", cfg.mults):
        raise RecipeError(f"--mults is {cfg.mults!r}; it takes up to 8 whole numbers with commas between, such as 1,2,4.", 2)
    unit = cfg.factor * 2 ** cfg.mults.count(",")
    if cfg.target_size % unit:
        raise RecipeError(f"--target_size is {cfg.target_size}; here it takes a multiple of {unit} (factor and levels).", 2)
    if cfg.dim % 8:
        raise RecipeError(f"--dim is {cfg.dim}; it takes a multiple of 8.", 2)
    if cfg.latent_channels > 3 * cfg.factor**2:
        raise RecipeError(f"--latent_channels is {cfg.latent_channels}; patches of {cfg.factor} x {cfg.factor} pixels have "
            f"{3 * cfg.factor**2} values, and latents take fewer.", 2)  # fmt: skip
    if cfg.encoder == "vae" and cfg.factor % 2 and not cfg.vae:
        raise RecipeError(f"--factor is {cfg.factor}; the VAE takes an even one, such as 2, 4 or 8.", 2)
    if cfg.stage == "encoder" and (cfg.encoder == "pca" or cfg.vae or cfg.encoder_weights):
        raise RecipeError("--stage encoder trains the VAE: leave --encoder pca, --vae and --encoder_weights away.", 2)


# --- data -------------------------------------------------------------------------------------------------------------
def load_item(path):
    """EDIT HERE: one image file -> uint8 [height, width, 3], or [height, width] for a gray one."""
    return read_image(path)


def load_picture(record, size):
    """The middle square of a record's image, resized: uint8 [3, size, size]. A text is the name of a built-in shape."""
    if isinstance(record, str):
        return shape(record, size)
    image = square(colour(load_item(record["image"]), record["image"]), size)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def shape(name, size):
    """A built-in image uint8 [3, size, size] of the class that `name` ("disc 7") begins with, in colours of its own."""
    rng, big = np.random.default_rng(mix(name)), 4 * size
    back, ink = (tuple(int(v) for v in rng.integers(*span, 3)) for span in ((150, 256), (0, 110)))
    sheet = Image.new("RGB", (big, big), back)
    draw, kind, r = ImageDraw.Draw(sheet), name.split()[0], big * rng.uniform(0.22, 0.34)
    x, y = rng.uniform(0.4, 0.6, 2) * big
    box, width = [x - r, y - r, x + r, y + r], int(0.3 * r)
    if kind in ("disc", "ring"):
        draw.ellipse(box, fill=ink if kind == "disc" else None, outline=ink, width=width)
    elif kind == "square":
        draw.rectangle(box, fill=ink)
    elif kind == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=ink)
    elif kind == "cross":
        draw.rectangle([x - r, y - width, x + r, y + width], fill=ink)
        draw.rectangle([x - width, y - r, x + width, y + r], fill=ink)
    else:
        for k in range(-2, 3, 2):
            draw.rectangle([x - r, y + k * r / 2.5 - width / 2, x + r, y + k * r / 2.5 + width / 2], fill=ink)
    return np.asarray(sheet.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1).copy()


def label_of(record):
    """The class of a record: the CSV's label, else the name of the folder that the file lies in."""
    if isinstance(record, str):
        return record.split()[0]
    return str(record.get("label") or "").strip() or Path(record["image"]).parent.name


class Pictures(torch.utils.data.Dataset):
    """Images, or their `latents` [images, mirrorings, c, h, w] once these are there, mirrored at random, with their classes."""

    def __init__(self, items, labels, cfg):
        self.items, self.labels, self.cfg, self.cached, self.latents = items, labels, cfg, items.cached, None

    def __len__(self):
        return len(self.items)

    def name(self, index):
        """The file of a sample, for messages."""
        record = self.items.paths[index]
        return record if isinstance(record, str) else record["image"]

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out.

        image: uint8 [n, 3, s, s], or latents [n, c, h, w]; label: int64 [n]; index: [n].
        """
        images, index = [], np.array([i for _, i in keys])
        for epoch, i in keys:
            turn = int(uniforms(self.cfg.seed, epoch, [i], 1)[0, 0] * {"none": 1, "h": 2, "hv": 4}[self.cfg.flip])
            flip = (slice(None), slice(None, None, -1 if turn & 2 else 1), slice(None, None, -1 if turn & 1 else 1))
            images.append(self.items[i][flip].copy() if self.latents is None else self.latents[i, turn].numpy())
        places = [self.items.place(i) for i in index]  # of bad files
        batch = {"image": np.stack(images), "label": self.labels[places], "index": index}
        return {k: torch.from_numpy(a) for k, a in batch.items()}


def natural(text):
    """A key that sorts ID_2 before ID_10."""
    return [(int(part), "") if part.isdecimal() else (0, part.lower()) for part in re.split(r"(\d+)", text)], text


def open_data(cfg, run):
    """(training `Pictures`, held-out namespace) of the folders, or of built-in shapes without any; writes data.png.

    Held out: `images` uint8 [n, 3, s, s] and `labels` int64 [n]; `names` the classes; `real` the training images and `truth`
    their labels, 2,000 at most; `thumbs` these at 32 x 32 with their mirrorings, for `copy_rate`.
    """
    if cfg.data_dir:
        sets = zip(("training", "validation"), open_records(cfg), (cfg.data_dir, cfg.val_dir or cfg.data_dir))
        train, held = (run.fix_files(*s) for s in sets)
    else:
        say("No --data_dir: training on built-in shapes; for your classes add --data_dir FOLDER, with a folder for each.")
        train, held = ([f"{name} {k}" for name in SHAPES for k in span] for span in (range(BUILT_IN), range(-10, 0)))
    names = json.loads(run.settings.get("settings", {}).get("names") or "[]")
    names = names or sorted({label_of(r) for r in train}, key=natural)
    if len(names) < 2:
        raise RecipeError(f"{cfg.data_dir} has one class, {names[0]!r}: put each class into a folder of its own, or give a CSV "
            "with columns image and label.", 2)  # fmt: skip
    cfg.names, strange = json.dumps(names, ensure_ascii=False), [r for r in held if label_of(r) not in names]
    if strange:
        say(f"{len(strange)} validation images are of classes without a training image and left out: {label_of(strange[0])!r}")
    held = [r for r in held if label_of(r) in names]
    train = [r for r in train if label_of(r) in names]
    if not held:
        why = "check --val_dir" if cfg.val_dir else "give a class two images or more, or give --val_dir"
        raise RecipeError(f"No validation image is of a training class ({', '.join(names[:5])}); {why}.", 2)
    load = functools.partial(load_picture, size=cfg.target_size)
    number = {name: k for k, name in enumerate(names)}
    labels = np.array([number[label_of(r)] for r in train], np.int64)
    counts = np.bincount(labels, minlength=len(names))
    least, most = names[counts.argmin()], names[counts.argmax()]
    say(f"{len(train)} images of {len(names)} classes, {counts.min()} ({least}) to {counts.max()} ({most}) each; "
        f"{len(held)} held out, {min(len(held), cfg.val_images)} of them for the held-out loss.")  # fmt: skip
    items, seen = Items(train, load, check=run.check), evenly(len(train), 2000)
    others = Items(held, load, "validation", run.check)
    real, images = (torch.from_numpy(np.stack(a)) for a in ([items[i] for i in seen], [others[i] for i in range(len(held))]))
    held_labels = [number[label_of(held[others.place(i)])] for i in range(len(held))]  # a bad file's is another's
    val = types.SimpleNamespace(
        images=images, labels=torch.tensor(held_labels), names=names, real=real, copies=0.0,
        truth=torch.from_numpy(labels[[items.place(i) for i in seen]]), thumbs=mirrored(thumbs(real), cfg.flip),
    )  # fmt: skip
    if run.main:
        shown = [c for c in evenly(len(names), 16) if counts[c]]
        rows = [[items[i].transpose(1, 2, 0) for i in np.flatnonzero(labels == c)[:8]] * 8 for c in shown]
        sheet = picture([r[:8] for r in rows], zoom=max(1, 64 // cfg.target_size), names=[names[c] for c in shown])
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return Pictures(items, labels, cfg), val


def thumbs(images):
    """uint8 images [n, 3, s, s] as floats [n, 3, 32, 32]."""
    return torch.cat([F.interpolate(part.float(), (32, 32), mode="area") for part in images.cpu().split(64)])


# --- encoder: images <-> latents ------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), which starts as x."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x):
        return x + self.b(F.silu(self.a(F.silu(x))))


class Codec(nn.Module):
    """Images <-> latents with mean 0 and deviation 1 in each channel.

    `pca` projects patches of factor x factor pixels on their first principal components. `vae` adds small networks that learn
    what this leaves, and starts as the PCA. `outer` is a `common.VAE`. `ready`: no longer in training; `plain`: the networks
    were no better than the PCA and are not used; `begun`: the share of the run after which the diffusion began.
    """

    def __init__(self, kind, factor, channels, outer=None, width=64):
        super().__init__()
        self.kind, self.factor, self.outer, self.ready, self.plain, self.begun = kind, factor, outer, False, False, 0.0
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1))
        if outer is None:
            values = 3 * factor**2
            self.register_buffer("mean", torch.zeros(1, values, 1, 1))
            self.register_buffer("basis", torch.eye(channels, values))
            self.register_buffer("back", torch.eye(values, channels))
        if kind == "vae":
            half = width // 2
            self.enc = nn.Sequential(nn.Conv2d(values, width, 3, padding=1), Residual(width), Residual(width), nn.SiLU(),
                nn.Conv2d(width, 2 * channels, 3, padding=1))  # fmt: skip
            self.dec = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), Residual(width), Residual(width), nn.SiLU(),
                nn.Conv2d(width, half * (factor // 2) ** 2, 3, padding=1), nn.PixelShuffle(factor // 2), Residual(half),
                nn.SiLU(), nn.Conv2d(half, 12, 3, padding=1), nn.PixelShuffle(2))  # fmt: skip
            for last in (self.enc[-1], self.dec[-2]):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def get_extra_state(self):
        return {"ready": self.ready, "plain": self.plain, "begun": self.begun}

    def set_extra_state(self, state):
        vars(self).update(state)

    def went_on(self, trained, stage):
        """Take note that a run goes on after this share of it: one that was made longer stays in the diffusion's stage."""
        self.begun = min(self.begun, trained) if self.ready else self.begun
        if stage == "encoder":
            self.ready = self.plain = False

    def project(self, x):
        """Images [n, 3, s, s] in -1..1 -> (patches, their principal components)."""
        patches = F.pixel_unshuffle(x, self.factor) - self.mean
        return patches, F.conv2d(patches, self.basis[..., None, None])

    def rebuild(self, z):
        """The inverse of `project` on what it kept, with the networks' share."""
        x = F.pixel_shuffle(F.conv2d(z, self.back[..., None, None]) + self.mean, self.factor)
        return x + self.dec(z) if self.kind == "vae" and not self.plain else x

    def forward(self, images, noise):
        """What training the VAE takes: uint8 images, noise of the latents' shape -> (images in -1..1, rebuilt ones, KL)."""
        x = images.float() / 127.5 - 1
        patches, z = self.project(x)
        more, spread = self.enc(patches).float().chunk(2, 1)
        z, spread = z + more, spread - 6
        return x, self.rebuild(z + (spread / 2).exp() * noise), 0.5 * (z**2 + spread.exp() - spread - 1).mean()

    @torch.no_grad()
    def encode(self, images):
        """uint8 images [n, 3, s, s] -> latents [n, c, s / factor, s / factor]."""
        images = images.to(self.shift.device)
        if self.outer is not None:
            z = self.outer.encode(images)
        else:
            patches, z = self.project(images.float() / 127.5 - 1)
            z = z + self.enc(patches).chunk(2, 1)[0] if self.kind == "vae" and not self.plain else z
        return (z - self.shift) / self.scale

    @torch.no_grad()
    def decode(self, z):
        """Latents -> images [n, 3, s, s], which reach from about -1 to 1."""
        z = z.float() * self.scale + self.shift
        return self.rebuild(z) if self.outer is None else self.outer.decode(z).float() / 127.5 - 1

    @torch.no_grad()
    def fit(self, batches):
        """Principal components of all patches of uint8 image batches, from the largest down, each with deviation 1."""
        if self.outer is not None:
            return
        total, square, count = 0, 0, 0
        for images in batches:
            p = F.pixel_unshuffle(images.double() / 127.5 - 1, self.factor).permute(0, 2, 3, 1).flatten(0, 2)
            total, square, count = total + p.sum(0), square + p.T @ p, count + len(p)
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        spread, vectors = values[-len(self.basis) :].flip(0).clamp(min=1e-8).sqrt(), vectors[:, -len(self.basis) :].flip(1)
        self.mean.copy_(mean.view(1, -1, 1, 1))
        self.basis.copy_((vectors / spread).T)
        self.back.copy_(vectors * spread)

    @torch.no_grad()
    def normalise(self, batches):
        """Set shift and scale so that the latents of these images have mean 0 and deviation 1."""
        self.shift.zero_()
        self.scale.fill_(1.0)
        z = torch.cat([self.encode(images).cpu().double().transpose(0, 1).flatten(1) for images in batches], 1)
        self.shift.copy_(z.mean(1).view(1, -1, 1, 1))
        self.scale.copy_(z.std(1).clamp(min=1e-6).view(1, -1, 1, 1))


def to_bytes(images):
    """Images in -1..1 -> uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def psnr_of(codec, images):
    """Mean PSNR in dB of uint8 images that went through the latents and back."""
    pairs = ((to_bytes(codec.decode(codec.encode(part))).cpu().float(), part.float()) for part in images.split(32))
    error = torch.cat([(a - b).square().mean((1, 2, 3)) for a, b in pairs])
    return float((10 * torch.log10(255**2 / error.clamp(min=1e-3))).mean())


# --- model ------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A residual block, scaled and shifted by the condition [n, cond]; starts as its shortcut."""

    def __init__(self, width, out, cond, dropout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, out, 3, padding=1)
        self.emb, self.drop = nn.Linear(cond, 2 * out), nn.Dropout(dropout)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(c)[..., None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(self.drop(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))))


class Attention(nn.Module):
    """Self-attention over all positions of [n, width, h, w], added to it; starts as the identity."""

    products = True  # not in a run that is planned for a card

    def __init__(self, width, head=64):
        super().__init__()
        self.heads = next(n for n in range(max(1, width // head), 0, -1) if width % n == 0)
        self.norm, self.qkv, self.out = nn.GroupNorm(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)
        q, k, v = self.qkv(tokens).view(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.products and x.device.type == "cpu":  # products in bf16 take half the time of PyTorch's kernel for processors
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.transpose(1, 2).reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


class UNet(nn.Module):
    """Noisy latents [n, channels, side, side], times [n] in 0..1, classes int64 [n] (the last one: unknown) -> velocities.

    After Ho et al., "Denoising diffusion probabilistic models", 2020; one block a level down and two up, attention from
    8 x 8 positions on.
    """

    def __init__(self, channels, dim, mults, classes, side, dropout=0.0):
        super().__init__()
        cond, width, widths, skips = 4 * dim, dim, [dim * m for m in mults], [dim]
        self.dim, self.null, self.classes = dim, classes, nn.Embedding(classes + 1, cond)
        self.time = nn.Sequential(nn.Linear(dim, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.first, self.down, self.up = nn.Conv2d(channels, dim, 3, padding=1), nn.ModuleList(), nn.ModuleList()
        for k, out in enumerate(widths):
            if k:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                side //= 2
                skips.append(width)
            self.down.append(self.level(width, out, cond, dropout, side))
            width = out
            skips.append(width)
        self.middle = nn.ModuleList([self.level(width, width, cond, dropout, 1), Block(width, width, cond, dropout)])
        for k, out in reversed(list(enumerate(widths))):
            for _ in range(2):
                self.up.append(self.level(width + skips.pop(), out, cond, dropout, side))
                width = out
            if k:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
                side *= 2
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @staticmethod
    def level(width, out, cond, dropout, side):
        return nn.ModuleList([Block(width, out, cond, dropout), Attention(out) if side <= 8 else nn.Identity()])

    def forward(self, z, t, label):
        angle = t[:, None] * torch.exp(torch.linspace(0, math.log(1000), self.dim // 2, device=t.device))
        c = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], 1)) + self.classes(label))
        x = self.first(z.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for part in self.down:
            x = part(x) if isinstance(part, nn.Conv2d) else part[1](part[0](x, c))
            skips.append(x)
        x = self.middle[1](self.middle[0][1](self.middle[0][0](x, c)), c)
        for part in self.up:
            if isinstance(part, nn.Conv2d):
                x = part(F.interpolate(x, scale_factor=2.0))
            else:
                x = part[1](part[0](torch.cat([x, skips.pop()], 1), c))
        return self.last(F.silu(self.norm(x))).float()


def make_codec(cfg, outer=None):
    """The codec of these settings, or one around a `common.VAE`."""
    return Codec("outer" if outer else cfg.encoder, cfg.factor, cfg.channels, outer)


def make_net(cfg):
    """The UNet of these settings."""
    mults, side = [int(m) for m in cfg.mults.split(",")], cfg.target_size // cfg.factor
    net = UNet(cfg.channels, cfg.dim, mults, len(json.loads(cfg.names)), side, cfg.dropout)
    for p in net.parameters():  # Module.to would refuse fake tensors
        p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    return net


# --- diffusion: z = cos(pi t / 2) x + sin(pi t / 2) noise; its velocity is cos(pi t / 2) noise - sin(pi t / 2) x ------------
def angles(t):
    """cos and sin of pi t / 2 for times t [n], each [n, 1, 1, 1]."""
    t = t.view(-1, 1, 1, 1) * (math.pi / 2)
    return t.cos(), t.sin()


def to_noisy(batch, cfg, run):
    """A batch of latents -> {z, v, t, label, weight}: noisy latents, velocities, times, classes of which some are hidden."""
    x, n = batch["image"].float(), len(batch["image"])
    noise, t = run.draw("randn", x.shape), run.draw("rand", (n,))
    t = (torch.arange(n, device=t.device) + run.rank * n + t) / (n * run.world)  # one in each n-th: the gradient varies less
    if cfg.objective == "edm":  # Karras et al., 2022: a lognormal ratio of noise to signal, and equal weights of velocities
        t = (1.2 * math.sqrt(2) * torch.erfinv((2 * t - 1).clamp(-0.99999, 0.99999)) - 0.5).exp().atan() * (2 / math.pi)
    a, b = angles(t)
    hidden = run.draw("rand", (n,)) < cfg.class_drop
    label = torch.where(hidden, len(json.loads(cfg.names)), batch["label"])
    ratio = (a / b.clamp(min=1e-4)).flatten() ** 2
    weight = ratio.clamp(max=5) / (ratio + 1) if cfg.objective == "v" else torch.ones_like(t)  # Hang et al., 2023
    return {"z": a * x + b * noise, "v": a * noise - b * x, "t": t, "label": label, "weight": weight}


@torch.no_grad()
def heldout_loss(net, x, label, run, times=8):
    """Mean squared error of the velocity over latents x [n, c, h, w] at each of a uniform grid of times, with fixed noise; a
    list. 1.0 is what guessing zero gives."""
    own, total = torch.Generator().manual_seed(0), [0.0] * times
    for k in range(times):
        for x1, y in zip(x.split(32), label.split(32)):
            run.check()
            x1, noise = x1.to(run.device), torch.randn(x1.shape, generator=own).to(run.device)
            t = torch.full((len(x1),), (k + 0.5) / times, device=run.device)
            a, b = angles(t)
            with run.autocast():
                v = net(a * x1 + b * noise, t, y.to(run.device))
            total[k] += float((v - a * noise + b * x1).square().mean((1, 2, 3)).sum()) / len(x)
    return total


@torch.no_grad()
def draw_latents(net, noise, label, cfg, run, steps=0):
    """Latents [n, c, h, w] of classes [n] from noise, by DPM-Solver++(2M) (Lu et al., 2022) on EDM's noise levels.

    Guidance (Ho and Salimans, 2022) holds between two noise levels (Kynkaanniemi et al., 2024) and is rescaled to the
    deviation of plain samples (Lin et al., 2023).
    """
    n = steps or cfg.steps
    levels = [(80 ** (1 / 7) + k / (n - 1) * (0.01 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(n)] + [0.0]
    y, label, before = noise.to(run.device) * levels[0], label.to(run.device), None
    for k, (s, after) in enumerate(zip(levels, levels[1:])):
        run.check()
        guided = cfg.guidance != 1 and cfg.class_drop > 0 and cfg.guidance_low <= s <= cfg.guidance_high
        z, t = y / math.sqrt(1 + s * s), torch.full((len(y),), math.atan(s) * 2 / math.pi, device=y.device)
        a, b = angles(t)
        with run.autocast():
            if guided:
                seen, blind = net(z.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([label, label * 0 + net.null])).chunk(2)
            else:
                seen = net(z, t, label)
        x = a * z - b * seen
        if guided:
            far = a * z - b * (blind + cfg.guidance * (seen - blind))
            same = x.std((1, 2, 3), keepdim=True) / far.std((1, 2, 3), keepdim=True)
            x = far * (1 + cfg.rescale * (same - 1))
        step, now = after / s, x
        if before is not None and after > 0:
            r = math.log(levels[k - 1] / s) / math.log(s / after)
            now = x + (x - before) / (2 * r)
        y, before = step * y + (1 - step) * now, x
    return y


def own_noise(cfg, *key):
    """Noise [c, h, w] that depends on the seed and the key alone, so that a sample is the same in any company."""
    side = cfg.target_size // cfg.factor
    return torch.randn(cfg.channels, side, side, generator=torch.Generator().manual_seed(mix(cfg.seed, *key)))


def draw_images(net, codec, label, keys, cfg, run, steps=0):
    """(images uint8 [n, 3, s, s] of classes int64 [n], share of their values that lay outside -1.2..1.2); noise by `keys`."""
    images, outside = [], []
    for at in range(0, len(label), 32):
        noise = torch.stack([own_noise(cfg, *key) for key in keys[at : at + 32]])
        out = codec.decode(draw_latents(net, noise, label[at : at + 32], cfg, run, steps))
        images.append(to_bytes(out).cpu())
        outside.append(float((out.abs() > 1.2).float().mean()))
    return torch.cat(images), sum(outside) / len(outside)


# --- do classes differ? a small classifier looks ------------------------------------------------------------------------
class Classifier(nn.Module):
    """What `thumbs` makes of images -> logits [n, classes]."""

    def __init__(self, classes, width=24):
        super().__init__()

        def conv(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU())

        w, pool = width, nn.MaxPool2d(2)
        body = [conv(12, 2 * w), conv(2 * w, 2 * w), pool, conv(2 * w, 4 * w), conv(4 * w, 4 * w), nn.AdaptiveAvgPool2d(1)]
        self.net = nn.Sequential(nn.PixelUnshuffle(2), *body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * w, classes))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.net((x / 64 - 2).contiguous(memory_format=torch.channels_last))


def vary(x, flip, own):
    """Images [n, 3, 32, 32] with other sizes, places and brightness, mirrored, and a little noisy."""
    u, move = torch.rand(len(x), 5, generator=own), torch.eye(2, 3).repeat(len(x), 1, 1)
    move[:, :, :2] *= 0.85 + 0.3 * u[:, :1, None]
    move[:, 0, 0] *= torch.where((u[:, 1] < 0.5) & (flip != "none"), -1.0, 1.0)
    move[:, :, 2] = 0.4 * u[:, 2:4] - 0.2  # by up to 3 pixels
    x = F.grid_sample(x, F.affine_grid(move, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    return x * (0.8 + 0.4 * u[:, 4:, None, None]) + 8 * torch.randn(x.shape, generator=own)


def train_classifier(val, cfg, run):
    """A `Classifier` of the real training images in eval mode, kept in classifier.pt of the run folder."""
    key = mix(cfg.names, str(val.real.shape), int(val.real.sum(dtype=torch.int64)), cfg.seed)
    torch.manual_seed(cfg.seed)
    net, path, own = Classifier(len(val.names)), run.folder / "classifier.pt", torch.Generator().manual_seed(cfg.seed)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RuntimeError):  # none yet, or damaged
        if (state := load_tensors(path))["key"] == key:
            net.load_state_dict(state["model"])
            return net.to(run.device).eval()
    say("Training a small classifier on the real images; it will judge the samples ...")
    net, small = net.to(run.device).train(), thumbs(val.real)
    updates = max(2 * EPOCHS, min(EPOCHS * len(small) // 64, 2000))
    opt = torch.optim.AdamW(net.parameters(), 6e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 6e-3, updates)
    for _ in range(updates):
        run.check()
        index = torch.randint(len(small), (64,), generator=own)
        x, y = vary(small[index], cfg.flip, own).to(run.device), val.truth[index].to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype is torch.bfloat16):
            loss = F.cross_entropy(net(x), y, label_smoothing=0.1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
    run.write(lambda: save_tensors(path, {"key": key, "model": net.state_dict()}))
    return net.eval()


@torch.no_grad()
def accuracy(classifier, images, labels):
    """Share of uint8 images whose class the classifier names."""
    device = next(classifier.parameters()).device
    hits = [classifier(thumbs(x).to(device)).argmax(1).cpu() == y for x, y in zip(images.split(128), labels.split(128))]
    return float(torch.cat(hits).float().mean())


@torch.no_grad()
def feature_distance(classifier, images, real):
    """How far uint8 images are from `real` ones, as the classifier sees them: the energy distance (Szekely and Rizzo, 2013) of
    its features in units of the mean distance between two real images; 0 is no difference. Unlike the accuracy it sees samples
    that are all alike or too typical. The classifier must not have been trained on either."""
    device = next(classifier.parameters()).device
    x, y = (torch.cat([classifier.net[:-1](thumbs(p).to(device)).cpu() for p in s.split(128)]) for s in (images, real))
    x, y = ((s - y.mean(0)) / (y.std(0) + 1e-6) for s in (x, y))
    xx, yy = (torch.cdist(a, a).sum() / (len(a) * max(len(a) - 1, 1)) for a in (x, y))
    return float((2 * torch.cdist(x, y).mean() - xx - yy) / yy.clamp(min=1e-6))


def spread(images, labels):
    """Mean distance between images of one class; uint8 images [n, 3, s, s]. Not a number where no class has two."""
    flat = thumbs(images).flatten(1)
    pairs = [torch.pdist(flat[labels == c]).mean() for c in labels.unique() if (labels == c).sum() > 1]
    return float(torch.stack(pairs).mean()) if pairs else math.nan


# --- training ---------------------------------------------------------------------------------------------------------
def adam(model, peak, run):
    """AdamW with its state allocated."""
    opt = torch.optim.AdamW([{"params": list(model.parameters()), "peak": peak}], 0.0, (0.9, 0.99), weight_decay=0.0,
        fused=run.kind in ("cuda", "cpu"))  # fmt: skip
    return with_state(opt)


def build(cfg, run):
    """What --stage says: the codec, with its average and optimizer where it is a VAE to train; and the UNet with its own."""
    torch.manual_seed(cfg.seed)
    outer = VAE(cfg.vae, run.device) if cfg.vae else None
    given = outer or cfg.encoder_weights or cfg.stage == "diffusion"
    cfg.channels = outer.channels if outer else cfg.latent_channels
    if outer and outer.factor != cfg.factor:
        raise RecipeError(f"The VAE in {cfg.vae} makes a position of {outer.factor} pixels; add --factor {outer.factor}.", 2)
    with run.device:
        codec, net = make_codec(cfg, outer), make_net(cfg) if cfg.stage != "encoder" else None
    for part in (m for m in (net.modules() if net else ()) if isinstance(m, Attention)):
        part.products = run.kind == "cpu"
    parts = Parts(codec=codec)
    if cfg.encoder_weights:
        load_encoder(codec, cfg)
    if cfg.encoder == "vae" and not given:
        parts = Parts(codec=codec, codec_ema=EMA(codec, 0.99), codec_opt=adam(codec, 2e-3, run))
    if net is not None:
        run.compile(net)
        long = cfg.num_steps >= 50_000 and not (cfg.time_budget or cfg.deadline)
        peak = cfg.learning_rate or (1e-4 if long else 1e-3)  # a run that continues keeps its own
        parts = Parts(**vars(parts), model=net, ema=EMA(net, 0.999), opt=adam(net, peak, run))
    return parts


def load_encoder(codec, cfg):
    """Fill a codec from --encoder_weights."""
    try:
        codec.load_state_dict(load_tensors(Path(cfg.encoder_weights).expanduser())["model"])
        codec.begun = 0.0
    except (*UNREADABLE, RuntimeError, LookupError, TypeError, AttributeError) as e:
        why = str(e).splitlines()[-1].strip()[:120]
        raise RecipeError(f"--encoder_weights {cfg.encoder_weights} does not fit ({why}). It takes an encoder.pt of "
            f"--factor {cfg.factor} --latent_channels {cfg.latent_channels}.", 2) from None  # fmt: skip


def final(parts):
    """The codec to use: the averaged one where it is trained."""
    return parts.codec_ema.model if hasattr(parts, "codec_ema") else parts.codec


def example_batch(cfg, run):
    """A random batch of the shapes and types that `Pictures` makes: images for the encoder's stage, else latents."""
    n, side = cfg.batch_size * cfg.accumulate, cfg.target_size // cfg.factor
    image = torch.randint(256, (n, 3, cfg.target_size, cfg.target_size), dtype=torch.uint8, device=run.device)
    if cfg.stage != "encoder":
        image = torch.randn(n, cfg.channels, side, side, device=run.device).half()
    zeros = torch.zeros(n, dtype=torch.int64, device=run.device)
    return {"image": image, "label": zeros, "index": zeros}


def train_step(parts, batch, cfg, run):
    """One update from a batch of `Pictures`, of the VAE where it holds images, else of the UNet; returns scalar tensors."""
    if batch["image"].dtype == torch.uint8:
        return encoder_step(parts, batch, cfg, run)
    run.anneal(parts.opt, span=(final(parts).begun, 1.0))
    net = run.net(parts.model)

    def loss_fn(part):
        # EDIT HERE: the loss, that of the velocity
        loss = part["weight"] * (net(part["z"], part["t"], part["label"]) - part["v"]).square().mean((1, 2, 3))
        quarters = {f"loss_q{k + 1}": 4 * (loss * ((part["t"] * 4).long() == k)).mean() for k in range(4)}
        return {"loss": loss.mean()} | quarters

    return run.update(loss_fn, to_noisy(batch, cfg, run), parts.opt, parts.model, parts.ema)


def encoder_step(parts, batch, cfg, run):
    """One update of the VAE: absolute and squared error, and a little of the KL divergence to a normal distribution."""
    run.anneal(parts.codec_opt, span=(0.0, 1.0 if cfg.stage == "encoder" else cfg.encoder_share))
    codec, side, n = run.net(parts.codec), cfg.target_size // cfg.factor, len(batch["image"])

    def loss_fn(part):
        x, again, kl = codec(part["image"], part["noise"])
        return (x - again).abs().mean() + (x - again).square().mean() + 1e-5 * kl

    noise = run.draw("randn", (n, cfg.channels, side, side))
    return run.update(loss_fn, {"image": batch["image"], "noise": noise}, parts.codec_opt, parts.codec, parts.codec_ema)


@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation: a guided step of 32 samples and their decoding; for --stage encoder 32 images there and back."""
    size, side, codec = cfg.target_size, cfg.target_size // cfg.factor, final(parts)
    if cfg.stage == "encoder":
        return codec.decode(codec.encode(torch.zeros(32, 3, size, size, dtype=torch.uint8, device=run.device)))
    z, t = torch.zeros(64, cfg.channels, side, side, device=run.device), torch.full((64,), 0.5, device=run.device)
    with run.autocast():
        return codec.decode(parts.ema.model(z, t, torch.zeros(64, dtype=torch.int64, device=run.device))[:32])


def fit_codec(parts, val):
    """Fit the principal components, and the latents' mean and deviation, before update 1."""
    codec = parts.codec
    if not codec.ready:
        codec.fit(val.real.split(32))
        codec.normalise(val.real.split(32))
        codec.ready = not hasattr(parts, "codec_opt")
    if hasattr(parts, "codec_ema"):
        parts.codec_ema.model.load_state_dict(codec.state_dict())


def end_encoder(parts, val, run):
    """The end of the VAE's stage: it is kept where it beats the PCA on held-out images."""
    codec, psnr = final(parts), {}
    for codec.plain in (False, True):
        codec.normalise(val.real.split(32))
        psnr[codec.plain] = psnr_of(codec, val.images)
    codec.plain = psnr[False] <= psnr[True]
    codec.normalise(val.real.split(32))
    codec.ready, codec.begun = True, run.trained()
    text = f"VAE {psnr[False]:.2f} dB, PCA of patches {psnr[True]:.2f} dB on held-out images"
    say(f"{text}: the {'PCA' if codec.plain else 'VAE'} makes the latents from now on.")
    parts.codec.load_state_dict(codec.state_dict())
    run.write(lambda: save_tensors(run.folder / "encoder.pt", {"model": codec.state_dict()}))


def watch_encoder(parts, data, val, cfg, run):
    """After an update of the VAE: one line at 5 % of the run, and the change to the diffusion's stage."""
    codec, few = final(parts), val.images[evenly(len(val.images), cfg.val_images)]
    if run.due(at=(0.05,)):
        own, codec.plain = psnr_of(codec, few), True
        linear, codec.plain = psnr_of(codec, few), False
        text = f"5 % of the run: through the VAE's latents {own:.2f} dB, through the PCA's {linear:.2f} dB."
        say(text + ("" if own > linear else " If it stays below, the PCA is used, and --encoder pca saves the time."))
    if cfg.stage == "all" and run.trained() >= cfg.encoder_share:
        run.settled = True
        end_encoder(parts, val, run)
        take_latents(parts, data, val, cfg, run)
        run.renew()
        codec.begun = parts.codec.begun = run.trained()
        run.save(must=False)


def take_latents(parts, data, val, cfg, run):
    """Latents of the training and held-out images, from the codec as it is now; the training's are cached in the run folder."""
    codec = final(parts)
    if codec.ready:
        weights = [float(v.cpu().double().sum()) for v in codec.state_dict().values() if isinstance(v, torch.Tensor)]
        key = (codec.kind, codec.plain, weights, codec.outer and codec.outer.key)
        data.latents = cached_latents(data.items, codec.encode, key, cfg, run)
    held, seen = (evenly(len(s), cfg.val_images) for s in (val.images, val.real))
    val.psnr, val.y, val.seen_y = psnr_of(codec, val.images[held]), val.labels[held], val.truth[seen]
    latents = ([codec.encode(part).cpu() for part in s.split(32)] for s in (val.images[held], val.real[seen]))
    val.x, val.seen = map(torch.cat, latents)


def assess(parts, val, cfg, run):
    """{heldout_loss, train_loss at the same times and noise, heldout_q1 (little noise) to q4 (much), class_effect: how far the
    class moves the prediction, class_gap: the share by which another class is
    worse}; keeps the best weights."""
    net = parts.ema.model
    held = heldout_loss(net, val.x, val.y, run)
    metrics = {"heldout_loss": sum(held) / len(held)}
    metrics["train_loss"] = sum(heldout_loss(net, val.seen, val.seen_y, run)) / len(held)
    metrics |= {f"heldout_q{k + 1}": (held[2 * k] + held[2 * k + 1]) / 2 for k in range(4)}
    with torch.no_grad(), run.autocast():
        x, y = val.x[:64].to(run.device), val.y[:64].to(run.device)
        t = torch.full((len(x),), 0.75, device=run.device)
        (a, b), noise = angles(t), torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(run.device)
        v, blind, other = (net(a * x + b * noise, t, label) for label in (y, y * 0 + net.null, (y + 1) % net.null))
        metrics["class_effect"] = float((v - blind).square().mean() / v.square().mean().clamp(min=1e-9))
        own, wrong = ((out - a * noise + b * x).square().mean() for out in (v, other))
        metrics["class_gap"] = float(wrong / own.clamp(min=1e-9)) - 1
    run.judge("heldout_loss", metrics, {"net": net.state_dict(), "codec": final(parts).state_dict()}, higher=False)
    return metrics


class Watch:
    """Says what is wrong, each thing once: what it means and what to do."""

    def __init__(self):
        self.told, self.low, self.high = set(), None, None

    def see(self, loss, share):
        """Note the least and the greatest loss of a single batch, once the diffusion has had 5 % of the run."""
        if share > 0.05:
            self.low = loss if self.low is None else torch.fmin(self.low, loss)
            self.high = loss if self.high is None else torch.fmax(self.high, loss)

    def warn(self, metrics, run, begun=0.0):
        """Print the sentences that `warnings_of` has for these metrics and that were not printed before."""
        metrics = metrics | {"begun": begun}
        if self.low is not None:
            metrics = metrics | {"batch_low": float(self.low), "batch_high": float(self.high)}
        for name, text in warnings_of(metrics, run).items():
            if name not in self.told:
                self.told.add(name)
                say(text)


def warnings_of(metrics, run):
    """Sentences about what is wrong by these metrics, by name: what it means and what to do."""
    m = {"begun": 0.0, "copy_rate": 0.0, "diversity": 1.0, "clipped": 0.0, "batch_low": 1.0, "batch_high": 0.0} | metrics
    parted = m["heldout_loss"] > max(1.1 * m["train_loss"], 1.01 * run.best.get("heldout_loss", math.inf))
    # fmt: off
    rules = {
        "memorising": (parted, "Memorisation begins: the held-out loss rises to {heldout_loss:.4f}, that of the training "
            "images is {train_loss:.4f}. best.pt holds the best so far; --patience 3 ends a run there, and --dim 32, "
            "--dropout 0.1 or more images put it off."),
        "ignored": (min(m["class_effect"], m["class_gap"] / 5) < IGNORED and run.trained() > m["begun"] + 0.3, "The class is "
            "ignored: with and without it predictions differ by {class_effect:.1e} of their square, and another class is worse "
            "by {class_gap:.1%}. Does each row of data.png show one class? Early in a run this can be want of updates."),
        "copies": (m["copy_rate"] > 0.01, "{copy_rate:.0%} of the samples are copies of training images. Use an earlier "
            "model-N.pt (--model), --dim 32 or more images; where images are private, do not hand these samples on."),
        "collapsed": (m["diversity"] < 0.5, "Samples of a class are alike: they differ {diversity:.0%} as much as real ones. "
            "A smaller --guidance gives variety; if all are one colour, --fresh with a third of the learning rate."),
        "clipped": (m["clipped"] > 0.02, "{clipped:.0%} of the samples' values are out of range. A smaller --guidance or "
            "--rescale 1 mends that; early in a run it is noise."),
        "low": (m["batch_low"] < 1e-4, "The loss of a single batch was {batch_low:.1e}, below the guide's 0.0001. A "
            "batch's loss follows its noise levels; memorisation shows in heldout_loss against train_loss, and in copy_rate."),
        "high": (m["batch_high"] > 1.0, "The loss of a single batch was {batch_high:.2f}, above the guide's 1.0, about what "
            "guessing zero gives. Once is chance; if it stays there, --fresh with a third of the learning rate."),
    }
    # fmt: on
    return {name: text.format(**m) for name, (wrong, text) in rules.items() if wrong}


@torch.no_grad()
def judge_samples(parts, val, cfg, run, share=1.0):
    """Draw samples of all classes (100 at most) and judge them: class_accuracy and figures beside it; writes classes.png."""
    chosen = evenly(len(val.names), 100)
    whole, each = (max(2, round(part * JUDGED / len(chosen))) for part in (1.0, share))
    label = torch.tensor(chosen).repeat_interleave(each)
    keys, start = [("judged", c, i) for c in chosen for i in range(each)], time.monotonic()
    images, clipped = draw_images(parts.ema.model, final(parts), label, keys, cfg, run)
    run.ahead = (time.monotonic() - start) * (whole / each - 1)
    metrics = {"class_accuracy": accuracy(val.classifier, images, label)}
    metrics["class_accuracy_real"] = accuracy(val.classifier, val.images, val.labels)
    metrics |= {"copy_rate": copy_rate(images, val.thumbs), "clipped": clipped}
    metrics["feature_distance"] = feature_distance(val.classifier, images, val.images)
    diversity = spread(images, label) / spread(val.real, val.truth)
    metrics |= {"diversity": diversity} if math.isfinite(diversity) else {}
    rows, shown = [], evenly(len(chosen), 40)
    for k in shown:
        real = val.real[val.truth == chosen[k]][:2]
        row = [*real, *[torch.full_like(images[0], 255)] * (2 - len(real)), *images[k * each : (k + 1) * each][:6]]
        rows.append([a.numpy().transpose(1, 2, 0) for a in row])
    titles = ["real", "real"] + ["sample"] * (len(rows[0]) - 2)
    sheet = picture(rows, titles, max(1, 64 // cfg.target_size), [val.names[chosen[k]] for k in shown])
    run.write(lambda: write_aside(run.folder / "classes.png", lambda f: sheet.save(f, "PNG")))
    return metrics


def show(parts, val, cfg, run):
    """Write sample-<update>.png: one sample of each class (36 at most), from the same noise each time; notes their copies."""
    label = torch.tensor(evenly(len(val.names), 36))
    keys = [("show", int(c)) for c in label]
    images, _ = draw_images(parts.ema.model, final(parts), label, keys, cfg, run, min(cfg.steps, 12))
    val.copies, across = copy_rate(images, val.thumbs), math.ceil(math.sqrt(len(images)))
    images = images.numpy().transpose(0, 2, 3, 1)
    cells = [*images, *[np.full_like(images[0], 255)] * (-len(images) % across)]
    sheet = picture([cells[k : k + across] for k in range(0, len(cells), across)], zoom=max(1, 128 // cfg.target_size))
    write_aside(run.folder / f"sample-{run.step:06d}.png", lambda f: sheet.save(f, "PNG"))


def export(parts, folder, name="model.pt", keep=0):
    """Write the averaged UNet and its codec; of numbered files the newest `keep` stay."""
    codec = final(parts)
    save_tensors(folder / name, {"net": parts.ema.model.state_dict(), "codec": codec.state_dict()})
    numbered = {int(p.stem[6:]): p for p in folder.glob("model-*.pt") if p.stem[6:].isdigit()}
    for old in sorted(numbered)[:-keep] if keep else ():
        numbered[old].unlink()


def wrap_up(parts, val, cfg, run):
    """The ending, rehearsed before update 1: evaluate, sample, save and export the averaged weights. Returns the metrics."""
    with run.ending():
        if cfg.stage == "encoder":
            metrics = {"psnr": psnr_of(final(parts), val.images)}
            run.judge("psnr", metrics, final(parts).state_dict())
            run.save()
            return metrics
        metrics = {"psnr": val.psnr} | assess(parts, val, cfg, run)
        run.save()
        if run.main:
            metrics |= judge_samples(parts, val, cfg, run, 1.0 if run.over else 0.2)
            show(parts, val, cfg, run)
            with run.results() as folder:
                export(parts, folder)
    return metrics


def verdict(metrics):
    """One line at 5 % of the run: does it learn, does it use the class, and what to change if not."""
    loss, effect = metrics["heldout_loss"], metrics["class_effect"]
    text = f"5 % of the diffusion: held-out loss {loss:.4f} (guessing zero: 1)."
    if loss > 0.98:
        text += " It learns nothing yet: if that goes on, start over with --fresh and a third of the learning rate."
    text += f" The class is {'used' if effect > 1e-3 else 'not used yet'} (effect {effect:.1e})."
    return text + ("" if effect > 1e-3 else " If that stays so: does each row of data.png show one class?")


def summary(metrics):
    """The figures in one line."""
    if "heldout_loss" not in metrics:
        return f"PSNR through the latents {metrics['psnr']:.2f} dB"
    text = "held-out loss {heldout_loss:.4f} (training images {train_loss:.4f})"
    if "class_accuracy" in metrics:
        text += ", classifier right on {class_accuracy:.0%} of samples ({class_accuracy_real:.0%} of real held-out images), "
        text += "{copy_rate:.0%} copies"
    return text.format(**metrics)


def describe(parts, val, cfg):
    """The line that says what is trained on which latents."""
    shape = "x".join(str(n) for n in (val.x.shape[2], val.x.shape[3], val.x.shape[1]))
    codec, share = final(parts), 1 if cfg.stage == "encoder" else cfg.encoder_share
    text = f"Latents {shape} ({codec.kind}, {val.psnr:.1f} dB there and back"
    text += ")" if codec.ready else f"; a VAE learns for {share:.0%} of the run)"
    if hasattr(parts, "model"):
        weights = sum(p.numel() for p in parts.model.parameters()) / 1e6
        text += f"; UNet of {weights:.2f} million weights, objective {cfg.objective}"
    return text


def train(cfg):
    """The whole run; returns the metrics of the averaged weights: heldout_loss, class_accuracy, class_accuracy_real, copy_rate
    and others."""
    for f in (f for f in dataclasses.fields(cfg) if "derived" in f.metadata):
        setattr(cfg, f.name, f.default)  # this run's data decide anew
    if cfg.stage == "diffusion" and cfg.encoder == "vae" and not (cfg.vae or cfg.encoder_weights):
        raise RecipeError("--stage diffusion needs --encoder_weights FILE, the encoder.pt of a run, or --encoder pca.", 2)
    with Run(cfg, RECIPE) as run:
        data, val = open_data(cfg, run)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {run.finished}. A longer --num_steps or --time_budget continues it, --fresh starts over.")
            return run.finished
        if run.saved < 0:
            fit_codec(parts, val)
        for codec in {parts.codec, final(parts)}:
            codec.went_on(run.trained(), cfg.stage)
        take_latents(parts, data, val, cfg, run)
        val.classifier = train_classifier(val, cfg, run) if run.main and cfg.stage != "encoder" else None
        say(describe(parts, val, cfg))
        metrics = wrap_up(parts, val, cfg, run)
        say("Before: " + summary(metrics))
        watch = Watch()
        for batch in run.batches():
            losses = train_step(parts, batch, cfg, run)
            run.advance(losses)
            if not final(parts).ready:
                watch_encoder(parts, data, val, cfg, run)
                continue
            begun = final(parts).begun
            watch.see(losses["loss"], run.trained() - begun)
            marks = {m: begun + m * (1 - begun) for m in SAMPLE_MARKS}  # shares of the diffusion's part
            if run.due(every=0.1, at=(marks[0.05],)) and not run.over:
                metrics = assess(parts, val, cfg, run)
                say(f"step {run.step}: {summary(metrics)}")
                watch.warn(metrics | {"copy_rate": val.copies}, run, begun)
                if run.due(at=(marks[0.05],)):
                    say(verdict(metrics))
            if run.step % cfg.model_every == 0:
                run.write(lambda: export(parts, run.folder, f"model-{run.step:06d}.pt", cfg.keep))
            if run.due(at=marks.values()) or (run.step % cfg.model_every == 0 and not (run.over or run.hurried)):
                run.write(lambda: show(parts, val, cfg, run))
        if cfg.stage == "encoder":
            end_encoder(parts, val, run)
        metrics = run.finish(wrap_up(parts, val, cfg, run))
        if cfg.stage != "encoder":
            watch.warn(metrics, run, final(parts).begun)
        say(f"After {run.step} updates: {summary(metrics)}. Weights and pictures are in {run.folder}")
        return metrics


# --- using the result -------------------------------------------------------------------------------------------------
class Painter(nn.Module):
    """A trained net and its codec: `Painter.forward(labels)` draws uint8 images [n, 3, s, s] of classes int64 [n]."""

    def __init__(self, net, codec, cfg):
        super().__init__()
        self.net, self.codec, self.cfg, self.names = net, codec, cfg, json.loads(cfg.names)

    def forward(self, labels, first=0):
        """Images `first`, `first` + 1, ... of each class: the same in any company, others with another `cfg.seed`."""
        seen, keys = {}, []
        for c in labels.tolist():
            keys.append((self.names[c], first + seen.setdefault(c, 0)))
            seen[c] += 1
        device = self.codec.shift.device
        self.cfg.device = str(device) if device.type == "cuda" else device.type
        return draw_images(self.net, self.codec, labels, keys, self.cfg, Run(self.cfg, RECIPE))[0]


def load(run_dir, device="cpu", model="", vae=""):
    """The trained (EMA) `Painter` of a run folder in eval mode; `model` names one of its model-N.pt, `vae` is where the folder
    of the run's --vae is now."""
    with trained_weights(run_dir, RECIPE, Config, *([model] if model else ("model.pt", "best.pt"))) as (cfg, path):
        if cfg.stage == "encoder":
            raise RecipeError(f"{run_dir} holds an encoder alone; train --stage diffusion with it first.", 2)
        state = load_tensors(path)
        state = state.get("model", state)  # best.pt has them one deeper
        cfg.vae = vae or cfg.vae
        outer = VAE(cfg.vae, device) if cfg.vae else None
        codec, net = make_codec(cfg, outer), make_net(cfg)
        codec.load_state_dict(state["codec"])
        net.load_state_dict(state["net"])
    return Painter(net, codec, cfg).to(device).eval()


def sample(cfg):
    """Draw --sample pictures of each of --classes into <run folder>/samples/<class>; returns their paths."""
    folder = Path(cfg.out_dir or f"results/{RECIPE}").expanduser()
    if not cfg.out_dir and not (folder / "settings.json").exists():
        folder = folder.with_name(folder.name + "-demo")
    painter, paths = load(folder, Run(cfg, RECIPE).device, cfg.model, cfg.vae), []
    own = painter.cfg
    for name in ("steps", "guidance", "guidance_low", "guidance_high", "rescale", "seed", "use_amp", "amp_dtype", "device"):
        if name in getattr(cfg, "given", ()) or getattr(cfg, name) != getattr(Config, name):
            setattr(own, name, getattr(cfg, name))
    wanted = [cfg.classes] if cfg.classes in painter.names else [c.strip() for c in cfg.classes.split(",") if c.strip()]
    wanted = wanted or painter.names
    if strange := set(wanted) - set(painter.names):
        known = ", ".join(painter.names)
        raise RecipeError(f"--classes: the model in {folder} has no class {min(strange)!r}; it has {known}.", 2)
    say(f"Sampling with the model in {folder}: {own.steps} steps, guidance {own.guidance:g}.")
    for name in wanted:
        plain = re.sub(r'[\\/:*?"<>|]|^\.+$', "_", name)  # as a file may be called
        place = folder / "samples" / plain
        place.mkdir(parents=True, exist_ok=True)
        for at in range(0, cfg.sample, 32):
            labels = torch.full((min(32, cfg.sample - at),), painter.names.index(name))
            for i, image in enumerate(painter(labels, at).numpy()):
                paths.append(place / f"{plain}-{own.seed}-{at + i}.png")
                write_aside(paths[-1], lambda f, image=image: Image.fromarray(image.transpose(1, 2, 0)).save(f, "PNG"))
    say(f"{len(paths)} pictures are in {folder / 'samples'}, a folder for each class")
    return paths


if __name__ == "__main__":
    main(lambda cfg: sample(cfg) if cfg.sample else train(cfg), Config, __doc__)
