"""One optimizer update: accumulation, memory that runs out, numbers that are not finite, several processes."""

import math

import pytest
import torch
from conftest import checkpoint, command, run, same, tensors_in

import common
from common import RecipeError, Run


@pytest.fixture
def step(srcnn, config):
    """step(cfg changes, micro=...) -> (parts, losses) after one update of a fixed batch of eight."""

    def make(micro=8, change=lambda recipe, run: None):
        torch.manual_seed(0)
        cfg = config(batch_size=8)
        run = Run(cfg)
        run.clock, run.micro = common.Clock(), micro
        parts = srcnn.build(cfg, run)
        batch = srcnn.example_batch(cfg, run)
        change(srcnn, run)
        return parts, srcnn.train_step(parts, batch, cfg, run), run

    return make


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7])
def test_accumulation_equals_the_full_batch(step, micro):
    whole, losses, _ = step()
    pieces, again, _ = step(micro)  # 3, 5 and 7 leave a ragged last slice
    for a, b in zip(whole.model.parameters(), pieces.model.parameters()):
        scale = a.grad.abs().max()
        assert scale > 0 and (a.grad - b.grad).abs().max() < 1e-5 * scale
    assert losses["loss"].item() == pytest.approx(again["loss"].item(), rel=1e-5)
    assert losses["norm"].item() == pytest.approx(again["norm"].item(), rel=1e-5)


def out_of_memory_above(monkeypatch, srcnn, limit, kind=torch.OutOfMemoryError):
    core = srcnn.SRCNN.core

    def full(model, x):
        if model.training and x.shape[0] > limit:
            raise kind("CUDA out of memory. Tried to allocate 20.00 GiB" if kind is not MemoryError else "")
        return core(model, x)

    monkeypatch.setattr(srcnn.SRCNN, "core", full)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_gives_the_bits_of_the_smaller_micro_batch(srcnn, config, tmp_path, monkeypatch, capsys, kind):
    small = config(batch_size=2, accumulate=4, num_steps=3, out_dir=str(tmp_path / "small"))
    srcnn.train(small)
    out_of_memory_above(monkeypatch, srcnn, 2, kind)
    srcnn.train(config(batch_size=8, num_steps=3))
    assert "--batch_size 2 --accumulate 4" in capsys.readouterr().out
    same(checkpoint(tmp_path / "run")["parts"], checkpoint(tmp_path / "small")["parts"])


def test_one_sample_that_does_not_fit_is_a_sentence(srcnn, config, monkeypatch):
    out_of_memory_above(monkeypatch, srcnn, 0)
    with pytest.raises(RecipeError, match="with one sample; lower --target_size"):
        srcnn.train(config())


