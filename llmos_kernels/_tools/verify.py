"""Check every op, or every installed file: ``python -m llmos_kernels verify``."""

import time
from collections.abc import Callable

import torch

from llmos_kernels._tools import checksums
from llmos_kernels.testing import CASES, DTYPES, Case, worst_error
from llmos_kernels.testing.cases import encoder_layer, int8


def _judge(case: Case) -> Callable[[torch.dtype, str], float]:
    """Return a function (dtype, device) that gives the largest error over budget of ``case``."""
    shapes = [s for s in case.shapes if torch.Size(s).numel() > 0]
    return lambda dtype, device: max(worst_error(case, s, dtype, device) for s in shapes)


def _result(
    error: Callable[[torch.dtype, str], float], dtype: torch.dtype, device: str
) -> tuple[bool, str]:
    """Return whether an op passes, and its error over budget or the exception that it raised."""
    try:
        worst = error(dtype, device)
    except Exception as e:
        return False, f"{type(e).__name__}: {e}"
    return worst <= 1, f"{worst:.2f}"


def ops() -> bool:
    """Compare every op with the float64 reference, print the errors; return True if all pass."""
    judged = {case.name: _judge(case) for case in CASES}
    judged |= {"int8_linear": int8.worst_error, "encoder_layer": encoder_layer.worst_error}
    failed, start = 0, time.perf_counter()
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for name, error in judged.items():
            cells = []
            for dtype in DTYPES:
                passed, text = _result(error, dtype, device)
                failed += not passed
                verdict = "PASS" if passed else "FAIL"
                cells.append(f"{str(dtype).removeprefix('torch.')} {verdict} {text}")
            print(f"{device:5} {name:28} " + "  ".join(cells), flush=True)
    print(f"error over budget, 1 or less passes; {time.perf_counter() - start:.0f} s")
    print(f"{failed} failed: FAIL" if failed else "PASS")
    return not failed


def files() -> bool:
    """Print each installed file that differs from its wheel; return True if there is none.

    Raises:
        ValueError: The package was not installed from a wheel.
    """
    found = list(checksums.altered())
    print("\n".join([*found, f"{len(found)} files altered: FAIL" if found else "PASS"]))
    return not found
