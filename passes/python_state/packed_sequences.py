"""Packed sequences (`torch.nn.utils.rnn`): why they are refused, and what to do instead."""

from __future__ import annotations

from typing import TypeVar

from autopipe.errors import AutopipeError

Kind = TypeVar("Kind", bound=AutopipeError)


def packed_error(kind: type[Kind], source: str | None = None) -> Kind:
    """The error for a packed sequence.

    Args:
        kind: the class of the error.
        source: ``file:line`` of the model, if known.
    """
    return kind(
        "a packed sequence cannot be split into micro-batches: the lengths, which are values,"
        " decide its shape, and it holds the time steps of all samples in one dimension",
        source=source,
        found="torch.nn.utils.rnn: pack_padded_sequence, pack_sequence or a PackedSequence",
        remedy="run the recurrent layer on the padded batch. For a layer of one direction that"
        " changes nothing before the padding: mask the outputs by the lengths, and in the place of"
        " its last state take the output of each last step: out.gather(1, (lengths -"
        " 1).view(-1, 1, 1).expand(-1, 1, out.shape[2])).squeeze(1) (batch_first=True)",
    )
