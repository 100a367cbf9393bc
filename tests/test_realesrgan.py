"""Real-ESRGAN: the network and its fast form, each stage of the degradation, the formats, what a trained model is used for."""

import io
import json
import math
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, checkpoint, command, environment, run, same, slowness, stop_after
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import train_realesrgan_optimized as recipe
from common import RecipeError, Run, Stopped

QUIET = types.SimpleNamespace(check=lambda: None)


def draws(seed=0):
    """draw(kind, shape) from a generator of its own."""
    own = torch.Generator().manual_seed(seed)
    return lambda kind, shape: getattr(torch, kind)(shape, generator=own)


def noisy_model(blocks=2, scale=4, growth=12, features=24):
    torch.manual_seed(0)
    model = recipe.RRDBNet(features, blocks, growth, scale)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.eval()


def photo(h=96, w=104, seed=0):
    """A colour picture [h, w, 3] with edges and smooth parts."""
    big = Image.fromarray(recipe.coloured(f"photo {seed}"))
    return np.asarray(big.resize((w, h), Image.Resampling.BICUBIC))


# --- the network ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "preset, scale, count",
    [("optimized", 4, 832587), ("optimized", 2, 834531), ("optimized", 1, 842307), ("lightweight", 4, 2198755),
     ("lightweight", 1, 2211715), ("full", 4, 16697987), ("full", 2, 16703171)],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(preset, scale, count):
    with torch.device("meta"):
        model = recipe.RRDBNet(*recipe.PRESETS[preset], scale)
    assert sum(p.numel() for p in model.parameters()) == count


def test_names_and_shapes_are_those_of_published_weights():
    state = recipe.RRDBNet(24, 8, 12).state_dict()
    assert len(state) == 252 and {k.split(".")[0] for k in state} == {
        "conv_first", "body", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"}  # fmt: skip
    assert state["body.7.rdb3.conv5.weight"].shape == (24, 72, 3, 3) and state["body.0.rdb1.conv1.bias"].shape == (12,)


@pytest.mark.parametrize("features, count", [(64, 4376897), (32, 1094817), (24, 616057)])
def test_the_discriminator_is_the_published_one(features, count):
    model = recipe.Discriminator(features)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.rand(2, 3, 40, 32)).shape == (2, 1, 40, 32)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_the_fast_form_is_the_same_function(scale):
    model, x, results = noisy_model(scale=scale), torch.rand(2, 3, 16, 20), []
    for fast in (False, True):
        model.fast = fast
        model.zero_grad()
        out = model(x)
        (out**2).mean().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    (plain, slow), (quick, grads) = results
    assert plain.shape == (2, 3, 16 * scale, 20 * scale) and (plain - quick).abs().max() < 1e-5
    for a, b in zip(slow, grads):
        assert a.abs().max() > 0 and (a - b).abs().max() < 1e-5 * a.abs().max()


def test_the_fast_form_passes_a_numerical_gradient_check():
    torch.manual_seed(0)
    block, x = recipe.ResidualDenseBlock(3, 2).double(), torch.randn(1, 3, 4, 5, dtype=torch.double, requires_grad=True)
    rrdb = types.SimpleNamespace(rdb1=block, rdb2=block, rdb3=block)
    assert torch.autograd.gradcheck(lambda t: recipe.dense_body(types.SimpleNamespace(body=[rrdb]), t), (x,))


