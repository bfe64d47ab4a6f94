"""`Measured`: measured steps of a pipeline, which can be printed and planned with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopipe.errors import OptionError, shown
from autopipe.formatting import format_seconds
from autopipe.planning.measured_data import MeasuredData
from autopipe.report.measured_text import measured_text

if TYPE_CHECKING:
    from autopipe.planning.measured_data import MeasuredSteps


class Measured(MeasuredData):
    """When each action of some steps ran, on every device; from `Pipeline.profile`.

    It is complete when the ``with`` block ends. `print` it for a table of measured times beside
    predicted ones. ``autopipe.plan(..., profile=measured)`` plans with them. It holds plain data,
    and can be pickled.
    """

    def complete(self, found: MeasuredSteps | None, others: int, unfinished: int) -> None:
        """Fill in what was measured.

        Args:
            found: the steps of the program that ran most often; None: no step was measured.
            others, unfinished: see `MeasuredData`.
        """
        self._found, self.others, self.unfinished = found, others, unfinished

    def __str__(self) -> str:
        return measured_text(self)

    def __repr__(self) -> str:
        if not self.steps:
            return f"{type(self).__name__}(no steps)"
        length, count = format_seconds(self.step_seconds), len(self.steps)
        steps = f"{count} step{'s' * (count > 1)}"
        return f"{type(self).__name__}({steps}, median {length}, bubble {self.bubble:.1%})"


def check_profile(profile: Any) -> None:
    """Check the option `profile`.

    Raises:
        OptionError: it is neither a bool nor a `Measured` with steps.
    """
    if isinstance(profile, Measured):
        _ = profile.found
    elif not isinstance(profile, bool):
        expected = "True, False, or what `with pipe.profile() as measured:` gave"
        raise OptionError("`profile`", expected=expected, found=shown(profile))
