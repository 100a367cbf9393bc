"""What each trick of train_nextdit_ultrafast.py is worth: the time to an equal held-out loss, alone and together.

    python benchmarks/nextdit_tricks.py --data_dir FUNDUS [--out FILE.json] [--seeds 3] [--share 0/2]

Every form trains with the recipe's own train_step, on the same split, for several lengths, each annealed to its own end,
with each seed. The losses depend on updates alone, so several processes may share the work (--share 0/2 and 1/2, the files
are merged by --merge FILES). The time of an update is measured afterwards, by --times, with the machine to itself: the forms
take turns in one process. time to a loss = updates to it (linear in the logarithm between lengths) times ms per update.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_nextdit_ultrafast as recipe  # noqa: E402
from common import Items, Run, Stream, find_labels, keep_freed_memory, open_records  # noqa: E402

PLAIN = {"predict": "v", "t_shape": "uniform", "learning_rate": 2e-3}  # 1e-3 is worse
FORMS = {  # name -> (settings, lengths in updates)
    "plain": (PLAIN, (50, 100, 200, 400)),
    "+ stratified times": (PLAIN | {"t_shape": "stratified"}, (50, 100, 200, 400)),
    "+ residual of the linear denoiser": (PLAIN | {"predict": "residual"}, (10, 50, 100, 200)),
    "both: the recipe": (PLAIN | {"predict": "residual", "t_shape": "stratified"}, (10, 50, 100, 200)),
}
recipe.NOISY = 32  # four held-out images: more noise makes their loss steadier
SIZE = {"target_size": 64, "preset": "tiny", "batch_size": 8, "device": "cpu"}


def open_pairs(args):
    """(training pairs, held-out images, held-out masks) of one fixed split."""
    cfg = recipe.Config(data_dir=args.data_dir, **SIZE)
    train, held = open_records(cfg)
    labels = find_labels([r["mask"] for r in train + held])
    cfg.labels = " ".join(map(str, labels))
    items = Items(train, lambda r: recipe.load_pair(r, cfg, labels))
    val = list(Items(held, lambda r: recipe.load_pair(r, cfg, labels)))
    x = recipe.Pixels().encode(torch.stack([torch.from_numpy(image) for image, _ in val]))
    return recipe.Pairs(items, cfg), x, recipe.to_masks(torch.stack([torch.from_numpy(m) for _, m in val]), cfg)


def start(words, seed, data):
    """(cfg, run, parts) of a form, ready for update 1."""
    cfg = recipe.Config(seed=seed, **SIZE | words)
    cfg.labels = data.cfg.labels
    run = Run(cfg)
    parts = recipe.build(cfg, run)
    recipe.fit_linear(parts, data, cfg)
    return cfg, run, parts


def one(words, seed, length, data, x, mask):
    """The held-out loss of a form after `length` annealed updates."""
    cfg, run, parts = start(words, seed, data)
    for k, keys in zip(range(length), Stream(len(data), cfg.batch_size, seed)):
        run.step, run.progress = k, k / length
        run.generator.manual_seed(1000 * seed + k)
        recipe.train_step(parts, data.__getitems__(keys), cfg, run)
    own = recipe.heldout_loss(parts.ema.model, x, mask, run)
    return {"heldout_loss": own, "mask_gap": recipe.heldout_loss(parts.ema.model, x, mask.roll(1, 0), run) - own}


def times(data, repeats=25):
    """Median ms of an update of each form, taking turns."""
    forms = {name: (*start(words, 0, data), []) for name, (words, _) in FORMS.items()}
    for keys, _ in zip(Stream(len(data), SIZE["batch_size"], 0), range(repeats)):
        batch = data.__getitems__(keys)
        for cfg, run, parts, row in forms.values():
            at = time.perf_counter()
            recipe.train_step(parts, batch, cfg, run)
            row.append(time.perf_counter() - at)
    return {name: 1e3 * statistics.median(row[5:]) for name, (*_, row) in forms.items()}


def updates_to(losses, goal):
    """Updates to a loss, between the lengths that were measured: linear in both logarithms; the least where it is below at
    once, None where it is never reached."""
    rows = sorted((int(n), v) for n, v in losses.items())
    if rows[0][1] <= goal:
        return rows[0][0]
    for (n, a), (m, b) in zip(rows, rows[1:]):
        if b <= goal:
            part = (math.log(a) - math.log(goal)) / (math.log(a) - math.log(b))
            return n * (m / n) ** part
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--out", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--merge", nargs="*", default=[])
    parser.add_argument("--times", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    data, x, mask = open_pairs(args)
    about = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "setting": SIZE}
    about |= {"images": len(data), "held_out": len(x), "date": time.strftime("%F"), "runs": {}}
    for path in args.merge:
        about["runs"] |= json.loads(Path(path).read_text())["runs"]
    k, n = map(int, args.share.split("/"))
    if args.out and Path(args.out).exists():  # what was done before an interruption
        about["runs"] |= json.loads(Path(args.out).read_text())["runs"]
    jobs = [(seed, name, length) for seed in range(args.seeds) for name in FORMS for length in FORMS[name][1]]
    jobs.sort(key=lambda job: -job[2])  # so that the shares are equally long
    for seed, name, length in jobs[k::n] if not args.merge else ():
        if f"{name} | {seed} | {length}" in about["runs"]:
            continue
        about["runs"][f"{name} | {seed} | {length}"] = row = one(FORMS[name][0], seed, length, data, x, mask)
        print(f"{name} | seed {seed} | {length} updates: {row['heldout_loss']:.4f}, gap {row['mask_gap']:.5f}", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if args.times:
        about["threads"], about["ms_per_update"] = torch.get_num_threads(), {k: round(v, 1) for k, v in times(data).items()}
        base, ms = next(iter(FORMS)), about["ms_per_update"]
        mean = about["mean_loss"] = {
            f: {
                n: statistics.mean(about["runs"][f"{f} | {s} | {n}"]["heldout_loss"] for s in range(args.seeds))
                for n in lengths
            }
            for f, (_, lengths) in FORMS.items()
        }
        about["faster"] = {f: {} for f in FORMS}
        for n, goal in mean[base].items():
            for form in FORMS:
                at = updates_to(mean[form], goal)
                about["faster"][form][n] = round(n * ms[base] / (at * ms[form]), 2) if at else None
        for form in FORMS:
            losses = ", ".join(f"{v:.4f} ({n})" for n, v in mean[form].items())
            print(f"{form}: {ms[form]:.0f} ms per update; loss (updates) {losses}; times faster {about['faster'][form]}")
    if args.out:
        Path(args.out).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
