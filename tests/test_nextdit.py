"""NextDiT: the published model, masks, the flow, the figures, fine-tuning."""

import argparse
import importlib
import json
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT, command, environment, run, slowness
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import finetune_pretrained as tune
import train_nextdit_fast as fast
import train_nextdit_ultrafast as ultra

REFERENCE = ROOT.parent / "shared" / "reference" / "nextdit_tiny.pt"
TINY = {"target_size": 16, "batch_size": 4, "num_steps": 3, "use_amp": False, "device": "cpu"}
TINY |= {"num_workers": 0, "val_images": 2, "steps": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for recipe in (fast, ultra, tune):
        monkeypatch.setattr(recipe, "BUILT_IN", 6)
        monkeypatch.setattr(recipe, "NOISY", 4)
    monkeypatch.setattr(tune, "STAND_IN", 2)
    for recipe in (fast, ultra):
        monkeypatch.setitem(recipe.SIZES, "tiny", (24, 4, 2, 0))


def net(**changes):
    """A tiny NextDiT whose output is not zero."""
    torch.manual_seed(0)
    words = {"patch_size": 2, "in_channels": 3, "dim": 24, "n_layers": 4, "n_heads": 2, "multiple_of": 8, "learn_sigma": False}
    model = fast.NextDiT(**words | {"qk_norm": True} | changes)
    for name, p in model.named_parameters():
        if "mask_embedder" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


# --- the published model ------------------------------------------------------------------------------------------------
@pytest.fixture(params=["mha", "gqa_noqk", "gqa_qk"])
def case(request):
    if not REFERENCE.exists():
        pytest.skip(f"{REFERENCE} is not here: the numbers of the published implementation")
    return torch.load(REFERENCE, weights_only=True)["cases"][request.param]


def test_outputs_of_the_published_code(case):
    model, x = fast.NextDiT(**case["kwargs"]), case["inputs"]
    model.load_state_dict(case["state_dict"], strict=True)
    words = {k: x[k] for k in ("t", "cap_feats", "cap_mask")}
    assert (model(x["x"], **words) - case["output"]).abs().max() < 1e-5
    for mine, theirs in zip(model(case["list_inputs"], **words), case["list_output"], strict=True):
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-5
    for name in ("cfg", "cfg_ntk", "cfg_linear"):
        more = {"cfg_scale": 4.0, "proportional_attn": name != "cfg"} | case[name]
        t, theirs = torch.full((2,), more.pop("t")), more.pop("output")
        mine = model.forward_with_cfg(x["x"], t, x["cap_feats"], x["cap_mask"], **more)
        assert (mine - theirs).abs().max() < 1e-5, name


def test_gradients_of_the_published_code(case):
    model, x = fast.NextDiT(**case["kwargs"]), case["inputs"]
    model.load_state_dict(case["state_dict"], strict=True)
    loss = model(x["x"], x["t"], x["cap_feats"], x["cap_mask"]).square().mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    norms = {k: float(p.grad.norm()) for k, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == case["grad_norms"].keys()
    for name, value in case["grad_norms"].items():
        assert norms[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name  # some are zero but for rounding


@pytest.mark.parametrize("kv, count", [(None, 1_988_524_576), (8, 1_627_386_400)])
def test_the_published_sizes(kv, count):
    with torch.device("meta"):
        model = fast.NextDiT(2, 4, 2304, 24, 32, kv, qk_norm=True, cap_feat_dim=2048, mask_channels=1)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("mask_embedder")}
    assert sum(math.prod(s) for s in state.values()) == count and len(state) == 567
    width = 576 if kv else 2304
    expected = {"pad_token": (2304,), "x_embedder.weight": (2304, 16), "t_embedder.mlp.0.weight": (1024, 256)}
    expected |= {
        "cap_embedder.0.weight": (2048,),
        "cap_embedder.1.weight": (1024, 2048),
        "final_layer.linear.weight": (32, 2304),
    }
    expected |= {"final_layer.adaLN_modulation.1.weight": (2304, 1024)}
    block = {"attention.gate": (32,), "attention.wq.weight": (2304, 2304), "attention.wv_y.weight": (width, 2048)}
    block |= {"attention.ky_norm.bias": (width,), "feed_forward.w2.weight": (2304, 6144), "attention_y_norm.weight": (2048,)}
    block |= {"attention_norm1.weight": (2304,), "ffn_norm2.weight": (2304,), "adaLN_modulation.1.weight": (9216, 1024)}
    expected |= {f"layers.{i}.{k}": v for i in (0, 23) for k, v in block.items()}
    assert {k: state.get(k) for k in expected} == expected


def test_the_presets_are_as_large_as_they_say():
    for name, (dim, layers, heads, millions) in {**fast.SIZES, "tiny": (192, 6, 3, 4)}.items():
        with torch.device("meta"):
            model = fast.NextDiT(16, 3, dim, layers, heads, learn_sigma=False, qk_norm=True, mask_channels=1)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01, abs=0.6), name


def test_a_new_network_is_silent_and_every_weight_learns():
    torch.manual_seed(0)
    model = fast.NextDiT(2, 3, 24, 2, 2, multiple_of=8, learn_sigma=False, qk_norm=True, cap_feat_dim=8, mask_channels=1)
    x, t, words = torch.randn(2, 3, 8, 8), torch.rand(2), {"cap_feats": torch.randn(2, 3, 8), "cap_mask": torch.ones(2, 3)}
    words["mask"] = torch.randn(2, 1, 8, 8)
    assert model(x, t, **words).abs().max() == 0
    opt = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(5):
        opt.zero_grad()
        ((model(x, t, **words) - x) ** 2).mean().backward()
        opt.step()
    assert [k for k, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == ["pad_token"]


def test_the_mask_embedder_leaves_a_pretrained_output_as_it_is_and_learns_at_once():
    plain, masked = net(), net(mask_channels=2)
    assert masked.load_state_dict(plain.state_dict(), strict=False).missing_keys == [
        "mask_embedder.weight",
        "mask_embedder.bias",
    ]
    x, t, mask = torch.randn(3, 3, 8, 8), torch.rand(3), torch.randn(3, 2, 8, 8).sign()
    out = masked(x, t, mask=mask)
    assert torch.equal(out, plain(x, t))
    out.square().mean().backward()
    assert masked.mask_embedder.weight.grad.abs().max() > 0


def test_checkpointing_changes_no_gradient():
    grads = []
    for flag in (False, True):
        model = net()
        model.checkpointing = flag
        model(torch.ones(2, 3, 8, 8), torch.tensor([0.2, 0.7])).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_products_in_bf16_are_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 16, h, 8) for h in (4, 2, 2))
    exact = fast.attend(q, k, v)
    half = fast.attend(*(a.bfloat16() for a in (q, k, v)))
    assert half.dtype is torch.bfloat16 and (half.float() - exact).abs().max() < 0.03
    pad = torch.ones(2, 16, dtype=torch.bool)
    assert torch.allclose(fast.attend(q, k, v, pad), exact, atol=1e-6)


