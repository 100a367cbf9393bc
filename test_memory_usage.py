# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "numpy", "pillow", "filelock", "tqdm", "tensorboard", "matplotlib", "monai", "einops", "nibabel"]
# ///
"""Will it fit, and will it be done in time? Peak memory, disk and time of any recipe's training, before you own the GPU.

python test_memory_usage.py                                                        # the 3-D recipe at 256x256x64
python test_memory_usage.py --resolution 256,256,64 --batch-size 1 --channels 16,32,64
python test_memory_usage.py --recipe train_latent_cfg --batch_size 16 --gpu T4,3090 --hours 6

All other flags are the recipe's own. The recipe's build, train_step and eval_step run on fake tensors, which have sizes and
no contents: that takes seconds and no memory. Where a GPU is, each row is measured too, in a process of its own.
"""

import bisect
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

try:
    from common import (  # isort: skip
        RecipeError, Run, clock_text, is_out_of_memory, main, opt, parse, say, write_json,
    )  # fmt: skip
except ImportError as e:
    if e.name != "common":
        raise
    raise SystemExit("test_memory_usage.py looks at the recipes beside it: run it in the repository's folder.") from e

MIB, GIB = 2**20, 2**30
CONTEXT = 0.45  # GiB that CUDA itself takes: reports say 0.3 to 0.43 with lazy loading
FLOP_SHARE, BYTE_SHARE = 0.35, 0.7  # of a card's table values that training reaches, a guess; --measure replaces it
# name: usable GiB, compute capability, GB/s, TFLOPS in fp32 (TF32 where the card has it), in half precision with fp32 sums
CARDS = {  # dense rates: NVIDIA's white papers (Turing, GA102, Ada, A100) and data sheets
    "P100": (15.9, (6, 0), 732, 9.3, 18.7),
    "T4": (14.56, (7, 5), 320, 8.1, 65),
    "V100": (15.8, (7, 0), 900, 15.7, 125),
    "2080ti": (10.8, (7, 5), 616, 13.4, 53.8),
    "3060": (11.6, (8, 6), 360, 12.7, 25.5),
    "3090": (23.6, (8, 6), 936, 35.6, 71),
    "4090": (23.6, (8, 9), 1008, 82.6, 165),
    "A10": (22.1, (8, 6), 600, 62.5, 125),
    "L4": (22.1, (8, 9), 300, 60, 121),
    "A100": (39.4, (8, 0), 1555, 156, 312),
    "A100-80": (79.2, (8, 0), 1935, 156, 312),
    "H100": (79.2, (9, 0), 3350, 494, 989),
    "H200": (139.8, (9, 0), 4800, 494, 989),
}
CUDA_FP32 = set(  # what CUDA's autocast runs in fp32 and the processor's does not (ATen/autocast_mode.h)
    "group_norm layer_norm softmax log_softmax l1_loss mse_loss smooth_l1_loss exp log log2 log10 log1p expm1 pow __pow__ "
    "__rpow__ sum norm rsqrt reciprocal softplus binary_cross_entropy_with_logits cosine_similarity cross_entropy nll_loss "
    "interpolate cumsum cumprod prod erfinv acos asin cosh sinh tan dist pdist cdist renorm logsumexp".split()
)
DATA = {  # what a recipe learns from its data before `build`; here as its guide has it
    "train_latent_cfg": {"names": json.dumps([f"class {k}" for k in range(31)])},
    "train_convnext": {"names": json.dumps([f"class {k}" for k in range(10)])},
    "train_nextdit_fast": {"labels": "0 255"},
    "train_nextdit_ultrafast": {"labels": "0 255"},
    "finetune_pretrained": {"labels": "0 255"},
}
GIVEN = {  # the flags of a recipe's row where the user gives none
    "train_autoencoder3d": {"target_size": "256,256,64", "batch_size": "1", "accumulate": "1", "checkpointing": "1"},
    "train_convnext": {"target_size": "32", "batch_size": "1024"},
    "finetune_pretrained": {"weights": "the published ones"},
}
RESIDENT = ("train_convnext",)  # recipes that keep small images on the device
VARIANTS = {  # what else to look at, beside switches that every recipe may have
    "train_autoencoder3d": ["--channels 24,48,64", "--channels 32,64,128", "--gan 0.01"],
    "train_latent_cfg": ["--dim 32", "--dim 64"],
    "train_convnext": ["--arch baseline", "--base_channels 32"],
    "train_realesrgan_optimized": ["--gan"],
}


