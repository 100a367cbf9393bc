"""The house: layout, sizes, tools, the README's commands."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT, run, slowness

sys.path.insert(0, str(ROOT / "tools"))
from bundle import bundle  # noqa: E402
from check_copies import check  # noqa: E402

TOP = """README.md README.zh-CN.md LICENSE requirements.txt pyproject.toml common.py train_nextdit_fast.py
train_nextdit_ultrafast.py finetune_pretrained.py train_convnext.py train_realesrgan_optimized.py
train_ultrafast_srcnn.py train_latent_cfg.py train_autoencoder3d.py test_memory_usage.py tests benchmarks tools .ci
.gitignore""".split()


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_layout():
    assert {name.split("/")[0] for name in tracked()} <= set(TOP)


def test_no_pictures_scans_or_weights_in_the_tree():
    assert not [
        n for n in tracked() if n.endswith((".png", ".jpg", ".gz", ".pt", ".pth", ".onnx", ".npz")) and "benchmarks/" not in n
    ]


def code_lines(path):
    """Lines of code: no blanks, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in skip for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_sizes():
    big = {
        "train_nextdit_fast",
        "train_nextdit_ultrafast",
        "finetune_pretrained",
        "train_realesrgan_optimized",
        "train_convnext",
    }
    for path in ROOT.glob("*.py"):
        assert code_lines(path) <= LIMITS.get(path.stem, 600 if path.stem in big else 450), path.name


# the plan says 600, and 450 for latent diffusion; they may only fall (common.py rose for its second folder, and for what
# damaged files of a run may hold: 160 and 60). NextDiT's three scripts hold the same 430 lines of model,
# data and figures; latent diffusion holds a VAE, a UNet, a sampler and a classifier that judges; the classifier's script reads
# .npz, trains two networks with three losses, and has metrics, pictures and the comparison
LIMITS = {"common": 1518, "train_realesrgan_optimized": 862, "train_latent_cfg": 826}
LIMITS |= {"train_nextdit_fast": 706, "train_nextdit_ultrafast": 671, "finetune_pretrained": 878, "train_convnext": 923}
# reading and checking scans 100, files and windows of --encode, --decode 110, the linear autoencoder 130, SOAP 50; the planner:
# counting 160, tables 190
LIMITS |= {"train_autoencoder3d": 783, "test_memory_usage": 544}


def test_public_functions_say_what_they_do():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                plain = node.name in ("Config", "make_model") or (
                    isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 2
                )
                assert ast.get_docstring(node) or plain, f"{path.name}: {node.name}"


def test_copies_are_the_same():
    assert [p for path in ROOT.glob("*.py") for p in check(path)] == []


def test_check_copies_finds_and_mends(tmp_path):
    (tmp_path / "owner.py").write_text("import os\n\n\nclass Net:\n    size = 1\n\n    def f(self):\n        return os\n")
    copy = tmp_path / "copy.py"
    copy.write_text("import os\n\n\n# Copied from owner.py::Net\nclass Net:\n    size = 2\n\n\nafter = 1\n")
    words = [sys.executable, str(ROOT / "tools" / "check_copies.py"), str(copy)]
    done = run(words)
    assert done.returncode == 1 and "copy.py: Net differs from owner.py" in done.stdout
    assert run([*words, "--fix"]).returncode == 0 and run(words).returncode == 0
    assert "size = 1" in copy.read_text() and copy.read_text().endswith("\n\n\nafter = 1\n")
    copy.write_text("# Copied from owner.py::Gone\nclass Gone:\n    pass\n")
    assert "no top-level Gone" in run(words).stderr


def test_bundle_refuses_what_it_cannot_do(tmp_path):
    head = "try:\n    from common import RecipeError\nexcept ImportError as e:\n    raise\n"
    for text, part in (
        ("import common\n", "exactly one"),
        (head.replace("RecipeError", "*"), "without"),
        (head.replace("RecipeError", "nothing_of_the_kind"), "has no nothing_of_the_kind"),
        (head + "def say(x):\n    pass\n\n\ndef f():\n    raise RecipeError('')\n", None),
        (head + "class RecipeError(Exception):\n    pass\n", "defines RecipeError"),
    ):
        (tmp_path / "s.py").write_text(text)
        if part is None:
            assert "class RecipeError" in bundle(tmp_path / "s.py")
            continue
        with pytest.raises(SystemExit, match=part):
            bundle(tmp_path / "s.py")
    assert run([sys.executable, str(ROOT / "tools" / "bundle.py"), "nowhere.py"]).returncode == 1


