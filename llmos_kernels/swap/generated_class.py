"""Classes made at run time: a fused forward mixed into the class whose modules it takes over.

A model's own class (a residual block, an RMS norm) keeps its name, attributes and methods; only its
``forward`` is another one.  ``isinstance`` with the original class holds.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


class GeneratedClass(torch.nn.Module):
    """Base of the fused forwards that ``generate_class`` mixes into other classes.

    A subclass defines ``forward``.  Where its arguments are not what the fused computation takes,
    it calls ``self._replaced.forward``; one whose class may replace a generated one, calls
    ``super().forward``.
    """

    #: The name of the first argument of the original forward, by which it may be given.
    _first_argument: str | None
    #: The original class, which is also the second base of the generated one.
    _replaced: Any
    #: The function that generated the class, and its arguments.
    _made_by: tuple[Callable[..., type], tuple[Any, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do not pass a generated class on to the ``__init_subclass__`` of the original one.

        That may want arguments, or enter the class in a registry of the user's.
        """

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle and deepcopy cannot find the class by its name, so they generate it again.
        if _has_reduce(self._replaced):
            made = self._replaced.__reduce_ex__(self, protocol)
            if not isinstance(made, tuple) or made[0] is not type(self):
                return made
            return _called_instance, (*self._made_by, *made[1]), *made[2:]
        state = object.__getattribute__(self, "__dict__").copy()
        if _defines(self._replaced, "__getstate__"):
            state = self._replaced.__getstate__(self)
        return _new_instance, self._made_by, state


def generate_class(
    forward: type[GeneratedClass],
    replaced: Any,
    made_by: tuple[Callable[..., type], tuple[Any, ...]],
    **members: Any,
) -> type:
    """Return a subclass of ``replaced`` with the ``forward`` of another class.

    What asks for the signature of its ``forward``, such as ``torch.export``, sees the original's.

    Args:
        forward: the subclass of ``GeneratedClass`` that defines the fused forward.
        replaced: the original class.
        made_by: the function that calls this one, and its arguments. They are pickled in place of
            the class, so both must be picklable.
        members: class attributes of the new class.

    Returns:
        The class ``Fused<name of replaced>``.
    """
    fused: Any = forward.forward
    own_forward = FunctionType(
        fused.__code__, fused.__globals__, fused.__name__, fused.__defaults__, fused.__closure__
    )
    signature = inspect.signature(replaced.forward)
    own_forward.__signature__ = signature  # type: ignore[attr-defined]
    _, *parameters = signature.parameters.values()
    is_named = parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    members["_first_argument"] = parameters[0].name if is_named else None
    # What a generated class replaces stays so for its own forward, if it is replaced in turn.
    original = replaced._replaced if issubclass(replaced, GeneratedClass) else replaced
    attributes = {"_replaced": original, "_made_by": made_by, "forward": own_forward, **members}
    # Not by calling the metaclass, whose ``__init__`` may enter the class in a user's registry.
    metaclass: Any = type(replaced)
    return metaclass.__new__(
        metaclass, f"Fused{replaced.__name__}", (forward, replaced), attributes
    )


def named_as_before(cls: Any) -> type:
    """Return a generated class under the name of the original.

    transformers looks models up, and saves them, by the names of their classes.
    """
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(cls, attribute, getattr(cls._replaced, attribute))
    return cls


def recipe(cls: Any) -> Any:
    """Return what ``class_of`` makes ``cls`` of, and pickle takes."""
    return cls._made_by if issubclass(cls, GeneratedClass) else cls


def class_of(made_by: Any) -> type:
    """Return the class of a ``recipe``."""
    return made_by if isinstance(made_by, type) else made_by[0](*made_by[1])


def checkpointed(cls: type) -> type:
    """Return a generated class whose forward transformers checkpoints, as it does the original's.

    transformers wraps the forward of each subclass of its layers; the outermost one checkpoints.
    """
    for base in cls.__mro__:
        if base.__name__ == "GradientCheckpointingLayer":
            vars(base)["__init_subclass__"].__func__(cls)
    return cls


def _defines(cls: type, name: str) -> bool:
    """Return True if ``cls`` or a base of it that is neither torch's nor Python's has ``name``."""
    users = (c for c in cls.__mro__ if c not in (torch.nn.Module, object))
    return any(name in vars(c) for c in users)


def _has_reduce(cls: type) -> bool:
    return _defines(cls, "__reduce__") or _defines(cls, "__reduce_ex__")


def _called_instance(
    make: Callable[..., type], arguments: tuple[Any, ...], *given: Any
) -> torch.nn.Module:
    return make(*arguments)(*given)


def _new_instance(make: Callable[..., type], arguments: tuple[Any, ...]) -> torch.nn.Module:
    cls: Any = make(*arguments)
    return cls.__new__(cls)
