"""Faults put into runs of every recipe, one code for test_faults.py (a few of each) and benchmarks/soak.py (many).

A fault is a function (recipe, folder, dice) -> dict of what happened: it starts runs of the recipe in `folder`, does them harm
at moments that `dice` (a random.Random) chooses, starts the same command again, and asserts what the README promises. A run is
a process of its own, forked from a server that has the imports done (multiprocessing's forkserver): hundreds take minutes.
"""

import collections
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from conftest import RECIPES, ROOT, checkpoint, environment, same, tensors_in
from PIL import Image

STEPS = 6
HEAVY = [
    "torch._dynamo",
    "monai.networks.nets",
    "nibabel",
    "torch.utils.tensorboard",
    "matplotlib.figure",
    "onnx",
    "safetensors.torch",
]
PASSING = {
    "seconds",
    "metric_seconds",
    "peak_memory_gib",
    "images_per_second",
    "seconds_per_epoch",
}  # metrics that no two runs share


TAKEN_OUT = ""  # the protection that all runs do without, for a test of the tests


# --- runs -------------------------------------------------------------------------------------------------------------
@functools.cache
def server():
    """The multiprocessing context whose server has torch and all recipes imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY, *RECIPES])
    before = dict(os.environ)
    try:
        os.environ.clear()
        os.environ.update(environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])))
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def child(recipe, faults, words, log, cwd, variables):
    """In the new process: a session and an output of its own, then the recipe."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # for the workers that load data, as in a run that a shell started
    for name in ("HOME", "TMPDIR"):
        os.environ[name] = str(cwd)  # what the run writes is written below the test's folder, whatever happens
    os.environ.update(variables)
    import drive

    drive.main(recipe, faults, words)


class Process:
    """A started run: `pid`, `wait()` -> exit status (negative for a signal), `text` of its output so far."""

    def __init__(self, recipe, folder, *words, faults=None, rank="", variables=None):
        home, faults = Path(folder).parent, {} | (faults or {})
        home = Path(faults["trace"]).parent if "trace" in faults else home  # where the run folder's disk is the one that fails
        home.mkdir(parents=True, exist_ok=True)
        self.log, self.trace = (home / f"{Path(folder).name}{rank}.{kind}" for kind in ("log", "trace"))
        for old in (self.log, self.trace):
            old.unlink(missing_ok=True)
        words = [*RECIPES[recipe].split(), "--no-use_amp", "--device", "cpu", "--out_dir", str(folder), *words]
        faults |= {"trace": str(self.trace), "without": faults.get("without", TAKEN_OUT)}
        what = recipe, faults, words, str(self.log), str(home), variables or {}
        self.process = server().Process(target=child, args=what)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, limit=120):
        self.process.join(limit)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"still running after {limit} s: {self.text[-2000:]}")
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()

    @property
    def text(self):
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def passed(self):
        """The trace: a list of (place, times, update, seconds)."""
        rows = [line.split() for line in self.trace.read_text().splitlines()] if self.trace.exists() else []
        return [(r[0], int(r[1]), int(r[2]), float(r[3])) for r in rows if len(r) == 4]

    def await_place(self, place, times=1, limit=60):
        """Wait until the run has passed a place."""
        end = time.monotonic() + limit
        while not any(p[:2] == (place, times) for p in self.passed()):
            assert self.process.is_alive() and time.monotonic() < end, f"never came to {place} {times}: {self.text[-2000:]}"
            time.sleep(0.02)


def finish(recipe, folder, *words, faults=None, code=0, limit=120):
    """A run to its end: its Process, after its exit status was asserted, and that it ended with no traceback."""
    run = Process(recipe, folder, *words, faults=faults)
    status = run.wait(limit)
    assert status == code and "Traceback" not in run.text, f"{recipe} ended with {status}:\n{run.text[-3000:]}"
    return run


WHOLE, LOCKS = {}, collections.defaultdict(threading.Lock)


def whole(recipe, folder, *words, faults=None):
    """(run folder, Process) of an uninterrupted run with these flags, made once in this process, beside `folder`."""
    key = recipe, words, json.dumps(faults)
    with LOCKS[key]:  # the soak's threads may want the same one
        if key not in WHOLE:
            place = Path(folder).parent / f"whole-{recipe}-{abs(hash(key))}"
            WHOLE[key] = place, finish(recipe, place, *words, faults=(faults or {}) | {"without": ""})
    return WHOLE[key]


