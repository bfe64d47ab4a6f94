"""Version counters tell what was changed in place, as autograd does."""

from __future__ import annotations

import torch

from autopipe.version_watch import VersionWatch


def watch(*tensors: torch.Tensor) -> VersionWatch:
    result = VersionWatch()
    result.add([f"t{i}" for i in range(len(tensors))], tensors)
    return result


def test_an_in_place_change_is_seen_through_every_alias() -> None:
    for view in (lambda x: x, lambda x: x[1:], lambda x: x.detach(), lambda x: x.view(2, 2)):
        x = torch.zeros(4)
        seen = watch(torch.zeros(1), view(x))
        assert seen.changed() is None
        x.add_(1)
        assert seen.changed() == "t1"


def test_only_the_names_asked_for() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    seen = watch(x, y)
    y.add_(1)
    assert seen.changed({"t0"}) is None
    assert seen.changed({"t1"}) == "t1"
    assert seen.changed(frozenset()) is None


def test_reading_and_data_are_no_changes() -> None:
    x = torch.zeros(2)
    seen = watch(x)
    assert x.sum() == 0
    x.data.add_(1)  # as in eager torch: nobody notices
    assert seen.changed() is None


def test_nothing_is_watched_after_clear() -> None:
    x = torch.zeros(2)
    seen = watch(x)
    x.add_(1)
    seen.clear()
    assert seen.changed() is None


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        x = torch.zeros(2)
    assert watch(x).changed() is None
