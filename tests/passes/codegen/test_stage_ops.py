"""One stage's ops as a function, of any names, constants, files and source lines.

Every function is checked, loaded and run: it must compute what its ops compute, called here one by
one, and call nothing else.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping, Sequence
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from autopipe.errors import UnsupportedError
from autopipe.passes.codegen import HEADER, check_source, stage_function
from autopipe.passes.ir.phase_groups import PhaseFunction, phase_functions
from autopipe.passes.ir.phased import StagePhases
from autopipe.runtime.load import load_source
from autopipe.runtime.random import MicroBatchContext
from tests.support import hostile
from tests.support.programs import CPU

Call = tuple[Any, tuple[Any, ...], Mapping[str, Any], str, "str | None"]

FIRST = torch.tensor(0)
"""As an argument: the first tensor of a stage (see `hostile.stage_of`)."""

RECEIVED: list[Any] = []
"""What the operators of the test library were called with, besides tensors."""

ADD = torch.ops.aten.add.Tensor

WORDS = [w for w in hostile.WORDS if w.isidentifier() and w != "x"]


def implementation(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    RECEIVED.append((args, kwargs))
    return x * 2 + len(RECEIVED) % 7


class Library:
    """Operators of any name, defined when they are first asked for."""

    def __init__(self) -> None:
        self.own = torch.library.Library("autopipe_test_ops", "FRAGMENT")
        self.made: dict[str, Any] = {}

    def op(self, name: str, overload: str, schema: str) -> Any | None:
        """The operator; None if torch has no such name."""
        full = f"{name}.{overload}" if overload else name
        if full + schema not in self.made:
            try:
                self.own.define(f"{full}(Tensor x{schema}) -> Tensor")
                self.own.impl(full, implementation, "CompositeExplicitAutograd")
                packet = getattr(torch.ops.autopipe_test_ops, name)
                found = getattr(packet, overload or "default")
            except (RuntimeError, AttributeError):
                found = None
            # (`packet.op` is something else, also where an overload is called `op`.)
            self.made[full + schema] = found if isinstance(found, type(ADD)) else None
        return self.made[full + schema]


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    made = Library()
    yield made
    if torch.__version__ >= "2.13":  # an older one misreads names, or crashes
        made.own._destroy()


def forward_of(stage: StagePhases) -> PhaseFunction:
    return phase_functions(stage, ("F",))[0]


def run(stage: StagePhases, device: torch.device = CPU) -> tuple[str, list[Tensor]]:
    """Write, check, load and run a stage's forward; its source and its results."""
    source = (
        HEADER.format(title="a test")
        + "\n\n"
        + stage_function(stage, forward_of(stage), device, "F_0_b2")
    )
    assert check_source(source) == {"F_0_b2"}
    names, _ = load_source(source)
    inputs = [torch.full((2, 3), float(i)) for i in range(len(stage.receives))]
    results: list[Tensor] = names["F_0_b2"](MicroBatchContext(0, (), 0), inputs)
    assert inputs == []
    return source, results


def agrees(calls: Sequence[Call], inputs: Sequence[str] = ("x",)) -> str:
    """Compare a stage with its ops, called one by one; its source."""
    values: list[Any] = [torch.full((2, 3), float(i)) for i in range(len(inputs))]

    def real(value: Any) -> Any:
        if isinstance(value, Tensor):
            return values[int(value)]
        return type(value)(map(real, value)) if type(value) in (list, tuple) else value

    RECEIVED.clear()
    for target, args, kwargs, *_ in calls:
        values.append(target(*real(args), **{k: real(v) for k, v in kwargs.items()}))
    expected, results = [*RECEIVED], values[len(inputs) :]
    RECEIVED.clear()
    source, found = run(hostile.stage_of(calls, inputs))
    assert len(found) == len(results)
    assert all(map(torch.equal, found, results))
    assert repr(RECEIVED) == repr(expected)
    return source


def adding(name: str = "add", stack: str | None = None) -> Call:
    return (ADD, (FIRST, FIRST), {}, name, stack)


# ------------------------------------------------------------------------------- comments