def read_export(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True) if path.suffix in (".pt", ".pth") else path.read_bytes()


def all_whole(folder):
    """Assert that each file under its own name is whole whenever its writer was killed; a checkpoint on its way need not be."""
    for path in Path(folder).rglob("*"):
        if path.suffix == ".pt" and path.name != "next.pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png":
            Image.open(path).load()


def same_end(a, b):
    """Assert that two run folders ended with the same bits: weights, average, optimizers, best so far, exports, metrics."""
    x, y = checkpoint(a), checkpoint(b)
    same(x["parts"], y["parts"])
    assert (x["step"], x["best"], x["progress"]) == (y["step"], y["best"], y["progress"])
    same(checkpoint(a, "best.pt")["model"], checkpoint(b, "best.pt")["model"])
    one, two = ({p.name for p in Path(f).glob("m*") if p.is_file()} | {p.name for p in Path(f).glob("*.onnx")} for f in (a, b))
    assert one == two
    for name in one - {"metrics.json"}:
        same(read_export(Path(a) / name), read_export(Path(b) / name), name)
    one, two = (json.loads((Path(f) / "metrics.json").read_text()) for f in (a, b))
    figures = {k for k in one if k not in PASSING and not k.startswith("time_")}
    assert {k: one[k] for k in figures} == {k: two.get(k) for k in figures}
    assert not list(Path(a).glob(".*.part")) and not list(Path(a).glob("tmp*"))


# --- kills ------------------------------------------------------------------------------------------------------------
def killed(recipe, folder, dice, kills=1, export=False, timed=False, where=()):
    """kill -9 at random places (or at the one `where`) of a run that saves after every update, or at random times; then the
    same command."""
    flags, faults = ("--save_minutes", "0"), {"export": True} if export else {}
    end, model = whole(recipe, folder, *flags, faults=faults)
    counts = {}
    for place, times, _, _ in model.passed():
        counts[place] = times
    span = model.passed()[-1][3] - model.passed()[0][3]
    run, lost, places, killed_so_far, done, kept = folder / "run", [], [], 0, 0, -1
    while True:
        more = dict(faults)
        if again := len(places) < kills:
            place = dice.choice(sorted(counts))
            place, times = where or (place, dice.randint(1, counts[place]))
            places.append("a moment" if timed else place)
            more |= {} if timed else {"at": [[place, times, "kill"]]}
        process = Process(recipe, run, *flags, faults=more)
        if timed and again:
            time.sleep(dice.uniform(0, span + 0.5))
            process.kill()
        status, trace = process.wait(), process.passed()
        all_whole(run)
        began = next((step for place, _, step, _ in trace if place == "resume+"), None)
        if began is not None:  # it loses what was not saved: the update whose save was cut, no more
            assert max(kept, done - 1) <= began, f"{recipe} began at {began}, {kept} saved, {done} done:\n{process.text}"
            lost += [max(0, done - began)] if killed_so_far else []
            done = began
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"{recipe} ended with {status}:\n{process.text[-3000:]}"
        killed_so_far += 1
        done = max([done, *(step for place, _, step, _ in trace if place == "advance+")])
        kept = max([kept, *(step for place, _, step, _ in trace if place == "save+")])
    same_end(run, end)
    return {"kills": killed_so_far, "lost": lost, "places": places[:killed_so_far]}


def interval(recipe, folder, dice):
    """kill -9 of a run that saves every 0.6 s: what is lost is younger than that and the time of a save and an update."""
    flags, every = ("--num_steps", "40", "--save_minutes", "0.01"), 0.6
    end, _ = whole(recipe, folder, *flags)
    run, at = folder / "run", dice.randint(16, 39)
    process = Process(recipe, run, *flags, faults={"slow_update": 0.05, "at": [["advance+", at, "kill"]]})
    assert process.wait() == -signal.SIGKILL, process.text
    trace = process.passed()
    kept = max(step for place, _, step, _ in trace if place == "save+")
    begun = [t for place, _, step, t in trace if place == "save" and step == kept][0]
    again = finish(recipe, run, *flags)
    began = next(step for place, _, step, _ in again.passed() if place == "resume+")
    saving = max(b[3] - a[3] for a, b in zip(trace, trace[1:]) if b[0] == "save+")
    assert began == kept and 0 < kept <= at and trace[-1][3] - begun < every + saving + 2, (at, kept, trace[-1][3] - begun)
    same_end(run, end)
    return {"kills": 1, "seconds": trace[-1][3] - begun}


