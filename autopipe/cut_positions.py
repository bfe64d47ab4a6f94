"""The option `cut_at`: the modules of a model that are not cut, or with which stages start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from autopipe.errors import OptionError, shown
from autopipe.passes.split import CutAt

LISTS = nn.ModuleList, nn.Sequential
UNCALLED = nn.ModuleList, nn.ModuleDict
"""Classes that only hold modules: a model calls their members."""

BLOCKS = "blocks"
EXPECTED = '"blocks", names of modules ("transformer.h.3") or classes ("LlamaDecoderLayer")'


def cut_positions(model: nn.Module, cut_at: Any) -> CutAt:
    """Find the modules that the option `cut_at` means.

    Args:
        model: the user's module.
        cut_at: None; "blocks"; or one or several of: the name of a module, a class of modules, the
            name of a class.

    Returns:
        `whole`: the blocks, or the modules of the classes (of one within another only the outer
        counts). `starts`: the modules listed by name; None if there is none.

    Raises:
        OptionError: it is nothing of these, a list of modules, or the model has no such module; the
            error names the nearest.
    """
    if cut_at is None:
        return CutAt()
    if isinstance(cut_at, str) and cut_at == BLOCKS:
        return CutAt(whole=frozenset(_blocks(model)))
    several = isinstance(cut_at, Sequence) and not isinstance(cut_at, str)
    wanted = list(cut_at) if several else [cut_at]
    if not wanted:
        raise OptionError("`cut_at` names no module", expected=EXPECTED, found=shown(cut_at))
    modules = dict(model.named_modules(remove_duplicate=False))
    whole, starts = set[str](), set[str]()
    for one in wanted:
        if isinstance(one, str) and one and one in modules:
            _check_called(one, [modules[one]])
            starts.add(one)
        else:
            found = _of_class(modules, one)
            _check_called(one, [modules[name] for name in found])
            whole |= found
    return CutAt(frozenset(whole), frozenset(starts) if starts else None)


def _check_called(one: Any, found: Sequence[nn.Module]) -> None:
    """Refuse a list of modules: a model never calls it, so nothing would be restricted."""
    if all(type(module) in UNCALLED for module in found):
        raise OptionError(
            f"a model never calls an nn.{type(found[0]).__name__}, so it cannot be cut at one",
            expected=EXPECTED,
            found=shown(one if isinstance(one, str) else one.__name__),
            remedy=f'cut at its members: "{BLOCKS}", their names or their class',
        )


def _of_class(modules: dict[str, nn.Module], one: Any) -> set[str]:
    """The names of the modules of a class, which is given itself or by its name."""
    if isinstance(one, type) and issubclass(one, nn.Module):
        found = {name for name, module in modules.items() if isinstance(module, one)}
        what = one.__name__
    elif isinstance(one, str):
        found = {name for name, module in modules.items() if type(module).__name__ == one}
        what = one
    else:
        raise OptionError("`cut_at` names no module", expected=EXPECTED, found=shown(one))
    if not found - {""}:
        inner = {type(module).__name__ for name, module in modules.items() if name}
        known = [*modules, *inner, BLOCKS]
        near = get_close_matches(what, filter(None, known))
        remedy = f"the nearest: {', '.join(map(shown, near))}" if near else None
        raise OptionError(
            "the model has no such module to cut at",
            expected=EXPECTED,
            found=shown(one if isinstance(one, str) else what),
            remedy=remedy,
        )
    return found - {""}


def _blocks(model: nn.Module) -> list[str]:
    """The names of a model's blocks.

    Blocks are the members of its lists of layers (`nn.ModuleList`, `nn.Sequential`). Where the
    members of a list all differ, and some repeat layers in lists of their own, as the stages of a
    ResNet or a Swin do, the layers of these are the blocks. Within a block no list counts.
    """
    found = list(_blocks_in(model, ""))
    if not found:
        raise OptionError(
            "the model has no blocks to cut at",
            expected="layers in an nn.ModuleList or an nn.Sequential",
            found=type(model).__name__,
            remedy='list modules or classes: cut_at=["encoder", "decoder"]',
        )
    return found


def _blocks_in(module: nn.Module, path: str) -> Iterator[str]:
    is_list, repeats = isinstance(module, LISTS), _repeats(module)
    for name, member in _members(module):
        where = f"{path}.{name}" if path else name
        if not is_list or (not repeats and any(map(_repeats, member.modules()))):
            yield from _blocks_in(member, where)
        else:
            yield where


def _members(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a module holds itself, under each of their names."""
    for name, member in module.named_modules(remove_duplicate=False):
        if name and "." not in name:
            yield name, member


def _repeats(module: nn.Module) -> bool:
    """Whether it is a list with two members of one class and mostly parameters of equal shapes."""
    if not isinstance(module, LISTS):
        return False
    members = [(type(member), _shapes(member)) for _, member in _members(module)]
    return any(
        kind is other and 2 * (shapes & others).total() > max(shapes.total(), others.total())
        for at, (kind, shapes) in enumerate(members)
        for other, others in members[:at]
    )


def _shapes(module: nn.Module) -> Counter[tuple[str, tuple[int, ...]]]:
    return Counter((name, tuple(p.shape)) for name, p in module.named_parameters())
