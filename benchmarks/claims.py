# ruff: noqa: E501 (a table of sentences in two languages)
"""The guides' figures, each beside what is measured, predicted or counted: one table, and a picture of it.

    python benchmarks/claims.py [ROW ...] [--lang zh]          # compute these rows (default: all) and print the table
    python benchmarks/claims.py --print [--lang zh]            # print and draw what was found before

`two cores`: measured on this machine's processor, which says nothing certain of a card. `predicted`: what test_memory_usage.py
expects of the card that the row names. `counted`: arithmetic, or weights of a network that is built. Rows that look at other
files of benchmarks/results need them. Writes benchmarks/results/claims_<device>.json and benchmarks/pictures/claims.png.
"""

import argparse
import json
import math
import re
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from memory import GUIDE  # noqa: E402
from run import Form, about, in_turns, keep_freed_memory  # noqa: E402

import test_memory_usage as planner  # noqa: E402

RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "pictures" / "claims.png"
GUIDES = {
    1: ("NextDiT in 24 hours", "NextDiT 24 小时"),
    2: ("ConvNeXt, faster", "ConvNeXt 提速"),
    3: ("latent diffusion, batch 16", "潜在扩散，batch 16"),
    4: ("3-D autoencoder, memory", "三维自编码器显存"),
    5: ("super-resolution, 400x", "超分辨率 400 倍"),
}
VERDICTS = {"holds": "成立", "nearly": "接近", "more": "更多", "less": "更少", "no": "不成立", "unclear": "无法判断"}
BASES = {"two cores": "双核实测", "predicted": "预测", "counted": "计数"}
ROWS = {}


def claim(guide, name, claimed, chinese, basis):
    """Decorate a function that returns (figures, sentence, its Chinese, verdict, measured / claimed or None)."""

    def keep(function):
        ROWS[name] = {"guide": guide, "claimed": claimed, "chinese": chinese, "basis": basis, "make": function}
        return function

    return keep


def rule(value, low, high=None):
    """How a value lies to a claimed range (or a claimed value): "holds" to a tenth outside it, "nearly" to a quarter, beyond that
    "less" or "more"."""
    high = high or low
    for word, off in (("holds", 0.1), ("nearly", 0.25)):
        if (1 - off) * low <= value <= (1 + off) * high:
            return word
    return "less" if value < low else "more"


def result(name):
    """A file of benchmarks/results; of several devices' the processor's."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def compared(first, second, repeats=9, skip=2):
    """How many times faster an update of the second (recipe, flags) is than one of the first, taking turns."""
    forms = {k: Form(recipe, f"{flags} --device cpu") for k, (recipe, flags) in enumerate((first, second))}
    times = in_turns(forms, repeats, skip)
    return times[0] / times[1]


def on_card(recipe, flags, card, images=0):
    """(seconds of an update, updates of the run, bytes in all) that the planner predicts on a card."""
    _, capability, speed, fp32, half = planner.CARDS[card]
    plan = planner.Plan(recipe=recipe, images=images)
    words = planner.whole(plan, flags.split())
    found = planner.predict(plan, words, "cuda", capability)
    rates = (planner.BYTE_SHARE * speed, planner.FLOP_SHARE * fp32, planner.FLOP_SHARE * half)
    return planner.seconds_of(found["work"], rates), found["steps"], found["total"]


def on_weights(recipe, flags):
    """Million weights that `build` makes, on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = planner.Plan(recipe=recipe)
    module, cfg = planner.configure(plan, planner.whole(plan, flags.split()))
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = module.build(cfg, planner.Run(cfg, module.RECIPE, kind="cuda", capability=(8, 0)))
        return sum(p.numel() for p in parts.model.parameters()) / 1e6


# --- 1: NextDiT -------------------------------------------------------------------------------------------------------
FAST, ULTRA = "train_nextdit_fast", "train_nextdit_ultrafast"


@claim(1, "nextdit-size", '768/12/12 is "0.6B", the standard "2.3B"', "768/12/12 为 0.6B，标准版 2.3B", "counted")
def _():
    small = on_weights("train_nextdit_ultrafast", "--preset 0.1B --target_size 256") / 1e3
    published = on_weights("finetune_pretrained", "--weights PUBLISHED --train all") / 1e3
    text = f"{small:.2f} and {published:.2f} billion"
    return {"0.1B": small, "published": published}, text, f"{small:.2f} 与 {published:.2f}（十亿）", "no", small / 0.6