# --- disks and folders ------------------------------------------------------------------------------------------------
def full_for_a_while(recipe, folder, dice):
    """No file can be written for two updates: said, and nothing else changes."""
    flags, k = ("--save_minutes", "0"), dice.randint(1, 3)
    end, _ = whole(recipe, folder, *flags)
    faults = {"at": [["advance", k, "full", 20_000], ["advance", k + 2, "space"]]}
    run = finish(recipe, folder / "run", *flags, faults=faults)
    assert "Cannot write into" in run.text and "Training goes on and tries again" in run.text
    same_end(folder / "run", end)
    return {}


def full_for_good(recipe, folder, dice):
    """No file can be written any more: the run ends with a sentence, and the same command continues from what was saved."""
    flags, k = ("--save_minutes", "0"), dice.randint(2, 5)
    end, _ = whole(recipe, folder, *flags)
    run = finish(recipe, folder / "run", *flags, faults={"at": [["advance", k, "full", 20_000]]}, code=1)
    assert "Cannot write into" in run.text and "run the same command again" in run.text
    kept = checkpoint(folder / "run")["step"]
    assert kept == k - 1 and not list(folder.glob("*-rescued-*"))  # nor did the rescue find space
    finish(recipe, folder / "run", *flags)
    same_end(folder / "run", end)
    return {}


@contextlib.contextmanager
def small_disk(place, size):
    """A file system of its own of `size` bytes at `place`; gives whether this machine allows it."""
    place.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        allowed = subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        allowed = False
    try:
        yield allowed
    finally:
        if allowed:
            subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk(recipe, folder, dice):
    """A real disk that is full: before the start told before training; in the middle the end is saved on another one."""
    flags = ("--save_minutes", "0")
    end, _ = whole(recipe, folder, *flags)
    with small_disk(folder / "disk", 64 << 10) as allowed:
        if not allowed:
            return {"skipped": "no right to mount a small disk"}
        run = finish(recipe, folder / "disk" / "run", *flags, code=1)
        told = re.search("No space left on device|MB free. Free some space", run.text)
        assert told and not any(place == "advance" for place, *_ in run.passed()), run.text
    size = sum(p.stat().st_size for p in end.rglob("*") if p.is_file())
    with small_disk(folder / "disk2", 2 * size + (8 << 20)):
        filler = str(folder / "disk2" / "filler")
        faults = {"at": [["advance", dice.randint(2, 5), "fill", filler]], "trace": str(folder / "trace")}
        run = finish(recipe, folder / "disk2" / "run", *flags, faults=faults, code=1)
        kept = Path(re.search(r"is saved in (\S+) instead", run.text)[1])
        assert checkpoint(kept)["step"] == STEPS and f"--continue_from {kept}" in run.text
        finish(recipe, folder / "new", *flags, "--continue_from", str(kept))
        same(checkpoint(folder / "new")["parts"], checkpoint(end)["parts"])
        os.remove(filler)
        finish(recipe, folder / "disk2" / "run", *flags)  # and where there is space again, the same command continues
        same_end(folder / "disk2" / "run", end)
    return {}


def read_only(recipe, folder, dice):
    """Folders that cannot be written: a sentence that names them; input that cannot be written is only read."""
    data, flags = data_for(recipe, folder / "data"), data_flags(recipe, folder / "data")
    before = {p: p.read_bytes() for p in data.rglob("*") if p.is_file()}
    for p in [*data.rglob("*"), data]:
        p.chmod(0o555 if p.is_dir() else 0o444)
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    try:
        run = finish(recipe, closed / "run", faults={"mortal": True, "trace": str(folder / "trace")}, code=1)
        assert str(closed) in run.text and "Permission denied" in run.text
        finish(recipe, folder / "run", *flags, faults={"mortal": True})
    finally:
        for p in [closed, data, *data.rglob("*")]:
            p.chmod(0o755)
    assert {p: p.read_bytes() for p in data.rglob("*") if p.is_file()} == before
    return {}