def test_scaled_norm_is_the_norm_and_has_its_gradient():
    torch.manual_seed(0)
    x, scale = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 1, 8, dtype=torch.float64)
    mine = fast.ScaledNorm.apply(x, scale, 1e-5)
    assert torch.allclose(mine, torch.nn.functional.rms_norm(x, (8,), eps=1e-5) * scale, atol=1e-6)
    x, scale = x.requires_grad_(), scale.requires_grad_()
    ours = torch.autograd.grad(fast.ScaledNorm.apply(x, scale, 1e-5).pow(3).sum(), (x, scale))
    theirs = torch.autograd.grad((torch.nn.functional.rms_norm(x, (8,), eps=1e-5) * scale).pow(3).sum(), (x, scale))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs))


# --- flow ---------------------------------------------------------------------------------------------------------------
def test_the_linear_denoiser_is_the_best_one_for_gaussian_images():
    """Images of a known spectrum, channels that depend on each other: its error is the one it tells, and no other gain is
    better."""
    torch.manual_seed(0)
    x = torch.randn(4000, 2, 8, 8)
    x = x + 2 * x.roll(1, 3) + 0.5 * x.flip(1) + torch.linspace(-1, 1, 8)
    linear = fast.LinearDenoiser(2, 8)
    linear.fit(lambda: x[:3000].split(500))
    held, noise = x[3000:], torch.randn(1000, 2, 8, 8)
    for t in (0.1, 0.5, 0.9):
        at = torch.full((1000,), t)
        z = t * held + (1 - t) * noise
        out = linear(z, at)
        error = (out - held).square().mean().sqrt()
        assert error == pytest.approx(float(linear.error(at)[0]), rel=0.05)
        for other in (linear.mean + 1.05 * (out - linear.mean), linear.mean + 0.95 * (out - linear.mean)):
            assert (other - held).square().mean().sqrt() > error


