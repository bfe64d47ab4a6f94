"""Compute the output size of an upsampling op in Python.

The C++ code that turns scale factors into an output size asks for integer sizes, which would fix
symbolic ones. It then calls another overload of the operator, with the size; so does this file.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch

from autopipe.passes._torch import OpOverload

EXACT = 2**10
"""Up to this denominator, a factor times a size is exact in floating point."""


def with_output_size(target: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Return the call of the overload that gets an output size, if a call has symbolic sizes.

    Args:
        target: an operator or function.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Target, arguments and keyword arguments; those given, if it is no upsampling op, all sizes
        are numbers, or the output size is no simple expression in the input's.
    """
    if not _takes_factors(target):
        return target, args, kwargs
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, size, factors = given["input"], given.get("output_size"), given.get("scale_factors") or ()
    sizes = x.shape[2:]
    if not any(isinstance(n, torch.SymInt) for n in (*sizes, *(size or ()))):
        return target, args, kwargs
    if size is None:
        ratios = [f.as_integer_ratio() for f in factors]
        if any(denominator > EXACT for _, denominator in ratios):
            return target, args, kwargs
        size = [n * p // q for n, (p, q) in zip(sizes, ratios, strict=True)]
    corners = [given["align_corners"]] if "align_corners" in given else []
    steps = factors or repeat(None, len(sizes))
    return target.overloadpacket.default, (x, size, *corners, *steps), {}


def _takes_factors(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target._overloadname != "vec":
        return False
    return any(argument.name == "scale_factors" for argument in target._schema.arguments)
