"""Plumbing that every recipe shares; it knows no model.

In this order: settings, device, randomness, clock, files, data, pictures, and `Run`, which a recipe opens with
`with Run(cfg, "name") as run:` and which keeps the folder, the clock, the log and the updates of one training run.
Copy this file beside the script that you copy, or make one file of the two: python tools/bundle.py train_x.py
"""

import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import typing
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

SAMPLE_MARKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # shares of a run at which a recipe shows samples; 1.0 is its ending
BAD_LIMIT = 5  # so many non-finite updates in a row are no accident
HEARTBEAT = 5.0  # seconds between two log lines, and between two writes of the time used
GONE = "(?i)connection (closed|reset|refused)|broken pipe|timed? ?out|remote process|closed by peer"  # how a lost process shows
YES_NO = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


# --- settings ---------------------------------------------------------------------------------------------------------
class RecipeError(Exception):
    """A sentence for the user: what is wrong, with the value, and what to do. `code` is the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


class Stopped(RecipeError):
    """The run was asked to stop and has saved; the sentence names the command that continues it."""


def opt(default, help, **rules):
    """One setting of a `Config`: its default, its help line and its rules.

    Rules: `fixed` (must be the same when a run continues), `everyday` (shown by --help), `choices`, `low` and `high`
    (inclusive), `check` (a function that raises ValueError naming what the setting takes), `action` (no environment
    variable), `derived` (filled from the data before `build`).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def duration(text):
    """Seconds in a text such as 6h, 1h30m or 90s; 0 for an empty one. ValueError names what it takes."""
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])*", text.strip()):
        raise ValueError("a time such as 6h, 1h30m or 90s")
    return sum(float(n) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[u] for n, u in re.findall(r"([\d.]+)([dhms])", text))


def moment(text):
    """Seconds since the epoch of a local time such as 2026-11-24 08:30; 0 for an empty text. ValueError as above."""
    try:
        return datetime.datetime.fromisoformat(text.strip()).timestamp() if text.strip() else 0.0
    except ValueError:
        raise ValueError('a date and time such as "2026-11-24 08:30"') from None


@dataclasses.dataclass
class Settings:
    """The settings that mean the same in every recipe; a recipe's `Config` adds its own and changes defaults."""

    data_dir: str = opt("", "folder or CSV of training data; empty: built-in data", everyday=True)
    val_dir: str = opt("", "folder or CSV of validation data; empty: a tenth of the training data", everyday=True)
    out_dir: str = opt("", "run folder; empty: results/<recipe>", everyday=True)
    target_size: int = opt(64, "image size in pixels", fixed=True, everyday=True, low=1)
    batch_size: int = opt(16, "samples per forward pass and process", everyday=True, low=1)
    accumulate: int = opt(1, "forward passes added up before an update", low=1)
    num_epochs: float = opt(10.0, "length of the run in passes over the data", everyday=True, low=0)
    num_steps: int = opt(0, "length of the run in updates; 0: num_epochs decides", low=0)
    time_budget: str = opt("", "finish inside this time, e.g. 6h, 90s; all sessions count", everyday=True, check=duration)
    deadline: str = opt("", 'finish before this moment, e.g. "2026-11-24 08:30"', check=moment)
    session_limit: str = opt("", "save and stop this session after e.g. 11h; the same command continues", check=duration)
    save_minutes: float = opt(10.0, "minutes between two checkpoints", low=0)
    sample_ratio: float = opt(1.0, "share of the training files to use", fixed=True, low=1e-6, high=1)
    learning_rate: float = opt(1e-3, "peak learning rate", fixed=True, everyday=True, low=0)
    use_amp: bool | None = opt(None, "half precision; default: where the hardware gains from it")
    amp_dtype: str = opt("auto", "half precision's type", choices=("auto", "bf16", "fp16"))
    compile: bool = opt(False, "torch.compile; runs eagerly where it fails")
    patience: int = opt(0, "evaluations without a better result before the run anneals and ends; 0: off", low=0)
    seed: int = opt(0, "seed of everything random", fixed=True, low=0)
    mirror_dir: str = opt("", "second folder, e.g. on a network drive, to which each save is copied too")
    num_workers: int = opt(-1, "processes that load data; -1: none for cached data, else up to 4", low=-1)
    device: str = opt("auto", "auto, cpu, mps, cuda or cuda:1")
    continue_from: str = opt("", "run folder (may be read-only) that an empty out_dir continues")
    fresh: bool = opt(False, "start over; an older run folder is renamed, never deleted", action=True)


def _kind(config, name):
    """The plain type of a setting: bool for `bool | None`."""
    hint = typing.get_type_hints(config)[name]
    return next((t for t in typing.get_args(hint) if t is not types.NoneType), hint)


def check_setting(field, value, source):
    """RecipeError (exit code 2) when a setting's value breaks its rules; `source` is its flag, variable or name."""
    rules, takes = field.metadata, ""
    low, high = rules.get("low", -math.inf), rules.get("high", math.inf)
    if "choices" in rules and value not in rules["choices"]:
        takes = " or ".join(map(str, rules["choices"]))
    elif isinstance(value, (int, float)) and not low <= value <= high:
        takes = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
    elif isinstance(value, (int, float)) and not abs(value) <= 2**53:  # no count, and beyond what a seed or a file takes
        takes = "a number of at most 9e15"
    elif "check" in rules:
        try:
            rules["check"](value)
        except ValueError as e:
            takes = str(e)
    if takes:
        raise RecipeError(f"{source} is {value!r}; it takes {takes}.", 2)


def help_text(config, doc, everything=False):
    """What --help prints: the script's docstring and its everyday settings; all of them for `--help all`."""
    fields = [f for f in dataclasses.fields(config) if "derived" not in f.metadata]
    lines = [(doc or "").strip(), "", "Settings (flag, else environment variable in capitals, else [default]):"]
    for f in (f for f in fields if everything or f.metadata.get("everyday")):
        more = f" ({', '.join(map(str, f.metadata['choices']))})" if "choices" in f.metadata else ""
        value = "auto" if f.default is None else "" if f.default is False else f.default
        lines.append(f"  --{f.name:<15} {f.metadata['help']}{more}" + (f" [{value}]" if value != "" else ""))
    return "\n".join([*lines, "" if everything else f"  {'--help all':<17} shows all {len(fields)} settings"])


