"""Classes made at run time: a fused forward over the class that it replaces."""

from collections.abc import Callable

import torch


class Derived(torch.nn.Module):
    """What such a class has: where it comes from, and how to make it again.

    ``_replaced`` is the class below it, ``_made_by`` the function that made it and its arguments.
    """

    _replaced: type
    _made_by: tuple[Callable[..., type], tuple]

    def __reduce_ex__(self, protocol):
        # pickle and deepcopy cannot find the class by its name.
        return _new, self._made_by, self.__dict__.copy()


def derive(forward: type, replaced: type, made_by: tuple, **members) -> type:
    """``replaced`` with the forward of ``forward``, a subclass of ``Derived``."""
    own = {"_replaced": replaced, "_made_by": made_by, **members}
    return type(f"Fused{replaced.__name__}", (forward, replaced), own)


def _new(make, arguments) -> torch.nn.Module:
    cls = make(*arguments)
    return cls.__new__(cls)
