"""Compile parts of generated functions with torch's compiler "inductor".

In: a `GraphPart`, the values of its symbolic sizes, the options of inductor.
Out: `CompiledPart`: a function of a list of tensors, and for which arguments it is valid.

Read the files in this order:

    `compiled_part`     a compiled part, and the arguments that it takes
    `part_compilation`  GraphPart -> CompiledPart, with symbolic sizes or with numbers
    `modes`             the modes of `torch.compile`, as settings of inductor
"""

from __future__ import annotations

from .compiled_part import CompiledPart, ExpectedTensor, as_expected
from .modes import MODES, inductor_options
from .part_compilation import compile_part, part_key

__all__ = [
    "MODES",
    "CompiledPart",
    "ExpectedTensor",
    "as_expected",
    "compile_part",
    "inductor_options",
    "part_key",
]
