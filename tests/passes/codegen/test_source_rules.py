"""The statements that a program may hold: programs pass, and whatever does something else does not.

Truth: `compile`, for what Python would run. Covers codegen/source_forms.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopipe.errors import VerifyError
from autopipe.passes.codegen import check_source
from tests.golden.mlp import Mlp
from tests.support import hostile
from tests.support.agreement import pipelined

HEAD = '"""title"""\n\nfrom math import inf, nan\n\nimport torch\nfrom torch import device\n\n\n'
OPS = HEAD + "def F_0_b2(ctx, args):\n    x, y = args\n    args.clear()\n"
STAGE = OPS + "    return [x]\n\n\ndef forward_0(run, m, compute):\n"


@pytest.fixture(scope="module")
def program() -> str:
    pipe = pipelined(Mlp(), chunks=2, batch_norm="micro")
    pipe(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))
    return str(pipe.code)


def test_a_program_passes(program: str) -> None:
    functions = check_source(program)
    assert {"F_0_b2", "RBW_1_b2", "forward_0", "backward_1", "device_1_backward"} <= functions


STATEMENTS = [
    "z = torch.ops.aten.add.Tensor(x, y)",
    'z: "f32[2]" = torch.ops.aten.add.Tensor(x, y, alpha = -1.5);  x = y = None',
    "z = torch.ops.aten.full.default([2, -3], -inf, dtype = torch.float32, device = device('cpu'))",
    "z = ctx.draw(0, torch.ops.aten.bernoulli.p, x, 0.5)",
    'z = getattr(torch.ops.aten, "add").Tensor(x, complex(1.0, -0.0))',
    'z = getattr(torch.ops.aten.random, "from")(x, 1, 2)',
    'z = torch.ops.aten.random.to(x, **{"to": 3})',
    'z = ctx.draw(1, getattr(torch.ops.aten.random, "from"), x, 1, 2)',
    "z = torch.tensor([[1.0], [nan]], dtype = torch.bool)",
    "z = x[0]",
    "z = torch.ops.aten.add.Tensor(x, (1, [None, ...], True, b'', 'a', slice(0, None, 2)))",
    "z = torch.ops.aten.full.default([x // 2, max(x * 3, 1)], float(x) ** 0.5)",
    "z = torch.ops.aten.narrow.default(y, 0, 0, int((x / 2) // 1))",
    "z = torch.ops.aten.mul.Tensor(y, x > 8 and x % 2 == 0)",
    "accumulate = ctx.accumulate(0, x);  ctx = accumulate = None",
    "F_0_b2 = x[0];  F_0_b2 = None",  # an input of the model may have this name
    "# a comment; RAN.append(1)\n    z = x[0]  # and another",
    "z = torch.ops.aten.add.Tensor(\n        x,\n        y,\n    )",
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_stages_compute(statement: str) -> None:
    source = f"{OPS}    {statement}\n    return [x, None]\n"
    compile(source, "<test>", "exec")
    assert check_source(source) == {"F_0_b2"}


ESCAPED = [
    f"{hostile.SENTINEL}.append(1)",
    "print(1)",
    "x.add_(1)",
    "z = x.add(1)",
    "z = x.shape",
    "z = [a for a in x]",
    "z = lambda: 1",
    "z = (w := x)",
    "z = f'{x}'",
    "z = unknown",
    "z = x[y]",
    "z = x[1:2]",
    "z = -x",
    "z = not x",
    "z = torch",
    "z = torch.load",
    "z = torch.load('file')",
    "z = torch.ops",
    "z = torch.ops.load_library('file')",
    "z = torch.ops.aten.add",
    "z = torch.ops.aten.add(x, y)",
    "z = torch.ops.aten.no_such_op.default(x)",
    "z = torch.ops.aten.add.__class__.mro()",
    "z = torch.ops.aten.add.Tensor(x, exec('1'))",
    "z = torch.ops.aten.add.Tensor(*x)",
    "z = torch.ops.aten.add.Tensor(**x)",
    "z = torch.ops.aten.add.Tensor(x, alpha = y.alpha)",
    "z = torch.ops.aten.add.Tensor.__call__(x, y)",
    "z = getattr(x, 'add')(y)",
    "z = getattr(torch, 'load')",
    "z = ctx.__class__",
    "z = ctx.other(x)",
    "z = ctx.draw",
    "ctx.draw.x = y",
    "x.y = y",
    "x[0] = y",
    "torch = x",
    "getattr = x",
    "float = x",
    "z = x > exec('1')",
    "z = x if y else x",
    "device = x",
    "x += y",
    "del x",
    "pass",
    "assert x",
    "global z",
    "import os",
    "from os import path",
    "if x: y = None",
    "for a in x: y = None",
    "with x: y = None",
    "raise x",
    "return x",
    "'text'",
    "x: int",
    "x: exec('1') = y",
    "def f(): return [x]",
    "class C: x = None",
    "async def f(): return [x]",
    "try: x = None\n    finally: y = None",
    "z = x \\\n    .add(1)",
]


@pytest.mark.parametrize("statement", ESCAPED)
def test_everything_else_is_refused(statement: str) -> None:
    """Wherever it stands: alone, before a line, after one, at the end of a comment's line."""
    compile(f"{OPS}    {statement}\n    return [x]\n", "<test>", "exec")
    for body in (
        f"    {statement}\n    return [x]\n",
        f"    z = x[0]\n    # a comment\n    {statement}\n    return [x]\n",
        f"    return [x]\n    {statement}\n",
    ):
        with pytest.raises(VerifyError, match="no pass writes"):
            check_source(OPS + body)


