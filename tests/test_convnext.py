"""Classifier: metrics against their definitions, data of all kinds, speed tricks against the plain way, tables and pictures."""

import csv
import io
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL, ROOT, checkpoint, run, same, slowness, stop_after
from PIL import Image

import common
import train_convnext as recipe

SMALL = {"base_channels": 8, "target_size": 16, "batch_size": 4, "num_steps": 4, "use_amp": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(recipe, "BUILT_IN", 6)


@pytest.fixture
def config(tmp_path):
    return lambda **changes: recipe.Config(**SMALL | {"out_dir": str(tmp_path / "run")} | changes)


@pytest.fixture
def folder(tmp_path):
    """Three classes of six images, one colour each."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(("grade 10", "grade 2", "grade 1")):
        place = tmp_path / "data" / name
        place.mkdir(parents=True)
        for i in range(6):
            image = rng.integers(0, 60, (20, 24, 3)) + 180 * np.eye(3)[k]
            Image.fromarray(image.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "data"


def held(folder):
    """A copy of the folder, to hold out."""
    return str(shutil.copytree(folder, folder.with_name("held")))


def parts_of(cfg, names="abc"):
    cfg.names = json.dumps(list(names))
    run = common.Run(cfg)
    return recipe.build(cfg, run), run


# --- metrics ----------------------------------------------------------------------------------------------------------
def textbook(x, y, k=5):
    """The separation metrics by their definitions, one image at a time."""
    x, y, n = np.asarray(x, np.float64), np.asarray(y), len(y)
    far = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    out = {"map_at_r": [], "precision_at_1": [], "knn": [], "silhouette": []}
    for i in range(n):
        near = [j for j in np.argsort(far[i], kind="stable") if j != i]
        r = (y == y[i]).sum() - 1
        votes = np.bincount(y[near[:k]])
        best = [c for c in range(len(votes)) if votes[c] == votes.max()]
        out["knn"].append((best[0] if len(best) == 1 else next(y[j] for j in near if y[j] in best)) == y[i])
        if r:
            hit = y[near] == y[i]
            out["map_at_r"].append(sum(hit[: j + 1].mean() for j in range(r) if hit[j]) / r)
            out["precision_at_1"].append(hit[0])
            a = far[i, y == y[i]].sum() / r
            b = min(far[i, y == c].mean() for c in set(y) - {y[i]})
            out["silhouette"].append((b - a) / max(a, b))
        else:
            out["silhouette"].append(0.0)
    out = {name: float(np.mean(v)) for name, v in out.items()}
    mean = {c: x[y == c].mean(0) for c in set(y)}
    between = sum(((mean[c] - x.mean(0)) ** 2).sum() for c in y)
    out["fisher"] = between / sum(((x[i] - mean[y[i]]) ** 2).sum() for i in range(n))
    pairs = [(far[i, j], y[i] == y[j]) for i in range(n) for j in range(i)]
    return out | {
        n: float(np.mean([d for d, s in pairs if s is own])) for n, own in (("intra", np.True_), ("inter", np.False_))
    }


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_separation_is_what_the_textbook_says(apart, chunk):
    rng = np.random.default_rng(3)
    y = np.concatenate([rng.integers(0, 4, 80), [4]])  # the last class has one image
    x = rng.normal(size=(81, 6)) + apart * np.eye(6)[y] + 5
    ours, theirs = recipe.separation(torch.tensor(x), torch.tensor(y), chunk=chunk), textbook(x, y)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=2e-4), name


def test_separation_of_what_is_known():
    y = torch.arange(40) // 20
    apart = torch.randn(40, 3) * 0.01 + 10 * y[:, None]
    m = recipe.separation(apart, y)
    assert m["map_at_r"] == m["precision_at_1"] == m["knn"] == 1 and m["silhouette"] > 0.99 and m["fisher"] > 1e4
    large = recipe.separation(10 * apart, y)
    for name in m:
        assert large[name] == pytest.approx(m[name] * (10 if name in ("intra", "inter") else 1), rel=1e-3), name
    one = recipe.separation(apart[:20], y[:20])
    assert one["map_at_r"] == 1 and not {"silhouette", "fisher", "inter"} & set(one)  # there is no other class
    pair = recipe.separation(torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([0, 1]))
    assert pair["inter"] == 5 and not {"map_at_r", "intra"} & set(pair)  # nobody has a neighbour of its class


def test_embeddings_that_are_all_alike_score_as_chance():
    """In the order of their files they would score 1."""
    y = torch.arange(600) // 200
    m = recipe.separation(torch.ones(600, 4), y)
    order = np.random.default_rng(0).permutation(600)
    chance = textbook(np.arange(600)[order][:, None] * 1.0, y.numpy())["map_at_r"]  # neighbours at random
    assert m["map_at_r"] == pytest.approx(chance, abs=0.05) and m["precision_at_1"] < 0.5 and m["silhouette"] == 0
    assert m["intra"] == m["inter"] == 0 and "fisher" not in m


def test_scores_by_hand():
    p = torch.tensor([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]])
    label = torch.tensor([0, 0, 1, 2, 2])
    m = recipe.classification(p.log(), label)
    assert m["accuracy"] == pytest.approx(4 / 5) and m["balanced_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    areas = [1.0, 1.0, (1 + 1 + 1 + 0.5 + 0.5 + 1) / 6]
    assert recipe.areas(p, label).tolist() == pytest.approx(areas)
    assert m["macro_auc"] == pytest.approx(float(recipe.areas(p.log().double().softmax(1), label).mean()))
    assert m["ece"] == pytest.approx(ece_by_hand(p, label))
    cost = [[0, 1, 4], [1, 0, 1], [4, 1, 0]]
    table = [[2, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert recipe.confusion(p.argmax(1), label, 3).tolist() == table
    seen = sum(cost[i][j] * table[i][j] for i in range(3) for j in range(3))
    by_chance = sum(cost[i][j] * sum(table[i]) * sum(r[j] for r in table) / 5 for i in range(3) for j in range(3))
    assert m["kappa"] == pytest.approx(1 - seen / by_chance)


def ece_by_hand(p, label):
    total = 0.0
    for b in range(15):
        inside = [i for i in range(len(p)) if b / 15 < p[i].max() <= (b + 1) / 15]
        if inside:
            right = np.mean([float(p[i].argmax() == label[i]) for i in inside])
            total += len(inside) / len(p) * abs(np.mean([float(p[i].max()) for i in inside]) - right)
    return total


def test_scores_at_the_edges():
    perfect = recipe.classification(100 * F.one_hot(torch.tensor([0, 1, 2, 0])).float(), torch.tensor([0, 1, 2, 0]))
    assert perfect["accuracy"] == perfect["macro_auc"] == perfect["kappa"] == 1 and perfect["ece"] < 1e-6
    flat = recipe.classification(torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert flat["macro_auc"] == pytest.approx(0.5) and flat["ece"] == pytest.approx(0, abs=1e-6)
    sure = recipe.classification(100 * torch.eye(2)[[1, 1, 0, 0]], torch.tensor([0, 0, 1, 1]))  # always sure, always wrong
    assert sure["accuracy"] == 0 and sure["ece"] == pytest.approx(1) and sure["macro_auc"] == 0 and sure["kappa"] == -1
    one = recipe.classification(torch.eye(2)[[0, 0]], torch.tensor([0, 0]))  # the other class does not occur
    assert one["balanced_accuracy"] == 1 and math.isnan(one["macro_auc"])


def test_metrics_agree_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed; CI runs this with it")
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 400)
    x = rng.normal(size=(400, 8)) + 1.2 * np.eye(8)[y]
    m = recipe.separation(torch.tensor(x), torch.tensor(y), k=1, chunk=128)
    assert m["silhouette"] == pytest.approx(sk.silhouette_score(x, y), abs=1e-5)
    near = KNeighborsClassifier(2).fit(x, y).kneighbors(x, return_distance=False)[:, 1]
    assert m["knn"] == m["precision_at_1"] == pytest.approx((y[near] == y).mean())
    scores = torch.randn(400, 5) + F.one_hot(torch.tensor(y), 5)
    p, guess, ours = scores.double().softmax(1).numpy(), scores.argmax(1), recipe.classification(scores, torch.tensor(y))
    assert ours["macro_auc"] == pytest.approx(sk.roc_auc_score(y, p / p.sum(1, keepdims=True), multi_class="ovr"))
    assert ours["kappa"] == pytest.approx(sk.cohen_kappa_score(y, guess, weights="quadratic"))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, guess))
    assert (recipe.confusion(guess, torch.tensor(y), 5).numpy() == sk.confusion_matrix(y, guess)).all()


# --- model, optimizer, augmentation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_layer_whitens(stride):
    layer = recipe.Whitened(stride, 24)
    assert recipe.Whitened(1, 48).out_channels == 24  # a patch of 2 x 2 pixels has no more
    x = F.interpolate(torch.randn(50, 3, 8, 8), (32, 32), mode="bicubic")
    layer.fit(x)
    out = layer(x)[:, :12, 1:-1, 1:-1].transpose(0, 1).flatten(1)
    assert layer(x).shape[2:] == ((31, 31) if stride == 1 else (16, 16))
    out = out - out.mean(1, keepdim=True)
    covariance = out @ out.T / out.shape[1]
    strong = covariance.diagonal() > 0.5  # where the patches vary at all
    assert strong.sum() >= 5 and (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.1
    assert torch.equal(layer.weight[:12], -layer.weight[12:]) and not layer.weight.requires_grad


def test_a_judged_image_and_its_mirror_image_get_one_answer(config):
    x = torch.rand(3, 3, 16, 16) * 255
    for flip, same_ in (("h", True), ("none", False)):
        cfg = config(flip=flip)
        net = parts_of(cfg)[0].ema.model
        one, two = (torch.cat(net(t), 1) for t in (x, x.flip(3)))
        assert torch.allclose(one, two, atol=1e-5) == same_
        e, scores = net.see(x)
        assert torch.allclose(net(x)[1], (scores + net.see(x.flip(3))[1]) / 2, atol=1e-5) == same_
        net.train()
        assert torch.equal(net(x)[0], net.see(x)[0])  # training sees one at a time


def test_orthogonal_steps():
    """Muon's matrices have singular values near 1, whatever the gradient's were."""
    x = torch.randn(3, 20, 60) * torch.logspace(-1, 1, 20)[:, None]
    values = torch.linalg.svdvals(recipe.Muon.orthogonal(x, steps=6))
    assert values.min() > 0.5 and values.max() < 1.3


def test_a_step_of_muon():
    unit, free, rest = (torch.nn.Parameter(torch.randn(6, 8)) for _ in range(3))
    groups = [{"params": [p], "kind": k} for p, k in ((unit, "unit"), (free, "free"), (rest, "adam"))]
    opt, was = recipe.Muon(groups, 0.1), [p.detach().clone() for p in (unit, free, rest)]
    for p in (unit, free, rest):
        p.grad = torch.randn(6, 8)
    opt.step()
    turn = recipe.Muon.orthogonal(unit.grad[None])[0]  # whatever its length: mean and gradient point the same way
    assert torch.allclose(unit, was[0] * 6**0.5 / was[0].norm() - 0.1 * turn, atol=1e-4)
    assert torch.allclose(free, was[1] - 0.1 * recipe.Muon.orthogonal(free.grad[None])[0], atol=1e-4)
    assert torch.allclose(rest, was[2] - 0.1 * rest.grad.sign(), atol=1e-4)  # Adam's first step


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("arch", ["baseline", "convnext"])
def test_rates_grow_with_the_batch(arch, optimizer, config):
    small, large = (
        recipe.make_optimizer(recipe.Net(cfg := config(arch=arch, optimizer=optimizer, batch_size=n), 3), cfg, common.Run(cfg))[
            1
        ]
        for n in (64, 256)
    )
    assert large / small == pytest.approx(4 if optimizer == "sgd" else 2)
    assert recipe.make_optimizer(recipe.Net(cfg := config(learning_rate=0.5), 3), cfg, common.Run(cfg))[1] == 0.5


def test_augmentation_moves_mirrors_and_cuts(config):
    x = torch.arange(16 * 16 * 3).view(1, 16, 16, 3).remainder(251).byte()
    plain = x.permute(0, 3, 1, 2).float()
    u = torch.full((1, 8), 0.5)
    quiet = {"cutout": 0, "flip": "none", "zoom": 0, "shift": 0.2}
    assert torch.equal(recipe.augment(x, u, config(**quiet), 0.0), plain)
    mirror = u.clone()
    mirror[:, 3] = 0.1
    assert torch.equal(recipe.augment(x, mirror, config(**quiet | {"flip": "h"}), 0.0), plain.flip(3))
    mirror[:, 2] = 0.1
    assert torch.equal(recipe.augment(x, mirror, config(**quiet | {"flip": "hv"}), 0.0), plain.flip(2, 3))
    move = u.clone()
    move[:, 0] = 0.999  # three pixels, the largest step
    out = recipe.augment(x, move, config(**quiet), 0.0)
    assert torch.equal(out[:, :, :13], plain[:, :, 3:]) and torch.equal(out[:, :, 13], plain[:, :, 14])  # mirrored at the edge
    cut = recipe.augment(x, u, config(**quiet | {"cutout": 0.5}), -1.0)
    hole = cut[0, 0] == -1
    assert hole.sum() == 64 and hole[4:12, 4:12].all()
    near = u.clone()
    near[:, 4] = 0.0  # half the step between two samples: everything twice as large
    big = recipe.augment(x, near, config(**quiet | {"zoom": 1.0}), 0.0)
    assert torch.equal(big[:, :, 0::2], big[:, :, 1::2]) and not torch.equal(big, plain)


def test_the_same_update_gives_the_same_augmentation_for_any_split(config):
    x, u = torch.randint(256, (6, 16, 16, 3), dtype=torch.uint8), torch.rand(6, 8)
    cfg = config(zoom=0.3, flip="hv")
    whole = recipe.augment(x, u, cfg, 0.0)
    assert torch.equal(whole, torch.cat([recipe.augment(a, b, cfg, 0.0) for a, b in zip(x.split(4), u.split(4))]))


# --- losses -----------------------------------------------------------------------------------------------------------
def test_supervised_contrast_by_hand():
    z, label = F.normalize(torch.randn(6, 4), dim=1), torch.tensor([0, 0, 1, 1, 1, 2])
    loss = recipe.supervised_contrast(z, label)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        total = sum(math.exp(z[i] @ z[j] / 0.1) for j in others)
        same_class = [j for j in others if label[j] == label[i]]
        by_hand = -sum(math.log(math.exp(z[i] @ z[j] / 0.1) / total) for j in same_class) / max(len(same_class), 1)
        assert float(loss[i]) == pytest.approx(by_hand, abs=1e-4)


def test_arcface_adds_the_margin_to_the_own_angle(config):
    cfg = config(loss="arcface")
    angles = torch.tensor([[0.5, 1.2, 2.0]])
    part = {"label": torch.tensor([0])}
    loss = recipe.class_loss(None, recipe.ARC_SCALE * angles.cos(), part, cfg, torch.zeros(3))
    moved = recipe.ARC_SCALE * torch.tensor([[0.5 + recipe.ARC_MARGIN, 1.2, 2.0]]).cos()
    assert float(loss) == pytest.approx(float(F.cross_entropy(moved, part["label"])), rel=1e-4)


def test_balance_makes_the_classes_count_alike(config):
    """The scores that minimise the loss name the class by what the image says, not by how many there are."""
    label = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    scores = torch.zeros(1, 2, requires_grad=True)
    for balance, expected in ((False, 0.9), (True, 0.5)):
        prior = torch.tensor([0.9, 0.1]).log() if balance else torch.zeros(2)
        opt = torch.optim.LBFGS([scores], max_iter=50)

        def closure(opt=opt, prior=prior):
            opt.zero_grad()
            loss = recipe.class_loss(None, scores.expand(100, 2), {"label": label}, config(smoothing=0.0), prior)
            loss.backward()
            return loss

        opt.step(closure)
        assert float(scores.detach().softmax(1)[0, 0]) == pytest.approx(expected, abs=0.01)


def test_mixup_is_the_mean_of_two_losses(config):
    cfg, scores = config(mixup=1.0), torch.randn(4, 3)
    part = {"label": torch.tensor([0, 1, 2, 1]), "mix": torch.tensor([0.0, 0.5, 0.25, 0.1])}
    own, other = (
        F.cross_entropy(scores, y, label_smoothing=0.1, reduction="none") for y in (part["label"], part["label"].roll(1))
    )
    expected = ((1 - part["mix"]) * own + part["mix"] * other).mean()
    assert float(recipe.class_loss(None, scores, part, cfg, torch.zeros(3))) == pytest.approx(float(expected))
    with pytest.raises(common.RecipeError, match="--mixup"):
        config(mixup=0.5, loss="supcon")


@pytest.mark.parametrize("changes", [{"loss": "supcon"}, {"loss": "arcface"}, {"mixup": 0.5}], ids=str)
@pytest.mark.parametrize("arch", ["baseline", "convnext"])
def test_each_loss_learns(arch, changes, config):
    """Two classes of one brightness each: told apart, and by SupCon and ArcFace pushed apart."""
    cfg = config(arch=arch, batch_size=12, cutout=0, num_steps=40, learning_rate=0.1, **changes)
    parts, run_ = parts_of(cfg, "ab")
    label = torch.arange(12) % 2
    image = torch.full((12, 16, 16, 3), 60, dtype=torch.uint8) + (120 * label[:, None, None, None]).byte()
    image = image + torch.randint(20, image.shape, dtype=torch.uint8)
    first = None
    for step in range(80):
        run_.step, run_.progress = step, step / 80
        losses = recipe.train_step(parts, {"image": image, "label": label, "index": label}, cfg, run_)
        first = first or float(losses["loss"])
    assert float(losses["loss"]) < first and float(losses["right"]) > 0.9
    if "loss" in changes:
        e = F.normalize(parts.model(image.permute(0, 3, 1, 2).float())[0].detach())
        assert (e[::2] @ e[1::2].T).mean() < 0.5 < (e[::2] @ e[::2].T).mean()


def test_mixup_mixes_images_and_classes_alike(config, monkeypatch):
    """With two images, one black and one white, the loss hears of each image's own share of white."""
    cfg, heard = config(mixup=1.0, cutout=0, batch_size=2), {}
    parts, run_ = parts_of(cfg, "ab")
    monkeypatch.setattr(
        recipe.Net, "see", lambda net, x: (heard.update(x=x.detach()), (x.mean((2, 3)) @ net.head.weight[:, :3].T,) * 2)[1]
    )
    loss = recipe.class_loss
    monkeypatch.setattr(recipe, "class_loss", lambda *a: (heard.update(part=a[2]), loss(*a))[1])
    image = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    image[1] = 255
    recipe.train_step(parts, {"image": image, "label": torch.tensor([0, 1]), "index": torch.arange(2)}, cfg, run_)
    white, share = heard["x"].mean((1, 2, 3)) / 255, heard["part"]["mix"]
    assert torch.allclose(white, torch.stack([share[0], 1 - share[1]]), atol=1e-5) and 0 < share.min() and share.max() <= 0.5


def test_the_prior_is_the_share_of_each_class(config, folder):
    other = held(folder)
    for i in range(4):
        (folder / "grade 10" / f"{i}.png").unlink()
    cfg = config(data_dir=str(folder), val_dir=other, balance=True)
    with common.Run(cfg, recipe.RECIPE) as run_:
        data, _, names = recipe.open_data(cfg, run_)
        parts = recipe.build(cfg, run_)
        recipe.prepare(parts, data, cfg, run_)
    share = torch.bincount(data.labels, minlength=len(names)) / len(data)
    assert len(set(share.tolist())) > 1 and torch.allclose(parts.prior.exp(), share)


# --- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, capability", [("cpu", (0, 0)), ("cuda", (7, 5))])
@pytest.mark.parametrize("changes", [{"loss": "supcon"}, {"arch": "baseline"}], ids=str)
def test_the_contract_runs_on_fake_tensors(changes, kind, capability, config):
    from torch._subclasses.fake_tensor import FakeTensorMode

    cfg = config(**changes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        planned = common.Run(cfg, kind=kind, capability=capability)
        parts = recipe.build(cfg, planned)
        losses = recipe.train_step(parts, recipe.example_batch(cfg, planned), cfg, planned)
        recipe.eval_step(parts, cfg, planned)
    assert {"loss", "right", "norm"} <= set(losses)


def test_example_batch_is_like_a_real_one(config):
    cfg = config()
    with common.Run(cfg, recipe.RECIPE) as run_:
        data, _, _ = recipe.open_data(cfg, run_)
        real, made = data.__getitems__([(0, i) for i in range(4)]), recipe.example_batch(cfg, run_)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


def test_settings_follow_the_data(config, folder):
    cfg = config(data_dir=str(folder), target_size=0, batch_size=0)
    assert (cfg.target_size, cfg.batch_size, cfg.stem) == (20, 32, 2)
    assert [recipe.Config(target_size=s, batch_size=8).stem for s in (32, 64, 128)] == [2, 4, 4]
    assert [recipe.Config(arch="baseline", target_size=s, batch_size=8).stem for s in (32, 64, 128)] == [1, 2, 4]
    for changes in ({"target_size": 8, "arch": "baseline", "stem": 2}, {"target_size": 4, "stem": 4}):
        with pytest.raises(common.RecipeError, match=r"--target_size is \d+; .* takes \d+ at least"):
            config(**changes)


def test_a_length_that_is_given_counts(tmp_path):
    length = lambda **words: recipe.Config(target_size=16, batch_size=4, **words).num_epochs  # noqa: E731
    assert (length(), length(data_dir=str(tmp_path)), length(num_epochs=40)) == (15, 40, 40)
    assert length(time_budget="1m") == length(num_steps=3) == 0  # so that the clock, or the steps, end the run


@pytest.mark.parametrize("images, batch", [(60, 32), (10_000, 128), (50_000, 1024), (10**6, 1024)])
def test_the_batch_grows_with_the_set(images, batch, monkeypatch):
    monkeypatch.setattr(recipe, "glance", lambda cfg: (images, 32))
    assert recipe.Config().batch_size == batch and recipe.Config(batch_size=7).batch_size == 7


# --- data -------------------------------------------------------------------------------------------------------------
def npz(path, gray=False, **more):
    """An .npz as MedMNIST's: labels [n, 1]."""
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 12), ("test", 6)):
        label = np.arange(n) % 3
        image = rng.integers(0, 60, (n, 16, 16, 3)) + 180 * np.eye(3)[label][:, None, None]
        arrays |= {f"{split}_images": image.astype(np.uint8), f"{split}_labels": label[:, None]}
        if gray:
            arrays[f"{split}_images"] = arrays[f"{split}_images"][..., 0]
    np.savez(path, **arrays | more)
    return path


