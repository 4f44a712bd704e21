"""Error classes of ops that are also the RuntimeError that torch raises in their place.

A ValueError or TypeError says what is wrong; being a RuntimeError as well, it is caught by code
that was written for torch's functions.
"""


class ArgumentError(ValueError, RuntimeError):
    """Shapes or devices disagree, or a number is out of its range."""


class DtypeError(TypeError, RuntimeError):
    """A dtype is not supported, or the dtypes of the arguments disagree."""
