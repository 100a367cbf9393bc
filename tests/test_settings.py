"""Settings: flags, environment variables, bad values, and what must stay the same when a run continues."""

import sys
from pathlib import Path

import pytest
from conftest import command, run

from common import RecipeError, duration, main, moment, parse


def test_both_spellings_and_equals_sign(srcnn):
    for words in (["--batch_size", "4"], ["--batch-size", "4"], ["--batch_size=4"], ["--batch-size=4"]):
        cfg = parse(srcnn.Config, argv=words)
        assert cfg.batch_size == 4 and cfg.given == {"batch_size"}


@pytest.mark.parametrize(
    "words, value",
    [([], None), (["--use_amp"], True), (["--use-amp"], True), (["--no-use_amp"], False), (["--no-use-amp"], False),
     (["--no_use_amp"], False), (["--use_amp", "0"], False), (["--use_amp=true"], True), (["--use_amp", "FALSE"], False)],
)  # fmt: skip
def test_booleans(srcnn, words, value):
    assert parse(srcnn.Config, argv=words).use_amp is value


def test_flag_beats_environment_beats_default(srcnn, monkeypatch, capsys):
    monkeypatch.setenv("BATCH_SIZE", "5")
    monkeypatch.setenv("NUM_EPOCHS", "2.5")
    monkeypatch.setenv("FRESH", "1")  # an action: no variable may start a run over
    cfg = parse(srcnn.Config, argv=["--batch_size", "7"])
    assert (cfg.batch_size, cfg.num_epochs, cfg.seed, cfg.fresh) == (7, 2.5, 0, False)
    assert "NUM_EPOCHS=2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--batch_size", "four"], ["--batch_size", "'four'", "a whole number"]),
        (["--batch-size", "0"], ["--batch-size", "0", "1 or more"]),
        (["--batch_size", "4.5"], ["'4.5'", "a whole number"]),
        (["--learning_rate", "nan"], ["nan", "0 or more"]),
        (["--sample_ratio", "1.5"], ["1.5", "to 1"]),
        (["--scale", "5"], ["--scale", "5", "2 or 3 or 4"]),
        (["--amp_dtype", "fp8"], ["fp8", "bf16"]),
        (["--use_amp=maybe"], ["'maybe'", "true or false"]),
        (["--time_budget", "6"], ["'6'", "6h"]),
        (["--deadline", "tomorrow"], ["'tomorrow'", "2026"]),
        (["--bach_size", "4"], ["--bach_size", "did you mean --batch_size"]),
        (["--batch_size"], ["--batch_size needs a value"]),
        (["--batch_size", "--seed", "1"], ["--batch_size needs a value"]),
        (["photos"], ["photos", "--help"]),
    ],
)
def test_bad_values_are_named(srcnn, words, parts):
    with pytest.raises(RecipeError) as e:
        parse(srcnn.Config, argv=words)
    assert e.value.code == 2
    for part in parts:
        assert part in str(e.value)


def test_bad_variable_is_named(srcnn, monkeypatch):
    monkeypatch.setenv("TARGET_SIZE", "big")
    with pytest.raises(RecipeError, match="variable TARGET_SIZE is 'big'; it takes a whole number"):
        parse(srcnn.Config, argv=[])


def test_settings_made_in_code_are_checked_too(config, srcnn):
    with pytest.raises(RecipeError, match="batch_size is 0; it takes 1 or more"):
        srcnn.train(config(batch_size=0))


def test_notebook_arguments_are_ignored(srcnn, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert parse(srcnn.Config).batch_size == 16
    assert main(lambda cfg: {"psnr": 1.0}, srcnn.Config) == {"psnr": 1.0}

    def fails(cfg):
        raise RecipeError("A sentence.")

    assert main(fails, srcnn.Config) is None  # no SystemExit in a notebook
    assert "A sentence." in capsys.readouterr().err


def test_help_shows_ten_settings_and_all(srcnn, capsys):
    assert parse(srcnn.Config, srcnn.__doc__, ["--help"]) is None
    short = capsys.readouterr().out
    assert srcnn.__doc__.strip().splitlines()[0] in short
    assert sum(line.startswith("  --") for line in short.splitlines()) == 11  # ten and --help all
    parse(srcnn.Config, srcnn.__doc__, ["--help", "all"])
    full = capsys.readouterr().out
    assert all(f"--{name}" in full for name in srcnn.Config.__dataclass_fields__)


def test_times():
    assert [duration(t) for t in ("6h", "1h30m", "90s", "1.5h", "")] == [21600, 5400, 90, 5400, 0]
    assert moment("2026-11-24 08:30") - moment("2026-11-24 08:00") == 1800
    for bad in ("6", "h", "1h 30", "-5m"):
        with pytest.raises(ValueError):
            duration(bad)


def test_changed_free_setting_is_said_and_used(config, srcnn, capsys):
    srcnn.train(config(num_steps=2))
    metrics = srcnn.train(config(num_steps=4))
    out = capsys.readouterr().out
    assert metrics["steps"] == 4 and "num_steps was 2 before and is 4 now" in out


def written(folder):
    return sorted((p.name, p.stat().st_mtime_ns) for p in Path(folder).glob("*.pt"))


@pytest.mark.parametrize("change, old", [({"learning_rate": 0.5}, "0.003"), ({"seed": 7}, "0"), ({"arch": "espcn"}, "srcnn")])
def test_changed_fixed_setting_is_an_error_that_names_it(config, srcnn, change, old):
    srcnn.train(config(num_steps=1))
    before = written(config().out_dir)
    with pytest.raises(RecipeError) as e:
        srcnn.train(config(num_steps=2, **change))
    name = next(iter(change))
    assert e.value.code == 2 and f"--{name} {old}" in str(e.value) and "--fresh" in str(e.value)
    assert written(config().out_dir) == before


def test_batch_split_is_free_but_its_product_fixed(config, srcnn):
    srcnn.train(config(num_steps=1, batch_size=4))
    assert srcnn.train(config(num_steps=2, batch_size=2, accumulate=2))["steps"] == 2
    with pytest.raises(RecipeError, match="took 4 samples .* would now take 8"):
        srcnn.train(config(num_steps=3, batch_size=4, accumulate=2))


def test_messages_survive_a_narrow_terminal(tmp_path):
    done = run(command("--data_dir", tmp_path / "照片 é"), cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and "there is no such folder" in done.stderr and "Traceback" not in done.stderr


def test_a_home_that_nobody_has_is_a_sentence(tmp_path):
    done = run(command("--out_dir", "~no-such-user/x"), cwd=tmp_path)
    assert done.returncode == 2 and "--out_dir ~no-such-user/x: there is no such home folder" in done.stderr, done.stderr
