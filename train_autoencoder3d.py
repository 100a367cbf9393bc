# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "monai", "einops", "nibabel"]
# ///
"""Train MONAI's AutoencoderKL on 3-D scans, for latents or reconstructions, by your deadline and in the memory you have.

python train_autoencoder3d.py --data_dir scans --time_budget 2h    # .nii, .nii.gz or .npy, a folder or a CSV
python train_autoencoder3d.py                                      # try it out on built-in phantoms
python train_autoencoder3d.py --reconstruct scan.nii.gz            # also --encode scan.nii.gz, --decode scan-latent.npz

Measured (two cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, MONAI 1.6.1, 2026-11-22; not yet on a GPU): 20 minutes on
nine scans, crops of 64 x 64 x 32, latents of 3 channels at a quarter of each side: 27.31 dB on held-out crops, where the patch
PCA of the same size has 24.07 dB and the linear autoencoder that the network starts from 25.81 dB.
"""

import contextlib
import functools
import importlib.util
import math
import re
import tempfile
import time
import types
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from common import (  # isort: skip
        EMA, SAMPLE_MARKS, UNREADABLE, Items, Parts, RecipeError, Run, Settings, evenly, load_tensors, main, mix,
        open_records, opt, picture, save_tensors, say, schedule, trained_weights, uniforms, with_state, write_aside,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py train_autoencoder3d.py"
    ) from e

RECIPE = "autoencoder3d"
VOLUMES = (".nii", ".nii.gz", ".npy")
CROPS = 8  # crops of a scan that make an epoch
LINEAR_STEPS = 600  # updates of the linear autoencoder before the first one of the network
BUILT_IN = 24  # built-in phantoms to train on
CONTENT = 0.01  # a training crop has this share of voxels above 0.05, where some tries find one
PRESETS = {  # the guide's configurations A, B and C with checkpointing where they need it, and a smaller one
    "8gb": {"channels": "16,32,64", "batch_size": 1, "accumulate": 4, "checkpointing": True},
    "24gb": {"channels": "16,32,64", "batch_size": 1, "accumulate": 4, "checkpointing": False},
    "32gb": {"channels": "24,48,64", "batch_size": 2, "accumulate": 2, "checkpointing": True},
    "40gb": {"channels": "32,64,128", "batch_size": 4, "accumulate": 1, "checkpointing": True},
}
GUIDE = "128,128,64@0.2 256,256,64@0.6 perceptual"  # what --stages guide stands for


def triple(text):
    """(w, h, d) of a text such as 64,64,32; () of an empty one. ValueError names what it takes."""
    text = text.replace("x", ",").replace(" ", "")
    if not re.fullmatch(r"(\d{1,6}(\.\d{1,6})?(,\d{1,6}(\.\d{1,6})?){2})?", text) or text and 0 in map(float, text.split(",")):
        raise ValueError("three numbers above 0 with commas between, such as 64,64,32")
    return tuple(float(v) for v in text.split(",")) if text else ()


@dataclass
class Config(Settings):
    preset: str = opt("auto", "settings for a card of this memory", everyday=True, choices=("auto", *PRESETS))
    target_size: str = opt("", "crop in voxels; empty: 64,64,32, on a GPU 128,128,64", fixed=True, everyday=True, check=triple)
    stages: str = opt("", "earlier stages, crop@share of the run, or guide", fixed=True)
    spacing: str = opt("", "resample scans to millimetres, e.g. 1,1,1; empty: as they are", fixed=True, check=triple)
    channels: str = opt("", "widths of the levels; empty: by the preset", fixed=True, everyday=True)
    norm_groups: int = opt(0, "groups of the GroupNorms; 0: 8, or what divides the widths", fixed=True, low=0)
    res_blocks: int = opt(1, "residual blocks of a level", fixed=True, low=1, high=8)
    enlarge: str = opt("transposed", "how the decoder enlarges: a transposed convolution, or nearest voxels and a convolution",
        fixed=True, choices=("transposed", "nearest"))  # fmt: skip
    latent_channels: int = opt(3, "channels of a latent", fixed=True, low=1, high=64)
    attention: str = opt("none", "attention at the last level and in its middle, there only, or none", fixed=True,
        choices=("all", "middle", "none"))  # fmt: skip
    start: str = opt("linear", "the network learns what a linear autoencoder leaves, or all of it", fixed=True,
        choices=("linear", "plain"))  # fmt: skip
    checkpointing: bool | None = opt(None, "recompute each block in the backward pass: less memory; default: by the preset")
    half_norm: bool = opt(True, "under half precision keep norms and enlargements in it too: half of the memory")
    batch_size: int = opt(0, "scans per forward pass and process; 0: by the preset, on a processor 1", everyday=True, low=0)
    accumulate: int = opt(0, "forward passes added up before an update; 0: by the preset, on a processor 1", low=0)
    num_epochs: float = opt(100.0, "length of the run in passes of 8 crops a scan; without data 800 updates", low=0)
    learning_rate: float = opt(1e-3, "peak learning rate", fixed=True, everyday=True, low=0)
    kl_weight: float = opt(1e-5, "weight of the KL divergence, a mean over latent values", fixed=True, low=0)
    gan: float = opt(0.0, "weight of a patch discriminator, e.g. 0.01; 0: none", fixed=True, everyday=True, low=0)
    gan_start: float = opt(0.5, "share of the run after which the discriminator joins", fixed=True, low=0, high=1)
    disc: str = opt("2,16", "the discriminator's layers and first width", fixed=True)
    perceptual: float = opt(0.0, "weight of MONAI's perceptual loss, e.g. 0.001; needs lpips; 0: none", fixed=True, low=0)
    val_crops: int = opt(16, "held-out crops of an evaluation", low=1)
    val_scans: int = opt(2, "held-out scans reconstructed whole at the end", low=0)
    overlap: float = opt(0.25, "overlap of the windows that make whole scans", low=0, high=0.9)
    reconstruct: str = opt("", "only use the model: scan or folder -> *-reconstructed.nii.gz", everyday=True, action=True)
    encode: str = opt("", "only use the model: scan or folder -> *-latent.npz", action=True)
    decode: str = opt("", "only use the model: *-latent.npz or folder -> *-decoded.nii.gz", action=True)

    def __post_init__(self):
        settle(self)


