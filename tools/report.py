"""Make one page of a run, or of several side by side, to hand to a supervisor:

    python tools/report.py results/ultrafast_srcnn                       # report.html in the run folder
    python tools/report.py results/a results/b --out comparison.html    # what differs first, then each run
    python tools/report.py results/a --lang zh                           # in Chinese

The page is one file that asks the network for nothing and runs no script: mail it, print it. Its curves are written as
vector PDF beside it, for a thesis. It only reads the run folders, and never runs the code in them.
"""

import argparse
import base64
import html
import importlib
import io
import json
import math
import re
import shlex
import sys
import time
import types
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import RecipeError, clock_text, read_clock, read_json, read_settings, write_aside  # noqa: E402

MARK = "tools/report.py of deadline recipes"  # how a page or a figure of ours is known, and may be written anew
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
WIDEST, HEAVIEST, STRIP = 1600, 1_500_000, 12  # pixels and bytes of a picture on the page; pictures of a strip
COLOURS = {  # on white: on black. After Okabe and Ito, whose colours the colour-blind can tell apart; then three grays
    "#0072b2": "#62b5ef", "#d55e00": "#ff9350", "#009e73": "#3fd0a2", "#cc79a7": "#eaa5cb", "#b07d00": "#f0c04d",
    "#5f5fb0": "#a9a9f5", "#303030": "#e2e2e2", "#707070": "#a0a0a0", "#dcdcdc": "#3d3d3d",
}  # fmt: skip
*LINES, INK, FAINT, GRID = COLOURS
STYLES = {"solid": "-", "dashed": "--", "dotted": ":", "double": "-."}  # a border of CSS: a curve of matplotlib
REFERENCES = {  # figure: what to hold it against, where the run has measured that
    "psnr": ("psnr_bicubic", "psnr_pca"), "heldout_loss": ("linear_loss",), "class_accuracy": ("class_accuracy_real",),
}  # fmt: skip
ELSEWHERE = {"out_dir", "fresh", "continue_from", "mirror_dir"}  # settings that say where a run lies, not what it is
MEASURED_ON = set("data_dir val_dir target_size scale degradation lr_dir sample_ratio spacing val_images val_crops vae".split())


def esc(value):
    """A value from a run folder as text that HTML takes for nothing but text."""
    text = str(value).encode("utf-8", "replace").decode()
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text))


def speaker(lang):
    """t(text, **values): the text in this language, with the values escaped."""

    def t(text, **values):
        return (CHINESE.get(text, text) if lang == "zh" else text).format(**{k: esc(v) for k, v in values.items()})

    t.zh = lang == "zh"
    return t


# --- reading ----------------------------------------------------------------------------------------------------------
def real(value):
    """Whether a value of a JSON file is a number that can be shown and drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def read_log(path, samples):
    """(training rows, evaluations, first updates of the sessions, damaged lines, lines) of a log.jsonl, in order.

    Where the updates go back, the rows after that go: what a killed session did was done again. A session begins there, or
    where more time has passed than the updates took: a process was starting.
    """
    rows, judged, sessions, damaged = [], [], [], 0
    lines = [s for s in path.read_text(encoding="utf-8", errors="replace").splitlines() if s.strip("\0 ")]
    for line in lines:
        try:
            row = {k: str(v) if k == "metric" else v for k, v in json.loads(line).items() if k == "metric" or real(v)}
            row["step"] = int(row["step"])
        except Exception:  # whatever is in it: a full disk tears lines
            damaged += 1
            continue
        if "metric" in row:
            judged = [r for r in judged if (r["step"], r["metric"]) != (row["step"], row["metric"])] + [row]
        if "metric" in row or "seconds" not in row:  # a recipe may note other things
            continue
        last, rate = rows[-1] if rows else {"step": math.inf, "seconds": 0.0}, row.get("items_per_second", 0.0)
        gap = row["seconds"] - last["seconds"] - (row["step"] - last["step"]) * samples / rate if samples and rate > 0 else 0.0
        if row["step"] <= last["step"]:
            rows, judged = ([r for r in part if r["step"] < row["step"]] for part in (rows, judged))
        if row["step"] <= last["step"] or gap > 0.3 + 2e-4 * row["seconds"]:  # the log rounds to five digits
            sessions.append(row["step"])
        rows.append(row)
    return rows, judged, sessions, damaged, len(lines)


def recipe_fields(recipe):
    """(settings of a recipe beside this tool, name -> dataclass field; its file); nothing where it is not here or not loads."""
    names = {p.stem.removeprefix("train_"): p.stem for p in [*ROOT.glob("train_*.py"), *ROOT.glob("finetune_*.py")]}
    try:
        return importlib.import_module(names[recipe]).Config.__dataclass_fields__, f"{names[recipe]}.py"
    except (Exception, SystemExit):
        return {}, ""


def read_run(folder):
    """What the page shows of a run folder, as a namespace. RecipeError (exit code 2) for a folder that is none."""
    folder = Path(folder)
    about, run = read_settings(folder), types.SimpleNamespace(folder=folder, problems=[], begun="")
    run.metrics, run.settings, clock = read_json(folder / "metrics.json"), about.get("settings", {}), read_clock(folder)
    run.samples = max(0, about["samples"]) if real(about.get("samples")) else 0
    log = (folder / "log.jsonl").is_file()
    run.rows, run.judged, run.sessions, bad, lines = read_log(folder / "log.jsonl", run.samples) if log else ([], [], [], 0, 0)
    if not (isinstance(about.get("recipe"), str) or run.rows or run.judged or real(run.metrics.get("steps"))):
        inside = sorted(p.parent.name for p in folder.glob("*/settings.json"))[:5]
        what = "is not a run folder: it holds no settings.json or log.jsonl of a run" if folder.is_dir() else "is no folder"
        hint = f"one of those in it, e.g. {', '.join(inside)}" if inside else "the run folder that a recipe printed"
        raise RecipeError(f"{folder} {what}. Name {hint}.", 2)
    last, judged = (part[-1] if part else {} for part in (run.rows, run.judged))
    steps = max(last.get("step", 0), judged.get("step", 0))
    old, run.metric, run.evaluated = run.metrics.get("steps"), judged.get("metric", ""), judged.get("step", 0)
    run.finished = bool(run.metrics) and not (real(old) and old < steps)
    if not run.finished:
        alive = (folder / "clock.json").exists() and time.time() - (folder / "clock.json").stat().st_mtime < 60
        state = "is going on: {share} of it is done." if alive else "has not finished: {share} of it is done. The same command"
        share = f"{last.get('progress', 0.0):.0%}"
        run.problems = [(f"This run {state}" + " continues it." * (not alive), {"share": share})]
    for wrong, text, values in (
        (run.metrics and not run.finished, "metrics.json is of update {old}; training has gone on since then.", {"old": old}),
        (about and about != read_json(folder / "settings.json"), "settings.json is lost or damaged; its copy is shown.", {}),
        (not about, "settings.json is lost or damaged, its copy in code/ too.", {}),
        (not log, "log.jsonl is missing.", {}),
        (bad, "{n} of {all} lines of log.jsonl are damaged and left out.", {"n": bad, "all": lines}),
        (not run.metrics and (folder / "metrics.json").exists(), "metrics.json is damaged; the log stands in for it.", {}),
    ):  # fmt: skip
        run.problems += [(text, values)] if wrong else []
    if not run.finished:
        run.metrics = {k: v for k, v in judged.items() if k not in ("step", "metric")} | {"steps": steps}
        run.metrics["seconds"] = max(clock.get("used", 0.0), last.get("seconds", 0.0))
        run.metrics["peak_memory_gib"] = max((r.get("memory_gib", 0.0) for r in run.rows), default=0.0)
    run.metrics = {k: v for k, v in run.metrics.items() if real(v)}
    run.start = next((r for r in run.judged if r["step"] == 0 < run.evaluated), {})
    run.recipe = str(about.get("recipe") or folder.resolve().name)
    run.fields, run.script = recipe_fields(run.recipe)
    run.device = str(about.get("device", "")).removeprefix(f"{run.recipe}: ")
    run.about = {k: v for k, v in about.items() if isinstance(v, (str, int, float))}
    run.about |= {f"{k} files": len(v) for k, v in about.get("files", {}).items()}
    run.data = Path(str(run.settings.get("data_dir") or "").replace("\\", "/")).name
    try:
        run.begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(clock["born"]))
    except (KeyError, OverflowError, ValueError, OSError):
        pass  # no clock, or one that holds no moment
    busy = [r for r in run.rows if r.get("items_per_second", 0.0) > 0]
    counts = [1 if r["step"] in run.sessions else r["step"] - before.get("step", 0) for before, r in zip([{}, *busy], busy)]
    costs = [n / r["items_per_second"] for n, r in zip(counts, busy)]
    run.speed = sum(counts) / sum(costs) if costs else 0.0
    run.wait = sum(c * r.get("data_wait", 0.0) for c, r in zip(costs, busy)) / sum(costs) if costs else None
    return run


def value_of(run, name):
    """A setting of a run; its default where an older run did not know it."""
    field = run.fields.get(name)
    return run.settings.get(name, field.default if field and run.settings else "?")


def changed(run):
    """The names of the settings that a user changed from the recipe's defaults."""
    usual = {n: f for n, f in run.fields.items() if not {"action", "derived"} & set(f.metadata)}
    return [n for n, f in usual.items() if n in run.settings and run.settings[n] != f.default]


