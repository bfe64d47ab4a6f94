"""Capture a model: module and example inputs → one flat graph of ATen ops, its batch symbolic.

In: a `CaptureRequest`: the user's model (see `FRONTENDS`), example inputs, their batch dimensions.
Out: a `Captured`; from `Frontend`s, which objects a user may pass as a model, and the module of
each.

Files, in reading order:

- `request`: `CaptureRequest`, the arguments of `capture`
- `model`: `capture`, the steps in order
- `frontends`: the kinds of models, and how each is traced to a normalized graph
- `tracing`: calls a front end, with the patches and checks that a faithful graph needs
- `containers`: objects that hold tensors, taken apart
- `flat_module`: the model as a function from flat tensors to flat tensors
- `exporting`: runs torch.export: silences it, refuses what it would lose
- `size_uses`: what the model's code did with symbolic sizes
- `explain`: short errors for those of torch.export
- `normalize`: the exported graph → plain ops, one placeholder for each tensor
- `inlining`: copies the ops of the exported graph, and those of its no_grad and autocast regions
- `canonicalize`: rewrites single ops: dropouts that drop nothing, squeezes
- `scalar_reads`: Python numbers read from tensors become tensors of one entry
- `patches`: replacements of parts of a model while it is traced
- `names`: by which code reaches attributes
- `holders`, `holder_of`, `reachable`: the Python values that a forward can read or change, copied
  before it runs
- `changes`, `python_state`: what it changed of them, and what it read
- `watch_calls`, `random_numbers`, `iterators`: which functions it calls; random numbers that are
  not torch's; iterators
- `tensor_mode`, `leftovers`: tensors that are reached around the model's names, or left behind
- `noted`: what it asked for: flags of tensors, variables of the environment
- `value_keys`, `reads`: the Python values that it read, compared in later calls
- `ambient`: settings of the process that a graph depends on
- `buffer_state`: restores attributes, and registries and values of buffers
- `hidden_state`: refuses models whose next call depends on what this one set
- `buffer_assignment`: ``self.n = self.n + 1`` as a write in place
- `buffer_mutation`: writes to buffers become results, once a step
- `norm_statistics`: running statistics of the batch from those of micro-batches
- `size_guards`: the batch sizes that the graph holds for
"""

from __future__ import annotations

from .ambient import ambient_settings
from .buffer_state import preserve_buffers, restore_values
from .containers import Parts, take_apart
from .frontends import FRONTENDS, Frontend, UserModel, argument_names, as_module, is_model
from .holders import MODULE_INTERNALS
from .model import capture
from .reachable import is_user_module
from .request import CaptureRequest
from .value_keys import Identity, WeakIdentity, value_key

__all__ = [
    "FRONTENDS",
    "MODULE_INTERNALS",
    "CaptureRequest",
    "Frontend",
    "Identity",
    "Parts",
    "UserModel",
    "WeakIdentity",
    "ambient_settings",
    "argument_names",
    "as_module",
    "capture",
    "is_model",
    "is_user_module",
    "preserve_buffers",
    "restore_values",
    "take_apart",
    "value_key",
]
