"""The attention of Hugging Face models: a name in their configs, proved on the whole model.

transformers is not imported here: it is optional, and a model's classes tell where it comes from.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmos_kernels._core.registry import KERNEL_DTYPES
from llmos_kernels.swap.calls import Call, ModelRun, tensors_in
from llmos_kernels.swap.proof import DRAWS, Results, largest_of
from llmos_kernels.swap.replica import replica
from llmos_kernels.swap.rules import why_untouchable
from llmos_kernels.swap.timing import Timing, compare, kind

NAME = "llmos"
_MARK = "_llmos_attention_before"
#: What transformers chooses by itself. Any other name is its user's choice.
_OURS_TO_CHANGE = ("eager", "sdpa", NAME)
_TOKENS = 12
#: How many sequences of which length a model is timed on whose inputs are not known.
_SIZES = ((1, 8), (2, 128))


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a ``transformers.PreTrainedModel``."""
    base = ("transformers.modeling_utils", "PreTrainedModel")
    return any((c.__module__, c.__name__) == base for c in type(module).__mro__)


def candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost Hugging Face models in ``model`` whose attention is not ours yet."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if is_pretrained(module) and module not in inside:
            inside.update(module.modules())
            if set(_implementations(module)) != {NAME}:
                yield name, module


def why_not(model: Any, ancestors: list[nn.Module]) -> str:
    """Why the attention of ``model`` has to stay, or an empty string."""
    why = why_untouchable(model, ancestors)
    if why:
        return why
    for module in model.modules():
        if module._compiled_call_impl is not None:
            return "a part of it is compiled: optimize before torch.compile"
        if is_pretrained(module) and not module._can_set_attn_implementation():
            return f"{type(module).__name__} does not take its attention from AttentionInterface"
    for name in _implementations(model):
        if name not in _OURS_TO_CHANGE:
            return f"its attention is {name!r}, chosen by name"
    for p in model.parameters():
        if p.is_floating_point() and p.dtype not in KERNEL_DTYPES:
            return f"no kernel for {p.dtype}"
    return ""