def parse(config, doc="", argv=None):
    """`config` filled from flags, else environment variables, else defaults; None after printing --help.

    Flags are --batch_size 4, --batch-size=4, --use_amp, --no-use_amp. `cfg.given` names the settings that the user
    gave. RecipeError (exit code 2) for a bad flag, variable or value.
    """
    if argv is None:  # a notebook kernel's own argv is not ours
        argv = [] if "ipykernel" in sys.modules else sys.argv[1:]
    fields = {f.name: f for f in dataclasses.fields(config) if "derived" not in f.metadata}
    words, values = list(argv), {}
    variables = {n: os.environ.get(n.upper()) for n, f in fields.items() if "action" not in f.metadata}
    given = {n: (text, f"The variable {n.upper()}") for n, text in variables.items() if text}
    if given:
        say("From the environment: " + " ".join(f"{n.upper()}={text}" for n, (text, _) in given.items()))
    while words:
        flag, equals, text = words.pop(0).partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if name in ("h", "help"):
            print(help_text(config, doc, "all" in [text, *words]))
            return None
        off = name.startswith("no_") and name[3:] in fields and _kind(config, name[3:]) is bool
        name = name[3:] if off else name
        if name not in fields or not flag.startswith("--"):
            near = difflib.get_close_matches(name, fields, 1)
            raise RecipeError(f"There is no setting {flag}{f'; did you mean --{near[0]}' if near else ''}. See --help all.", 2)
        if _kind(config, name) is bool and not equals:
            text = words.pop(0) if words and words[0].lower() in YES_NO and not off else "1"
        elif not equals and (not words or words[0].startswith("--")):
            raise RecipeError(f"{flag} needs a value: {fields[name].metadata['help']}.", 2)
        text = text if equals or _kind(config, name) is bool else words.pop(0)
        given[name] = (str(not YES_NO[text.lower()]) if off and text.lower() in YES_NO else text, flag)
    for name, (text, source) in given.items():
        kind = _kind(config, name)
        try:
            values[name] = YES_NO[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            takes = {bool: "1, 0, true or false", int: "a whole number", float: "a number"}[kind]
            raise RecipeError(f"{source} is {text!r}; it takes {takes}.", 2) from None
        check_setting(fields[name], values[name], source)
    cfg = config(**values)
    cfg.given = frozenset(values)
    return cfg


def main(run, config, doc=""):
    """Parse the settings and return run(cfg); end with a sentence wherever a traceback is no help.

    Exit codes: 2 for a wrong call, 1 for a failure, 130, 143 or 138 for a run that a signal stopped. In a notebook the
    sentence is printed and nothing exits.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a gbk terminal must not turn a message into a traceback
    try:
        cfg = parse(config, doc)
        if cfg is None:
            return None
        cfg.head_start = 0.0 if "ipykernel" in sys.modules else process_age()
        return run(cfg)
    except RecipeError as e:
        message, code = str(e), e.code
    except KeyboardInterrupt:
        message, code = "Interrupted. The last checkpoint is whole, and the same command continues from it.", 130
    except OSError as e:  # the disk, a permission, a path: never a reason for a traceback
        if e.filename is None and e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        message, code = f"{e.filename or 'The disk'}: {e.strerror}. Mend that and run the same command again.", 1
    except (RuntimeError, MemoryError) as e:
        why = (str(e).splitlines() or [""])[0]
        if is_out_of_memory(e):
            message, code = f"Out of memory: {why} Try a smaller --target_size or --batch_size.", 1
        elif "home directory" in why:
            told = " ".join(f"--{name} {value}" for name, value in vars(cfg).items() if str(value).startswith("~"))
            message, code = f"{told}: there is no such home folder; write the path out, without ~.", 2
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and re.search(GONE, why):
            message, code = f"Another process of this run is gone ({why[:150]}). The same command continues.", 1
        else:
            raise
    if os.environ.get("RANK", "0") != "0":
        message = f"Process {os.environ['RANK']}: {message}"
    print(message, file=sys.stderr, flush=True)
    if "ipykernel" not in sys.modules:
        sys.exit(code)


def process_age():
    """Seconds since this process began: imports count against a time budget too."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()  # not Linux: the processor time is the best that the standard library knows


def say(text):
    """Print a line at once, above a progress bar, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        (sys.modules["tqdm"].tqdm.write if "tqdm" in sys.modules else print)(text)
        sys.stdout.flush()


def clock_text(seconds):
    """A length of time for people: 45s, 3m20s, 14m, 3h05m."""
    s = max(0, round(seconds))
    if s < 600:
        return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m" if s >= 3600 else f"{s // 60}m"


# --- device -----------------------------------------------------------------------------------------------------------
def choose_device(name="auto", local_rank=0):
    """(torch.device, its name) for --device; RecipeError where this torch has no kernels for the card."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if cards > 1 and "WORLD_SIZE" not in os.environ:
            say(f"{cards} GPUs are here and this uses one. All: torchrun --nproc_per_node={cards} {shlex.join(sys.argv)}")
        name = f"cuda:{local_rank}" if cards else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and shutil.which("nvidia-smi"):
            say(
                f"An NVIDIA card is here, but torch {torch.__version__} has no CUDA or cannot use the driver: this runs on the "
                "processor. Install the CUDA build that pytorch.org/get-started names (plain pip on Windows brings none)."
            )
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name) or (name == "mps" and not torch.backends.mps.is_available()):
        raise RecipeError(f"--device is {name!r}; it takes auto, cpu, mps on a Mac that has it, cuda or cuda:1.", 2)
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type != "cuda":
        return device, f"{device.type} with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    if device.index >= cards:
        raise RecipeError(f"--device is {name!r}, but torch {torch.__version__} sees {cards} CUDA cards; try --device cpu.", 2)
    title, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    built, here = torch.cuda.get_arch_list(), 10 * major + minor
    known = [(kind, int(number)) for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(built))]
    if known and not any(n <= here and (kind == "compute" or n // 10 == major) for kind, n in known):
        raise RecipeError(
            f"torch {torch.__version__} has no kernels for {title} (sm_{here}; it has {', '.join(built)}). Choose another "
            "card (on Kaggle: T4), install the cu126 build that pytorch.org/get-started names, or add --device cpu."
        )
    return device, title


def cpu_has_bf16():
    """Whether the processor multiplies bfloat16 itself (AVX512-BF16, AMX); where it does not, bf16 is slower than fp32."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))


def choose_dtype(kind, capability=(0, 0), use_amp=None, amp_dtype="auto"):
    """(dtype of autocast or torch.float32, why). `kind` is cuda, cpu or mps; `capability` that of a CUDA card.

    torch.cuda.is_bf16_supported() is not asked: it is True on T4 and P100, which emulate bf16 slowly.
    """
    if use_amp is False:
        return torch.float32, "half precision is off"
    if amp_dtype != "auto":
        if (kind, amp_dtype) == ("cpu", "fp16"):
            raise RecipeError("--amp_dtype is 'fp16', which is of no use on a CPU; it takes bf16 there.", 2)
        slow = ", though this card only emulates it" if (kind, amp_dtype) == ("cuda", "bf16") and capability < (8, 0) else ""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype], "asked for" + slow
    if kind == "cuda":
        card = f"compute capability {capability[0]}.{capability[1]}"
        if capability >= (8, 0):
            return torch.bfloat16, f"{card} has it"
        if capability >= (7, 0):
            return torch.float16, f"{card} has no bf16"
        return (torch.float16, f"{card}: saves memory, not time") if use_amp else (torch.float32, f"{card} has no tensor cores")
    if kind == "cpu" and (use_amp or cpu_has_bf16()):
        return torch.bfloat16, "this processor has it" if cpu_has_bf16() else "asked for, though slow on this processor"
    return (torch.float16, "asked for") if use_amp else (torch.float32, f"no gain from half precision on this {kind}")


def is_out_of_memory(error):
    """Whether an exception means that memory ran out, on a GPU or in RAM."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    words += ("unable to find an engine", "Unable to find a valid cuDNN")  # how a convolution without its workspace ends
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def free_memory():
    """Bytes of RAM that this process may still take; a container's limit counts. 4 GiB where the system does not tell."""
    limits, files = [], {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    with contextlib.suppress(OSError, TypeError):
        limits.append(int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024)
        for _, kind, place in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()):
            for folder in ["", *Path(place.strip("/")).parents, place.strip("/")] if kind in files else ():
                with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
                    limit, used = (int((Path("/sys/fs/cgroup") / kind / folder / f).read_text()) for f in files[kind])
                    limits.append(limit - used)
    return min(limits, default=4 * 2**30)


def keep_freed_memory():
    """Tell the C library (glibc) not to give freed memory back to the system: a training step frees and takes the same
    blocks each time, and to fault their pages in anew cost a third of a plain fp32 step on a virtual machine's CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # all that an old glibc takes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


# --- randomness -------------------------------------------------------------------------------------------------------
def mix(*numbers):
    """A 63-bit seed from numbers or texts; neighbouring inputs give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def uniforms(seed, epoch, index, count):
    """Random numbers in [0, 1), shape [len(index), count], that depend on nothing but (seed, epoch, index).

    splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) as a counter-based generator:
    no state, so that a resumed run, any worker and any process draw the same.
    """
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix(seed, epoch))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def evenly(n, most):
    """At most so many of range(n), evenly chosen."""
    return [i * n // min(n, most) for i in range(min(n, most))]


@functools.lru_cache(4)
def epoch_order(n, seed, epoch):
    """The shuffled order of n samples in an epoch: a pure function, so that resuming needs no state."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class Stream(torch.utils.data.Sampler):
    """Endless batches of (epoch, index). Update k holds samples k*G to (k+1)*G of the shuffled epochs laid end to end.

    Each of `world` processes takes its slice of the G = `per_update`.
    """

    def __init__(self, n, per_update, seed, start=0, rank=0, world=1):
        self.n, self.per_update, self.seed, self.start = n, per_update, seed, start
        self.rank, self.share = rank, per_update // world

    def __iter__(self):
        for k in itertools.count(self.start):
            first = k * self.per_update + self.rank * self.share
            places = (divmod(p, self.n) for p in range(first, first + self.share))
            yield [(epoch, int(epoch_order(self.n, self.seed, epoch)[i])) for epoch, i in places]


# --- clock ------------------------------------------------------------------------------------------------------------
def schedule(progress, shape="cosine", warmup=0.05, floor=0.0):
    """Factor on the peak learning rate at `progress` 0..1: warm-up from near 0, then down to `floor` at 1.

    `shape` is cosine, linear, constant or onecycle (cosine up over 30 %, cosine down; Smith and Topin, 2017).
    """
    p, warmup = min(max(progress, 0.0), 1.0), 0.3 if shape == "onecycle" else warmup
    if p < warmup:
        return 0.52 - 0.48 * math.cos(math.pi * p / warmup) if shape == "onecycle" else max(p / warmup, 1e-3)
    rest = (p - warmup) / (1 - warmup)
    down = {"linear": 1 - rest, "constant": 1.0}.get(shape, 0.5 + 0.5 * math.cos(math.pi * rest))
    return floor + (1 - floor) * down


class Clock:
    """The time used by all sessions of a run, and its share of the budget or of the way to the deadline.

    budget, session: seconds, 0 for none; deadline: seconds since the epoch; head_start: seconds that this process had
    used before. `before` (earlier sessions' seconds) and `born` (the first one's start) come from the run folder.
    """

    def __init__(self, budget=0.0, deadline=0.0, session=0.0, head_start=0.0):
        self.budget, self.deadline, self.session = budget, deadline, session
        self.start, self.before, self.born = time.monotonic() - head_start, 0.0, time.time() - head_start

    def used(self):
        return self.before + time.monotonic() - self.start

    def left(self, reserve=0.0):
        """Seconds until the budget or the deadline ends, whichever is earlier, with `reserve` held back."""
        budget = self.budget - self.used() if self.budget else math.inf
        return min(budget, self.deadline - time.time() if self.deadline else math.inf) - reserve

    def progress(self, reserve=0.0):
        """Share of the time that has gone, 0..1, with `reserve` held back at the end; 0 without a limit."""
        spans = [(self.used(), self.budget)] if self.budget else []
        spans += [(time.time() - self.born, self.deadline - self.born)] if self.deadline else []
        return max((min(gone / (whole - reserve), 1.0) if whole > reserve else 1.0 for gone, whole in spans), default=0.0)


# --- files ------------------------------------------------------------------------------------------------------------
def write_aside(path, write, check=None):
    """Write a file so that a crash leaves the old one or the new one: aside, flush, fsync, check, rename.

    write(file) fills a binary file; check(path) raises where what stands on the disk is not whole.
    """
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if check:
            check(part)
        os.replace(part, path)
    except BaseException as e:
        if isinstance(e, OSError) and e.errno:
            e.filename = e.filename or str(path)  # a full disk does not say where
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Write plain values as UTF-8 JSON, aside first."""
    text = json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")  # a file's name need not be UTF-8
    write_aside(path, lambda f: f.write(text))


def read_json(path):
    """The dict in a JSON file; an empty one where there is no file or it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogatepass"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def read_settings(folder):
    """What settings.json of a run folder holds, or its copy in code/ where it is damaged; an empty dict without any."""

    def sound(about):
        files = about.get("files", {})
        lists = files.values() if isinstance(files, dict) else [None]
        names = all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists)
        return about and names and isinstance(about.get("settings", {}), dict) and isinstance(about.get("samples", 0), int)

    both = (read_json(Path(folder) / name) for name in ("settings.json", "code/settings.json"))
    return next((about for about in both if sound(about)), {})


def read_clock(folder):
    """What clock.json of a run folder holds: seconds `used`, the moment `born`, the `process`, as far as they are numbers."""
    state = read_json(Path(folder) / "clock.json")
    return {k: v for k, v in state.items() if isinstance(v, (int, float)) and abs(v) < 1e12}


def check_zip(path):
    """zipfile.BadZipFile unless every record of a torch file has the checksum that it was written with."""
    with zipfile.ZipFile(path) as z:
        if any(record.compress_type != zipfile.ZIP_STORED for record in z.infolist()):
            raise zipfile.BadZipFile("it is compressed, which no checkpoint is")
        if bad := z.testzip():
            raise zipfile.BadZipFile(f"{bad} in it is damaged")


def save_tensors(path, state):
    """torch.save of tensors and plain values, written aside and read back before it takes its name; OSError if that fails."""
    try:
        write_aside(path, lambda f: torch.save(state, f), check_zip)
    except (RuntimeError, zipfile.BadZipFile) as e:  # as torch tells a full disk; and what did not read back
        if is_out_of_memory(e):
            raise
        raise OSError(errno.EIO, (str(e) or "it did not read back").splitlines()[0][:150], str(path)) from e


def load_tensors(path, device="cpu"):
    """What `save_tensors` wrote, on `device`. OSError where it cannot be read, ValueError where it is damaged or is something
    else; code in the file is never run."""
    try:
        check_zip(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL or is_out_of_memory(e):  # that is a place before the file's start
            raise
        raise ValueError(str(e).strip().split("\n")[0][:200] or type(e).__name__) from e


@contextlib.contextmanager
def trained_weights(run_dir, recipe, config, *names):
    """Context manager for a recipe's `load`: gives (settings of a run, path of the first of its files `names` that is there).

    RecipeError where there is none, and for weights that are damaged, hold code or do not fit: for what raises inside.
    """
    about = read_settings(run_dir)
    path = next((p for p in (Path(run_dir) / name for name in names) if p.exists()), None)
    if about.get("recipe") != recipe or not isinstance(about.get("settings"), dict) or not path:
        there = ", ".join(p.name for p in sorted(Path(run_dir).glob("*.pt"))[:9]) or "no weights"
        raise RecipeError(
            f"{run_dir} holds no trained model of {recipe}: no {' or '.join(names)} ({there} in it). Train first, or name its "
            "run folder as --out_dir.", 2)  # fmt: skip
    if path.name == "best.pt":
        say(f"The run in {run_dir} has not finished; these are its best weights so far.")
    try:
        yield config(**{k: v for k, v in about["settings"].items() if k in config.__dataclass_fields__}), path
    except (*UNREADABLE, RuntimeError, LookupError, AttributeError, TypeError, pickle.UnpicklingError) as e:
        if is_out_of_memory(e):
            raise
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise RecipeError(f"{path} holds no network of this run ({why}).", 2) from e


def write_weights(path, state, about=None):
    """Write tensors as .safetensors, with texts `about` them, read back before it takes its name; as .pth where safetensors is
    missing."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError:
        return save_tensors(path.with_suffix(".pth"), state)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}

    def check(part):
        with safe_open(part, "pt") as again:
            if set(again.keys()) != set(state) or not all(torch.equal(again.get_tensor(k), v) for k, v in state.items()):
                raise RecipeError(f"{path.name} did not read back as it was written; is the disk failing?")

    return write_aside(path, lambda f: save_file(state, f.name, about), check)


class Mirror:
    """Copies of a run folder's files in a second folder, made by a thread: a drive that is slow, full or gone stops no run.

    A copy is written aside, flushed, read back (as far as the system does not answer from its own memory) and compared before
    it takes its name; the checkpoint before it stays, as previous.pt. What fails is said and tried again with the next save.
    """

    def __init__(self, source, target, owner):
        self.source, self.target, self.owner, self.thread, self.copied, self.longest = source, target, owner, None, {}, 0.0

    def stranger(self):
        """Why the target is not this run's to write into; an empty text where it is."""
        theirs, used = read_settings(self.target), read_clock(self.target).get("used", 0.0)
        files = (p for p in self.target.rglob("*") if p.is_file() and not p.name.startswith("."))
        if theirs.get("run") != self.owner and (theirs or any(p.relative_to(self.target) not in self.copied for p in files)):
            return "holds another run or other files"
        if (mine := read_clock(self.source).get("used", math.inf)) < used - HEARTBEAT:
            return f"holds this run further on, {clock_text(used)} of training against {clock_text(mine)} in {self.source}"
        return ""

    def start(self):
        """Begin to copy what has changed; while the copying before still goes on, only say that."""
        name = f"copying to {self.target}"
        if any(thread.name == name for thread in threading.enumerate()):  # an earlier run's of this process too
            return say(f"The {name} still goes on; this save is not copied.")
        self.thread = threading.Thread(target=self._copy, name=name, daemon=True)
        return self.thread.start()

    def wait(self, seconds, enough=lambda: False):
        """Wait until the copying is done, for so many seconds at most, or until enough()."""
        end, told = time.monotonic() + seconds, time.monotonic() + 2
        while self.thread and self.thread.is_alive() and not enough():  # in short spells, which Ctrl-C can end everywhere
            self.thread.join(0.2)
            if time.monotonic() > end:
                return say(f"The {self.thread.name} is not done in {clock_text(seconds)}; {self.source} has everything.")
            if time.monotonic() > told:
                told = say(f"Waiting for the {self.thread.name} ...") or math.inf
        return None

    def _copy(self):
        start = time.monotonic()
        try:
            if self.copied and not self.target.is_dir():  # and an empty mount point is not the drive
                raise OSError("the folder is gone; is the drive mounted?")
            self.target.mkdir(exist_ok=True)
            if why := self.stranger():
                raise OSError(f"it {why}")
            names = [Path(top, n).relative_to(self.source) for top, _, files in os.walk(self.source) for n in files]
            first = ("lock", "next.pt", "previous.pt", "latents.pt", "tensorboard")
            names = [n for n in names if not (n.parts[0] in first or any(part.startswith(".") for part in n.parts))]
            for name in sorted(names, key=lambda n: (n.name != "settings.json", n.name == "last.pt")):  # ours, ..., complete
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile: the next save has it
                    about = (self.source / name).stat()
                    state = about.st_size, about.st_mtime_ns
                    self._one(name, state)
        except Exception as e:  # whatever a drive may answer: the run itself is not touched by it
            say(f"No copy in {self.target}: {getattr(e, 'strerror', None) or e}. Training goes on and tries again.")
        self.longest = max(self.longest, time.monotonic() - start)

    def _one(self, name, state):
        """Copy a file whose (size, time) is not what was copied last."""
        target, sums = self.target / name, [hashlib.blake2b(), hashlib.blake2b()]
        there = (target.stat().st_size, target.stat().st_mtime_ns) if target.exists() else None
        if there == state or (there and there[0] == state[0] and self.copied.get(name) == state):
            return  # where the drive keeps times, of an earlier session too
        if self.copied.get(name) and not there:
            say(f"{self.target} did not keep {name}; is that drive full or gone? It is copied again.")

        def blocks(path, total):
            with open(path, "rb") as f:
                while block := f.read(1 << 22):
                    total.update(block)
                    yield block

        def check(part):
            for _ in blocks(part, sums[1]):
                pass
            if sums[0].digest() != sums[1].digest():
                raise OSError(f"{name} did not read back as it was written")
            if name.name == "last.pt" and target.exists():
                os.replace(target, target.with_name("previous.pt"))

        target.parent.mkdir(exist_ok=True)
        write_aside(target, lambda f: [f.write(b) for b in blocks(self.source / name, sums[0])], check)
        self.copied[name] = state
        os.utime(target, ns=(state[1], state[1]))


class Parts(types.SimpleNamespace):
    """What a recipe's `build` returns: models, optimizers, EMA by name. All that have a state go into checkpoints."""

    def state_dict(self):
        return {k: v.state_dict() for k, v in vars(self).items() if hasattr(v, "state_dict")}

    def load_state_dict(self, state):
        mine = {k for k, v in vars(self).items() if hasattr(v, "state_dict")}
        if set(state) != mine:
            raise KeyError(f"it holds {', '.join(sorted(map(str, state)))}, and {', '.join(sorted(mine))} are wanted")
        for name in state:
            getattr(self, name).load_state_dict(state[name])


def with_state(opt):
    """`opt`, an Adam or SGD whose rate is 0, with its state allocated, as memory planning and `Run.resume` want it."""
    weights = [p for group in opt.param_groups for p in group["params"]]
    for p in weights:
        p.grad = torch.zeros_like(p)
    opt.step()
    for value in (v for state in opt.state.values() for v in state.values()):
        value.zero_()
    opt.zero_grad(set_to_none=True)
    return opt


class EMA:
    """Running average of a model's weights; the decay warms up: min(decay, (1 + k) / (10 + k)) at update k.

    A fixed 0.9999 over 440 updates would be 96 % initialisation. `ema.model` is the averaged copy, in eval mode; weights
    that are frozen when it is made are no copies.
    """

    def __init__(self, model, decay=0.999):
        known = {id(p.fake_mode): p.fake_mode for p in model.parameters() if hasattr(p, "fake_mode")}  # of a planned run
        known |= {id(p): p for p in model.parameters() if not p.requires_grad}  # frozen weights are shared
        self.model, self.decay, self.updates = copy.deepcopy(model, known).eval(), decay, 0
        for mine, new in zip(self.model.parameters(), model.parameters()):
            mine.requires_grad_(False) if mine is not new else None

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(a, b) for a, b in zip(self.model.parameters(), model.parameters()) if a is not b]
        torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - keep)
        for mine, new in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(new)

    def state_dict(self):
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


