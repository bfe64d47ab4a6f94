"""Commands on what is broken: callables, files, paths, numbers, streams, locales.

Covers commands/_output.py, target.py and cli.py: exit code 2 and one message, never a traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopipe import Plan
from autopipe.cli import INTERRUPTED, main
from tests.support.command_line import ROOT, assert_refused, planning, simulated
from tests.support.plans import made_plan

TARGETS = """
import json, os, sys

from models import with_args

def raises(): raise ValueError("\\x1b[31mred\\nand more")
def asserts(): assert False
def exits(): sys.exit(7)
def exits_well(): sys.exit()
def says_why(): sys.exit("no GPU today")
def in_a_library(): return json.loads("{")
def needs_more(size): return with_args()
def interrupts(): raise KeyboardInterrupt
def recurses(): return recurses()
def closes():
    sys.stdout.close()
    return with_args()
def prints():
    print("\\u00d7 \\x1b[1mloud")
    return with_args()

class HostileError(Exception):
    def __str__(self): raise RuntimeError("never")
    __repr__ = __str__
def hostile(): raise HostileError

class Meta(type):
    @property
    def __name__(cls): raise HostileError
class NamelessError(Exception, metaclass=Meta): pass
def nameless(): raise NamelessError("x")

class Model:
    @property
    def __class__(self): raise HostileError
def strange(): return Model(), ()

class Lazy:
    @property
    def make(self): raise OSError(5, "the disk is gone", "/data")
lazy = Lazy()

def __getattr__(name):
    raise ZeroDivisionError(name)
