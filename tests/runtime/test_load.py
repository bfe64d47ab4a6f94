"""Generated source code as functions: tracebacks and `linecache` show the text that runs."""

from __future__ import annotations

import gc
import linecache

import pytest

from autopipe.runtime.load import load_source


def test_linecache_keeps_the_program_when_files_are_checked() -> None:
    names, filename = load_source("def answer():\n    return 42\n")
    linecache.checkcache()
    assert linecache.getline(filename, 2) == "    return 42\n"
    assert names["answer"]() == 42
    assert names["answer"].__code__.co_filename == filename


def test_lines_end_where_python_ends_them() -> None:
    """A form feed, or U+2028, ends a line for `str.splitlines`, but not for Python."""
    text = "# a \x0c b \x1c c \x85 d \u2028 e\ndef answer():\n    return 42 / 0\n"
    names, filename = load_source(text)
    assert linecache.getline(filename, 3) == "    return 42 / 0\n"
    with pytest.raises(ZeroDivisionError) as caught:
        names["answer"]()
    assert caught.traceback[-1].lineno == 2  # counted from 0
    assert "".join(linecache.getlines(filename)) == text


def test_loading_the_same_text_twice_keeps_one_file() -> None:
    _, first = load_source("x = 1\n")
    _, again = load_source("x = 1\n")
    _, other = load_source("x = 2\n")
    assert first == again != other


def test_the_text_lives_as_long_as_the_last_program_that_has_it() -> None:
    text = "def answer():\n    return 43\n"
    names, filename = load_source(text)
    others, _ = load_source(text)
    function = others["answer"]
    del names
    gc.collect()
    assert linecache.getlines(filename)
    del others
    gc.collect()
    assert function() == 43
    assert linecache.getlines(filename)
    del function
    gc.collect()
    assert not linecache.getlines(filename)
