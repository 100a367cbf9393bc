"""What every recipe promises, at one point each; SRCNN has the full matrix in the other files."""

import ast
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import RECIPES, ROOT, checkpoint, run
from faults import finish, free_port, pair

import common

sys.path.insert(0, str(ROOT / "tools"))
from bundle import bundle  # noqa: E402

EXACT = {"train_realesrgan_optimized": ["--no-gan"]}  # Adam on a discriminator blows rounding up
RESULT = {"train_nextdit_fast": "model.safetensors", "train_nextdit_ultrafast": "model.safetensors"}
RESULT |= {
    "finetune_pretrained": "merged.safetensors",
    "train_latent_cfg": "model.pt",
    "train_autoencoder3d": "model.pt",
}  # what a finished run exports, where it is not a .onnx
CONTRACT = ["Config", "build", "example_batch", "train_step", "eval_step", "train", "load"]
recipes = pytest.mark.parametrize("recipe", RECIPES)
others = pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "train_ultrafast_srcnn"])  # it has these elsewhere


def flags(recipe, folder, *more):
    return [*RECIPES[recipe].split(), "--no-use_amp", "--device", "cpu", "--out_dir", str(folder), *more]


def test_every_script_is_in_the_list():
    scripts = {p.stem for p in ROOT.glob("train_*.py")} | {p.stem for p in ROOT.glob("finetune_*.py")}
    assert scripts == set(RECIPES)


@recipes
def test_head_and_contract(recipe):
    source = (ROOT / f"{recipe}.py").read_text(encoding="utf-8")
    assert source.startswith("# /// script\n# requires-python")
    module = importlib.import_module(recipe)
    assert all(callable(getattr(module, name)) for name in CONTRACT)
    assert issubclass(module.Config, common.Settings) and source.count("# EDIT HERE") + source.count('"""EDIT HERE') == 2
    loop = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < 60  # it fits on one screen
    assert all(f.metadata["help"] for f in module.Config.__dataclass_fields__.values())
    everyday = [n for n, f in module.Config.__dataclass_fields__.items() if f.metadata.get("everyday")]
    assert 8 <= len(everyday) <= 12


@recipes
def test_without_common_it_names_the_two_ways_out(recipe, tmp_path):
    (tmp_path / f"{recipe}.py").write_bytes((ROOT / f"{recipe}.py").read_bytes())
    done = run([sys.executable, f"{recipe}.py"], cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "copy it beside the script" in done.stderr and f"tools/bundle.py {recipe}.py" in done.stderr
    if recipe != "train_ultrafast_srcnn":
        return  # the same lines in all of them
    (tmp_path / "common.py").write_text("import no_such_package\n")
    done = run([sys.executable, f"{recipe}.py"], cwd=tmp_path, PYTHONPATH="")
    assert "no_such_package" in done.stderr and "copy it beside" not in done.stderr


@recipes
def test_the_bundle_runs_alone_as_a_script_and_as_a_notebook_cell(recipe, tmp_path):
    text = bundle(ROOT / f"{recipe}.py")
    compile(text, recipe, "exec")
    assert "from common" not in text.replace("# --- from common.py", "") and text.count("# --- the recipe") == 1
    source = (ROOT / f"{recipe}.py").read_text(encoding="utf-8")
    assert source[source.index("\nclass ") :] in text  # the recipe itself is untouched
    (tmp_path / "one.py").write_text(text, encoding="utf-8")
    (tmp_path / "cell.py").write_text(
        "import sys, types\nsys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"
        "sys.argv = ['ipykernel_launcher.py', '-f', 'kernel.json']\ndel __file__\n"
        "exec(compile(open('one.py', encoding='utf-8').read(), '<cell>', 'exec'), sys.modules['__main__'].__dict__)\n"
    )
    words = flags(recipe, "cell")
    settings = {w[2:].upper(): v for w, v in zip(words, words[1:]) if w.startswith("--") and not v.startswith("--")}
    with ThreadPoolExecutor(2) as pool:
        script = pool.submit(run, [sys.executable, "one.py", *flags(recipe, "run")], cwd=tmp_path, PYTHONPATH="")
        cell = pool.submit(run, [sys.executable, "cell.py"], cwd=tmp_path, PYTHONPATH="", **settings)
    for name, done in (("run", script.result()), ("cell", cell.result())):
        assert done.returncode == 0 and (tmp_path / name / "metrics.json").exists(), done.stderr
    assert "From the environment:" in cell.result().stdout


@recipes
def test_untrained_weights_never_look_like_a_result(recipe, tmp_path):
    """The rehearsal exports for a try; what a stopped run leaves under the export's name would be its start."""
    folder, result = tmp_path / "run", RESULT.get(recipe, "*.onnx")
    done = finish(recipe, folder, faults={"export": True, "stop_at": 2}, code=143)
    assert "after update 2, which is saved" in done.text
    assert not list(folder.rglob(result)) and not list(folder.glob("tmp*")) and not list(folder.glob(".*.part"))
    finish(recipe, folder, faults={"export": True})
    assert len(list(folder.glob(result))) == 1


@others
def test_two_processes_give_the_weights_of_one(recipe, tmp_path):
    """With SGD, which adds up nothing but the gradients; what is random in an update is drawn once for both."""
    more, faults = [*EXACT.get(recipe, []), "--learning_rate", "0.01"], {"optimizer": "SGD"}
    finish(recipe, tmp_path / "one", *more, "--batch_size", "4", faults=faults)
    both = pair(recipe, tmp_path / "two", *more, faults={0: faults, 1: faults}, port=free_port())
    assert [p.wait() for p in both] == [0, 0], both[0].text[-3000:] + both[1].text[-3000:]
    told = both[0].text + both[1].text
    assert "4 samples per update = 2 x 1 x 2 processes" in told and told.count("Before:") == 1
    one, two = (checkpoint(tmp_path / name)["parts"]["model"] for name in ("one", "two"))
    assert list(one) == list(two)
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-5, name


@recipes
def test_help_is_fast(recipe):
    """It loads torch, numpy and Pillow, and nothing of what a run or an export needs later."""
    code = "import runpy, sys; sys.argv = [sys.argv[1], '--help']; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}), 'torch._dynamo' in sys.modules)"
    done = run([sys.executable, "-c", code, str(ROOT / f"{recipe}.py")])
    assert done.returncode == 0 and "--data_dir" in done.stdout, done.stderr
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert {"torch", "numpy", "PIL", "False"} <= loaded
    assert not loaded & set("matplotlib tensorboard tensorflow onnx diffusers safetensors scipy pandas monai nibabel".split())
