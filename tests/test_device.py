"""Device and precision under faked cards and processors."""

import shutil

import pytest
import torch

import common
from common import RecipeError, choose_device, choose_dtype


@pytest.fixture
def card(monkeypatch):
    """card(title, capability, built for, count) fakes CUDA cards; is_bf16_supported lies as it does on T4 and P100."""

    def fake(title, capability, archs, count=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=None: title)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)

    return fake


CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def test_t4_gets_fp16(card):
    card("Tesla T4", (7, 5), CU128)
    device, title = choose_device("auto")
    assert (device.type, title) == ("cuda", "Tesla T4")
    dtype, why = choose_dtype("cuda", (7, 5))
    assert dtype is torch.float16 and "7.5" in why
    assert "emulates" in choose_dtype("cuda", (7, 5), amp_dtype="bf16")[1]


def test_p100_without_kernels_names_the_ways_out(card):
    card("Tesla P100-PCIE-16GB", (6, 0), CU128)
    with pytest.raises(RecipeError) as e:
        choose_device("auto")
    for part in ("Tesla P100", "sm_60", "sm_70", "T4", "cu126", "--device cpu"):
        assert part in str(e.value)


def test_p100_with_kernels_runs_in_fp32(card):
    card("Tesla P100-PCIE-16GB", (6, 0), CU126)
    assert choose_device("auto")[0].type == "cuda"
    assert choose_dtype("cuda", (6, 0))[0] is torch.float32
    assert choose_dtype("cuda", (6, 0), use_amp=True)[0] is torch.float16


@pytest.mark.parametrize("capability, archs", [((8, 9), CU126), ((12, 1), CU128), ((13, 0), CU128), ((9, 0), ["sm_90a"])])
def test_newer_cards_of_a_known_family_and_ptx_pass(card, capability, archs):
    card("New", capability, archs)
    assert choose_device("auto")[0].type == "cuda"
    assert choose_dtype("cuda", capability)[0] is torch.bfloat16


def test_unknown_newer_family_without_ptx_is_named(card):
    card("New", (12, 0), CU126)
    with pytest.raises(RecipeError, match="sm_120"):
        choose_device("auto")


def test_torch_without_cuda_beside_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    assert choose_device("auto")[0].type == "cpu"
    out = capsys.readouterr().out
    assert "NVIDIA card" in out and "pytorch.org" in out
    choose_device("cpu")  # asked for: nothing to say
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, part", [("gpu", "takes auto"), ("cuda", "sees 0 CUDA cards"), ("cuda:3", "--device cpu")])
def test_wrong_device_is_a_sentence(name, part, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=part) as e:
        choose_device(name)
    assert e.value.code == 2


@pytest.mark.parametrize("has, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_cpu_precision_follows_the_processor(monkeypatch, has, dtype):
    monkeypatch.setattr(common, "cpu_has_bf16", lambda: has)
    assert choose_dtype("cpu")[0] is dtype
    assert choose_dtype("cpu", use_amp=False)[0] is torch.float32
    assert choose_dtype("cpu", use_amp=True)[0] is torch.bfloat16
    with pytest.raises(RecipeError, match="fp16"):
        choose_dtype("cpu", amp_dtype="fp16")


def test_run_says_in_its_first_line_what_it_chose(config, srcnn, capsys):
    srcnn.train(config(num_steps=1))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(
        "ultrafast_srcnn: cpu with 1 threads, fp32 (half precision is off); 3 samples per update = 3 x 1 x 1"
    )


def test_second_card_is_told_with_the_torchrun_line(card, capsys):
    card("Tesla T4", (7, 5), CU128, count=2)
    choose_device("auto")
    assert "2 GPUs" in (out := capsys.readouterr().out) and "torchrun --nproc_per_node=2" in out
