"""The programs that measure: that what they write is what they measured."""

import json
import sys
import time

import pytest
import torch
from conftest import ROOT, run

BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.slow
def test_every_form_of_a_recipe_is_measured(tmp_path):
    out = tmp_path / "here.json"
    words = [sys.executable, f"{BENCHMARKS}/run.py", "--recipe", "finetune_pretrained", "--quick", "--repeats", "1"]
    done = run([*words, "--updates", "3", "--out", out, "--device", "cpu"], cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    row = found["recipes"]["finetune_pretrained"]
    assert set(row["forms"]) >= {f"{p} own layout eager {m}" for p in ("fp32", "AMP") for m in ("plain", "checkpointed")}
    for form in row["forms"].values():
        assert form["ms"] > 0 and form["peak_mib"] > 10 and 0 < form["utilisation"] < 1.1
        assert form["items_per_second"] == pytest.approx(row["samples"] / form["ms"] * 1e3, rel=0.01)
    plain, again = (row["forms"][f"AMP own layout eager {m}"] for m in ("plain", "checkpointed"))
    assert again["peak_mib"] < plain["peak_mib"] and row["forms"]["fp32 own layout eager plain"]["faster"] == 1
    assert row["gflop"] > 1 and 0 <= row["data_wait"] < 1 and row["expected_seconds"] > 0
    assert {"torch", "date", "threads", "processor"} <= set(found) and "| fp32 own layout eager plain |" in done.stdout
    assert "it takes train_" in run([*words[:2], "--recipe", "train_nothing"]).stderr


@pytest.mark.parametrize("recipe, kept", [("train_realesrgan_optimized", True), ("train_convnext", False)])
def test_a_form_is_in_the_layout_of_its_name_or_left_out(recipe, kept):
    """ConvNeXt's images lie with their colours last, so that it has no contiguous form."""
    from run import Form

    last, flags = torch.channels_last, "--target_size 32 --batch_size 2 --no-use_amp --device cpu"
    contiguous, other = Form(recipe, flags, "contiguous"), Form(recipe, flags, "channels last")
    assert contiguous.keeps() is kept and other.keeps() is True
    other.layout = "contiguous"  # a form that is not what it is called
    assert other.keeps() is False and torch.channels_last is last


def test_forms_take_turns_and_the_first_are_not_counted():
    from run import in_turns

    order, slow = [], iter([9.0, 9.0, 1.0, 3.0, 2.0])
    forms = {"a": lambda: order.append("a") or next(slow), "b": lambda: order.append("b") or 5.0}
    assert in_turns(forms, 3) == {"a": 2.0, "b": 5.0} and "".join(order) == "ab" * 5


def test_a_claim_is_judged_by_its_range():
    import claims

    assert [claims.rule(x, 1.5, 2) for x in (1.4, 2.1, 1.2, 2.4, 1.1, 2.6)] == "holds holds nearly nearly less more".split()
    assert claims.rule(9, 4) == "more" and claims.rule(2, 4) == "less" and claims.rule(4.3, 4) == "holds"
    figures, text, zh, verdict, ratio = claims.ROWS["latent-steps"]["make"]()
    assert figures == {"updates": 97} and verdict == "holds" and "97" in text and "97" in zh and ratio == 1
    assert claims.ROWS["volume-amp"]["make"]()[3] == "less"  # than the 3-D guide's half of the memory


def names_in(code):
    """The names that a function uses, in its comprehensions too."""
    inner = (names_in(c) for c in code.co_consts if hasattr(c, "co_names"))
    return set(code.co_names).union(*inner)


def test_the_committed_claims_are_all_claims():
    """Those that look at other files, or count, are made anew: figures, sentences, verdict and ratio."""
    import claims

    found, anew = claims.result("claims_cpu2")["rows"], 0
    assert list(found) == list(claims.ROWS)
    for name, row in found.items():
        own = claims.ROWS[name]
        assert all(row[k] == own[k] for k in ("guide", "claimed", "chinese", "basis")) and row["verdict"] in claims.VERDICTS, (
            name
        )
        if not {"compared", "on_card", "on_weights", "Form", "whole_run", "latent"} & names_in(own["make"].__code__):
            again, anew = own["make"](), anew + 1
            assert [row[k] for k in ("found", "found_zh", "verdict", "ratio")] == list(again[1:]), name
    assert anew >= 20


def test_quality_over_time_is_read_from_the_log():
    from time_to_quality import curve, there

    rows = [{"step": 0, "metric": "psnr", "psnr": 20.0, "seconds": 1.5}, {"step": 4, "seconds": 2.0, "items_per_second": 8.0},
        {"step": 8, "seconds": 4.0, "items_per_second": 2.0}, {"step": 8, "metric": "psnr", "psnr": 30.0, "seconds": 4.5},
        {"step": 12, "seconds": 5.0, "items_per_second": 8.0}]  # fmt: skip
    assert curve(rows, "psnr") == [(1.5, 20.0), (4.5, 30.0)]
    found = {"ours": {"points": curve(rows, "psnr")}, "slow": {"psnr": 25.0}}
    assert there(found, "psnr", True) == 4.5 and there(found, "psnr", False) == 1.5
    assert there(found | {"slow": {"psnr": 31.0}}, "psnr", True) is None


def test_the_planner_s_time_is_of_the_right_order():
    """Where it was measured, within a factor of four: the README says how far off it is."""
    import claims

    found = claims.result("choices")["error where it was measured"]["time"]
    assert len(found) == 8 and all(0.25 < x < 4 for x in found.values()), found
    assert time.strptime(claims.result("choices")["date"], "%Y-%m-%d")
