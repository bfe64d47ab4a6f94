"""Text of a model is data: no name, constant, file or line of source becomes code.

Models are built from hostile text and trained as pipelines: nothing of it runs, results and
gradients are eager's, and what is printed can be read.
"""

from __future__ import annotations

import linecache
import math
import random
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopipe.errors import CaptureError, StageError
from tests.support import hostile
from tests.support.agreement import assert_agrees, assert_close, pipelined

ACTION = f"    {hostile.SENTINEL}.append(1)"


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    with hostile.nothing_runs():
        yield


def forward_of(body: str, file: str, name: str = "forward") -> Callable[..., Any]:
    """A function from source, which torch's stack traces quote."""
    text = f"def {name}(self, x):\n{body}"
    lines = [f"{line}\n" for line in text.split("\n")]
    linecache.cache[file] = (len(text), None, lines, file)
    scope: dict[str, Any] = {}
    exec(compile(text, file, "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def written(body: str, file: str = "odd.py") -> nn.Module:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.double()

        forward = forward_of(body, file)

    return Written()


def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64)


def can_be_read(text: str) -> bool:
    return text.replace("\n", "").replace("\t", "").isprintable()


# ------------------------------------------------------------------------------- lines and files


# A line feed ends the comment in the model itself, and so does \r; NUL is no source code.
@pytest.mark.few(3)
@pytest.mark.parametrize("end", [*hostile.LINE_ENDS[3:], *hostile.INVISIBLE[1:-1]], ids=ascii)
def test_a_comment_of_the_model_does_not_run(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPIPE_DUMP", str(tmp_path / "dump"))
    body = f"    y = self.a(x)  # {end}{ACTION}\n    return self.b(y.tanh())\n"
    pipe = pipelined(written(body))
    assert_agrees(pipe, x())
    assert f"# File: odd.py:2 in forward, code: y = self.a(x)  # {ascii(end)[1:-1]}" in pipe.code
    dumped = [p.read_text("utf-8") for p in (tmp_path / "dump").iterdir()]
    shown = [pipe.code, *(s.code for s in pipe.stages), str(pipe.captured), pipe.explain()]
    assert all(map(can_be_read, [*dumped, *shown]))


FILES = [f"a{end}{ACTION}.py" for end in hostile.LINE_ENDS]
FILES += ["a:3 in f.py", '"""\\', "#"]


@pytest.mark.few(3)
@pytest.mark.parametrize("file", FILES, ids=ascii)
def test_a_file_of_any_name(file: str) -> None:
    body = "    y = self.a(x)\n    return self.b(y.tanh())\n"
    pipe = pipelined(written(body, file))
    assert_agrees(pipe, x())
    assert can_be_read(pipe.code)
    assert all(can_be_read(s.code) for s in pipe.stages)


def test_a_file_whose_name_torch_cannot_pass_on() -> None:
    """A name that is no UTF-8: torch keeps stack traces as UTF-8."""
    with pytest.raises(CaptureError, match=r"source: \\udc80:2") as caught:
        pipelined(written("    return self.a(x)\n", "\udc80"))(x())
    assert caught.value.source == "\udc80:2"


class Table(nn.Module):
    """Fails at run time where an index is out of range, in a file of any name."""

    def __init__(self, file: str, comment: str) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(4, 4), nn.Embedding(9, 4)
        body = f"    ids, h = x[..., 0].long(), self.first(x)\n    h = h.tanh()  # {comment}\n"
        self.run = forward_of(f"{body}    return h + self.table(ids)  # {comment}\n", file)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.run(self, x)
        return result


@pytest.mark.parametrize(
    ("file", "comment", "shown"),
    [
        ("model.py", "\x0c # File: evil.py:1 in f", "model.py:4"),
        ("dir:3 in a/model.py", "\x1c", "dir\\x3a3 in a/model.py:4"),
        ("mod\x85el.py", "\u2028", "mod\\x85el.py:4"),
    ],
)
def test_an_error_names_the_line_of_the_model(file: str, comment: str, shown: str) -> None:
    pipe = pipelined(Table(file, comment))
    values = torch.zeros(6, 4)
    pipe(values)
    values[-1] = 9
    with pytest.raises(StageError) as caught:
        pipe(values)
    assert caught.value.source == shown
    assert caught.value.node is not None
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)  # type: ignore[union-attr]
    assert any((f.line or "").lstrip().startswith(f"{caught.value.node}: ") for f in frames)


# ------------------------------------------------------------------------------- names


class Named(nn.Module):
    """Parameters, buffers, submodules, arguments and keys of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        for prefix in ("a", "b"):
            self.register_parameter(prefix + name, nn.Parameter(torch.randn(4)))
        self.register_buffer("c" + name, torch.randn(4))
        self.add_module("d" + name, nn.Linear(4, 4))
        self.double()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b, c = (getattr(self, p + self.name) for p in "abc")
        h = (batch[self.name] * a).tanh() + getattr(self, "d" + self.name)(batch["x"])
        return {self.name: h * b + c, "loss": h.square().mean()}


NAMES = [
    "lambda",
    "batch_size",
    "ctx",
    "self",
    "",
    "é ﬁ",
    '"""',
    f"\x0c{ACTION}".replace(".", "_"),
    "\x1b[31m",
    "\\",
]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_values_of_any_name(name: str) -> None:
    pipe = pipelined(Named(name))
    assert_agrees(pipe, {name: x(), "x": x() * 2})
    assert can_be_read(pipe.code)
    assert can_be_read(str(pipe.captured))


