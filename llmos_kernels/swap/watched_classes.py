"""Copies of modules and other objects that record what a forward reads of them."""

from typing import Any

from torch import nn

from llmos_kernels.swap.traced_values import Value

WATCH = "_llmos_watch"
#: Attributes of modules that hold no data of the model.
_INNER = frozenset(vars(nn.Module())) - {"training"}
#: What ``nn.Module.__setattr__`` keeps elsewhere than in plain attributes.
_REGISTERED = ("_parameters", "_buffers", "_modules")
_CLASSES: dict[tuple[type, bool], type] = {}


def watching_class(cls: Any, is_leaf: bool = False) -> Any:
    """Return a subclass of ``cls`` whose instances record what is read of them."""
    if (cls, is_leaf) in _CLASSES:
        return _CLASSES[cls, is_leaf]

    def __getattribute__(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name[:2] == "__" or name == WATCH or name in _INNER:
            return value
        tracer, path = object.__getattribute__(self, "__dict__")[WATCH]
        owner = getattr(value, "__self__", None)
        is_class_method = isinstance(owner, type) and isinstance(self, owner)
        if owner is self or is_class_method or isinstance(value, Value):
            return value  # Its own method.
        if WATCH in getattr(value, "__dict__", ()):
            return value
        return tracer.read((*path, name), value)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        own = object.__getattribute__(self, "__dict__")
        tracer, path = own[WATCH]
        is_new = not hasattr(cls, name) and not any(name in own[kind] for kind in _REGISTERED)
        is_plain = is_new and cls.__setattr__ is nn.Module.__setattr__
        if is_plain and not path and isinstance(value, Value):
            tracer.set_attribute(name, value)
            own[name] = value
            return
        tracer.effects.append(f"sets an attribute ({name})")

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer, path = object.__getattribute__(self, "__dict__")[WATCH]
        return tracer.create_proxy("call_module", ".".join(path), args, kwargs)

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        """Tell nobody of the class."""

    members: dict[str, Any] = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    if is_leaf:
        members["__call__"] = __call__
    quiet = type("_Quiet", (), {"__init_subclass__": classmethod(__init_subclass__)})
    metaclass: Any = type(cls)
    made = metaclass.__new__(metaclass, cls.__name__, (quiet, cls), members)
    _CLASSES[cls, is_leaf] = made
    return made