def opened(cfg):
    with common.Run(cfg, recipe.RECIPE) as run_:
        return recipe.open_data(cfg, run_)


def test_classes_from_folders_csv_and_npz(config, folder, tmp_path):
    data, val, names = opened(config(data_dir=str(folder)))
    assert names == ["grade 1", "grade 2", "grade 10"] and len(data) == 16 and len(val) == 2
    for i in range(len(data)):  # each class has its colour
        assert names[data.labels[i]] == ("grade 10", "grade 2", "grade 1")[int(data.images[i].float().mean((0, 1)).argmax())]
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8") as f:
        rows = [[p, p.parent.name[-1], "val" if p.stem == "0" else ""] for p in sorted(folder.rglob("*.png"))]
        csv.writer(f).writerows([["image", "label", "split"], *rows])
    data, val, names = opened(config(data_dir=str(tmp_path / "list.csv"), out_dir=str(tmp_path / "b")))
    assert names == ["0", "1", "2"] and len(val) == 3
    for k, gray in enumerate((False, True)):
        cfg = config(data_dir=str(npz(tmp_path / f"{k}.npz", gray)), out_dir=str(tmp_path / f"c{k}"))
        data, val, names = opened(cfg)
        assert names == ["0", "1", "2"] and (len(data), len(val)) == (12, 6) and data.images.shape == (12, 16, 16, 3)
    cfg = config(data_dir=str(npz(tmp_path / "named.npz", classes=["ant", "bee", "cat"])), out_dir=str(tmp_path / "d"))
    assert opened(cfg)[2] == ["ant", "bee", "cat"] and cfg.target_size == 16