@dataclass
class Plan:
    """The planner's own settings."""

    recipe: str = opt("train_autoencoder3d", "the recipe's script", everyday=True)
    gpu: str = opt("T4,3090,A100", f"cards to fit: {', '.join(CARDS)}", everyday=True)
    vram: float = opt(0.0, "fit a card of this memory in GB, instead of --gpu", everyday=True, low=0)
    hours: float = opt(0.0, "say which settings finish in so many hours", everyday=True, low=0)
    images: int = opt(0, "files of your data set, for --hours and data that stay on the card", everyday=True, low=0)
    json: str = opt("", "write the table to this file too", everyday=True)
    measure: bool | None = opt(None, "measure each row too; default: where a GPU is", everyday=True)
    only: bool = opt(False, "the flags as they are given, no other rows")
    row: str = opt("", "measure one row (for the planner itself)")


# --- prediction -------------------------------------------------------------------------------------------------------
class CudaRules(TorchFunctionMode):
    """CUDA's autocast on tensors of the processor: what the processor's leaves in half precision goes to fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func is torch.Tensor.backward
        ):  # recomputed blocks need the mode, which is off while it handles a function of tensors
            edge, seed = torch.autograd.graph.get_gradient_edge(args[0]), torch.ones_like(args[0])
            with self:
                return torch.autograd.backward((edge,), (seed,))
        if getattr(func, "__name__", "") in CUDA_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(lambda t: t.float() if is_half(t) else t, (args, kwargs))
        return func(*args, **kwargs)


def is_half(value):
    """Whether a value is a tensor in half precision."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


class Allocator:
    """CUDA's caching allocator (c10/cuda/CUDACachingAllocator) with its default settings, as long as memory lasts: pieces of
    512 bytes; up to 1 MiB from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from ones of their own in steps of
    2 MiB; best fit, blocks are split and joined again."""

    def __init__(self):
        self.free, self.reserved, self.count = {True: [], False: []}, 0, 0

    def take(self, size):
        """A block of at least so many bytes."""
        small = size <= MIB
        at = bisect.bisect_left(self.free[small], (size,))
        if at < len(self.free[small]):
            block = self.free[small].pop(at)[2]
        else:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else math.ceil(size / (2 * MIB)) * 2 * MIB
            block = {"size": whole, "small": small, "before": None, "after": None}
            self.reserved += whole
        rest, block["free"] = block["size"] - size, False
        if rest >= 512 if small else rest > MIB:
            new = {"size": rest, "small": small, "before": block, "after": block["after"]}
            if block["after"]:
                block["after"]["before"] = new
            block["after"], block["size"] = new, size
            self._put(new)
        return block

    def give(self, block):
        """Give a block back and join it with free neighbours."""
        for side, other in (("before", "after"), ("after", "before")):
            near = block[side]
            if near and near["free"]:
                self.free[near["small"]].remove((near["size"], near["number"], near))
                block["size"] += near["size"]
                block[side] = near[side]
                if block[side]:
                    block[side][other] = block
        self._put(block)

    def _put(self, block):
        self.count += 1
        block |= {"free": True, "number": self.count}
        bisect.insort(self.free[block["small"]], (block["size"], self.count, block))


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, by kind, on fake or real tensors; and the work that is done.

    peak: the most bytes at once; at_peak: what they were; workspace: the largest operand of a convolution, as an allowance for
    what it takes inside; work: (FLOPs, bytes, in half precision) of each operation; calls: (its arguments, bytes alive, what
    they were) of each convolution, for `with_scratch`.
    """

    def __init__(self):
        super().__init__()
        self.known, self.allocator, self.kind, self.kinds = {}, Allocator(), "weights", {}
        self.live = self.peak = self.workspace = 0
        self.at_peak, self.work, self.calls = {}, [], []

    def begin(self):
        """Forget the peak and the work so far: a phase begins."""
        self.kind, self.peak, self.at_peak, self.work, self.calls = "activations", 0, {}, [], []

    def found(self):
        """(peak, what it was, work, calls) of the phase."""
        return self.peak, self.at_peak, self.work, self.calls

    def add(self, tensor, kind=None):
        """Count a tensor's storage from now on as of this kind."""
        storage, kind = tensor.untyped_storage(), kind or self.kind
        key, size = storage._cdata, math.ceil(storage.nbytes() / 512) * 512
        if key in self.known:
            old = self.known[key]
            if kind != old["kind"] and kind != self.kind:
                self.kinds[old["kind"]] -= size
                self.kinds[kind] = self.kinds.get(kind, 0) + size
                old["kind"] = kind
            return
        if size:
            ref = weakref.ref(storage, lambda _: self.drop(key))
            self.known[key] = {"ref": ref, "size": size, "kind": kind, "block": self.allocator.take(size)}
            self.live += size
            self.kinds[kind] = self.kinds.get(kind, 0) + size
            if self.live > self.peak:
                self.peak, self.at_peak = self.live, {k: v for k, v in self.kinds.items() if v}

    def drop(self, key):
        gone = self.known.pop(key, None)
        if gone:
            self.live -= gone["size"]
            self.kinds[gone["kind"]] -= gone["size"]
            self.allocator.give(gone["block"])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        sizes = [t.numel() * t.element_size() for t in tensors]
        if func._overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward) and sizes:
            self.workspace = max(self.workspace, max(sizes))
            self.calls.append((func, tree_map(form, args), self.live, {k: v for k, v in self.kinds.items() if v}))
        if not func.is_view and tensors:
            self.work.append((flops(func, args, kwargs, out), sum(sizes), any(map(is_half, tensors))))
        return out


