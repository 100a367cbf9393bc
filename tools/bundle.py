"""Make one file of a recipe, or a notebook that runs it on Colab and Kaggle.

python tools/bundle.py train_x.py [OUT]               # one file; OUT is standalone/train_x.py by default
python tools/bundle.py --notebook train_x.py [OUT]    # a notebook; OUT is standalone/train_x.ipynb by default

One file: the `try: from common import ...` block of the script gives way to the definitions themselves, with all that
they use, in the order of common.py and with their comments: ordinary Python that runs alone, in an empty folder or in a
notebook cell.

The notebook writes the script and common.py, word for word, and runs the script as its own process. So nothing of
CUDA is begun in the notebook, torchrun can start a process per GPU, and a memory that is full does not end the kernel.
"""

import ast
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THERE = {"torch", "numpy", "pillow", "tqdm", "tensorboard", "matplotlib"}  # what Colab and Kaggle bring

# The cells of the notebook. "train_x.py" and "RECIPE" in them stand for the script's file name and for its own name.
ABOUT = """# train_x.py

WHAT

1. **Switch the GPU on.** Colab: *Runtime > Change runtime type*. Kaggle: *Settings > Accelerator*, and *Internet* on.
2. **Set `DATA`** in the next cell. Left empty, the recipe draws its own data to try it out; `BUDGET = "5m"` will do then.
3. **Run all.**

When the session is cut, open the notebook again and *Run all*: the run continues from its last save. `BUDGET` counts all
sessions together. On Colab it continues from the copy on your Drive. On Kaggle start it with *Save Version > Save & Run All*,
which needs no open browser and keeps the run folder; in the next session first attach that output: *Add Input > Your Work*.

Many small files come slowly from Drive. Keep them there as a zip, and write in a new cell after the next one
`!unzip -qn drive/MyDrive/photos.zip -d photos`, with `DATA = "photos"`.

The two long cells are the sources; `EDIT HERE` in `train_x.py` marks the places that you may want to change."""

SETTINGS = """DATA = ""  # folder or CSV with your data, e.g. "/kaggle/input/photos"; empty: built-in data
BUDGET = "1h"  # finish inside this time, all sessions together; empty: the recipe's own length
FLAGS = ""  # more settings, e.g. "--batch_size 8"; to see them: !python train_x.py --help
DRIVE = True  # on Colab: copy each save to your Drive, so that a cut session loses little

# From here on nothing needs a change.
import json, os, re, shlex, subprocess, sys
from pathlib import Path

KAGGLE = bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE")) or Path("/kaggle/working").is_dir()
COLAB = "google.colab" in sys.modules and not KAGGLE  # Kaggle's machines are made from Colab's
NAME = "RECIPE" if DATA else "RECIPE-demo"
OUT = Path("/kaggle/working" if KAGGLE else "/content" if COLAB else "results") / NAME
words = ["--out_dir", str(OUT)]
words += ["--data_dir", DATA] if DATA else []
words += ["--time_budget", BUDGET] if BUDGET else []

if COLAB and DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
    words += ["--mirror_dir", f"/content/drive/MyDrive/{NAME}"]


def time_used(run):
    # seconds of training in a folder from which this notebook can go on, else 0
    about, clock = (run / "settings.json").read_text(errors="replace"), run / "clock.json"
    ours = '"recipe": "RECIPE"' in about and ('"data_dir": ""' in about) == (not DATA)
    saved = clock.exists() and any((run / name).exists() for name in ("last.pt", "previous.pt"))
    return json.loads(clock.read_text())["used"] if ours and saved else 0


if KAGGLE:  # a session ends after 12 hours; the next one goes on from its output, once that is attached
    words += ["--session_limit", "11h"]
    runs = [file.parent for depth in range(1, 5) for file in Path("/kaggle/input").glob("*/" * depth + "settings.json")]
    if any(time_used(run) for run in runs):
        words += ["--continue_from", str(max(runs, key=time_used))]

GPUS = len(re.findall(r"^GPU \\d+:", subprocess.getoutput("nvidia-smi -L"), re.M))
START = "python" if GPUS < 2 else f"torchrun --standalone --nproc_per_node={GPUS}"
ARGUMENTS = shlex.join(words + shlex.split(FLAGS))
print("Kaggle," if KAGGLE else "Colab," if COLAB else "Neither Colab nor Kaggle,", GPUS, "GPU(s). The run will be:")
print(START, "train_x.py", ARGUMENTS)
if not GPUS:
    print("No GPU is switched on: this will be slow.")"""