def test_what_is_printed_can_be_read() -> None:
    name = "\x1b[31m\x0c\u202e"
    pipe, batch = pipelined(Named(name)), {name: x(), "x": x() * 2}
    pipe(batch)
    shown = [pipe.explain(), pipe.verify(batch), pipe.plan, pipe.memory, pipe, *pipe.stages]
    assert all(can_be_read(str(each)) for each in shown)


@pytest.mark.parametrize("name", ["batch_size", "self", "args", "ctx", "run", "m", "results"])
def test_an_argument_of_any_name(name: str) -> None:
    """`batch_size` is what the epilogue calls the number of samples, by which it divides here."""
    scope: dict[str, Any] = {}
    text = f"def forward(model, {name}):\n    h = model.a({name})\n"
    exec(f"{text}    return {name}, h, {name}.mean(), h.square().mean()\n", scope)

    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()

        forward = scope["forward"]

    assert_agrees(pipelined(Taking()), x().requires_grad_())


# ------------------------------------------------------------------------------- operators


OPERATORS = ["lambda", "batch_size", "ctx", "args", "self", "device", "run", "inf"]
KEYS = ["from", "lambda", "index", "op", "__debug__", "args"]


class Operators:
    """Operators with derivatives: pointwise, of a constant, and random."""

    def __init__(self) -> None:
        self.own = torch.library.Library("autopipe_test_names", "FRAGMENT")
        tags = (torch.Tag.pointwise,)
        for name in OPERATORS:
            self._define(name, "(Tensor x) -> Tensor", lambda x: x * 3, tags)
        for key in KEYS:
            schema = f"(Tensor x, *, float {key}) -> Tensor"
            self._define(f"key_{key}", schema, lambda x, **k: x * sum(k.values()), tags)
            random_tags = (*tags, torch.Tag.nondeterministic_seeded)
            self._define(f"draw_{key}", schema, draws, random_tags)
        schema = "(Tensor x, Scalar z, str s) -> Tensor"
        self._define("constant", schema, lambda x, z, s: x + signs(z) + len(s), tags)

    def _define(self, name: str, schema: str, function: Any, tags: Any) -> None:
        self.own.define(name + schema, tags=tags)
        self.own.impl(name, function, "CompositeExplicitAutograd")
        self.own.impl(name, lambda x, *args, **kwargs: torch.empty_like(x), "Meta")

    def __call__(self, name: str) -> Any:
        return getattr(torch.ops.autopipe_test_names, name)


