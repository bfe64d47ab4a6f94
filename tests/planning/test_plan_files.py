"""Files that somebody broke: each loads to a plan that works, or is a `PlanError`, soon.

Covers typed_json.py and planning/plans.py: the limits of a file, and what its texts may hold.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autopipe import typed_json
from autopipe.errors import PlanError
from autopipe.passes.schedule import KINDS
from autopipe.planning import plans
from autopipe.planning.plans import Plan
from autopipe.report.page import page
from tests.support.plans import crossing, made_plan, whole_plan

RED = "\x1b[31mRED\x1b]0;title\x07\u202e\x9b2J"
"""Colours, a new window title, text from right to left, and C1's own way to clear the screen."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    whole_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def tree(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def obeyed(text: str) -> set[str]:
    """The characters that a terminal would not show, but for the newlines between lines."""
    return {c for c in text if not c.isprintable()} - {"\n"}


def loaded_or_refused(path: Path) -> tuple[Plan | None, str]:
    """The plan in a file, or what is said of it."""
    try:
        return Plan.load(path), ""
    except PlanError as error:
        return None, str(error)


def drawn_or_refused(plan: Plan) -> str:
    try:
        return page(plan)
    except PlanError as error:
        return f"refused: {error}"


def uses(plan: Plan, path: Path) -> None:
    """All that is done with a plan without its model."""
    plan.verify()
    assert obeyed(str(plan)) == set()
    assert plan.timeline.makespan >= 0
    json.loads(plan.timeline.to_chrome_trace(), parse_constant=pytest.fail)
    text = drawn_or_refused(plan)
    assert "drawn" in text if text.startswith("refused") else "nan" not in text
    plan.save(path)
    assert Plan.load(path) == plan


# -------------------------------------------------------------------------------------- the limits

LIMITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "stages": (
        lambda p: p.update(stages=[p["stages"][0] | {"first": f"c{i}"} for i in range(1025)]),
        "at most 1,024 stages",
    ),
    "micro-batches": (lambda p: p.update(sizes=[1] * 200_000, chunks=200_000), "at most 65,536"),
    "values": (lambda p: p.update(sizes=[1] * 600_000, chunks=600_000), "at most 500,000 values"),
    "texts": (lambda p: p.update(notes=[""] * 2_000_001), "at most 500,000 values"),
    "objects": (lambda p: p.update(begins=[{}] * 500_000), "at most 500,000 values"),
    "bytes": (lambda p: p.update(model="m" * 2**24), "at most 16,777,216 bytes"),
    "a text": (lambda p: p.update(model="m" * 2**17), "at most 65,536 characters"),
    "nesting": (lambda p: p.update(notes=nested(21)), "nested at most 20 deep"),
    "much nesting": (lambda p: p.update(notes=nested(900)), "nested at most 20 deep"),
    "a count": (lambda p: p.update(chunks=2**64), "at most 64 bits"),
    "a negative count": (lambda p: p["stages"][0].update(flops=-(2**64)), "at most 64 bits"),
    "a size": (lambda p: p.update(sizes=[4, 4, 10**400]), "numbers of at most 40 characters"),
    "bytes of a tensor": (
        lambda p: p["crossings"][0].update(nbytes=10**30),
        "crossings[0].nbytes cannot be read",
    ),
    "a time": (lambda p: p["stages"][1]["times"][0].update(forward=1e16), "1e+15 seconds"),
    "an integer for a time": (lambda p: p.update(gather_seconds=10**38), "at most 64 bits"),
    "a bound": (lambda p: p.update(bound_seconds=1e300), "1e+15 seconds"),
}


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_beyond_a_limit_is_refused_at_once(
    path: Path, tree: dict[str, Any], name: str
) -> None:
    change, said = LIMITS[name]
    change(tree["plan"])
    path.write_text(json.dumps(tree))
    began = time.process_time()
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert time.process_time() - began < 10
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"[" * 2**24, b"]" * 2**24, b'"' * 2**24, b"\\" * 2**24, b"[]," * 2**22, b'{"":' * 2**22,
     b"1" * 2**24, b"0." + b"1" * (2**24 - 2), b'"\\u0000' * 2**21, b" " * 2**24, b"[[],{}" * 2**21,
     b"{" + b",".join(b'"%d":0' % i for i in range(400_000)) + b',"0":0}'],
    ids=[*("open", "closed", "quotes", "backslashes", "lists", "objects", "an integer", "a float"),
         *("escapes", "spaces", "both", "a name twice at the end")],
)  # fmt: skip
def test_files_of_the_largest_size_are_refused_soon(path: Path, text: bytes) -> None:
    """Sixteen megabytes of what is dear to a parser: seconds, and memory in their proportion."""
    path.write_bytes(text)
    tracemalloc.start()
    try:
        with pytest.raises(PlanError):
            Plan.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * typed_json.LARGEST_FILE


