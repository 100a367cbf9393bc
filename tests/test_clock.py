"""Time: budgets, deadlines, session limits, the learning rate at the end. The clock is a fake that the updates turn."""

import json
import math
import time as real_time
import types

import pytest

import common
from common import Clock, RecipeError, Stopped, schedule


class FakeTime:
    """Stands in for the `time` module in common.py; `pass_(seconds)` turns it."""

    def __init__(self):
        self.now, self.idle = 1000.0, 1_790_000_000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + self.idle

    def pass_(self, seconds):
        self.now += seconds

    def __getattr__(self, name):
        return getattr(real_time, name)


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(common, "time", fake)
    monkeypatch.setattr(common, "HEARTBEAT", 1e9)  # the thread that writes the clock down only does so at start and end
    return fake


@pytest.fixture
def updates(srcnn, clock, monkeypatch):
    """Let each update take seconds(run) on the fake clock, each ending 3; returns the list of learning rates used."""
    rates, step, evaluate = [], srcnn.train_step, srcnn.evaluate
    state = types.SimpleNamespace(seconds=lambda run: 1.0, rates=rates, fail_at=None)

    def slow(parts, batch, cfg, run):
        losses = step(parts, batch, cfg, run)
        clock.pass_(state.seconds(run))
        rates.append(run.lr)
        if state.fail_at == run.step:
            raise KeyboardInterrupt  # as a kill would: nothing is saved
        return losses

    def slow_evaluation(model, val, cfg, run):
        clock.pass_(3.0)
        return evaluate(model, val, cfg, run)

    monkeypatch.setattr(srcnn, "train_step", slow)
    monkeypatch.setattr(srcnn, "evaluate", slow_evaluation)
    return state


def test_half_the_speed_at_40_percent_still_ends_annealed_and_inside(srcnn, config, clock, updates):
    updates.seconds = lambda run: 0.5 if run.progress < 0.4 else 1.0
    start = clock.now
    metrics = srcnn.train(config(num_steps=0, time_budget="4m"))
    assert 0.9 * 240 < clock.now - start <= 240
    assert updates.rates[-1] <= 0.01 * max(updates.rates) and max(updates.rates) == pytest.approx(0.003, rel=0.01)
    assert metrics["seconds"] == pytest.approx(clock.now - start, abs=1)


def test_a_slow_start_does_not_eat_the_warm_up(srcnn, config, clock, updates, monkeypatch):
    open_data = srcnn.open_data
    monkeypatch.setattr(srcnn, "open_data", lambda *a: (clock.pass_(60), open_data(*a))[1])
    start = clock.now
    srcnn.train(config(num_steps=0, time_budget="4m"))
    assert updates.rates[0] < 0.02 * max(updates.rates) and max(updates.rates) == pytest.approx(0.003, rel=0.01)
    assert updates.rates[-1] <= 0.01 * max(updates.rates) and 210 < clock.now - start <= 240


def test_a_longer_budget_prolongs_a_finished_run(srcnn, config, clock, updates, monkeypatch):
    """The warm-up is not begun again, nor does the rate stay near 0 until the old start's share of the new budget."""
    open_data = srcnn.open_data
    monkeypatch.setattr(srcnn, "open_data", lambda *a: (clock.pass_(10), open_data(*a))[1])
    first = srcnn.train(config(num_steps=0, time_budget="1m"))
    before = len(updates.rates)
    second = srcnn.train(config(num_steps=0, time_budget="5m"))
    assert second["steps"] > 3 * first["steps"] and 250 < second["seconds"] <= 300
    assert max(updates.rates[before : before + 40]) > 0.5 * 0.003 and updates.rates[-1] <= 0.01 * 0.003


def test_steps_limit_a_timed_run_only_where_given(srcnn, config, clock, updates):
    assert srcnn.train(config(num_steps=5, time_budget="10m"))["steps"] == 5


