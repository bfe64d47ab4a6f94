"""Models wherever they are: on a CPU, on one device, on none of the stages', spread, on meta.

The truth is the same pipeline on CPU workers.
"""

from __future__ import annotations

import gc

import pytest
import torch

import autopipe
from tests.support.simulated import simulated
from tests.support.simulated.backend import move
from tests.support.simulated.engine import current, run_backward
from tests.support.simulated.nets import NETS
from tests.support.simulated.pairs import BATCH, CHUNKS, WIDTH, host, total

PLACES = {
    "one": ("lazy:0",),
    "outside": ("lazy:5",),
    "spread": ("lazy:1", "lazy:0", "lazy:5", "cpu"),
}
DEVICES = {"two": ["lazy:0", "lazy:1"], "the CPU first": ["cpu", "lazy:0"]}


@pytest.mark.few(6)
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("place", [*PLACES, "meta", "meta at the capture"])
@pytest.mark.parametrize("net", ["chain", "norms", "tied"])
def test_a_model_is_brought_to_its_stages(
    net: str, place: str, devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH)
    with simulated(monkeypatch, 6) as machine:
        torch.manual_seed(0)
        truth = NETS[net](WIDTH)
        state = {name: tensor.clone() for name, tensor in truth.state_dict().items()}
        torch.manual_seed(0)
        with torch.device("meta" if "meta" in place else "cpu"):
            model = NETS[net](WIDTH)
        for i, tensor in enumerate([*model.parameters(), *model.buffers()]):
            if place in PLACES:
                move(tensor, torch.device(PLACES[place][i % len(PLACES[place])]))
        pipe = autopipe.compile(model, DEVICES[devices], CHUNKS)
        ours = x.to("lazy:0")
        if "capture" in place:
            pipe.capture(ours, ours)
        if "meta" in place:
            model.load_state_dict(state, assign=True)
        expected = autopipe.compile(truth, ["cpu"] * 2, CHUNKS)
        for _ in range(2):
            torch.manual_seed(1)
            loss = total(expected(x, x))
            loss.backward()
            torch.manual_seed(1)
            found = total(pipe(ours, ours))
            run_backward(machine, found, current(machine), monkeypatch)
            torch.testing.assert_close(host(found), loss.detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(host(parameter.grad), truth.get_parameter(name).grad)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(host(buffer), truth.get_buffer(name))
        gc.collect()
        assert machine.races == []
        assert {str(p.device) for p in model.parameters()} <= {*DEVICES[devices]}