def test_the_largest_plans_are_read_and_drawn(path: Path) -> None:
    """Just within the limits all works; one more is refused when it is saved, too."""
    sent = [crossing(f"h_{i}", i % 63, i % 63 + 1) for i in range(10_000)]
    plan = made_plan(64, (1,) * (plans.MOST_WORK // 64), sent)
    plan.save(path)
    assert Plan.load(path) == plan
    more = made_plan(64, (1,) * (plans.MOST_WORK // 64 + 1), [])
    with pytest.raises(PlanError, match="at most 65,536"):
        more.save(path)
    assert Plan.load(path) == plan, "what was there stays"


@pytest.mark.parametrize(
    "plan",
    [
        made_plan(model="a\0b"),
        made_plan(model="\ud800"),
        made_plan(notes=("n" * 2**17,)),
        dataclasses.replace(made_plan(), gather_seconds=float("nan")),
        dataclasses.replace(made_plan(), gather_seconds=float("inf")),
        dataclasses.replace(made_plan(), gather_seconds=-1.0),
        dataclasses.replace(made_plan(), chunks=2**70),
        dataclasses.replace(made_plan(), stages=()),
    ],
    ids=["NUL", "surrogate", "long", "nan", "inf", "negative", "huge", "none"],
)
def test_what_would_not_be_read_is_not_written(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(PlanError):
        plan.save(tmp_path / "plan.json")
    assert [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------- texts and numbers

TEXTS: dict[str, Callable[[str], str | bytes]] = {
    "a NUL": lambda t: t.replace('"Net"', '"a\\u0000b"'),
    "a raw NUL": lambda t: t.replace('"Net"', '"a\0b"'),
    "a raw escape": lambda t: t.replace('"Net"', '"\x1b[31m"'),
    "half a pair": lambda t: t.replace('"Net"', '"\\ud800"'),
    "the other half": lambda t: t.replace('"call_0"', '"a\\udc00b"'),
    "a raw half": lambda t: t.replace('"Net"', '"\ud800"').encode("utf-8", "surrogatepass"),
    "a byte order mark": lambda t: "\ufeff" + t,
    "UTF-16": lambda t: t.encode("utf-16"),
    "UTF-32": lambda t: t.encode("utf-32"),
    "Latin-1": lambda t: t.replace("Net", "Nét").encode("latin-1"),
    "NaN": lambda t: t.replace('"forward": ', '"forward": NaN, "x": '),
    "infinity": lambda t: t.replace('"forward": ', '"forward": -Infinity, "x": '),
    "1e999": lambda t: t.replace('"bytes": ', '"bytes": 1e999, "x": ').replace("1024", "1e999"),
    "a time twice": lambda t: t.replace('"forward": ', '"forward": 0.5, "forward": ', 1),
    "a plan twice": lambda t: t.replace('"plan": ', '"plan": {}, "plan": ', 1),
    "two files": lambda t: t + t,
    "a comment": lambda t: "// a plan\n" + t,
    "NULs behind": lambda t: t + "\0\0\0",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_no_json_or_no_text(path: Path, name: str) -> None:
    content = TEXTS[name](path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert obeyed(str(caught.value)) == set()


@pytest.mark.parametrize("name", ["a\0b.json", "a" * 5000, "plan.json/x"])
def test_paths_that_cannot_be(path: Path, name: str) -> None:
    with pytest.raises((PlanError, OSError)):
        Plan.load(path.parent / name)


def test_a_number_is_no_path() -> None:
    with pytest.raises(TypeError):
        Plan.load(0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- nothing for terminals


def spots(tree: Any, inside: str = "") -> Iterator[tuple[Any, Any, str]]:
    """(holder, key, path) of everything in a parsed file."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in [*pairs]:
        yield tree, key, f"{inside}/{key}"
        if isinstance(value, (dict, list)):
            yield from spots(value, f"{inside}/{key}")


def test_no_text_of_a_plan_commands_the_terminal(path: Path, tree: dict[str, Any]) -> None:
    """In every field, and in every name of a field: shown escaped, in plans and in errors."""
    loaded = refused = 0
    for i, (holder, key, _) in enumerate([*spots(tree)]):
        before = holder[key]
        holder[key] = f"{i} {RED}"
        for text in (json.dumps(tree), json.dumps(tree, ensure_ascii=False)):
            path.write_text(text)
            plan, said = loaded_or_refused(path)
            if plan is None:
                refused += 1
                assert obeyed(said) == set()
                assert said.count("\n") <= 3
            else:
                loaded += 1
                assert obeyed(str(plan) + "".join(map(str, plan.crossings))) == set()
                assert obeyed(page(plan)) == set()
        holder[key] = before
        if isinstance(holder, dict):
            holder[f"{key}{RED}\nfound: all is well"] = 1
            path.write_text(json.dumps(tree))
            with pytest.raises(PlanError) as caught:
                Plan.load(path)
            assert obeyed(str(caught.value)) == set()
            assert "\nfound" not in str(caught.value)
            del holder[f"{key}{RED}\nfound: all is well"]
    assert loaded > 20
    assert refused > 100


def test_a_name_is_one_line(path: Path, tree: dict[str, Any]) -> None:
    """No name looks like another line of the table or the message."""
    tree["plan"]["crossings"][1]["name"] = "h\nnote: this plan was checked"
    path.write_text(json.dumps(tree))
    assert "\nnote: this" not in str(Plan.load(path))
    tree["plan"]["stages"][0]["remat"] = "full\n  what to do: nothing"
    path.write_text(json.dumps(tree))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert "\n  what to do" not in str(caught.value)


# --------------------------------------------------------------------------------------- mutations

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**64), 10**38, 10**400),
    *(0.0, -0.0, 5e-324, 1e-300, 1e15, 1e16, 1e308, 0.5, -1.5, float("nan"), float("inf")),
    *("", "full", "none", "0.5", "min-cut", "1f1b", "gpipe", "zb-v", "parameter", "input", "\0"),
    *(RED, "\ud83d", "x" * 70_000, "\n\n", "<script>", "%s%n", "../../etc/passwd", "NaN", "3"),
    *([], {}, [[]], [None], [0, 0], [1, 2], {"a": 1}, [{}], ["a", "b"], [1] * 1000),
)
WORDS = (
    '"',
    "\\",
    "\\u",
    "\\ud800",
    ",",
    ":",
    "{",
    "}",
    "[",
    "]",
    "NaN",
    "-",
    "e9",
    "1" * 50,
    "\0",
)


def by_tree(text: str, draw: random.Random) -> str:
    """Other values, other types, names removed, added and exchanged, lists longer and shorter."""
    tree = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        places = [*spots(tree)]
        holder, key, _ = draw.choice(places)
        kind = draw.randrange(7)
        if kind < 3:
            holder[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * draw.choice((1, 2, 50))
        elif kind == 4:
            holder[draw.choice(("x", "forward", "", RED, *holder))] = holder[key]
        elif kind == 5:
            other, place, _ = draw.choice(places)
            holder[key] = copy.deepcopy(other[place])
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * draw.choice((-1, 0, 2, 10**6, 10**20, 0.5))
        if not tree:
            break
    return json.dumps(tree)


def by_text(text: str, draw: random.Random) -> str:
    """Cut off, put in, left out, doubled."""
    for _ in range(draw.choice((1, 1, 3))):
        a, b = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:b]
        elif kind == 1:
            text = text[:a] + draw.choice(WORDS) + text[a:]
        elif kind == 2:
            text = text[:a] + text[min(b, a + 20) :]
        elif kind == 3:
            text = text[:b] + text[a:]
        else:
            text = text.replace(draw.choice((":", ",", '"', "0", "]")), draw.choice(WORDS), 1)
    return text


def by_bytes(text: str, draw: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(draw.choice((1, 2, 10))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


WAYS: tuple[Callable[[str, random.Random], str | bytes], ...] = (
    by_tree, by_tree, by_tree, by_text, by_bytes,
)  # fmt: skip


def bases() -> list[Plan]:
    one = made_plan(1, (2,), [crossing("x", None, 0)])
    mixed = made_plan(4, (2,) * 6, schedule="1f1b", remat="none")
    return [whole_plan(), one, mixed]


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.full) for s in range(2, 20))]
)
def test_mutated_plans_work_or_are_refused(tmp_path: Path, seed: int) -> None:
    """A hundred each: never another exception, never minutes, never a plan that breaks later."""
    path, draw, loaded = tmp_path / "plan.json", random.Random(seed), 0
    texts = []
    for plan in bases():
        plan.save(path)
        texts.append(path.read_text())
    for i in range(100):
        content = draw.choice(WAYS)(draw.choice(texts), draw)
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
        began = time.process_time()
        found, said = loaded_or_refused(path)
        assert obeyed(said) == set()
        assert len(said) < 2000
        if found is not None:
            loaded += 1
            uses(found, path)
        assert time.process_time() - began < 10, (seed, i)
    assert loaded >= 3


def test_the_schedules_of_the_table_are_refused_or_work(path: Path, tree: dict[str, Any]) -> None:
    for kind in KINDS:
        tree["plan"]["schedule"] = kind
        path.write_text(json.dumps(tree))
        if KINDS[kind].virtual_stages == 1 or KINDS[kind].any_virtual_stages:
            uses(Plan.load(path), path)
        else:
            with pytest.raises(PlanError, match="stages on"):
                Plan.load(path)