def test_the_fast_form_keeps_less_for_the_backward_pass():
    model, x = noisy_model(), torch.rand(1, 24, 64, 64)

    def kept(body):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            body(x)
        return sum(sizes)

    assert kept(lambda x: recipe.dense_body(model, x)) < 0.5 * kept(model.body)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_it_starts_near_an_enlarged_copy(scale):
    x = F.interpolate(torch.rand(1, 3, 6, 7), (48, 56), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        out = recipe.RRDBNet(24, 8, 12, scale)(x)
    half = F.avg_pool2d(x, 2) if scale == 1 else x
    smooth = F.interpolate(half, scale_factor=max(2, scale), mode="bilinear")
    assert out.shape == smooth.shape and (out - smooth)[..., 12:-12, 12:-12].abs().max() < 0.15
    assert (out - smooth)[..., 12:-12, 12:-12].abs().mean() < 0.03


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_tiled_is_untiled(scale):
    model, x = noisy_model(blocks=3, scale=scale), torch.rand(1, 3, 47, 61)
    whole = recipe.enlarge(model, x, 1000)
    assert whole.shape == (1, 3, 47 * scale, 61 * scale)
    for tile in (16, 24, 40):
        assert (recipe.enlarge(model, x, tile) - whole).abs().max() < 2e-5


def test_with_less_overlap_tiles_would_show(monkeypatch):
    model, x = noisy_model(blocks=3), torch.rand(1, 3, 40, 40)
    monkeypatch.setattr(recipe.RRDB, "reach", 1)
    assert (recipe.enlarge(model, x, 16) - recipe.enlarge(model, x, 1000)).abs().max() > 1e-4


# --- degradation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quality", [30, 50, 75, 95])
@pytest.mark.parametrize("shape", [(96, 104), (50, 37)])
def test_jpeg_agrees_with_pillow(quality, shape):
    """Within one level of 255 on average, which is a small part of what JPEG changes."""
    image, memory = photo(*shape), io.BytesIO()
    Image.fromarray(image).save(memory, "JPEG", quality=quality)
    pillow = np.asarray(Image.open(memory)).astype(float)
    batch = torch.cat([recipe.to_tensor(photo(*shape, seed=1)), recipe.to_tensor(image)])
    ours = recipe.to_array(recipe.jpeg(batch, torch.tensor([10.0, float(quality)]))[1:]).astype(float)
    share = {30: 0.2, 50: 0.2, 75: 0.3, 95: 0.6}[quality]
    assert abs(ours - pillow).mean() < min(1.0, share * abs(pillow - image).mean())
    assert abs(ours - image).mean() == pytest.approx(abs(pillow - image).mean(), rel=0.06)


@pytest.mark.parametrize("quality", [31, 37, 44, 49])
def test_jpeg_tables_are_pillows_to_the_number(quality, monkeypatch):
    """Of a picture of one coefficient per block, what comes back is a whole number of Pillow's quantiser."""
    memory = io.BytesIO()
    Image.fromarray(photo()).save(memory, "JPEG", quality=quality)
    luma, chroma = (np.array(t).reshape(8, 8) for t in Image.open(memory).quantization.values())
    seen, divide = [], torch.Tensor.__truediv__
    monkeypatch.setattr(torch.Tensor, "__truediv__", lambda a, b: seen.append(b) or divide(a, b))
    recipe.jpeg(recipe.to_tensor(photo()), torch.tensor([float(quality)]))
    tables = [t.reshape(8, 8).numpy() for t in seen if isinstance(t, torch.Tensor) and t.numel() == 64 and t.min() >= 1]
    assert len(tables) == 2 and (tables[0] == luma).all() and (tables[1] == chroma).all()


def test_bicubic_is_pillows_antialiased_one():
    image = photo()
    pillow = np.asarray(Image.fromarray(image).resize((26, 24), Image.Resampling.BICUBIC)).astype(int)
    low = recipe.degrade(recipe.to_tensor(image), "bicubic", 4, None)
    assert abs(recipe.to_array(low).astype(int) - pillow).max() <= 1


def test_light_noise_and_jpeg_have_their_shares(monkeypatch):
    coded = []
    monkeypatch.setattr(recipe, "jpeg", lambda x, quality: coded.append(quality) or torch.zeros_like(x))
    low = recipe.degrade(torch.full((4000, 3, 32, 32), 0.4), "light", 4, draws())
    black = (low == 0).flatten(1).all(1)
    assert black.float().mean() == pytest.approx(0.75, abs=0.03)
    assert coded[0].min() >= 50 and coded[0].max() <= 95 and coded[0].mean() == pytest.approx(72.5, abs=1)
    sigma = 255 * low[~black].flatten(1).std(1)
    noisy = sigma > 0.4  # below, rounding hides it
    assert noisy.float().mean() == pytest.approx(0.5, abs=0.06) and sigma.max() < 11.5
    assert sigma[noisy].mean() == pytest.approx(5.1, abs=0.5)


def test_blur_kernels_have_their_kinds_and_widths():
    u = torch.rand(4000, 9, generator=torch.Generator().manual_seed(0))
    kernels = recipe.blur_kernels(u, 3.0, 0.1)
    assert kernels.shape == (4000, 21, 21) and torch.allclose(kernels.sum((1, 2)), torch.ones(4000), atol=1e-4)
    ring = torch.arange(-10.0, 11.0)
    outside = (ring.abs()[:, None].maximum(ring.abs()[None]) > 3 + (u[:, 0, None, None] * 8).floor()) & (kernels != 0)
    assert not outside.any()  # sizes 7 to 21
    sizes = (kernels.abs().sum(1) > 0).sum(1)[u[:, 7] < 0.1]  # narrow Gaussians vanish before their edge
    assert set(sizes.tolist()) == set(range(7, 22, 2))
    rings = (kernels < 0).flatten(1).any(1)
    assert rings[u[:, 7] < 0.1].float().mean() > 0.8 and not rings[u[:, 7] >= 0.1].any()
    wide = (u[:, 0] > 0.9) & (u[:, 7] > 0.1) & (u[:, 3] < 0.45) & (u[:, 1] > 0.2) & (u[:, 1] < 0.8)  # isotropic and not cut off
    spread = (kernels * ring[:, None] ** 2).sum((1, 2)).sqrt()
    assert torch.allclose(spread[wide], 0.2 + 2.8 * u[wide, 1], rtol=0.1, atol=0.12)
    turned = (kernels - kernels.transpose(1, 2)).abs().flatten(1).sum(1) > 1e-3
    assert not turned[(u[:, 3] < 0.45)].any() and turned[(u[:, 3] > 0.45) & (u[:, 3] < 0.7)].float().mean() > 0.7


@pytest.mark.parametrize("kind", [0.2, 0.6, 0.75, 0.83, 0.9, 0.98])
def test_each_kernel_has_its_formula(kind):
    kernel = recipe.blur_kernels(torch.tensor([[0.99, 0.7, 0.3, kind, 0.2, 0.9, 0.5, 0.9, 0.0]]), 3.0, 0.1)[0].numpy()
    angle, one = -math.pi + 0.6 * math.pi, 0.2 + 0.7 * 2.8
    two = 0.2 + 0.2 * 2.8 if kind in (0.6, 0.83, 0.98) else one
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    y, x = np.mgrid[-10:11, -10:11]
    at = np.stack([x, y], -1)
    r2 = ((at @ np.linalg.inv(turn @ np.diag([one**2, two**2]) @ turn.T)) * at).sum(-1)
    want = np.exp(-0.5 * r2) if kind < 0.7 else np.exp(-0.5 * r2**2.5) if kind < 0.85 else 1 / (1 + r2**1.5)
    assert abs(kernel - want / want.sum()).max() < 1e-5


def test_low_pass_filters_cut_where_they_say():
    """The response of a jinc of cutoff c is 1 below and 0 above; 0.5 of the way the finite kernel smooths that."""
    u = torch.tensor([[0.99, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.0, 0.5]])
    for lowest in (math.pi / 5, math.pi / 3):
        kernel = recipe.blur_kernels(u, 3.0, 0.1, lowest)[0]
        cutoff = (lowest + math.pi) / 2
        waves = [float((kernel.sum(0) * torch.cos(w * torch.arange(-10.0, 11.0))).sum()) for w in (0.7 * cutoff, 1.25 * cutoff)]
        assert waves[0] == pytest.approx(1, abs=0.12) and abs(waves[1]) < 0.12


def test_real_has_its_stages_in_order_and_with_their_strengths(monkeypatch):
    log = []

    def watch(name, whole):
        monkeypatch.setattr(recipe, name, lambda *a: log.append((name, a)) or whole(*a))

    for name in ("blur", "resize", "add_noise", "jpeg"):
        watch(name, getattr(recipe, name))
    recipe.real_chain(torch.rand(800, 3, 32, 32), (32, 32), draws())

    def calls(name):
        return [a for n, a in log if n == name]

    assert " ".join(n for n, _ in log) == "blur resize add_noise jpeg blur resize add_noise jpeg resize blur jpeg"
    assert [a[3:] for a in calls("add_noise")] == [((1, 30), (0.05, 3.0)), ((1, 25), (0.05, 2.5))]
    for _, quality in calls("jpeg"):
        assert 30 <= quality.min() < 32 and 93 < quality.max() <= 95
    factor = calls("resize")[1][3][0] / 32
    assert 0.28 <= factor.min() < 0.36 and 1.15 < factor.max() <= 1.2
    assert (factor < 1).float().mean() == pytest.approx(0.43, abs=0.07)  # rounding down takes some of those kept
    # whether a picture is blurred the second time is decided by a number that nothing before it moves
    blurred = draws()("rand", (800, 48))[:, 18 + 9] < 0.8
    x, kernels = calls("blur")[1]
    assert 0.75 < blurred.float().mean() < 0.85
    assert torch.equal(calls("resize")[1][0][~blurred], x[~blurred])
    assert torch.equal(calls("resize")[1][0][blurred], recipe.blur(x, kernels)[blurred])


def test_blurring_is_a_convolution_of_each_picture_with_its_kernel():
    x, kernels = torch.rand(3, 3, 30, 26), recipe.blur_kernels(torch.rand(3, 9), 3.0, 0.5)
    out = recipe.blur(x, kernels)
    padded = F.pad(x, (10,) * 4, mode="reflect")
    for i in range(3):
        for c in range(3):
            own = F.conv2d(padded[i, c][None, None], kernels[i][None, None])[0, 0]
            assert torch.allclose(out[i, c], own, atol=1e-5)


@pytest.mark.parametrize("mode, u", [("area", 0.1), ("bilinear", 0.5), ("bicubic", 0.9)])
@pytest.mark.parametrize("size", [12, 30, 37, 55])
def test_resizing_agrees_with_torch(mode, u, size):
    """Pictures of different sizes in one batch; away from the edges, where torch repeats pixels and this renormalises."""
    x = torch.rand(2, 3, 40, 40)
    content = [torch.tensor([37.0, 40.0])] * 2
    out = recipe.resize(x, torch.tensor([u, u]), content, [torch.tensor([float(size), 20.0])] * 2, [60, 60])
    assert out.shape == (2, 3, 60, 60)
    for i, (old, new) in enumerate(((37, size), (40, 20))):
        if mode == "area" and (new > old or old % new):
            continue  # torch rounds its areas to whole pixels
        own = F.interpolate(x[i : i + 1, :, :old, :old], (new, new), mode=mode)[0]
        edge = 0 if mode == "area" else math.ceil(2 * new / old)
        inner = slice(edge, new - edge)
        assert torch.allclose(out[i][:, inner, inner], own[:, inner, inner], atol=1e-4)
        assert torch.allclose(out[i][:, :new, new:], out[i][:, :new, new - 1 : new].expand(-1, -1, 60 - new))


def test_noise_has_its_kinds_and_strengths():
    n, x = 3000, torch.full((3000, 3, 16, 16), 0.5)
    u, normal = draws()("rand", (n, 4)), draws(1)("randn", (n, 3, 16, 16))
    gaussian, gray = u[:, 0] < 0.5, u[:, 1] < 0.4
    added = recipe.add_noise(x, u, normal, (1, 30), (0.05, 3.0)) - x
    same_in_all = (added[:, :1] - added).abs().flatten(1).amax(1) == 0
    assert torch.equal(same_in_all, gray) and 0.35 < gray.float().mean() < 0.45
    sigma = added.flatten(1).std(1)
    assert torch.allclose(sigma[gaussian], (1 + 29 * u[gaussian, 2]) / 255, rtol=0.25)
    scale = 0.05 + 2.95 * u[~gaussian, 3]
    assert torch.allclose(sigma[~gaussian], scale * math.sqrt(0.5 / 256), rtol=0.25)
    quarter = recipe.add_noise(torch.full_like(x, 0.125), u, normal, (1, 15), (0.05, 1.0)) - 0.125
    whole = recipe.add_noise(x, u, normal, (1, 15), (0.05, 1.0)) - x
    ratio = quarter.flatten(1).std(1) / whole.flatten(1).std(1)  # Poisson's grows with the root of the light
    assert ratio[~gaussian].median() == pytest.approx(0.5, abs=0.02) and ratio[gaussian].median() > 0.97


@pytest.mark.parametrize("kind", ["bicubic", "light", "real"])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_small_pictures_are_whole_levels_of_their_size(kind, scale):
    low = recipe.degrade(torch.rand(3, 3, 64, 48), kind, scale, draws())
    assert low.shape == (3, 3, 64 // scale, 48 // scale) and 0 <= low.min() and low.max() <= 1
    assert torch.allclose(low * 255, (low * 255).round(), atol=1e-4) and torch.isfinite(low).all()


def test_real_resizes_have_their_shares_and_ranges(monkeypatch):
    seen, whole = [], recipe.resize
    monkeypatch.setattr(
        recipe, "resize", lambda x, u, now, then, total: seen.append((now, then)) or whole(x, u, now, then, total)
    )
    recipe.degrade(torch.rand(600, 3, 32, 32), "real", 4, draws())
    (first, second, third) = [then[0] for _, then in seen]
    factor = first / 32
    assert (factor == 1).float().mean() == pytest.approx(0.1, abs=0.05)
    assert (factor > 1).float().mean() == pytest.approx(0.2, abs=0.06)
    assert 0.12 <= factor.min() < 0.2 and 1.4 < factor.max() <= 1.5
    assert second.min() >= 1 and second.max() <= 1.2 * 8 and (third == 8).all()
    assert torch.equal(first, seen[1][0][0])  # what one stage makes is what the next one takes


def test_a_picture_is_degraded_by_its_own_numbers_alone():
    x, numbers = torch.rand(4, 3, 48, 48), draws()
    u, one, two = numbers("rand", (4, 48)), numbers("randn", (4, 3, 72, 72)), numbers("randn", (4, 3, 15, 15))

    def chain(rows):
        left = iter([u[rows], one[rows], two[rows]])
        return recipe.degrade(x[rows], "real", 4, lambda kind, shape: next(left))

    assert torch.allclose(chain(slice(None))[2:], chain(slice(2, None)), atol=1.01 / 255)
    assert not torch.allclose(chain(slice(0, 1)), chain(slice(1, 2)), atol=0.05)


# --- data -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six colour pictures of 64 x 72 and a gray one, and inverted small ones of a quarter beside them."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("high", "low"):
        (root / name).mkdir()
    for i in range(6):
        image = photo(64, 72, i)
        Image.fromarray(image).save(root / "high" / f"{i}.png")
        Image.fromarray(255 - image[::4, ::4]).save(root / "low" / f"{i}.bmp")
    Image.fromarray(photo(64, 72, 7)[..., 0]).save(root / "high" / "gray.png")
    Image.fromarray(255 - photo(64, 72, 7)[::4, ::4, 0]).save(root / "low" / "gray.bmp")
    return root


def test_own_pairs_replace_the_degradation(pictures):
    cfg = recipe.Config(data_dir=str(pictures / "high"), lr_dir=str(pictures / "low"), target_size=32)
    paths = sorted((pictures / "high").iterdir())
    partners = recipe.partners_of(paths, pictures / "high", cfg)
    items = common.Items(paths, lambda p: recipe.load_pair(p, cfg, partners, 32))
    batch = recipe.Crops(items, cfg).__getitems__([(e, i) for e in range(4) for i in range(7)])
    assert batch["hr"].shape == (28, 3, 32, 32) and batch["lr"].shape == (28, 3, 8, 8)
    for hr, lr in zip(batch["hr"], batch["lr"]):  # aligned, and turned alike: one of the four offsets that a turn leaves
        gaps = [(255 - hr[:, a::4, b::4].int() - lr.int()).abs().max() for a in (0, 3) for b in (0, 3)]
        assert min(gaps) == 0
    pair = recipe.make_pair({k: v[:4] for k, v in batch.items()}, cfg, Run(cfg))
    assert torch.equal((pair["lr"] * 255).round().byte(), batch["lr"][:4])
    for path in (paths[0], paths[-1]):
        high, low = recipe.load_pair(path, cfg, partners)
        assert high.ndim == low.ndim == (2 if path.stem == "gray" else 3) and (255 - high[::4, ::4] == low).all()


def test_pairs_that_do_not_fit_are_sentences(pictures, tmp_path):
    shutil.copytree(pictures / "low", tmp_path / "low")
    cfg = recipe.Config(data_dir=str(pictures / "high"), lr_dir=str(tmp_path / "low"), target_size=32)
    paths = sorted((pictures / "high").iterdir())
    Image.fromarray(photo(10, 10)).save(tmp_path / "low" / "0.bmp")
    with pytest.raises(ValueError, match="its small picture has 10 x 10 pixels, not 18 x 16"):
        recipe.load_pair(paths[0], cfg, recipe.partners_of(paths, pictures / "high", cfg))
    (tmp_path / "low" / "3.bmp").unlink()
    with pytest.raises(RecipeError, match=r"1 of 7 pictures have no partner of that name in .*3\.png"):
        recipe.partners_of(paths, pictures / "high", cfg)
    with pytest.raises(RecipeError, match="--lr_dir and --val_dir need --data_dir"):
        recipe.train(recipe.Config(lr_dir=str(tmp_path), out_dir=str(tmp_path / "run")))


def test_pairs_are_found_by_path_before_name(tmp_path):
    for name in (
        "hr/a.png",
        "hr/b/a.png",
        "lr/a.png",
        "lr/b/a.png",
        "lr/b/only.png",
        "val/a.png",
        "lr/val/a.png",
        "hr/c/only.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(32, 32)).save(tmp_path / name)
    cfg, found = recipe.Config(lr_dir=str(tmp_path / "lr")), {}
    for root in ("hr", "val"):
        paths = sorted((tmp_path / root).rglob("*.png"))
        found |= recipe.partners_of(paths, tmp_path / root, cfg)
    found = {k.relative_to(tmp_path).as_posix(): v.relative_to(tmp_path).as_posix() for k, v in found.items()}
    assert found == {
        "hr/a.png": "lr/a.png",
        "hr/b/a.png": "lr/b/a.png",
        "hr/c/only.png": "lr/b/only.png",
        "val/a.png": "lr/val/a.png",
    }
    (tmp_path / "list.csv").write_text("image\nb/a.png\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.png").write_bytes((tmp_path / "hr/a.png").read_bytes())
    assert recipe.partners_of([tmp_path / "b" / "a.png"], tmp_path / "list.csv", cfg) == {
        tmp_path / "b" / "a.png": tmp_path / "lr" / "b" / "a.png"}  # fmt: skip
    (tmp_path / "hr" / "d").mkdir()
    with pytest.raises(RecipeError, match="1 of 1 pictures have no partner"):  # two of that name elsewhere: which?
        recipe.partners_of(
            [tmp_path / "hr" / "d" / "a.png"], tmp_path / "hr", recipe.Config(lr_dir=str(tmp_path / "lr" / ".."))
        )


def test_large_pairs_are_cut_alike(tmp_path):
    high = np.random.default_rng(0).integers(0, 256, (803, 1001, 3), np.uint8)
    (tmp_path / "low").mkdir()
    Image.fromarray(high).save(tmp_path / "a.png")
    Image.fromarray(high[::4, ::4][:200, :250]).save(tmp_path / "low" / "ax4.png")
    cfg = recipe.Config(data_dir=str(tmp_path), lr_dir=str(tmp_path / "low"))
    partners = recipe.partners_of([tmp_path / "a.png"], tmp_path, cfg)
    big, small = recipe.load_pair(tmp_path / "a.png", cfg, partners)
    assert big.shape == (768, 768, 3) and (big[::4, ::4] == small).all()


def test_small_pictures_are_mirrored_to_the_crop():
    image = photo(40, 90)
    out = recipe.mirrored(image, 64)
    assert out.shape == (64, 90, 3) and (out[40:64] == image[39:15:-1]).all() and (out[:40] == image).all()


def test_crops_are_pure_and_use_all_eight_turns(pictures):
    cfg = recipe.Config(data_dir=str(pictures / "high"), target_size=32)
    items = common.Items(sorted((pictures / "high").iterdir()), lambda p: recipe.load_pair(p, cfg, {}, 32))
    data, turns = recipe.Crops(items, cfg), set()
    keys = [(e, i) for e in range(8) for i in range(7)]
    batch, again = data.__getitems__(keys), data.__getitems__(keys[3:9])
    assert torch.equal(batch["hr"][3:9], again["hr"]) and "lr" not in batch
    for (_, i), crop in zip(keys, batch["hr"].numpy()):
        whole = np.broadcast_to(items[i][0].reshape(64, 72, -1), (64, 72, 3))
        views = np.lib.stride_tricks.sliding_window_view(whole, (32, 32), (0, 1))
        for turn in range(8):
            back = crop.transpose(0, 2, 1) if turn & 4 else crop
            back = back[:, :: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]
            if (views == back).all((2, 3, 4)).any():
                turns.add(turn)
    assert turns == set(range(8))


def test_validation_small_pictures_are_the_same_each_time(pictures):
    cfg = recipe.Config(data_dir=str(pictures / "high"), degradation="real", scale=2)
    path = pictures / "high" / "1.png"
    (high, low), (_, again) = (recipe.load_pair(path, cfg, {}) for _ in range(2))
    assert high.shape == (64, 72, 3) and low.shape == (32, 36, 3) and (low == again).all()
    high, low = recipe.load_pair(pictures / "high" / "gray.png", cfg, {})
    assert high.ndim == low.ndim == 2


@pytest.mark.skipif(not (REAL / "Set5").is_dir(), reason="the real images are not here")
def test_bicubic_reads_the_published_figures_on_set5_and_set14():
    for name, scale, figure in (("Set5", 2, 33.66), ("Set5", 4, 28.42), ("Set14", 4, 26.00)):
        cfg = recipe.Config(scale=scale, degradation="bicubic")
        rows = []
        for path in sorted((REAL / name).glob("*.png")):
            high, low = recipe.load_pair(path, cfg, {})
            plain = recipe.to_array(F.interpolate(recipe.to_tensor(low), scale_factor=scale, mode="bicubic", antialias=True))
            plain = plain @ np.float32([0.299, 0.587, 0.114]) if high.ndim == 2 else plain
            a, b = (torch.from_numpy(recipe.luma(p))[scale:-scale, scale:-scale] for p in (plain, high))
            rows.append(recipe.psnr(a, b))
        assert sum(rows) / len(rows) == pytest.approx(figure, abs=0.03)


def test_sizes_are_checked(tmp_path):
    for changes, words in (
        ({"target_size": 36}, "--target_size is 36; it takes a multiple of 8"),
        ({"scale": 1, "degradation": "bicubic"}, "--scale 1 with --degradation bicubic"),
        ({"init": str(tmp_path / "none.pth")}, "Cannot read the weights"),
        ({"gan": True, "patience": 3}, "--patience would end the run before the second stage"),
        ({"vgg": "vgg19.pth"}, "--vgg is for the second stage; add --gan"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe.train(recipe.Config(out_dir=str(tmp_path / "run"), **changes))


# --- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cuda"])
@pytest.mark.parametrize("changes", [{}, {"degradation": "real", "gan": True}, {"preset": "full", "scale": 2, "grow": True}])
def test_the_contract_runs_on_fake_tensors(kind, changes):
    cfg = recipe.Config(batch_size=2, accumulate=2, target_size=32, **changes)
    run = Run(cfg, kind=kind)
    with FakeTensorMode():
        parts = recipe.build(cfg, run)
        for run.progress in (0.0, 1.0):
            losses = recipe.train_step(parts, recipe.example_batch(cfg, run), cfg, run)
            assert losses["loss"].shape == losses["norm"].shape == ()
        assert ("disc" in losses) == cfg.gan
        assert recipe.eval_step(parts, cfg, run).shape[1] == 3


def test_example_batch_has_the_shapes_of_a_real_one(pictures):
    paths = sorted((pictures / "high").iterdir())

    def check(cfg):
        partners = recipe.partners_of(paths, pictures / "high", cfg)
        data = recipe.Crops(common.Items(paths, lambda p: recipe.load_pair(p, cfg, partners, 32)), cfg)
        real, made = data.__getitems__([(0, i) for i in range(3)]), recipe.example_batch(cfg, Run(cfg))
        assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}

    base = {"data_dir": str(pictures / "high"), "target_size": 32, "batch_size": 3}
    check(recipe.Config(**base))
    check(recipe.Config(**base, lr_dir=str(pictures / "low")))


def textures_batch(cfg, n):
    items = common.Items([f"train {i}" for i in range(n)], lambda name: recipe.load_pair(name, cfg, {}, cfg.target_size))
    return recipe.Crops(items, cfg).__getitems__([(0, i) for i in range(n)])


@pytest.mark.parametrize("scale", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4])
def test_one_batch_can_be_learned(scale):
    cfg = recipe.Config(batch_size=2, target_size=64, device="cpu", use_amp=False, scale=scale, degradation="light")
    run = Run(cfg)
    parts, batch, losses = recipe.build(cfg, run), textures_batch(cfg, 2), []
    for run.step in range(40):
        run.progress = run.step / 40
        run.generator.manual_seed(0)  # the same small pictures each time
        losses.append(float(recipe.train_step(parts, batch, cfg, run)["loss"]))
    assert min(losses) < 0.6 * losses[0]


def test_accumulation_equals_the_full_batch_with_random_degradation():
    results = []
    for micro in (4, 3, 1):
        cfg = recipe.Config(batch_size=4, target_size=32, device="cpu", use_amp=False, degradation="real")
        run = Run(cfg)
        run.micro = micro
        parts = recipe.build(cfg, run)
        run.generator.manual_seed(3)
        recipe.train_step(parts, textures_batch(cfg, 4), cfg, run)
        results.append([p.grad.clone() for p in parts.model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).abs().max() <= 3e-3 * a.abs().max()  # a sign of the L1 loss may turn


def test_crops_grow_with_the_run():
    cfg = recipe.Config(target_size=128, grow=True)
    run, sizes = Run(cfg), []
    for run.progress in (0.0, 0.1, 0.2, 0.4, 0.6, 0.79, 0.8, 1.0):
        pair = recipe.make_pair(recipe.example_batch(cfg, run), cfg, run)
        assert pair["lr"].shape[-1] * 4 == pair["hr"].shape[-1]
        sizes.append(pair["hr"].shape[-1])
    assert sizes == [64, 64, 80, 96, 112, 112, 128, 128]


def test_the_stages_are_functions_of_progress():
    cfg = recipe.Config(gan=True, gan_share=0.25, target_size=32, batch_size=2, device="cpu", use_amp=False)
    run = Run(cfg)
    parts, batch, rates = recipe.build(cfg, run), recipe.example_batch(cfg, run), []
    for run.progress in (0.225, 0.7499, 0.75, 0.76, 0.9999):
        before = [p.clone() for p in parts.disc.parameters()]
        losses = recipe.train_step(parts, batch, cfg, run)
        adversarial = run.progress >= 0.75
        assert ("fool" in losses) == adversarial
        if run.progress < 0.99:  # at the very end the rate is next to nothing
            assert any(not torch.equal(a, b) for a, b in zip(before, parts.disc.parameters())) == adversarial
        rates.append(parts.opt.param_groups[0]["lr"] / cfg.learning_rate)
        assert all(p.requires_grad for p in parts.disc.parameters())
    assert rates[0] == pytest.approx(1) and rates[1] < 1e-3 and 0.05 < rates[3] <= 0.1 and rates[4] < 1e-3


@pytest.mark.slow
def test_the_discriminator_learns_what_the_network_makes_and_pushes_it():
    cfg = recipe.Config(gan=True, gan_share=1.0, target_size=32, batch_size=4, device="cpu", use_amp=False, learning_rate=0)
    run, losses = Run(cfg), []
    parts, batch = recipe.build(cfg, run), textures_batch(cfg, 4)
    parts.disc_opt.param_groups[0]["peak"] = 5e-4
    run.progress = 0.2
    for run.step in range(60):
        run.generator.manual_seed(0)
        losses.append({k: float(v) for k, v in recipe.train_step(parts, batch, cfg, run).items()})
    assert losses[0]["disc"] == pytest.approx(2 * math.log(2), abs=0.1)
    assert losses[-1]["disc"] < losses[0]["disc"] - 0.1 and losses[-1]["fool"] > losses[0]["fool"]
    assert all(math.isfinite(v) for x in losses for v in x.values())


def test_the_discriminator_pushes_the_network():
    cfg, grads = recipe.Config(gan=True, gan_share=1.0, **SMALL), []
    for gain in (1, 0):
        run = Run(cfg)
        run.progress, parts = 0.5, recipe.build(cfg, run)
        with torch.no_grad():
            parts.disc.conv9.weight.mul_(gain)  # without it the logits are the same everywhere
        recipe.train_step(parts, textures_batch(cfg, 2), cfg, run)
        grads.append(parts.model.conv_last.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() > 1e-3 * grads[1].abs().max()


@pytest.mark.parametrize("capability, dtype", [((7, 5), None), ((8, 0), torch.bfloat16)])
def test_the_discriminator_stays_out_of_fp16(capability, dtype, monkeypatch):
    seen, forward = [], recipe.Discriminator.forward

    def watched(model, x):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return forward(model, x)

    monkeypatch.setattr(recipe.Discriminator, "forward", watched)
    cfg = recipe.Config(gan=True, target_size=32, batch_size=1)
    run = Run(cfg, kind="cuda", capability=capability)
    run.progress = 1.0
    with FakeTensorMode():
        recipe.train_step(recipe.build(cfg, run), recipe.example_batch(cfg, run), cfg, run)
    assert set(seen) == {dtype} and len(seen) == 2


def test_one_scaler_serves_both_optimizers():
    """With fp16's loss scaling the two updates of a step give what they give without."""
    results = []
    for scale in (None, 1024.0):
        cfg = recipe.Config(gan=True, gan_share=1.0, **SMALL)
        run = Run(cfg)
        run.progress, parts = 0.5, recipe.build(cfg, run)
        if scale:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        losses = recipe.train_step(parts, textures_batch(cfg, 2), cfg, run)
        results.append((losses, [*parts.model.parameters(), *parts.disc.parameters()]))
    (plain, weights), (scaled, others) = results
    assert all(float(plain[k]) == pytest.approx(float(scaled[k]), rel=1e-4) for k in plain)
    for a, b in zip(weights, others):
        assert (a - b).abs().max() < 1e-4


SMALL = {"target_size": 32, "batch_size": 2, "device": "cpu", "use_amp": False, "val_images": 1, "num_workers": 0}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """quick(**settings) -> metrics of a run of the recipe in this process, on eight textures and without exports."""
    monkeypatch.setattr(recipe, "BUILT_IN", 8)
    monkeypatch.setattr(recipe, "export", lambda *a: None)
    return lambda **more: recipe.train(recipe.Config(**{"out_dir": str(tmp_path / "run")} | SMALL | more))


def test_weights_to_start_from_reach_model_and_average(quick, tmp_path):
    goal = dict(noisy_model(8).state_dict())
    torch.save(goal, tmp_path / "w.pth")
    quick(init=str(tmp_path / "w.pth"), num_steps=1, learning_rate=0.0)
    parts = checkpoint(tmp_path / "run")["parts"]
    same(dict(parts["model"]), goal)
    for name, value in parts["ema"]["model"].items():
        assert torch.allclose(value, goal[name], atol=1e-6)


def judged(folder):
    """The steps of the evaluations in a log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row.get("metric") == "psnr"]


def test_it_evaluates_every_two_epochs(quick, tmp_path):
    quick(num_epochs=8.0)
    assert judged(tmp_path / "run") == [0, 2, 8, 16, 24, 32]  # 2: the verdict at 5 %


def test_no_epochs_at_all_only_export(quick, tmp_path):
    assert quick(num_epochs=0.0)["steps"] == 0


def scores(monkeypatch, psnr):
    """Let evaluations find psnr(step)."""
    rest = {"psnr_bicubic": 1.0, "colour_drift": 0.0, "ssim": 1.0}
    monkeypatch.setattr(recipe, "evaluate", lambda model, val, cfg, run: {"psnr": psnr(run.step), **rest})


def test_the_best_weights_are_those_of_the_first_stage(quick, tmp_path, monkeypatch, capsys):
    scores(monkeypatch, lambda step: 20.0 + step)
    metrics = quick(gan=True, gan_share=0.45, num_steps=20, val_epochs=0.0)
    assert metrics["steps"] == 20 and metrics["psnr"] == 40
    assert checkpoint(tmp_path / "run", "best.pt")["step"] == 11  # the last update of the first stage, at its lowest rate
    out = capsys.readouterr().out
    assert "The second stage begins" in out and "gradients and spectra stand in" in out


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_stage_may_have_it_all(quick, tmp_path, monkeypatch, capsys, share):
    scores(monkeypatch, lambda step: 20.0 + step)
    quick(gan=True, gan_share=share, num_steps=6, val_epochs=0.0)
    assert "The second stage begins" not in capsys.readouterr().out and checkpoint(tmp_path / "run", "best.pt")["step"] == 6
    used = any(float(state["step"]) for state in checkpoint(tmp_path / "run")["parts"]["disc_opt"]["state"].values())
    assert used == (share == 1)


def test_a_stop_at_the_turn_judges_the_first_stage_all_the_same(quick, tmp_path, monkeypatch):
    """The evaluation after the last update of the first stage is cut off; the continued run makes it up."""
    scores(monkeypatch, lambda step: 20.0 + step)
    evaluate, done = recipe.evaluate, []

    def cut_off(model, val, cfg, run):
        if run.step == 11 and not done:
            done.append(1)
            run.clock, run.asked = common.Clock(), "SIGTERM"
            run.check()
        return evaluate(model, val, cfg, run)

    monkeypatch.setattr(recipe, "evaluate", cut_off)
    with pytest.raises(common.Stopped):
        quick(gan=True, gan_share=0.45, num_steps=20, val_epochs=0.0)
    assert checkpoint(tmp_path / "run")["step"] == 11
    quick(gan=True, gan_share=0.45, num_steps=20, val_epochs=0.0)
    assert checkpoint(tmp_path / "run", "best.pt")["step"] == 11


def test_patience_ends_a_run_early(quick, monkeypatch):
    scores(monkeypatch, lambda step: 20.0 - step)
    assert quick(num_steps=40, val_epochs=0.0, patience=2)["steps"] < 12


def test_a_run_stopped_in_the_second_stage_continues_bit_for_bit(quick, tmp_path, monkeypatch):
    def go(name):
        quick(target_size=32, batch_size=2, num_steps=6, gan=True, gan_share=0.5, val_images=1, out_dir=str(tmp_path / name))

    go("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped, match="after update 5, which is saved"):
            go("cut")
    go("cut")
    same(checkpoint(tmp_path / "whole")["parts"], checkpoint(tmp_path / "cut")["parts"])


@pytest.mark.slow
def test_two_processes_train_network_and_discriminator(tmp_path):
    """Their discriminators see halves of a batch, so the figures are near those of one process, not the same bits."""
    words = "--target_size 32 --num_steps 4 --gan --gan_share 0.5 --val_images 1 --no-use_amp --device cpu".split()
    one, two = (
        command(*words, "--out_dir", tmp_path / n, "--batch_size", size, recipe="train_realesrgan_optimized", drive={})
        for n, size in (("one", 4), ("two", 2))
    )
    done = run([two[0], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *two[1:]])
    assert done.returncode == 0 and "The second stage begins" in done.stdout, done.stderr[-3000:]
    assert run(one).returncode == 0
    last = [json.loads((tmp_path / n / "log.jsonl").read_text().splitlines()[-2]) for n in ("one", "two")]
    assert last[0]["step"] == last[1]["step"] == 4
    for key in ("l1", "detail", "fool", "disc"):
        assert last[0][key] == pytest.approx(last[1][key], rel=0.05)


def test_vgg_is_used_where_its_file_is_given(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(recipe.Perceptual("").state_dict(), tmp_path / "vgg19.pth")
    monkeypatch.setattr(recipe, "detail_loss", lambda *a: 1 / 0)
    cfg = recipe.Config(gan=True, gan_share=1.0, vgg=str(tmp_path / "vgg19.pth"), **SMALL)
    run = Run(cfg)
    parts = recipe.build(cfg, run)
    assert recipe.train_step(parts, recipe.example_batch(cfg, run), cfg, run)["detail"] > 0
    assert set(parts.state_dict()) == {"model", "ema", "opt", "disc", "disc_opt"}  # VGG is in no checkpoint
    assert recipe.Perceptual.layers == {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}


def test_vgg_weights_by_file(tmp_path):
    torch.manual_seed(0)
    made = recipe.Perceptual("").state_dict()
    assert len(made) == 32 and made["features.34.weight"].shape == (512, 512, 3, 3)
    torch.save(made | {"classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg19.pth")
    loss = recipe.Perceptual(tmp_path / "vgg19.pth")
    same(loss.state_dict(), made)
    x, goal = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True)
    loss(x, goal).backward()
    assert goal.grad is None  # nothing is kept for the target's half
    assert x.grad.abs().max() > 0 and not any(p.requires_grad for p in loss.parameters()) and loss(x, x) == 0
    del made["features.2.weight"]
    torch.save(made, tmp_path / "vgg19.pth")
    with pytest.raises(RecipeError, match="is no VGG19"):
        recipe.Perceptual(tmp_path / "vgg19.pth")
    with pytest.raises(RecipeError, match="Cannot read the weights"):
        recipe.Perceptual(tmp_path / "gone.pth")


def test_detail_loss_sees_blur_and_not_brightness():
    x = recipe.to_tensor(photo())
    blurred = F.avg_pool2d(x, 3, 1, 1)
    assert recipe.detail_loss(x, x) == 0 and recipe.detail_loss(blurred, x) > 3 * recipe.detail_loss(x + 0.02, x)


class Gray(torch.nn.Module):
    """A model whose results have lost their colour."""

    def __init__(self):
        super().__init__()
        self.scale, self.weight = 4, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return F.interpolate(x, scale_factor=4).mean(1, keepdim=True).expand(-1, 3, -1, -1)


def test_a_drift_of_colours_is_measured_and_said(pictures, tmp_path, capsys):
    cfg = recipe.Config(data_dir=str(pictures / "high"), degradation="bicubic", out_dir=str(tmp_path))
    val = [recipe.load_pair(pictures / "high" / f"{i}.png", cfg, {}) for i in range(3)]
    means = [recipe.to_tensor(low).mean((2, 3))[0] for _, low in val]
    expected = 255 * sum(float((m.mean() - m).abs().max()) for m in means) / 3
    assert recipe.evaluate(Gray(), val, cfg, QUIET)["colour_drift"] == pytest.approx(expected, abs=0.3) and expected > 5
    run = Run(cfg)
    run.clock, run.step, run.progress, run.main = common.Clock(), 5, 0.5, False
    recipe.assess(types.SimpleNamespace(ema=types.SimpleNamespace(model=Gray())), val, cfg, run)
    assert "Colours drift: results differ" in capsys.readouterr().out
    run.step, run.judged, good = 6, -1, recipe.RRDBNet(24, 1, 12)
    good.forward = lambda x: F.interpolate(x, scale_factor=4, mode="bicubic")
    recipe.assess(types.SimpleNamespace(ema=types.SimpleNamespace(model=good)), val, cfg, run)
    assert "Colours drift" not in capsys.readouterr().out


def test_the_settings_of_the_guide_come_from_the_environment(pictures, tmp_path):
    words = ["--data_dir", pictures / "high", "--out_dir", tmp_path / "run", "--device", "cpu", "--degradation", "bicubic"]
    line = command(*words, recipe="train_realesrgan_optimized", drive={})
    done = run(line, BATCH_SIZE="2", TARGET_SIZE="64", NUM_EPOCHS="4", SAMPLE_RATIO="0.5")
    assert done.returncode == 0, done.stderr
    assert "From the environment: TARGET_SIZE=64 BATCH_SIZE=2 NUM_EPOCHS=4 SAMPLE_RATIO=0.5" in done.stdout
    assert "Only 6 updates" in done.stdout and "step 6" in done.stdout  # half of six pictures, four times, in twos
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 6


# --- formats ----------------------------------------------------------------------------------------------------------
def test_more_growth_channels_are_the_same_function_and_come_off_again():
    model, x = noisy_model(), torch.rand(1, 3, 16, 12)
    state = recipe.regrow(model.state_dict(), 32)
    wide = recipe.RRDBNet(24, 2, 32)
    wide.load_state_dict(state)
    with torch.no_grad():
        assert (wide(x) - model(x)).abs().max() < 1e-5
    same(dict(recipe.regrow(state, 12)), dict(model.state_dict()))
    with pytest.raises(RecipeError, match="use 32 growth channels, and this network has 12"):
        recipe.regrow(noisy_model(growth=32).state_dict(), 12)


@pytest.mark.parametrize("wrap", ["params_ema", "params", "state_dict", "", "module."])
def test_weights_are_taken_from_the_usual_files(wrap, tmp_path):
    model = noisy_model()
    state = {"module." * (wrap == "module.") + k: v for k, v in model.state_dict().items()}
    torch.save({wrap: state, "iter": 3} if wrap and wrap != "module." else state, tmp_path / "w.pth")
    same(recipe.read_weights(tmp_path / "w.pth"), dict(model.state_dict()))


def test_starting_from_weights_reports_what_matched(tmp_path, capsys):
    torch.manual_seed(1)
    theirs = recipe.RRDBNet(24, 8, 12)
    torch.save({"params_ema": recipe.regrow(theirs.state_dict(), 32)}, tmp_path / "x4.pth")
    mine = recipe.RRDBNet(24, 8, 12)
    recipe.start_from(mine, recipe.Config(init=str(tmp_path / "x4.pth")))
    same(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert "252 of 252 tensors match." in capsys.readouterr().out
    recipe.start_from(recipe.RRDBNet(24, 8, 12, 2), recipe.Config(init=str(tmp_path / "x4.pth"), scale=2))
    assert "251 of 252 tensors match; left as they start: conv_first.weight" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="24 features x 8 blocks, growth 32; only 97 of 702 tensors fit --preset full"):
        with torch.device("meta"):
            model = recipe.RRDBNet(64, 23, 32)
        recipe.start_from(model, recipe.Config(init=str(tmp_path / "x4.pth"), preset="full"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "x4.pth")
    with pytest.raises(RecipeError, match="not the weights of an RRDBNet"):
        recipe.start_from(mine, recipe.Config(init=str(tmp_path / "x4.pth")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder made by the script itself on its built-in textures, in some seconds, with --init and all exports."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    torch.save(recipe.RRDBNet(24, 8, 12).state_dict(), folder / "start.pth")
    words = ["--out_dir", folder / "run", "--num_steps", 60, "--target_size", 48, "--device", "cpu", "--val_images", 4]
    done = run(command(*words, "--init", folder / "start.pth", recipe="train_realesrgan_optimized"))
    assert done.returncode == 0, done.stderr
    assert "built-in textures" in done.stdout.splitlines()[1] and "252 of 252 tensors match" in done.stdout
    assert "Validating on 4 of 6 pictures" in done.stdout and "of a step" in done.stdout
    return folder / "run"


def test_no_data_learns_and_its_weights_load(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    first = next(row for row in log if row.get("metric") == "psnr")
    assert metrics["psnr"] > first["psnr"] + 0.5
    model, cfg = recipe.load(trained), recipe.Config()
    assert not model.training and model.scale == 4
    val = [recipe.load_pair(f"val {i}", cfg, {}) for i in (0, 1, 3, 4)]
    assert recipe.evaluate(model, val, cfg, QUIET)["psnr"] == pytest.approx(metrics["psnr"], abs=1e-3)


@pytest.mark.slow
def test_without_data_it_beats_bicubic_within_two_minutes(tmp_path):
    start = time.monotonic()
    line = command("--out_dir", tmp_path / "run", "--device", "cpu", recipe="train_realesrgan_optimized")
    done = run(line, timeout=300, OMP_NUM_THREADS="2")
    assert done.returncode == 0 and time.monotonic() - start < 120 * slowness(), done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["psnr"] > metrics["psnr_bicubic"] + 0.1


SPANDREL = """
import sys, types, importlib.machinery, torch
for name in ("torchvision", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.functional"):
    stub = types.ModuleType(name)
    stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    stub.__file__, stub.__getattr__ = "stub", lambda attribute: type(attribute, (), {})
    sys.modules[name] = stub
import spandrel
torch.set_num_threads(1)
found = spandrel.ModelLoader("cpu").load_from_file(sys.argv[1])
assert (found.architecture.id, found.scale, found.input_channels) == ("ESRGAN", 4, 3), found
with torch.no_grad():
    torch.save(found(torch.load(sys.argv[2])), sys.argv[3])
print(found.tags)
"""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_export_opens_in_spandrel(trained, tmp_path, suffix):
    pytest.importorskip("safetensors", reason="safetensors is a test-only extra")
    if subprocess.run([sys.executable, "-c", "import importlib.util as u; exit(not u.find_spec('spandrel'))"]).returncode:
        pytest.skip("spandrel is a test-only extra")
    x = torch.rand(1, 3, 21, 30)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "see.py").write_text(SPANDREL)
    file = trained / f"realESRGAN_fast_training.{suffix}"
    done = run([sys.executable, "see.py", file, "x.pt", "y.pt"], cwd=tmp_path)
    assert done.returncode == 0 and "24nf" in done.stdout and "8nb" in done.stdout, done.stderr
    with torch.no_grad():
        expected = recipe.load(trained)(x).clamp(0, 1)  # as spandrel does
    assert (torch.load(tmp_path / "y.pt") - expected).abs().max() < 1e-5


def test_onnx_is_one_file_and_the_same_at_another_size(trained):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is a test-only extra")
    session = runtime.InferenceSession(str(trained / "realESRGAN_fast_training.onnx"))
    x = torch.rand(2, 3, 33, 47)
    with torch.no_grad():
        expected = recipe.load(trained)(x)
    assert np.abs(session.run(None, {"input": x.numpy()})[0] - expected.numpy()).max() < 1e-5
    assert not list(trained.glob("*.data"))


@pytest.mark.parametrize("scale", [1, 2])
def test_folded_networks_export_too(scale, tmp_path):
    model = noisy_model(blocks=1, scale=scale)
    recipe.export(model, tmp_path)  # compares each file with the model
    assert {p.suffix for p in tmp_path.iterdir()} >= {".pth", ".onnx"}


@pytest.mark.parametrize("kind", ["safetensors", "onnx"])
def test_each_export_is_compared(kind, tmp_path, monkeypatch):
    pytest.importorskip(kind)
    if kind == "onnx":
        from onnx.reference import ReferenceEvaluator

        whole = ReferenceEvaluator.run
        monkeypatch.setattr(ReferenceEvaluator, "run", lambda *a: [whole(*a)[0] + 0.01])
    else:
        import safetensors.torch as library

        read, key = library.load_file, "conv_last.bias"
        monkeypatch.setattr(library, "load_file", lambda path: {k: v + 0.01 * (k == key) for k, v in read(path).items()})
    with pytest.raises(RecipeError, match=f"realESRGAN_fast_training.{kind} would differ from the model by \\d"):
        recipe.export(noisy_model(1), tmp_path)
    assert not list(tmp_path.glob(f"*{kind}*"))


def test_the_pth_has_what_other_programs_look_for(trained):
    saved = torch.load(trained / "realESRGAN_fast_training.pth", weights_only=True)
    assert list(saved) == ["params_ema"] and len(saved["params_ema"]) == 252
    assert saved["params_ema"]["body.0.rdb1.conv1.weight"].shape == (32, 24, 3, 3)


def test_large_outputs_are_compared_by_their_size(tmp_path):
    model = noisy_model(1)
    with torch.no_grad():
        model.conv_last.weight.mul_(1e9)
    recipe.export(model, tmp_path)
    assert (tmp_path / "realESRGAN_fast_training.pth").exists()


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    model, regrow = noisy_model(blocks=1), recipe.regrow
    monkeypatch.setattr(recipe, "regrow", lambda s, g: {k: v + 0.01 * (k == "conv_last.bias") for k, v in regrow(s, g).items()})
    with pytest.raises(RecipeError, match=r"realESRGAN_fast_training.pth would differ from the model by \d"):
        recipe.export(model, tmp_path)


# --- using the result -------------------------------------------------------------------------------------------------
def test_upscale_keeps_names_colours_alpha_and_gray(trained, tmp_path):
    source = tmp_path / "图 片"
    source.mkdir()
    image = photo(24, 30)
    alpha = np.full((24, 30, 1), 255, np.uint8)
    alpha[:, :15] = 0
    Image.fromarray(image).save(source / "colour.png")
    Image.fromarray(np.concatenate([image, alpha], 2)).save(source / "clear.png")
    Image.fromarray(np.concatenate([image[..., :1], alpha], 2)).save(source / "clear_gray.png")
    Image.fromarray(image[..., 0]).save(source / "gray.png")
    Image.fromarray(image).quantize(32).save(source / "palette.gif")
    Image.fromarray(np.uint16(image[..., 0]) * 257).save(source / "deep.png")
    (source / "bad.png").write_text("no picture")
    before = {p: p.read_bytes() for p in source.iterdir()}
    words = ["--upscale", source, "--out_dir", trained, "--device", "cpu"]
    done = run(command(*words, recipe="train_realesrgan_optimized"))
    assert done.returncode == 0 and "bad.png" in done.stdout and "Traceback" not in done.stderr, done.stderr
    out = {p.name: Image.open(p) for p in (trained / "upscaled").iterdir()}
    assert {n: i.mode for n, i in out.items()} == {
        "colour.png": "RGB", "clear.png": "RGBA", "clear_gray.png": "LA", "gray.png": "L", "palette.png": "RGB",
        "deep.png": "I;16"}  # fmt: skip
    assert all(i.size == (120, 96) for i in out.values()) and {p: p.read_bytes() for p in source.iterdir()} == before
    clear = np.asarray(out["clear.png"])
    assert (clear[..., :3] == np.asarray(out["colour.png"])).all()
    assert (clear[:, :52, 3] == 0).all() and (clear[:, 68:, 3] == 255).all()
    deep = np.asarray(out["deep.png"]).astype(float)
    assert abs(deep / 257 - np.asarray(out["gray.png"])).max() <= 0.51 and len(np.unique(deep)) > 256
    again = np.asarray(out["colour.png"].resize((30, 24), Image.Resampling.BICUBIC)).astype(int)
    assert abs(again - image).mean() < 8  # the same colours


def test_sixteen_bits_of_colour_stay(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="opencv is a test-only extra")
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 4)).astype(np.uint16)
    for channels in (3, 4):
        file = tmp_path / f"{channels} 位.png"
        file.write_bytes(cv2.imencode(".png", values[..., :channels])[1].tobytes())
        image, deep = recipe.read_deep(file)
        assert deep and image.shape == (9, 7, channels)
        assert np.abs(image[..., :3] * 65535 - values[..., 2::-1]).max() < 0.02  # opencv keeps blue first
        recipe.write_deep(tmp_path / "out.png", image, True)
        assert (cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED) == values[..., :channels]).all()


def test_sixteen_bits_of_colour_without_opencv_is_a_sentence(tmp_path, monkeypatch):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(4))
    head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="16-bit colour; for it, pip install opencv-python-headless"):
        recipe.read_deep(tmp_path / "deep.png")


def test_an_interrupted_run_upscales_with_its_best_weights(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("lock"))
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "realESRGAN_fast_training.pth").unlink()
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    same(dict(recipe.load(tmp_path / "run").state_dict()), dict(best["model"]))
    assert "has not finished; these are its best weights so far" in capsys.readouterr().out and best["step"] > 0


def test_what_is_no_trained_model_is_a_sentence(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("lock"))
    weights = tmp_path / "run" / "realESRGAN_fast_training.pth"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(RecipeError, match="Cannot read the weights"):
        recipe.load(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps(about | {"recipe": "ultrafast_srcnn"}))
    with pytest.raises(RecipeError, match="holds no trained model"):
        recipe.load(tmp_path / "run")


def test_deep_gray_pictures_keep_their_range(tmp_path):
    for top, white in ((65535, 65535), (30000, 65535), (100000, 100000)):
        values = np.linspace(0, top, 12).reshape(3, 4)
        Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tif")
        image, deep = recipe.read_deep(tmp_path / "deep.tif")
        assert deep and image.shape == (3, 4, 1) and np.abs(image[..., 0] - values.astype(int) / white).max() < 1e-6


def test_out_of_memory_while_enlarging_names_the_tile(trained, tmp_path, monkeypatch):
    Image.fromarray(photo(32, 32)).save(tmp_path / "a.png")
    monkeypatch.setattr(recipe, "enlarge", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(RecipeError, match="Out of memory enlarging .*a.png; try --tile 128"):
        recipe.upscale(recipe.Config(upscale=str(tmp_path / "a.png"), out_dir=str(trained), device="cpu"))


def test_upscale_without_a_model_or_a_picture_is_a_sentence(trained, tmp_path):
    for folder, source, words in (
        (tmp_path / "none", tmp_path, "holds no trained model"),
        (trained, tmp_path / "gone", "no such folder"),
    ):
        done = subprocess.run(
            command("--upscale", source, "--out_dir", folder, recipe="train_realesrgan_optimized"),
            cwd=tmp_path, env=environment(), capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_side_by_side_picture_has_three_columns(trained):
    sheet = np.asarray(Image.open(sorted(trained.glob("sample-*.png"))[-1]))
    assert sheet.shape == (30 + 4 * 294, 3 * 294 + 6, 3)
