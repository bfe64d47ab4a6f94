"""Random graphs of real operators, as pipelines, against the model itself and the captured graph.

    AUTOPIPE_GRAPHS=5000 pytest tests/test_random_graphs.py

draws that many graphs anew (four or five minutes a thousand); without it every run takes the
same few hundred. A failure prints ``Program(...)`` and ``Setup(...)``: paste them into `agree`.

Truth is eager torch on the whole batch, which a program that does not mix samples must reproduce
to rounding, and, bit for bit, the captured graph under plain autograd (`tests.support.reference`).
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import autopipe
from autopipe.call_signature import flatten
from autopipe.errors import PartitionError
from tests.support import reference
from tests.support.agreement import ROUNDING, assert_agrees, assert_close, fresh, objective
from tests.support.random_drawing import programs
from tests.support.random_kinds import Brief
from tests.support.random_models import Program, RandomModel

DRAWN = int(os.environ.get("AUTOPIPE_GRAPHS", "0"))


def graphs(count: int) -> Any:
    """Settings: `count` examples, always the same, unless `DRAWN` asks for others."""
    return settings(
        max_examples=DRAWN or count,
        deadline=None,
        derandomize=not DRAWN,
        database=None,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@dataclass(frozen=True, repr=False)
class Setup(Brief):
    """How a program is pipelined and called.

    Attributes:
        again: the number of samples of a second call, if there is one.
        then: what changes before it: "eval" (from training) or "no_grad".
        names: inputs are keyword arguments.
    """

    devices: int = 2
    chunks: int = 2
    batch: int = 4
    again: int | None = None
    then: str = ""
    remat: str = "full"
    train: bool = True
    names: bool = False


SETUPS = st.builds(
    Setup,
    devices=st.sampled_from((2, 1, 3, 4)),
    chunks=st.sampled_from((2, 3, 1, 4, 5)),
    batch=st.integers(1, 9),
    again=st.one_of(st.none(), st.none(), st.none(), st.integers(1, 9)),
    then=st.sampled_from(("", "eval", "no_grad")),
    remat=st.sampled_from(("full", "none", "min-cut")),
    train=st.booleans(),
    names=st.booleans(),
)


def compiled(program: Program, setup: Setup, batch: int) -> tuple[autopipe.Pipeline, Any]:
    """The pipeline, on fewer devices if its graph has too few calls for so many; its call."""
    model = RandomModel(program, setup.train)
    call = _call(program, setup, batch)
    in_dims: Any = program.in_dims
    if setup.names:
        in_dims = {f"x{i}": d for i, d in enumerate(program.in_dims)}
    for devices in range(setup.devices, 0, -1):
        try:
            pipe = autopipe.compile(
                model,
                devices,
                setup.chunks,
                remat=setup.remat,
                in_dims=in_dims,
                args=call[0],
                kwargs=call[1],
            )
        except PartitionError:
            continue
        return pipe, call
    event("nothing is computed")
    assume(False)
    raise AssertionError


def _call(program: Program, setup: Setup, batch: int) -> Any:
    arguments = program.arguments(batch)
    if setup.names:
        return (), {f"x{i}": x for i, x in enumerate(arguments)}
    return arguments, {}


def agree(program: Program, setup: Setup) -> None:
    """Training steps of the pipeline are those of the model, and of its captured graph."""
    pipe, call = compiled(program, setup, setup.batch)
    assert_agrees(pipe, *call[0], **call[1])
    assert_bit_equal(pipe, call)
    if setup.again is None:
        return
    args, kwargs = _call(program, setup, setup.again)
    if setup.then == "no_grad":
        with torch.no_grad():
            found, expected = pipe(*args, **kwargs), pipe.model(*args, **kwargs)
        pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
        for n, (x, y) in enumerate(pairs):
            if isinstance(y, Tensor):
                assert_close(x, y, f"result {n} without gradients")
    else:
        pipe.train(setup.train and setup.then != "eval")
        assert_agrees(pipe, *args, **kwargs)


def assert_bit_equal(pipe: autopipe.Pipeline, call: Any) -> None:
    """A training step equals the captured graph's under plain autograd, chunk by chunk."""
    unbatched = {i.index for i in pipe.captured.inputs if i.batch_dim is None}
    for leaf in pipe.captured.leaves:
        if leaf.kind == "parameter" or (leaf.kind == "input" and leaf.value in unbatched):
            return  # its gradient goes around the chunks, which the reference does not know
    if any(i.batch_dim == 1 for i in pipe.captured.inputs):
        return  # the reference's chunks are not dense; other strides, other kernels, other bits
    if any(op.name == "gru" for op in pipe.model.program.ops):
        return  # see test_bugs_graphs
    model = copy.deepcopy(pipe.model)
    pipe.zero_grad()
    args, kwargs = fresh(call)
    result = pipe(*args, **kwargs)
    reference.objective(result).backward()
    chunks = pipe.options.chunks
    truth = reference.over_chunks(pipe.captured, model, flatten(*call)[0], chunks)
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(truth.result), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if not _same(a, b)] == [], "results"
    for name, gradient in truth.parameters.items():
        assert _same(pipe.get_parameter(name).grad, gradient), f"gradient of {name}"
    inputs = [x.grad for x in flatten(args, kwargs)[0] if x.requires_grad]
    pairs = zip(inputs, truth.inputs, strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if not _same(a, b)] == [], "gradients of inputs"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return bool(a == b)


