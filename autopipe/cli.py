"""The `autopipe` command: plan a model, simulate a schedule, draw a plan.

Exit codes: 0; 1: the model cannot be planned; 2: an argument or a file is wrong. What goes wrong
within the user's own callable is the user's, and shows its traceback. Torch takes seconds to
import, so it is imported where a model has to be planned and nowhere else.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autopipe.errors import AutopipeError, DeviceError, OptionError, PlanError, UnsupportedError
from autopipe.passes.devices import DEVICES
from autopipe.passes.schedule import DEFAULT_KIND, EXECUTED, KINDS, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autopipe.passes.schedule import Timeline
    from autopipe.planning.plans import Plan

WRONG, CANNOT = 2, 1

PLAN = """\
Capture a model on example inputs, cut it into stages, and print the plan as a table.

MODULE is an importable name or the path of a .py file. CALLABLE takes no arguments and returns the
model and its example inputs: (model, args), (model, kwargs) or (model, args, kwargs), where args is
a tuple and kwargs a dict. It is called under torch.device("meta"), so no weights are made."""

SIMULATE = """\
Play one training step of a schedule out in time and draw it: a row a device; digits are forwards,
letters backwards, capitals W apart from its B, ' R apart from it, dots are waiting. Times have no
unit of their own."""

EXAMPLES = """\
examples:
  autopipe plan examples/gpt2_xl.py:training --devices 8 --memory 80GiB --device h100 -o plan.json
  autopipe report plan.json -o plan.html
  autopipe simulate 1f1b --stages 8 --chunks 24 --forward 18.5 --backward 27.4"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; None: those it was called with.

    Returns:
        The exit code.

    Raises:
        SystemExit: by argparse, for help (0) and unknown arguments (2).
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
    except (DeviceError, OptionError, PlanError) as error:
        print(f"autopipe: {error}", file=sys.stderr)
        return WRONG
    except AutopipeError as error:
        print(f"autopipe: {error}", file=sys.stderr)
        # What is not implemented is asked for by an option, or needed by the model.
        asked = isinstance(error, UnsupportedError) and error.node is None and error.source is None
        return WRONG if asked else CANNOT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autopipe",
        description="Pipeline plans of PyTorch models: make, simulate, draw.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _plan_options(
        _command(commands, "plan", "cut a model into stages, print the plan", PLAN, _plan)
    )
    _simulate_options(
        _command(commands, "simulate", "time a schedule, without a model", SIMULATE, _simulate)
    )
    report = _command(
        commands, "report", "draw a plan: one HTML page", "Write a plan as one HTML page that "
        "needs no network and no scripts.", _report,
    )  # fmt: skip
    trace = _command(
        commands, "trace", "a plan's timeline for trace viewers", "Write a plan's simulated step "
        "as trace events, for chrome://tracing or Perfetto.", _trace,
    )  # fmt: skip
    for command, ending in ((report, "html"), (trace, "json")):
        command.add_argument("plan", metavar="PLAN", help="a file that `autopipe plan -o` wrote")
        what = (
            f"write there (default: PLAN with the ending .{'trace.' * (ending == 'json')}{ending})"
        )
        command.add_argument("-o", "--output", metavar="FILE", help=what)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    line: str,
    description: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=line,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


# ------------------------------------------------------------------------------------------- plan


def _plan_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODULE:CALLABLE", help="what returns the model and its example inputs")
    add("--devices", required=True, metavar="N", help="how many stages; or a list: cpu,cpu,cuda:0")
    add("--chunks", type=int, metavar="M", help="micro-batches of a batch (default: the fastest)")
    add("--schedule", default=DEFAULT_KIND, metavar="KIND",
        help=f"{', '.join(EXECUTED)} or auto (default: {DEFAULT_KIND})")  # fmt: skip
    add("--remat", default="full", metavar="POLICY", help="what stages keep: full (default), none, "
        "min-cut, a fraction of what that keeps, or auto: what is fastest and fits")  # fmt: skip
    add("--batch-norm", default="deferred", help="deferred (default) or micro: when running "
        "statistics change, once a step or once a micro-batch")  # fmt: skip
    add("--out-reduce", metavar="RULE", help="mean or sum, where a result's rule is not derived")
    add("--memory", metavar="SIZE", help="a limit for each device, such as 16GiB; or a list of one "
        "for each: 80GiB,24GiB")  # fmt: skip
    add("--device", metavar="NAME", help=f"whose speeds: {', '.join(DEVICES)}; "
        "or a list of one for each stage")  # fmt: skip
    add("--profile", action="store_true", help="time the model's calls and stages here")
    add("--real", action="store_true", help="call CALLABLE as it is, not under the meta device")
    add("-o", "--output", metavar="FILE", help="save the plan as JSON")


