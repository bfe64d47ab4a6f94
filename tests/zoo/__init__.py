"""The zoo: architectures under the names that their users know, in training and in tiny.

entry = ZOO["Llama"]
model, kwargs = entry.build(dropout=False)
loss = entry.loss(model(**kwargs))
"""

from __future__ import annotations

from .adapters import ADAPTERS
from .compare import TOLERANCE, Agreement, Randomness, agreement, randomness
from .decoders import DECODERS
from .diffusion import DIFFUSION
from .encoders import ENCODER_DECODERS, ENCODERS
from .entry import Entry, WayOut
from .speech import SPEECH_AND_MORE
from .vision import VISION

__all__ = [
    "TOLERANCE",
    "ZOO",
    "Agreement",
    "Entry",
    "Randomness",
    "WayOut",
    "agreement",
    "randomness",
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
