"""Each fault once, on recipes in turn; benchmarks/soak.py has all of them on all recipes, and hundreds of kills."""

import sys

import faults
import fuzzing
import pytest

RECIPES = list(faults.RECIPES)
CHEAP = ["train_ultrafast_srcnn", "train_autoencoder3d", "train_convnext", "train_nextdit_ultrafast"]
OTHERS = [f for f in faults.FAULTS if f is not faults.killed]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, signals and modes of files are POSIX")
# (protection of drive.WITHOUT, fault that must notice that it is gone, what to fix of its dice)
WITHOUT = [
    ("aside", "killed", {"where": ("write", 1)}), ("seed", "killed", {"where": ("forward", 3)}),
    ("replay", "out_of_memory", {}),
    ("interval", "interval", {}), ("retry", "full_for_a_while", {}), ("write", "full_for_good", {}), ("main", "full_disk", {}),
    ("rescue", "mount_vanishes", {}), ("main", "read_only", {}), ("remake", "folder_vanishes", {}), ("fallback", "damaged", {}),
    ("mirror", "mirrored", {}), ("mirror", "mirror_fails", {"how": "forgets"}), ("mirror", "mirror_fails", {"how": "goes"}),
    ("thread", "mirror_fails", {"how": "hangs", "limit": 30}), ("handlers", "stopped", {}), ("second", "interrupted_twice", {}),
    ("finite", "not_finite_once", {}), ("finite", "not_finite_for_good", {}), ("substitute", "data_goes_bad", {}),
    ("substitute", "data_vanishes", {}), ("main", "peer_lost", {}), ("lock", "second_run", {}),
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_ends_like_the_uninterrupted_one(recipe, tmp_path):
    faults.try_fault(faults.killed, recipe, tmp_path, 3)


@pytest.mark.parametrize("fault", OTHERS, ids=lambda fault: fault.__name__)
def test_faults_lose_nothing(fault, tmp_path):
    out = faults.try_fault(fault, CHEAP[OTHERS.index(fault) % len(CHEAP)], tmp_path, 0)
    if "skipped" in out:
        pytest.skip(out["skipped"])


@pytest.mark.parametrize("fault, how", [("mirror_fails", "goes"), ("mirror_fails", "hangs"), ("mirrored", "through")])
def test_more_kinds_of_a_second_folder(fault, how, tmp_path):
    faults.try_fault(getattr(faults, fault), "train_autoencoder3d", tmp_path, how, how=how)


@pytest.mark.parametrize("family", fuzzing.FAMILIES)
def test_bad_input_is_refused_in_a_sentence(family, tmp_path):
    """No traceback, no hang, no code run, nothing touched outside the folder, no absurd memory; thousands in the soak."""
    count = {"settings": 120, "lists": 80, "weights": 80, "volumes": 40, "runs": 12}.get(family, 60)
    done = fuzzing.FAMILIES[family](tmp_path, count, 0)
    assert done["inputs"] >= count and done["accepted"] and done["refused"]  # neither all nor none


@pytest.mark.slow
@pytest.mark.parametrize("protection, fault, more", WITHOUT, ids=lambda value: value if isinstance(value, str) else "")
def test_a_fault_is_noticed_when_its_protection_is_gone(protection, fault, more, tmp_path, monkeypatch):
    fault, recipe = getattr(faults, fault), "train_nextdit_ultrafast"
    if "skipped" in (faults.try_fault(fault, recipe, tmp_path, 0, **more) or {}):
        pytest.skip("this machine cannot show it")
    monkeypatch.setattr(faults, "TAKEN_OUT", protection)
    try:
        faults.try_fault(fault, recipe, tmp_path, "without", **more)
    except Exception as e:
        print(f"noticed: {e}")
        return
    raise AssertionError(f"{fault.__name__} passes without {protection}")
