"""Every file of tests, and so every promise, has a smallest form in `make test`."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.tiers import few_of, files_by_tier, mark_full, outside_part, parse_part

FULL_ONLY: dict[str, str] = {
    "tests/system/test_curves.py": "many steps; one is compared in test_transparency.py",
    "tests/system/test_lengths_zoo.py": "whole models; test_lengths.py has small ones",
}
"""Files all of whose tests are in the full tier, and why."""


def test_every_file_has_a_test_in_the_first_tier(files: dict[str, bool]) -> None:
    assert {name for name, quick in files.items() if not quick} - set(FULL_ONLY) == set()
    assert {name for name in FULL_ONLY if files.get(name)} == set()


@pytest.mark.parametrize(
    ("count", "n", "expected"),
    [
        (1, 3, {0}),
        (3, 3, {0, 1, 2}),
        (9, 3, {0, 4, 8}),
        (7, 1, {0}),
        (7, 2, {0, 6}),
        (100, 5, {0, 24, 49, 74, 99}),
    ],
)
def test_few_are_spread(count: int, n: int, expected: set[int]) -> None:
    assert few_of(count, n) == expected


class Item:
    """As much of a `pytest.Item` as is asked for."""

    def __init__(self, nodeid: str, **marks: Any) -> None:
        self.nodeid = nodeid
        self.marks = {n: SimpleNamespace(args=a) for n, a in marks.items()}

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = SimpleNamespace(args=())


def test_parts_of_the_full_tier_are_all_of_it() -> None:
    items: Any = [Item(f"a.py::test_numbers[{n}]", **{"full": ()} if n else {}) for n in range(99)]
    parts = [outside_part(items, part, 4) for part in range(4)]
    assert all(run[0] is items[0] for run, _ in parts)
    found = [item.nodeid for run, _ in parts for item in run[1:]]
    assert sorted(found) == sorted(item.nodeid for item in items[1:])
    assert all(15 < len(run) < 35 and len(run) + len(others) == 99 for run, others in parts)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "1/0"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(text)):
        parse_part(text)


def test_few_mark_the_others_full() -> None:
    items: Any = [Item(f"a.py::test_numbers[{n}]", few=(2,)) for n in range(5)]
    items += [Item("a.py::test_marked[1]"), Item("a.py::test_marked[2]", full=())]
    items += [Item("b.py::test_full@group", full=())]
    mark_full(items)
    quick = [i.nodeid for i in items if i.get_closest_marker("full") is None]
    assert quick == ["a.py::test_numbers[0]", "a.py::test_numbers[4]", "a.py::test_marked[1]"]
    assert files_by_tier(items) == {"a.py": True, "b.py": False}
