"""TODO."""

from __future__ import annotations

from .fake_strides import static_fakes
from .fx_utils import (
    HIDDEN_WRITES,
    add_call,
    add_size,
    batch_size_node,
    drop_dead,
    emit_size,
    fingerprint,
    functional_of,
    in_batch,
    is_effect,
    is_integer,
    is_random,
    is_size,
    once_per_graph,
    owner_of,
    owners,
    size,
    source_line,
    spec_of,
    tensors_of,
    written_arguments,
)
from .mutations import Writes
from .numerics import close, is_inexact
from .source_location import advise, is_users, user_frame, users_trace

__all__ = [
    "HIDDEN_WRITES",
    "Writes",
    "add_call",
    "add_size",
    "advise",
    "batch_size_node",
    "close",
    "drop_dead",
    "emit_size",
    "fingerprint",
    "functional_of",
    "in_batch",
    "is_effect",
    "is_inexact",
    "is_integer",
    "is_random",
    "is_size",
    "is_users",
    "once_per_graph",
    "owner_of",
    "owners",
    "size",
    "source_line",
    "spec_of",
    "static_fakes",
    "tensors_of",
    "user_frame",
    "users_trace",
    "written_arguments",
]
