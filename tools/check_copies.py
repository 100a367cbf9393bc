"""Keep copied classes and functions the same: python tools/check_copies.py [--fix] [FILE ...].

A copy stands right below a line `# Copied from train_x.py::Name` and has to be the text of Name in that file. Without
files it looks at every script at the top level. Exit code 1 names the copies that differ; --fix rewrites them.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def definition(path, name):
    """(first line, last line + 1) of a top-level class or function, decorators included; SystemExit where there is none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if getattr(node, "name", None) == name:
            return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno
    raise SystemExit(f"{path} has no top-level {name}.")


def check(path, fix=False):
    """The copies in a file that differ from their originals, as sentences; with `fix` they are rewritten."""
    path, found = Path(path), []
    for mark in re.findall(r"^# Copied from (\S+)::(\w+)$", path.read_text(encoding="utf-8"), re.M):
        lines, (file, name) = path.read_text(encoding="utf-8").splitlines(), mark
        first, end = definition(path, name)
        if lines[first - 1] != f"# Copied from {file}::{name}":
            found.append(f"{path.name}: {name} does not follow its mark.")
            continue
        start, stop = definition(path.parent / file, name)
        original = (path.parent / file).read_text(encoding="utf-8").splitlines()[start:stop]
        if lines[first:end] != original:
            found.append(f"{path.name}: {name} differs from {file}.")
            if fix:
                path.write_text("\n".join([*lines[:first], *original, *lines[end:]]) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    files = [a for a in sys.argv[1:] if a != "--fix"] or sorted(ROOT.glob("*.py"))
    problems = [p for f in files for p in check(f, "--fix" in sys.argv)]
    for problem in problems:
        print(problem + (" Rewritten." if "--fix" in sys.argv and "differs" in problem else ""))
    sys.exit(1 if problems and "--fix" not in sys.argv else 0)
