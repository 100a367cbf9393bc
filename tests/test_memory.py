"""The planner: the allocator, CUDA's autocast on fake tensors, predictions against measurements, tables."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from test_recipes import RECIPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import common

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import ROWS, SMALL  # noqa: E402

import test_memory_usage as planner  # noqa: E402

MIB, GIB = 2**20, 2**30


def plan(recipe="train_autoencoder3d", **changes):
    return planner.Plan(recipe=recipe, **{"data": SMALL.get(recipe, "")} | changes)


# --- the allocator ----------------------------------------------------------------------------------------------------
def test_segments_are_taken_as_cuda_takes_them():
    for sizes, reserved in (
        ([512], 2 * MIB),  # small: a segment of 2 MiB
        ([512] * 4096, 2 * MIB),  # which 4,096 pieces fill
        ([512] * 4097, 4 * MIB),
        ([2 * MIB], 20 * MIB),  # middling: 20 MiB
        ([2 * MIB] * 10, 20 * MIB),
        ([2 * MIB] * 11, 40 * MIB),
        ([11 * MIB], 12 * MIB),  # large: its own, in steps of 2 MiB
        ([11 * MIB, 512 * 1024], 14 * MIB),  # the small pool is another
    ):
        own = planner.Allocator()
        for size in sizes:
            own.take(size)
        assert own.reserved == reserved, sizes


def test_freed_blocks_are_joined_and_used_again():
    own = planner.Allocator()
    blocks = [own.take(6 * MIB) for _ in range(3)]  # 18 of 20 MiB
    for k in (0, 2, 1):
        own.give(blocks[k])
    assert [b[0] for b in own.free[False]] == [20 * MIB]
    own.take(20 * MIB)
    assert own.reserved == 20 * MIB
    own.take(6 * MIB)
    assert own.reserved == 40 * MIB


def test_the_best_fit_is_taken():
    own = planner.Allocator()
    big, middle, _ = own.take(40 * MIB), own.take(30 * MIB), own.take(12 * MIB)
    own.give(big)
    own.give(middle)
    own.take(25 * MIB)
    assert [b[0] for b in own.free[False]] == [5 * MIB, 40 * MIB]


# --- CUDA's autocast --------------------------------------------------------------------------------------------------
def test_norms_and_losses_are_fp32_under_cudas_autocast():
    found = {}
    with planner.CudaRules():
        with torch.autocast("cpu", torch.float16):
            h = F.conv2d(torch.rand(1, 4, 8, 8), torch.rand(4, 4, 3, 3))
            found = {"conv": h.dtype, "norm": F.group_norm(h, 2).dtype, "up": F.interpolate(h, scale_factor=2).dtype}
            found |= {"silu": F.silu(h).dtype, "sum": h.sum().dtype, "softmax": h.softmax(1).dtype}
            with torch.autocast("cpu", enabled=False):
                found["off"] = F.group_norm(h, 2).dtype
        found["outside"] = F.group_norm(h, 2).dtype
    half, full = torch.float16, torch.float32
    assert found == {
        "conv": half,
        "norm": full,
        "up": full,
        "silu": half,
        "sum": full,
        "softmax": full,
        "off": half,
        "outside": half,
    }


def test_recomputed_blocks_run_under_the_same_rules():
    seen, w = [], torch.rand(4, 4, 3, 3, requires_grad=True)

    def block(x):
        h = F.group_norm(F.conv2d(x, w, padding=1), 2)
        seen.append(h.dtype)
        return F.silu(h)

    with planner.CudaRules():
        with torch.autocast("cpu", torch.float16):
            out = checkpoint(block, torch.rand(1, 4, 8, 8), use_reentrant=False)
        out.float().square().mean().backward()
    assert seen == [torch.float32] * 2 and w.grad is not None


# --- counting ---------------------------------------------------------------------------------------------------------
def test_live_storages_are_counted_once_and_until_they_go():
    live = planner.Live()
    with FakeTensorMode(), live:
        a = torch.empty(1000)  # 4,000 bytes: eight pieces of 512
        b = a.view(10, 100)[2:]
        assert live.live == 4096
        c = a + 1
        assert live.live == 8192
        del a
        assert live.live == 8192  # the view holds it
        del b, c
        assert live.live == 0 and live.peak == 8192


def test_the_breakdown_of_a_step_is_what_it_should_be():
    class Recipe:
        RECIPE = __name__ = "toy"

        @staticmethod
        def build(cfg, run):
            model = torch.nn.Linear(1024, 1024, bias=False)
            return common.Parts(
                model=model, ema=common.EMA(model), opt=common.with_state(torch.optim.Adam(model.parameters(), 0.0))
            )

        @staticmethod
        def example_batch(cfg, run):
            return {"x": torch.rand(4096, 1024)}

        @staticmethod
        def train_step(parts, batch, cfg, run):
            return run.update(lambda part: parts.model(part["x"]).mean(), batch, parts.opt, parts.model, parts.ema)

        @staticmethod
        def eval_step(parts, cfg, run):
            return parts.ema.model(torch.rand(1, 1024))

    cfg, live = common.Settings(batch_size=4096), planner.Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        disk, found, each = planner.follow(Recipe, cfg, plan(), lambda own: common.Run(own, "toy", kind="cuda"), live)
    peak, parts, work, _ = found["an update"]
    assert parts["weights"] == 4 * MIB and parts["average"] == 4 * MIB and parts["batch"] == 16 * MIB and each == 4096
    assert 8 * MIB <= parts["optimizer"] < 8.1 * MIB and 12 * MIB < disk < 17 * MIB
    assert 16 * MIB <= parts["activations"] < 21 * MIB  # the product, then its gradient and the weight's
    assert sum(parts.values()) == peak
    products = 2 * 2 * 4096 * 1024 * 1024  # forward, and for the weight's gradient
    assert sum(f for f, _, _ in work) == products


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_planned(recipe):
    found = planner.predict(plan(recipe), ROWS[recipe].split())
    assert sum(found["breakdown"].values()) == pytest.approx(found["peak"] - found["data"], rel=1e-6)
    assert found["total"] > found["reserved"] >= 0.99 * found["peak"] > found["breakdown"]["weights"] > 0
    assert found["checkpoint"] > 0.9 * found["breakdown"]["weights"]
    assert found["breakdown"]["optimizer"] > 0 and sum(f for f, _, _ in found["work"]) > 1e8


@pytest.mark.slow
def test_published_nextdit_weights_are_planned_as_they_are():
    """1.63 billion weights, of which LoRA trains few: the optimizer is small, the weights are there once."""
    found = planner.predict(plan("finetune_pretrained", data=""), ["--target_size", "256", "--batch_size", "1"])
    assert found["phase"] == "building"  # in fp32, before they are halved
    assert 6 * GIB < found["breakdown"]["weights"] < 6.5 * GIB and 3 * GIB < found["checkpoint"] < 3.6 * GIB


def test_a_slice_of_256_fits_into_three_gigabytes():
    full = "--checkpointing --attention all --res_blocks 2 --enlarge nearest --batch_size 1 --accumulate 1".split()
    found = planner.predict(plan(), [*full, "--target_size", "256,256,64"], capability=(7, 5))
    assert found["precision"] == "float16" and found["peak"] < 2.5 * GIB and found["total"] < 3.6 * GIB
    cube = planner.predict(plan(), [*full, "--target_size", "256,256,256"], capability=(7, 5))
    assert 8 * GIB < cube["peak"] < 11 * GIB
    slower = planner.predict(plan(), [*full, "--target_size", "256,256,64", "--no-half_norm", "--no-checkpointing"])
    assert slower["peak"] > 3.5 * found["peak"]


@pytest.mark.slow
def test_the_largest_batch_is_the_largest():
    words = ["--target_size", "64,64,32"]
    row, room = planner.predict(plan(), words) | {"name": "as given"}, 2 * GIB
    most = planner.largest_batch(plan(), row, room, (8, 0))
    totals = [planner.predict(plan(), [*words, "--batch_size", str(n)])["total"] for n in (most, most + max(2, most // 10))]
    assert most > 4 and totals[0] <= room < totals[1]


# --- against the processor --------------------------------------------------------------------------------------------
def difference(recipe):
    words = ROWS[recipe].split() + ["--device", "cpu", "--use_amp"]
    measured = planner.measure(plan(recipe), words)
    return planner.predict(plan(recipe), words, "cpu", scratch=True)["peak"] / measured["peak"] - 1


def test_a_prediction_is_near_what_the_processors_allocator_gives():
    assert abs(difference("train_ultrafast_srcnn")) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r for r in ROWS if r != "train_ultrafast_srcnn"])
def test_predictions_are_near_for_every_recipe(recipe):
    assert abs(difference(recipe)) < 0.08


def test_running_out_of_memory_is_a_result(monkeypatch):
    """A batch of terabytes in a process that may take eight gigabytes."""
    real = planner.subprocess.run
    limited = lambda words, **more: real(["bash", "-c", 'ulimit -v 8000000; exec "$@"', "-", *words], **more)  # noqa: E731
    monkeypatch.setattr(planner.subprocess, "run", limited)
    found = planner.measure(plan("train_ultrafast_srcnn"), ["--device", "cpu", "--batch_size", "40000000"])
    assert "memory" in found["oom"].lower()


# --- the command ------------------------------------------------------------------------------------------------------
def test_the_guides_command(tmp_path):
    words = "--resolution 256,256,64 --batch-size 1 --channels 16,32,64 --gpu 3090 --hours 6 --images 100".split()
    words += ["--only", "--no-measure"]
    done = run([sys.executable, str(ROOT / "test_memory_usage.py"), *words, "--json", str(tmp_path / "table.json")])
    assert done.returncode == 0, done.stderr
    for text in (
        "predicted on fake tensors",
        "as given",
        "3090 (23.60, bfloat16): python train_autoencoder3d.py",
        "In 6 hours",
        "updates, yes",
    ):
        assert text in done.stdout, text
    table = json.loads((tmp_path / "table.json").read_text())
    row = table["rows"][0]
    about = row["cards"]["3090"]
    assert about["margin"] == pytest.approx(23.6 * GIB - about["total"]) and about["largest_batch"] > 1


@pytest.mark.parametrize(
    "words, text",
    [
        ("--recipe train_x", "it takes finetune_pretrained, train_autoencoder3d"),
        ("--gpu T5", "--gpu has 't5'; it takes P100, T4"),
        ("--channel 16,32,64", "did you mean --channels"),
        ("--target_size 30,30,30", "a side is a multiple of 4"),
    ],
)
def test_wrong_words_are_sentences(words, text):
    done = run([sys.executable, str(ROOT / "test_memory_usage.py"), *words.split()])
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("groups, transposed", [(1, False), (8, False), (2, True)])
def test_the_work_of_a_convolution_is_counted_with_its_groups(groups, transposed):
    """2 x images x positions x channels x channels of a group x taps: once forward, once for each gradient."""
    make = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv, x = make(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 10, 10, requires_grad=True)
    with planner.Live() as live:
        conv(x).sum().backward()
    once = 2 * 2 * 100 * 8 * 8 // groups * 9
    assert [f for f, _, _ in live.work if f] == [once, 2 * once]