def settle(cfg):
    """Fill what the preset, the card and 0 leave to the script. RecipeError for settings that do not fit each other."""
    card = torch.cuda.is_available() and cfg.device not in ("cpu", "mps")
    if cfg.preset == "auto":
        room, number = 0, re.fullmatch(r"auto|cuda(?::(\d+))?", cfg.device)
        with contextlib.suppress(AssertionError, RuntimeError):  # a card that is not there: `Run` says so
            room = torch.cuda.get_device_properties(int(number[1] or 0)).total_memory / 2**30 if card and number else 0
        cfg.preset = next((name for name in reversed(PRESETS) if room >= 0.9 * int(name[:-2])), "8gb")
        if not card:
            cfg.batch_size, cfg.accumulate = cfg.batch_size or 1, cfg.accumulate or 1
            cfg.checkpointing = bool(cfg.checkpointing)
    for name, value in PRESETS[cfg.preset].items():
        own = getattr(cfg, name)
        setattr(cfg, name, own if own or own is False else value)
    whole = not (cfg.time_budget or cfg.deadline or cfg.num_steps or cfg.num_epochs != Config.num_epochs)
    if not cfg.data_dir and whole:
        cfg.num_steps = 800  # enough for the built-in phantoms
    cfg.target_size = cfg.target_size.strip() or ("32,32,16" if not cfg.data_dir else "128,128,64" if card else "64,64,32")
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4}){1,7}", cfg.channels):
        raise RecipeError(f"--channels is {cfg.channels!r}; it takes a width for each level, such as 16,32,64.", 2)
    widths = [int(c) for c in cfg.channels.split(",")]
    common = math.gcd(*widths)
    cfg.norm_groups = cfg.norm_groups or max(g for g in (8, 6, 5, 4, 3, 2, 1) if common % g == 0)
    if common % cfg.norm_groups:
        fit = " or ".join(str(g) for g in range(2, 33) if common % g == 0) or "1"
        raise RecipeError(f"--norm_groups is {cfg.norm_groups}, which does not divide all of --channels {cfg.channels}; {fit} "
            "does, or 0 leaves it to the script.", 2)  # fmt: skip
    if not re.fullmatch(r"[1-8],[1-9]\d{0,3}", cfg.disc):
        raise RecipeError(f"--disc is {cfg.disc!r}; it takes layers and width, such as 2,16 or 3,32.", 2)
    cfg.stages = GUIDE if cfg.stages == "guide" else cfg.stages
    stages, factor = stages_of(cfg), 2 ** (len(widths) - 1)
    for end, size, perceptual in stages:
        least = max(
            8, 2 * factor, 3 * 2 ** int(cfg.disc.split(",")[0]) if cfg.gan and end > cfg.gan_start else 0, 20 * perceptual
        )
        if any(s % factor or s < least for s in size):
            better = ",".join(str(max(least, round(s / factor) * factor)) for s in size)
            more = f"{' and the discriminator' * bool(cfg.gan)}{' and the perceptual loss' * perceptual}"
            raise RecipeError(f"A crop of {','.join(map(str, size))} voxels does not suit {len(widths)} levels{more}: a side "
                f"is a multiple of {factor} and at least {least}. Try {better}.", 2)  # fmt: skip
    if cfg.latent_channels >= factor**3:
        raise RecipeError(f"--latent_channels is {cfg.latent_channels}; patches of {factor} x {factor} x {factor} voxels have "
            f"{factor**3} values, and latents take fewer.", 2)  # fmt: skip


def stages_of(cfg):
    """[(share of the run at which it ends, crop, whether the perceptual loss is on)] of --stages and --target_size."""
    last = tuple(int(v) for v in triple(cfg.target_size))
    stages, begun, perceptual = [], 0.0, cfg.perceptual > 0
    words = cfg.stages.split()
    for k, word in enumerate(words):
        size, at, share = word.partition("@")
        try:
            if word == "perceptual" and stages and k == len(words) - 1:
                continue
            stages.append((float(share), tuple(int(v) for v in triple(size)), False))
            if not begun < float(share) < 1 or len(stages[-1][1]) != 3:
                raise ValueError
        except ValueError:
            raise RecipeError(f"--stages has {word!r}; it takes guide, or crops with the share of the run at which each ends, "
                'such as "32,32,16@0.3 64,64,32@0.6".', 2) from None  # fmt: skip
        begun = stages[-1][0]
    return [*stages, (1.0, stages[-1][1] if words[-1:] == ["perceptual"] else last, perceptual)]


def stage_now(cfg, run):
    """The stage (end, crop, perceptual) that the run is in."""
    return next(s for s in stages_of(cfg) if run.trained() < s[0] or s[0] == 1.0)


# --- data -------------------------------------------------------------------------------------------------------------
def load_item(path):
    """EDIT HERE: one file -> (scan [w, h, d], affine [4, 4] from voxels to millimetres, or None for no orientation)."""
    if str(path).lower().endswith(".npy"):
        return np.load(path, allow_pickle=False), None
    import nibabel

    image, most = nibabel.load(path), Path(path).stat().st_size * (1100 if str(path).lower().endswith(".gz") else 1)
    if math.prod(image.shape) * image.get_data_dtype().itemsize > most:  # before memory is taken for it; gzip packs 1032 times
        raise ValueError(f"its header claims {image.shape} voxels, more than the file can hold")
    return np.asanyarray(image.dataobj, np.float32), image.affine


def read_volume(path, cfg):
    """(float32 [w, h, d] with axes right, anterior, superior and the --spacing, its affine). ValueError says what is wrong."""
    try:
        volume, affine = load_item(path)
        volume = np.asarray(volume, np.float32)
    except (MemoryError, RecipeError):
        raise
    except Exception as e:  # whatever the readers make of a damaged file
        raise ValueError(f"cannot be read: {(str(e).splitlines() or [type(e).__name__])[0][:100]}") from None
    volume = volume[(..., *[0] * (volume.ndim - 3))] if volume.ndim > 3 and set(volume.shape[3:]) == {1} else volume
    if volume.ndim != 3:
        few = "slices belong into one volume" if volume.ndim < 3 else "save one of its volumes, e.g. a[..., 0]"
        raise ValueError(f"it has the shape {volume.shape} and a scan has 3 axes: {few}")
    if not volume.size:
        raise ValueError(f"it has the shape {volume.shape}: no voxel")
    if not np.isfinite(volume).all():
        share = 1 - np.isfinite(volume).mean()
        raise ValueError(f"{share:.2%} of its voxels are NaN or infinite: replace them, e.g. by numpy.nan_to_num")
    if affine is not None:
        affine = np.asarray(affine, np.float64)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError(f"its affine cannot orient it ({np.round(affine[:3, :3].ravel(), 3).tolist()}): mend the header")
        from monai.data import MetaTensor
        from monai.transforms import Orientation, Spacing

        tensor = Orientation("RAS", labels=None)(MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine)))
        if cfg.spacing:
            voxels = np.linalg.norm(np.asarray(tensor.affine, np.float64)[:3, :3], axis=0)
            if not volume.size * math.prod(voxels) / math.prod(triple(cfg.spacing)) < 2**30:
                raise ValueError(f"voxels of {np.round(voxels, 3).tolist()} mm would become more than a billion of --spacing "
                    f"{cfg.spacing}: is its header right?")  # fmt: skip
            tensor = Spacing(triple(cfg.spacing), padding_mode="border", dtype=np.float32)(tensor)
        volume, affine = tensor.numpy()[0], np.asarray(tensor.affine, np.float64)
    elif cfg.spacing:
        raise ValueError("--spacing needs .nii or .nii.gz: a .npy file does not tell its spacing")
    return np.ascontiguousarray(volume), affine