def test_a_velocity_that_knows_the_image_is_exact_and_sampling_reaches_it():
    """A network that answers with one image: the flow then ends at that image, by every solver."""
    goal = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)

    class Knows(torch.nn.Module):
        in_channels, cap_feat_dim = 3, 0

        def forward(self, z, t, mask=None):
            return goal.expand_as(z)

    velocity = fast.Velocity(Knows(), "x", 8)
    cfg = fast.Config(device="cpu", use_amp=False, steps=4)
    work = common.Run(cfg)
    for cfg.solver in ("euler", "midpoint", "heun"):
        for cfg.shift in (1.0, 4.0):
            out = fast.draw_samples(velocity, torch.randn(2, 3, 8, 8), None, cfg, work)
            assert (out - goal).abs().max() < 1e-4
    assert fast.heldout_loss(velocity, goal, None, work) < 1e-8
    zero = fast.heldout_loss(lambda z, t, m: torch.zeros_like(z), goal, None, work)
    assert zero == pytest.approx(1 + float(goal.square().mean()), rel=0.05)


def test_the_shift_puts_more_steps_near_noise():
    seen = []

    def velocity(z, t, mask=None):
        seen.append(float(t[0]))
        return torch.zeros_like(z)

    cfg = fast.Config(device="cpu", use_amp=False, steps=4, solver="euler", shift=4.0)
    fast.draw_samples(velocity, torch.zeros(1, 3, 8, 8), None, cfg, common.Run(cfg))
    assert seen[2] == pytest.approx(0.2)  # half of the steps lie below 0.2


def test_guidance_and_hidden_masks():
    cfg = fast.Config(device="cpu", use_amp=False, steps=1, solver="euler", guidance=3.0, mask_drop=0.5)
    work = common.Run(cfg)
    out = fast.draw_samples(
        lambda z, t, m: m.mean((1, 2, 3), True) + 0 * z, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), cfg, work
    )
    assert torch.allclose(out, torch.full_like(out, 3.0))  # 0 + 3 (1 - 0)
    batch = {"image": torch.zeros(64, 3, 8, 8, dtype=torch.uint8), "mask": torch.ones(64, 1, 8, 8, dtype=torch.uint8)}
    hidden = [float((m == 0).all()) for m in fast.to_flow(batch, cfg, work)["mask"]]
    assert 10 < sum(hidden) < 54
    shown = fast.to_masks(torch.tensor([[[[0, 1], [1, 0]]]]), fast.Config(factor=2))
    assert shown.flatten().tolist() == [-1, 1, 1, -1] and shown.shape == (1, 4, 1, 1)


def test_times_are_stratified_over_the_whole_update():
    cfg = fast.Config(device="cpu", t_shape="stratified")
    batch = {"image": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}
    t = fast.to_flow(batch, cfg, common.Run(cfg))["t"]
    assert ((t * 8).floor() == torch.arange(8)).all()


def test_copies_are_found():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (20, 3, 32, 32), np.uint8))
    thumbs = common.mirrored(images.float(), "h")
    fresh = torch.from_numpy(rng.integers(0, 256, (4, 3, 32, 32), np.uint8))
    assert common.copy_rate(fresh, thumbs) == 0
    assert common.copy_rate(torch.cat([fresh[:2], images[:1], images[3:4].flip(3)]), thumbs) == 0.5


