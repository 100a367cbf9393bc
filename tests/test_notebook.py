"""The notebooks for Colab and Kaggle: what they hold, and that their cells do what they say on machines like those."""

import importlib.util
import json
import os
import re
import shutil
import sys
from importlib.metadata import version

import pytest
from conftest import RECIPES, ROOT, run

sys.path.insert(0, str(ROOT / "tools"))
from bundle import notebook  # noqa: E402

SRCNN = "train_ultrafast_srcnn"
TINY = f"{RECIPES[SRCNN]} --device cpu"
JUPYTER = [name for name in ("nbclient", "ipykernel", "nbformat") if importlib.util.find_spec(name)]

# What IPython does with such cells, as far as they use it.
EMULATION = r"""
import json, re, subprocess, sys, types

page = types.ModuleType("IPython.display")
page.Image = lambda filename: open(filename, "rb").read(4) + filename.encode()
page.display = lambda thing: print("shown:", thing)
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": page}
exec(sys.argv[2])
names = {}


def shell(line):
    subprocess.run(re.sub("{(.+?)}", lambda m: str(eval(m[1], names)), line), shell=True, stderr=subprocess.STDOUT)


names["shell"] = shell
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    first, _, rest = text = "".join(cell["source"]).partition("\n")
    if first.startswith("%%writefile "):
        open(first.split()[1], "w", encoding="utf-8").write(rest + "\n")
    elif cell["cell_type"] == "code":
        exec(re.sub("^!(.*)", lambda m: f"shell({m[1]!r})", "".join(text), flags=re.M), names)
        sys.stdout.flush()
"""
COLAB = """
import os
colab = types.ModuleType("google.colab")
colab.drive = types.SimpleNamespace(mount=lambda folder: os.makedirs(folder + "/MyDrive", exist_ok=True))
sys.modules |= {"google": types.ModuleType("google"), "google.colab": colab}
"""
KERNEL = """
import sys, nbformat, nbclient
pages = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(pages, timeout=100, kernel_name="python3", resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(pages, sys.argv[1])
"""


def sources(pages):
    return {cell["id"]: "".join(cell["source"]) for cell in pages["cells"]}


