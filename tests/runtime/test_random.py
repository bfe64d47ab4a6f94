"""Draws are functions of (seed, call, micro-batch), whatever thread makes them and how often.

What all samples share is a function of (seed, call)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopipe.runtime.random import MicroBatchContext, derive_seed, step_seed

aten = torch.ops.aten
X = torch.full((40, 30), 0.5)

WITH_GENERATOR: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bernoulli": (aten.bernoulli.p, (X, 0.3)),
    "bernoulli of probabilities": (aten.bernoulli.default, (X,)),
    "rand": (aten.rand.default, ([40, 30],)),
    "randn": (aten.randn.default, ([40, 30],)),
    "randint": (aten.randint.low, (3, 90, [40, 30])),
    "randperm": (aten.randperm.default, (1000,)),
    "multinomial": (aten.multinomial.default, (X, 20)),
    "normal": (aten.normal.Tensor_float, (X, 2.0)),
}
WITHOUT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "dropout": (aten.native_dropout.default, (X, 0.5, True)),
    "attention": (
        aten._scaled_dot_product_attention_math.default,
        (X[None], X[None], X[None], None, 0.5),
    ),
}
OPS = WITH_GENERATOR | WITHOUT
each_op = pytest.mark.parametrize("name", OPS)


def draw(name: str, *, seed: int = 5, call: int = 0, m: int = 0, shared: bool = False) -> Tensor:
    op, args = OPS[name]
    drawn = MicroBatchContext(seed, [(n, 0, shared) for n in range(4)], m).draw(call, op, *args)
    result: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
    return result


# ------------------------------------------------------------------------------- keys


def test_keys_are_splitmix64() -> None:
    """The generator's first outputs from the seeds 0 and 1234567, as published."""
    assert derive_seed(0) == 0xE220A8397B1DCDAF
    assert derive_seed(1234567) == 6457827717110365317


def test_keys_of_different_parts_differ() -> None:
    keys = [derive_seed(*parts) for parts in itertools.product(range(9), repeat=4)]
    assert len(set(keys)) == 9**4
    assert all(0 <= k < 2**64 for k in keys)
    assert derive_seed(1, 2) != derive_seed(2, 1) != derive_seed(1) != derive_seed(1, 2, 0)


def test_a_steps_seed_comes_from_the_default_generator() -> None:
    torch.manual_seed(3)
    seeds = [step_seed() for _ in range(5)]
    torch.manual_seed(3)
    assert [step_seed() for _ in range(5)] == seeds
    assert len(set(seeds)) == 5
    torch.manual_seed(4)
    assert step_seed() not in seeds


# ------------------------------------------------------------------------------- draws


@each_op
def test_a_repetition_draws_the_same(name: str) -> None:
    first = draw(name)
    draw(name, m=1)  # whatever was drawn in between
    torch.rand(3)
    assert torch.equal(draw(name), first)


@each_op
def test_another_seed_call_or_micro_batch_draws_something_else(name: str) -> None:
    others = [draw(name, seed=6), draw(name, call=1), draw(name, m=1)]
    for a, b in itertools.combinations([draw(name), *others], 2):
        assert not torch.equal(a, b)


@each_op
def test_micro_batches_share_a_draw(name: str) -> None:
    """Each draws what the first one draws of its own."""
    first = draw(name)
    assert all(torch.equal(draw(name, m=m, shared=True), first) for m in range(3))
    for other in (draw(name, seed=6, shared=True), draw(name, call=1, shared=True)):
        assert not torch.equal(other, first)


@pytest.mark.parametrize("name", WITH_GENERATOR)
def test_a_draw_is_the_operators_own_under_the_key(name: str) -> None:
    op, args = OPS[name]
    generator = torch.Generator().manual_seed(derive_seed(5, 0, 0, 2))
    overload = op
    if "generator" not in [a.name for a in op._schema.arguments]:
        names = {"rand": "generator", "randn": "generator", "randint": "low_generator"}
        overload = getattr(op.overloadpacket, names.get(name, "generator"))
    assert torch.equal(draw(name, m=2), overload(*args, generator=generator))


@pytest.mark.parametrize("name", WITHOUT)
def test_operators_without_generator_draw_under_the_key_too(name: str) -> None:
    op, args = OPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(5, 0, 0, 2))
        expected = op(*args)
    assert torch.equal(draw(name, m=2), expected[0])


# ------------------------------------------------------------------------------- arguments


def operators_with_generator() -> list[Any]:
    """Every random operator in torch's registry that takes a generator, or has such an overload."""
    found = []
    for schema in torch._C._jit_get_all_schemas():
        if any(a.is_out for a in schema.arguments) or schema.name.startswith("autopipe"):
            continue
        namespace, name = schema.name.split("::")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        op = getattr(packet, schema.overload_name or "default", None)
        if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()):
            others = [getattr(packet, n)._schema.arguments for n in packet.overloads()]
            if any("Generator" in str(a.type) for arguments in others for a in arguments):
                found.append(op)
    return sorted(found, key=str)


