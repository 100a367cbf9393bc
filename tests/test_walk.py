"""A newcomer's walk: every command of the README is run as it stands, or where it needs hours or a card, read by its script.

Small data lie under the names that the README uses, and tiny sizes come from environment variables, which flags of a command
overrule as they do for its users. Quick commands run in the suite, all others in the slow part.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import RECIPES, ROOT, environment
from PIL import Image

import common

USES = ("--upscale", "--sample", "--embed", "--reconstruct", "--encode", "--decode")
QUICK = (
    "train_ultrafast_srcnn.py --data_dir photos --scale 3",
    "train_ultrafast_srcnn.py --upscale",
    "tools/bundle.py --notebook",
)
READ = {  # commands that are only read, and why
    "--weights lumina": "the published weights are not here",
    "--target_size 256": "hours on a processor",
    "--stages guide": "hours on a processor",
    "--model model-074000.pt": "a model of update 74,000",
    "results/convnext-old1": "two runs of another recipe; test_report.py runs it",
    ".venv": "the first command: test_house.py runs it in a fresh environment, .ci/run the second",
}
WHOLE = {"test_memory_usage.py": 400}  # seconds; others 150
MADE = {  # what a command leaves in its folder
    "--upscale": "**/holiday*", "--sample": "**/samples/**/*.png", "--embed": "**/*.csv", "--reconstruct": "**/scan*",
    "--notebook": "standalone/*.ipynb", "tools/report.py": "**/report.html",
}  # fmt: skip


def blocks(name="README.md"):
    """The command lines of a README's bash blocks, without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.+?)```", text, flags=re.S) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def why_only_read(line):
    return next((why for part, why in READ.items() if part in line), None)


COMMANDS = [line for line in blocks() if not why_only_read(line)]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with the scripts and, under the README's names, small data."""
    folder, rng = tmp_path_factory.mktemp("walk"), np.random.default_rng(0)
    for path in [*ROOT.glob("*.py"), ROOT / "tools"]:
        (folder / path.name).symlink_to(path)

    def paint(path, size=(48, 40), mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        (small if mode == "RGB" else small.convert("L").point(lambda v: 255 * (v > 140))).save(path)

    for k in range(10):
        paint(folder / "photos" / f"{k}.png", (72, 64))
        paint(folder / "fundus" / "images" / f"{k}.png")
        paint(folder / "fundus" / "masks" / f"{k}.png", mode="L")
        for c in ("cat", "dog"):
            paint(folder / "DATA" / c / f"{k}.png")
    paint(folder / "new_masks" / "a.png", mode="L")
    paint(folder / "holiday.jpg")
    shutil.copytree(folder / "photos", folder / "PICTURE_OR_FOLDER")
    rows = [f"{p},{p.parent.name},{'val' if p.stem > '7' else 'train'}" for p in sorted((folder / "DATA").rglob("*.png"))]
    (folder / "both.csv").write_text("\n".join(["image,label,split", *rows]) + "\n", encoding="utf-8")
    (folder / "scans").mkdir()
    for k in range(4):
        np.save(folder / "scans" / f"{k}.npy", rng.random((20, 20, 12), np.float32))
    import nibabel

    nibabel.save(nibabel.Nifti1Image(rng.random((20, 20, 12), np.float32), np.eye(4)), folder / "scan.nii.gz")
    return folder


def tiny(line):
    """Environment variables that make the recipe of a command small."""
    recipe = next((r for r in RECIPES if f"{r}.py" in line), None)
    words, env = RECIPES.get(recipe, "").split(), {"DEVICE": "cpu"} if recipe else {}
    for word, value in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            env[word[2:].replace("-", "_").upper()] = "1" if value.startswith("--") else value
    return env


def walk(line, place, folder):
    """Run a command as a newcomer would, in `folder`, where the names of `place` are."""
    folder.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.name == "tools" and not (folder / "tools").exists():  # they write beside themselves
            shutil.copytree(path, folder / "tools")
        elif not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    line = re.sub(r"\bpython (?=[\w/]+\.py)", f"{shlex.quote(sys.executable)} ", line)
    limit = next((s for part, s in WHOLE.items() if part in line), 150)
    env = environment(**tiny(line)) | {"PYTHONPATH": ""}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, timeout=limit, capture_output=True, text=True,
        encoding="utf-8", errors="replace")  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done


