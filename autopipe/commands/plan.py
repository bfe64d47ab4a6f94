"""``autopipe plan``: cut a model into stages and print the plan."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING

from autopipe.commands import Command
from autopipe.errors import OptionError, shortened
from autopipe.passes.devices import DEVICES
from autopipe.passes.remat_policies import DEFAULT, policy_options
from autopipe.passes.schedule import DEFAULT_KIND, KINDS

from ._files import check_writable, writing
from ._output import say

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

MOST_DEVICES, MOST_CHUNKS = 1024, 2**16
"""As in a plan's file."""

DESCRIPTION = """\
Capture a model on example inputs, cut it into stages, and print the plan as a table.

MODULE is an importable name or the path of a .py file. CALLABLE takes no arguments and returns the
model and its example inputs: (model, args), (model, kwargs) or (model, args, kwargs), where args is
a tuple and kwargs a dict. It is called under torch.device("meta"), so no weights are made."""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    policies = ", ".join(policy_options())
    add("model", metavar="MODULE:CALLABLE", help="what returns the model and its example inputs")
    add(
        "--devices",
        required=True,
        metavar="N",
        help="how many; or a list: cpu,cpu,cuda:0 or 0,1",
    )
    add(
        "--chunks",
        type=_chunks,
        metavar="M",
        help="micro-batches of a batch (default: the fastest)",
    )
    add("--schedule", default=DEFAULT_KIND, metavar="KIND",
        help=f"{', '.join(KINDS)} or auto (default: {DEFAULT_KIND})")  # fmt: skip
    add("--virtual-stages", type=int, metavar="V", help="stages per device, for a schedule that "
        "leaves the choice")  # fmt: skip
    add("--remat", default=DEFAULT.name, metavar="POLICY", help=f"what stages save: {policies}; or "
        f"auto: what is fastest and fits (default: {DEFAULT.name})")  # fmt: skip
    add("--batch-norm", default="deferred", help="deferred (default) or micro: when running "
        "statistics change, once a step or once a micro-batch")  # fmt: skip
    add("--out-reduce", metavar="RULE", help="mean or sum, where a result's rule is not derived")
    add("--cut-at", type=_names, metavar="WHERE", help="blocks; or names of modules or classes: "
        "LlamaDecoderLayer or h.3,h.6 (default: anywhere)")  # fmt: skip
    add("--memory", type=_sizes, metavar="SIZE", help="a limit for each device, such as 16GiB; "
        "or a list of one for each: 80GiB,24GiB")  # fmt: skip
    add("--device", metavar="NAME", help=f"whose speeds: {', '.join(DEVICES)}; "
        "or a list of one for each device")  # fmt: skip
    add("--no-exact", action="store_false", dest="exact", help="sum gradients of shared parameters "
        "where they are made, which rounds otherwise than eager PyTorch")  # fmt: skip
    add("--profile", action="store_true", help="time the model's calls and stages here")
    add("--real", action="store_true", help="call CALLABLE as it is, not under the meta device")
    add("-o", "--output", metavar="FILE", help="save the plan as JSON")


def _run(options: Namespace) -> None:
    if options.output is not None:
        file = options.model.rpartition(":")[0]
        check_writable(options.output, keep=file, what="the model's file")
    devices = _devices(options.devices)
    from autopipe import target
    from autopipe.torch_version import check_torch

    check_torch()
    model, args, kwargs = target.load(options.model, real=options.real)
    from autopipe.api import plan

    made = plan(
        model,
        devices,
        options.chunks,
        args=args,
        kwargs=kwargs,
        schedule=options.schedule,
        virtual_stages=options.virtual_stages,
        remat=options.remat,
        memory=_one_or_each(options.memory),
        device=_one_or_each(options.device),
        profile=options.profile,
        batch_norm=options.batch_norm,
        out_reduce=options.out_reduce,
        cut_at=options.cut_at,
        exact=options.exact,
    )
    try:
        if options.output is not None:
            with writing():
                made.save(options.output)
    finally:  # it may have taken minutes: print it even if it cannot be saved
        say(str(made))


def _devices(text: str) -> int | list[int | str]:
    try:
        count = int(text)
    except ValueError:
        return [int(d) if d.isdecimal() and len(d) < 5 else d for d in text.split(",")]
    if count > MOST_DEVICES:
        found, expected = shortened(text, 80), f"at most {MOST_DEVICES}"
        raise OptionError("so many devices cannot be planned", expected=expected, found=found)
    return count


def _chunks(text: str) -> int:
    count = int(text)
    if count > MOST_CHUNKS:
        raise ArgumentTypeError(f"more than {MOST_CHUNKS:,} micro-batches")
    return count


_chunks.__name__ = "int"  # what argparse calls a wrong value


def _sizes(text: str) -> str:
    """Sizes whose bytes a float can hold; `autopipe.plan` reads them."""
    if re.search("[0-9.]{17}", text):
        raise ArgumentTypeError("more than 16 digits")
    return text


def _names(text: str) -> str | list[str]:
    """The word "blocks", or names of modules and classes."""
    return text if text == "blocks" else text.split(",")


def _one_or_each(text: str | None) -> str | list[str] | None:
    """One value for all devices, or a list of one for each."""
    return text.split(",") if text is not None and "," in text else text


COMMAND = Command(
    name="plan",
    help="cut a model into stages, print the plan",
    description=DESCRIPTION,
    add_arguments=_add_arguments,
    run=_run,
)
