"""What a forward changes of the containers and objects that are its arguments.

A trace gets copies of them, and a pipeline never changes what it is called with. An entry that the
forward only adds or removes is lost, which a warning says. A number that it counts up is read by
the next call, which is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from autopipe.errors import CaptureError

from .containers import take_apart

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN = (int, float, complex, str, bool)


class _Nothing:
    """Stands for an entry that does not exist."""


def entries(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a call hold.

    Args:
        args, kwargs: of the call.

    Returns:
        For each value that is no container its place, as code: ``args[0]['mask']``.
    """
    taken = [take_apart(a) for a in args], {n: take_apart(v) for n, v in kwargs.items()}
    found = [
        (part, pytree.tree_leaves_with_path(tree)) for part, tree in zip(NAMES, taken, strict=True)
    ]
    return {part + pytree.keystr(path): leaf for part, leaves in found for path, leaf in leaves}


NAMES = ("args", "kwargs")


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Say which entries of its arguments a forward changed, if any.

    Args:
        before, after: the forward: what `entries` returned.

    Returns:
        At most one remark, for the user.

    Raises:
        CaptureError: it changed a number or a text, which the next call may read.
    """
    changed = [
        place
        for place in {**before, **after}
        if before.get(place, _Nothing) is not after.get(place, _Nothing)
    ]
    for place in changed:
        old, new = before.get(place, _Nothing), after.get(place, _Nothing)
        if type(old) in PLAIN and type(new) in PLAIN and (type(old) is not type(new) or old != new):
            raise CaptureError(
                "the forward changes a value of its argument, which a pipeline does not, and a"
                " later call may read it",
                found=f"{place} = {new!r}",
                remedy="copy the argument before it is changed (dict(batch)), and return what later"
                " calls need",
            )
    if not changed:
        return ()
    return (
        f"changes its arguments ({', '.join(changed[:LONGEST])}); the pipeline does not: return"
        " what is needed",
    )


LONGEST = 5
"""How many entries a warning names."""
