"""What stages compute, in words: the modules of their ops."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from autopipe.passes.ir import Split


def modules_by_stage(split: Split) -> tuple[str, ...]:
    """For each stage the first and the last of its modules: ``layers.3.self_attn … layers.5``.

    They are the outermost ones whose ops are all in the stage, in the order of the ops. Where there
    is none, the innermost ones; where no op is in a module, an empty text. An op that several
    stages compute counts in the first of them.

    Args:
        split: the stages.
    """
    ops = [
        [node for node in ops if split.duplicated.get(node.name, (k,))[0] == k]
        for k, ops in enumerate(split.ops)
    ]
    stages: dict[str, set[int]] = defaultdict(set)
    for k, own in enumerate(ops):
        for node in own:
            for call in node.meta.get("calls", ()):
                stages[call].add(k)
    return tuple(_first_and_last(own, stages) for own in ops)


def _first_and_last(ops: Sequence[fx.Node], stages: Mapping[str, set[int]]) -> str:
    outermost, innermost = [], []
    for node in ops:
        paths, calls = node.meta.get("modules", ()), node.meta.get("calls", ())
        outermost += [p for p, call in zip(paths, calls, strict=True) if len(stages[call]) == 1][:1]
        innermost += paths[-1:]
    named = outermost or innermost
    return " … ".join(dict.fromkeys([*named[:1], *named[-1:]]))