@claim(1, "nextdit-factors", "12 days → 20 h, by 4 x 2 x 1.5 x 3.3", "12 天 → 20 小时，由 4×2×1.5×3.3", "counted")
def _():
    times, product = 12 * 24 / 20, 4 * 2 * 1.5 * 100 / 30
    text = f"its factors make {product:.0f}, its times {times:.0f}"
    return (
        {"factors": product, "times": times},
        text,
        f"各因数相乘为 {product:.0f}，时间之比为 {times:.0f}",
        "no",
        times / product,
    )


@claim(1, "nextdit-resolution", "half the side: 4 times as fast", "边长减半：4 倍速度", "two cores")
def _():
    flags = "--preset tiny --patch 8 --batch_size 16 --target_size"
    x = compared((ULTRA, f"{flags} 128"), (ULTRA, f"{flags} 64"))
    return {"faster": x}, f"{x:.1f} times", f"{x:.1f} 倍", rule(x, 4), x / 4


@claim(1, "nextdit-model", "2.3B → 1.1B: twice as fast", "2.3B → 1.1B：2 倍速度", "predicted")
def _():
    big, small = (on_card(FAST, f"--preset {p} --target_size 512 --batch_size 32", "A100-80")[0] for p in ("2.3B", "1.1B"))
    x = big / small
    return {"faster": x}, f"{x:.1f} times on an A100 of 80 GB", f"80 GB 的 A100 上 {x:.1f} 倍", rule(x, 2), x / 2


@claim(1, "nextdit-batch", "batch 32 → 64: 1.5 times as fast", "批次 32 → 64：1.5 倍速度", "two cores")
def _():
    flags = "--preset tiny --target_size 64 --batch_size"
    x = 2 * compared((ULTRA, f"{flags} 32"), (ULTRA, f"{flags} 64"), 5)
    return {"faster": x}, f"{x:.2f} times the images a second, 64 px", f"64 像素时每秒图像数 {x:.2f} 倍", rule(x, 1.5), x / 1.5


@claim(1, "nextdit-batch-time", "a batch of 64 at 512 px: ~30 s", "512 像素、批次 64：约 30 秒", "predicted")
def _():
    flags = "--preset 1.1B --target_size 512 --batch_size 64 --patch"
    (theirs, _, total), (ours, *_) = (on_card(FAST, f"{flags} {p}", "A100") for p in (2, 16))
    gib = total / planner.GIB
    text = f"{theirs:,.0f} s and {gib:,.0f} GiB on an A100 with patch 2 on pixels; {ours:.1f} s with patch 16"
    zh = f"A100 上像素 patch 2 为 {theirs:,.0f} 秒、{gib:,.0f} GiB，patch 16 为 {ours:.1f} 秒"
    return {"patch 2": theirs, "gib": gib, "patch 16": ours}, text, zh, rule(theirs, 30), theirs / 30


def whole_run(recipe, flags, card="A100"):
    """(hours of updates with the guide's patch 2, with patch 16, updates) of a run on the guide's 1,400 images."""
    found = [on_card(recipe, f"{flags} --patch {p} --val_dir HELD_OUT", card, 1400) for p in (2, 16)]
    return *(seconds * steps / 3600 for seconds, steps, _ in found), found[0][1]


@claim(1, "nextdit-hours", "512 px, 1.1B, 30 epochs: ~20 h", "512 像素、1.1B、30 轮：约 20 小时", "predicted")
def _():
    theirs, ours, steps = whole_run(FAST, "--preset 1.1B --target_size 512 --batch_size 64 --num_epochs 30")
    text = f"{theirs:,.0f} h on an A100 with patch 2 on pixels, {ours:.1f} h with patch 16"
    zh = f"A100 上像素 patch 2 需 {theirs:,.0f} 小时，patch 16 需 {ours:.1f} 小时"
    return {"patch 2": theirs, "patch 16": ours, "updates": steps}, text, zh, rule(theirs, 18, 22), theirs / 20


@claim(
    1,
    "nextdit-ultra-hours",
    "256 px, 768/12/12, patch 2, 20 epochs: ~6 h",
    "256 像素、768/12/12、patch 2、20 轮：约 6 小时",
    "predicted",
)
def _():
    theirs, ours, steps = whole_run(ULTRA, "--preset 0.1B --target_size 256 --batch_size 128 --num_epochs 20")
    text = f"{theirs:.1f} h on an A100, {60 * ours:.1f} minutes with patch 16"
    zh = f"A100 上需 {theirs:.1f} 小时，patch 16 需 {60 * ours:.1f} 分钟"
    return {"patch 2": theirs, "patch 16": ours, "updates": steps}, text, zh, rule(theirs, 6), theirs / 6


