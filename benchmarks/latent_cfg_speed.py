"""What makes the latent UNet's training step fast: ms per update of each form, taking turns in one process.

    pip install --no-deps denoising-diffusion-pytorch einops      # the package to compare with; nothing else needs it
    python benchmarks/latent_cfg_speed.py [--side 32 --channels 4] [--compile] [--out FILE.json]

The first line is that package's class-conditional UNet and loss (v with min-SNR, dim 48, multipliers 1, 2, 4), clipping and
Adam, in fp32 as it comes. The others are the recipe's own train_step, EMA included.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_latent_cfg as recipe  # noqa: E402
from common import Run, keep_freed_memory  # noqa: E402

PACKAGE = "denoising-diffusion-pytorch: fp32, Adam"
FORMS = {  # name -> (half precision?, compiled?, forward passes an update)
    "recipe in fp32": (False, False, 1),
    "recipe": (None, False, 1),
    "recipe, half the batch twice": (None, False, 2),
    "recipe, compiled": (None, True, 1),
}


def package():
    """The package's module for classes alone: its __init__ also wants torchvision and accelerate."""
    spec = importlib.util.find_spec("denoising_diffusion_pytorch")
    if spec is None:
        sys.exit("The comparison needs the package: pip install --no-deps denoising-diffusion-pytorch einops")
    file = Path(spec.submodule_search_locations[0]) / "classifier_free_guidance.py"
    spec = importlib.util.spec_from_file_location("package_for_classes", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_step(args, device):
    """(one update of the package's training, its weights)."""
    module = package()
    net = module.Unet(dim=48, num_classes=31, cond_drop_prob=0.1, dim_mults=(1, 2, 4), channels=args.channels)
    loss = module.GaussianDiffusion(net, image_size=args.side, objective="pred_v", min_snr_loss_weight=True).to(device)
    opt = torch.optim.Adam(net.parameters(), 1e-4, (0.9, 0.99))
    x = torch.rand(args.batch_size, args.channels, args.side, args.side, device=device)  # it wants 0..1
    y = torch.randint(31, (args.batch_size,), device=device)

    def step():
        opt.zero_grad()
        loss(x, classes=y).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()

    return step, sum(p.numel() for p in net.parameters())


def recipe_step(args, half, compiled, passes, stack):
    """(one update of the recipe, its weights, its run)."""
    words = {"factor": 4, "target_size": 4 * args.side, "latent_channels": args.channels, "accumulate": passes}
    words["batch_size"] = args.batch_size // passes
    cfg = recipe.Config(device=args.device, use_amp=half, compile=compiled, **words)
    cfg.names = json.dumps([str(k) for k in range(31)])
    run = Run(cfg)
    run.undo = stack.enter_context(contextlib.ExitStack())
    parts = recipe.build(cfg, run)
    batch = recipe.example_batch(cfg, run)
    return lambda: recipe.train_step(parts, batch, cfg, run), sum(p.numel() for p in parts.model.parameters()), run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, default=32, help="positions of a latent, across")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="", help="a JSON file; the row is added to those in it")
    args = parser.parse_args()
    times, weights, steps = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name, (half, compiled, passes) in FORMS.items():
            if args.compile or not compiled:
                steps[name], weights[name], run = recipe_step(args, half, compiled, passes, stack)
        steps[PACKAGE], weights[PACKAGE] = package_step(args, run.device)
        if run.kind == "cpu":
            keep_freed_memory()
        for _ in range(args.repeats + 3):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if run.kind == "cuda":
                    torch.cuda.synchronize()
                times.setdefault(name, []).append(time.perf_counter() - start)
    times = {name: 1e3 * statistics.median(times[name][3:]) for name in [PACKAGE, *(n for n in times if n != PACKAGE)]}
    print("| form | million weights | ms per update | updates a second | against the package |\n|---|--:|--:|--:|--:|")
    for name, ms in times.items():
        print(f"| {name} | {weights[name] / 1e6:.2f} | {ms:.1f} | {1e3 / ms:.2f} | {times[PACKAGE] / ms:.2f} |")
    if args.out:
        path = Path(args.out)
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        row = {"side": args.side, "channels": args.channels, "batch_size": args.batch_size, "weights": weights}
        row |= {"ms_per_update": {k: round(v, 2) for k, v in times.items()}}
        about = {"device": run.device_name, "processor": platform.processor() or platform.machine()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"rows": [*rows, row]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