def _plan(options: argparse.Namespace) -> None:
    if options.output is not None:
        _can_write(options.output)
    from . import target

    model, args, kwargs = target.load(options.model, real=options.real)
    from autopipe.api import plan

    made = plan(
        model,
        _devices(options.devices),
        options.chunks,
        args=args,
        kwargs=kwargs,
        schedule=options.schedule,
        remat=options.remat,
        memory=_listed(options.memory),
        device=_listed(options.device),
        profile=options.profile,
        batch_norm=options.batch_norm,
        out_reduce=options.out_reduce,
    )
    if options.output is not None:
        with _writing(options.output):
            made.save(options.output)
    _say(str(made))


def _devices(text: str) -> int | list[str]:
    try:
        return int(text)
    except ValueError:
        return text.split(",")


def _listed(text: str | None) -> str | list[str] | None:
    """One value for all devices, or one for each."""
    return text.split(",") if text is not None and "," in text else text


# --------------------------------------------------------------------------------------- simulate


def _simulate_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    kinds = "; ".join(f"{kind.name}: {kind.summary}" for kind in KINDS.values())
    add("kind", metavar="KIND", help=kinds)
    add("--stages", required=True, type=int, metavar="K")
    add("--chunks", required=True, type=int, metavar="M", help="micro-batches")
    for name, default, what in (
        ("forward", None, "F, the forward"),
        ("backward", None, "B, the gradients of a stage's inputs (or all of its backward)"),
        ("weight", 0.0, "W, the gradients of its parameters (default: 0)"),
        ("recompute", 0.0, "R, rematerialization (default: 0)"),
    ):
        add(f"--{name}", required=default is None, default=default, type=_times, metavar="TIME",
            help=f"time of {what}; one, or one a stage: 18.5,18.5,19")  # fmt: skip
    add("--early-recompute", action="store_true", help="R is an action of its own, before its B")
    free = ", ".join(kind.name for kind in KINDS.values() if kind.any_virtual_stages)
    add("--virtual-stages", type=int, metavar="V", help=f"stages per device, for {free}")
    add("--transfer", type=float, default=0.0, metavar="TIME", help="between devices (default: 0)")


def _times(text: str) -> float | tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    return values[0] if len(values) == 1 else values


_times.__name__ = "time"  # what argparse calls a wrong value


def _simulate(options: argparse.Namespace) -> None:
    line = simulate(
        options.kind,
        stages=options.stages,
        chunks=options.chunks,
        forward=options.forward,
        backward=options.backward,
        weight=options.weight,
        recompute=options.recompute,
        transfer=options.transfer,
        early_recompute=options.early_recompute,
        virtual_stages=options.virtual_stages,
    )
    _say(f"{line}\n{_figures(line)}")


def _figures(line: Timeline) -> str:
    busy = [sum(span.end - span.start for span in row) for row in line.spans]
    speedup = f"{sum(busy) / line.makespan:.3f}" if line.makespan else "-"
    return (
        f"work {sum(busy):.6g}, busiest device {max(busy):.6g}\n"
        f"speed-up over one device {speedup}, of {len(line.spans)} at best"
    )


# --------------------------------------------------------------------------------- report, trace


def _report(options: argparse.Namespace) -> None:
    from autopipe.report.page import page

    _write(options, ".html", page)


def _trace(options: argparse.Namespace) -> None:
    _write(options, ".trace.json", lambda plan: plan.timeline.to_chrome_trace())


def _write(options: argparse.Namespace, ending: str, make: Callable[[Plan], str]) -> None:
    """Read the plan that is asked for, write what is made of it, say where."""
    from autopipe.planning.plans import Plan

    source = Path(options.plan)
    target = Path(options.output) if options.output else source.parent / f"{source.stem}{ending}"
    _can_write(target)
    try:
        same = target.exists() and target.samefile(source)
        plan = Plan.load(source)
    except OSError as error:
        raise OptionError("the plan cannot be read", found=_reason(error)) from error
    if same:
        raise OptionError("the output would replace the plan", found=str(target))
    text = make(plan)
    with _writing(target):
        target.write_text(text, encoding="utf-8")
    _say(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # who reads has seen enough (`| head`); Python must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _can_write(path: str | Path) -> None:
    """Before minutes of work: is there a folder to write into?"""
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise OptionError(
            "the output cannot be written", expected="a file in a folder that exists",
            found=str(path),
        )  # fmt: skip


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError("the output cannot be written", found=_reason(error)) from error


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.strerror else str(error)
