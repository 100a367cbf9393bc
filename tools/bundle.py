"""Make one file of a recipe: python tools/bundle.py train_x.py [OUT]. OUT is standalone/train_x.py by default.

The `try: from common import ...` block of the script gives way to the definitions themselves, with all that they use,
in the order of common.py and with their comments: ordinary Python that runs alone, in an empty folder or in a notebook
cell.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_file():
        raise SystemExit("Usage: python tools/bundle.py train_x.py [OUT]")
    out = Path(sys.argv[2] if len(sys.argv) == 3 else ROOT / "standalone" / Path(sys.argv[1]).name)
    text = bundle(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: one file of {len(text.splitlines())} lines that runs alone.")
