"""Keep measured times on disk: one JSON file per torch version, device and number of threads.

A file with other content is not changed, and a warning is issued. So is one where there is no home
directory, or no file can be written: then the times are not kept.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autopipe.errors import describe, printable
from autopipe.passes.graph import warn_at_user_line

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
"""Version of the files: increased when the meaning of a key or a time changes."""

LARGEST_FILE = 64 * 2**20
"""Bytes of a file that is read. (A call takes about 200.)"""


_NOT_OURS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What reading other content raises."""


@dataclass(frozen=True)
class Timing:
    """Median times of one op, in seconds; 0 for a backward that does not happen."""

    forward_seconds: float
    backward_seconds: float


def cache_file(device: str, folder: str | Path | None = None) -> Path:
    """The cache file of a device for this version of torch.

    Raises:
        RuntimeError: there is no home directory.
    """
    base = Path.home() / ".cache" / "autopipe" if folder is None else Path(folder)
    slug = re.sub(r"[^0-9A-Za-z.]+", "-", f"{torch.__version__} {device}")
    return base / f"profile-{slug}.json"


def kept_times(device: str, folder: str | Path | None = None) -> dict[str, Timing] | None:
    """Read what was measured on a device before.

    Args:
        device: `device_name` of it.
        folder: of the files; None: ``~/.cache/autopipe``.

    Returns:
        As `load`; also None, with a warning, where there is no home directory.
    """
    try:
        path = cache_file(device, folder)
    except RuntimeError as error:
        _warn("measurements are not kept: there is no home directory", error)
        return None
    return load(path, device)


def keep_times(device: str, folder: str | Path | None, timings: Mapping[str, Timing]) -> None:
    """Write all times of a device for later; a warning if they cannot be written.

    Args:
        device: `device_name` of it.
        folder: of the files; None: ``~/.cache/autopipe``.
        timings: by `work_key`.
    """
    path = cache_file(device, folder)
    try:
        save(path, device, timings)
    except OSError as error:
        _warn(f"measurements cannot be kept in {path}", error)


def load(path: Path, device: str) -> dict[str, Timing] | None:
    """Read a cache file.

    Args:
        path: of the file.
        device: `device_name`.

    Returns:
        Its times by `work_key`; empty if there is no file; None, with a warning, if it has other
        content or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        return _read(json.loads(content), device)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn(f"measurements in {path} cannot be read, and none are kept", error)
        return None
    except _NOT_OURS as error:
        _warn(
            f"{path} does not hold measurements of this device and this torch; it is ignored and"
            " left as it is: delete it to keep new ones",
            error,
        )
        return None


def _warn(text: str, error: Exception) -> None:
    warn_at_user_line(f"{printable(text)} ({describe(error)})")


def _read(content: Any, device: str) -> dict[str, Timing]:
    head = {n: content[n] for n in ("format", "torch", "device")}
    if head != _head(device):
        raise ValueError(f"it says {head!r:.200}")
    found = {}
    for key, pair in content["calls"].items():
        forward, backward = pair
        for time in pair:
            if type(time) not in (int, float) or not 0 <= float(time) < math.inf:
                raise ValueError(f"times {pair!r:.200}")
        found[str(key)] = Timing(float(forward), float(backward))
    return found


def save(path: Path, device: str, timings: Mapping[str, Timing]) -> None:
    """Write all times of a device to its cache file, atomically: others may write it, too.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    calls = {k: [t.forward_seconds, t.backward_seconds] for k, t in timings.items()}
    text = json.dumps({**_head(device), "calls": calls}, indent=0)
    part = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        part.write_text(text, encoding="ascii")
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _head(device: str) -> dict[str, Any]:
    return {"format": FORMAT, "torch": str(torch.__version__), "device": device}