# --- data -------------------------------------------------------------------------------------------------------------
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)


def open_image(path):
    """Image.open for files that are data alone: to open a few other kinds, such as EPS, Pillow would run a program."""
    Image.init()
    return Image.open(path, formats=FORMATS)


def read_image(path):
    """An image file as uint8, [height, width] for a gray one, else [height, width, 3].

    Palettes are resolved, transparency lies on white, 16 bits are scaled to 8 and not clipped (floats by their own
    range), EXIF orientation is applied. Raises one of `UNREADABLE` for a file that is none or is cut short.
    """
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16-bit, 32-bit and float gray
            values = np.nan_to_num(np.asarray(image, np.float64))
            low, high = min(values.min(), 0), max(values.max(), 1e-9)
            high = 65535 if image.mode[0] == "I" and high <= 65535 else high
            return ((values - low) * (255 / (high - low)) + 0.5).astype(np.uint8)
        if image.mode not in ("1", "L", "RGB"):
            rgba = image.convert("RGBA")
            gray = image.mode in ("LA", "La") or (image.mode == "P" and rgba.convert("RGB").getcolors(256) is not None
                and all(r == g == b for _, (r, g, b) in rgba.convert("RGB").getcolors(256)))  # fmt: skip
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L" if gray else "RGB")
        return np.array(image.convert("L") if image.mode in "1L" else image)


def find_images(folder, what="images", types=IMAGE_TYPES):
    """Files below `folder` that end in one of `types`, sorted. RecipeError says what was searched, what is there, and the
    nearest ones."""
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise RecipeError(f"{folder} is a file; give the folder that holds the {what}, or a .csv list of them.", 2)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.name.lower().endswith(types)]
    if images:
        return images
    kinds = [p.suffix.lower() or "without a suffix" for p in files]
    found = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds), key=kinds.count)[-5:]) or "no file"
    message = f"No {what} in {folder}: {f'{found} in it.' if folder.is_dir() else 'there is no such folder.'}"
    if ".dcm" in kinds:
        message += " DICOM is not read: convert slices to PNG with pydicom, volumes to .nii.gz with dcm2niix."
    home = next(p for p in folder.absolute().parents if p.is_dir())
    around = itertools.islice((p for pattern in ("*", "*/*", "*/*/*") for p in home.glob(pattern)), 20000)  # not all of "/"
    near = [p.parent for p in around if p.name.lower().endswith(types)]
    if near:
        near = max(near, key=lambda p: difflib.SequenceMatcher(None, p.name, folder.name).ratio())
        message += f" The nearest folder with such files is {near}."
    raise RecipeError(f"{message} They end in {' '.join(types)}.", 2)


def read_table(path):
    """Rows of a CSV `image[,mask][,label][,split][,group]` as dicts; image and mask are paths beside the CSV."""
    path = Path(path).expanduser()
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise RecipeError(f"Cannot read the list {path}: {e}. It must be a CSV file in UTF-8.", 2) from None
    if not rows or not rows[0].get("image"):
        head = ", ".join(filter(None, rows[0])) if rows else "no rows"
        raise RecipeError(f"{path} needs a first line that names a column image (mask, label, split, group); it has {head}.", 2)
    return [r | {k: path.parent / r[k] for k in ("image", "mask") if r.get(k)} for r in rows if r["image"]]


def open_records(cfg, types=IMAGE_TYPES):
    """(training records, validation records): dicts with `image` and whatever other columns the CSV has; files end in `types`.

    `data_dir` and `val_dir` are folders or CSVs; of a folder with images/ in it, that, and its masks/ go with them where
    the recipe has a `mask_dir`. Without a `val_dir` the CSV's split column decides (val..., test against the rest), else a
    tenth is split off by seed; a `group` never straddles the split. `sample_ratio` thins the training records.
    """

    def listed(place, what, masks=""):
        if str(place).lower().endswith(".csv"):
            return read_table(place)
        root = Path(place).expanduser()
        below = {p.name.lower(): p for p in sorted(root.iterdir()) if p.is_dir()} if root.is_dir() else {}
        inside = below.get("images", root)
        masks = Path(masks).expanduser() if masks else below.get("masks")
        images = [p for p in find_images(inside, what, types) if not masks or masks.absolute() not in p.absolute().parents]
        return pair_masks(images, masks, inside) if masks and hasattr(cfg, "mask_dir") else [{"image": p} for p in images]

    train = listed(cfg.data_dir, "training images", getattr(cfg, "mask_dir", ""))
    groups = [r.get("group") or str(r["image"]) for r in train]
    if any(r.get("split") for r in train):
        held = {g for g, r in zip(groups, train) if str(r.get("split")).strip().lower()[:3] in ("val", "tes")}
        both = held & {g for g, r in zip(groups, train) if str(r.get("split")).strip().lower()[:3] not in ("val", "tes")}
        if both:
            raise RecipeError(f"{cfg.data_dir} puts group {min(both)!r} on both sides of the split; give it one split.", 2)
    else:
        names = sorted(set(groups), key=lambda g: (mix(cfg.seed, os.path.basename(g)), g))
        held = set() if cfg.val_dir else set(names[: max(1, round(len(names) / 10))])
    val = listed(cfg.val_dir, "validation images") if cfg.val_dir else [r for g, r in zip(groups, train) if g in held]
    out = {os.path.abspath(r["image"]) for r in val}  # a val_dir may lie inside the data_dir
    train = [r for g, r in zip(groups, train) if g not in held and os.path.abspath(r["image"]) not in out]
    keep = np.random.default_rng(cfg.seed).permutation(len(train))[: max(1, round(len(train) * cfg.sample_ratio))]
    if not train or not val:
        raise RecipeError(f"{cfg.data_dir} gives {len(train)} training and {len(val)} validation images; each needs one.", 2)
    return [train[i] for i in sorted(keep)], val


MASK_WORDS = r"([_\-. ](image|img|train|training|test|masks?|manual\d*|gt|labels?|seg|segmentation|annotation|vessels?))+$"


