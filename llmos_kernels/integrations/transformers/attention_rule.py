"""The rule of ``optimize`` for the attention of Hugging Face models.

The attention is a name in the configs of a model.  The rule sets it to "llmos", and proves on the
whole model that the outputs stay the same.
"""

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from llmos_kernels._core.numerics import Compared, Wide
from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.integrations.transformers.attention import NAME, attention
from llmos_kernels.swap.calls import ModelRun, ModuleCall, tensors_in
from llmos_kernels.swap.proof import DRAWS, largest_of
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules.rule import (
    ModelCandidate,
    ModelRule,
    ancestors,
    why_untouchable,
)
from llmos_kernels.swap.timing import Timing, compare, kind

#: The attribute of a changed model that holds the names of the attention it had before.
_MARK = "_llmos_attention_before"
#: Names that transformers chooses by itself. Any other name is the choice of the user.
_DEFAULT_NAMES = ("eager", "sdpa", NAME)
#: The sequence length of example calls.
_TOKENS = 12
#: Batch size and sequence length of the calls on which a model is timed whose inputs are not known.
_SIZES = ((1, 8), (2, 128))


class TransformersAttentionRule(ModelRule):
    """Chooses the attention "llmos" in models that take theirs from ``AttentionInterface``."""

    def candidates(self, model: nn.Module) -> Iterator[ModelCandidate]:
        """Yield the outermost Hugging Face models in ``model`` that do not use "llmos" yet."""
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if not isinstance(module, PreTrainedModel) or module in inside:
                continue
            inside.update(module.modules())
            if set(_names(module)) != {NAME}:
                shown = f"attention of {type(module).__name__}"
                why = why_no_attention(module, ancestors(model, name))
                yield ModelCandidate(name, module, self, shown, why)

    def prove(self, model: Any, captured: list[ModuleCall]) -> tuple[float, list[Timing]]:
        """Return the largest error of the outputs over its budget, in eval mode, and the times.

        Args:
            model: a Hugging Face model.
            captured: how it was called; empty: example calls are drawn.
        """
        error = largest_error(model, captured[:1] or example_calls(model))
        if not error <= 1:
            return error, []
        return error, _timings(model, captured or [example_calls(model, *s)[0] for s in _SIZES])

    def switch(self, model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return functions that choose "llmos", and the names that were chosen before."""
        configs, before, earlier = _configs(model), _names(model), model.__dict__.get(_MARK)
        model.set_attn_implementation(NAME)
        ours = [NAME if name == NAME else name for name in _names(model)]
        _put(model, before)
        names = zip(before, earlier or before, strict=True)
        mark = [old if name == NAME else name for name, old in names]

        def put(names: list[str], mark: list[str] | None) -> None:
            for config, name in zip(configs, names, strict=True):
                config._attn_implementation = name
            if mark is None:
                model.__dict__.pop(_MARK, None)
            else:
                model.__dict__[_MARK] = mark

        return partial(put, ours, mark), partial(put, before, earlier)

    def restore(self, model: nn.Module) -> None:
        """Choose the attention of before in every model inside ``model``.

        A name that was chosen since stays.
        """
        for module in model.modules():
            if _MARK in module.__dict__:
                before = module.__dict__.pop(_MARK)
                names = zip(before, _names(module), strict=True)
                _put(module, [old if name == NAME else name for old, name in names])


def why_no_attention(model: Any, around: list[nn.Module]) -> str:
    """Return why the attention of ``model`` cannot be changed, or an empty string."""
    why = why_untouchable(model, around)
    if why:
        return why
    for module in model.modules():
        if module._compiled_call_impl is not None:
            return "a part of it is compiled: optimize before torch.compile"
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            return f"{type(module).__name__} does not take its attention from AttentionInterface"
    for name in _names(model):
        if name not in _DEFAULT_NAMES:
            return f"its attention is {name!r}, chosen by name"
    for config in _configs(model):
        if getattr(config, "output_attentions", False):
            return "its config has output_attentions, which transformers allows with eager only"
    for p in model.parameters():
        if p.is_floating_point() and p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    return ""


def largest_error(model: Any, calls: list[ModuleCall]) -> float:
    """Return the largest error of the outputs over its budget, in eval mode.

    The reference is a copy in float64 with transformers' eager attention, and the budget comes from
    that attention in the model's dtype. Padded positions are left out: with left padding and a
    causal mask they see no key, of which eager attention makes numbers without a meaning. A call
    that misses its budget is judged together with others, whose positions are in another order
    (``proof.largest_of``).

    Args:
        model: a Hugging Face model.
        calls: its inputs.
    """
    before = _names(model)
    exact, stock = _frozen(model, torch.float64), _frozen(model)

    def results(call: ModuleCall) -> Compared:
        model.set_attn_implementation("eager")  # All copies share the config.
        with Wide():
            expected = _outputs(exact, call.map(_double))
        eager = _outputs(stock, call)
        model.set_attn_implementation(NAME)
        actual = _outputs(stock, call)
        if not len(actual) == len(eager) == len(expected):
            raise ValueError("it returns other things than with eager attention")
        compared = zip(actual, expected, eager, strict=True)
        return {f"output {i}": c for i, c in enumerate(compared)}

    try:
        return max(
            largest_of(results(c), (results(_reordered(c)) for _ in range(DRAWS))) for c in calls
        )
    finally:
        _put(model, before)


def _reordered(call: ModuleCall) -> ModuleCall:
    """Return ``call`` with the positions of its tensors, [batch, length, ...], in another order.

    Tensors with the same batch and length get the same order.
    """
    orders: dict[torch.Size, Tensor] = {}

    def reordered(t: Tensor) -> Tensor:
        if t.ndim < 2:
            return t
        order = orders.setdefault(t.shape[:2], torch.randperm(t.shape[1], device=t.device))
        return t[:, order]

    return call.map(reordered)


def _timings(model: Any, calls: list[ModuleCall]) -> list[Timing]:
    """Return times of attention modules with the attention of before and with "llmos".

    One module of each kind is timed: a copy in eval mode, on the inputs that it gets when the model
    runs ``calls``; for a model in train mode also with the gradients of its parameters.
    """
    copied: Any = _frozen(model)
    on, off = TransformersAttentionRule().switch(copied)
    found = []
    try:
        for call in calls:
            run = ModelRun(copied, call)
            on()
            modules = attending(run)
            given = []
            for choose in (off, on):  # The two may get different masks.
                choose()
                given.append(_first_calls(modules, run))
            kinds: dict[Hashable, nn.Module] = {}
            for m in modules:
                kinds.setdefault(kind(m, type(m), {}, [g[m] for g in given]), m)
            for m in kinds.values():
                runs = [ModelRun(m, g[m]) for g in given]
                for backward in (False, True)[: 1 + model.training]:
                    before, after = (
                        partial(_run_with, *side, backward)
                        for side in zip((off, on), runs, strict=True)
                    )
                    found.append(compare(before, after, runs[0].call.rows, backward))
    finally:
        off()  # The copy shares the config with the model.
    return found


def _run_with(choose: Callable[[], None], run: ModelRun, backward: bool) -> None:
    choose()
    run(backward)


def attending(run: Callable[[], object]) -> list[nn.Module]:
    """Return the modules that call the attention "llmos" in ``run``."""
    found: dict[nn.Module, None] = {}

    def remember(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        found[module] = None
        return attention(module, *args, **kwargs)

    AttentionInterface.register(NAME, remember)
    try:
        run()
    finally:
        AttentionInterface.register(NAME, attention)
    return list(found)


@contextlib.contextmanager
def chosen(model: Any) -> Iterator[None]:
    """Choose "llmos" in a ``with`` block."""
    before = _names(model)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        _put(model, before)


def _first_calls(modules: list[nn.Module], run: ModelRun) -> dict[nn.Module, ModuleCall]:
    """Return the first call of each of ``modules`` in ``run``, with copies of its arguments."""
    found: dict[nn.Module, ModuleCall] = {}

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in found:
            found[module] = ModuleCall(args, kwargs).copied()

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _configs(model: nn.Module) -> list[Any]:
    """Return every config that names an attention for a part of ``model``, outer ones first."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        found[id(config)] = config
        for name in config.sub_configs:
            inner = getattr(config, name, None)
            if inner is not None and id(inner) not in found:
                add(inner)

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in found:
            add(module.config)
    return list(found.values())


def _names(model: nn.Module) -> list[str]:
    """Return the name of the attention in each of ``_configs``."""
    return [config._attn_implementation for config in _configs(model)]


def _put(model: nn.Module, names: list[str]) -> None:
    """Set the name of the attention in each of ``_configs``."""
    for config, name in zip(_configs(model), names, strict=True):
        config._attn_implementation = name


def _frozen(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of ``model`` in eval mode."""
    copy = replica(model, dtype=dtype)
    for module in copy.modules():
        module.training = False
    return copy


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def example_calls(model: Any, batch: int = 2, length: int = _TOKENS) -> list[ModuleCall]:
    """Return two calls with random tokens [batch, length]: without a mask, and with left padding.

    Raises:
        ValueError: the model takes other inputs than tokens.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, int):
        raise ValueError(f"the inputs of {type(model).__name__} are unknown: pass inputs=")
    ids = torch.randint(vocabulary, (batch, length), device=model.device)
    given = {"input_ids": ids}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        given["decoder_input_ids"] = ids.flip(0)
    mask = torch.ones_like(ids)
    mask[-1, : length // 3] = 0
    return [ModuleCall(kwargs=given), ModuleCall(kwargs=given | {"attention_mask": mask})]


def _outputs(model: nn.Module, call: ModuleCall) -> list[Tensor]:
    """Return the floating point tensors that ``model`` returns, without padded positions."""
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    names = ("attention_mask", "decoder_attention_mask")
    masks = [bound[n].bool() for n in names if isinstance(bound.get(n), Tensor)]
    with torch.no_grad():
        found = list(tensors_in(call.on(model)))
    if not found:
        raise ValueError("it returns no floating point tensors to compare")
    for mask in masks:
        found = [t[mask] if t.shape[:2] == mask.shape else t for t in found]
    return found