def well_defined(program: Program, setup: Setup) -> bool:
    """Can eager torch run it, and are its results what the inputs say and not what rounding says?

    A gradient that is zero in exact arithmetic, or a comparison of two values that are equal but
    for rounding, is another one in every run. Such programs are known by a change of parameters and
    inputs in their last bits, after which eager torch disagrees with itself; or by a gradient that
    is nothing but rounding beside what it is made of (it may be the same after that change).
    """
    for batch in {setup.batch, setup.again or setup.batch}:
        runs, gradients = [], []
        for bits in (0, 4):
            model = RandomModel(program, setup.train)
            inputs = fresh(program.arguments(batch))
            _shake([*model.parameters(), *model.buffers(), *inputs], bits)
            try:
                result = model(*inputs)
                objective(result).backward()
            except RuntimeError:  # almost always a value that was needed, and written to
                event("eager torch refuses it")
                return False
            gradients = [x.grad for x in (*model.parameters(), *inputs) if x.grad is not None]
            runs.append([*pytree.tree_leaves(result), *gradients])
        sizes = [x.nan_to_num(0, 0, 0).abs().max().item() for x in gradients if x.numel()]
        if not all(map(_close, *runs)) or any(0 < s < 1e-14 * max(sizes) for s in sizes):
            event("ill-conditioned")
            return False
    return True


def _shake(tensors: list[Tensor], bits: int) -> None:
    """Change every float by up to so many units of its last place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in tensors:
            if x.is_floating_point():
                ulps = torch.randint(-bits, bits + 1, x.shape, generator=generator)
                x.mul_(1 + ulps * torch.finfo(x.dtype).eps)


def _close(a: Any, b: Any) -> bool:
    """Within a tenth of the rounding that is allowed."""
    if not isinstance(a, Tensor):
        return a == b
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = a.detach().nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(a, b, rtol=0, atol=ROUNDING / 10 * scale, equal_nan=True)


@pytest.mark.skipif(DRAWN > 0, reason="the test after it draws them")
@graphs(10)
@given(programs(), SETUPS)
def test_a_few_random_graphs_agree_with_the_model(program: Program, setup: Setup) -> None:
    assume(well_defined(program, setup))
    agree(program, setup)


@pytest.mark.full
@graphs(200)
@given(programs(), SETUPS)
def test_random_graphs_agree_with_the_model(program: Program, setup: Setup) -> None:
    assume(well_defined(program, setup))
    agree(program, setup)


@graphs(100)
@given(programs(), st.integers(1, 5))
def test_kinds_are_what_torch_makes(program: Program, batch: int) -> None:
    """The generator tests itself: values have the shapes and dtypes that it thinks they have."""
    model = RandomModel(program)
    kinds = [g.kind for g in program.inputs] + [h.kind for h in program.held]
    kinds += [k for made in model.plan for k in made.kinds]
    try:
        values = model.values(*program.arguments(batch))
    except RuntimeError:
        assume(False)
    other = torch.Generator()
    for kind, value in zip(kinds, values, strict=True):
        expected = kind.tensor(batch, other)
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
        if kind.dtype == "long" and value.numel() and not kind.reduced:
            assert value.min() >= 0
            assert value.max() < kind.high