# --- masks --------------------------------------------------------------------------------------------------------------
def put(folder, name, value, size=(20, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.full(size, value, np.uint8) if np.isscalar(value) else np.asarray(value, np.uint8)
    Image.fromarray(array).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    "image, mask",
    [
        ("21.png", "21.png"),
        ("21.png", "21_manual1.gif"),
        ("21_training.tif", "21_manual1.gif"),
        ("im0001.png", "im0001.ah.png"),
        ("Case 7.jpg", "case 7-mask.png"),
        ("a_image.png", "a_label.png"),
    ],
)
def test_masks_are_found_by_name(tmp_path, image, mask, capsys):
    a, b = put(tmp_path / "images", image, 9), put(tmp_path / "masks", mask, 1)
    put(tmp_path / "images", "210.png", 9)
    put(tmp_path / "masks", "99_other.png", 9)
    records = common.pair_masks(common.find_images(tmp_path / "images"), tmp_path / "masks", tmp_path / "images")
    assert records == [{"image": a, "mask": b}]
    said = capsys.readouterr().out
    assert "1 images have no mask and are left out: 210.png" in said and "1 masks belong to no image: 99_other.png" in said


def test_no_pair_at_all_is_a_sentence(tmp_path):
    put(tmp_path / "images", "a.png", 9)
    put(tmp_path / "masks", "b.png", 9)
    with pytest.raises(common.RecipeError, match="there is b.png, and an image is a.png"):
        common.pair_masks(common.find_images(tmp_path / "images"), tmp_path / "masks", tmp_path / "images")


def test_a_folder_with_images_and_masks_gives_pairs_and_nothing_else(tmp_path):
    for i in range(4):
        put(tmp_path / "images", f"{i}.png", 9)
        put(tmp_path / "masks", f"{i}.png", 9)
    train, val = common.open_records(fast.Config(data_dir=str(tmp_path)))
    assert len(train) == 3 and len(val) == 1 and all(r["mask"].parent.name == "masks" for r in train + val)
    plain, _ = common.open_records(importlib.import_module("train_ultrafast_srcnn").Config(data_dir=str(tmp_path)))
    assert all(r["image"].parent.name == "images" and "mask" not in r for r in plain)


HALF = np.zeros((20, 20))
HALF[:, 10:] = 1


@pytest.mark.parametrize(
    "values, labels, said",
    [
        (HALF, [0, 1], "values 0, 1"),
        (HALF * 255, [0, 255], "values 0, 255"),
        (HALF + np.eye(20), [0, 1, 2], "2 classes"),
        (np.stack([HALF * 255, HALF * 0, HALF * 0], 2), [0, 0x1FF0000], "#ff0000"),
        (HALF * 200 + np.arange(20)[:, None], [-110], "one class, above 109"),
    ],
)
def test_mask_values_are_recognised_and_said(tmp_path, values, labels, said, capsys):
    paths = [put(tmp_path, "a.png", values), put(tmp_path, "b.png", values * 0)]
    assert common.find_labels(paths) == labels
    out = capsys.readouterr().out
    assert said in out and "1 of 2 are of one value" in out
    mask = common.read_mask(paths[0], labels)
    assert mask.shape[0] == max(1, len(labels) - 1) and mask[0, 0, 12] and not mask[0, 1, 2]


def test_label_masks_of_16_bits_keep_their_values(tmp_path):
    Image.fromarray((HALF * 3).astype(np.uint16)).save(tmp_path / "a.png")
    assert common.find_labels([tmp_path / "a.png"]) == [0, 3]


def test_masks_that_say_nothing_stop_the_run(tmp_path):
    for i in range(4):
        put(tmp_path / "images", f"{i}.png", 9)
        put(tmp_path / "masks", f"{i}.png", 255)
    done = run(command("--data_dir", tmp_path, "--out_dir", tmp_path / "run", recipe="train_nextdit_fast"))
    assert done.returncode == 2 and "All 4 masks have one value throughout (255)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_masks_of_two_sources_are_not_taken_for_two_classes(tmp_path):
    with pytest.raises(common.RecipeError, match="hold 0, 1 and 255"):
        common.find_labels([put(tmp_path, "a.png", HALF), put(tmp_path, "b.png", HALF * 255)])


def test_a_gray_file_among_coloured_ones_keeps_its_meaning(tmp_path):
    """White is 255 in any file; blue is no gray."""
    white = put(tmp_path, "a.png", HALF * 255)
    blue = put(tmp_path, "b.png", np.stack([HALF * 0, HALF * 0, HALF * 255], 2))
    both = put(tmp_path, "c.png", np.stack([HALF * 255] * 3, 2))
    assert common.find_labels([white, blue, both]) == [0, 255, 0x10000FF]


def test_values_that_the_training_did_not_have(tmp_path):
    other = put(tmp_path, "a.png", HALF * 255)
    assert common.read_mask(other, [0, 1])[0, 0, 12]  # one class: whatever is not the background
    with pytest.raises(ValueError, match="its value 255 is none of the training's: 0, 1, 2"):
        common.read_mask(other, [0, 1, 2])


def test_more_masks_than_one_are_said(tmp_path, capsys):
    image = put(tmp_path / "images", "a.png", 9)
    first = put(tmp_path / "masks", "a_EX.png", 9)
    put(tmp_path / "masks", "a_MA.png", 9)
    assert common.pair_masks([image], tmp_path / "masks", image.parent) == [{"image": image, "mask": first}]
    assert "1 images have more than one mask" in capsys.readouterr().out and first.name == "a_EX.png"


def test_masks_of_the_same_folder_win(tmp_path):
    for part in ("test", "train"):
        put(tmp_path / "images" / part, "1.png", 9)
        put(tmp_path / "masks" / part, "1.png", 9)
    records = common.pair_masks(common.find_images(tmp_path / "images"), tmp_path / "masks", tmp_path / "images")
    assert [r["mask"].parent.name for r in records] == ["test", "train"]


def test_masks_are_never_images(tmp_path):
    for i in range(3):
        put(tmp_path, f"{i}.png", 9)
        put(tmp_path / "labels", f"{i}.png", 9)
    train, val = common.open_records(fast.Config(data_dir=str(tmp_path), mask_dir=str(tmp_path / "labels")))
    assert len(train + val) == 3 and all(r["mask"].parent.name == "labels" for r in train + val)
    with pytest.raises(common.RecipeError, match="a folder each"):
        common.open_records(fast.Config(data_dir=str(tmp_path / "labels"), mask_dir=str(tmp_path)))


def test_too_many_colours_are_no_classes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3))
    with pytest.raises(common.RecipeError, match="too many for classes"):
        common.find_labels([put(tmp_path, "a.png", noise)])


