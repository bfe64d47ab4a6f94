"""docs/errors.md: every class of error with scripts that raise it, and what they print.

``python -m tests.support.errors_page > docs/errors.md`` writes the page anew.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import runpy
import tempfile
import textwrap
import warnings
from pathlib import Path

from autopipe import errors

HEAD = """\
import torch, autopipe
from torch import nn
"""

CASES: dict[type[errors.AutopipeError], dict[str, str]] = {
    errors.OptionError: {
        "A value that cannot be right": """\
            autopipe.compile(nn.Linear(4, 4), devices=2, chunks=0)
            """,
        "A class instead of a model": """\
            autopipe.compile(nn.Linear, devices=1, chunks=2)
            """,
        "A step without labels": """\
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.head = nn.Linear(4, 3)
                def forward(self, x, labels=None):
                    logits = self.head(x)
                    if labels is None:
                        return {"logits": logits}
                    loss = nn.functional.cross_entropy(logits, labels)
                    return {"loss": loss, "logits": logits}

            autopipe.compile(Model(), devices=1, chunks=2).step(torch.randn(6, 4))
            """,
        "A step without a target": """\
            loss_fn = nn.functional.mse_loss
            pipe = autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2, loss_fn=loss_fn)
            pipe.step(torch.randn(6, 4))
            """,
        "A module to cut at that the model does not have": """\
            autopipe.compile(nn.Sequential(nn.Linear(4, 4)), 1, 2, cut_at=["Linaer"])
            """,
        "A question before the first call": """\
            autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2).explain()
            """,
    },
    errors.DeviceError: {
        "A device that does not exist": """\
            autopipe.compile(nn.Linear(4, 4), devices=["cpu", "gpu:0"], chunks=2)
            """,
        "A model without weights": """\
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            autopipe.compile(model, devices=1, chunks=2)(torch.randn(6, 4))
            """,
    },
    errors.CaptureError: {
        "A parameter that the model does not know": """\
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.scales = [nn.Parameter(torch.ones(4))]
                def forward(self, x):
                    return x * self.scales[0]

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(4, 4))
            """,
        "An argument with more than values": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x * getattr(x, "scale", 1.0)

            x = torch.randn(4, 4)
            x.scale = 2.0
            autopipe.compile(Model(), devices=1, chunks=2)(x)
            """,
        "A seed within the forward": """\
            class Model(nn.Module):
                def forward(self, x):
                    torch.manual_seed(0)
                    return x + torch.rand(4)

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(4, 4))
            """,
        "A result that depends on the time": """\
            import time

            class Model(nn.Module):
                def forward(self, x):
                    return x * time.time()

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(4, 4))
            """,
        "A state that is no buffer": """\
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.total = torch.zeros(4)
                def forward(self, x):
                    self.total += x.mean(0)
                    return x * 2

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(4, 4))
            """,
        "A number that Python draws": """\
            from random import random as draw

            class Model(nn.Module):
                def forward(self, x):
                    return x * draw()

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(4, 4))
            """,
        "Control flow that depends on data": """\
            class Model(nn.Module):
                def forward(self, x):
                    if x.sum() > 0:
                        return x * 2
                    return x

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A packed sequence": """\
            from torch.nn.utils.rnn import pack_padded_sequence

            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.LSTM(4, 4, batch_first=True)
                def forward(self, x, lengths):
                    packed = pack_padded_sequence(x, lengths, batch_first=True)
                    return self.layer(packed)[1][0][-1]

            x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 4, 2])
            autopipe.compile(Model(), devices=1, chunks=2)(x, lengths)
            """,
        "A layer of one's own that is told whether a mask is causal": """\
            class Layer(nn.TransformerEncoderLayer):
                def forward(self, x, src_mask=None, is_causal=False, **others):
                    return x if is_causal else x * 2

            model = nn.TransformerEncoder(Layer(4, 2, batch_first=True), 1)
            pipe = autopipe.compile(model, devices=1, chunks=2, in_dims={"mask": None})
            pipe(torch.randn(6, 3, 4), mask=nn.Transformer.generate_square_subsequent_mask(3))
            """,
        "A batch size that becomes a number": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x * torch.ones(len(x), 1)

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "Gradients taken in the forward": """\
            class Model(nn.Module):
                def forward(self, x):
                    y = x.sin()
                    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

            x = torch.randn(6, 4, requires_grad=True)
            autopipe.compile(Model(), devices=1, chunks=2)(x)
            """,
        "Random numbers in a vmap": """\
            class Model(nn.Module):
                def forward(self, x):
                    return torch.vmap(lambda a: a * torch.rand(()), randomness="different")(x)

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A random number that torch does not know of": """\
            import random

            class Model(nn.Module):
                def forward(self, x):
                    return x * random.random()

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "An input without a batch dimension": """\
            autopipe.compile(nn.Linear(4, 2), devices=1, chunks=2)(torch.randn(4))
            """,
        "A target that the model does not take": """\
            pipe = autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2)
            pipe(torch.randn(6, 4), torch.randn(6, 4))
            """,
        "A value that is written into a text": """\
            class Model(nn.Module):
                def forward(self, x):
                    y = x * 2
                    print(f"mean {y.mean().item():.3f}")
                    return y

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A number of a tensor": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x / float(x.abs().max())

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A tensor on a device of its own": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x + torch.ones(4, device="meta")

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A tensor that goes to NumPy": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x + torch.from_numpy(x.numpy()).round()

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A hook on a tensor": """\
            class Model(nn.Module):
                def forward(self, x):
                    y = x * 2
                    y.register_hook(lambda gradient: gradient * 0.5)
                    return y

            x = torch.randn(6, 4, requires_grad=True)
            autopipe.compile(Model(), devices=1, chunks=2)(x)
            """,
    },
    errors.CouplingError: {
        "Samples that meet in the model": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x.softmax(0)

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
        "A contrastive loss": """\
            class Model(nn.Module):
                def forward(self, x, y):
                    logits = x @ y.T
                    target = torch.arange(x.shape[0])
                    return nn.functional.cross_entropy(logits, target)

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4), torch.randn(6, 4))
            """,
        "A reduction without a known rule": """\
            class Model(nn.Module):
                def forward(self, x):
                    return x.logsumexp(0).mean()

            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
            """,
    },
    errors.InputError: {
        "An argument that cannot be compared from call to call": """\
            class Model(nn.Module):
                def forward(self, x, scales):
                    return x * next(scales)

            pipe = autopipe.compile(Model(), devices=1, chunks=2)
            pipe(torch.randn(4, 4), iter([1.0, 2.0]))
            """,
        "Targets with an entry for each sample": """\
            class Model(nn.Module):
                def forward(self, x, targets):
                    return torch.stack([(a - t["box"]).sum() for a, t in zip(x, targets)])

            targets = [{"box": torch.rand(n, 4)} for n in (1, 2, 1)]
            autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(3, 4), targets)
            """,
        "A list of tensors that differ in their number of samples": """\
            class Model(nn.Module):
                def forward(self, parts):
                    return parts[0].mean(1) + parts[1].mean(1)

            pipe = autopipe.compile(Model(), devices=1, chunks=2)
            pipe([torch.randn(6, 4), torch.randn(5, 4)])
            """,
        "A list instead of a tensor": """\
            autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2)([[1.0, 2.0, 3.0, 4.0]])
            """,
        "A batch norm with one sample": """\
            pipe = autopipe.compile(nn.BatchNorm1d(4), devices=1, chunks=2)
            pipe(torch.randn(1, 4))
            """,
        "Inputs that differ in their number of samples": """\
            autopipe.compile(nn.Bilinear(4, 4, 2), 1, 2)(torch.randn(6, 4), torch.randn(5, 4))
            """,
    },
    errors.PartitionError: {
        "More stages than the model has calls": """\
            autopipe.compile(nn.Linear(4, 4), devices=3, chunks=2)(torch.randn(6, 4))
            """,
    },
    errors.MemoryLimitError: {
        "A limit that nothing keeps": """\
            layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
            autopipe.plan(layers, 2, 4, args=(torch.ones(8, 64),), memory="200KiB")
            """,
    },
    errors.PlanError: {
        "A plan of another model": """\
            large = nn.Sequential(*[nn.Linear(4, 4)] * 3)
            plan = autopipe.plan(large, 2, 2, args=(torch.ones(4, 4),))
            autopipe.compile(nn.Linear(4, 4), plan=plan)(torch.randn(6, 4))
            """,
    },
    errors.UnsupportedError: {
        "A schedule that needs the loss": """\
            layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            autopipe.compile(layers, devices=2, chunks=2, schedule="1f1b")(torch.randn(6, 4))
            """,
        "A move": """\
            autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2).half()
            """,
    },
    errors.StageError: {
        "A batch that is overwritten before its backward": """\
            model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(4, 4)
            loss = autopipe.compile(model, devices=1, chunks=2)(x).sum()
            x.copy_(torch.randn(4, 4))
            loss.backward()
            """,
        "A target of another dtype": """\
            class Model(nn.Module):
                def forward(self, logits, labels):
                    return nn.functional.cross_entropy(logits, labels)

            pipe = autopipe.compile(Model(), devices=1, chunks=2)
            pipe(torch.randn(6, 4), torch.zeros(6, dtype=torch.int32))
            """,
        "A stage that fails while it runs": """\
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.table = nn.Embedding(10, 4)

                def forward(self, ids):
                    return self.table(ids) * 2

            pipe = autopipe.compile(Model(), devices=1, chunks=2)
            pipe(torch.tensor([1, 2, 3, 10]))
            """,
        "A second backward": """\
            pipe = autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2)
            loss = pipe(torch.randn(6, 4)).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            """,
    },
    errors.VerifyError: {
        "A program that breaks its own rules": """\
            import dataclasses

            pipe = autopipe.compile(nn.Linear(4, 4), devices=1, chunks=2)
            pipe(torch.randn(6, 4))
            dataclasses.replace(pipe.captured, inputs=()).verify()
            """,
    },
}

WARNINGS = {
    "A check of values": """\
        class Model(nn.Module):
            def forward(self, x):
                y = x.log()
                assert not torch.isnan(y).any()
                return y

        autopipe.compile(Model(), devices=1, chunks=2)(torch.rand(6, 4))
        """,
    "A forward that prints": """\
        class Model(nn.Module):
            def forward(self, x):
                y = x * 2
                print(y)
                return y

        autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
        """,
    "A forward that asks for the time": """\
        import time

        class Model(nn.Module):
            def forward(self, x):
                start = time.perf_counter()
                y = x * 2
                self.seconds = time.perf_counter() - start
                return y

        autopipe.compile(Model(), devices=1, chunks=2)(torch.randn(6, 4))
        """,
}
"""Scripts that run, with a warning."""

WARNED = """\
## Warnings