INSTALL = """# What is not there yet. torch is, and it must stay the one that fits this machine.
from importlib.metadata import version

!pip install -q PACKAGES torch=={version("torch")}"""

# Through a pipe the script prints lines. A notebook gives it a terminal of 80 columns, in which the bar has no room for the
# time left, and keeps every bar that was drawn: 2 MB an hour. -i lets tee live on while a stopped run saves and says so.
RUN = """# Run this cell again and the run continues, or says that it is finished.
!{START} train_x.py {ARGUMENTS} 2>&1 | tee -i"""

RESULT = """from IPython.display import Image, display

done = OUT / "metrics.json"
print(done.read_text() if done.exists() else "No metrics.json: the run is not finished. Its last lines above say why.")
for file in [*sorted(OUT.glob("sample-*.png"))[-1:], OUT / "curves.png", OUT / "data.png"]:
    if file.exists():
        print(file)
        display(Image(filename=str(file)))"""

USE = """# To use what was trained, take away the # of the next line and name your own files.
# !python train_x.py --out_dir "{OUT}" HOW"""


def names_in(node):
    """Every name that a piece of code reads or writes."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def defined_by(node):
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(a.asname or a.name).split(".")[0] for a in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def text_of(node, lines):
    """The source of a top-level statement with its decorators and the comments right above it."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ---"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def bundle(script, common=ROOT / "common.py"):
    """The text of one file that is `script` with what it takes from common.py. SystemExit says why one cannot be made."""
    source, shared = Path(script).read_text(encoding="utf-8"), Path(common).read_text(encoding="utf-8")
    tree, parts = ast.parse(source), ast.parse(shared).body[1:]  # without common.py's docstring
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "common"]
    block = next((n for n in tree.body if isinstance(n, ast.Try) and n.body == imports), None)
    if block is None or any(a.asname or a.name == "*" for n in imports for a in n.names):
        raise SystemExit(f"{script} needs exactly one `try: from common import (names)` block, without * and as.")
    owner = {name: node for node in parts for name in defined_by(node)}
    wanted, todo = set(), [a.name for n in imports for a in n.names]
    missing = [name for name in todo if name not in owner]
    if missing:
        raise SystemExit(f"common.py has no {', '.join(missing)}, which {script} imports.")
    while todo:
        node = owner[todo.pop()]
        if node not in wanted:
            wanted.add(node)
            todo += [name for name in names_in(node) if name in owner]
    own = set().union(*(defined_by(n) for n in tree.body if n is not block and not isinstance(n, (ast.Import, ast.ImportFrom))))
    twice = own & {name for node in wanted for name in defined_by(node)}
    if twice:
        raise SystemExit(f"{script} defines {', '.join(sorted(twice))}, which comes from common.py too; rename one of them.")
    lines, body = shared.splitlines(), source.splitlines()
    own_imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    shared_imports = [n for n in parts if n in wanted and isinstance(n, (ast.Import, ast.ImportFrom))]
    pieces = [text_of(n, lines) for n in parts if n in wanted and n not in shared_imports]
    constants = [p for p in pieces if "\n" not in p]
    definitions = [p for p in pieces if p not in constants]
    for n in own_imports:  # they move into the merged block
        body[n.lineno - 1 : n.end_lineno] = [None] * (n.end_lineno - n.lineno + 1)
    before = [line for line in body[: block.lineno - 1] if line is not None]
    after = [line for line in body[block.end_lineno :] if line is not None]
    return "\n".join([
        "\n".join(before).rstrip(), "", *merged(own_imports + shared_imports), "",
        "# --- from common.py " + "-" * 100, *constants, "", "", "\n\n\n".join(definitions), "", "",
        "# --- the recipe " + "-" * 104, "\n".join(after).strip("\n"), "",
    ])  # fmt: skip


