"""Attention weights that are computed when somebody looks at them.

Many models return their weights whether anybody asked for them or not. Fused attention does not
have them, and computing them costs what it has saved.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What may be asked of weights that are not computed.
_KNOWN = frozenset(("device", "dtype", "is_nested", "layout", "ndim", "shape"))
#: What waits for a gradient of the output by the weights, which were not there.
_OF_GRADIENTS = frozenset(("register_hook", "retain_grad"))


class LazyWeights(torch.Tensor):
    """A tensor that is computed by the first function of torch that gets it.

    Args:
        compute: returns the tensor.
        like: a tensor of its dtype and device.
        shape: its shape.
    """

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls: Any, compute: Callable[[], Tensor], like: Tensor, shape: tuple[int, ...]
    ) -> "LazyWeights":
        lazy = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        lazy._compute, lazy._value = compute, None
        return lazy

    def computed(self) -> Tensor:
        """Return the weights as a tensor of torch's own class."""
        if self._value is None:
            assert self._compute is not None
            self._value, self._compute = self._compute(), None
        return self._value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in _OF_GRADIENTS:
            raise RuntimeError(
                f"{name} of attention weights: fused attention has computed its output without"
                " them, so that no gradient passes through; llmos_kernels.restore(model) first"
            )
        return func(*_computed(args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_computed(args), **_computed(kwargs or {}))


def _computed(value: Any) -> Any:
    if isinstance(value, LazyWeights):
        return value.computed()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_computed, value))
    return {k: _computed(v) for k, v in value.items()} if isinstance(value, dict) else value


def lazy_weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the weights of attention, which are computed when they are used.

    Args:
        query: [..., q_len, head_dim].
        key: [..., k_len, head_dim].
        mask: None, bool, True where a key is seen, or what is added to the logits.
        scale: the factor of the logits.

    Returns:
        A ``LazyWeights``. It raises RuntimeError where its arguments were changed in place until
        it is used; in inference mode, where that is not seen, it keeps copies of them.
    """
    if query.is_inference():  # Nothing would tell of a later change.
        query, key = query.clone(), key.clone()
        mask = None if mask is None else mask.clone()
    given = [t for t in (query, key, mask) if t is not None]
    versions = [_version(t) for t in given]
    recorded = torch.is_grad_enabled()

    def compute() -> Tensor:
        if [_version(t) for t in given] != versions:
            raise RuntimeError("attention weights: what they depend on was changed in place")
        with torch.set_grad_enabled(recorded):
            logits = (query @ key.mT) * scale
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -math.inf)
            elif mask is not None:
                logits = logits + mask
            weights = logits.softmax(-1, torch.float32).to(query.dtype)
            return weights.nan_to_num(0.0) if mask is not None else weights

    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    return LazyWeights(compute, query, (*batch, query.shape[-2], key.shape[-2]))


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