def draws(x: Tensor, **kwargs: float) -> Tensor:
    """Draws, but returns the same whatever it has drawn: eager draws other numbers."""
    return x + torch.rand(x.shape[1:]).sum() * 0 + sum(kwargs.values())


def signs(z: complex) -> float:
    """A number that tells the signs of zeros and NaNs apart."""
    z = complex(z)
    return math.copysign(1.0, z.real) + 4 * math.copysign(1.0, z.imag)


@pytest.fixture(scope="module")
def operators() -> Iterator[Operators]:
    made = Operators()
    yield made
    made.own._destroy()


class Calling(nn.Module):
    """An operator between two layers, and one whose result is returned beside a loss."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.call = call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.call(self.a(x).tanh().detach()) + self.b(x)
        found = self.call(x)
        return found, h, h.square().mean()


@pytest.mark.few(3)
@pytest.mark.parametrize("remat", ["full", "min-cut", "none"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_any_name(operators: Operators, name: str, remat: str) -> None:
    assert_agrees(pipelined(Calling(lambda x: operators(name)(x)), remat=remat), x())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.few(3)
def test_results_named_like_inputs_of_the_epilogue(operators: Operators, name: str) -> None:
    """A sum over the batch is divided by its size, which the epilogue calls `batch_size`."""

    class Dividing(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = operators(name)(x)
            return y, y.sum() / x.shape[0], (y.square().sum() + x.shape[0]) * 2

    with torch.no_grad():
        found, expected = pipelined(Dividing())(x()), Dividing()(x())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["key", "draw"])
@pytest.mark.parametrize("key", KEYS)
def test_keyword_arguments_of_any_name(operators: Operators, kind: str, key: str) -> None:
    op = operators(f"{kind}_{key}")
    assert_agrees(pipelined(Calling(lambda x: op(x, **{key: 1.5}))), x())


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("number", "text"),
    [
        (complex(1, -0.0), "# COUNTER: 3"),
        (complex(-0.0, float("inf")), '"""\n\x0c\u2028' + ACTION),
        (complex(float("nan"), -1), "\\"),
        (-0.0, "'"),
        (2**62, "\x00"),
        (-float("inf"), "#"),
    ],
    ids=ascii,
)
def test_constants_of_any_value(operators: Operators, number: Any, text: str) -> None:
    op = operators("constant")
    assert_agrees(pipelined(Calling(lambda x: op(x, number, text))), x())


# ------------------------------------------------------------------------------- anything


class Mixed(Named):
    """Of any name; calls an operator of any name in a line of any text."""

    def __init__(self, name: str, op: Any, comment: str, file: str) -> None:
        super().__init__(name)
        self.op, self.first, self.last = op, nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        body = f"    h = self.first(x)  # {comment}\n    h = (self.op(h.detach()) + h).tanh()\n"
        self.inner = forward_of(f"{body}    return self.last(h)  # {comment}\n", file)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().forward(batch) | {"h": self.inner(self, batch["x"])}


@pytest.mark.few(3)
@pytest.mark.parametrize("seed", range(40))
def test_models_of_any_text(operators: Operators, seed: int) -> None:
    rng = random.Random(seed)
    name = hostile.text(rng).replace(".", "_").encode("utf-8", "replace").decode()
    comment = "".join(c for c in hostile.text(rng) if c not in "\n\r\0\udc80")
    file = "".join(c for c in hostile.text(rng) if c not in "\0\udc80")
    model = Mixed(name, operators(rng.choice(OPERATORS)), comment, file)
    pipe = pipelined(model)
    assert_agrees(pipe, {name: x(), "x": x() * 2})
    assert can_be_read(pipe.code)
    assert can_be_read(str(pipe.captured))
