"""Slow settings, a guide's or a plain loop's, against ours on real data: quality over wall clock, as a picture.

    python benchmarks/time_to_quality.py --data FOLDER [--minutes 3] [--recipe train_convnext]

FOLDER holds what the recipes are tried on: T91 and Set5, fundus, cifar10_10k_2k.npz, volumes (those of one patient
are held out). Of each recipe two runs work side by side with a thread each, for the same time: slow settings, as far as they
are flags, and ours. Quality is each evaluation of log.jsonl, at the time used until then. Writes
benchmarks/results/time_to_quality_<device>.json and benchmarks/pictures/time_to_quality.png. Latent diffusion is not among
them: its start alone takes a minute on a core (benchmarks/latent_cfg_speed.py and latent_cfg_samples.py measure it).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from run import about  # noqa: E402

PAIRS = {  # recipe: (data and sizes of both, slow settings, metric, higher is better?, what it is, the slow ones in words)
    "train_ultrafast_srcnn": (
        "--data_dir {data}/T91 --val_dir {data}/Set5 --scale 3", "--arch srcnn-955 --no-use_amp",
        "psnr", True, "SRCNN, x3 on Set5, dB", "9-5-5 in fp32"),
    "train_realesrgan_optimized": (
        "--data_dir {data}/T91 --val_dir {data}/Set5 --degradation bicubic", "--preset lightweight --no-use_amp",
        "psnr", True, "Real-ESRGAN, x4 on Set5, dB", "32 x 12 in fp32"),
    "train_nextdit_ultrafast": (
        "--data_dir {data}/fundus --target_size 64 --preset tiny", "--predict v --t_shape uniform --no-use_amp",
        "heldout_loss", False, "NextDiT, fundus 64 px, held-out loss", "v-prediction, uniform times, fp32"),
    "train_convnext": (
        "--data_dir {data}/cifar10_10k_2k.npz", "--optimizer adamw --no-use_amp",
        "accuracy", True, "ConvNeXt, 10,000 CIFAR images, accuracy", "AdamW, fp32"),
    "train_autoencoder3d": (
        "--data_dir {scans} --target_size 64,64,32", "--start plain --res_blocks 2 --enlarge nearest --no-use_amp",
        "psnr", True, "3-D autoencoder, scans, dB", "MONAI's network alone, fp32"),
}  # fmt: skip


def curve(rows, metric):
    """[(seconds used, quality)] of a run's evaluations, from the rows of its log."""
    return [(row["seconds"], row[metric]) for row in rows if row.get("metric") and math.isfinite(row[metric])]


def run_pair(recipe, data, minutes, folder):
    """Both runs of a recipe side by side; {"slow" and "ours": points, final quality, updates, seconds}."""
    place, slow, metric, *_ = PAIRS[recipe]
    scans = folder / "scans.csv"
    rows = [f"{p},{'val' if 'patient03' in p.name else 'train'}" for p in sorted((data / "volumes").glob("*.nii.gz"))]
    scans.write_text("\n".join(["image,split", *rows]) + "\n", encoding="utf-8")
    place = [word.format(data=data, scans=scans) for word in place.split()]
    base = [sys.executable, str(ROOT / f"{recipe}.py"), *place, "--time_budget", f"{minutes}m"]
    jobs, found = {}, {}
    for name, more in (("slow", slow.split()), ("ours", [])):
        words = [*base, *more, "--out_dir", str(folder / f"{recipe}-{name}")]
        log = open(folder / f"{recipe}-{name}.txt", "w", encoding="utf-8")
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        jobs[name] = subprocess.Popen(words, stdout=log, stderr=log, env=env), folder / f"{recipe}-{name}"
    for name, (job, run) in jobs.items():
        if job.wait():
            raise SystemExit((folder / f"{recipe}-{name}.txt").read_text(encoding="utf-8")[-2000:])
        end = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        points = [*curve(rows, metric), (end["seconds"], end[metric])]
        found[name] = {"points": [[round(t, 1), round(v, 5)] for t, v in points], "steps": end["steps"]}
        found[name] |= {"seconds": end["seconds"], metric: end[metric]}
    found["ours there after"] = there(found, metric, PAIRS[recipe][3])
    return found


def there(found, metric, higher):
    """Seconds after which our run was as good as the slow one at its end; None where it never was."""
    better = max if higher else min
    return next((t for t, v in found["ours"]["points"] if better(v, found["slow"][metric]) == v), None)


def draw(found, file):
    """The curves of all pairs as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = [(r, found["pairs"][r]) for r in PAIRS if r in found["pairs"]]
    fig, axes = plt.subplots(-(-len(pairs) // 3), min(3, len(pairs)), figsize=(13, 3.6 * -(-len(pairs) // 3)), squeeze=False)
    for ax in axes.flat[len(pairs) :]:
        ax.remove()
    for ax, (recipe, pair) in zip(axes.flat, pairs):
        *_, higher, title, slow = PAIRS[recipe]
        for name, label, colour in (("slow", f"slow settings: {slow}", "#999999"), ("ours", "this recipe", "#0072b2")):
            t, v = zip(*pair[name]["points"])
            ax.plot([x / 60 for x in t], v, "o-", ms=4, lw=2, color=colour, label=label)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("minutes, start and evaluations included", fontsize=9)
        if not higher:
            ax.set_yscale("log")
        ax.grid(color="#e5e5e5")
        ax.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    fig.suptitle("Quality over wall clock, a core each, side by side", x=0.01, ha="left", fontsize=13)
    fig.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=90)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets named above")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--recipe", default="", help="one or several, by commas; default: all")
    parser.add_argument("--keep", default="", help="keep the run folders here")
    args = parser.parse_args()
    recipes = [r for r in args.recipe.split(",") if r] or list(PAIRS)
    unknown = [r for r in recipes if r not in PAIRS]
    if unknown:
        raise SystemExit(f"--recipe has {', '.join(unknown)}; it takes {', '.join(PAIRS)}.")
    head = about("cpu")
    path = ROOT / "benchmarks" / "results" / f"time_to_quality_{head['device']}.json"
    found = {"pairs": {}} | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | head
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(args.keep or aside)
        folder.mkdir(parents=True, exist_ok=True)
        for recipe in recipes:
            pair = run_pair(recipe, Path(args.data).resolve(), args.minutes, folder)
            flags = PAIRS[recipe][0].replace("{data}/", "").replace("{scans}", "scans.csv")
            found["pairs"][recipe] = {"flags": flags, "slow flags": PAIRS[recipe][1], "minutes": args.minutes} | pair
            print(f"{recipe}: as good as the slow settings at their end after {pair['ours there after']} s", flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, path.parent.parent / "pictures" / "time_to_quality.png")


if __name__ == "__main__":
    main()