def test_npz_of_other_kinds(config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (20, 16, 16, 1), np.uint8), np.arange(20) % 2
    np.savez(tmp_path / "plain.npz", images=x, labels=y)
    data, val, _ = opened(config(data_dir=str(tmp_path / "plain.npz"), sample_ratio=0.5, out_dir=str(tmp_path / "a")))
    assert (len(data), len(val)) == (9, 2)  # a tenth held out, half of the rest
    np.savez(tmp_path / "keras.npz", x_train=x[:12], y_train=y[:12], x_test=x[12:], y_test=y[12:])
    data, val, _ = opened(config(data_dir=str(tmp_path / "keras.npz"), out_dir=str(tmp_path / "b")))
    assert (len(data), len(val)) == (12, 8) and "the test images" in capsys.readouterr().out
    npz(tmp_path / "three.npz", val_images=x[:4].repeat(3, 3), val_labels=y[:4])
    data, val, _ = opened(config(data_dir=str(tmp_path / "three.npz"), out_dir=str(tmp_path / "c")))
    assert len(val) == 4 and "its test images are left alone" in capsys.readouterr().out
    np.savez(tmp_path / "only.npz", test_images=x[:6], test_labels=y[:6])
    words = {"data_dir": str(tmp_path / "plain.npz"), "val_dir": str(tmp_path / "only.npz")}
    data, val, _ = opened(config(**words, out_dir=str(tmp_path / "d")))
    assert (len(data), len(val)) == (20, 6)
    with pytest.raises(common.RecipeError, match="no training images, only test"):
        opened(config(data_dir=str(tmp_path / "only.npz"), out_dir=str(tmp_path / "e")))


