"""Two tiers of tests: `make test` runs what is not marked ``full``, `make test-all` everything.

``@pytest.mark.few(n)``, on a test or on a whole file, leaves n parameter sets of each parametrized
test in the first tier, spread evenly from the first to the last, and marks the others ``full``.

``--full-part=3/12`` runs the first tier and one of twelve parts of the rest: `.ci/run` takes
another part for each commit.
"""

from __future__ import annotations

import zlib
from collections import defaultdict

import pytest

from tests.support.models import MODELS


def full_unless(quick: bool) -> list[pytest.MarkDecorator]:
    """Marks of a parameter set that is in the first tier only if `quick`."""
    return [] if quick else [pytest.mark.full]


def few_of(count: int, n: int) -> set[int]:
    """Positions of at most `n` among `count`, spread evenly; the first is one, and the last."""
    if n >= count:
        return set(range(count))
    return {i * (count - 1) // max(n - 1, 1) for i in range(n)}


def mark_full(items: list[pytest.Item]) -> None:
    """Mark what ``few`` leaves to the full tier."""
    of_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("full") is None:
            of_test[item.nodeid.partition("[")[0]].append(item)
    for together in of_test.values():
        mark = together[0].get_closest_marker("few")
        stay = few_of(len(together), mark.args[0] if mark else len(together))
        for i, item in enumerate(together):
            if i not in stay:
                item.add_marker("full")


def parse_part(text: str) -> tuple[int, int]:
    """Parse ``3/12``: the part, from 0, and the number of parts.

    Raises:
        pytest.UsageError: it is something else.
    """
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise pytest.UsageError(f"--full-part={text}: write 3/12 for the parts 0/12 to 11/12")
    return int(part), int(parts)


def outside_part(
    items: list[pytest.Item], part: int, parts: int
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Divide tests into those to run, and those of the full tier that are in other parts.

    Args:
        items: marked.
        part: of the full tier, from 0.
        parts: how many there are.
    """
    run, other = [], []
    for item in items:
        own = zlib.crc32(item.nodeid.partition("@")[0].encode()) % parts
        full = item.get_closest_marker("full") is not None
        (other if full and own != part else run).append(item)
    return run, other


def group_by_model(items: list[pytest.Item]) -> None:
    """Give the tests of each small model to one worker, which captures it for all of them."""
    for item in items:
        call = getattr(item, "callspec", None)
        name = call and call.params.get("name")
        if name in MODELS and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name))


def files_by_tier(items: list[pytest.Item]) -> dict[str, bool]:
    """Each file of `items`, from the root of the repository: has it a test in the first tier?"""
    found: dict[str, bool] = {}
    for item in items:
        name = item.nodeid.partition("::")[0].partition("@")[0]
        found[name] = found.get(name, False) or item.get_closest_marker("full") is None
    return found
