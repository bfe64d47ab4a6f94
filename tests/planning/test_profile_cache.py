"""Times on disk: believed only if they are ours; one warning, and on, where none can be kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from autopipe.passes.cost.node_costs import annotate
from autopipe.passes.ir.captured import Annotated
from autopipe.planning import profile_cache
from autopipe.planning.profile_cache import Timing, cache_file, keep_times, kept_times, load, save
from autopipe.planning.profile_calls import device_name, profile
from tests.support.command_line import ROOT
from tests.support.programs import captured_of

CPU = torch.device("cpu")


def stack(depth: int) -> Annotated:
    layers = [m for _ in range(depth) for m in (nn.Linear(8, 8), nn.Tanh())]
    return annotate(captured_of(nn.Sequential(*layers), torch.randn(4, 8)))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 0, "torch": "%(torch)s", "device": "%(device)s", "calls": {}}',
        '{"format": 1, "torch": "1.0", "device": "%(device)s", "calls": {}}',
        '{"format": 1, "torch": "%(torch)s", "device": "abacus", "calls": {}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": []}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [1]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [1, -1]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [NaN, 1]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": "ab"}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": "12"}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": ["1", "2"]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [true, 1]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [1, 2, 3]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [1, %(n)s]}}',
        '{"format": 1, "torch": "%(torch)s", "device": "%(device)s", "calls": {"x": [1, 1e999]}}',
        '{"format": "\x1b[31m", "torch": [], "device": {}}',
        '{"format": 1, "torch": "\\u001b[31m\\u202e", "device": "", "calls": {}}',
        "[" * 100_000,
        "1" * 10_000,
        "",
        "\0" * 100,
        "\ufeff{}",
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(text: str, tmp_path: Path) -> None:
    path = cache_file(device_name(CPU), tmp_path)
    text = (
        text.replace("%(n)s", "1" * 400)
        .replace("%(torch)s", torch.__version__)
        .replace("%(device)s", device_name(CPU))
    )
    path.write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="is ignored and left as it is") as caught:
        found = profile(stack(1), 4, folder=tmp_path)
    assert len(caught) == 1
    assert str(caught[0].message).isprintable()
    assert found.measured == 2
    assert path.read_text(encoding="utf-8") == text


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = cache_file(device_name(CPU), tmp_path)
    path.write_bytes(b"\x80\x04\x95pickled?")
    with pytest.warns(UserWarning, match="is ignored"):
        assert load(path, device_name(CPU)) is None


def test_files_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    assert load(path, "here") == {}
    save(path, "here", {"a call": Timing(1.5, 0.25)})
    assert load(path, "here") == {"a call": Timing(1.5, 0.25)}
    assert json.loads(path.read_text())["calls"] == {"a call": [1.5, 0.25]}
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def in_a_file(folder: Path) -> Path:
    """A folder that cannot be: there is a file in its place. (Root may write in all others.)"""
    (folder / "file").write_text("not a folder")
    return folder / "file"


PLACES = {
    "a file": in_a_file,
    "within a file": lambda folder: in_a_file(folder) / "deeper",
    "no such place": lambda folder: Path("/proc/autopipe"),
    "a long name": lambda folder: folder / ("x" * 300),
    "a folder in the file's place": lambda folder: made_folder(folder),
}


def made_folder(folder: Path) -> Path:
    cache_file(device_name(CPU), folder).mkdir()
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_where_nothing_can_be_kept_times_are_measured(tmp_path: Path, place: str) -> None:
    folder = PLACES[place](tmp_path)
    with pytest.warns(UserWarning, match="measurements .* kept") as caught:
        found = profile(stack(1), 4, folder=folder)
    assert found.measured == 2
    assert len(caught) == 1
    assert str(caught[0].message).isprintable()
    assert list(tmp_path.rglob("*.part")) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left") as caught:
        found = profile(stack(1), 4, folder=tmp_path)
    assert (found.measured, len(caught)) == (2, 1)
    assert [*tmp_path.iterdir()] == [], "what was begun is removed"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """``HOME`` is unset and the user is in no table: `Path.home` raises a RuntimeError."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(UserWarning, match="there is no home directory") as caught:
        found = profile(stack(1), 4)
    assert (found.measured, len(caught)) == (2, 1)


def test_a_file_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "LARGEST_FILE", 100)
    save(cache_file("here", tmp_path), "here", {"a call" * 20: Timing(1.0, 1.0)})
    with pytest.warns(UserWarning, match="more than 100 bytes"):
        assert kept_times("here", tmp_path) is None


def write_often(name: str, folder: Path, rounds: int) -> None:
    for i in range(rounds):
        new = {f"{name} {i} {j}": Timing(1.0, 0.5) for j in range(20)}
        keep_times("here", folder, {**(kept_times("here", folder) or {}), **new})


def assert_one_whole_file(folder: Path, rounds: int) -> None:
    assert [*folder.iterdir()] == [cache_file("here", folder)]
    found = kept_times("here", folder)
    assert found is not None
    assert len(found) >= rounds * 20, "the times of a writer who was last"
    assert set(found.values()) == {Timing(1.0, 0.5)}


@pytest.mark.filterwarnings("error")
def test_four_writers_at_once(tmp_path: Path) -> None:
    """Readers see one whole file or another; no part of any is left."""
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write_often, name, tmp_path, 25) for name in "abcd"]:
            done.result(60)
    assert_one_whole_file(tmp_path, 25)


@pytest.mark.full
def test_four_programs_at_once(tmp_path: Path) -> None:
    code = "from tests.planning.test_profile_cache import write_often, Path, sys\n"
    code += "write_often(sys.argv[1], Path(sys.argv[2]), 10)"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([*command, name, tmp_path], env=environment, stderr=subprocess.PIPE)
        for name in "abcd"
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert (writer.returncode, said) == (0, b"")
    assert_one_whole_file(tmp_path, 10)


def test_an_ascii_locale(tmp_path: Path) -> None:
    key = "größe × 3"
    keep_times("here", tmp_path, {key: Timing(1.0, 0.5)})
    cache_file("here", tmp_path).read_text(encoding="ascii")
    assert kept_times("here", tmp_path) == {key: Timing(1.0, 0.5)}
