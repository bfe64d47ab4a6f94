"""The logger "autopipe", and the environment variable that shows its lines.

``AUTOPIPE_LOGS=info`` shows on stderr why and how long models are captured, cut and traced;
``AUTOPIPE_LOGS=debug`` shows more. Without it, the standard `logging` module decides.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "AUTOPIPE_LOGS"
LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}


def configure(environ: Mapping[str, str]) -> None:
    """Add a handler for stderr to the logger if the environment asks for it.

    Args:
        environ: the environment. An unknown level is a warning that names the known ones.
    """
    asked = environ.get(VARIABLE, "").strip().lower()
    if not asked:
        return
    if asked not in LEVELS:
        warnings.warn(f"{VARIABLE}={asked!r}: expected {' or '.join(LEVELS)}", stacklevel=2)
        return
    logger = logging.getLogger("autopipe")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(LEVELS[asked])
