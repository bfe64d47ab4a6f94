"""Run a model so that its pipeline can be compared with it.

Two things differ by design between a model and its pipeline: random numbers, which a pipeline draws
by (seed, op, micro-batch), and BatchNorm, which sees micro-batches. `NoRandomness` disables
randomness in both runs; `MicroBatchNorm` makes the model itself normalise micro-batch by
micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
    torch.alpha_dropout,
}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
CONSTANTS: dict[str, float] = {
    # Uniform numbers become one half: a branch that is dropped below a probability is kept.
    "rand": 0.5,
    "rand_like": 0.5,
    "uniform_": 0.5,
    "randn": 0.0,
    "randn_like": 0.0,
    "normal": 0.0,
    "normal_": 0.0,
    "exponential_": 1.0,
    "bernoulli": 1.0,
    "bernoulli_": 1.0,
}


class NoRandomness(TorchFunctionMode):
    """Make random functions deterministic: dropout drops nothing, noise is constant.

    Functions that are not in its table stay random; a graph captured under it shows them
    (`verify`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in DROPOUTS:
            return args[0].clone() if args else kwargs["input"].clone()
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs.pop("dropout_p", None)
            return func(*args, **kwargs)
        # The mode intercepts these as a whole, not the random functions that they call.
        if func is F.multi_head_attention_forward:
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
            args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
            return func(*args, **kwargs)
        if func is F.gumbel_softmax:
            return _softmax(*args, **kwargs)
        if func in (F.rrelu, torch.rrelu):
            return _slopes(*args, **kwargs)
        if name in RECURRENT and len(args) > 5 and isinstance(args[5], float):
            return func(*args[:5], 0.0, *args[6:], **kwargs)
        if name in CONSTANTS:
            result = func(*args, **kwargs)
            return (
                result.fill_(CONSTANTS[name])
                if name.endswith("_")
                else torch.full_like(result, CONSTANTS[name])
            )
        if name in ("randint", "randint_like"):
            bounds = [a for a in args if isinstance(a, int)]
            return torch.full_like(func(*args, **kwargs), bounds[0] if len(bounds) > 1 else 0)
        return func(*args, **kwargs)


def _softmax(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    """Gumbel softmax without noise; soft, even if the model asks for a hard one."""
    return (logits / tau).softmax(dim)


def _slopes(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *rest: Any, **more: Any
) -> Tensor:
    """Randomized ReLU with its mean slope."""
    return F.leaky_relu(x, (lower + upper) / 2)


class MicroBatchNorm(TorchFunctionMode):
    """Make batch norm in training normalise micro-batch by micro-batch.

    Args:
        sizes: samples per micro-batch.
        deferred: running statistics see the whole batch, once.
    """

    def __init__(self, sizes: Sequence[int], *, deferred: bool) -> None:
        super().__init__()
        self.sizes, self.deferred = list(sizes), deferred

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return self._batch_norm(func, *args, **(kwargs or {}))

    def _batch_norm(
        self,
        func: Callable[..., Tensor],
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return func(x, mean, variance, weight, bias, False, momentum, eps)
        per_sample = x.shape[0] // sum(self.sizes)
        own: tuple[Tensor | None, Tensor | None] = (mean, variance)
        if self.deferred:
            own = (None, None)
            if mean is not None:
                with torch.no_grad():
                    func(x, mean, variance, weight, bias, True, momentum, eps)
        parts = torch.split(x, [n * per_sample for n in self.sizes])
        return torch.cat([func(p, *own, weight, bias, True, momentum, eps) for p in parts])
