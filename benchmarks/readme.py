"""Fill the tables of both READMEs that come straight from benchmarks/results: python benchmarks/readme.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; --check says which are not what the files give, and exits 1.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import claims as guides  # noqa: E402
from choices import CARDS  # noqa: E402

READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}


def table(head, rows, right=1):
    """Markdown of a table; columns from `right` on are figures."""
    lines = [head, ["---" if k < right else "--:" for k in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def claims(lang):
    """The guides' figures beside ours."""
    return guides.markdown(guides.result("claims_cpu2")["rows"], lang)


def choices(lang):
    """What the planner predicts of each recipe's command on each card."""
    rows, word = [], "predicted" if lang == "en" else "预测"
    for recipe, row in guides.result("choices")["rows"].items():
        cells = []
        for card in CARDS:
            c = row["cards"][card]
            count = f"{c['updates']:,}" if c["updates"] < 10_000 else f"{c['updates'] / 1000:,.0f}k"
            no = "too much" if lang == "en" else "放不下"
            cells.append(f"{c['gib']:.1f} GiB, {count if c['fits'] else no}")
        rows.append([f"`{recipe}.py {row['flags']} --time_budget {row['hours']}h`", *cells])
    first = "command: memory, updates in that time" if lang == "en" else "命令：显存，该时间内的更新次数"
    return table([first, *(f"{card}, *{word}*" for card in CARDS)], rows)


def switches(lang):
    """What AMP, channels last, torch.compile and checkpointing are worth in each recipe: times as fast, and memory."""
    rows = []
    for recipe, row in guides.result("cpu2")["recipes"].items():
        forms, own = row["forms"], "AMP own layout eager plain"

        def worth(a, b, forms=forms):
            if a not in forms or b not in forms:
                return "-"
            faster, memory = forms[a]["ms"] / forms[b]["ms"], forms[b]["peak_mib"] / forms[a]["peak_mib"] - 1
            return f"{faster:.2f}, {100 * memory:+.0f} %"

        best = forms[own]
        figures = [f"{best['ms']:.1f}", f"{best['items_per_second']:.1f}", f"{100 * best['utilisation']:.0f} %"]
        figures += [
            worth("fp32 own layout eager plain", own),
            worth("AMP contiguous eager plain", "AMP channels last eager plain"),
        ]
        figures += [worth(own, "AMP own layout compiled plain"), worth(own, "AMP own layout eager checkpointed")]
        rows.append([f"`{recipe}`", *figures])
    head = "recipe, ms per update, items/s, of the matrix rate, AMP, channels last, compile, checkpointing"
    if lang == "zh":
        head = "脚本, 每次更新毫秒, 每秒样本, 占矩阵速率, 混合精度, channels last, compile, 检查点"
    return table(head.split(", "), rows)


def quality(lang):
    """Slow settings against ours, with the same time."""
    from time_to_quality import PAIRS

    rows = []
    for recipe, pair in guides.result("time_to_quality_cpu2")["pairs"].items():
        metric, there = PAIRS[recipe][2], pair["ours there after"]
        form = {"psnr": "{:.2f} dB", "accuracy": "{:.3f}"}.get(metric, "{:.4f}")
        both = [cell for who in ("slow", "ours") for cell in (form.format(pair[who][metric]), f"{pair[who]['steps']:,}")]
        after = f"{there:.0f} s" if there is not None else ("never" if lang == "en" else "未达到")
        rows.append([f"`{recipe}`", f"`{pair['slow flags']}`", *both, after])
    head = "recipe, slow settings, they end at, updates, ours end at, updates, as good as theirs after"
    if lang == "zh":
        head = "脚本, 慢的设置, 其结果, 更新次数, 我们的结果, 更新次数, 达到其结果的用时"
    return table(head.split(", "), rows, 2)


def samples(lang):
    """Whether samples help a classifier."""
    zh = {"real": "真实图像", "samples": "样本", "real and samples": "真实图像加样本"}
    rows = []
    for name, row in guides.result("samples_help_cpu2")["sets"].items():
        rows.append(
            [
                name if lang == "en" else zh[name],
                f"{row['images']:,}",
                f"{100 * row['mean']:.1f} %",
                f"{100 * row['spread']:.1f} %",
            ]
        )
    head = ["trained on", "images", "accuracy, mean of three seeds", "deviation between seeds"]
    return table(head if lang == "en" else ["训练集", "图像数", "准确率（三个种子的平均）", "种子间标准差"], rows)


TABLES = {f.__name__: f for f in (claims, choices, switches, quality, samples)}


def filled(text, lang):
    """A README's text with its tables made anew."""

    def make(found):
        return f"<!-- table: {found[1]} -->\n{TABLES[found[1]](lang)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", make, text, flags=re.S)


def main():
    stale = []
    for lang, path in READMES.items():
        text = path.read_text(encoding="utf-8")
        new = filled(text, lang)
        if new != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if "--check" in sys.argv and stale:
        raise SystemExit(f"{', '.join(stale)}: tables differ from benchmarks/results; run python benchmarks/readme.py.")


if __name__ == "__main__":
    main()
