"""The zoo: architectures under the names that their users know, in training and in tiny.

entry = ZOO["Llama"]
model, kwargs = entry.build(dropout=False)
loss = entry.loss(model(**kwargs))
"""

from __future__ import annotations

from tests.support.zoo.adapters import ADAPTERS
from tests.support.zoo.compare import TOLERANCE, Agreement, Randomness, compare_with_eager
from tests.support.zoo.decoders import DECODERS
from tests.support.zoo.diffusion import DIFFUSION
from tests.support.zoo.encoders import ENCODER_DECODERS, ENCODERS
from tests.support.zoo.entry import Entry, WayOut
from tests.support.zoo.speech import SPEECH_AND_MORE
from tests.support.zoo.vision import VISION

__all__ = [
    "TOLERANCE",
    "ZOO",
    "Agreement",
    "Entry",
    "Randomness",
    "WayOut",
    "compare_with_eager",
]

ZOO: dict[str, Entry] = {
    **DECODERS,
    **ENCODERS,
    **ENCODER_DECODERS,
    **VISION,
    **SPEECH_AND_MORE,
    **DIFFUSION,
    **ADAPTERS,
}
