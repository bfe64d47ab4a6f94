"""Random numbers that are not torch's are refused by what is called, whatever it is named.

Covers python_state/random_numbers.py.
"""

from __future__ import annotations

import os
import random
import secrets
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from random import gauss, shuffle
from random import random as draw
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import default_rng, normal
from torch import Tensor, nn

import autopipe
from autopipe.errors import CaptureError

own, seeded = random.Random(), random.Random(3)
bound = seeded.random
rng, state = default_rng(0), np.random.RandomState(0)
bound_rng = rng.normal


class Draws(nn.Module):
    def __init__(self, f: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(4, 4), nn.Linear(4, 4), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) * self.f()


def shuffled() -> float:
    values = [1.0, 2.0, 3.0]
    shuffle(values)
    return values[0]


class Holder:
    def __init__(self) -> None:
        self.rng = random.Random(1)
        self.generator = np.random.default_rng(1)

    def next(self) -> float:
        return self.rng.random()


holder = Holder()

DRAWS: dict[str, Callable[[], float]] = {
    "random.random": lambda: random.random(),
    "from random import": lambda: draw(),
    "gauss": lambda: gauss(0, 1),
    "uniform": lambda: random.uniform(0, 1),
    "choice": lambda: random.choice([1.0, 2.0]),
    "randint": lambda: random.randint(1, 10),
    "shuffle": shuffled,
    "an own generator": lambda: own.random(),
    "a bound method": lambda: bound(),
    "a new generator": lambda: random.Random().random(),
    "in an object": lambda: holder.next(),
    "system": lambda: random.SystemRandom().random(),
    "urandom": lambda: float(os.urandom(1)[0]),
    "secrets": lambda: float(secrets.randbelow(100)),
    "uuid": lambda: float(uuid.uuid4().int % 100),
    "np.random": lambda: float(np.random.rand()),
    "from numpy.random import": lambda: float(normal()),
    "default_rng": lambda: float(rng.normal()),
    "a bound method of it": lambda: float(bound_rng()),
    "RandomState": lambda: float(state.rand()),
    "a new default_rng": lambda: float(np.random.default_rng().random()),
    "in an object, numpy": lambda: float(holder.generator.random()),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="random number that is not torch's") as caught:
        autopipe.compile(Draws(DRAWS[name]), 1, 3)(torch.randn(6, 4))
    assert "torch.rand" in str(caught.value.remedy)


@pytest.mark.parametrize("name", ["from random import", "np.random", "uuid", "in an object"])
def test_the_line_is_named(name: str) -> None:
    with pytest.raises(CaptureError) as caught:
        autopipe.compile(Draws(DRAWS[name]), 1, 3)(torch.randn(6, 4))
    file, _, line = str(caught.value.source).rpartition(":")
    assert file == __file__
    with open(file, encoding="utf-8") as text:
        assert "lambda" in text.readlines()[int(line) - 1] or name == "in an object"


HARMLESS: dict[str, Callable[[], float]] = {
    "a state that is read": lambda: float(len(random.getstate())),
    "a generator that is not used": lambda: 1.0 if own is not None else 0.0,
    "seeded in the forward": lambda: float(np.random.default_rng(3).random()),
    "torch": lambda: 1.0 + 0 * torch.rand(()).numel(),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_draws_nothing_passes(name: str) -> None:
    model, x = Draws(HARMLESS[name]), torch.randn(6, 4)
    torch.testing.assert_close(autopipe.compile(model, 2, 3)(x), model(x))


def test_the_watch_ends() -> None:
    """After a capture, and after one that failed."""
    before = random.random, np.random.rand, sys.getprofile()
    for name in ("random.random", "np.random"):
        with pytest.raises(CaptureError):
            autopipe.compile(Draws(DRAWS[name]), 1, 3)(torch.randn(6, 4))
        assert (random.random, np.random.rand, sys.getprofile()) == before
        assert 0 <= DRAWS[name]() < 1


def test_a_profiler_of_the_user_goes_on() -> None:
    calls: list[Any] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        calls.append(event)

    model, x = Draws(lambda: 1.0), torch.randn(6, 4)
    sys.setprofile(profile)
    try:
        out = autopipe.compile(model, 1, 3)(x)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert calls
    torch.testing.assert_close(out, model(x))


SCRIPT = """
from random import random as draw
import torch, autopipe
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.a = nn.Linear(4, 4)
    def forward(self, x): return self.a(x) * draw()
try: autopipe.compile(Net(), 1, 3)(torch.randn(6, 4))
except autopipe.errors.CaptureError as error: print("refused", error.source)
"""


@pytest.mark.parametrize("way", ["-c", "stdin", "torchish"])
@pytest.mark.full
def test_code_that_is_in_no_ordinary_file(way: str, tmp_path: Any) -> None:
    """From -c, standard input, and a package whose name begins with torch."""
    text = textwrap.dedent(SCRIPT)
    if way == "torchish":
        (tmp_path / "torchsomething.py").write_text(text)
        command, given = [sys.executable, "-c", "import torchsomething"], None
    elif way == "-c":
        command, given = [sys.executable, "-c", text], None
    else:
        command, given = [sys.executable, "-"], text
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    found = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert found.stdout.startswith("refused")
    assert {"-c": "<string>", "stdin": "<stdin>", "torchish": "torchsomething.py"}[
        way
    ] in found.stdout


GENERATORS: dict[str, tuple[Any, Any, Any]] = {
    "Random": (random.Random(0), lambda g: g.random(), lambda g: g.getstate()),
    "Generator": (np.random.default_rng(0), lambda g: g.random(), lambda g: g.bit_generator.state),
    "RandomState": (np.random.RandomState(0), lambda g: g.rand(), lambda g: g.get_state()),
    "PCG64": (np.random.PCG64(0), lambda g: g.random_raw(), lambda g: g.state),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_is_set_back_when_it_is_refused(name: str) -> None:
    generator, draw, state = GENERATORS[name]

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.generator = nn.Linear(4, 4), generator

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * (float(draw(self.generator)) % 7)

    before = repr(state(generator))
    with pytest.raises(CaptureError, match="random number that is not torch's"):
        autopipe.compile(Draws(), 1, 2)(torch.randn(4, 4))
    assert repr(state(generator)) == before