def commands():
    """The two command lines of the README, by their marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- command: (\w+) -->\n```bash\n(.+?)\n```", text))


def test_the_readme_names_the_two_commands():
    assert set(commands()) == {"train", "test"}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "command: test" in ci  # it takes the line from the README


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tools/|tests/|benchmarks/)?\w+\.(?:py|txt|json))`", text):
        found = (ROOT / name).exists() or name in ("settings.json", "metrics.json", "train_x.py")
        assert found or name in TOP, name  # a recipe that the layout names and that has not landed yet is said to be planned


@pytest.mark.slow
def test_the_first_command_in_a_fresh_environment(tmp_path):
    """Installs and trains on nothing but Python and pip; training beats bicubic and ends within 90 seconds."""
    for name in tracked():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    install, _, training = commands()["train"].rpartition(" && ")
    constraints = {"PIP_CONSTRAINT": str(ROOT / ".ci" / "constraints.txt"), "PYTHONPATH": "", "OMP_NUM_THREADS": "2"}
    done = run(["bash", "-c", install], cwd=tmp_path, timeout=900, **constraints)
    assert done.returncode == 0, done.stderr
    done = run(["bash", "-c", f"time {training}"], cwd=tmp_path, timeout=300, **constraints)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    minutes, seconds = re.search(r"real\s+(\d+)m([\d.]+)s", done.stderr).groups()
    assert 60 * int(minutes) + float(seconds) < 90 * slowness()
    ours, bicubic = re.search(r"([\d.]+) dB, bicubic ([\d.]+) dB, SSIM", done.stdout).groups()
    assert float(ours) > float(bicubic) + 0.5


@pytest.mark.parametrize(
    "recipe, heading, published",
    [
        ("ultrafast_srcnn", "## Super-resolution in minutes", "32.39"),
        ("realesrgan_optimized", "## Real-ESRGAN in minutes", "30.48 30.72 30.90 27.49 27.61 27.73 32.73 28.99"),
    ],
)
def test_the_figures_of_the_readme_are_the_measured_ones(recipe, heading, published):
    """Every decimal in the tables of dB and of ms per step stands in a file under benchmarks/results."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    files, short = ROOT / "benchmarks" / "results", recipe.split("_")[-1 if "srcnn" in recipe else 0]
    runs = json.loads((files / f"{short}_set5_cpu2.json").read_text())["runs"]
    speed = json.loads((files / f"{short}_speed_cpu2.json").read_text())
    figures = [v for r in [*runs, *speed["reached"].values()] for k, v in r.items() if "psnr" in k]
    known = {f"{v:.2f}" for v in figures} | set(published.split()) | {f"{r['ssim']:.3f}" for r in runs}
    times = list(speed["ms_per_step"].values())
    known |= {f"{ms:.1f}" for ms in times} | {f"{times[0] / ms:.1f}" for ms in times}
    tables = [part.splitlines() for part in section.split("\n\n") if part.startswith("| ") and re.search(r"dB|ms", part)]
    found = {figure for table in tables for row in table for figure in re.findall(r"\d+\.\d+", row)}
    assert len(tables) == 2 and len(found) > 12 and found <= known, found - known
    docstring = (ROOT / f"train_{recipe}.py").read_text(encoding="utf-8").split('"""')[1]
    claims = set(re.findall(r"(\d+\.\d+) dB", docstring))
    assert claims and claims <= known


def test_the_figures_of_nextdit_are_the_measured_ones():
    """Every decimal in the tables of losses and of ms stands in a file under benchmarks/results."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Images from masks")[1].split("\n## ")[0]
    files = {n: json.loads((ROOT / "benchmarks" / "results" / f"nextdit_{n}_cpu2.json").read_text()) for n in NEXTDIT}
    known = {f"{r[k]:.{d}f}" for r in files["fundus"]["runs"] for k in r if isinstance(r[k], float) for d in (3, 4)}
    known |= {f"{v:.3f}" for row in files["tricks"]["mean_loss"].values() for v in row.values()}
    known |= {f"{v:.1f}" for row in files["tricks"]["faster"].values() for v in row.values() if v}
    known |= {"3.7", "0.1"}  # million weights, and the name of a preset
    for row in files["speed"]["rows"]:
        times = list(row["ms_per_update"].values())
        known |= {f"{times[0] / ms:.2f}" for ms in times}
    tables = [
        part for part in section.split("\n\n") if part.startswith("| ") and re.search(r"loss|times as", part.split("\n")[0])
    ]
    found = {figure for table in tables for figure in re.findall(r"\d+\.\d+", table)}
    assert len(tables) == 3 and len(found) > 15 and found <= known, found - known
    claims = []
    for name in ("train_nextdit_fast", "train_nextdit_ultrafast", "finetune_pretrained"):
        docstring = (ROOT / f"{name}.py").read_text(encoding="utf-8").split('"""')[1].partition("Measured")[2]
        claims += re.findall(r"(?<!\d)0\.\d+", docstring)
    assert len(claims) > 8 and set(claims) <= known, set(claims) - known