@claim(1, "nextdit-warmup", "200 updates of warm-up in that run", "该配置热身 200 步", "counted")
def _():
    steps = 20 * math.ceil(1400 / 128)
    return (
        {"updates": steps},
        f"of {steps} in all: {20_000 / steps:.0f} %",
        f"总共只有 {steps} 步：占 {20_000 / steps:.0f} %",
        "no",
        None,
    )


@claim(1, "nextdit-timeline", "18-22 h; its timeline: done at 6:00", "18-22 小时；其时间线：6:00 完成", "counted")
def _():
    return {"hours": 6}, "its own timeline is 3 times as fast as its claim", "其时间线的速度是其说法的 3 倍", "no", None


@claim(1, "nextdit-overhead", "loading, validation: time x 3.5", "数据加载、验证等：时间 x 3.5", "two cores")
def _():
    run = result("nextdit_fundus_cpu2")["runs"][0]
    ms = result("nextdit_speed_cpu2")["rows"][0]["ms_per_update"]["half, own norm, rotation and attention (the recipe)"]
    x = run["seconds"] / (run["steps"] * ms / 1e3)
    text, zh = (
        f"x {x:.2f} in a run of {run['seconds']:.0f} s, start included",
        f"{run['seconds']:.0f} 秒的运行（含启动）x {x:.2f}",
    )
    return {"overhead": x}, text, zh, rule(x, 3.5), x / 3.5


@claim(1, "nextdit-sample-ratio", "half of the data: half the time", "只用一半数据：时间减半", "counted")
def _():
    whole, half = (30 * math.ceil(n / 64) for n in (1400, 700))
    text = f"{half} for {whole} updates, if the epochs stay"
    return {"updates": half / whole}, text, f"轮数不变时 {whole} 步变为 {half} 步", rule(half / whole, 0.5), half / whole / 0.5


@claim(1, "nextdit-finetune", "fine-tuning, 10 epochs: 2-3 h", "微调 10 轮：2-3 小时", "predicted")
def _():
    seconds, steps, _ = on_card("finetune_pretrained", "--num_epochs 10 --train all --val_dir HELD_OUT", "A100-80", 1400)
    lora = on_card("finetune_pretrained", "--num_epochs 10 --val_dir HELD_OUT", "A100-80", 1400)[0]
    h, ours = seconds * steps / 3600, lora * steps / 3600
    text = f"{h:.1f} h of updates on an A100 of 80 GB, all weights, 512 px; {ours:.1f} h by LoRA"
    zh = f"80 GB 的 A100、512 像素、全部权重：更新共 {h:.1f} 小时，LoRA 为 {ours:.1f} 小时"
    return {"hours": h, "lora": ours, "updates": steps}, text, zh, rule(h, 2, 3), h / 2.5


@claim(1, "nextdit-loss", "a loss of ~0.05 is the end of training", "损失约 0.05 即训练完成", "two cores")
def _():
    run = result("nextdit_fundus_cpu2")["runs"][0]
    text = (
        f"{run['linear_loss']:.3f} without any network, {run['heldout_loss']:.3f} after 10 min at 64 px: alone it tells nothing"
    )
    zh = f"64 像素时不用网络即 {run['linear_loss']:.3f}，训练 10 分钟为 {run['heldout_loss']:.3f}：单看无意义"
    return {k: run[k] for k in ("linear_loss", "heldout_loss")}, text, zh, "unclear", None


# --- 2: ConvNeXt ------------------------------------------------------------------------------------------------------
def form(recipe, name, key):
    """A figure of a recipe's form from benchmarks/run.py."""
    return result("cpu2")["recipes"][recipe]["forms"][name][key]


def amp(recipe, key):
    """A figure of a recipe in fp32 over that in AMP."""
    return form(recipe, "fp32 own layout eager plain", key) / form(recipe, "AMP own layout eager plain", key)


@claim(2, "convnext-amp", "AMP: 1.5-2 times as fast", "混合精度：1.5-2 倍速度", "two cores")
def _():
    x = amp("train_convnext", "ms")
    return {"faster": x}, f"{x:.2f} times", f"{x:.2f} 倍", rule(x, 1.5, 2), x / 1.75


