"""Sentences as they come: what the docstrings of Python's own library begin with."""

import ast
import functools
import random
import sysconfig
from pathlib import Path

_KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def sentences(count):
    """Return the first paragraphs of ``count`` docstrings, in an order without meaning."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = (n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, _KINDS))
        found += [text for node in nodes if (text := ast.get_docstring(node))]
    random.Random(0).shuffle(found)
    return [" ".join(text.split("\n\n")[0].split()) for text in found[:count]]
