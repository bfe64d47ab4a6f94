"""What an architecture of the zoo is, and the batches that they share.

Models are the libraries' own classes with random weights, some dozens of numbers wide; nothing is
downloaded. A batch has eight samples, so that three chunks are uneven (3, 3, 2); texts have padding
of different lengths, and what their labels leave out differs from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
VOCABULARY = 80
LENGTH = 12
CLASSES = 5
IMAGE = 32
RATE = 0.15
"""Of every dropout and drop-path, where they are on."""
SPREAD = 0.2
"""Standard deviation of weights, about 1 / √width. The libraries' 0.02 is for widths of a thousand;
at 32 it makes attention uniform and its gradients a millionth of the others, too small to miss."""

Inputs = Callable[[], dict[str, Any]]
Build = Callable[[bool], tuple[nn.Module, dict[str, Any]]]


def returned(result: Any) -> Tensor:
    """The loss that the model returns."""
    loss: Tensor = result.loss
    return loss


@dataclass(frozen=True)
class WayOut:
    """What had to be chosen so that a model can be a pipeline.

    Attributes:
        choice: what to write or to do.
        without: builds the model with everything but that.
        said: what its error should say for a reader to find the way; a part of the message.
    """

    choice: str
    without: Build
    said: str


@dataclass(frozen=True)
class Entry:
    """An architecture.

    Attributes:
        family: the heading it stands under.
        model: class of the model, as in the library.
        build: with dropout or without → the model in training mode, the keywords of its call.
        loss: from the model's result to the number that is minimized.
        random: it has dropout, or another random operator in training.
        ways_out: what had to be chosen so that it can be a pipeline.
        in_dims: as `autopipe.compile` has it: which inputs are not batched.
    """

    family: str
    model: str
    build: Build
    loss: Callable[[Any], Tensor] = returned
    random: bool = True
    ways_out: tuple[WayOut, ...] = ()
    in_dims: Any = 0


def make(
    model: str, config: str, sizes: dict[str, Any], rates: tuple[str, ...], inputs: Inputs
) -> Build:
    """A builder for a class of transformers.

    Args:
        model: name of its class.
        config: name of its configuration's.
        sizes: fields of the configuration.
        rates: those of its fields that are dropout or drop-path probabilities.
        inputs: makes the keywords of a call.
    """

    def build(dropout: bool) -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        torch.manual_seed(0)
        fields = sizes | dict.fromkeys(rates, RATE if dropout else 0.0)
        settings = getattr(transformers, config)(**fields)
        for spread in ("initializer_range", "init_std"):
            if hasattr(settings, spread):
                setattr(settings, spread, SPREAD)
        made = training(getattr(transformers, model)(settings))
        torch.manual_seed(1)
        return made, inputs()

    return build


def training(model: nn.Module) -> nn.Module:
    """In training mode, and with values for what starts at zero: biases that are nothing hide
    mistakes, and the normalization of a class token that is nothing has an enormous gradient."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=SPREAD)
    return model.train()


def transformer(
    family: str,
    model: str,
    config: str,
    sizes: dict[str, Any],
    rates: tuple[str, ...],
    inputs: Inputs,
    **more: Any,
) -> Entry:
    """An entry for a class of transformers; arguments as `make` and `Entry` have them."""
    build = make(model, config, sizes, rates, inputs)
    return Entry(family, model, build, random=bool(rates), **more)


def ids(length: int = LENGTH) -> Tensor:
    """Token numbers without the special ones, which are 0, 1 and 2."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def padding(length: int = LENGTH) -> Tensor:
    """An attention mask: samples of different lengths, padded on the right."""
    lengths = torch.tensor([length, length - 3, length, length - 5, length - 1, length, 4, 5])
    return (torch.arange(length) < lengths[:, None]).long()


def text(length: int = LENGTH) -> dict[str, Tensor]:
    """Texts with their padding (token 0)."""
    mask = padding(length)
    return {"input_ids": ids(length) * mask, "attention_mask": mask}


def next_tokens() -> dict[str, Tensor]:
    """Texts and themselves as labels, without padding, and without all of one sample."""
    batch = text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[4] = -100
    return batch | {"labels": labels}


def masked_tokens() -> dict[str, Tensor]:
    """Texts of which some tokens are to be guessed; none of the last chunk's."""
    batch = text()
    labels = batch["input_ids"].where(torch.rand(BATCH, LENGTH) < 0.4, torch.tensor(-100))
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels[6:] = -100
    return batch | {"labels": labels}


def classified_text() -> dict[str, Tensor]:
    """Texts with a class each."""
    return text() | {"labels": torch.randint(0, CLASSES, (BATCH,))}


def translated() -> dict[str, Tensor]:
    """Texts and their translations, some shorter than others."""
    labels = ids(9).masked_fill(padding(9) == 0, -100)
    return text() | {"labels": labels}


def images(size: int = IMAGE) -> dict[str, Tensor]:
    """Pictures with a class each."""
    labels = torch.randint(0, CLASSES, (BATCH,))
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": labels}
