"""What makes a training step fast: ms per update of each form of both networks, taking turns in one process.

    python benchmarks/convnext_speed.py [--side 32 --batch_size 256] [--compile] [--out FILE.json]

Each form is the recipe's own train_step, augmentation and EMA included; the first of a network is fp32.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_convnext as recipe  # noqa: E402
from common import Run, keep_freed_memory  # noqa: E402

FORMS = {  # name -> (settings, channels last?, half precision in the depthwise convolutions?)
    "baseline, fp32": ({"arch": "baseline", "use_amp": False}, True, None),
    "baseline": ({"arch": "baseline", "use_amp": True}, True, None),
    "baseline, SGD for Muon": ({"arch": "baseline", "use_amp": True, "optimizer": "sgd"}, True, None),
    "baseline, not channels last": ({"arch": "baseline", "use_amp": True}, False, None),
    "baseline, compiled": ({"arch": "baseline", "use_amp": True, "compile": True}, True, None),
    "convnext, fp32": ({"arch": "convnext", "use_amp": False}, None, None),
    "convnext": ({"arch": "convnext", "use_amp": True}, None, None),
    "convnext, half precision throughout": ({"arch": "convnext", "use_amp": True}, None, True),
    "convnext, patches of 4 pixels": ({"arch": "convnext", "use_amp": True, "stem": 4}, None, None),
    "convnext, compiled": ({"arch": "convnext", "use_amp": True, "compile": True}, None, None),
}


def form(settings, last, half, args, stack):
    """(one update of a form, its weights, its run)."""
    cfg = recipe.Config(device=args.device, target_size=args.side, batch_size=args.batch_size, **settings)
    cfg.names = json.dumps([str(k) for k in range(10)])
    run = Run(cfg)
    run.undo = stack.enter_context(contextlib.ExitStack())
    parts = recipe.build(cfg, run)
    if last is False:
        for p in parts.model.parameters():
            p.data = p.data.contiguous()
    for block in (m for m in parts.model.modules() if half and isinstance(m, recipe.Block)):
        block.plain = False
    batch = recipe.example_batch(cfg, run)
    return lambda: recipe.train_step(parts, batch, cfg, run), sum(p.numel() for p in parts.model.parameters()), run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, default=32, help="pixels of an image, across")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="", help="a JSON file; the row is added to those in it")
    args = parser.parse_args()
    times, weights, steps = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, (settings, last, half) in FORMS.items():
            if args.compile or not settings.get("compile"):
                steps[name], weights[name], run = form(settings, last, half, args, stack)
        if run.kind == "cpu":
            keep_freed_memory()
        for _ in range(args.repeats + 3):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if run.kind == "cuda":
                    torch.cuda.synchronize()
                times.setdefault(name, []).append(time.perf_counter() - start)
    times = {name: 1e3 * statistics.median(values[3:]) for name, values in times.items()}
    print("| form | million weights | ms per update | images/s | against fp32 |\n|---|--:|--:|--:|--:|")
    for name, ms in times.items():
        plain = times[f"{name.split(',')[0]}, fp32"]
        print(f"| {name} | {weights[name] / 1e6:.2f} | {ms:.1f} | {1e3 * args.batch_size / ms:.0f} | {plain / ms:.2f} |")
    if args.out:
        path = Path(args.out)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        row = {"side": args.side, "batch_size": args.batch_size, "weights": weights}
        row |= {"ms_per_update": {k: round(v, 2) for k, v in times.items()}}
        about = {"device": run.device_name, "processor": platform.processor() or platform.machine()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
