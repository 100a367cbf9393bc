"""Damaged, hostile and silly inputs against everything that reads what a user gives: flags, pictures, lists, scans, weights
and run folders.

Whatever comes in, it is taken or refused in a sentence, as `common.main` would print it: no traceback, no hang, no code
that a file carries, nothing touched outside the folder of the trial, no memory but what the data need. A test draws few
inputs and `benchmarks/soak.py` thousands, from the same functions:

    for name, fuzz in FAMILIES.items():
        print(name, fuzz(folder, examples=1000, seed=0))  # {"inputs": 1000, "accepted": ..., "refused": ...}
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import sys
import time
import types
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image

import common
from common import UNREADABLE, RecipeError

LIMIT = 20.0  # seconds for one input
ROOM = 2**30  # bytes that the peak memory may grow by during one input; all inputs are small
RECIPES = ("train_ultrafast_srcnn", "train_realesrgan_optimized", "train_nextdit_fast", "train_nextdit_ultrafast",
    "finetune_pretrained", "train_latent_cfg", "train_convnext", "train_autoencoder3d")  # fmt: skip


def recipe(name):
    """A recipe by its name, `SRCNN` or `train_ultrafast_srcnn`."""
    return importlib.import_module(next(n for n in RECIPES if name in n))


# --- what is watched while an input is tried --------------------------------------------------------------------------
class Hung(BaseException):
    """An input took longer than LIMIT. No Exception, so that no handler on the way takes it for a damaged file."""


CODE = ("os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty pty.spawn subprocess.Popen socket.connect socket.bind "
    "socket.sendto socket.getaddrinfo pickle.find_class os.startfile webbrowser.open urllib.Request").split()  # fmt: skip
WRITES = {"os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.truncate": ((0, 9),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
    "os.utime": ((0, 3),)}  # the places of a path and of the folder that it is relative to  # fmt: skip
watched = types.SimpleNamespace(folder="", seen=None, hooked=False, counts=Counter())


def hook(event, args):
    """Audit hook of the whole process: notes programs that start, connections, and what is written outside the folder."""
    if watched.seen is None:
        return
    if event in CODE:
        watched.seen.append(f"{event} {args!r:.300}")
    places = WRITES.get(event, ())
    if event == "open" and (set(str(args[1] or "")) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        places = ((0, 9),)
    for at, base in places:
        folder = args[base] if base < len(args) and isinstance(args[base], int) and args[base] >= 0 else None
        if isinstance(args[at], int) or os.fspath(args[at]) in (os.devnull, os.fsencode(os.devnull)):
            continue  # a file that is open already
        here = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        path = os.path.abspath(os.path.join(here, os.fsdecode(args[at])))
        if os.path.commonpath([path, watched.folder]) != watched.folder:
            watched.seen.append(f"{event} {path}")


def fail(text):
    """A violation; a search for further ones may replace this."""
    raise AssertionError(text)


def peak():
    """Peak memory of this process in bytes; 0 where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def refused(error, low=()):
    """Whether an exception ends in a sentence: of `common.main`, or one of `low`, for which a reader's caller has one."""
    if low or isinstance(error, RecipeError):
        return isinstance(error, low) or (isinstance(error, RecipeError) and str(error).strip() != "")
    told = isinstance(error, (RuntimeError, MemoryError)) and (common.is_out_of_memory(error) or "home directory" in str(error))
    return told or (isinstance(error, OSError) and error.filename is not None)


def attempt(told, call, low=()):
    """Whether call() went well (else it was refused); a violation names the input, `told`."""

    def hung(*_):
        raise Hung

    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", "replace")  # as `common.main` sets it up
    before, start, error = peak(), time.monotonic(), None
    old, watched.seen = signal.signal(signal.SIGALRM, hung), []
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except BaseException as e:
        error = e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        seen, watched.seen = watched.seen, None
    grown, told = peak() - before, f"{told!r:.1500}" if not isinstance(told, str) else told
    if isinstance(error, Hung) or time.monotonic() - start > LIMIT:
        fail(f"{told}: no end after {LIMIT:g} s")
    elif isinstance(error, KeyboardInterrupt):
        raise error
    elif seen or (Path(watched.folder) / "canary").exists():
        fail(f"{told}: ran code or left its folder: {seen[:3]}")
    elif grown > ROOM:
        fail(f"{told}: took {grown / 2**30:.1f} GiB")
    elif error and not refused(error, low):
        try:
            fail(f"{told}: {type(error).__name__}: {error!s:.300}")
        except AssertionError as e:
            raise e from error  # with the traceback that a user would have seen
    watched.counts["refused" if error else "accepted"] += 1
    return error is None


def drive(folder, examples, seed, strategy, body):
    """Call body(input, empty folder) with inputs of a strategy; returns the counts."""
    if not watched.hooked:
        sys.addaudithook(hook)  # once: nothing takes an audit hook away again
        watched.hooked = True
    folder = Path(os.path.realpath(folder))
    work, watched.folder, watched.counts = folder / "work", str(folder), Counter(inputs=0, accepted=0, refused=0)
    hypothesis.configuration.set_hypothesis_home_dir(str(folder / "hypothesis"))

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def trial(value):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        watched.counts["inputs"] += 1
        body(value, work)

    here, silent, was = os.getcwd(), sys.dont_write_bytecode, dict(os.environ)
    try:
        os.chdir(folder)
        sys.dont_write_bytecode = True  # a module imported within a trial is no file that the trial wrote
        trial()
    finally:
        os.chdir(here)
        sys.dont_write_bytecode = silent
        os.environ.clear()
        os.environ.update(was)
    return dict(watched.counts)


