"""The zoo: architectures under the names that their users know, in training and in tiny.

entry = ZOO["Llama"]
model, kwargs = entry.build(dropout=False)
loss = entry.loss(model(**kwargs))
"""

from __future__ import annotations

from .adapters import ADAPTERS
from .decoders import DECODERS
from .diffusion import DIFFUSION
from .encoders import ENCODER_DECODERS, ENCODERS
from .entry import Entry
from .speech import SPEECH_AND_MORE
from .vision import VISION

__all__ = ["ZOO", "Entry"]

ZOO: dict[str, Entry] = {
    **DECODERS,
    **ENCODERS,
    **ENCODER_DECODERS,
    **VISION,
    **SPEECH_AND_MORE,
    **DIFFUSION,
    **ADAPTERS,
}
