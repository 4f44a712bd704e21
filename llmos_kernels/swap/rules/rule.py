"""The base classes of rules, and helpers that rules share.

``Rule`` swaps the class of a module, ``ModelRule`` changes something that belongs to a whole model
of another library.  A rule is added to ``llmos_kernels.swap.rules.RULES``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.proof import Replicas, judge
from llmos_kernels.swap.timing import Timing

_EXAMPLE_ROWS = 16


class Match(NamedTuple):
    """The result of a rule for a module that it knows.

    Args:
        drop_in: the class that replaces that of the module.
        input_width: the number of features of the module's input, where no attribute of it says so.
        sites: what is replaced inside of its forward, for the report.
        why_not: why the module cannot be swapped, where that is known already.
    """

    drop_in: type
    input_width: int = 0
    sites: tuple[str, ...] = ()
    why_not: str = ""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One module that a rule knows. It is classified once, and this result is passed along.

    Args:
        name: the name of the module in its model; empty for the model itself.
        module: the module, not swapped yet.
        rule: the rule that knows it.
        drop_in: the class that replaces that of the module.
        why_not: why the module cannot be swapped, or an empty string.
        input_width: the number of features of its input, where no attribute of it says so.
        sites: what is replaced inside of its forward.
    """

    name: str
    module: nn.Module
    rule: "Rule"
    drop_in: type
    why_not: str = ""
    input_width: int = 0
    sites: tuple[str, ...] = ()

    def example_calls(self, size: tuple[int, int] | None = None) -> list[ModuleCall]:
        """Return random calls of the module, see ``Rule.example_calls``."""
        return self.rule.example_calls(self, size)

    def largest_error(self, call: ModuleCall) -> float:
        """Return the largest error of the drop-in over its budget, see ``Rule.largest_error``."""
        return self.rule.largest_error(self, call)


class Rule:
    """One kind of module that ``optimize`` swaps: how it is recognised, and how a swap is proved.

    A rule for classes known by name sets ``classes`` and defines ``example_calls``:

    Example:
        >>> class DoubleRule(Rule):
        ...     classes: ClassVar = {Double: FusedDouble}
        ...
        ...     def example_calls(self, candidate, size=None):
        ...         return [ModuleCall((torch.randn(example_rows(size), 8),))]
        >>> rules.RULES.append(DoubleRule())
    """

    #: Classes and their drop-ins. A subclass of such a class is a candidate that is not swapped.
    classes: ClassVar[Mapping[type, type]] = {}
    #: Further classes of this package that are fused already.
    fused: ClassVar[tuple[type, ...]] = ()

    def match(self, module: nn.Module) -> Match | None:
        """Return the drop-in of ``module``, or None where the rule does not know the module."""
        for original, drop_in in self.classes.items():
            if isinstance(module, original):
                return Match(drop_in)
        return None

    def match_called(self, module: nn.Module, calls: Sequence[ModuleCall]) -> Match | None:
        """Return what ``match`` does, for a module that is called as in ``calls``.

        Args:
            module: the module.
            calls: calls with tensors on the meta device; empty where none are known.
        """
        return self.match(module)

    def why_not(self, module: Any) -> str:
        """Return why a module that matches cannot be swapped, or an empty string.

        Reasons that hold for every rule (``rules.why_not``) have been looked for before.
        """
        return ""

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return random calls of the candidate, in its dtype and on its device.

        Args:
            candidate: the module.
            size: batch size and sequence length. A module of rows gets their product as its number
                of rows. Default: 16 rows, or a batch of 4 sequences of 33 positions.

        Raises:
            ValueError: the shape of the inputs cannot be known.
        """
        name = type(candidate.module).__name__
        raise ValueError(f"the inputs of {name} are unknown: pass inputs=")

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error of outputs and gradients over their budget.

        They are compared in eval and in train mode.

        A rule overrides this where gradients or outputs are not comparable on every input.
        """
        return judge(self.replicas(candidate), call)

    def used_sites(self, candidate: Candidate) -> tuple[str, ...]:
        """Return those of the candidate's sites where the fused call ran in the last proof."""
        return candidate.sites

    def replicas(self, candidate: Candidate) -> Replicas:
        """Return the copies that a proof compares: in float64, as it is, and the drop-in."""
        return Replicas.of(candidate.module, candidate.drop_in)


class ModelCandidate(NamedTuple):
    """One model that a ``ModelRule`` knows.

    Args:
        name: its name in the model that is optimized; empty for that model itself.
        model: the model.
        rule: the rule that knows it.
        shown: what a report calls the part that changes.
        why_not: why it cannot be changed, or an empty string.
    """

    name: str
    model: nn.Module
    rule: "ModelRule"
    shown: str
    why_not: str = ""


class ModelRule(ABC):
    """A change to a whole model of another library, proved and timed on the whole model.

    Integrations register such rules with ``rules.register_library``.
    """

    @abstractmethod
    def candidates(self, model: nn.Module) -> Iterator[ModelCandidate]:
        """Yield the models in ``model`` that the rule could change."""

    @abstractmethod
    def prove(self, model: nn.Module, captured: list[ModuleCall]) -> tuple[float, list[Timing]]:
        """Return the largest error over its budget, and times before and after.

        Args:
            model: the model of a candidate.
            captured: how it was called when the user's inputs ran; empty without such inputs.
        """

    @abstractmethod
    def switch(self, model: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return a function that makes the change, and one that undoes it."""

    @abstractmethod
    def restore(self, model: nn.Module) -> None:
        """Undo the change in every model inside ``model``."""


def ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that contain the module ``name`` of ``model``, outermost first."""
    found, module = [], model
    for part in name.split(".") if name else []:
        found.append(module)
        module = getattr(module, part)
    return found


def why_untouchable(module: nn.Module, around: Sequence[nn.Module]) -> str:
    """Return why no rule at all can change ``module``, or an empty string.

    Args:
        module: the module.
        around: the modules that contain it, see ``ancestors``.
    """
    for outer in [*around, module]:
        if type(outer).__name__ == "OptimizedModule" or outer._compiled_call_impl is not None:
            return "it is compiled: optimize before torch.compile"
        if type(outer).__name__ == "FullyShardedDataParallel":
            return "its parameters are sharded by FSDP: optimize before wrapping"
    for name, p in module.named_parameters():
        if type(p.data) is not torch.Tensor:
            return f"{name} is a {type(p.data).__name__}: optimize before sharding or quantizing"
        if p.is_meta:
            return f"{name} is on the meta device"
    return ""


def first_line(e: Exception) -> str:
    """Return the first line of the message of ``e``."""
    return next(iter(str(e).splitlines()), "")


def tensor_options(module: nn.Module) -> dict[str, Any]:
    """Return device and dtype of the first parameter, as keyword arguments of ``torch.randn``."""
    parameter = next(module.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    return {"device": parameter.device, "dtype": parameter.dtype}


def example_rows(size: tuple[int, int] | None) -> int:
    """Return the number of rows of an example call, see ``Rule.example_calls``."""
    return _EXAMPLE_ROWS if size is None else math.prod(size)


def example_batch(size: tuple[int, int] | None) -> tuple[int, int]:
    """Return batch size and sequence length of an example call, see ``Rule.example_calls``."""
    return size or (4, 2 * _EXAMPLE_ROWS + 1)
