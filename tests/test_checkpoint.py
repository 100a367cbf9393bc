"""Nothing is lost: continuing bit for bit, damaged files, folders, second runs, signals; test_faults.py has kills and disks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, checkpoint, command, environment, run, same, stop_after

import common
from common import RecipeError, Stopped, Stream, load_tensors, mix, save_tensors, uniforms, write_aside


def compare_runs(a, b):
    """Assert that two run folders end in the same bits: weights, EMA, optimizer, and the best so far."""
    x, y = checkpoint(a), checkpoint(b)
    same(x["parts"], y["parts"])
    assert (x["step"], x["best"], x["progress"]) == (y["step"], y["best"], y["progress"])
    same(checkpoint(a, "best.pt")["model"], checkpoint(b, "best.pt")["model"])


# --- continuing -------------------------------------------------------------------------------------------------------
def test_continuing_in_a_new_process_is_bit_for_bit(srcnn, config, images, tmp_path, monkeypatch):
    """Stops at the start, in an epoch and at its end (six updates are one), with 0 and 2 workers before and after."""
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    cases = [(1, 0, 0), (4, 0, 2), (6, 2, 2), (4, 2, 0)]
    for k, workers, _ in cases:
        with monkeypatch.context() as patch:
            stop_after(patch, k)
            with pytest.raises(Stopped, match=f"after update {k}, which is saved"):
                srcnn.train(config(out_dir=str(tmp_path / f"{k}-{workers}"), num_workers=workers))

    def continued(case):
        k, workers, later = case
        words = ["--data_dir", images, "--out_dir", tmp_path / f"{k}-{workers}", *TINY]
        done = run(command(*words, "--num_workers", later, drive={}))
        assert done.returncode == 0 and f"Continuing after update {k}," in done.stdout, done.stderr
        compare_runs(tmp_path / f"{k}-{workers}", tmp_path / "whole")
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(continued, cases))


@pytest.mark.parametrize("k", [1, 2, 5, 6, 7, 8])
def test_continuing_from_any_update_is_bit_for_bit(srcnn, config, tmp_path, monkeypatch, k):
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, k)
        with pytest.raises(Stopped):
            srcnn.train(config())
    srcnn.train(config())
    compare_runs(tmp_path / "run", tmp_path / "whole")


def test_what_is_random_in_an_update_depends_on_seed_and_update_alone(srcnn, config, monkeypatch, tmp_path):
    step, drawn = srcnn.train_step, {}

    def draws(parts, batch, cfg, run):
        new = torch.rand(2).tolist() + run.draw("randn", (3,)).tolist()
        assert drawn.setdefault(run.step, new) == new
        return step(parts, batch, cfg, run)

    monkeypatch.setattr(srcnn, "train_step", draws)
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            srcnn.train(config())
    torch.rand(7)
    srcnn.train(config())
    assert len(drawn) == 9 and len({tuple(v) for v in drawn.values()}) == 9


def test_order_and_augmentation_are_pure_functions():
    whole = [next(it) for it in [iter(Stream(7, 4, 3))] for _ in range(6)]
    later = iter(Stream(7, 4, 3, start=4))
    assert [next(later), next(later)] == whole[4:]
    halves = [iter(Stream(7, 4, 3, 0, rank, 2)) for rank in (0, 1)]
    assert [next(halves[0]) + next(halves[1]) for _ in range(6)] == whole
    flat = [key for batch in whole for key in batch]
    for epoch in (0, 1, 2):
        assert sorted(i for e, i in flat if e == epoch) == list(range(7))
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]
    draws = uniforms(1, 2, range(5000), 3)
    assert (uniforms(1, 2, [77], 3) == draws[77]).all() and (uniforms(1, 3, [77], 3) != draws[77]).all()
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert abs(draws[:, 0] @ draws[:, 1] / 5000 - 0.25) < 0.01  # the columns are not correlated
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900


def test_a_finished_run_says_so_and_more_steps_continue(srcnn, config, capsys, tmp_path):
    first = srcnn.train(config())
    stamp = (tmp_path / "run" / "last.pt").stat().st_mtime_ns
    assert srcnn.train(config()) == first
    assert "Finished before" in capsys.readouterr().out and (tmp_path / "run" / "last.pt").stat().st_mtime_ns == stamp
    assert srcnn.train(config(num_steps=11))["steps"] == 11


def test_the_run_folder_is_complete(srcnn, config, tmp_path):
    metrics = srcnn.train(config())
    names = {p.name for p in (tmp_path / "run").iterdir()}
    wanted = {"settings.json", "last.pt", "previous.pt", "best.pt", "log.jsonl", "metrics.json", "data.png", "curves.png"}
    assert wanted | {"tensorboard", "code", "sample-000009.png"} <= names
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert {"psnr", "psnr_bicubic", "ssim", "steps", "seconds", "peak_memory_gib"} == set(metrics)
    kept = {p.name.rsplit("-", 1)[0] for p in (tmp_path / "run" / "code").iterdir()}
    assert kept == {"common", "train_ultrafast_srcnn", "settings.json"}
    assert not [n for n in names if n.endswith(".part")]


# --- kills and damage -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "shifted"])
def test_a_damaged_newest_file_falls_back_to_the_one_before(srcnn, config, tmp_path, monkeypatch, capsys, damage):
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            srcnn.train(config(save_minutes=0.0))
    last = tmp_path / "run" / "last.pt"
    data = bytearray(last.read_bytes())
    assert checkpoint(tmp_path / "run", "previous.pt")["step"] < 5
    data[len(data) // 2] ^= 16
    kinds = {
        "truncated": data[: len(data) // 2],
        "flipped": data,
        "empty": b"",
        "text": b"not a checkpoint",
        "shifted": data[1:],
    }
    last.write_bytes(kinds[damage])
    srcnn.train(config())
    assert "last.pt is damaged" in capsys.readouterr().out and (tmp_path / "run" / "last.pt.damaged").exists()
    compare_runs(tmp_path / "run", tmp_path / "whole")


def test_two_damaged_files_are_a_sentence_and_nothing_is_deleted(srcnn, config, tmp_path):
    srcnn.train(config())
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(RecipeError, match="No checkpoint .* can be read. --fresh"):
        srcnn.train(config())
    assert (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run" / "previous.pt").exists()
    with pytest.raises(RecipeError, match="No checkpoint .* can be read. --fresh"):
        srcnn.train(config())  # and a second try does not start over either


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"parts": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(Exception, match="[Uu]nsupported|[Ww]eights"):
        load_tensors(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    write_aside(tmp_path / "a", lambda f: f.write(b"old"))

    def breaks(f):
        f.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_aside(tmp_path / "a", breaks)
    monkeypatch.setattr(os, "fsync", lambda f: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_aside(tmp_path / "a", lambda f: f.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_file_that_reads_back_wrong_never_takes_its_name(tmp_path, monkeypatch):
    save_tensors(tmp_path / "a.pt", {"x": torch.arange(1000)})
    torch_save = torch.save

    def lies(state, f):  # a drive that says yes and keeps something else
        torch_save(state, f)
        f.seek(700)
        f.write(b"\xff" * 64)
        f.seek(0, 2)

    monkeypatch.setattr(torch, "save", lies)
    with pytest.raises(Exception, match="damaged|Bad|CRC|central"):
        save_tensors(tmp_path / "a.pt", {"x": torch.zeros(1000)})
    assert torch.equal(load_tensors(tmp_path / "a.pt")["x"], torch.arange(1000))


# --- disks and folders ------------------------------------------------------------------------------------------------
def test_too_little_space_is_told_before_training(srcnn, config, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RecipeError, match="keeps three checkpoints of .* MB free. Free some space"):
        srcnn.train(config())


def test_a_torn_line_in_the_log_ends_nothing(srcnn, config, tmp_path):
    srcnn.train(config())
    with open(tmp_path / "run" / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lo{"step": 4, "loss": 1.0}\n')
    assert srcnn.train(config(num_steps=10))["steps"] == 10


def test_a_checkpoint_of_another_network_is_a_sentence(srcnn, config, monkeypatch):
    srcnn.train(config(num_steps=2))
    make = srcnn.make_model
    monkeypatch.setattr(srcnn, "make_model", lambda cfg: srcnn.ESPCN(3))
    with pytest.raises(RecipeError, match="does not fit this script .* undo the change"):
        srcnn.train(config(num_steps=4))
    monkeypatch.setattr(srcnn, "make_model", make)
    assert srcnn.train(config(num_steps=4))["steps"] == 4


def test_a_bug_in_a_worker_ends_the_process(images, tmp_path):
    """Workers ignore signals; they must still end when the run does, and a user's own bug keeps its traceback."""
    words = command("--data_dir", images, "--out_dir", tmp_path / "run", *TINY, "--num_workers", 2, drive={"worker_bug": True})
    done = run(words, timeout=60)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_continue_from_a_read_only_folder(srcnn, config, tmp_path, monkeypatch):
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            srcnn.train(config(out_dir=str(tmp_path / "earlier")))
    source = tmp_path / "earlier"
    before = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    opened = []
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda f, mode="r", *a, **k: (opened.append((str(f), mode)), real_open(f, mode, *a, **k))[1]
    )
    srcnn.train(config(continue_from=str(source)))
    assert not [f for f, mode in opened if str(source) in f and mode != "rb" and mode != "r"]  # root may write anywhere
    assert {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()} == before
    compare_runs(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(RecipeError, match="holds no checkpoint"):
        srcnn.train(config(continue_from=str(tmp_path / "nowhere"), out_dir=str(tmp_path / "new")))


def test_fresh_renames_the_old_folder(srcnn, config, tmp_path, capsys):
    srcnn.train(config())
    old = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file() and p.name != "lock"}
    metrics = srcnn.train(config(fresh=True, num_steps=2))
    assert metrics["steps"] == 2 and "run-old1" in capsys.readouterr().out
    for name, data in old.items():
        assert (tmp_path / "run-old1" / name).read_bytes() == data
    srcnn.train(config(fresh=True, num_steps=2))
    assert (tmp_path / "run-old2").is_dir()