def test_a_mask_of_another_shape_is_a_bad_file(tmp_path):
    record = {"image": put(tmp_path, "a.png", 9, (20, 30)), "mask": put(tmp_path, "b.png", HALF)}
    with pytest.raises(ValueError, match="30 x 20 pixels, and its mask 20 x 20"):
        fast.load_pair(record, fast.Config(target_size=8), [0, 1])


def test_a_pair_keeps_together(tmp_path):
    """Cropped, resized and mirrored alike: bright where the mask is."""
    wide = np.zeros((24, 40), np.uint8)
    wide[:12, 20:] = 255
    record = {"image": put(tmp_path, "a.png", np.stack([wide] * 3, 2)), "mask": put(tmp_path, "m.png", wide // 255)}
    cfg = fast.Config(target_size=12, flip="hv")
    items = common.Items([record], lambda r: fast.load_pair(r, cfg, [0, 1]))
    batch = fast.Pairs(items, cfg).__getitems__([(epoch, 0) for epoch in range(12)])
    assert batch["image"].shape == (12, 3, 12, 12) and batch["mask"].shape == (12, 1, 12, 12)
    assert ((batch["image"][:, 0] > 128) == (batch["mask"][:, 0] == 1)).float().mean() > 0.97
    assert len({tuple(m.flatten().tolist()) for m in batch["mask"]}) == 4


def test_thin_vessels_survive_small_sizes(tmp_path):
    line = np.zeros((64, 64), np.uint8)
    line[:, 30:32] = 1
    assert fast.fit_mask(line[None] == 1, fast.Config(target_size=16)).any(2).all()


# --- runs ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Eight pairs of images and masks in two classes, of 24 x 20 pixels."""
    rng = np.random.default_rng(0)
    for i in range(8):
        mask = np.zeros((20, 24), np.uint8)
        at = rng.integers(2, 12)
        mask[at : at + 5, at : at + 6], mask[2:4] = 1, 2
        put(tmp_path / "data" / "masks", f"{i}_mask.png", mask)
        put(tmp_path / "data" / "images", f"{i}.png", np.stack([60 + 90 * mask] * 3, 2) + rng.integers(0, 9, (20, 24, 3)))
    return tmp_path / "data"


@pytest.mark.parametrize("recipe", [fast, ultra], ids=lambda r: r.RECIPE)
def test_a_run_on_pairs_and_what_it_leaves(recipe, folder, tmp_path, capsys):
    cfg = recipe.Config(data_dir=str(folder), out_dir=str(tmp_path / "run"), **TINY)
    metrics = recipe.train(cfg)
    assert {"heldout_loss", "linear_loss", "mask_gap", "copy_rate"} <= metrics.keys()
    said = capsys.readouterr().out
    assert "values 0, 1, 2: background is 0, 2 classes" in said and "5 % of the run" in said and "Attention: PyTorch's" in said
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"data.png", "model.safetensors", "metrics.json", "sample-000000.png", "sample-000003.png", "curves.png"} <= names
    model = recipe.load(tmp_path / "run")
    x, mask = torch.randn(2, 3, 16, 16), torch.ones(2, 2, 16, 16)
    assert model(x, torch.tensor([0.1, 0.9]), mask).shape == x.shape and not model.training
    model.net.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    cfg = recipe.Config(sample=2, mask_dir=str(folder / "masks"), out_dir=str(tmp_path / "run"), device="cpu", steps=2)
    paths = recipe.sample(cfg)
    assert len(paths) == 16 and Image.open(paths[0]).size == (16, 16)
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "masks" / paths[0].name))
    assert set(np.unique(drawn)) == {0, 1, 2}  # the values of the masks that were given
    blind = recipe.sample(recipe.Config(sample=1, out_dir=str(tmp_path / "run"), device="cpu", steps=2))
    assert [p.name for p in blind] == ["sample-0-0.png"]
    again = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in recipe.sample(cfg)] == again and again[0] != again[1]


def test_without_masks_it_trains_on_images_alone_and_says_so(folder, tmp_path, capsys):
    metrics = fast.train(fast.Config(data_dir=str(folder / "images"), out_dir=str(tmp_path / "run"), **TINY))
    assert "mask_gap" not in metrics and "training on images alone" in capsys.readouterr().out
    assert len(fast.sample(fast.Config(sample=3, out_dir=str(tmp_path / "run"), device="cpu", steps=2))) == 3
    with pytest.raises(common.RecipeError, match="trained without masks"):
        fast.sample(fast.Config(sample=1, mask_dir=str(folder / "masks"), out_dir=str(tmp_path / "run"), device="cpu"))