def folder_vanishes(recipe, folder, dice):
    """The run folder is deleted while training: it is made anew, and the run ends as if nothing had been."""
    flags, k = ("--save_minutes", "0"), dice.randint(1, 5)
    end, _ = whole(recipe, folder, *flags)
    run = finish(recipe, folder / "run", *flags, faults={"at": [["advance", k, "remove", str(folder / "run")]]})
    assert "was gone and is made anew" in run.text
    same(checkpoint(folder / "run")["parts"], checkpoint(end)["parts"])
    assert checkpoint(folder / "run", "best.pt")["step"] == checkpoint(folder / "run")["best"]["step"]
    assert finish(recipe, folder / "run", *flags).text.count("Finished before") == 1
    return {}


def mount_vanishes(recipe, folder, dice):
    """The drive with the run folder goes away: the end is saved elsewhere, and nothing is written where the drive was."""
    flags, k, drive = ("--save_minutes", "0"), dice.randint(1, 5), folder / "drive"
    end, _ = whole(recipe, folder, *flags)
    faults = {"at": [["advance", k, "rename", str(drive), str(folder / "away")]], "trace": str(folder / "trace")}
    run = finish(recipe, drive / "run", *flags, faults=faults, code=1)
    kept = Path(re.search(r"is saved in (\S+) instead", run.text)[1])
    assert checkpoint(kept)["step"] == STEPS and not drive.exists()
    finish(recipe, folder / "new", *flags, "--continue_from", str(kept))
    same(checkpoint(folder / "new")["parts"], checkpoint(end)["parts"])
    return {}


def damaged(recipe, folder, dice):
    """The newest checkpoint is truncated, flipped, emptied: the one before takes over, and the damaged one is kept."""
    flags, k = ("--save_minutes", "0"), dice.randint(2, 5)
    end, _ = whole(recipe, folder, *flags)
    process = Process(recipe, folder / "run", *flags, faults={"at": [["forward", k, "kill"]]})
    assert process.wait() == -signal.SIGKILL, process.text
    last = folder / "run" / "last.pt"
    data, kept = bytearray(last.read_bytes()), checkpoint(folder / "run", "previous.pt")["step"]
    how, place = dice.choice(["truncated", "flipped", "empty", "zeros"]), dice.randrange(len(data))
    data[place] ^= 1 << dice.randrange(8)
    last.write_bytes({"truncated": data[:place], "flipped": data, "empty": b"", "zeros": bytes(len(data))}[how])
    run = finish(recipe, folder / "run", *flags)
    began = next(step for name, _, step, _ in run.passed() if name == "resume+")
    if "is damaged" not in run.text:  # a bit that no record of the file covers
        assert how == "flipped" and began > kept
    else:
        assert began == kept and (folder / "run" / "last.pt.damaged").exists()
    same_end(folder / "run", end)
    return {"how": how}


def mirrored(recipe, folder, dice, how=""):
    """--mirror_dir: the machine is lost with its run folder, and what was saved is taken from there."""
    flags, k, run = ("--save_minutes", "0", "--mirror_dir", str(folder / "mirror")), dice.randint(2, 5), folder / "run"
    end, _ = whole(recipe, folder, "--save_minutes", "0")
    if (how or dice.choice(["copying", "through"])) == "copying":  # killed while a file is copied, perhaps
        at = [["replace", dice.randint(20, 40), "kill"]]
    else:
        at = [["advance", k, "sleep", 1.5], ["advance+", k, "kill"]]  # the copies are through
    assert Process(recipe, run, *flags, faults={"at": at}).wait() == -signal.SIGKILL
    all_whole(folder / "mirror")
    copies = [p for p in (folder / "mirror" / name for name in ("last.pt", "previous.pt")) if p.exists()]
    kept = torch.load(copies[0], weights_only=True)["step"] if copies else -1  # killed before the first was there
    assert at[0][0] == "replace" or kept == k - 1
    shutil.rmtree(run)
    again = finish(recipe, run, *flags)
    went_on = f"Continuing the run of {folder / 'mirror'}" in again.text and f"Continuing after update {kept}," in again.text
    assert went_on == (kept >= 0), again.text
    same_end(run, end)
    same_end(folder / "mirror", end)
    return {"how": at[0][0]}