def command(run):
    """The command line that trains the run anew, in a folder of its own."""
    values = {n: run.settings[n] for n in changed(run) if n not in ELSEWHERE}
    values["out_dir"] = str(run.settings.get("out_dir") or f"results/{run.recipe}") + "-again"
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}={value}"] if not str(value) or str(value)[0] == "-" else [f"--{name}", str(value)]
    each = [value_of(run, n) for n in ("batch_size", "accumulate")]
    world = int(run.samples // math.prod(each)) if all(real(v) and v > 0 for v in each) else 1
    return shlex.join([*(["torchrun", f"--nproc_per_node={world}"] if world > 1 else ["python"]), run.script, *words])


# --- curves and pictures ----------------------------------------------------------------------------------------------
def plain(name):
    """A name for a figure: ASCII only, since a font may lack the rest."""
    return re.sub(r"[^\w .%()/-]", "?", str(name)[:40], flags=re.ASCII).lstrip("_") or "?"


def series(rows, x, y):
    """The columns x and y of those rows that have both, as an array [2, n]."""
    return np.array([(row[x], row[y]) for row in rows if x in row and y in row], float).reshape(-1, 2).T


def draw(panels, name):
    """(SVG for the page, PDF) of rows of two panels (x label, y label, lines); a line is (x, y, look), as matplotlib has it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    look = {"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42, "font.size": 9, "text.color": INK,
            "axes.edgecolor": FAINT, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT,
            "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
            "axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": False, "lines.linewidth": 1.7,
            "lines.markersize": 3.5, "legend.frameon": False, "legend.fontsize": 8, "text.parse_math": False}  # fmt: skip
    with matplotlib.rc_context(look):
        figure, files = Figure(figsize=(9.2, 2.5 * len(panels)), layout="constrained"), []
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
        for axis, (x_label, y_label, lines) in zip(figure.subplots(len(panels), 2).flat, sum(panels, [])):
            for x, y, how in lines:
                axis.plot(x, y, **how)
            heights = np.concatenate([y for _, y, _ in lines] or [np.ones(1)])
            if "loss" in y_label and heights.min() > 1e-9 and heights.max() > 30 * heights.min():
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
                axis.yaxis.set_minor_formatter("")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
            axis.set(xlabel=x_label, ylabel=y_label)
            if axis.get_legend_handles_labels()[1]:
                axis.legend()
        for form, about in (("svg", {"Date": None}), ("pdf", {"Creator": MARK, "CreationDate": None})):
            figure.savefig(file := io.BytesIO(), format=form, transparent=form == "svg", metadata=about)
            files.append(file.getvalue())
            figure.set_layout_engine("none")  # it stands
    svg = files[0].decode()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[a-z][\w.]*_\d+"| (width|height)="[\d.]+pt"', "", svg)  # names that would stand twice in a page
    for k, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{k})")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    return f'<div class="plot">{svg}</div>', files[1]


def curves(runs, name):
    """What `draw` gives of loss, judged figures, learning rate and throughput of runs; nothing where nothing is logged."""
    longest = max((r.get("seconds", 0) for run in runs for r in run.rows), default=0)
    unit, word = next((u, w) for u, w in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if longest > 2.5 * u or u == 1)
    judged, panels = list(dict.fromkeys(run.metric for run in runs if run.metric))[:3], []
    for pair in [("loss", "loss"), *zip(judged, judged), ("lr", "items_per_second")]:
        row = []
        for timed, key in enumerate(pair):
            label = {"loss": "training loss", "lr": "learning rate", "items_per_second": "samples per second"}.get(key)
            row.append((f"time used, {word}" if timed else "updates", label or plain(key), lines := []))
            held = {}  # the lines of the references, once for all runs that have the same
            for i, run in enumerate(runs):
                rows = run.rows if label else [r for r in run.judged if r["metric"] == key]
                rows = rows[1:-1] if timed and key != pair[0] and len(rows) > 4 else rows  # those two are of a moment only
                ticks, (x, y) = series(run.rows, "step", "seconds"), series(rows, "step", key)
                if not len(x) or (timed and not ticks.size):
                    continue
                how = {"color": LINES[i % 6], "linestyle": [*STYLES.values()][i % 4]}
                how |= {"label": chr(65 + i % 26)} if len(runs) > 1 else {}
                found, many = [], max(1, len(x) // 500)
                if key == "loss" and len(x) > 40:  # a mean over neighbours; of a single run the rows themselves, pale behind it
                    box = np.ones(n := len(x) // 25) / n
                    found = [(x[::many], y[::many], {"color": FAINT, "linewidth": 0.4})] if len(runs) == 1 else []
                    x, y = (np.convolve(v, box, "valid") for v in (x, y))
                found.append((x[::many], y[::many], how | {"marker": "o" if len(x) < 30 else ""}))
                for other in REFERENCES.get(key, ()):
                    x, y = series(rows, "step", other)
                    look = {"color": INK, "linestyle": ":", "linewidth": 1.2, "label": plain(other)}
                    if len(y):
                        held.setdefault(text_of(other, y[-1]), (np.interp(x, *ticks) / unit if timed else x, y, look))
                lines += [(np.interp(x, *ticks) / unit if timed else x, y, how) for x, y, how in found]
            lines += held.values()
        panels += [row] if any(lines for *_, lines in row) else []
    return draw(panels, name) if panels else ("", b"")


def embedded(path):
    """A picture file as a data: URI, made smaller where it is very large; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            form, data = image.format, path.read_bytes()
            image.load()
            if form not in ("PNG", "JPEG") or max(image.size) > WIDEST or len(data) > HEAVIEST:
                image = image.convert("RGB")
                image.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
                for form, more in (("PNG", {"optimize": True}), ("JPEG", {"quality": 92})):
                    image.save(file := io.BytesIO(), form, **more)
                    if len(data := file.getvalue()) <= HEAVIEST:
                        break
        return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
    except Exception:  # Pillow raises whatever a damaged file leads it to
        return None


# --- the page ---------------------------------------------------------------------------------------------------------
def about(name, recipe=""):
    """(whether more is better: + - or 0, how to write it, what it is in English, in Chinese) of a figure."""
    keys = (f"{recipe}.{name}", name, re.sub("^(time|heldout)_.*", r"\1", name))
    return next((METRICS[key] for key in keys if key in METRICS), ("0", ".4g", "", ""))


def text_of(name, value):
    """A figure with the digits that mean something."""
    form = about(name)[1]
    if form in ("%", "dB", "GiB"):
        return f"{100 * value:.1f} %" if form == "%" else f"{value:.2f} {form}"
    return clock_text(value) if form == "time" else f"{int(value):,}" if form == "int" else f"{value:{form}}"


def figure_of(name, value):
    """The same for the page, with all its digits for whoever looks."""
    return f'<data value="{value}" title="{value}">{text_of(name, value)}</data>'


def label(name, text):
    """A name with what it means below it."""
    return code(name) + (f"<small>{text}</small>" if text else "")


def setting_means(run, name, t):
    """What a setting is, in the page's language."""
    known = next((SETTINGS[key] for key in (f"{run.recipe}.{name}", name) if key in SETTINGS), "") if t.zh else ""
    return esc(known or (run.fields[name].metadata["help"] if name in run.fields else ""))


def code(value):
    """A setting's value, or a name, as code."""
    text = value if isinstance(value, str) and value else "auto" if value is None else json.dumps(value, ensure_ascii=False)
    return f"<code>{esc(text)}</code>"


def table(head, rows, align):
    """An HTML table of ready cells; `align` has l or r for each column. A row that is a text is a heading."""
    lines = ["".join(f'<th class="{a}" scope="col">{cell}</th>' for a, cell in zip(align, head))] if head else []
    for row in rows:
        if isinstance(row, str):
            lines.append(f'<th class="part" colspan="{len(align)}" scope="colgroup">{row}</th>')
        else:
            cells = "".join(f'<td class="{a}">{cell}</td>' for a, cell in zip(align[1:], row[1:]))
            lines.append(f'<th scope="row">{row[0]}</th>{cells}')
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def held_against(run, t):
    """(figure, reference, how far it is ahead, that as a text) of the pairs that the run has measured, judged ones first."""
    pairs = [(n, r) for n, known in REFERENCES.items() for r in known if n in run.metrics and r in run.metrics]
    for name, reference in sorted(pairs, key=lambda pair: pair[0] != run.metric):
        ahead = (run.metrics[name] - run.metrics[reference]) * {"-": -1, "0": 0, "+": 1}[about(name)[0]]
        text = f"{100 * abs(ahead):.1f} {t('points')}" if about(name)[1] == "%" else text_of(name, abs(ahead))
        text = "" if about(name)[0] == "0" else text  # typical samples are easier than real images: more is not better
        yield name, reference, ahead if re.search("[1-9]", text) else 0.0, text


def summary(run, t):
    """What, how long and how good, in a sentence or two."""
    m, parts = run.metrics, {}
    lead = {"steps": f"{int(m.get('steps', 0)):,}", "time": clock_text(m.get("seconds", 0)), "device": run.device}
    text = t("{steps} updates in {time}" + " on {device}" * bool(run.device), **lead) + t(". ")
    for name, reference, ahead, by in [(n, None, 0, "") for n in m if n == run.metric] + [*held_against(run, t)]:
        part = parts.setdefault(name, [t("{name} is {value}", name=name, value=text_of(name, m[name]))])
        how = "the same as {reference} ({value})" if about(name)[0] != "0" else "beside {reference} ({value})"
        how = f"{{by}} {'better' if ahead > 0 else 'worse'} than {{reference}} ({{value}})" if ahead else how
        part += [t(how, by=by, reference=reference, value=text_of(reference, m[reference]))] if reference else []
    for name, part in parts.items():
        part += [t("against {value} before training", value=text_of(name, run.start[name]))] if name in run.start else []
    return text + t("; ").join(t(", ").join(part) for part in parts.values()) + t(". ") * bool(parts)


def tiles(run, t):
    """The figures that say most, large, each with a note below."""
    m, name, wait = run.metrics, run.metric, f"{100 * (run.wait or 0):.0f} %"
    beside = next((f"{r} {text_of(r, m[r])}" for n, r, *_ in held_against(run, t) if n == name), "")
    if not beside and name in run.start:
        beside = f"{t('before training')} {text_of(name, run.start[name])}"
    rate = t("{n} samples per second", n=f"{run.speed:,.0f}" if run.speed > 100 else f"{run.speed:.3g}") if run.speed else ""
    found = [(code(name), name, beside)] if name in m else []
    found += [(t("time used"), "seconds", t("{share} of it waiting for data", share=wait)), (t("updates"), "steps", rate)]
    found += [(t("peak memory"), "peak_memory_gib", "GPU" if "cuda" in run.device else "RAM")]
    cells = (f"<dt>{a}</dt><dd>{figure_of(n, m[n])}<small>{b}</small></dd>" for a, n, b in found if n in m)
    return '<dl class="tiles">' + "".join(f"<div>{cell}</div>" for cell in cells) + "</dl>"


def figures(run, t):
    """The table of figures with their references."""
    pairs, rows = [*held_against(run, t)], []
    names = [n for n in run.metrics if n not in {r for _, r, *_ in pairs} and not RAN.fullmatch(n)]
    for name in sorted(names, key=lambda n: n != run.metric):
        mine = [(r, ahead, by) for n, r, ahead, by in pairs if n == name]
        held = "".join(f"<div>{figure_of(r, run.metrics[r])}<small>{esc(r)}</small></div>" for r, *_ in mine)
        gain = "".join(f"<div>{by}<small>{t('better' if a > 0 else 'worse') if a else ''}</small></div>" for _, a, by in mine)
        before = figure_of(name, run.start[name]) if name in run.start else ""
        final = f"<b>{figure_of(name, run.metrics[name])}</b>"
        rows.append([code(name), final, held, gain, before, about(name, run.recipe)[2 + t.zh]])
    head = ["figure", "final" if run.finished else "so far", "reference", "against it", "before training", "what it is"]
    keep = [k for k in range(6) if any(row[k] for row in rows)]  # no empty columns
    told = "As metrics.json has them, measured on held-out data with the averaged weights."
    told = told if run.finished else "As the log's evaluation after update {step} has them."
    text = t(told if rows else "No evaluation has been recorded yet.", step=run.evaluated)
    rows = [[row[k] for k in keep] for row in rows]
    return (table([t(head[k]) for k in keep], rows, "".join("lrrrrl"[k] for k in keep)) if rows else "") + note(text)


def note(text, kind="note"):
    """A paragraph in small print, or a warning."""
    return f'<p class="{kind}">{text}</p>' if text else ""


def pictures(run, key, t):
    """The pictures of the run folder: samples over time, and the last of every other kind."""
    found, ticks, bad = {}, series(run.rows, "step", "progress"), []
    for path in sorted(run.folder.glob("*.png")):
        if named := re.fullmatch(r"([a-z]+)-(\d{1,9})\.png", path.name):
            found.setdefault(named[1], []).append((int(named[2]), path))
    samples = sorted(found.pop("sample", []))
    chosen = (
        sorted({round(k * (len(samples) - 1) / (STRIP - 1)) for k in range(STRIP)})
        if len(samples) > STRIP
        else range(len(samples))
    )

    def shown(path, caption, step=None, name=""):
        if step is not None:
            share = t("before training") if not step else f"{np.interp(step, *ticks):.0%}" if ticks.size else ""
            caption += t("update {step}", step=f"{step:,}") + (f" · {share}" if share else "")
        if not (uri := embedded(path)):
            bad.append(note(t("{name} cannot be read.", name=path.name), "warn"))
            return ""
        image = f'<img alt="{esc(path.name)}" src="{uri}">'
        opening, image = (f'<figure id="{name}">', f'<a href="#{name}">{image}</a>') if name else ("<figure>", image)
        return f"{opening}{image}<figcaption>{caption}</figcaption></figure>"

    strip = "".join(shown(samples[k][1], "", samples[k][0], f"{key}-{k}") for k in chosen)
    told = t("What the model has made over time; choose a picture to enlarge it.")
    told += t(" ") + t("{n} of {all} are shown.", n=STRIP, all=len(samples)) if len(samples) > STRIP else ""
    rest = [shown(max(files)[1], f"{esc(name)} · ", max(files)[0]) for name, files in found.items()]
    single = (("classes", "real images of each class, then samples"), ("data", "what the model sees in training"))
    rest += [shown(p, f"{n}.png · {t(text)}") for n, text in single if (p := run.folder / f"{n}.png").is_file()]
    text = f'{note(told)}<div class="strip">{strip}</div>' if strip else ""
    text += f'<div class="grid">{"".join(rest)}</div>' if any(rest) else ""
    return text + "".join(bad) or note(t("The run folder holds no pictures yet."))


def settings(run, t):
    """The settings: those that a user changed, then all of them, folded."""
    if not run.settings:
        return note(t("The settings of this run are not known."))

    def rows(names):
        default = {n: code(run.fields[n].default) if n in run.fields else "" for n in names}
        return [[code(n), code(run.settings[n]), default[n], setting_means(run, n, t)] for n in names]

    head, mine = [t(h) for h in ("setting", "value", "default", "meaning")], changed(run)
    text = "These differ from the recipe's defaults:" if mine else "All settings are the recipe's defaults."
    text = note(t(text if run.fields else "The recipe is not beside this tool, so its defaults are not known."))
    text += table(head, rows(mine), "llll") if mine else ""
    every = table(head, rows(run.settings), "llll")
    return f"{text}<details><summary>{t('All {n} settings', n=len(run.settings))}</summary>{every}</details>"


def environment(run, t):
    """How it ran, what is known of machine, program and data, and how to run it again."""
    rows = [(label(n, about(n)[2 + t.zh]), figure_of(n, v)) for n, v in run.metrics.items() if RAN.fullmatch(n)]
    if run.speed and run.samples:
        rows.append((t("time per update, mean"), f"{1000 * run.samples / run.speed:,.4g} ms"))
    if run.sessions:
        steps = ", ".join(f"{s:,}" for s in run.sessions)
        several = "{n}, from the updates {steps}" if len(run.sessions) > 1 else "one, without a break"
        rows.append((t("sessions"), t(several, n=len(run.sessions), steps=steps)))
    rows += [(t("device"), esc(run.device)), (t("script"), esc(run.script or run.recipe))]
    names = {n: n for n in ("training files", "validation files", "torch")}
    names |= {"samples": "samples per update", "command": "last command"}
    rows += [(t(text), esc(run.about[n])) for n, text in names.items() if n in run.about]
    rows += [(esc(n), esc(v)) for n, v in run.about.items() if n not in (*names, "recipe", "run", "device")]
    text = table([], rows, "ll")
    if not run.script or not run.settings:
        return text
    told = [t("This trains it anew, in a folder of its own.")]
    if run.settings.get("time_budget") or run.settings.get("deadline"):
        told.append(t("As the time is limited, another machine manages more or fewer updates in it."))
    copies = sorted((run.folder / "code").glob(f"{Path(run.script).stem}-*.py"), key=lambda p: p.stat().st_mtime)
    if copies and (ROOT / run.script).read_bytes() not in [p.read_bytes() for p in copies]:
        told.append(t("The script has changed since then; the one that ran is {name}.", name=f"code/{copies[-1].name}"))
    return f"{text}<h3>{t('To run it again')}</h3>{note(t(' ').join(told))}<pre>{esc(command(run))}</pre>"


def part_of(run, key, letter, name, t):
    """(HTML, PDF) of one run; the PDF will be called `name`."""
    h, (plot, pdf) = 2 if letter else 1, curves([run], key)
    title = t("{recipe} on {data}", recipe=run.recipe, data=run.data or t("built-in data")) if run.settings else esc(run.recipe)
    where = t("folder {name}", name=run.folder.resolve().name) + (
        f" · {t('begun {when}', when=run.begun)}" if run.begun else ""
    )
    told = [t("Nothing has been logged yet, so there are no curves.")]
    if pdf:
        told = [
            t("The loss is that of the training batches; a dotted line is the reference."),
            t("As vector PDF: {name}", name=name),
        ]
    sections = {"Figures": figures(run, t), "Curves": plot + note(t(" ").join(told)), "Pictures": pictures(run, key, t)}
    sections |= {"Settings": settings(run, t), "How it ran, and where": environment(run, t)}
    parts = [f'<h{h} id="{key}">{letter}{" · " * bool(letter)}{title}</h{h}>', note(where), note(summary(run, t), "lead")]
    parts += [note(t(text, **values), "warn") for text, values in run.problems] + [tiles(run, t)]
    parts += [f"<section><h{h + 1}>{t(head)}</h{h + 1}>{content}</section>" for head, content in sections.items()]
    return f"<article>{''.join(parts)}</article>", pdf


def comparison(runs, letters, name, t):
    """(HTML, PDF) of the runs side by side: the settings that differ, the figures, the curves."""
    same, first = len({run.recipe for run in runs}) == 1, runs[0]
    names = list(dict.fromkeys(n for run in runs for n in run.settings if n not in ELSEWHERE))
    names = [n for n in names if same or all(n in run.settings for run in runs)]
    differ = [n for n in names if len({json.dumps(value_of(run, n), sort_keys=True) for run in runs}) > 1]

    rows = [] if same else [[t("script"), *(esc(run.recipe) for run in runs)]]
    rows += [[label(n, setting_means(first, n, t)), *(code(value_of(run, n)) for run in runs)] for n in differ]
    for what, values in (("device", [run.device for run in runs]), ("torch", [run.about.get("torch", "") for run in runs])):
        rows += [[t(what), *map(esc, values)]] if len(set(values)) > 1 else []
    rows = [t("Settings that differ"), *rows] if rows else [t("No setting differs between these runs.")]
    hidden = {r for known in REFERENCES.values() for r in known}
    for title, wanted in (("Figures", False), ("How it ran", True)):
        every = dict.fromkeys(n for run in runs for n in run.metrics if bool(RAN.fullmatch(n)) == wanted)
        rows += [t(title)] if every else []
        for n in every:
            values = [run.metrics[n] for run in runs if n in run.metrics]
            sign = {"+": max, "-": min}.get(about(n)[0]) if same and not wanted and n not in hidden else None
            best = sign(values) if sign and len(set(values)) > 1 else None
            cells = [figure_of(n, run.metrics[n]) if n in run.metrics else "–" for run in runs]
            cells = [f'<b><small>{t("best")}</small> {c}</b>' if best is not None and run.metrics.get(n) == best else c
                     for c, run in zip(cells, runs)]  # fmt: skip
            rows.append([label(n, about(n, first.recipe)[2 + t.zh]), *cells])
    head = [t("run")]
    for i, (letter, run) in enumerate(zip(letters, runs)):
        key = f'<i class="key" style="border-top:3px {[*STYLES][i % 4]} var(--c{i % 6})"></i>'
        state = "" if run.finished else f" · {t('not finished')}"
        head.append(f'{key} <a href="#run{i}">{letter}</a><small>{esc(run.folder.resolve().name)}{state}</small>')
    notes = [] if same else [t("These runs are of different recipes, so no figure is marked as the best.")]
    if unlike := [n for n in differ if n in MEASURED_ON]:
        text = "These runs differ in {names}, so their figures may be measured on different data."
        notes.append(t(text, names=", ".join(unlike)))
    plot, pdf = curves(runs, "compared")
    told = t("Colours and line styles are those of the table.") + t(" ") + t("As vector PDF: {name}", name=name) if pdf else ""
    text = f"<h1>{t('Comparison of {n} runs', n=len(runs))}</h1>" + "".join(note(n, "warn") for n in notes)
    return text + table(head, rows, "l" + "r" * len(runs)) + plot + note(told), pdf


# --- words and looks --------------------------------------------------------------------------------------------------
# figure, whether more of it is better (+), worse (-) or neither (0), how to write it, what it is
METRICS = """
psnr + dB | peak signal-to-noise ratio on held-out data | 留出数据上的峰值信噪比
psnr_bicubic 0 dB | the same of bicubic enlargement | 双三次插值的峰值信噪比
psnr_pca 0 dB | the same of a linear PCA with latents of the same size | 潜变量大小相同的线性 PCA 的峰值信噪比
latent_cfg.psnr + dB | held-out images, through the latents and back | 留出图像经潜变量编码再解码后的峰值信噪比
ssim + .4f | structural similarity on held-out data; 1 is the same | 留出数据上的结构相似度，1 为完全相同
psnr_scan + dB | whole held-out scans, window by window | 整幅留出扫描（逐窗口重建）的峰值信噪比
ssim_scan + .4f | structural similarity of whole held-out scans | 整幅留出扫描的结构相似度
latent_scale 0 .4g | the factor that gives latents a deviation of 1 | 使潜变量标准差为 1 的系数
colour_drift - .2f | how far colours differ from the input's, in levels of 255 | 颜色与输入的偏差（以 255 级计）
heldout_loss - .4f | loss on held-out data, at fixed noise | 留出数据在固定噪声下的损失
linear_loss 0 .4f | the same of the best linear denoiser | 最佳线性去噪器的损失
train_loss 0 .4f | the same on training images; far lower: learned by heart | 训练图像上的同一损失；远低于前者说明在死记
heldout - .4f | held-out loss, by quarters of the noise levels | 留出损失，按噪声水平分为四段
mask_gap + .4g | held-out loss with other images' masks, minus that with their own | 换用他图掩码时留出损失的增量
class_effect + .4g | how much the class changes what the network predicts | 类别对网络预测的影响
class_gap + % | how much worse another image's class predicts | 换用其他类别时预测变差的比例
class_accuracy 0 % | samples that a classifier puts in their class | 分类器判对类别的生成样本比例
class_accuracy_real 0 % | the same of real held-out images | 分类器判对类别的真实留出图像比例
copy_rate - % | samples that nearly are a training image | 几乎照抄训练图像的样本比例
clipped - % | values of samples that are out of range | 生成样本中超出取值范围的比例
feature_distance - .4g | distance of samples from real images, to the classifier | 在分类器看来与真实图像的距离
diversity 0 .3f | spread of samples over that of real images; 1 is right | 样本多样性与真实图像之比，1 为正好
accuracy + % | held-out images put in the right class | 留出图像的分类正确率
balanced_accuracy + % | accuracy with each class counting alike | 各类别同等计数的正确率
macro_auc + .4f | area under the ROC curve, mean over classes | 各类别 ROC 曲线下面积的平均
kappa + .4f | quadratically weighted agreement; 0 is chance | 二次加权一致性，0 为随机
ece - .4f | calibration error: how far confidence is from truth | 校准误差：置信度与实际正确率之差
map_at_r + .4f | mean average precision of the R nearest embeddings | 嵌入最近邻检索的平均精度
precision_at_1 + % | nearest embedding of the same class | 最近邻嵌入同类的比例
knn + % | right by the vote of the nearest embeddings | 最近邻投票的正确率
silhouette + .4f | how well classes separate, -1 to 1 | 类别分离程度，-1 到 1
fisher + .4g | variance between classes over that within | 类间方差与类内方差之比
intra - .4f | mean distance within a class | 类内平均距离
inter + .4f | mean distance between classes | 类间平均距离
steps 0 int | updates of the weights | 权重更新次数
seconds 0 time | time used, all sessions | 全部会话用时
peak_memory_gib - GiB | peak memory of the GPU, or of the process without one | 显存峰值（无 GPU 时为进程内存峰值）
seconds_per_epoch - .2f | seconds of a pass over the data | 遍历一次数据的秒数
images_per_second + .1f | images per second in training | 训练时每秒图像数
metric_seconds - .2f | seconds of an evaluation | 一次评估的秒数
time 0 % | share of the time that went into this | 该环节的时间占比
"""
METRICS = {n: line for n, *line in re.findall(r"^(\S+) ([-+0]) (\S+) \| (.+?) \| (.+)$", METRICS, re.M)}
RAN = re.compile(r"steps|seconds|peak_memory_gib|time_\w+|metric_seconds|\w+_per_\w+")  # how it ran, not how good it is

SETTINGS = """
data_dir 训练数据的文件夹或 CSV；留空为内置数据; val_dir 验证数据；留空取训练数据的十分之一; out_dir 运行文件夹;
target_size 图像边长（像素）; batch_size 每次前向的样本数（每进程）; accumulate 每次更新累加的前向次数;
num_epochs 遍历数据的次数; num_steps 更新次数，0 由 num_epochs 决定; time_budget 总时间预算（含所有会话）;
deadline 截止时刻; session_limit 单次会话的时间上限; save_minutes 两次存档间隔（分钟）; sample_ratio 使用的训练文件比例;
learning_rate 峰值学习率; use_amp 是否半精度，默认看硬件是否受益; amp_dtype 半精度类型; compile 是否使用 torch.compile;
patience 多少次评估无改进后提前收尾，0 关闭; seed 随机种子; mirror_dir 存档的第二份副本; num_workers 读取数据的进程数，-1 自动;
device 计算设备; continue_from 接续的旧运行文件夹; fresh 重新开始; weights 预训练权重; vae VAE 的文件夹; mask_dir 掩码文件夹;
train 微调哪些权重; lora_rank LoRA 的秩; heads 注意力头数; flip 训练图像的镜像; weight_decay 权重衰减; t_shape 噪声水平的抽取方式;
t_mean 噪声水平分布的均值; mask_drop 训练中隐藏掩码的比例; checkpointing 重算激活以节省内存; val_images 验证图像数上限;
sample 只生成样本; merge 只合并权重; steps 采样步数; solver 采样算法; guidance 引导强度; shift 采样器的时间偏移;
convnext.shift 训练图像的平移幅度; geometry 网络参数（由权重得知）; predict 网络预测的量; patch 图块大小; size 网络规模;
labels 掩码取值; channels 通道数; factor 潜变量每个元素对应的像素; preset 预设规模; stages 训练阶段; spacing 体素间距（毫米）;
norm_groups 归一化分组数; res_blocks 每层残差块数; enlarge 解码器的放大方式; latent_channels 潜变量通道数; attention 注意力的位置;
start 网络是否只学线性部分之余; half_norm 归一化也用半精度; kl_weight KL 散度权重; gan 判别器的权重或是否对抗训练;
gan_start 判别器加入的时刻（占全程比例）; disc 判别器的层数与宽度; perceptual 感知损失权重; val_crops 验证裁块数;
val_scans 最后整幅重建的扫描数; overlap 窗口重叠; reconstruct 只重建; encode 只编码; decode 只解码; arch 网络结构;
base_channels 首层宽度; num_blocks 块数; stem 首层每个位置对应的像素; loss 损失函数; balance 各类别同等计数; optimizer 优化器;
zoom 训练图像的缩放幅度; mirrored 评估时取与镜像的平均; cutout 遮挡方块的边长比例; mixup 混合其他图像的比例; smoothing 标签平滑;
metrics_every 两次分离度评估之间的遍历次数; embed_every 两次嵌入图之间的遍历次数; compare 四种配置对比; embed 只计算嵌入;
names 类别名; stage 训练哪一部分; encoder 编码器; encoder_weights 已有的编码器; encoder_share 训练 VAE 的时间占比; dim UNet 宽度;
mults UNet 各层宽度的倍数; dropout 随机失活; objective 噪声水平与权重的方案; class_drop 训练中隐藏类别的比例;
model_every 两次导出之间的更新次数; keep 保留的导出数; classes 采样的类别; model 采样所用的模型; guidance_low 引导的噪声下限;
guidance_high 引导的噪声上限; rescale 引导后保持对比度的程度; space 在像素还是潜变量上建模; scale 放大倍数; degradation 图像退化方式;
lr_dir 自备的小图文件夹; grow 裁块逐渐变大; gan_share 对抗训练的时间占比; vgg VGG19 权重; init 初始权重;
val_epochs 两次评估之间的遍历次数; tile 一次放大的块大小; upscale 只放大图像; patch_size 图块大小;
"""  # noqa: E501
SETTINGS = dict(re.findall(r"([\w.]+) ([^;]+);", SETTINGS))

CHINESE = """
{recipe} on {data} => {recipe}：{data}
built-in data => 内置数据
Training report => 训练报告
Comparison of {n} runs => {n} 次运行的对比
begun {when} => 开始于 {when}
folder {name} => 文件夹 {name}
{steps} updates in {time} on {device} => 在 {device} 上更新 {steps} 次，用时 {time}
{steps} updates in {time} => 更新 {steps} 次，用时 {time}
{name} is {value} => {name} 为 {value}
beside {reference} ({value}) => 对照 {reference}（{value}）
{by} better than {reference} ({value}) => 比参照 {reference}（{value}）好 {by}
{by} worse than {reference} ({value}) => 比参照 {reference}（{value}）差 {by}
the same as {reference} ({value}) => 与参照 {reference}（{value}）相同
against {value} before training => 训练前为 {value}
better => 更好
worse => 更差
best => 最佳
time used => 用时
updates => 更新次数
peak memory => 内存峰值
{share} of it waiting for data => 其中 {share} 在等待数据
{n} samples per second => 每秒 {n} 个样本
points => 个百分点
Figures => 指标
figure => 指标
final => 最终
so far => 目前
reference => 参照
against it => 与参照相比
before training => 训练前
what it is => 说明
As metrics.json has them, measured on held-out data with the averaged weights. => 取自 metrics.json，用平均后的权重在留出数据上测得。
As the log's evaluation after update {step} has them. => 取自日志中第 {step} 次更新后的评估。
No evaluation has been recorded yet. => 还没有评估记录。
Curves => 曲线
The loss is that of the training batches; a dotted line is the reference. => 损失（training loss）取自训练批次；点线为参照。横轴：左为更新次数（updates），右为已用时间（time used）。
Colours and line styles are those of the table. => 颜色与线型同上表。
As vector PDF: {name} => 矢量 PDF：{name}
Nothing has been logged yet, so there are no curves. => 还没有训练记录，因此没有曲线。
Pictures => 图片
What the model has made over time; choose a picture to enlarge it. => 模型在训练过程中的输出；点击图片可放大。
{n} of {all} are shown. => 共 {all} 张，此处显示 {n} 张。
update {step} => 第 {step} 次更新
The run folder holds no pictures yet. => 运行文件夹中还没有图片。
what the model sees in training => 模型训练时看到的数据
real images of each class, then samples => 每类先为真实图像，后为生成样本
How it ran => 运行情况
How it ran, and where => 运行情况与环境
time per update, mean => 每次更新平均用时
Settings => 设置
setting => 设置
value => 取值
default => 默认值
meaning => 含义
These differ from the recipe's defaults: => 与默认值不同的设置：
All settings are the recipe's defaults. => 所有设置均为默认值。
All {n} settings => 全部 {n} 项设置
The recipe is not beside this tool, so its defaults are not known. => 本工具旁没有该脚本，默认值未知。
The settings of this run are not known. => 此次运行的设置未知。
device => 设备
samples per update => 每次更新的样本数
training files => 训练文件数
validation files => 验证文件数
last command => 最近一次命令
sessions => 会话
script => 脚本
one, without a break => 一次，未中断
{n}, from the updates {steps} => {n} 次，分别从第 {steps} 次更新开始
To run it again => 重现
This trains it anew, in a folder of its own. => 以下命令在新文件夹中重新训练。
As the time is limited, another machine manages more or fewer updates in it. => 由于限定了时间，在其他机器上更新次数会有不同。
The script has changed since then; the one that ran is {name}. => 脚本在此次运行后有改动；当时运行的是 {name}。
Settings that differ => 不同的设置
No setting differs between these runs. => 这些运行的设置完全相同。
These runs are of different recipes, so no figure is marked as the best. => 这些运行使用不同的脚本，因此不标注最佳指标。
These runs differ in {names}, so their figures may be measured on different data. => 这些运行的 {names} 不同，指标可能在不同的数据上测得，比较时请注意。
run => 运行
not finished => 未完成
This run is going on: {share} of it is done. => 运行正在进行：已完成 {share}。
This run has not finished: {share} of it is done. The same command continues it. => 运行尚未完成：已完成 {share}。用相同的命令可以继续。
metrics.json is of update {old}; training has gone on since then. => metrics.json 是第 {old} 次更新时的结果，此后训练仍在继续。
settings.json is lost or damaged; its copy is shown. => settings.json 缺失或损坏，以下取自 code/ 中的副本。
settings.json is lost or damaged, its copy in code/ too. => settings.json 及其在 code/ 中的副本都缺失或损坏。
log.jsonl is missing. => 缺少 log.jsonl。
{n} of {all} lines of log.jsonl are damaged and left out. => log.jsonl 的 {all} 行中有 {n} 行损坏，已略去。
metrics.json is damaged; the log stands in for it. => metrics.json 损坏，以下为日志中最近一次评估。
{name} cannot be read. => 无法读取 {name}。
Made by {mark} on {when}. This page is one file: it runs no script and asks the network for nothing. => 由 {mark} 生成于 {when}。本页为单个文件，不运行脚本，也不访问网络。
"""  # noqa: E501
CHINESE = dict(line.split(" => ", 1) for line in CHINESE.strip().splitlines())
CHINESE |= {"; ": "；", ", ": "，", ". ": "。", " ": ""}

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--soft:#f4f4f2;--warn:#fff3d6;LIGHT}
@media screen and (prefers-color-scheme:dark){:root{--paper:#161616;--soft:#232323;--warn:#3a3018;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.5rem 4rem;max-width:60rem;background:var(--paper);color:var(--c6);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"PingFang SC","Microsoft YaHei",
 "Noto Sans CJK SC","Source Han Sans SC","WenQuanYi Micro Hei",sans-serif;overflow-wrap:break-word}
h1,h2,h3{line-height:1.25;font-weight:600;margin:2.4rem 0 .6rem}h1{font-size:1.75rem;margin-top:0}h2{font-size:1.3rem}
h3{font-size:1.05rem}article+article,h1~article{border-top:2px solid var(--c6);margin-top:3.5rem;padding-top:1.5rem}
h1~article>h2{font-size:1.5rem;margin-top:0}h1~article h3{font-size:1.2rem}
.lead{font-size:1.1rem;max-width:48rem}.note,small,figcaption,footer{color:var(--c7);font-size:.85rem}.note{margin:.4rem 0}
small{display:block;font-weight:400;line-height:1.3}b small{display:inline}
.warn{background:var(--warn);padding:.5rem .8rem;border-left:4px solid var(--c4);margin:.6rem 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:0 1.5rem;margin:1.6rem 0}
.tiles div{border-top:1px solid var(--c6);padding:.5rem 0}dt{font-size:.85rem;color:var(--c7)}dd{margin:0;font-size:1.55rem;
 font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;margin:.5rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .9rem .38rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--c8);font-weight:400;
 unicode-bidi:isolate}th[scope=col]{font-size:.85rem;color:var(--c7);border-color:var(--c7);vertical-align:bottom}
.r{text-align:right}data,.r b,.r div{white-space:nowrap}.part{padding-top:1.3rem;font-weight:600}td b{font-weight:650}
td code{overflow-wrap:anywhere;white-space:normal}.l code{display:inline-block;min-width:7rem}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em}
pre{background:var(--soft);padding:.8rem 1rem;white-space:pre-wrap;overflow-wrap:anywhere;border-radius:4px}
.key{display:inline-block;width:2.2rem;height:.3rem;vertical-align:middle}
.plot svg{display:block;width:100%;height:auto;margin:.6rem 0}.plot text{font-family:inherit!important}
figure{margin:0}img{display:block;max-width:100%;height:auto;background:#fff}a{color:inherit}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem;align-items:start;margin:.8rem 0 1.6rem}
.strip img{width:100%}.strip figure:target{grid-column:1/-1}
.grid{columns:2 24rem;column-gap:1.5rem}.grid figure{break-inside:avoid;margin-bottom:1.5rem}
summary{cursor:pointer;margin:.6rem 0}footer{margin-top:4rem;border-top:1px solid var(--c8);padding-top:.6rem}
@media print{@page{margin:16mm}body{padding:0;max-width:none;font-size:10pt}.tiles,.strip{grid-template-columns:repeat(4,1fr)}
 details::details-content{content-visibility:visible;block-size:auto}figure,tr,.plot,.tiles,pre,.warn{break-inside:avoid}
 h1,h2,h3,h2+.note{break-after:avoid}h1~article{break-before:page}.wide{overflow:visible}*{print-color-adjust:exact}
 .grid{columns:2}.grid img{max-height:200mm}}
"""


# --- writing ----------------------------------------------------------------------------------------------------------
def report(folders, out=None, lang="en"):
    """Write the page of these run folders and its figures; returns the paths written, the page first.

    RecipeError says what is wrong: a folder that is no run, or a file in the way that is not ours.
    """
    runs, t = [read_run(folder) for folder in folders], speaker(lang)
    several = len(runs) > 1
    out = Path(out) if out else (Path() if several else runs[0].folder) / "report.html"
    letters = [chr(65 + i % 26) + str(i // 26 or "") for i in range(len(runs))]
    files, title = {out: b""}, f"{t('Training report')} · {esc(runs[0].recipe)}"
    title = t("Comparison of {n} runs", n=len(runs)) if several else title
    body, pdf = comparison(runs, letters, f"{out.stem}-compare.pdf", t) if several else ("", b"")
    files |= {out.with_name(f"{out.stem}-compare.pdf"): pdf} if pdf else {}
    for i, (run, letter) in enumerate(zip(runs, letters)):
        path = out.with_name(f"{out.stem}-{letter + '-' if several else ''}curves.pdf")
        text, pdf = part_of(run, f"run{i}", letter if several else "", path.name, t)
        body, files = body + text, files | ({path: pdf} if pdf else {})
    light, dark = (";".join(f"--c{k}:{c}" for k, c in enumerate(side)) for side in (COLOURS, COLOURS.values()))
    made = t("Made by {mark} on {when}. This page is one file: it runs no script and asks the network for nothing.",
        mark=MARK, when=time.strftime("%Y-%m-%d %H:%M"))  # fmt: skip
    files[out] = (
        f'<!DOCTYPE html>\n<html lang="{lang}">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="{MARK}">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="referrer" content="no-referrer">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE.replace('LIGHT', light).replace('DARK', dark)}</style>\n</head>\n<body>\n{body}\n"
        f"<footer>{made}</footer>\n</body>\n</html>\n"
    ).encode()
    for path in files:
        if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()[: 2000 if path == out else None]):
            raise RecipeError(f"{path} is there and is no report of this tool; nothing was written. Choose another --out.", 2)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        write_aside(path, lambda f, data=data: f.write(data))
    return list(files)


def main(argv=None):
    """The command line; returns the exit code: 2 for a wrong call, 1 for a failure."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a gbk terminal must not turn a message into a traceback
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="run folder; several are compared")
    parser.add_argument("--out", help="the page; default: report.html in the run folder, of several runs in this folder")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the page")
    given = parser.parse_args(argv)
    try:
        paths = report(given.folders, given.out, given.lang)
    except RecipeError as e:
        print(e, file=sys.stderr)
        return e.code
    except OSError as e:
        print(f"{e.filename or 'The disk'}: {e.strerror}. Mend that, or choose another place with --out.", file=sys.stderr)
        return 1
    print(f"{paths[0]} ({paths[0].stat().st_size / 2**20:.1f} MB); figures: {', '.join(p.name for p in paths[1:]) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
