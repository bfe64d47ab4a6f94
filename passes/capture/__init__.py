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
- `argument_changes`: what a forward changes of its arguments
- `passed_numbers`: arguments that are numbers without a value in a trace
- `number_checks`: these do in a trace what they do as numbers
- `flat_module`: the model as a function from flat tensors to flat tensors
- `exporting`: runs torch.export: silences it, refuses what it would lose
- `any_size`: functions whose C++ code would fix symbolic sizes
- `vmaps`: `torch.vmap` as plain ops
- `size_uses`: what the model's code did with symbolic sizes
- `explain`: short errors for those of torch.export
- `failures`: common reasons for these, and what to do
- `normalize`: the exported graph → plain ops, one placeholder for each tensor
- `inlining`: copies the ops of the exported graph, and those of its no_grad and autocast regions
- `canonicalize`: rewrites single ops: dropouts that drop nothing, squeezes
- `scalar_reads`: Python numbers read from tensors become tensors of one entry
- `patches`: replacements of parts of a model while it is traced
- `buffer_state`: restores attributes, and registries and values of buffers
- `hidden_state`: refuses models whose next call depends on what this one set
- `far_values`: what these may be after many calls
- `buffer_assignment`: ``self.n = self.n + 1`` as a write in place
- `buffer_mutation`: writes to buffers become results, once a step
- `norm_statistics`: running statistics of the batch from those of micro-batches
- `symbolic_dims`: the dimensions that are symbolic, and what their symbols mean
- `size_guards`: the sizes that the graph holds for
"""

from __future__ import annotations

from .buffer_state import preserve_buffers, restore_values
from .containers import Parts, is_cache, take_apart
from .failures import missing_target
from .flat_module import TARGET
from .frontends import FRONTENDS, Frontend, UserModel, argument_names, as_module, is_model
from .model import capture
from .normalize import RESERVED
from .request import CaptureRequest
from .tracing import leaf_names

__all__ = [
    "FRONTENDS",
    "RESERVED",
    "TARGET",
    "CaptureRequest",
    "Frontend",
    "Parts",
    "UserModel",
    "argument_names",
    "as_module",
    "capture",
    "is_cache",
    "is_model",
    "leaf_names",
    "missing_target",
    "preserve_buffers",
    "restore_values",
    "take_apart",
]