@claim(2, "convnext-amp-memory", "AMP: about 50 % less memory", "混合精度：显存减少约 50 %", "two cores")
def _():
    x = 1 - 1 / amp("train_convnext", "peak_mib")
    return {"saves": x}, f"{x:.0%} less".replace("%", " %"), f"减少 {x:.0%}".replace("%", " %"), rule(x, 0.5), x / 0.5


@claim(2, "convnext-epochs", "an epoch: 30 → 15-20 min with AMP", "每轮 30 → 15-20 分钟（混合精度）", "two cores")
def _():
    ms = result("convnext_speed_cpu2")["rows"][0]["ms_per_update"]
    x = 30 * ms["convnext"] / ms["convnext, fp32"]
    return {"minutes": x}, f"30 → {x:.0f}", f"30 → {x:.0f}", rule(x, 15, 20), x / 17.5


@claim(2, "convnext-baseline", "baseline: 10-15 min, with AMP 5-10", "baseline：10-15 分钟，混合精度 5-10", "two cores")
def _():
    ms = result("convnext_speed_cpu2")["rows"][0]["ms_per_update"]
    a, b = (30 * ms[n] / ms["convnext, fp32"] for n in ("baseline, fp32", "baseline"))
    text, zh = (
        f"{a:.0f} and {b:.0f} of 30, of a baseline with more weights",
        f"以 30 计为 {a:.0f} 与 {b:.0f}（本仓库的 baseline 更大）",
    )
    return {"fp32": a, "AMP": b}, text, zh, "unclear", None


@claim(2, "convnext-compile", "torch.compile: faster after the first run", "torch.compile：首次之后加速", "two cores")
def _():
    x = form("train_convnext", "AMP own layout eager plain", "ms") / form(
        "train_convnext", "AMP own layout compiled plain", "ms"
    )
    return {"faster": x}, f"{x:.2f} times as fast", f"{x:.2f} 倍速度", "holds" if x > 1.02 else "no", x


@claim(2, "convnext-batch", "batch 1024 on two GPUs is 2048", "两张卡 batch 1024 等效 2048", "counted")
def _():
    return {"samples": 1024}, "1024: DataParallel splits the batch", "1024：DataParallel 会拆分批次", "less", 0.5


# --- 3: latent diffusion ----------------------------------------------------------------------------------------------
LATENT, STAGE = "train_latent_cfg", "--stage diffusion --encoder pca"


@claim(3, "latent-accumulation", "16 x 1 for 8 x 2: twice as fast", "16 x 1 代替 8 x 2：2 倍速度", "two cores")
def _():
    flags = f"{STAGE} --target_size 256 --batch_size"
    x = compared((LATENT, f"{flags} 8 --accumulate 2"), (LATENT, f"{flags} 16"))
    return {"faster": x}, f"{x:.2f} times", f"{x:.2f} 倍", rule(x, 2), x / 2


@claim(3, "latent-batch", "batch 32 is no faster than 16", "batch 32 不会更快", "two cores")
def _():
    flags = f"{STAGE} --target_size 256 --batch_size"
    x = 2 * compared((LATENT, f"{flags} 16"), (LATENT, f"{flags} 32"), 5)
    return {"faster": x}, f"{x:.2f} times the images a second", f"每秒图像数 {x:.2f} 倍", rule(x, 1), x


def latent(batch):
    """(seconds of an update, GiB in all) of the guide's size on its card."""
    seconds, _, total = on_card(LATENT, f"{STAGE} --target_size 256 --batch_size {batch}", "P100")
    return seconds, total / planner.GIB


@claim(3, "latent-memory", "batch 8 takes 1 GB, batch 16 2 GB", "batch 8 占 1 GB，batch 16 占 2 GB", "predicted")
def _():
    a, b = latent(8)[1], latent(16)[1]
    text, zh = f"{a:.1f} and {b:.1f} GiB of this recipe on a P100, 256 px", f"本脚本在 P100、256 像素：{a:.1f} 与 {b:.1f} GiB"
    return {"batch 8": a, "batch 16": b}, text, zh, rule(b, 2), b / 2


@claim(3, "latent-step", "0.05 s an update", "单步 0.05 秒", "predicted")
def _():
    s = latent(16)[0]
    return {"seconds": s}, f"{s:.2f} s on a P100, 256 px", f"P100、256 像素：{s:.2f} 秒", rule(s, 0.05), s / 0.05


@claim(3, "latent-hours", "150,000 updates: 2.1 h", "150,000 步：2.1 小时", "predicted")
def _():
    h = 150_000 * latent(16)[0] / 3600
    return {"hours": h}, f"{h:.1f} h on a P100, 256 px", f"P100、256 像素：{h:.1f} 小时", rule(h, 2.1), h / 2.1


