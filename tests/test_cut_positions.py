"""The option `cut_at`: which modules it means. Covers autopipe/cut_positions.py."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from autopipe.cut_positions import cut_positions
from autopipe.errors import OptionError
from autopipe.passes.split import CutAt


class Layer(nn.Module):
    """A layer whose parts stand in a list, as those of T5 do."""

    def __init__(self, width: int, experts: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(width, width), nn.LayerNorm(width)])
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


class Stage(nn.Module):
    """A stage of a model such as Swin: layers, and what leads to the next stage."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.down = nn.Linear(width, 2 * width)


class Model(nn.Module):
    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(4, 4), nn.ModuleList(members), nn.Linear(4, 4)


def blocks(model: nn.Module) -> list[str]:
    found = cut_positions(model, "blocks")
    assert found.starts is None
    return sorted(found.whole)


def test_blocks_are_the_members_of_lists() -> None:
    assert blocks(Model(nn.Linear(4, 8), nn.Linear(8, 4))) == ["body.0", "body.1"]
    layer = nn.Linear(4, 4)
    assert blocks(nn.Sequential(layer, nn.ReLU(), layer)) == ["0", "1", "2"]


def test_lists_within_a_repeated_block_do_not_count() -> None:
    assert blocks(Model(Layer(4, experts=2), Layer(4, experts=2))) == ["body.0", "body.1"]
    assert blocks(Model(Layer(4))) == ["body.0"]


def test_a_list_of_stages_gives_way_to_their_layers() -> None:
    found = blocks(Model(nn.Linear(4, 4), Stage(4, 2), Stage(8, 1), Stage(16, 2)))
    first, last = [f"body.1.layers.{n}" for n in (0, 1)], [f"body.3.layers.{n}" for n in (0, 1)]
    assert found == ["body.0", *first, "body.2", *last]


def test_names_and_classes() -> None:
    model = Model(Layer(4), Layer(4), Stage(4, 1))
    names = frozenset({"body.1", "head"})
    assert cut_positions(model, None) == CutAt()
    assert cut_positions(model, ["body.1", "head"]) == CutAt(starts=names)
    assert cut_positions(model, "body.1") == CutAt(starts=frozenset({"body.1"}))
    layers = CutAt(whole=frozenset({"body.0", "body.1", "body.2.layers.0"}))
    assert cut_positions(model, Layer) == cut_positions(model, ("Layer",)) == layers
    assert cut_positions(model, [Layer, "body.1", "head"]) == CutAt(layers.whole, names)


@pytest.mark.parametrize(
    ("cut_at", "said"),
    [
        ("block", "the nearest: 'blocks'"),
        (["body.11"], "the nearest: 'body.1'"),
        (["Layr"], "the nearest: 'Layer'"),
        (nn.Conv2d, "the model has no such module"),
        ("Model", r"found: 'Model'(?!\n.*nearest: 'Model')"),
        ("body", "never calls an nn.ModuleList.*\n.*\n.*\n.*cut at its members"),
        (nn.ModuleList, "never calls an nn.ModuleList"),
        ([], "names no module"),
        ([""], "the model has no such module"),
        (3, "names no module"),
        ([int], "names no module"),
    ],
)
def test_what_is_no_module_is_refused(cut_at: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        cut_positions(Model(Layer(4), Layer(4)), cut_at)


def test_a_model_without_lists_has_no_blocks() -> None:
    with pytest.raises(OptionError, match="no blocks to cut at"):
        cut_positions(nn.Linear(4, 4), "blocks")