"""

BROKEN = {
    "raises": (r"targets.py:raises fails", "targets.py:6", r"ValueError: \x1b[31mred"),
    "asserts": ("targets.py:asserts fails", "targets.py:7", "AssertionError"),
    "exits": ("targets.py:exits leaves the program", "targets.py:8", "SystemExit: 7"),
    "exits_well": ("targets.py:exits_well leaves the program", "targets.py:9", "SystemExit"),
    "says_why": ("targets.py:says_why leaves", "targets.py:10", "SystemExit: no GPU today"),
    "in_a_library": ("targets.py:in_a_library fails", "targets.py:11", "JSONDecodeError"),
    "needs_more": ("targets.py:needs_more fails", "TypeError: needs_more() missing 1"),
    "recurses": ("targets.py:recurses fails", "targets.py:14", "RecursionError"),
    "hostile": ("targets.py:hostile fails", "HostileError: (no text: its __str__ raised Runtime"),
    "nameless": ("targets.py:nameless fails", "NamelessError: x"),
    "strange": ("targets.py:strange fails", "HostileError: (no text"),
    "lazy.make": ("targets.py:lazy.make fails", "the disk is gone"),
    "nothing": ("targets.py:nothing fails", "ZeroDivisionError: nothing"),
    "closes": ("the output cannot be written", "stdout: ValueError: I/O operation on closed"),
}


@pytest.fixture
def targets(models: Path) -> Path:
    (models / "targets.py").write_text(TARGETS)
    return models


@pytest.mark.parametrize("name", BROKEN)
def test_callables_that_fail(
    targets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "closes":
        monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115
    assert main(planning(f"targets.py:{name}")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autopipe: ")
    for words in BROKEN[name]:
        assert words in captured.err
    assert_plain(captured.err)


def assert_plain(text: str) -> None:
    """No traceback, no controls, no more than a message has."""
    assert "Traceback" not in text
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    assert len(text) < 3000
    assert text.count("\n") <= 5


def test_the_cause_is_what_was_raised(targets: Path) -> None:
    from autopipe.errors import OptionError
    from autopipe.target import load

    with pytest.raises(OptionError) as caught:
        load("targets.py:raises")
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.source == f"{targets / 'targets.py'}:6"


def test_an_interrupted_command_is_quiet(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(planning("targets.py:interrupts")) == INTERRUPTED == 130
    assert capsys.readouterr() == ("", "")


FILES: dict[str, tuple[str | bytes, str]] = {
    "syntax": ("def make(:\n", "syntax.py:1"),
    "indent": ("def make():\nreturn 1\n", "indent.py:2"),
    "nul": ("x = 1\n\0", "null bytes"),
    "latin": (b"x = '\xe9'\n", "SyntaxError"),
    "imports": ("import no_such_package\n", "No module named 'no_such_package'"),
    "wrong_name": ("from json import nothing\n", "cannot import name 'nothing'"),
    "value": ("raise ValueError('at import')\n", "ValueError: at import"),
    "leaving": ("import sys\nsys.exit(3)\n", "leaving.py:2"),
    "empty": ("", "empty.py has no 'make'"),
    "deep": ("x = " + "(" * 1000 + ")" * 1000, "deep.py"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["file", "module", "package"])
def test_files_that_cannot_be_imported(
    models: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    content, words = FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    where = f"broken_{how}_{name}"
    if how == "package":
        (models / where).mkdir()
        (models / where / "__init__.py").write_bytes(content)
        target = f"{where}.models:make"
        words = words.replace(f"{name}.py has no 'make'", f"no module '{where}.models'")
        words = words.replace(f"{name}.py", "__init__.py")
    else:
        (models / f"{where}.py").write_bytes(content)
        target = f"{where}.py:make" if how == "file" else f"{where}:make"
        words = words if how == "file" else words.replace(".py has", " has")
    assert main(planning(target)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert_plain(captured.err)


PATHS = [
    *(
        "..:make",
        ".models:make",
        "models..x:make",
        "mo\0dels:make",
        "models\x1b[1m:make",
        ":",
        "a:",
    ),
    *("folder.py:make", "none.py:make", f"{'x' * 5000}.py:make", "a\0b.py:make", "/proc/x.py:make"),
    *("models.py/x.py:make", "\ud800.py:make", "models.py:", "models.py:.", "models.py:a..b"),
    *("__main__:nothing", "sys:nothing", "models.py:__doc__", "models:with_args.x"),
]


@pytest.mark.parametrize("target", PATHS, ids=lambda t: ascii(t)[:20])
def test_targets_that_are_not_there(
    models: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    (models / "folder.py").mkdir()
    assert main(planning(target)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_plain(captured.err[:1000])


# ------------------------------------------------------------------------------- files and paths

HUGE, DIGITS = str(10**30), "9" * 5000

WRONG = {
    "chunks": planning("models.py:with_args", "--chunks", HUGE),
    "chunks of many digits": planning("models.py:with_args", "--chunks", DIGITS),
    "no chunks": planning("models.py:with_args", "--chunks", "0"),
    "fewer chunks": planning("models.py:with_args", "--chunks=-3"),
    "chunks, not a number": planning("models.py:with_args", "--chunks", "nan"),
    "chunks of ten": planning("models.py:with_args", "--chunks", "\x1b[31m"),
    "devices": planning("models.py:with_args", "--devices", HUGE),
    "devices of many digits": planning("models.py:with_args", "--devices", DIGITS),
    "fewer devices": planning("models.py:with_args", "--devices=-2"),
    "no device": planning("models.py:with_args", "--devices", ""),
    "commas": planning("models.py:with_args", "--devices", ",,"),
    "a red device": planning("models.py:with_args", "--devices", "\x1b[31mcpu"),
    "a device of the table": planning("models.py:with_args", "--device", "\x1b[31m"),
    "memory": planning("models.py:with_args", "--memory", "9" * 320 + "TiB"),
    "memory, not a number": planning("models.py:with_args", "--memory", "nan"),
    "negative memory": planning("models.py:with_args", "--memory=-1GiB"),
    "infinite memory": planning("models.py:with_args", "--memory", "inf"),
    "remat": planning("models.py:with_args", "--remat", "nan"),
    "negative remat": planning("models.py:with_args", "--remat=-0.5"),
    "schedule": planning("models.py:with_args", "--schedule", "\x1b[31m"),
    "an option": planning("models.py:with_args", "--\x1b[31m"),
    "output folder": planning("models.py:with_args", "-o", "."),
    "output nowhere": planning("models.py:with_args", "-o", "none/plan.json"),
    "output in a file": planning("models.py:with_args", "-o", "models.py/plan.json"),
    "output with a long name": planning("models.py:with_args", "-o", "x" * 5000),
    "output over the model": planning("models.py:with_args", "-o", "./models.py"),
    "plan": ["report", "none.json"],
    "a folder": ["report", "."],
    "nothing": ["trace", ""],
    "a model": ["report", "models.py"],
    "a long name": ["report", "x" * 5000],
    "NUL": ["report", "a\0b"],
    "NUL to": ["report", "plan.json", "-o", "a\0b"],
    "a red name": ["report", "\x1b[31m.json"],
    "no text": ["report", "\udcff.json"],
    "a part of a file": ["report", "plan.json/x"],
    "zeros": ["report", "/dev/zero"],
    "what cannot be read": ["report", "/proc/self/mem"],
    "trace to a folder": ["trace", "plan.json", "-o", "."],
    "trace to a long name": ["trace", "plan.json", "-o", "x" * 300],
    "trace to no text": ["trace", "plan.json", "-o", "none/\udcff"],
    "trace over the plan": ["trace", "plan.json", "-o", "../{folder}/plan.json"],
    "a command": ["\x1b[31m"],
    "no command": [],
    "stages": simulated(f"gpipe --stages {HUGE} --chunks 2"),
    "micro-batches": simulated(f"gpipe --stages 2 --chunks {HUGE}"),
    "many": simulated("1f1b --stages 1000 --chunks 1000"),
    "groups": simulated("interleaved --stages 100000 --chunks 1"),
    "virtual": simulated("interleaved --stages 2 --chunks 2 --virtual-stages 1000000"),
    "a V": simulated("zb-v --stages 2000 --chunks 1"),
    "no stage of many": simulated(f"gpipe --stages 0 --chunks {HUGE}"),
    "less than no stage": simulated(f"gpipe --stages=-{HUGE} --chunks=-{HUGE}"),
    "nan": simulated("gpipe --stages 2 --chunks 2 --transfer nan"),
    "nan forward": simulated("gpipe --stages 2 --chunks 2 --forward nan"),
    "inf": simulated("gpipe --stages 2 --chunks 2 --recompute inf"),
    "1e400": simulated("gpipe --stages 2 --chunks 2 --backward 1e400"),
    "1e308": simulated("gpipe --stages 2 --chunks 2 --forward 1e308"),
    "1e308 between": simulated("gpipe --stages 2 --chunks 2 --transfer 1e308"),
    "negative": simulated("gpipe --stages 2 --chunks 2 --weight=-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(models: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    made_plan().save("plan.json")
    arguments = [a.replace("{folder}", models.name) for a in WRONG[case]]
    before = {p.name: p.read_bytes() for p in models.iterdir() if p.is_file()}
    try:
        code = main(arguments)
    except SystemExit as left:  # by argparse
        code = int(str(left.code))
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("autopipe")
    assert "Traceback" not in captured.err
    assert {c for c in captured.err if not c.isprintable()} <= {"\n"}
    assert captured.err.count("\n") <= 5
    assert {p.name: p.read_bytes() for p in models.iterdir() if p.is_file()} == before


def test_argparses_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "gpipe", "--stages", "2", "--chunks", "two\n\x1b[31m"])
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "invalid int value" in text
    assert text.endswith("(see autopipe simulate --help)\n")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody writes to")
def test_a_plan_that_cannot_be_saved_is_printed(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Making it took long; what it says is not lost."""
    assert main(planning("models.py:with_args", "-o", "/proc/plan.json")) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("2 stages")
    assert "the output cannot be written" in captured.err