@claim(3, "latent-steps", "1,550 images: 97 updates an epoch", "1,550 张：每轮 97 步", "counted")
def _():
    n = math.ceil(1550 / 16)
    return {"updates": n}, f"{n}", f"{n}", rule(n, 97), n / 97


@claim(3, "latent-share", "a batch of 16 is 0.1 % of 1,550", "batch 16 占 1,550 张的 0.1 %", "counted")
def _():
    x = 16 / 1550
    return {"share": x}, f"{100 * x:.2f} %", f"{100 * x:.2f} %", rule(x, 0.001), x / 0.001


@claim(3, "latent-quality", "20,000 updates: blurred; 50,000: clear", "20,000 步模糊，50,000 步清晰", "two cores")
def _():
    run = result("latent_cfg_grocery_cpu2")["metrics"]
    text = f"{run['class_accuracy']:.0%} of samples recognised after {run['steps']:,} at 64 px, other data".replace("%", " %")
    zh = f"另一数据集、64 像素，{run['steps']:,} 步后 {run['class_accuracy']:.0%} 的样本可被识别".replace("%", " %")
    return {k: run[k] for k in ("class_accuracy", "steps")}, text, zh, "unclear", None


@claim(3, "latent-loss", "a loss of 0.001-0.01 is high quality", "损失 0.001-0.01 为高质量", "two cores")
def _():
    run = result("latent_cfg_grocery_cpu2")["metrics"]
    text = f"{run['heldout_loss']:.2f} in that run, where guessing zero is 1: the scale is the objective's"
    zh = f"该次运行为 {run['heldout_loss']:.2f}（猜零为 1）：数值取决于目标函数"
    return {"heldout_loss": run["heldout_loss"]}, text, zh, "unclear", None


# --- 4: the 3-D autoencoder -------------------------------------------------------------------------------------------
def memory(part):
    """The row of a claim in benchmarks/results/memory_cpu2.json (benchmarks/memory.py), on a T4."""
    return next(r for r in result("memory_cpu2")["claims"] if r["claim"].startswith(part))


def saving(name, part, claimed, chinese, low, high, more="", mehr=""):
    """Register a claim that something saves a share of the memory."""

    @claim(4, name, claimed, chinese, "predicted")
    def _():
        row = memory(part)
        x = 1 - row["to"] / row["from"]
        text, zh = (t.replace("%", " %") for t in (f"{x:.0%} less on a T4{more}", f"T4 上减少 {x:.0%}{mehr}"))
        return {"saves": x}, text, zh, rule(x, low, high), x / ((low + high) / 2)


def costing(name, part, claimed, chinese, low, high):
    """Register a claim that something costs or saves so many MB."""

    @claim(4, name, claimed, chinese, "predicted")
    def _():
        row = memory(part)
        x = abs(row["to"] - row["from"]) / 1e6
        return {"mb": x}, f"{x:,.0f} MB on a T4", f"T4 上 {x:,.0f} MB", rule(x, low, high), x / ((low + high) / 2)


def fitting(name, part, claimed, chinese, low, high):
    """Register a claim of what a configuration takes, on live tensors alone: less than what the card must have."""

    @claim(4, name, claimed, chinese, "predicted")
    def _():
        row = memory(part)
        x, ours = row["from"] / planner.GIB, row["to"] / planner.GIB
        text = f"{x:.1f} GiB of live tensors; {ours:.1f} with half-precision norms and block-by-block checkpointing"
        zh = f"仅张量就有 {x:.1f} GiB；归一化半精度加逐块检查点为 {ours:.1f} GiB"
        return {"theirs": x, "ours": ours}, text, zh, rule(x, low, high), x / ((low + high) / 2)


saving("volume-amp", "AMP", "AMP: about 50 % less memory", "混合精度：节省约 50 % 显存", 0.5, 0.5)
saving("volume-checkpointing", "checkpointing", "checkpointing: 30-40 % less", "梯度检查点：节省 30-40 %", 0.3, 0.4,
    " block by block; the method that the guide calls is not in MONAI", "（逐块）；指南调用的方法在 MONAI 中不存在")  # fmt: skip
saving("volume-channels", "channels", "channels 16,32,64: 30-50 % less", "通道减为 16,32,64：节省 30-50 %", 0.3, 0.5)
costing("volume-disc", "a smaller disc", "a smaller discriminator saves 200-400 MB", "简化判别器：节省 200-400 MB", 200, 400)
costing("volume-perceptual", "perceptual", "perceptual loss: 300-500 MB", "感知损失：300-500 MB", 300, 500)


