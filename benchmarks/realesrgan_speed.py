"""What makes Real-ESRGAN's training step fast, and what each form reaches in the same time.

    python benchmarks/realesrgan_speed.py --data_dir IMAGES [--val_dir IMAGES --budget 90s] [--out FILE.json]

The first line is the loop that most scripts have: the same network (24 x 8 x 12, x4, four crops of 128 pixels), fp32, the
default memory layout, eager, Adam. The others are the recipe's own train_step in several forms. All see the same batches
and take turns in one process, so that a machine whose speed drifts slows them all. With --budget, each form of `RUNS` then
trains for that long, start and export included, and its PSNR is printed.
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
import train_realesrgan_optimized as recipe  # noqa: E402
from common import EMA, Items, Parts, Run, Stream, find_images, keep_freed_memory  # noqa: E402

SOAP = recipe.SOAP


def adam(params, lr=0.0):
    """Adam as most scripts use it, with a good peak rate for it."""
    return torch.optim.Adam([{"params": list(params), "peak": 1e-3}], betas=(0.9, 0.99))


FORMS = {  # name -> (half precision?, own dense blocks?, optimizer)
    "plain loop: fp32, contiguous, Adam": None,
    "fp32, channels last, Adam": (False, False, adam),
    "half, channels last, Adam": (None, False, adam),
    "half, own dense blocks, Adam": (None, True, adam),
    "half, own dense blocks, SOAP (the recipe)": (None, True, SOAP),
}
RUNS = tuple(name for name in FORMS if "half, channels" not in name and "fp32, channels" not in name)


def plain_step(parts, batch, cfg, run):
    """One update of the plain loop."""
    hr = batch["hr"].float().contiguous() / 255
    lr = recipe.degrade(hr, cfg.degradation, cfg.scale, run.draw).contiguous()
    run.anneal(parts.opt, "onecycle")
    parts.opt.zero_grad(set_to_none=True)
    d = parts.model(lr) - hr
    loss = d.abs().mean() + recipe.gray(d).abs().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 1.0)
    parts.opt.step()
    parts.ema.update(parts.model)
    return {"loss": loss.detach(), "norm": norm}


def form(name, cfg, run):
    """(parts, step) of a form."""
    half = FORMS[name]
    parts = recipe.build(cfg, run)
    parts.model.fast, make = (False, adam) if half is None else half[1:]
    parts.opt = parts.opt if make is SOAP else make(parts.model.parameters())
    if half is not None:
        return parts, recipe.train_step
    parts.model = recipe.RRDBNet(*recipe.PRESETS[cfg.preset], cfg.scale).to(run.device)
    return Parts(model=parts.model, ema=EMA(parts.model), opt=adam(parts.model.parameters())), plain_step


def steps(args):
    """Median ms per step of each form, taking turns."""
    more = {"data_dir": args.data_dir, "device": args.device, "degradation": "bicubic", "preset": args.preset}
    more |= {"target_size": 128, "batch_size": 4}
    cfg = recipe.Config(**more)
    data = recipe.Crops(
        Items(find_images(args.data_dir), functools.partial(recipe.load_pair, cfg=cfg, partners={}, crop=128)), cfg
    )
    setups, device = {}, Run(cfg).device
    for name, half in FORMS.items():
        run = Run(recipe.Config(use_amp=False if half is None else half[0], **more))
        setups[name] = (run, *form(name, cfg, run), [])
    if device.type == "cpu":
        keep_freed_memory()
    for keys in itertools.islice(Stream(len(data), cfg.batch_size, 0), args.repeats + 5):
        batch = {k: v.to(device) for k, v in data.__getitems__(keys).items()}
        for run, parts, step, times in setups.values():
            start = time.perf_counter()
            step(parts, batch, cfg, run)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[5:]) for name, (*_, times) in setups.items()}


def quality(args, name):
    """The metrics of a whole run of one form, with the recipe's own crops."""
    whole = recipe.build, recipe.train_step
    step = plain_step if FORMS[name] is None else recipe.train_step
    recipe.train_step = step
    recipe.build = lambda cfg, run: (setattr(recipe, "build", whole[0]), form(name, cfg, run)[0])[1]
    try:
        with tempfile.TemporaryDirectory() as folder:
            amp = False if FORMS[name] is None else FORMS[name][0]
            more = {"use_amp": amp, "device": args.device, "preset": args.preset, "degradation": "bicubic", "out_dir": folder}
            more |= {"data_dir": args.data_dir, "val_dir": args.val_dir, "time_budget": args.budget}
            return recipe.train(recipe.Config(**more))
    finally:
        recipe.build, recipe.train_step = whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--preset", default="optimized", choices=tuple(recipe.PRESETS))
    parser.add_argument("--val_dir", default="")
    parser.add_argument("--budget", default="")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    medians, run = steps(args), Run(recipe.Config(device=args.device))
    base = next(iter(medians.values()))
    print("| form | ms per step | against the first |\n|---|--:|--:|")
    for name, ms in medians.items():
        print(f"| {name} | {ms:.1f} | {base / ms:.2f} |")
    reached = {name: quality(args, name) for name in RUNS} if args.budget else {}
    if reached:
        print(f"\n| form | dB after {args.budget} | updates |\n|---|--:|--:|")
    for name, metrics in reached.items():
        print(f"| {name} | {metrics['psnr']:.2f} | {metrics['steps']} |")
    if args.out:
        about = {"device": run.device_name, "processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        about |= {"threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(), "repeats": args.repeats}
        about |= {"preset": args.preset, "ms_per_step": {k: round(v, 2) for k, v in medians.items()}}
        text = json.dumps(about | {"budget": args.budget, "reached": reached}, indent=1)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
