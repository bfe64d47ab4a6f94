"""What a model's modules hold besides parameters may change between calls: eager torch sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopipe
from tests.support.loops import Net, alike, ids, loss_of, train

pytestmark = [pytest.mark.few(1), pytest.mark.usefixtures("alike_models_once")]


@dataclasses.dataclass
class Settings:
    factor: float = 1.0
    inner: SimpleNamespace = dataclasses.field(default_factory=lambda: SimpleNamespace(power=1.0))


class Holds(Net):
    """A net whose result depends on all kinds of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = torch.tensor(1.0, dtype=torch.float64)
        self.settings: Any = Settings()
        self.table_of: dict[str, Any] = {"factors": [1.0, 2.0]}
        self.masks = [torch.ones(8, dtype=torch.float64)]

    def forward(self, ids: Tensor) -> Tensor:
        y = super().forward(ids) * self.scale * self.settings.factor
        y = y * self.settings.inner.power * self.table_of["factors"][0]
        return y * self.masks[0].mean()


def other_tensor(m: Any) -> None:
    m.scale = torch.tensor(3.0, dtype=torch.float64)


def tensor_in_place(m: Any) -> None:
    m.scale.mul_(3)


def other_setting(m: Any) -> None:
    m.settings.factor = 3.0


def other_settings(m: Any) -> None:
    m.settings = Settings(factor=3.0)


def nested_setting(m: Any) -> None:
    m.settings.inner.power = 3.0


def entry_of_a_dict(m: Any) -> None:
    m.table_of["factors"][0] = 3.0


def tensor_in_a_list(m: Any) -> None:
    m.masks[0] = torch.full((8,), 3.0, dtype=torch.float64)


CHANGES: list[Callable[[Any], None]] = [
    other_tensor,
    tensor_in_place,
    other_setting,
    other_settings,
    nested_setting,
    entry_of_a_dict,
    tensor_in_a_list,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_attributes_that_change_between_steps(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)

    def loop(module: nn.Module) -> Any:
        before = train(module, 1)
        change(getattr(module, "model", module))
        return before, train(module, 2)

    alike(loop, Holds().double())


def test_what_holds_the_module_is_not_looked_into() -> None:
    """A trainer that a module knows changes in every step; that is no reason to capture again."""

    class Trainer:
        def __init__(self) -> None:
            self.step = 0

    torch.manual_seed(0)
    model: Any = Holds().double()
    model.trainer = Trainer()
    pipe = alike(lambda module: loss_of(module, 0), model)
    captured = pipe.captured
    model.trainer.step += 1
    pipe(ids())
    assert pipe.captured is captured


scale = 1.0


def test_a_variable_with_the_name_of_an_attribute_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script's ``for scale in ...`` is none of the model's business."""
    pipe = autopipe.compile(Holds(), 2, 2)
    for value in (1.0, 2.0, 3.0):
        monkeypatch.setitem(globals(), "scale", value)
        pipe(ids(4))
    assert autopipe.explain_captures(pipe).count == 1
