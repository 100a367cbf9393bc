# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "onnx"]
# ///
"""Train SRCNN super-resolution (9-1-5, 9-5-5 or the faster ESPCN; x2, x3, x4) on a folder of images, in minutes.

    python train_ultrafast_srcnn.py --data_dir photos --scale 3 --time_budget 5m
    python train_ultrafast_srcnn.py                          # try it out on built-in textures, under a minute
    python train_ultrafast_srcnn.py --upscale PICTURE_OR_FOLDER

Measured (two cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-21; trained on T91, PSNR on Set5; whole process):
SRCNN 9-1-5 x3 32.48 dB in 30 s, 32.77 dB in 5 min (bicubic 30.39); ESPCN x4 30.48 dB in 1 min (bicubic 28.42).
"""

import copy
import functools
import io
import itertools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

try:
    from common import (
        EMA,
        SAMPLE_MARKS,
        UNREADABLE,
        Items,
        Parts,
        RecipeError,
        Run,
        Settings,
        find_images,
        load_tensors,
        main,
        mix,
        open_records,
        opt,
        picture,
        read_image,
        save_tensors,
        say,
        trained_weights,
        uniforms,
        write_aside,
    )
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py train_ultrafast_srcnn.py"
    ) from e

RECIPE = "ultrafast_srcnn"
CROPS = 16  # crops of each image in an epoch
MARGIN = 4  # low-resolution pixels around a crop that its outermost output pixels depend on


@dataclass
class Config(Settings):
    arch: str = opt("srcnn", "network", fixed=True, everyday=True, choices=("srcnn", "srcnn-955", "espcn"))
    scale: int = opt(3, "enlargement", fixed=True, everyday=True, choices=(2, 3, 4))
    target_size: int = opt(48, "high-resolution crop in pixels, a multiple of the scale", fixed=True, low=12)
    num_epochs: float = opt(40.0, "length of the run in epochs of 16 crops of each image", everyday=True, low=0)
    learning_rate: float = opt(3e-3, "peak learning rate of SOAP", fixed=True, everyday=True, low=0)
    upscale: str = opt("", "picture or folder to enlarge with the trained model", everyday=True, action=True)  # no training


# --- data -------------------------------------------------------------------------------------------------------------
def luma(image):
    """uint8 [h, w, 3] -> Y of BT.601 as float32 [h, w] in 16..235, the luma of the published figures; gray stays gray."""
    return image.astype(np.float32) if image.ndim == 2 else image @ np.float32([65.481, 128.553, 24.966]) / 255 + 16


def load_item(path):
    """EDIT HERE: one file -> uint8 [height, width], what is to be enlarged."""
    return (luma(read_image(path)) + 0.5).astype(np.uint8)


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


