"""What the tests share: a small folder of images, tiny settings, and a way to run a recipe as its users do."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

RECIPES = {  # flags that make a run of a second or two on built-in data; a recipe that lands adds its line here
    "train_ultrafast_srcnn": "--target_size 24 --batch_size 2 --num_steps 6",
    "train_realesrgan_optimized": "--target_size 32 --batch_size 2 --num_steps 6 --degradation real --gan --gan_share 0.5 "
    "--val_images 1",
    "train_nextdit_fast": "--target_size 16 --patch 8 --batch_size 2 --num_steps 6 --steps 2 --val_images 2",
    "train_nextdit_ultrafast": "--target_size 16 --patch 8 --batch_size 2 --num_steps 6 --steps 2 --val_images 2",
    "train_latent_cfg": "--target_size 16 --dim 8 --mults 1,2 --batch_size 2 --num_steps 6 --steps 2 --val_images 4",
    "train_autoencoder3d": "--target_size 16,16,8 --channels 4,8,8 --batch_size 2 --num_steps 6 --val_crops 2",
    "train_convnext": "--base_channels 8 --target_size 16 --batch_size 2 --num_steps 6 --metrics_every 1",
    "finetune_pretrained": "--target_size 16 --batch_size 2 --num_steps 6 --steps 2 --val_images 2 --heads 2",
}
TINY = ["--target_size", "24", "--batch_size", "3", "--num_steps", "9", "--no-use_amp", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread_one_seed_and_no_settings(monkeypatch):
    """Two cores are shared by the tests and their children; a test that fails must fail again; and no variable of the
    machine may reach a setting."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    for name in ("SEED", "DEVICE", "COMPILE", "SCALE", "ARCH", "BATCH_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Ten pictures of 40 x 44 pixels, nine of them to train on."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(10):
        small = Image.fromarray(rng.integers(0, 256, (10, 11, 3), np.uint8))
        small.resize((44, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def srcnn(monkeypatch):
    """The SRCNN recipe with an export that costs nothing; `test_srcnn.py` tests the real one."""
    recipe = importlib.import_module("train_ultrafast_srcnn")
    monkeypatch.setattr(recipe, "export", lambda model, folder: None)
    monkeypatch.setattr(recipe, "CROPS", 2)  # 18 crops, so that an epoch is six updates of three
    return recipe


@pytest.fixture
def config(srcnn, images, tmp_path):
    """config(**changes) -> a tiny Config of the SRCNN recipe on `images`, in this test's own run folder."""

    def make(**changes):
        settings = {"data_dir": str(images), "out_dir": str(tmp_path / "run"), "target_size": 24, "batch_size": 3}
        settings |= {"num_steps": 9, "use_amp": False, "num_workers": 0, "device": "cpu"}
        return srcnn.Config(**settings | changes)

    return make


def same(a, b, where=""):
    """Assert that two nested states hold the same bits."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def tensors_in(state):
    """All tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ():
        yield from tensors_in(value)


def checkpoint(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def stop_after(monkeypatch, k):
    """Have every run of this process asked to stop when k updates are done."""
    advance = common.Run.advance

    def stopping(run, losses):
        advance(run, losses)
        if run.step == k:
            run.asked = "SIGTERM"

    monkeypatch.setattr(common.Run, "advance", stopping)


def command(*words, recipe="train_ultrafast_srcnn", drive=None):
    """The command line that runs a recipe, as its users do, or through drive.py with faults put in."""
    if drive is None:
        return [sys.executable, str(ROOT / f"{recipe}.py"), *map(str, words)]
    return [sys.executable, str(ROOT / "tests" / "drive.py"), recipe, json.dumps(drive), *map(str, words)]


def environment(**changes):
    scripts = [*ROOT.glob("train_*.py"), *ROOT.glob("finetune_*.py")]
    names = {f for path in scripts for f in importlib.import_module(path.stem).Config.__dataclass_fields__}
    return (
        {k: v for k, v in os.environ.items() if k.lower() not in names}
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        | changes
    )


def run(words, cwd=None, timeout=120, **changes):
    """Run a command; returns the finished process with its output as text."""
    return subprocess.run(
        words,
        cwd=cwd,
        env=environment(**changes),
        timeout=timeout,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def slowness():
    """How many times longer than on the machine of the README's figures a fixed piece of training takes here and now, at least
    1: a bound in seconds that was met there holds anywhere once it is multiplied by this."""
    done = run([sys.executable, "-c", YARDSTICK], OMP_NUM_THREADS="2")
    return max(1.0, float(done.stdout) / YARDSTICK_SECONDS)


YARDSTICK_SECONDS = 1.8  # what it took there
YARDSTICK = """
import time, torch
torch.set_num_threads(2)
net = torch.nn.Sequential(*[torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)])
x, spent = torch.randn(32, 64, 32, 32), []
for half in (False, True) * 10:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        net(x).square().mean().backward()
    spent.append(time.perf_counter() - start)
print(sum(sorted(spent)[:16]))
"""
