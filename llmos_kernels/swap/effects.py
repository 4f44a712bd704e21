"""What the code of a forward does besides computing, seen while it runs once.

``forwards.side_effect`` reads the code of a whole forward. Here only the lines that ran count, so
that a forward may have a branch with an effect that is not taken, and functions that it calls are
looked at, too, whichever library they come from.
"""

import dis
import functools
import gc
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from llmos_kernels.swap import outside
from llmos_kernels.swap.calls import PLAIN
from llmos_kernels.swap.forwards import EFFECTS, STATES, changes
from llmos_kernels.swap.outside import Outside

#: Functions of Python that change nothing and depend on their arguments alone.
_HARMLESS = frozenset(
    (
        *("__build_class__", "abs", "all", "any", "bool", "callable", "enumerate", "float"),
        *("getattr", "hasattr", "id", "int", "isinstance", "issubclass", "iter", "len", "list"),
        *("max", "min", "next", "range", "reversed", "round", "slice", "sorted", "str", "sum"),
        *("super", "tuple", "type", "zip"),
    )
)
#: Modules of Python whose functions change nothing.
_HARMLESS_MODULES = frozenset(("math", "operator", "_operator", "_functools", "itertools"))
#: Modules of Python whose code is not looked at.
_HARMLESS_LIBRARIES = frozenset(("enum", "inspect", "typing"))
#: What a function of these modules does for the code that it calls: all of them, or those named.
_AROUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch.utils.checkpoint": ("saves memory by torch.utils.checkpoint", ()),
    "torch.amp.autocast_mode": ("changes autocast", ()),
    "torch.autograd.graph": ("changes what is saved for gradients", ()),
    "torch.utils._contextlib": ("has a with block as a decorator", ("decorate_context",)),
    "contextlib": ("has a with block as a decorator", ("inner",)),
}
#: What the methods of change nothing, but for those whose names say so.
_DATA = (*PLAIN, tuple, list, dict, set, frozenset, type)


class Effects:
    """What a run did and what it depended on.

    Args:
        found: a verb and its object for each effect, such as "sets an attribute (hidden)".
        outside: what was read from outside of the module.
        recorded: what the graph repeats, by line: "" for a change in place of a traced value, and
            the names of attributes that were set.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.outside: list[Outside] = []
        self.recorded: dict[tuple[CodeType, int], set[str]] = {}


@contextmanager
def watching(
    is_ours: Callable[[FrameType], bool], functions: Mapping[CodeType, FunctionType]
) -> Iterator[Effects]:
    """Watch what the code in a ``with`` block does, in this thread.

    Args:
        is_ours: says of a frame whether its code is ours and not looked at. Nor is torch's.
        functions: the functions that are known, by their code, for their closures.
    """
    effects = Effects()
    lines: dict[tuple[CodeType, int], dict[str, Any]] = {}

    def is_foreign(frame: FrameType | None) -> bool:
        if frame is None:
            return False
        top = str(frame.f_globals.get("__name__")).partition(".")[0]
        if top in _HARMLESS_LIBRARIES:
            return True
        if top in sys.stdlib_module_names:  # Of torch's if torch calls it.
            return is_foreign(frame.f_back)
        return top == "torch" or is_ours(frame)

    def trace_call(frame: FrameType, event: str, arg: Any) -> Any:
        name, caller = frame.f_code.co_name, frame.f_back
        if not is_ours(frame):
            effects.found.extend(_of_context(frame))
        if is_foreign(frame):
            if caller is not None and not is_foreign(caller) and _is_torchs(frame):
                effects.found.extend(_of_name(name))
            return None
        lines[frame.f_code, frame.f_lineno] = frame.f_globals
        return trace_line

    def trace_line(frame: FrameType, event: str, arg: Any) -> Any:
        lines[frame.f_code, frame.f_lineno] = frame.f_globals
        return trace_line

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and not is_foreign(frame):
            effects.found.extend(_of_builtin(arg))

    before = sys.gettrace(), sys.getprofile()
    collects = gc.isenabled()
    gc.disable()  # What runs when objects are collected is not the forward's.
    sys.setprofile(profile)
    sys.settrace(trace_call)
    try:
        yield effects
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
        if collects:
            gc.enable()
        for (code, line), variables in lines.items():
            effects.found.extend(_of_line(code, line, effects.recorded.get((code, line), ())))
            instructions = _lines(code).get(line, ())
            effects.outside.extend(outside.of_line(instructions, code, variables, functions))


def _is_torchs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"


def _of_name(name: str) -> Iterator[str]:
    if name in STATES:
        yield f"asks for {name}"
    elif changes(name):
        yield f"calls {name}"


def _of_context(frame: FrameType) -> Iterator[str]:
    """Yield what a function does for the code that it calls, such as a decorator of it."""
    what, names = _AROUND.get(str(frame.f_globals.get("__name__")), ("", ("",)))
    if what and (not names or frame.f_code.co_name in names):
        yield what


def _of_builtin(function: Any) -> Iterator[str]:
    """Yield what calling a function that is not written in Python may do."""
    name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
    top = (getattr(function, "__module__", None) or "").partition(".")[0]
    is_torchs = "torch" in (top, type(owner).__module__.partition(".")[0])
    if is_torchs or (not isinstance(owner, ModuleType) and isinstance(owner, _DATA)):
        yield from _of_name(name)
    elif name not in _HARMLESS and top not in _HARMLESS_MODULES and not name.startswith("__"):
        yield f"uses {name}"


@functools.cache
def _lines(code: CodeType) -> dict[int, list[dis.Instruction]]:
    """Return the instructions of ``code`` by the line that they belong to."""
    found: dict[int, list[dis.Instruction]] = {}
    line = code.co_firstlineno
    starts = dict(dis.findlinestarts(code))
    for instruction in dis.get_instructions(code):
        line = starts.get(instruction.offset) or line
        found.setdefault(line, []).append(instruction)
    return found


def _of_line(code: CodeType, line: int, recorded: Collection[str]) -> Iterator[str]:
    instructions = _lines(code).get(line, ())
    set_here = [i.argval for i in instructions if i.opname == "STORE_ATTR"]
    names = {i.argval for i in instructions if isinstance(i.argval, str)}
    if "is_tensor" in names or ("isinstance" in names and names & {"Tensor", "Parameter"}):
        yield "asks for the class of a tensor"  # A value that is traced has another one.
    for instruction in instructions:
        name, value = instruction.opname, instruction.argval
        if name == "YIELD_VALUE" or (name == "STORE_DEREF" and value in code.co_cellvars):
            continue  # The generators that ran were looked at; the variable is the code's own.
        if name == "STORE_ATTR" and value in recorded and set_here.count(value) == 1:
            continue
        if name in EFFECTS:
            yield f"{EFFECTS[name]} ({value})" if isinstance(value, str) else EFFECTS[name]
        elif "" in recorded:
            continue
        elif name.startswith("INPLACE_") or (name == "BINARY_OP" and "=" in instruction.argrepr):
            yield f"changes a value in place ({instruction.argrepr or name})"
