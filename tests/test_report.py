"""The report: true figures, nothing of a run folder taken for HTML, and a page that a browser shows without the network."""

import ast
import contextlib
import html.parser
import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from conftest import RECIPES, ROOT, run
from PIL import Image

import common

sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402

RECIPE = "train_ultrafast_srcnn"
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&'{0} {x} $\\frac{ \u202e\ud800\x01 图片"


@pytest.fixture(scope="session")
def runs(images, tmp_path_factory):
    """Two finished runs that differ in two settings."""
    recipe, folder = importlib.import_module(RECIPE), tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "export", lambda model, folder: None)  # a few seconds that nothing here looks at
        for name, more in (("one", ""), ("two", " --learning_rate 0.001 --batch_size 3")):
            words = f"{RECIPES[RECIPE]}{more} --device cpu --no-use_amp --data_dir {images} --out_dir".split()
            recipe.train(common.parse(recipe.Config, argv=[*words, str(folder / name)]))
    return [folder / "one", folder / "two"]


@pytest.fixture
def copy(runs, tmp_path):
    """A run folder of this test's own, to spoil."""
    shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.pt", "lock", "tensorboard"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def pages(runs, tmp_path_factory):
    """The folders of the pages that several tests look at, none of which changes them: one run, two, two in Chinese."""
    made = [tmp_path_factory.mktemp(name) for name in ("en", "en2", "zh2")]
    for folder, which, lang in zip(made, (runs[:1], runs, runs), ("en", "en", "zh")):
        assert report.main([*map(str, which), "--out", str(folder / "page.html"), "--lang", lang]) == 0
    return made


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without curves, which take most of the time, for a test that looks at something else."""
    monkeypatch.setattr(report, "draw", lambda panels, name: ('<div class="plot"></div>', f"%PDF {report.MARK}".encode()))


class Page(html.parser.HTMLParser):
    """What a test asks of a page: its tags with attributes, its text, its tables as rows of texts, the exact figures."""

    def __init__(self, path):
        super().__init__()
        self.source, self.tags, self.texts, self.rows, self.figures = path.read_text(encoding="utf-8"), [], [], [], []
        self.inside = False
        self.feed(self.source)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = self.inside or tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "data":
            self.figures.append(float(dict(attributes)["value"]))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "style"

    def handle_data(self, data):
        if not self.inside and data.strip():
            self.texts.append(data.strip())
        if self.rows and self.rows[-1] and not self.inside:
            self.rows[-1][-1] += data

    def row(self, name):
        """The cells of the rows that begin with a name."""
        return next(cells[1:] for cells in self.rows if cells[0].startswith(name) and len(cells) > 1)


def page_of(folder, tmp_path, *flags):
    """The page that the command line makes."""
    folders = folder if isinstance(folder, list) else [folder]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "page.html"), *flags]) == 0
    return Page(tmp_path / "page.html")


def assert_whole(page):
    """One file that runs nothing and points nowhere else."""
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "source"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "background", "ping"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "poster"):
                assert value.startswith("data:image/" if name == "src" else "#"), (tag, name, value[:50])
            assert not re.search(r"url\((?!#)", value or ""), (tag, name)
    styles = "".join(re.findall(r"<style>(.*?)</style>", page.source, re.S))
    assert styles and "url(" not in styles and "@import" not in styles
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy and "script" not in policy
    ids = [a["id"] for _, a in page.tags if "id" in a]
    targets = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert len(ids) == len(set(ids)) and targets <= set(ids)
    assert page.tags[0] == ("html", {"lang": page.tags[0][1]["lang"]}) and page.source.startswith("<!DOCTYPE html>")


def test_the_page_holds_the_true_figures_and_settings(runs, images, pages):
    page, metrics = Page(pages[0] / "page.html"), json.loads((runs[0] / "metrics.json").read_text())
    settings = json.loads((runs[0] / "settings.json").read_text())["settings"]
    assert_whole(page)
    assert set(metrics.values()) <= set(page.figures)
    final, held, against, before, meaning = page.row("psnr")
    assert final == f"{metrics['psnr']:.2f} dB" and held == f"{metrics['psnr_bicubic']:.2f} dBpsnr_bicubic"
    gain = metrics["psnr"] - metrics["psnr_bicubic"]
    assert against == f"{abs(gain):.2f} dB{'better' if gain > 0 else 'worse'}" and "signal-to-noise" in meaning
    start = json.loads((runs[0] / "log.jsonl").read_text().splitlines()[0])
    assert start["step"] == 0 and before == f"{start['psnr']:.2f} dB"
    every = page.source.split("<details>")[1].split("</details>")[0]
    assert all(f"<code>{name}</code>" in every for name in settings) and every.count("<tr>") == len(settings) + 1
    changed = page.source.split("differ from the recipe&#x27;s defaults:" if "&#x27;s def" in page.source else "defaults:")[1]
    names = re.findall(r'scope="row"><code>(\w+)', changed.split("<details>")[0])
    assert names == ["data_dir", "out_dir", "target_size", "batch_size", "num_steps", "use_amp", "device"]
    pictures = [a for t, a in page.tags if t == "img"]
    assert [a["alt"] for a in pictures] == [*(p.name for p in sorted(runs[0].glob("sample-*.png"))), "data.png"]
    assert "6 updates in" in page.text and f"ultrafast_srcnn on {images.name}" in page.text and "fp32" in page.text
    assert "one, without a break" in page.text and "update 6 · 100%" in page.text
    assert (pages[0] / "page-curves.pdf").read_bytes().startswith(b"%PDF")
    assert "training loss" in page.text and "learning rate" in page.text and "time used, " in page.text


def test_a_run_folder_gets_its_report_and_only_ours_is_written_anew(copy, undrawn, tmp_path, capsys, monkeypatch):
    assert report.main([str(copy)]) == 0 and (copy / "report-curves.pdf").read_bytes().startswith(b"%PDF")
    assert f"{copy / 'report.html'} (" in capsys.readouterr().out
    (copy / "report.html").write_text((copy / "report.html").read_text(encoding="utf-8") + "old", encoding="utf-8")
    assert report.main([str(copy)]) == 0 and not (copy / "report.html").read_text(encoding="utf-8").endswith("old")
    for name in ("report-curves.pdf", "report.html"):
        ours = (copy / name).read_bytes()
        (copy / name).write_bytes(b"my thesis")
        assert report.main([str(copy)]) == 2
        assert f"{name} is there and is no report of this tool" in capsys.readouterr().err
        assert (copy / name).read_bytes() == b"my thesis"
        (copy / name).write_bytes(ours)
    monkeypatch.chdir(tmp_path)
    assert report.main([str(copy), str(copy)]) == 0 and (tmp_path / "report.html").exists()
    assert {p.name for p in tmp_path.glob("*.pdf")} == {"report-compare.pdf", "report-A-curves.pdf", "report-B-curves.pdf"}
    assert report.main([str(copy), "--out", str(copy / "log.jsonl" / "page.html")]) == 1
    assert "choose another place with --out" in capsys.readouterr().err


def test_two_runs_give_one_table_of_what_differs(runs, pages):
    page = Page(pages[1] / "page.html")
    assert_whole(page)
    first = [row for row in page.rows if row[0] in ("Settings that differ", "Figures")]
    start, stop = (page.rows.index(row) for row in first[:2])
    differ = {re.match(r"[a-z_]+?(?=samples|peak)", row[0])[0]: row[1:] for row in page.rows[start + 1 : stop]}
    assert differ == {"batch_size": ["2", "3"], "learning_rate": ["0.003", "0.001"]}
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in runs]
    cells = next(row for row in page.rows[stop:] if row[0].startswith("psnr"))[1:]
    assert [c.removeprefix("best ") for c in cells] == [f"{m['psnr']:.2f} dB" for m in metrics]
    best = max(metrics, key=lambda m: m["psnr"])
    assert [c.startswith("best") for c in cells] == [m == best for m in metrics]
    assert not any(c.startswith("best") for c in next(row for row in page.rows if row[0].startswith("psnr_bicubic")))
    assert "different data" not in page.text and page.text.count("To run it again") == 2
    for name in ("compare", "A-curves", "B-curves"):
        assert (pages[1] / f"page-{name}.pdf").read_bytes().startswith(b"%PDF")


def test_runs_that_cannot_be_compared_say_so(runs, copy, undrawn, tmp_path):
    about = json.loads((copy / "settings.json").read_text())
    about |= {"recipe": "another", "settings": about["settings"] | {"data_dir": "elsewhere", "only_here": 1}}
    (copy / "settings.json").write_text(json.dumps(about))
    page = page_of([runs[0], copy], tmp_path)
    assert "different recipes, so no figure is marked" in page.text and "These runs differ in data_dir" in page.text
    assert "best " not in page.text.replace("best.pt", "") and "only_here" not in page.source.split("<article>")[0]
    assert "its defaults are not known" in page.text  # of a recipe that is not here


def test_the_command_gives_the_settings_back(tmp_path):
    recipe = importlib.import_module(RECIPE)
    words = ["--data_dir", "my $(photos) 'of' \"it\"/图片", "--val_dir=-x", "--learning_rate", "0.002", "--no-use_amp"]
    cfg = common.parse(recipe.Config, argv=[*words, "--seed", "7", "--compile", "--fresh", "--out_dir", str(tmp_path / "a b")])
    about = {"recipe": "ultrafast_srcnn", "settings": vars(cfg) | {"given": None}, "samples": 16}
    (tmp_path / "settings.json").write_text(json.dumps(about), encoding="utf-8")
    line = report.command(report.read_run(tmp_path))
    assert line.startswith(f"python {RECIPE}.py ")
    again = common.parse(recipe.Config, argv=shlex.split(line)[2:])
    changes = {"fresh": False, "out_dir": str(tmp_path / "a b") + "-again"}
    assert {k: v for k, v in vars(again).items() if k != "given"} == {
        k: v for k, v in vars(cfg).items() if k != "given"
    } | changes
    (tmp_path / "settings.json").write_text(json.dumps(about | {"samples": 48}))
    assert report.command(report.read_run(tmp_path)).startswith("torchrun --nproc_per_node=3 ")


def test_nothing_in_a_run_folder_becomes_html_or_runs(copy, tmp_path, request):
    about, log = json.loads((copy / "settings.json").read_text()), (copy / "log.jsonl").read_text()
    about["settings"] |= {"data_dir": HOSTILE, HOSTILE: HOSTILE, "num_steps": [HOSTILE, None, {"x": 10**30}], "seed": HOSTILE}
    about |= {"device": HOSTILE, "torch": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE, "samples": 10**30}
    (copy / "code" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (copy / f"{HOSTILE.translate({0xD800: None, 1: None, 47: None})}-1.png").write_bytes(b"")
    evil = [{"step": 6, "metric": HOSTILE, HOSTILE: 1e200, "psnr": HOSTILE}, {"step": 10**40}, {"step": 7, "loss": True}]
    (copy / "log.jsonl").write_text(log + "\n".join(map(json.dumps, evil)), encoding="utf-8")
    (copy / "metrics.json").write_text(json.dumps({HOSTILE: 0.5, "psnr": HOSTILE, "steps": 1e400, "seconds": None}))
    for recipe in (HOSTILE, "../code/evil", "evil", "common", "ultrafast_srcnn", ""):
        (copy / "settings.json").write_text(json.dumps(about | {"recipe": recipe}), encoding="utf-8")
        page = page_of([copy, copy], tmp_path, "--lang", "zh" if recipe == "evil" else "en")
        request.getfixturevalue("undrawn")  # from the second page on
        assert_whole(page)
        assert page.text.count("<script>alert(1)</script>") > 5 and "\u202e" not in page.source
        assert {t for t, a in page.tags if a.get("src") == "x"} == set()
    assert not (tmp_path / "ran").exists()


def spoil_lines(folder):
    with open(folder / "log.jsonl", "ab") as f:
        f.write(b'\n{"step": 7, "lo\n\x00\xff\xfe\n[1]\n{"step": "x"}\n')


def spoil_settings(folder):
    (folder / "settings.json").write_text("{")


def spoil_both_settings(folder):
    (folder / "settings.json").unlink()
    (folder / "code" / "settings.json").write_text("[]")


def spoil_pictures(folder):
    (folder / "data.png").write_bytes((folder / "data.png").read_bytes()[:200])
    for path in folder.glob("sample-*.png"):
        path.unlink()


def spoil_everything(folder):
    for name in ("log.jsonl", "metrics.json", "clock.json"):
        (folder / name).unlink()
    for path in folder.glob("*.png"):
        path.unlink()


def prolong(folder):
    with open(folder / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 9, "loss": 0.1, "progress": 0.75, "seconds": 99.0}) + "\n")


@pytest.mark.parametrize(
    "spoil, sentences",
    [
        (lambda folder: (folder / "metrics.json").unlink(), ["This run", "100% of it is done", "after update 6 has them"]),
        (lambda folder: (folder / "metrics.json").write_text("{1"), ["metrics.json is damaged; the log stands in for it."]),
        (lambda folder: (folder / "log.jsonl").unlink(), ["log.jsonl is missing.", "Nothing has been logged yet"]),
        (lambda folder: (folder / "clock.json").write_text('{"born": -9e11, "used": "x"}'), ["ultrafast_srcnn on "]),
        (spoil_lines, [r"4 of \d+ lines of log.jsonl are damaged and left out\."]),
        (spoil_settings, ["settings.json is lost or damaged; its copy is shown.", "num_steps"]),
        (
            spoil_both_settings,
            ["settings.json is lost or damaged, its copy in code/ too.", "settings of this run are not known"],
        ),
        (spoil_pictures, ["data.png cannot be read."]),
        (spoil_everything, ["0% of it is done", "No evaluation has been recorded", "holds no pictures yet", "num_steps"]),
        (prolong, ["metrics.json is of update 6; training has gone on", "75% of it is done"]),
    ],
)
def test_what_is_missing_or_damaged_is_said(copy, undrawn, tmp_path, spoil, sentences):
    spoil(copy)
    page = page_of(copy, tmp_path)
    assert_whole(page)
    for sentence in sentences:
        assert re.search(sentence, page.text), page.text
    page_of([copy, copy], tmp_path)


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "run").mkdir()
    common.write_json(tmp_path / "run" / "settings.json", {"recipe": "convnext", "run": "ab"})
    common.write_json(tmp_path / "run" / "clock.json", {"used": 3.0, "born": 1.0, "process": 1})
    assert "This run is going on: 0% of it is done." in page_of(tmp_path / "run", tmp_path).text
    os.utime(tmp_path / "run" / "clock.json", (1, 1))
    assert "The same command continues it." in page_of(tmp_path / "run", tmp_path).text


def test_a_folder_that_is_no_run(runs, undrawn, tmp_path, capsys):
    tool = [sys.executable, str(ROOT / "tools" / "report.py")]
    done = run([*tool, "没有 é"], cwd=tmp_path, PYTHONIOENCODING="gbk")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "is no folder" in done.stderr
    for folder in (tmp_path, runs[0].parent, runs[0] / "code", runs[0] / "log.jsonl"):
        expected = 0 if folder.name == "code" else 2  # the copy of settings.json there tells of the run
        assert report.main([str(folder), "--out", str(tmp_path / "page.html")]) == expected
        error = capsys.readouterr().err
        assert expected == 0 or error.count("\n") == 1 and "is no" in error
        assert ("e.g. one, two" in error) == (folder == runs[0].parent)
    with pytest.raises(SystemExit) as ended:
        report.main([])
    assert ended.value.code == 2


def test_chinese_has_the_same_figures(runs, pages):
    english, chinese = (Page(folder / "page.html") for folder in pages[1:])
    assert english.tags[0][1] == {"lang": "en"} and chinese.tags[0][1] == {"lang": "zh"}
    assert english.figures == chinese.figures and len(english.rows) == len(chinese.rows)
    assert_whole(chinese)
    assert "留出数据上的峰值信噪比" in chinese.text and "更新 6 次" in chinese.text and "更新次数" in chinese.text
    rest = re.sub(r"<(svg|code|small|pre|style).*?</\1>|<[^>]*>", " ", chinese.source, flags=re.S)
    rest = rest.replace(json.loads((runs[0] / "settings.json").read_text())["device"].partition(": ")[2], "")
    left = set(re.findall(r"[A-Za-z]{3,}(?: [A-Za-z]+){3,}", rest))  # English sentences
    assert not left
    drawn = re.findall(r"<svg.*?</svg>", chinese.source, re.S)
    assert len(drawn) == 3 and all(svg.isascii() for svg in drawn)  # a font may lack the rest


def test_every_text_has_its_chinese():
    source = (ROOT / "tools" / "report.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "t"]
    texts = {n.value for call in calls for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant) and n.value}
    texts -= {" on {device}", "steps", "name"}
    assert len(texts) > 40 and texts <= set(report.CHINESE), texts - set(report.CHINESE)
    for english, chinese in report.CHINESE.items():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese)), english
    assert set(common.Settings.__dataclass_fields__) <= set(report.SETTINGS)


def test_a_log_tells_sessions_and_what_was_done_again(tmp_path):
    def row(step, seconds, rate, **more):
        return {"step": step, "seconds": seconds, "items_per_second": rate, "data_wait": 0.5, "loss": seconds} | more

    rows = [
        row(1, 9.0, 10.0), row(51, 14.0, 100.0), {"step": 60, "metric": "psnr", "psnr": 1}, {"step": 60, "share": 1},
        row(101, 19.0, 100.0),
        row(81, 27.0, 10.0), row(131, 32.0, 100.0), {"step": 131, "metric": "psnr", "psnr": 2},  # killed, went on after 80
        row(132, 40.0, 10.0), row(182, 45.0, 100.0),  # stopped, went on
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{")
    found, judged, sessions, damaged, lines = report.read_log(tmp_path / "log.jsonl", 10)
    assert [r["step"] for r in found] == [1, 51, 81, 131, 132, 182] and sessions == [1, 81, 132]
    assert [r["psnr"] for r in judged] == [1, 2] and (damaged, lines) == (1, 11)
    told = report.read_run(tmp_path)
    assert told.recipe == tmp_path.name and told.metrics["steps"] == 182 and not told.finished
    assert told.wait == pytest.approx(0.5) and 60 < told.speed < 100


def test_pictures_are_made_small_and_a_strip_short(copy, undrawn, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 2400, 3), np.uint8)
    Image.fromarray(noise).save(copy / "data.png")
    for step in range(10, 400, 10):
        shutil.copy(copy / "sample-000006.png", copy / f"sample-{step:06d}.png")
    page = page_of(copy, tmp_path)
    shown = {a["alt"]: a["src"] for t, a in page.tags if t == "img"}
    assert len(shown) == 12 + 1 and {"sample-000000.png", "sample-000390.png"} < set(shown) and "12 of 4" in page.text
    data = report.base64.b64decode(shown["data.png"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (1600, 600) and len(data) < 2 * report.HEAVIEST


# --- a real browser ---------------------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed (apt-get install chromium)")


def browse(path, tmp_path):
    """Open a file in Chromium: its document as text, its picture, what the console said, the addresses that it asked for.

    The browser asks for things of its own too, which its log tells apart: those have no page as their origin. It is kept
    from reaching them.
    """
    flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1000,1600 --dump-dom "
    flags += "--enable-logging=stderr --v=0"
    places = {"--user-data-dir": "profile", "--log-net-log": "net.json", "--screenshot": "shot.png"}
    places = [f"{flag}={tmp_path / name}" for flag, name in places.items()]
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    words = [BROWSER, *flags.split(), *places, rules, path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=60)
    net = json.loads((tmp_path / "net.json").read_text(encoding="utf-8"))
    kind = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [e["params"] for e in net["events"] if e["type"] == kind and "url" in e.get("params", {})]
    asked = [job["url"] for job in jobs if job["initiator"] != "not an origin"]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    picture = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    return types.SimpleNamespace(dom=done.stdout, picture=picture, console=console, asked=asked, jobs=len(jobs))


@browser
@pytest.mark.parametrize("which", [0, 2])
def test_a_browser_shows_the_page_and_asks_for_nothing(runs, pages, tmp_path, which):
    page = Page(pages[which] / "page.html")
    seen = browse(pages[which] / "page.html", tmp_path)
    assert seen.console == [] and seen.asked == []
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert f"{metrics['psnr']:.2f} dB" in seen.dom and f'lang="{["en", "", "zh"][which]}"' in seen.dom and "</html>" in seen.dom
    assert seen.dom.count("<img") == page.source.count("<img") and seen.dom.count("<svg") == page.source.count("<svg")
    assert seen.picture.shape == (1600, 1000, 3)
    shade = seen.picture.mean(2)
    assert 0.5 < (shade > 240).mean() < 0.98 and 0.005 < (shade < 120).mean() < 0.3  # dark on light, and not blank
    blue = (abs(seen.picture.astype(int) - (0, 0x72, 0xB2)) < 24).all(2)
    assert blue.sum() > 300  # a curve


@browser
def test_the_browser_test_can_fail(pages, tmp_path):
    """A page that asks is seen to ask; with our policy in it the same page asks for nothing, and the console tells."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.png"
        shut = (pages[0] / "page.html").read_text(encoding="utf-8").replace("</footer>", f'<img src="{address}"></footer>')
        texts = {"shut": shut, "open": re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", shut)}
        answering = threading.Thread(target=answer_once, args=(server,))
        answering.start()
        for name, text in texts.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "page.html").write_text(text, encoding="utf-8")
            seen = browse(tmp_path / name / "page.html", tmp_path / name)
            assert seen.asked == ([address] if name == "open" else [])
            assert any("Content Security Policy" in line for line in seen.console) == (name == "shut")
            assert answering.is_alive() == (name == "shut")  # it did connect, or did not


def answer_once(server):
    """Answer one request, or none within a while."""
    server.settimeout(40)
    with contextlib.suppress(TimeoutError), server.accept()[0] as peer:
        peer.recv(1 << 16)
        peer.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