def pair_masks(images, folder, root):
    """Records {image, mask} of the images below `root` that have a mask in `folder`; what stays alone is named.

    A mask belongs to the image of the same path, else of the same name, whatever the suffix; else to the one whose name it
    continues after one of "_-. " (21.tif, 21_manual1.gif), else to the one that equals it without words such as _training,
    _mask or _manual1 (21_training.tif). Of several the first in the alphabet is taken, and said.
    """
    if not images:
        raise RecipeError(f"All images in {root} are in the folder of masks, {folder}: give images and masks a folder each.", 2)
    masks, names, records, alone, many, used = find_images(folder, "masks"), {}, [], [], [], set()
    for p in masks:
        stem = p.stem.lower()
        keys = [str(p.relative_to(folder).with_suffix("")), "=" + stem, "+" + re.sub(MASK_WORDS, "", stem)]
        for key in dict.fromkeys(keys + ["-" + stem[: m.start()] for m in re.finditer(r"[_\-. ]", stem)]):
            names.setdefault(key, []).append(p)
    for p in images:
        stem = p.stem.lower()
        keys = (str(p.relative_to(root).with_suffix("")), "=" + stem, "-" + stem, "+" + re.sub(MASK_WORDS, "", stem))
        found = next((names[k] for k in keys if k in names), [])
        used.update(found)
        if found:
            records.append({"image": p, "mask": found[0]})
            many += [f"{p.name}: {', '.join(m.name for m in found[:4])}"] if len(found) > 1 else []
        else:
            alone.append(p.name)
    unused = [p.name for p in masks if p not in used]
    if not records:
        raise RecipeError(f"No mask in {folder} belongs to an image: there is {masks[0].name}, and an image is {alone[0]}. "
            "Give them the same names, or a CSV with columns image and mask.", 2)  # fmt: skip
    for texts, what in ((alone, "images have no mask and are left out"), (unused, "masks belong to no image"),
        (many, "images have more than one mask; the first is taken (merge them into label masks, or give a CSV)")):  # fmt: skip
        if texts:
            say(f"{len(texts)} {what}: {', '.join(texts[:5])}{' ...' * (len(texts) > 5)}")
    return records


def read_labels(path):
    """A mask file as int32 [height, width]: gray values as they stand, a colour as 0x1RRGGBB."""
    with open_image(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode not in ("1", "L", "RGB") and image.mode[0] not in "IF":
            image = image.convert("L" if image.mode in ("LA", "La") else "RGB")
        values = np.asarray(image)
    if values.ndim == 2:
        return values.astype(np.int32)
    r, g, b = (values[..., k] for k in range(3))
    colour = 1 << 24 | r.astype(np.int32) << 16 | g.astype(np.int32) << 8 | b
    return np.where((r == g) & (g == b), r, colour)


def find_labels(paths, check=lambda: None):
    """The values by which masks tell their classes, background first; `[-v]` stands for one class, v and above.

    Prints what was found. RecipeError where no mask tells anything apart, or colours are too many to be classes.
    """
    counts, empty, bad = {}, 0, 0

    def count(path):
        try:
            return np.unique(read_labels(path), return_counts=True)
        except UNREADABLE:
            return (), ()  # `Items` names it

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for values, times in pool.map(count, paths):
            check()
            empty, bad = empty + (len(values) == 1), bad + (len(values) == 0)
            for v, n in zip(values, times):
                counts[int(v)] = counts.get(int(v), 0) + int(n)
    values, total = sorted(counts), max(sum(counts.values()), 1)
    named = ", ".join(f"#{v - (1 << 24):06x}" if v >> 24 else str(v) for v in values[:16])
    if empty == len(paths) - bad:
        raise RecipeError(f"All {len(paths)} masks have one value throughout ({named}), e.g. {paths[0]}: they say nothing. "
            "Look at them, or train without masks on the folder of images alone.", 2)  # fmt: skip
    if values == [0, 1, 255]:
        raise RecipeError(f"The masks in {paths[0].parent} hold 0, 1 and 255: two sources that mean the same? Save all of "
            "them with 0 and 255.", 2)  # fmt: skip
    if len(values) <= 16:
        first = 0 if 0 in counts else max(values, key=counts.get)
        labels = [first, *(v for v in values if v != first)]
        shares = ", ".join(f"{counts[v] / total:.2%} of the pixels" for v in labels[1:])
        said = f"values {named}: background is {first}, {len(labels) - 1} class{'es' * (len(labels) > 2)} ({shares})"
    elif values[-1] >> 24:
        raise RecipeError(f"The masks have {len(values)} colours, too many for classes: {named} ... Save them as PNG, which "
            "keeps colours exact, one colour a class.", 2)  # fmt: skip
    else:
        middle = (values[0] + values[-1]) // 2
        labels, share = [-middle - 1], sum(n for v, n in counts.items() if v > middle) / total
        said = f"{len(values)} values from {values[0]} to {values[-1]}: one class, above {middle} ({share:.2%} of the pixels)"
    say(f"Masks: {said}; {empty} of {len(paths)} are of one value.")
    return labels


def read_mask(path, labels):
    """A mask file as bool [classes, height, width] by the `find_labels` of the training; with one class, whatever is not the
    background is set. ValueError for values that the training did not have."""
    values = read_labels(path)
    if labels[0] < 0:
        return (values >= -labels[0])[None]
    if len(labels) == 2:
        return (values != labels[0])[None]
    if strange := set(np.unique(values).tolist()) - set(labels):
        raise ValueError(f"its value {min(strange)} is none of the training's: {', '.join(map(str, labels))}")
    return np.stack([values == v for v in labels[1:]])


def colour(image, path):
    """What a recipe's load_item made of the file `path`, uint8 [h, w] or [h, w, 3], as [h, w, 3]; RecipeError where it is
    something else."""
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or image.dtype != np.uint8:
        raise RecipeError(f"load_item must return uint8 [h, w] or [h, w, 3]; for {path}: {image.dtype} {image.shape}.")
    return image if image.ndim == 3 else np.stack([image] * 3, 2)


def square(image, size, how=Image.Resampling.LANCZOS):
    """The middle square of a uint8 array [h, w, ...], resized to size x size."""
    h, w = image.shape[:2]
    s = min(h, w)
    left, top = (w - s) // 2, (h - s) // 2
    return np.asarray(Image.fromarray(image).resize((size, size), how, box=(left, top, left + s, top + s)))


class Items:
    """Decoded files by index: in RAM while they fit (`cached` says whether all do); a bad one's slot takes the next good.

    load(path) returns an array, or raises one of `UNREADABLE` for a file that cannot be used. Bad files are named;
    RecipeError when they are more than a fifth (and than three).
    """

    def __init__(self, paths, load, what="training", check=lambda: None, share=0.5):
        self.paths, self.load, self.what, self.kept, self.bad = list(paths), load, what, {}, {}
        room, told = free_memory() * share / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), time.monotonic()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for i in range(0, len(self.paths), 64):  # in blocks, so that a full RAM and a stop signal are seen in time
                check()
                block = range(i, min(i + 64, len(self.paths))) if room > 0 else ()
                for j, item in zip(block, pool.map(self._read, block)):
                    self.kept[j] = item
                    room -= sum(a.nbytes for a in (item if isinstance(item, tuple) else (item,)) if a is not None)
                if time.monotonic() - told > HEARTBEAT:
                    told = time.monotonic()
                    say(f"Read {i} of {len(self.paths)} {what} files.")
        self.cached = room > 0

    def _read(self, i):
        if i in self.bad:
            return None
        try:
            return self.load(self.paths[i])
        except UNREADABLE as e:
            self.bad[i] = f"{self.paths[i]['image'] if isinstance(self.paths[i], dict) else self.paths[i]} ({e})"
            if len(self.bad) <= 5:
                say(f"Bad {self.what} file, its place takes the next good one: {self.bad[i]}")
            if len(self.bad) > max(3, len(self.paths) / 5) or len(self.bad) == len(self.paths):
                few = "; ".join(why for _, why in sorted(self.bad.items())[:3])
                raise RecipeError(f"{len(self.bad)} of {len(self.paths)} {self.what} files cannot be used: {few}.") from None

    def __getstate__(self):
        return vars(self) | {"kept": {}}  # a spawned worker reads for itself; a forked one shares the memory

    def __len__(self):
        return len(self.paths)

    def place(self, i):
        """The file that stands in for i as far as is known: i itself, or for a bad one the next good one."""
        return next(j % len(self) for j in range(i, i + len(self)) if j % len(self) not in self.bad)

    @property
    def good(self):
        """How many are not known to be bad."""
        return len(self.paths) - len(self.bad)

    def _get(self, i):
        return self.kept[i] if i in self.kept else self._read(i)

    def __iter__(self):
        """The good ones, each once."""
        return (item for item in map(self._get, range(len(self.paths))) if item is not None)

    def __getitem__(self, i):
        return next(item for j in range(i, i + len(self.paths)) if (item := self._get(j % len(self.paths))) is not None)


