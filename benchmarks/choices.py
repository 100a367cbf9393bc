"""The README's "I have N hours and this card": what the planner predicts of each recipe's command on each card.

    python benchmarks/choices.py

Writes benchmarks/results/choices.json: memory, seconds of an update, updates in the hours, the flags that fit. Nothing of it is
measured on these cards; how far the planner is off where it can be checked is in benchmarks/results/cpu2.json (time) and
memory_cpu2.json (memory), and summed up here.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from claims import result  # noqa: E402
from run import about  # noqa: E402

import test_memory_usage as planner  # noqa: E402

CARDS = ("P100", "T4", "3090", "A100")
CHOICES = {  # recipe: (hours, flags of the README's command, those that the planner takes in their place where they differ)
    "train_realesrgan_optimized": (1, "--data_dir DATA --batch_size 16 --target_size 128", ""),
    "train_nextdit_ultrafast": (6, "--data_dir DATA --preset 0.1B --batch_size 32 --accumulate 2", ""),
    "train_nextdit_fast": (20, "--data_dir DATA --preset 0.6B --batch_size 8 --accumulate 8", ""),
    "finetune_pretrained": (3, "--data_dir DATA --weights lumina --vae sdxl-vae --batch_size 8 --accumulate 2",
        "--data_dir DATA --weights PUBLISHED --batch_size 8 --accumulate 2"),
    "train_latent_cfg": (2, "--data_dir DATA --target_size 256",
        "--data_dir DATA --target_size 256 --stage diffusion --encoder pca"),
    "train_convnext": (1, "--data_dir DATA --target_size 32 --batch_size 512", ""),
    "train_autoencoder3d": (6, "--data_dir DATA --preset 8gb --target_size 256,256,64 --accumulate 4", ""),
}  # fmt: skip


def predicted(recipe, flags, card, hours):
    """What the planner says of a recipe's flags on a card: memory, whether it fits, seconds and number of updates."""
    room, capability, speed, fp32, half = planner.CARDS[card]
    plan = planner.Plan(recipe=recipe, images=1550)
    found = planner.predict(plan, planner.whole(plan, flags.split()), "cuda", capability)
    rates = (planner.BYTE_SHARE * speed, planner.FLOP_SHARE * fp32, planner.FLOP_SHARE * half)
    seconds = planner.seconds_of(found["work"], rates)
    row = {"gib": round(found["total"] / planner.GIB, 2), "fits": found["total"] <= room * planner.GIB}
    row |= {"seconds": round(seconds, 4), "updates": round(hours * 3600 / seconds), "precision": found["precision"]}
    return row | {"samples": found["samples"]}


def main():
    rows = {}
    for recipe, (hours, flags, planned) in CHOICES.items():
        cards = {card: predicted(recipe, planned or flags, card, hours) for card in CARDS}
        rows[recipe] = {"hours": hours, "flags": flags, "cards": cards}
        print(recipe, hours, flags, json.dumps(rows[recipe]["cards"]), flush=True)
    times = {r: row["expected_seconds"] / (row["own_ms"] / 1e3) for r, row in result("cpu2")["recipes"].items()}
    error = {"time": {r: round(x, 2) for r, x in times.items()}}
    for name, key in (("memory", "tensors"), ("memory with convolutions", "predicted")):
        off = [row[key] / row["measured"]["peak"] - 1 for row in result("memory_cpu2")["rows"]]
        error[name] = [round(min(off), 3), round(max(off), 3)]
    head = about("cpu")
    head = {"date": head["date"], "torch": head["torch"], "predicted": True, "error where it was measured": error}
    path = ROOT / "benchmarks" / "results" / "choices.json"
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(error))


if __name__ == "__main__":
    main()