@pytest.mark.parametrize("end", hostile.LINE_ENDS, ids=ascii)
@pytest.mark.parametrize("where", ["code", "file", "function"])
def test_the_rest_of_a_comment_does_not_run(end: str, where: str) -> None:
    parts = {"code": "y = x", "file": "model.py", "function": "forward"}
    parts[where] += f"{end}    {hostile.SENTINEL}.append(1)"
    stack = f'  File "{parts["file"]}", line 7, in {parts["function"]}\n    {parts["code"]}\n'
    with hostile.nothing_runs():
        source = agrees([adding(stack=stack)])
    if "\n" not in end:
        assert len([x for x in source.splitlines() if "File: model.py" in x]) == 1
        assert f"model.py{'' if where != 'file' else ascii(end)[1:-1]}" in source


def test_a_line_of_the_model_may_look_like_a_mark_of_torch() -> None:
    """torch.fx numbers lines by comments of this form, and drops whatever line has one."""
    stack = '  File "model.py", line 7, in forward\n    y = x + x  # COUNTER: 3\n'
    assert "code: y = x + x  # COUNTER: 3\n" in agrees([adding(stack=stack)])


def test_letters_of_other_scripts_stay_readable() -> None:
    stack = '  File "modèle.py", line 7, in forward\n    y = x + x  # 加法 é\n'
    assert "# File: modèle.py:7 in forward, code: y = x + x  # 加法 é\n" in agrees(
        [adding("a", stack)]
    )


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", [*hostile.WORDS, "", "a\n", "ﬁ", "x_٣", "1", "a b", "\x85"], ids=ascii
)
def test_values_of_any_name(name: str) -> None:
    calls = [adding(name), (ADD, (torch.tensor(1), torch.tensor(0)), {}, f"{name}_1", None)]
    agrees(calls, ["input"])
    agrees([adding("y"), (ADD, (torch.tensor(2), torch.tensor(1)), {}, "z", None)], [name, "other"])


def test_names_that_python_takes_for_the_same() -> None:
    """`ﬁ` is `fi` to Python, and a digit of another script is another name to it."""
    agrees([adding("fi"), (ADD, (torch.tensor(0), torch.tensor(1)), {}, "ﬁ", None)], ["ﬀ"])


@pytest.mark.parametrize("where", ["operator", "overload", "keyword"])
def test_operators_and_arguments_of_any_name(library: Library, where: str) -> None:
    """As far as torch has them: its schemas have keywords of their own, like `class`."""
    found = set()
    for name in WORDS:
        kwargs = {}
        if where == "keyword":
            op, kwargs = library.op("keyword", f"of_{name}", f", *, float {name}"), {name: 1.5}
        elif where == "overload":
            op = library.op("overloaded", name, "")
        else:
            op = library.op(name, "", "")
        if op is not None:
            agrees([(op, (FIRST,), kwargs, "y", None)])
            found.add(name)
    assert found >= {"lambda", "args", "ctx", "torch", "device", "self", "index", "print"}
    assert len(found) > 30


# ------------------------------------------------------------------------------- constants

SCHEMA = ", str s, Scalar z, int[] n, float[] f, Device? d, ScalarType? t, Layout? l, bool b"
DEFAULTS = ("", 0, [], [], None, None, None, False)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *[(0, t) for t in ("# COUNTER: 1", "a'b\"\n\x0c\u2028", "\\", '"""', "{x}")],
        *[(1, z) for z in (-0.0, inf, -inf, nan, 2**62, -(2**63), complex(-0.0, 1), 1 - 0j)],
        *[(1, complex(a, b)) for a in (inf, nan, 0.0) for b in (-0.0, -inf, nan)],
        *[(2, [-1, 2**62]), (3, [-0.0, nan, 1e-320])],
        *[(4, torch.device("meta")), (5, torch.complex64), (6, torch.sparse_coo), (7, True)],
    ],
    ids=ascii,
)
def test_constants_arrive_as_they_are(library: Library, at: int, value: Any) -> None:
    op = library.op("constant", "", SCHEMA)
    args: list[Any] = [*DEFAULTS]
    args[at] = value
    agrees([(op, (FIRST, *args), {}, "y", None)])