def test_npz_of_packed_files(config, tmp_path):
    files = []
    for i in range(8):
        memory = io.BytesIO()
        Image.new("RGB", (16, 16), (255, 0, 0) if i % 2 else (0, 0, 255)).save(memory, "PNG")
        files.append(np.frombuffer(memory.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"train_jpeg": np.concatenate(files), "train_offsets": offsets, "train_labels": np.arange(8) % 2}
    np.savez(tmp_path / "p.npz", **arrays, classes=["blue", "red"])
    data, val, names = opened(config(data_dir=str(tmp_path / "p.npz")))
    assert len(data) == 7 and len(val) == 1  # a tenth, one at least
    for i in range(7):
        assert data.images[i, 0, 0].tolist() == ([255, 0, 0] if names[data.labels[i]] == "red" else [0, 0, 255])
    assert re.fullmatch(r".*p\.npz\[train \d\]", data.name(0))


def test_wrong_data_get_sentences(config, folder, tmp_path):
    def refused(match, **changes):
        with pytest.raises(common.RecipeError, match=match):
            opened(config(out_dir=str(tmp_path / f"refused-{match[:3]}"), **changes))

    one = tmp_path / "one" / "only"
    one.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20)).save(one / f"{i}.png")
    refused("one class to train on, 'only'", data_dir=str(one.parent))
    two = tmp_path / "two"
    for name in "ab":
        (two / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(two / name / "0.png")
    refused("one class to train on|No validation image", data_dir=str(two))
    refused("no such folder", data_dir=str(tmp_path / "gone"))
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    refused("broken.npz cannot be read", data_dir=str(tmp_path / "broken.npz"))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    refused("other.npz holds weights. It takes images and labels", data_dir=str(tmp_path / "other.npz"))
    refused("float64", data_dir=str(npz(tmp_path / "f.npz", train_images=np.zeros((12, 16, 16, 3)))))
    refused("each image needs one label", data_dir=str(npz(tmp_path / "l.npz", train_labels=np.zeros(5, int))))
    refused("takes an .npz too", data_dir=str(npz(tmp_path / "v.npz")), val_dir=str(folder))


def test_a_bad_file_has_the_class_of_the_one_that_takes_its_place(config, folder, capsys):
    bad = folder / "grade 1" / "3.png"
    bad.write_bytes(b"no picture")
    data, val, names = opened(config(data_dir=str(folder)))
    assert "Bad" in capsys.readouterr().out
    for set_ in (data, val):
        for i in range(len(set_)):
            assert (
                names[set_.labels[i]] == ("grade 10", "grade 2", "grade 1")[int(set_.images[i].float().mean((0, 1)).argmax())]
            )


def test_a_bad_held_out_file_is_left_out(config, folder):
    """Its stand-in would be a twin, which looks like a neighbour of its class."""
    other = held(folder)
    (folder.with_name("held") / "grade 2" / "1.png").write_bytes(b"no picture")
    _, val, names = opened(config(data_dir=str(folder), val_dir=other))
    assert len(val) == 17 and not any(val.name(i).endswith("grade 2/1.png") for i in range(17))
    assert [names[c] for c in val.labels] == [recipe.Path(val.name(i)).parent.name for i in range(17)]


def test_a_set_that_does_not_fit_is_read_by_the_loader(config, folder, monkeypatch, capsys):
    """The same batches, and the same weights at the end."""
    whole = recipe.train(config(data_dir=str(folder), out_dir=str(folder.parent / "a"), num_workers=2))
    assert "no loader" in capsys.readouterr().out
    monkeypatch.setattr(common, "free_memory", lambda: 0)
    monkeypatch.setattr(recipe, "free_memory", lambda: 0)
    again = recipe.train(config(data_dir=str(folder), out_dir=str(folder.parent / "b"), num_workers=2))
    assert "read by worker processes" in capsys.readouterr().out
    same(checkpoint(folder.parent / "a")["parts"], checkpoint(folder.parent / "b")["parts"])
    assert whole["accuracy"] == again["accuracy"]


# --- what a run says and leaves ----------------------------------------------------------------------------------------
def test_a_run_leaves_its_tables_and_pictures(config, folder, tmp_path, capsys):
    metrics = recipe.train(config(data_dir=str(folder), val_dir=held(folder), num_steps=12, metrics_every=1, embed_every=2))
    out, place = capsys.readouterr().out, tmp_path / "run"
    names = ("accuracy", "map_at_r", "knn", "silhouette", "fisher", "intra", "inter", "ece", "macro_auc", "kappa", "steps")
    assert set(names) <= set(metrics) and "Time: data" in out and "at a peak rate of" in out
    assert sum(v for k, v in metrics.items() if k.startswith("time_")) == pytest.approx(1, abs=0.01)
    for kind in ("embeddings-*.npz", "scatter-*.png", "confusion-*.png"):
        assert len(list(place.glob(kind))) >= 3, kind  # before, during and after
    with np.load(place / "embeddings-000012.npz") as saved:
        assert saved["embedding"].shape[0] == 18 and np.allclose(np.linalg.norm(saved["embedding"], axis=1), 1, atol=1e-4)
        guess = saved["probability"].argmax(1)
        assert (guess == saved["label"]).mean() == pytest.approx(metrics["accuracy"], abs=1e-4)
    with open(place / "classes.csv", encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f))
    assert [r["class"] for r in rows] == ["grade 1", "grade 2", "grade 10"] and {r["images"] for r in rows} == {"6"}
    state = common.load_tensors(place / "model.pt")
    same(dict(state), dict(checkpoint(place)["parts"]["ema"]["model"]))  # what was judged is what is exported
    with open(place / "errors.csv", encoding="utf-8-sig") as f:
        errors = list(csv.DictReader(f))
    assert len(errors) == round(18 * (1 - metrics["accuracy"])) and all(r["label"] != r["said"] for r in errors)
    assert list(place.glob("errors-*.png"))
    recalls = [float(r["recall"]) for r in rows]
    assert np.mean(recalls) == pytest.approx(metrics["balanced_accuracy"], abs=1e-4)