def test_other_runtime_errors_are_not_taken_for_memory(srcnn, config, monkeypatch):
    monkeypatch.setattr(srcnn.F, "mse_loss", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        srcnn.train(config())


def poison(value):
    """A change for `step` that makes the loss of every update `value`."""

    def change(srcnn, run):
        update = run.update
        run.update = lambda fn, *a, **k: update(lambda part: fn(part) * value, *a, **k)

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_batch_changes_nothing(step, srcnn, config, value):
    fresh = srcnn.build(config(batch_size=8), Run(config(batch_size=8)))
    parts, losses, run = step(change=poison(value))
    assert not math.isfinite(losses["loss"]) and run.worse
    for part in ("model", "ema"):
        same(getattr(parts, part).state_dict(), getattr(fresh, part).state_dict())
    same(parts.opt.state_dict()["state"], fresh.opt.state_dict()["state"])
    good, _, run = step()
    assert not run.worse and good.ema.updates == 1 and good.opt.state_dict()["state"][0]["step"] == 1


def test_a_scaler_that_searches_its_scale_is_not_counted(step):
    def change(srcnn, run):
        poison(1000.0)(srcnn, run)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    parts, losses, run = step(change=change)
    assert math.isfinite(losses["loss"]) and not math.isfinite(losses["norm"])
    assert not run.worse and run.scaler.get_scale() == 2.0**126


def nan_updates(monkeypatch, srcnn, when):
    """Make the loss NaN in updates for which when(run.step, run.rate_scale) holds."""
    update = Run.update

    def poisoned(run, fn, *a, **k):
        bad = when(run.step, run.rate_scale)
        return update(run, lambda part: fn(part) * (math.nan if bad else 1.0), *a, **k)

    monkeypatch.setattr(Run, "update", poisoned)


def test_a_row_of_bad_updates_goes_back_once_at_a_lower_rate(srcnn, config, monkeypatch, capsys):
    nan_updates(monkeypatch, srcnn, lambda k, scale: k >= 3 and scale == 1)
    metrics = srcnn.train(config(num_steps=12, save_minutes=1000.0))
    out = capsys.readouterr().out
    assert "back to update 0 at 0.3 of the rate" in out and ".png" in out
    assert metrics["steps"] == 12 and math.isfinite(metrics["psnr"])


def test_bad_updates_for_good_stop_and_name_the_files(srcnn, config, monkeypatch, tmp_path):
    nan_updates(monkeypatch, srcnn, lambda k, scale: k >= 3)
    with pytest.raises(RecipeError, match=r"not finite in 5 updates in a row, at a lower rate too.*\d\.png"):
        srcnn.train(config(num_steps=12))
    for tensor in tensors_in(checkpoint(tmp_path / "run")["parts"]):
        assert torch.isfinite(tensor.float()).all()


def test_single_bad_updates_are_skipped(srcnn, config, monkeypatch, capsys):
    nan_updates(monkeypatch, srcnn, lambda k, scale: k in (2, 3, 6))
    metrics = srcnn.train(config())
    assert metrics["steps"] == 9 and math.isfinite(metrics["psnr"]) and "back to update" not in capsys.readouterr().out


def test_draws_are_made_for_the_whole_update_and_sliced(config, monkeypatch):
    whole = Run(config(batch_size=8))
    whole.generator.manual_seed(5)
    expected = whole.draw("randn", (8, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        half = Run(config(batch_size=4))
        half.generator.manual_seed(5)
        parts.append(half.draw("randn", (4, 2)))
    same(torch.cat(parts), expected)


@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("SOAP", marks=pytest.mark.slow)])
def test_two_processes_give_the_weights_of_one(srcnn, config, images, tmp_path, monkeypatch, optimizer):
    """With SOAP, the second process alone is asked to stop in update 8: both leave, and the same command continues."""
    if optimizer == "SGD":  # adds up nothing but the gradients
        monkeypatch.setattr(srcnn, "SOAP", lambda params, lr: torch.optim.SGD(params, 1.0))
    srcnn.train(config(batch_size=4, num_steps=12, learning_rate=0.001, out_dir=str(tmp_path / "one")))
    words = ["--data_dir", images, "--out_dir", tmp_path / "two", "--target_size", 24, "--batch_size", 2, "--num_steps", 12]
    words += ["--no-use_amp", "--device", "cpu", "--learning_rate", 0.001]

    def torchrun(**faults):
        line = command(*words, drive={"optimizer": optimizer, **faults})
        return run([line[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *line[1:]])

    if optimizer == "SOAP":
        stopped = torchrun(stop_at=7, rank=1)
        assert stopped.returncode != 0 and "Stopped (another process) after update 8, which is saved" in stopped.stderr
        assert "torchrun --nproc_per_node=2" in stopped.stderr and checkpoint(tmp_path / "two")["step"] == 8
    done = torchrun()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 samples per update = 2 x 1 x 2 processes" in done.stdout and done.stdout.count("Before:") == 1
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["step"] == two["step"] == 12
    for a, b in zip(tensors_in(one["parts"]["model"]), tensors_in(two["parts"]["model"])):
        assert (a - b).abs().max() < 1e-6