@pytest.mark.parametrize("where", ["argument", "keyword"])
def test_devices_are_replaced_wherever_they_stand(library: Library, where: str) -> None:
    """A stage that was traced for one device of a type runs on another."""
    op = library.op("placed", "", ", Device d, *, Device e")
    stage = hostile.stage_of([(op, (FIRST, CPU), {"e": CPU}, "y", None)])
    there = stage_function(stage, forward_of(stage), torch.device("cuda", 3), "F_0_b2")
    assert there.count("device(type='cuda', index=3)") == 2
    assert "cpu" not in there


@pytest.mark.parametrize(
    ("target", "argument"),
    [(ADD, object()), (ADD, [{1}]), (len, 1), (torch.add, 1), (torch.ops.aten.add, 1)],
)
def test_what_python_cannot_express_is_refused(target: Any, argument: Any) -> None:
    stage = hostile.stage_of([adding("a")])
    node = next(n for n in stage.graph.nodes if n.op == "call_function")
    node.target, node.args = target, (node.args[0], argument)
    node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    y = x\n'
    with pytest.raises(UnsupportedError, match="cannot be written as Python") as caught:
        stage_function(stage, forward_of(stage), CPU, "F_0_b2")
    assert (caught.value.node, caught.value.source) == ("a", "model.py:7")


def test_only_methods_of_the_context_are_called() -> None:
    stage = hostile.stage_of([adding("a")])
    node = next(n for n in stage.graph.nodes if n.op == "call_function")
    for owner, method in ((node.args[0], "draw"), (next(iter(stage.graph.nodes)), "__init__")):
        node.op, node.target, node.args = "call_method", method, (owner, 1)
        with pytest.raises(UnsupportedError, match="cannot be written as Python"):
            stage_function(stage, forward_of(stage), CPU, "F_0_b2")


# ------------------------------------------------------------------------------- anything


@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.full)])
def test_stages_of_any_text(library: Library, count: int) -> None:
    """Names of inputs, values, operators, overloads, arguments; constants; stack traces."""
    rng = random.Random(7)
    with hostile.nothing_runs():
        for _ in range(count):
            inputs = unique(rng, rng.randrange(1, 4), [])
            names = unique(rng, rng.randrange(1, 5), inputs)
            calls: list[Call] = []
            for i, name in enumerate(names):
                call = any_call(library, rng, len(inputs) + i)
                calls.append((*call, name, rng.choice([None, hostile.trace(rng)])))
            source = agrees(calls, inputs)
            tree = ast.parse(source)
            (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
            assigned = [s for s in function.body if isinstance(s, ast.AnnAssign)]
            assert len(assigned) == len(calls)


def unique(rng: random.Random, count: int, taken: Sequence[str]) -> list[str]:
    """Different texts; alike after their characters are replaced, perhaps."""
    found: list[str] = []
    while len(found) < count:
        name = rng.choice([hostile.text(rng), rng.choice(hostile.WORDS)])
        if name not in (*found, *taken):
            found.append(name)
    return found


def any_call(
    library: Library, rng: random.Random, count: int
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """An operator of any name, on one of `count` tensors and on constants."""
    tensor = torch.tensor(rng.randrange(count))
    words = WORDS
    name, overload, keyword = rng.choice(words), rng.choice(["", *words]), rng.choice(words)
    kind = rng.randrange(4)
    if kind == 0:
        op, args, kwargs = library.op(name, overload, ""), (tensor,), {}
    elif kind == 1:
        schema = f", *, Scalar {keyword}"
        op, args = library.op("named", f"of_{keyword}", schema), (tensor,)
        kwargs = {keyword: rng.choice([-0.0, nan, complex(inf, -0.0), 3])}
    else:
        valid = hostile.text(rng).encode("utf-8", "replace").decode().replace("\0", "")
        numbers = [rng.choice([0.5, -0.0, inf, nan]) for _ in range(rng.randrange(3))]
        op, kwargs = library.op("constant", "", SCHEMA), {}
        args = (tensor, valid, rng.choice([1, -0.0, 1 - 0j]), [rng.randrange(9)], numbers)
        args += (rng.choice([None, CPU]), rng.choice([None, torch.bool]), None, rng.random() < 0.5)
    return (ADD, (tensor, tensor), {}) if op is None else (op, args, kwargs)