@pytest.fixture
def machine(tmp_path):
    """A machine whose /content and /kaggle lie in tmp_path, with this Python first on PATH and the cards it claims to have.

    machine(cards, fakes, **settings) writes the notebook of SRCNN with the user's settings in its edit cell and returns its
    path. The programs of `fakes` only print their arguments. The notebook runs with the variables machine.env.
    """
    bin, work = tmp_path / "bin", tmp_path / "my work"
    bin.mkdir()
    work.mkdir()

    def make(cards=0, fakes=(), **settings):
        smi = [f"echo 'GPU {i}: Tesla T4 (UUID: GPU-{i})'" for i in range(cards)] or ["echo 'GPUs: no devices'", "exit 9"]
        programs = {"nvidia-smi": smi} | {name: [f"printf '%s\\n' {name} \"$@\""] for name in fakes}
        for name, lines in programs.items():
            (bin / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
            (bin / name).chmod(0o755)
        pages = notebook(ROOT / f"{SRCNN}.py")
        edit = next(cell for cell in pages["cells"] if cell["id"] == "settings")
        text = "".join(edit["source"])
        for name, value in settings.items():
            text, times = re.subn(f'(?m)^{name} = (""|".*?"|True)', lambda m, n=name, v=value: f"{n} = {v!r}", text)
            assert times == 1
        edit["source"] = re.sub("/(content|kaggle)/?", lambda m: f"{work}{m[0]}", text).splitlines(keepends=True)
        (tmp_path / "pages.ipynb").write_text(json.dumps(pages), encoding="utf-8")
        return tmp_path / "pages.ipynb"

    make.work = work
    make.env = {"PATH": os.pathsep.join([str(bin), os.path.dirname(sys.executable), os.environ["PATH"]])}
    make.env |= {"PYTHONPATH": "", "PIP_NO_INDEX": "1", "KAGGLE_KERNEL_RUN_TYPE": ""}  # pip finds all in place
    return make


def emulate(machine, folder, prelude="", cards=0, fakes=(), **settings):
    """Run all in `folder` of the machine's work folder; returns what was printed."""
    (machine.work / folder).mkdir(exist_ok=True)
    words = [sys.executable, "-c", EMULATION, str(machine(cards, fakes, **settings)), prelude]
    done = run(words, cwd=machine.work / folder, **machine.env)
    assert done.returncode == 0 and "ERROR" not in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_notebook_of_every_recipe(recipe, tmp_path):
    out = tmp_path / f"{recipe}.ipynb"
    assert (
        run([sys.executable, str(ROOT / "tools" / "bundle.py"), "--notebook", f"{recipe}.py", str(out)], ROOT).returncode == 0
    )
    pages = json.loads(out.read_text(encoding="utf-8"))
    if "nbformat" in JUPYTER:
        importlib.import_module("nbformat").validate(pages)
    assert (pages["nbformat"], pages["nbformat_minor"]) == (4, 5) and pages["metadata"]["accelerator"] == "GPU"
    assert pages["metadata"]["kernelspec"]["name"] == "python3"
    for cell in pages["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"]) and isinstance(cell["metadata"], dict)
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    cells = sources(pages)
    assert list(cells) == ["about", "settings", "install", "common", "recipe", "run", "result", "use"]
    for name, key in (("common.py", "common"), (f"{recipe}.py", "recipe")):
        assert cells[key] + "\n" == f"%%writefile {name}\n" + (ROOT / name).read_text(encoding="utf-8")
    for key in ("settings", "install", "run", "result", "use"):
        compile(re.sub("(?m)^!.*", "", cells[key]), key, "exec")
        assert len(cells[key].splitlines()) < 60
    assert not re.search("train_x|RECIPE|WHAT|PACKAGES|HOW", "".join(cells[k] for k in cells if k not in ("common", "recipe")))
    source = (ROOT / f"{recipe}.py").read_text(encoding="utf-8")
    needs = set(re.search(r"pip install -q (.+) torch==", cells["install"])[1].split())
    there = {"torch", "numpy", "pillow", "tqdm", "tensorboard", "matplotlib"}
    assert needs | there == set(re.findall(r'"([\w-]+)"', source.splitlines()[2]))
    flags = set(re.findall(r"--\w+", cells["use"])) | set(re.findall('"(--[a-z_]+)"', cells["settings"]))
    assert "--continue_from" in flags and len(flags) > 6
    assert flags <= {f"--{name}" for name in importlib.import_module(recipe).Config.__dataclass_fields__}


def test_it_refuses_in_a_sentence_what_is_no_recipe(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "my recipe.py").write_bytes((ROOT / f"{SRCNN}.py").read_bytes())
    (tmp_path / "second.py").write_text("mine")
    for words, part in (
        (["nowhere.py"], "Usage"),
        ([], "Usage"),
        ([ROOT / "test_memory_usage.py"], "is no recipe"),
        ([tmp_path / "broken.py"], "is not Python"),
        ([tmp_path / "my recipe.py"], "my recipe.py does not suit"),
        ([ROOT / f"{SRCNN}.py", tmp_path / "second.py"], "nothing was written"),
    ):
        done = run([sys.executable, str(ROOT / "tools" / "bundle.py"), "--notebook", *map(str, words)], cwd=tmp_path)
        assert done.returncode == 1 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "second.py").read_text() == "mine" and not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.skipif(len(JUPYTER) < 3, reason="needs nbclient, ipykernel and nbformat")