def form(value):
    """A tensor's shape, strides and type; any other value as it is."""
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value


SCRATCH = {}  # what each convolution was found to take inside


def with_scratch(peak, parts, work, calls):
    """The same with what convolutions take inside (other layouts of their operands, the library's workspace), each tried once
    on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def real(value):
        is_form = isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], torch.dtype)
        return torch.empty_strided(*value[:2], dtype=value[2], device=device).zero_() if is_form else value

    for func, args, live, kinds in calls:
        key = (func, repr(args))
        if key not in SCRATCH:
            own = [real(a) for a in args]
            func(*own)  # the first call of all sets the library up
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = func(*own)
                most = torch.cuda.max_memory_allocated() - before
            else:
                out = []
                most = profiled(lambda own=own, out=out, func=func: out.append(func(*own)))
            SCRATCH[key] = max(0, most - sum(bytes_of(out)))
            del own, out
        if live + SCRATCH[key] > peak:
            peak, parts = live + SCRATCH[key], kinds | {"inside operations": SCRATCH[key]}
    return peak, parts, work, calls


def flops(func, args, kwargs, out):
    """Floating point operations of an operation that multiplies matrices or convolves; 0 for others."""
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    name = func._overloadpacket
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(a.shape for a in args[:3]))
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(a.shape for a in args[:4]))
    with contextlib.suppress(Exception):  # the registry knows shapes of some calls only
        return flop_registry[name](*args, **(kwargs or {}), out_val=out) if name in flop_registry else 0
    return 0


def configure(plan, words):
    """(the recipe's module, its Config of these words) with what its data would tell filled in."""
    recipe = importlib.import_module(plan.recipe)
    named = {w.lstrip("-").partition("=")[0].replace("-", "_").removeprefix("no_") for w in words if w.startswith("--")}
    given = {"data_dir": "data"} | {k: v for k, v in GIVEN.get(plan.recipe, {}).items() if k not in named}
    with contextlib.redirect_stdout(None):
        cfg = parse(recipe.Config, "", [w for k, v in given.items() for w in (f"--{k}", v)] + list(words))
    return recipe, filled(cfg, plan.recipe)


def filled(cfg, recipe):
    """A Config with what the recipe would learn from its data."""
    for name, value in DATA.get(recipe, {}).items():
        setattr(cfg, name, value)
    return cfg


def phases_of(cfg, recipe):
    """[(name, Config, share of the run)] at which updates may differ: stages of their own, and early and late."""
    stages = type(cfg).__dataclass_fields__.get("stage")
    if stages and cfg.stage == "all":
        names = [s for s in stages.metadata["choices"] if s != "all"]
        return [(f"--stage {s}", filled(dataclasses.replace(cfg, stage=s), recipe), 0.5) for s in names]
    return [("an update", cfg, 0.0), *([("a late update", cfg, 0.9999)] if getattr(cfg, "gan", 0) else [])]


def follow(recipe, cfg, run_of, live, only=None):
    """Build, update and evaluate, with `live` counting; returns (bytes of a checkpoint, {phase: (peak, what, work)}, bytes of a
    sample)."""
    disk, found = 0, {}
    for name, own, progress in phases_of(cfg, recipe.__name__):
        if only not in (None, name, "evaluation"):
            continue
        run = run_of(own)
        live.kind, run.progress = "weights", progress
        parts = recipe.build(own, run)
        label(parts, live)
        disk = max(disk, sum(bytes_of(parts.state_dict())))
        live.kind = "batch"
        batch = recipe.example_batch(own, run)
        live.begin()
        losses = recipe.train_step(parts, batch, own, run)
        found[name] = live.found()
        each = max(sum(bytes_of(v)) / len(v) for v in batch.values())
        del losses, batch
        live.begin()
        recipe.eval_step(parts, own, run)
        found["evaluation"] = max(found.get("evaluation", (0,)), live.found(), key=lambda p: p[0])
        del parts, run
    return disk, found, each


def label(parts, live):
    """Tell `live` what the tensors of `parts` are."""
    for part in vars(parts).values():
        if isinstance(part, torch.optim.Optimizer):
            for state in part.state.values():
                for t in tree_iter(state):
                    live.add(t, "optimizer") if isinstance(t, torch.Tensor) else None
            for p in (p for group in part.param_groups for p in group["params"]):
                p.register_post_accumulate_grad_hook(lambda p: live.add(p.grad, "gradients"))
        elif hasattr(part, "decay"):
            for t in (*part.model.parameters(), *part.model.buffers()):
                live.add(t, "average") if t.untyped_storage()._cdata in live.known else None


def bytes_of(state):
    """The sizes of all tensors in nested dicts and lists."""
    return (t.numel() * t.element_size() for t in tree_iter(state) if isinstance(t, torch.Tensor))


def predict(plan, words, kind="cuda", capability=(8, 0), only=None, scratch=False):
    """What a run with these words takes, on fake tensors: a dict of bytes, and of its work for `seconds_of`. `only` leaves out
    all phases but this one; `scratch` tries each convolution on this machine for what it takes inside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe, cfg = configure(plan, words)
    live, rules = Live(), CudaRules() if kind == "cuda" else contextlib.nullcontext()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), live, rules:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        one = functools.partial(Run, recipe=recipe.RECIPE, kind=kind, capability=capability)
        disk, found, each = follow(recipe, cfg, one, live, only)
    if scratch:
        found = {name: with_scratch(*f) for name, f in found.items()}
    phase, (peak, parts, _, _) = max(found.items(), key=lambda p: p[1][0])
    resident = int(each * plan.images) if plan.recipe in RESIDENT else 0
    run, reserved = Run(cfg, recipe.RECIPE, kind=kind, capability=capability), live.allocator.reserved + resident
    total = reserved + (live.workspace + CONTEXT * GIB if kind == "cuda" else 0)
    return {"words": list(words), "total": total, "peak": peak + resident, "reserved": reserved, "workspace": live.workspace,
        "data": resident, "phase": phase, "breakdown": parts, "checkpoint": disk, "precision": str(run.dtype)[6:],
        "samples": run.samples, "batch_size": cfg.batch_size, "steps": steps_of(cfg, plan, run),
        "work": max((f[2] for name, f in found.items() if name != "evaluation"), key=lambda w: sum(f for f, _, _ in w))}  # fmt: skip


def steps_of(cfg, plan, run):
    """Updates of the whole run, 0 where only a time limit or the data tell."""
    if cfg.num_steps:
        return cfg.num_steps
    per_image = getattr(sys.modules[type(cfg).__module__], "CROPS", 1)
    return math.ceil(cfg.num_epochs * plan.images * per_image / run.samples)


def seconds_of(work, rates):
    """Seconds of an update: for each operation what takes longer, its arithmetic or its memory traffic."""
    speed, fp32, half = rates
    return sum(max(f / ((half if h else fp32) * 1e12), b / (speed * 1e9)) for f, b, h in work)


def probe(device):
    """(GB/s, TFLOPS in fp32, in half precision) of this machine, measured in about a second."""

    def best(function, times=6):
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        spent = []
        for _ in range(times):
            wait()
            start = time.perf_counter()
            function()
            wait()
            spent.append(time.perf_counter() - start)
        return min(spent)

    n, big = (4096, 2**28) if device.type == "cuda" else (1024, 2**26)
    a, rates = torch.empty(big, dtype=torch.uint8, device=device), []
    rates.append(2 * big / best(a.clone) / 1e9)
    for dtype in (torch.float32, torch.float16 if device.type == "cuda" else torch.bfloat16):
        m = torch.randn(n, n, device=device).to(dtype)
        rates.append(2 * n**3 / best(lambda m=m: m @ m) / 1e12)
    return rates


# --- measurement ------------------------------------------------------------------------------------------------------
def measure_here(plan, words):
    """What a run with these words takes on this machine: {"peak", "seconds"}, or {"oom"}. For a process of its own."""
    recipe, cfg = configure(plan, words)
    run, seconds = Run(cfg, recipe.RECIPE), []
    card = run.kind == "cuda"

    def steps():
        for _, own, progress in phases_of(cfg, plan.recipe):
            run = Run(own, recipe.RECIPE)
            run.progress = progress
            parts = recipe.build(own, run)
            batch = recipe.example_batch(own, run)
            for _ in range(3 if card else 1):
                start = time.perf_counter()
                recipe.train_step(parts, batch, own, run)
                torch.cuda.synchronize() if card else None
                seconds.append(time.perf_counter() - start)
            if run.micro < own.batch_size:
                raise torch.OutOfMemoryError(f"out of memory; --batch_size {run.micro} fits")
            recipe.eval_step(parts, own, run)

    try:
        if not card:
            return {"peak": profiled(steps), "seconds": min(seconds)}
        torch.backends.cudnn.benchmark = True
        steps()
        return {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "seconds": min(seconds),
        }
    except (RuntimeError, MemoryError, RecipeError) as e:
        if not (is_out_of_memory(e) or "out of memory" in str(e).lower()):
            raise
        return {"oom": str(e).splitlines()[0]}


def profiled(function):
    """The most bytes that PyTorch's allocator of the processor held at once while function ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    now = most = 0
    for event in sorted(
        (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(plan, words):
    """`measure_here` in a process of its own, so that running out of memory is a result and not an end."""
    line = [sys.executable, __file__, "--recipe", plan.recipe, "--row", "1", *words]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", errors="replace", env=os.environ)
    for text in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return {
        "oom": f"the process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
    }


# --- tables -----------------------------------------------------------------------------------------------------------
def variants(plan, words):
    """[(name, words)] of the rows: as given, each switch turned, other batches, and what else the recipe has."""
    _, cfg = configure(plan, words)
    rows, fields = [("as given", [])], type(cfg).__dataclass_fields__
    for name in ("use_amp", "checkpointing", "half_norm"):
        if name in fields and not plan.only:
            value = getattr(cfg, name)
            on = value or (value is None and name == "use_amp")
            rows.append((f"--{'no-' * bool(on)}{name}", [f"--{'no-' * bool(on)}{name}"]))
    pairs = [(2 * cfg.batch_size, cfg.accumulate), (cfg.batch_size // 2, 2 * cfg.accumulate)]
    rows += [(f"--batch_size {n}", ["--batch_size", str(n), "--accumulate", str(k)]) for n, k in pairs if n and not plan.only]
    rows += [(text, text.split()) for text in VARIANTS.get(plan.recipe, []) if not plan.only]
    return [(name, [*words, *more]) for name, more in rows]


def largest_batch(plan, row, room, capability):
    """The largest --batch_size of a row that fits into `room` bytes: from the slope between two predictions, then checked."""
    n = row["batch_size"]

    def total(batch):
        return predict(plan, [*row["words"], "--batch_size", str(batch)], "cuda", capability, row["phase"])["total"]

    guess = n + int((room - row["total"]) * n / max(total(2 * n) - row["total"], 1))
    while guess > n and total(guess) > room:
        guess = max(n, min(guess - 1, int(0.96 * guess)))
    return guess


def gib(size):
    """Bytes as a text in GiB."""
    return f"{size / GIB:.2f}"


def table(head, rows):
    """Lines of a table with columns as wide as their texts."""
    rows = [[str(cell) for cell in row] for row in (head, *rows)]
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([r[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(r[1:], wide[1:]))]) for r in rows)


def cards_of(plan):
    """{name: (usable bytes, capability, rates or None)} of --vram or --gpu."""
    if plan.vram:
        return {f"{plan.vram:g} GB": (0.95 * plan.vram * GIB, (8, 0), None)}
    cards, known = {}, {name.lower(): name for name in CARDS}
    for text in filter(None, (t.strip().lower() for t in plan.gpu.split(","))):
        if text not in known:
            raise RecipeError(f"--gpu has {text!r}; it takes {', '.join(CARDS)}, or give --vram 24.", 2)
        room, capability, speed, fp32, half = CARDS[known[text]]
        cards[known[text]] = (room * GIB, capability, (BYTE_SHARE * speed, FLOP_SHARE * fp32, FLOP_SHARE * half))
    return cards


def plan_row(plan, name, words, cards):
    """The prediction of one row, and of each card whether it fits; where a GPU is, or --measure asks, its measurement."""
    known = {}
    for card, (room, capability, rates) in cards.items():
        kind = (capability >= (7, 0)) + (capability >= (8, 0))  # cards of a kind have one precision
        known[kind] = known.get(kind) or predict(plan, words, "cuda", capability)
        own = known[kind]
        known[card] = {
            "total": own["total"],
            "margin": room - own["total"],
            "precision": own["precision"],
            "phase": own["phase"],
        }
        known[card] |= {"seconds": seconds_of(own["work"], rates)} if rates else {}
    row = known[max(k for k in known if isinstance(k, int))] | {"name": name, "cards": {c: known[c] for c in cards}}
    here = torch.cuda.is_available()
    if here if plan.measure is None else plan.measure:
        row["measured"] = measure(plan, words)
        same = ("cuda", torch.cuda.get_device_capability()) if here else ("cpu",)
        row["predicted_here"] = predict(plan, words, *same)["peak"]
        row["predicted_with_scratch"] = predict(plan, words, *same, scratch=True)["peak"]
    return row


def report(plan, words):
    """Predict, where there is a GPU measure, and print the tables; returns the rows."""
    here, cards, lines = torch.cuda.is_available(), cards_of(plan), []
    say(f"{plan.recipe} {' '.join(words)}: predicted on fake tensors, in GiB")
    rows = [plan_row(plan, name, own, cards) for name, own in variants(plan, words)]
    order = ["weights", "optimizer", "average", "gradients", "batch", "activations"]
    for r in rows:
        fits = [f"{'yes' if c['margin'] >= 0 else 'NO'} {c['margin'] / GIB:+.1f}" for c in r["cards"].values()]
        parts = [gib(r["breakdown"].get(k, 0)) for k in order]
        lines.append([r["name"], gib(r["total"]), gib(r["peak"]), *parts, gib(r["checkpoint"]), *fits])
    say(table(["", "total", "live", *order, "checkpoint", *cards], lines))
    r = rows[0]
    say(f"total: {gib(r['reserved'])} that CUDA's allocator takes for the live tensors (most in {r['phase']}), "
        f"{gib(r['workspace'])} for the workspace of convolutions, {CONTEXT} for CUDA. Predicted, not measured.")  # fmt: skip
    if r["data"]:
        say(f"{gib(r['data'])} of it are the {plan.images} images, which stay on the card.")
    elif plan.recipe in RESIDENT:
        say("Small images stay on the card: --images N adds them.")
    for card, (room, capability, _) in cards.items():
        fitting = [r for r in rows if r["cards"][card]["margin"] >= 0]
        if not fitting:
            say(f"{card} ({gib(room)}): none of these fits; the least is {gib(min(r['total'] for r in rows))}. Try a smaller "
                "--target_size.")  # fmt: skip
            continue
        best = rows[0] if rows[0] in fitting else max(fitting, key=lambda r: r["cards"][card]["margin"])
        most = largest_batch(plan, best | best["cards"][card], room, capability)
        best["cards"][card]["largest_batch"] = most
        say(f"{card} ({gib(room)}, {best['cards'][card]['precision']}): python {plan.recipe}.py {' '.join(best['words'])} "
            f"fits, up to --batch_size {most}.")  # fmt: skip
    if plan.hours:
        hours(plan, rows, cards)
    if "measured" in rows[0]:
        compare(rows, here)
    for r in rows:
        del r["work"]
    if plan.json:
        about = {"recipe": plan.recipe, "device": torch.cuda.get_device_name() if here else "none", "torch": torch.__version__}
        write_json(Path(plan.json), about | {"date": time.strftime("%F"), "rows": rows})
        say(f"The table is in {plan.json}")
    return rows


def hours(plan, rows, cards):
    """Print which rows finish in --hours."""
    here = torch.cuda.is_available()
    rates = {"this card": probe(torch.device("cuda"))} if here else {c: about[2] for c, about in cards.items() if about[2]}
    if not rates:
        raise RecipeError("--hours needs the card's speed: give --gpu instead of --vram.", 2)
    lines = []
    for r in rows:
        cells = []
        for card in rates:
            seconds = seconds_of(r["work"], rates[card]) if here else r["cards"][card]["seconds"]
            whole = r["steps"] * seconds
            done = f", {'yes' if whole <= 3600 * plan.hours else 'NO'} {clock_text(whole)}" if r["steps"] else ""
            cells.append(f"{1000 * seconds:.0f} ms, {3600 * plan.hours / seconds:,.0f} updates{done}")
        lines.append([r["name"], *cells])
    say(f"\nIn {plan.hours:g} hours:\n{table(['', *rates], lines)}")
    sheet = f"{FLOP_SHARE:.0%} of the arithmetic and {BYTE_SHARE:.0%} of the bandwidth of the cards' data sheets"
    say(f"An estimate: counted operations at {'the speed that a one-second probe found' if here else sheet}; loading data, "
        "evaluations and samples come on top.")  # fmt: skip
    if not any(r["steps"] for r in rows):
        say("--images N, the number of your files, tells how many updates the recipe's epochs are.")


def compare(rows, here):
    """Print predictions and measurement side by side."""
    lines, kinds = [], ("predicted_here", "predicted_with_scratch")
    for r in rows:
        found = r["measured"]
        cells = [f"{gib(r[k])} {r[k] / found['peak'] - 1:+.1%}" if "peak" in found else gib(r[k]) for k in kinds]
        lines.append([r["name"], *cells, gib(found["peak"]) if "peak" in found else found["oom"][:70]])
        lines[-1] += [gib(found.get("reserved", 0))] if here else []
    where = torch.cuda.get_device_name() if here else "this machine's processor"
    head = ["", "tensors", "with what convolutions take inside", "measured", *(["reserved"] if here else [])]
    say(f"\nPeak of a step and an evaluation on {where}, in GiB:\n{table(head, lines)}")


def split(words):
    """(the planner's words, the recipe's) of a command line; --resolution is the guide's name of --target_size."""
    own, rest, fields = [], [], Plan.__dataclass_fields__
    words = [w.replace("--resolution", "--target_size") for w in words]
    while words:
        name = words[0].lstrip("-").partition("=")[0].replace("-", "_")
        mine = own if name in fields or name in ("h", "help", "no_measure", "no_only") else rest
        mine.append(words.pop(0))
        while words and not words[0].startswith("--"):
            mine.append(words.pop(0))
    return own, rest


def start(plan, words):
    """Check --recipe; then measure one row, or plan."""
    plan.recipe = Path(plan.recipe).stem
    known = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem.startswith(("train_", "finetune_")))
    if plan.recipe not in known:
        raise RecipeError(f"--recipe is {plan.recipe!r}; it takes {', '.join(known)}.", 2)
    if plan.row:
        print(json.dumps(measure_here(plan, words)))
        return None
    return report(plan, words)


if __name__ == "__main__":
    OWN, REST = split(sys.argv[1:])
    sys.argv = [sys.argv[0], *OWN]
    main(lambda plan: start(plan, REST), Plan, __doc__)