ARGUMENTS: dict[str, Any] = {
    "Tensor": X,
    "number": 1,
    "float": 0.5,
    "int": 2,
    "List[int]": [2, 3],
    "bool": True,
    "Optional[Generator]": None,
    "ScalarType": torch.float32,
    "Device": torch.device("cpu"),
}
"""A value of each type, by the type's name."""


class Received(TorchDispatchMode):
    """Records the generators that torch's own operators receive, and the other arguments.

    Of a tensor only the shape is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[torch.Generator] = []
        self.others: list[list[Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [*args, *(kwargs or {}).values()]
        found = [v for v in values if isinstance(v, torch.Generator)]
        if found:
            self.generators += found
            others = [v for v in values if not isinstance(v, torch.Generator)]
            self.others.append([v.shape if isinstance(v, Tensor) else v for v in others])
            raise InterruptedError
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", operators_with_generator(), ids=str)
def test_each_operator_gets_the_generator_however_its_arguments_are_passed(op: Any) -> None:
    """Truth: torch's own parser, which binds the call before the operator runs."""
    arguments = op._schema.arguments
    values = {
        a.name: ARGUMENTS.get(str(a.type)) if not a.has_default_value() else a.default_value
        for a in arguments
    }
    in_order = [a.name for a in arguments if not a.kwarg_only]
    generators = {a.name for a in arguments if "Generator" in str(a.type)}
    others: list[list[Any]] = []
    for n, left_out in itertools.product(range(len(in_order) + 1), (True, False)):
        positional = [values[name] for name in in_order[:n]]
        named = {k: v for k, v in values.items() if k not in in_order[:n]}
        if left_out:
            named = {k: v for k, v in named.items() if k not in generators}
        with Received() as received, pytest.raises(InterruptedError):
            MicroBatchContext(5, [(3, 1, False)], 2).draw(0, op, *positional, **named)
        (generator,) = received.generators
        assert generator.initial_seed() == derive_seed(5, 3, 1, 2)
        others += received.others
    assert all(own == others[0] for own in others), "the other arguments are as given"


@pytest.fixture(scope="module")
def between() -> Any:
    """Operators whose generator is not the last argument, and has another name."""
    library = torch.library.Library("autopipe_test_generators", "FRAGMENT")
    tags = (torch.Tag.nondeterministic_seeded,)
    library.define("noise(Tensor x, Generator? source, float scale) -> Tensor", tags=tags)
    library.define("hidden(Tensor x, float scale) -> Tensor", tags=tags)
    library.define("hidden.source(Tensor x, Generator? source, float scale) -> Tensor", tags=tags)
    for name in ("noise", "hidden.source"):
        library.impl(name, lambda x, source, scale: torch.rand(x.shape, generator=source) * scale)
    yield torch.ops.autopipe_test_generators
    library._destroy()


def test_a_generator_between_other_arguments(between: Any) -> None:
    generator = torch.Generator().manual_seed(derive_seed(5, 0, 0, 0))
    expected = torch.rand(X.shape, generator=generator) * 0.5
    noise, hidden = between.noise.default, between.hidden.default
    ctx = MicroBatchContext(5, [(0, 0, False)], 0)
    for found in (
        ctx.draw(0, noise, X, None, 0.5),
        ctx.draw(0, noise, X, None, scale=0.5),
        ctx.draw(0, noise, X, scale=0.5),
        ctx.draw(0, noise, x=X, source=None, scale=0.5),
        ctx.draw(0, hidden, X, 0.5),
        ctx.draw(0, hidden, X, scale=0.5),
        ctx.draw(0, hidden, x=X, scale=0.5),
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["self", "index", "op", "args", "kwargs", "device", "generator_"])
@pytest.mark.parametrize("kind", ["str", "int", "float"])
def test_arguments_of_any_name(name: str, kind: str) -> None:
    """Also one that is called `device` and is none."""
    value = {"str": "left", "int": 1, "float": 0.5}[kind]
    library = torch.library.Library(f"autopipe_test_named_{name}_{kind}", "FRAGMENT")
    library.define(
        f"noise(Tensor[] x, *, {kind} {name}) -> Tensor",
        tags=(torch.Tag.nondeterministic_seeded,),
    )
    library.impl("noise", lambda x, **given: torch.rand(4) + hash(given[name]) % 5)
    op = getattr(torch.ops, f"autopipe_test_named_{name}_{kind}").noise.default
    try:
        found = MicroBatchContext(5, [(0, 0, False)], 0).draw(0, op, [X], **{name: value})
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(5, 0, 0, 0))
            assert torch.equal(found, op([X], **{name: value}))
    finally:
        library._destroy()


