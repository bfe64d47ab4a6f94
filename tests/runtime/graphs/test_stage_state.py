"""A stage's state as graphs read it: where it is, or in copies that follow it."""

from __future__ import annotations

import pytest
import torch

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


def test_settings_of_torch_count(monkeypatch: pytest.MonkeyPatch) -> None:
    state, weight = StageState(), torch.ones(3)
    state.is_as_before([weight])
    before = settings()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    assert settings() != before
    assert not state.is_as_before([weight])
    assert state.is_as_before([weight])
