"""What a model's forward reads, changes and leaves of Python's state: watched while it runs.

In: the user's model, and its forward while it is traced.
Out: a `PythonState`, which lists the `Change`s and makes the `Reads` that later calls are compared
with; `CallWatch` and `TensorMode`, which tell it what the forward calls; keys by which values are
compared.

Files, in reading order:

- `value_keys`: the key by which a Python value is compared
- `holders`, `members`, `holder_of`: what holds Python values: attributes, variables, containers
- `kinds`: what a value is
- `names`: by which code reaches attributes
- `noted`: what the forward asked for: flags of tensors, variables of the environment
- `random_numbers`, `iterators`: those that are not torch's; iterators that are advanced
- `reachable`: the values that the code which runs can reach, copied before it runs
- `changes`, `state`: what it changed of them, and what it read
- `reads`: what it read, compared in later calls
- `arguments`: what it asked of its arguments, besides values and sizes
- `ambient`: settings and modes of the process that a graph depends on
- `questions`: what functions of torch told it about the process
- `outside_world`: what it asked for outside of the process: clocks, files
- `watch_calls`: which Python functions it calls
- `value_checks`: checks of values, which a trace passes over
- `packed_sequences`: why they are refused
- `tensor_mode`, `leftovers`: tensors that are reached around the model's names, or left behind
"""

from __future__ import annotations

from .ambient import CallModes, ambient_modes, ambient_settings, check_modes, is_users_hook
from .arguments import shared
from .changes import Change, Forgotten, forget_tensors, refuse_replaced_modules, set_changes
from .holders import MODULE_INTERNALS
from .kinds import is_user_module
from .leftovers import refuse_leftovers
from .noted import check_remark
from .packed_sequences import packed_error
from .random_numbers import AVOIDING_OPTIONS
from .reads import Reads
from .state import PythonState
from .tensor_mode import TensorMode, TensorNames
from .value_checks import answer_of_check, line_of_check
from .value_keys import (
    Identity,
    WeakIdentity,
    attribute_names,
    extra_key,
    is_made_of_attributes,
    is_same,
    raw_dict,
    value_key,
)
from .watch_calls import CallWatch

__all__ = [
    "AVOIDING_OPTIONS",
    "MODULE_INTERNALS",
    "CallModes",
    "CallWatch",
    "Change",
    "Forgotten",
    "Identity",
    "PythonState",
    "Reads",
    "TensorMode",
    "TensorNames",
    "WeakIdentity",
    "ambient_modes",
    "ambient_settings",
    "answer_of_check",
    "attribute_names",
    "check_modes",
    "check_remark",
    "extra_key",
    "forget_tensors",
    "is_made_of_attributes",
    "is_same",
    "is_user_module",
    "is_users_hook",
    "line_of_check",
    "packed_error",
    "raw_dict",
    "refuse_leftovers",
    "refuse_replaced_modules",
    "set_changes",
    "shared",
    "value_key",
]