def ignore_signals(worker):
    """Worker set-up: a terminal's Ctrl-C reaches the workers too, but it is the run that decides when they end."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def as_is(batch):
    """Collate function: a dataset whose __getitems__ makes whole batches is left alone."""
    return batch if isinstance(batch, dict) else torch.utils.data.default_collate(batch)


def mirrored(x, flip):
    """x [n, ..., h, w] and its mirrorings that --flip takes (none, h, hv): [n, mirrorings, ..., h, w]."""
    dims = {"none": [()], "h": [(), (-1,)], "hv": [(), (-1,), (-2,), (-2, -1)]}[flip]
    return torch.stack([x.flip(d) if d else x for d in dims], 1)


def cached_latents(items, encode, key, cfg, run):
    """Latents [images, mirrorings, c, h, w] of all items (uint8 [3, h, w], first in a tuple or alone) in fp16.

    encode(uint8 [n, 3, h, w]) makes them once; they stay in latents.pt of the run folder as long as the files and `key`,
    which tells encoders apart, are the same.
    """
    files = [
        (str(p), p.stat().st_mtime_ns if p.exists() else 0) for p in (r["image"] for r in items.paths if isinstance(r, dict))
    ]
    key, path, state = mix(files or items.paths, key, cfg.target_size, cfg.flip), run.folder / "latents.pt", {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        state = load_tensors(path) if run.main else {}
    if run.main and not (isinstance(state, dict) and state.get("key") == key):
        say(f"Encoding {len(items)} images into latents, once ...")
        done, group, told = [], max(1, 2**16 // cfg.target_size**2), time.monotonic()
        for i in range(0, len(items), group):
            run.check()
            part = [items[j] for j in range(i, min(i + group, len(items)))]
            images = mirrored(torch.from_numpy(np.stack([a[0] if isinstance(a, tuple) else a for a in part])), cfg.flip)
            done.append(encode(images.flatten(0, 1)).half().cpu().unflatten(0, images.shape[:2]))
            if time.monotonic() - told > HEARTBEAT:
                told = time.monotonic()
                say(f"{i} of {len(items)} images are encoded.")
        state = {"key": key, "latents": torch.cat(done), "bad": items.bad}
        run.write(lambda: save_tensors(path, state), must=run.world > 1)  # alone, this process has them in memory
    if run.world > 1:
        torch.distributed.barrier()
    state = state or load_tensors(path)
    items.bad |= state.get("bad", {})  # so that `Items.place` knows whose latents these are
    return state["latents"]


class VAE:
    """Latents of a diffusers AutoencoderKL folder, shifted and scaled as its config.json says."""

    def __init__(self, folder, device):
        try:
            warnings.filterwarnings("ignore", module="diffusers")
            from diffusers import AutoencoderKL
        except ImportError:
            raise RecipeError("--vae needs diffusers: pip install diffusers", 2) from None
        folder = Path(folder).expanduser()
        folder = folder / "vae" if (folder / "vae" / "config.json").exists() else folder
        if not (folder / "config.json").exists():
            raise RecipeError(f"--vae {folder} has no config.json; give the folder of an AutoencoderKL, e.g. sdxl-vae.", 2)
        try:
            self.model = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as e:
            raise RecipeError(
                f"--vae {folder} cannot be read ({str(e).splitlines()[0][:150]}). Is its download whole?", 2
            ) from None
        self.model = self.model.to(device).eval().requires_grad_(False)
        about = self.model.config
        self.channels, self.factor = about.latent_channels, 2 ** (len(about.block_out_channels) - 1)
        self.scale, self.offset = about.scaling_factor, getattr(about, "shift_factor", None) or 0.0
        self.key = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())]

    def prepare(self, items, cfg, run):
        """`cached_latents` of the items."""
        return cached_latents(items, self.encode, self.key, cfg, run)

    @torch.no_grad()
    def encode(self, images):
        x = images.to(self.model.device).float() / 127.5 - 1
        return (self.model.encode(x).latent_dist.mode() - self.offset) * self.scale

    @torch.no_grad()
    def decode(self, x):
        images = [self.model.decode(part / self.scale + self.offset).sample for part in x.float().split(2)]
        return ((torch.cat(images) + 1) * 127.5).round().clamp(0, 255).byte()


# --- pictures ---------------------------------------------------------------------------------------------------------
def picture(rows, titles=(), zoom=1, names=()):
    """A PIL image: a grid of uint8 arrays (gray or RGB), `rows` of equal length, `titles` above the columns, `names` before
    the rows."""
    rows = [[np.asarray(a).repeat(zoom, 0).repeat(zoom, 1) for a in row] for row in rows]
    gap, top, font = 6, 30 if titles else 6, ImageFont.load_default()
    left = gap + max((int(font.getlength(name)) + gap for name in names), default=0)
    widths = [gap + max(row[c].shape[1] for row in rows) for c in range(len(rows[0]))]
    heights = [gap + max(a.shape[0] for a in row) for row in rows]
    sheet = Image.new("RGB", (left + sum(widths), top + sum(heights)), "white")
    for c, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((left + sum(widths[:c]), 9), title, "black", font)
    for r, name in enumerate(names):
        ImageDraw.Draw(sheet).text((gap, top + sum(heights[:r]) + rows[r][0].shape[0] // 2 - 6), name, "black", font)
    for r, row in enumerate(rows):
        for c, a in enumerate(row):
            sheet.paste(Image.fromarray(a).convert("RGB"), (left + sum(widths[:c]), top + sum(heights[:r])))
    return sheet


def overlay(image, mask, fill=False):
    """uint8 [h, w, 3] of an image [3, h, w] with its mask [classes, h, w], one colour a class: outlines in large images."""
    out = image.transpose(1, 2, 0).copy()
    for m, colour in zip(mask if mask is not None else (), ((0, 255, 0), (0, 160, 255), (255, 255, 0), (255, 0, 255)) * 4):
        inside = m.copy()
        inside[1:-1, 1:-1] &= m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]
        out[m if fill or max(m.shape) <= 128 else m & ~inside] = colour
    return out


def mask_picture(mask):
    """uint8 [h, w, 3] of a mask [classes, h, w] alone: white, or one colour a class."""
    empty = np.zeros((3, *mask.shape[1:]), np.uint8)
    return np.uint8(mask[0][..., None] * 255).repeat(3, 2) if len(mask) == 1 else overlay(empty, mask, fill=True)


def copy_rate(samples, thumbs):
    """Share of samples uint8 [n, 3, s, s] whose nearest training image (`thumbs` [N, mirrorings, 3, 32, 32]) is nearer than a
    third of the way to the second nearest (Yoon et al., "Diffusion models generalize when they fail to memorize", 2023)."""
    small = torch.nn.functional.interpolate(samples.float(), thumbs.shape[-2:], mode="area").flatten(1)
    far = torch.cdist(small, thumbs.flatten(2).flatten(0, 1)).view(len(small), *thumbs.shape[:2]).amin(2)
    near = far.topk(min(2, far.shape[1]), largest=False).values
    return float((near[:, 0] < near[:, -1] / 3).float().mean()) if near.shape[1] > 1 else 1.0


def fundus(name, size):
    """A built-in image like a fundus photograph, uint8 [size, size, 3], and its mask of vessels, bool [1, size, size]."""
    rng, big = np.random.default_rng(mix(name)), 3 * size
    sheet, mask = Image.new("RGB", (big, big)), Image.new("1", (big, big))
    tone, middle, side = rng.uniform(0.75, 1.15), big * rng.uniform(0.47, 0.53, 2), rng.choice([-1, 1])
    draw, ink, radius = ImageDraw.Draw(sheet), ImageDraw.Draw(mask), big * rng.uniform(0.44, 0.49)
    for k in range(24):  # darker towards the rim
        r = radius * (1 - k / 40)
        colour = tuple(int(tone * c * (0.62 + 0.38 * k / 23)) for c in (190, 88, 40))
        draw.ellipse([*(middle - r), *(middle + r)], fill=colour)
    disc = middle + [side * radius * rng.uniform(0.45, 0.6), radius * rng.uniform(-0.1, 0.1)]
    vessels = [(disc, a + rng.normal(0, 0.2), 0.028 * big, 0) for a in np.arange(6) * math.pi / 3]
    while vessels:
        at, angle, width, depth = vessels.pop()
        for _ in range(int(rng.integers(6, 11))):
            turn = math.atan2(middle[1] - at[1], middle[0] - at[0]) - angle  # bend round the middle, towards its side
            angle += 0.12 * math.sin(turn) + rng.normal(0, 0.1)
            to = at + 0.05 * big * np.array([math.cos(angle), math.sin(angle)])
            if np.linalg.norm(to - middle) > 0.97 * radius:
                break
            for d, fill in ((draw, tuple(int(tone * c) for c in (120, 28, 22))), (ink, 1)):
                d.line([tuple(at), tuple(to)], fill=fill, width=max(2, int(width)))
            at = to
        if depth < 3:
            vessels += [(at, angle + s * rng.uniform(0.2, 0.6), 0.7 * width, depth + 1) for s in (-1, 1)]
    draw.ellipse([*(disc - 0.07 * big), *(disc + 0.07 * big)], fill=tuple(int(tone * c) for c in (215, 165, 100)))
    image = np.asarray(sheet.resize((size, size), Image.Resampling.BOX), np.float32) + rng.normal(0, 3, (size, size, 3))
    mask = np.asarray(mask.convert("L").resize((size, size), Image.Resampling.BOX))
    return image.clip(0, 255).astype(np.uint8), (mask >= 64)[None]


def draw_curves(log, path):
    """Draw the loss and the judged metric of a log.jsonl, all sessions together, into one PNG picture."""
    from matplotlib.figure import Figure

    rows = {}
    for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(Exception):  # whatever is in it: a full disk tears lines
            row = json.loads(line)
            row = {k: v for k, v in row.items() if k == "metric" or (isinstance(v, (int, float)) and abs(v) < 1e300)}
            rows[int(row["step"]), str(row.get("metric", "")) in row] = row  # what a killed session did was done again
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, judged in zip(figure.subplots(1, 2), (False, True)):
        part = [row for (_, is_judged), row in sorted(rows.items()) if is_judged == judged]
        name = str(part[-1].get("metric", "loss")) if part else ""
        for key in (k for k in (part[-1] if part else ()) if k.startswith(name) and k != "metric"):
            axis.plot([row["step"] for row in part], [row.get(key, math.nan) for row in part], label=key)
        axis.set(xlabel="update", ylabel=name if judged else "training loss")
        axis.legend() if axis.lines else None
    figure.savefig(path, dpi=110, format="png")


# --- the run ----------------------------------------------------------------------------------------------------------
KEPT = tuple("step progress was best stale judged settled cut begin reserve rate_scale".split())  # saved with a run
CHECKPOINTS = ("next.pt", "last.pt", "previous.pt")  # newest first; next.pt is last.pt on its way


class Run:
    """One training run: device, folder, clock, log, checkpoints, updates. Open it with `with Run(cfg, "name") as run:`.

    A `Run(cfg)` that is not entered serves build, train_step and eval_step (planner, benchmarks, `load`); with `planned`
    they also run on fake tensors, as if on a device `kind` of this compute `capability`.

    step: updates done; progress: share of the run that has gone, 0..1; samples: samples per update of all processes;
    micro: samples per forward pass; dtype: autocast's; main: whether this process writes.
    """

    def __init__(self, cfg, recipe="", kind=None, capability=(8, 0)):
        for f in dataclasses.fields(cfg):
            check_setting(f, getattr(cfg, f.name), f.name)
        self.cfg, self.recipe, self.planned = cfg, recipe, kind is not None
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.samples, self.micro = self.rank == 0, cfg.batch_size * cfg.accumulate * self.world, cfg.batch_size
        self.device, self.device_name, self.kind = torch.device("cpu"), kind, kind
        if not self.planned:
            self.device, self.device_name = choose_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
            self.kind = self.device.type
            capability = torch.cuda.get_device_capability(self.device) if self.kind == "cuda" else capability
        self.dtype, why = choose_dtype(self.kind, capability, cfg.use_amp, cfg.amp_dtype)
        name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]
        self.title = f"{recipe}: {self.device_name}, {name} ({why})"
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.dtype is torch.float16 and not self.planned)
        self.generator = torch.Generator(self.device)
        self.step, self.progress, self.was, self.begin, self.best, self.stale, self.cut = 0, 0.0, 0.0, 0.0, {}, 0, None
        self.reserve, self.rate_scale, self.lr, self.bad, self.step_time, self.first = 0.0, 1.0, 0.0, 0, 0.0, 0
        self.parts = self.data = self.board = self.bar = self.mirror = self.late = None
        self.clock = Clock()
        self.asked, self.saved, self.judged, self.ddp, self.probed, self.sums, self.settings = "", -1, -1, {}, set(), {}, {}
        self.leaving = self.stepping = self.rehearsing = self.hurried = self.worse = self.rescued = False
        self.settled, self.undo, self.process = True, contextlib.ExitStack(), os.getpid()
        folder = cfg.out_dir or os.path.join("results", recipe + ("" if cfg.data_dir else "-demo"))
        self.folder = Path(folder).expanduser()

    # - opening and closing
    def __enter__(self):
        with contextlib.ExitStack() as undo:  # what is opened here is closed here, should a later line raise
            cfg, head_start = self.cfg, getattr(self.cfg, "head_start", 0.0)
            if self.kind == "cpu":
                keep_freed_memory()
            self.clock = Clock(duration(cfg.time_budget), moment(cfg.deadline), duration(cfg.session_limit), head_start)
            cfg.head_start = 0.0
            if self.world > 1 and not torch.distributed.is_initialized():
                limit = datetime.timedelta(seconds=float(os.environ.get("PROCESS_TIMEOUT", 1800)))
                torch.distributed.init_process_group("nccl" if self.kind == "cuda" else "gloo", timeout=limit)
                undo.callback(torch.distributed.destroy_process_group)
                undo.callback(lambda: (self.ddp.clear(), gc.collect()))  # DDP must go before the group that it holds
            if self.kind == "cuda":
                torch.cuda.set_device(self.device)
                torch.cuda.reset_peak_memory_stats()
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            undo.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
            if self.main:
                self._open_folder(undo)
            if self.world > 1:
                torch.distributed.barrier()
            started = any((self.folder / name).exists() for name in CHECKPOINTS)
            about = read_settings(self.folder)  # before a checkpoint nothing is lost by changing them
            self.settings = about if started else {"run": about.get("run")}
            past = read_clock(self.folder)
            self.clock.before, self.clock.born = past.get("used", 0.0), past.get("born", self.clock.born)
            self._compare()
            if not started and 0 < self.clock.deadline < time.time():
                raise RecipeError(f"--deadline is {cfg.deadline!r}; it has passed, now is {time.strftime('%F %H:%M')}.", 2)
            for name in ("SIGINT", "SIGTERM", "SIGUSR1") if threading.current_thread() is threading.main_thread() else ():
                if hasattr(signal, name):
                    undo.callback(signal.signal, getattr(signal, name), signal.signal(getattr(signal, name), self._on_signal))
            hook = threading.excepthook
            undo.callback(setattr, threading, "excepthook", hook)  # TensorBoard writes in a thread, and a full disk is no bug
            threading.excepthook = lambda e: say(f"In a thread: {e.exc_value}") if isinstance(e.exc_value, OSError) else hook(e)
            if self.main:
                done = threading.Event()
                beat = threading.Thread(target=self._beat, args=(done,), daemon=True)
                beat.start()
                undo.callback(lambda: (done.set(), beat.join()))
            say(
                f"{self.title}; {self.samples} samples per update = {cfg.batch_size} x {cfg.accumulate} x {self.world} "
                f"process{'es' * (self.world > 1)}; folder {self.folder}"
            )
            self.undo = undo.pop_all()
        return self

    def _open_folder(self, undo):
        """Check, make and lock the run folder; rename it for --fresh; fill it for --continue_from or from --mirror_dir."""
        folder, theirs = self.folder, read_settings(self.folder).get("recipe")
        inside = [p for p in folder.iterdir() if p.name != "lock" and p.suffix != ".part"] if folder.is_dir() else []
        strangers = folder.is_file() or inside
        if strangers and theirs != self.recipe:
            what = f"a run of {theirs}" if theirs else "files that are not a run of this recipe"
            raise RecipeError(f"{folder} holds {what}; nothing was touched. Choose another --out_dir.", 2)
        mirror = Path(self.cfg.mirror_dir).expanduser() if self.cfg.mirror_dir else None
        if self.cfg.fresh and theirs:
            self._lock().release()  # nobody is in it
        if mirror:
            a, b = folder.resolve(), mirror.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise RecipeError(f"--mirror_dir {mirror} and the run folder {folder} lie in each other; choose a folder on "
                    "another disk.", 2)  # fmt: skip
            if not any((folder / name).exists() for name in CHECKPOINTS) or self.cfg.fresh:
                try:
                    mirror.mkdir(exist_ok=True)
                except OSError as e:
                    raise RecipeError(
                        f"--mirror_dir {mirror}: {e.strerror}. Is the drive mounted? Nothing was begun.", 2
                    ) from None
            mine, copy = read_settings(folder).get("run"), read_settings(mirror)
            whose = copy.get("recipe") == self.recipe and mine in (None, copy.get("run")) and not (mirror / "lock").exists()
            if self.cfg.fresh and whose:
                self._rename_older(mirror)
            elif self.cfg.fresh and (why := Mirror(folder, mirror, mine).stranger()):
                raise RecipeError(f"--mirror_dir {mirror} {why}; nothing was touched. Choose another --mirror_dir.", 2)
        if self.cfg.fresh and theirs:
            self._rename_older(folder)
        folder.mkdir(parents=True, exist_ok=True)
        undo.callback(self._lock().release)
        for part in folder.glob(".*.part") if theirs else ():  # what a kill left of a write
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        self._name_run()  # known as ours from now on
        if self.cfg.continue_from and not any((folder / name).exists() for name in CHECKPOINTS[:2]):
            source = Path(self.cfg.continue_from).expanduser()
            if mirror and not self.cfg.fresh and read_settings(mirror).get("run", 0) == read_settings(source).get("run"):
                if read_clock(mirror).get("used", 0) > read_clock(source).get("used", 0):
                    source = mirror  # an earlier session went on from --continue_from
            theirs = read_settings(source).get("recipe")
            if theirs != self.recipe or not any((source / name).exists() for name in CHECKPOINTS):
                what = f"a run of {theirs}" if theirs not in (None, self.recipe) else "no checkpoint"
                raise RecipeError(f"--continue_from {source} holds {what}; give the run folder of an earlier session.", 2)
            self._fill(source)
        if mirror:
            self._open_mirror(mirror)

    def _name_run(self, name=""):
        """Give the run in the folder a name of its own, where it has none or `name` is that of the copy to go on from."""
        about = read_settings(self.folder)
        if name or not about.get("run"):
            name = name or os.urandom(8).hex()
            write_json(self.folder / "settings.json", {"recipe": self.recipe} | about | {"run": name})

    def _rename_older(self, folder):
        older = next(p for p in (folder.with_name(f"{folder.name}-old{n}") for n in range(1, 10**6)) if not p.exists())
        folder.rename(older)
        say(f"--fresh: the older run is now {older}")

    def _fill(self, source):
        """Copy what a run goes on from into the run folder."""
        names = ("clock.json", "best.pt", "log.jsonl", "previous.pt", "last.pt")  # the last completes it
        write_json(self.folder / "settings.json", read_settings(source))
        for name in (n for n in names if (source / n).exists()):
            with open(source / name, "rb") as f:
                write_aside(self.folder / name, functools.partial(shutil.copyfileobj, f))
        self._name_run()  # which an old one lacks
        say(f"Continuing the run of {source} in {self.folder}")

    def _open_mirror(self, target):
        """Check --mirror_dir, and go on from the run in it where the run folder has none. RecipeError where it cannot be used
        at the start of a run; later that is only said."""
        folder, where = self.folder, f"--mirror_dir {target}"
        started, half = (any((folder / name).exists() for name in names) for names in (CHECKPOINTS[:2], CHECKPOINTS))
        self.mirror = Mirror(folder, target, read_settings(folder)["run"])
        try:
            theirs, copied = read_settings(target), any((target / name).exists() for name in CHECKPOINTS)
            older = read_clock(target).get("used", 0) < read_clock(folder).get("used", 0) - HEARTBEAT
            if not (started or self.cfg.fresh or (half and older)) and theirs.get("recipe") == self.recipe:
                self._fill(target) if copied else self._name_run(theirs.get("run"))
            self.mirror.owner = read_settings(folder)["run"]
            target.mkdir(exist_ok=True)
            why = self.mirror.stranger()
        except OSError as e:
            return say(f"{e.filename or where}: {e.strerror}. Training goes on and tries again.")
        if why:
            raise RecipeError(f"{where} {why}; nothing was touched. Choose another --mirror_dir, or an empty --out_dir to go "
                "on from it.", 2)  # fmt: skip
        return None

    def _lock(self):
        lock = filelock.FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
            return lock
        except filelock.Timeout:
            owner = read_json(self.folder / "clock.json").get("process", "unknown")
            raise RecipeError(f"{self.folder} is in use by process {owner}; wait for it or choose another --out_dir.") from None
        except (OSError, NotImplementedError) as e:
            say(f"{self.folder} cannot be locked ({e}); do not start a second run in it.")
            return lock

    def __exit__(self, kind, error, trace):
        with self.undo:
            broke = isinstance(error, Exception) and kind is not Stopped
            if broke and self.step > self.saved >= 0 and not (self.stepping or self.bad):
                try:
                    self.save()  # whatever went wrong, the weights between two updates are good
                except RecipeError as e:
                    say(str(e))
                if self.saved == self.step and not self.rescued:
                    say(f"The run broke off after update {self.step}, which is saved; the same command continues from it.")
            if self.world > 1 and not error:
                torch.distributed.barrier()  # nobody leaves while the first process is still writing
            for thing in filter(None, (self.bar, self.board)):
                with contextlib.suppress(OSError):
                    thing.close()
            if self.mirror and self.saved >= 0 and kind is not KeyboardInterrupt:  # once more, with what the ending wrote
                self._wait_for_mirror()
                if not self.mirror.thread or not self.mirror.thread.is_alive():
                    self.mirror.start()
                    self._wait_for_mirror()

    def _wait_for_mirror(self, enough=lambda: False):
        left = self.clock.left() if self.over else 0.1 * self.clock.left()  # a drive that hangs must not eat a short run's time
        if self.clock.session:
            left = min(left, self.clock.session - (time.monotonic() - self.clock.start))
        self.mirror.wait(max(2.0, min(left, 600.0, max(60.0, 3 * self.mirror.longest))), enough)

    def _beat(self, done):
        """Write the time used every few seconds, whatever the loop is doing: a kill must not refund any."""
        while True:
            state = {"used": round(self.clock.used(), 2), "born": self.clock.born, "process": os.getpid()}
            with contextlib.suppress(OSError):  # a full disk is for `save` to report
                write_json(self.folder / "clock.json", state)
            if done.is_set():
                return
            done.wait(HEARTBEAT)

    def _on_signal(self, number, frame):
        if self.asked == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if os.getpid() == self.process:  # and not in a worker that has just been forked
            os.write(2, f"\n{self.asked}: this update ends, then the run is saved. Ctrl-C again leaves at once.\n".encode())

    def check(self):
        """Leave with a saved run when a signal or the session limit asks. For every long loop outside the updates."""
        if self._wanted() and self.world == 1:
            self._leave()

    def _wanted(self):
        spent = time.monotonic() - self.clock.start + self.reserve + self.step_time
        if self.main and self.clock.session and spent > self.clock.session:
            self.asked = self.asked or "session limit"
        return bool(self.asked)

    def _leave(self):
        if self.parts and self.step > self.saved:
            self.save()
        if self.world > 1:
            torch.distributed.barrier()  # the first process is still writing
        processes = os.environ.get("LOCAL_WORLD_SIZE", self.world)
        start = ["torchrun", f"--nproc_per_node={processes}"] if self.world > 1 else ["python"]
        command = " ".join(shlex.quote(w) for w in (*start, *sys.argv) if not w.startswith("--fresh"))
        command = "run the cell again" if "ipykernel" in sys.modules else command
        code = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "another process": 143}.get(self.asked, 0)
        kept = f"after update {self.step}, which is saved" if self.saved >= 0 else "before the first update"
        # torchrun ends all when one fails: only the first process may, once it has said what is to be said
        raise Stopped(f"Stopped ({self.asked}) {kept}. To continue: {command}", code if self.main else 0)

    # - what must not change between sessions
    def _compare(self, derived=False):
        old, advice = self.settings.get("settings", {}), "start over with --fresh, or choose another --out_dir."
        changed = []
        for f in dataclasses.fields(self.cfg) if old else ():
            before, now = old.get(f.name, f.default), getattr(self.cfg, f.name)
            if now == before or "action" in f.metadata or ("derived" in f.metadata) != derived:
                continue
            if derived:
                raise RecipeError(f"The data or weights tell {f.name} {now!r} now, and in {self.folder} it is {before!r}. "
                    f"Give the same ones, {advice}", 2)  # fmt: skip
            if "fixed" in f.metadata:
                same = f"Continue with --{f.name} {before}" if before not in ("", None) else f"Leave --{f.name} away"
                raise RecipeError(f"{f.name} was {before!r} in {self.folder} and is {now!r} now. {same}, {advice}", 2)
            changed.append(f"{f.name} was {before!r} before and is {now!r} now.")
        if old and self.settings.get("samples", self.samples) != self.samples:
            raise RecipeError(f"An update took {self.settings['samples']} samples in {self.folder} and would now take "
                f"{self.samples}. Choose --batch_size and --accumulate so that the product stays, {advice}", 2)  # fmt: skip
        for line in changed:
            say(line)

    def fix_files(self, name, records, root):
        """The records of this run's own file list, in its order; at the first start `records` become that list."""
        found, root = {}, os.path.expanduser(root or ".")
        for record in records:
            with contextlib.suppress(ValueError):  # another Windows drive
                record = record | {"key": Path(os.path.relpath(record["image"], root)).as_posix()}
            found[record.get("key") or str(record["image"])] = record
        kept = self.settings.setdefault("files", {}).setdefault(name, list(found))
        here = [found[k] for k in kept if k in found]
        if not here:
            raise RecipeError(f"None of the {len(kept)} {name} files of {self.folder} is in {root}; --fresh starts over.", 2)
        for files, what in ((set(found) - set(kept), "new since the run began and not used"), (set(kept) - set(found), "gone")):
            if files:
                say(f"{len(files)} {name} files are {what}, e.g. {min(files)}")
        return [found[k] if k in found else here[i % len(here)] for i, k in enumerate(kept)]

    # - checkpoints
    def resume(self, parts, data):
        """Take `parts` and the training data; load the newest whole checkpoint where there is one."""
        self.parts, self.data = parts, data
        self._compare(derived=True)
        state = self._read()
        if state:
            self._apply(state)
            self.clock.before, self.clock.born = max(self.clock.before, state["used"]), state["born"]
            say(f"Continuing after update {self.step}, {clock_text(self.clock.used())} used so far.")
        elif self.clock.before > HEARTBEAT and (self.clock.budget or self.clock.deadline):
            say(f"Earlier starts without a checkpoint used {clock_text(self.clock.before)} of the time; --fresh gives it back.")
        self.settings |= {"recipe": self.recipe, "settings": dataclasses.asdict(self.cfg), "samples": self.samples}
        self.settings |= {"device": self.title, "torch": torch.__version__, "command": shlex.join(sys.argv)}
        if self.main:
            (self.folder / "code").mkdir(exist_ok=True)
            for place in (self.folder, self.folder / "code"):  # what a run cannot go on without lies there twice
                write_json(place / "settings.json", self.settings)
            for module in {sys.modules.get(type(self.cfg).__module__), sys.modules[Run.__module__]}:
                if getattr(module, "__file__", None):  # the code that ran, one copy a session that changed it
                    code = Path(module.__file__).read_bytes()
                    target = self.folder / "code" / f"{Path(module.__file__).stem}-{mix(code) % 10**6}.py"
                    if state and not target.exists() and any(target.parent.glob(f"{Path(module.__file__).stem}-*.py")):
                        say(f"{module.__file__} has changed since the last session; --fresh starts over.")
                    write_aside(target, lambda f, code=code: f.write(code))
        was, _ = self.was, self._share()
        if self.cut is not None and self.progress < self.cut:
            self.cut, self.stale = None, 0  # the run was made longer
        self.was, self.begin = min(was, self.progress), min(self.begin, self.progress)

    def _read(self):
        """The newest checkpoint that is whole, None where there is none at all; damaged ones are named and kept aside."""
        damaged, places = [], [self.folder / name for name in CHECKPOINTS]
        if self.mirror and self.world == 1:
            places.insert(2, self.mirror.target / "last.pt")  # newer than the one before
        for path in places:
            try:
                state = load_tensors(path)
                if not isinstance(state, dict) or not {*KEPT, "used", "born", "parts", "scaler"} <= set(state):
                    raise ValueError("it is no checkpoint of a run")
            except FileNotFoundError:
                continue
            except ValueError as e:  # an error of the disk or of memory is not the file's fault
                damaged += [path] * (path.parent == self.folder)
                say(f"{path} is damaged ({e}).")
                continue
            for other in damaged if self.main else ():
                os.replace(other, other.with_name(f"{other.name}.damaged"))
            return state
        if damaged:
            raise RecipeError(f"No checkpoint in {self.folder} can be read. --fresh starts over and keeps the folder.")

    def _apply(self, state):
        try:
            self.parts.load_state_dict(state["parts"])
            self.scaler.load_state_dict(state["scaler"]) if self.scaler.is_enabled() and state["scaler"] else None
            numbers = {name: state[name] for name in (*KEPT, "used", "born") if name not in ("best", "cut", "settled")}
            if not isinstance(state["best"], dict) or not all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in (*numbers.values(), state["cut"] or 0)
            ):
                raise TypeError("a number in it is none")
            vars(self).update({name: state[name] for name in KEPT})
        except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, OverflowError) as e:
            why = (str(e).splitlines() or [""])[-1].strip()
            raise RecipeError(
                f"The checkpoint in {self.folder} does not fit this script ({why}). The code that "
                "made it is in its folder code; undo the change, start over with --fresh, or choose another --out_dir."
            ) from e
        self.saved, self.first = self.step, self.step

    def save(self, must=True):
        """Write last.pt; the one before becomes previous.pt. A failure raises RecipeError, or is only said if not `must`.

        Where it must and the folder takes nothing any more, trained weights are saved in another place, which the error names.
        """
        state = {name: getattr(self, name) for name in KEPT} | {"used": self.clock.used(), "born": self.clock.born}
        state |= {"parts": self.parts.state_dict(), "scaler": self.scaler.state_dict()}
        new, last, self.saved_at = self.folder / "next.pt", self.folder / "last.pt", time.monotonic()
        if self.mirror and os.name == "nt":
            self.mirror.wait(60)  # there a file that is being read cannot be renamed

        def write():
            self._remake_folder()
            if self.late:
                write_aside(self.folder / "best.pt", lambda f: f.write(self.late), check_zip)
                self.late = None
            save_tensors(new, state)
            if last.exists():
                os.replace(last, self.folder / "previous.pt")
            os.replace(new, last)

        try:
            done = self.write(write, must)
        except RecipeError as e:
            if self.step <= max(self.saved, 0):
                raise
            raise self._rescue(state, e) from e
        if done:
            self.saved = self.step
            if self.mirror:
                self.mirror.start()

    def _remake_folder(self):
        """A run folder that was deleted under the run is made anew; not its parents, which a drive that is gone took along."""
        if not self.folder.is_dir():
            self.folder.mkdir()
            write_json(self.folder / "settings.json", self.settings)
            self.undo.callback(self._lock().release)
            self.board, self.best = None, {} if self.world == 1 else self.best  # gone too: the next evaluation is the best
            write_json(self.folder / "clock.json", {"used": self.clock.used(), "born": self.clock.born, "process": os.getpid()})
            say(f"{self.folder} was gone and is made anew; what was in it before is lost.")

    def _rescue(self, state, error):
        """Save `state` wherever there is space; returns the RecipeError that tells where."""
        for find in (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir())):  # each of which may raise too
            folder = None
            with contextlib.suppress(OSError, RuntimeError, ValueError, zipfile.BadZipFile):
                folder = find() / f"{self.folder.name}-rescued-{self.settings['run']}-{self.step}"
                folder.mkdir()
                write_json(folder / "settings.json", self.settings)
                write_json(folder / "clock.json", {"used": state["used"], "born": state["born"]})
                with contextlib.suppress(OSError):
                    best = self.late or (self.folder / "best.pt").read_bytes()
                    write_aside(folder / "best.pt", lambda f, best=best: f.write(best))
                save_tensors(folder / "last.pt", state)
                self.saved, self.rescued = self.step, True
                return RecipeError(f"{str(error).partition(' Mend that')[0]} Update {self.step} is saved in {folder} instead. "
                    f"To go on from it: --out_dir NEW --continue_from {shlex.quote(str(folder))}")  # fmt: skip
            if folder and not (folder / "last.pt").exists():
                shutil.rmtree(folder, ignore_errors=True)
        return error

    def write(self, write, must=False):
        """Call write() in the first process; returns whether it went well. A failure raises where it `must`, else is said."""
        try:
            if self.main:
                write()
            return True
        except (OSError, RuntimeError, zipfile.BadZipFile) as e:
            why = f"Cannot write into {self.folder}: {getattr(e, 'strerror', None) or e}. What was written before is whole."
            if must:
                raise RecipeError(f"{why} Mend that and run the same command again.") from e
            say(f"{why} Training goes on and tries again.")

    # - the loop
    @property
    def planned_steps(self):
        """Updates that --num_steps or --num_epochs ask for; infinity where only the clock ends the run."""
        own, given = type(self.cfg), getattr(self.cfg, "given", ())
        pairs = ((n, getattr(self.cfg, n)) for n in ("num_steps", "num_epochs"))
        steps, epochs = (bool(value) and (n in given or value != getattr(own, n)) for n, value in pairs)
        if (self.clock.budget or self.clock.deadline) and not (steps or epochs):
            return math.inf
        if self.cfg.num_steps and (steps or not epochs):
            return self.cfg.num_steps
        return math.ceil(self.cfg.num_epochs * len(self.data) / self.samples)

    def _share(self):
        """Move progress on. Processes agree here, once per update: on the first one's clock and anyone's wish to stop."""
        late, hurried = self.clock.left(self.reserve) < self.step_time, self.clock.left() < 2 * self.reserve
        shared = [float(self._wanted()), 1.0 if late else self.clock.progress(self.reserve), float(hurried)]
        if self.world > 1:
            shared = torch.tensor([shared[0], *(v * self.main for v in shared[1:])], device=self.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            shared = shared.tolist()
        self.leaving, by_clock, self.hurried = shared
        if self.leaving:
            self.asked = self.asked or "another process"
        by_steps = self.step / self.planned_steps if self.planned_steps else 1.0
        self.was, self.progress = self.progress, min(max(by_steps, by_clock), 1.0)

    @property
    def over(self):
        """Whether the run has reached its end: its length, its time, or the end of the tenth that --patience adds."""
        return self.progress >= (1 if self.cut is None else min(1.1 * self.cut, 1))

    def batches(self):
        """Yield the batches from the present update on, on the device, until the run is over or asked to stop."""
        if self.main and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, bar_format="{percentage:3.0f}%|{bar}| {desc}", dynamic_ncols=True)
        size = (self.folder / "last.pt").stat().st_size if self.main and self.saved == 0 else 0  # the rehearsal's
        free = shutil.disk_usage(self.folder).free if size else 0
        if 2 * size > free:
            raise RecipeError(
                f"A run keeps three checkpoints of {size / 2**20:.0f} MB each; {self.folder} has {free / 2**20:.0f} MB free. "
                "Free some space or choose an --out_dir on another disk."
            )
        resident, cached = (getattr(self.data, name, False) for name in ("resident", "cached"))  # on the device; in RAM
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = self.cfg.num_workers if self.cfg.num_workers >= 0 else 0 if cached else min(4, cores)
        self.workers = 0 if resident else own
        self.logged_at = self.saved_at = self.began = time.monotonic()
        self.wait, self.count, self.first = 0.0, 0, self.step
        if self.step == 0:
            self.begin = self.progress  # reading the data and the rehearsal took time; warming up begins here
        more = {"persistent_workers": True, "prefetch_factor": 4} if self.workers else {}
        while not self.over:
            stream = Stream(len(self.data), self.samples, self.cfg.seed, self.step, self.rank, self.world)
            loader = torch.utils.data.DataLoader(
                self.data, batch_sampler=stream, collate_fn=as_is, num_workers=self.workers, worker_init_fn=ignore_signals,
                pin_memory=self.kind == "cuda" and not resident, generator=torch.Generator().manual_seed(0), **more,
            )  # fmt: skip
            batches, self.rewound = iter(loader), False
            try:
                while not (self.over or self.rewound):
                    self.settled = True  # whatever belongs to the updates so far is done
                    if not self.bad and (self.saved < 0 or time.monotonic() - self.saved_at >= 60 * self.cfg.save_minutes):
                        self.save(must=False)
                    if self.leaving or (self.asked and self.world == 1):
                        self._leave()
                    start = time.monotonic()
                    try:
                        batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
                    except RecipeError as e:  # from a worker: its sentence ends a traceback
                        raise RecipeError(re.sub(r"^[\w.]*RecipeError: ", "", str(e).strip().splitlines()[-1])) from None
                    self.wait, self.index = self.wait + time.monotonic() - start, batch["index"]
                    torch.manual_seed(mix(self.cfg.seed, self.step))  # everything random in update k depends on (seed, k)
                    self.generator.manual_seed(mix(self.cfg.seed, self.step, "draw"))
                    yield batch
            finally:  # workers ignore the signals that would end them
                getattr(batches, "_shutdown_workers", int)()

    def draw(self, kind, shape, **more):
        """Random numbers for a batch, e.g. draw("randn", x.shape): drawn for the whole update, then this process's slice.

        kind: a torch function of a shape and a generator (rand, randn). Put the result into the batch dict, so that
        `update` slices it along with the rest.
        """
        whole = getattr(torch, kind)(shape[0] * self.world, *shape[1:], generator=self.generator, device=self.device, **more)
        return whole[self.rank * shape[0] : (self.rank + 1) * shape[0]]

    def trained(self, progress=None):
        """Share of the updates' part of the run that has gone, 0..1: start-up does not count."""
        return ((self.progress if progress is None else progress) - self.begin) / max(1 - self.begin, 1e-9)

    def anneal(self, opt, shape="cosine", warmup=0.05, floor=0.0, span=(0.0, 1.0)):
        """Set the learning rates of `opt`: each group's `peak` (default: --learning_rate) times `schedule` of how far the
        run is in `span`, a part of its training such as (0.7, 1.0)."""
        trained = (self.trained(self.cut) - span[0]) / max(span[1] - span[0], 1e-9)
        factor = self.rate_scale * schedule(trained, shape, warmup, floor)
        if self.cut is not None:  # patience struck: from the rate it had, straight down over a last tenth
            factor *= max(0.0, 1 - (self.progress - self.cut) / max(min(0.1 * self.cut, 1 - self.cut), 1e-9))
        for group in opt.param_groups:
            group["lr"] = group.setdefault("peak", self.cfg.learning_rate) * factor
        self.lr = opt.param_groups[0]["lr"]

    # - one update
    def autocast(self):
        """The autocast context of the forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def finite(self, value):
        """Whether a tensor is finite throughout; True for a planned run, whose tensors hold nothing."""
        return True if self.planned else bool(torch.isfinite(value).all())

    def net(self, model):
        """The model to call in a training step: itself, or in PyTorch's DDP where several processes train it."""
        if self.world == 1 or self.planned:
            return model
        if id(model) not in self.ddp:
            wrap = torch.nn.parallel.DistributedDataParallel
            names = ("forward_sync_buffers", "broadcast_buffers")  # torch 2.13 renamed it; a replay would repeat it
            flag = next(n for n in names if n in inspect.signature(wrap).parameters)
            self.ddp[id(model)] = wrap(model, device_ids=[self.device.index] if self.kind == "cuda" else None, **{flag: False})
        return self.ddp[id(model)]

    def compile(self, model):
        """torch.compile in place where --compile asks for it; graphs that fail run eagerly."""
        if self.cfg.compile and not self.planned:
            self.undo.callback(setattr, torch._dynamo.config, "suppress_errors", torch._dynamo.config.suppress_errors)
            torch._dynamo.config.suppress_errors = True
            model.compile()
        return model

    def update(self, loss_fn, batch, opt, model=None, ema=None, clip=1.0):
        """One optimizer update from one batch; returns its losses as scalar tensors, the gradient's `norm` among them.

        batch: dict of tensors [n, ...]; loss_fn(part) gets slices of it along the first axis, runs under autocast and
        returns the mean loss of its samples, or a dict of means with `loss` in it. Slices weigh by their length, so
        accumulation equals the full batch, a ragged last slice included. Where memory runs out, the slices halve and
        the same batch is replayed. A non-finite loss or gradient changes neither weights nor `ema` (of `model`).
        RecipeError when one sample does not fit.
        """
        # find the slice that fits while processes can still differ, for each kind of update that a recipe has
        if self.world > 1 and (kind := (loss_fn.__qualname__, *(v.shape for v in batch.values()))) not in self.probed:
            self.probed.add(kind)
            self._accumulate(loss_fn, batch, opt, probe=True)
            fits = torch.tensor(self.micro, device=self.device)
            torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
            self.micro = int(fits)
        losses = self._accumulate(loss_fn, batch, opt)
        if self.scaler.is_enabled():
            self.scaler.unscale_(opt)
        weights = [p for group in opt.param_groups for p in group["params"]]
        losses["norm"] = torch.nn.utils.clip_grad_norm_(weights, clip or math.inf)
        good = self.finite(losses["norm"] + (losses["loss"] if self.world == 1 else 0))  # the norm is the same everywhere
        if good:
            self.stepping = True  # until `advance` has counted it
            opt.step()
            if ema:
                ema.update(model)
        elif not (self.scaler.is_enabled() and self.scaler.get_scale() > 1 and (self.world > 1 or self.finite(losses["loss"]))):
            self.worse = True  # a GradScaler that still searches its scale overflows on purpose; that does not count
        if self.scaler.is_enabled():
            self.scaler.update()
        return losses

    def _accumulate(self, loss_fn, batch, opt, probe=False):
        """Gradients of the mean loss of a batch, slice by slice; returns the losses. `probe` drops the gradients."""
        n = len(next(iter(batch.values())))
        while True:
            if not self.planned:
                torch.manual_seed(mix(self.cfg.seed, self.step))  # a replay draws what the first try drew
            opt.zero_grad(set_to_none=True)
            totals = {}
            try:
                for i in range(0, n, self.micro):
                    share = min(self.micro, n - i) / n
                    with contextlib.ExitStack() as stack:
                        for wrapped in self.ddp.values() if probe or i + self.micro < n else ():
                            stack.enter_context(wrapped.no_sync())  # processes exchange gradients once, at the last slice
                        with self.autocast():
                            out = loss_fn({k: v[i : i + self.micro] for k, v in batch.items()})
                        out = out if isinstance(out, dict) else {"loss": out}
                        self.scaler.scale(out["loss"] * share).backward()
                    for name, value in out.items():
                        totals[name] = totals.get(name, 0) + value.detach().float() * share
                if probe:
                    opt.zero_grad(set_to_none=True)
                return totals
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
                half = max(1, math.ceil(self.micro / 2))
                advice = f"--batch_size {half} --accumulate {math.ceil(self.cfg.batch_size * self.cfg.accumulate / half)}"
                if self.micro == 1:
                    raise RecipeError(f"Out of memory on {self.device_name} with one sample; lower --target_size.") from e
                if self.world > 1 and not probe:
                    raise RecipeError(f"Out of memory with {self.micro} samples per forward pass; try {advice}.") from e
            out = totals = None  # outside the handler, so that nothing keeps the failed try's activations alive
            opt.zero_grad(set_to_none=True)
            if self.kind == "cuda":
                torch.cuda.empty_cache()
            say(f"Out of memory with {self.micro} samples per forward pass, now {half}. To start so: {advice}")
            self.micro = half

    # - after an update
    def advance(self, losses):
        """Count the update that gave `losses`: log it, save when due, go back when several in a row were not finite."""
        self.step, self.count, self.bad = self.step + 1, self.count + 1, self.bad + 1 if self.worse else 0
        self.stepping = self.settled = self.worse = False
        self.sums = {k: self.sums.get(k, 0) + v for k, v in losses.items()}
        if self.bad >= BAD_LIMIT:
            self._recover()
        now = time.monotonic()
        self.step_time = (now - self.began) / max(self.step - self.first, 1)
        self._share()
        if self.bar is not None:
            self.bar.update(100 * self.progress - self.bar.n)
        if now - self.logged_at >= HEARTBEAT or self.step - self.first == 1 or self.over:
            self._log(now)

    def _recover(self):
        files = ", ".join(dict.fromkeys(str(self.data.name(i)) for i in self.index.tolist()))
        state = self._read() if self.rate_scale == 1 else None
        if not state:
            raise RecipeError(f"Loss or gradient was not finite in {BAD_LIMIT} updates in a row, at a lower rate too. The last "
                f"files: {files}. Look at them, or try a smaller --learning_rate or --no-use_amp.")  # fmt: skip
        self._apply(state)
        self.rate_scale, self.bad, self.rewound, self.sums, self.count, self.began = 0.3, 0, True, {}, 0, time.monotonic()
        say(f"{BAD_LIMIT} updates in a row were not finite: back to update {self.step} at 0.3 of the rate. Last files: {files}")

    def renew(self):
        """Have `batches` start its loader anew, after the training data have changed; looks at the clock again."""
        self.rewound = True
        self._share()

    def due(self, every=None, at=()):
        """Whether the update just counted passed a mark: each `every` share of the run (0.05: twenty), or one of `at`.

        Never in the last moments of a timed run: the ending evaluates, and there is no time for both.
        """
        was, now = (self.trained(p) + 1e-9 for p in (self.was, self.progress))
        repeated = every and math.floor(now / every) > math.floor(was / every)
        return not self.hurried and bool(repeated or any(was < mark <= now for mark in at))

    def memory(self):
        """Peak memory of this process in GiB, the GPU's or else RAM; 0 where the system does not tell."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        with contextlib.suppress(ImportError):
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
        return 0.0

    def eta(self):
        """Seconds until the run ends, the ending included."""
        return min(self.clock.left(), (self.planned_steps - self.step) * self.step_time + self.reserve)

    def _log(self, now):
        seconds, count = max(now - self.logged_at, 1e-9), max(self.count, 1)
        row = {"step": self.step, "lr": self.lr, "progress": self.progress, "seconds": self.clock.used()}
        row |= {"items_per_second": count * self.samples / seconds, "data_wait": self.wait / seconds}
        row["memory_gib"] = self.memory()
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        row |= {k: float(v) / count for k, v in self.sums.items()}
        total = f"/{self.planned_steps}" if self.planned_steps < math.inf else ""
        numbers = " ".join(f"{k} {row[k]:.4g}" for k in self.sums if k != "norm")
        line = (
            f"step {self.step}{total} {numbers} lr {self.lr:.2e} {row['items_per_second']:.0f} img/s data-wait "
            f"{row['data_wait']:.0%} {row['memory_gib']:.1f} GB eta {clock_text(self.eta())}"
        )
        if self.bar is not None:
            self.bar.set_description_str(line)
        else:
            say(line)
        self.record(row)
        if row["data_wait"] > 0.2 and self.step - self.first > count and not hasattr(self, "advised"):
            advice = f"--num_workers {2 * self.workers + 2}, a smaller --sample_ratio, or the files on a local disk"
            self.advised = say(f"{row['data_wait']:.0%} of the time is waiting for data. Try {advice}.")
        self.logged_at, self.wait, self.count, self.sums = now, 0.0, 0, {}

    def record(self, row):
        """Append a dict with `step` to log.jsonl, and its numbers to TensorBoard where that is installed."""
        if self.main:
            with contextlib.suppress(OSError), open(self.folder / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            with contextlib.suppress(ImportError, OSError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = self.board or SummaryWriter(self.folder / "tensorboard")
                for key in (k for k, v in row.items() if isinstance(v, (int, float)) and k != "step"):
                    self.board.add_scalar(key, row[key], row["step"])

    def judge(self, name, metrics, weights, higher=True):
        """Record an evaluation; keep `weights` as best.pt where metrics[name] is the best so far; feed --patience."""
        if self.judged == self.step or (self.rehearsing and self.step and self.settled and not self.over):
            return  # a continued run's rehearsal must not count, unless the evaluation here was cut off
        value = torch.tensor(float(metrics[name]), device=self.device, dtype=torch.float64 if self.kind != "mps" else None)
        if self.world > 1:
            torch.distributed.broadcast(value, 0)
        self.judged, value = self.step, float(value)
        self.record({"step": self.step, "metric": name, "seconds": round(self.clock.used(), 2), **metrics})
        if name not in self.best or (value - self.best[name]) * (1 if higher else -1) > 0:
            self.best, self.stale = {name: value, "step": self.step}, 0
            state, self.late = {"model": weights, "settings": dataclasses.asdict(self.cfg)} | self.best, None
            if not self.write(lambda: save_tensors(self.folder / "best.pt", state), must=False):
                torch.save(state, late := io.BytesIO())  # as it is now; the next save writes it
                self.late = late.getvalue()
        else:
            self.stale += 1
        if self.cut is None and self.step and self.stale >= (self.cfg.patience or math.inf):
            self.cut = self.progress
            say(f"{self.stale} evaluations without a better {name}: the rate anneals over a last tenth, then the run ends.")

    @contextlib.contextmanager
    def ending(self):
        """Time a recipe's ending (evaluate, sample, save, export). Every run rehearses it before update 1: that finds in
        minute 1 what would fail in hour 20, and tells how much time to hold back; a recipe that rehearses less than it will do
        sets `ahead`, the seconds that this leaves out."""
        start, self.rehearsing, self.ahead = time.monotonic(), True, 0.0
        yield
        self.rehearsing = False
        if self.main and (self.folder / "log.jsonl").exists():
            with contextlib.suppress(ImportError):
                self.write(lambda: write_aside(self.folder / "curves.png", lambda f: draw_curves(self.folder / "log.jsonl", f)))
        if self.mirror and not self.over:  # the last copies are made when the run closes
            self._wait_for_mirror(lambda: bool(self.asked))
            self.ahead += self.mirror.longest  # what the ending exports is copied too
        self.reserve = 1.2 * (time.monotonic() - start + self.ahead) + 0.5
        self._share()

    @contextlib.contextmanager
    def results(self):
        """Context manager that gives the folder to export into: the run's at its end; else one that vanishes again, since what
        is still in training must not look like a result."""
        if self.over:
            yield self.folder
        else:
            with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=self.folder) as aside:
                yield Path(aside)

    def finish(self, metrics):
        """Write metrics.json; returns metrics with steps, seconds and peak memory."""
        metrics = {k: round(float(v), 5) for k, v in metrics.items()}
        metrics |= {"steps": self.step, "seconds": round(self.clock.used(), 1), "peak_memory_gib": round(self.memory(), 3)}
        if self.main:
            write_json(self.folder / "metrics.json", metrics)
        return metrics

    @property
    def finished(self):
        """The metrics of a run that an earlier session finished and that its limits do not prolong now, else None."""
        metrics = read_json(self.folder / "metrics.json")
        return metrics if self.over and metrics.get("steps") == self.step else None
