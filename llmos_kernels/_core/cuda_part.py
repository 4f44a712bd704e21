"""How many rows CUDA C++ computes itself: beyond these its ops hand a call to Triton's launcher.

Measured numbers of rows are in ``tuned/gpu/cuda*.json``, by architecture and op:

    {"sm_90": {"layer_norm_forward": 512}}

Where there is none the extension's own rule answers (``csrc/cuda/choice.h``). ``LLMOS_CUDA=cpp``
and ``LLMOS_CUDA=triton`` give all calls to one of them, for measurements.
"""

import ctypes
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmos_kernels._core.tuned import folders

#: What stands for every architecture and for every op.
_EVERY_ARCH, _EVERY_OP = "sm_0", "*"
_NO_LIMIT = 2**62


def mode() -> str | None:
    """Return ``LLMOS_CUDA``: "cpp", "triton" or None; raise ValueError if it is another word."""
    wanted = os.environ.get("LLMOS_CUDA") or None
    if wanted not in (None, "cpp", "triton"):
        raise ValueError(f"LLMOS_CUDA must be cpp or triton, got {wanted!r}")
    return wanted


def measured() -> dict[str, dict[str, int]]:
    """Return the numbers of rows by architecture and op; what the user measured goes first."""
    rows: dict[str, dict[str, int]] = {}
    for path in (
        p for folder in reversed(folders()) for p in sorted(folder.glob("gpu/cuda*.json"))
    ):
        try:
            for arch, of_op in _checked(json.loads(path.read_text())):
                rows.setdefault(arch, {}).update(of_op)
        except (OSError, ValueError) as e:
            warnings.warn(f"{path} is not used: {e}", RuntimeWarning, stacklevel=2)
    return rows


def _checked(given: object) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the architectures of a file with their ops and rows."""
    if not isinstance(given, dict):
        raise ValueError("it must be an object of architectures")
    for arch, of_op in given.items():
        if not (arch.startswith("sm_") and arch[3:].isdigit() and isinstance(of_op, dict)):
            raise ValueError(f"expected architectures such as sm_90, got {arch!r}")
        for op, rows in of_op.items():
            is_number = isinstance(rows, int) and not isinstance(rows, bool)
            if not is_number or not 0 <= rows <= _NO_LIMIT:
                raise ValueError(f"rows of {op} must be a number of 0 to 2^62, got {rows!r}")
        yield arch, of_op


def configure(library: Path) -> None:
    """Tell the CUDA part which calls it computes.

    Args:
        library: the loaded library.

    Raises:
        ValueError: ``LLMOS_CUDA`` is neither "cpp" nor "triton".
    """
    forced = mode()
    rows = measured()
    if forced:
        rows = {_EVERY_ARCH: {_EVERY_OP: _NO_LIMIT if forced == "cpp" else -1}}
    set_rows = ctypes.CDLL(str(library)).llmos_cuda_rows
    set_rows.argtypes = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
    for arch, of_op in rows.items():
        for op, most in of_op.items():
            set_rows(op.encode(), int(arch[3:]), most)  # An op that it lacks is Triton's anyway.