# --- how bytes are damaged --------------------------------------------------------------------------------------------
SHARE = st.floats(0, 1)
LETTERS = "aZ09 _-=.,:;/\\\"'%{}[]()<>*?~#@|$\t\n\r\0\x1b\x7f\x85é²٣ßİ照片😀\u200b\u202e\ufeff\udcd5"  # fmt: skip
TEXT = st.text(LETTERS, max_size=9)
NUMBERS = (0, 1, 2, 3, 8, 255, 60000, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1)
STEPS = st.one_of(st.tuples(st.just("cut"), SHARE), st.tuples(st.just("bit"), SHARE, st.integers(0, 7)),
    st.tuples(st.just("byte"), st.integers(0, 400), st.integers(0, 255)), st.tuples(st.just("number"), st.integers(0, 400),
    st.sampled_from(NUMBERS), st.sampled_from(("<I", ">I", "<H", ">H", "<Q"))), st.tuples(st.just("put"), SHARE,
    st.binary(max_size=12)), st.tuples(st.just("drop"), SHARE, st.integers(1, 64)), st.tuples(st.just("again"), SHARE),
    st.tuples(st.just("splice"), SHARE, st.integers(0, 99)),)  # fmt: skip
DAMAGE = st.lists(STEPS, max_size=3)


def damage(data, steps, pool=()):
    """Bytes after steps of damage; a splice goes on with one of the `pool`."""
    for kind, where, *more in steps:
        at = min(where if isinstance(where, int) else int(where * len(data)), len(data))
        if kind == "cut":
            data = data[:at]
        elif kind in ("bit", "byte") and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << more[0] if kind == "bit" else more[0]]) + data[at + 1 :]
        elif kind in ("number", "put"):
            new = struct.pack(more[1], more[0] % 2 ** (8 * struct.calcsize(more[1]))) if kind == "number" else more[0]
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "drop":
            data = data[:at] + data[at + more[0] :]
        elif kind == "again":
            data = data[:at] + data
        elif kind == "splice" and pool:
            data = data[:at] + pool[more[0] % len(pool)][at:]
    return data