def test_wrong_labels_are_found(config):
    """Two clouds; one point of each carries the other's label."""
    y = torch.arange(20) // 10
    e = F.normalize(torch.randn(20, 4) * 0.05 + torch.eye(4)[y])
    scores, label = 8 * torch.eye(2)[y] + 0.1 * torch.randn(20, 2), y.clone()
    label[3], label[15] = 1, 0
    val = types.SimpleNamespace(scores=scores, labels=label, embedding=e, name=lambda i: f"{i}.png")
    rows = recipe.suspects(val, ["a", "b"])
    assert {r["file"] for r in rows} == {"3.png", "15.png"} and all(r["maybe_mislabelled"] for r in rows)
    assert {(r["label"], r["said"]) for r in rows} == {("b", "a"), ("a", "b")}
    scores[7] = torch.tensor([0.0, 8.0])  # the network errs alone: its neighbours are of its class
    row = next(r for r in recipe.suspects(val, ["a", "b"]) if r["file"] == "7.png")
    assert not row["maybe_mislabelled"]


def test_the_bottleneck_names_the_setting(config):
    shares = {f"time_{k}": 0.02 for k in ("data", "augment", "metrics", "pictures")} | {"time_compute": 0.92}
    assert "--arch baseline" in recipe.bottleneck(shares, config())
    for part, setting in (("data", "--num_workers"), ("augment", "--cutout 0"), ("metrics", "--metrics_every 20")):
        assert setting in recipe.bottleneck(shares | {f"time_{part}": 0.4}, config(), resident=False)


