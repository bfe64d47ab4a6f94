"""The releases of torch that autopipe is tested with; another one is an error.

autopipe replaces private functions of torch while it captures a model. In a release that nobody
has tried, a replacement may do nothing, and gradients may be wrong without an error. So an untested
release is refused, not warned about; `OVERRIDE` is for those who want to try one.
"""

from __future__ import annotations

import os
import re

from autopipe.errors import UnsupportedError

TESTED = ("2.11", "2.12", "2.13")
"""Releases without their last number. pyproject.toml has the same bounds."""

OVERRIDE = "AUTOPIPE_UNTESTED_TORCH"
"""The environment variable that lets any release through if it is set to 1."""


def check_torch(version: str | None = None) -> None:
    """Refuse a torch that autopipe is not tested with.

    Args:
        version: as in ``torch.__version__``; None: that of the installed torch.

    Raises:
        UnsupportedError: the release is not in `TESTED`; the message names those that are.
    """
    if version is None:
        import torch

        version = torch.__version__
    release = re.match(r"\d+\.\d+", version)
    if (release and release[0] in TESTED) or os.environ.get(OVERRIDE) == "1":
        return
    raise UnsupportedError(
        "autopipe is not tested with this torch; what it replaces in torch may have changed, and"
        " gradients may be wrong without an error",
        expected=f"torch {', '.join(TESTED[:-1])} or {TESTED[-1]}",
        found=f"torch {version}",
        remedy=f'pip install "torch>={TESTED[0]},<{_next(TESTED[-1])}"; to try this torch anyway,'
        f" set {OVERRIDE}=1 and compare with pipe.verify()",
    )


def _next(release: str) -> str:
    """``2.13`` → ``2.14``."""
    major, minor = release.split(".")
    return f"{major}.{int(minor) + 1}"
