"""Training on texts of many lengths, beside eager in the same run.

    python -m benchmarks.lengths [layers ...]

Llama (d 256, 4 heads; 4 and 12 layers), batches of 8 padded to the longest text, 40 steps of 20
lengths between 24 and 120, the last batch smaller; two stages, M = 2, remat none. A step of the
pipeline alternates with a step of the model itself on the same batch, in one process with one
thread; seconds are CPU seconds. The first call and the second capture are what a capture costs.
Bars: at most 1.15 times eager plus two captures; two captures; no growth over 200 lengths.
"""

from __future__ import annotations

import gc
import random
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autopipe
from autopipe import program_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS, LENGTHS, SAMPLES, VOCABULARY = 40, 20, 8, 1000


def llama(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
    )


def batch(samples: int, longest: int) -> dict[str, torch.Tensor]:
    """Texts up to one length, padded as a collator does."""
    ends = [longest, *(random.randint(longest // 2, longest) for _ in range(samples - 1))]
    mask = torch.stack([(torch.arange(longest) < end).long() for end in ends])
    ids = torch.randint(1, VOCABULARY, (samples, longest)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def batches(steps: int, lengths: list[int]) -> Iterator[dict[str, torch.Tensor]]:
    for step in range(steps):
        samples = 5 if step == steps - 1 else SAMPLES
        yield batch(samples, lengths[step % len(lengths)])


def timed(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    start = time.process_time()
    model(**inputs).loss.backward()
    return time.process_time() - start


def places(pipe: autopipe.Pipeline) -> dict[str, int]:
    stages = pipe._programs.last[0].split.stages
    return {i.target: s.index for s in stages for i in s.held if i.kind.value == "parameter"}


def train(layers: int) -> None:
    random.seed(0)
    model, captures = llama(layers), []
    capture = program_cache.capture_with_costs

    def counted(*args: Any, **kwargs: Any) -> Any:
        captures.append(1)
        return capture(*args, **kwargs)

    program_cache.capture_with_costs = counted  # type: ignore[assignment]
    warm = autopipe.compile(llama(1), ["cpu", "cpu"], 2, remat="none")
    for longest in (20, 22):  # torch's own first imports and tables
        timed(warm, batch(SAMPLES, longest))
    captures.clear()
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, remat="none")
    lengths = random.sample(range(24, 121), LENGTHS)
    eager, own, first, where = 0.0, 0.0, [], None
    for inputs in batches(STEPS, lengths):
        eager += timed(model, inputs)
        before = len(captures)
        seconds = timed(pipe, inputs)
        model.zero_grad()
        own += seconds
        if len(captures) > before:
            first.append(seconds)
        where = where or places(pipe)
        if places(pipe) != where:
            raise AssertionError("parameters have moved")
    program_cache.capture_with_costs = capture
    rest = (own - sum(first)) / eager
    print(
        f"{layers} layers: eager {eager:.1f} s, pipeline {own:.1f} s; {len(captures)} captures of"
        f" {', '.join(f'{s:.1f}' for s in first)} s; steps without them {rest:.2f} x eager;"
        f" (1.15 x eager + two first captures) = {1.15 * eager + 2 * first[0]:.1f} s"
    )


def growth(lengths: int = 200) -> None:
    """Memory after many lengths, beside that after a tenth of them."""
    model = llama(1)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, remat="none")
    used = []
    for n, longest in enumerate(range(20, 20 + lengths)):
        timed(pipe, batch(4, longest))
        model.zero_grad()
        if n in (lengths // 10, lengths - 1):
            gc.collect()
            objects = sum(isinstance(x, torch.fx.Graph) for x in gc.get_objects())
            used.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, objects))
    (early, graphs), (late, more) = used
    print(
        f"{lengths} lengths: peak memory {early:.0f} -> {late:.0f} MiB, graphs {graphs} -> {more}"
    )


def main() -> None:
    torch.set_num_threads(1)
    for layers in map(int, sys.argv[1:] or ("4", "12")):
        train(layers)
    growth()


if __name__ == "__main__":
    main()
