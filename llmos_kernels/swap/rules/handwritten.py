"""Modules with a forward of their own, in which the matcher finds attention, feed-forwards, norms.

The forward is traced, with its children as leaves, and just what was found is replaced. What is
not traceable, or holds nothing, stays.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmos_kernels.graph.site import Site
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.code import names_in
from llmos_kernels.swap.forwards import may_have_effects, reaches_outside
from llmos_kernels.swap.generated_class import GeneratedClass, generate_class
from llmos_kernels.swap.plans import NOT_RUN, Plan, Plans, arguments_of, plan_of, run
from llmos_kernels.swap.proof import Replicas, judge
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules._kinks import largest_error_without_kinks
from llmos_kernels.swap.rules.rule import Candidate, Match, Rule, example_batch, tensor_options

#: What code with attention in it names.
_ATTENTION = frozenset(("softmax", "Softmax", "scaled_dot_product_attention"))
#: How many widths of an input are tried where nothing says what it is.
_MAX_WIDTHS = 4


class FusedForward(GeneratedClass):
    """A module with fused calls in its forward, for each kind of arguments that can be traced.

    Any other call runs the forward of the class that was replaced.
    """

    _plans: Plans

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # The backend "llmos" finds the same in the stock code.
            return self._replaced.forward(self, *args, **kwargs)
        arguments = arguments_of(self._replaced, args, kwargs)
        if arguments is not None:
            result = run(self._plans, self, self._replaced, arguments)
            if result is not NOT_RUN:
                return result
        return self._replaced.forward(self, *args, **kwargs)


@functools.cache
def fused_forward(replaced: type) -> type:
    """Return the drop-in subclass of the class ``replaced``."""
    plans: Plans = {}
    return generate_class(FusedForward, replaced, (fused_forward, (replaced,)), _plans=plans)


class HandwrittenRule(Rule):
    """Swaps modules in whose own forward the matcher finds something."""

    def match(self, module: nn.Module) -> Match | None:
        return self.match_called(module, ())

    def match_called(self, module: nn.Module, calls: Sequence[ModuleCall]) -> Match | None:
        cls: Any = type(module)
        if not has_own_forward(module) or reaches_outside(module):
            return None
        drop_in: Any = fused_forward(cls)
        made = (_plan(drop_in._plans, module, cls, call) for call in calls or guesses(module))
        plans = [plan for plan in made if plan is not None]
        sites = tuple(dict.fromkeys(s for p in plans for s in p.found))
        if sites:
            return Match(drop_in, sites=sites)
        missed = [m for p in plans for m in p.missed]
        if not missed or not _ATTENTION & names_in(module):
            return None
        return Match(drop_in, why_not=missed[0])

    def why_not(self, module: Any) -> str:
        rates = [m.p for m in module.children() if isinstance(m, nn.Dropout)]
        bad = next((p for p in rates if not 0 <= p < 1), None)
        return "" if bad is None else f"dropout with p={bad}"

    def example_calls(
        self, candidate: Candidate, size: tuple[int, int] | None = None
    ) -> list[ModuleCall]:
        """Return one call, whose tensors are [batch, length, width]; shorter if it must be."""
        sizes = itertools.chain(guesses(candidate.module, size), guesses(candidate.module))
        found = next(sizes, None)
        if found is None:
            return super().example_calls(candidate, size)
        device = tensor_options(candidate.module)["device"]
        return [found.map(lambda t: torch.randn(t.shape, dtype=t.dtype, device=device))]

    def largest_error(self, candidate: Candidate, call: ModuleCall) -> float:
        """Return the largest error; gradients are compared away from kinks of an activation."""
        drop_in: Any = candidate.drop_in
        plan = _plan(drop_in._plans, candidate.module, type(candidate.module), call)
        for _, site in self._sites(candidate):
            site.has_fused = False
        has_kink = plan is not None and "relu" in plan.activations
        if has_kink and next(guesses(candidate.module), None) is not None:
            return largest_error_without_kinks(candidate, call)
        return judge(self.replicas(candidate), call)

    def used_sites(self, candidate: Candidate) -> tuple[str, ...]:
        """Return the sites whose arguments the fused call takes."""
        used = {where for where, site in self._sites(candidate) if site.has_fused}
        return tuple(s for s in candidate.sites if s in used)

    def _sites(self, candidate: Candidate) -> list[tuple[str, Site]]:
        """Return the sites of all modules of the class, among them the copies that are compared."""
        drop_in: Any = candidate.drop_in
        plans = [p for ps in drop_in._plans.values() for p in ps]
        return [pair for p in plans for pair in zip(p.found, p.sites, strict=True)]

    def replicas(self, candidate: Candidate) -> Replicas:
        """Return the copies to compare, without dropout, also where it is called as a function."""
        found = super().replicas(candidate)
        drop_in: Any = candidate.drop_in
        plans = [p for ps in drop_in._plans.values() for p in ps if p.holds(candidate.module)]
        for plan in plans:
            for path, value in plan.reads:
                if type(value) is not float or value not in plan.dropout:
                    continue
                for copied in (found.exact, found.stock, found.ours):
                    owner = functools.reduce(getattr, path[:-1], copied)
                    if isinstance(owner, nn.Module):
                        vars(owner)[path[-1]] = 0.0
        return found


def _plan(plans: Plans, module: nn.Module, cls: type, call: ModuleCall) -> Plan | None:
    arguments = arguments_of(cls, call.args, call.kwargs)
    if arguments is None:
        return None
    real = tensor_options(module)["device"]

    def on_device(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return tuple(map(on_device, kind))
        return real if kind == torch.device("meta") else kind

    kinds = on_device(arguments.kinds)
    return plan_of(plans, module, cls, arguments._replace(kinds=kinds))


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the class of ``module`` defines a forward, and is not one of torch's."""
    cls: Any = type(module)
    forward = inspect.getattr_static(cls, "forward", None)
    if forward is inspect.getattr_static(nn.Module, "forward") or not inspect.isfunction(forward):
        return False
    places = cls.__module__, forward.__module__
    tops = [str(place).partition(".")[0] for place in places]
    return "torch" not in tops and "llmos_kernels" not in tops


def guesses(module: nn.Module, size: tuple[int, int] | None = None) -> Iterator[ModuleCall]:
    """Yield calls that ``module`` may take, with tensors [batch, length, width] on the meta device.

    Arguments with a default are left out. ``module`` is not called, a copy without memory is.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not needed or any("mask" in name for name in needed) or may_have_effects(module):
        return
    options = tensor_options(module) | {"device": "meta"}
    copied = replica(module, device="meta")
    for width in itertools.islice(_widths(module), _MAX_WIDTHS):
        x = torch.empty(*example_batch(size), width, **options)
        call = ModuleCall(kwargs={name: torch.empty_like(x) for name in needed})
        try:
            with torch.no_grad():
                call.on(copied)
        except Exception:  # It takes something else.
            continue
        yield call
        return


def _widths(module: nn.Module) -> Iterator[int]:
    """Yield the widths of input that the parts of ``module`` have, and its own parameters."""
    found: dict[int, None] = {}
    for part in module.modules():
        width = getattr(part, "in_features", None)
        shape = getattr(part, "normalized_shape", None)
        if isinstance(shape, tuple) and len(shape) == 1:
            width = shape[0]
        if isinstance(width, int) and width not in found:
            found[width] = None
            yield width
    own = (p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 1)
    yield from (width for width in dict.fromkeys(own) if width not in found)