def scale(volume):
    """A scan in 0..1 from its least value to its percentile 99.5, and these two. ValueError for a constant one."""
    low, high = (float(v) for v in np.percentile(volume, (0, 99.5)))
    high = high if high > low else float(volume.max())
    if high <= low:
        raise ValueError(f"it is constant: every voxel is {low:g}")
    return np.clip((volume - low) / (high - low), 0, 1), low, high


def load_volume(record, cfg):
    """A record's scan as float16 [w, h, d] in 0..1; a text is the name of a built-in phantom."""
    size = [max(s[1][k] for s in stages_of(cfg)) for k in range(3)]
    if isinstance(record, str):
        return phantom(record, size)
    volume = scale(read_volume(record["image"], cfg)[0])[0]
    if any(2 * v < s for v, s in zip(volume.shape, size)):
        least = max(8, 2 ** (cfg.channels.count(",") + 1))
        better = ",".join(str(min(s, max(least, v // least * least))) for v, s in zip(volume.shape, size))
        if any(2 * v < least for v in volume.shape):
            raise ValueError(f"its {' x '.join(map(str, volume.shape))} voxels are too thin for this network: leave it out, or "
                "resample with --spacing 1,1,1")  # fmt: skip
        raise ValueError(f"its {' x '.join(map(str, volume.shape))} voxels are less than half of the crop in an axis: try "
            f"--target_size {better}, or --spacing 1,1,1")  # fmt: skip
    return volume.astype(np.float16)


def phantom(name, size):
    """A built-in scan, float16 of one and a half crops: a head of ellipsoids, in contrasts of its own."""
    rng, shape = np.random.default_rng(mix(name)), [3 * s // 2 for s in size]
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in shape], indexing="ij"))
    volume, tones = np.zeros(shape), rng.uniform(0.25, 1.0, 4)
    axes = rng.uniform(0.75, 0.92, 3)

    def inside(centre, radii):
        turn, _ = np.linalg.qr(np.eye(3) + 0.3 * rng.normal(size=(3, 3)))
        far = np.tensordot(turn, grid - np.reshape(centre, (3, 1, 1, 1)), 1) / np.reshape(radii, (3, 1, 1, 1))
        return np.sqrt((far**2).sum(0))

    skull = inside([0, 0, 0], axes)
    volume[skull < 1], volume[skull < 0.93] = tones[0], 0.1
    volume[skull < 0.88] = tones[1]
    wave = np.sin(rng.uniform(8, 14) * grid[0] + 3 * np.sin(rng.uniform(4, 8) * grid[1])) * np.sin(rng.uniform(5, 9) * grid[2])
    volume[(skull < 0.86) & (wave > 0.3)] = tones[2]  # folds
    for side in (-1, 1):
        volume[inside([side * 0.18, rng.uniform(-0.1, 0.1), 0], rng.uniform(0.1, 0.25, 3)) < 1] = 0.15
    for _ in range(6):
        volume[inside(rng.uniform(-0.5, 0.5, 3), rng.uniform(0.04, 0.12, 3)) < 1] = tones[3]
    return np.clip(volume + 0.01 * rng.normal(size=shape), 0, 1).astype(np.float16)


def fill(volume, size):
    """A scan mirrored at its ends where it is smaller than a crop."""
    more = [max(0, s - v) for v, s in zip(volume.shape, size)]
    return np.pad(volume, [(m // 2, m - m // 2) for m in more], "symmetric") if any(more) else volume


def cut(volume, size, u):
    """The crop of a scan at u [3] in 0..1 between its first and its last place."""
    volume = fill(volume, size)
    at = [int(a * (v - s + 1)) for a, v, s in zip(u, volume.shape, size)]
    return volume[tuple(slice(a, a + s) for a, s in zip(at, size))]


class Volumes(torch.utils.data.Dataset):
    """Random crops of scans, mirrored at random; `size` is the crop of the stage that the run is in."""

    def __init__(self, items, cfg):
        self.items, self.cfg, self.cached, self.size = items, cfg, items.cached, stages_of(cfg)[0][1]

    def __len__(self):
        return CROPS * len(self.items)

    def name(self, index):
        """The file of a sample, for messages."""
        record = self.items.paths[index // CROPS]
        return record if isinstance(record, str) else record["image"]

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out: image float32 [n, 1, w, h, d] in 0..1, index [n]."""
        crops = []
        for epoch, i in keys:
            u, volume = uniforms(self.cfg.seed, epoch, [i], 15)[0], self.items[i // CROPS]
            for k in range(4):  # the first place with something in it
                crop = cut(volume, self.size, u[3 * k : 3 * k + 3])
                if (crop[::2, ::2, ::2] > 0.05).mean() >= CONTENT:
                    break
            crops.append(crop[tuple(slice(None, None, -1 if flip < 0.5 else 1) for flip in u[12:])].astype(np.float32)[None])
        return {"image": torch.from_numpy(np.stack(crops)), "index": torch.tensor([i for _, i in keys])}


def open_data(cfg, run):
    """(training `Volumes`, held-out namespace: `crops` float32 [n, 1, w, h, d] and `items`); writes data.png."""
    if cfg.data_dir:
        sets = zip(("training", "validation"), open_records(cfg, VOLUMES), (cfg.data_dir, cfg.val_dir or cfg.data_dir))
        train, held = (run.fix_files(*s) for s in sets)
    else:
        say("No --data_dir: training on built-in phantoms; for your scans add --data_dir FOLDER with .nii.gz or .npy files.")
        train, held = ([f"phantom {k}" for k in span] for span in (range(BUILT_IN), range(-4, 0)))
    load = functools.partial(load_volume, cfg=cfg)
    items, others = Items(train, load, check=run.check), Items(held, load, "validation", run.check)
    size, crops, n = stages_of(cfg)[-1][1], [], len(held)
    for i in range(n):  # on a line through each scan, from corner to corner in another order of the axes
        few = len(range(i, cfg.val_crops, n))
        for k in range(few):
            u = [((k + 0.5) / few * (1, 3, 2)[a] + 0.29 * a) % 1 for a in range(3)]
            crops.append(torch.from_numpy(cut(others[i], size, u).astype(np.float32))[None])
    val = types.SimpleNamespace(crops=torch.stack(crops), items=others, names=[name_of(r) for r in held])
    if run.main:
        few = [items[i] for i in range(min(6, len(items)))]
        sheet = picture([slices(v) for v in few], ("axial", "coronal", "sagittal"), 1, [name_of(r) for r in train[: len(few)]])
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return Volumes(items, cfg), val


def name_of(record):
    """A short name for pictures."""
    return record if isinstance(record, str) else re.sub(r"\.(nii|nii\.gz|npy)$", "", Path(record["image"]).name)[:24]


def slices(volume):
    """The middle slices of a scan in 0..1, axial, coronal and sagittal, as uint8 pictures with the head up."""
    w, h, d = (s // 2 for s in volume.shape)
    planes = (volume[:, :, d], volume[:, h], volume[w])
    return [np.uint8(np.clip(np.asarray(p, np.float32).T[::-1], 0, 1) * 255 + 0.5) for p in planes]


# --- model ------------------------------------------------------------------------------------------------------------
class Linear(nn.Module):
    """Patches of factor^3 voxels <-> their principal components, each of deviation 1, and from there a linear autoencoder that
    sees the 125 nearest patches too: `wide` adds to the components, `kernel` makes a patch of them."""

    reach = 5

    def __init__(self, factor, channels):
        super().__init__()
        self.factor, values, near = factor, factor**3, [self.reach] * 3
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(channels, values))  # rows are components
        self.register_buffer("back", torch.zeros(values, channels))
        self.wide = nn.Parameter(torch.zeros(channels, values, *near))
        self.kernel = nn.Parameter(torch.zeros(values, channels, *near))
        self.bias = nn.Parameter(torch.zeros(values))

    def patches(self, x):
        """[n, 1, w, h, d] -> [n, factor^3, w / factor, h / factor, d / factor]."""
        n, f = len(x), self.factor
        w, h, d = (s // f for s in x.shape[2:])
        return x.reshape(n, w, f, h, f, d, f).permute(0, 2, 4, 6, 1, 3, 5).reshape(n, f**3, w, h, d)

    def whole(self, p):
        """The inverse of `patches`."""
        (n, _, w, h, d), f = p.shape, self.factor
        return p.reshape(n, f, f, f, w, h, d).permute(0, 4, 1, 5, 2, 6, 3).reshape(n, 1, w * f, h * f, d * f)

    def around(self, x):
        """x with its ends repeated, as far as a kernel reaches."""
        return F.pad(x, [self.reach // 2] * 6, mode="replicate")

    def encode(self, x):
        """Scans [n, 1, w, h, d] -> latents."""
        p = self.patches(x) - self.mean.view(1, -1, 1, 1, 1)
        return F.conv3d(p, self.basis[..., None, None, None]) + F.conv3d(self.around(p), self.wide)

    def decode(self, z):
        """Latents -> scans."""
        return self.whole(F.conv3d(self.around(z), self.kernel, self.bias))

    @torch.no_grad()
    def pca(self, x):
        """x through its principal components, patch by patch: what the network is compared with."""
        z = F.conv3d(self.patches(x) - self.mean.view(1, -1, 1, 1, 1), self.basis[..., None, None, None])
        return self.whole(F.conv3d(z, self.back[..., None, None, None], self.mean))

    @torch.no_grad()
    def fit(self, crops):
        """Principal components, and the best kernel for them, in closed form from crops [1, w, h, d]."""
        total, square, count = 0, 0, 0
        for x in crops:
            p = self.patches(x[None].to(self.mean.device)).flatten(2)[0].T.double().cpu()
            total, square, count = total + p.sum(0), square + p.T @ p, count + len(p)
        mean, k = total / count, len(self.basis)
        values, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
        spread, vectors = values[-k:].flip(0).clamp(min=1e-10).sqrt(), vectors[:, -k:].flip(1)
        self.mean.copy_(mean)
        self.basis.copy_((vectors / spread).T)
        self.back.copy_(vectors * spread)
        xx, xy, r = 0, 0, self.reach
        for x in crops:
            x = x[None].to(self.mean.device)
            seen = self.around(self.encode(x)).unfold(2, r, 1).unfold(3, r, 1).unfold(4, r, 1)
            seen = F.pad(seen.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(0, 3), (0, 1), value=1.0).double().cpu()
            xx, xy = xx + seen.T @ seen, xy + seen.T @ self.patches(x).flatten(2)[0].T.double().cpu()
        weight = torch.linalg.solve(xx + 1e-4 * count * torch.eye(len(xx), dtype=xx.dtype), xy)
        self.kernel.copy_(weight[:-1].T.reshape(self.kernel.shape))
        self.bias.copy_(weight[-1])


class HalfNorm(nn.GroupNorm):
    """GroupNorm in the type of its input: CUDA's autocast would make it fp32, and keep it so for the backward pass."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HalfUpsample(nn.Upsample):
    """Enlargement in the type of its input."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Autoencoder(nn.Module):
    """MONAI's AutoencoderKL `net`, with the `linear` autoencoder added to what it encodes and decodes (None: the net alone).

    `encode`, `decode` and `encode_stage_2_inputs`, `decode_stage_2_outputs` are as in MONAI, so that its inferers take it;
    `latent_scale` times a latent has deviation 1. `checkpointing` recomputes block by block in the backward pass, where
    MONAI's own recomputes a half of the net at once.
    """

    def __init__(self, channels, latent_channels, groups, res_blocks=1, attention="none", transposed=True, linear=True,
        checkpointing=False, half_norm=True):  # fmt: skip
        super().__init__()
        need("monai", "einops")
        from monai.networks.nets import AutoencoderKL

        levels, self.checkpointing = len(channels), checkpointing
        self.factor, self.channels = 2 ** (levels - 1), latent_channels
        self.net = AutoencoderKL(
            3, 1, 1, num_res_blocks=(res_blocks,) * levels, channels=channels, latent_channels=latent_channels,
            attention_levels=(False,) * (levels - 1) + (attention == "all",), norm_num_groups=groups,
            with_encoder_nonlocal_attn=attention != "none", with_decoder_nonlocal_attn=attention != "none",
            use_flash_attention=True,  # MONAI's default holds the whole matrix of all positions: 16 GiB at 256x256x64
            use_convtranspose=transposed,  # a convolution at the enlarged size costs more than all other blocks there
        )  # fmt: skip
        self.linear = Linear(self.factor, latent_channels) if linear else None
        self.register_buffer("latent_scale", torch.ones(()))
        for m in self.net.modules():
            if half_norm and type(m) in (nn.GroupNorm, nn.Upsample):
                m.__class__ = HalfNorm if type(m) is nn.GroupNorm else HalfUpsample
        if linear:  # then the network starts as nothing, and each of its blocks as the identity
            self.quiet()

    @torch.no_grad()
    def quiet(self):
        for name, m in self.net.named_modules():
            if name.endswith(("conv2.conv", "out_proj")) or m is self.net.decoder.blocks[-1].conv:
                m.weight.zero_()
                m.bias.zero_()
        self.net.quant_conv_mu.conv.weight.zero_()
        self.net.quant_conv_mu.conv.bias.zero_()
        self.net.quant_conv_log_sigma.conv.weight.zero_()
        self.net.quant_conv_log_sigma.conv.bias.fill_(-6.0)

    def through(self, blocks, x):
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def encode(self, x):
        """Scans [n, 1, w, h, d] in 0..1 -> mean and deviation of their latents, each [n, c, w / f, h / f, d / f]."""
        h = self.through(self.net.encoder.blocks, x)
        mu, log_var = self.net.quant_conv_mu(h).float(), self.net.quant_conv_log_sigma(h).float().clamp(-30, 20)
        if self.linear is not None:
            first = self.linear.encode(x.float()).float()
            mu = first + self.contrast(first) * mu
        return mu, (log_var / 2).exp()

    @staticmethod
    def contrast(z):
        """The deviation of each sample's latents [n, 1, 1, 1, 1]: the network's GroupNorms take it away."""
        return z.std((1, 2, 3, 4), keepdim=True)

    def decode(self, z):
        """Latents -> scans [n, 1, w, h, d]."""
        x = self.through(self.net.decoder.blocks, self.net.post_quant_conv(z)).float()
        return x * self.contrast(z) + self.linear.decode(z).float() if self.linear is not None else x

    def forward(self, x, noise=None):
        """Scans, and noise of their latents' shape (None: none) -> (reconstruction, mean, deviation)."""
        mu, sigma = self.encode(x)
        return self.decode(mu if noise is None else mu + sigma * noise), mu, sigma

    def encode_stage_2_inputs(self, x):
        """A latent of scans with noise of its deviation, as a diffusion model takes it."""
        mu, sigma = self.encode(x)
        return mu + sigma * torch.randn_like(mu)

    def decode_stage_2_outputs(self, z):
        return self.decode(z)


def make_model(cfg):
    """The autoencoder of these settings."""
    widths = tuple(int(c) for c in cfg.channels.split(","))
    return Autoencoder(widths, cfg.latent_channels, cfg.norm_groups, cfg.res_blocks, cfg.attention,
        cfg.enlarge == "transposed", cfg.start == "linear", bool(cfg.checkpointing), cfg.half_norm)  # fmt: skip


def vol2col(version, cudnn):
    """Whether this torch computes 3-D convolutions in half precision by way of all patches, at many times the memory."""
    return bool(re.match(r"2\.9\.", version)) and (cudnn or 0) < 91500


def guard(run):
    """Leave half precision where `vol2col` would make it dearer than fp32."""
    if run.kind == "cuda" and not run.planned and run.dtype is not torch.float32:
        version = torch.backends.cudnn.version()
        if vol2col(torch.__version__, version):
            say(f"torch {torch.__version__} with cuDNN {version} takes many times the memory for 3-D convolutions in half "
                "precision: this runs in fp32. Install torch 2.10 or nvidia-cudnn-cu12 9.15.")  # fmt: skip
            run.dtype = torch.float32


def need(*packages):
    """RecipeError that names packages which are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"This recipe needs {' and '.join(missing)}: pip install monai einops nibabel", 2)


def perceptual_loss(cfg, run):
    """MONAI's perceptual loss on a fifth of all slices. RecipeError where its parts are not at hand."""
    try:
        from monai.losses import PerceptualLoss

        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = PerceptualLoss(3, "squeeze", is_fake_3d=True, fake_3d_ratio=0.2, pretrained=not run.planned)
            return loss if run.planned else loss.to(run.device)
    except Exception as e:  # MONAI, lpips, torchvision and the download each raise their own
        why = (str(e).splitlines() or [type(e).__name__])[0][:150]
        raise RecipeError(f"--perceptual needs lpips, torchvision and SqueezeNet's weights, which lpips downloads ({why}). "
            "pip install lpips torchvision, or leave --perceptual away.", 2) from None  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------
# Copied from train_realesrgan_optimized.py::SOAP
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


def build(cfg, run):
    """Model, EMA and optimizer with its state; with --gan the discriminator and its optimizer too."""
    torch.manual_seed(cfg.seed)
    guard(run)
    with run.device:
        model = make_model(cfg)
    run.compile(model)
    # 375 neighbours make a voxel of the linear decoder: steps of its weights add up
    linear = [] if model.linear is None else [{"params": list(model.linear.parameters()), "peak": 0.05 * cfg.learning_rate}]
    groups = [{"params": list(model.net.parameters()), "peak": cfg.learning_rate}, *linear]
    parts = Parts(model=model, ema=EMA(model, 0.99), opt=SOAP(groups, 0.0))
    if cfg.gan:
        from monai.networks.nets import PatchDiscriminator

        layers, width = (int(v) for v in cfg.disc.split(","))
        with run.device:
            parts.disc = PatchDiscriminator(3, width, 1, num_layers_d=layers, norm="INSTANCE")
        weights = [{"params": list(parts.disc.parameters()), "peak": 5e-4}]
        parts.disc_opt = with_state(
            torch.optim.AdamW(weights, 0.0, (0.5, 0.99), weight_decay=0.0, fused=run.kind in ("cuda", "cpu"))
        )
    if cfg.perceptual:
        parts.look = types.SimpleNamespace(loss=perceptual_loss(cfg, run))
    return parts


def example_batch(cfg, run):
    """A random batch of the shapes and types that `Volumes` makes."""
    n, size = cfg.batch_size * cfg.accumulate, max((s[1] for s in stages_of(cfg)), key=math.prod)
    return {"image": torch.rand(n, 1, *size, device=run.device), "index": torch.zeros(n, dtype=torch.int64, device=run.device)}


def divergence(mu, sigma):
    """KL divergence of latents from a normal distribution, mean over their values."""
    return 0.5 * (mu.square() + sigma.square() - 2 * sigma.clamp(min=1e-12).log() - 1).mean()


def train_step(parts, batch, cfg, run):
    """One update from a batch of `Volumes`, of the autoencoder and with --gan then of the discriminator; scalar tensors: loss,
    its terms and the gradient's norm."""
    x, gan = batch["image"], cfg.gan and run.trained() >= cfg.gan_start
    run.anneal(parts.opt)
    net, shape = run.net(parts.model), [len(x), cfg.latent_channels, *(s // parts.model.factor for s in x.shape[2:])]
    batch = {"image": x, "noise": run.draw("randn", shape)}
    perceptual = cfg.perceptual if stage_now(cfg, run)[2] else 0
    if gan:
        batch["fake"], parts.disc = torch.empty_like(x), parts.disc.requires_grad_(False)

    def loss_fn(part):
        again, mu, sigma = net(part["image"], part["noise"])
        again, mu, sigma = again.float(), mu.float(), sigma.float()
        terms = {"l1": (again - part["image"]).abs().mean(), "kl": divergence(mu, sigma)}
        loss = terms["l1"] + cfg.kl_weight * terms["kl"]  # EDIT HERE: the loss
        if perceptual:
            terms["perceptual"] = parts.look.loss(again, part["image"])
            loss = loss + perceptual * terms["perceptual"]
        if gan:
            part["fake"].copy_(again.detach())  # a slice of the batch: the discriminator learns from it below
            terms["fool"] = (parts.disc(again)[-1].float() - 1).square().mean()
            loss = loss + cfg.gan * terms["fool"]
        return {"loss": loss, **terms}

    losses = run.update(loss_fn, batch, parts.opt, parts.model, parts.ema)
    if not gan:
        return losses
    run.anneal(parts.disc_opt, "constant", span=(cfg.gan_start, 1))
    run.lr = parts.opt.param_groups[0]["lr"]
    disc = run.net(parts.disc.requires_grad_(True))

    def disc_loss(part):
        real, fake = (disc(part[k])[-1].float() for k in ("image", "fake"))
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())

    return losses | {"disc": run.update(disc_loss, {k: batch[k] for k in ("image", "fake")}, parts.disc_opt)["loss"]}


@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation: one crop there and back."""
    size = max((s[1] for s in stages_of(cfg)), key=math.prod)
    with run.autocast():
        return parts.ema.model(torch.zeros(1, 1, *size, device=run.device))[0]


# --- evaluation -------------------------------------------------------------------------------------------------------
def psnr(a, b):
    """PSNR in dB of scans [n, ...] in 0..1, one each."""
    return 10 * torch.log10(1 / (a - b).flatten(1).square().mean(1).clamp(min=1e-10))


def ssim(a, b):
    """SSIM of scans [n, 1, w, h, d] in 0..1, one each, by MONAI (Gaussian windows of 7, of thin scans as many as fit)."""
    from monai.metrics.regression import compute_ssim_and_cs

    window = tuple(min(7, s - 1 + s % 2) for s in a.shape[2:])
    return compute_ssim_and_cs(a, b, 3, window, (1.5, 1.5, 1.5))[0].flatten(1).mean(1)


@torch.no_grad()
def assess(parts, val, cfg, run):
    """{psnr, psnr_pca of a patch PCA of the same latent size, ssim, latent_scale} of the held-out crops; keeps the best
    weights. `val.shown` are the first crops with what became of them."""
    model, rows, latents, val.shown = parts.ema.model, [], [], []
    for i, x in enumerate(val.crops.split(1)):
        run.check()
        with run.autocast():
            again, mu, _ = model(x.to(run.device))
        again = again.float().clamp(0, 1).cpu()
        linear = val.linear.pca(x).clamp(0, 1)
        rows.append([*(float(psnr(x, y)) for y in (again, linear)), float(ssim(again, x))])
        latents.append(mu.float().cpu().flatten())
        if i < 6:
            val.shown.append((x[0, 0], linear[0, 0], again[0, 0]))
    model.latent_scale.fill_(1 / max(float(torch.cat(latents).std()), 1e-6))
    parts.model.latent_scale.copy_(model.latent_scale)
    metrics = dict(zip(("psnr", "psnr_pca", "ssim"), np.mean(rows, 0).tolist()))
    metrics["latent_scale"] = float(model.latent_scale)
    run.judge("psnr", metrics, model.state_dict())
    return metrics


def show(val, run):
    """Write sample-<update>.png: slices of held-out crops, through the PCA, through the network, and its error times 4."""
    rows = [[p for v in (*row, (row[2] - row[0]).abs() * 4) for p in slices(v.numpy())[:2]] for row in val.shown]
    titles = [f"{name} {plane}" for name in ("scan", "PCA", "network", "error x4") for plane in ("axial", "coronal")]
    wide = max(s.shape[1] for s in rows[0])
    sheet = picture(rows, titles, max(1, 128 // wide))
    write_aside(run.folder / f"sample-{run.step:06d}.png", lambda f: sheet.save(f, "PNG"))


def windows(function, volume, size, overlap, factor=1, enlarge=1):
    """function over windows of volume [c, w, h, d], blended by Gaussian weights so that no seams show; on the processor.

    Windows of `size` begin at multiples of `factor`; what they give is 1 / factor or `enlarge` times as large. A volume that is
    smaller, or that the factor does not divide, is mirrored at its end, as in training.
    """
    from monai.inferers import sliding_window_inference

    old = volume.shape[1:]
    whole = [max(c, -(-v // factor) * factor) for v, c in zip(old, size)]
    x = np.pad(volume, [(0, 0), *((0, n - v) for n, v in zip(whole, old))], "symmetric")
    places = [(torch.arange(s) + 0.5 - s / 2) / (s / 8) for s in size]
    weight = functools.reduce(lambda a, b: a[..., None] * b, [(-(p**2) / 2).exp() for p in places])
    steps = [max(1, int(s * (1 - overlap)) // factor) * factor for s in size]
    shares = [max(0.0, 1 - (step + 0.5) / s) for step, s in zip(steps, size)]  # MONAI makes whole numbers of them again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = sliding_window_inference(torch.from_numpy(np.ascontiguousarray(x, np.float32))[None], size, 1, function, shares,
            roi_weight_map=weight, device="cpu")[0]  # fmt: skip
    return out[(slice(None), *(slice(-(-v // factor) * enlarge) for v in old))]


@torch.no_grad()
def there_and_back(model, volume, cfg, run):
    """A scan [w, h, d] in 0..1 through the latents and back, window by window."""

    def one(part):
        run.check()
        with run.autocast():
            return model(part.to(run.device))[0].float().cpu()

    return windows(one, volume[None], stages_of(cfg)[-1][1], cfg.overlap)[0].clamp(0, 1)


def judge_scans(parts, val, cfg, run):
    """psnr_scan and ssim_scan of whole held-out scans, --val_scans of them, window by window; one window in a rehearsal."""
    size, start = stages_of(cfg)[-1][1], time.monotonic()
    scans = [val.items[i] for i in range(min(cfg.val_scans, len(val.items)))]
    count = sum(math.prod(math.ceil(max(v / s - 1, 0) / (1 - cfg.overlap)) + 1 for v, s in zip(x.shape, size)) for x in scans)
    if not run.over:
        there_and_back(parts.ema.model, val.crops[0, 0].numpy(), cfg, run)
        run.ahead = 1.1 * (time.monotonic() - start) * max(0, count - 1)
        left = run.clock.left()
        if run.ahead > 0.15 * left:
            run.ahead, cfg.val_scans = 0.0, 0
            say("Whole held-out scans would take more than a seventh of the time: crops only (--val_scans 0).")
        return {}
    rows = []
    for x in scans:
        a, b = (
            torch.from_numpy(np.asarray(v, np.float32))[None, None] for v in (there_and_back(parts.ema.model, x, cfg, run), x)
        )
        rows.append([float(psnr(a, b)), float(ssim(a, b))])
    return dict(zip(("psnr_scan", "ssim_scan"), np.mean(rows, 0).tolist())) if rows else {}


def export(parts, folder):
    """Write model.pt: the averaged weights with the latent's scale; and monai.pt, those of MONAI's AutoencoderKL alone, where
    it stands alone."""
    model = parts.ema.model
    save_tensors(folder / "model.pt", model.state_dict())
    if model.linear is None:
        save_tensors(folder / "monai.pt", model.net.state_dict())


def wrap_up(parts, val, cfg, run):
    """The ending, rehearsed before update 1: evaluate, show, save and export the averaged weights. Returns the metrics."""
    with run.ending():
        metrics = assess(parts, val, cfg, run)
        run.save()
        if run.main:
            metrics |= judge_scans(parts, val, cfg, run)
            show(val, run)
            with run.results() as folder:
                export(parts, folder)
    return metrics


def fit_linear(parts, data, val, cfg, run):
    """Before update 1: fit the linear autoencoder in closed form, then train it for some seconds, which is kept where it is
    better on these crops. `val.linear` is the PCA to compare with."""
    model, size = parts.model, data.size
    val.linear = Linear(model.factor, model.channels)
    if run.saved >= 0 and model.linear is not None:
        return val.linear.load_state_dict(model.linear.state_dict())
    data.size = tuple(min(s, t) for s, t in zip(size, (64, 64, 32)))
    crops = [data.__getitems__([(0, i)])["image"][0] for i in evenly(len(data), 128)]
    val.linear.fit(crops)
    if model.linear is not None:
        linear, start, run.parts = model.linear, time.monotonic(), None  # nothing to save: a run stopped here begins anew
        linear.load_state_dict(val.linear.state_dict())
        train_linear(linear, crops, data, cfg, run)
        run.parts = parts
        if linear_loss(linear, crops[::4]) > linear_loss(val.linear.to(run.device), crops[::4]):
            linear.load_state_dict(val.linear.state_dict())
        val.linear.cpu()
        parts.ema.model.linear.load_state_dict(linear.state_dict())
        say(f"The linear autoencoder took {time.monotonic() - start:.0f} s; the network learns what it leaves.")
    data.size = size
    return None


def train_linear(linear, crops, data, cfg, run):
    """LINEAR_STEPS updates of the linear autoencoder, of four crops each, in a twentieth of the time at most; of these crops
    where the scans are not in RAM."""
    opt, told = SOAP(list(linear.parameters()), 0.0), time.monotonic()
    start, room = told, 0.05 * run.clock.left()
    for k in range(LINEAR_STEPS):
        run.check()
        share = max(k / LINEAR_STEPS, (time.monotonic() - start) / room)
        if share >= 1:
            break
        opt.param_groups[0]["lr"] = 1e-3 * schedule(share, "linear")
        where = range(4 * k, 4 * k + 4)
        if data.cached:
            x = data.__getitems__([(-1 - k, i % len(data)) for i in where])["image"].to(run.device)
        else:
            x = torch.stack([crops[i % len(crops)] for i in where]).to(run.device)
        z = linear.encode(x)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(mix(cfg.seed, k, "linear"))).to(run.device)
        loss = (linear.decode(z + 0.05 * noise) - x).abs().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"Linear autoencoder: update {k} of {LINEAR_STEPS}, loss {float(loss.detach()):.4f}")
    opt.zero_grad(set_to_none=True)


@torch.no_grad()
def linear_loss(linear, crops):
    """Mean absolute error of crops [1, w, h, d] through a linear autoencoder."""
    crops = (x[None].to(linear.mean.device) for x in crops)
    return sum(float((linear.decode(linear.encode(x)) - x).abs().mean()) for x in crops)


def summary(metrics):
    """The figures in one line."""
    return "{psnr:.2f} dB, patch PCA {psnr_pca:.2f} dB, SSIM {ssim:.4f}".format(**metrics)


def verdict(metrics, start):
    """One line at 5 % of the run: does it learn, and what to change if not."""
    gain, lead = metrics["psnr"] - start["psnr"], metrics["psnr"] - metrics["psnr_pca"]
    text = f"5 % of the run: {gain:+.2f} dB since its start, {lead:+.2f} dB against the patch PCA."
    if gain < -1:
        text += " It gets worse: start over with --fresh and a third of --learning_rate."
    return text


def train(cfg):
    """The whole run; returns the metrics of the averaged weights: psnr, psnr_pca, ssim, latent_scale and others."""
    need("monai", "einops", "nibabel")
    with Run(cfg, RECIPE) as run:
        data, val = open_data(cfg, run)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {run.finished}. A longer --num_epochs or --time_budget continues it, --fresh starts over.")
            return run.finished
        data.size = stage_now(cfg, run)[1]
        fit_linear(parts, data, val, cfg, run)
        weights = sum(p.numel() for p in parts.model.parameters()) / 1e6
        say(f"{weights:.2f} million weights, latents {cfg.latent_channels} x 1/{parts.model.factor} of each side, crops of "
            f"{' x '.join(map(str, data.size))}, {len(data.items)} scans and {len(val.items)} held out.")  # fmt: skip
        if cfg.stages.endswith("perceptual"):
            say(f"--stages: the last stage keeps crop {','.join(map(str, stages_of(cfg)[-1][1]))}, whatever --target_size is"
                f"{'.' if cfg.perceptual else '; its perceptual loss is off, --perceptual 0.001 turns it on.'}")  # fmt: skip
        metrics = start = wrap_up(parts, val, cfg, run)
        say("Before: " + summary(metrics))
        for batch in run.batches():
            run.advance(train_step(parts, batch, cfg, run))
            if run.due(every=0.1, at=SAMPLE_MARKS) and not run.over:
                metrics = assess(parts, val, cfg, run)
                run.write(lambda: show(val, run))
                say(f"step {run.step}: {summary(metrics)}")
                if run.due(at=(0.05,)):
                    say(verdict(metrics, start))
            if stage_now(cfg, run)[1] != data.size and not run.over:
                data.size = stage_now(cfg, run)[1]
                say(f"step {run.step}: a new stage begins, with crops of {' x '.join(map(str, data.size))}")
                run.renew()
        metrics = run.finish(wrap_up(parts, val, cfg, run))
        say(f"{summary(metrics)} after {run.step} updates. The weights (model.pt) and pictures are in {run.folder}")
        return metrics


# --- using the result -------------------------------------------------------------------------------------------------
def load(run_dir, device="cpu"):
    """The trained (EMA) `Autoencoder` of a run folder in eval mode; `model.cfg` are its settings."""
    with trained_weights(run_dir, RECIPE, Config, "model.pt", "best.pt") as (cfg, path):
        state, model = load_tensors(path), make_model(cfg)
        model.load_state_dict(state.get("model", state))  # best.pt has them one deeper
    model.cfg = cfg
    return model.to(device).eval()


def encode_scan(model, volume, cfg, run):
    """Latents float32 [c, w / f, h / f, d / f] of a scan [w, h, d] in 0..1, window by window."""

    def one(part):
        with torch.no_grad(), run.autocast():
            return model.encode(part.to(run.device))[0].float().cpu()

    return windows(one, volume[None], stages_of(cfg)[-1][1], cfg.overlap, model.factor)


def decode_latent(model, z, cfg, run):
    """A scan [w, h, d] in 0..1 of latents [c, w / f, h / f, d / f], window by window."""

    def one(part):
        with torch.no_grad(), run.autocast():
            return model.decode(part.to(run.device)).float().cpu()

    size = [s // model.factor for s in stages_of(cfg)[-1][1]]
    return windows(one, z, size, cfg.overlap, enlarge=model.factor)[0].clamp(0, 1)


def use(cfg):
    """--reconstruct, --encode or --decode files; writes into <run folder>/volumes; returns the paths. In a folder a file that
    cannot be used is named and left out."""
    need("monai", "nibabel")
    import nibabel

    folder = Path(cfg.out_dir or f"results/{RECIPE}").expanduser()
    if not cfg.out_dir and not (folder / "settings.json").exists():
        folder = folder.with_name(folder.name + "-demo")
    run = Run(cfg, RECIPE)
    guard(run)
    model = load(folder, run.device)
    own, what = model.cfg, next(n for n in ("reconstruct", "encode", "decode") if getattr(cfg, n))
    own.overlap, kinds, paths = cfg.overlap, (".npz",) if cfg.decode else VOLUMES, []
    source = Path(getattr(cfg, what)).expanduser()
    if not source.exists():
        raise RecipeError(f"--{what} {source}: there is no such file or folder.", 2)
    alone = source.is_file()
    files = [source] if alone else [p for p in sorted(source.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.name.lower().endswith(kinds) and (alone or folder / "volumes" not in p.parents)]
    if not files:
        raise RecipeError(f"--{what} {source}: it takes files that end in {' '.join(kinds)}, or a folder of them.", 2)
    (folder / "volumes").mkdir(exist_ok=True)
    for file in files:
        name = file.name if alone else "-".join(file.relative_to(source).parts)
        name = re.sub(r"(\.nii|\.nii\.gz|-latent\.npz)$", "", name.replace(".npy", "-npy") if not alone else name)
        try:
            paths.append(use_file(file, re.sub(r"\.(npy|npz)$", "", name), what, model, own, run, folder / "volumes", nibabel))
        except (*UNREADABLE, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
            if alone:
                raise RecipeError(f"{file}: {e}.") from None
            say(f"{file} is left out: {e}.")
    return paths


def use_file(file, name, what, model, cfg, run, folder, nibabel):
    """One file of `use`; returns the path of what was written. Raises one of `UNREADABLE` for a file that cannot be used."""
    if what == "decode":
        with np.load(file, allow_pickle=False) as state:
            z, low, high, shape, affine = (state[k] for k in ("latent", "low", "high", "shape", "affine"))
        if z.ndim != 4 or len(z) != model.channels:
            raise ValueError(f"its latent has the shape {z.shape}, and this model takes [{model.channels}, w, h, d]")
        again = decode_latent(model, np.asarray(z, np.float32), cfg, run)
    else:
        volume, affine = read_volume(file, cfg)
        (x, low, high), shape = scale(volume), volume.shape
        affine = np.eye(4) if affine is None else affine
    if what == "encode":
        target, z = folder / f"{name}-latent.npz", encode_scan(model, x, cfg, run).numpy()
        about = {"low": low, "high": high, "shape": shape, "affine": affine, "latent_scale": float(model.latent_scale)}
        write_aside(target, lambda f: np.savez(f, latent=z, **about))
        say(f"{file.name} -> {target}")
        return target
    if what == "reconstruct":
        again = there_and_back(model, x, cfg, run)
        quality = f": {float(psnr(again[None], torch.from_numpy(x)[None])):.2f} dB"
    values = again.numpy()[tuple(slice(int(s)) for s in shape)] * (float(high) - float(low)) + float(low)
    target = folder / f"{name}-{what}{'d' if what == 'decode' else 'ed'}.nii.gz"
    image = nibabel.Nifti1Image(values.astype(np.float32), affine)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        nibabel.save(image, Path(aside) / target.name)
        write_aside(target, lambda f: f.write((Path(aside) / target.name).read_bytes()))
    say(f"{file.name} -> {target}{quality if what == 'reconstruct' else ''}")
    return target


if __name__ == "__main__":
    main(lambda cfg: use(cfg) if cfg.reconstruct or cfg.encode or cfg.decode else train(cfg), Config, __doc__)
