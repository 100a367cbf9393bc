"""What makes NextDiT's training step fast: ms per update of each form, taking turns in one process.

    python benchmarks/nextdit_speed.py [--preset tiny --target_size 64 --batch_size 16] [--compile] [--out FILE.json]

The first line is the loop that most scripts have: the same network, batch and loss in fp32, eager, with torch's own norm,
attention and AdamW. The others are the recipe's own train_step in several forms. On a GPU the peak memory and the share of
the card's measured rate of matrix products (--peak) are told too: FLOP of an update = 6 x weights x tokens + attention's.
"""

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_nextdit_fast as recipe  # noqa: E402
from common import EMA, Parts, Run, keep_freed_memory  # noqa: E402

OWN = {"norm": recipe.RMSNorm.forward, "rotate": recipe.rotate, "attend": recipe.attend}


def plain_norm(norm, x, scale=1.0):
    return F.rms_norm(x.float(), x.shape[-1:], eps=norm.eps).to(x.dtype) * norm.weight * scale


def plain_rotate(x, table):
    cos, sin = (a.unsqueeze(-2) for a in table)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def plain_attend(q, k, v, mask=None, scale=None):
    q, k, v = (a.transpose(1, 2) for a in (q, k.to(q.dtype), v.to(q.dtype)))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@contextlib.contextmanager
def parts_of(own):
    """The model's own norm, rotation and attention inside, or torch's."""
    names = OWN if own else {"norm": plain_norm, "rotate": plain_rotate, "attend": plain_attend}
    recipe.RMSNorm.forward, recipe.rotate, recipe.attend = names["norm"], names["rotate"], names["attend"]
    yield
    recipe.RMSNorm.forward, recipe.rotate, recipe.attend = OWN["norm"], OWN["rotate"], OWN["attend"]


FORMS = {  # name -> (half precision?, own norm, rotation and attention?, compiled?)
    "plain loop: fp32, eager, AdamW": (False, False, False),
    "half": (None, False, False),
    "half, own norm, rotation and attention (the recipe)": (None, True, False),
    "the same, compiled": (None, True, True),
}


def measure(args):
    """({form: median ms}, {form: peak GiB}) of an update."""
    setups, peaks = {}, {}
    with contextlib.ExitStack() as stack:
        for name, (half, own, compiled) in FORMS.items():
            if compiled and not args.compile:
                continue
            words = {"preset": args.preset, "target_size": args.target_size, "batch_size": args.batch_size}
            cfg = recipe.Config(device=args.device, use_amp=half, compile=compiled, **words)
            cfg.labels = "0 1"
            run = Run(cfg)
            run.undo = stack.enter_context(contextlib.ExitStack())
            with parts_of(own):
                parts = recipe.build(cfg, run)
            if half is False:
                opt = torch.optim.AdamW(parts.model.parameters(), 0.0, (0.9, 0.99), weight_decay=0.0)
                parts = Parts(model=parts.model, ema=EMA(parts.model), opt=opt)
            recipe.pick_attention(run)
            setups[name] = (cfg, run, parts, recipe.example_batch(cfg, run), own, [])
        if run.kind == "cpu":
            keep_freed_memory()
        for _ in range(args.repeats + 3):
            for name, (cfg, run, parts, batch, own, times) in setups.items():
                if run.kind == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                with parts_of(own):
                    recipe.train_step(parts, batch, cfg, run)
                if run.kind == "cuda":
                    torch.cuda.synchronize()
                    peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                times.append(time.perf_counter() - start)
    net, tokens = parts.model.net, (cfg.target_size // cfg.patch) ** 2
    weights = sum(p.numel() for p in net.parameters())
    flop = args.batch_size * tokens * (6 * weights + 12 * len(net.layers) * tokens * net.final_layer.linear.in_features)
    return {name: 1e3 * statistics.median(row[3:]) for name, (*_, row) in setups.items()}, peaks, flop, run


def matrix_rate(device):
    """FLOP/s of large products in half precision, measured."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    best = 1e9
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="tiny", choices=tuple(recipe.SIZES))
    parser.add_argument("--target_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="", help="a JSON file; the row is added to those in it")
    args = parser.parse_args()
    times, peaks, flop, run = measure(args)
    rate, base = matrix_rate(run.device), next(iter(times.values()))
    print("| form | ms per update | against the first | of the matrix rate | peak GiB |\n|---|--:|--:|--:|--:|")
    for name, ms in times.items():
        print(f"| {name} | {ms:.1f} | {base / ms:.2f} | {flop / ms * 1e3 / rate:.0%} | {peaks.get(name, '')} |")
    if args.out:
        path = Path(args.out)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        row = {"preset": args.preset, "target_size": args.target_size, "batch_size": args.batch_size, "flop": flop}
        row |= {"ms_per_update": {k: round(v, 2) for k, v in times.items()}, "peak_gib": peaks, "matrix_rate": round(rate)}
        about = {"device": run.device_name, "processor": platform.processor() or platform.machine()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
