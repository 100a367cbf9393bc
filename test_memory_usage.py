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
import io
import json
import math
import os
import shlex
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
FLOP_SHARE, BYTE_SHARE = 0.35, 0.7  # of a card's rates that training reaches, a guess
LAUNCH = 5e-6  # seconds that the start of an operation takes at least
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
    "square normalize rms_norm huber_loss kl_div interpolate cumsum cumprod prod erfinv acos asin cosh sinh tan dist pdist "
    "cdist renorm logsumexp".split()
)
DATA = {  # what a recipe learns from its data before `build`; here as its guide has it
    "train_latent_cfg": {"names": json.dumps([f"class {k}" for k in range(31)])},
    "train_convnext": {"names": json.dumps([f"class {k}" for k in range(10)])},
    "train_nextdit_fast": {"labels": "0 255"},
    "train_nextdit_ultrafast": {"labels": "0 255"},
    "finetune_pretrained": {"labels": "0 255"},
}
GIVEN = {  # the flags of a recipe's row where the user gives none
    "train_autoencoder3d": {"preset": "8gb", "target_size": "256,256,64", "accumulate": "1"},
    "train_convnext": {"target_size": "32", "batch_size": "1024"},
    "train_nextdit_fast": {"preset": "0.1B", "batch_size": "64"},
    "train_nextdit_ultrafast": {"preset": "0.1B", "batch_size": "128"},
    "finetune_pretrained": {"weights": "PUBLISHED"},
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
    data: str = opt("", 'what your data would tell the recipe, as JSON, e.g. {"names": "[\\"cat\\", \\"dog\\"]"}')
    json: str = opt("", "write the table to this file too", everyday=True)
    measure: bool | None = opt(None, "measure each row too; default: where a GPU is", everyday=True)
    only: bool = opt(False, "the flags as they are given, no other rows")
    row: str = opt("", "measure one row (for the planner itself)")


# --- prediction -------------------------------------------------------------------------------------------------------
class CudaRules(TorchFunctionMode):
    """CUDA's autocast on tensors of the processor: what the processor's leaves in half precision goes to fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:  # recomputed blocks need the mode, which is off while it handles a function
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
        self.free, self.reserved, self.most, self.count = {True: [], False: []}, 0, 0, 0

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
            self.most = max(self.most, self.reserved)
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

    def trim(self):
        """Give whole free segments back, as CUDA's does before it fails; `most` keeps what was reserved at once."""
        for free in self.free.values():
            for entry in [e for e in free if not (e[2]["before"] or e[2]["after"])]:
                free.remove(entry)
                self.reserved -= entry[0]

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

    def begin(self, kind):
        """Forget the peak and the work so far: a phase begins, with tensors of this kind."""
        self.kind, self.peak, self.at_peak, self.work, self.calls = kind, 0, {}, [], []
        self.allocator.trim()

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


def with_scratch(peak, parts, work, calls, kind):
    """The same with what convolutions take inside (other layouts of their operands, the library's workspace), each tried once
    on this machine; one that does not fit there is left out."""
    cuda = kind == "cuda"

    def real(value):
        is_form = isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], torch.dtype)
        return torch.empty_strided(*value[:2], dtype=value[2], device=kind).zero_() if is_form else value

    def inside(func, args):
        own, out = [real(a) for a in args], []
        if not cuda:
            func(*own)  # the first call sets the library up
            return profiled(lambda: out.append(func(*own))) - sum(bytes_of(out))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.append(func(*own))  # the first call tries the library's algorithms, as in training
        return torch.cuda.max_memory_allocated() - before - sum(bytes_of(out))

    for func, args, live, kinds in calls:
        key = (kind, func, repr(args))
        if key not in SCRATCH:
            try:
                SCRATCH[key] = max(0, inside(func, args))
            except RuntimeError as e:
                if not is_out_of_memory(e):
                    raise
                SCRATCH[key] = 0
            torch.cuda.empty_cache() if cuda else None
        if live + SCRATCH[key] > peak:
            peak, parts = live + SCRATCH[key], kinds | {"inside operations": SCRATCH[key]}
    return peak, parts, work, calls


