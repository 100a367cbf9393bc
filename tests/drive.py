"""Run a recipe with faults put in: python tests/drive.py RECIPE JSON [flags]. JSON keys:

trace: file that tells each place a run passes, a line `place times update seconds`; at: list of [place, times, action, ...] for
when a place is passed so often: kill, signal NAME ..., remove PATH, rename PATH PATH, garbage PATH, chmod PATH MODE, fill PATH
(its disk, to the last byte), full BYTES (no file may grow beyond them), space, oom, sleep S; nan_at, nan_from: updates whose
loss is nan; uncached: true leaves no RAM for decoded files; mortal: true takes root's right to read and write everything;
forgetful: folder in which every file vanishes as soon as it is there; without: one of WITHOUT, a protection to take out;
stop_at: ask process `rank` for a stop when so many updates are done; slow_update: seconds that each update takes;
worker_bug: true makes loading fail in worker processes; export: true keeps the export; optimizer: SGD replaces SOAP and Adam.
"""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import common

SMALL = {
    "CROPS": 2,
    "BUILT_IN": 6,
    "NOISY": 2,
    "STAND_IN": 1,
    "JUDGED": 12,
    "EPOCHS": 1,
    "LINEAR_STEPS": 3,
}  # as in conftest.py
RUN = {  # places: methods of Run as they begin; those with a "+" also as they end
    "open": "_open_folder", "resume": "resume+", "evaluate": "judge", "forward": "_accumulate", "advance": "advance+",
    "save": "save+", "finish": "finish+", "leave": "_leave", "close": "__exit__",
}  # fmt: skip


def full(limit):
    """No file of this process may grow beyond `limit` bytes; the kernel answers as it does on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def mortal():
    """Root obeys the modes of files from now on, as everyone does."""
    if os.geteuid() == 0:
        import ctypes

        class Rights(ctypes.Structure):
            _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]

        class Head(ctypes.Structure):
            _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

        head, rights = Head(0x20080522, 0), (Rights * 2)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(ctypes.byref(head), rights) == 0
        rights[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        assert libc.capset(ctypes.byref(head), rights) == 0


def act(action, *words):
    """Do to this process what `at` asks for."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "signal":
        for name in words:
            os.kill(os.getpid(), getattr(signal, name))
    elif action == "remove":
        shutil.rmtree(words[0]) if os.path.isdir(words[0]) else os.remove(words[0])
    elif action == "rename":
        os.rename(*words)
    elif action == "garbage":
        Path(words[0]).write_bytes(b"\x89PNG but no picture" * 9)
    elif action == "chmod":
        os.chmod(*words)
    elif action == "fill":
        with contextlib.suppress(OSError), open(words[0], "wb", buffering=0) as f:
            while f.write(bytes(512)):
                pass
    elif action == "sleep":
        time.sleep(words[0])
    elif action in ("full", "space"):
        full(words[0] if words else -1)
    elif action == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory, says the test")
    else:
        raise ValueError(action)