@pytest.mark.parametrize("space", ["x", "v", "residual"])
def test_every_prediction_learns(space, tmp_path):
    metrics = fast.train(
        fast.Config(
            out_dir=str(tmp_path / "run"), predict=space, learning_rate=3e-3, **TINY | {"num_steps": 60, "batch_size": 8}
        )
    )
    start = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "metric" in line][0]
    assert metrics["heldout_loss"] < start["heldout_loss"]
    if space == "residual":  # it starts as the linear denoiser, and gets better than that
        assert start["heldout_loss"] == pytest.approx(start["linear_loss"], rel=1e-3)


def test_sizes_that_do_not_fit_are_sentences(tmp_path):
    for words, part in (({"target_size": 30, "patch": 4}, "multiple of 4"), ({"space": "latent"}, "needs --vae")):
        with pytest.raises(common.RecipeError, match=part):
            fast.train(fast.Config(out_dir=str(tmp_path / "run"), device="cpu", **words))


def test_the_size_follows_memory_and_disk(monkeypatch, tmp_path, capsys):
    import types

    monkeypatch.setattr(fast, "SIZES", {"tiny": (0, 0, 0, 4), "0.1B": (0, 0, 0, 116), "0.6B": (0, 0, 0, 620),
        "1.1B": (0, 0, 0, 1121), "2.3B": (0, 0, 0, 2352)})  # fmt: skip
    work = types.SimpleNamespace(kind="cuda", planned=False, settings={}, device=0, folder=tmp_path, device_name="cpu")
    for memory, disk, size in ((15, 900, "0.1B"), (24, 900, "0.6B"), (79, 900, "1.1B"), (141, 900, "1.1B"), (79, 20, "0.1B")):
        props = types.SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, props=props: props)
        monkeypatch.setattr(fast.shutil, "disk_usage", lambda p, disk=disk: types.SimpleNamespace(free=disk * 1e9))
        assert fast.choose_size(fast.Config(), work) == size
    assert "15 GB of memory" in capsys.readouterr().out
    with pytest.raises(common.RecipeError, match="2.3B takes 44 GB .* card has 15 GB"):
        props = types.SimpleNamespace(total_memory=15 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: props)
        fast.choose_size(fast.Config(preset="2.3B"), work)
    work.kind = "cpu"
    assert fast.choose_size(fast.Config(), work) == "tiny"
    assert fast.choose_size(fast.Config(preset="2.3B"), work) == "2.3B"


