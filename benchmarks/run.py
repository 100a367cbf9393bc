"""Measure an update of every recipe on this machine: seconds, rate, use of the processor, memory, waiting for data.

    python benchmarks/run.py [--recipe train_convnext] [--device auto] [--quick] [--out FILE.json]

Each recipe's own build and train_step, through the contract, in every form of {fp32, AMP} x {contiguous, channels last} x
{eager, compiled} x {plain, checkpointed} that it has, and in its own layout, as its users have it; compiled ones choose their
layouts themselves. All forms of a recipe take turns in one process, so that a noisy machine slows them alike. The first updates
are not counted, and the median is of the others: SOAP's turn of its bases in each tenth update is not in it. Writes
benchmarks/results/<device>.json and prints Markdown.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from memory import SMALL  # noqa: E402

import test_memory_usage as planner  # noqa: E402
from common import Run, keep_freed_memory  # noqa: E402

MIB = 2**20
FLAGS = {  # sizes whose update takes a tenth of a second or so on a processor, and larger ones on a card
    "cpu": {
        "train_ultrafast_srcnn": "--target_size 48 --batch_size 16",
        "train_realesrgan_optimized": "--target_size 64 --batch_size 4",
        "train_nextdit_fast": "--preset tiny --target_size 64 --batch_size 8",
        "train_nextdit_ultrafast": "--preset tiny --target_size 64 --batch_size 8",
        "finetune_pretrained": "--target_size 64 --batch_size 8",
        "train_latent_cfg": "--target_size 64 --batch_size 16 --stage diffusion --encoder pca",
        "train_convnext": "--target_size 32 --batch_size 64",
        "train_autoencoder3d": "--target_size 64,64,32 --batch_size 1",
    },
    "cuda": {
        "train_ultrafast_srcnn": "--target_size 48 --batch_size 256",
        "train_realesrgan_optimized": "--target_size 256 --batch_size 8",
        "train_nextdit_fast": "--preset 0.6B --target_size 512 --batch_size 16",
        "train_nextdit_ultrafast": "--preset 0.1B --target_size 256 --batch_size 64",
        "finetune_pretrained": "--target_size 256 --batch_size 16",
        "train_latent_cfg": "--target_size 64 --batch_size 16 --stage diffusion --encoder pca",
        "train_convnext": "--target_size 32 --batch_size 1024",
        "train_autoencoder3d": "--target_size 256,256,64 --batch_size 1",
    },
}
AXES = (("fp32", "AMP"), ("contiguous", "channels last", "own layout"), ("eager", "compiled"), ("plain", "checkpointed"))
PLAIN, OWN = (("fp32", "own layout", "eager", "plain"), ("AMP", "own layout", "eager", "plain"))


class Form:
    """One way of running a recipe's update: call it for one; `parts`, `batch` and `run` are the recipe's own.

    layout: "contiguous" or "channels last"; anything else is the recipe's own choice. Recipes ask for channels last by torch's
    own name; while a contiguous form works, that name means the other layout.
    """

    def __init__(self, recipe, flags, layout="", data=""):
        plan = planner.Plan(recipe=recipe, data=data or SMALL.get(recipe, "") * ("--weights" not in flags))
        self.words, self.layout, self.last = flags.split(), layout, torch.channels_last
        self.recipe, self.cfg = planner.configure(plan, self.words)
        self.plan, self.stack = plan, contextlib.ExitStack()
        with self:
            self.run = Run(self.cfg, self.recipe.RECIPE)
            self.run.undo = self.stack
            self.run.progress = 0.5  # mid-run: the rate is no longer that of the first update
            self.parts = self.recipe.build(self.cfg, self.run)
            self.batch = self.recipe.example_batch(self.cfg, self.run)
            if layout in ("contiguous", "channels last"):
                for module in (m for m in vars(self.parts).values() if isinstance(m, torch.nn.Module)):
                    for p in module.parameters():
                        p.data = self.laid(p.data)
                self.batch = {k: self.laid(v) for k, v in self.batch.items()}

    def __enter__(self):
        torch.channels_last = torch.contiguous_format if self.layout == "contiguous" else self.last

    def __exit__(self, *_):
        torch.channels_last = self.last

    def laid(self, t):
        """A tensor of four or five dimensions in this form's layout; bytes are images that no convolution has yet."""
        if t.dtype is torch.uint8:
            return t
        if t.ndim not in (4, 5) or self.layout == "contiguous":
            return t.contiguous()
        return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)

    def keeps(self):
        """Whether an update's convolutions get what the form promises: nothing, or mostly, channels last."""
        seen, kinds = [], {4: self.last, 5: torch.channels_last_3d}

        def look(module, args, out):
            tensors = [t for t in (*args, out) if t.ndim in kinds and min(t.shape[1:]) > 1]
            seen.extend(t.is_contiguous(memory_format=kinds[t.ndim]) for t in tensors)

        models = [m for m in vars(self.parts).values() if isinstance(m, torch.nn.Module)]
        convolutions = {m for model in models for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)}
        hooks = [m.register_forward_hook(look) for m in convolutions]
        self()
        for hook in hooks:
            hook.remove()
        return bool(seen) and (not any(seen) if self.layout == "contiguous" else sum(seen) > len(seen) / 2)

    def __call__(self):
        """One update, to its end; returns its seconds."""
        with self:
            wait(self.run.device)
            start = time.perf_counter()
            self.recipe.train_step(self.parts, self.batch, self.cfg, self.run)
            wait(self.run.device)
            spent = time.perf_counter() - start
        if self.run.micro < self.cfg.batch_size:
            raise SystemExit(f"{' '.join(self.words)} ran out of memory and halved its batch: it cannot be compared.")
        return spent

    def resident(self):
        """Bytes that are there between two updates: weights, averages, the optimizer's state, a batch."""
        found = list(self.batch.values())
        for part in vars(self.parts).values():
            part = getattr(part, "model", part)
            if isinstance(part, torch.nn.Module):
                found += [*part.parameters(), *part.buffers()]
            elif isinstance(part, torch.optim.Optimizer):
                found += [t for t in planner.tree_iter(list(part.state.values())) if isinstance(t, torch.Tensor)]
        return sum(planner.bytes_of(found))

    def peak(self):
        """The most bytes at once during an update."""
        for part in vars(self.parts).values():
            if isinstance(part, torch.optim.Optimizer):
                part.zero_grad(set_to_none=True)  # they are counted as the update makes them
        if self.run.kind != "cuda":
            return self.resident() + planner.profiled(self)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return self.resident() + torch.cuda.max_memory_allocated() - before