def test_times_add_up(config):
    import time

    times = recipe.Times(common.Run(config()))
    with times("metrics"):
        time.sleep(0.05)
    for _ in times.batches(iter([1, 2])):
        with times("augment", sampled=True):
            time.sleep(0.02)
    shares = times.shares()
    assert sum(shares.values()) == pytest.approx(1) and shares["time_metrics"] > shares["time_augment"] > shares["time_data"]


def test_new_images_get_predictions_and_embeddings(config, folder, tmp_path):
    cfg = config(data_dir=str(folder), val_dir=held(folder), num_steps=30, cutout=0)
    metrics = recipe.train(cfg)
    (folder / "grade 1" / "broken.png").write_bytes(b"no picture")
    rows = recipe.embed(config(embed=str(folder)))
    assert len(rows) == 18
    right = np.mean([cls == re.search(r"grade \d+", file)[0] for file, cls, _ in rows])
    assert right == pytest.approx(metrics["accuracy"], abs=1e-4)
    model = recipe.load(tmp_path / "run")
    x = torch.from_numpy(recipe.load_picture({"image": rows[0][0]}, 16).copy()).permute(2, 0, 1)[None]
    e, p = model(x)
    with np.load(tmp_path / "run" / "embedded" / "embeddings.npz") as saved:
        assert np.allclose(saved["embedding"][0], e.detach().numpy()[0], atol=1e-5)
    assert model.names[int(p.argmax())] == rows[0][1]
    with pytest.raises(common.RecipeError, match="no trained model"):
        recipe.load(tmp_path / "nowhere")
    with pytest.raises(common.RecipeError, match="No pictures|no such folder"):
        recipe.embed(config(embed=str(tmp_path / "gone")))