def flops(func, args, kwargs, out):
    """Floating point operations of an operation that multiplies matrices or convolves; 0 for others."""
    from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    name = func._overloadpacket
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(a.shape for a in args[:3]))
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(a.shape for a in args[:4]))
    if name is torch.ops.aten.convolution_backward:  # the registry takes no heed of groups, such as depthwise ones
        return conv_flop_count(args[1].shape, args[2].shape, args[0].shape, args[7]) * sum(args[10][:2])
    with contextlib.suppress(Exception):  # the registry knows shapes of some calls only
        return flop_registry[name](*args, **(kwargs or {}), out_val=out) if name in flop_registry else 0
    return 0


def configure(plan, words):
    """(the recipe's module, its Config of these words) with what its data would tell filled in."""
    recipe = importlib.import_module(plan.recipe)
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = parse(recipe.Config, "", list(words))
    return recipe, filled(cfg, plan)


def whole(plan, words):
    """The words of a row: as given, and what else its recipe's settings would leave to the machine that plans."""
    named = {w.lstrip("-").partition("=")[0].replace("-", "_").removeprefix("no_") for w in words if w.startswith("--")}
    named |= {k.lower() for k in os.environ if k.isupper()}
    given = {k: v for k, v in ({"data_dir": "DATA"} | GIVEN.get(plan.recipe, {})).items() if k not in named}
    return [w for k, v in given.items() for w in (f"--{k}", v)] + list(words)


def filled(cfg, plan):
    """A Config with what the recipe would learn from its data. RecipeError for a --data that is none."""
    try:
        more = DATA.get(plan.recipe, {}) | json.loads(plan.data or "{}")
        if getattr(cfg, "weights", "") == "PUBLISHED" and "geometry" not in more:
            recipe = sys.modules[type(cfg).__module__]
            more |= {"geometry": json.dumps(recipe.PUBLISHED), "channels": 4, "factor": 8}
        if getattr(cfg, "space", "") == "latent" or (hasattr(cfg, "space") and cfg.vae):
            more = {"channels": 4, "factor": 8} | more
    except (ValueError, TypeError):
        raise RecipeError(f"--data is {plan.data!r}; it takes a JSON object of the recipe's derived settings.", 2) from None
    for name, value in more.items():
        setattr(cfg, name, value)
    return cfg


def phases_of(cfg, plan):
    """[(name, Config, share of the run)] at which updates may differ: stages of their own, and early and late."""
    stages = type(cfg).__dataclass_fields__.get("stage")
    if stages and cfg.stage == "all":
        names = [s for s in stages.metadata["choices"] if s != "all"]
        return [(f"--stage {s}", filled(dataclasses.replace(cfg, stage=s), plan), 0.5) for s in names]
    late = any(getattr(cfg, name, 0) for name in ("gan", "grow", "stages"))
    return [("an update", cfg, 0.0), *([("a late update", cfg, 0.9999)] if late else [])]


def follow(recipe, cfg, plan, run_of, live):
    """Build, update and evaluate, with `live` counting; returns (bytes of a checkpoint, {phase: (peak, what, work, calls)},
    bytes of a sample)."""
    run, found = run_of(cfg), {}
    parts = recipe.build(cfg, run)
    label(parts, live)
    found["building"] = live.found()
    disk = sum(bytes_of(parts.state_dict()))
    for name, own, run.progress in phases_of(cfg, plan):
        live.begin("batch")
        batch = recipe.example_batch(own, run)
        live.kind = "activations"
        losses = recipe.train_step(parts, batch, own, run)
        found[name] = live.found()
        each = max(sum(bytes_of(v)) / len(v) for v in batch.values())
        del losses
        live.begin("activations")
        recipe.eval_step(parts, own, run)
        found["evaluation"] = max(found.get("evaluation", (0,)), live.found(), key=lambda p: p[0])
        del batch
    return disk, found, each


