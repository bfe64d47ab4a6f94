"""Look inside a pipeline: stages, boundary tensors, costs, code; then run the stages by hand.

    python examples/inspect_stages.py

Nothing here needs a GPU, and the last part not even weights.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import autopipe
from autopipe.report.stages import StageView


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=6, n_embd=64, n_head=2, vocab_size=256, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def describe(stage: StageView) -> None:
    print(f"stage {stage.index} on {stage.device}: {len(stage.parameters)} parameters,", end=" ")
    print(f"{stage.parameters[0]} ... {stage.parameters[-1]}")
    for boundary in stage.inputs:
        print(f"  in   {boundary}")
    for boundary in stage.outputs:
        print(f"  out  {boundary}")
    flops = stage.cost.flops
    print(f"  forward flops       {flops}, at B = 8: {int(flops.subs('B', 8)):,}")
    print(f"  activation bytes    {stage.cost.activation_bytes}\n")


def by_hand(pipe: autopipe.Pipeline, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The model's forward, one stage graph after another; no runtime, no micro-batches."""
    model, captured = pipe.model, pipe.captured
    values: dict[str, Tensor] = dict(inputs)  # a placeholder has the name of the argument
    for item in captured.inputs:
        if item.kind == "parameter":
            values[item.name] = model.get_parameter(item.target)
        elif item.kind == "buffer":
            values[item.name] = model.get_buffer(item.target)
        elif item.kind == "constant":
            values[item.name] = captured.constants[item.target]
    for stage in pipe.stages:
        arguments = [*stage.held, *(boundary.name for boundary in stage.inputs)]
        results = stage.graph_module(*(values[name] for name in arguments))
        values.update(zip((b.name for b in stage.outputs), results, strict=True))
    # Each micro-batch yields the sum of its losses and the number of tokens that count; the
    # epilogue makes the whole batch's mean of their totals.
    assert captured.epilogue is not None
    return captured.epilogue(*(values[output.name] for output in captured.outputs))


def main() -> None:
    transformers.logging.set_verbosity_error()
    model = gpt2()
    ids = torch.randint(256, (8, 32))
    pipe = autopipe.compile(model, ["cpu"] * 3, 4, kwargs={"input_ids": ids, "labels": ids})

    print("== Stages, their boundary tensors and their costs as formulas in the batch size B\n")
    for stage in pipe.stages:
        describe(stage)

    print("== The first calls of stage 2: pipe.stages[2].code\n")
    lines = pipe.stages[2].code.splitlines()
    calls = [line.split(";")[0].strip() for line in lines if "torch.ops" in line]
    print("\n".join(calls[:6]))

    print("\n== The stage graphs by hand, at another batch size than they were captured with\n")
    ids = torch.randint(256, (5, 32))
    with torch.no_grad():
        loss, logits, *_ = by_hand(pipe, {"input_ids": ids, "labels": ids})
        expected = model(input_ids=ids, labels=ids)
    print(f"loss {loss:.6f}, the model's {expected.loss:.6f}")
    print(f"largest difference of the logits: {(logits - expected.logits).abs().max():.1e}")
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(logits, expected.logits)

    print("\n== A plan for a model without weights: autopipe.plan\n")
    with torch.device("meta"):
        config = BertConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16)
        large = BertForMaskedLM(config)
    tokens = torch.zeros(32, 512, dtype=torch.long)
    plan = autopipe.plan(large, ["cpu"] * 4, 8, kwargs={"input_ids": tokens})
    print(plan)
    print(f"\n{plan.timeline}")
    assert plan.balance > 0.9
    held = sum(stage.parameter_bytes for stage in plan.stages)
    assert held == sum(p.nbytes for p in large.parameters())


if __name__ == "__main__":
    main()
