"""The README's pictures: every recipe on its built-in data, and what a healthy run looks like at 1, 5, 20 and 100 %.

    python benchmarks/pictures.py [RECIPE ...] [--keep FOLDER]

Two runs at a time, a thread each. Writes benchmarks/pictures/<recipe>.png (a strip) and, when all ran, first.png. Nothing in
them comes from anybody's data.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "pictures"
RUNS = {  # recipe: flags, name of its pictures, part of each (left, top, right, bottom; shares), what the parts show
    "train_ultrafast_srcnn": ("", "sample", (0, 0, 1, 0.27), "bicubic, model, original"),
    "train_realesrgan_optimized": ("--time_budget 4m", "sample", (0, 0, 1, 0.27), "bicubic, model, original"),
    "train_nextdit_ultrafast": ("--time_budget 5m", "sample", (0, 0, 0.5, 1), "mask, sample, real"),
    "train_latent_cfg": ("--time_budget 3m", "sample", (0, 0, 1, 1), "a sample of each class"),
    "train_convnext": ("--embed_every 1", "scatter", (0, 0, 1, 1), "held-out embeddings"),
    "train_autoencoder3d": ("--time_budget 3m", "sample", (0, 0, 1, 0.36), "scan, patch PCA, network, error"),
}
FIRST = {  # recipe: which picture of its strip, which part of it, what it is
    "train_nextdit_ultrafast": (3, (0, 0, 0.5, 0.68), "Images from masks: mask, sample, real"),
    "train_realesrgan_optimized": (3, (0, 0, 1, 0.51), "Super-resolution: bicubic, model, original"),
    "train_autoencoder3d": (3, (0, 0, 0.748, 0.51), "3-D scans: scan, patch PCA, network"),
    "train_convnext": (2, (0, 0.05, 1, 1), "Classes told apart, after a fifth of the run"),
}
MARKS = (0.01, 0.05, 0.2, 1.0)
WIDE = 380  # pixels of one part of a strip


def trained(recipe, folder):
    """Run a recipe on its built-in data; its run folder."""
    words = [sys.executable, str(ROOT / f"{recipe}.py"), *RUNS[recipe][0].split(), "--out_dir", str(folder / recipe)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-1000:])
    print(recipe, done.stdout.strip().splitlines()[-1], flush=True)
    return folder / recipe


def at_marks(run, name):
    """[(share of the updates' time, picture)] of the pictures nearest to MARKS; a run's log tells how far an update was."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, progress = zip(*sorted((r["step"], r["progress"]) for r in rows if "progress" in r))
    begin = max(0.0, progress[0] - steps[0] * (progress[-1] - progress[0]) / max(1, steps[-1] - steps[0]))  # after starting up
    files = {int(re.search(r"(\d+)\.png", p.name)[1]): p for p in run.glob(f"{name}-*.png")}
    at = {step: float(np.interp(step, (0, *steps), (begin, *progress))) for step in files}
    shares = {step: 1.0 if step == max(files) else (at[step] - begin) / (1 - begin) for step in files}
    chosen = []
    for mark in MARKS:
        chosen.append(min((s for s in shares if s not in chosen), key=lambda s: abs(shares[s] - mark)))
    return [(shares[step], Image.open(files[step]).convert("RGB")) for step in chosen]


def cropped(picture, box):
    """A share of a picture: left, top, right, bottom in parts of it."""
    w, h = picture.size
    return picture.crop((int(box[0] * w), int(box[1] * h), int(box[2] * w), int(box[3] * h)))


def part(picture, box):
    """The same, WIDE pixels across."""
    picture = cropped(picture, box)
    return picture.resize((WIDE, round(picture.height * WIDE / picture.width)), Image.Resampling.LANCZOS)


def labelled(pictures, texts):
    """Pictures side by side on white, each with a text above it."""
    high, font = max(p.height for p in pictures), ImageFont.load_default(16)
    sheet = Image.new("RGB", (sum(p.width + 8 for p in pictures) - 8, high + 26), "white")
    x, pen = 0, ImageDraw.Draw(sheet)
    for picture, text in zip(pictures, texts):
        pen.text((x + 2, 3), text, fill="black", font=font)
        sheet.paste(picture, (x, 26))
        x += picture.width + 8
    return sheet


def save(sheet, file):
    """As a PNG of 256 colours, which these pictures do not miss."""
    OUT.mkdir(exist_ok=True)
    sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(RUNS))
    parser.add_argument("--keep", default="", help="keep the run folders here; one that is there already is continued or taken")
    args = parser.parse_args()
    unknown = [r for r in args.recipes if r not in RUNS]
    if unknown:
        raise SystemExit(f"There is no picture of {', '.join(unknown)}; there are {', '.join(RUNS)}.")
    with tempfile.TemporaryDirectory() as aside, ThreadPoolExecutor(2) as pool:
        folder, last = Path(args.keep or aside), {}
        for recipe, run in zip(args.recipes or RUNS, pool.map(lambda r: trained(r, folder), args.recipes or RUNS)):
            _, name, box, shows = RUNS[recipe]
            found = at_marks(run, name)
            last[recipe] = None
            if recipe in FIRST:
                k, piece, _ = FIRST[recipe]
                last[recipe] = cropped(found[k][1], piece)
            texts = [f"{share:.0%}" if share > 0.005 else "under 1%" for share, _ in found]
            texts[0] += f" of the run: {shows}"
            save(labelled([part(p, box) for _, p in found], texts), OUT / f"{recipe}.png")
        if len(last) == len(RUNS):
            rows = []
            for names in (("train_nextdit_ultrafast", "train_realesrgan_optimized"), ("train_autoencoder3d", "train_convnext")):
                panels = [last[name] for name in names]
                panels = [p.resize((round(p.width * 300 / p.height), 300), Image.Resampling.LANCZOS) for p in panels]
                rows.append(labelled(panels, [FIRST[name][2] for name in names]))
            sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height + 8 for r in rows) - 8), "white")
            for k, row in enumerate(rows):
                sheet.paste(row, (0, k * (row.height + 8)))
            save(sheet, OUT / "first.png")


if __name__ == "__main__":
    main()
