# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "onnx", "safetensors"]
# ///
"""Train Real-ESRGAN super-resolution (RRDBNet; x1, x2, x4) on a folder of images, from minutes up.

    python train_realesrgan_optimized.py --data_dir photos --time_budget 30m    # add --gan for sharper textures
    python train_realesrgan_optimized.py                          # try it out on built-in textures, under two minutes
    python train_realesrgan_optimized.py --upscale PICTURE_OR_FOLDER

Measured (two cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-21; x4 of bicubic small pictures, trained on T91,
PSNR on Set5; whole process): 30.75 dB in 2 min, 31.31 dB in 10 min (bicubic 28.43 dB).
"""

import collections
import copy
import functools
import io
import itertools
import math
import time
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

try:
    from common import (  # isort: skip
        EMA, SAMPLE_MARKS, UNREADABLE, Items, Parts, RecipeError, Run, Settings, find_images, is_out_of_memory,
        load_tensors, main, mix, open_image, open_records, opt, picture, read_image, say, trained_weights, uniforms, with_state,
        write_aside,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py train_realesrgan_optimized.py"
    ) from e

RECIPE = "realesrgan_optimized"
PRESETS = {"optimized": (24, 8, 12), "lightweight": (32, 12, 16), "full": (64, 23, 32)}  # features, blocks, growth
BUILT_IN = 192  # pictures to train on where there is no --data_dir
EXPORT = "realESRGAN_fast_training"  # .pth, .safetensors and .onnx


@dataclass
class Config(Settings):
    preset: str = opt("optimized", "features x blocks 24x8, 32x12, 64x23", fixed=True, everyday=True, choices=tuple(PRESETS))
    scale: int = opt(4, "enlargement", fixed=True, everyday=True, choices=(1, 2, 4))
    degradation: str = opt("light", "how pictures shrink", fixed=True, everyday=True, choices=("bicubic", "light", "real"))
    lr_dir: str = opt("", "folder of your own small pictures with the same names; replaces --degradation")
    target_size: int = opt(96, "high-resolution crop in pixels, a multiple of 8", fixed=True, everyday=True, low=32)
    batch_size: int = opt(8, "crops per forward pass and process", everyday=True, low=1)
    num_epochs: float = opt(8.0, "length of the run in epochs of one crop of each image", everyday=True, low=0)
    learning_rate: float = opt(3e-3, "peak learning rate of SOAP", fixed=True, low=0)
    grow: bool = opt(False, "crops grow from half of target_size to all of it over the run", fixed=True)
    gan: bool = opt(False, "adversarial training in the last part of the run", fixed=True, everyday=True)
    gan_share: float = opt(0.3, "share of the run that is adversarial", fixed=True, low=0, high=1)
    vgg: str = opt("", "torchvision's VGG19 weights (.pth), for the perceptual loss of --gan")
    init: str = opt("", "weights to start from (.pth, .safetensors), published ones or your own")
    val_epochs: float = opt(2.0, "epochs between two evaluations, of which a run has about ten at most", low=0)
    val_images: int = opt(24, "validation images to use at most", low=1)
    tile: int = opt(256, "low-resolution pixels that are enlarged at once", low=16)
    upscale: str = opt("", "picture or folder to enlarge with the trained model", everyday=True, action=True)  # no training


# --- data -------------------------------------------------------------------------------------------------------------
def load_item(path):
    """EDIT HERE: one file -> uint8 [height, width, 3], or [height, width] for a gray one."""
    return read_image(path)


# Copied from train_ultrafast_srcnn.py::textures
def textures(name, size=192):
    """A built-in picture as uint8 [size, size]: gratings, shapes and lines with sharp edges, drawn at 3x and averaged."""
    rng, big = np.random.default_rng(mix(name)), 3 * size
    y, x = np.mgrid[:big, :big] / big
    angle, waves = rng.uniform(0, math.pi), rng.uniform(3, 16)
    wave = np.sin(2 * math.pi * waves * (x * math.cos(angle) + y * math.sin(angle)) * (1 + 0.5 * x))
    sheet = Image.fromarray(np.uint8(128 + rng.uniform(20, 60) * (np.sign(wave) if rng.random() < 0.5 else wave)))
    draw = ImageDraw.Draw(sheet)
    for _ in range(40):
        tone, kind, at = int(rng.integers(256)), rng.integers(3), rng.uniform(0, big, (3, 2))
        if kind == 0:
            draw.polygon([tuple(p) for p in at[0] + (at - at[0]) * 0.25], fill=tone)
        elif kind == 1:
            draw.ellipse([*at[0], *(at[0] + rng.uniform(20, 150, 2))], fill=tone)
        else:
            draw.line([tuple(at[0]), tuple(at[1])], fill=tone, width=int(rng.integers(4, 16)))
    return np.asarray(sheet.resize((size, size), Image.Resampling.BOX))


def coloured(name):
    """A built-in picture as uint8 [256, 256, 3]: textures between two colours that change across it."""
    shade, rng = textures(name, 256)[..., None] / 255, np.random.default_rng(mix(name, "colours"))
    across = np.linspace(0, 1, shade.shape[1])[:, None]
    low, high = (a * across + b * (1 - across) for a, b in (rng.uniform(*span, (2, 3)) for span in ((0, 120), (120, 256))))
    return np.uint8(low + (high - low) * shade)


def mirrored(image, size):
    """[h, w, ...], continued by its mirror image to `size` pixels where a side is shorter."""
    return np.pad(image, [(0, max(0, size - n)) for n in image.shape[:2]] + [(0, 0)] * (image.ndim - 2), "symmetric")