def test_restarts_count_the_time_used(srcnn, config, clock, updates):
    cfg = {"num_steps": 0, "time_budget": "3m", "save_minutes": 0.0}
    updates.fail_at = 20
    start = clock.now
    with pytest.raises(KeyboardInterrupt):
        srcnn.train(config(**cfg))
    first, updates.fail_at = clock.now - start, None
    before = len(updates.rates)
    clock.pass_(10_000)  # nobody pays for the time between two sessions
    start = clock.now
    srcnn.train(config(**cfg))
    assert 0.85 * 180 < first + clock.now - start <= 180
    assert updates.rates[before + 1] < max(updates.rates[:before])  # further down the same curve, not up again
    assert updates.rates[-1] <= 0.01 * max(updates.rates)


def test_a_deadline_counts_idle_gaps(srcnn, config, clock, updates):
    end = clock.time() + 400
    cfg = {"num_steps": 0, "save_minutes": 0.0, "deadline": real_time.strftime("%Y-%m-%d %H:%M:%S", real_time.localtime(end))}
    updates.fail_at = 20
    with pytest.raises(KeyboardInterrupt):
        srcnn.train(config(**cfg))
    updates.fail_at, before = None, len(updates.rates)
    clock.idle += 200
    metrics = srcnn.train(config(**cfg))
    assert end - 30 < clock.time() <= end + 1
    assert metrics["steps"] < 250 and updates.rates[before + 1] < 0.6 * 0.003
    assert updates.rates[-1] <= 0.01 * max(updates.rates)


def test_the_earlier_of_budget_and_deadline_wins(clock):
    at = Clock(budget=100, deadline=clock.time() + 50)
    clock.pass_(25)
    assert at.progress() == pytest.approx(0.5) and at.left() == pytest.approx(25)
    assert Clock(budget=40, deadline=clock.time() + 50).left() == pytest.approx(40)


def test_a_used_up_budget_does_no_update_and_still_exports(srcnn, config, clock, updates, monkeypatch, tmp_path):
    exported = []
    monkeypatch.setattr(srcnn, "export", lambda model, folder: exported.append(folder))
    metrics = srcnn.train(config(num_steps=0, time_budget="2s"))
    assert metrics["steps"] == 0 and math.isfinite(metrics["psnr"]) and len(exported) == 2
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 0


def test_a_passed_deadline_is_an_error(srcnn, config, clock):
    with pytest.raises(RecipeError, match="it has passed"):
        srcnn.train(config(deadline="2020-01-01 00:00"))


def test_a_session_limit_stops_and_the_same_command_continues(srcnn, config, clock, updates):
    start = clock.now
    with pytest.raises(Stopped, match="session limit.*To continue: python ") as e:
        srcnn.train(config(num_steps=100, session_limit="1m"))
    assert e.value.code == 0 and 40 < clock.now - start <= 60
    done = 0
    for _ in range(3):
        try:
            done = srcnn.train(config(num_steps=100, session_limit="1m"))["steps"]
        except Stopped:
            continue
    assert done == 100


def test_patience_anneals_over_a_last_tenth(srcnn, config, clock, updates, monkeypatch, capsys):
    worse = iter(range(1000))
    monkeypatch.setattr(srcnn, "evaluate", lambda *a: {"psnr": 30.0 - next(worse), "psnr_bicubic": 30.0, "ssim": 1.0})
    metrics = srcnn.train(config(num_steps=200, patience=4))
    assert "anneals over a last tenth" in capsys.readouterr().out
    assert 60 < metrics["steps"] <= 67  # evaluations at 5, 10, 20 and 30 %: sixty updates, then a tenth of those
    assert updates.rates[-1] < 0.25 * updates.rates[59]


def test_schedule_shapes():
    for shape in ("cosine", "linear", "onecycle"):
        values = [schedule(p / 1000, shape, 0.05, 0.01) for p in range(1001)]
        peak = values.index(max(values))
        assert max(values) == pytest.approx(1, abs=0.01) and values[-1] == pytest.approx(0.01)
        assert values[0] < 0.05 and all(a <= b + 1e-9 for a, b in zip(values[:peak], values[1 : peak + 1]))
        assert all(a >= b - 1e-9 for a, b in zip(values[peak:], values[peak + 1 :]))
    assert schedule(0.5, "constant") == 1.0 and schedule(7.0) == pytest.approx(0)


def test_clock_text():
    assert [common.clock_text(s) for s in (-3, 45, 200, 840, 11100)] == ["0s", "45s", "3m20s", "14m", "3h05m"]
