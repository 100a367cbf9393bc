"""Predicted against measured memory of every recipe, and what the 3-D guide says about memory against what is predicted.

python benchmarks/memory.py --json benchmarks/results/memory_cpu2.json

Without a GPU the same step is measured with the processor's allocator; with one, on it. The guide's claims are predicted for a
card with fp16 (T4). The perceptual loss is predicted where lpips and torchvision are installed (pip install --no-deps lpips
torchvision is enough), with random weights, since only sizes count.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_memory_usage as planner  # noqa: E402

GIB = 2**30
ROWS = {  # geometries whose step takes a second or less here and holds tens of MiB, so that a percentage means something
    "train_ultrafast_srcnn": "--batch_size 16 --target_size 96",
    "train_realesrgan_optimized": "--batch_size 2 --target_size 64",
    "train_nextdit_fast": "--preset tiny --target_size 64 --batch_size 4",
    "train_nextdit_ultrafast": "--preset tiny --target_size 64 --batch_size 4",
    "finetune_pretrained": "--target_size 64 --batch_size 4 --train all",
    "train_latent_cfg": "--target_size 64 --dim 32 --batch_size 8 --stage diffusion --encoder pca",
    "train_convnext": "--base_channels 32 --batch_size 64 --target_size 32",
    "train_autoencoder3d": "--target_size 48,48,32 --batch_size 1",
}
MORE = {  # on a processor some more of them, and in fp32
    "train_realesrgan_optimized": "--batch_size 2 --target_size 64 --gan --no-use_amp",
    "train_latent_cfg": "--target_size 64 --dim 32 --batch_size 8 --stage encoder --no-use_amp",
    "train_convnext": "--arch baseline --base_channels 32 --batch_size 64 --target_size 32 --no-use_amp",
    "train_autoencoder3d": "--target_size 64,48,32 --attention all --res_blocks 2 --enlarge nearest --checkpointing --gan 0.01",
}
GEOMETRY = {"patch_size": 8, "in_channels": 3, "dim": 256, "n_layers": 4, "n_heads": 4, "cap_feat_dim": 32}
SMALL = {"finetune_pretrained": json.dumps({"geometry": json.dumps(GEOMETRY), "channels": 3, "factor": 1, "patch": 8})}
CARD = {  # on a GPU also the guides' own sizes
    "train_nextdit_fast": "--preset 0.1B --target_size 256 --batch_size 8",
    "train_latent_cfg": "--target_size 256 --batch_size 16",
    "train_convnext": "--batch_size 1024 --target_size 32",
    "train_realesrgan_optimized": "--target_size 256 --batch_size 8 --gan",
    "train_autoencoder3d": "--target_size 256,256,64 --batch_size 1 --checkpointing",
}
GUIDE = "--target_size 256,256,64 --attention all --res_blocks 2 --enlarge nearest --batch_size 1 --accumulate 1"


def near(device):
    """Rows {recipe, flags, tensors, predicted, measured} in bytes, of this machine's device."""
    rows = []
    for table in (ROWS, CARD if device == "cuda" else MORE):
        for recipe, flags in table.items():
            words = [*flags.split(), "--device", device, *([] if "use_amp" in flags else ["--use_amp"])]
            plan = planner.Plan(recipe=recipe, data=SMALL.get(recipe, ""))
            same = ("cuda", torch.cuda.get_device_capability()) if device == "cuda" else ("cpu",)
            row = {"recipe": recipe, "flags": flags, "measured": planner.measure(plan, words)}
            row["tensors"] = planner.predict(plan, words, *same)["peak"]
            row["predicted"] = planner.predict(plan, words, *same, scratch=True)["peak"]
            rows.append(row)
            off = row["predicted"] / row["measured"]["peak"] - 1 if "peak" in row["measured"] else float("nan")
            print(
                f"{recipe} {flags}: predicted {row['predicted'] / 2**20:.1f} MiB, {off:+.2%} of what was measured", flush=True
            )
    return rows


def random_lpips():
    """Have lpips make its network with random weights, and torchvision work without its own operators, which its PyPI build
    lacks beside a CPU torch. To be called before MONAI is imported; returns what must be kept, None where lpips is missing."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # a torchvision that has its own
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import lpips
    except ImportError:
        return None
    models = lpips.pretrained_networks.tv
    make = models.squeezenet1_1
    lpips.pretrained_networks.tv = types.SimpleNamespace(
        **vars(models) | {"squeezenet1_1": lambda pretrained=True: make(weights=None)}
    )
    return library


def claims(there):
    """Rows {claim, claimed, from, to} of the guide; bytes of live tensors at the peak, on a T4. `there`: of `random_lpips`."""

    def peak(*more):
        return planner.predict(planner.Plan(), [*GUIDE.split(), *" ".join(more).split()], "cuda", (7, 5))["peak"]

    plain, low = "--no-half_norm --no-checkpointing", "--no-checkpointing"
    full = peak(plain, "--no-use_amp")
    amp, half = peak(plain), peak(low)
    rows = [
        {"claim": "AMP", "claimed": "saves about 50 %", "from": full, "to": amp},
        {"claim": "AMP with norms in half precision too", "claimed": "", "from": full, "to": half},
        {
            "claim": "checkpointing, here block by block",
            "claimed": "saves 30-40 %",
            "from": half,
            "to": peak("--checkpointing"),
        },
        {
            "claim": "channels 16,32,64 for 32,64,64",
            "claimed": "saves 30-50 %",
            "from": peak(low, "--channels 32,64,64"),
            "to": half,
        },
        {"claim": "four forward passes added up", "claimed": "adds nothing", "from": half, "to": peak(low, "--accumulate 4")},
    ]
    gan = "--gan 0.01 --disc"
    big, small = peak(low, gan, "3,32"), peak(low, gan, "2,16")
    rows.append({"claim": "a smaller discriminator", "claimed": "saves 200-400 MB", "from": big, "to": small})
    seen = "--perceptual 0.001" if there else ""
    if there:
        rows.append({"claim": "perceptual loss", "claimed": "costs 300-500 MB", "from": half, "to": peak(low, seen)})
    for name, claimed, flags, ours in (
        ("A, 24 GB", "10-14 GB", f"--checkpointing {gan} 2,16 --accumulate 4", ""),
        (
            "B, 32 GB",
            "18-22 GB",
            f"{low} {gan} 3,32 --channels 24,48,64 --batch_size 2 --accumulate 2 {seen}",
            "--checkpointing",
        ),
        ("C, 40 GB", "fits 40 GB", f"{low} {gan} 3,32 --channels 32,64,128 --batch_size 4 {seen}", "--checkpointing"),
    ):
        rows.append({"claim": f"configuration {name}", "claimed": claimed, "from": peak(flags, "--no-half_norm"),
            "to": peak(flags, ours)})  # fmt: skip
    for row in rows:
        print(f"{row['claim']}: {row['claimed']}: {row['from'] / GIB:.2f} -> {row['to'] / GIB:.2f} GiB", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    out = {
        "device": name,
        "torch": torch.__version__,
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
    }
    there = random_lpips()
    out |= {"date": time.strftime("%F"), "claims": claims(there), "rows": near(device)}
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