def load_pair(path, cfg, partners, crop=0):
    """(high, low) uint8 [h, w, 3] or [h, w] of a file; low is None where the device makes it. ValueError below 32 pixels.

    A training picture (crop > 0) is mirrored outwards where it is smaller than the crop. Of a validation picture the middle
    768 x 768 pixels count, cut to multiples of 4, and its small picture is made here, from its own seed.
    """
    high, s = load_item(path) if isinstance(path, Path) else coloured(path), cfg.scale
    if high.ndim not in (2, 3) or high.shape[2:] not in ((), (3,)) or high.dtype != np.uint8:
        raise RecipeError(f"load_item must return uint8 [h, w] or [h, w, 3]; for {path} it is {high.dtype} {high.shape}.")
    if min(high.shape[:2]) < 32:
        raise ValueError(f"{high.shape[1]} x {high.shape[0]} pixels; it takes 32 at least")
    low = None
    if cfg.lr_dir:
        low, size = load_item(partners[path]), (high.shape[0] // s, high.shape[1] // s)
        if low.shape[:2] != size:
            raise ValueError(f"its small picture has {low.shape[1]} x {low.shape[0]} pixels, not {size[1]} x {size[0]}")
        high = high[: s * size[0], : s * size[1]]
    if crop:
        return tuple(a if a is None else mirrored(a, crop // k) for a, k in ((high, 1), (low, s)))
    rows, cols = (min(768, n // 4 * 4) for n in high.shape[:2])
    top, left = ((n - m) // 2 // 4 * 4 for n, m in zip(high.shape, (rows, cols)))
    high = np.ascontiguousarray(high[top : top + rows, left : left + cols])
    if low is not None:
        return high, np.ascontiguousarray(low[top // s : (top + rows) // s, left // s : (left + cols) // s])
    low = degrade(to_tensor(high), cfg.degradation, s, draws(mix(cfg.seed, getattr(path, "name", path))))
    return high, to_array(low)[..., 0] if high.ndim == 2 else to_array(low)


def to_tensor(image):
    """uint8 [h, w] or [h, w, 3] -> float [1, 3, h, w] in 0..1; a gray picture three times."""
    x = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)[None]
    return x.expand(1, 3, *x.shape[2:]).float() / 255


def to_array(x):
    """float [1, c, h, w] in 0..1 -> uint8 [h, w, c]."""
    return (x[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()


def draws(seed):
    """draw(kind, shape) as of `Run.draw`, from a generator of its own on the CPU."""
    own = torch.Generator().manual_seed(seed)
    return lambda kind, shape: getattr(torch, kind)(shape, generator=own)


def gray(x):
    """The luma [n, 1, h, w] of RGB [n, 3, h, w]."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


class Crops(torch.utils.data.Dataset):
    """Random aligned crops with the eight flips and turns; an epoch holds one of each image."""

    def __init__(self, items, cfg):
        self.items, self.cfg, self.cached = items, cfg, items.cached

    def __len__(self):
        return len(self.items)

    def name(self, index):
        """The file of a sample, for messages."""
        return self.items.paths[index]

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out, as uint8 tensors.

        hr: [n, 3, target_size, target_size]; with --lr_dir lr: [n, 3, target_size / scale, ...]; index: [n].
        """
        s, size, highs, lows = self.cfg.scale, self.cfg.target_size // self.cfg.scale, [], []
        for epoch, group in itertools.groupby(keys, key=lambda key: key[0]):
            index = [i for _, i in group]
            for i, (u, v, turn) in zip(index, uniforms(self.cfg.seed, epoch, index, 3)):
                high, low = self.items[i]
                top, left, turn = (
                    int(u * (high.shape[0] // s - size + 1)),
                    int(v * (high.shape[1] // s - size + 1)),
                    int(turn * 8),
                )
                flip = slice(None, None, -1 if turn & 2 else 1), slice(None, None, -1 if turn & 1 else 1)
                for image, k, out in ((high, s, highs), (low, 1, lows)):
                    if image is not None:
                        crop = image[k * top : k * (top + size), k * left : k * (left + size)][flip]
                        crop = np.broadcast_to(crop[..., None], (*crop.shape, 3)) if crop.ndim == 2 else crop
                        out.append(crop.transpose(2, 1, 0) if turn & 4 else crop.transpose(2, 0, 1))
        batch = {"hr": np.stack(highs), "index": np.array([i for _, i in keys])} | ({"lr": np.stack(lows)} if lows else {})
        return {k: torch.from_numpy(a) for k, a in batch.items()}


def partners_of(paths, root, cfg):
    """{picture: its small picture in --lr_dir}: the one of its folder and path, else of its path, else the only one of its
    name, whatever the suffix. RecipeError names a picture that has none."""
    if not cfg.lr_dir:
        return {}
    small, here, named, found = Path(cfg.lr_dir).expanduser(), {}, {}, {}
    root = root.parent if root.is_file() else root
    for p in find_images(small, "small pictures"):
        below = p.relative_to(small).with_suffix("")
        here[below] = p
        for name in {below.name, below.name.removesuffix(f"x{cfg.scale}")}:  # 0001x4.png is usual too
            named.setdefault(name, []).append(p)
    for path in paths:
        below = (path.relative_to(root) if path.is_relative_to(root) else Path(path.name)).with_suffix("")
        same = named.get(below.name, [])
        found[path] = here.get(root.name / below) or here.get(below) or (same[0] if len(same) == 1 else None)
    alone = [p for p, partner in found.items() if partner is None]
    if alone:
        raise RecipeError(f"{len(alone)} of {len(paths)} pictures have no partner of that name in {small}, e.g. {alone[0]}.", 2)
    return found


def open_data(cfg, run):
    """(training crops, validation pairs) of the folders, or of the built-in textures without any; writes data.png."""
    if cfg.target_size % 8:
        raise RecipeError(f"--target_size is {cfg.target_size}; it takes a multiple of 8.", 2)
    if cfg.gan and cfg.patience:
        raise RecipeError("--patience would end the run before the second stage of --gan; leave one of them away.", 2)
    if cfg.vgg and not cfg.gan:
        raise RecipeError("--vgg is for the second stage; add --gan.", 2)
    if cfg.scale == 1 and cfg.degradation == "bicubic" and not cfg.lr_dir:
        raise RecipeError("--scale 1 with --degradation bicubic leaves nothing to learn; choose light or real.", 2)
    if cfg.data_dir:
        roots = (cfg.data_dir, cfg.val_dir or cfg.data_dir)
        sets = (run.fix_files(n, r, d) for n, r, d in zip(("training", "validation"), open_records(cfg), roots))
        train, val = ([r["image"] for r in records] for records in sets)
        train_pairs, val_pairs = (partners_of(p, Path(r).expanduser(), cfg) for p, r in zip((train, val), roots))
    else:
        say("No --data_dir: training on built-in textures, to try things out; for your pictures add --data_dir FOLDER.")
        if cfg.lr_dir or cfg.val_dir:
            raise RecipeError("--lr_dir and --val_dir need --data_dir: the pictures to train on.", 2)
        train, val, train_pairs, val_pairs = [f"train {i}" for i in range(BUILT_IN)], [f"val {i}" for i in range(6)], {}, {}
    if len(val) > cfg.val_images:
        say(f"Validating on {cfg.val_images} of {len(val)} pictures, evenly chosen; --val_images changes that.")
        val = [val[i * len(val) // cfg.val_images] for i in range(cfg.val_images)]
    load = functools.partial(load_pair, cfg=cfg)
    data = Crops(Items(train, functools.partial(load, partners=train_pairs, crop=cfg.target_size), check=run.check), cfg)
    val = Items(val, functools.partial(load, partners=val_pairs), "validation", run.check)
    batch = data.__getitems__([(0, i * len(data) // 12) for i in range(12)])
    high = batch["hr"].float() / 255
    low = batch["lr"].float() / 255 if cfg.lr_dir else degrade(high, cfg.degradation, cfg.scale, draws(cfg.seed))
    low = low.repeat_interleave(cfg.scale, 2).repeat_interleave(cfg.scale, 3)
    cells = [[to_array(low[i : i + 1]), to_array(high[i : i + 1])] for i in range(12)]
    sheet = picture([sum(cells[r : r + 4], []) for r in (0, 4, 8)], ["input", "target"] * 4)
    if run.main:
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return data, val


# --- degradation: batched, on the device, each picture by its own random numbers ----------------------------------------
def between(u, low, high):
    """Random numbers 0..1 stretched to low..high."""
    return low + u * (high - low)


def blur_kernels(u, widest, sinc, lowest=math.pi / 5):
    """Random 21 x 21 kernels [n, 21, 21] from u [n, 9] in 0..1: Real-ESRGAN's six kinds of Gaussians of sigma 0.2 to `widest`,
    or for a share `sinc` circular low-pass filters, which ring as sharpened pictures do (Wang et al., 2021)."""
    size, sigma, angle, kind, other, side, shape, which, cutoff = u[:, :, None, None].unbind(1)
    half, ring = 3 + (size * 8).floor(), torch.arange(-10.0, 11.0, device=u.device)
    y, x, angle = ring[:, None], ring[None], between(angle, -math.pi, math.pi)
    # isotropic .45, anisotropic .25, generalised Gaussian .12 and .03, plateau .12 and .03
    even = (kind < 0.45) | ((kind >= 0.70) & (kind < 0.82)) | ((kind >= 0.85) & (kind < 0.97))
    one = between(sigma, 0.2, widest)
    two = torch.where(even, one, between(other, 0.2, widest))
    r2 = ((x * angle.cos() + y * angle.sin()) / one) ** 2 + ((y * angle.cos() - x * angle.sin()) / two) ** 2
    bell, flat = (torch.where(side < 0.5, between(shape, low, 1), between(shape, 1, high)) for low, high in ((0.5, 4), (1, 2)))
    kernel = torch.exp(-0.5 * r2 ** torch.where(kind < 0.70, 1.0, bell))
    kernel = torch.where(kind < 0.85, kernel, 1 / (1 + r2**flat))
    cutoff, r = between(cutoff, torch.where(half < 6, math.pi / 3, lowest), math.pi), (y**2 + x**2).sqrt().clamp(min=1e-6)
    waves = (cutoff * r).cpu() if u.device.type == "mps" else cutoff * r
    jinc = torch.where(
        r < 0.5, cutoff**2 / (4 * math.pi), cutoff * torch.special.bessel_j1(waves).to(u.device) / (2 * math.pi * r)
    )
    kernel = torch.where(which < sinc, jinc, kernel) * (y.abs() <= half) * (x.abs() <= half)
    return kernel / kernel.sum((1, 2), keepdim=True)


def blur(x, kernels):
    """Each picture of [n, 3, h, w] by its own kernel [n, 21, 21]; mirrored at the edges, repeated where it is too small."""
    n, c, h, w = x.shape
    x = F.pad(x, (10,) * 4, mode="reflect" if min(h, w) > 10 else "replicate").reshape(1, n * c, h + 20, w + 20)
    return F.conv2d(x, kernels.repeat_interleave(c, 0)[:, None], groups=n * c).view(n, c, h, w)


def resize_matrix(u, content, size, total_in, total_out):
    """[n, total_out, total_in]: each row of `content` [n] pixels to `size` [n] ones, by area, bilinear or bicubic as u [n]
    in 0..1 chooses, without antialiasing for the last two, as Real-ESRGAN does. Beyond `size` the last pixel repeats."""
    step = (content / size)[:, None, None]
    out = torch.minimum(torch.arange(total_out, device=u.device)[:, None], size[:, None, None] - 1)
    pixel = torch.arange(total_in, device=u.device)[None, None]
    d = (pixel - (out + 0.5) * step + 0.5).abs()
    area = torch.minimum(0.5 * (1 + step) - d, step.clamp(max=1)).clamp(min=0)
    cubic = torch.where(d < 1, (1.25 * d - 2.25) * d * d + 1, torch.where(d < 2, ((3.75 - 0.75 * d) * d - 6) * d + 3, 0.0))
    u = u[:, None, None]
    weight = torch.where(u < 1 / 3, area, torch.where(u < 2 / 3, (1 - d).clamp(min=0), cubic)) * (
        pixel < content[:, None, None]
    )
    return weight / weight.sum(2, keepdim=True)


def resize(x, u, content, size, total):
    """The top left `content` (two [n] of rows, columns) pixels of pictures [n, 3, h, w] to `size` ones on [n, 3, *total]."""
    rows, cols = (resize_matrix(u, *cs, n, t) for cs, n, t in zip(zip(content, size), x.shape[2:], total))
    return rows[:, None] @ x @ cols[:, None].transpose(2, 3)


def add_noise(x, u, normal, gauss, poisson):
    """Gaussian noise (sigma of `gauss`, in levels of 255) or, for the other half, Poisson's (times `poisson`) as Gaussian
    noise of its variance at 256 levels; gray for two fifths. x, normal: [n, 3, h, w]; u: [n, 4] in 0..1."""
    u = u[:, :, None, None, None]
    alike = u[:, 1] < 0.4  # in the three channels
    normal = torch.where(alike, normal[:, :1], normal)
    light = torch.where(alike, gray(x), x).clamp(0, 1)
    sigma = torch.where(u[:, 0] < 0.5, between(u[:, 2], *gauss) / 255, between(u[:, 3], *poisson) * (light / 256).sqrt())
    return (x + normal * sigma).clamp(0, 1)


LUMA_TABLE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
CHROMA_TABLE = "17 18 24 47 18 21 26 66 24 26 56 99 47 66 99 99"  # its upper left quarter; the rest is 99


def jpeg(x, quality):
    """JPEG of each picture [n, 3, h, w] in 0..1 at its own quality [n] in 1..100, with the tables of Annex K and chroma at
    half size, as Pillow's default; what a decoder shows, in 0..1."""
    h, w = x.shape[2:]
    x = F.pad((x * 255).round(), (0, -w % 16, 0, -h % 16), mode="replicate")
    y = gray(x)
    chroma = F.avg_pool2d(torch.cat([(x[:, 2:] - y) / 1.772, (x[:, :1] - y) / 1.402], 1) + 128, 2)
    luma_table = torch.tensor([float(t) for t in LUMA_TABLE.split()], device=x.device).view(8, 8)
    chroma_table = torch.full((8, 8), 99.0, device=x.device)
    chroma_table[:4, :4] = torch.tensor([float(t) for t in CHROMA_TABLE.split()], device=x.device).view(4, 4)
    quality = quality.floor()
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)[:, None, None]
    k = torch.arange(8.0, device=x.device)
    dct = torch.cos(math.pi / 16 * (2 * k + 1) * k[:, None]) * torch.where(k == 0, math.sqrt(1 / 8), 0.5)[:, None]

    def code(plane, table):
        table = ((table * scale + 50) / 100).floor().clamp(1, 255)[:, None, None, None]
        n, c, rows, cols = plane.shape
        blocks = plane.round().clamp(0, 255).view(n, c, rows // 8, 8, cols // 8, 8).transpose(3, 4) - 128
        blocks = dct.t() @ ((dct @ blocks @ dct.t() / table).round() * table) @ dct
        return (blocks.transpose(3, 4).reshape(plane.shape) + 128).round().clamp(0, 255)

    y = code(y, luma_table)
    cb, cr = (F.interpolate(code(chroma, chroma_table), scale_factor=2, mode="bilinear") - 128).split(1, 1)
    x = torch.cat([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return x.round().clamp(0, 255)[..., :h, :w] / 255


def real_chain(x, size, draw):
    """Real-ESRGAN's two-order chain (Wang et al., 2021, with its published ranges): [n, 3, h, w] -> [n, 3, *size] in 0..1.

    Its authors share resize factors inside a batch and shuffle a pool of 180 pairs to hide that; here each picture has its
    own, so that there is no pool, and update k depends on (seed, k) alone. They also degrade more than the crop and cut
    after it, and sharpen the targets (USM); this degrades the crop, and the target is your picture as it is.
    """
    n, _, h, w = x.shape
    u, now = draw("rand", (n, 48)), [x.new_full((n,), float(side)) for side in (h, w)]
    first = ((h, w), 3.0, 1.0, (0.2, 0.9), (0.15, 1.5), (1, 30), (0.05, 3.0))
    second = (size, 1.5, 0.8, (0.3, 0.7), (0.3, 1.2), (1, 25), (0.05, 2.5))
    for v, (base, widest, blurred, ways, factors, gauss, poisson) in zip(u.split(18, 1), (first, second)):
        x = torch.where(v[:, 9, None, None, None] < blurred, blur(x, blur_kernels(v[:, :9], widest, 0.1)), x)
        up, down = between(v[:, 11], 1, factors[1]), between(v[:, 11], factors[0], 1)
        factor = torch.where(v[:, 10] < ways[0], up, torch.where(v[:, 10] < ways[1], down, 1.0))
        then = [(side * factor).floor().clamp(min=1) for side in base]
        x, now = resize(x, v[:, 12], now, then, [math.ceil(factors[1] * side) for side in base]), then
        x = add_noise(x, v[:, 13:17], draw("randn", x.shape), gauss, poisson)
        if base is not size:
            x = jpeg(x, between(v[:, 17], 30, 95))
    v, goal = u[:, 36:], [x.new_full((n,), float(side)) for side in size]
    late, quality = v[:, 11, None, None, None] < 0.5, between(v[:, 10], 30, 95)
    x = resize(torch.where(late, x, jpeg(x, quality)), u[:, 35], now, goal, size)
    x = torch.where(
        v[:, 9, None, None, None] < 0.8, blur(x, blur_kernels(v[:, :9], 1.0, 1.0, math.pi / 3)).clamp(0, 1), x.clamp(0, 1)
    )
    return torch.where(late, jpeg(x, quality), x)


@torch.no_grad()
def degrade(high, kind, scale, draw):
    """Small pictures [n, 3, h / scale, w / scale] of high [n, 3, h, w] in 0..1, rounded to 8 bits, on the same device.

    kind: `bicubic` (antialiased, the benchmarks' protocol); `light` (that, then noise of sigma 0 to 10 for a half and JPEG
    of quality 50 to 95 for three quarters); `real` (see `real_chain`). draw(kind of torch function, shape) gives random
    numbers, e.g. `run.draw`.
    """
    size = (high.shape[2] // scale, high.shape[3] // scale)
    if kind == "real":
        x = real_chain(high, size, draw)
    else:
        x = F.interpolate(high, size, mode="bicubic", antialias=True) if scale > 1 else high
    if kind == "light":
        u = draw("rand", (len(x), 4))
        x = x + draw("randn", x.shape) * (between(u[:, 0], 0, 10) / 255 * (u[:, 1] < 0.5))[:, None, None, None]
        coded = jpeg(x.clamp(0, 1), between(u[:, 2], 50, 95))
        x = torch.where(u[:, 3, None, None, None] < 0.75, coded, x)
    return (x * 255).round().clamp(0, 255) / 255


# --- model ------------------------------------------------------------------------------------------------------------
class ResidualDenseBlock(nn.Module):
    """Five 3 x 3 convolutions, each on all that came before it."""

    def __init__(self, features, growth):
        super().__init__()
        for k in range(1, 6):
            setattr(self, f"conv{k}", nn.Conv2d(features + (k - 1) * growth, growth if k < 5 else features, 3, padding=1))

    def forward(self, x):
        seen = [x]
        for k in range(1, 5):
            seen.append(F.leaky_relu(getattr(self, f"conv{k}")(torch.cat(seen, 1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(seen, 1))


class RRDB(nn.Module):
    """Residual in residual: three dense blocks."""

    reach = 15  # how many pixels away its output sees

    def __init__(self, features, growth):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(features, growth) for _ in range(3))

    def forward(self, x):
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """RGB [n, 3, h, w] in 0..1 -> [n, 3, scale * h, scale * w] (Wang et al., "ESRGAN", 2018, with the names of its published
    weights; x2 and x1 fold pixels into channels first, as Real-ESRGAN does, and need h and w to be multiples of 2 and 4).

    It starts near a bilinear enlargement (x1: of the picture at half its size): the first features carry RGB through the
    convolutions, the rest adds nothing yet. A bicubic skip would do too, but not inside the format that other programs load.
    """

    def __init__(self, features, blocks, growth, scale=4):
        super().__init__()
        self.scale, self.fast = scale, False
        self.conv_first = nn.Conv2d(3 * (4 // scale) ** 2, features, 3, padding=1)
        self.body = nn.Sequential(*[RRDB(features, growth) for _ in range(blocks)])
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(features, features, 3, padding=1) for _ in range(4)
        )
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)
        self.start()

    @torch.no_grad()
    def start(self):
        """Set the first weights."""
        for name, conv in self.named_modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, 0 if "rdb" in name else 0.2)
                conv.weight.mul_(0.1 if "rdb" in name else 1)
                conv.bias.zero_()
        self.conv_body.weight.zero_()
        self.conv_last.weight.zero_()
        r, triangle = 4 // self.scale, torch.tensor([0.25, 0.5, 0.25])  # which on repeated pixels is linear interpolation
        parts, h = min(r * r, 4), max(1, r // 2)  # features of a colour: itself, or the means of the quarters of folded pixels
        edge = triangle if r == 1 else torch.tensor([-0.15, 0.3, 0.35])  # near least squares to put quarters in their places
        self.conv_first.weight[: 3 * parts] = 0
        for conv in (self.conv_up1, self.conv_up2, self.conv_hr):
            conv.weight[:3] = 0
        for c, k in itertools.product(range(3), range(parts)):
            down, across, quarter = k // 2, k % 2, torch.zeros(r, r)
            quarter[down * h : down * h + h, across * h : across * h + h] = parts / r**2
            self.conv_first.weight[parts * c + k, c * r * r : (c + 1) * r * r, 1, 1] = quarter.flatten()
            sides = (edge.flip(0) if far else edge for far in (down, across))
            self.conv_up1.weight[c, parts * c + k] = torch.outer(*sides)
        for c in range(3):
            self.conv_up2.weight[c, c] = torch.outer(triangle, triangle)
            self.conv_hr.weight[c, c, 1, 1] = self.conv_last.weight[c, c, 1, 1] = 1

    def head(self, x):
        """Features [n, f, h, w] -> [n, 3, 4 * h, 4 * w]."""
        for conv in (self.conv_up1, self.conv_up2):
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))

    def forward(self, x):
        x = self.conv_first(F.pixel_unshuffle(x, 4 // self.scale))
        body = dense_body(self, x) if self.fast and torch.is_grad_enabled() else self.body(x)
        return self.head(x + self.conv_body(body))


class Discriminator(nn.Module):
    """Real-ESRGAN's U-Net with spectral norm: [n, 3, h, w], h and w multiples of 8 -> a logit for each pixel [n, 1, h, w]."""

    def __init__(self, features):
        super().__init__()
        f, norm = features, nn.utils.parametrizations.spectral_norm
        self.conv0 = nn.Conv2d(3, f, 3, padding=1)
        for k in (1, 2, 3):
            setattr(self, f"conv{k}", norm(nn.Conv2d(f * 2 ** (k - 1), f * 2**k, 4, 2, 1, bias=False)))
        for k in (4, 5, 6):
            setattr(self, f"conv{k}", norm(nn.Conv2d(f * 2 ** (7 - k), f * 2 ** (6 - k), 3, 1, 1, bias=False)))
        self.conv7, self.conv8 = (norm(nn.Conv2d(f, f, 3, 1, 1, bias=False)) for _ in range(2))
        self.conv9 = nn.Conv2d(f, 1, 3, padding=1)
        for k in range(1, 9):  # spectral norm leaves next to nothing of a signal behind the usual start
            weight = getattr(self, f"conv{k}").parametrizations.weight.original.data
            weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, device="cpu")))  # not every MPS has the QR for it

    def forward(self, x):
        levels = [F.leaky_relu(self.conv0(x), 0.2)]
        for conv in (self.conv1, self.conv2, self.conv3):
            levels.append(F.leaky_relu(conv(levels[-1]), 0.2))
        x = levels.pop()
        for conv in (self.conv4, self.conv5, self.conv6):
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = F.leaky_relu(conv(x), 0.2) + levels.pop()
        return self.conv9(F.leaky_relu(self.conv8(F.leaky_relu(self.conv7(x), 0.2)), 0.2))


class Perceptual(nn.Module):
    """L1 between VGG19's features before ReLU, weighted as Real-ESRGAN does. `path`: the usual features.N.weight file."""

    layers = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}

    def __init__(self, path):
        super().__init__()
        widths = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4]
        modules, before = [], 3
        for width in widths:
            modules += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            before = width or before
        self.features = nn.Sequential(*modules[:35])
        if path:
            state = read_weights(path)
            try:
                self.load_state_dict({k: v.float() for k, v in state.items() if k in self.state_dict()})
            except RuntimeError as e:
                raise RecipeError(f"--vgg {path} is no VGG19: {str(e).splitlines()[-1].strip()}", 2) from None
        self.requires_grad_(False).eval()

    def seen(self, x):
        """The features of RGB [n, 3, h, w] in 0..1, one tensor for each of `layers`."""
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x, found = (x - mean) / std, []
        for k, layer in enumerate(self.features):
            x = layer(x)
            found += [x.float()] if k in self.layers else []
        return found

    def forward(self, x, goal):
        with torch.no_grad():
            goal = self.seen(goal)
        return sum(w * F.l1_loss(a, b) for w, a, b in zip(self.layers.values(), self.seen(x), goal))


def detail_loss(x, y):
    """What stands in for VGG: L1 between the gradients of two pictures, and between their spectra."""
    d = x - y
    steep = d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()
    spectra = (torch.fft.rfft2(p, norm="ortho").abs() for p in (x, y))
    return steep + F.l1_loss(*spectra)


# --- speed: skip this at first reading ----------------------------------------------------------------------------------
class DenseBlock(torch.autograd.Function):
    """ResidualDenseBlock with its own backward pass: one 72-channel buffer instead of five growing copies, backward as
    another dense block, and the five weight gradients as one convolution. It keeps less than half of the activations.

    apply(x [n, f, h, w], back, five weights, five biases); back: the weights [f + 4g, f + 4g, 3, 3] turned around, input
    channels first, so that the gradient of a layer's output is one convolution of all that came after it.
    """

    @staticmethod
    def forward(ctx, x, back, *layers):
        f, g = x.shape[1], layers[0].shape[0]
        seen = torch.empty(
            (x.shape[0], f + 4 * g, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        seen[:, :f] = x
        outs = []
        for k in range(4):
            outs.append(F.leaky_relu_(F.conv2d(seen[:, : f + k * g] if k else x, layers[k], layers[5 + k], padding=1), 0.2))
            seen[:, f + k * g : f + (k + 1) * g] = outs[-1]
        ctx.save_for_backward(seen, back, *outs)
        return torch.add(x, F.conv2d(seen, layers[4], layers[9], padding=1), alpha=0.2)

    @staticmethod
    def backward(ctx, d):
        seen, back, *outs = ctx.saved_tensors
        f, g = d.shape[1], (seen.shape[1] - d.shape[1]) // 4
        grads = torch.empty_like(seen)  # of what goes into the activations: g channels of each layer, then f of the last
        grads[:, 4 * g :] = d * 0.2
        for k in (3, 2, 1, 0):
            out = F.conv2d(grads[:, (k + 1) * g :], back[f + k * g : f + (k + 1) * g, (k + 1) * g :], padding=1)
            grads[:, k * g : (k + 1) * g] = torch.ops.aten.leaky_relu_backward(out, outs[k], 0.2, True)
        weights = torch.nn.grad.conv2d_weight(seen, back.shape, grads, padding=1)
        spans = [slice(k * g, (k + 1) * g) for k in range(4)] + [slice(4 * g, None)]
        bias = grads.sum((0, 2, 3))
        layers = [weights[span, : f + k * g] for k, span in enumerate(spans)] + [bias[span] for span in spans]
        return F.conv2d(grads, back[:f], padding=1).add_(d), None, *layers


def dense_body(model, x):
    """What model.body(x) is, by `DenseBlock`."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    dense = [block for rrdb in model.body for block in (rrdb.rdb1, rrdb.rdb2, rrdb.rdb3)]
    with torch.autocast(kind, enabled=False):
        stacks = [torch.stack([getattr(getattr(b, f"conv{k}"), what) for b in dense]).to(dtype)
                  for what in ("weight", "bias") for k in range(1, 6)]  # fmt: skip
        wide = stacks[4].shape[2]
        back = stacks[0].new_zeros(len(dense), wide, wide, 3, 3)
        for k, w in enumerate(stacks[:5]):
            first = k * stacks[0].shape[1]
            back[:, : w.shape[2], first : first + w.shape[1]] = w.detach().flip(3, 4).transpose(1, 2)
        inner = x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        for k, (turned, *own) in enumerate(zip(back, *(s.unbind() for s in stacks))):
            inner = DenseBlock.apply(inner, turned, *own)
            if k % 3 == 2:  # the end of an RRDB
                inner = x = torch.add(x, inner, alpha=0.2)
    return x


# Copied from train_ultrafast_srcnn.py::SOAP
class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., "SOAP: improving and stabilizing Shampoo using
    Adam", 2024). For networks this small the matrices cost little, and an update is worth several of Adam's. Weights of
    one shape are turned together, as one stack; their state is kept with the first of them."""

    def __init__(self, params, lr, betas=(0.95, 0.999), every=10):
        super().__init__(params, {"lr": lr, "betas": betas, "every": every})
        for same in (s for group in self.param_groups for s in self.stacks(group)):
            p, n = same[0], len(same)
            sizes = p.flatten(2).shape if p.ndim > 2 else p.shape
            eye = [torch.eye(d, device=p.device).repeat(n, 1, 1) if p.ndim > 1 and d > 1 else p.new_zeros(0) for d in sizes]
            self.state[p] = {"step": 0, "mean": p.new_zeros(n, *sizes), "square": p.new_zeros(n, *sizes)}
            self.state[p] |= {"factors": [0 * e for e in eye], "bases": [e.detach() for e in eye]}

    @staticmethod
    def stacks(group):
        """The parameters of a group, those of one shape together."""
        by_shape = {}
        for p in group["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        return list(by_shape.values())

    @staticmethod
    def turn(x, bases, back=False):
        """Rotate every axis of x [n, ...] but the first into its basis, or back; each in turn moves to the end."""
        for q in bases:
            turned = x.movedim(1, -1)
            if q.numel():
                turned = (turned.flatten(1, -2) @ (q.mT if back else q)).view(turned.shape)
            x = turned
        return x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), every = group["betas"], group["every"]
            for same in (s for s in self.stacks(group) if s[0].grad is not None):
                state = self.state[same[0]]
                state["step"] += 1
                k, bases, g = state["step"], state["bases"], torch.stack([p.grad for p in same]).view(state["mean"].shape)
                new = k % every == 0
                mean = self.turn(state["mean"], bases, back=True) if new else None  # it is kept in the basis
                for axis, (factor, q) in enumerate(zip(state["factors"], bases)):
                    if q.numel():
                        flat = g.movedim(axis + 1, 1).flatten(2)
                        factor.lerp_(flat @ flat.mT, 1 - b1)
                        if new:  # one step of power iteration, damped, so that rounding turns no direction
                            m = factor @ q + 0.01 * factor.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * q
                            q.copy_(torch.linalg.qr(m.cpu() if m.device.type == "mps" else m)[0])
                if new:
                    state["mean"].copy_(self.turn(mean, bases))
                turned = self.turn(g, bases)
                state["mean"].lerp_(turned, 1 - b1)
                state["square"].mul_(b2).addcmul_(turned, turned, value=1 - b2)
                mean = state["mean"] / (1 - b1**k)
                mean /= (state["square"] / (1 - b2**k)).sqrt_().add_(1e-10)
                steps = self.turn(mean, bases, back=True).reshape(len(same), *same[0].shape).unbind()
                torch._foreach_add_(same, list(steps), alpha=-group["lr"])


# --- evaluation -------------------------------------------------------------------------------------------------------
# Copied from train_ultrafast_srcnn.py::luma
def luma(image):
    """uint8 [h, w, 3] -> Y of BT.601 as float32 [h, w] in 16..235, the luma of the published figures; gray stays gray."""
    return image.astype(np.float32) if image.ndim == 2 else image @ np.float32([65.481, 128.553, 24.966]) / 255 + 16


# Copied from train_ultrafast_srcnn.py::psnr
def psnr(a, b):
    """PSNR in dB of two float pictures in 0..255."""
    return 10 * math.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-12))


# Copied from train_ultrafast_srcnn.py::ssim
def ssim(a, b):
    """SSIM of two float pictures [h, w] in 0..255, 11 x 11 Gaussian window of sigma 1.5, no padding (Wang et al., 2004)."""
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    a, b, g = a.double(), b.double(), (g / g.sum()).view(1, 1, 11, 1)
    maps = torch.stack([a, b, a * a, b * b, a * b])[:, None]
    ma, mb, aa, bb, ab = F.conv2d(F.conv2d(maps, g), g.transpose(2, 3))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    return float((top / ((ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2))).mean())


def tiled(layer, x, device, tile, reach, scale=1):
    """layer(x) of [1, c, h, w] by tiles of `tile` pixels with `reach` more around them, on `device`; x and the result
    [1, _, scale * h, scale * w] are on the CPU. The same as in one piece, where `reach` is what a pixel sees."""
    out = None
    for top, left in itertools.product(range(0, x.shape[2], tile), range(0, x.shape[3], tile)):
        up, across = min(top, reach), min(left, reach)
        part = layer(x[..., top - up : top + tile + reach, left - across : left + tile + reach].to(device))
        part = part[..., scale * up : scale * (up + tile), scale * across : scale * (across + tile)].cpu()
        if out is None:
            out = part.new_empty(1, part.shape[1], scale * x.shape[2], scale * x.shape[3])
        out[..., scale * top : scale * top + part.shape[2], scale * left : scale * left + part.shape[3]] = part
    return out


@torch.no_grad()
def enlarge(model, low, tile=256):
    """[1, 3, h, w] in 0..1 -> [1, 3, scale * h, scale * w] on the CPU, in pieces where a side is longer than `tile`.

    Not the network is cut into tiles, but each of its blocks: 15 pixels around a tile are enough then for the same result
    as in one piece, where the whole network sees 124 (24 x 8) or 349 (64 x 23).
    """
    s, (h, w), device = model.scale, low.shape[2:], next(model.parameters()).device
    fold = 4 // s
    x = F.pad(low, (0, -w % fold, 0, -h % fold), mode="replicate").contiguous(memory_format=torch.channels_last)
    if max(h, w) <= tile:
        return model(x.to(device)).float().cpu()[..., : s * h, : s * w]
    size = tile // fold
    x = tiled(model.conv_first, F.pixel_unshuffle(x, fold), device, size, 1)
    body = x
    for block in model.body:
        body = tiled(block, body, device, size, RRDB.reach)
    x += tiled(model.conv_body, body, device, size, 1)
    return tiled(model.head, x, device, size, 2, scale=4)[..., : s * h, : s * w]


def evaluate(model, val, cfg, run):
    """Means over (high, low) pairs: psnr, psnr_bicubic and ssim of the luma, rounded, border = scale, as published; and
    colour_drift: how many levels of 255 the mean colour of the result, made small again, lies from the input's."""
    rows, s = [], cfg.scale
    for high, low in val:
        run.check()
        x = to_tensor(low)
        ours, plain = enlarge(model, x, cfg.tile), F.interpolate(x, scale_factor=s, mode="bicubic", antialias=True)
        shift = F.interpolate(ours, x.shape[2:], mode="bicubic", antialias=True).mean((2, 3)) - x.mean((2, 3))
        ours, plain = (to_array(p) if high.ndim == 3 else to_array(gray(p))[..., 0] for p in (ours, plain))
        ours, plain, high = (torch.from_numpy(luma(p))[s:-s, s:-s] for p in (ours, plain, high))
        rows.append((psnr(ours, high), psnr(plain, high), ssim(ours, high), 255 * float(shift.abs().max())))
    names = ("psnr", "psnr_bicubic", "ssim", "colour_drift")
    return {k: sum(column) / len(rows) for k, column in zip(names, zip(*rows))}


def show(parts, val, cfg, run, size=144):
    """Write sample-<update>.png: bicubic, model, original; the middle of four validation images, twice enlarged."""
    rows = []
    for high, low in itertools.islice(val, 4):
        top, left = (max(0, (n - size) // 2) for n in high.shape[:2])
        x = to_tensor(low)
        plain = F.interpolate(x, scale_factor=cfg.scale, mode="bicubic", antialias=True)
        pictures = (to_array(plain), to_array(enlarge(parts.ema.model, x, cfg.tile)), high)
        rows.append([a[top : top + size, left : left + size] for a in pictures])
    sheet = picture(rows, ("bicubic", cfg.preset, "original"), zoom=2)
    write_aside(run.folder / f"sample-{run.step:06d}.png", lambda f: sheet.save(f, "PNG"))


# --- weights that open elsewhere ----------------------------------------------------------------------------------------
def shape_of(state):
    """(features, blocks, growth, scale) of an RRDBNet's weights; RecipeError where they are none."""
    try:
        features, inputs = state["conv_first.weight"].shape[:2]
        blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("body."))
        return features, blocks, state["body.0.rdb1.conv1.weight"].shape[0], {3: 4, 12: 2, 48: 1}[inputs]
    except (KeyError, ValueError, IndexError):
        raise RecipeError(
            "These are not the weights of an RRDBNet: conv_first, body.0.rdb1.conv1 ... are missing.", 2
        ) from None


def regrow(state, growth):
    """The same function with `growth` channels a layer: zeros are added (other programs know 32 only) or taken away again.

    RecipeError where channels would be taken away that do something.
    """
    (features, _, old, _), new = shape_of(state), dict(state)
    for key in (k for k in state if ".rdb" in k and old != growth):
        w, k, more = state[key], int(key.split(".conv")[1][0]) - 1, growth - old
        if w.ndim == 4:
            first, *grown = w.split([features, *[old] * k], 1)
            w = torch.cat([first, *(F.pad(part, (0, 0, 0, 0, 0, more)) for part in grown)], 1)  # negative: cut
        new[key] = F.pad(w, (0, 0) * (w.ndim - 1) + (0, more)) if k < 4 else w
        if more < 0 and new[key].count_nonzero() != state[key].count_nonzero():
            raise RecipeError(
                f"The weights use {old} growth channels, and this network has {growth}; choose another --preset.", 2
            )
    return new


def read_weights(path):
    """{name: tensor} of a .safetensors, .pth or .pt file: its params_ema, params, state_dict or model, if it has them."""
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise RecipeError(f"To read {path}: pip install safetensors.", 2) from None
    except Exception as e:
        raise RecipeError(
            f"Cannot read the weights {path}: {str(e).splitlines()[0] if str(e) else type(e).__name__}", 2
        ) from None
    for name in ("params_ema", "params", "state_dict", "model"):
        state = state.get(name, state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    named = ((k, v) for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor) and not v.is_meta)
    return {k.removeprefix("module."): v for k, v in named if v.layout is torch.strided and v.is_floating_point()}


def start_from(model, cfg):
    """Take the weights of --init into `model`; say what matched. RecipeError where nothing did."""
    state, mine = read_weights(cfg.init), model.state_dict()
    features, blocks, growth, scale = shape_of(state)
    try:
        if growth != PRESETS[cfg.preset][2] and features == PRESETS[cfg.preset][0]:
            state = regrow(state, PRESETS[cfg.preset][2])
    except (RuntimeError, ValueError, IndexError) as e:
        raise RecipeError(f"--init {cfg.init} is no RRDBNet throughout ({str(e).splitlines()[0][:150]}).", 2) from None
    fits = {k: v.to(mine[k].dtype) for k, v in state.items() if k in mine and v.shape == mine[k].shape}
    other = [k for k in mine if k not in fits]
    if len(fits) < len(mine) / 2:
        raise RecipeError(
            f"--init {cfg.init} is a network of {features} features x {blocks} blocks, growth {growth}; only {len(fits)} of "
            f"{len(mine)} tensors fit --preset {cfg.preset}. The presets are {PRESETS}.", 2)  # fmt: skip
    model.load_state_dict(fits, strict=False)
    rest = f"; left as they start: {', '.join(other[:4])}{' ...' * (len(other) > 4)}" if other else ""
    say(f"--init {cfg.init} (x{scale}): {len(fits)} of {len(mine)} tensors match{rest}.")


def export(model, folder):
    """Write the weights as .pth and .safetensors with 32 growth channels (for spandrel, chaiNNer, ComfyUI) and a one-file
    .onnx of any size. Each is read again and compared with the model before it takes its name, else RecipeError."""
    plain = copy.deepcopy(model).cpu().eval()
    state = {k: v.contiguous() for k, v in regrow(plain.state_dict(), 32).items()}
    wide, x = RRDBNet(*shape_of(state)).eval(), torch.rand(1, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    goal = plain(x).detach()

    def write(suffix, fill, rerun):
        def check(part):
            gap = float((rerun(part) - goal).abs().max() / goal.abs().max().clamp(min=1))
            if not gap < 1e-4:
                raise RecipeError(f"{EXPORT}{suffix} would differ from the model by {gap:.1e}: try another torch or onnx.")

        write_aside(folder / f"{EXPORT}{suffix}", fill, check)

    def by_weights(state):
        wide.load_state_dict(state)
        return wide(x).detach()

    write(".pth", lambda f: torch.save({"params_ema": state}, f), lambda part: by_weights(load_tensors(part)["params_ema"]))
    try:
        from safetensors.torch import load_file, save

        write(".safetensors", lambda f: f.write(save(state)), lambda part: by_weights(load_file(part)))
    except ImportError:
        say(f"No {EXPORT}.safetensors: for it, pip install safetensors.")
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        return say(f"No {EXPORT}.onnx: for it, pip install onnx.")
    memory, axes = io.BytesIO(), {0: "n", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that writes one file is called deprecated
        torch.onnx.export(
            plain, (torch.rand(1, 3, 24, 20),), memory, dynamo=False, opset_version=17, input_names=["input"],
            output_names=["output"], dynamic_axes={"input": axes, "output": axes},
        )  # fmt: skip

    def by_onnx(part):
        return torch.from_numpy(ReferenceEvaluator(onnx.load(part)).run(None, {"input": x.numpy()})[0])

    write(".onnx", lambda f: f.write(memory.getvalue()), by_onnx)


# --- training ---------------------------------------------------------------------------------------------------------
def build(cfg, run):
    """Model, EMA and optimizer with its state, on the run's device; with --gan the discriminator and its optimizer too."""
    torch.manual_seed(cfg.seed)
    with run.device:
        model = RRDBNet(*PRESETS[cfg.preset], cfg.scale)
        parts = Parts(model=model, ema=EMA(model, 0.999), opt=SOAP(model.parameters(), cfg.learning_rate))
        if cfg.gan:
            parts.disc = Discriminator(PRESETS[cfg.preset][0])
            opt = torch.optim.Adam([{"params": list(parts.disc.parameters()), "peak": 2e-4}], 0.0, (0.9, 0.99))
            parts.disc_opt = with_state(opt)
            if cfg.vgg:
                parts.look = types.SimpleNamespace(loss=Perceptual(cfg.vgg))  # not a part of checkpoints
    model.fast = not cfg.compile and run.kind != "mps"  # not tried there
    run.compile(model)
    return parts


def crop_now(cfg, run):
    """The crop's size in pixels at this moment: with --grow in five steps from half of target_size."""
    return 8 * math.ceil(cfg.target_size * (4 + min(4, int(5 * run.trained()))) / 64) if cfg.grow else cfg.target_size


def adversarial(cfg, run, progress=None):
    """Whether the second stage has begun, at the run's progress or another."""
    return cfg.gan and run.trained(progress) >= 1 - cfg.gan_share


def example_batch(cfg, run):
    """A random batch of the shapes and types that `Crops` makes."""
    n, sizes = cfg.batch_size * cfg.accumulate, {"hr": cfg.target_size}
    if cfg.lr_dir:
        sizes["lr"] = cfg.target_size // cfg.scale
    batch = {k: torch.randint(256, (n, 3, s, s), dtype=torch.uint8, device=run.device) for k, s in sizes.items()}
    return batch | {"index": torch.zeros(n, dtype=torch.int64, device=run.device)}


def make_pair(batch, cfg, run):
    """{hr, lr} of a batch of `Crops` as floats in 0..1; what is random in lr is drawn from (seed, update)."""
    crop = crop_now(cfg, run)
    hr = batch["hr"][..., :crop, :crop].float() / 255
    if cfg.lr_dir:
        lr = batch["lr"][..., : crop // cfg.scale, : crop // cfg.scale].float() / 255
    else:
        lr = degrade(hr, cfg.degradation, cfg.scale, run.draw)
    return {k: x.contiguous(memory_format=torch.channels_last) for k, x in (("hr", hr), ("lr", lr))}


def train_step(parts, batch, cfg, run):
    """One update from a batch of `Crops`: of the network, in the second stage then of the discriminator.

    Returns `loss`, `norm` and in the second stage the terms of the loss as scalar tensors. Spectral norm takes one step
    of its power iteration in each forward pass, so that there splitting a batch is not exact to the last bit.
    """
    gan, pair, net = adversarial(cfg, run), make_pair(batch, cfg, run), run.net(parts.model)
    first = 1 - cfg.gan_share if cfg.gan else 1.0
    for group in parts.opt.param_groups:
        group["peak"] = cfg.learning_rate * (0.1 if gan else 1)
    if not gan:
        run.anneal(parts.opt, "onecycle", span=(0, first))

        def loss_fn(part):
            d = net(part["lr"]).float() - part["hr"]
            return d.abs().mean() + gray(d).abs().mean()  # EDIT HERE: the loss. The eye and PSNR look at luma most

        return run.update(loss_fn, pair, parts.opt, parts.model, parts.ema)
    run.anneal(parts.disc_opt, "constant", span=(first, 1))
    run.anneal(parts.opt, "cosine", span=(first, 1))
    pair["fake"], parts.disc = torch.empty_like(pair["hr"]), parts.disc.requires_grad_(False)
    half = run.dtype is torch.bfloat16  # fp16 is too narrow for the discriminator

    def generator_loss(part):
        out = net(part["lr"]).float()
        part["fake"].copy_(out.detach())  # a slice of the pair: the discriminator learns from it below
        with torch.autocast(run.device.type, enabled=half):
            logits = parts.disc(out).float()
            detail = parts.look.loss(out, part["hr"]) if cfg.vgg else detail_loss(out, part["hr"])
        terms = {"l1": F.l1_loss(out, part["hr"]), "detail": detail, "fool": F.softplus(-logits).mean()}
        return {"loss": terms["l1"] + terms["detail"] + 0.1 * terms["fool"], **terms}

    losses = run.update(generator_loss, pair, parts.opt, parts.model, parts.ema)
    disc = run.net(parts.disc.requires_grad_(True))

    def disc_loss(part):
        with torch.autocast(run.device.type, enabled=half):
            real, fake = disc(torch.cat([part["hr"], part["fake"]])).float().chunk(2)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    return losses | {"disc": run.update(disc_loss, pair, parts.disc_opt, clip=None)["loss"]}


@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation: one tile with its surroundings, as features and enlarged."""
    side = cfg.tile * cfg.scale // 4 + 2 * RRDB.reach
    features = torch.zeros(1, PRESETS[cfg.preset][0], side, side, device=run.device)
    return parts.ema.model.head(parts.ema.model.body[0](features))


def wrap_up(parts, val, cfg, run):
    """The ending, rehearsed before update 1: evaluate, show, save and export the averaged weights. Returns the metrics."""
    with run.ending():
        metrics = assess(parts, val, cfg, run)
        run.save()
        if run.main:
            show(parts, val, cfg, run)
            with run.results() as folder:
                export(parts.ema.model, folder)
    return metrics


def assess(parts, val, cfg, run):
    """Evaluate, and keep the best weights by PSNR; not those of the second stage, which trades PSNR for sharpness."""
    metrics = evaluate(parts.ema.model, val, cfg, run)
    if run.step and cfg.gan_share < 1 and adversarial(cfg, run, run.was):  # the stage of the update just done
        run.record({"step": run.step, "metric": "psnr", **metrics})
    else:
        run.judge("psnr", metrics, parts.ema.model.state_dict())
    if metrics["colour_drift"] > 2 and run.trained() > 0.1:
        say(
            f"Colours drift: results differ from their inputs by {metrics['colour_drift']:.1f} levels of 255. If that grows: "
            f"Ctrl-C, then --out_dir NEW --init {run.folder / 'best.pt'} --learning_rate {cfg.learning_rate / 3:g}"
        )
    return metrics


def verdict(gain, lead, batch, cfg, run):
    """One line at 5 % of the run: does it learn (gain: since its start, lead: over bicubic), and what degrading costs."""
    start = time.perf_counter()
    for _ in range(3):
        float(make_pair(batch, cfg, run)["lr"].sum())
    cost = f"Making small pictures takes {(time.perf_counter() - start) / 3 / run.step_time:.0%} of a step."
    if max(gain, lead) > 0.05:
        return f"5 % of the run: it learns, {gain:+.2f} dB since the start, {lead:+.2f} against bicubic. {cost}"
    return f"5 % of the run: {gain:+.2f} dB since the start. If it stays so: are the images sharp? See data.png. {cost}"


def train(cfg):
    """The whole run; returns the metrics of the averaged weights: psnr, psnr_bicubic, ssim, colour_drift, steps, seconds."""
    with Run(cfg, RECIPE) as run:
        data, val = open_data(cfg, run)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {run.finished}. A longer --num_epochs or --time_budget continues it, --fresh starts over.")
            return run.finished
        if cfg.init and run.saved < 0:
            start_from(parts.model, cfg)
            parts.ema.model.load_state_dict(parts.model.state_dict())
        elif cfg.init:
            say("--init is left alone: this run has begun already. To start from it: --fresh, or another --out_dir.")
        if cfg.gan and not adversarial(cfg, run) and any(state["step"] for state in parts.disc_opt.state.values()):
            say("This run was in its second stage; longer now, it goes back to the first.")
        metrics = start = wrap_up(parts, val, cfg, run)
        say(f"Before: {metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB on {val.good} validation images.")
        if cfg.gan and not cfg.vgg:
            say("--gan without --vgg: gradients and spectra stand in for the perceptual loss of VGG19.")
        if cfg.data_dir and run.planned_steps < 500:
            say(f"Only {run.planned_steps} updates; --time_budget 30m or a larger --num_epochs gives it time to learn.")
        every = max(0.1, cfg.val_epochs * len(data) / run.samples / max(run.planned_steps, 1))
        turn = (1 - cfg.gan_share,) if cfg.gan and 0 < cfg.gan_share < 1 else ()
        for batch in run.batches():
            run.advance(train_step(parts, batch, cfg, run))
            if run.due(every=every, at=(0.05, *turn)) and not run.over:
                metrics = assess(parts, val, cfg, run)
                say(f"step {run.step}: {metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB")
                if run.due(at=(0.05,)):
                    say(verdict(metrics["psnr"] - start["psnr"], metrics["psnr"] - metrics["psnr_bicubic"], batch, cfg, run))
            if run.due(at=turn):
                say("The second stage begins: sharper textures, at a lower PSNR. best.pt keeps the best of the first.")
            if run.due(at=SAMPLE_MARKS):
                run.write(lambda: show(parts, val, cfg, run))
        metrics = run.finish(wrap_up(parts, val, cfg, run))
        say(
            f"{metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB, SSIM {metrics['ssim']:.4f} on {val.good} "
            f"images after {run.step} updates. The weights ({EXPORT}.*) and pictures are in {run.folder}"
        )
        return metrics


# --- using the result -------------------------------------------------------------------------------------------------
def load(run_dir, device="cpu"):
    """The trained (EMA) model of a run folder in eval mode: RGB [n, 3, h, w] in 0..1 -> [n, 3, scale * h, scale * w]."""
    with trained_weights(run_dir, RECIPE, Config, f"{EXPORT}.pth", "best.pt") as (cfg, path):
        model = RRDBNet(*PRESETS[cfg.preset], cfg.scale)
        model.load_state_dict(regrow(read_weights(path), PRESETS[cfg.preset][2]))
    return model.to(device).eval()


def read_deep(path):
    """(float32 [h, w, 1 to 4] in 0..1, whether the file has 16 bits): gray, gray + alpha, RGB or RGBA."""
    with open_image(path) as image:
        raw = str(image.tile[0][3]) if image.tile else ""
        if image.mode[0] not in "IF" and ";16" in raw:  # Pillow would drop eight bits of colour
            try:
                import cv2
            except ImportError:
                raise ValueError("16-bit colour; for it, pip install opencv-python-headless") from None
            values = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
            if values is None or values.ndim != 3:
                raise ValueError("OpenCV cannot decode it")
            return np.float32(values[..., [2, 1, 0, *range(3, values.shape[2])]] / 65535), True
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            values = np.nan_to_num(np.asarray(image, np.float32)[..., None]).clip(0)
            top = max(float(values.max()), 1e-9)
            return values / (65535 if image.mode[0] == "I" and top <= 65535 else top), True
        clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        mode = ("LA" if clear else "L") if image.mode in ("1", "L", "LA", "La") else "RGBA" if clear else "RGB"
        values = np.asarray(image.convert(mode), np.float32) / 255
        return values.reshape(*values.shape[:2], -1), False


def write_deep(path, values, deep):
    """Write float [h, w, 1 to 4] in 0..1 as a PNG of 8 or 16 bits."""
    values = (values * (65535 if deep else 255)).round().clip(0, 65535 if deep else 255).astype(np.uint16 if deep else np.uint8)
    if deep and values.shape[2] > 1:
        import cv2

        order = {2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[values.shape[2]]
        return write_aside(path, lambda f: f.write(cv2.imencode(".png", values[..., order])[1].tobytes()))
    picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    write_aside(path, lambda f: picture.save(f, "PNG"))


def upscale_image(model, image, tile=256):
    """float [h, w, 1 to 4] in 0..1 -> the same, scale times as large: the colours by the model, alpha by bicubic."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    colours = x.shape[1] - (x.shape[1] % 2 == 0)
    out = enlarge(model, x[:, :colours].expand(1, 3, -1, -1), tile)
    out = gray(out) if colours == 1 else out
    if x.shape[1] > colours:
        out = torch.cat([out, F.interpolate(x[:, colours:], out.shape[2:], mode="bicubic", antialias=True)], 1)
    return out[0].permute(1, 2, 0).clamp(0, 1).numpy()


def upscale(cfg):
    """Enlarge a picture or a folder with a trained model into <run folder>/upscaled; returns the paths written."""
    run, folder = Run(cfg, RECIPE), Path("results") / RECIPE
    if cfg.out_dir or not (folder / "best.pt").exists():
        folder = run.folder  # named, or the one of the built-in data
    model, source = load(folder, run.device), Path(cfg.upscale).expanduser()
    files, done = [source] if source.is_file() else find_images(source, "pictures to enlarge"), []
    say(f"Enlarging {model.scale} times with the model in {folder}")
    names = collections.Counter(p.with_suffix("") for p in files)
    for path in files:
        try:
            image, deep = read_deep(path)
        except UNREADABLE as e:
            say(f"Left out {path}: {e}")
            continue
        try:
            out = upscale_image(model, image, cfg.tile)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise RecipeError(f"Out of memory enlarging {path}; try --tile {max(16, cfg.tile // 2)}.") from e
        name = path.relative_to(source) if path != source else Path(path.name)
        alone = names[path.with_suffix("")] == 1  # beside a.png, a.jpg keeps its suffix
        target = folder / "upscaled" / (name.with_suffix(".png") if alone else name.with_name(name.name + ".png"))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_deep(target, out, deep)
        say(f"{path} -> {target} ({out.shape[1]} x {out.shape[0]})")
        done.append(target)
    if not done:
        raise RecipeError(f"Nothing enlarged: {cfg.upscale} holds no readable picture.")
    return done


if __name__ == "__main__":
    main(lambda cfg: upscale(cfg) if cfg.upscale else train(cfg), Config, __doc__)