def test_a_real_kernel_runs_all_and_then_says_that_it_is_done(machine, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "Anna's {new} $HOME")  # IPython and the shell each have a meaning for these
    pages = machine(DATA=str(data), BUDGET="1h", FLAGS=TINY)
    jupyter = {name: str(tmp_path / "jupyter") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    for told in ("after 6 updates", "Finished before"):
        done = run([sys.executable, "-c", KERNEL, str(pages), str(machine.work)], **machine.env, **jupyter)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs = {c["id"]: c.get("outputs", []) for c in json.loads(pages.read_text(encoding="utf-8"))["cells"]}
        assert not [o for some in outputs.values() for o in some if o["output_type"] == "error"]
        assert told in json.dumps(outputs["run"]) and '"ERROR' not in json.dumps(outputs["install"])
        assert "psnr" in json.dumps(outputs["result"])
        assert len([o for o in outputs["result"] if "image/png" in o.get("data", ())]) == 3
    assert "psnr" in json.loads((machine.work / "results" / "ultrafast_srcnn" / "metrics.json").read_text())
    for name in ("common.py", f"{SRCNN}.py"):
        assert (machine.work / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_cells_on_colab_and_then_on_kaggle(machine):
    """A run on Colab with its copy on Drive; then a session on Kaggle that goes on from that copy, which is attached."""
    content, kaggle = machine.work / "content", machine.work / "kaggle"
    text = emulate(machine, "content", COLAB, FLAGS=TINY)
    local, drive = content / "ultrafast_srcnn-demo", content / "drive" / "MyDrive" / "ultrafast_srcnn-demo"
    assert "Colab, 0 GPU(s)" in text and "No GPU is switched on" in text and "after 6 updates" in text
    assert '"psnr"' in text and text.count(r"shown: b'\x89PNG") == 3 and f"{local}/sample-000006.png" in text
    assert (drive / "last.pt").exists() and "--time_budget 1h" in text and "--session_limit" not in text
    # attached: this run, an earlier state of it, and longer ones that do not suit: real data, another recipe, no weights
    runs = {"notebooks/me/last time": None, "before": 0.5, "real": 9e9, "other": 9e9, "bare": 9e9}
    for place, used in runs.items():
        runs[place] = shutil.copytree(drive, kaggle / "input" / place / "run")
        if used:
            (runs[place] / "clock.json").write_text(json.dumps({"used": used}))
    for place, mine, theirs in (("real", '"data_dir": ""', '"data_dir": "x"'), ("other", "ultrafast_srcnn", "convnext")):
        about = (runs[place] / "settings.json").read_text()
        assert mine in about
        (runs[place] / "settings.json").write_text(about.replace(mine, theirs))
    for name in ("last.pt", "previous.pt"):
        (runs["bare"] / name).unlink()
    (kaggle / "input" / "bare" / "settings.json").write_bytes(b"\xff[]")  # some data set's own
    text = emulate(machine, "kaggle/working", COLAB, fakes=("pip",), FLAGS=TINY)  # its machines are made from Colab's
    assert "Kaggle, 0 GPU(s)" in text and "--session_limit 11h" in text and "--mirror_dir" not in text
    assert f"Continuing the run of {runs['notebooks/me/last time']} in {kaggle}/working/ultrafast_srcnn-demo" in text
    assert "Continuing after update 6" in text and '"psnr"' in text


def test_two_cards_get_two_processes(machine):
    out = machine.work / "kaggle" / "working" / "ultrafast_srcnn"
    out.parent.mkdir(parents=True)
    settings = {"DATA": "/photos of $HOME", "BUDGET": "", "FLAGS": "--scale 4 --arch 'a b'"}
    text = emulate(machine, "kaggle/working", cards=2, fakes=("torchrun", "pip"), **settings)
    words = ["torchrun", "--standalone", "--nproc_per_node=2", f"{SRCNN}.py", "--out_dir", str(out), "--data_dir"]
    words += ["/photos of $HOME", "--session_limit", "11h", "--scale", "4", "--arch", "a b"]
    assert "\n".join(["", *words, ""]) in text and "Kaggle, 2 GPU(s)" in text and "No metrics.json" in text
    assert f"pip\ninstall\n-q\nfilelock\nonnx\ntorch=={version('torch')}\n" in text and "No GPU" not in text


def test_one_card_needs_no_torchrun_and_drive_is_left_alone_where_it_is_not_wanted(machine):
    text = emulate(machine, "content", COLAB, cards=1, fakes=("python", "torchrun", "pip"), DRIVE=False)
    words = ["python", f"{SRCNN}.py", "--out_dir", f"{machine.work}/content/ultrafast_srcnn-demo", "--time_budget", "1h"]
    assert "\n".join(["", *words, ""]) in text and "Colab, 1 GPU(s)" in text and not (machine.work / "content/drive").exists()
