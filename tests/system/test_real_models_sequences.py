"""Models of sequences: torch's Transformer with its causal mask, and recurrent layers.

Truth is eager torch on the whole batch, in float64. Covers python_state/packed_sequences.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from autopipe.errors import CaptureError, InputError
from tests.support.agreement import assert_agrees, assert_close, pipelined

pytestmark = [pytest.mark.few(1), pytest.mark.filterwarnings("ignore:enable_nested_tensor")]
WIDTH, LENGTH = 8, 5


def causal(length: int = LENGTH) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def encoder(*, batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2).double()


def words(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


class Masked(nn.Module):
    """Makes its mask in the forward."""

    def __init__(self, mask: Callable[[int], Tensor], **hints: Any) -> None:
        super().__init__()
        self.encoder, self.mask, self.hints = encoder(), mask, hints

    def forward(self, x: Tensor) -> Any:
        return self.encoder(x, mask=self.mask(x.shape[1]), **self.hints)


MASKS: dict[str, Tensor] = {
    "float": causal(),
    "not causal": torch.randn(LENGTH, LENGTH, dtype=torch.float64),
    "bool": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
}


@pytest.mark.parametrize("batch", [6, LENGTH])
@pytest.mark.parametrize("name", MASKS)
def test_an_encoder_with_a_mask(name: str, batch: int) -> None:
    """Whether it is causal is decided by its values, and makes no difference to the result."""
    pipe = pipelined(encoder(), in_dims={"mask": None})
    assert_agrees(pipe, words(batch, LENGTH), mask=MASKS[name])
    assert_agrees(pipe, words(batch, LENGTH), mask=torch.zeros_like(MASKS[name]))


@pytest.mark.parametrize("hint", [True, None])
def test_an_encoder_whose_batch_comes_second(hint: bool | None) -> None:
    pipe = pipelined(encoder(batch_first=False), in_dims={"src": 1, "mask": None})
    assert_agrees(pipe, words(LENGTH, 6), mask=causal(), is_causal=hint)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Masked(causal),
        lambda: Masked(causal, is_causal=True),
        lambda: Masked(lambda n: torch.ones(n, n, dtype=torch.bool).triu(1)),
        lambda: Masked(lambda n: torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)),
    ],
)
def test_a_mask_made_in_the_forward(model: Callable[[], nn.Module]) -> None:
    assert_agrees(pipelined(model()), words(6, LENGTH))


@pytest.mark.parametrize(
    "hints",
    [
        {"tgt_mask": causal(4)},
        {"src_mask": causal(), "tgt_mask": causal(4), "tgt_is_causal": True},
        {"tgt_mask": torch.zeros(4, 4, dtype=torch.float64), "src_mask": causal()},
    ],
)
def test_a_transformer(hints: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 1, 16, 0.0, batch_first=True).double()
    pipe = pipelined(model, in_dims={n: None for n in hints if n.endswith("mask")})
    assert_agrees(pipe, words(6, LENGTH), words(6, 4), **hints)


def test_attention_and_a_decoder() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    decoder = nn.TransformerDecoder(layer, 2).double()
    pipe = pipelined(decoder, in_dims={"tgt_mask": None})
    assert_agrees(pipe, words(6, 4), words(6, LENGTH), tgt_mask=causal(4))
    x = words(6, LENGTH)
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double()
    pipe = pipelined(attention, devices=1, in_dims={"attn_mask": None})
    assert_agrees(pipe, x, x, x, attn_mask=causal(), is_causal=True, need_weights=False)


class Own(nn.TransformerEncoderLayer):
    """Believes what it is told of the mask."""

    def forward(self, src: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any) -> Tensor:
        return super().forward(src) * (2 if is_causal else 1)


@pytest.mark.parametrize("hint", [True, False])
def test_a_layer_of_ones_own_must_be_told(hint: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(Own(WIDTH, 2, 16, 0.0, batch_first=True), 1).double()
    pipe = pipelined(model, devices=1, in_dims={"mask": None})
    with pytest.raises(CaptureError, match="depends on the values of the mask") as caught:
        pipe(words(6, LENGTH), mask=causal())
    assert "is_causal=True" in str(caught.value.remedy)
    pipe = pipelined(model, devices=1, in_dims={"mask": None})
    assert_agrees(pipe, words(6, LENGTH), mask=causal(), is_causal=hint)


@pytest.mark.parametrize(
    ("options", "inputs", "suggested"),
    [
        ({}, (6, LENGTH), {"mask": None}),
        ({"in_dims": 1}, (LENGTH, 6), {"src": 1, "mask": None}),
    ],
)
def test_a_mask_that_is_taken_for_a_batch(
    options: dict[str, Any], inputs: tuple[int, int], suggested: dict[str, Any]
) -> None:
    """The remedy is what to write: with it the model runs."""
    model = encoder(batch_first=not options)
    with pytest.raises(InputError, match="number of samples") as caught:
        pipelined(model, **options)(words(*inputs), mask=causal())
    assert str(suggested) in str(caught.value.remedy)
    assert_agrees(pipelined(model, in_dims=suggested), words(*inputs), mask=causal())


def test_a_mask_as_long_as_the_batch_is_named() -> None:
    with pytest.raises(CaptureError, match="fixes the size") as caught:
        pipelined(encoder())(words(LENGTH, LENGTH), mask=causal())
    assert caught.value.node == "mask"
    assert "in_dims" in str(caught.value.remedy)


# ------------------------------------------------------------------------------ packed sequences

LENGTHS = torch.tensor([5, 4, 3, 5, 2, 1])


class Recurrent(nn.Module):
    """Returns the last output of each sequence, from a packed or a padded batch."""

    def __init__(self, kind: type[nn.Module], how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(WIDTH, 6, batch_first=True).double()
        self.last = nn.Linear(6, 2).double()
        self.how = how

    def forward(self, x: Any, lengths: Tensor | None = None) -> Tensor:
        if self.how == "padded":
            assert lengths is not None
            out, _ = self.layer(x)
            index = (lengths - 1).view(-1, 1, 1).expand(-1, 1, out.shape[2])
            return self.last(out.gather(1, index).squeeze(1))
        if self.how == "list":
            x = pack_padded_sequence(x, LENGTHS.tolist(), batch_first=True, enforce_sorted=False)
        elif self.how == "several":
            x = pack_sequence([x[0], x[1]])
        elif lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, state = self.layer(x)
        if self.how == "outputs":
            return self.last(pad_packed_sequence(out, batch_first=True)[0])
        return self.last(state[0][-1] if isinstance(state, tuple) else state[-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("how", ["state", "outputs", "list", "several"])
def test_packing_is_refused(how: str, kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match="packed sequence") as caught:
        pipelined(Recurrent(kind, how))(words(6, LENGTH), LENGTHS)
    assert caught.value.source is not None
    assert "test_real_models_sequences.py" in caught.value.source
    assert "out.gather(1, (lengths - 1)" in str(caught.value.remedy)


def test_a_packed_argument_is_refused() -> None:
    packed = pack_padded_sequence(words(6, 5), LENGTHS, batch_first=True, enforce_sorted=False)
    with pytest.raises(InputError, match="packed sequence"):
        pipelined(Recurrent(nn.LSTM, "state"))(packed)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_way_out_of_packing(kind: type[nn.Module]) -> None:
    """What the error proposes runs, and computes what the packed model computes."""
    padded, packed = Recurrent(kind, "padded"), Recurrent(kind, "state")
    found = assert_agrees(pipelined(padded), words(6, LENGTH), LENGTHS)
    assert_close(found, packed(words(6, LENGTH), LENGTHS))
