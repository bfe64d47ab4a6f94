"""Write the pipeline as Python source text, and check the text.

The text has three layers; each calls the layer before it:

    F_1_b4, RBW_1_b4      what stage 1 computes on a micro-batch of 4, in ATen operators
    forward_1             one micro-batch at stage 1: receive, compute, send, save
    device_1_forward      what the worker of device 1 does in one step: its list of actions

It needs only torch and the `run` object that the runtime passes in; it calls the methods of
`autopipe.runtime.executor.Run`. `pipe.code` is this text. Functions get their arguments in a list
and empty it, so that a value is freed after its last use.

A model, a plan and their names reach the text in three forms only: identifiers that `Names` has
made, literals, and comments without control characters. `check_source` does not rely on this: it
parses the text, and accepts the statements above and no others.

In: a `Scheduled`, and a `Phased` for each micro-batch size.
Out: `Generated`, the source and the names of the functions to call.

Read the files in this order:

    `generated`       the result
    `program`         the whole program: what each device does
    `stage_calls`     what a stage receives, sends and keeps
    `stage_ops`       one stage's ops as a function
    `parted_functions`  the same in parts, for another compiler
    `loose_draws`     draws that wait for no computed value, for these
    `source_forms`    forms of expressions
    `source_rules`    the statements that a program may hold
"""

from __future__ import annotations

from .generated import Generated
from .program import HEADER, codegen
from .source_rules import check_source
from .stage_calls import stage_messages, verb
from .stage_ops import stage_function

__all__ = [
    "HEADER",
    "Generated",
    "check_source",
    "codegen",
    "stage_function",
    "stage_messages",
    "verb",
]