def shrink(hr, scale):
    """[h, w] uint8 -> [h / scale, w / scale] uint8 by antialiased bicubic, rounded: the low-resolution picture."""
    hr = torch.from_numpy(np.array(hr))[None, None].float()
    size = (hr.shape[2] // scale, hr.shape[3] // scale)
    return F.interpolate(hr, size, mode="bicubic", antialias=True).round().clamp(0, 255).byte()[0, 0].numpy()


def load_pair(path, cfg, smallest):
    """(high, low) uint8 [h, w] of a file; h and w are cut to multiples of the scale. ValueError below `smallest` pixels."""
    hr, s = load_item(path) if isinstance(path, Path) else textures(path), cfg.scale
    if hr.ndim != 2:
        raise RecipeError(f"load_item must return [height, width]; for {path} its shape is {hr.shape}.")
    if min(hr.shape) < smallest:
        raise ValueError(f"{hr.shape[1]} x {hr.shape[0]} pixels; it takes {smallest} at least")
    hr = np.ascontiguousarray(hr[: hr.shape[0] // s * s, : hr.shape[1] // s * s])
    return hr, shrink(hr, s)


class Crops(torch.utils.data.Dataset):
    """Random aligned crops with the eight flips and turns; an epoch holds CROPS of each image."""

    def __init__(self, items, cfg):
        self.items, self.cfg, self.cached = items, cfg, items.cached

    def __len__(self):
        return CROPS * len(self.items)

    def name(self, index):
        """The file of a sample, for messages."""
        return self.items.paths[index // CROPS]

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out, as uint8 tensors.

        lr: [n, 1, low, low] with low = crop / scale + 2 * MARGIN; hr: [n, 1, crop, crop]; index: [n].
        """
        s, size = self.cfg.scale, self.cfg.target_size // self.cfg.scale
        lows, highs = [], []
        for epoch, group in itertools.groupby(keys, key=lambda key: key[0]):
            index = [i for _, i in group]
            for i, (u, v, turn) in zip(index, uniforms(self.cfg.seed, epoch, index, 3)):
                hr, lr = self.items[i // CROPS]
                top, left, turn = int(u * (lr.shape[0] - size + 1)), int(v * (lr.shape[1] - size + 1)), int(turn * 8)
                rows = np.arange(top - MARGIN, top + size + MARGIN).clip(0, lr.shape[0] - 1)  # replicate at the edges
                cols = np.arange(left - MARGIN, left + size + MARGIN).clip(0, lr.shape[1] - 1)
                pair = lr[rows[:, None], cols], hr[top * s : (top + size) * s, left * s : (left + size) * s]
                low, high = (a.T if turn & 4 else a for a in pair)  # bits of turn: transpose, upside down, mirror
                up, across = slice(None, None, -1 if turn & 2 else 1), slice(None, None, -1 if turn & 1 else 1)
                lows.append(low[up, across])
                highs.append(high[up, across])
        batch = {"lr": np.stack(lows)[:, None], "hr": np.stack(highs)[:, None], "index": np.array([i for _, i in keys])}
        return {k: torch.from_numpy(a) for k, a in batch.items()}


def open_data(cfg, run):
    """(training crops, validation pairs) of the folders, or of the built-in textures without any; writes data.png."""
    if cfg.target_size % cfg.scale:
        raise RecipeError(f"--target_size is {cfg.target_size}; it takes a multiple of --scale {cfg.scale}.", 2)
    if cfg.data_dir:
        roots = (cfg.data_dir, cfg.val_dir or cfg.data_dir)
        train, val = (run.fix_files(n, r, d) for n, r, d in zip(("training", "validation"), open_records(cfg), roots))
        train, val = [r["image"] for r in train], [r["image"] for r in val]
    else:
        say("No --data_dir: training on built-in textures, to try things out; figures count on real images only.")
        train, val = [f"train {i}" for i in range(24)], [f"val {i}" for i in range(6)]
    pair = functools.partial(load_pair, cfg=cfg)
    data = Crops(Items(train, functools.partial(pair, smallest=cfg.target_size), check=run.check), cfg)
    val = Items(val, functools.partial(pair, smallest=11 + 2 * cfg.scale), "validation", run.check)  # SSIM's window
    batch = data.__getitems__([(0, i * len(data) // 12) for i in range(12)])
    cells = [
        [lr[0, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy().repeat(cfg.scale, 0).repeat(cfg.scale, 1), hr[0].numpy()]
        for lr, hr in zip(batch["lr"], batch["hr"])
    ]
    sheet = picture(
        [sum(cells[r : r + 4], []) for r in (0, 4, 8)], ["input", "target"] * 4, zoom=max(1, 144 // cfg.target_size)
    )
    if run.main:
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return data, val


# --- model ------------------------------------------------------------------------------------------------------------
def bicubic_taps(scale):
    """[scale^2, 1, 5, 5]: the bicubic kernel (a = -0.5) for each subpixel of a pixel, over its 5 x 5 neighbours."""
    x = ((torch.arange(scale) + 0.5) / scale - 0.5)[:, None] - torch.arange(-2, 3)
    x = x.abs()
    k = torch.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, torch.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))
    return torch.einsum("ia,jb->ijab", k, k).reshape(scale**2, 1, 5, 5)


class Upscaler(nn.Module):
    """Low-resolution luma [n, 1, h, w] in 0..1 -> [n, 1, scale * h, scale * w]; the base of both networks.

    `core` computes without padding: from a picture with MARGIN more pixels around it, all but `border` high-resolution
    pixels at each side. forward(x, valid=True) is the core, which training uses.
    """

    border = 0

    def __init__(self, scale):
        super().__init__()
        self.scale, self.fast = scale, False
        self.register_buffer("taps", bicubic_taps(scale), persistent=False)

    def bicubic(self, x):
        """[n, 1, h, w] -> [n, 1, scale * (h - 4), scale * (w - 4)], the inner part of the bicubic enlargement."""
        return F.pixel_shuffle(F.conv2d(x, self.taps.to(x.dtype)), self.scale)

    def forward(self, x, valid=False):
        if valid:
            return self.core(x)
        extra = -(-self.border // self.scale)
        cut = extra * self.scale - self.border
        y = self.core(F.pad(x, (MARGIN + extra,) * 4, mode="replicate"))
        return y[..., cut : y.shape[-2] - cut, cut : y.shape[-1] - cut]


class SRCNN(Upscaler):
    """9-k-5 convolutions on the bicubic enlargement (Dong et al., "Image super-resolution using deep convolutional
    networks", 2015), 8,129 parameters for k = 1 and 57,281 for k = 5."""

    def __init__(self, scale, k=1):
        super().__init__(scale)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 64, 9), nn.Conv2d(64, 32, k), nn.Conv2d(32, 1, 5)
        self.border = (k - 1) // 2 + 2
        self.register_buffer("lift", lift_matrix(scale), persistent=False)  # both for `patch_core`
        self.register_buffer("spread", spread_matrix(scale if k == 1 else 1), persistent=False)
        with torch.no_grad():  # one path starts as the identity: the first picture is the bicubic one, not noise
            for conv in (self.conv1, self.conv2):
                nn.init.kaiming_normal_(conv.weight)
                conv.weight[0] = 0
            self.conv1.weight.sub_(self.conv1.weight.mean((2, 3), keepdim=True))
            self.conv2.weight[:, 0] = 0
            nn.init.normal_(self.conv3.weight, std=1e-3)
            self.conv3.weight[0, 0] = 0
            for conv, middle in ((self.conv1, 4), (self.conv2, k // 2), (self.conv3, 2)):
                conv.bias.zero_()
                conv.weight[0, 0, middle, middle] = 1

    def core(self, x):
        if self.fast:
            return patch_core(self, x)
        cut = 2 * self.scale - 4
        h = F.relu(self.conv1(self.bicubic(x)))
        h = h[..., cut : h.shape[-2] - cut, cut : h.shape[-1] - cut]
        return self.conv3(F.relu(self.conv2(h)))


class ESPCN(Upscaler):
    """Three convolutions at low resolution, then pixel shuffle (Shi et al., "Real-time single image and video
    super-resolution using an efficient sub-pixel convolutional neural network", 2016), here with ReLU and on top of
    the bicubic enlargement: 24,752 parameters at x4."""

    def __init__(self, scale):
        super().__init__(scale)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 64, 5), nn.Conv2d(64, 32, 3), nn.Conv2d(32, scale**2, 3)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)

    def core(self, x):
        h = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        base, cut = self.bicubic(x), 2 * self.scale
        return F.pixel_shuffle(h, self.scale) + base[..., cut : base.shape[-2] - cut, cut : base.shape[-1] - cut]


def make_model(cfg):
    return ESPCN(cfg.scale) if cfg.arch == "espcn" else SRCNN(cfg.scale, 5 if cfg.arch == "srcnn-955" else 1)


# --- speed: skip this at first reading ----------------------------------------------------------------------------------
def lift_matrix(scale):
    """[scale^2, 81, reach^2]: from the 81 weights of a 9 x 9 convolution after the bicubic enlargement to those of the one
    convolution that does both, over the reach x reach low-resolution neighbours of each of a pixel's subpixels."""
    reach = 9 if scale == 2 else 7
    unit = F.pad(torch.eye(reach**2).view(-1, 1, reach, reach), (4,) * 4)
    wide, first = scale * (reach + 4) - 8, scale * (reach // 2 + 2) - 4
    lift = F.unfold(F.pixel_shuffle(F.conv2d(unit, bicubic_taps(scale)), scale), 9).view(reach**2, 81, wide, wide)
    return lift[:, :, first : first + scale, first : first + scale].permute(2, 3, 1, 0).reshape(scale**2, 81, reach**2)


def spread_matrix(s):
    """[s^2, 25, (s + 4)^2]: where each of the 25 taps of a 5 x 5 convolution lies in the s + 4 wide window of outputs that
    the s x s subpixels of a pixel reach."""
    taps = torch.eye(25).view(25, 5, 5)
    return torch.stack([F.pad(taps, (j, s - 1 - j, i, s - 1 - i)).flatten(1) for i in range(s) for j in range(s)])


def patch_core(model, x):
    """SRCNN.core for processors, as matrix products over low-resolution patches.

    A 9 x 9 convolution of one channel, and a 5 x 5 one to one channel, fit their convolution kernels badly; and the
    patches of the enlargement would be scale^2 times as many as those of the picture.
    """
    s, device = model.scale, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    n, rows, cols = x.shape[0], x.shape[2] - 2 * MARGIN, x.shape[3] - 2 * MARGIN
    reach = math.isqrt(model.lift.shape[2])
    trim = MARGIN - reach // 2
    with torch.autocast(device, enabled=False):
        x = x[:, 0, trim : x.shape[2] - trim, trim : x.shape[3] - trim].to(dtype)
        patches = x.new_ones(n, rows, cols, reach**2 + 1)  # the last column is for the bias
        patches[..., :-1].unflatten(-1, (reach, reach)).copy_(x.unfold(1, reach, 1).unfold(2, reach, 1))
        weight = torch.einsum("oc,scr->sor", model.conv1.weight.flatten(1), model.lift)
        weight = torch.cat([weight, model.conv1.bias.expand(s**2, 64)[..., None]], 2).flatten(0, 1).to(dtype)
        h = F.linear(patches.flatten(0, 2), weight).relu_().view(-1, 64)  # rows: n, row, column, subpixel
        if model.conv2.kernel_size[0] == 1:
            h = F.linear(h, model.conv2.weight.flatten(1).to(dtype), model.conv2.bias.to(dtype)).relu_()
        else:
            h = h.view(n, rows, cols, s, s, 64).permute(0, 5, 1, 3, 2, 4)
            h = h.reshape(n, 64, rows * s, cols * s).contiguous(memory_format=torch.channels_last)
            h = F.relu(F.conv2d(h, model.conv2.weight.to(dtype), model.conv2.bias.to(dtype)))
            rows, cols, s = h.shape[2], h.shape[3], 1
            h = h.permute(0, 2, 3, 1)
        taps = torch.einsum("ct,sto->osc", model.conv3.weight[0].flip(1, 2).flatten(1), model.spread).flatten(1)
        windows = F.linear(h.reshape(n, rows * cols, s * s * 32), taps.to(dtype)).transpose(1, 2).float()
        full = F.fold(windows, (rows * s + 4, cols * s + 4), s + 4, stride=s)
        return full[..., 4:-4, 4:-4] + model.conv3.bias


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
def psnr(a, b):
    """PSNR in dB of two float pictures in 0..255."""
    return 10 * math.log10(255**2 / max(float(((a - b) ** 2).mean()), 1e-12))


def ssim(a, b):
    """SSIM of two float pictures [h, w] in 0..255, 11 x 11 Gaussian window of sigma 1.5, no padding (Wang et al., 2004)."""
    g = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    a, b, g = a.double(), b.double(), (g / g.sum()).view(1, 1, 11, 1)
    maps = torch.stack([a, b, a * a, b * b, a * b])[:, None]
    ma, mb, aa, bb, ab = F.conv2d(F.conv2d(maps, g), g.transpose(2, 3))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    return float((top / ((ma**2 + mb**2 + c1) * (aa - ma**2 + bb - mb**2 + c2))).mean())


@torch.no_grad()
def enlarge(model, lr, tile=128):
    """[h, w] uint8 luma -> (model's, bicubic) float [scale * h, scale * w] in 0..255, unrounded, on the CPU.

    Works in tiles of `tile` low-resolution pixels that overlap as far as the network sees: the same as in one piece.
    """
    s, device = model.scale, next(model.parameters()).device
    reach, x = MARGIN + -(-model.border // s), torch.from_numpy(np.array(lr))[None, None].float() / 255
    padded, out = F.pad(x, (reach,) * 4, mode="replicate"), x.new_empty(s * x.shape[2], s * x.shape[3])
    for top, left in itertools.product(range(0, x.shape[2], tile), range(0, x.shape[3], tile)):
        part = padded[..., top : top + tile + 2 * reach, left : left + tile + 2 * reach].to(device)
        part, cut = model.core(part)[0, 0].float(), s * (reach - MARGIN) - model.border
        part = part[cut : part.shape[0] - cut, cut : part.shape[1] - cut]
        out[s * top : s * top + part.shape[0], s * left : s * left + part.shape[1]] = part
    return out * 255, F.interpolate(x, out.shape, mode="bicubic", antialias=True)[0, 0] * 255


def evaluate(model, val, cfg, run):
    """Mean psnr, psnr_bicubic and ssim over (high, low) pairs by the published protocol: luma, rounded, border = scale."""
    rows, s = [], cfg.scale
    for high, low in val:
        run.check()
        pictures = (*enlarge(model, low), torch.from_numpy(np.array(high)).float())
        ours, plain, high = (t.round().clamp(0, 255)[s:-s, s:-s] for t in pictures)
        rows.append((psnr(ours, high), psnr(plain, high), ssim(ours, high)))
    return {k: sum(column) / len(rows) for k, column in zip(("psnr", "psnr_bicubic", "ssim"), zip(*rows))}


def show(parts, val, cfg, run, size=120):
    """Write sample-<update>.png: bicubic, model, original; the middle of four validation images, twice enlarged."""
    rows = []
    for high, low in itertools.islice(val, 4):
        top, left = max(0, (high.shape[0] - size) // 2), max(0, (high.shape[1] - size) // 2)
        ours, plain = (t.round().clamp(0, 255).byte().numpy() for t in enlarge(parts.ema.model, low))
        rows.append([a[top : top + size, left : left + size] for a in (plain, ours, high)])
    sheet = picture(rows, ("bicubic", cfg.arch, "original"), zoom=2)
    write_aside(run.folder / f"sample-{run.step:06d}.png", lambda f: sheet.save(f, "PNG"))


def export(model, folder):
    """Write model.pt and one-file model.onnx (luma 0..1, any size); the ONNX file is reloaded and compared with the model
    before it takes its name, else RecipeError."""
    save_tensors(folder / "model.pt", model.state_dict())
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        return say("No model.onnx: for it, pip install onnx.")
    plain, axes = copy.deepcopy(model).cpu(), {0: "n", 2: "height", 3: "width"}
    memory = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that writes one file is called deprecated
        torch.onnx.export(
            plain, (torch.rand(1, 1, 24, 20),), memory, dynamo=False, opset_version=17, input_names=["luma"],
            output_names=["enlarged"], dynamic_axes={"luma": axes, "enlarged": axes},
        )  # fmt: skip

    def check(part):
        x = torch.rand(1, 1, 11, 13, generator=torch.Generator().manual_seed(0))
        again = ReferenceEvaluator(onnx.load(part)).run(None, {"luma": x.numpy()})[0]
        gap = float(np.abs(again - plain(x).detach().numpy()).max())
        if not gap < 1e-4:
            raise RecipeError(f"model.onnx would differ from the model by {gap:.1e}: try another version of torch or onnx.")

    write_aside(folder / "model.onnx", lambda f: f.write(memory.getvalue()), check)


# --- training ---------------------------------------------------------------------------------------------------------
def build(cfg, run):
    """Model, EMA and optimizer with its state, on the run's device."""
    torch.manual_seed(cfg.seed)
    with run.device:
        model = make_model(cfg)
    for p in model.parameters():
        p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
    parts = Parts(model=model, ema=EMA(model, 0.999), opt=SOAP(model.parameters(), cfg.learning_rate))
    model.fast = run.kind == "cpu"
    run.compile(model)
    return parts


def example_batch(cfg, run):
    """A random batch of the shapes and types that `Crops` makes."""
    n, low = cfg.batch_size * cfg.accumulate, cfg.target_size // cfg.scale + 2 * MARGIN
    shapes = {"lr": (n, 1, low, low), "hr": (n, 1, cfg.target_size, cfg.target_size)}
    batch = {k: torch.randint(256, shape, dtype=torch.uint8, device=run.device) for k, shape in shapes.items()}
    return batch | {"index": torch.zeros(n, dtype=torch.int64, device=run.device)}


def train_step(parts, batch, cfg, run):
    """One update from a batch of `Crops`; returns `loss` and `norm` as scalar tensors."""
    run.anneal(parts.opt, warmup=0.1)
    net, cut = run.net(parts.model), parts.model.border

    def loss_fn(part):
        out = net(part["lr"].float() / 255, valid=True).float()
        target = part["hr"][..., cut : cfg.target_size - cut, cut : cfg.target_size - cut].float() / 255
        return F.mse_loss(out, target)  # EDIT HERE: the loss. The squared error is what PSNR measures

    return run.update(loss_fn, batch, parts.opt, parts.model, parts.ema)


@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation: one tile with its surroundings."""
    side = 128 + 2 * (MARGIN + 2)  # what `enlarge` has on the device at once
    return parts.ema.model.core(torch.zeros(1, 1, side, side, device=run.device))


def wrap_up(parts, val, cfg, run):
    """The ending, rehearsed before update 1: evaluate, show, save and export the averaged weights. Returns the metrics."""
    with run.ending():
        metrics = evaluate(parts.ema.model, val, cfg, run)
        run.judge("psnr", metrics, parts.ema.model.state_dict())
        run.save()
        if run.main:
            show(parts, val, cfg, run)
            with run.results() as folder:
                export(parts.ema.model, folder)
    return metrics


def verdict(gain):
    """One line at 5 % of the run: does it learn?"""
    if gain > 0.1:
        return f"5 % of the run: it learns, {gain:.2f} dB above bicubic already."
    advice = "Are the images sharp originals? If they are, try a third of the --learning_rate."
    return f"5 % of the run: only {gain:+.2f} dB against bicubic. {advice}"


def train(cfg):
    """The whole run; returns the metrics of the averaged weights: psnr, psnr_bicubic, ssim, steps, seconds and memory."""
    with Run(cfg, RECIPE) as run:
        data, val = open_data(cfg, run)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {run.finished}. A longer --num_epochs or --time_budget continues it, --fresh starts over.")
            return run.finished
        metrics = wrap_up(parts, val, cfg, run)
        say(f"Before: {metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB on {val.good} validation images.")
        for batch in run.batches():
            run.advance(train_step(parts, batch, cfg, run))
            if run.due(every=0.1, at=(0.05,)) and not run.over:
                metrics = evaluate(parts.ema.model, val, cfg, run)
                run.judge("psnr", metrics, parts.ema.model.state_dict())
                say(f"step {run.step}: {metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB")
                if run.due(at=(0.05,)):
                    say(verdict(metrics["psnr"] - metrics["psnr_bicubic"]))
            if run.due(at=SAMPLE_MARKS):
                run.write(lambda: show(parts, val, cfg, run))
        metrics = run.finish(wrap_up(parts, val, cfg, run))
        say(
            f"{metrics['psnr']:.2f} dB, bicubic {metrics['psnr_bicubic']:.2f} dB, SSIM {metrics['ssim']:.4f} on "
            f"{val.good} images after {run.step} updates. Pictures, model.pt and model.onnx are in {run.folder}"
        )
        return metrics


# --- using the result -------------------------------------------------------------------------------------------------
def load(run_dir, device="cpu"):
    """The trained (EMA) model of a run folder in eval mode: luma [n, 1, h, w] in 0..1 -> [n, 1, scale * h, scale * w]."""
    with trained_weights(run_dir, RECIPE, Config, "model.pt", "best.pt") as (cfg, path):
        state, model = load_tensors(path, device), make_model(cfg)
        model.load_state_dict(state["model"] if path.name == "best.pt" else state)
    return model.to(device).eval()


def upscale(cfg):
    """Enlarge a picture or a folder with a trained model into <run folder>/upscaled; returns the paths written."""
    run, folder = Run(cfg, RECIPE), Path("results") / RECIPE
    if cfg.out_dir or not (folder / "best.pt").exists():
        folder = run.folder  # named, or the one of the built-in data
    model, source = load(folder, run.device), Path(cfg.upscale).expanduser()
    files, done = [source] if source.is_file() else find_images(source, "pictures to enlarge"), []
    for path in files:
        try:
            image = read_image(path)
        except UNREADABLE as e:
            say(f"Left out {path}: {e}")
            continue
        out = upscale_image(model, image)
        name = path.relative_to(source) if path != source else Path(path.name)
        alone = sum(p.with_suffix("") == path.with_suffix("") for p in files) == 1  # beside a.png, a.jpg keeps its suffix
        target = folder / "upscaled" / (name.with_suffix(".png") if alone else name.with_name(name.name + ".png"))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_aside(target, lambda f, out=out: Image.fromarray(out).save(f, "PNG"))
        say(f"{path} -> {target} ({out.shape[1]} x {out.shape[0]})")
        done.append(target)
    if not done:
        raise RecipeError(f"Nothing enlarged: {cfg.upscale} holds no readable picture.")
    return done


def upscale_image(model, image):
    """uint8 [h, w] or [h, w, 3] -> the same, scale times as large: the luma by the model, the colours by bicubic."""
    if image.ndim == 2:
        return enlarge(model, image)[0].round().clamp(0, 255).byte().numpy()
    ours, plain = enlarge(model, luma(image))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    colour = F.interpolate(x, plain.shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    out = colour + (ours - plain)[..., None] * (255 / 219)  # a change of luma changes the three channels alike
    return out.round().clamp(0, 255).byte().numpy()


if __name__ == "__main__":
    main(lambda cfg: upscale(cfg) if cfg.upscale else train(cfg), Config, __doc__)
