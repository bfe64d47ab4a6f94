"""Training on inputs of many sizes, beside eager in the same run.

    python -m benchmarks.lengths [family ...]

40 steps with a smaller batch at the end; two stages, M = 2, remat none. A step of the pipeline
alternates with a step of the model itself on the same batch, in one process with one thread;
seconds are CPU seconds. The first call and later captures are what a capture costs. Each family
runs twice: as it is, and with its lengths named beforehand (`dynamic=`). Bars: at most 1.15 times
eager plus two captures, each as long as the first one of the run without names; two captures; the
cut and the places of parameters unchanged; no growth over 200 lengths (`growth`).

Families: `llama-4` and `llama-12` (layers; d 256; texts padded to the longest, 20 lengths), `t5`
(source and target have 20 lengths each), `wav2vec2` (20 lengths of audio), `unet2d` (three sizes
of images), `loop` (a GRU cell over 12 lengths of time in Python: each length is a graph of its
own, so it runs once).
"""

from __future__ import annotations

import gc
import random
import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import autopipe
from autopipe import program_cache
from benchmarks.models import gpt2

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, SAMPLES, LAST, VOCABULARY = 40, 8, 5, 1000

Batch = dict[str, Tensor]


class Family(NamedTuple):
    """A model and its batches.

    Attributes:
        model: makes it.
        batch: (samples, size) → inputs.
        sizes: of the batches, in turns.
        dynamic: the names of the lengths; None if they cannot be named.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    sizes: list[int]
    dynamic: dict[str, dict[int, str]] | None


def llama(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

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


def padded(samples: int, longest: int) -> tuple[Tensor, Tensor]:
    """Texts up to one length, padded as a collator does, and their mask."""
    ends = [longest, *(random.randint(longest // 2, longest) for _ in range(samples - 1))]
    mask = torch.stack([(torch.arange(longest) < end).long() for end in ends])
    return torch.randint(1, VOCABULARY, (samples, longest)) * mask, mask


def texts(samples: int, longest: int) -> Batch:
    ids, mask = padded(samples, longest)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=256, d_ff=688, d_kv=64, num_layers=4, num_heads=4
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def translations(samples: int, longest: int) -> Batch:
    """The target has a length of its own."""
    ids, mask = padded(samples, longest)
    target, kept = padded(samples, random.randint(24, 120))
    labels = target.masked_fill(kept == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=688,
        conv_dim=(64,) * 4,
        conv_kernel=(10, 3, 3, 2),
        conv_stride=(5, 2, 2, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        mask_time_prob=0.0,
        num_labels=5,
    )
    return Wav2Vec2ForSequenceClassification(config)


def sounds(samples: int, length: int) -> Batch:
    values = torch.randn(samples, length * 40)
    return {"input_values": values, "labels": torch.randint(5, (samples,))}


class Denoiser(nn.Module):
    """A U-Net with its loss."""

    def __init__(self) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.unet = UNet2DModel(
            sample_size=32,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep).sample.square().mean()


def images(samples: int, size: int) -> Batch:
    return {
        "sample": torch.randn(samples, 3, size, size),
        "timestep": torch.randint(0, 100, (samples,)),
    }


class Loop(nn.Module):
    """A recurrent cell, called in a Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(64, 256), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 256)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state).square().mean()


def lengths(count: int = 20) -> list[int]:
    return random.Random(0).sample(range(24, 121), count)


TEXT = {name: {1: "length"} for name in ("input_ids", "attention_mask", "labels")}

FAMILIES = {
    "llama-4": Family(lambda: llama(4), texts, lengths(), TEXT),
    "llama-12": Family(lambda: llama(12), texts, lengths(), TEXT),
    "t5": Family(t5, translations, lengths(), {**TEXT, "labels": {1: "target"}}),
    "wav2vec2": Family(wav2vec2, sounds, lengths(), {"input_values": {1: "samples"}}),
    "unet2d": Family(Denoiser, images, [16, 24, 32], {"sample": {2: "size", 3: "size"}}),
    "loop": Family(Loop, lambda n, length: {"x": torch.randn(n, length, 64)}, lengths(12), None),
}