def switch(model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what chooses our attention, and what undoes it; ``restore`` knows what was chosen before."""
    configs, before, earlier = _configs(model), _implementations(model), model.__dict__.get(_MARK)
    _choose(model)
    ours = _implementations(model)
    _put(model, before)
    mark = [e if name == NAME else name for name, e in zip(before, earlier or before, strict=True)]

    def put(names: list[str], mark: list[str] | None) -> None:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        if mark is None:
            model.__dict__.pop(_MARK, None)
        else:
            model.__dict__[_MARK] = mark

    return partial(put, ours, mark), partial(put, before, earlier)


def restore(model: nn.Module) -> None:
    """Undo ``switch`` in every model inside ``model``, but for what was chosen since."""
    for module in model.modules():
        if _MARK in module.__dict__:
            before = module.__dict__.pop(_MARK)
            now = _implementations(module)
            _put(module, [b if n == NAME else n for n, b in zip(now, before, strict=True)])


def prove(model: Any, captured: list[Call]) -> tuple[float, list[Timing]]:
    """The largest error of its outputs over budget, in eval mode, and its times before and after."""
    error = largest_error(model, captured[:1] or example_calls(model))
    if not error <= 1:
        return error, []
    return error, _timings(model, captured or [example_calls(model, *s)[0] for s in _SIZES])


def largest_error(model: Any, calls: list[Call]) -> float:
    """The largest error of its outputs over budget, in eval mode.

    Exact is a copy in float64 with transformers' eager attention. Padded positions are left out:
    causal attention of left padding sees nothing, and eager makes something of that. A call that misses is
    judged with others, its positions in another order (see ``proof.largest_of``).
    """
    before = _implementations(model)
    exact, stock = _frozen(model, torch.float64), _frozen(model)

    def results(call: Call) -> Results:
        model.set_attn_implementation("eager")  # The config is that of all.
        wanted, allowed = _outputs(exact, call.map(_double)), _outputs(stock, call)
        _choose(model)
        actual = _outputs(stock, call)
        if not len(actual) == len(allowed) == len(wanted):
            raise ValueError("it returns other things than with eager attention")
        compared = zip(actual, wanted, allowed, strict=True)
        return {f"output {i}": c for i, c in enumerate(compared)}

    try:
        return max(
            largest_of(results(c), (results(_reordered(c)) for _ in range(DRAWS))) for c in calls
        )
    finally:
        _put(model, before)


def _reordered(call: Call) -> Call:
    """``call`` with the positions of its tensors, [batch, length, ...], in another order, alike in all."""
    orders: dict[torch.Size, Tensor] = {}

    def reordered(t: Tensor) -> Tensor:
        if t.ndim < 2:
            return t
        order = orders.setdefault(t.shape[:2], torch.randperm(t.shape[1], device=t.device))
        return t[:, order]

    return call.map(reordered)


def _timings(model: Any, calls: list[Call]) -> list[Timing]:
    """How long its attention modules take with the attention it has and with ours, one of each kind: copies
    in eval mode, on what they get when the model runs ``calls``; of a model that is training with the
    gradients of their parameters, too."""
    copied = _frozen(model)
    on, off = switch(copied)
    found = []
    try:
        for call in calls:
            run = ModelRun(copied, call)
            on()
            modules = _attending(run)
            given = []
            for choose in (off, on):  # Their masks may differ.
                choose()
                given.append(_first_calls(modules, run))
            kinds: dict[Hashable, nn.Module] = {}
            for m in modules:
                kinds.setdefault(kind(m, type(m), {}, [g[m] for g in given]), m)
            for m in kinds.values():
                runs = [ModelRun(m, g[m]) for g in given]
                for backward in (False, True)[: 1 + model.training]:
                    before, after = (
                        partial(_chosen, *side, backward)
                        for side in zip((off, on), runs, strict=True)
                    )
                    found.append(compare(before, after, runs[0].call.rows, backward))
    finally:
        off()  # The config is the model's own.
    return found


def _chosen(choose: Callable[[], None], run: ModelRun, backward: bool) -> None:
    choose()
    run(backward)


def _attending(run: ModelRun) -> list[nn.Module]:
    """The modules that call our attention in ``run``."""
    from transformers import AttentionInterface

    from llmos_kernels.integrations.transformers import attention

    found: dict[nn.Module, None] = {}

    def seen(module, *args, **kwargs):
        found[module] = None
        return attention(module, *args, **kwargs)

    AttentionInterface.register(NAME, seen)
    try:
        run()
    finally:
        AttentionInterface.register(NAME, attention)
    return list(found)


def _first_calls(modules: list[nn.Module], run: ModelRun) -> dict[nn.Module, Call]:
    """How each of ``modules`` is called first in ``run``, as it was before the call."""
    found: dict[nn.Module, Call] = {}

    def remember(module, args, kwargs):
        if module not in found:
            found[module] = Call(args, kwargs).copied()

    handles = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _choose(model: Any) -> None:
    import llmos_kernels.integrations.transformers  # noqa: F401  registers the name

    model.set_attn_implementation(NAME)


def _configs(model: nn.Module) -> list:
    """Every config that names an attention for a part of ``model``, outer ones first."""
    found: dict[int, Any] = {}

    def add(config):
        found[id(config)] = config
        for name in config.sub_configs:
            inner = getattr(config, name, None)
            if inner is not None and id(inner) not in found:
                add(inner)

    for module in model.modules():
        if is_pretrained(module) and id(module.config) not in found:
            add(module.config)
    return list(found.values())


def _implementations(model: nn.Module) -> list[str]:
    return [config._attn_implementation for config in _configs(model)]


def _put(model: nn.Module, names: list[str]) -> None:
    for config, name in zip(_configs(model), names, strict=True):
        config._attn_implementation = name


def _frozen(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    copy = replica(model, dtype=dtype)
    for module in copy.modules():
        module.training = False
    return copy


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def example_calls(model: Any, batch: int = 2, length: int = _TOKENS) -> list[Call]:
    """Random tokens, without a mask and with left padding."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, int):
        raise ValueError(f"the inputs of {type(model).__name__} are unknown: pass inputs=")
    ids = torch.randint(vocabulary, (batch, length), device=model.device)
    given = {"input_ids": ids}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        given["decoder_input_ids"] = ids.flip(0)
    mask = torch.ones_like(ids)
    mask[-1, : length // 3] = 0
    return [Call(kwargs=given), Call(kwargs=given | {"attention_mask": mask})]


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    """The floating point tensors that ``model`` returns, without padded positions."""
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