def test_latents_of_a_vae_are_cached_once(folder, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="--vae needs diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.5)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    words = TINY | {"target_size": 32, "vae": str(tmp_path / "vae"), "space": "latent"}
    cfg = fast.Config(data_dir=str(folder), out_dir=str(tmp_path / "run"), **words)
    assert fast.train(cfg)["heldout_loss"] > 0 and cfg.factor == 8 and cfg.channels == 4
    assert "Encoding 7 images" in capsys.readouterr().out
    latents = common.load_tensors(tmp_path / "run" / "latents.pt")["latents"]
    assert latents.shape == (7, 2, 4, 4, 4)
    fast.train(fast.Config(data_dir=str(folder), out_dir=str(tmp_path / "run"), **words | {"num_steps": 4}))
    assert "Encoding" not in capsys.readouterr().out
    assert len(fast.sample(fast.Config(sample=1, mask_dir=str(folder / "masks"), out_dir=str(tmp_path / "run"), steps=1))) == 8


# --- fine-tuning --------------------------------------------------------------------------------------------------------
PUBLISHED = {"in_channels": 3, "n_kv_heads": 1, "learn_sigma": True, "cap_feat_dim": 16}


@pytest.fixture
def weights(tmp_path):
    """What a published file holds, for pixels: grouped keys, a caption branch, two halves of the output."""
    return {k: v.clone() for k, v in net(**PUBLISHED).state_dict().items()}


def tuned(tmp_path, place, **changes):
    words = TINY | {"data_dir": str(tmp_path / "data"), "out_dir": str(tmp_path / "run"), "weights": str(place), "lora_rank": 2}
    return tune.Config(**words | changes)


def save_shards(state, folder):
    names = list(state)
    for i in range(2):
        save_file({k: state[k].contiguous() for k in names[i::2]}, folder / f"model-0000{i + 1}-of-00002.safetensors")


FORMATS = {
    "file.pth": lambda state, p: torch.save(state, p / "file.pth"),
    "consolidated.00-of-01.pth": lambda state, p: torch.save(state, p / "consolidated.00-of-01.pth"),
    "wrapped.pt": lambda state, p: torch.save(
        {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, p / "wrapped.pt"
    ),
    "file.safetensors": lambda state, p: __import__("safetensors.torch").torch.save_file(state, p / "file.safetensors"),
    "sharded": save_shards,
}


@pytest.mark.parametrize("name", FORMATS)
def test_fine_tuning_from_every_format(name, weights, folder, tmp_path, capsys):
    place = tmp_path / "weights"
    place.mkdir()
    FORMATS[name](weights, place)
    if name == "consolidated.00-of-01.pth":  # the average is preferred, and a pickled namespace beside it is left alone
        torch.save({k: v + 1 for k, v in weights.items()}, place / name)
        torch.save(weights, place / "consolidated_ema.00-of-01.pth")
        torch.save(argparse.Namespace(a=1), place / "model_args.pth")
    cfg = tuned(tmp_path, place if name in ("sharded", "consolidated.00-of-01.pth") else place / name)
    metrics = tune.train(cfg)
    assert metrics["steps"] == 3 and "100.0% of the network" in capsys.readouterr().out
    assert json.loads(cfg.geometry) | {"qk_norm": True, "n_heads": 2, "n_kv_heads": 1} == json.loads(cfg.geometry)
    state = common.load_tensors(tmp_path / "run" / "last.pt")["parts"]["model"]
    assert torch.equal(state["net.layers.1.attention.wq.base.weight"], weights["layers.1.attention.wq.weight"])
    assert state["net.layers.1.attention.wq.up"].abs().max() > 0 and torch.equal(state["net.pad_token"], weights["pad_token"])


def test_step_0_is_the_pretrained_network(weights, folder, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    plain = net(**PUBLISHED)
    cfg = tuned(tmp_path, tmp_path / "w.pth")
    cfg.labels = "0 1"
    with common.Run(cfg, tune.RECIPE) as work:
        model = tune.build(cfg, work).model
    x, t, mask = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 1, 16, 16)
    prompt = {"cap_feats": model.prompt.expand(2, -1, -1), "cap_mask": torch.ones(2, 8)}
    assert torch.allclose(model(x, t, mask), plain(x, t, **prompt), atol=1e-6)


def test_merged_weights_load_without_lora(weights, folder, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    tune.train(tuned(tmp_path, tmp_path / "w.pth", learning_rate=0.05))
    first = load_file(tmp_path / "run" / "merged.safetensors")
    path = tune.write_merged(tune.Config(out_dir=str(tmp_path / "run")))
    assert all(torch.equal(first[k], v) for k, v in load_file(path).items())
    assert load_file(tmp_path / "run" / "merged-extras.safetensors")["prompt"].shape == (1, 8, 16)
    plain, trained = net(mask_channels=2, **PUBLISHED), tune.load(tmp_path / "run")
    plain.load_state_dict(load_file(path), strict=True)
    x, t, mask = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 2, 16, 16).sign()
    words = {"cap_feats": trained.prompt.expand(2, -1, -1), "cap_mask": torch.ones(2, 8)}
    assert torch.allclose(trained(x, t, mask), plain(x, t, mask=mask, **words), atol=1e-4)
    assert not torch.equal(load_file(path)["layers.0.attention.wq.weight"], weights["layers.0.attention.wq.weight"])


@pytest.mark.parametrize("kind", ["lora", "ends", "all"])
def test_what_is_trained(kind, weights, folder, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    tune.train(tuned(tmp_path, tmp_path / "w.pth", train=kind, learning_rate=0.01))
    state = common.load_tensors(tmp_path / "run" / "last.pt")["parts"]["model"]
    changed = {k for k, v in weights.items() if f"net.{k}" in state and not torch.equal(state[f"net.{k}"], v)}
    assert "layers.0.attention_norm1.weight" in changed and state["net.mask_embedder.weight"].abs().max() > 0
    assert ("x_embedder.weight" in changed) == (kind != "lora")
    assert ("layers.0.adaLN_modulation.1.weight" in changed) == (kind == "all")
    assert ("layers.0.attention.wq.weight" in changed) == (kind == "all")


def test_renamed_weights_are_refused(weights, folder, tmp_path):
    names = [k for k in weights if k.startswith("layers.1")] + [k for k in weights if k.startswith("layers.2")]
    for k in names[: len(weights) // 5]:
        weights[f"old_{k}"] = weights.pop(k)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(common.RecipeError, match=r"Only \d\d% of the network .* unexpected: old_.*Nothing was trained"):
        tune.train(tuned(tmp_path, tmp_path / "w.pth"))


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_code_in_a_pickle_is_not_run(weights, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights | {"bomb": Bomb()}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(common.RecipeError, match="something other than tensors"):
            tune.train(tuned(tmp_path, tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def test_wrong_weights_are_sentences(weights, folder, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    latent = net(**PUBLISHED | {"in_channels": 5})
    torch.save(latent.state_dict(), tmp_path / "latent.pth")
    for place, part in (("other.pth", "is no NextDiT"), ("latent.pth", "add --vae FOLDER"), ("nowhere", "no such file")):
        with pytest.raises(common.RecipeError, match=part):
            tune.train(tuned(tmp_path, tmp_path / place))
    with pytest.raises(common.RecipeError, match="--weights is missing"):
        tune.train(tuned(tmp_path, ""))


def test_a_file_of_our_own_run_knows_what_its_network_predicts(folder, tmp_path):
    """Alone, without its run folder; and the weights of a LoRA run are asked for as they should be."""
    fast.train(fast.Config(out_dir=str(tmp_path / "first"), **TINY))
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "first" / "model.safetensors").read_bytes())
    cfg = tuned(tmp_path, tmp_path / "alone.safetensors", heads=2)
    tune.train(cfg)
    assert cfg.predict == "residual"
    for place in (tmp_path / "run", tmp_path / "run" / "best.pt"):
        with pytest.raises(common.RecipeError, match="add --merge"):
            tuned(tmp_path, place, heads=2)
    merged = tuned(tmp_path, tmp_path / "run" / "merged.safetensors", heads=2, out_dir=str(tmp_path / "second"))
    tune.train(merged)
    assert merged.predict == "residual"


def test_our_own_run_is_fine_tuned_with_its_linear_denoiser(folder, tmp_path, capsys):
    fast.train(fast.Config(out_dir=str(tmp_path / "first"), **TINY))
    cfg = tuned(tmp_path, tmp_path / "first", heads=2, target_size=0)
    tune.train(cfg)
    assert cfg.predict == "residual" and cfg.target_size == 16 and "100.0% of the network" in capsys.readouterr().out
    theirs = common.load_tensors(tmp_path / "first" / "best.pt")["model"]
    mine = common.load_tensors(tmp_path / "run" / "last.pt")["parts"]["model"]
    assert torch.equal(mine["linear.mean"], theirs["linear.mean"])


def test_frozen_weights_are_half_and_shared_with_the_average(weights, folder, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    cfg = tuned(tmp_path, tmp_path / "w.pth", use_amp=True, amp_dtype="bf16")
    cfg.labels = "0 1"
    with common.Run(cfg, tune.RECIPE) as work:
        parts = tune.build(cfg, work)
        batch = tune.example_batch(cfg, work)
        assert torch.isfinite(tune.train_step(parts, batch, cfg, work)["loss"])
    base, mean = (m.net.layers[0].attention.wq.base.weight for m in (parts.model, parts.ema.model))
    assert base.dtype is torch.bfloat16 and base is mean
    assert parts.model.net.layers[0].attention.wq.up is not parts.ema.model.net.layers[0].attention.wq.up


@pytest.mark.parametrize("recipe", [fast, ultra, tune], ids=lambda r: r.RECIPE)
def test_steps_run_on_fake_tensors_for_a_card_that_is_not_here(recipe):
    """What the planner does: the real sizes, no memory."""
    words = {"preset": "0.1B", "target_size": 256} if recipe is not tune else {"target_size": 256, "vae": "somewhere"}
    cfg = recipe.Config(**words, batch_size=2, checkpointing=True)
    cfg.labels = "0 255"
    work = common.Run(cfg, kind="cuda")
    with FakeTensorMode():
        parts = recipe.build(cfg, work)
        losses = recipe.train_step(parts, recipe.example_batch(cfg, work), cfg, work)
        assert losses["loss"].shape == () and recipe.eval_step(parts, cfg, work).shape[0] == 32
        count = sum(p.numel() for p in parts.model.net.parameters())
    assert count > (1.6e9 if recipe is tune else 1.1e8)


# --- real data ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not (REAL / "fundus").exists(), reason="needs the real fundus images")
def test_real_pairs():
    train, val = common.open_records(fast.Config(data_dir=str(REAL / "fundus")))
    assert len(train) + len(val) == len(list((REAL / "fundus" / "images").iterdir()))
    assert all(r["image"].stem == r["mask"].stem for r in train + val)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_nextdit_fast", "train_nextdit_ultrafast", "finetune_pretrained"])
def test_without_data_in_two_minutes(name, tmp_path):
    import time

    start = time.monotonic()
    words = command("--out_dir", tmp_path / "run", recipe=name)
    done = run(words, timeout=300, OMP_NUM_THREADS="2")
    assert done.returncode == 0 and time.monotonic() - start < 120 * slowness(), done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    judged = [r["heldout_loss"] for r in rows if "metric" in r]
    assert judged[-1] < judged[0] and list((tmp_path / "run").glob("sample-*.png"))
    assert environment()