def timed(model: Any, inputs: Batch) -> float:
    start = time.process_time()
    out = model(**inputs)
    (out if isinstance(out, Tensor) else out.loss).backward()
    return time.process_time() - start


def places(pipe: autopipe.Pipeline) -> dict[str, int]:
    return {name: stage.index for stage in pipe.stages for name in stage.parameters}


def warm_up() -> None:
    """Pay for torch's own first imports and tables."""
    model, _ = gpt2(1, 32, 2, 64)
    warm = autopipe.compile(model, ["cpu", "cpu"], 2, remat="none")
    for length in (20, 22):
        ids = torch.randint(0, 256, (SAMPLES, length))
        timed(warm, {"input_ids": ids, "labels": ids})


def train(name: str) -> None:
    """Run a family as it is, and with names for its lengths."""
    bar = run(name, None, "")
    if FAMILIES[name].dynamic is not None:
        run(name, FAMILIES[name].dynamic, f", lengths named; bar {bar:.1f} s")


def run(name: str, dynamic: dict[str, dict[int, str]] | None, remark: str) -> float:
    """Train, print what it took, and return the bar."""
    random.seed(0)
    torch.manual_seed(0)
    family, captures = FAMILIES[name], []
    model = family.model().train()
    capture = program_cache.capture_with_costs

    def counted(*args: Any, **kwargs: Any) -> Any:
        captures.append(1)
        return capture(*args, **kwargs)

    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, remat="none", dynamic=dynamic)
    eager, own, calls, where = 0.0, 0.0, [], None
    program_cache.capture_with_costs = counted  # type: ignore[assignment]
    try:
        for step in range(STEPS):
            samples = LAST if step == STEPS - 1 else SAMPLES
            inputs = family.batch(samples, family.sizes[step % len(family.sizes)])
            plain = timed(model, inputs)
            programs = sum(e.programs for e in autopipe.explain_captures(pipe).entries)
            seconds = timed(pipe, inputs)
            model.zero_grad()
            eager, own = eager + plain, own + seconds
            if sum(e.programs for e in autopipe.explain_captures(pipe).entries) > programs:
                calls.append(seconds)
            where = where or places(pipe)
            if places(pipe) != where:
                raise AssertionError("parameters have moved")
    finally:
        program_cache.capture_with_costs = capture
    bar = 1.15 * eager + 2 * calls[0]
    print(
        f"{name}{remark}: eager {eager:.1f} s, pipeline {own:.1f} s; {len(captures)} captures;"
        f" calls that traced {', '.join(f'{s:.1f}' for s in calls)} s;"
        f" without them {(own - sum(calls)) / eager:.2f} x eager"
        + ("" if remark else f"; 1.15 x eager + two first captures = {bar:.1f} s"),
        flush=True,
    )
    return bar


def growth(count: int = 200) -> None:
    """Memory after many lengths, beside that after a tenth of them."""
    model = llama(1)
    pipe = autopipe.compile(model, ["cpu", "cpu"], 2, remat="none")
    used = []
    for n, longest in enumerate(range(20, 20 + count)):
        timed(pipe, texts(4, longest))
        model.zero_grad()
        if n in (count // 10, count - 1):
            gc.collect()
            objects = sum(isinstance(x, torch.fx.Graph) for x in gc.get_objects())
            used.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, objects))
    (early, graphs), (late, more) = used
    print(f"{count} lengths: peak memory {early:.0f} -> {late:.0f} MiB, graphs {graphs} -> {more}")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or [*FAMILIES, "growth"]
    warm_up()
    for name in names:
        growth() if name == "growth" else train(name)


if __name__ == "__main__":
    main()