def mend_png(data):
    """A PNG whose checksums fit what stands in it, so that damage gets past them."""
    out, at = data[:8], 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        out, at = out + data[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big"), at + 12 + size
    return out if at > 8 else data


class Payload:
    """Makes the folder `canary` when it is unpickled."""

    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        place = os.path.join(watched.folder, "canary")
        return {"mkdir": (os.mkdir, (place,)), "system": (os.system, (f"mkdir '{place}'",)),
            "eval": (eval, (f"__import__('os').mkdir({place!r})",)), "import": (__import__, ("antigravity",)),
            "load": (torch.load, (place, None, None, False))}[self.how]  # fmt: skip


PAYLOADS = ("mkdir", "system", "eval", "import", "load")


# --- settings ---------------------------------------------------------------------------------------------------------
PATHS = ("data_dir val_dir out_dir mask_dir continue_from mirror_dir weights vae lr_dir encoder_weights model init vgg upscale "
    "embed encode decode reconstruct").split()  # fmt: skip
PLACES = ("work/pictures", "work/list.csv", "work/gone", "work/gone.npz", "~no-such-user/x", "x" * 300, "\udcd5\udcd5", "a\nb")
VALUES = ("", " ", "0", "1", "-1", "3", "8", "64", "1e3", "nan", "inf", "-inf", "1e308", "1e400", "9" * 25, "9" * 4000,
    "9" * 5000, "٣", "²", "0x10", "1_000", "true", "OFF", "none", "auto", "6h", "1h30m", "99999999999999d", "9" * 400 + "d",
    "1.5.5h", "nand", "0001-01-01", "9999-12-31 23:59", "2026-13-01", "2099-01-01 00:00", "64,64,32", " 6 4,64,32", "64x64x32",
    "0,0,0", "1,1", "1,2,4", "1," * 3000 + "1", "16,32,64", "9" * 400 + ",1,1", "32,32,16@0.3", "32,32,16@nan perceptual",
    "guide", "cuda:1", "cuda:" + "9" * 30, "mps", "cpu", "~no-such-user/x", "../x", "x" * 300, "a\nb", "照片", "\udcd5\udcd5",
    "--seed", "=", "-", "\x1b[2J", "bf16", "fp16", "work/pictures", "work/pictures/a.png", "work/list.csv")  # fmt: skip


def flags_of(config):
    """Words of a command line, mostly settings of a `Config` with values that may be theirs, and variables."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    likely = {bool: ("1", "no"), int: ("0", "1", "4", "64", "٣", "-1", "9" * 25), float: ("0", "0.5", "inf", "1e308", "nan")}
    kinds = {n: PLACES if n in PATHS else likely.get(common._kind(config, n), VALUES) for n in fields}
    own = {n: [str(f.default), *f.metadata.get("choices", kinds[n])] for n, f in fields.items()}
    values = st.one_of(st.sampled_from(VALUES), TEXT, st.integers().map(str), st.floats().map(str))

    def words(name, form, value, mine):
        value = str(own[name][mine % len(own[name])]) if mine is not None else value
        if name in PATHS and os.path.isdir(os.path.expanduser(value)) and not value.startswith("work"):
            value = "work/nowhere"  # not a search through the whole disk
        forms = ([f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"--no-{name}"], [f"--no_{name}={value}"],
            [f"--{name.replace('_', '-')}", value], [f"-{name}", value], [f"{name}={value}"])  # fmt: skip
        return forms[form]

    mine = st.integers(0, 99)
    sane = st.tuples(
        st.sampled_from(sorted(fields)),
        st.sampled_from((*[0] * 12, 1, 1, 1, 2, 3, 4, 5, 6, 7)),
        values,
        mine | mine | st.none(),
    )
    flag = st.one_of(*[sane.map(lambda a: words(*a))] * 9, st.lists(TEXT, min_size=1, max_size=2))
    variables = st.dictionaries(st.sampled_from(sorted(n.upper() for n in fields if n not in PATHS)), values, max_size=1)
    return st.tuples(st.lists(flag, max_size=3).map(lambda a: sum(a, [])), st.just({}) | st.just({}) | variables)


def fuzz_settings(folder, examples, seed):
    """Flags and variables of all recipes: parsed, and what a run makes of them before it has read any data."""
    kinds = st.sampled_from((None, "cpu", "cuda"))
    choices = [st.tuples(st.just(n), flags_of(recipe(n).Config), kinds) for n in RECIPES]

    def use(name, words, kind, work):
        module = recipe(name)
        cfg = common.parse(module.Config, module.__doc__, words)
        if cfg is not None:
            run = common.Run(cfg, module.RECIPE, kind)
            run.data, run.step_time = range(100), 0.1
            run.clock = common.Clock(*map(common.duration, (cfg.time_budget,)), common.moment(cfg.deadline))
            torch.manual_seed(cfg.seed)
            run._share()
            common.clock_text(run.eta())
            common.write_json(work / "settings.json", dataclasses.asdict(cfg) | {"command": words})

    def body(value, work):
        name, (words, variables), kind = value
        (work / "pictures").mkdir()
        (work / "pictures" / "a.png").write_bytes(pictures()["gray.png"])
        (work / "list.csv").write_text("image\npictures/a.png\n")
        with mock.patch.dict(os.environ):
            for key, text in variables.items():
                with contextlib.suppress(ValueError):  # no shell can set that
                    os.environ[key] = text
            attempt(value, lambda: use(name, words, kind, work))

    return drive(folder, examples, seed, st.one_of(choices), body)


# --- pictures ---------------------------------------------------------------------------------------------------------
@functools.cache
def pictures():
    """{name: bytes} of small pictures of every kind that is read, and of what is none."""
    ramp = np.linspace(0, 255, 24 * 20).reshape(24, 20).astype(np.uint8)
    colour, exif, made = np.stack([ramp, 255 - ramp, ramp // 2], 2), Image.Exif(), {}
    exif[0x0112], exif[0x010E] = 6, "a text"
    deep, alpha = ramp.astype(np.uint16) * 257, np.dstack([colour, ramp])
    for name, array, mode, more in (("gray.png", ramp, "", {}), ("deep.png", deep, "", {}), ("colour.png", colour, "",
        {"exif": exif}), ("a.png", alpha, "", {}), ("palette.png", colour, "P", {"transparency": 3}), ("la.png", alpha, "LA",
        {}), ("bit.png", ramp > 99, "", {}), ("mask.png", np.uint8(ramp > 99) * 255, "", {}), ("c.jpg", colour, "",
        {"exif": exif}), ("k.jpg", colour, "CMYK", {}), ("g.tif", ramp, "", {}), ("lzw.tif", colour, "",
        {"compression": "tiff_lzw"}), ("f.tif", np.float32(ramp), "", {}), ("i.tif", ramp.astype(np.int32) * 70000, "", {}),
        ("nan.tif", np.where(ramp < 9, np.float32(np.inf), ramp), "", {}), ("c.bmp", colour, "", {}), ("p.gif", colour, "P",
        {}), ("many.gif", ramp, "", {"save_all": True, "append_images": [Image.fromarray(255 - ramp)] * 2}), ("c.webp", colour,
        "", {}), ("l.webp", alpha, "", {"lossless": True}), ("c.ppm", colour, "", {}), ("deep.pgm", deep, "", {}), ("lab.tif",
        colour, "LAB", {}), ("j.tif", colour, "", {"compression": "jpeg"}), ("z.tif", deep, "",
        {"compression": "tiff_adobe_deflate"})):  # fmt: skip
        image, file = Image.fromarray(array), io.BytesIO()
        if mode == "LAB":
            from PIL import ImageCms

            image = ImageCms.profileToProfile(
                image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(name.split(".")[1], name.split(".")[1].upper())
        (image.convert(mode) if mode and mode != "LAB" else image).save(file, kind, **more)
        made[name] = file.getvalue()
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # a program, not a picture
    return made | {"e.png": head, "text.png": b"P2 9 9 9 x", "empty.png": b"", "pickle.png": pickle.dumps([1]),
        "tab.ppm": b"P6\t" b"99999999 99999999 255 ",
        "x.xpm": b'/* XPM */\nstatic char *x[] = {"9 9 1 1","a c #000"};'}  # fmt: skip


def fuzz_images(folder, examples, seed):
    """Damaged pictures through every reader of pictures and masks, alone and among good ones."""
    pool, (real, fast) = pictures(), (recipe("realesrgan"), recipe("nextdit_fast"))
    names = st.sampled_from(sorted(pool))
    size = st.none() | st.tuples(*[st.sampled_from((0, 1, 3, 9000, 13000, 60000, 2**31 - 1, 2**32 - 1))] * 2)
    cfg = fast.Config(target_size=16, patch=4, device="cpu")

    def image(path):
        a = common.read_image(path)
        assert a.dtype == np.uint8 and (a.ndim == 2 or a.shape[2:] == (3,)) and a.size, (a.dtype, a.shape)

    def body(value, work):
        name, steps, mended, suffix, claim, labels = value
        path, good = work / f"x{suffix}", [work / f"{i}.png" for i in range(4)]
        data = damage(pool[name], steps, list(pool.values()))
        if claim and data[:4] == b"\x89PNG":
            data = data[:16] + struct.pack(">II", *claim) + data[24:]
        path.write_bytes(mend_png(data) if mended or claim else data)
        for p in good:
            p.write_bytes(pool["mask.png"])
        load = functools.partial(fast.load_pair, cfg=cfg, labels=labels)
        records = [{"image": p, "mask": q} for p, q in zip([path, good[0], *good], [good[0], path, *good])]
        for call in (lambda: image(path), lambda: common.read_labels(path), lambda: common.read_mask(path, labels),
            lambda: real.read_deep(path), lambda: load({"image": path, "mask": path})):  # fmt: skip
            attempt(value, call, UNREADABLE)
        for call in (lambda: common.find_labels([path, *good]), lambda: common.find_labels([path]),
            lambda: list(common.Items(records, load)), lambda: common.Items([path, good[0]],
            common.read_image)[0]):  # fmt: skip
            attempt(value, call)

    labels = st.sampled_from(([0, 255], [-128], [0, 1, 2], [0, (1 << 24) + 5, 7]))
    value = st.tuples(names, DAMAGE, st.booleans(), st.sampled_from(common.IMAGE_TYPES), size, labels)
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 2**21):  # Pillow's guard; at its 2**27 a trial takes half a minute
        return drive(folder, examples, seed, value, body)


# --- lists and folders ------------------------------------------------------------------------------------------------
def reader(name, place, work, **more):
    """Read a folder or a list with a recipe's own `open_data`, as its `train` does, and note down what it found."""
    module = recipe(name)
    size = "8,8,8" if "autoencoder" in name else 16
    cfg = module.Config(data_dir=str(place), out_dir=str(work / "run"), target_size=size, batch_size=2, device="cpu", **more)
    run = common.Run(cfg, module.RECIPE)
    run.folder.mkdir(exist_ok=True)
    module.open_data(cfg, run, *((module.open_codec(cfg, run),) if hasattr(module, "open_codec") else ()))
    common.write_json(run.folder / "settings.json", run.settings | {"settings": dataclasses.asdict(cfg)})


READERS = {"srcnn": {"scale": 2}, "realesrgan": {}, "nextdit_fast": {"patch": 4}, "latent_cfg": {"factor": 2, "mults": "1,2"},
    "convnext": {"num_blocks": 2, "stem": 2}, "autoencoder3d": {"channels": "8,8"}}  # fmt: skip


def fuzz_lists(folder, examples, seed):
    """CSV lists with every column, encoding and path, and folders with every name, through what reads a recipe's data."""
    files = ("a.png", "子 目录/图 1.png", "b.jpg", "m.png", "v.npy", "words.png", "w.nii")
    odd = (str(Path("..", "work", "a.png")), "gone.png", "子 目录", ".", "..", "/", "~/a.png", "x" * 300, "a\0b.png", "\n", '"',
        "C:a.png", "a.png ", "list.csv", "")  # fmt: skip
    cell = st.one_of(*[st.sampled_from(files)] * 4, st.sampled_from(odd), TEXT)
    word = st.sampled_from(("", "0", "1", "cat", "狗", "val", "TEST ", "train", "p1", "p2", "²", "nan", "\ud800")) | TEXT
    heads = st.lists(
        st.sampled_from(("mask", "label", "split", "group", "image", "Image", "", "\ufeffimage", "备注")), max_size=4
    )
    rows = st.lists(st.tuples(cell, cell, st.lists(word, max_size=5)), max_size=12)
    codes = st.sampled_from((*["utf-8"] * 9, "utf-8-sig", "gbk", "utf-16"))
    table = st.tuples(heads, rows, codes, st.sampled_from(",,,,,,,,,;\t"), st.just([]) | DAMAGE)
    names = [*files, ".hidden.png", "d.png/", "new\nline.png", "照片.png", os.fsdecode(b"\xd5\xd5\xc6\xac.png"),
        "y" * 240 + ".png", "a b.PNG", "x.tiff", "e.csv", "loop.png@", "masks/a.png", "images/a.png", "masks/图 1_mask.png",
        "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "dog/3.png", "v2.npy", "lock", "-1.png", "#.png"]  # fmt: skip
    tree = st.lists(st.sampled_from(names), max_size=12, unique=True)

    def make(path):
        with contextlib.suppress(OSError):  # not every file system takes every name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith("@"):
                path.with_name(path.name[:-1]).symlink_to(path.parent)
            elif path.suffix == ".npy":
                np.save(path, np.random.default_rng(0).random((9, 9, 9), np.float32))
            else:
                kind = "gray.png" if "mask" not in str(path) and path.name != "m.png" else "mask.png"
                kind = "c.jpg" if path.suffix == ".jpg" else "text.png" if path.stem in ("words", "w") else kind
                path.write_bytes(pictures()[kind])

    def body(value, work):
        name, listed, more = value
        place = work / "data"
        place.mkdir()
        if isinstance(listed, tuple):
            head, rows, code, comma, steps = listed
            text = io.StringIO()
            writer = csv.writer(text, delimiter=comma)
            writer.writerow(["image", *head] if len(rows) % 5 else head)
            for a, b, words in rows:
                writer.writerow([a, *[b if h == "mask" else w for h, w in zip(head + ["", ""], words)]])
            for n in files:
                make(work / n)
            place = work / "list.csv"
            place.write_bytes(damage(text.getvalue().encode(code, "replace"), steps))
            attempt(value, lambda: common.read_table(place))
        else:
            for n in listed:
                (place / n).mkdir(parents=True, exist_ok=True) if n.endswith("/") else make(place / n)
        attempt(value, lambda: reader(name, place, work, **READERS[name], **more))

    more = st.sampled_from(({}, {}, {"sample_ratio": 0.3}, {"seed": 10**25}, {"val_dir": "work"}, {"val_dir": "work/list.csv"}))
    return drive(folder, examples, seed, st.tuples(st.sampled_from(sorted(READERS)), table | tree, more), body)


# --- scans and arrays -------------------------------------------------------------------------------------------------
@functools.cache
def scans():
    """{name: bytes} of small NIfTI files, and of .npy ones."""
    import monai.data
    import monai.transforms  # noqa: F401, now: importing these asks for networks and makes folders at home
    import nibabel

    rng, made = np.random.default_rng(0), {}
    plain, turned = rng.random((16, 18, 14), np.float32), np.diag([-1.0, 2, 1.5, 1])
    images = {"1": nibabel.Nifti1Image(plain, np.eye(4)), "2": nibabel.Nifti2Image(plain, turned),
        "short": nibabel.Nifti1Image((plain * 999).astype(np.int16), turned), "4d": nibabel.Nifti1Image(plain[..., None],
        turned), "nan": nibabel.Nifti1Image(np.where(plain > 0.9, np.nan, plain), turned),
        "rgb": nibabel.Nifti1Image(np.zeros((9, 9, 9), [("R", "u1"), ("G", "u1"), ("B", "u1")]), turned)}  # fmt: skip
    images["short"].header.set_slope_inter(0.5, -3)
    for name, array in (("f", plain), ("i", (plain * 99).astype(np.int16)), ("bool", plain > 0.5), ("c", plain + 1j), ("flat",
        plain[0]), ("one", np.ones_like(plain)), ("inf", plain / (plain > 0.1)), ("no", plain[:0]),
        ("big", plain * np.float64(1e300)),
        ("many", np.stack([plain] * 2, 3)), ("word", np.full((8, 8, 8), "1"))):  # fmt: skip
        np.save(file := io.BytesIO(), array)
        made[f"{name}.npy"] = file.getvalue()
    return made | {f"{k}.nii": v.to_bytes() for k, v in images.items()}


FIELDS = {"dim": (40, "<8h"), "type": (70, "<2h"), "size": (76, "<8f"), "offset": (108, "<f"), "slope": (112, "<2f"),
    "codes": (252, "<2h"), "quatern": (256, "<6f"), "rows": (280, "<12f"), "magic": (344, "<4s"), "length": (0,
    "<i")}  # fmt: skip
HEADS = st.tuples(st.sampled_from("<f4 |O <c8 |b1 <U5 <f8 >i2 |V8 <M8[s] <f2 |S0 <i99".split()).map(repr) |
    st.just("[('a', '<f4')]"), st.sampled_from(("False", "True", "1", "None")), st.sampled_from(("(16, 18, 14)", "(10**12,)",
    "(1000000, 1000000, 1)", "(0, 9, 9)", "()", "(-1, 2, 3)", "(9223372036854775807, 9)", "(16, 18, 14, 1)", "[4032]",
    "(True, 4, 4)", "(" * 300, "(3000, 3000, 3000)")))  # fmt: skip


def fuzz_volumes(folder, examples, seed):
    """Damaged scans through the readers of the 3-D recipe."""
    module = recipe("autoencoder3d")
    pool, cfgs = scans(), [module.Config(data_dir="x", target_size="16,16,8", spacing=s, device="cpu") for s in ("", "1,1,1")]
    number = st.sampled_from((0.0, 1.0, -1.0, 2.0, 64.0, 1e-12, 1e6, 1e30, 32767.0, 352.0, 1e9, float("nan"), float("inf")))
    field = st.tuples(
        st.sampled_from(sorted(FIELDS)), st.lists(number | st.sampled_from((16.0, 512.0, 1024.0, 128.0)), max_size=12)
    )

    def write(path, value):
        name, fields, head, steps, packed, _ = value
        data = pool[name]
        for key, numbers in fields if name.endswith(".nii") else ():
            at, form = FIELDS[key]
            old = list(struct.unpack_from(form, data, at))
            for i, v in enumerate(numbers[: len(old)]):
                whole = int(v) if abs(v) < 32767 else 32767
                old[i] = b"n+2\0" if key == "magic" else whole if form[-1] in "hi" else v
            data = data[:at] + struct.pack(form, *old) + data[at + struct.calcsize(form) :]
        if head and name.endswith(".npy"):
            text = "{" + ", ".join(f"'{k}': {v}" for k, v in zip(("descr", "fortran_order", "shape"), head)) + "}"
            data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data[128:]
        data = damage(data, steps, list(pool.values()))
        packed = packed if name.endswith(".nii") else packed.replace("gz", "")
        data = gzip.compress(data, 1) if "gz" in packed else data
        data += gzip.compress(bytes(2**20), 9) * 300 if packed == "gz bomb" else b""
        path.write_bytes(data[: len(data) * 2 // 3] if "cut" in packed else data)

    def body(value, work):
        name, *_, packed, cfg = value
        suffix = {True: ".nii.gz", False: ".nii"}["gz" in packed] if name.endswith(".nii") else ".npy"
        path = work / f"x{suffix.upper() if len(value[1]) == 2 else suffix}"
        write(path, value)

        def load():
            volume = module.load_volume({"image": path}, cfgs[cfg])
            assert volume.dtype == np.float16 and volume.ndim == 3 and 0 <= volume.min() <= volume.max() <= 1

        attempt(value, load, UNREADABLE)
        for i in range(3):
            np.save(work / f"{i}.npy", np.random.default_rng(i).random((16, 16, 8), np.float32))
        record = [{"image": p} for p in (path, *sorted(work.glob("?.npy")))]
        attempt(value, lambda: list(common.Items(record, functools.partial(module.load_volume, cfg=cfgs[0]))))

    value = st.tuples(st.sampled_from(sorted(pool)), st.lists(field, max_size=2), st.none() | HEADS, st.just([]) | DAMAGE,
        st.sampled_from(("", "", "", "gz", "gz cut", "cut", "gz bomb")), st.integers(0, 1))  # fmt: skip
    return drive(folder, examples, seed, value, body)


def fuzz_arrays(folder, examples, seed):
    """.npz files of pictures with labels, whole in the wrong way or damaged."""
    module, rng = recipe("convnext"), np.random.default_rng(0)
    jpeg = np.frombuffer(pictures()["c.jpg"], np.uint8)
    arrays = {"gray": rng.integers(0, 255, (8, 16, 16), np.uint8), "rgb": rng.integers(0, 255, (8, 16, 18, 3), np.uint8),
        "one": np.zeros((8, 16, 16, 1), np.uint8), "float": rng.random((8, 16, 16)), "empty": np.zeros((0, 16, 16), np.uint8),
        "thin": np.zeros((8, 0, 16), np.uint8), "scalar": np.uint8(3), "labels": np.arange(8) % 2, "column": np.arange(8)[:,
        None] % 2, "words": np.array(["cat", "狗", "²", ""] * 2), "short": np.arange(3), "nan": np.full(8, np.nan),
        "jpegs": np.tile(jpeg, 8), "offsets": np.arange(9) * len(jpeg), "wild": np.array([0, 9, 5, -7, 10**12, 3, 3, 3, 9]),
        "fraction": np.arange(9) * 0.5, "objects": np.array([None] * 8), "payload": np.array([Payload("mkdir")] * 8),
        "flat": np.zeros((8, 3), np.uint8)}  # fmt: skip
    keys = ("images labels train_images train_labels val_images val_labels test_images test_labels x_train y_train x_test "
        "y_test train_jpeg train_offsets val_jpeg val_offsets classes other").split()  # fmt: skip
    good = st.sampled_from(({"images": "rgb", "labels": "labels"}, {"train_images": "gray", "train_labels": "column",
        "val_images": "gray", "val_labels": "words"}, {"train_jpeg": "jpegs", "train_offsets": "offsets",
        "train_labels": "labels"}))  # fmt: skip
    contents = st.tuples(
        good | st.just({}), st.dictionaries(st.sampled_from(keys), st.sampled_from(sorted(arrays)), max_size=3)
    )

    def body(value, work):
        (first, more), packed, steps, own = value
        file = io.BytesIO()
        (np.savez_compressed if packed else np.savez)(file, **{k: arrays[n] for k, n in (first | more).items()})
        (work / "x.npz").write_bytes(damage(file.getvalue(), steps))
        (work / "v.npz").write_bytes(file.getvalue())
        module.read_npz.cache_clear()
        attempt(value, lambda: module.Config(data_dir=str(work / "x.npz")))
        attempt(
            value, lambda: reader("convnext", work / "x.npz", work, **READERS["convnext"], val_dir="work/v.npz" if own else "")
        )

    return drive(folder, examples, seed, st.tuples(contents, st.booleans(), st.just([]) | DAMAGE, st.booleans()), body)


# --- weights ----------------------------------------------------------------------------------------------------------
def odd_tensor(kind):
    """A tensor of a kind that no network's weights have."""
    made = {"float": lambda: torch.ones(3, 4), "scalar": lambda: torch.tensor(1.0), "empty": lambda: torch.zeros(0, 0),
        "half": lambda: torch.ones(2, 2).half(), "long": lambda: torch.ones(3, 3).long(), "bool": lambda: torch.ones(2,
        2).bool(), "complex": lambda: torch.ones(4, 4) * 1j, "sparse": lambda: torch.eye(4).to_sparse(),
        "csr": lambda: torch.eye(4).to_sparse_csr(), "wide": lambda: torch.ones(1, 1).expand(10**6, 10**6),
        "nan": lambda: torch.full((4, 4), float("nan")), "meta": lambda: torch.ones(4, 4, device="meta"),
        "parameter": lambda: torch.nn.Parameter(torch.ones(4, 4)), "quantised": lambda: torch.quantize_per_tensor(torch.ones(4,
        4), 0.1, 0, torch.qint8), "deep": lambda: torch.zeros(1, 1, 1, 1, 1, 1)}  # fmt: skip
    return made[kind]()


KINDS = "float scalar empty half long bool complex sparse csr wide nan meta parameter quantised deep".split()
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.sampled_from((10**18, 10**400, 1e308, float("nan"),
    float("inf"))), TEXT, st.sampled_from(("model", "v", "16,32", "[]", '["a", "b"]', "x" * 999)))  # fmt: skip
KEY = st.sampled_from(
    ("model", "parts", "state_dict", "params", "ema", "codec", "net", "key", "latents", "module.", "", "body.x", "layers.²")
)
TREE = st.recursive(PLAIN | st.sampled_from(KINDS).map(lambda k: ("tensor", k)), lambda inner: st.lists(inner, max_size=3) |
    st.dictionaries(KEY | st.integers(0, 3), inner, max_size=3), max_leaves=6)  # fmt: skip


def grown(tree, like=None):
    """A drawn tree with its tensors made; ("like", kind) has the shape of the tensor that it replaces."""
    if isinstance(tree, tuple) and tree[0] == "like":
        made = {
            "sparse": lambda a: a.to_sparse(),
            "meta": lambda a: a.to("meta"),
            "complex": lambda a: a + 1j,
            "wide": lambda a: torch.zeros(()).expand(a.shape),
            "long": lambda a: a.long(),
            "flat": lambda a: a.flatten(),
            "more": lambda a: a[None],
            "cut": lambda a: a[:-1],
            "none": lambda a: a[:0],
            "zero": lambda a: a.sum(),
            "nan": lambda a: a * float("nan"),
        }[tree[1]]
        return made(like.float()) if isinstance(like, torch.Tensor) else like
    if isinstance(tree, tuple):
        return odd_tensor(tree[1])
    if isinstance(tree, dict):
        return {k: grown(v) for k, v in tree.items()}
    return [grown(v) for v in tree] if isinstance(tree, list) else tree


LIKE = st.sampled_from("sparse meta complex wide long flat more cut none zero nan".split()).map(lambda k: ("like", k))
EDITS = st.lists(st.tuples(st.integers(0, 999), st.sampled_from(("set", "set", "drop", "name")), LIKE | TREE, KEY |
    st.integers(0, 3) | st.sampled_from(("body.0.rdb1.other", "body.0.rdb1.convx.weight", "layers.0",
    "cap_embedder.0.weight"))), max_size=3)  # fmt: skip


def edited(state, edits):
    """A dict of tensors after edits: values replaced, taken away or under other names."""
    state = dict(state)
    for at, what, tree, name in edits:
        key = list(state)[at % len(state)] if state else ""
        old = state.pop(key, None)
        if what != "drop":
            state[name if what == "name" else key] = grown(tree, old) if what == "set" else old
    return state


@functools.cache
def networks():
    """{name: (recipe, tiny network's weights, its settings)} of the recipes whose weights are read."""
    importlib.import_module("torch._dynamo")  # now: importing it makes a folder for its cache
    torch.manual_seed(0)
    made, (real, tune, latent) = {}, (recipe(n) for n in ("realesrgan", "finetune", "latent_cfg"))
    made["realesrgan"] = real, real.RRDBNet(4, 1, 4, 4).state_dict(), {}
    net = tune.NextDiT(2, 3, 24, 2, 2, multiple_of=8, learn_sigma=False, qk_norm=True)
    made["finetune"] = tune, net.state_dict(), {}
    cfg = latent.Config(target_size=16, factor=2, device="cpu", dim=8, mults="1,2", names='["a", "b"]', channels=4)
    codec, net = latent.make_codec(cfg).state_dict(), latent.make_net(cfg).state_dict()
    made["latent_cfg"] = latent, {"codec": codec, "net": net}, dataclasses.asdict(cfg)
    for name, words in {"srcnn": {}, "convnext": {"num_blocks": 2, "base_channels": 8, "target_size": 16, "batch_size": 2,
        "names": '["a", "b"]'}, "autoencoder3d": {"channels": "8,8", "target_size": "8,8,8",
        "norm_groups": 2}}.items():  # fmt: skip
        cfg = recipe(name).Config(device="cpu", **words)
        net = recipe(name).Net(cfg, 2) if name == "convnext" else recipe(name).make_model(cfg)
        made[name] = recipe(name), net.state_dict(), dataclasses.asdict(cfg)
    return made


def packed(state, form):
    """The bytes of a file of weights: a torch zip, torch's old format, a plain pickle, or safetensors (plain tensors only)."""
    file = io.BytesIO()
    if form == "safetensors":
        from safetensors.torch import save

        flat = state if isinstance(state, dict) else {}
        whole = {
            str(k): v
            for k, v in flat.items()
            if isinstance(v, torch.Tensor) and v.layout is torch.strided and not v.is_quantized
        }
        return save(
            {k: v.detach().clone().contiguous() for k, v in whole.items() if v.device.type == "cpu" and v.numel() < 10**6}
        )
    if form == "pickle":
        pickle.dump(state, file) if not isinstance(state, dict) else pickle.dump({k: str(v) for k, v in state.items()}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


def rezipped(data, steps):
    """A torch file whose pickle is damaged and whose checksums fit it."""
    out, done = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    with zipfile.ZipFile(out, "w") as z:
        for name in done.namelist():
            z.writestr(name, damage(done.read(name), steps) if name.endswith("data.pkl") else done.read(name))
    return out.getvalue()


FORMS = st.sampled_from(("zip", "zip", "old", "pickle", "safetensors"))
FILE = st.tuples(st.one_of(*[EDITS] * 4, TREE.map(lambda t: ("tree", t)), st.sampled_from(PAYLOADS).map(lambda p: ("code", p))),
    st.none() | st.sampled_from(("params_ema", "state_dict", "model", "ema", "list")), FORMS, st.just([]) | DAMAGE,
    st.booleans())  # fmt: skip


def file_of(state, value):
    """The bytes of a drawn file of weights."""
    edits, wrap, form, steps, inside = value
    if isinstance(edits, tuple):
        state = Payload(edits[1]) if edits[0] == "code" else grown(edits[1])
        state = {"model": state} if inside and edits[0] == "code" else state
    else:
        state = edited(state, edits)
    data = packed(state if not wrap else [state] if wrap == "list" else {wrap: state}, form)
    return rezipped(data, steps) if inside and form == "zip" else damage(data, steps)


def fuzz_weights(folder, examples, seed):
    """Files of weights, edited, damaged or carrying code, through every reader of weights."""
    nets = networks()
    (real, real_state, _), (tune, tune_state, _), (latent, *_) = (nets[n] for n in ("realesrgan", "finetune", "latent_cfg"))
    models = {growth: real.RRDBNet(4, 1, growth, 4) for growth in (4, 8)}
    cfg = latent.Config(target_size=16, factor=2, latent_channels=4, channels=4, device="cpu")
    codec = latent.make_codec(cfg)
    items = common.Items([f"picture {i}" for i in range(2)], lambda name: np.zeros((3, 16, 16), np.uint8))

    def start(path):
        real.shape_of(real.read_weights(path))
        for growth, model in models.items():  # as it is, and grown
            with mock.patch.dict(real.PRESETS, {"optimized": (4, 1, growth)}):
                real.start_from(model, real.Config(init=str(path)))

    def tuned(path):
        cfg = tune.Config(weights=str(path), data_dir="x", target_size=16, device="cpu", train="ends")
        state = tune.read_weights(cfg.weights)
        cfg.geometry = json.dumps(tune.read_geometry(state, cfg))
        tune.load_into(tune.make_model(cfg, ready=False), state, path)

    def latents(path):
        os.replace(path, path.with_name("latents.pt"))
        run = common.Run(cfg, "latent_cfg")
        run.folder = path.parent
        common.cached_latents(items, lambda x: x.float()[:, :, ::2, ::2], "key", cfg, run)

    def body(value, work):
        target, drawn = value
        states = {"start": real_state, "tuned": tune_state, "shards": tune_state, "encoder": {"model": codec.state_dict()},
            "latents": {"key": 1, "latents": torch.zeros(2, 2, 3, 8, 8), "bad": {}}}  # fmt: skip
        path = work / f"x{'.safetensors' if drawn[2] == 'safetensors' else '.pth'}"
        path.write_bytes(file_of(states[target], drawn))
        attempt(value, lambda: common.load_tensors(path), (ValueError, OSError))
        if target == "shards":
            (work / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
            (work / "settings.json").write_bytes(damage(b'{"recipe": "nextdit_fast", "settings": {"predict": "v"}}', drawn[3]))
            (work / f"y{path.suffix}").write_bytes(packed({"extra": torch.ones(2)}, "safetensors"))
        calls = {"start": lambda: start(path), "tuned": lambda: tuned(path), "shards": lambda: tuned(work),
            "latents": lambda: latents(path), "encoder": lambda: latent.load_encoder(codec, dataclasses.replace(cfg,
            encoder_weights=str(path)))}  # fmt: skip
        attempt(value, calls[target])

    targets = st.sampled_from(("start", "tuned", "shards", "encoder", "latents"))
    return drive(folder, examples, seed, st.tuples(targets, FILE), body)


def fuzz_trained(folder, examples, seed):
    """`load` of a run folder whose settings or weights were edited or damaged."""
    nets = {name: net for name, net in networks().items() if net[2]}
    change = st.dictionaries(st.integers(0, 99), PLAIN | st.lists(PLAIN, max_size=2), max_size=2)

    def body(value, work):
        name, changes, drawn, file, whole, steps = value
        module, state, settings = nets[name]
        settings = settings | {sorted(settings)[at % len(settings)]: v for at, v in changes.items()}
        about = {"recipe": module.RECIPE, "settings": settings if whole != "odd" else list(settings)}
        (work / "settings.json").write_bytes(damage(json.dumps(about).encode(), steps))
        (work / file).write_bytes(file_of(state if file == "model.pt" else {"model": state}, drawn))
        attempt(value, lambda: module.load(work))

    plain = st.just(([], None, "zip", [], False))
    value = st.tuples(st.sampled_from(sorted(nets)), change, plain | FILE, st.sampled_from(("model.pt", "best.pt")),
        st.sampled_from(("", "", "", "odd")), st.just([]) | DAMAGE)  # fmt: skip
    return drive(folder, examples, seed, value, body)


# --- run folders ------------------------------------------------------------------------------------------------------
def fuzz_runs(folder, examples, seed):
    """A run continued in a folder whose own files are damaged or hold something else; what is not its own is left alone."""
    module, rng, folder = recipe("srcnn"), np.random.default_rng(0), Path(os.path.realpath(folder))
    kept = folder / "kept"
    (kept / "pictures").mkdir(parents=True, exist_ok=True)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (24, 26), np.uint8)).save(kept / "pictures" / f"{i}.png")
    stubs = {"CROPS": 2, "export": lambda *a: None, "show": lambda *a, **k: None}
    config = functools.partial(module.Config, data_dir=str(kept / "pictures"), target_size=12, batch_size=3, use_amp=False,
        device="cpu", num_workers=0)  # fmt: skip
    with mock.patch.multiple(module, **stubs), contextlib.redirect_stdout(io.StringIO()):
        for steps in (1, 2):
            module.train(config(out_dir=str(kept / "run"), num_steps=steps))
    for name in ("mine.txt", "notes/mine.txt", "code/mine.py"):
        (kept / "run" / name).parent.mkdir(exist_ok=True)
        (kept / "run" / name).write_text("mine")
    rows = st.dictionaries(st.sampled_from(("step", "metric", "psnr", "loss")), PLAIN | st.lists(PLAIN, max_size=1), max_size=4)
    json_value = st.recursive(PLAIN, lambda a: st.lists(a, max_size=3) | st.dictionaries(KEY, a, max_size=3), max_leaves=4)
    edits = st.tuples(st.just("edit"), st.lists(st.integers(0, 30), min_size=1, max_size=3), json_value)
    common_harm = st.one_of(st.tuples(st.just("damage"), DAMAGE), st.tuples(st.just("gone")), st.tuples(st.just("folder")))
    whole, weights = st.tuples(st.just("whole"), json_value), st.tuples(st.just("weights"), FILE)
    lines = st.tuples(st.just("rows"), st.lists(rows, min_size=1, max_size=4))
    harm = st.one_of(*(st.tuples(st.sampled_from(names.split()), st.one_of(*kinds, common_harm)) for names,
        kinds in (("settings.json settings settings code/settings.json", [edits] * 4 + [whole]), ("clock.json metrics.json",
        [edits, whole, edits]), ("log.jsonl", [lines] * 3), ("last.pt best.pt previous.pt next.pt lock", [edits, edits,
        weights]))))  # fmt: skip

    def newest(place):
        steps = [-1]
        for path in place.glob("*.pt*"):
            with contextlib.suppress(Exception):
                steps.append(torch.load(path, weights_only=True)["step"] + 0)
        return max(steps)

    def edit(value, keys, new):
        if not keys or not isinstance(value, dict) or not value:
            return new
        key = sorted(value)[keys[0] % len(value)]
        return value | {key: edit(value[key], keys[1:], new)}

    def hurt(path, harm):
        how, *more = harm
        old = path.read_bytes() if path.is_file() else b"{}"
        path.unlink(missing_ok=True)
        if how == "folder":
            return path.mkdir()
        if how == "gone":
            return None
        if how == "edit" and path.suffix == ".pt":
            with contextlib.suppress(Exception):  # a file that an earlier harm broke stays so
                torch.save(edit(torch.load(io.BytesIO(old), weights_only=True), *more), new := io.BytesIO())
                old = new.getvalue()
        elif how == "edit":
            with contextlib.suppress(ValueError):
                old = json.dumps(edit(json.loads(old), *more)).encode()
        elif how == "rows":
            old += b"".join(json.dumps(row).encode() + b"\n" for row in more[0])
        elif how == "weights":
            old = file_of({"parts": {}, "step": 1, "used": 1.0, "born": 0.0}, more[0])
        else:
            old = json.dumps(more[0]).encode() if how == "whole" else damage(old, more[0])
        return path.write_bytes(old)

    def body(value, work):
        harms, steps, mirrored = value
        shutil.copytree(kept / "run", work / "run")
        for name, harm in harms:
            place = work / "mirror" if mirrored else work / "run"
            if mirrored and not place.exists():
                shutil.copytree(kept / "run", place)
            for path in [place / name] if name != "settings" else [place / "settings.json", place / "code" / "settings.json"]:
                hurt(path, harm) if not path.is_dir() else None
        words = {"out_dir": "work/run", "num_steps": steps, "mirror_dir": "work/mirror" if mirrored else ""}
        with mock.patch.multiple(module, **stubs), mock.patch.object(common, "draw_curves", lambda *a: None):
            attempt(value, lambda: module.train(config(**words)))
        log = work / "run" / "log.jsonl"
        if log.is_file() and any(name == log.name for name, _ in harms):  # drawing takes longer than all else here
            attempt(value, lambda: common.draw_curves(log, io.BytesIO()), (OSError, RuntimeError))  # what `Run.write` says
        for place in {work / "run", work / "mirror"} if mirrored and harms else {work / "run"}:
            if any((place / n).read_text() != "mine" for n in ("mine.txt", "notes/mine.txt", "code/mine.py")):
                fail(f"{value!r}: a file of the user's was touched")
        if not any(name.endswith(".pt") for name, _ in harms) and newest(work / "run") < 2:
            fail(f"{value!r}: a checkpoint is gone")

    value = st.tuples(
        st.lists(harm, min_size=1, max_size=2), st.sampled_from((2, 2, 2, 3)), st.sampled_from((False, False, True))
    )
    with mock.patch.object(common, "HEARTBEAT", 0.5):
        return drive(folder, examples, seed, value, body)


FAMILIES = {"settings": fuzz_settings, "images": fuzz_images, "lists": fuzz_lists, "volumes": fuzz_volumes,
    "arrays": fuzz_arrays, "weights": fuzz_weights, "trained": fuzz_trained, "runs": fuzz_runs}  # fmt: skip
