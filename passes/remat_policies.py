"""Rematerialization policies: which values F saves for the backward, and estimates of the cost.

    none      save everything that the backward reads, as autograd does
    full      save only what the stage received; the backward recomputes the rest (GPipe, sec. 2.3)
    offload   save as "none", but on the host: what F saves is copied there, and back before the
              backward (PipeOffload, arXiv 2503.01328); nothing is recomputed
    min-cut   save what functorch's min-cut partitioner selects: results of matrix products, mostly;
              the backward recomputes cheap ops
    0.0..1.0  save a fraction of what min-cut saves beyond the received values: functorch's memory
              budget, whose knapsack first recomputes the values that free most bytes per FLOP

Each policy is one class below and one entry in `POLICIES` (or, if it has a parameter, in
`PARAMETERIZED`). Option parsing, error messages, help texts, the planner's ladder of policies, the
estimates for the cut and the choice of saved values all ask these objects. No torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

NodeT = TypeVar("NodeT")


@dataclass(frozen=True)
class JointValues(Generic[NodeT]):
    """The values of a stage's joint graph that a policy selects from.

    Attributes:
        forward: values that the forward computes or reads.
        received: the stage's received values; they are always saved.
        min_cut: the values that functorch's partitioner saves under a memory budget from 0 to 1.
    """

    forward: AbstractSet[NodeT]
    received: AbstractSet[NodeT]
    min_cut: Callable[[float], AbstractSet[NodeT]]


class OpEstimate(NamedTuple):
    """Estimates for one op before any stage is traced.

    Attributes:
        autograd_bytes: bytes of its results that autograd saves.
        min_cut_bytes: bytes of its results that a min-cut would save.
        is_cheap: whether a min-cut would recompute it.
    """

    autograd_bytes: int
    min_cut_bytes: int
    is_cheap: bool


@dataclass(frozen=True)
class RematPolicy(ABC):
    """What a stage saves between the forward and the backward of a micro-batch.

    Policies are equal if their options are; they serve as cache keys.

    Attributes:
        option: what a user writes for it: a name, or a number.
        rank: orders policies by how much they recompute: 0 "none", 1 "min-cut", 2 "full"; a new
            policy needs a distinct rank.
    """

    option: str | float
    rank: float

    @property
    def name(self) -> str:
        """The option as text, as in plans and tables."""
        return str(self.option)

    @property
    def saves_received(self) -> bool:
        """Whether received values are saved even if no backward reads them (recomputation does)."""
        return True

    @property
    def least_offloaded(self) -> int | None:
        """The size in bytes from which saved tensors leave the device; None: they stay there."""
        return None

    @property
    def min_cut_share(self) -> float | None:
        """The fraction of min-cut's saved values that this policy saves.

        None if it saves other values. The planner tries fractions between policies that have a
        share.
        """
        return None

    @abstractmethod
    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        """Choose the values that F saves, besides the received ones.

        Args:
            values: of the stage's joint graph.

        Returns:
            Nodes; those that the backward does not read are not saved in the end.
        """

    @abstractmethod
    def saved_bytes(self, op: OpEstimate) -> float:
        """Bytes of an op's results that each further micro-batch in flight saves."""

    @abstractmethod
    def recomputed_share(self, op: OpEstimate) -> float:
        """The share (0 to 1) of an op's forward that is recomputed, if the backward may need it."""


class SaveAll(RematPolicy):
    """Nothing is recomputed."""

    @property
    def saves_received(self) -> bool:
        return False

    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        return values.forward

    def saved_bytes(self, op: OpEstimate) -> float:
        return float(op.autograd_bytes)

    def recomputed_share(self, op: OpEstimate) -> float:
        return 0.0


@dataclass(frozen=True)
class SaveOnHost(SaveAll):
    """Nothing is recomputed; what is saved waits in the host's memory.

    Attributes:
        least: `least_offloaded`. 256 KiB take 5 µs over PCIe Gen5 x16, as long as to launch a copy.
    """

    least: int = 2**18

    @property
    def least_offloaded(self) -> int:
        return self.least

    def saved_bytes(self, op: OpEstimate) -> float:
        return 0.0


