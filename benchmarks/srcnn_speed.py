"""Where SRCNN's time goes: a training step in several forms, and what each form reaches in the same time.

    python benchmarks/srcnn_speed.py --data_dir IMAGES [--val_dir IMAGES --budget 60s] [--out FILE.json]

Every form trains the same network (9-1-5, x3, 16 crops of 48 pixels) on the same batches through the recipe's own
train_step; for the steps the forms take turns in one process, so that a machine whose speed drifts slows them all.
With --budget, each form of `RUNS` then trains for that long, start and export included, and its PSNR is printed.
"""

import argparse
import datetime
import functools
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_ultrafast_srcnn as recipe  # noqa: E402
from common import Items, Run, Stream, find_images, keep_freed_memory  # noqa: E402


def adam(params):
    """Adam as most SRCNN scripts use it, with the recipe's peak rate for it."""
    return torch.optim.Adam([{"params": list(params), "peak": 1e-3}], fused=True)


def forms(device):
    """name -> (half precision?, patch form?, optimizer); the last line is the recipe itself."""
    soap = functools.partial(recipe.SOAP, lr=3e-3)
    table = {"fp32, Adam": (False, False, adam), "half, Adam": (None, False, adam), "half, SOAP": (None, False, soap)}
    if device == "cpu":
        table |= {"fp32, patches, Adam": (False, True, adam), "half, patches, Adam": (None, True, adam)}
        table |= {"half, patches, SOAP (the recipe)": (None, True, soap)}
    return table


RUNS = ("fp32, Adam", "half, patches, Adam", "half, patches, SOAP (the recipe)")


def quality(args, name, amp, fast, optimizer):
    """The metrics of a whole run of one form."""
    build = recipe.build

    def other(cfg, run):
        parts = build(cfg, run)
        parts.model.fast, parts.opt = fast, optimizer(parts.model.parameters())
        return parts

    recipe.build = other
    try:
        with tempfile.TemporaryDirectory() as folder:
            more = {"use_amp": amp, "device": args.device, "arch": args.arch, "out_dir": folder}
            return recipe.train(recipe.Config(data_dir=args.data_dir, val_dir=args.val_dir, time_budget=args.budget, **more))
    finally:
        recipe.build = build


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arch", default="srcnn", choices=("srcnn", "srcnn-955"))
    parser.add_argument("--val_dir", default="")
    parser.add_argument("--budget", default="")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    cfg = recipe.Config(data_dir=args.data_dir, device=args.device, arch=args.arch)
    pair = functools.partial(recipe.load_pair, cfg=cfg, smallest=cfg.target_size)
    data = recipe.Crops(Items(find_images(args.data_dir), pair), cfg)
    setups, device = {}, Run(cfg).device
    for name, (amp, fast, optimizer) in forms(device.type).items():
        run = Run(recipe.Config(use_amp=amp, device=args.device))
        parts = recipe.build(cfg, run)
        parts.model.fast, parts.opt = fast, optimizer(parts.model.parameters())
        setups[name] = run, parts, []
    if device.type == "cpu":
        keep_freed_memory()
    for keys in itertools.islice(Stream(len(data), cfg.batch_size, 0), args.repeats + 5):
        batch = {k: v.to(device) for k, v in data.__getitems__(keys).items()}
        for run, parts, times in setups.values():
            start = time.perf_counter()
            recipe.train_step(parts, batch, cfg, run)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    medians = {name: 1e3 * statistics.median(times[5:]) for name, (_, _, times) in setups.items()}
    base = next(iter(medians.values()))
    print("| form | ms per step | against the first |\n|---|--:|--:|")
    for name, ms in medians.items():
        print(f"| {name} | {ms:.1f} | {base / ms:.2f} |")
    reached = {}
    if args.budget:
        for name, form in forms(device.type).items():
            if name in RUNS or device.type != "cpu":
                reached[name] = quality(args, name, *form)
        print(f"\n| form | dB after {args.budget} | updates |\n|---|--:|--:|")
        for name, metrics in reached.items():
            print(f"| {name} | {metrics['psnr']:.2f} | {metrics['steps']} |")
    if args.out:
        about = {
            "device": Run(cfg).device_name,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        about |= {"threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(), "repeats": args.repeats}
        about |= {"arch": args.arch, "ms_per_step": {k: round(v, 3) for k, v in medians.items()}}
        text = json.dumps(about | {"budget": args.budget, "reached": reached}, indent=1)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
