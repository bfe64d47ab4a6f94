"""A stage's state as graphs read it: where it is, or in copies that follow it."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from autopipe.runtime.graphs.stage_state import StageState, settings


def test_what_stays_is_read_where_it_is() -> None:
    state, weight = StageState(), torch.ones(3)
    assert state.is_as_before([weight])  # nothing was captured before
    assert state.is_as_before([weight.detach()])
    assert state.in_place([weight])[0].data_ptr() == weight.data_ptr()


def test_what_is_new_in_the_second_run_is_copied_from_then_on() -> None:
    state, weight = StageState(), torch.ones(3)
    buffers = [torch.full((2,), float(n)) for n in range(4)]
    state.is_as_before([weight, buffers[0]])
    assert not state.is_as_before([weight, buffers[1]])
    read = state.in_place([weight, buffers[1]])
    assert read[0].data_ptr() == weight.data_ptr()
    assert read[1].tolist() == [1, 1]
    for n in (2, 3):
        assert state.is_as_before([weight, buffers[n]])
        state.refresh([weight, buffers[n]])
        assert read[1].tolist() == [n, n]
    buffers[3].zero_()
    state.refresh([weight, buffers[3]])
    assert read[1].tolist() == [0, 0]


def test_what_is_replaced_once_is_read_at_its_new_place() -> None:
    state, old, new, newer = StageState(), *(torch.full((3,), float(n)) for n in range(3))
    for _ in range(3):
        state.is_as_before([old])
    assert not state.is_as_before([new])
    assert state.is_as_before([new])
    assert state.in_place([new])[0].data_ptr() == new.data_ptr()
    assert not state.is_as_before([newer])
    copy = state.in_place([newer])[0]
    assert copy.data_ptr() != newer.data_ptr()
    assert state.is_as_before([old])
    state.refresh([old])
    assert copy.tolist() == [0, 0, 0]


def test_a_copy_has_the_new_shape() -> None:
    state = StageState()
    for n in (1, 2, 2):
        state.is_as_before([torch.ones(n)])
    x = torch.arange(3.0)
    assert not state.is_as_before([x])
    assert state.in_place([x])[0].tolist() == [0, 1, 2]


def test_settings_of_torch_count() -> None:
    state, weight = StageState(), torch.ones(3)
    state.is_as_before([weight])
    before = settings()
    was = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = not was
    try:
        assert settings() != before
        assert not state.is_as_before([weight])
        assert state.is_as_before([weight])
    finally:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = was


def test_precisions_of_either_interface_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has set the newer one (``fp32_precision``) cannot read the older one."""

    class Newer:
        fp32_precision, allow_fp16_accumulation = "tf32", False
        allow_fp16_reduced_precision_reduction = allow_bf16_reduced_precision_reduction = True

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Newer())
    before = settings()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    assert settings() != before


def test_what_inference_mode_makes_is_read_anew() -> None:
    """Nobody counts the changes of such a tensor; and its copy is used in other modes."""
    state = StageState()
    with torch.inference_mode():
        buffers = [torch.full((2,), float(n)) for n in range(2)]
        for buffer in buffers:
            state.is_as_before([buffer])
        read = state.in_place([buffers[1]])
        buffers[1].fill_(5)
        state.refresh([buffers[1]])
        assert read[0].tolist() == [5, 5]
    with torch.no_grad():
        state.refresh([torch.zeros(2)])
    assert read[0].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_tensor_is_nowhere(layout: torch.layout) -> None:
    state, weight = StageState(), torch.ones(3)
    tensors = [weight, torch.eye(3).to_sparse(layout=layout)]
    assert state.is_as_before(tensors)
    assert state.is_as_before(tensors)
    assert not state.is_as_before([weight.clone(), tensors[1]])


def test_a_wrapper_is_where_its_parts_are() -> None:
    state, parts = StageState(), [torch.ones(3), torch.ones(3)]
    for _ in range(3):
        assert state.is_as_before([TwoTensor(*parts)])
    for _ in range(3):
        parts = [x.clone() for x in parts]
        wrapper = TwoTensor(*parts)
        assert not state.is_as_before([wrapper])
        assert type(state.in_place([wrapper])[0]) is TwoTensor
    assert state.is_as_before([TwoTensor(*parts)])
