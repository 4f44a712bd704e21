"""Products written as ``torch.einsum`` in the form of ``torch.matmul``."""

from typing import NamedTuple

#: An order of dimensions for ``Tensor.permute``; None where they are in that order already.
Order = tuple[int, ...] | None


class Product(NamedTuple):
    """How operands and result of an einsum are permuted to be those of a matrix product.

    Args:
        left: brings the first operand to [..., rows, inner].
        right: brings the second operand to [..., columns, inner], or with ``inner_rows`` to
            [..., inner, columns].
        result: brings [..., rows, columns] to the result.
        rank: the number of dimensions of all three.
    """

    left: Order
    right: Order
    result: Order
    rank: int


def product(equation: str, inner_rows: bool) -> Product | None:
    """Return how ``equation``, of two operands, is a batched matrix product; None if it is not.

    Every dimension but the three of the matrices is one of the batch, in both operands.

    Args:
        equation: such as "bhid,bhjd->bhij".
        inner_rows: whether the right matrix is wanted as [inner, columns].
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    a, comma, b = inputs.partition(",")
    letters = [a, b, out]
    if not (arrow and comma) or not all(s.isalpha() and len(set(s)) == len(s) for s in letters):
        return None
    batch = [c for c in out if c in a and c in b]
    rows = [c for c in out if c in a and c not in b]
    columns = [c for c in out if c in b and c not in a]
    inner = [c for c in a if c in b and c not in out]
    known = {*batch, *rows, *columns, *inner}
    if not len(rows) == len(columns) == len(inner) == 1 or not {*a, *b, *out} <= known:
        return None
    right = [*batch, *inner, *columns] if inner_rows else [*batch, *columns, *inner]
    wanted = [*batch, *rows, *columns]
    return Product(
        _order(a, [*batch, *rows, *inner]),
        _order(b, right),
        _order("".join(wanted), list(out)),
        len(out),
    )


def _order(given: str, wanted: list[str]) -> Order:
    order = tuple(given.index(c) for c in wanted)
    return None if order == tuple(range(len(order))) else order