def label(parts, live):
    """Tell `live` what the tensors of `parts` are."""
    weights = [m for m in vars(parts).values() if isinstance(m, torch.nn.Module)]
    own = {t.untyped_storage()._cdata for m in weights for t in (*m.parameters(), *m.buffers())}
    for part in vars(parts).values():
        if isinstance(part, torch.optim.Optimizer):
            for t in tree_iter(list(part.state.values())):
                live.add(t, "optimizer") if isinstance(t, torch.Tensor) else None
            for p in (p for group in part.param_groups for p in group["params"]):
                p.register_post_accumulate_grad_hook(lambda p: live.add(p.grad, "gradients"))
        elif hasattr(part, "decay"):  # an average; weights that are not trained are shared with the model
            for t in (t for t in (*part.model.parameters(), *part.model.buffers()) if t.untyped_storage()._cdata not in own):
                live.add(t, "average") if t.untyped_storage()._cdata in live.known else None


def bytes_of(state):
    """The sizes of all tensors in nested dicts and lists, each storage once."""
    tensors = {t.untyped_storage()._cdata: t for t in tree_iter(state) if isinstance(t, torch.Tensor)}
    return (t.numel() * t.element_size() for t in tensors.values())


def predict(plan, words, kind="cuda", capability=(8, 0), scratch=False):
    """What a run with these words takes, on fake tensors: a dict of bytes, and of its work for `seconds_of`. `scratch` tries
    each convolution on this machine for what it takes inside."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe, cfg = configure(plan, words)
    live, rules = Live(), CudaRules() if kind == "cuda" else contextlib.nullcontext()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), live, rules:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        one = functools.partial(Run, recipe=recipe.RECIPE, kind=kind, capability=capability)
        disk, found, each = follow(recipe, cfg, plan, one, live)
    if scratch:
        found = {name: with_scratch(*f, kind) for name, f in found.items()}
    phase, (peak, parts, _, _) = max(found.items(), key=lambda p: p[1][0])
    resident = int(each * plan.images) if plan.recipe in RESIDENT else 0
    run, reserved = Run(cfg, recipe.RECIPE, kind=kind, capability=capability), live.allocator.most
    total = reserved + (live.workspace + CONTEXT * GIB if kind == "cuda" else 0)
    works = [f[2] for name, f in found.items() if name not in ("building", "evaluation")]
    return {"words": list(words), "total": total, "peak": peak, "reserved": reserved, "workspace": live.workspace,
        "data": resident, "phase": phase, "breakdown": parts, "checkpoint": disk, "precision": str(run.dtype)[6:],
        "samples": run.samples, "batch_size": cfg.batch_size, "steps": steps_of(cfg, plan, run),
        "work": max(works, key=lambda w: sum(f for f, _, _ in w))}  # fmt: skip


def steps_of(cfg, plan, run):
    """Updates of the whole run, 0 where only a time limit or the number of files tells."""
    given = getattr(cfg, "given", ())
    if (cfg.time_budget or cfg.deadline) and not {"num_steps", "num_epochs"} & set(given):
        return 0
    if cfg.num_steps:
        return cfg.num_steps
    each = getattr(sys.modules[type(cfg).__module__], "CROPS", 1) * cfg.sample_ratio * (1 if cfg.val_dir else 0.9)
    return math.ceil(cfg.num_epochs * plan.images * each / run.samples)


def seconds_of(work, rates):
    """Seconds of an update: for each operation what takes longest, its arithmetic, its memory traffic or its start."""
    speed, fp32, half = rates
    return sum(max(f / ((half if h else fp32) * 1e12), b / (speed * 1e9), LAUNCH) for f, b, h in work)


def probe(device):
    """(GB/s, TFLOPS in fp32, in half precision) of this machine, measured in about a second, and the shares of them that
    training reaches."""

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

    torch.set_float32_matmul_precision("high")
    n, big = (4096, 2**28) if device.type == "cuda" else (1024, 2**26)
    a = torch.empty(big, dtype=torch.uint8, device=device)
    rates = [BYTE_SHARE * 2 * big / best(a.clone) / 1e9]
    for dtype in (torch.float32, torch.float16 if device.type == "cuda" else torch.bfloat16):
        m = torch.randn(n, n, device=device).to(dtype)
        rates.append(FLOP_SHARE * 2 * n**3 / best(lambda m=m: m @ m) / 1e12)
    return rates


# --- measurement ------------------------------------------------------------------------------------------------------
def measure_here(plan, words):
    """What a run with these words takes on this machine: {"peak", "seconds"}, or {"oom"}. For a process of its own."""
    recipe, cfg = configure(plan, words)
    run, seconds = Run(cfg, recipe.RECIPE), 0.0
    card = run.kind == "cuda"

    def steps():
        nonlocal seconds
        parts = recipe.build(cfg, run)
        for _, own, run.progress in phases_of(cfg, plan):
            batch, spent = recipe.example_batch(own, run), []
            for _ in range(3 if card else 1):
                start = time.perf_counter()
                recipe.train_step(parts, batch, own, run)
                torch.cuda.synchronize() if card else None
                spent.append(time.perf_counter() - start)
            seconds = max(seconds, min(spent))
            if run.micro < own.batch_size:
                raise torch.OutOfMemoryError(f"out of memory; --batch_size {run.micro} fits")
            recipe.eval_step(parts, own, run)

    try:
        if not card:
            return {"peak": profiled(steps), "seconds": seconds}
        torch.cuda.set_device(run.device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        steps()
        return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "seconds": seconds}
    except (RuntimeError, MemoryError, RecipeError) as e:
        if not (is_out_of_memory(e) or "out of memory" in str(e).lower()):
            raise
        return {"oom": (str(e).splitlines() or ["out of memory"])[0]}


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
    line = [sys.executable, __file__, "--recipe", plan.recipe, "--data", plan.data or "{}", "--row", "1", *words]
    same = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # it changes what convolutions take inside
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", errors="replace", env=same)
    for text in reversed(done.stdout.splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(text)
    return {"oom": f"the process ended with {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1][:200]}"}


# --- tables -----------------------------------------------------------------------------------------------------------
def variants(plan, words):
    """[(name, words)] of the rows: as given, each switch turned, other batches, and what else the recipe has."""
    words = whole(plan, words)
    _, cfg = configure(plan, words)
    rows, fields = [], type(cfg).__dataclass_fields__
    for name in ("use_amp", "checkpointing", "half_norm"):
        if name in fields:  # where the recipe decides, it is on
            value = getattr(cfg, name)
            rows.append(f"--{'no-' * (value is None or bool(value))}{name}")
    rows.append(f"--batch_size {2 * cfg.batch_size}")
    if cfg.batch_size % 2 == 0:
        rows.append(f"--batch_size {cfg.batch_size // 2} --accumulate {2 * cfg.accumulate}")
    found = [("as given", words)]
    for text in [*rows, *VARIANTS.get(plan.recipe, [])] * (not plan.only):
        with contextlib.suppress(RecipeError):  # one that does not go with what is given
            configure(plan, [*words, *text.split()])
            found.append((text, [*words, *text.split()]))
    return found


def largest_batch(plan, row, room, capability):
    """The largest --batch_size of a row that fits into `room` bytes, to 3 % (131,072 at most)."""

    def fits(batch):
        return predict(plan, [*row["words"], "--batch_size", str(batch)], "cuda", capability)["total"] <= room

    low, high = row["batch_size"], 2 * row["batch_size"]
    while high <= 2**17 and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 32) and high <= 2**17:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


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
    if not cards:
        raise RecipeError(f"--gpu is {plan.gpu!r}; it takes {', '.join(CARDS)}, or give --vram 24.", 2)
    return cards


def plan_row(plan, name, words, cards):
    """The prediction of one row, and of each card whether it fits; where a GPU is, or --measure asks, its measurement."""
    known, fit = {}, {}
    for card, (room, capability, rates) in cards.items():
        kind = (capability >= (7, 0)) + (capability >= (8, 0))  # cards of a kind have one precision
        own = known[kind] = known.get(kind) or predict(plan, words, "cuda", capability)
        data = own["data"] if own["data"] < (room - CONTEXT * GIB) / 4 else 0  # else they stay in RAM
        fit[card] = {"total": own["total"] + data, "margin": room - own["total"] - data, "precision": own["precision"]}
        fit[card] |= {"data": data} | ({"seconds": seconds_of(own["work"], rates)} if rates else {})
    row = known[max(known)] | {"name": name, "cards": fit}
    here = torch.cuda.is_available()
    if here if plan.measure is None else plan.measure:
        row["measured"] = measure(plan, words)
    return row


def report(plan, words):
    """Predict, where there is a GPU measure, and print the tables; returns the rows."""
    here, cards, lines = torch.cuda.is_available(), cards_of(plan), []
    if plan.hours and plan.vram and not here:
        raise RecipeError("--hours needs the card's speed: give --gpu instead of --vram.", 2)
    say(f"{plan.recipe} {shlex.join(whole(plan, words))}: predicted on fake tensors, in GiB")
    rows = [plan_row(plan, name, own, cards) for name, own in variants(plan, words)]
    for r in (r for r in rows if "measured" in r):  # after all measurements: they want the whole card
        kind = ("cuda", torch.cuda.get_device_capability()) if here and "--device cpu" not in " ".join(r["words"]) else ("cpu",)
        r["predicted_here"] = predict(plan, r["words"], *kind)["peak"]
        r["predicted_with_scratch"] = predict(plan, r["words"], *kind, scratch=True)["peak"]
    order = ["weights", "optimizer", "average", "gradients", "batch", "activations"]
    for r in rows:
        fits = [f"{'yes' if c['margin'] >= 0 else 'NO'} {c['margin'] / GIB:+.1f}" for c in r["cards"].values()]
        parts = [gib(r["breakdown"].get(k, 0)) for k in order]
        lines.append([r["name"], gib(r["total"]), gib(r["peak"]), *parts, gib(r["checkpoint"]), *fits])
    say(table(["", "total", "live", *order, "checkpoint", *cards], lines))
    r = rows[0]
    say(f"total: {gib(r['reserved'])} that CUDA's allocator takes for the live tensors (most in {r['phase']}), "
        f"{gib(r['workspace'])} for the workspace of convolutions, {CONTEXT} for CUDA. Predicted, not measured.")  # fmt: skip
    if plan.recipe in RESIDENT and not plan.images:
        say("Small images stay on the card where they are less than a quarter of it: --images N adds them.")
    for card, (room, capability, _) in cards.items():
        fitting = [r for r in rows if r["cards"][card]["margin"] >= 0]
        if not fitting:
            least = min(r["cards"][card]["total"] for r in rows)
            say(f"{card} ({gib(room)}): none of these fits; the least is {gib(least)}. Try a smaller --target_size.")
            continue
        best = rows[0] if rows[0] in fitting else max(fitting, key=lambda r: r["cards"][card]["margin"])
        about = best["cards"][card]
        about["largest_batch"] = largest_batch(plan, best, room - about["data"], capability)
        images = f", {gib(about['data'])} of images on the card" if about["data"] else ""
        say(f"{card} ({gib(room)}, {about['precision']}{images}): python {plan.recipe}.py {shlex.join(best['words'])} "
            f"fits, up to --batch_size {about['largest_batch']}.")  # fmt: skip
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
    rates = {c: about[2] for c, about in cards.items() if about[2]}
    rates |= {"this card": probe(torch.device("cuda"))} if here else {}
    lines = []
    for r in rows:
        cells = []
        for card in rates:
            seconds = r["cards"][card]["seconds"] if card in r["cards"] else seconds_of(r["work"], rates[card])
            seconds = r.get("measured", {}).get("seconds", seconds) if card == "this card" else seconds
            all_of_it = r["steps"] * seconds
            done = f", {'yes' if all_of_it <= 3600 * plan.hours else 'NO'} {clock_text(all_of_it)}" if r["steps"] else ""
            cells.append(f"{1000 * seconds:.0f} ms, {3600 * plan.hours / seconds:,.0f} updates{done}")
        lines.append([r["name"], *cells])
    say(f"\nIn {plan.hours:g} hours:\n{table(['', *rates], lines)}")
    say(f"An estimate: counted operations at {FLOP_SHARE:.0%} of the arithmetic and {BYTE_SHARE:.0%} of the bandwidth of the "
        "cards' data sheets; this card as measured. Loading data, evaluations and samples come on top.")  # fmt: skip
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
