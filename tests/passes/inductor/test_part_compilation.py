"""A part becomes compiled code, for the sizes for which it holds and for no others.

Covers inductor/compiled_part.py, inductor/modes.py, passes/_torch_inductor.py.
"""

from __future__ import annotations

import itertools
import threading
import time

import sympy
import torch
from torch import Tensor, fx

from autopipe.passes._torch_inductor import compile_graph, compiler_fake_mode
from autopipe.passes.graph import SizeExpression
from autopipe.passes.inductor import (
    MODES,
    ExpectedTensor,
    as_expected,
    compile_part,
    inductor_options,
    part_key,
)
from autopipe.passes.ir import B, GraphPart

aten = torch.ops.aten
CPU = torch.device("cpu")


def part(count: float = 2.0, name: str = "F_0_B_part_1") -> GraphPart:
    """x[B, 3] → x * count + B, as a matrix of one row."""
    graph = fx.Graph()
    x = graph.placeholder(name.lower())
    environment = compiler_fake_mode()
    from autopipe.passes._torch_sizes import create_size_symbol

    assert environment.shape_env is not None
    _, size = create_size_symbol(environment.shape_env, "B", 4)
    with environment:
        x.meta["val"] = torch.empty(size, 3)
    scaled = graph.call_function(aten.mul.Scalar, (x, count))
    moved = graph.call_function(aten.add.Scalar, (scaled, SizeExpression(B)))
    row = graph.call_function(aten.reshape.default, (moved, [1, SizeExpression(3 * B)]))
    row.meta["val"] = x.meta["val"]
    graph.output([row])
    return GraphPart(name, 0, graph, CPU, CPU, (B,))


def expected(x: Tensor) -> Tensor:
    return (x * 2 + len(x)).reshape(1, -1)


def test_one_code_for_all_sizes_or_for_one() -> None:
    options = inductor_options("default")
    for symbolic in (True, False):
        compiled = compile_part(part(), {B: 4}, options, symbolic=symbolic)
        assert compiled.holds_for({B: 4})
        assert compiled.holds_for({B: 5}) == symbolic
        assert not compiled.holds_for({B: 1})
        assert compiled.symbols == ((B,) if symbolic else ())
        assert compiled.expected({B: 5})[0].shape == (5, 3)
        for n in (4, 5) if symbolic else (4,):
            x = torch.randn(n, 3)
            arguments = [n, x] if symbolic else [x]
            (found,) = compiled.call(arguments)
            assert arguments == []  # what is not read any more can be freed
            torch.testing.assert_close(found, expected(x))


def test_a_size_that_torch_fixes_is_a_condition() -> None:
    """Reshaping to four rows is only possible for one size."""
    one = part()
    node = next(n for n in one.graph.nodes if n.target is aten.reshape.default)
    node.args = (node.args[0], [4, 3])
    compiled = compile_part(one, {B: 4}, inductor_options("default"), symbolic=True)
    assert any(isinstance(c, sympy.Eq) for c in compiled.conditions)
    assert not compiled.holds_for({B: 5})


def test_equal_parts_have_equal_keys() -> None:
    assert part_key(part()) == part_key(part(name="F_1_B_part_1"))
    assert part_key(part()) != part_key(part(3.0))


def test_modes_are_those_of_torch() -> None:
    import torch._inductor

    assert {*MODES} <= {*torch._inductor.list_mode_options()}
    for mode in MODES:
        found = inductor_options(mode)
        assert found["triton.cudagraphs"] is False
        assert found["cpp.threads"] == torch.get_num_threads()
    assert inductor_options("max-autotune")["max_autotune"]


def test_arguments_become_what_compiled_code_expects() -> None:
    wanted = [ExpectedTensor((2, 3), (3, 1), torch.float32)]
    dense, turned = torch.randn(2, 3), torch.randn(3, 2).t()
    for tensor in (dense, turned):
        given = [tensor]
        assert as_expected(given, wanted)
        assert given[0].stride() == (3, 1)
        assert torch.equal(given[0], tensor)
        assert (given[0] is tensor) == (tensor is dense)
    for other in (dense.double(), dense[:1]):
        assert not as_expected([other], wanted)
    one = [torch.randn(1, 3).as_strided((1, 3), (7, 1))]
    assert as_expected(one, [ExpectedTensor((1, 3), (3, 1), torch.float32)])
    negative = [torch.view_as_complex(torch.randn(2, 3, 2)).conj().imag]
    values = negative[0].clone()
    assert negative[0].is_neg()
    assert as_expected(negative, wanted)
    assert not negative[0].is_neg()
    assert torch.equal(negative[0], values)


def test_kernels_release_the_lock_of_python() -> None:
    """While a kernel runs for a while, another thread goes on."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(30):
        x = graph.call_function(aten.exp.default, (graph.call_function(aten.sin.default, (x,)),))
    graph.output([x])
    mode = compiler_fake_mode()
    with mode:
        example = torch.empty(4_000_000)
    call = compile_graph(fx.GraphModule({}, graph), [example], {"cpp.threads": 1})
    call([torch.zeros(4_000_000)])
    ticks, running = [time.perf_counter()], threading.Event()

    def work() -> None:
        running.set()
        call([torch.zeros(4_000_000)])
        running.clear()

    thread = threading.Thread(target=work)
    thread.start()
    running.wait(10)
    start = time.perf_counter()
    while running.is_set():
        ticks.append(time.perf_counter())
    duration = time.perf_counter() - start
    thread.join()
    gaps = [b - a for a, b in itertools.pairwise(ticks[1:])]
    assert max(gaps, default=duration) < duration / 2


def test_a_compiled_graph_takes_a_list() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(aten.exp.default, (x,))])
    mode = compiler_fake_mode()
    with mode:
        example = torch.empty(3)
    call = compile_graph(fx.GraphModule({}, graph), [example], {})
    given = [torch.zeros(3)]
    (found,) = call(given)
    assert given == []
    assert torch.equal(found, torch.ones(3))
