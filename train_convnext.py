# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "onnx"]
# ///
"""Train an image classifier whose embeddings separate your classes, ConvNeXt or a plain fast baseline, by your deadline.

python train_convnext.py --use_amp --data_dir DATA --time_budget 10m   # DATA/<class>/*.jpg, a CSV, or an .npz
python train_convnext.py                                               # try it out on built-in shapes
python train_convnext.py --embed PICTURE_OR_FOLDER                     # predictions and embeddings of new images

Measured (two cores of an AMD EPYC with AVX512-BF16, torch 2.13.0, 2026-11-21; not yet on a GPU), on 10,000 images of CIFAR-10
and 2,000 held-out ones: after 10 minutes the baseline is right on 84.0 %, ConvNeXt on 75.3 %; after 3 minutes on 81.5 % and
69.5 %, in fp32 on 79.6 % and 67.3 %. On sets of this size take --arch baseline; --compare tells it for yours.
"""

import copy
import csv
import dataclasses
import functools
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

try:
    from common import (  # isort: skip
        EMA, UNREADABLE, Items, Parts, RecipeError, Run, Settings, colour, evenly, find_images, free_memory,
        load_tensors, main, mix, open_records, opt, picture, read_image, read_json, read_table, save_tensors, say,
        square, trained_weights, with_state, write_aside,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit(
        "This script needs common.py: copy it beside the script, or make one file of both: "
        "python tools/bundle.py train_convnext.py"
    ) from e

RECIPE = "convnext"
SHAPES = ("disc", "ring", "square", "cross", "triangle", "stripes")  # the built-in classes
BUILT_IN = 120  # built-in images of a class to train on
JUDGED = 10_000  # held-out images that the separation metrics compare with each other, at most
RATES = {  # peak learning rates at 256 samples per update, and how they grow with it
    "muon": ({"baseline": 0.17, "convnext": 0.1}, 0.5), "adamw": ({"baseline": 4e-3, "convnext": 4e-3}, 0.5),
    "sgd": ({"baseline": 0.3, "convnext": 0.3}, 1.0),
}  # fmt: skip


@dataclass
class Config(Settings):
    data_dir: str = opt("", "folder with a folder per class, CSV or .npz; empty: built-in shapes", everyday=True)
    arch: str = opt("convnext", "network", fixed=True, everyday=True, choices=("convnext", "baseline"))
    base_channels: int = opt(64, "width of the first blocks", fixed=True, low=8)
    num_blocks: int = opt(
        4, "blocks of ConvNeXt; the baseline has a pair of convolutions for each but one", fixed=True, low=2, high=12
    )
    stem: int = opt(
        0, "pixels that a position of the first layer stands for, across; 0: by network and size", fixed=True, low=0, high=16
    )
    loss: str = opt("ce", "cross entropy, supervised contrastive, ArcFace", fixed=True, everyday=True,
        choices=("ce", "supcon", "arcface"))  # fmt: skip
    balance: bool = opt(False, "classes count alike however many images they have (logit adjustment)", fixed=True)
    optimizer: str = opt("muon", "what updates the weights", fixed=True, choices=("muon", "adamw", "sgd"))
    target_size: int = opt(0, "image size in pixels; 0: the data's, 128 at most", fixed=True, everyday=True, low=0)
    batch_size: int = opt(0, "images per forward pass and process; 0: 32 to 1024, by their number", everyday=True, low=0)
    num_epochs: float = opt(0.0, "length of the run in passes over the data; 0: 40, built-in shapes 15", everyday=True, low=0)
    learning_rate: float = opt(0.0, "peak learning rate; 0: by optimizer and samples per update", fixed=True, low=0)
    flip: str = opt("h", "mirror training images: horizontally, both ways", fixed=True, choices=("none", "h", "hv"))
    shift: float = opt(0.1, "move training images by up to this share of their side", fixed=True, low=0, high=0.5)
    zoom: float = opt(0.0, "enlarge or shrink training images by up to this share", fixed=True, low=0, high=1)
    mirrored: bool = opt(True, "judge and export the mean over an image and its left-right mirror image", fixed=True)
    cutout: float = opt(0.375, "side of the square cut out of a training image, as a share", fixed=True, low=0, high=1)
    mixup: float = opt(0.0, "mix another image in, by up to half of this share", fixed=True, low=0, high=1)
    smoothing: float = opt(0.1, "label smoothing", fixed=True, low=0, high=0.9)
    metrics_every: int = opt(10, "passes over the data between two separation metrics", everyday=True, low=1)
    embed_every: int = opt(50, "passes between two sets of embeddings, scatter and worst errors", low=1)
    compare: bool = opt(False, "baseline and convnext in fp32 and half precision, the same time for each: one table",
        everyday=True, action=True)  # fmt: skip
    embed: str = opt("", "picture or folder: write predictions and embeddings", everyday=True, action=True)
    names: str = opt("", "the classes, as JSON", derived=True)

    def __post_init__(self):
        settle(self)


def settle(cfg):
    """Fill what 0 leaves to the script. RecipeError for settings that do not fit each other."""
    if not (cfg.target_size and cfg.batch_size):
        count, side = glance(cfg)
        cfg.target_size = cfg.target_size or side
        cfg.batch_size = cfg.batch_size or min(1024, max(32, 2 ** int(math.log2(max(count, 1) / 40))))
    if not (cfg.num_epochs or cfg.time_budget or cfg.deadline or cfg.num_steps):
        cfg.num_epochs = 40.0 if cfg.data_dir else 15.0
    small, s = (1, 2) if cfg.arch == "baseline" else (2, 4), cfg.target_size
    cfg.stem = cfg.stem or (small[0] if s <= 48 else small[1] if s <= 96 else 4)
    if cfg.loss != "ce" and cfg.mixup:
        raise RecipeError(f"--mixup is {cfg.mixup}; it mixes classes, which --loss {cfg.loss} cannot take. Leave one away.", 2)
    halved = cfg.num_blocks - 1 if cfg.arch == "baseline" else (cfg.num_blocks - 1) // 2
    least = max(cfg.stem * 2**halved + cfg.stem % 2, 2 * cfg.stem)
    if s < least:
        raise RecipeError(
            f"--target_size is {s}; with --stem {cfg.stem} and --num_blocks {cfg.num_blocks} it takes {least} at least.", 2
        )


def glance(cfg):
    """(number of training images, their side in pixels) by a look at the data."""
    place, sides = Path(cfg.data_dir).expanduser(), []
    if not cfg.data_dir:
        return BUILT_IN * len(SHAPES), 32
    if place.suffix.lower() == ".npz":
        files = splits_of(place)["train"].images
    else:
        files = [r["image"] for r in read_table(place)] if place.suffix.lower() == ".csv" else find_images(place)
    for i in evenly(len(files), 9):
        with suppress(*UNREADABLE):  # a bad one is named later
            sides.append(min((load_item(files[i]) if isinstance(files[i], Path) else unpack(files[i], place)).shape[:2]))
    return len(files), min(128, max(8, sorted(sides or [64])[len(sides) // 2] // 4 * 4))


# --- data -------------------------------------------------------------------------------------------------------------
def load_item(path):
    """EDIT HERE: one image file (or its bytes, from an .npz) -> uint8 [height, width, 3], or [height, width] for a gray one."""
    return read_image(path)


def unpack(item, place):
    """An image of an .npz: an array as it is, bytes of a file by `load_item`; uint8 [h, w, 3]."""
    item = load_item(io.BytesIO(item.tobytes())) if item.ndim == 1 else item
    return colour(item[..., 0] if item.shape[2:] == (1,) else item, place)


@functools.lru_cache(2)
def read_npz(path):
    """{split: namespace of images and labels (texts)} of an .npz; RecipeError says which arrays it takes.

    Arrays: images and labels, or train_images, train_labels, val_..., test_... (as MedMNIST has them), or x_train, y_train,
    x_test, y_test; images uint8 [n, h, w(, 3)]; or files packed end to end: train_jpeg, train_offsets, train_labels.
    `classes` names the labels.
    """
    takes = "It takes images and labels, or train_images, train_labels, val_..., test_..., or train_jpeg, train_offsets."
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except MemoryError:
        raise
    except Exception as e:  # whatever zipfile, zlib and numpy make of a damaged file
        raise RecipeError(
            f"{path} cannot be read as .npz ({(str(e).splitlines() or [type(e).__name__])[0][:150]}).", 2
        ) from None
    if flat := [k for k, a in arrays.items() if a.ndim == 0]:
        raise RecipeError(f"{path}: {flat[0]} is one value, no array. {takes}", 2)
    splits, named = {}, [str(c) for c in arrays.get("classes", [])]
    for split in ("train", "val", "test"):
        plain = ("images", "labels") if split == "train" else ("", "")
        pairs = ((f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}"), plain)
        images, labels = next(((arrays[i], arrays[k]) for i, k in pairs if i in arrays and k in arrays), (None, None))
        if f"{split}_jpeg" in arrays and f"{split}_offsets" in arrays:
            packed, ends = arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"]
            if packed.ndim != 1 or ends.ndim != 1 or ends.dtype.kind not in "iu" or packed.dtype != np.uint8:
                raise RecipeError(f"{path}: {split}_jpeg takes bytes (uint8) end to end, {split}_offsets whole numbers.", 2)
            images = np.split(packed, ends[1:-1].astype(np.int64))
            labels = arrays.get(f"{split}_labels")
        elif images is not None and (images.dtype != np.uint8 or images.shape[3:] not in ((), (1,), (3,)) or images.ndim < 3):
            what = f"{split} images are {images.dtype} {images.shape}"
            raise RecipeError(f"{path}: {what}; give uint8 [n, height, width] or [n, height, width, 3].", 2)
        if images is None or labels is None:
            continue
        if len(images) != len(labels) or labels.size != len(labels):
            what = f"{len(images)} {split} images and labels of shape {labels.shape}"
            raise RecipeError(f"{path}: {what}; each image needs one label.", 2)
        texts = [str(v) for v in labels.ravel().tolist()]
        texts = [named[int(t)] if named and t.isdecimal() and int(t) < len(named) else t for t in texts]
        splits[split] = types.SimpleNamespace(images=images, labels=texts)
    if not splits or not all(part.labels for part in splits.values()):
        raise RecipeError(f"{path} holds {', '.join(arrays) or 'nothing'}. {takes}", 2)
    return splits


def splits_of(path):
    """`read_npz` of training data."""
    if "train" not in read_npz(path):
        raise RecipeError(f"{path} holds no training images, only {', '.join(read_npz(path))}; give it as --val_dir.", 2)
    return read_npz(path)


def npz_records(cfg):
    """`common.open_records` for an .npz: held out are --val_dir's images, else its own val or test images, else a tenth."""
    place = Path(cfg.data_dir).expanduser()

    def listed(path, split):
        s = read_npz(path)[split]
        return [{"image": f"{path}[{split} {i}]", "item": s.images[i], "label": s.labels[i]} for i in range(len(s.labels))]

    splits, train = splits_of(place), listed(place, "train")
    held = next((s for s in ("val", "test") if s in splits), "")
    if cfg.val_dir:
        if not cfg.val_dir.lower().endswith(".npz"):
            raise RecipeError(f"--val_dir is {cfg.val_dir!r}; beside an .npz as --data_dir it takes an .npz too.", 2)
        other = Path(cfg.val_dir).expanduser()
        val = listed(other, next(s for s in ("test", "val", "train") if s in read_npz(other)))
    elif held:
        val, alone = listed(place, held), "; its test images are left alone" * ({"val", "test"} <= set(splits))
        say(f"Held out: the {held} images of {place.name}{alone}.")
    else:
        order = np.random.default_rng(cfg.seed).permutation(len(train))
        cut = max(1, len(train) // 10)
        train, val = [train[i] for i in sorted(order[cut:])], [train[i] for i in sorted(order[:cut])]
    if not train or not val:
        raise RecipeError(f"{place} gives {len(train)} training and {len(val)} validation images; each needs one.", 2)
    keep = np.random.default_rng(cfg.seed).permutation(len(train))[: max(1, round(len(train) * cfg.sample_ratio))]
    return [train[i] for i in sorted(keep)], val


# Copied from train_latent_cfg.py::shape
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


# Copied from train_latent_cfg.py::label_of
def label_of(record):
    """The class of a record: the CSV's label, else the name of the folder that the file lies in."""
    if isinstance(record, str):
        return record.split()[0]
    return str(record.get("label") or "").strip() or Path(record["image"]).parent.name


# Copied from train_latent_cfg.py::natural
def natural(text):
    """A key that sorts ID_2 before ID_10."""
    return [(int(part), "") if part.isdecimal() else (0, part.lower()) for part in re.split(r"(\d+)", text)], text


def load_picture(record, size):
    """The middle square of a record's image, resized: uint8 [size, size, 3]. A text is the name of a built-in shape."""
    if isinstance(record, str):
        return shape(record, size).transpose(1, 2, 0).copy()
    image = unpack(record["item"], record["image"]) if "item" in record else colour(load_item(record["image"]), record["image"])
    return image if image.shape[:2] == (size, size) else square(image, size)


class Pictures(torch.utils.data.Dataset):
    """Images with their classes; `resident` where all of them lie on the device as one uint8 tensor [n, s, s, 3].

    A bad file's place takes the next good one with its class; of held-out images it is left out.
    """

    def __init__(self, records, names, what, cfg, run):
        self.records, number = records, {name: k for k, name in enumerate(names)}
        self.items = Items(records, functools.partial(load_picture, size=cfg.target_size), what, run.check)
        self.files = [i for i in range(len(records)) if what == "training" or i not in self.items.bad]
        self.own = torch.tensor([number[label_of(r)] for r in records])  # the classes of the files
        self.size = cfg.target_size
        self.cached, size = self.items.cached, 3 * cfg.target_size**2 * len(records)
        room = torch.cuda.mem_get_info(run.device)[0] if run.kind == "cuda" else free_memory()
        self.resident, self.images = self.cached and size < room / 4, None
        if self.resident:
            self.images = torch.from_numpy(np.stack([self.items[i] for i in self.files])).to(run.device)
            self.items.kept.clear()
        self.labels = self.classes(range(len(self)))

    def __len__(self):
        return len(self.files)

    def name(self, index):
        """The file of a sample, for messages."""
        record = self.records[self.items.place(self.files[index])]
        return record if isinstance(record, str) else str(record["image"])

    def classes(self, index):
        """int64 [n]: the classes of indices, as far as bad files are known."""
        return self.own[[self.items.place(self.files[int(i)]) for i in index]]

    def take(self, index):
        """uint8 [n, s, s, 3] of indices, on the device where the images are resident."""
        if self.resident:
            return self.images[torch.as_tensor(index).to(self.images.device)]
        return torch.from_numpy(np.stack([self.items[self.files[int(i)]] for i in index]))

    def __getitems__(self, keys):
        """The batch of (epoch, index) keys that `common.Stream` deals out: image uint8 [n, s, s, 3], label and index int64."""
        index = torch.tensor([i for _, i in keys])
        image = self.take(index)  # a bad file may be found here
        return {"image": image, "label": self.labels[index] if self.cached else self.classes(index), "index": index}


def open_data(cfg, run):
    """(training `Pictures`, held-out `Pictures`, names of the classes) of the data, or of built-in shapes; writes data.png."""
    if cfg.data_dir:
        records = npz_records(cfg) if cfg.data_dir.lower().endswith(".npz") else open_records(cfg)
        sets = zip(("training", "validation"), records, (cfg.data_dir, cfg.val_dir or cfg.data_dir))
        train, held = (run.fix_files(*s) for s in sets)
    else:
        say("No --data_dir: training on built-in shapes; for your classes add --data_dir FOLDER, with a folder for each.")
        train, held = ([f"{name} {k}" for name in SHAPES for k in span] for span in (range(BUILT_IN), range(-20, 0)))
    names = json.loads(run.settings.get("settings", {}).get("names") or "[]")
    told = [bool(str(r.get("label") or "").strip()) for r in train if not isinstance(r, str)]
    if any(told) and not all(told):
        what = f"{told.count(False)} rows of {cfg.data_dir} have no label, e.g. {train[told.index(False)]['image']}"
        raise RecipeError(f"{what}: give them one or drop them.", 2)
    names = names or sorted({label_of(r) for r in train}, key=natural)
    if len(names) < 2:
        raise RecipeError(f"{cfg.data_dir} has one class to train on, {names[0]!r}: put each class into a folder, or "
            "give a CSV with columns image and label.", 2)  # fmt: skip
    cfg.names, strange = json.dumps(names, ensure_ascii=False), [r for r in held if label_of(r) not in names]
    if strange:
        say(f"{len(strange)} validation images are of classes without a training image and left out: {label_of(strange[0])!r}")
    held = [r for r in held if label_of(r) in names]
    if new := [r for r in train if label_of(r) not in names]:
        raise RecipeError(f"{len(new)} training images are of a class that this run did not begin with: {label_of(new[0])!r}. "
            "Undo that, start over with --fresh, or choose another --out_dir.", 2)  # fmt: skip
    if not held:
        why = "check --val_dir" if cfg.val_dir else "give a class two images or more, or give --val_dir"
        raise RecipeError(f"No validation image is of a training class ({', '.join(names[:5])}); {why}.", 2)
    data, val = (Pictures(r, names, what, cfg, run) for r, what in ((train, "training"), (held, "validation")))
    counts = torch.bincount(data.labels, minlength=len(names))
    least, most = names[int(counts.argmin())], names[int(counts.argmax())]
    where = f"on the {run.device.type}, no loader" if data.resident else "in RAM" if data.cached else "read by worker processes"
    say(f"{len(data)} images of {len(names)} classes, {counts.min()} ({least}) to {counts.max()} ({most}) each, {where}; "
        f"{len(val)} held out.")  # fmt: skip
    below = {p.name.lower() for p in Path(cfg.data_dir).expanduser().glob("*")} if cfg.data_dir and not cfg.val_dir else set()
    other = next((n for n in ("val", "valid", "validation", "heldout", "test") if n in below), None)
    if "train" in below and other:
        say(f"{cfg.data_dir} holds train and {other}, and both are mixed now; to keep them apart: --data_dir "
            f"{Path(cfg.data_dir) / 'train'} --val_dir {Path(cfg.data_dir) / other}")  # fmt: skip
    if counts.max() > 3 * counts.min() and not cfg.balance:
        say(f"The classes are unequal; if {least!r} matters as much as {most!r}, add --balance.")
    if run.main:
        shown = [c for c in evenly(len(names), 16) if counts[c]]
        index = [(data.labels == c).nonzero()[:, 0].repeat(8)[:8] for c in shown]
        u = torch.rand(8 * len(shown), 8, generator=torch.Generator().manual_seed(0)).to(run.device)
        seen = augment(data.take(torch.cat(index)).to(run.device), u, cfg, 127.0).permute(0, 2, 3, 1).byte().cpu().numpy()
        rows = [[*data.take(i[:2]).cpu().numpy(), *seen[8 * k + 2 : 8 * k + 8]] for k, i in enumerate(index)]
        titles = ["as read"] * 2 + ["as trained"] * 6
        sheet = picture(rows, titles, max(1, 64 // cfg.target_size), [names[c] for c in shown])
        write_aside(run.folder / "data.png", lambda f: sheet.save(f, "PNG"))
    return data, val, names


def augment(x, u, cfg, fill):
    """uint8 [n, s, s, 3] on any device -> float [n, 3, s, s] in 0..255: moved, zoomed and mirrored by one gather (nearest
    pixels, mirrored at the edges), then a square of `fill` cut out. u: [n, 8] random numbers in 0..1."""
    n, s = x.shape[:2]
    t, far, reach = torch.arange(s, device=x.device), s - 1, round(cfg.shift * s)
    scale = (1 + cfg.zoom) ** (2 * u[:, 4:5] - 1) if cfg.zoom else 1.0
    places = []
    for k, turned in ((0, cfg.flip == "hv"), (1, cfg.flip != "none")):
        moved = (u[:, k : k + 1] * (2 * reach + 1)).floor() - reach
        place = (t - far / 2) * scale + far / 2 + moved if cfg.zoom else t + moved
        place = far - (far - place.round().abs()).abs()
        places.append((torch.where(u[:, 2 + k : 3 + k] < 0.5, far - place, place) if turned else place).clamp(0, far).long())
    rows, columns = places
    x = x[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).float()
    if cfg.cutout:
        half = cfg.cutout * s / 2
        inside = [(t + 0.5 - u[:, 6 + k : 7 + k] * s).abs() < half for k in (0, 1)]
        x = torch.where((inside[0][:, :, None] & inside[1][:, None])[:, None], fill, x)
    return x


# --- models -----------------------------------------------------------------------------------------------------------
class Whitened(nn.Conv2d):
    """A first layer [n, 3, s, s] -> [n, filters, s / stride, s / stride] of fixed filters that whiten patches: eigenvectors of
    the training images' patches, scaled to variance 1, and their negatives (as in Jordan, "94% on CIFAR-10 in 3.29 seconds on a
    single GPU", 2024). They save the first layers the time in which they would learn the same."""

    def __init__(self, stride, filters):
        super().__init__(3, min(filters, 24 * stride**2), 2 * stride, stride, stride // 2, bias=False)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images):
        """Set the filters from normalised images [n, 3, s, s]."""
        patches = F.unfold(images.float(), self.kernel_size, stride=self.stride).transpose(1, 2).flatten(0, 1)
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())
        filters = (vectors / (values + 1e-2).sqrt()).T.flip(0)[: self.out_channels // 2]
        filters = filters.reshape(-1, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))


class Baseline(nn.Module):
    """A plain convolutional net [n, 3, s, s] -> [n, width]: pairs of 3 x 3 convolutions with batch normalisation, each pair at
    half the side of the one before, behind a `Whitened` layer; the greatest value of each channel is the embedding."""

    def __init__(self, channels, blocks, stem):
        super().__init__()
        self.stem, layers, width = Whitened(stem, 24), [], 24
        for k in range(blocks - 1):
            wide = channels * min(2**k, 4)
            for a, pool in ((width, nn.MaxPool2d(2)), (wide, nn.Identity())):
                conv, norm = nn.Conv2d(a, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
                nn.init.dirac_(conv.weight.data[:a])  # the layer's inputs are among its outputs
                norm.num_batches_tracked = None  # nobody reads it
                layers += [conv, pool, norm, nn.GELU()]
            width = wide
        self.body, self.width = nn.Sequential(*layers), width

    def forward(self, x):
        return self.body(F.gelu(self.stem(x))).amax((2, 3))


class Block(nn.Module):
    """ConvNeXt's block (Liu et al., "A ConvNet for the 2020s", 2022): 7 x 7 depthwise convolution, layer normalisation, an MLP
    of four times the width; [n, h, w, c] -> the same. The layer scale starts at 0.5 and not at 1e-6, which is for deep nets."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma, self.plain = nn.Parameter(torch.full((width,), 0.5)), False

    def forward(self, x):
        device = x.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not self.plain):
            y = self.mix((x.float() if self.plain else x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.gamma * self.down(F.gelu(self.up(self.norm(y))))


class ConvNeXt(nn.Module):
    """[n, 3, s, s] -> [n, width]: blocks on positions of `stem` pixels; the third, fifth, ... works at half the side and twice
    the width of the one before it. The first layer sees overlapping patches through `Whitened` filters; with the paper's
    patch layer, which learns, 10,000 images of CIFAR-10 were at 54 instead of 61 % after some 190 updates."""

    def __init__(self, channels, blocks, stem):
        super().__init__()
        self.stem, self.norm = Whitened(stem, 48), nn.LayerNorm(channels)
        self.widen = nn.Linear(self.stem.out_channels, channels)
        width, layers = channels, []
        for k in range(blocks):
            if k % 2 == 0 and k:
                layers += [Halve(width)]
                width *= 2
            layers.append(Block(width))
        self.body, self.last, self.width = nn.Sequential(*layers), nn.LayerNorm(width), width

    def forward(self, x):
        x = self.widen(F.gelu(self.stem(x).permute(0, 2, 3, 1)))
        return self.last(self.body(self.norm(x)).mean((1, 2)))


class Halve(nn.Module):
    """Layer normalisation and a 2 x 2 convolution: [n, h, w, c] -> [n, h/2, w/2, 2c]."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(width), nn.Conv2d(width, 2 * width, 2, 2)

    def forward(self, x):
        return self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Net(nn.Module):
    """Images [n, 3, s, s] in 0..255 -> (embeddings [n, width], scores [n, classes] before softmax); in eval mode the means over
    the image and its mirror image where training images are mirrored."""

    def __init__(self, cfg, classes):
        super().__init__()
        self.body = {"baseline": Baseline, "convnext": ConvNeXt}[cfg.arch](cfg.base_channels, cfg.num_blocks, cfg.stem)
        self.head, self.loss = nn.Linear(self.body.width, classes, bias=cfg.loss != "arcface"), cfg.loss
        self.both = cfg.mirrored and cfg.flip != "none"
        self.scale = 1 / 9 if cfg.arch == "baseline" else 1.0  # maxima are large; small scores learn better
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 127.5))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 64.0))

    def forward(self, x):
        e, scores = self.see(x)
        if self.training or not self.both:
            return e, scores
        other, more = self.see(x.flip(3))
        return (e + other) / 2, (scores + more) / 2

    def see(self, x):
        """Embeddings and scores of the images as they are."""
        e = self.body((x - self.mean) / self.std).float()
        if self.loss == "arcface":
            with torch.autocast(x.device.type, enabled=False):  # angles in half precision are too coarse
                return e, ARC_SCALE * (F.normalize(e) @ F.normalize(self.head.weight).T)
        return e, self.head(e.detach() if self.loss == "supcon" else e).float() * self.scale


ARC_SCALE, ARC_MARGIN = 16.0, 0.3  # 64 and 0.5 in the paper, for thousands of classes
TEMPERATURE = 0.1  # of the contrastive loss


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for the matrices of hidden layers (Jordan et al., "Muon: an optimizer for hidden layers in
    neural networks", 2024), Adam for all else. torch.optim.Muon takes no convolutions.

    Groups say `kind`: "unit" (matrices before a normalisation, kept at one norm), "free" (other matrices) or "adam".
    """

    def __init__(self, groups, lr, momentum=0.6, betas=(0.9, 0.99)):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"mean": torch.zeros_like(p)}
                if group["kind"] == "adam":
                    self.state[p] |= {"square": torch.zeros_like(p), "step": 0}

    @staticmethod
    def orthogonal(x, steps=3):
        """Matrices [n, a, b], a <= b, near the closest ones with orthonormal rows, by Newton-Schulz iteration."""
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, keep, (b1, b2) = group["lr"], group["momentum"], group["betas"]
            by_shape, unit = {}, group["kind"] == "unit"
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if group["kind"] == "adam":
                    state["step"] += 1
                    state["mean"].lerp_(p.grad, 1 - b1)
                    state["square"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    scale = (state["square"] / (1 - b2 ** state["step"])).sqrt_().add_(1e-8)
                    p.addcdiv_(state["mean"], scale, value=-lr / (1 - b1 ** state["step"]))
                else:
                    state["mean"].mul_(keep).add_(p.grad)
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, same in by_shape.items():
                x = torch.stack([p.grad.add(self.state[p]["mean"], alpha=keep).flatten(1) for p in same])
                half = x.dtype if self.exact else torch.bfloat16
                wide = x.shape[1] <= x.shape[2]
                x = self.orthogonal((x if wide else x.mT).to(half)).to(x.dtype)
                for p, new in zip(same, x if wide else x.mT):
                    p.mul_(len(p) ** 0.5 / p.norm()) if unit else None
                    p.add_(new.reshape(shape), alpha=-lr * (1 if unit else max(1, len(p) / new.shape[1]) ** 0.5))

    exact = True  # multiply in the weights' own type; else in bf16


def make_optimizer(net, cfg, run):
    """The optimizer with its state allocated, and its peak rate: `learning_rate`, or the table's scaled to the batch."""
    table, power = RATES[cfg.optimizer]
    peak = cfg.learning_rate or table[cfg.arch] * (run.samples / 256) ** power
    muon, groups = cfg.optimizer == "muon", [{"params": [], "peak": peak}, {"params": [], "peak": peak}]
    for name, p in net.named_parameters():
        if p.requires_grad:  # matrices (for Muon those of the hidden layers), and the rest
            first = p.ndim > 1 and (not muon or (name.startswith("body.body") and ".mix." not in name))
            groups[not first]["params"].append(p)
    if muon:
        kind, share = ("unit", 0.02) if cfg.arch == "baseline" else ("free", 0.03)
        opt = Muon([groups[0] | {"kind": kind}, groups[1] | {"kind": "adam", "peak": share * peak}], 0.0)
        opt.exact = run.dtype is not torch.bfloat16
        return opt, peak
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.05 if cfg.optimizer == "adamw" else 5e-4, 0.0
    if cfg.optimizer == "adamw":
        return with_state(torch.optim.AdamW(groups, 0.0)), peak
    return with_state(torch.optim.SGD(groups, 0.0, momentum=0.9, nesterov=True)), peak


# --- losses -----------------------------------------------------------------------------------------------------------
def supervised_contrast(z, label):
    """Supervised contrastive loss (Khosla et al., 2020) of unit vectors z [n, d]; each sample's loss as [n]."""
    with torch.autocast(z.device.type, enabled=False):
        near = z @ z.T / TEMPERATURE
    near = near - 1e9 * torch.eye(len(z), device=z.device)
    same = (label[:, None] == label).float() - torch.eye(len(z), device=z.device)
    return -(same * near.log_softmax(1)).sum(1) / same.sum(1).clamp(min=1)


def class_loss(embedding, scores, part, cfg, prior):
    """EDIT HERE: the mean loss of a batch's embeddings [n, d] and scores [n, classes]; part["label"] holds the classes.

    prior [classes]: the logarithm of each class's share, added to the scores in training where classes are to count alike
    (logit adjustment: Menon et al., 2021); zeros without --balance.
    """
    label = part["label"]
    if cfg.loss == "arcface":  # Deng et al., 2019: the angle to the own class counts as larger by a margin
        own = F.one_hot(label, scores.shape[1]).bool()
        angle = (scores / ARC_SCALE).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        scores = torch.where(own, ARC_SCALE * (angle + ARC_MARGIN).clamp(max=math.pi).cos(), scores)
    loss = F.cross_entropy(scores + prior, label, label_smoothing=cfg.smoothing if cfg.loss == "ce" else 0.0, reduction="none")
    if cfg.mixup:
        other = F.cross_entropy(scores + prior, label.roll(1), label_smoothing=cfg.smoothing, reduction="none")
        loss = loss + part["mix"] * (other - loss)
    if cfg.loss == "supcon":
        loss = loss + supervised_contrast(F.normalize(embedding), label)
    return loss.mean()


# --- metrics: what a batch of scores or embeddings is worth ---------------------------------------------------------------
def classification(scores, label):
    """{accuracy, balanced_accuracy, macro_auc, kappa, ece} of scores [n, classes] and true classes [n].

    balanced_accuracy: mean recall of the classes that occur. macro_auc: mean area under the ROC curve of each class against
    the rest, ties count half. kappa: Cohen's with quadratic weights, for classes in their natural order (grades). ece: expected
    calibration error (Guo et al., 2017), 15 bins of the greatest probability.
    """
    p, classes = scores.cpu().double().softmax(1), scores.shape[1]
    label = label.cpu()
    table = confusion(p.argmax(1), label, classes).double()
    seen = table.sum(1) > 0
    metrics = {"accuracy": float(table.trace() / table.sum())}
    metrics["balanced_accuracy"] = float((table.diagonal() / table.sum(1).clamp(min=1))[seen].mean())
    metrics["macro_auc"] = float(areas(p, label).nanmean())
    grid = torch.arange(classes, dtype=torch.float64)
    cost = (grid[:, None] - grid) ** 2
    chance = (cost * table.sum(1)[:, None] * table.sum(0)).sum() / table.sum()
    metrics["kappa"] = 1 - float((cost * table).sum() / chance)
    top, guess = p.max(1)
    bins = (top * 15).ceil().long().clamp(1, 15) - 1
    gap = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, top - (guess == label).double())
    return metrics | {"ece": float(gap.abs().sum() / len(label))}


def confusion(guess, label, classes):
    """[classes, classes] counts; rows are the true classes."""
    return torch.bincount(label * classes + guess, minlength=classes**2).view(classes, classes)


def areas(p, label):
    """Area under the ROC curve of each class against the rest, ties count half; not a number where one side is empty."""
    out = []
    for c, column in enumerate(p.unbind(1)):
        own, rest = column[label == c].contiguous(), column[label != c].sort().values
        both = torch.searchsorted(rest, own) + torch.searchsorted(rest, own, right=True)
        out.append(both.double().mean() / (2 * len(rest)) if len(rest) and len(own) else torch.tensor(math.nan))
    return torch.stack(out).double()


def separation(x, label, k=5, chunk=1024, check=lambda: None):
    """How well the classes [n] lie apart in embeddings x [n, d], by Euclidean distance; no distance is kept for more than
    `chunk` rows at once.

    map_at_r: mean average precision at R (Musgrave et al., "A metric learning reality check", 2020); precision_at_1; knn: share
    whose class the k nearest others name (ties: the nearer ones); silhouette (Rousseeuw, 1987); fisher: squared distances
    between over those within classes, tr(S_b) / tr(S_w); intra and inter: mean distance of two images of one class, of two
    classes. What needs two images of a class or two classes is left out where there are none. Equal distances come in random
    order, so that embeddings which are all alike score as chance.
    """
    if len(x) < 2:
        return {}
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    x, label = x[order].float(), label.to(x.device)[order].unique(return_inverse=True)[1]
    x, n = x - x.mean(0), len(x)
    member = F.one_hot(label).float()
    count = member.sum(0)
    most = min(n - 1, max(int(count.max()) - 1, k))
    place, sums, rows = torch.arange(1, most + 1, device=x.device), [], []
    how = "donot_use_mm_for_euclid_dist" if x.is_cuda else "use_mm_for_euclid_dist_if_necessary"  # TF32 is coarse
    for at in range(0, n, chunk):
        check()
        part, mine = x[at : at + chunk], label[at : at + chunk]
        far = torch.cdist(part, x, compute_mode=how)
        itself = (torch.arange(len(part), device=x.device), torch.arange(at, at + len(part), device=x.device))
        far[itself] = 0
        sums.append(far @ member)
        far[itself] = math.inf
        near = label[far.topk(most, largest=False).indices]
        hit = (near == mine[:, None]).float()
        r = count[mine] - 1
        average = (hit * hit.cumsum(1) / place * (place <= r[:, None])).sum(1) / r
        votes = torch.zeros(len(part), len(count), device=x.device)
        votes.scatter_add_(1, near[:, :k], (1 + 1e-3 / place[:k].float()).expand(len(part), -1))
        rows.append(torch.stack([average, hit[:, 0], (votes.argmax(1) == mine).float()], 1))
    rows, sums = torch.cat(rows), torch.cat(sums)
    own, lone = sums.gather(1, label[:, None])[:, 0], count[label] < 2
    metrics = dict(zip(("map_at_r", "precision_at_1", "knn"), rows[~lone].mean(0).tolist()))
    metrics["knn"] = float(rows[:, 2].mean())
    others = (sums / count).scatter(1, label[:, None], math.inf)
    a, b = own / (count[label] - 1).clamp(min=1), others.amin(1)
    metrics["silhouette"] = float(((b - a) / torch.maximum(a, b).clamp(min=1e-12)).masked_fill(lone, 0).mean())
    centres = (member.T @ x) / count[:, None]
    between, within = (count * centres.square().sum(1)).sum(), (x - centres[label]).square().sum()
    metrics["fisher"] = float(between / within) if len(count) > 1 else math.nan
    pairs = (count * (count - 1)).sum()
    metrics |= {"intra": float(own.sum() / pairs), "inter": float((sums.sum() - own.sum()) / (n * (n - 1) - pairs))}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


# --- evaluation -------------------------------------------------------------------------------------------------------
def at_once(side):
    """How many images an evaluation takes at once."""
    return max(1, min(256, 2**22 // side**2))


@torch.no_grad()
def look(net, images, run):
    """(embeddings of length 1 [n, d], scores [n, classes]) of `Pictures`, on the device."""
    rows, group = [], at_once(images.size)
    for at in range(0, len(images), group):
        run.check()
        x = images.take(range(at, min(at + group, len(images)))).to(run.device)
        with run.autocast():
            rows.append(net(x.permute(0, 3, 1, 2).float()))
    e, scores = (torch.cat(r).float() for r in zip(*rows))
    return F.normalize(e), scores


def assess(parts, val, cfg, run):
    """All metrics of the averaged weights on held-out images, and the seconds that they took; keeps the best weights."""
    start = time.monotonic()
    with parts.times("metrics"):
        val.embedding, val.scores = look(parts.ema.model, val, run)
        metrics = classification(val.scores, val.labels)
        few = torch.tensor(evenly(len(val), JUDGED))
        order = val.labels.argsort(stable=True)[few]  # as many of each class as there are
        metrics |= separation(val.embedding[order.to(run.device)], val.labels[order], check=run.check)
    metrics = {k: v for k, v in metrics.items() if math.isfinite(v)} | {"metric_seconds": time.monotonic() - start}
    metrics |= parts.times.shares()
    run.judge("balanced_accuracy" if cfg.balance else "accuracy", metrics, parts.ema.model.state_dict())
    return metrics


class Times:
    """Where the time of a run goes: `with times("metrics"):` around a part, `shares()` of all of it.

    Kernels of a GPU are waited for in one of 16 updates only, and what was measured there stands for all.
    """

    def __init__(self, run):
        self.run, self.spent, self.start, self.update = run, {}, time.monotonic(), 0

    @contextmanager
    def __call__(self, part, sampled=False):
        every = 16 if sampled and self.run.kind == "cuda" else 1
        self.update += sampled
        if self.run.planned or self.update % every:
            yield
            return
        wait = torch.cuda.synchronize if self.run.kind == "cuda" else int
        wait()
        start = time.monotonic()
        yield
        wait()
        self.spent[part] = self.spent.get(part, 0.0) + every * (time.monotonic() - start)

    def batches(self, batches):
        """The batches, with the time that they are waited for."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.spent["data"] = self.spent.get("data", 0.0) + time.monotonic() - start
            if batch is None:
                return
            yield batch

    def shares(self):
        """{time_data, time_augment, time_metrics, time_pictures, time_compute}, adding up to 1."""
        whole = max(time.monotonic() - self.start, 1e-9)
        shares = {f"time_{k}": min(self.spent.get(k, 0.0) / whole, 1.0) for k in ("data", "augment", "metrics", "pictures")}
        return shares | {"time_compute": max(0.0, 1 - sum(shares.values()))}


def bottleneck(shares, cfg, resident=True):
    """A line: where the time went, and the setting that would change it most."""
    text = ", ".join(f"{k[5:]} {v:.0%}" for k, v in shares.items())
    advice = {
        "data": "Waiting for data costs most that can be changed: "
        + (
            "a larger --batch_size (with --fresh)."
            if resident
            else "--num_workers 8, a smaller --target_size, or files on a local disk."
        ),
        "augment": "Augmentation costs much: --cutout 0 --zoom 0 (with --fresh) is faster.",
        "metrics": f"Metrics cost much: --metrics_every {2 * cfg.metrics_every}.",
        "pictures": f"Embeddings and pictures cost much: --embed_every {2 * cfg.embed_every}.",
    }
    worst = max(advice, key=lambda k: shares[f"time_{k}"])
    if shares[f"time_{worst}"] > 0.15:
        return f"Time: {text}. {advice[worst]}"
    cure = "--use_amp, " * (cfg.use_amp is False) + "--arch baseline, " * (cfg.arch == "convnext")
    cure += f"--base_channels {max(8, cfg.base_channels * 3 // 4)}"
    return f"Time: {text}. The network itself is what costs; faster (with --fresh): {cure}."


# --- pictures ---------------------------------------------------------------------------------------------------------
def chart(path, size, draw):
    """Write a PNG of what draw(axis, figure) draws; names are taken as they are, in a font that has them if there is one."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    here, wanted = {f.name for f in fontManager.ttflist}, "DejaVu Sans,Noto Sans CJK SC,Microsoft YaHei,PingFang SC,SimHei"
    fonts = {"font.family": [n for n in wanted.split(",") if n in here], "text.parse_math": False}
    with warnings.catch_warnings(), matplotlib.rc_context(fonts):
        warnings.simplefilter("ignore")  # a glyph that no font has
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), figure)
        figure.savefig(path, dpi=100, format="png")


def draw_scatter(e, label, names, path):
    """A PNG of embeddings [n, d] in the plane in which the classes' means lie furthest apart (principal axes of the means)."""
    e, label = e.cpu().double(), label.cpu()
    seen = label.unique()
    means = torch.stack([e[label == c].mean(0) for c in seen])
    axes = torch.linalg.svd(means - means.mean(0), full_matrices=False)[2][:2]
    axes = torch.cat([axes, axes.new_zeros(2 - len(axes), e.shape[1])])
    flat, middle = ((t - e.mean(0)) @ axes.T for t in (e, means))

    def draw(axis, figure):
        for c, centre in zip(seen.tolist(), middle):
            own = flat[label == c][:500]
            dots = axis.scatter(own[:, 0], own[:, 1], s=9, alpha=0.6, linewidths=0)
            if len(seen) <= 40:
                axis.annotate(names[c], centre.tolist(), color="black", ha="center", fontsize=9,
                    bbox={"fc": "white", "ec": dots.get_facecolor()[0], "alpha": 0.85, "pad": 1.5})  # fmt: skip
        axis.set(title="held-out embeddings, in the plane of the class means", xticks=[], yticks=[])

    chart(path, (8, 7), draw)


def draw_confusion(table, names, path):
    """A PNG of a confusion matrix: rows are the true classes, colours shares of a row, numbers counts."""
    share = (table.double() / table.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = max(4.5, min(0.45 * len(names) + 2.5, 24))

    def draw(axis, figure):
        figure.colorbar(axis.imshow(share, cmap="Blues", vmin=0, vmax=1), shrink=0.7)
        if len(names) <= 40:
            for row, column in (table > 0).nonzero().tolist():
                axis.text(column, row, int(table[row, column]), ha="center", va="center", fontsize=7,
                    color="white" if share[row, column] > 0.5 else "black")  # fmt: skip
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(xlabel="predicted", ylabel="true")

    chart(path, (side + 1, side), draw)


def suspects(val, names, most=200):
    """Held-out images that are taken for another class, the surest first, as dicts; `maybe_mislabelled` where most of the five
    nearest other images are of that class too: then the label may be wrong, and not the network."""
    p, label = val.scores.softmax(1).cpu(), val.labels
    top, guess = p.max(1)
    doubt = (top - p.gather(1, label[:, None])[:, 0]).masked_fill(guess == label, -1.0)
    rows = []
    for i in doubt.argsort(descending=True)[: min(most, int((guess != label).sum()))].tolist():
        near = (val.embedding @ val.embedding[i]).cpu()
        near[i] = -math.inf
        near = near.topk(min(5, len(near) - 1)).indices
        row = {"file": val.name(i), "label": names[label[i]], "said": names[guess[i]], "probability": round(float(top[i]), 4)}
        share = float((label[near] == guess[i]).float().mean()) if len(near) else 0.0
        rows.append(row | {"maybe_mislabelled": int(share > 0.5), "index": i, "near": near.tolist()})
    return rows


def show(parts, val, names, cfg, run):
    """Write what can be looked at: embeddings, scatter, confusion matrix, worst errors, each with the update in its name, and
    classes.csv and errors.csv of the newest."""
    with parts.times("pictures"):
        tag, folder = f"{run.step:06d}", run.folder
        p, files = val.scores.softmax(1).cpu(), [val.name(i) for i in range(len(val))]
        table, auc = confusion(p.argmax(1), val.labels, len(names)), areas(p, val.labels).tolist()
        arrays = {"embedding": val.embedding.cpu().numpy(), "probability": p.numpy(), "label": val.labels.numpy()}
        arrays |= {"classes": np.array(names), "files": np.array(files)}
        write_aside(folder / f"embeddings-{tag}.npz", lambda f: np.savez_compressed(f, **arrays))
        write_aside(folder / f"scatter-{tag}.png", lambda f: draw_scatter(val.embedding, val.labels, names, f))
        write_aside(folder / f"confusion-{tag}.png", lambda f: draw_confusion(table, names, f))
        said, here, right = table.sum(0).tolist(), table.sum(1).tolist(), table.diagonal().tolist()
        rows = [[n, here[c], right[c] / here[c] if here[c] else "", right[c] / said[c] if said[c] else "", auc[c]]
            for c, n in enumerate(names)]  # fmt: skip
        worst, keys = suspects(val, names), ["file", "label", "said", "probability", "maybe_mislabelled"]
        if run.step:  # the tables carry no update in their names
            write_csv(folder / "classes.csv", ["class", "images", "recall", "precision", "auc"], rows)
            write_csv(folder / "errors.csv", keys, [[row[k] for k in keys] for row in worst])
        if worst:
            cells = [[*val.take([row["index"], *row["near"]]).cpu().numpy()] for row in worst[:16]]
            texts = [f"is {r['label']}, said {r['said']} {r['probability']:.0%}" + ", wrong label?" * r["maybe_mislabelled"]
                for r in worst[:16]]  # fmt: skip
            sheet = picture(cells, ["image"] + ["nearest"] * (len(cells[0]) - 1), max(1, 64 // cfg.target_size), texts)
            write_aside(folder / f"errors-{tag}.png", lambda f: sheet.save(f, "PNG"))


def write_csv(path, head, rows):
    """Write a table as UTF-8 CSV, aside first."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    write_aside(path, lambda f: f.write(text.getvalue().encode("utf-8-sig")))  # Excel wants the mark


# --- training ---------------------------------------------------------------------------------------------------------
def build(cfg, run):
    """Network, EMA and optimizer with its state, on the run's device."""
    torch.manual_seed(cfg.seed)
    with run.device:
        net = Net(cfg, len(json.loads(cfg.names or "[]")) or 10)
    for p in net.parameters() if cfg.arch == "baseline" else ():  # ConvNeXt is in that order by itself
        p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
    for block in (m for m in net.modules() if isinstance(m, Block)):
        block.plain = run.kind == "cpu"  # there the weights' gradient of a depthwise convolution is slower in bf16
    parts = Parts(model=net, ema=EMA(net, 0.995), times=Times(run))
    parts.opt, parts.peak = make_optimizer(net, cfg, run)
    parts.prior = torch.zeros(len(net.head.weight), device=run.device)
    run.compile(net)
    return parts


def prepare(parts, data, cfg, run):
    """What the training images decide: mean, deviation and the first layer before update 1; --balance's prior."""
    if cfg.balance:
        share = torch.bincount(data.labels, minlength=len(parts.prior)).double() / len(data)
        parts.prior = share.clamp(min=1e-9).log().float().to(run.device)
    if run.saved < 0:
        few = evenly(len(data), max(16, min(2000, 2**21 // cfg.target_size**2)))
        x = data.take(few).to(run.device).permute(0, 3, 1, 2).float()
        for net in (parts.model, parts.ema.model):
            net.mean.copy_(x.mean((0, 2, 3), keepdim=True))
            net.std.copy_(x.std((0, 2, 3), keepdim=True).clamp(min=1))
        parts.model.body.stem.fit((x - parts.model.mean) / parts.model.std)  # the average shares these weights


def example_batch(cfg, run):
    """A random batch of the shapes and types that `Pictures` makes."""
    n, s = cfg.batch_size * cfg.accumulate, cfg.target_size
    image = torch.randint(256, (n, s, s, 3), dtype=torch.uint8, device=run.device)
    zeros = torch.zeros(n, dtype=torch.int64, device=run.device)
    return {"image": image, "label": zeros, "index": zeros}


def train_step(parts, batch, cfg, run):
    """One update from a batch of `Pictures`; returns `loss`, `right` (the share of the batch that is classified right) and
    `norm` as scalar tensors. Exceptions from exact accumulation: batch normalisation, mixup and the contrastive loss see the
    images of one forward pass."""
    run.anneal(parts.opt, "linear", warmup=0.1)
    net, views = run.net(parts.model), 2 if cfg.loss == "supcon" else 1
    u = run.draw("rand", (len(batch["image"]), 8 * views))
    ready = {"image": batch["image"], "label": batch["label"], "u": u, "mix": u[:, 5] * cfg.mixup / 2}

    def loss_fn(part):
        with parts.times("augment", sampled=True), torch.no_grad():
            x = torch.cat([augment(part["image"], v, cfg, parts.model.mean) for v in part["u"].split(8, 1)])
        if cfg.mixup:
            share = part["mix"][:, None, None, None]
            x = x + share * (x.roll(1, 0) - x)
        part = part | {"label": part["label"].repeat(views)}
        embedding, scores = net(x)
        right = (scores.argmax(1) == part["label"]).float().mean()
        return {"loss": class_loss(embedding, scores, part, cfg, parts.prior), "right": right}

    return run.update(loss_fn, ready, parts.opt, parts.model, parts.ema, 1.0 if cfg.optimizer == "adamw" else 0.0)


@torch.no_grad()
def eval_step(parts, cfg, run):
    """The largest evaluation."""
    with run.autocast():
        return parts.ema.model(torch.zeros(at_once(cfg.target_size), 3, cfg.target_size, cfg.target_size, device=run.device))


def export(parts, names, cfg, folder):
    """Write model.pt and one-file model.onnx (image: float [n, 3, s, s] in 0..255 -> embedding, of length 1, and probability);
    the ONNX file is reloaded and compared before it takes its name."""
    net = copy.deepcopy(parts.ema.model).cpu().eval()
    save_tensors(folder / "model.pt", net.state_dict())
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError:
        return say("No model.onnx: for it, pip install onnx.")
    whole, memory = Finished(net, names, cfg).eval(), io.BytesIO()  # or the exporter would leave it in training mode
    x = torch.rand(2, 3, cfg.target_size, cfg.target_size, generator=torch.Generator().manual_seed(0)) * 255
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that writes one file is called deprecated
        torch.onnx.export(
            whole, (x,), memory, dynamo=False, opset_version=17, input_names=["image"],
            output_names=["embedding", "probability"],
            dynamic_axes=dict.fromkeys(("image", "embedding", "probability"), {0: "n"}),
        )  # fmt: skip

    def check(part):
        again = ReferenceEvaluator(onnx.load(part)).run(None, {"image": x[:1].numpy()})
        gap = max(float(np.abs(a - b.detach().numpy()).max()) for a, b in zip(again, whole(x[:1])))
        if not gap < 1e-3:
            raise RecipeError(f"model.onnx would differ from the model by {gap:.1e}: try another version of torch or onnx.")

    return write_aside(folder / "model.onnx", lambda f: f.write(memory.getvalue()), check)


def wrap_up(parts, val, names, cfg, run):
    """The ending, rehearsed before update 1: evaluate, show, save and export the averaged weights. Returns the metrics."""
    with run.ending():
        metrics = assess(parts, val, cfg, run)
        run.save()
        if run.main:
            show(parts, val, names, cfg, run)
            with run.results() as folder:
                try:
                    export(parts, names, cfg, folder)
                except RecipeError as e:  # found in the rehearsal it ends the run, and later costs the file alone
                    if not run.over:
                        raise
                    say(str(e))
    return metrics


def summary(metrics):
    """The figures in one line."""
    named = {"macro_auc": "macro AUC", "ece": "ECE", "map_at_r": "embeddings: MAP@R", "knn": "5-NN", "silhouette": "silhouette"}
    figures = [f"{n} {metrics[k]:.3f}" for k, n in (named | {"fisher": "Fisher"}).items() if k in metrics]
    return f"accuracy {metrics['accuracy']:.1%}, {', '.join(figures)} ({metrics['metric_seconds']:.1f} s)"


def verdict(metrics, classes):
    """One line at 5 % of the run: does it learn?"""
    text = (
        f"5 % of the run: on average {metrics['balanced_accuracy']:.0%} of a class is right; guessing gives {1 / classes:.0%}"
    )
    if metrics["balanced_accuracy"] > min(1.5 / classes, 0.8 / classes + 0.2):
        return text + ": it learns."
    return text + ". If it stays so: does each row of data.png show one class? If so, try a third of the learning rate."


def train(cfg):
    """The whole run; returns the metrics of the averaged weights on held-out images: accuracy, map_at_r and others."""
    cfg.names = ""  # this run's data decide anew
    with Run(cfg, RECIPE) as run:
        data, val, names = open_data(cfg, run)
        parts = build(cfg, run)
        run.resume(parts, data)
        if run.finished:
            say(f"Finished before: {summary(run.finished)}. More --num_epochs or --time_budget continue it.")
            return run.finished
        prepare(parts, data, cfg, run)
        weights = sum(p.numel() for p in parts.model.parameters()) / 1e6
        say(f"{cfg.arch} of {weights:.2f} million weights, stem {cfg.stem}; {cfg.optimizer} at a peak rate of {parts.peak:.2g}"
            + (f" = {RATES[cfg.optimizer][0][cfg.arch]:g} x (samples per update / 256)"
               f"{' ^ 0.5' * (RATES[cfg.optimizer][1] < 1)}") * (not cfg.learning_rate))  # fmt: skip
        say("Before: " + summary(wrap_up(parts, val, names, cfg, run)))
        parts.times = Times(run)
        for batch in parts.times.batches(run.batches()):
            before = run.step * run.samples / len(data)
            run.advance(train_step(parts, batch, cfg, run))
            now = run.step * run.samples / len(data)
            passed = [every for every in (cfg.metrics_every, cfg.embed_every) if now // every > before // every]
            often = run.world == 1 and parts.times.shares()["time_metrics"] > 0.1  # in a short run
            if not (run.over or run.hurried) and (passed or run.due(every=math.inf if often else 0.2, at=(0.05,))):
                metrics = assess(parts, val, cfg, run)
                say(f"epoch {now:.1f}: {summary(metrics)}")
                if run.due(at=(0.05,)):
                    say(verdict(metrics, len(names)))
                if cfg.embed_every in passed and parts.times.shares()["time_pictures"] < 0.1:
                    run.write(lambda: show(parts, val, names, cfg, run))
        shares, steps = parts.times.shares(), run.step - run.first
        busy = (time.monotonic() - parts.times.start) * (1 - shares["time_metrics"] - shares["time_pictures"])
        metrics = wrap_up(parts, val, names, cfg, run) | shares
        if steps:
            speed = steps * run.samples / max(busy, 1e-9)
            metrics |= {"images_per_second": speed, "seconds_per_epoch": len(data) / speed}
            say(bottleneck(shares, cfg, data.resident))
        metrics = run.finish(metrics)
        say(f"After {run.step} updates: {summary(metrics)}. Weights, pictures and tables are in {run.folder}")
        return metrics


# --- using the result -------------------------------------------------------------------------------------------------
class Finished(nn.Module):
    """A trained net: images [n, 3, s, s] in 0..255 (uint8 or float) -> (embeddings of length 1, probabilities)."""

    def __init__(self, net, names, cfg):
        super().__init__()
        self.net, self.names, self.size = net, names, cfg.target_size

    def forward(self, images):
        embedding, scores = self.net(images.float())
        return F.normalize(embedding), scores.softmax(1)


def load(run_dir, device="cpu"):
    """The trained (EMA) model of a run folder in eval mode, a `Finished`."""
    with trained_weights(run_dir, RECIPE, Config, "model.pt", "best.pt") as (cfg, path):
        state, names = load_tensors(path), json.loads(cfg.names)
        net = Net(cfg, len(names))
        net.load_state_dict(state["model"] if path.name == "best.pt" else state)
    return Finished(net, names, cfg).to(device).eval()


@torch.no_grad()
def embed(cfg):
    """Write predictions.csv and embeddings.npz of a picture or a folder into <run folder>/embedded; returns the rows."""
    folder = Path(cfg.out_dir or f"results/{RECIPE}").expanduser()
    if not cfg.out_dir and not (folder / "settings.json").exists():
        folder = folder.with_name(folder.name + "-demo")
    run, source = Run(cfg, RECIPE), Path(cfg.embed).expanduser()
    model = load(folder, run.device)
    files = [source] if source.is_file() else find_images(source, "pictures")
    rows, vectors, group = [], [], at_once(model.size)
    for at in range(0, len(files), group):
        given = []
        for path in files[at : at + group]:
            try:
                given.append((path, load_picture({"image": path}, model.size)))
            except UNREADABLE as e:
                say(f"Left out {path}: {e}")
        if given:
            x = torch.from_numpy(np.stack([image for _, image in given])).to(run.device).permute(0, 3, 1, 2)
            e, p = (t.cpu() for t in model(x))
            vectors += [*e.numpy()]
            rows += [[str(path), model.names[int(q.argmax())], round(float(q.max()), 4)] for (path, _), q in zip(given, p)]
    if not rows:
        raise RecipeError(f"Nothing to embed: {source} holds no readable picture.")
    place = folder / "embedded"
    place.mkdir(exist_ok=True)
    write_csv(place / "predictions.csv", ["file", "class", "probability"], rows)
    arrays = {"embedding": np.stack(vectors), "files": np.array([r[0] for r in rows])}
    write_aside(place / "embeddings.npz", lambda f: np.savez_compressed(f, **arrays))
    for row in rows[:5]:
        say(f"{row[0]}: {row[1]} ({row[2]:.0%})")
    say(f"{len(rows)} predictions and embeddings are in {place}")
    return rows


def compare(cfg):
    """Train baseline and convnext in fp32 and half precision, each in a run and process of its own and for the same time;
    writes comparison.csv and comparison.png beside their folders and returns the rows."""
    if cfg.deadline or cfg.session_limit or cfg.mirror_dir:
        raise RecipeError(
            "--compare runs four times: give --time_budget for each, not --deadline, --session_limit or --mirror_dir.", 2
        )
    top, fields = Path(cfg.out_dir or f"results/{RECIPE}-compare").expanduser(), Config.__dataclass_fields__
    changed = {k for k in fields if getattr(cfg, k) != getattr(Config, k)} - {"target_size", "batch_size", "stem", "num_epochs"}
    own = {"compare", "embed", "out_dir", "arch", "use_amp", "names"}
    given = {k: getattr(cfg, k) for k in fields if k in getattr(cfg, "given", changed) and k not in own}
    if not cfg.time_budget and not {"num_epochs", "num_steps"} & set(given):
        given["time_budget"] = "3m"
    say(f"Four runs, each {given.get('time_budget') or 'as long as the flags say'}; their folders are in {top}")
    rows = []
    for arch, amp in (("baseline", False), ("baseline", True), ("convnext", False), ("convnext", True)):
        name = f"{arch}-{'amp' if amp else 'fp32'}"
        mine = given | {"arch": arch, "use_amp": amp, "out_dir": str(top / name)}
        words = [f"--{k}={int(v) if isinstance(v, bool) else v}" for k, v in mine.items()]
        say(f"--- {name}: {shlex.join(words)}")
        if globals().get("__file__") and "ipykernel" not in sys.modules:
            metrics = in_process([sys.executable, os.path.abspath(__file__), *words], top / name)
        else:  # a notebook cell; a process's greatest RAM never falls, so that it tells nothing here
            metrics = train(dataclasses.replace(cfg, **{"stem": 0} | mine | {"compare": False}))
            metrics["peak_memory_gib"] = metrics["peak_memory_gib"] if torch.cuda.is_available() else math.nan
        rows.append({"run": name} | {k: metrics.get(k, math.nan) for k in COLUMNS})
    lines = [[r["run"], *(form.format(r[k]) for k, (_, form) in COLUMNS.items())] for r in rows]
    head = ["run", *(title for title, _ in COLUMNS.values())]
    write_csv(top / "comparison.csv", ["run", *COLUMNS], [list(r.values()) for r in rows])
    write_aside(top / "comparison.png", lambda f: draw_table(head, lines, f))
    for line in (head, *lines):
        say("  ".join(f"{cell:>{12 if k else 14}}" for k, cell in enumerate(line)))
    say(f"The table is in {top / 'comparison.csv'}, as a picture in comparison.png")
    return rows


def in_process(words, folder):
    """Train in a process of its own; returns its metrics. RecipeError where it was stopped: it has saved, and goes on later."""
    child = subprocess.Popen(words)
    wanted = {"SIGINT": lambda *_: None, "SIGTERM": lambda n, _: child.send_signal(n)}  # a terminal's Ctrl-C reaches it anyway
    wanted["SIGUSR1"] = wanted["SIGTERM"]
    before = {n: signal.signal(n, f) for n, f in ((getattr(signal, k, None), f) for k, f in wanted.items()) if n}
    try:
        child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if child.returncode in (130, 138, 143):
        raise RecipeError("Stopped and saved; the same command, without --fresh, goes on from it.", child.returncode)
    metrics = read_json(folder / "metrics.json")
    if child.returncode or not metrics:
        raise RecipeError(f"The run in {folder} ended early, as said above; mend that and run the same command again.")
    return metrics


COLUMNS = {  # of the comparison: figure -> (title, form)
    "accuracy": ("accuracy", "{:.1%}"), "map_at_r": ("MAP@R", "{:.3f}"), "seconds_per_epoch": ("s per epoch", "{:.2f}"),
    "images_per_second": ("images/s", "{:.0f}"), "peak_memory_gib": ("peak GiB", "{:.2f}"), "seconds": ("seconds", "{:.0f}"),
}  # fmt: skip


def draw_table(head, lines, path):
    """A PNG of a table of texts."""

    def draw(axis, figure):
        axis.axis("off")
        axis.table(lines, colLabels=head, loc="center", cellLoc="center").scale(1, 1.5)

    chart(path, (1.35 * len(head), 0.4 * len(lines) + 0.6), draw)


def begin(cfg):
    """What the flags ask for."""
    if (cfg.compare or cfg.embed) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("--compare and --embed take one process: start them with python, not torchrun.", 2)
    return compare(cfg) if cfg.compare else embed(cfg) if cfg.embed else train(cfg)


if __name__ == "__main__":
    main(begin, Config, __doc__)
