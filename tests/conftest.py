"""Shared by all tests: one thread per operator (so that sums have one order), GPU skipping."""

from __future__ import annotations

import gc

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 100)  # tracing makes objects by the million; this saves a tenth


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
