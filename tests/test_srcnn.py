"""SRCNN and ESPCN: the networks, the protocol, the optimizer, what a trained model is used for."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, command, run, same, tensors_in
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import train_ultrafast_srcnn as recipe
from common import EMA, RecipeError, Run

ARCHS = ["srcnn", "srcnn-955", "espcn"]
QUIET = types.SimpleNamespace(check=lambda: None)


def noisy_model(arch, scale):
    torch.manual_seed(0)
    model = recipe.make_model(recipe.Config(arch=arch, scale=scale))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model.eval()


@pytest.mark.parametrize(
    "arch, scale, count", [("srcnn", 3, 8129), ("srcnn-955", 3, 57281), ("espcn", 4, 24752), ("espcn", 2, 21284)]
)
def test_parameter_counts_are_the_published_ones(arch, scale, count):
    assert sum(p.numel() for p in noisy_model(arch, scale).parameters()) == count


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("arch", ["srcnn", "srcnn-955"])
def test_the_fast_form_is_the_same_function(arch, scale):
    model, x = noisy_model(arch, scale), torch.rand(2, 1, 24, 21)
    results = []
    for fast in (False, True):
        model.fast = fast
        model.zero_grad()
        out = model(x, valid=True)
        (out**2).mean().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    (plain, slow), (quick, grads) = results
    assert plain.shape == quick.shape and (plain - quick).abs().max() < 1e-5
    for a, b in zip(slow, grads):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_geometry_and_the_start_near_bicubic(arch, scale):
    x = F.interpolate(torch.rand(1, 1, 6, 7), (18, 21), mode="bicubic").clamp(0, 1)
    model = recipe.make_model(recipe.Config(arch=arch, scale=scale)).eval()
    with torch.no_grad():
        out = model(x)
        inner = model(x, valid=True)
    assert out.shape == (1, 1, 18 * scale, 21 * scale)
    cut = recipe.MARGIN * scale + model.border
    assert torch.allclose(out[..., cut:-cut, cut:-cut], inner, atol=1e-5)  # training sees what inference does
    bicubic = F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=True)
    assert (out - bicubic)[..., cut:-cut, cut:-cut].abs().max() < 0.03


@pytest.mark.parametrize("arch", ARCHS)
def test_tiled_is_untiled(arch):
    model = noisy_model(arch, 3)
    low = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    whole, _ = recipe.enlarge(model, low, tile=1000)
    for tile in (16, 20, 37):
        assert (recipe.enlarge(model, low, tile)[0] - whole).abs().max() < 1e-3  # of 255
    with torch.no_grad():
        direct = model(torch.from_numpy(low)[None, None].float() / 255)[0, 0] * 255
    assert (direct - whole).abs().max() < 1e-3


@pytest.mark.skipif(not (REAL / "Set5").is_dir(), reason="the real images are not here")
def test_bicubic_reads_the_published_figure_on_set5():
    for scale, figure in ((2, 33.66), (3, 30.39), (4, 28.42)):
        cfg = recipe.Config(scale=scale)
        val = [recipe.load_pair(path, cfg, 17) for path in sorted((REAL / "Set5").glob("*.png"))]
        metrics = recipe.evaluate(recipe.make_model(cfg), val, cfg, QUIET)
        assert metrics["psnr_bicubic"] == pytest.approx(figure, abs=0.03)


@pytest.mark.skipif(not (REAL / "Set14").is_dir(), reason="the real images are not here")
def test_gray_stays_gray_on_set14():
    bridge = recipe.load_item(REAL / "Set14" / "bridge.png")
    assert (bridge == np.asarray(Image.open(REAL / "Set14" / "bridge.png"))).all()  # not squeezed into 16..235


def test_luma_is_bt601(tmp_path):
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "c.png")
    assert recipe.load_item(tmp_path / "c.png").tolist() == [[16, 235, 81, 145, 41]]  # MATLAB's rgb2ycbcr


def test_shrinking_is_antialiased_bicubic():
    hr = np.random.default_rng(0).integers(0, 256, (36, 48), np.uint8)
    pillow = np.asarray(Image.fromarray(hr).resize((16, 12), Image.Resampling.BICUBIC)).astype(int)
    assert abs(recipe.shrink(hr, 3).astype(int) - pillow).max() <= 1


def test_psnr_and_ssim():
    a = torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (40, 50)))
    assert recipe.psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert recipe.ssim(a, a) == pytest.approx(1)
    flat = torch.full((20, 20), 100.0)
    c1 = (0.01 * 255) ** 2  # without variance SSIM is its luminance term
    assert recipe.ssim(flat, flat + 20) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-9)
    assert recipe.ssim(a, 255 - a) < 0 < recipe.ssim(a, a + torch.randn(40, 50) * 20) < 1


def test_crops_are_aligned_turned_and_pure(images):
    cfg = recipe.Config(data_dir=str(images), target_size=24, scale=3)
    m, turns = recipe.MARGIN, set()
    items = common.Items(sorted(images.iterdir()), lambda path: recipe.load_pair(path, cfg, 17))
    data = recipe.Crops(items, cfg)
    keys = [(e, i) for e in (0, 1) for i in range(len(data))]
    batch, again = data.__getitems__(keys), data.__getitems__(keys[5:9])
    assert torch.equal(batch["hr"][5:9], again["hr"]) and torch.equal(batch["lr"][5:9], again["lr"])
    assert not torch.equal(batch["hr"][: len(data)], batch["hr"][len(data) :])
    for hr, lr in zip(batch["hr"][:, 0].numpy(), batch["lr"][:, 0].numpy()):
        small = recipe.shrink(hr, 3).astype(int)[2:-2, 2:-2]  # away from the crop's own edges
        assert abs(small - lr[m + 2 : -m - 2, m + 2 : -m - 2]).max() <= 1
    whole = [np.asarray(items[i][0]) for i in range(len(items))]
    for hr in batch["hr"][:, 0].numpy():
        for turn in range(8):
            back = hr[:: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]
            back = back.T if turn & 4 else back
            if any((np.lib.stride_tricks.sliding_window_view(w, (24, 24)) == back).all((2, 3)).any() for w in whole):
                turns.add(turn)
    assert turns == set(range(8))
    assert data.name(0) == items.paths[0] and data.name(len(data) - 1) == items.paths[-1]


@pytest.mark.parametrize("arch", ARCHS)
def test_one_batch_can_be_learned(arch):
    cfg = recipe.Config(arch=arch, scale=2, batch_size=4, target_size=24, device="cpu", seed=1)
    run = Run(cfg)
    parts = recipe.build(cfg, run)
    items = common.Items([f"train {i}" for i in range(2)], lambda path: recipe.load_pair(path, cfg, 17))
    batch, losses = recipe.Crops(items, cfg).__getitems__([(0, i) for i in range(4)]), []
    for run.step in range(60):
        run.progress = run.step / 60
        losses.append(float(recipe.train_step(parts, batch, cfg, run)["loss"]))
    assert min(losses) < 0.75 * losses[0]


def test_soap_learns_faster_than_adam():
    cfg = recipe.Config(scale=2, batch_size=4, target_size=24, device="cpu", use_amp=False)
    items = common.Items([f"train {i}" for i in range(4)], lambda path: recipe.load_pair(path, cfg, 24))
    data = recipe.Crops(items, cfg)

    def late_loss(make):
        run, losses = Run(cfg), []
        parts = recipe.build(cfg, run)
        parts.opt = make(parts.model.parameters())
        for batch, run.step in zip(common.Stream(len(data), 4, 0), range(200)):
            run.progress = run.step / 200
            losses.append(float(recipe.train_step(parts, data.__getitems__(batch), cfg, run)["loss"]))
        return sum(losses[-50:])

    def adam(lr):
        return lambda params: torch.optim.Adam([{"params": list(params), "peak": lr}])

    assert late_loss(lambda p: recipe.SOAP(p, 0.003)) < 0.97 * min(late_loss(adam(lr)) for lr in (0.001, 0.003))


def test_soap_is_adam_in_one_dimension():
    one, two = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    pair = [recipe.SOAP([one], 0.01), torch.optim.Adam([two], 0.01, betas=(0.95, 0.999), eps=1e-10)]
    for k in range(20):
        for w, opt in zip((one, two), pair):
            w.grad = torch.arange(5.0) + k % 3 - 1
            opt.step()
    assert torch.allclose(one, two, atol=1e-6)


def test_soap_state_survives_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = recipe.make_model(recipe.Config())
    opt = recipe.SOAP(model.parameters(), 1e-3)
    for _ in range(11):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    common.save_tensors(tmp_path / "o.pt", opt.state_dict())
    other = recipe.SOAP(model.parameters(), 1e-3)
    other.load_state_dict(common.load_tensors(tmp_path / "o.pt"))
    for p in model.parameters():
        assert opt.state[p]["step"] == other.state[p]["step"] == 11
        for key in ("factors", "bases"):
            assert all(torch.equal(a, b) for a, b in zip(opt.state[p][key], other.state[p][key]))


def test_ema_warms_up():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.999)
    torch.nn.init.ones_(model.weight)
    for _ in range(100):
        ema.update(model)
    assert 0.999 < float(ema.model.weight) <= 1 and not ema.model.training


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_contract_runs_on_fake_tensors(arch, kind):
    cfg = recipe.Config(arch=arch, batch_size=4, accumulate=2)
    run = Run(cfg, kind=kind)
    with FakeTensorMode():
        parts = recipe.build(cfg, run)
        losses = recipe.train_step(parts, recipe.example_batch(cfg, run), cfg, run)
        shape = recipe.eval_step(parts, cfg, run).shape
    assert losses["loss"].shape == losses["norm"].shape == () and shape[-1] >= 128 * 3
    assert all(t.numel() for t in tensors_in(parts.opt.state_dict()["state"][0]["mean"]))


def test_example_batch_has_the_shapes_of_a_real_one(images):
    cfg = recipe.Config(data_dir=str(images), target_size=24, batch_size=3)
    items = common.Items(sorted(images.iterdir()), lambda path: recipe.load_pair(path, cfg, 17))
    real, made = recipe.Crops(items, cfg).__getitems__([(0, 0), (0, 1), (0, 2)]), recipe.example_batch(cfg, Run(cfg))
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder made by the script itself on its built-in textures, in a few seconds, exports included."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(command("--out_dir", folder / "run", "--num_steps", 120, "--target_size", 24, "--scale", 2, "--device", "cpu"))
    assert done.returncode == 0, done.stderr
    assert "built-in textures" in done.stdout.splitlines()[1]
    return folder / "run"


def test_no_data_beats_bicubic(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["psnr"] > metrics["psnr_bicubic"] + 0.2


def test_load_gives_the_model_that_was_measured(trained):
    model = recipe.load(trained)
    assert not model.training and model.scale == 2
    cfg = recipe.Config(scale=2, target_size=24)
    val = [recipe.load_pair(f"val {i}", cfg, 17) for i in range(6)]
    psnr = recipe.evaluate(model, val, cfg, QUIET)["psnr"]
    assert psnr == pytest.approx(json.loads((trained / "metrics.json").read_text())["psnr"], abs=1e-3)


def test_onnx_is_one_file_and_the_same_at_another_size(trained):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is a test-only extra")
    session = runtime.InferenceSession(str(trained / "model.onnx"))
    x = torch.rand(2, 1, 33, 47)
    with torch.no_grad():
        expected = recipe.load(trained)(x)
    assert np.abs(session.run(None, {"luma": x.numpy()})[0] - expected.numpy()).max() < 1e-5
    assert not list(trained.glob("*.data"))


def test_an_onnx_file_that_differs_is_refused(trained, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    model = recipe.load(trained)
    export = torch.onnx.export

    def other(net, *args, **more):
        with torch.no_grad():
            net.conv3.bias += 0.01
        export(net, *args, **more)
        with torch.no_grad():
            net.conv3.bias -= 0.01

    monkeypatch.setattr(torch.onnx, "export", other)
    with pytest.raises(RecipeError, match="model.onnx would differ from the model by 1.0e-02"):
        recipe.export(model, tmp_path)
    assert not list(tmp_path.glob("*onnx*"))


def test_upscale_keeps_names_colours_and_gray(trained, tmp_path):
    source = tmp_path / "图 片"
    source.mkdir()
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 15, 3), np.uint8)
    Image.fromarray(small).resize((45, 36), Image.Resampling.BICUBIC).save(source / "colour.png")
    Image.fromarray(small[..., 0]).save(source / "gray.png")
    Image.fromarray(small[:, ::-1, 0]).save(source / "gray.bmp")
    (source / "bad.png").write_text("no picture")
    done = run(command("--upscale", source, "--out_dir", trained, "--device", "cpu"))
    assert done.returncode == 0 and "bad.png" in done.stdout and "Traceback" not in done.stderr, done.stderr
    names = {p.name for p in (trained / "upscaled").iterdir()}
    assert names == {"colour.png", "gray.png.png", "gray.bmp.png"}  # gray.png would be two pictures
    colour, gray = (np.asarray(Image.open(trained / "upscaled" / f"{n}.png")) for n in ("colour", "gray.png"))
    assert colour.shape == (72, 90, 3) and gray.shape == (24, 30)
    again = np.asarray(Image.fromarray(colour).resize((45, 36), Image.Resampling.BICUBIC)).astype(int)
    assert abs(again - np.asarray(Image.open(source / "colour.png"))).mean() < 6  # the same colours
    assert {p.name for p in source.iterdir()} == {"colour.png", "gray.png", "gray.bmp", "bad.png"}


def test_an_interrupted_run_upscales_with_its_best_weights(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("lock"))
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "model.pt").unlink()
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    same(dict(recipe.load(tmp_path / "run").state_dict()), dict(best["model"]))
    assert "these are its best weights so far" in capsys.readouterr().out and best["step"] > 0


def test_upscale_without_a_model_or_a_picture_is_a_sentence(trained, tmp_path):
    done = run(command("--upscale", tmp_path, "--out_dir", tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 2 and "holds no trained model" in done.stderr and "Traceback" not in done.stderr
    done = run(command("--upscale", tmp_path / "gone", "--out_dir", trained), cwd=tmp_path)
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr


def test_target_size_must_fit_the_scale(tmp_path):
    with pytest.raises(RecipeError, match="--target_size is 50; it takes a multiple of --scale 3"):
        recipe.train(recipe.Config(target_size=50, out_dir=str(tmp_path / "run")))


def test_side_by_side_picture_has_three_columns(trained):
    sheet = np.asarray(Image.open(sorted(trained.glob("sample-*.png"))[-1]))
    assert sheet.shape[1] == 3 * 246 + 6 and sheet.shape[0] == 30 + 4 * 246
    columns = [sheet[30:, 6 + 246 * i : 246 + 246 * i].astype(int) for i in range(3)]
    assert ((columns[1] - columns[2]) ** 2).mean() < ((columns[0] - columns[2]) ** 2).mean()  # ours is nearer
    shutil.copy(trained / "curves.png", trained / "copy.png")
    assert Image.open(trained / "copy.png").size == (1100, 396)
