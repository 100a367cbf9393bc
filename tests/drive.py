"""Run a recipe with faults put in: python tests/drive.py RECIPE JSON [flags]. JSON keys:

stop_at: ask process `rank` for a stop when so many updates are done; slow_write: seconds that each fsync takes;
full_after: bytes after which no file can grow (a real limit of the kernel); worker_bug: true makes loading fail in worker
processes; export: true keeps the export; optimizer: SGD replaces SOAP and Adam.
"""

import importlib
import json
import os
import sys
import time

import common

recipe, faults = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
sys.argv = [f"{sys.argv[1]}.py", *sys.argv[3:]]
if not faults.get("export"):
    recipe.export = lambda *args: None
for name, value in {
    "CROPS": 2,
    "BUILT_IN": 6,
    "NOISY": 2,
    "STAND_IN": 1,
    "JUDGED": 12,
    "EPOCHS": 1,
    "LINEAR_STEPS": 3,
}.items():  # as in conftest.py
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
if "stop_at" in faults and os.environ.get("RANK", "0") == str(faults.get("rank", 0)):
    advance = common.Run.advance

    def stopping(run, losses):
        advance(run, losses)
        if run.step == faults["stop_at"]:
            run.asked = "SIGTERM"

    common.Run.advance = stopping
if "slow_write" in faults:
    fsync = os.fsync
    os.fsync = lambda f: (time.sleep(faults["slow_write"]), fsync(f))
if "full_after" in faults:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (faults["full_after"], faults["full_after"]))
common.main(recipe.train, recipe.Config, recipe.__doc__)
