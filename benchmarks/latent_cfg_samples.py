"""How guidance and the number of steps change the samples of a finished run: the classifier's accuracy for each.

    python benchmarks/latent_cfg_samples.py RUN_FOLDER [--each 20] [--learn 50] [--out FILE.json]

The classifier is the run's own, trained on the real training images; its accuracy on held-out real images stands first. Every
line draws the same noise. `error` is the standard error of the accuracy; `distance` that to held-out real images, as the
recipe measures it. `--learn N` also does it the other way round (Ravuri and Vinyals, 2019): it trains the classifier on N
samples of each class, and on these and the real images, and tests it on held-out real images: what samples are worth as data.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_latent_cfg as recipe  # noqa: E402
from common import Run, copy_rate, load_tensors, read_json, say  # noqa: E402

LINES = [  # changes of the settings
    *({"guidance": g} for g in (1.0, 1.5, 2.0, 3.0, 5.0)),
    *({"steps": n} for n in (10, 15, 50, 100)),
    {"guidance_low": 0.0, "guidance_high": 1e9},
    {"rescale": 0.0},
]


def learn(painter, val, args, metrics):
    """{guidance: accuracy on held-out real images of a classifier that has seen samples only, samples and real images}."""
    learnt = {}
    with tempfile.TemporaryDirectory() as aside:
        own = recipe.Config(flip=painter.cfg.flip, device=args.device, out_dir=str(Path(aside) / "run"))
        with Run(own, recipe.RECIPE) as run:
            labels = torch.arange(len(val.names)).repeat_interleave(args.learn)
            keys = [("learn", c, i) for c in range(len(val.names)) for i in range(args.learn)]
            for guidance in (1.0, painter.cfg.guidance):
                changed = {k: v for k, v in vars(painter.cfg).items() if k in recipe.Config.__dataclass_fields__}
                cfg = recipe.Config(**changed | {"guidance": guidance})
                images = recipe.draw_images(painter.net, painter.codec, labels, keys, cfg, run)[0]
                for what, real, truth in (
                    ("samples", images, labels),
                    ("both", torch.cat([val.real, images]), torch.cat([val.truth, labels])),
                ):
                    seen = types.SimpleNamespace(names=val.names, real=real, truth=truth)
                    net = recipe.train_classifier(seen, own, run)
                    right = recipe.accuracy(net, val.images, val.labels)
                    learnt.setdefault(f"{guidance:g}", {})[what] = round(right, 4)
                    say(f"Trained on {what} at guidance {guidance:g}: {right:.3f} (real: {metrics['class_accuracy_real']:.3f})")
    return learnt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--each", type=int, default=20, help="samples of each class")
    parser.add_argument("--learn", type=int, default=0, help="samples of each class to train the classifier on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="", help="a JSON file to write")
    args = parser.parse_args()
    painter = recipe.load(args.run_folder)
    cfg, names, metrics = painter.cfg, painter.names, read_json(args.run_folder / "metrics.json")
    cfg.device = args.device
    run = Run(cfg)
    painter.to(run.device)
    judge = recipe.Classifier(len(names))
    judge.load_state_dict(load_tensors(args.run_folder / "classifier.pt")["model"])
    judge.to(run.device).eval()
    labels = torch.arange(len(names)).repeat_interleave(args.each)
    keys = [("benchmark", c, i) for c in range(len(names)) for i in range(args.each)]
    saved = read_json(args.run_folder / "settings.json")["settings"]
    words = {k: saved[k] for k in ("data_dir", "val_dir", "target_size", "flip", "seed", "sample_ratio")}
    with tempfile.TemporaryDirectory() as aside:
        with Run(recipe.Config(**words, device=args.device, out_dir=str(Path(aside) / "run")), recipe.RECIPE) as again:
            _, val = recipe.open_data(again.cfg, again)
    say(f"Held-out real images: {metrics['class_accuracy_real']:.3f}. {len(labels)} samples a line.")
    say("| change | accuracy | error | of the ceiling | distance | copies | out of range | seconds |")
    say("|---|--:|--:|--:|--:|--:|--:|--:|")
    rows = []
    for change in LINES:
        own = recipe.Config(**{k: v for k, v in vars(cfg).items() if k in recipe.Config.__dataclass_fields__} | change)
        start = time.perf_counter()
        images, outside = recipe.draw_images(painter.net, painter.codec, labels, keys, own, run)
        seconds, right = time.perf_counter() - start, recipe.accuracy(judge, images, labels)
        error, share = (right * (1 - right) / len(labels)) ** 0.5, right / metrics["class_accuracy_real"]
        row = {"change": change, "accuracy": round(right, 4), "error": round(error, 4), "of_ceiling": round(share, 4)}
        row |= {"distance": round(recipe.feature_distance(judge, images, val.images), 4), "clipped": round(outside, 5)}
        row |= {"copy_rate": copy_rate(images, val.thumbs), "seconds": round(seconds, 1)}
        rows.append(row)
        text = ", ".join(f"{k} {v:g}" for k, v in change.items())
        tail = f"{row['distance']:.3f} | {row['copy_rate']:.1%} | {outside:.2%} | {seconds:.0f} |"
        say(f"| {text} | {right:.3f} | {error:.3f} | {share:.0%} | {tail}")
    learnt = learn(painter, val, args, metrics) if args.learn else {}
    if args.out:
        about = {"device": run.device_name, "processor": platform.processor() or platform.machine()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
        about |= {"defaults": {k: getattr(cfg, k) for k in ("steps", "guidance", "guidance_low", "guidance_high", "rescale")}}
        about |= {"metrics": metrics, "rows": rows, "learnt": learnt}
        Path(args.out).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