What the pipeline does otherwise than the model, without harm to its results, is a warning at the
user's line.
"""

INTRODUCTION = """\
# Errors

Every error that autopipe raises on purpose is an `autopipe.errors.AutopipeError`, one class for
each kind. It carries `problem`, `node` (in the captured graph), `source` (``file:line`` of the
model), `expected`, `found` and `remedy`, and prints those that it has. What follows is generated:
each script was run (after ``import torch, autopipe`` and ``from torch import nn``), and this is
what it raised.
"""


def raised(script: str) -> Exception:
    """What a script raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_text(HEAD + textwrap.dedent(script))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(path))
        except Exception as error:
            error.args = (str(error).replace(f"{folder}/", ""),)
            return error
    raise AssertionError(f"nothing was raised by\n{script}")


def warned(script: str) -> str:
    """What a script warns of, as Python shows it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Path(folder) / "train.py"
        path.write_text(HEAD + textwrap.dedent(script))
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(path))
        shown = [
            f"{w.filename}:{w.lineno}: {w.category.__name__}: {w.message}".replace(f"{folder}/", "")
            for w in caught
        ]
    if not shown:
        raise AssertionError(f"nothing was warned of by\n{script}")
    return "\n".join(shown)


def page() -> str:
    """The text of docs/errors.md."""
    parts = [INTRODUCTION]
    for kind, cases in CASES.items():
        parts.append(f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n")
        for title, script in cases.items():
            error = raised(script)
            code = textwrap.dedent(script).strip()
            parts.append(
                f"### {title}\n\n```python\n{code}\n```\n\n```text\n{type(error).__name__}:"
                f" {error}\n```\n"
            )
    parts.append(WARNED)
    for title, script in WARNINGS.items():
        code = textwrap.dedent(script).strip()
        shown = f"```python\n{code}\n```\n\n```text\n{warned(script)}\n```\n"
        parts.append(f"### {title}\n\n{shown}")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