@claim(4, "volume-a", "configuration A: 10-14 GB", "配置 A：10-14 GB", "predicted")
def _():
    flags = f"{GUIDE} --gan 0.01 --disc 2,16 --accumulate 4"
    theirs, ours = (on_card("train_autoencoder3d", f"{flags} {more}", "3090")[2] / planner.GIB
        for more in ("--no-checkpointing --no-half_norm", "--checkpointing"))  # fmt: skip
    text = f"{theirs:.1f} GiB on a 3090, with fast attention (MONAI's default would not fit); {ours:.1f} with ours"
    zh = f"3090 上用快速注意力为 {theirs:.1f} GiB（MONAI 默认注意力放不下）；用我们的办法 {ours:.1f} GiB"
    return {"theirs": theirs, "ours": ours}, text, zh, rule(theirs, 10, 14), theirs / 12


fitting("volume-b", "configuration B", "configuration B: 18-22 GB", "配置 B：18-22 GB", 18, 22)
fitting("volume-c", "configuration C", "configuration C: for 40 GB", "配置 C：用于 40 GB", 40, 40)


@claim(4, "volume-accumulation", "accumulation adds no memory", "梯度累积不增加显存", "predicted")
def _():
    row = memory("four forward")
    x = row["to"] / row["from"] - 1
    return {"adds": x}, f"{100 * x:.0f} % more on a T4", f"T4 上增加 {100 * x:.0f} %", "holds" if x < 0.02 else "no", None


@claim(4, "volume-checkpointing-time", "checkpointing: 20-30 % slower", "梯度检查点：慢 20-30 %", "two cores")
def _():
    forms = [form("train_autoencoder3d", f"AMP own layout eager {m}", "ms") for m in ("plain", "checkpointed")]
    x = forms[1] / forms[0] - 1
    text, zh = (f"{100 * x:.0f} % slower, block by block; the guide's own table says 50 %",
        f"逐块慢 {100 * x:.0f} %；指南自己的表格为 50 %")  # fmt: skip
    return {"slower": x}, text, zh, rule(x, 0.2, 0.3), x / 0.25


@claim(4, "volume-times", "64x64x32, 128x128x64, 256x256x64: 2, 8, 20 min an epoch", "64x64x32、128x128x64、256x256x64：每轮 2、8、20 分钟",
    "predicted")  # fmt: skip
def _():
    flags = "--channels 32,64,64 --attention middle --res_blocks 2 --enlarge nearest --start plain --no-checkpointing --accumulate 1"
    sizes = {"64,64,32": 4, "128,128,64": 2, "256,256,64": 1}
    s = [on_card("train_autoencoder3d", f"--target_size {t} --batch_size {n} {flags}", "3090")[0] / n for t, n in sizes.items()]
    own = [2 * x / s[0] for x in s]
    text, zh = f"2, {own[1]:.0f}, {own[2]:.0f} on a 3090", f"3090 上 2、{own[1]:.0f}、{own[2]:.0f}"
    return dict(zip(sizes, own)), text, zh, rule(own[2], 20), own[2] / 20


@claim(4, "volume-groups", "channels 12,24,48 where memory is short", "显存不足时通道用 12,24,48", "counted")
def _():
    return {"rest": 12 % 8}, "cannot be built with its 8 norm groups", "其归一化分 8 组，这样的通道数无法构建", "no", None


# --- 5: super-resolution ----------------------------------------------------------------------------------------------
GAN = "train_realesrgan_optimized"


def rrdb(*shape):
    """Million weights of RRDBNet(features, blocks, growth)."""
    from train_realesrgan_optimized import RRDBNet

    with torch.device("meta"):
        return sum(p.numel() for p in RRDBNet(*shape).parameters()) / 1e6


@claim(5, "sr-size", '64x23 "16M", 32x12 "4M", 24x8 "2M"', "64x23 约 16M，32x12 约 4M，24x8 约 2M", "counted")
def _():
    m = [rrdb(64, 23, 32), rrdb(32, 12, 16), rrdb(24, 8, 12)]
    figures, ratio = dict(zip(("64x23", "32x12", "24x8"), m)), m[2] / 2
    return figures, f"{m[0]:.2f}, {m[1]:.2f} and {m[2]:.2f} million", f"{m[0]:.2f}、{m[1]:.2f}、{m[2]:.2f} 百万", "less", ratio


