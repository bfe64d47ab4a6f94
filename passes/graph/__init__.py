"""Analyses and small edits of fx graphs that several passes share.

In: fx graphs whose nodes carry fake tensors in `meta["val"]`.
Out: facts about nodes (sizes in `B`, tensors, memory owners, side effects, source lines), appended
ops, graph modules, constants as source, and a fake tensor mode with the strides of real kernels.

Read the files in this order:

    `sizes`            sizes in `B` and in lengths; append arithmetic on sizes
    `fx_utils`         tensors, side effects, views of a node; append ops
    `mutations`        which ops write to whose memory
    `source_location`  which lines are the user's code; warnings at the user's line
    `fake_shapes`      fake results for symbolic sizes, where torch's take long or fail
    `fake_strides`     fake tensors with the strides of real kernels
    `numerics`         equality up to rounding
    `source_text`      constants, operators and names as Python source
    `fingerprints`     equal for graphs with the same ops on the same arguments
    `interpreted`      graph modules; odd graphs run without Python source
"""

from __future__ import annotations

from .fake_shapes import known_shapes
from .fake_strides import fake_mode, static_fake_mode
from .fingerprints import fingerprint
from .fx_utils import (
    HIDDEN_WRITES,
    add_call,
    cache_per_graph,
    functional_variant,
    has_side_effect,
    is_integer,
    is_random,
    is_size,
    memory_owner,
    memory_owners,
    remove_dead_calls,
    source_line,
    tensors_of,
    written_arguments,
)
from .interpreted import graph_module
from .mutations import InPlaceWrites
from .numerics import is_close, is_inexact
from .sizes import (
    SizeExpression,
    SizeNames,
    add_product,
    add_size,
    emit_size,
    emit_symbol,
    example_lengths,
    full_size,
    in_named_sizes,
    name_sizes,
    readable_symbols,
    size_symbols,
    symbolic_size,
    tensor_spec,
)
from .source_location import (
    is_own_file,
    is_standard_library,
    is_user_file,
    line_of,
    trim_to_user_frame,
    user_source_line,
    warn_at_user_line,
)
from .source_text import Names, is_identifier, literal, operator_path, quoted

__all__ = [
    "HIDDEN_WRITES",
    "InPlaceWrites",
    "Names",
    "SizeExpression",
    "SizeNames",
    "add_call",
    "add_product",
    "add_size",
    "cache_per_graph",
    "emit_size",
    "emit_symbol",
    "example_lengths",
    "fake_mode",
    "fingerprint",
    "full_size",
    "functional_variant",
    "graph_module",
    "has_side_effect",
    "in_named_sizes",
    "is_close",
    "is_identifier",
    "is_inexact",
    "is_integer",
    "is_own_file",
    "is_random",
    "is_size",
    "is_standard_library",
    "is_user_file",
    "known_shapes",
    "line_of",
    "literal",
    "memory_owner",
    "memory_owners",
    "name_sizes",
    "operator_path",
    "quoted",
    "readable_symbols",
    "remove_dead_calls",
    "size_symbols",
    "source_line",
    "static_fake_mode",
    "symbolic_size",
    "tensor_spec",
    "tensors_of",
    "trim_to_user_frame",
    "user_source_line",
    "warn_at_user_line",
    "written_arguments",
]
