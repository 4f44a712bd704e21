"""The float weight that an int8 layer shows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class QuantizedLayer(Protocol):
    """A layer without a float weight that can take one."""

    def write_weight(self, value: Tensor) -> None:
        """Quantize ``value`` [out, in] and compute with it from now on."""


class DenseWeight(Tensor):
    """The float weight of an int8 layer, which exists only while somebody holds it.

    It is read like any tensor. Assigning to its ``data`` quantizes the new values into the layer. A
    write in place, also to a view, raises, since it would be lost. Quantizing after each such write
    would not help: a change smaller than half an int8 step would be rounded away.

    A write that torch does not report to Python is lost unseen: through ``numpy()``, DLPack or the
    storage, by a fused optimizer, and in a compiled graph, which reads a plain tensor.
    """

    _layer: QuantizedLayer

    @staticmethod
    def of(layer: QuantizedLayer, values: Tensor) -> "DenseWeight":
        """Return ``values`` [out, in], no inference tensor, as the weight of ``layer``."""
        weight = values.as_subclass(DenseWeight)
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        weights = [a for a in tree_leaves((args, kwargs)) if isinstance(a, DenseWeight)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [w._version for w in weights]
            out = func(*args, **kwargs)
            if versions != [w._version for w in weights]:
                raise RuntimeError(
                    f"{getattr(func, '__name__', func)} writes in place to the float weight of an "
                    "int8 layer, which is made anew each time it is read: assign the whole, "
                    "layer.weight.data = value, and it is quantized (in PEFT, safe_merge=True)"
                )
            return tree_map(lambda result: _with_owner(result, weights), out)

    @property
    def data(self) -> Tensor:
        """The weight without its history; assigning quantizes the new values into the layer."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._layer.write_weight(value)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return _plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)


def _plain(weight: DenseWeight) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.as_subclass(Tensor)


def _with_owner(result: Any, weights: Sequence[DenseWeight]) -> Any:
    """Return ``result``, as a ``DenseWeight`` if it is a view of one of ``weights``."""
    if type(result) is Tensor:
        storage = result.untyped_storage()._cdata
        for weight in weights:
            if weight.untyped_storage()._cdata == storage:
                return DenseWeight.of(weight._layer, result)
    return result
