"""Kill, fill, damage and starve runs of every recipe, many times: python benchmarks/soak.py [--kills 200] [--rounds 1] ...

The faults are those of tests/faults.py and tests/fuzzing.py, at random moments; it is bounded in count and in time. What ends
otherwise than promised is in `failed` and makes the exit status 1. Writes benchmarks/results/soak.json.
"""

import argparse
import collections
import datetime
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import faults  # noqa: E402
import fuzzing  # noqa: E402


def soak(recipe, scenarios, kills, folder, deadline, report, lock):
    """Try (fault, seed, more) of one recipe one after the other, `killed` until it was so often; count in `report`."""
    for fault, seed, more in scenarios:
        if fault is faults.killed and kills <= 0:
            continue
        if time.monotonic() > deadline:
            report["left out"] += 1
            continue
        start = time.monotonic()
        try:
            out, wrong = faults.try_fault(fault, recipe, folder, seed, **more), ""
        except Exception as e:  # a finding, not the end of the soak
            out, wrong = {}, f"{fault.__name__} {recipe} {seed}: {type(e).__name__}: {str(e)[-1500:]}"
        kills -= out.get("kills", 1)  # one that failed counts, so that there is an end
        with lock:
            row = report["faults"].setdefault(fault.__name__, collections.Counter())
            if out.get("skipped"):
                row["skipped"] += 1
                continue
            row["tried"] += 1
            row["failed"] += bool(wrong)
            row["kills"] += out.get("kills", 0)
            report["kills"] += out.get("kills", 0)
            for place in out.get("places", ()):
                report["places"][place.rstrip("+")] += 1
            if fault is faults.killed:
                for lost in out.get("lost", ()):
                    report["restarts by updates lost"][lost] += 1
            if "seconds" in out:
                key = f"longest {fault.__name__}, seconds"
                report[key] = round(max(report.get(key, 0), out["seconds"]), 2)
            report["failed"] += [wrong] if wrong else []
        print(f"{recipe} {fault.__name__} {seed}: {wrong or out} ({time.monotonic() - start:.0f} s)", flush=True)


def main():
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--kills", type=int, default=200, help="kill -9, over all recipes")
    about.add_argument("--rounds", type=int, default=1, help="how often each other fault is tried on each recipe")
    about.add_argument("--inputs", type=int, default=1000, help="bad inputs tried in each family")
    about.add_argument("--minutes", type=float, default=60, help="nothing new begins after these")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "soak.json"))
    words = about.parse_args()
    start, lock = time.monotonic(), threading.Lock()
    deadline = start + 60 * words.minutes
    counter = collections.Counter
    report = {"kills": 0, "restarts by updates lost": counter(), "places": counter(), "faults": {}, "failed": [], "left out": 0}
    each = -(-words.kills // len(faults.RECIPES))  # of a recipe; a run takes four or fewer, since it may end before the next
    scenarios = [(faults.killed, words.seed + k, {"kills": 4, "timed": k % 3 == 2, "export": k % 3 == 1})
        for k in range(each)]  # fmt: skip
    others = [f for f in faults.FAULTS if f not in (faults.killed, faults.mirror_fails)]
    scenarios += [(f, words.seed + k, {}) for k in range(words.rounds) for f in others]
    scenarios += [(faults.mirror_fails, f"{words.seed + k}-{how}", {"how": how})
        for k in range(words.rounds) for how in ("forgets", "goes", "hangs")]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        faults.server()
        jobs = [pool.submit(soak, recipe, scenarios, each, Path(folder), deadline, report, lock) for recipe in faults.RECIPES]
        for job in jobs:
            job.result()
    report["inputs"] = {}
    for name, family in fuzzing.FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                count = words.inputs // 5 if name == "runs" else words.inputs  # whose inputs take a quarter of a second each
                report["inputs"][name] = family(Path(folder), count, words.seed)
            except AssertionError as e:
                report["failed"].append(f"{name}: {str(e)[-1500:]}")
        print(name, report["inputs"].get(name, "failed"), flush=True)
    report["recipes"] = len(faults.RECIPES)
    report["minutes"] = round((time.monotonic() - start) / 60, 1)
    report |= {"torch": torch.__version__, "date": datetime.date.today().isoformat(), "seed": words.seed}
    Path(words.out).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "failed"}, ensure_ascii=False))
    for wrong in report["failed"]:
        print("FAILED", wrong)
    return 1 if report["failed"] or report["left out"] or report["kills"] < words.kills else 0


if __name__ == "__main__":
    sys.exit(main())
