"""The form of the Triton package: what Triton does not compile is annotated, and formatted."""

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "llmos_kernels" / "_triton"


def is_compiled(function: ast.FunctionDef) -> bool:
    """Return True if Triton compiles the function, whose parameters are not Python's."""
    return any(
        ast.unparse(decorator).startswith(("triton.jit", "kernel"))
        for decorator in function.decorator_list
    )


def signature_lines(function: ast.FunctionDef) -> range:
    return range(function.lineno, function.body[0].lineno)


@pytest.mark.parametrize(
    "path", sorted(FOLDER.rglob("*.py")), ids=lambda p: str(p.relative_to(FOLDER))
)
def test_form(path):
    """Launchers have types, only kernel signatures are not formatted, lines have 100 columns."""
    source = path.read_text()
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    for function in functions:
        if not is_compiled(function):
            arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            missing = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
            assert function.returns and not missing, f"{function.name}: no types of {missing}"
    signatures = {n for f in functions if is_compiled(f) for n in signature_lines(f)}
    for number, line in enumerate(source.splitlines(), 1):
        assert len(line) <= 100, f"line {number} has {len(line)} columns"
        assert "# fmt: skip" not in line or number in signatures, f"line {number} is not formatted"
