"""Which models torch.distributed.pipelining trains with right gradients, and which autopipe does.

    python -m benchmarks.pipelining --cases
    python -m benchmarks.pipelining --zoo [--loss-outside] [--only gpt2 bert]

`--cases`: the five models of `benchmarks.five_cases`, split by hand between their layers, four
micro-batches. `--zoo`: the small Hugging Face models of `tests.support.zoo`, used as a user
would: labels
among the arguments and the model's own loss, a split half-way, two ranks, GPipe, two micro-batches
of four samples. `--loss-outside`: without labels; a loss on the first output.

Each model runs in processes of its own (gloo, CPU) and ends as one of

    right   every gradient equals that of eager torch on the whole batch
    tied    right once the user adds up what the stages' copies of a shared parameter got
    wrong   it trains, with other gradients
    error   an exception: its type and first line
    hang    stopped at the time limit
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.five_cases import CASES, CONTROL, Case
from benchmarks.peers import Example, Outcome, Trial, as_row, try_model

SIDES = ("pipelining", "autopipe")


def case_example(case: Case) -> Example:
    """One of the five."""
    model, x, target = case.build()
    return Example(model, (x,), {}, target)


def cases() -> dict[str, Trial]:
    """The five, by what is difficult in them, and one that is not."""
    return {
        case.says: Trial(partial(case_example, case), case.loss, case.chunks, case.split)
        for case in (CONTROL, *CASES.values())
    }


def zoo_example(name: str, *, labels: bool) -> Example:
    """A model of the zoo; its batch has eight samples.

    Without labels, what a decoder would make of them is passed in their place. Caches are off: as
    results they are something that torch.export does not know.
    """
    from tests.support.zoo import ZOO

    model, kwargs = ZOO[name].build(False)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if not labels:
        ids = kwargs.pop("labels", None)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = ids.clamp(min=0)
    return Example(model, (), kwargs)


def own_loss(result: Any, _: Any) -> Tensor:
    """What the model returns first, which is its loss."""
    return pytree.tree_leaves(result)[0]


def square(result: Any, _: Any) -> Tensor:
    """A mean over the first output."""
    return pytree.tree_leaves(result)[0].pow(2).mean()


def zoo(*, outside: bool) -> dict[str, Trial]:
    """All models of the zoo; those that return no loss get one outside in any case."""
    from tests.support.zoo import ZOO
    from tests.support.zoo.entry import returned

    return {
        name: Trial(
            partial(zoo_example, name, labels=not outside),
            own_loss if entry.loss is returned and not outside else square,
            chunks=2,
            whole=tuple(n for n, d in (entry.in_dims or {}).items() if d is None),
        )
        for name, entry in ZOO.items()
    }


def table(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Markdown: a line per model, then the counts."""
    lines = ["| model | torch.distributed.pipelining | autopipe |", "|---|---|---|"]
    for name, outcomes in results.items():
        cells = (
            f"{o.kind}{': ' * bool(o.detail)}{o.detail}" for o in map(outcomes.get, SIDES) if o
        )
        lines.append(f"| {name} | " + " | ".join(c.replace("|", "\\|")[:160] for c in cells) + " |")
    lines.append("")
    for side in SIDES:
        counts = Counter(outcomes[side].kind for outcomes in results.values())
        found = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        lines.append(f"{side}: {found} of {len(results)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelining")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cases", action="store_true", help="the five models of five_cases.py")
    which.add_argument("--zoo", action="store_true", help="the small models of tests/zoo")
    parser.add_argument("--loss-outside", action="store_true", help="zoo: without labels")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models only")
    parser.add_argument("--seconds", type=float, default=90.0, help="time limit per model and side")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    # Processes that are killed leave semaphores for a tracker to clean up, which would say so.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    make: Callable[[], dict[str, Trial]]
    make = cases if options.cases else partial(zoo, outside=options.loss_outside)
    results = {}
    for name, trial in make().items():
        if options.only and name not in options.only:
            continue
        results[name] = try_model(trial, options.seconds)
        print(name, {side: o.kind for side, o in results[name].items()}, flush=True)
        if options.json:
            rows = [as_row(n, outcomes) for n, outcomes in results.items()]
            options.json.write_text(json.dumps(rows, indent=1))
    print()
    print(table(results))


if __name__ == "__main__":
    main()