@pytest.mark.parametrize("where", ["argument", "keyword", "list", "nowhere"])
def test_the_device_is_found_wherever_it_stands(where: str, monkeypatch: Any) -> None:
    """Of an op without a generator argument, whose device's default generator is used."""
    asked = []

    def backend_of(device: torch.device) -> Any:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr("autopipe.runtime.random.backend_of", backend_of)
    meta, op = torch.device("meta"), aten.native_dropout.default
    args, kwargs = {
        "argument": ((X, meta), {}),
        "keyword": ((X,), {"place": meta}),
        "list": (([X.to(meta)], X), {}),
        "nowhere": ((0.5,), {}),
    }[where]
    with pytest.raises(InterruptedError):
        MicroBatchContext(0, [(0, 0, False)], 0).draw(0, op, *args, **kwargs)
    assert asked == [torch.device("cpu") if where == "nowhere" else meta]


def test_an_overload_for_other_types_is_not_taken() -> None:
    """`randint_like` has one for a number and one for a tensor, with the same names."""
    op = aten.randint_like.Tensor
    found = MicroBatchContext(5, [(0, 0, False)], 0).draw(0, op, X, torch.tensor(9))
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(5, 0, 0, 0))
        assert torch.equal(found, torch.randint_like(X, 9))


# ------------------------------------------------------------------------------- side effects


@each_op
def test_the_default_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    draw(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_generator_is_left_alone_by_a_draw_that_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        MicroBatchContext(0, [(0, 0, False)], 0).draw(0, aten.native_dropout.default, X, 2.0, True)
    assert torch.equal(torch.get_rng_state(), before)


def in_threads(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=f, daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(t.is_alive() for t in threads)


@each_op
def test_the_thread_does_not_matter(name: str) -> None:
    expected = [draw(name, m=m) for m in range(12)]
    found: dict[int, list[Tensor]] = {}
    together = threading.Barrier(4)

    def work(worker: int) -> None:
        together.wait(10)
        order = range(12) if worker % 2 else reversed(range(12))
        made = {m: draw(name, m=m) for m in order}
        found[worker] = [made[m] for m in range(12)]

    before = torch.get_rng_state()
    in_threads([lambda w=w: work(w) for w in range(4)])  # type: ignore[misc]
    assert sorted(found) == list(range(4))
    for values in found.values():
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_different_micro_batches_are_unrelated() -> None:
    """Correlations of 1200 numbers each are of the order of 1/√1200 ≈ 0.03."""
    rows = torch.stack([draw("randn", m=m).flatten() for m in range(8)])
    related = torch.corrcoef(rows) - torch.eye(8)
    assert related.abs().max() < 0.15
    assert rows.mean().abs() < 0.05
    assert abs(rows.std().item() - 1) < 0.05


# ------------------------------------------------------------------------------- the ctx's words


def layouts() -> list[Tensor]:
    base = torch.randn(2, 6, 4, 3)
    shapes = [(2, 6, 4, 3), (1, 6, 4, 3), (2, 1, 4, 3), (1, 1, 4, 3), (2, 6, 1, 1), (1, 6, 1, 3)]
    made = [torch.randn(s) for s in shapes]
    made += [torch.randn(s).to(memory_format=torch.channels_last) for s in shapes]
    made += [base.transpose(1, 2), base.transpose(2, 3), base.permute(0, 2, 3, 1), base[:, ::2]]
    made += [base[:1].permute(0, 2, 3, 1), base[..., :1], base[:, :1].expand(-1, 6, -1, -1)]
    return made


@pytest.mark.parametrize("tensor", layouts(), ids=lambda t: f"{tuple(t.shape)}-{t.stride()}")
def test_settled_is_dense_in_the_format_that_aten_suggests(tensor: Tensor) -> None:
    """Truth: an operator that asks ATen for the suggested format and makes its result in it."""
    found = MicroBatchContext.in_suggested_format(tensor)
    assert torch.equal(found, tensor)
    suggested = aten.upsample_nearest2d.default(tensor, list(tensor.shape[2:]))
    pairs = zip(tensor.shape, found.stride(), suggested.stride(), strict=True)
    assert all(own == theirs for size, own, theirs in pairs if size > 1)
    assert MicroBatchContext.in_suggested_format(found) is found


def test_recording_calls_with_gradients_on() -> None:
    seen = []
    with torch.no_grad():
        MicroBatchContext.with_grad(lambda x: seen.append((x, torch.is_grad_enabled())), 3)
        seen.append((0, torch.is_grad_enabled()))
    assert seen == [(3, True), (0, False)]
    given = MicroBatchContext.with_grad(lambda *args, **kwargs: (args, kwargs), 3, op=4, self=5)
    assert given == ((3,), {"op": 4, "self": 5})
