"""Latent diffusion: encoders, noise levels, sampler, warnings, samples."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import REAL, ROOT, checkpoint, run, same, slowness, stop_after
from PIL import Image

import common
import train_latent_cfg as recipe

SMALL = {"target_size": 16, "dim": 8, "mults": "1,2", "batch_size": 4, "num_steps": 4, "val_images": 8, "steps": 3}
SMALL |= {"use_amp": False, "device": "cpu", "num_workers": 0, "encoder": "pca"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few images, few samples, few passes of the classifier."""
    for name, value in {"BUILT_IN": 6, "JUDGED": 12, "EPOCHS": 1}.items():
        monkeypatch.setattr(recipe, name, value)


@pytest.fixture
def config(tmp_path):
    return lambda **changes: recipe.Config(**SMALL | {"out_dir": str(tmp_path / "run")} | changes)


@pytest.fixture
def folder(tmp_path):
    """Three classes of five images, one colour each."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("ID_2", "ID_10", "ID_1")):
        place = tmp_path / "data" / name
        place.mkdir(parents=True)
        for i in range(5):
            image = rng.integers(0, 60, (20, 24, 3)) + 180 * np.eye(3)[k]
            Image.fromarray(image.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "data"


def pictures(n=40, size=16):
    return torch.from_numpy(np.stack([recipe.shape(f"{recipe.SHAPES[i % 6]} {i}", size) for i in range(n)]))


def fitted(kind="pca", factor=2, channels=4, images=None):
    codec = recipe.Codec(kind, factor, channels)
    images = pictures() if images is None else images
    codec.fit(images.split(7))
    codec.normalise(images.split(7))
    return codec


def tiny(cfg, names="abc"):
    """A net of these settings that is not silent at its start."""
    cfg.names, cfg.channels = json.dumps(list(names)), cfg.latent_channels
    net = recipe.make_net(cfg)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


# --- encoders ---------------------------------------------------------------------------------------------------------
def test_pca_latents_are_normal_and_keep_what_they_can():
    images = pictures()
    codec = fitted(channels=12)
    z = codec.encode(images)
    assert z.shape == (40, 12, 8, 8)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
    assert (recipe.to_bytes(codec.decode(z)).int() - images.int()).abs().max() <= 1  # all components: nothing is lost
    assert recipe.psnr_of(codec, images) > recipe.psnr_of(fitted(), images) > recipe.psnr_of(fitted(channels=1), images)


def test_pca_leaves_what_the_singular_values_say():
    images = pictures()
    codec = fitted(channels=3)
    x = torch.nn.functional.pixel_unshuffle(images.double() / 127.5 - 1, 2).permute(0, 2, 3, 1).flatten(0, 2)
    left = torch.linalg.svdvals(x - x.mean(0))[3:].square().sum() / x.numel()
    error = (codec.decode(codec.encode(images)).double() - (images.double() / 127.5 - 1)).square().mean()
    assert abs(float(error / left) - 1) < 1e-3


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_vae_starts_as_the_pca_and_learns(factor):
    torch.manual_seed(0)
    images = pictures(size=32)
    pca, vae = fitted(factor=factor, images=images), fitted("vae", factor, images=images)
    assert torch.allclose(vae.decode(vae.encode(images)), pca.decode(pca.encode(images)), atol=1e-4)
    opt = torch.optim.Adam(vae.parameters(), 2e-3)
    for _ in range(30):
        x, again, kl = vae(images, torch.randn(40, 4, 32 // factor, 32 // factor))
        loss = (x - again).abs().mean() + 1e-5 * kl
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert recipe.psnr_of(vae, images) > recipe.psnr_of(pca, images) + 0.3


@pytest.mark.parametrize("better", [True, False])
def test_a_vae_that_does_not_beat_the_pca_is_not_used(better, config, capsys):
    images = pictures()
    codec = fitted("vae")
    with torch.no_grad():
        if better:
            opt = torch.optim.Adam(codec.parameters(), 2e-3)
            with torch.enable_grad():
                for _ in range(20):
                    x, again, _ = codec(images, torch.zeros(40, 4, 8, 8))
                    opt.zero_grad()
                    (x - again).square().mean().backward()
                    opt.step()
        else:
            codec.dec[-2].bias.fill_(0.5)
    val = recipe.types.SimpleNamespace(real=images, images=images)
    with common.Run(config(), recipe.RECIPE) as run:
        parts = common.Parts(codec=codec)
        recipe.end_encoder(parts, val, run)
        assert (run.folder / "encoder.pt").exists()
    assert codec.ready and codec.plain is not better
    assert f"the {'VAE' if better else 'PCA'} makes the latents" in capsys.readouterr().out
    z = codec.encode(images)
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
    if not better:
        assert torch.allclose(codec.decode(z), fitted().decode(fitted().encode(images)), atol=1e-4)


def test_latents_are_cached_until_data_or_encoder_change(config, folder, capsys):
    cfg = config(data_dir=str(folder), num_steps=1)

    def encoded():
        recipe.train(cfg)
        return "into latents" in capsys.readouterr().out

    assert encoded()
    cfg.num_steps = 2
    assert not encoded()
    path = folder / "ID_1" / "0.png"
    Image.fromarray(np.full((20, 24, 3), 9, np.uint8)).save(path)
    common.os.utime(path, (1, 1))
    cfg.num_steps = 3
    assert encoded()
    cfg.fresh, cfg.latent_channels = True, 5
    assert encoded()


def test_stages(config, tmp_path, capsys):
    """The encoder alone, then the diffusion alone with its encoder.pt; what each builds."""
    metrics = recipe.train(config(stage="encoder", encoder="vae", out_dir=str(tmp_path / "enc")))
    assert metrics["steps"] == 4 and "psnr" in metrics and "heldout_loss" not in metrics
    weights = tmp_path / "enc" / "encoder.pt"
    assert "model" not in checkpoint(tmp_path / "enc")["parts"] and weights.exists()
    more = {"stage": "diffusion", "encoder": "vae", "encoder_weights": str(weights)}
    metrics = recipe.train(config(**more))
    assert metrics["heldout_loss"] > 0
    parts = checkpoint(tmp_path / "run")["parts"]
    assert "codec_opt" not in parts
    given = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(parts["codec"][k], v) for k, v in given.items() if isinstance(v, torch.Tensor))
    with pytest.raises(common.RecipeError, match="--factor 2 --latent_channels 5"):
        recipe.train(config(**more, latent_channels=5, out_dir=str(tmp_path / "other")))


def test_both_stages_continue_bit_for_bit(config, tmp_path, monkeypatch, capsys):
    """Stopped while the VAE learns, when it has ended, and after the first update of the diffusion."""

    def go(name):
        recipe.train(config(encoder="vae", encoder_share=0.5, num_steps=5, steps=2, out_dir=str(tmp_path / name)))

    go("whole")
    whole = checkpoint(tmp_path / "whole")
    for stop in (1, 3, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            capsys.readouterr()
            with pytest.raises(common.Stopped, match=f"after update {stop}, which is saved"):
                go(f"run{stop}")
        assert ("makes the latents" in capsys.readouterr().out) == (stop > 1)
        go(f"run{stop}")
        again = checkpoint(tmp_path / f"run{stop}")
        for name in ("parts", "best", "judged", "stale"):
            same(again[name], whole[name])


def test_vae_of_diffusers(config, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2, (8, 8), 1, norm_num_groups=4)
    net.save_pretrained(tmp_path / "vae")
    with pytest.raises(common.RecipeError, match="add --factor 2"):
        recipe.train(config(vae=str(tmp_path / "vae"), factor=4, mults="1"))
    metrics = recipe.train(config(vae=str(tmp_path / "vae"), factor=2, fresh=True))
    assert 0 < metrics["heldout_loss"] < 2
    images = recipe.load(tmp_path / "run")(torch.tensor([0, 1]))
    assert images.shape == (2, 3, 16, 16)
    (tmp_path / "vae").rename(tmp_path / "moved")
    with pytest.raises(common.RecipeError, match="has no config.json"):
        recipe.load(tmp_path / "run")
    assert torch.equal(recipe.load(tmp_path / "run", vae=str(tmp_path / "moved"))(torch.tensor([0, 1])), images)


def test_an_encoder_run_goes_on_when_it_is_made_longer(config, tmp_path):
    """Also where the first ending chose the PCA."""
    words = {"stage": "encoder", "encoder": "vae"}
    recipe.train(config(**words))
    for name in ("last.pt", "previous.pt"):
        state = checkpoint(tmp_path / "run", name)
        for codec in (state["parts"]["codec"], state["parts"]["codec_ema"]["model"]):
            codec["_extra_state"]["plain"] = True
        torch.save(state, tmp_path / "run" / name)
    before = checkpoint(tmp_path / "run")["parts"]["codec"]["dec.0.weight"]
    assert recipe.train(config(**words, num_steps=6))["steps"] == 6
    assert not torch.equal(checkpoint(tmp_path / "run")["parts"]["codec"]["dec.0.weight"], before)
    with pytest.raises(common.RecipeError, match="holds an encoder alone"):
        recipe.load(tmp_path / "run")


def test_a_longer_run_stays_in_the_stage_that_it_had_reached(config, tmp_path, monkeypatch):
    """2 of 4 updates made the VAE; of 40 it would be 20, but the diffusion goes on, at a rate worth having."""
    words, rates = {"encoder": "vae", "encoder_share": 0.5, "latent_channels": 3}, {}
    recipe.train(config(**words))
    before = torch.load(tmp_path / "run" / "encoder.pt", weights_only=True)["model"]
    advance = common.Run.advance

    def noted(run, losses):
        advance(run, losses)
        rates[run.step] = run.lr

    monkeypatch.setattr(common.Run, "advance", noted)
    recipe.train(config(**words, num_steps=40))
    assert min(rates) == 5 and max(rates[k] for k in range(5, 15)) > 9e-4 and rates[40] < 1e-4
    after = checkpoint(tmp_path / "run")["parts"]["codec_ema"]["model"]
    assert after["_extra_state"]["begun"] == pytest.approx(0.1)
    assert all(torch.equal(before[k], after[k]) for k in before if isinstance(before[k], torch.Tensor))


def test_weights_of_other_kinds_get_sentences(config, tmp_path):
    recipe.train(config(num_steps=2))
    folder = tmp_path / "run"
    assert recipe.load(folder, model="best.pt")(torch.tensor([0])).shape == (1, 3, 16, 16)
    (folder / "model-000002.pt").write_bytes(b"no weights")
    for name in ("last.pt", "model-000002.pt"):
        with pytest.raises(common.RecipeError, match=f"{name} holds no network of this run"):
            recipe.load(folder, model=name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(common.RecipeError, match="list.pt does not fit"):
        recipe.train(config(encoder="vae", encoder_weights=str(tmp_path / "list.pt"), out_dir=str(tmp_path / "other")))


# --- diffusion --------------------------------------------------------------------------------------------------------
def test_the_net_starts_at_zero_and_hears_time_and_class(config):
    cfg = config()
    z, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    cfg.names, cfg.channels = '["a", "b", "c"]', 4
    assert recipe.make_net(cfg)(z, t, y).abs().max() == 0
    net = tiny(config(latent_channels=4))
    out = net(z, t, y)
    assert out.shape == z.shape and net.null == 3
    for other in (net(z, t + 0.05, y), net(z, t, y * 0 + net.null), net(z, t, y.flip(0))):
        assert (other - out).abs().max() > 1e-4


@pytest.mark.parametrize("objective", ["v", "edm"])
def test_noise_levels_and_weights(objective, config):
    cfg = config(objective=objective, batch_size=4096, class_drop=0.25)
    cfg.names = '["a", "b"]'
    run = common.Run(cfg)
    x = torch.randn(4096, 2, 2, 2)
    noisy = recipe.to_noisy({"image": x, "label": torch.zeros(4096, dtype=torch.int64)}, cfg, run)
    a, b = torch.cos(noisy["t"] * math.pi / 2).view(-1, 1, 1, 1), torch.sin(noisy["t"] * math.pi / 2).view(-1, 1, 1, 1)
    assert torch.allclose(a * noisy["z"] - b * noisy["v"], x, atol=1e-4)
    assert abs(float((noisy["label"] == 2).float().mean()) - 0.25) < 0.03
    level = torch.tan(noisy["t"].double() * math.pi / 2)
    if objective == "edm":
        assert abs(float(level.log().mean()) + 0.5) < 0.05 and abs(float(level.log().std()) - 1.2) < 0.05
        assert (noisy["weight"] == 1).all()
    else:  # uniform times; min(SNR, 5) / SNR of the squared error of x, which is 1 / (SNR + 1) of the velocity's ... times SNR
        assert abs(float(noisy["t"].mean()) - 0.5) < 0.01
        snr = 1 / level**2
        want = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
        assert torch.allclose(noisy["weight"].double(), want, atol=1e-3)


class Gauss(torch.nn.Module):
    """The exact velocity for latents that are normal around a mean of their class, 0 for the unknown one."""

    null, means, deviation = 2, torch.tensor([-1.0, 2.0, 0.0]), 0.5

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, z, t, label):
        self.asked.append(label)
        a, b = recipe.angles(t)
        m = self.means[label].view(-1, 1, 1, 1)
        gain = a * self.deviation**2 / (a**2 * self.deviation**2 + b**2)
        x = m + gain * (z - a * m)
        return (a * z - x) / b


@pytest.mark.parametrize("steps", [15, 20, 100])
def test_the_sampler_draws_the_distribution(steps, config):
    cfg = config(guidance=1.0, steps=steps)
    torch.manual_seed(0)
    label = torch.tensor([0, 1]).repeat_interleave(64)
    x = recipe.draw_latents(Gauss(), torch.randn(128, 2, 8, 8), label, cfg, common.Run(cfg))
    for k in (0, 1):
        part = x[label == k]
        assert abs(float(part.mean()) - float(Gauss.means[k])) < 0.02
        assert abs(float(part.std()) / Gauss.deviation - 1) < (0.09 if steps < 100 else 0.02)


def test_twenty_steps_are_near_two_hundred(config):
    noise, label = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(16, dtype=torch.int64)
    few, fine, many = (
        recipe.draw_latents(Gauss(), noise, label, config(guidance=1.0), common.Run(config()), n) for n in (20, 40, 400)
    )
    assert (few - many).abs().mean() < 0.03  # of a deviation of 0.5
    assert (fine - many).abs().mean() < 0.35 * (few - many).abs().mean()  # second order


def test_guidance_one_asks_for_the_class_alone_and_more_pushes_towards_it(config):
    net, label = Gauss(), torch.ones(8, dtype=torch.int64)
    noise = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = recipe.draw_latents(net, noise, label, config(guidance=1.0), common.Run(config()), 20)
    assert all((asked == 1).all() and len(asked) == 8 for asked in net.asked)
    net.asked.clear()
    own = {"guidance_low": 0.0, "guidance_high": 1e9, "rescale": 0.0}
    pushed = recipe.draw_latents(net, noise, label, config(guidance=3.0, **own), common.Run(config()), 20)
    assert all(len(asked) == 16 and (asked[8:] == 2).all() for asked in net.asked)
    assert pushed.mean() > plain.mean() + 1
    net.asked.clear()
    recipe.draw_latents(net, noise, label, config(guidance=3.0), common.Run(config()), 20)
    assert 0 < sum(len(asked) == 16 for asked in net.asked) < 20  # in between two noise levels only
    half = recipe.draw_latents(net, noise, label, config(guidance=3.0, **own | {"rescale": 1.0}), common.Run(config()), 20)
    assert half.std() < pushed.std() * 1.05


def test_heldout_loss_is_one_for_a_silent_net(config):
    cfg = config()
    cfg.names, cfg.channels = '["a", "b"]', 3
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with_run = common.Run(cfg)
    loss = recipe.heldout_loss(recipe.make_net(cfg), x, torch.zeros(64, dtype=torch.int64), with_run)
    assert len(loss) == 8 and all(abs(v - 1) < 0.05 for v in loss)
    assert loss == recipe.heldout_loss(recipe.make_net(cfg), x, torch.zeros(64, dtype=torch.int64), with_run)
    exact = sum(recipe.heldout_loss(Gauss(), 2 + 0.5 * x, torch.ones(64, dtype=torch.int64), with_run))
    assert exact < 0.8 * sum(recipe.heldout_loss(Gauss(), 2 + 0.5 * x, torch.zeros(64, dtype=torch.int64), with_run))


@pytest.mark.parametrize(
    "stage, kind, capability", [("all", "cuda", (8, 0)), ("encoder", "cuda", (6, 0)), ("diffusion", "cpu", (0, 0))]
)
def test_the_contract_runs_on_fake_tensors(stage, kind, capability, config):
    from torch._subclasses.fake_tensor import FakeTensorMode

    cfg = config(stage=stage, encoder="vae", use_amp=None)
    cfg.names = json.dumps([str(k) for k in range(31)])
    planned = common.Run(cfg, recipe.RECIPE, kind=kind, capability=capability)
    with FakeTensorMode():
        parts = recipe.build(cfg, planned)
        batch = recipe.example_batch(cfg, planned)
        losses = recipe.train_step(parts, batch, cfg, planned)
        recipe.eval_step(parts, cfg, planned)
    assert losses["loss"].shape == () and hasattr(parts, "model") == (stage != "encoder")
    assert hasattr(parts, "codec_opt") == (stage != "diffusion")


def test_example_batch_is_like_a_real_one(config):
    cfg = config()
    with common.Run(cfg, recipe.RECIPE) as run:
        data, val = recipe.open_data(cfg, run)
        parts = recipe.build(cfg, run)
        recipe.fit_codec(parts, val)
        recipe.take_latents(parts, data, val, cfg, run)
        real = data.__getitems__([(0, i) for i in range(4)])
        made = recipe.example_batch(cfg, run)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


# --- warnings ---------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_ignored_class_is_told(config, monkeypatch, capsys):
    """The planted bug: the class never reaches the network in training."""
    more = {"num_steps": 60, "learning_rate": 5e-3, "class_drop": 0.1}
    recipe.train(config(**more))
    assert "The class is ignored" not in capsys.readouterr().out
    init = recipe.UNet.__init__

    def deaf(net, *args, **words):
        init(net, *args, **words)
        torch.nn.init.zeros_(net.classes.weight)
        net.classes.requires_grad_(False)

    monkeypatch.setattr(recipe.UNet, "__init__", deaf)
    adam = recipe.adam
    monkeypatch.setattr(recipe, "adam", lambda model, *words: adam(Trained(model), *words))
    recipe.train(config(**more, fresh=True))
    assert "The class is ignored" in capsys.readouterr().out


class Trained:
    """The weights of a model that are not frozen."""

    def __init__(self, model):
        self.model = model

    def parameters(self):
        return (p for p in self.model.parameters() if p.requires_grad)


def test_classes_that_never_reach_training_are_told(config, monkeypatch, capsys):
    """The other planted bug: all classes hidden in training, so that their embeddings stay random and do move predictions."""
    recipe.train(config(num_steps=60, learning_rate=5e-3, class_drop=1.0))
    assert "The class is ignored" in capsys.readouterr().out


@pytest.mark.slow
def test_planted_copies_are_told(config, monkeypatch, capsys):
    """Samples that are training images, a little brighter and mirrored; real held-out ones are no copies."""
    metrics = recipe.train(config())
    assert metrics["copy_rate"] == 0 and "copies of training" not in capsys.readouterr().out

    def plant(net, codec, label, keys, cfg, run, steps=0):
        named = [recipe.shape(f"{recipe.SHAPES[c % 6]} {c % 5}", cfg.target_size)[:, :, ::-1] for c in label.tolist()]
        return torch.from_numpy(np.stack(named).clip(0, 253) + 2), 0.0

    monkeypatch.setattr(recipe, "draw_images", plant)
    metrics = recipe.train(config(fresh=True, num_steps=12))
    assert metrics["copy_rate"] > 0.5 and "copies of training images" in capsys.readouterr().out


def test_each_warning_has_its_cause(config):
    run = common.Run(config())
    run.progress, run.best = 0.5, {"heldout_loss": 0.5, "step": 3}
    fine = {
        "heldout_loss": 0.5,
        "train_loss": 0.48,
        "class_effect": 0.02,
        "class_gap": 0.05,
        "copy_rate": 0.0,
        "diversity": 0.9,
        "clipped": 0.0,
    }
    fine |= {"batch_low": 0.02, "batch_high": 0.6}
    assert recipe.warnings_of(fine, run) == {}
    causes = {"memorising": {"heldout_loss": 0.56, "train_loss": 0.4}, "ignored": {"class_effect": 1e-5}}
    causes |= {"copies": {"copy_rate": 0.02}, "collapsed": {"diversity": 0.2}, "clipped": {"clipped": 0.1}}
    causes |= {"low": {"batch_low": 5e-5}, "high": {"batch_high": 1.2}}
    for name, cause in causes.items():
        told = recipe.warnings_of(fine | cause, run)
        assert list(told) == [name] and "{" not in told[name]
    assert recipe.warnings_of(fine | {"heldout_loss": 0.505, "train_loss": 0.4}, run) == {}  # parted, but not rising
    watch = recipe.Watch()
    watch.see(torch.tensor(1.5), 0.5)
    watch.see(torch.tensor(2e-5), 0.5)
    watch.see(torch.tensor(math.nan), 0.5)
    watch.see(torch.tensor(9.0), 0.01)  # the first losses are high on purpose
    assert (float(watch.low), float(watch.high)) == (pytest.approx(2e-5), 1.5)


def test_loss_by_quartile_adds_up(config):
    cfg = config(batch_size=8)
    cfg.names = '["a", "b"]'
    run = common.Run(cfg)
    run.data = [0] * 10
    parts = recipe.build(cfg, run)
    losses = recipe.train_step(parts, recipe.example_batch(cfg, run), cfg, run)
    assert sum(float(losses[f"loss_q{k}"]) for k in (1, 2, 3, 4)) / 4 == pytest.approx(float(losses["loss"]), rel=1e-5)


# --- data and samples -------------------------------------------------------------------------------------------------
def test_classes_from_folders_and_csv(config, folder, tmp_path, capsys):
    recipe.train(config(data_dir=str(folder)))
    assert json.loads(recipe.load(tmp_path / "run").cfg.names) == ["ID_1", "ID_2", "ID_10"]
    assert "(ID_" in capsys.readouterr().out
    rows = [f"{p.relative_to(tmp_path)},{'odd' if int(p.stem) % 2 else 'even'}" for p in sorted(folder.rglob("*.png"))]
    (tmp_path / "list.csv").write_text("image,label\n" + "\n".join(rows))
    recipe.train(config(data_dir=str(tmp_path / "list.csv"), out_dir=str(tmp_path / "csv")))
    assert json.loads(recipe.load(tmp_path / "csv").cfg.names) == ["even", "odd"]


def test_wrong_data_get_sentences(config, folder, tmp_path):
    with pytest.raises(common.RecipeError, match="one class, 'ID_1'.*folder of its own"):
        recipe.train(config(data_dir=str(folder / "ID_1")))
    (tmp_path / "other" / "bird").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "bird" / "1.png")
    with pytest.raises(common.RecipeError, match=r"No validation image is of a training class \(ID_1, ID_2, ID_10\)"):
        recipe.train(config(data_dir=str(folder), val_dir=str(tmp_path / "other"), fresh=True))
    for changes, match in (
        ({"target_size": 18}, "takes a multiple of 4"),
        ({"mults": "1;2"}, "--mults is '1;2'; it takes up to 8 whole numbers"),
        ({"dim": 12}, "multiple of 8"),
        ({"latent_channels": 13}, "12 values"),
        ({"stage": "encoder", "encoder": "pca"}, "leave --encoder pca"),
        ({"factor": 3, "target_size": 24, "encoder": "vae"}, "an even one"),
    ):
        with pytest.raises(common.RecipeError, match=match):
            config(**changes)
    with pytest.raises(common.RecipeError, match="--encoder_weights FILE"):
        recipe.train(config(stage="diffusion", encoder="vae"))


def test_a_bad_file_has_the_class_of_the_one_that_takes_its_place(config, folder, tmp_path, capsys):
    (folder / "ID_1" / "4.png").write_text("no image")  # the next in order lies in ID_10
    (tmp_path / "held" / "ID_10").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "held" / "ID_10" / "1.png")
    cfg = config(data_dir=str(folder), val_dir=str(tmp_path / "held"))
    with common.Run(cfg, recipe.RECIPE) as run:
        data, val = recipe.open_data(cfg, run)
        bad = next(i for i in range(len(data)) if data.name(i).name == "4.png" and data.name(i).parent.name == "ID_1")
        batch = data.__getitems__([(0, bad), (0, bad - 1)])
    stands_in = data.name(data.items.place(bad)).parent.name
    assert [val.names[k] for k in batch["label"].tolist()] == [stands_in, "ID_1"] and stands_in != "ID_1"
    assert "Bad training file" in capsys.readouterr().out


def test_odd_class_names_make_odd_folders_nowhere_else(config, folder, tmp_path):
    names = {"ID_1": "../up", "ID_2": '"c, d"', "ID_10": "a/b?"}
    rows = [f"{p.relative_to(tmp_path)},{names[p.parent.name]}" for p in sorted(folder.rglob("*.png"))]
    (tmp_path / "list.csv").write_text("image,label\n" + "\n".join(rows))
    recipe.train(config(data_dir=str(tmp_path / "list.csv"), num_steps=1))
    paths = recipe.sample(config(sample=1, steps=2))
    assert sorted(p.parent.name for p in paths) == [".._up", "a_b_", "c, d"]
    assert all(p.parent.parent == tmp_path / "run" / "samples" for p in paths)
    assert [p.parent.name for p in recipe.sample(config(sample=1, steps=2, classes="c, d"))] == ["c, d"]


def test_epochs_count_where_they_are_given(config):
    assert recipe.Config(num_epochs=5).num_steps == 0 and recipe.Config().num_steps == 600
    assert recipe.Config(data_dir="x").num_steps == 150_000 and recipe.Config(num_epochs=5, num_steps=7).num_steps == 7
    for words, want in (
        ({}, 150_000), ({"num_epochs": 5}, 32), ({"num_steps": 9}, 9), ({"time_budget": "9m"}, math.inf),
        ({"time_budget": "9m", "num_epochs": 5}, 32), ({"time_budget": "9m", "num_steps": 9}, 9),
    ):  # fmt: skip
        run = common.Run(recipe.Config(**{"data_dir": "x", "out_dir": "x"} | words))
        run.data, run.clock = [0] * 100, common.Clock(common.duration(run.cfg.time_budget))
        assert run.planned_steps == want, words


def test_numbered_models_stay_few_and_can_be_sampled(config, tmp_path):
    recipe.train(config(num_steps=7, model_every=2, keep=2))
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.glob("model*.pt")) == ["model-000004.pt", "model-000006.pt", "model.pt"]
    assert {"sample-000002.png", "sample-000004.png", "sample-000006.png"} <= {p.name for p in folder.iterdir()}
    early = torch.load(folder / "model-000004.pt", weights_only=True)
    assert set(early) == {"net", "codec"}  # the average alone
    same(dict(recipe.load(folder, model="model-000004.pt").net.state_dict()), dict(early["net"]))
    with pytest.raises(common.RecipeError, match="no model-000002.pt .*model-000004.pt, model-000006.pt, model.pt"):
        recipe.load(folder, model="model-000002.pt")


def test_samples_come_in_a_folder_per_class_and_are_the_same_in_any_company(config, tmp_path):
    recipe.train(config())
    cfg = config(sample=3, classes="ring, disc", steps=2)
    first = {p.name: p.read_bytes() for p in recipe.sample(cfg)}
    assert sorted(first) == sorted(f"{c}-0-{i}.png" for c in ("ring", "disc") for i in range(3))
    assert {p.parent.name for p in (tmp_path / "run" / "samples").rglob("*.png")} == {"ring", "disc"}
    assert Image.open(tmp_path / "run" / "samples" / "disc" / "disc-0-1.png").size == (16, 16)
    again = {p.name: p.read_bytes() for p in recipe.sample(config(sample=1, classes="disc", steps=2))}
    assert again["disc-0-0.png"] == first["disc-0-0.png"]
    assert (
        len({p.read_bytes() for p in recipe.sample(config(sample=2, classes="disc", steps=2, seed=5))} | {*first.values()}) > 6
    )
    with pytest.raises(common.RecipeError, match="no class 'wheel'; it has cross, disc"):
        recipe.sample(config(sample=1, classes="wheel"))
    with pytest.raises(common.RecipeError, match="holds no trained model"):
        recipe.sample(config(sample=1, out_dir=str(tmp_path / "nothing")))


def test_the_pictures_name_their_classes(config, tmp_path):
    recipe.train(config())
    for name, columns in (("classes.png", 4), ("data.png", 8)):  # two real and two samples; eight images
        with Image.open(tmp_path / "run" / name) as sheet:
            left = np.asarray(sheet.convert("L"))[:, : sheet.width - columns * 70]
            assert left.shape[1] > 30 and (left < 128).sum() > 100  # ink of the names


def test_classifier_tells_the_shapes_apart(config, monkeypatch):
    monkeypatch.setattr(recipe, "EPOCHS", 40)
    monkeypatch.setattr(recipe, "BUILT_IN", 20)
    cfg = config(target_size=32)
    with common.Run(cfg, recipe.RECIPE) as run:
        _, val = recipe.open_data(cfg, run)
        net = recipe.train_classifier(val, cfg, run)
        right = recipe.accuracy(net, val.images, val.labels)
        assert right > 0.7  # chance is 1/6
        assert recipe.accuracy(recipe.train_classifier(val, cfg, run), val.images, val.labels) == right  # from its file


def test_feature_distance_is_least_for_the_same_distribution():
    torch.manual_seed(0)
    net, images = recipe.Classifier(6).eval(), pictures(120, 32)
    alike = images[:1].expand(60, -1, -1, -1)
    same_kind, other, one = (recipe.feature_distance(net, x, images[60:]) for x in (images[:60], 255 - images[:60], alike))
    assert abs(same_kind) < 0.05 and other > 0.1 and one > 0.3


def test_real_data(config):
    """31 classes of groceries; skipped without the data."""
    if not (REAL / "grocery64").is_dir():
        pytest.skip("grocery64 is not here")
    metrics = recipe.train(config(data_dir=str(REAL / "grocery64" / "train"), val_dir=str(REAL / "grocery64" / "heldout"),
        sample_ratio=0.2, target_size=32))  # fmt: skip
    assert metrics["copy_rate"] == 0 and 0 <= metrics["class_accuracy"] <= 1


@pytest.mark.slow
def test_no_data_in_two_minutes(tmp_path):
    """The command of the README: samples whose class the classifier names, well above chance."""
    words = [sys.executable, str(ROOT / "train_latent_cfg.py")]
    done = run(words, cwd=tmp_path, timeout=240, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "results" / "latent_cfg-demo" / "metrics.json").read_text())
    assert metrics["seconds"] < 120 * slowness() and metrics["class_accuracy"] > 0.5 and metrics["class_accuracy_real"] > 0.9
    assert re.search(r"5 % of the diffusion: .* The class is", done.stdout)
    assert (tmp_path / "results" / "latent_cfg-demo" / "classes.png").exists()