@claim(5, "sr-lighter", "32x8 has 80 % fewer weights, SRCNN 95 %", "32x8 参数减少 80 %，SRCNN 减少 95 %", "counted")
def _():
    full, light = rrdb(64, 23, 32), rrdb(32, 8, 16)
    a, b = 1 - light / full, 1 - 8129 / 1e6 / full
    text, zh = f"{100 * a:.0f} % and {100 * b:.2f} % fewer", f"减少 {100 * a:.0f} % 与 {100 * b:.2f} %"
    return {"32x8": a, "SRCNN": b}, text, zh, rule(a, 0.8), a / 0.8


@claim(5, "sr-amp", "AMP: twice as fast", "混合精度：2 倍速度", "two cores")
def _():
    x = amp(GAN, "ms")
    return {"faster": x}, f"{x:.2f} times", f"{x:.2f} 倍", rule(x, 2), x / 2


@claim(5, "sr-crop", "half the side: 4 times as fast", "边长减半：4 倍速度", "two cores")
def _():
    x = compared((GAN, "--target_size 256 --batch_size 8"), (GAN, "--target_size 128 --batch_size 8"), 5)
    return {"faster": x}, f"{x:.1f} times", f"{x:.1f} 倍", rule(x, 4), x / 4


@claim(5, "sr-400", "400 times as fast (120 min → 17 s an epoch)", "加速 400 倍（每轮 120 分钟 → 17 秒）", "two cores")
def _():
    full, small = (
        "--preset full --no-use_amp --batch_size 1 --target_size 512",
        "--preset optimized --batch_size 4 --target_size 256",
    )
    x = 4 * compared((GAN, full), (GAN, small), 3, 1)  # for each image
    ms = list(result("realesrgan_speed_cpu2")["ms_per_step"].values())
    like = ms[0] / ms[-1]
    text = f"{like:.1f} times for the same network, crops and images. {x:.0f} by 20 times fewer weights and a quarter of the pixels, "
    text += f"{5 * x:.0f} with a fifth of the images: another task"
    zh = f"同网络、同裁块、同图像 {like:.1f} 倍。参数减为二十分之一、像素减为四分之一时 {x:.0f} 倍，再只用五分之一图像为 {5 * x:.0f} 倍：已是另一个任务"
    return {"like for like": like, "smaller": x, "an epoch": 5 * x}, text, zh, rule(5 * x, 400), 5 * x / 400


@claim(5, "sr-memory", "0.01 GB of memory", "GPU 内存仅占 0.01 GB", "predicted")
def _():
    total = on_card(GAN, "--target_size 256 --batch_size 4", "T4")[2] / planner.GIB
    return {"gib": total}, f"{total:.1f} GiB on a T4", f"T4 上 {total:.1f} GiB", rule(total, 0.01), total / 0.01


@claim(5, "sr-quality", "24x8 has 85 % of the quality", "24x8 质量为 85 %", "two cores")
def _():
    run = result("realesrgan_set5_cpu2")["runs"][1]
    x, y = (run["psnr"] - run["psnr_bicubic"]) / (32.73 - run["psnr_bicubic"]), run["psnr"] / 32.73
    text = f"{100 * x:.0f} % of the published 64x23's gain over bicubic, {100 * y:.0f} % of its dB: a share of what?"
    zh = f"为 64x23 公布值相对双三次增益的 {100 * x:.0f} %，dB 的 {100 * y:.0f} %：是什么的百分比？"
    return {"gain": x, "dB": y}, text, zh, "unclear", None


@claim(5, "sr-srcnn", "SRCNN takes 30-50 min", "SRCNN 需 30-50 分钟", "two cores")
def _():
    run = result("srcnn_set5_cpu2")["runs"][0]
    x = run["seconds"] / 60
    text = f"{run['seconds']:.1f} s, 91 images: {run['psnr']:.2f} dB, more than its authors published"
    zh = f"91 张图像 {run['seconds']:.1f} 秒达 {run['psnr']:.2f} dB，高于作者公布值"
    return {k: run[k] for k in ("psnr", "seconds")}, text, zh, rule(x, 30, 50), x / 40