@pytest.mark.parametrize("arch", ["baseline", "convnext"])
def test_onnx_gives_what_the_model_gives(arch, config, folder, tmp_path):
    """At another batch size, in onnxruntime where it is installed, else in onnx's own evaluator."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    recipe.train(config(arch=arch, data_dir=str(folder), num_steps=3))
    x = torch.rand(5, 3, 16, 16) * 255
    e, p = recipe.load(tmp_path / "run")(x)
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "run" / "model.onnx"))
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(onnx.load(tmp_path / "run" / "model.onnx"))
    for ours, theirs in zip((e, p), session.run(None, {"image": x.numpy()})):
        assert np.abs(ours.detach().numpy() - theirs).max() < 1e-4


@pytest.mark.slow
def test_compare_writes_its_table(tmp_path):
    words = [sys.executable, str(ROOT / "train_convnext.py"), "--compare", "--num_steps", "2", "--batch_size", "8"]
    words += ["--base_channels", "8", "--target_size", "16", "--device", "cpu", "--out_dir", str(tmp_path / "c")]
    done = run(words, timeout=240)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "c" / "comparison.csv", encoding="utf-8-sig") as f:
        rows = list(csv.DictReader(f))
    assert [r["run"] for r in rows] == ["baseline-fp32", "baseline-amp", "convnext-fp32", "convnext-amp"]
    for row in rows:
        own = json.loads((tmp_path / "c" / row["run"] / "metrics.json").read_text())
        assert float(row["accuracy"]) == own["accuracy"] and float(row["seconds_per_epoch"]) > 0
        saved = json.loads((tmp_path / "c" / row["run"] / "settings.json").read_text())["settings"]
        assert f"{saved['arch']}-{'amp' if saved['use_amp'] else 'fp32'}" == row["run"] and saved["num_steps"] == 2
    assert Image.open(tmp_path / "c" / "comparison.png").width > 300 and "images/s" in done.stdout


@pytest.mark.parametrize("arch, optimizer", [("baseline", "muon"), ("convnext", "adamw"), ("baseline", "sgd")])
def test_each_network_and_optimizer_continues_bit_for_bit(arch, optimizer, config, tmp_path, monkeypatch):
    def cfg(name):
        words = {"arch": arch, "optimizer": optimizer, "num_steps": 5, "balance": True}
        return config(**words, out_dir=str(tmp_path / name))

    recipe.train(cfg("whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(common.Stopped, match="after update 2, which is saved"):
            recipe.train(cfg("run"))
    recipe.train(cfg("run"))
    same(checkpoint(tmp_path / "run")["parts"], checkpoint(tmp_path / "whole")["parts"])


def test_real_data(config, tmp_path):
    """Real pictures of 31 classes: a minute's worth of updates beats guessing by far."""
    if not (REAL / "grocery64").is_dir():
        pytest.skip("shared/data is not here")
    cfg = config(data_dir=str(REAL / "grocery64" / "train"), val_dir=str(REAL / "grocery64" / "heldout"), arch="baseline",
        target_size=32, base_channels=16, batch_size=32, num_steps=60, sample_ratio=0.5)  # fmt: skip
    metrics = recipe.train(cfg)
    assert metrics["accuracy"] > 4 / 31 and metrics["macro_auc"] > 0.7 and metrics["map_at_r"] > 1.5 / 31


@pytest.mark.slow
def test_no_data_in_ninety_seconds(tmp_path):
    import time

    start = time.monotonic()
    words = [sys.executable, str(ROOT / "train_convnext.py"), "--use_amp", "--out_dir", str(tmp_path / "run")]
    done = run(words, OMP_NUM_THREADS="2", timeout=300)
    assert done.returncode == 0 and time.monotonic() - start < 90 * slowness(), done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9 and list((tmp_path / "run").glob("scatter-*.png"))


@pytest.mark.slow
def test_seventy_percent_in_a_minute(tmp_path):
    """As many updates as a minute's run of the README has, so that the accuracy does not hang on the machine's speed."""
    import time

    if not (REAL / "cifar10_10k_2k.npz").exists():
        pytest.skip("shared/data is not here")
    start = time.monotonic()
    words = [sys.executable, str(ROOT / "train_convnext.py"), "--use_amp", "--arch", "baseline", "--num_steps", "200"]
    words += ["--data_dir", str(REAL / "cifar10_10k_2k.npz"), "--out_dir", str(tmp_path / "run")]
    done = run(words, OMP_NUM_THREADS="2", timeout=300)
    assert done.returncode == 0 and time.monotonic() - start < 60 * slowness(), done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] > 0.7