def test_permissions_are_asked_for_before_the_work(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # (root may write anywhere)
    for path in ("new.json", "models.py"):
        assert_refused(capsys, planning("models.py:raises", "-o", path), path)


# --------------------------------------------------------------------------- streams and locales

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}


def started(arguments: list[Any], folder: Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipe = subprocess.PIPE
    return subprocess.run(
        [sys.executable, "-m", "autopipe", *arguments],
        cwd=folder, env=environment, timeout=120, **({"stdout": pipe, "stderr": pipe} | options),
    )  # fmt: skip


TRACE, SIMULATE = ["trace", "plan.json"], simulated("gpipe --stages 2 --chunks 2")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that cannot be written")
@pytest.mark.parametrize("arguments", [TRACE, SIMULATE, ["--help"]], ids=["trace", "text", "help"])
def test_a_full_disk_behind_stdout(tmp_path: Path, arguments: list[str]) -> None:
    made_plan().save(tmp_path / "plan.json")
    with open("/dev/full", "w") as full:
        done = started(arguments, tmp_path, stdout=full)
        assert done.returncode == 2
        assert done.stderr.startswith(b"autopipe: the output cannot be written\n")
        assert b"Traceback" not in done.stderr
        done = started(arguments, tmp_path, stdout=full, stderr=full)
        assert done.returncode == 2


@pytest.mark.parametrize("arguments", [TRACE, SIMULATE, ["--help"]], ids=["trace", "text", "help"])
def test_a_reader_who_left(tmp_path: Path, arguments: list[str]) -> None:
    made_plan().save(tmp_path / "plan.json")
    here, there = os.pipe()
    os.close(here)
    with open(there, "w") as broken:
        done = started(arguments, tmp_path, stdout=broken)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed(tmp_path: Path, closed: str) -> None:
    """The exit code is the same, and a message for stderr does not end up in stdout."""
    made_plan().save(tmp_path / "plan.json")
    for arguments, code in (("trace plan.json", 0), ("trace none.json", 2), ("trace", 2)):
        command = f"{sys.executable} -m autopipe {arguments} {closed}"
        done = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=120,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == code
        assert b"Traceback" not in done.stderr
        assert code == 0 or done.stdout == b""


def test_an_ascii_locale(tmp_path: Path) -> None:
    """What the encoding lacks is escaped, in results, in names of files and in messages."""
    plan = made_plan(2, (2, 2), model="Größe", notes=("größer \x1b[31m",))
    name = "pl\u00e4n \u202e.json"
    plan.save(tmp_path / name)
    done = started(["report", name.encode()], tmp_path, env=ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"pl\udcc3\udca4n")
    assert "Größe" in (tmp_path / name.replace(".json", ".html")).read_text(encoding="utf-8")
    done = started(["report", b"n\xc3\xb6ne.json"], tmp_path, env=ASCII)
    assert done.returncode == 2
    assert b"No such file" in done.stderr
    for arguments in (["--help"], ["plan", "--help"], ["simulate", "--help"]):
        assert started(arguments, tmp_path, env=ASCII).returncode == 0


@pytest.mark.parametrize("locale", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_names_of_files_that_are_no_text(tmp_path: Path, locale: dict[str, str]) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"p\xff\x1b[31m.json")
    try:
        Path(os.fsdecode(name)).write_text("")
    except OSError:
        pytest.skip("the file system takes text only")
    made_plan().save(os.fsdecode(name))
    done = started(["trace", name, "-o", name + b".out"], tmp_path, env=locale)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"p\udcff\x1b[31m.json.out: " in done.stdout
    assert json.loads(Path(os.fsdecode(name + b".out")).read_text())["traceEvents"]
    done = started(["trace", name + b".out"], tmp_path, env=locale)
    assert done.returncode == 2
    assert rb"source: " in done.stderr
    assert b"\x1b" not in done.stderr


@pytest.mark.full
def test_planning_in_an_ascii_locale(targets: Path) -> None:
    done = started(planning("targets.py:prints", "-o", "plan.json"), targets, env=ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\xd7" in done.stdout
    assert Plan.load(targets / "plan.json").sizes == (2, 2, 2, 2)


def test_a_folder_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone, here = tmp_path / "gone", os.getcwd()
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        for arguments in (planning("models:x"), planning("m.py:x", "-o", "p"), ["report", "p"]):
            assert main(arguments) == 2
            assert_plain(capsys.readouterr().err)
    finally:
        os.chdir(here)


def test_streams_are_left_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout.errors, sys.stderr.errors
    assert main(SIMULATE) == 0
    assert (sys.stdout.errors, sys.stderr.errors) == before