def follow(lines, place, folder):
    """Run commands: each training in a folder of its own, what uses a result where its recipe was first trained."""
    first, ran = {}, []
    for k, line in enumerate(lines):
        recipe = next((r for r in RECIPES if f"{r}.py" in line), "report" if "report" in line else "")
        use = any(flag in line.split() for flag in USES) or recipe == "report"
        where = first.get("train_latent_cfg" if recipe == "report" else recipe) if use else None
        if use and where is None:
            where = folder / f"made-{k}"
            walk({"report": "python train_latent_cfg.py --data_dir DATA"}.get(recipe, f"python {recipe}.py"), place, where)
            demo = next((where / "results").glob("*"))
            demo.rename(where / "results" / demo.name.removesuffix("-demo"))
        where = where or folder / f"{k}"
        first.setdefault(recipe, where)
        before = time.time()
        done = walk(line, place, where)
        made = next((pattern for flag, pattern in MADE.items() if flag in line), "results/**/metrics.json")
        if "test_memory_usage.py" in line:
            assert "fits" in done.stdout or "GiB" in done.stdout, line
        else:
            assert [p for p in where.glob(made) if p.stat().st_mtime > before - 1], line
        ran.append(line)
    return ran


def test_quick_commands_run(place, tmp_path):
    lines = [line for line in COMMANDS if any(q in line for q in QUICK)]
    assert len(lines) == len(QUICK)
    follow(lines, place, tmp_path)
    found = {p.name for p in tmp_path.rglob("*")}
    assert {"train_ultrafast_srcnn.ipynb", "model.onnx", "metrics.json"} <= found and any("holiday" in n for n in found)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({re.search(r"[\w/]+\.py", line)[0] for line in COMMANDS}))
def test_every_command_runs(script, place, tmp_path):
    lines = [line for line in COMMANDS if re.search(r"[\w/]+\.py", line)[0] == script]
    assert follow(lines, place, tmp_path) == lines


def commands_elsewhere():
    """Commands in sentences and tables, and those of the cell for Colab."""
    text = re.sub(r"```bash.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    spans = re.findall(r"`(?:python )?((?:train_|finetune_|test_memory_usage)\w*\.py --[^`]+)`", text)
    return [f"python {span}" for span in spans] + re.findall(r"^!(python .+)$", text, flags=re.M)


@pytest.mark.parametrize("line", [line for line in blocks() if ".venv" not in line] + commands_elsewhere())
def test_every_command_is_one_that_its_script_takes(line, place, monkeypatch):
    """Names of flags, their values and how they go together; of tools, that they are there."""
    for part in filter(None, re.split(r" *(?:;|&&) *", line)):
        words = shlex.split(part)
        while "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        assert words[0] == "python" and (ROOT / words[1]).is_file(), part
        if words[1].startswith("tools/"):
            continue
        module, given = importlib.import_module(words[1].removesuffix(".py")), words[2:]
        if words[1] == "test_memory_usage.py":
            own, given = module.split(given)
            module = importlib.import_module(common.parse(module.Plan, module.__doc__, own).recipe)
        monkeypatch.chdir(place)  # one recipe looks at its data to settle its settings
        cfg = common.parse(module.Config, module.__doc__, given)
        assert len(cfg.given) >= sum(w.startswith("--") for w in given)


def test_commands_in_sentences_exist_and_take_their_flags():
    """`python benchmarks/x.py --flag` in the prose: the script is there and its help names the flags."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = set(re.findall(r"`python ((?:benchmarks|tools)/\w+\.py)([^`]*)`", text))
    assert len(found) > 8 and len(commands_elsewhere()) >= 3
    for script, rest in found:
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in re.findall(r"--\w+", rest):
            assert f'"{flag}"' in source, (script, flag)