def wait(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(forms, repeats, skip=2):
    """{name: seconds of an update, the median} of {name: callable that returns seconds}, which take turns."""
    spent = {name: [] for name in forms}
    for _ in range(skip + repeats):
        for name, form in forms.items():
            spent[name].append(form())
    return {name: statistics.median(times[skip:]) for name, times in spent.items()}


def matrix_rate(device, dtype):
    """A callable that multiplies two square matrices and returns its seconds, and the FLOPs of that."""
    n, times = (8192, 10) if device.type == "cuda" else (1024, 1)
    a = torch.randn(n, n, device=device).to(dtype)

    def multiply():
        wait(device)
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        wait(device)
        return (time.perf_counter() - start) / times

    return multiply, 2 * n**3


def forms_of(recipe, kind, quick):
    """{(precision, layout, mode, memory): flags} of the forms that a recipe has; `quick` leaves compiled ones out."""
    cfg = planner.configure(planner.Plan(recipe=recipe, data=SMALL.get(recipe, "")), FLAGS[kind][recipe].split())[1]
    found = {}
    for form in itertools.product(*AXES):
        precision, layout, mode, memory = form
        checkpoints = hasattr(cfg, "checkpointing")
        if mode == "compiled" and (quick or layout != "own layout"):
            continue
        if memory == "checkpointed" and not checkpoints:
            continue
        more = [FLAGS[kind][recipe], f"--device {kind}", "--use_amp" if precision == "AMP" else "--no-use_amp"]
        more += ["--compile"] * (mode == "compiled")
        more += [f"--{'no-' * (memory == 'plain')}checkpointing"] * checkpoints
        found[form] = " ".join(more)
    return found


def measure(recipe, kind, quick, repeats):
    """The row of a recipe: its forms' times, rates and memory, and what the planner says of them."""
    forms = {}
    for name, flags in forms_of(recipe, kind, quick).items():
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        form = Form(recipe, flags, name[1])
        first = form()
        if "compiled" in name and torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs:
            print(f"{recipe} {' '.join(name)}: nothing of it could be compiled", flush=True)
            continue
        if name[1] != "own layout" and not form.keeps():
            continue  # without convolutions, or with a layout that is part of the recipe
        forms[name] = form
        print(f"{recipe} {' '.join(name)}: first update {first:.1f} s", flush=True)
    device = form.run.device
    rates = {}
    for name, form in forms.items():
        if name[0] not in rates:
            rates[name[0]] = matrix_rate(device, form.run.dtype)
    turns = {" ".join(k): f for k, f in forms.items()} | {f"matrix {k}": f for k, (f, _) in rates.items()}
    spent = in_turns(turns, repeats)
    peak = {k: form.peak() for k, form in forms.items()}
    form = forms[PLAIN]
    work = planner.predict(form.plan, forms[PLAIN].words, form.run.kind, getattr(form.run, "capability", (8, 0)))["work"]
    done = sum(f for f, _, _ in work)
    rows = {}
    for name, form in forms.items():
        seconds, text = spent[" ".join(name)], " ".join(name)
        count = rates[name[0]][1]
        speed = count / spent[f"matrix {name[0]}"]
        rows[text] = {"ms": round(1e3 * seconds, 2), "faster": round(spent[" ".join(PLAIN)] / seconds, 3)}
        rows[text] |= {
            "items_per_second": round(form.run.samples / seconds, 2),
            "utilisation": round(done / seconds / speed, 4),
        }
        rows[text] |= {"peak_mib": round(peak[name] / MIB, 1)}
    about = {"flags": FLAGS[kind][recipe], "samples": form.run.samples, "precision": str(form.run.dtype)[6:]}
    about |= {"gflop": round(done / 1e9, 3), "own_ms": round(1e3 * spent[" ".join(OWN)], 2)}
    about["matrix_gflops"] = {k: round(count / spent[f"matrix {k}"] / 1e9, 1) for k, (_, count) in rates.items()}
    return about | {"forms": rows}


def expected(recipe, kind, capability, rates):
    """Seconds of an update in the recipe's own form, as the planner expects them of a card with these rates."""
    plan = planner.Plan(recipe=recipe, data=SMALL.get(recipe, ""))
    words = forms_of(recipe, kind, True)[OWN].split()
    return planner.seconds_of(planner.predict(plan, words, kind, capability)["work"], rates)


def data_wait(recipe, kind, updates):
    """The share of its time that a run of so many updates on built-in data waits for its loader, by the end of its log."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*FLAGS[kind][recipe].split(), "--num_steps", str(updates), "--device", kind, "--out_dir", f"{folder}/run"]
        done = subprocess.run([sys.executable, str(ROOT / f"{recipe}.py"), *words], capture_output=True, text=True, cwd=folder,
            encoding="utf-8", errors="replace")  # fmt: skip
        if done.returncode:
            raise SystemExit(
                f"{recipe} {' '.join(words)} ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}"
            )
        lines = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [r for r in map(json.loads, lines) if "data_wait" in r]
    return {"data_wait": rows[-1]["data_wait"], "updates": updates}


def markdown(found):
    """The tables of a results file, for people."""
    lines = []
    for recipe, row in found["recipes"].items():
        lines += [f"\n{recipe} `{row['flags']}`; {row['data_wait']:.1%} of the time is waiting for data; the planner expects "
            f"{1e3 * row['expected_seconds']:.0f} ms of an update\n",
            "| form | ms | faster | items/s | of the matrix rate | peak, MiB |", "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
        for name, f in row["forms"].items():
            figures = [f"{f['ms']:.1f}", f"{f['faster']:.2f}", f"{f['items_per_second']:.1f}", f"{f['utilisation']:.0%}"]
            lines.append(f"| {name} | {' | '.join(figures)} | {f['peak_mib']:.1f} |")
    return "\n".join(lines)


def about(device):
    """What a figure needs beside it: device, processor, threads, versions, date."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu{torch.get_num_threads()}"
    return {"device": name, "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "date": datetime.date.today().isoformat()}  # fmt: skip


def processor():
    """The processor's name."""
    with contextlib.suppress(OSError):
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    return platform.processor() or platform.machine()


def one(recipe, kind, quick, repeats):
    """The whole row of a recipe, for a process of its own."""
    if kind == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # as Run does where a recipe trains
    torch._dynamo.config.recompile_limit = 64  # one compiled function for each form
    row = measure(recipe, kind, quick, repeats)
    capability = torch.cuda.get_device_capability() if kind == "cuda" else (8, 0)
    rates = planner.probe(torch.device(kind))
    row |= {"expected_seconds": expected(recipe, kind, capability, rates)}
    return row | {"torch": torch.__version__, "date": datetime.date.today().isoformat()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="", help="one or several, by commas; default: all")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="without compiled forms, which take most of the time")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--updates", type=int, default=40, help="of the run that tells how long data are waited for")
    parser.add_argument("--out", default="", help="default: benchmarks/results/<device>.json; rows of recipes are replaced")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    recipes = [r for r in args.recipe.split(",") if r] or list(FLAGS[kind])
    unknown = [r for r in recipes if r not in FLAGS[kind]]
    if unknown:
        raise SystemExit(f"--recipe has {', '.join(unknown)}; it takes {', '.join(FLAGS[kind])}.")
    if args.row:
        print(json.dumps(one(recipes[0], kind, args.quick, args.repeats)))
        return
    head = about(kind)
    path = Path(args.out or ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', head['device'].lower())}.json")
    found = {"recipes": {}} | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | head
    for recipe in recipes:  # each in a process of its own, so that none leaves its memory to the next
        words = [sys.executable, __file__, "--row", "--recipe", recipe, "--device", kind, "--repeats", str(args.repeats)]
        done = subprocess.run([*words, *["--quick"] * args.quick], stdout=subprocess.PIPE, text=True, encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})  # fmt: skip
        print("\n".join(done.stdout.splitlines()[:-1]), flush=True)
        if done.returncode:
            raise SystemExit(f"{recipe} could not be measured; its last words are above.")
        found["recipes"][recipe] = json.loads(done.stdout.splitlines()[-1]) | data_wait(recipe, kind, args.updates)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