def watch(recipe, faults):
    """Have the run call a `visit` at each place: it writes the trace and does what `at` asks for."""
    counts, plans, run = {}, [list(p) for p in faults.get("at", ())], [None]

    def visit(place):
        counts[place] = counts.get(place, 0) + 1
        if faults.get("trace"):  # one write, which a kill leaves whole
            line = f"{place} {counts[place]} {getattr(run[0], 'step', -1)} {time.monotonic():.4f}\n"
            Path(faults["trace"]).open("a").write(line)
        for place_, times, action, *words in plans:
            if (place_, times) == (place, counts[place]):
                act(action, *words)

    def before(owner, name, place, after=False):
        whole = getattr(owner, name, None)
        if whole is None:
            return

        def wrapped(*args, **more):
            if isinstance(args[0] if args else None, common.Run) and not args[0].planned:
                run[0] = args[0]
            if os.getpid() != home:  # a worker that loads data
                return whole(*args, **more)
            visit(place)
            out = whole(*args, **more)
            if after:
                visit(f"{place}+")
            return out

        setattr(owner, name, wrapped)

    def in_halves(state, f):
        """torch.save with a moment in the middle of the file."""
        buffer = io.BytesIO()
        whole_save(state, buffer)
        data = buffer.getvalue()
        f.write(data[: len(data) // 2])
        f.flush()
        visit("write")
        f.write(data[len(data) // 2 :])

    home, whole_save, update = os.getpid(), torch.save, common.Run.update
    torch.save = in_halves
    for place, name in RUN.items():
        before(common.Run, name.rstrip("+"), place, name.endswith("+"))
    before(os, "fsync", "fsync")
    before(os, "replace", "replace")
    before(common.Items, "_read", "data")
    before(recipe, "show", "show")
    before(recipe, "export", "export")

    def updating(run, loss_fn, batch, *args, **more):
        def loss(part):
            visit("loss")
            out = loss_fn(part)
            if run.step in faults.get("nan_at", ()) or run.step >= faults.get("nan_from", 1 << 60):
                return {k: v * float("nan") for k, v in out.items()} if isinstance(out, dict) else out * float("nan")
            return out

        loss.__qualname__ = loss_fn.__qualname__
        return update(run, loss, batch, *args, **more)

    common.Run.update = updating


def direct(path, write, check=None):
    """write_aside without the aside."""
    with open(path, "wb") as f:
        write(f)


def no_handler(run, number, frame):
    """A signal handler that asks for a stop and never leaves at once."""
    run.asked = signal.Signals(number).name


mix, write, save = common.mix, common.Run.write, common.Run.save
WITHOUT = {  # protections to take out, so that a test sees its fault noticed
    "aside": (common, "write_aside", direct),
    "seed": (common, "mix", lambda *n: mix(*n, os.getpid()) if all(isinstance(x, int) for x in n[:2]) else mix(*n)),
    "replay": (common, "is_out_of_memory", lambda error: False),
    "retry": (common.Run, "write", lambda run, job, must=False: write(run, job, True)),
    "write": (common.Run, "write", lambda run, job, must=False: (job(), True)[1]),
    "interval": (common.Run, "save", lambda run, must=True: save(run, must) if must else None),
    "rescue": (common.Run, "_rescue", lambda run, state, error: error),
    "remake": (common.Run, "_remake_folder", lambda run: None),
    "fallback": (common, "CHECKPOINTS", ("last.pt",)),
    "mirror": (common.Mirror, "_copy", lambda mirror: None),
    "thread": (common.Mirror, "start", lambda mirror: mirror._copy()),
    "handlers": (signal, "signal", lambda *args: None),
    "second": (common.Run, "_on_signal", no_handler),
    "finite": (common.Run, "finite", lambda run, value: True),
    "substitute": (common.Items, "_read", lambda items, i: items.load(items.paths[i])),
    "lock": (common.Run, "_lock", lambda run: contextlib.nullcontext(setattr(contextlib.nullcontext, "release", print))),
    "main": (common, "main", lambda train, config, doc: train(common.parse(config, doc))),
}


def put_in(recipe, faults):
    """Change a recipe's module, and the shared one, as the keys of `faults` say."""
    if faults.get("without"):
        setattr(*WITHOUT[faults["without"]])
    if not faults.get("export"):
        recipe.export = lambda *args: None
    for name, value in SMALL.items():
        if hasattr(recipe, name):
            setattr(recipe, name, value)
    if hasattr(recipe, "NextDiT"):  # a network for tests, small and not silent at its start
        init = recipe.NextDiT.__init__  # (the heads are told by --heads where they are read from weights)

        def small(net, *args, **words):
            keys = ("patch_size", "in_channels", "dim", "n_layers", "n_heads")
            words = dict(zip(keys, args)) | words
            init(net, **words | {"dim": 24, "n_layers": 4, "n_heads": 2, "multiple_of": 8})
            recipe.torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)

        recipe.NextDiT.__init__ = small
    if faults.get("optimizer") == "SGD":
        recipe.SOAP = lambda params, lr: recipe.torch.optim.SGD(params, 1.0)
        recipe.Muon = lambda groups, lr: recipe.torch.optim.SGD(groups, 1.0)
        recipe.torch.optim.AdamW = lambda params, *args, **words: recipe.torch.optim.SGD(params, 1.0)
    if faults.get("worker_bug"):
        whole = recipe.Crops.__getitems__
        recipe.Crops.__getitems__ = lambda data, keys: 1 / 0 if recipe.torch.utils.data.get_worker_info() else whole(data, keys)
    if faults.get("uncached"):
        common.free_memory = lambda: 0
    advance = common.Run.advance

    def advancing(run, losses):
        advance(run, losses)
        time.sleep(faults.get("slow_update", 0))
        if run.step == faults.get("stop_at") and os.environ.get("RANK", "0") == str(faults.get("rank", 0)):
            run.asked = "SIGTERM"

    common.Run.advance = advancing
    if faults.get("mortal"):
        mortal()
    if "forgetful" in faults:
        replace = os.replace

        def forget(source, target):
            replace(source, target)
            if str(target).startswith(faults["forgetful"]):
                os.remove(target)

        os.replace = forget
    if faults.get("trace") or faults.get("at"):
        watch(recipe, faults)


def main(name, faults, words):
    """Run the recipe `name` with these faults and flags, and exit as it does."""
    recipe = importlib.import_module(name)
    sys.argv = [f"{name}.py", *map(str, words)]
    put_in(recipe, faults)
    with contextlib.suppress(AttributeError):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"])) if "OMP_NUM_THREADS" in os.environ else None
    common.main(recipe.train, recipe.Config, recipe.__doc__)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:])