def test_a_folder_of_someone_elses_is_not_touched(srcnn, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"my thesis")
    for change in ({}, {"fresh": True}):
        with pytest.raises(RecipeError, match="nothing was touched. Choose another --out_dir"):
            srcnn.train(config(**change))
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and (tmp_path / "run" / "last.pt").read_bytes() == b"my thesis"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["last.pt"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(RecipeError, match="nothing was touched"):
        srcnn.train(config(out_dir=str(tmp_path / "file")))


def test_a_second_run_in_the_same_folder_is_refused(srcnn, config, images, tmp_path):
    words = ["--data_dir", images, "--out_dir", tmp_path / "run", *TINY, "--num_steps", 100000]
    first = subprocess.Popen(
        command(*words, drive={}), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any(line.startswith("Before:") for line in first.stdout)
        for change in ({}, {"fresh": True}):
            with pytest.raises(RecipeError, match=f"in use by process {first.pid}"):
                srcnn.train(config(num_steps=100000, **change))
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130 and "Traceback" not in errors
    assert srcnn.train(config(num_steps=checkpoint(tmp_path / "run")["step"]))["steps"] > 0  # the lock is free again


# --- stopping ---------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_signals_save_and_name_the_command_that_continues(images, tmp_path, name, code):
    words = ["--data_dir", images, "--out_dir", tmp_path / "run", *TINY, "--num_steps", 100000]
    workers = ["--num_workers", "2"] if name == "SIGINT" else []  # a terminal's Ctrl-C reaches the workers too
    process = subprocess.Popen(command(*words, *workers, drive={}), env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    try:
        assert any(line.startswith("step 1") for line in process.stdout)
        os.killpg(process.pid, getattr(signal, name)) if name == "SIGINT" else process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in errors, errors
    assert errors.count("this update ends") == 1  # the workers keep quiet
    step = int(re.search(rf"Stopped \({name}\) after update (\d+), which is saved", errors)[1])
    assert checkpoint(tmp_path / "run")["step"] == step > 0
    told = errors.rsplit("To continue: python ", 1)[1]
    assert str(tmp_path / "run") in told and "--num_steps 100000" in told


def test_a_worker_that_has_just_been_forked_keeps_quiet(config, capfd):
    run = common.Run(config())
    for mine in (False, True):
        run.process = os.getpid() + (not mine)
        run._on_signal(signal.SIGTERM, None)
        assert ("this update ends" in capfd.readouterr().err) == mine


def test_a_second_ctrl_c_leaves_at_once(config, srcnn, monkeypatch):
    step, seen = srcnn.train_step, []

    def twice(parts, batch, cfg, run):
        losses = step(parts, batch, cfg, run)
        if run.step == 3:
            seen.append(run.step)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            seen.append("late")
        return losses

    monkeypatch.setattr(srcnn, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        srcnn.train(config())
    assert seen == [3]


def test_a_stop_is_seen_in_evaluation_and_in_caching(srcnn, config, tmp_path, monkeypatch):
    load_pair = srcnn.load_pair
    monkeypatch.setattr(
        srcnn, "load_pair", lambda path, **more: (os.kill(os.getpid(), signal.SIGTERM), load_pair(path, **more))[1]
    )
    with pytest.raises(Stopped, match="before the first update"):
        srcnn.train(config())
    monkeypatch.setattr(srcnn, "load_pair", load_pair)
    enlarge, calls = srcnn.enlarge, []

    def slow(model, low, *more):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return enlarge(model, low, *more)

    monkeypatch.setattr(srcnn, "enlarge", slow)
    with pytest.raises(Stopped) as e:
        srcnn.train(config())
    step = int(re.search(r"after update (\d+)", str(e.value))[1])
    assert checkpoint(tmp_path / "run")["step"] == step


@pytest.mark.parametrize("step", [3, 5, 9])
def test_an_evaluation_that_a_stop_cut_off_is_made_up(srcnn, config, tmp_path, monkeypatch, step):
    """Nine updates evaluate after every one: what is best and how patient the run still is must not depend on the stop."""
    srcnn.train(config(out_dir=str(tmp_path / "whole"), patience=50))
    evaluate = srcnn.evaluate

    def cut_off(model, val, cfg, run):
        if run.step == step and not run.rehearsing or (step == 9 and run.step == 9):
            run.asked = "SIGTERM"
            run.check()
        return evaluate(model, val, cfg, run)

    with monkeypatch.context() as patch:
        patch.setattr(srcnn, "evaluate", cut_off)
        with pytest.raises(Stopped, match=f"after update {step}, which is saved"):
            srcnn.train(config(patience=50))
    srcnn.train(config(patience=50))
    compare_runs(tmp_path / "run", tmp_path / "whole")
    for name in ("run", "whole"):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        judged = [row["step"] for row in map(json.loads, lines) if "metric" in row]
        assert judged == list(range(10)) and checkpoint(tmp_path / name)["judged"] == 9


def test_what_a_run_changes_in_the_process_is_put_back(srcnn, config):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    flags = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    threads = threading.active_count()
    srcnn.train(config(num_steps=1))
    with pytest.raises(RecipeError):
        srcnn.train(config(num_steps=2, seed=9))
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert flags == (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())
    assert threading.active_count() <= threads + 1  # TensorBoard's writer ends on its own


def test_the_rehearsal_finds_a_sampler_bug_before_update_1(srcnn, config, monkeypatch):
    steps = []
    step = srcnn.train_step
    monkeypatch.setattr(srcnn, "train_step", lambda *a: (steps.append(1), step(*a))[1])
    monkeypatch.setattr(
        srcnn, "picture", lambda *a, **k: 1 / 0 if len(a) > 1 and a[1][0] == "bicubic" else common.picture(*a, **k)
    )
    with pytest.raises(ZeroDivisionError):
        srcnn.train(config())
    assert steps == []


def test_a_bug_in_hour_19_loses_nothing(srcnn, config, tmp_path, monkeypatch, capsys):
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        evaluate = srcnn.evaluate
        patch.setattr(srcnn, "evaluate", lambda m, v, c, run: 1 / 0 if run.step == 7 else evaluate(m, v, c, run))
        with pytest.raises(ZeroDivisionError):
            srcnn.train(config())
    assert "broke off after update 7, which is saved" in capsys.readouterr().out
    srcnn.train(config())
    same(checkpoint(tmp_path / "run")["parts"], checkpoint(tmp_path / "whole")["parts"])


# --- a second folder --------------------------------------------------------------------------------------------------
def test_each_save_is_copied_and_a_lost_folder_comes_back_from_the_copy(srcnn, config, tmp_path, monkeypatch, capsys):
    mirror = tmp_path / "drive"
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            srcnn.train(config(mirror_dir=str(mirror)))
    assert checkpoint(mirror)["step"] == 4
    shutil.rmtree(tmp_path / "run")
    srcnn.train(config(mirror_dir=str(mirror)))
    assert f"Continuing the run of {mirror}" in capsys.readouterr().out
    compare_runs(tmp_path / "run", tmp_path / "whole")
    compare_runs(mirror, tmp_path / "whole")
    names = {p.name for p in mirror.iterdir()}
    assert {"settings.json", "metrics.json", "previous.pt", "curves.png", "data.png", "code"} <= names
    assert not names & {"lock", "next.pt", "tensorboard"} and not [n for n in names if n.endswith(".part")]
    old = (mirror / "last.pt").read_bytes()
    srcnn.train(config(mirror_dir=str(mirror), fresh=True, num_steps=2))
    assert (tmp_path / "drive-old1" / "last.pt").read_bytes() == old and checkpoint(mirror)["step"] == 2


def test_a_second_folder_that_is_not_this_runs_is_not_touched(srcnn, config, tmp_path, monkeypatch, capsys):
    strangers, other, gone = tmp_path / "theirs", tmp_path / "other", tmp_path / "no drive" / "copy"
    strangers.mkdir()
    (strangers / "last.pt").write_bytes(b"my thesis")
    srcnn.train(config(out_dir=str(tmp_path / "first"), mirror_dir=str(other), num_steps=1))
    cases = {strangers: "holds another run or other files", gone: "No such file.* Is the drive mounted. Nothing was begun"}
    cases |= {tmp_path / "run" / "copy": "lie in each other", tmp_path: "lie in each other"}
    for place, why in cases.items():
        with pytest.raises(RecipeError, match=why):
            srcnn.train(config(mirror_dir=str(place)))
    assert (strangers / "last.pt").read_bytes() == b"my thesis" and len(list(strangers.iterdir())) == 1
    srcnn.train(config(num_steps=1))
    before = (other / "last.pt").read_bytes()
    with pytest.raises(RecipeError, match="holds another run or other files; nothing was touched. Choose another --mirror_dir"):
        srcnn.train(config(mirror_dir=str(other), num_steps=2))
    assert (other / "last.pt").read_bytes() == before
    capsys.readouterr()
    assert srcnn.train(config(mirror_dir=str(gone), num_steps=2))["steps"] == 2  # a run with a checkpoint of its own goes on
    assert "No such file or directory. Training goes on and tries again" in capsys.readouterr().out and not gone.parent.exists()


def test_a_second_folder_that_is_further_on_is_not_overwritten(srcnn, config, tmp_path):
    mirror = tmp_path / "drive"
    srcnn.train(config(mirror_dir=str(mirror), num_steps=1))
    state = json.loads((mirror / "clock.json").read_text())
    (mirror / "clock.json").write_text(json.dumps(state | {"used": state["used"] + 600}))  # another machine went on from it
    before = (mirror / "last.pt").read_bytes()
    with pytest.raises(RecipeError, match="holds this run further on, 10m of training against .* an empty --out_dir"):
        srcnn.train(config(mirror_dir=str(mirror), num_steps=2))
    assert (mirror / "last.pt").read_bytes() == before
    assert srcnn.train(config(mirror_dir=str(mirror), out_dir=str(tmp_path / "new"), num_steps=2))["steps"] == 2


def test_a_copy_that_reads_back_wrong_never_takes_its_name(tmp_path, monkeypatch, capsys):
    source, target, fsync = tmp_path / "run", tmp_path / "drive", os.fsync
    source.mkdir()
    for content in (b"old", b"new and longer"):
        (source / "last.pt").write_bytes(content)
        mirror = common.Mirror(source, target, None)
        target.mkdir(exist_ok=True)
        mirror.copied = {common.Path("last.pt"): None}  # the target is known as ours
        if content != b"old":
            monkeypatch.setattr(os, "fsync", lambda f: (os.pwrite(f, b"x", 2), fsync(f)))  # the drive changes a byte
        mirror.start()
        mirror.wait(10)
    assert (target / "last.pt").read_bytes() == b"old" and "did not read back as it was written" in capsys.readouterr().out
    assert [p.name for p in target.iterdir()] == ["last.pt"]


def test_damaged_settings_are_taken_from_their_copy(srcnn, config, tmp_path):
    srcnn.train(config(num_steps=2))
    for damage in (b"", b"\xff\x00 no json", b"[1, 2]"):
        (tmp_path / "run" / "settings.json").write_bytes(damage)
        with pytest.raises(RecipeError, match="seed was 0 in .* and is 5 now"):
            srcnn.train(config(num_steps=3, seed=5))
    assert srcnn.train(config(num_steps=3))["steps"] == 3
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]["num_steps"] == 3


def test_the_best_weights_are_written_later_where_the_disk_was_full(srcnn, config, tmp_path, monkeypatch):
    write, evaluate, failed = common.write_aside, srcnn.evaluate, []

    def full(path, *args):
        if path.name == "best.pt" and len(failed) < 2 and (tmp_path / "run" / "last.pt").exists():
            failed.append(path)
            raise OSError(28, "No space left on device")
        write(path, *args)

    def rated(model, val, cfg, run):  # update 3 is the best
        return evaluate(model, val, cfg, run) | {"psnr": 99.0 if run.step == 3 else run.step}

    monkeypatch.setattr(common, "write_aside", full)
    monkeypatch.setattr(srcnn, "evaluate", rated)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        patch.setattr(srcnn, "show", lambda *a: None)
        with pytest.raises(Stopped):  # at the end of update 3
            srcnn.train(config(save_minutes=0.0))
    assert len(failed) == 2
    srcnn.train(config(save_minutes=0.0))
    kept, end = checkpoint(tmp_path / "run", "best.pt"), checkpoint(tmp_path / "run")
    assert kept["step"] == end["best"]["step"] == 3 and kept["psnr"] == 99


@pytest.mark.parametrize("damage", ["code", "flipped", "list", "other", "none"])
def test_weights_that_cannot_be_used_are_a_sentence(srcnn, config, tmp_path, damage):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    srcnn.train(config(num_steps=1))
    best = tmp_path / "run" / "best.pt"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "none":
        best.unlink()
    elif damage == "flipped":
        best.write_bytes(data)
    else:
        torch.save({"code": Bomb(), "list": [1, 2], "other": {"model": {"x": torch.ones(2)}}}[damage], best)
    with pytest.raises(
        RecipeError, match="holds no (network of this run|trained model of ultrafast_srcnn: no model.pt or best.pt)"
    ):
        srcnn.load(tmp_path / "run")
    assert not (tmp_path / "ran").exists()


def test_a_second_folder_is_found_again_beside_continue_from(srcnn, config, tmp_path, monkeypatch):
    """Session 1 ran elsewhere, session 2 went on from it and copied to the drive, its disk is lost: session 3 is session 2's
    command again."""
    first, mirror = tmp_path / "first", tmp_path / "drive"
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    for k, more in ((3, {"out_dir": str(first)}), (6, {"continue_from": str(first), "mirror_dir": str(mirror)})):
        with monkeypatch.context() as patch:
            stop_after(patch, k)
            with pytest.raises(Stopped, match=f"after update {k}"):
                srcnn.train(config(**more))
    for source in (first, mirror):  # the copy of each clock: the drive is further on
        assert common.read_clock(source)["used"] > 0
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped, match="after update 7"):  # one more, not four
            srcnn.train(config(continue_from=str(first), mirror_dir=str(mirror)))
    srcnn.train(config(continue_from=str(first), mirror_dir=str(mirror)))
    compare_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_without_a_name_gets_one_before_it_is_copied(srcnn, config, tmp_path, capsys):
    """Runs of earlier versions have none; other people's files are not overwritten for that."""
    srcnn.train(config(num_steps=1))
    for place in (tmp_path / "run", tmp_path / "run" / "code"):
        about = json.loads((place / "settings.json").read_text())
        del about["run"]
        (place / "settings.json").write_text(json.dumps(about))
    strangers = tmp_path / "theirs"
    strangers.mkdir()
    (strangers / "best.pt").write_bytes(b"my thesis")
    with pytest.raises(RecipeError, match="holds another run or other files"):
        srcnn.train(config(num_steps=2, mirror_dir=str(strangers)))
    assert (strangers / "best.pt").read_bytes() == b"my thesis"
    srcnn.train(config(num_steps=2, mirror_dir=str(tmp_path / "drive"), save_minutes=0.0))
    assert checkpoint(tmp_path / "drive")["step"] == 2 and "No copy" not in capsys.readouterr().out


def test_a_second_folder_that_was_half_copied_is_still_this_runs(srcnn, config, tmp_path):
    mirror = tmp_path / "drive"
    srcnn.train(config(num_steps=1, mirror_dir=str(mirror)))
    for path in list(mirror.iterdir()):
        if path.name not in ("settings.json", "data.png"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "run")
    assert srcnn.train(config(num_steps=2, mirror_dir=str(mirror)))["steps"] == checkpoint(mirror)["step"] == 2
    (mirror / "settings.json").write_bytes(b"damaged")  # its copy in code/ is whole
    shutil.rmtree(tmp_path / "run")
    assert srcnn.train(config(num_steps=3, mirror_dir=str(mirror)))["steps"] == checkpoint(mirror)["step"] == 3


def test_a_damaged_newest_file_is_taken_from_the_second_folder(srcnn, config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            srcnn.train(config(save_minutes=0.0, mirror_dir=str(tmp_path / "drive")))
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    srcnn.train(config(mirror_dir=str(tmp_path / "drive")))
    assert "Continuing after update 5," in capsys.readouterr().out


def test_fresh_renames_nothing_where_the_drive_is_not_there(srcnn, config, tmp_path):
    srcnn.train(config(num_steps=1))
    for place, why in ((tmp_path / "no drive" / "copy", "Is the drive mounted"), (tmp_path, "lie in each other")):
        with pytest.raises(RecipeError, match=why):
            srcnn.train(config(fresh=True, mirror_dir=str(place)))
    assert not list(tmp_path.glob("run-old*")) and checkpoint(tmp_path / "run")["step"] == 1
    other = tmp_path / "other"  # the run folder of another run is no copy of this one
    srcnn.train(config(num_steps=1, out_dir=str(other)))
    with pytest.raises(RecipeError, match="holds another run"):
        srcnn.train(config(fresh=True, mirror_dir=str(other)))
    assert not list(tmp_path.glob("other-old*"))


def test_the_last_save_is_rescued_where_there_is_space(srcnn, config, tmp_path, monkeypatch):
    """The drive with data and run folder goes away: reading fails first, and the trained weights are kept all the same."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    step = srcnn.train_step

    def breaks(parts, batch, cfg, run):
        if run.step == 4:
            (tmp_path / "drive").rename(tmp_path / "away")
            raise OSError(5, "Input/output error", "data")
        return step(parts, batch, cfg, run)

    (tmp_path / "drive").mkdir()
    monkeypatch.setattr(srcnn, "train_step", breaks)
    with pytest.raises(OSError):
        srcnn.train(config(out_dir=str(tmp_path / "drive" / "run")))
    (kept,) = (tmp_path / "home").iterdir()
    assert checkpoint(kept)["step"] == 4 and (kept / "clock.json").exists()
    monkeypatch.setattr(srcnn, "train_step", step)
    assert srcnn.train(config(continue_from=str(kept)))["steps"] == 9
    srcnn.train(config(out_dir=str(tmp_path / "whole")))
    same(checkpoint(tmp_path / "run")["parts"], checkpoint(tmp_path / "whole")["parts"])


def test_a_log_with_other_values_is_drawn_all_the_same(tmp_path):
    rows = [
        '{"step": 1, "loss": 2.0}',
        '{"step": 2, "metric": null}',
        '{"step": 3, "metric": 5, "loss": []}',
        '{"step": Infinity}',
        "[]",
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, '{"step": 4, "metric": "psnr", "psnr": "high"}']))
    common.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("state", [{}, [], {"step": 3}, "parts"])
def test_a_checkpoint_that_holds_no_run_never_starts_over(srcnn, config, tmp_path, state):
    """Empty, of another kind, or without one of its parts: fresh weights must not take the place of trained ones."""
    srcnn.train(config(num_steps=2))
    last, previous = tmp_path / "run" / "last.pt", tmp_path / "run" / "previous.pt"
    if state == "parts":
        state = checkpoint(tmp_path / "run")
        del state["parts"]["ema"]
    torch.save(state, last)
    torch.save(state, previous)
    with pytest.raises(RecipeError, match="No checkpoint .* can be read|does not fit this script"):
        srcnn.train(config(num_steps=4))
    assert last.exists() and previous.exists()