def mirror_fails(recipe, folder, dice, how="", limit=120):
    """A second folder that keeps nothing, goes away or hangs: said, and the run is not touched by it."""
    end, _ = whole(recipe, folder, "--save_minutes", "0")
    mirror, run = folder / "drive" / "mirror", folder / "run"
    flags, how = ("--save_minutes", "0", "--mirror_dir", str(mirror)), how or dice.choice(["forgets", "goes", "hangs"])
    mirror.mkdir(parents=True)
    faults = {"forgets": {"forgetful": str(mirror)}, "hangs": {}}
    faults["goes"] = {"at": [["advance", dice.randint(1, 5), "rename", str(folder / "drive"), str(folder / "away")]]}
    if how == "hangs":
        os.mkfifo(mirror / ".last.pt.part")  # nobody reads: to open it takes for ever
        flags += ("--time_budget", "10s")
    process = finish(recipe, run, *flags, faults=faults[how], limit=limit)
    said = {"forgets": "did not keep", "goes": "No copy in", "hangs": "still goes on"}[how]
    assert said in process.text, process.text
    assert checkpoint(run)["step"] == STEPS
    if how != "hangs":  # whose rate follows the clock
        same_end(run, end)
    return {"how": how}


# --- signals ----------------------------------------------------------------------------------------------------------
def stopped(recipe, folder, dice):
    """SIGTERM, SIGINT or SIGUSR1 anywhere, inside a save too: saved to the update, and the same command continues."""
    flags = ("--save_minutes", "0")
    end, model = whole(recipe, folder, *flags)
    name = dice.choice(["SIGTERM", "SIGINT", "SIGUSR1"])
    places = [p[:2] for p in model.passed() if p[0] not in ("open", "close", "leave") and not p[0].startswith("finish")]
    place = dice.choice([dice.choice([p for p in places if p[0] == "write"]), dice.choice(places)])
    run = Process(recipe, folder / "run", *flags, faults={"at": [[*place, "signal", name]]})
    status = run.wait()
    assert status in (0, {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}[name]) and "Traceback" not in run.text, run.text
    assert "this update ends, then the run is saved" in run.text
    done = max([step for where, _, step, _ in run.passed() if where == "advance+"], default=0)
    if status:
        assert "To continue: " in run.text
    if done:
        assert checkpoint(folder / "run")["step"] == done
    finish(recipe, folder / "run", *flags)
    same_end(folder / "run", end)
    return {"how": name}


def interrupted_twice(recipe, folder, dice):
    """Ctrl-C twice leaves at once, with a sentence; what was saved is whole."""
    flags = ("--save_minutes", "0")
    end, model = whole(recipe, folder, *flags)
    places = [p[:2] for p in model.passed() if p[0] in ("forward", "write", "fsync", "evaluate", "show", "advance", "loss")]
    run = Process(recipe, folder / "run", *flags, faults={"at": [[*dice.choice(places), "signal", "SIGINT", "SIGINT"]]})
    assert run.wait() == 130 and "Traceback" not in run.text and "the same command continues" in run.text, run.text
    done = max([step for where, _, step, _ in run.passed() if where == "advance+"], default=0)
    again = finish(recipe, folder / "run", *flags)
    began = next(step for where, _, step, _ in again.passed() if where == "resume+")
    assert began >= done - 1
    same_end(folder / "run", end)
    return {}


# --- updates that go wrong --------------------------------------------------------------------------------------------
def out_of_memory(recipe, folder, dice):
    """Memory runs out in a random update: as if the run had been stopped there and gone on with half of the batch."""
    _, model = whole(recipe, folder)
    k = dice.randint(1, STEPS - 1)
    first = next(times for place, times, step, _ in model.passed() if place == "loss" and step == k)
    run = finish(recipe, folder / "run", faults={"at": [["loss", first, "oom"]]})
    assert "Out of memory with 2 samples per forward pass, now 1. To start so: --batch_size 1 --accumulate 2" in run.text
    finish(recipe, folder / "split", faults={"stop_at": k}, code=143)
    finish(recipe, folder / "split", "--batch_size", "1", "--accumulate", "2")
    same_end(folder / "run", folder / "split")
    return {}


