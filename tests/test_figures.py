"""Every figure of the READMEs stands in a file under benchmarks/results that its section names; both say the same."""

import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

EN, ZH = ROOT / "README.md", ROOT / "README.zh-CN.md"
PUBLISHED = {  # figures of others, of formats and versions, and counts of weights: nothing that was measured here
    "": {"3.10"},
    "I have N hours": {"32.39", "1,550"},
    "The guides' claims": {"2.13.0", "90 %"},
    "Super-resolution in minutes": {"2.13.0", "32.39", "8,129"},
    "Real-ESRGAN": {"30.48", "30.72", "30.90", "27.49", "27.61", "27.73", "32.73", "28.99", "30 %"},
    "Images from masks": {"2.13.0", "0.1", "3.7", "90 %", "0.001"},
    "Classes from few images": {"2.13.0", "2.3.4", "0.0001", "15 %", "1.5", "150,000", "50,000", "2,000", "74,000"},
    "Classes told apart": {"2.13.0", "60 %", "1,024", "10,000", "2,000"},
    "3-D scans": {"2.13.0", "1.6.1", "99.5"},
    "Will it fit": {"50 %", "40 %"},
    "What every recipe keeps": {"2.13.0", "8.0"},
}

ALSO = {"I have N hou": ["srcnn_set5_cpu2"]}  # files besides those that a section names


def sections(path):
    """{heading: text} of a README; the first is the text before all headings."""
    parts = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.M)
    return {"": parts[0]} | {p.split("\n")[0]: p.partition("\n")[2] for p in parts[1:]}


def prose(text):
    """A section without code, links and marks, as figures are read in it."""
    text = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.S)
    return re.sub(r"`[^`]*`", " ", text)


def figures(text):
    """Figures with a decimal point, a percent sign or a comma of thousands: 32.60, 94 %, 1,550."""
    found = re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)*(?: ?%)?", prose(text))
    return [re.sub(r" ?%", " %", f.rstrip(",")) for f in found if re.search(r"[.%]|,\d{3}", f.rstrip(","))]


def numbers(value, name=""):
    """All numbers in nested lists and dicts, in their strings too; of a table of times also each over each other, and how far
    predicted memory is from the measured."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, str):
        yield from (float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", value))
    else:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(child, str(key))
        if name.startswith("ms_per"):
            yield from (a / b for a in value.values() for b in value.values())
        if isinstance(value, dict) and "from" in value:
            yield from (value["to"] / value["from"] - 1, value["from"] / value["to"])
        if name == "inputs" and isinstance(value, dict):
            yield sum(v["inputs"] for v in value.values())
        if isinstance(value, dict) and "tensors" in value:
            yield from (value[k] / value["measured"]["peak"] - 1 for k in ("tensors", "predicted"))
        if name == "rows" and isinstance(value, dict) and all("seconds" in v for v in value.values()):
            yield from (a["seconds"] / b["seconds"] for a in value.values() for b in value.values())


def written(values):
    """The ways in which the READMEs write a number: rounded, in percent, with commas, in millions, MiB or GiB."""
    known = set()
    for v in map(abs, values):
        known |= {f"{v:.{d}f}" for d in range(5)} | {f"{v:,.0f}"}
        known |= (
            {f"{v:.0%}"[:-1] + " %", f"{v:.1%}"[:-1] + " %"} if v < 2 and v != int(v) else {f"{v:.0f} %"} if v == 1 else set()
        )
        known |= {f"{v / 1e6:.2f}", f"{v / 2**20:.1f}", f"{v / 2**30:.2f}"} if isinstance(v, int) and v > 2e5 else set()
    return known


def known_in(text, heading):
    """The figures that a section may have: of the files that it names, and of others where they are said to be so."""
    files = set(re.findall(r"benchmarks/results/(\w+)\.json", text)) | set(ALSO.get(heading[:12], ()))
    values = []
    for name in files:
        values += numbers(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")))
    return written(values)


@pytest.mark.parametrize("heading", sections(EN))
def test_every_figure_is_in_a_file_of_results(heading):
    text = sections(EN)[heading]
    allowed = {"100 %"}.union(*(v for k, v in PUBLISHED.items() if heading.startswith(k) and bool(k) == bool(heading)))
    written_by_hand = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.S)  # the others are compared word for word
    assert set(figures(written_by_hand)) - known_in(text, heading) - allowed == set()


def test_nothing_is_left_to_fill_in():
    for path in (EN, ZH):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"%[A-Z]+%", text)
        assert sorted(re.findall(r"<!-- table: (\w+) -->", text)) == ["choices", "claims", "quality", "samples", "switches"]
        assert text.count("<!-- end -->") == 5


def test_the_tables_are_what_the_files_give():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_figure_is_found():
    known = written(list(numbers({"psnr": 32.48215, "psnr_bicubic": 30.38837, "ms_per_step": {"a": 30.0, "b": 20.0}})))
    assert {"32.48", "30.39", "1.50"} <= known and not {"32.49", "31.48", "48 %", "1.07"} & known
    rng = random.Random(0)
    for heading, text in sections(EN).items():  # nor does a file hold so much that any figure would be found
        known = known_in(text, heading)
        assert sum(f"{rng.uniform(10, 100):.1f}" in known for _ in range(500)) < 100, heading
        assert sum(f"{rng.uniform(10, 100):.2f}" in known for _ in range(500)) < 25, heading
        assert sum(f"{rng.uniform(10, 100):.1f} %" in known for _ in range(500)) < 100, heading
    assert figures("32.48 dB (`0.5`), 1,550 files, 94 %, +26 %, 7 in 3.0-4.5 of 12") == [
        "32.48",
        "1,550",
        "94 %",
        "26 %",
        "3.0",
        "4.5",
    ]


def test_both_readmes_have_the_same_sections_figures_pictures_and_commands():
    en, zh = list(sections(EN).items()), list(sections(ZH).items())
    assert len(en) == len(zh) > 15
    for (name, ours), (heading, theirs) in zip(en, zh):
        assert re.findall(r"`\w+\.py`", name) == re.findall(r"`[\w/]+\.py`", heading) or "tools/" in name, heading
        assert sorted(figures(ours)) == sorted(figures(theirs)), (name, set(figures(ours)) ^ set(figures(theirs)))
        for pattern in (r"\]\((benchmarks[^)]*)\)", r"<!--.*?-->", r"<details>", r"benchmarks/results/\w+\.json"):
            assert re.findall(pattern, ours) == re.findall(pattern, theirs), (name, pattern)
        blocks = [re.findall(r"```.*?```", t, flags=re.S) for t in (ours, theirs)]
        code = [[line.split("  #")[0].rstrip() for block in b for line in block.splitlines()] for b in blocks]
        assert code[0] == code[1], name
        rows = [[line.count("|") for line in t.splitlines() if line.startswith("|")] for t in (ours, theirs)]
        assert rows[0] == rows[1], name


def test_pictures_of_the_readme_are_there_and_small():
    names = set(re.findall(r"\((benchmarks/pictures/[^)]+)\)", EN.read_text(encoding="utf-8")))
    sizes = {n: (ROOT / n).stat().st_size for n in names}
    assert len(sizes) >= 9 and max(sizes.values()) < 600_000
    assert {p.name for p in (ROOT / "benchmarks" / "pictures").iterdir()} == {n.rsplit("/", 1)[1] for n in names}
