"""Wrap the actions of a generated program: what is measured or labelled while one run executes.

The generated functions of a program stay as they are. A run calls copies of the drivers' functions,
whose names for stages' functions (``forward_0``) lead to others. So other runs pay nothing.
"""

from __future__ import annotations

import re
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Action = Callable[..., None]

ACTION = re.compile(r"^(forward|recompute|gradients|weights|backward)_(\d+)$")
"""Name of the generated function that runs one action: its kind and its stage."""


def with_wrapped_actions(
    driver: Callable[[Any], None], wrap: Callable[[str, Action], Action]
) -> Callable[[Any], None]:
    """Copy a driver's function; the copy calls other functions for actions.

    Args:
        driver: runs the actions of one device.
        wrap: from an action's name and function, called as ``(run, m, compute)``, to what the copy
            calls.
    """
    assert isinstance(driver, FunctionType)
    names = dict(driver.__globals__)
    for name in filter(ACTION.match, driver.__code__.co_names):
        names[name] = wrap(name, names[name])
    return FunctionType(driver.__code__, names, driver.__name__)