def finite(folder):
    return all(torch.isfinite(t.float()).all() for t in tensors_in(checkpoint(folder)["parts"]))


def not_finite_once(recipe, folder, dice):
    """One update's loss is not finite: it is skipped, and a kill after it changes nothing."""
    flags, k = ("--save_minutes", "0"), dice.randint(0, STEPS - 2)
    faults = {"nan_at": [k]}
    end, _ = whole(recipe, folder, *flags, faults=faults)
    assert checkpoint(end)["step"] == STEPS and finite(end)
    process = Process(recipe, folder / "run", *flags, faults=faults | {"at": [["forward", STEPS - 1, "kill"]]})
    assert process.wait() == -signal.SIGKILL, process.text
    finish(recipe, folder / "run", *flags, faults=faults)
    same_end(folder / "run", end)
    return {}


def not_finite_for_good(recipe, folder, dice):
    """All losses are not finite from one update on: back once, then a sentence with files; what is saved is good."""
    flags, k = ("--num_steps", "20", "--save_minutes", "0"), dice.randint(1, 4)
    run = finish(recipe, folder / "run", *flags, faults={"nan_from": k}, code=1)
    assert "were not finite: back to update" in run.text and "not finite in 5 updates in a row, at a lower rate too" in run.text
    assert finite(folder / "run") and checkpoint(folder / "run")["step"] <= k
    finish(recipe, folder / "run", *flags)
    assert finite(folder / "run") and checkpoint(folder / "run")["step"] == 20
    return {}


# --- data -------------------------------------------------------------------------------------------------------------
def data_for(recipe, folder, n=12):
    """A folder of n small files as the recipe wants them: volumes, classes, or images with masks."""
    rng = np.random.default_rng(0)
    for i in range(n):
        place = folder / ("ab"[i % 2] if recipe in ("train_latent_cfg", "train_convnext") else "images")
        place.mkdir(parents=True, exist_ok=True)
        if recipe == "train_autoencoder3d":
            np.save(place / f"{i:02d}.npy", rng.random((18, 17, 10), np.float32))
            continue
        small = Image.fromarray(rng.integers(0, 256, (10, 11, 3), np.uint8))
        small.resize((44, 40), Image.Resampling.BICUBIC).save(place / f"{i:02d}.png")
        if "nextdit" in recipe or "finetune" in recipe:
            (folder / "masks").mkdir(exist_ok=True)
            mask = np.uint8(rng.random((5, 5)) > 0.6) * 255
            Image.fromarray(mask).resize((44, 40), Image.Resampling.NEAREST).save(folder / "masks" / f"{i:02d}.png")
    return folder


def data_flags(recipe, data):
    """The flags of a run on such a folder; fine-tuning takes the weights of another recipe's run too."""
    if recipe != "finetune_pretrained":
        return "--data_dir", str(data)
    return "--data_dir", str(data), "--weights", str(whole("train_nextdit_fast", data.parent, "--save_minutes", "0")[0])


def data_goes_bad(recipe, folder, dice):
    """Files are deleted, overwritten or locked while they are read in turn: named, and the next good ones take their places."""
    data = data_for(recipe, folder / "data")
    files = sorted(p for p in data.rglob("*.*") if "masks" not in p.parts)
    acts = [[("remove",), ("garbage",), ("chmod", 0)][(dice.randrange(3) + j) % 3] for j in range(2)]
    hit = dice.sample(files, 2)
    at = [["advance", 1, a[0], str(p), *a[1:]] for a, p in zip(acts, hit)]
    flags = (*data_flags(recipe, data), "--num_steps", "14")
    run = finish(recipe, folder / "run", *flags, faults={"uncached": True, "mortal": True, "at": at})
    named = sum(p.name in run.text for p in hit)  # not both where one is held out
    assert "Bad training file, its place takes the next good one" in run.text and named, run.text
    assert checkpoint(folder / "run")["step"] == 14
    return {"how": " and ".join(a[0] for a in acts), "named": named}


