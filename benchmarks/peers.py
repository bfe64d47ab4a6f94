"""One training step of a model under torch.distributed.pipelining and under autopipe, as a trial.

Each side runs in processes of its own with a time limit, so that a hang is an outcome and not the
end of the benchmark. What comes back is every gradient, compared with those of eager torch on the
whole batch.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import autopipe

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.pipelining", "transformers", "diffusers", "autopipe", "benchmarks.peers"]
)
ROUNDING = 1e-5
"""Of the model's largest gradient: what float32 may be off by, and no mistake would be."""

Gradients = dict[str, "numpy.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Example:
    """What a trial trains on.

    Attributes:
        model: in training mode, without anything random.
        args, kwargs: one batch.
        target: the loss's second argument; None if the model has its own labels.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Tensor | None = None

    @property
    def batch(self) -> int:
        """Samples: what the first tensor has in dimension 0."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next(len(x) for x in leaves if isinstance(x, Tensor))

    def micro_batches(self, chunks: int) -> list[Example]:
        """The same model with a part of the batch each."""

        def part(value: Any, indices: Tensor) -> Any:
            batched = isinstance(value, Tensor) and value.ndim and len(value) == self.batch
            return value[indices] if batched else value

        return [
            Example(
                self.model,
                *pytree.tree_map(partial(part, indices=i), (self.args, self.kwargs, self.target)),
            )
            for i in torch.arange(self.batch).tensor_split(chunks)
        ]


@dataclass(frozen=True)
class Trial:
    """A model to train for one step; pickled, so its functions stand at the top of a module.

    Attributes:
        build: makes the same example every time.
        loss: ``loss(result, target)``, of the batch or of a micro-batch.
        chunks: micro-batches.
        split: the modules before which a stage begins; None: one, half-way.
        whole: names of the keywords that are not batched.
    """

    build: Callable[[], Example]
    loss: Callable[[Any, Any], Tensor]
    chunks: int
    split: tuple[str, ...] | None = None
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        kind: "right"; "tied": right once the user adds up what the stages' copies of a shared
            parameter got; "wrong"; "error"; "hang".
        detail: the error's type and first line, or the largest deviation.
    """

    kind: str
    detail: str = ""


def halfway(example: Example) -> str:
    """The module at which half of the blocks have run: where a user would split.

    Blocks are the members of the outermost module lists, in the order in which they run; of a
    model without such lists, its own children.
    """
    model = example.model
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [n for n in lists if not any(n.startswith(f"{o}.") for o in lists if o != n)]
    blocks = {f"{n}.{i}": b for n in outer for i, b in model.get_submodule(n).named_children()}
    order: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda *_: None if name in order else order.append(name)

    for candidates in (blocks, dict(model.named_children())):
        hooks = [m.register_forward_pre_hook(watch(n)) for n, m in candidates.items()]
        with torch.no_grad():
            model(*example.args, **example.kwargs)
        for hook in hooks:
            hook.remove()
        if len(order) > 1:
            break
        order.clear()
    if len(order) < 2:
        raise ValueError("no two blocks to split between")
    return order[len(order) // 2]


def _gradients(module: nn.Module) -> Gradients:
    """By every name that a parameter has."""
    return {
        n: p.grad.detach().numpy()
        for n, p in module.named_parameters(remove_duplicate=False)
        if p.grad is not None
    }


# ------------------------------------------------------------------------- what the processes run


def eager(trial: Trial) -> tuple[Gradients, list[list[str]]]:
    """Gradients of the whole batch, and the groups of names that mean one parameter.

    BatchNorm sees a micro-batch at a time in every pipeline; a model with it is trained by the
    plain loop over the same chunks, the losses weighted by their sizes.
    """
    example = trial.build()
    normalised = any(isinstance(m, _BatchNorm) for m in example.model.modules())
    for part in example.micro_batches(trial.chunks) if normalised else [example]:
        loss = trial.loss(example.model(*part.args, **part.kwargs), part.target)
        (loss * (part.batch / example.batch)).backward()
    names = defaultdict(list)
    for name, parameter in example.model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return _gradients(example.model), list(names.values())


def autopiped(trial: Trial) -> Gradients:
    """The same through autopipe, in as many stages."""
    example = trial.build()
    devices = 2 if trial.split is None else len(trial.split) + 1
    in_dims = {n: None if n in trial.whole else 0 for n in example.kwargs} or 0
    pipe = autopipe.compile(example.model, devices, trial.chunks, in_dims=in_dims)
    trial.loss(pipe(*example.args, **example.kwargs), example.target).backward()
    return _gradients(pipe)


def pipelined(trial: Trial, rank: int, world: int, store: str) -> Gradients:
    """One rank of torch.distributed.pipelining, used as its documentation shows."""
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline
    from torch.distributed.pipelining.microbatch import TensorChunkSpec, _Replicate

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    example = trial.build()
    first = example.micro_batches(trial.chunks)[0]
    whole = pipeline(
        example.model,
        mb_args=first.args,
        mb_kwargs=first.kwargs,
        split_spec=dict.fromkeys(trial.split or (halfway(example),), SplitPoint.BEGINNING),
    )
    stage = whole.build_stage(rank, torch.device("cpu"))
    specs = {n: _Replicate() if n in trial.whole else TensorChunkSpec(0) for n in example.kwargs}
    schedule = ScheduleGPipe(
        stage, trial.chunks, loss_fn=trial.loss, kwargs_chunk_spec=specs if trial.whole else None
    )
    target = torch.zeros(example.batch) if example.target is None else example.target
    args, kwargs = (example.args, example.kwargs) if rank == 0 else ((), {})
    last = {"target": target} if rank == world - 1 else {}
    schedule.step(*args, **kwargs, **last)
    return _gradients(stage.submod)


def _in_a_line(error: BaseException) -> str:
    """Type and first line of the error that it began with, if that says anything."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    text = next(filter(None, map(str.strip, str(error).splitlines())), "")
    return f"{type(error).__name__}: {text}"


def _process(answers: Connection, function: Callable[..., Any], *args: Any) -> None:
    """Run a function quietly; send ("done", its result) or ("error", what it raised)."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:  # the exporter's log is megabytes
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        answers.send(("done", function(*args)))
    except BaseException as error:
        answers.send(("error", _in_a_line(error)))
    finally:
        answers.close()


# ----------------------------------------------------------------------------------- the judgement


def run(tasks: Sequence[tuple[Any, ...]], seconds: float) -> tuple[str, Any]:
    """Run functions side by side, each in a process, until all are done or one has failed.

    Returns:
        ("done", the results in order), ("error", the first error) or ("hang", who was waiting).
    """
    pipes = [CONTEXT.Pipe(duplex=False) for _ in tasks]
    processes = [
        CONTEXT.Process(target=_process, args=(send, *task), daemon=True)
        for (_, send), task in zip(pipes, tasks, strict=True)
    ]
    results: dict[Any, Any] = {}
    waiting = {receive: i for i, (receive, _) in enumerate(pipes)}
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for _, send in pipes:
            send.close()
        while waiting:
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                return "hang", f"{len(waiting)} of {len(tasks)} after {seconds:.0f} s"
            for receive in ready:
                index = waiting.pop(receive)
                try:
                    kind, answer = receive.recv()  # type: ignore[union-attr]
                except EOFError:
                    kind, answer = "error", "the process died"
                if kind == "error":
                    where = f"rank {index}: " if len(tasks) > 1 else ""
                    return "error", f"{where}{answer}"
                results[index] = answer
        return "done", [results[i] for i in range(len(tasks))]
    finally:
        for process in processes:
            process.kill()  # also those that wait for one that has failed
            process.join()


def judge(expected: Gradients, groups: Iterable[list[str]], found: Iterable[Gradients]) -> Outcome:
    """Compare the gradients that stages hold with eager's.

    Args:
        expected: eager's, by every name.
        groups: names that mean one parameter.
        found: per stage.
    """
    scale = max(_largest(g) for g in expected.values())
    alone = summed = 0.0
    for names in groups:
        truth = expected.get(names[0])
        if truth is None:
            continue
        stages = [[stage[n] for n in names if n in stage] for stage in found]
        copies = [held[0] for held in stages if held]
        alone = max([alone, *(_largest(c - truth) for c in copies or [0 * truth])])
        summed = max(summed, _largest(sum(copies) - truth))
    if alone <= ROUNDING * scale:
        return Outcome("right")
    if summed <= ROUNDING * scale:
        return Outcome("tied", "right if the copies' gradients are added up by hand")
    return Outcome("wrong", f"off by {summed / scale:.1e} of the largest gradient")


def _largest(gradient: Any) -> float:
    """Infinite where something is not a number."""
    return float(numpy.nan_to_num(abs(gradient), nan=numpy.inf).max(initial=0.0))


def try_model(trial: Trial, seconds: float = 90.0) -> dict[str, Outcome]:
    """Train a step under each of the two; {"pipelining": …, "autopipe": …}."""
    kind, truth = run([(eager, trial)], seconds)
    if kind != "done":
        return dict.fromkeys(("pipelining", "autopipe"), Outcome(kind, f"eager torch: {truth}"))
    ((expected, groups),) = truth
    world = 2 if trial.split is None else len(trial.split) + 1
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        sides = {
            "pipelining": [(pipelined, trial, rank, world, store) for rank in range(world)],
            "autopipe": [(autopiped, trial)],
        }
        for name, tasks in sides.items():
            kind, answer = run(tasks, seconds)
            outcomes[name] = (
                judge(expected, groups, answer) if kind == "done" else Outcome(kind, answer)
            )
    return outcomes


def as_row(name: str, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """For JSON."""
    return {"name": name} | {side: asdict(outcome) for side, outcome in outcomes.items()}