def merged(imports):
    """The import lines of two files as one sorted block, the standard library first."""
    plain, chosen = {}, {}
    for node in imports:
        for a in node.names:
            name = a.name + (f" as {a.asname}" if a.asname else "")
            if isinstance(node, ast.Import):
                plain[name] = f"import {name}"
            else:
                chosen.setdefault(node.module, set()).add(name)
    texts = [(k, v) for k, v in plain.items()] + [(k, f"from {k} import {', '.join(sorted(v))}") for k, v in chosen.items()]
    ours = {True: [], False: []}
    for key, text in sorted(texts, key=lambda kt: (kt[1].startswith("from"), kt[0])):
        ours[re.split(r"[. ]", key)[0] in sys.stdlib_module_names].append(text)
    return [*ours[True], "", *ours[False]]


def notebook(script, common=ROOT / "common.py"):
    """The notebook (nbformat 4.5, as a dict) that runs `script` on Colab and Kaggle. SystemExit says why there is none."""
    file, shared = Path(script).name, Path(common).read_text(encoding="utf-8")
    source = Path(script).read_text(encoding="utf-8")
    about, name = ast.get_docstring(ast.parse(source)), re.search(r'^RECIPE = "(.+)"$', source, re.M)
    if not about or not name:
        raise SystemExit(f'{script} is no recipe that a notebook can run: it needs a docstring and a line RECIPE = "name".')
    if not re.fullmatch(r"[\w.-]+", file):
        raise SystemExit(f"The name {file} does not suit the lines of a notebook; take letters, digits and _.")
    needs = re.search(r"^# dependencies = \[(.+?)\]$", source, re.M | re.S)
    needs = [p for p in re.findall(r'"(.+?)"', needs[1] if needs else "") if re.match(r"[\w-]+", p)[0] not in THERE]
    use = re.findall(r"^ *python \S+\.py (--.+?)(?: +#.*)?$", about, re.M)  # the docstring's last command is how it is used

    def cell(key, text, kind="code", **metadata):
        lines = text.removesuffix("\n").splitlines(keepends=True)
        more = {"execution_count": None, "outputs": []} if kind == "code" else {}
        return {"cell_type": kind, "id": key, "metadata": metadata, "source": lines, **more}

    def filled(text, **words):
        for word, meant in {"train_x.py": file, "RECIPE": name[1], **words}.items():
            text = text.replace(word, meant)
        return text

    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}, "_kg_hide-input": True}  # in Colab, Jupyter, Kaggle
    cells = [
        cell("about", filled(ABOUT, WHAT=about.split("\n")[0]), "markdown"),
        cell("settings", filled(SETTINGS)),
        cell("install", filled(INSTALL, PACKAGES=shlex.join(needs))),
        cell("common", f"%%writefile common.py\n{shared}", **hidden),
        cell("recipe", f"%%writefile {file}\n{source}", **hidden),
        cell("run", filled(RUN)),
        cell("result", filled(RESULT)),
        *[cell("use", filled(USE, HOW=how)) for how in use[-1:]],
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "kernelspec": kernel, "language_info": {"name": "python"}}  # the GPU is for Colab
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if w != "--notebook"]
    wanted = len(words) < len(sys.argv) - 1
    if len(words) not in (1, 2) or not Path(words[0]).is_file():
        raise SystemExit("Usage: python tools/bundle.py [--notebook] train_x.py [OUT]")
    default = Path(words[0]).with_suffix(".ipynb").name if wanted else Path(words[0]).name
    out = Path(words[1]) if len(words) == 2 else ROOT / "standalone" / default
    if wanted and out.suffix != ".ipynb":  # such as the second of train_*.py
        raise SystemExit(f"{out} does not end in .ipynb; nothing was written.")
    try:
        text = json.dumps(notebook(words[0]), indent=1, ensure_ascii=False) + "\n" if wanted else bundle(words[0])
    except (SyntaxError, ValueError) as e:
        raise SystemExit(f"{words[0]} is not Python: {e}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    about = "open it in Colab or Kaggle." if wanted else f"one file of {len(text.splitlines())} lines that runs alone."
    print(f"{out}: {about}")
