"""Seconds to a given accuracy: the recipe, and models of timm trained by a plain loop with a DataLoader, one after the other.

    pip install --no-deps timm && pip install huggingface_hub pyyaml      # to compare with; nothing else needs it
    python benchmarks/convnext_reach.py --data FILE.npz [--accuracy 0.6] [--out FILE.json]

The recipe (its baseline with 32 channels, which learn most in so short a time) is timed as whole processes, imports, reading,
evaluations and export included, with ever longer budgets; the first that ends at the accuracy counts. One view of each test
image is judged. Of timm's models the loop is timed alone: AdamW at 1e-3, batch 128, flips, half precision; the test images are
judged after every fifth of an epoch, which is not counted.
"""

import argparse
import datetime
import enum
import importlib.machinery
import json
import platform
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_convnext as recipe  # noqa: E402
from common import choose_dtype, keep_freed_memory, read_json  # noqa: E402

MODELS = ("convnext_atto", "resnet18")


class Stub(types.ModuleType):
    """Stands in for torchvision, which timm imports for transforms and does not import beside a CPU build of torch."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return enum.Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS NEAREST_EXACT")
        return type(name, (), {})


class Finder:
    """Finds torchvision and all below it as `Stub`s."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


class Files(torch.utils.data.Dataset):
    """Images of an .npz, decoded as they are asked for, as float tensors of mean 0 and deviation 1."""

    def __init__(self, split, names, flip):
        self.split, self.names, self.flip = split, names, flip

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, i):
        x = torch.from_numpy(recipe.unpack(self.split.images[i], "image")).permute(2, 0, 1).float() / 255
        x = (x - 0.45) / 0.25
        return x.flip(2) if self.flip and torch.rand(()) < 0.5 else x, self.names.index(self.split.labels[i])


def plain_loop(name, args):
    """{seconds of updates until the accuracy, accuracy, updates} of a model of timm."""
    import timm

    splits = recipe.read_npz(Path(args.data))
    names = sorted(set(splits["train"].labels))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = choose_dtype(device.type, torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0), True)[0]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(names)).to(device)
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = torch.utils.data.DataLoader(Files(splits["train"], names, True), 128, shuffle=True, num_workers=2,
        persistent_workers=True, drop_last=True)  # fmt: skip
    test = [*torch.utils.data.DataLoader(Files(splits["test"], names, False), 500)]
    spent, updates, accuracy, start = 0.0, 0, 0.0, time.perf_counter()
    while accuracy < args.accuracy and spent < args.limit:
        for x, y in loader:
            with torch.autocast(device.type, half):
                loss = F.cross_entropy(model(x.to(device)), y.to(device))
            opt.zero_grad()
            loss.backward()
            opt.step()
            updates += 1
            if updates % max(1, len(loader) // 5) == 0:
                loss.item()
                spent += time.perf_counter() - start
                model.eval()
                with torch.no_grad():
                    hits = [(model(x.to(device)).argmax(1).cpu() == y).float().sum() for x, y in test]
                accuracy = float(sum(hits)) / sum(len(y) for _, y in test)
                model.train()
                start = time.perf_counter()
                if accuracy >= args.accuracy or spent >= args.limit:
                    break
    return {"seconds": round(spent, 1), "accuracy": round(accuracy, 4), "updates": updates}


def whole_runs(args):
    """{seconds of the whole process, accuracy, budget} of the shortest run of the recipe that ends at the accuracy."""
    for budget in args.budgets:
        with tempfile.TemporaryDirectory() as folder:
            words = f"--use_amp --no-mirrored --arch=baseline --base_channels=32 --time_budget={budget}s".split()
            words += ["--data_dir", args.data, "--out_dir", f"{folder}/run"]
            start = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "train_convnext.py"), *words], check=True, stdout=subprocess.DEVNULL)
            row = {"seconds": round(time.perf_counter() - start, 1), "budget": budget}
            row["accuracy"] = read_json(Path(folder) / "run" / "metrics.json")["accuracy"]
        print(f"recipe: {row}", flush=True)
        if row["accuracy"] >= args.accuracy:
            break
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz with training and test images")
    parser.add_argument("--accuracy", type=float, default=0.6)
    parser.add_argument("--budgets", type=int, nargs="+", default=[20, 25, 30, 33, 36, 40, 60, 90, 120])
    parser.add_argument("--limit", type=float, default=400, help="seconds after which a model of timm is given up")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", default="", help="a JSON file")
    args = parser.parse_args()
    sys.meta_path.insert(0, Finder())
    if not torch.cuda.is_available():
        keep_freed_memory()
    rows = {"recipe": whole_runs(args)}
    for name in args.models:
        rows[f"timm {name}"] = plain_loop(name, args)
        print(f"{name}: {rows[f'timm {name}']}", flush=True)
    print("| form | seconds | accuracy |\n|---|--:|--:|")
    for name, row in rows.items():
        print(f"| {name} | {'> ' * (row['accuracy'] < args.accuracy)}{row['seconds']:.1f} | {row['accuracy']:.1%} |")
    if args.out:
        about = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
        about |= {"goal": args.accuracy, "limit": args.limit, "rows": rows}
        Path(args.out).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