class SaveReceived(RematPolicy):
    """The whole forward is recomputed."""

    @property
    def min_cut_share(self) -> float:
        return 0.0

    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        return values.received

    def saved_bytes(self, op: OpEstimate) -> float:
        return 0.0

    def recomputed_share(self, op: OpEstimate) -> float:
        return 1.0


class SaveMinCut(RematPolicy):
    """Cheap ops are recomputed where that saves memory."""

    @property
    def min_cut_share(self) -> float:
        return 1.0

    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        return values.min_cut(1.0)

    def saved_bytes(self, op: OpEstimate) -> float:
        return float(op.min_cut_bytes)

    def recomputed_share(self, op: OpEstimate) -> float:
        return float(op.is_cheap)


@dataclass(frozen=True)
class SaveFraction(RematPolicy):
    """Cheap ops are recomputed, and of the others what frees most bytes per FLOP.

    Attributes:
        share: the fraction of min-cut's saved values that is saved, from 0 to 1.
    """

    share: float

    @property
    def min_cut_share(self) -> float:
        return self.share

    def select(self, values: JointValues[NodeT]) -> AbstractSet[NodeT]:
        return values.min_cut(self.share) if self.share else values.received

    def saved_bytes(self, op: OpEstimate) -> float:
        return self.share * op.min_cut_bytes

    def recomputed_share(self, op: OpEstimate) -> float:
        # The knapsack first drops values that need least work to recompute: for example, half of
        # the bytes for a quarter of the work.
        return 1.0 if op.is_cheap else (1.0 - self.share) ** 2


FULL = SaveReceived("full", 2.0)
NONE = SaveAll("none", 0.0)
OFFLOAD = SaveOnHost("offload", 0.5)
MIN_CUT = SaveMinCut("min-cut", 1.0)

POLICIES: tuple[RematPolicy, ...] = (FULL, NONE, MIN_CUT, OFFLOAD)
"""The policies that have a name."""

DEFAULT = FULL
"""The policy of stages if none is given."""


def fraction_policy(share: float) -> RematPolicy:
    """The policy that saves a fraction of what min-cut saves.

    Args:
        share: from 0 (as "full") to 1 (as "min-cut").
    """
    return SaveFraction(share, 2.0 - share, share)


def _parse_fraction(value: object) -> RematPolicy | None:
    """The policy for a number from 0 to 1, or for its text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        return None
    return fraction_policy(float(value))


class PolicyParser(NamedTuple):
    """A kind of policy that has a parameter.

    Attributes:
        accepts: what it accepts, in words.
        parse: the policy that a value denotes; None: the value denotes none.
        policy: the class of the policies.
    """

    accepts: str
    parse: Callable[[object], RematPolicy | None]
    policy: type[RematPolicy]


PARAMETERIZED: tuple[PolicyParser, ...] = (
    PolicyParser("a fraction from 0 to 1 of what min-cut saves", _parse_fraction, SaveFraction),
)
"""The policies that have a parameter."""


def _ladder() -> tuple[RematPolicy, ...]:
    """Named policies that do not offload, and one half, unless a named one has that share."""
    half = fraction_policy(0.5)
    named = any(policy.min_cut_share == half.min_cut_share for policy in POLICIES)
    staying = [policy for policy in POLICIES if policy.least_offloaded is None]
    return tuple(sorted((*staying, *[half] * (not named)), key=lambda policy: policy.rank))


LADDER = _ladder()
"""What ``remat="auto"`` tries, by rank: from least recomputation to least memory.

Named policies are included automatically, but for those that offload: `planning.offloading` tries
them beside it, since their time depends on the device's link. No two have the same rank.
"""


def parse_policy(value: object) -> RematPolicy | None:
    """The policy that a value denotes.

    Args:
        value: a name, a number, or a number as text.

    Returns:
        The policy; None if the value denotes none.
    """
    for policy in POLICIES:
        if value == policy.option:
            return policy
    found = (parser.parse(value) for parser in PARAMETERIZED)
    return next((policy for policy in found if policy is not None), None)


def policy_options() -> tuple[str, ...]:
    """What a user may write for a policy, in words, for messages and help texts."""
    return (*(policy.name for policy in POLICIES), *(parser.accepts for parser in PARAMETERIZED))