@claim(5, "sr-nearest", "INTER_NEAREST for INTER_CUBIC saves time", "用 INTER_NEAREST 代替 INTER_CUBIC 省时", "two cores")
def _():
    update, high = Form(GAN, "--target_size 96 --batch_size 8 --degradation bicubic --device cpu"), torch.rand(8, 3, 96, 96)

    def shrink():
        start = time.perf_counter()
        F.interpolate(high, (24, 24), mode="bicubic", antialias=True)
        return time.perf_counter() - start

    times = in_turns({"update": update, "bicubic": shrink}, 9)
    x = times["bicubic"] / times["update"]
    return {"share": x}, f"bicubic is {100 * x:.1f} % of an update", f"双三次仅占一次更新的 {100 * x:.1f} %", "no", None


# --- table and picture ------------------------------------------------------------------------------------------------
def command(name):
    """What repeats a row."""
    return f"`claims.py {name}`"


def markdown(rows, lang):
    """The table of rows {name: row}, as Markdown."""
    zh = lang == "zh"
    head = (
        "| 指南 | 说法 | 我们的数字 | 依据 | 结论 | 复现 |"
        if zh
        else "| guide | it says | what we find | basis | verdict | to repeat |"
    )
    lines, last = [head, "|---|---|---|---|---|---|"], None
    for name, row in rows.items():
        guide = GUIDES[row["guide"]][zh] if row["guide"] != last else ""
        last = row["guide"]
        words = [guide, row["chinese"], row["found_zh"], BASES[row["basis"]], VERDICTS[row["verdict"]]] if zh else [
            guide, row["claimed"], row["found"], row["basis"], row["verdict"]]  # fmt: skip
        lines.append(f"| {' | '.join(words)} | {command(name)} |")
    return "\n".join(lines)


def draw(rows, file):
    """A picture of every claim that is a number: how many times what was claimed is what was found."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {n: r for n, r in rows.items() if r["ratio"]}
    colours = {"holds": "#0072b2", "nearly": "#56b4e9"}
    fig, ax = plt.subplots(figsize=(14, 0.3 * len(rows) + 1.6))
    ax.axvspan(0.75, 1.25, color="#e8eef4", zorder=0)
    ax.axvline(1, color="#555555", lw=1)
    for k, row in enumerate(rows.values()):
        x, colour = min(max(row["ratio"], 0.002), 200), colours.get(row["verdict"], "#d55e00")
        ax.plot([1, x], [k, k], color=colour, lw=2)
        ax.plot(x, k, "o" if row["basis"] == "two cores" else "D" if row["basis"] == "predicted" else "s", color=colour, ms=7,
            mfc="white" if row["basis"] == "predicted" else colour)  # fmt: skip
    for k, row in enumerate(rows.values()):
        found = textwrap.shorten(re.split("[;:] ", row["found"])[0], 50, placeholder=" ...")
        ax.text(1.02, k, found, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color="#333333")
    ax.set_yticks(range(len(rows)), [r["claimed"] for r in rows.values()], fontsize=9)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ticks = (0.002, 0.01, 0.1, 0.5, 1, 2, 10, 100)
    ax.set_xticks(ticks, [f"{t:g}x" for t in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_xlabel("what we find, as a multiple of what the guides claim (filled: measured or counted, hollow: predicted)")
    ax.set_title("Five guides' figures, measured", loc="left", fontsize=14)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    fig.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--print", action="store_true", help="only print and draw what was found before")
    parser.add_argument("--lang", default="en", choices=["en", "zh"])
    args = parser.parse_args()
    unknown = [n for n in args.rows if n not in ROWS]
    if unknown:
        raise SystemExit(f"There is no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}.")
    keep_freed_memory()
    head = about("cpu")
    path = RESULTS / f"claims_{head['device']}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    for name in [] if args.print else args.rows or ROWS:
        row = {k: v for k, v in ROWS[name].items() if k != "make"}
        row |= dict(zip(("figures", "found", "found_zh", "verdict", "ratio"), ROWS[name]["make"]()))
        found["rows"][name] = row | {"torch": head["torch"], "date": head["date"]}
        found["rows"] = {n: found["rows"][n] for n in ROWS if n in found["rows"]}
        path.write_text(json.dumps(head | found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {row['claimed']}: {row['found']}: {row['verdict']}", file=sys.stderr, flush=True)
    if args.print and not found["rows"]:
        raise SystemExit(
            f"{path} has no rows yet; run benchmarks/claims.py without --print (figures are kept by number of threads)."
        )
    if len(found["rows"]) == len(ROWS):  # a picture of some would hide the others
        draw(found["rows"], PICTURE)
    rows = {n: r for n, r in found["rows"].items() if not args.rows or n in args.rows}
    print(markdown(rows, args.lang))


if __name__ == "__main__":
    main()