def data_vanishes(recipe, folder, dice):
    """The folder of data goes away: a sentence, what was trained is saved; once it is back the same command continues."""
    data, away = data_for(recipe, folder / "data"), folder / "away"
    flags, same_data = (*data_flags(recipe, data), "--num_steps", "14"), data_for(recipe, folder / "same")
    end, _ = whole(recipe, folder, *data_flags(recipe, same_data), "--num_steps", "14", faults={"uncached": True})
    faults = {"uncached": True, "at": [["advance", dice.randint(1, 12), "rename", str(data), str(away)]]}
    process = Process(recipe, folder / "run", *flags, "--num_workers", "0", faults=faults)  # workers read far ahead
    status = process.wait()
    assert status in (0, 1) and "Traceback" not in process.text, process.text
    if status:
        assert "cannot be used" in process.text, process.text
        os.rename(away, data)
        finish(recipe, folder / "run", *flags)
    same(checkpoint(folder / "run")["parts"], checkpoint(end)["parts"])
    return {"how": "stopped" if status else "held in memory"}


# --- several processes ------------------------------------------------------------------------------------------------
def pair(recipe, folder, *words, faults=None, port=0):
    """Two processes of one run, started as torchrun does, but with nobody who ends one when the other is lost."""
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    names |= {"PROCESS_TIMEOUT": "30"}
    both = [faults.get(rank, {}) for rank in (0, 1)] if faults else [{}, {}]
    return [
        Process(
            recipe, folder, *words, faults=both[rank], rank=rank, variables=names | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in (0, 1)
    ]


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def peer_lost(recipe, folder, dice):
    """One of two processes is killed: the other ends by itself in bounded time with a sentence; the same command continues."""
    flags, lost, k = ("--save_minutes", "0", "--batch_size", "1"), dice.randrange(2), dice.randint(2, 5)
    faults = {lost: {"at": [["forward", k, "kill"]]}}
    both = pair(recipe, folder / "run", *flags, faults=faults, port=free_port())
    assert both[lost].wait() == -signal.SIGKILL, both[lost].text
    start = time.monotonic()
    status = both[1 - lost].wait(60)
    seconds, text = time.monotonic() - start, both[1 - lost].text
    assert status == 1 and "Another process of this run is gone" in text and "Traceback" not in text, text
    kept = checkpoint(folder / "run")["step"]
    both = pair(recipe, folder / "run", *flags, port=free_port())
    assert [p.wait() for p in both] == [0, 0], both[0].text + both[1].text
    assert f"Continuing after update {kept}," in both[0].text and checkpoint(folder / "run")["step"] == STEPS
    return {"seconds": seconds}


def second_run(recipe, folder, dice):
    """A second run in the same folder is refused with the first one's process id; a killed run's lock is taken over."""
    flags, run = ("--save_minutes", "0"), folder / "run"
    end, _ = whole(recipe, folder, *flags)
    k = dice.randint(1, 5)
    first = Process(recipe, run, *flags, faults={"at": [["advance", k, "sleep", 60]]})
    first.await_place("advance", k)
    log = first.log.rename(folder / "first.log")
    second = Process(recipe, run, *flags, faults={"trace": str(folder / "trace")})
    assert second.wait() == 1 and f"is in use by process {first.pid};" in second.text, second.text + log.read_text()
    first.kill()
    finish(recipe, run, *flags)
    same_end(run, end)
    return {"kills": 1}


FAULTS = [
    killed, interval, full_for_a_while, full_for_good, full_disk, read_only, folder_vanishes, mount_vanishes, damaged, mirrored,
    mirror_fails, stopped, interrupted_twice, out_of_memory, not_finite_once, not_finite_for_good, data_goes_bad, data_vanishes,
    peer_lost, second_run,
]  # fmt: skip


def try_fault(fault, recipe, folder, seed, **more):
    """One fault at moments that `seed` chooses, in a folder of its own."""
    folder = Path(folder) / f"{fault.__name__}-{recipe}-{seed}"
    folder.mkdir(parents=True)
    return fault(recipe, folder, random.Random(repr((fault.__name__, recipe, seed))), **more)
