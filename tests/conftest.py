"""Shared by all tests: one thread per operator (so that sums have one order), tiers, GPU skipping.

What belongs in which tier says CONTRIBUTING.md; `tests.support.tiers` is how.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from tests.support import once
from tests.support.tiers import (
    files_by_tier,
    group_by_model,
    mark_full,
    outside_part,
    parse_part,
)

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 100)  # tracing makes objects by the million; this saves a tenth

FILES = pytest.StashKey[dict[str, bool]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-part", help="run the first tier and this part of the rest: 3/12")


@pytest.hookimpl(tryfirst=True)  # before -m "not full" takes its choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_full(items)
    group_by_model(items)
    config.stash[FILES] = files_by_tier(items)
    if text := config.getoption("full_part"):
        items[:], others = outside_part(items, *parse_part(text))
        config.hook.pytest_deselected(items=others)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def files(pytestconfig: pytest.Config) -> dict[str, bool]:
    """The files of tests that were collected: has each a test in the first tier?"""
    return pytestconfig.stash[FILES]


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """A collection of garbage need not go through what was imported or traced before a file."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def traces_once() -> Iterator[None]:
    """A stage is traced once for all tests in which it is the same program."""
    with once.traces_once():
        yield


@pytest.fixture(scope="module")
def each_stage_cut_alone() -> Iterator[None]:
    """Cuts do not depend on which stages share a device.

    So a pipeline with several stages per device is cut as one with a device for each: another cut
    may sum gradients in another order.
    """
    name = "autopipe.passes.split.assign_stages.balance_devices"
    with mock.patch(name, lambda loads, starts, homes, **more: tuple(starts)):
        yield


@pytest.fixture(scope="module")
def alike_models_once() -> Iterator[None]:
    """And all models of a file that are made in the same way are captured once."""
    with once.pure_passes_once(alike=True):
        yield
