"""What libraries read off a model to know that its devices are chosen already.

A library that trains on one GPU moves the model there, and wraps it in `nn.DataParallel` if the
machine has several. Three attributes tell it not to:

- ``hf_device_map``: where each part is, as accelerate's ``dispatch_model`` writes it. The Trainer
  of transformers neither moves nor wraps a model with several devices in it, or with another than
  its own; accelerate's ``prepare_model`` does not move one with several entries.
- ``is_parallelizable`` and ``model_parallel``: the same for the Trainer of transformers 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autopipe.runtime.backends import accelerators

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

MARKS = "_autopipe_marks"
"""The attribute of a marked model that says what was set and what was there before."""


SET_FROM_OUTSIDE = frozenset({MARKS, "_compiled_call_impl", "_is_accelerate_prepared"})
"""Attributes that `Pipeline.install` and accelerate set in a model."""


def usual_device() -> torch.device:
    """The device to which a library moves a model by itself: the first accelerator, or the CPU."""
    return next(iter(accelerators()), torch.device("cpu"))


def needs_map(devices: Iterable[torch.device]) -> bool:
    """Whether a library would move a model away from these devices.

    Args:
        devices: of the stages.

    Returns:
        False for a pipeline on the usual device only, such as CPU workers on a machine without a
        GPU: it needs no map, for which libraries have code of their own.
    """
    return set(devices) != {usual_device()}


def device_map(model: nn.Module) -> dict[str, torch.device]:
    """Say where a model's parameters are.

    Args:
        model: any module.

    Returns:
        The device of each module that has parameters of its own, by its path; where these are on
        several devices, or the model's own, that of each parameter, by its name. Devices are
        `torch.device`s: the text ``"cpu"`` would say that weights are offloaded there.
    """
    found: dict[str, torch.device] = {}
    for path, module in model.named_modules():
        own = {name: p.device for name, p in module.named_parameters(path, recurse=False)}
        devices = set(own.values())
        found |= {path: devices.pop()} if path and len(devices) == 1 else own
    return found


def mark(model: nn.Module, devices: Iterable[torch.device]) -> None:
    """Set the attributes that tell libraries where a model is; `unmark` undoes it.

    A model that has ``model_parallel`` itself (GPT-2 in transformers 4) keeps its own, which its
    forward reads.

    Args:
        model: on the devices of its stages.
        devices: of the stages.
    """
    unmark(model)
    marks: dict[str, Any] = {"is_parallelizable": True}
    if not hasattr(model, "model_parallel"):
        marks["model_parallel"] = True
    if needs_map(devices):
        marks["hf_device_map"] = device_map(model)
    attributes = vars(model)
    replaced = {name: attributes[name] for name in marks if name in attributes}
    attributes.update(marks)
    attributes[MARKS] = tuple(marks), replaced


def unmark(model: nn.Module) -> None:
    """Give a model the attributes back that `mark` replaced.

    Args:
        model: also one that has no marks.
    """
    attributes = vars(model)
    marks, replaced = attributes.pop(MARKS, ((), {}))
    attributes.update(replaced)
    for name in marks:
        if name not in replaced:
            attributes.pop(name, None)


def unmarked(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """A module's attributes without what is set for libraries, which its forward does not read.

    Args:
        attributes: `vars` of the module.

    Returns:
        Those of the module without `mark`, its call replaced, or accelerate's mark.
    """
    if attributes.keys().isdisjoint(SET_FROM_OUTSIDE):
        return attributes
    marks, replaced = attributes.get(MARKS, ((), {}))
    hidden = SET_FROM_OUTSIDE.union(marks).difference(replaced)
    return {n: replaced.get(n, value) for n, value in attributes.items() if n not in hidden}
