"""FLOPs of our ops for ``torch.utils.flop_counter``, which counts 0 for an op without a formula.

torch's registry of formulas takes 0.2 s to import, so they enter it when a program imports it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
#: The formula of each op. It takes the op's arguments and returns a number.
_formulas: dict[Any, Callable[..., int]] = {}


def count_flops(op: torch._ops.OpOverload, formula: Callable[..., int]) -> None:
    """Have torch count ``formula(*arguments)`` FLOPs for each call of ``op``.

    A multiply-accumulate counts as two FLOPs, as in torch. What a kernel computes again in the
    backward does not count.
    """
    packet = op.overloadpacket
    _formulas[packet] = formula
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _register(counter, packet, formula)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register(counter: ModuleType, packet: Any, formula: Callable[..., int]) -> None:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    counter.flop_registry.setdefault(packet, count)


class _WhenImported(MetaPathFinder):
    """Registers all formulas once the counter's module has been imported, and is gone then."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            for packet, formula in _formulas.items():
                _register(module, packet, formula)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