def test_the_figures_of_latent_diffusion_are_the_measured_ones():
    """Every decimal and every share in the tables, and in the docstring, stands in a file under benchmarks/results."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Classes from few images")[1].split("\n## ")[0]
    files = {n: json.loads((ROOT / "benchmarks" / "results" / f"latent_cfg_{n}_cpu2.json").read_text()) for n in LATENT}
    run, judged = files["grocery"]["metrics"], [r for r in files["grocery"]["rows"]]
    judged += [r[k] for r in files["choices"]["rows"] for k in ("guidance_1", "guidance_2") if k in r]
    known = {f"{r['accuracy']:.0%}" for r in judged} | {f"{r['distance']:.3f}" for r in judged}
    known |= {f"{run[k]:.0%}" for k in ("class_accuracy", "class_accuracy_real")}
    known |= {f"{run[k]:.3f}" for k in ("heldout_loss", "train_loss")} | {f"{v:.1f}" for k, v in run.items() if "psnr_" in k}
    speed = files["speed"]["rows"][0]
    times = list(speed["ms_per_update"].values())
    known |= {f"{ms:.1f}" for ms in times} | {f"{times[0] / ms:.2f}" for ms in times}
    known |= {f"{n / 1e6:.2f}" for n in speed["weights"].values()}
    known |= {f"{v:.0%}" for row in files["grocery"]["learnt"].values() for v in row.values()}
    known |= {
        "15%",
        "100%",
        f"{files['choices']['rows'][2]['class_accuracy_guidance_3']:.0%}",
    }  # the VAE's share; PCA of 2 x 2 pixels
    tables = [part for part in section.split("\n\n") if part.startswith("| ") and "guide says" not in part]
    found = {f.replace(" ", "") for t in tables for f in re.findall(r"(?<![\w.])\d+\.\d+(?= dB|\*| \||,|;|$)|\d+ %", t)}
    prose = {f.replace(" ", "") for f in re.findall(r"\d+ %", section)}
    assert len(tables) == 4 and len(found) > 40 and found - known <= {"1.5"} and prose <= known, (found | prose) - known
    docstring = (ROOT / "train_latent_cfg.py").read_text(encoding="utf-8").split('"""')[1].partition("Measured")[2]
    claims = {f.replace(" ", "") for f in re.findall(r"(?<![\d.])0\.\d+|\d+ %|\d\.\d\d(?![.\d])", docstring)}
    assert len(claims) >= 4 and claims <= known, claims - known


def test_the_figures_of_the_classifier_are_the_measured_ones():
    """Every decimal in the tables and in the docstring stands in a file under benchmarks/results."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Classes told apart")[1].split("\n## ")[0]
    names = ("cifar", "reach", "speed")
    files = {n: json.loads((ROOT / "benchmarks" / "results" / f"convnext_{n}_cpu2.json").read_text()) for n in names}
    runs = [*files["cifar"]["runs"].values(), *files["cifar"]["compare"]]
    known = {f"{r['accuracy']:.1%}" for r in runs} | {f"{r['accuracy']:.1%}" for r in files["reach"]["rows"].values()}
    known |= {f"{r[k]:.3f}" for r in runs for k in r if k in ("map_at_r", "knn", "silhouette", "fisher", "ece", "macro_auc")}
    known |= {f"{r[k]:.2f}" for r in runs for k in ("seconds_per_epoch", "peak_memory_gib")}
    known |= {f"{r['seconds']:.1f}" for r in files["reach"]["rows"].values()}
    best = {n: r["seconds"] for n, r in files["reach"]["rows"].items() if r["accuracy"] >= files["reach"]["goal"]}
    ours = min(v for n, v in best.items() if "recipe" in n)
    known |= {f"{r['seconds'] / ours:.1f}" for r in files["reach"]["rows"].values()}
    for row in files["speed"]["rows"]:
        for name, ms in row["ms_per_update"].items():
            known |= {f"{ms:.1f}", f"{row['ms_per_update'][name.split(',')[0] + ', fp32'] / ms:.2f}"}
        known |= {f"{n / 1e6:.2f}" for n in row["weights"].values()}
    tables = [part for part in section.split("\n\n") if part.startswith("| ") and "the guide" not in part]
    found = {f.replace(" ", "") for t in tables for f in re.findall(r"\d+\.\d+(?: ?%)?", t)}
    assert len(tables) == 4 and len(found) > 40 and found <= known, found - known
    docstring = (ROOT / "train_convnext.py").read_text(encoding="utf-8").split('"""')[1].partition("Measured")[2]
    claims = {f.replace(" ", "") for f in re.findall(r"(?<![\d.])\d+\.\d(?: %|(?= times))", docstring)}
    assert len(claims) >= 3 and claims <= known, claims - known


