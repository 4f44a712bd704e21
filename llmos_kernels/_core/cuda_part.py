"""How many rows CUDA C++ computes itself: beyond these its ops hand a call to Triton's launcher.

Measured numbers of rows are in ``tuned/gpu/cuda*.json``, by architecture, op and width of rows:

    {"sm_90": {"layer_norm_forward": {"256": 1024, "1024": 512}, "int8_quantize": 256}}

Of two widths the wider counts for what is between them, and for all that is wider; a number alone
counts for every width. Where there is none the extension's own rule answers
(``csrc/cuda/choice.h``). ``LLMOS_CUDA=cpp`` and ``LLMOS_CUDA=triton`` give all calls to one of
them, for measurements.
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


#: The numbers of rows by architecture and op, and then by width.
_Rows = dict[str, dict[str, dict[int, int]]]


def measured() -> _Rows:
    """Return the numbers of rows that are in files; what the user measured goes first."""
    rows: _Rows = {}
    for path in (
        p for folder in reversed(folders()) for p in sorted(folder.glob("gpu/cuda*.json"))
    ):
        try:
            for arch, of_op in _checked(json.loads(path.read_text())):
                rows.setdefault(arch, {}).update(of_op)
        except (OSError, ValueError) as e:
            warnings.warn(f"{path} is not used: {e}", RuntimeWarning, stacklevel=2)
    return rows


def _checked(given: object) -> Iterator[tuple[str, dict[str, dict[int, int]]]]:
    """Yield the architectures of a file with the rows of each op by width."""
    if not isinstance(given, dict):
        raise ValueError("it must be an object of architectures")
    for arch, of_op in given.items():
        if not (arch.startswith("sm_") and arch[3:].isdigit() and isinstance(of_op, dict)):
            raise ValueError(f"expected architectures such as sm_90, got {arch!r}")
        yield arch, {op: dict(_by_width(op, rows)) for op, rows in of_op.items()}


def _by_width(op: str, given: object) -> Iterator[tuple[int, int]]:
    """Yield widths with their numbers of rows."""
    for width, rows in (given if isinstance(given, dict) else {str(_NO_LIMIT): given}).items():
        if not width.isdecimal():
            raise ValueError(f"widths of {op} must be numbers, got {width!r}")
        if not isinstance(rows, int) or isinstance(rows, bool) or not 0 <= rows <= _NO_LIMIT:
            raise ValueError(f"rows of {op} must be a number of 0 to 2^62, got {rows!r}")
        yield min(int(width), _NO_LIMIT), rows


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
        rows = {_EVERY_ARCH: {_EVERY_OP: {_NO_LIMIT: _NO_LIMIT if forced == "cpp" else -1}}}
    set_rows = ctypes.CDLL(str(library)).llmos_cuda_rows
    set_rows.argtypes = ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    for arch, of_op in rows.items():
        for op, of_width in of_op.items():
            for width, most in of_width.items():
                # An op that it lacks is Triton's anyway.
                set_rows(op.encode(), int(arch[3:]), width, most)


def attention_calls(library: Path) -> dict[str, int]:
    """Return how many calls of the encoder layer op on CUDA had their attention by whom.

    Args:
        library: the loaded library.

    Returns:
        Numbers of calls: "torch", its own attention, and "triton", Triton's launcher.
    """
    calls = (ctypes.c_int64 * 2)()
    ctypes.CDLL(str(library)).llmos_cuda_attention_calls(calls)
    return dict(zip(("torch", "triton"), calls, strict=True))
