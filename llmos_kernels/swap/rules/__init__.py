"""The rules of ``optimize``: which modules can be swapped, for what, and why one cannot.

Each rule has a file of its own; ``rule.py`` has their base classes. ``classify`` asks the rules in
turn, once for each module of a model; the first that matches decides.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.swap.calls import ModuleCall
from llmos_kernels.swap.generated_class import GeneratedClass
from llmos_kernels.swap.rules.attention import AttentionRule
from llmos_kernels.swap.rules.bert_layer import BertLayerRule
from llmos_kernels.swap.rules.handwritten import HandwrittenRule, has_own_forward
from llmos_kernels.swap.rules.linear import LinearRule
from llmos_kernels.swap.rules.norm import NormRule
from llmos_kernels.swap.rules.residual import ResidualRule
from llmos_kernels.swap.rules.rms_norm import ModelRMSNormRule
from llmos_kernels.swap.rules.rule import (
    Candidate,
    ModelRule,
    Rule,
    first_line,
    why_untouchable,
)
from llmos_kernels.swap.rules.sequential import SequentialRule
from llmos_kernels.swap.rules.transformer_layer import TransformerLayerRule

__all__ = [
    "RULES",
    "classify",
    "is_swap",
    "model_rules",
    "register_library",
    "set_class",
    "why_not",
]

#: All rules, in the order in which they are asked: first those that know classes by name, then
#: those that look at what a module is made of, last those that run a copy of it.
RULES: list[Rule] = [
    NormRule(),
    LinearRule(),
    AttentionRule(),
    TransformerLayerRule(),
    BertLayerRule(),
    ResidualRule(),
    ModelRMSNormRule(),
    SequentialRule(),
    HandwrittenRule(),
]
#: What loads the rule of a library, by the module and the name of the library's base class.
_LIBRARIES: dict[tuple[str, str], Callable[[], ModelRule]] = {}


def classify(
    module: nn.Module,
    name: str = "",
    around: Sequence[nn.Module] = (),
    calls: Sequence[ModuleCall] = (),
) -> Candidate | None:
    """Return what the first rule that knows ``module`` says about it.

    Args:
        module: the module.
        name: its name in its model.
        around: the modules that contain it, outermost first.
        calls: how it is called, with tensors on the meta device, where that is known.

    Returns:
        The ``Candidate``, whose ``why_not`` is empty if the module can be swapped; None if no rule
        knows the module, or if it is fused already.
    """
    if _is_fused(module):
        return None
    if isinstance(module, ScriptModule):
        return Candidate(name, module, RULES[0], type(module), "torch.jit has compiled it")
    lazy = any(map(is_lazy, module.parameters()))
    if lazy and not isinstance(module, LazyModuleMixin):
        return None  # Its parts are looked at one by one.
    kept: Candidate | None = None
    for rule in RULES:
        try:
            match = rule.match_called(module, calls)
            if match is not None:
                subclass = _is_subclass(module, rule)
                if subclass and has_own_forward(module):
                    # What its forward computes is for the last rule to see.
                    kept = Candidate(name, module, rule, match.drop_in, subclass)
                    continue
                why = match.why_not or why_not(module, rule, around)
                why = why or _why_no_instance(module, match.drop_in)
                width, sites = match.input_width, match.sites
                return Candidate(name, module, rule, match.drop_in, why, width, sites)
        except Exception as e:  # Whatever a user's class does is a reason to keep it.
            why = f"could not be examined: {type(e).__name__}: {first_line(e)}"
            return Candidate(name, module, rule, type(module), why)
    return kept


def why_not(module: nn.Module, rule: Rule, around: Sequence[nn.Module] = ()) -> str:
    """Return why a ``module`` that ``rule`` matches cannot be swapped, or an empty string.

    Args:
        module: the module.
        rule: the rule that matches it, which is asked last.
        around: the modules that contain ``module``, outermost first.

    Returns:
        The reason as the report shows it, or an empty string.
    """
    known = tuple(_drop_ins())
    if isinstance(module, LazyModuleMixin):
        return "it has no shape before it has run: run the model once, then optimize"
    if why := _is_subclass(module, rule):
        return why
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    why = why_untouchable(module, around)
    if why:
        return why
    parts = [m for m in module.modules() if isinstance(m, known)]
    for p in (p for m in parts or [module] for p in m.parameters()):
        if p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    return rule.why_not(module)


def _is_subclass(module: nn.Module, rule: Rule) -> str:
    """Return why a subclass of a class that rules know is no such class; else an empty string.

    The rule for code written by hand goes by what the code does.
    """
    cls = type(module)
    original = next((c for c in _drop_ins() if isinstance(module, c)), None)
    if original is None or cls is original or isinstance(rule, HandwrittenRule):
        return ""
    return f"{cls.__name__} is a subclass of {original.__name__} and may compute something else"


def set_class(module: nn.Module, cls: type) -> None:
    """Give ``module`` the class ``cls``, without calling a ``__setattr__`` that it may define.

    Args:
        module: the module, which is changed in place.
        cls: a class whose instances have the same memory layout.

    Raises:
        TypeError: the layouts differ.
    """
    object.__setattr__(module, "__class__", cls)


def _why_no_instance(module: nn.Module, drop_in: type) -> str:
    """Return why ``module`` cannot become an instance of ``drop_in``, or an empty string."""
    cls: Any = type(module)
    try:
        set_class(object.__new__(cls), drop_in)
    except (AttributeError, TypeError) as e:
        return f"its class cannot be changed: {first_line(e)}"
    return ""


def is_swap(cls: type, original: type) -> bool:
    """Return True if ``cls`` is the drop-in of ``original``.

    Args:
        cls: the class of a module that was swapped.
        original: the class that it had before.

    Returns:
        False if another tool has changed the class since.
    """
    return cls.__dict__.get("_replaced") is original or cls is _drop_ins().get(original)


def register_library(module: str, name: str, load: Callable[[], ModelRule]) -> None:
    """Add the rule of an integration, for models of another library.

    The library and the rule are not imported before such a model is optimized.

    Args:
        module: the module of the library that defines the base class of its models.
        name: the name of that base class.
        load: imports and returns the rule.

    Example:
        >>> register_library("transformers.modeling_utils", "PreTrainedModel", load_attention_rule)
    """
    _LIBRARIES[module, name] = load


def model_rules(model: nn.Module) -> list[ModelRule]:
    """Return the rules of the libraries that modules in ``model`` come from.

    Args:
        model: the model that is optimized or restored.

    Returns:
        The rules that ``register_library`` has added for base classes of modules in ``model``.
    """
    imported = {base: load for base, load in _LIBRARIES.items() if base[0] in sys.modules}
    if not imported:
        return []
    classes = {c for m in model.modules() for c in type(m).__mro__}
    bases = {(c.__module__, c.__name__) for c in classes}
    return [load() for base, load in imported.items() if base in bases]


def _drop_ins() -> dict[type, type]:
    """Return the drop-in of every class that a rule knows by name."""
    return {original: drop_in for rule in RULES for original, drop_in in rule.classes.items()}


def _is_fused(module: nn.Module) -> bool:
    """Return whether ``module`` is one of this package already."""
    fused = [cls for rule in RULES for cls in (*rule.classes.values(), *rule.fused)]
    return isinstance(module, (GeneratedClass, *fused))