def test_the_figures_of_the_3d_recipe_and_the_planner_are_the_measured_ones():
    """Every decimal in the tables stands in a file under benchmarks/results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = [text.split(heading)[1].split("\n## ")[0] for heading in ("## 3-D scans", "## Will it fit")]
    files = {
        n: json.loads((ROOT / "benchmarks" / "results" / f"{n}_cpu2.json").read_text()) for n in ("autoencoder3d", "memory")
    }
    runs = [*files["autoencoder3d"]["runs"].values(), *files["autoencoder3d"]["forms"].values()]
    known = {f"{r[k]:.2f}" for r in runs for k in r if k.startswith("psnr")}
    known |= {f"{r[k]:.3f}" for r in runs for k in r if k.startswith("ssim")}
    for row in files["memory"]["claims"]:
        known |= {f"{row[k] / 2**30:.2f}" for k in ("from", "to")} | {f"{abs(row['to'] / row['from'] - 1):.0%}"}
    for row in files["memory"]["rows"]:
        peak = row["measured"]["peak"]
        known |= {f"{peak / 2**20:.1f}"} | {f"{row[k] / peak - 1:+.1%}" for k in ("tensors", "predicted")}
    known |= {"0.01", "50%"}  # a flag, and the guide's own claim
    tables = [part for s in sections for part in s.split("\n\n") if part.startswith("| ")]
    found = {f.replace(" ", "") for t in tables for f in re.findall(r"[+-]?\d+\.\d+(?: ?%)?|(?<![-\d])\d+ %(?= \||,)", t)}
    assert len(tables) == 4 and len(found) > 40 and found <= known, found - known
    docstring = (ROOT / "train_autoencoder3d.py").read_text(encoding="utf-8").split('"""')[1].partition("Measured")[2]
    claims = set(re.findall(r"(\d\d\.\d+) dB", docstring))
    assert len(claims) >= 3 and claims <= known


LATENT = ("grocery", "choices", "speed")
NEXTDIT = ("fundus", "tricks", "speed")


def test_the_figures_of_reliability_are_the_soaks():
    """Kills, faults by kind, inputs and what was lost, as benchmarks/results/soak.json has them; nothing ended otherwise."""
    soak = json.loads((ROOT / "benchmarks" / "results" / "soak.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("**Nothing is lost, measured.**")[1].split("\n## ")[0]
    tried = {name: row["tried"] for name, row in soak["faults"].items()}
    assert soak["failed"] == [] and soak["left out"] == 0 and soak["recipes"] == 8 and soak["kills"] >= 200
    assert all(row["failed"] == 0 for row in soak["faults"].values()) and set(soak["restarts by updates lost"]) <= {"0", "1"}
    table = [
        int(row.rsplit("|", 2)[1])
        for row in text.splitlines()
        if row.startswith("| ") and row.rsplit("|", 2)[1].strip().isdigit()
    ]
    assert sum(table) == sum(tried.values()) - tried["killed"] + soak["faults"]["killed"]["kills"]
    restarts = soak["restarts by updates lost"]
    assert f"{soak['kills']} kills" in text and f"{restarts['1']} of {sum(restarts.values())} restarts" in text
    inputs = sum(family["inputs"] for family in soak["inputs"].values())
    assert inputs >= 1000 and f"{inputs:,} inputs" in text
