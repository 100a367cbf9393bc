"""Do samples help a classifier? Real images against real images and samples of train_latent_cfg, on the same real held-out set.

    python benchmarks/samples_help.py RUN --data_dir REAL --val_dir HELD_OUT [--each 25] [--num_steps 300] [--seeds 3]

RUN is a finished run of train_latent_cfg on REAL, a folder for each class. train_convnext trains on the real images, on samples
and on both; each as many updates, so that the real images alone are seen more often; two runs side by side with a thread each.
All seeds have the same samples: the spread is the classifier's. Writes benchmarks/results/samples_help_<device>.json.
"""

import argparse
import csv
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from run import about  # noqa: E402

from common import IMAGE_TYPES  # noqa: E402

SIDE = 32  # pixels across, for the classifier


def listed(folder, split):
    """Rows (file, class, split) of a folder with one for each class."""
    return [(p.resolve(), p.parent.name, split) for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in IMAGE_TYPES]


def trained(rows, folder, steps, seed):
    """The final metrics of train_convnext on these rows."""
    folder.mkdir()
    with open(folder / "list.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("image", "label", "split"), *rows])
    words = [sys.executable, str(ROOT / "train_convnext.py"), "--data_dir", str(folder / "list.csv"), "--num_steps", str(steps)]
    words += ["--batch_size", "64", "--target_size", str(SIDE), "--seed", str(seed), "--out_dir", str(folder / "run")]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-1000:])
    return json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="finished run folder of train_latent_cfg")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--val_dir", required=True)
    parser.add_argument("--each", type=int, default=25, help="samples of each class")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--num_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside, ThreadPoolExecutor(2) as pool:
        drawn = Path(aside) / "drawn"
        shutil.copytree(
            args.run, drawn, ignore=shutil.ignore_patterns("samples", "tensorboard", "*.png", "last.pt", "previous.pt")
        )
        words = [sys.executable, str(ROOT / "train_latent_cfg.py"), "--sample", str(args.each), "--out_dir", str(drawn)]
        if subprocess.run([*words, "--guidance", str(args.guidance)], stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{args.run} could not be sampled; its last words are above.")
        real, held = listed(args.data_dir, "train"), listed(args.val_dir, "val")
        learnt = Path(json.loads((drawn / "settings.json").read_text(encoding="utf-8"))["settings"]["data_dir"]).resolve()
        if learnt != Path(args.data_dir).resolve() or {r[0] for r in real} & {r[0] for r in held}:
            raise SystemExit(f"{args.run} has learnt {learnt}; --data_dir must be that, and nothing of it may be in --val_dir.")
        plain = {re.sub(r'[\\/:*?"<>|]|^\.+$', "_", name): name for _, name, _ in real}  # as the samples' folders are called
        fake = [(path, plain[name], split) for path, name, split in listed(drawn / "samples", "train")]
        sets = {"real": real, "samples": fake, "real and samples": real + fake}
        jobs = {}
        for name, seed in itertools.product(sets, range(args.seeds)):
            folder = Path(aside) / f"{name}-{seed}".replace(" ", "-")
            jobs[name, seed] = pool.submit(trained, sets[name] + held, folder, args.num_steps, seed)
        found = {}
        for (name, seed), job in jobs.items():
            metrics = job.result()
            row = found.setdefault(name, {"images": len(sets[name]), "accuracy": [], "map_at_r": []})
            for key in ("accuracy", "map_at_r"):
                row[key].append(round(metrics[key], 4))
            print(name, seed, row["accuracy"][-1], flush=True)
    for row in found.values():
        row |= {"mean": round(statistics.mean(row["accuracy"]), 4), "spread": round(statistics.pstdev(row["accuracy"]), 4)}
    head = about("cpu")
    path = ROOT / "benchmarks" / "results" / f"samples_help_{head['device']}.json"
    note = {
        "each": args.each,
        "guidance": args.guidance,
        "updates": args.num_steps,
        "batch_size": 64,
        "side": SIDE,
        "held_out": len(held),
    }
    path.write_text(json.dumps(head | note | {"sets": found}, indent=1) + "\n", encoding="utf-8")
    print("| trained on | images | accuracy, mean of seeds | spread |\n|---|--:|--:|--:|")
    for name, row in found.items():
        print(f"| {name} | {row['images']:,} | {row['mean']:.1%} | {row['spread']:.1%} |")


if __name__ == "__main__":
    main()