def test_a_statement_between_any_two_lines_is_found(program: str) -> None:
    """Also where the pieces that are parsed at once begin and end."""
    lines = (OPS + "    z = x[0]\n" * 130).split("\n")[:-1]
    for at in range(9, len(lines)):
        for escaped in ("    y.add_(1)", "    z = x[0]; y.add_(1)", "    y \\"):
            source = "\n".join([*lines[:at], escaped, *lines[at:]])
            with pytest.raises(VerifyError):
                check_source(source)


@pytest.mark.parametrize(
    "statement",
    [
        "x = 1",
        "import os",
        "import torch as inf",
        "from math import inf, nan, pi",
        "from torch import *",
        f"{hostile.SENTINEL}.append(1)",
        "exec('1')",
        "'another text'",
        "def other(run):\n    run.state(0)",
        "def F_0_b2(ctx, args, more):\n    args.clear()",
        "def F_1_b2(ctx, args=exec('1')):\n    args.clear()",
        "def F_1_b2(ctx, args: exec('1')):\n    args.clear()",
        "def F_1_b2(ctx, args) -> exec('1'):\n    args.clear()",
        "def F_1_b2(ctx, args): exec('1')",
        "@exec\ndef F_1_b2(ctx, args):\n    args.clear()",
        "class F_1_b2:\n    x = 1",
        "if torch:\n    x = 1",
        "lambda: 1",
    ],
)
def test_other_statements_of_a_module_are_refused(statement: str) -> None:
    sound = f"{OPS}    return [x]\n"
    assert check_source(sound) == {"F_0_b2"}
    for source in (f"{sound}\n\n{statement}\n", HEAD + statement + "\n" + sound[len(HEAD) :]):
        compile(source, "<test>", "exec")
        with pytest.raises(VerifyError):
            check_source(source)


@pytest.mark.parametrize(
    "statement",
    [
        "run.send('x', 0, 1, m, run)",
        "results = compute(run.context(0, m), [*run.state(0), run.receive('x', 0, m)])",
        "run.save(0, m, run)",
        "forward_0(run, 0, F_0_b2)",
    ],
)
def test_what_stages_call(statement: str) -> None:
    assert check_source(f"{STAGE}    {statement}\n") == {"F_0_b2", "forward_0"}


@pytest.mark.parametrize(
    "statement", ["run.execute('forward')", "run.program", "run._work(m, m)", "m(run)", "F_9(run)"]
)
def test_what_stages_do_not_call(statement: str) -> None:
    with pytest.raises(VerifyError):
        check_source(f"{STAGE}    {statement}\n")


@pytest.mark.parametrize("character", [*hostile.LINE_ENDS[1:], *hostile.INVISIBLE])
def test_control_characters_are_refused_anywhere(character: str) -> None:
    for source in (
        f"{OPS}    # a comment {character}\n    return [x]\n",
        f'{OPS}    z = torch.ops.mylib.f.default(x, "{character}")\n    return [x]\n',
        f"{OPS}    return [x]\n{character}",
    ):
        with pytest.raises(VerifyError, match="control character"):
            check_source(source)


@pytest.mark.parametrize("source", ["def F_0_b2(ctx:", "x = (", '"""', "a b", "\tx", "(" * 9999])
def test_what_is_no_python_is_refused(source: str) -> None:
    with pytest.raises(VerifyError, match="no Python"):
        check_source(source)


class Long(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(60))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_a_program_of_many_pieces_passes() -> None:
    pipe = pipelined(Long(), chunks=1)
    pipe(torch.randn(2, 2))
    assert pipe.code.count("\n") > 500
    assert "BW_0_b2" in check_source(pipe.code)
