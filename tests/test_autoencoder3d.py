"""The 3-D autoencoder: scans, the linear start, checkpointing, stages, the discriminator, whole scans, latents on disk."""

import gzip
import json
import math
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, checkpoint, run, same, slowness, stop_after
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import train_autoencoder3d as recipe

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("monai")
SMALL = {"target_size": "16,16,8", "channels": "4,8,8", "batch_size": 2, "accumulate": 1, "num_steps": 4, "val_crops": 3}
SMALL |= {"use_amp": False, "device": "cpu", "num_workers": 0}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    for name, value in {"BUILT_IN": 3, "LINEAR_STEPS": 3, "CROPS": 2}.items():
        monkeypatch.setattr(recipe, name, value)


@pytest.fixture
def config(tmp_path):
    return lambda **changes: recipe.Config(**SMALL | {"out_dir": str(tmp_path / "run")} | changes)


def scan(seed=0, shape=(24, 20, 12)):
    """A smooth scan with values from -100 to about 900."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.random((1, 1, 3, 3, 3), np.float32))
    return (F.interpolate(small, shape, mode="trilinear")[0, 0] ** 2 * 1000 - 100).numpy()


def save(volume, path, affine=None):
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.fixture
def scans(tmp_path):
    """Five scans as .nii.gz, and one as .npy."""
    (tmp_path / "scans").mkdir()
    for k in range(5):
        save(scan(k), tmp_path / "scans" / f"s{k}.nii.gz")
    np.save(tmp_path / "scans" / "s5.npy", scan(5))
    return tmp_path / "scans"


def fitted(factor=4, channels=3, count=6):
    linear = recipe.Linear(factor, channels)
    crops = [torch.from_numpy(recipe.scale(scan(k, (16, 16, 8)))[0]).float()[None] for k in range(count)]
    linear.fit(crops)
    return linear, torch.stack(crops)


# --- scans ------------------------------------------------------------------------------------------------------------
BAD = {
    "flat": (np.zeros((8, 9), np.float32), "a scan has 3 axes: slices belong into one volume"),
    "time": (np.zeros((8, 8, 8, 3), np.float32), "save one of its volumes"),
    "nan": (np.full((16, 16, 8), np.nan, np.float32), "100.00% of its voxels are NaN"),
    "constant": (np.full((16, 16, 8), 7, np.float32), "it is constant: every voxel is 7"),
    "thin": (scan(0, (16, 16, 3)), "16 x 16 x 3 voxels are too thin for this network: leave it out"),
    "narrow": (scan(0, (16, 7, 16)), "16 x 7 x 16 voxels are less than half of the crop in an axis: try --target_size 16,8,8"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".nii.gz", ".npy"])
def test_bad_scans_get_a_sentence(name, suffix, config, tmp_path):
    volume, words = BAD[name]
    path = tmp_path / f"{name}{suffix}"
    save(volume, path) if suffix != ".npy" else np.save(path, volume)
    with pytest.raises(ValueError, match=words):
        recipe.load_volume({"image": path}, config())


def test_damaged_files_and_headers_get_a_sentence(config, tmp_path):
    whole = save(scan(), tmp_path / "whole.nii.gz").read_bytes()
    for name, content in {
        "cut.nii.gz": whole[: len(whole) // 2],
        "text.nii.gz": b"no scan",
        "zip.nii": gzip.compress(b"x"),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read: "):
            recipe.load_volume({"image": tmp_path / name}, config())
    with open(tmp_path / "pickle.npy", "wb") as f:
        np.save(f, np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read: .*allow_pickle"):
        recipe.load_volume({"image": tmp_path / "pickle.npy"}, config())
    for affine in (np.diag([1.0, 0, 1, 1]), np.diag([1.0, np.nan, 1, 1])):
        image = nibabel.Nifti1Image(scan(), np.eye(4))
        image.header.set_sform(affine, 1)
        image.header["qform_code"] = 0
        image.header["sform_code"] = 1
        data = bytearray(nibabel.Nifti1Image(scan(), None, image.header).to_bytes())
        (tmp_path / "affine.nii").write_bytes(data)
        with pytest.raises(ValueError, match="its affine cannot orient it|cannot be read"):
            recipe.load_volume({"image": tmp_path / "affine.nii"}, config())


def test_a_bad_scan_is_named_and_the_others_train(scans, config, capsys):
    (scans / "s0.nii.gz").write_bytes(b"nothing")
    assert math.isfinite(recipe.train(config(data_dir=str(scans)))["psnr"])
    out = capsys.readouterr().out
    assert "its place takes the next good one" in out and "s0.nii.gz (cannot be read" in out


def test_folders_without_scans_say_what_they_hold(config, tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"")
    with pytest.raises(common.RecipeError, match="volumes to .nii.gz with dcm2niix.*They end in .nii .nii.gz .npy"):
        recipe.train(config(data_dir=str(tmp_path)))


def test_scans_are_turned_to_ras_and_resampled(config, tmp_path):
    volume = scan(1)
    save(volume, tmp_path / "ras.nii.gz")
    turned = np.diag([-1.0, 1.0, 2.0, 1.0])
    turned[0, 3] = volume.shape[0] - 1
    save(volume[::-1].copy(), tmp_path / "las.nii.gz", turned)
    swapped = np.array([[0, 1.0, 0, 0], [1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    save(volume.transpose(1, 0, 2).copy(), tmp_path / "axes.nii.gz", swapped)
    for name in ("ras", "las", "axes"):
        found, affine = recipe.read_volume(tmp_path / f"{name}.nii.gz", config())
        assert np.allclose(found, volume) and np.allclose(np.diag(affine)[:3], [1, 1, 2])
    finer, affine = recipe.read_volume(tmp_path / "ras.nii.gz", config(spacing="1,1,1"))
    assert finer.shape[:2] == (24, 20) and finer.shape[2] in (23, 24) and np.allclose(np.diag(affine)[:3], 1)
    with pytest.raises(ValueError, match="does not tell its spacing"):
        np.save(tmp_path / "a.npy", volume)
        recipe.read_volume(tmp_path / "a.npy", config(spacing="1,1,1"))
    save(volume[..., None], tmp_path / "four.nii.gz")
    assert recipe.read_volume(tmp_path / "four.nii.gz", config())[0].shape == volume.shape  # one volume in four axes is one


def test_scaling_is_monais():
    from monai.transforms import ScaleIntensityRangePercentiles

    volume = scan(2)
    ours, low, high = recipe.scale(volume)
    theirs = ScaleIntensityRangePercentiles(0, 99.5, 0, 1, clip=True)(torch.from_numpy(volume)).numpy()
    assert np.allclose(ours, theirs, atol=1e-5) and low == pytest.approx(volume.min()) and high < volume.max()
    sparse = np.zeros((20, 20, 20), np.float32)
    sparse[3, 3, 3] = 5  # less than half a percent: the percentile is the minimum
    assert recipe.scale(sparse)[0].max() == 1


def test_crops_are_pure_and_within_the_scan(config):
    volume = np.arange(6 * 5 * 4).reshape(6, 5, 4)
    assert (recipe.cut(volume, (2, 2, 2), (0, 0, 0)) == volume[:2, :2, :2]).all()
    assert (recipe.cut(volume, (2, 2, 2), (0.999, 0.999, 0.999)) == volume[-2:, -2:, -2:]).all()
    assert recipe.cut(volume, (8, 2, 2), (0.5, 0, 0)).shape == (8, 2, 2)  # mirrored at its ends
    cfg = config()
    items = common.Items([f"phantom {k}" for k in range(3)], lambda name: recipe.phantom(name, (16, 16, 8)))
    data = recipe.Volumes(items, cfg)
    one, two = data.__getitems__([(0, 1), (3, 4)]), data.__getitems__([(3, 4)])
    assert torch.equal(one["image"][1:], two["image"]) and not torch.equal(
        one["image"][:1], data.__getitems__([(1, 1)])["image"]
    )
    made = recipe.example_batch(cfg, common.Run(cfg))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


# --- the linear start -------------------------------------------------------------------------------------------------
def test_patches_and_back():
    x = torch.rand(2, 1, 16, 8, 8)
    linear = recipe.Linear(4, 3)
    p = linear.patches(x)
    assert torch.equal(linear.whole(p), x) and torch.equal(p[1, :, 2, 1, 0].view(4, 4, 4), x[1, 0, 8:12, 4:8, :4])


def test_the_pca_is_the_textbooks():
    linear, x = fitted()
    patches = linear.patches(x).flatten(2).transpose(1, 2).flatten(0, 1).double()
    centred = patches - patches.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    best = (centred @ axes[:3].T @ axes[:3] + patches.mean(0)).float()
    ours = linear.patches(linear.pca(x)).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(ours, best, atol=1e-4)
    z = linear.encode(x)
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1), torch.ones(3), atol=0.02)


def test_the_neighbours_help():
    linear, x = fitted()
    assert recipe.psnr(linear.decode(linear.encode(x)), x).mean() > recipe.psnr(linear.pca(x), x).mean() + 1


def test_the_network_starts_as_the_linear_autoencoder(config):
    model = recipe.make_model(config(channels="8,8,16", attention="all", res_blocks=2))
    linear, x = fitted()
    model.linear.load_state_dict(linear.state_dict())
    again, mu, sigma = model(x)
    assert torch.allclose(again, linear.decode(linear.encode(x)), atol=1e-5) and torch.allclose(mu, linear.encode(x), atol=1e-5)
    assert torch.allclose(sigma, torch.full_like(sigma, math.exp(-3)))
    again.sub(x).abs().mean().backward()
    assert model.net.decoder.blocks[-1].conv.weight.grad.abs().sum() > 0


# --- the network ------------------------------------------------------------------------------------------------------
def stirred(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("attention, enlarge", [("all", "nearest"), ("none", "transposed")])
def test_checkpointing_changes_no_bit(attention, enlarge, config):
    x, found = torch.rand(1, 1, 16, 16, 8), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        cfg = config(channels="8,8,16", attention=attention, enlarge=enlarge, res_blocks=2, checkpointing=checkpointing)
        model = stirred(recipe.make_model(cfg))
        again, mu, _ = model(x)
        (again.square().mean() + mu.square().mean()).backward()
        found.append([again.detach(), *(p.grad for p in model.parameters()), dict(model.state_dict())])
    same(found[0], found[1])


def test_alone_it_is_monais_network(config, tmp_path):
    from monai.networks.nets import AutoencoderKL

    cfg = config(start="plain", channels="8,8,16", attention="all", enlarge="nearest", res_blocks=2)
    metrics = recipe.train(cfg)
    assert metrics["psnr"] > 0
    net = AutoencoderKL(3, 1, 1, (2, 2, 2), (8, 8, 16), (False, False, True), 3, 8)  # MONAI's defaults, plain attention
    net.load_state_dict(torch.load(tmp_path / "run" / "monai.pt", weights_only=True))
    x = torch.rand(1, 1, 16, 16, 8)
    model = recipe.load(tmp_path / "run")
    with torch.no_grad():
        mu, sigma = net.eval().encode(x)
        ours = model.encode(x)
        assert torch.allclose(mu, ours[0], atol=1e-5) and torch.allclose(sigma, ours[1], atol=1e-5)
        assert torch.allclose(net.decode(mu), model.decode(mu), atol=1e-5)


def test_half_norms_stay_half():
    model = recipe.Autoencoder((8, 8, 16), 3, 8, 1, "none", False)
    seen = {}
    for name, m in model.net.named_modules():
        if isinstance(m, (recipe.HalfNorm, recipe.HalfUpsample)):
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    x = torch.rand(1, 1, 16, 16, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)[0]
    assert len(seen) > 10 and set(seen.values()) == {torch.bfloat16} and half.dtype is torch.float32
    assert (half - model(x)[0]).abs().max() < 0.05


def test_wrong_sizes_are_sentences(config):
    for changes, words in {
        ("channels", "12,24,48", "norm_groups", 8): "does not divide all of --channels 12,24,48; 2 or 3 or 4 or 6 or 12 does",
        ("target_size", "30,32,16"): r"multiple of 4 and at least 8. Try 32,32,16",
        ("target_size", "16,16,4"): r"Try 16,16,8",
        ("target_size", "16,16,8", "gan", 0.01): r"and the discriminator: .* at least 12. Try 16,16,12",
        ("latent_channels", 64): "patches of 4 x 4 x 4 voxels have 64 values",
        ("channels", "8;16"): "takes a width for each level",
        ("stages", "8,8@0.5"): "--stages has '8,8@0.5'",
        ("stages", "8,8,8@0.5 16,16,8@0.4"): "--stages has '16,16,8@0.4'",
        ("disc", "2"): "layers and width",
        ("target_size", "16,16,9", "device", "cuda:x"): "Try 16,16,8",  # and no traceback about the device before
    }.items():
        with pytest.raises(common.RecipeError, match=words):
            config(**dict(zip(changes[::2], changes[1::2])))
    with pytest.raises(common.RecipeError, match="target_size is '64,64'; it takes three numbers"):
        common.parse(recipe.Config, argv=["--target_size", "64,64"])
    assert config(channels="12,24,48").norm_groups == 6 and config(channels="24,48,64").norm_groups == 8


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_fill_what_is_not_given(preset, monkeypatch):
    cfg = recipe.Config(preset=preset, data_dir="x")
    assert {k: getattr(cfg, k) for k in recipe.PRESETS[preset]} == recipe.PRESETS[preset]
    assert recipe.Config(preset=preset, data_dir="x", channels="8,8,8").channels == "8,8,8"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = type("Card", (), {"total_memory": (int(preset[:-2]) - 0.4) * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    assert recipe.Config(data_dir="x").preset == preset and recipe.Config(data_dir="x").target_size == "128,128,64"


def test_the_guard_for_slow_half_precision():
    assert recipe.vol2col("2.9.1+cu128", 91002) and not recipe.vol2col("2.9.1+cu128", 91500)
    assert not recipe.vol2col("2.10.0", 91002) and not recipe.vol2col("2.8.0", 90000) and recipe.vol2col("2.9.0", None)


def test_a_missing_perceptual_network_is_one_sentence(config, monkeypatch):
    import monai.losses

    def missing(*args, **words):
        raise ModuleNotFoundError("No module named 'lpips'")

    monkeypatch.setattr(monai.losses, "PerceptualLoss", missing)
    with pytest.raises(
        common.RecipeError, match=r"needs lpips, torchvision .*No module named 'lpips'.*leave --perceptual away"
    ):
        recipe.train(config(perceptual=0.001, target_size="20,20,20"))


# --- training ---------------------------------------------------------------------------------------------------------
def test_divergence_is_the_textbooks():
    mu, sigma = torch.randn(2, 3, 4, 4, 4), torch.rand(2, 3, 4, 4, 4) + 0.1
    exact = torch.distributions.kl_divergence(torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(recipe.divergence(mu, sigma), exact.mean())


@pytest.mark.parametrize("kind, capability", [("cuda", (8, 0)), ("cuda", (7, 0)), ("cpu", (0, 0))])
@pytest.mark.parametrize(
    "changes", [{"attention": "all", "checkpointing": True}, {"gan": 0.01, "target_size": "16,16,12"}], ids=str
)
def test_the_contract_runs_on_fake_tensors(changes, kind, capability, config):
    cfg = config(use_amp=None, **changes)
    planned = common.Run(cfg, recipe.RECIPE, kind=kind, capability=capability)
    with FakeTensorMode():
        parts = recipe.build(cfg, planned)
        for planned.progress in (0.0, 0.999):
            losses = recipe.train_step(parts, recipe.example_batch(cfg, planned), cfg, planned)
            assert losses["loss"].shape == losses["norm"].shape == ()
        assert ("disc" in losses) == bool(cfg.gan)
        assert recipe.eval_step(parts, cfg, planned).shape[2:] == tuple(int(s) for s in cfg.target_size.split(","))


def test_one_crop_can_be_learned(config):
    cfg = config(learning_rate=3e-3, batch_size=1, target_size="16,16,8", channels="8,8,16")
    work = common.Run(cfg)
    parts, (linear, _) = recipe.build(cfg, work), fitted()
    parts.model.linear.load_state_dict(linear.state_dict())
    x = torch.from_numpy(recipe.phantom("phantom 1", (16, 16, 8))[4:20, 4:20, 2:10].astype(np.float32))[None, None]
    batch = {"image": x, "index": torch.zeros(1, dtype=torch.int64)}
    before = recipe.train_step(parts, batch, cfg, work)["l1"]
    for k in range(60):
        work.progress = 0.1 + k / 100
        after = recipe.train_step(parts, batch, cfg, work)["l1"]
    assert after < 0.8 * before


def test_the_discriminator_learns_and_pushes(config):
    cfg = config(gan=0.5, gan_start=0.0, target_size="16,16,12", channels="8,8,16")
    work = common.Run(cfg)
    work.progress = 0.5
    parts = recipe.build(cfg, work)
    stirred(parts.model)
    batch = recipe.example_batch(cfg, work)
    weights = [p.clone() for p in parts.disc.parameters()]
    losses = [recipe.train_step(parts, batch, cfg, work) for _ in range(12)]
    assert losses[-1]["disc"] < losses[0]["disc"] and losses[0]["fool"] > 0
    assert all(p.requires_grad for p in parts.disc.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(weights, parts.disc.parameters()))
    plain = recipe.train_step(recipe.build(config(target_size="16,16,12"), common.Run(cfg)), batch, config(), common.Run(cfg))
    assert "disc" not in plain


def test_stages_follow_each_other_and_continue_bit_for_bit(config, tmp_path, monkeypatch, capsys):
    """Crops grow at a third and two thirds of the run; stopped in each stage it goes on as if it had not been."""
    words = {"stages": "8,8,8@0.34 16,8,8@0.67", "num_steps": 6, "gan": 0.01, "gan_start": 0.7, "target_size": "16,16,12"}
    words |= {"channels": "4,8", "val_crops": 1}
    monkeypatch.setattr(recipe, "settle", lambda cfg, own=recipe.settle: own(cfg) if not cfg.gan else loose(cfg, own))
    recipe.train(config(**words, out_dir=str(tmp_path / "whole")))
    out = capsys.readouterr().out
    assert "crops of 8 x 8 x 8" in out and "with crops of 16 x 8 x 8" in out and "with crops of 16 x 16 x 12" in out
    for stop in (1, 3, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(common.Stopped, match=f"after update {stop}"):
                recipe.train(config(**words, out_dir=str(tmp_path / f"run{stop}")))
        recipe.train(config(**words, out_dir=str(tmp_path / f"run{stop}")))
        same(checkpoint(tmp_path / f"run{stop}")["parts"], checkpoint(tmp_path / "whole")["parts"])


def loose(cfg, own):
    """Settings with a discriminator whose earlier stages are smaller than it takes: it joins after them."""
    weight, cfg.gan = cfg.gan, 0.0
    own(cfg)
    cfg.gan = weight


def test_the_guides_stages(config, capsys):
    cfg = recipe.Config(stages="guide", target_size="64,64,32")
    assert [s[:2] for s in recipe.stages_of(cfg)] == [(0.2, (128, 128, 64)), (0.6, (256, 256, 64)), (1.0, (256, 256, 64))]
    words = {"stages": "8,8,8@0.5 perceptual", "num_steps": 1, "target_size": "16,16,8", "val_scans": 0}
    recipe.train(config(**words))
    out = capsys.readouterr().out
    assert "keeps crop 8,8,8, whatever --target_size is; its perceptual loss is off" in out
    cfg.perceptual = 0.001
    assert [s[2] for s in recipe.stages_of(cfg)] == [False, False, True]


# --- evaluation -------------------------------------------------------------------------------------------------------
def test_psnr_and_ssim():
    a = torch.rand(2, 1, 12, 12, 12)
    assert torch.allclose(recipe.psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-3)
    assert torch.allclose(recipe.ssim(a, a), torch.ones(2), atol=1e-5) and (recipe.ssim(a, torch.rand_like(a)) < 0.3).all()


def test_the_latent_scale_makes_latents_of_deviation_one(config, scans, tmp_path):
    metrics = recipe.train(config(data_dir=str(scans)))
    model = recipe.load(tmp_path / "run")
    assert float(model.latent_scale) == pytest.approx(metrics["latent_scale"], rel=1e-4)
    assert {"psnr", "psnr_pca", "ssim", "psnr_scan", "ssim_scan"} <= set(metrics)
    z = torch.cat([model.encode(torch.from_numpy(recipe.scale(scan(k))[0]).float()[None, None])[0] for k in range(4)])
    assert float(z.detach().std() * model.latent_scale) == pytest.approx(1, abs=0.4)


def test_windows_leave_no_seams(config):
    """Windows through a network that adds a random brightness to each: steps at their borders would be seen."""
    rng = torch.Generator().manual_seed(0)
    x = np.zeros((1, 112, 32, 32), np.float32)
    out = recipe.windows(lambda part: part + torch.rand(1, generator=rng), x, (64, 32, 32), 0.25)
    jump = max(out.diff(dim=d).abs().max() for d in (1, 2, 3))
    assert out.shape == x.shape and out.max() - out.min() > 0.2 and jump < 0.2 * (out.max() - out.min())


@pytest.mark.parametrize("shape, size", [((40, 24, 12), (16, 16, 8)), ((52, 10, 12), (64, 16, 32)), ((31, 17, 9), (16, 16, 8))])
def test_windows_meet_the_latents_grid(shape, size):
    """Means of 4 x 4 x 4 voxels, window by window: as of the whole scan, for any size of it."""
    volume = np.random.default_rng(0).random((1, *shape), np.float32)
    mean = lambda x: F.avg_pool3d(x, 4)  # noqa: E731
    more = [(0, 0), *((0, max(c, -(-v // 4) * 4) - v) for v, c in zip(shape, size))]
    whole = mean(torch.from_numpy(np.pad(volume, more, "symmetric"))[None])[0]
    for overlap in (0.0, 0.25, 0.3, 0.6):
        out = recipe.windows(mean, volume, size, overlap, factor=4)
        assert out.shape[1:] == tuple(-(-v // 4) for v in shape)
        assert torch.allclose(out, whole[(slice(None), *(slice(s) for s in out.shape[1:]))], atol=1e-5)
    again = recipe.windows(lambda z: F.interpolate(z, scale_factor=4), out.numpy(), [s // 4 for s in size], 0.25, enlarge=4)
    assert again.shape[1:] == tuple(4 * s for s in out.shape[1:]) and torch.allclose(again[:, ::4, ::4, ::4], out, atol=1e-5)


def test_a_run_stopped_while_the_linear_autoencoder_learns_begins_anew(config, tmp_path, monkeypatch):
    recipe.train(config(out_dir=str(tmp_path / "whole")))
    own = recipe.train_linear

    def stopping(linear, crops, data, cfg, work):
        work.asked = "SIGTERM"
        own(linear, crops, data, cfg, work)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train_linear", stopping)
        with pytest.raises(common.Stopped, match="before the first update"):
            recipe.train(config())
    assert not (tmp_path / "run" / "last.pt").exists()
    recipe.train(config())
    same(checkpoint(tmp_path / "run")["parts"], checkpoint(tmp_path / "whole")["parts"])


def test_thin_scans_are_judged_whole(config, tmp_path):
    (tmp_path / "thin").mkdir()
    for k in range(5):
        save(scan(k, (20, 20, 5)), tmp_path / "thin" / f"s{k}.nii.gz")
    metrics = recipe.train(config(data_dir=str(tmp_path / "thin"), num_steps=1))
    assert 0 < metrics["ssim_scan"] <= 1


def test_a_whole_folder_is_used_file_by_file(config, scans, tmp_path, capsys):
    recipe.train(config(data_dir=str(scans), num_steps=1))
    for place in ("sub-01", "sub-02"):
        (tmp_path / "bids" / place).mkdir(parents=True)
        save(scan(1), tmp_path / "bids" / place / "T1.nii.gz")
    (tmp_path / "bids" / "broken.nii.gz").write_bytes(b"x")
    paths = recipe.use(config(reconstruct=str(tmp_path / "bids")))
    assert [p.name for p in paths] == ["sub-01-T1-reconstructed.nii.gz", "sub-02-T1-reconstructed.nii.gz"]
    assert "broken.nii.gz is left out: cannot be read" in capsys.readouterr().out


def test_using_the_model_on_files(config, scans, tmp_path, capsys):
    recipe.train(config(data_dir=str(scans), num_steps=2))
    source = scans / "s1.nii.gz"
    (again,) = recipe.use(config(reconstruct=str(source)))
    assert again.name == "s1-reconstructed.nii.gz" and "dB" in capsys.readouterr().out
    made, original = nibabel.load(again), nibabel.load(source)
    assert made.shape == original.shape and np.allclose(made.affine, original.affine)
    values = original.get_fdata()
    assert np.corrcoef(made.get_fdata().ravel(), values.ravel())[0, 1] > 0.9 and made.get_fdata().max() > 500
    (latent,) = recipe.use(config(encode=str(source)))
    with np.load(latent) as state:
        assert state["latent"].shape == (3, 6, 5, 3) and set(state) == {
            "latent",
            "low",
            "high",
            "shape",
            "affine",
            "latent_scale",
        }
    (decoded,) = recipe.use(config(decode=str(latent)))
    assert nibabel.load(decoded).shape == original.shape
    assert np.corrcoef(nibabel.load(decoded).get_fdata().ravel(), values.ravel())[0, 1] > 0.9
    assert len(recipe.use(config(encode=str(scans)))) == 6
    wrong = {"takes files that end in .npz": {"decode": str(scans)}, "takes files that end in .nii": {"reconstruct": __file__}}
    for words, flags in (wrong | {"no such file": {"encode": "nowhere.nii"}}).items():
        with pytest.raises(common.RecipeError, match=words):
            recipe.use(config(**flags))
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(common.RecipeError, match="other.npz: "):
        recipe.use(config(decode=str(tmp_path / "other.npz")))
    with pytest.raises(common.RecipeError, match="holds no trained model"):
        recipe.use(config(reconstruct=str(source), out_dir=str(tmp_path / "none")))


def test_monais_latent_diffusion_takes_it(config):
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDPMScheduler

    model = recipe.make_model(config()).eval()
    unet = DiffusionModelUNet(3, 3, 3, channels=(8, 8), attention_levels=(False, False), norm_num_groups=4, num_res_blocks=1,
        num_head_channels=4)  # fmt: skip
    inferer = LatentDiffusionInferer(DDPMScheduler(10), scale_factor=float(model.latent_scale))
    x, noise = torch.rand(1, 1, 16, 16, 8), torch.randn(1, 3, 4, 4, 2)
    with torch.no_grad():
        out = inferer(inputs=x, autoencoder_model=model, diffusion_model=unet, noise=noise, timesteps=torch.tensor([3]))
    assert out.shape == noise.shape


@pytest.mark.skipif(not (REAL / "volumes").exists(), reason="needs the real scans")
def test_real_scans(config):
    cfg = config(target_size="64,64,32", channels="16,32,64")
    shapes = []
    for path in sorted((REAL / "volumes").glob("ms_*.nii.gz")):
        volume = recipe.load_volume({"image": path}, cfg)
        shapes.append(volume.shape)
        assert volume.dtype == np.float16 and 0 <= volume.min() and volume.max() == 1 and 0.05 < float(volume.mean()) < 0.6
    assert (306, 384, 39) in shapes and len(shapes) == 4


@pytest.mark.slow
def test_no_data_in_two_minutes(tmp_path):
    start = time.monotonic()
    words = [sys.executable, str(ROOT / "train_autoencoder3d.py"), "--out_dir", str(tmp_path / "run")]
    done = run(words, OMP_NUM_THREADS="2", timeout=400)
    assert done.returncode == 0 and time.monotonic() - start < 120 * slowness(), done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    judged = [r for r in rows if "metric" in r]
    assert judged[-1]["psnr"] > judged[0]["psnr"] + 0.1 and judged[-1]["psnr"] > judged[-1]["psnr_pca"] + 0.5
    assert list((tmp_path / "run").glob("sample-*.png")) and (tmp_path / "run" / "data.png").exists()
