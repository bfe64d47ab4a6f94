"""The house rules: who may import whom, how large and how documented files are.

Everything here is read off the sources as text; nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES = 300, 60  # a function's docstring is not counted

FLOORS = (
    {"devices", "one_at_a_time", "partition", "remat_policies", "schedule"},
    {
        "_torch",
        "_torch_foreach",
        "_torch_inductor",
        "_torch_modes",
        "_torch_patches",
        "_torch_sizes",
        "ops",
    },
    {"ir", "kernels"},
    {"graph"},
    {"batch", "codegen", "cost", "loss_seeds", "phases", "python_state"},
    {"capture", "inductor", "split"},
    {"driver"},
)
"""The packages and root files of `passes/`, lowest floor first. Imports only go down."""

LAYERS = (
    {"errors", "interrupts", "logs", "version"},
    {"passes", "runtime", "progress", "typed_json", "target", "formatting"}
    | {"option_names", "torch_version"},
    {"report", "planning", "profile", "options", "option_parsing", "batch_dims", "cut_positions"}
    | {"beside_plan", "schedule_option"}
    | {
        "loss_factor",
        "out_of_memory",
        "parameters",
        "placement",
        "results",
        "tensor_meta",
        "version_watch",
    },
    {"call_guards", "call_numbers", "call_signature", "caller_modes", "model_state_key"}
    | {"module_proxy", "valid_calls", "varying"}
    | {
        "compiled",
        "compiled_models",
        "compiled_parts",
        "graphed_stages",
        "compiled_program",
        "lengths",
        "traced_programs",
    }
    | {"traced_stages"}
    | {"capture_log", "capture_reasons"},
    {"pipeline_call", "step_call", "higher_derivatives", "program_cache", "verification"}
    | {"inspection", "profiling"},
    {"module"},
    {"api"},
    {"commands"},
    {"cli"},
)
"""The packages and files of `autopipe/`, lowest layer first.

Imports go down, or stay within a layer (there the rule against circles holds).
"""

OUTSIDE = (["autopipe", "errors"], ["autopipe", "interrupts"])
"""What `passes/` uses of autopipe."""

TORCH_FREE = (
    *("autopipe.errors", "autopipe.typed_json", "autopipe.formatting", "autopipe.cli"),
    *("autopipe.option_names", "autopipe.torch_version"),
    *("autopipe.passes.devices", "autopipe.passes.partition", "autopipe.passes.remat_policies"),
    *("autopipe.passes.schedule", "autopipe.planning.plans", "autopipe.planning.plan_parts"),
)
"""Usable, with all that they import, where there is no torch (or before it is loaded)."""


# --------------------------------------------------------------------------- reading the sources


@cache
def sources() -> tuple[Path, ...]:
    """Every file of the package, once: the link autopipe/passes is left out."""
    found = [*(ROOT / "passes").rglob("*.py")]
    found += [p for p in (ROOT / "autopipe").rglob("*.py") if "passes" not in p.parts]
    return tuple(sorted(found))


def module(path: Path) -> str:
    """``passes/ir/split.py`` → ``autopipe.passes.ir.split``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "autopipe" else ("autopipe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module(path): path for path in sources()}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def type_checking(source: ast.Module) -> set[ast.stmt]:
    """The statements that only a type checker sees."""
    guarded = [n for n in ast.walk(source) if isinstance(n, ast.If)]
    tests = [n for n in guarded if isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"]
    return {s for n in tests for b in n.body for s in ast.walk(b) if isinstance(s, ast.stmt)}


def within_functions(source: ast.Module) -> set[ast.stmt]:
    """The statements that run when a function is called."""
    inside = [n for n in ast.walk(source) if isinstance(n, ast.FunctionDef)]
    return {s for n in inside for b in n.body for s in ast.walk(b) if isinstance(s, ast.stmt)}


@cache
def imports(path: Path) -> tuple[tuple[str, str | None, int, bool], ...]:
    """(module, name or None, line, at once) for everything that a file imports.

    "At once": when the file is imported, not when a function is called, nor for types only.
    """
    package = module(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    source, found = tree(path), []
    later = type_checking(source) | within_functions(source)
    for n in ast.walk(source):
        if isinstance(n, ast.Import):
            found += [(alias.name, None, n.lineno, n not in later) for alias in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = package[: len(package) - n.level + 1] if n.level else []
            whole = ".".join([*base, *([n.module] if n.module else [])])
            found += [(whole, alias.name, n.lineno, n not in later) for alias in n.names]
    return tuple(found)


def needed(path: Path, *, at_once: bool) -> set[str]:
    """The modules of autopipe that a file imports; a name of a package counts as its file."""
    found = set()
    for name, what, _, runs in imports(path):
        target = f"{name}.{what}" if what and f"{name}.{what}" in modules() else name
        if target in modules() and (runs or not at_once):
            found.add(target)
    return found - {module(path)}


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def dotted(n: ast.expr) -> str:
    """``torch._ops.OpOverload`` of an attribute's expression; "" for anything else."""
    parts: list[str] = []
    while isinstance(n, ast.Attribute):
        parts.append(n.attr)
        n = n.value
    return ".".join([n.id, *reversed(parts)]) if isinstance(n, ast.Name) else ""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """(qualified name, function, public) of a file's functions and methods."""
    for n in tree(path).body:
        if isinstance(n, ast.FunctionDef):
            yield n.name, n, not n.name.startswith("_")
        elif isinstance(n, ast.ClassDef):
            for m in n.body:
                if isinstance(m, ast.FunctionDef):
                    public = not n.name.startswith("_") and not m.name.startswith("_")
                    yield f"{n.name}.{m.name}", m, public


def level(name: str, levels: tuple[set[str], ...]) -> int:
    return next(i for i, names in enumerate(levels) if name in names)


# ------------------------------------------------------------------------------- who imports whom


def test_the_sources_are_found() -> None:
    assert {"autopipe", "autopipe.api", "autopipe.passes.ir.split"} <= set(modules())
    assert len(modules()) == len(sources())
    assert "autopipe.passes.ir" in needed(ROOT / "passes" / "codegen" / "program.py", at_once=False)


def test_passes_import_downwards() -> None:
    """Between the packages of `passes/`; and of autopipe outside only its lowest layer."""
    wrong = []
    for path in (ROOT / "passes").rglob("*.py"):
        own = module(path).split(".")[2:3]
        for name, what, line, _ in imports(path):
            parts = (f"{name}.{what}" if what else name).split(".")
            if parts[0] != "autopipe" or parts[:2] in OUTSIDE or not own:
                continue
            inside = parts[1] == "passes" and len(parts) > 2
            if not inside or (
                parts[2] != own[0] and level(parts[2], FLOORS) >= level(own[0], FLOORS)
            ):
                wrong.append(f"{where(path, line)} imports {name}")
    assert wrong == []


def test_packages_of_passes_are_entered_by_the_door() -> None:
    """Another package's names are imported from the package, not from a file in it."""
    wrong = [
        f"{where(path, line)} imports {name}"
        for path in sources()
        for name, _, line, _ in imports(path)
        if name.startswith("autopipe.passes.")
        and len(name.split(".")) > 3
        and name.split(".")[:3] != module(path).split(".")[:3]
    ]
    assert wrong == []


def test_autopipe_imports_downwards() -> None:
    wrong = []
    for path in sources():
        parts = module(path).split(".")
        if len(parts) < 2 or parts[1] in ("passes", "__main__"):
            continue
        for target in needed(path, at_once=False):
            room = target.split(".")[1] if "." in target else None
            if room is None or level(room, LAYERS) > level(parts[1], LAYERS):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert wrong == []


def test_the_runtime_knows_errors_and_interrupts_only() -> None:
    known = ("autopipe.errors", "autopipe.interrupts", "autopipe.runtime")
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in (ROOT / "autopipe" / "runtime").rglob("*.py")
        for target in needed(path, at_once=False)
        if not target.startswith(known)
    ]
    assert wrong == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Not even for types."""
    left = {name: needed(path, at_once=False) for name, path in modules().items()}
    del left["autopipe"]  # its names are imported when they are first used
    left = {
        name: {n for n in to if not f"{name}.".startswith(f"{n}.")}  # a package holds its files
        for name, to in left.items()
    }
    while free := [name for name, to in left.items() if not to & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def reachable(name: str) -> set[str]:
    """What importing a module imports, packages on the way included."""
    found, todo = set(), [name]
    while todo:
        top = todo.pop()
        if top in found or top not in modules():
            continue
        found.add(top)
        todo += needed(modules()[top], at_once=True)
        todo += [top.rpartition(".")[0]]
    return found


@pytest.mark.parametrize("name", TORCH_FREE)
def test_without_torch(name: str) -> None:
    names = {name, *(m for m in modules() if m.startswith(f"{name}."))}
    wrong = [
        f"{m}: {imported}"
        for m in set().union(*map(reachable, names))
        for imported, _, _, runs in imports(modules()[m])
        if runs and imported.split(".")[0] in ("torch", "functorch")
    ]
    assert wrong == []


def test_passes_are_imported_through_autopipe() -> None:
    """``import passes`` would load every file twice."""
    files = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = [
        where(path, n.lineno)
        for path in files
        for n in ast.walk(tree(path))
        if (isinstance(n, ast.Import) and any(a.name.split(".")[0] == "passes" for a in n.names))
        or (isinstance(n, ast.ImportFrom) and not n.level and n.module.split(".")[0] == "passes")
    ]
    assert wrong == []


def test_private_torch_stands_in_three_files() -> None:
    """``torch._anything``, ``forward_ad._anything``: imported or written out, in _torch*.py only.

    (``torch.utils._pytree`` is documented as a name to import, its underscore notwithstanding.)
    """
    wrong = []
    for path in sources():
        if path.parent == ROOT / "passes" and path.name.startswith("_torch"):
            continue
        own: dict[str, str] = {}  # what torch's modules are called here
        for name, what, line, _ in imports(path):
            if name.split(".")[0] in ("torch", "functorch"):
                own[what or name.split(".")[0]] = f"{name}.{what}" if what else name.split(".")[0]
                if _private(f"{name}.{what}" if what else name):
                    wrong.append(f"{where(path, line)} imports {name}.{what}")
        for n in ast.walk(tree(path)):
            if isinstance(n, ast.Attribute) and (text := dotted(n)):
                first, _, rest = text.partition(".")
                if first in own and _private(f"{own[first]}.{rest}"):
                    wrong.append(f"{where(path, n.lineno)} uses {text}")
    assert wrong == []


def _private(name: str) -> bool:
    parts = name.split(".")
    if parts[:3] == ["torch", "utils", "_pytree"] or parts[1:2] == ["ops"]:
        return False  # operators may have any name: torch.ops.aten._log_softmax
    return any(p.startswith("_") and not p.startswith("__") for p in parts[1:])


# -------------------------------------------------------------------------------- size and words


def test_files_and_functions_are_small() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} has {count} lines"
        for path in sources()
        if (count := len(path.read_text().splitlines())) > FILE_LINES
    ]
    for path in sources():
        for name, n, _ in functions(path):
            first = n.body[0]
            text = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(n) else 0
            count = (n.end_lineno or n.lineno) - n.lineno + 1 - text
            if count > FUNCTION_LINES:
                wrong.append(f"{where(path, n.lineno)} {name} has {count} lines")
    assert wrong == []


OBVIOUS = {"verify", "forward", "backward", "train"}
"""Methods whose meaning the class's docstring or their base class gives."""


def test_everything_public_is_documented() -> None:
    """Modules, classes, functions; methods of more than one statement, but for `OBVIOUS` ones."""
    wrong = [str(p) for p in sources() if tree(p).body and not ast.get_docstring(tree(p))]
    for path in sources():
        for n in tree(path).body:
            if isinstance(n, ast.ClassDef) and not n.name.startswith("_"):
                wrong += [] if ast.get_docstring(n) else [f"{where(path, n.lineno)} {n.name}"]
        for name, n, public in functions(path):
            obvious = "." in name and (n.name in OBVIOUS or len(n.body) < 3)
            if public and not obvious and not ast.get_docstring(n):
                wrong.append(f"{where(path, n.lineno)} {name}")
    assert wrong == []


def test_one_class_name_has_one_meaning() -> None:
    found = defaultdict(list)
    for path in sources():
        for n in ast.walk(tree(path)):
            if isinstance(n, ast.ClassDef):
                found[n.name.lstrip("_")].append(where(path, n.lineno))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def exports(path: Path) -> list[str]:
    """The entries of a file's ``__all__``."""
    for n in tree(path).body:
        if isinstance(n, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets
        ):
            return [str(e.value) for e in ast.walk(n.value) if isinstance(e, ast.Constant)]
    return []


@pytest.mark.parametrize(
    "package",
    sorted(p.name for p in (ROOT / "passes").iterdir() if p.is_dir() and p.name != "__pycache__"),
)
def test_a_package_says_what_it_does(package: str) -> None:
    """What comes in, what goes out, its files; and no value carries the name of a file."""
    folder = ROOT / "passes" / package
    text = ast.get_docstring(tree(folder / "__init__.py")) or ""
    files = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert {f for f in files if not re.search(rf"`{f}`|^ *{f}\b", text, re.MULTILINE)} == set()
    assert re.search(r"\bIn:", text)
    assert re.search(r"\bOut:", text)
    assert files & set(exports(folder / "__init__.py")) == set()


def test_no_pass_keeps_state() -> None:
    """No ``global``, anywhere."""
    wrong = [
        where(path, n.lineno)
        for path in sources()
        for n in ast.walk(tree(path))
        if isinstance(n, ast.Global)
    ]
    assert wrong == []


# ------------------------------------------------------------------------------------------ tests


def test_every_source_file_has_its_test() -> None:
    """A test file of its name in the mirrored folder, or one whose docstring names it.

    ``passes/split/reorder.py`` → ``tests/passes/split/test_reorder.py``, or a docstring that says
    ``Covers split/reorder.py``.
    """
    tests = [*(ROOT / "tests").rglob("test_*.py")]
    named = " ".join(ast.get_docstring(tree(p)) or "" for p in tests)
    covered = set(re.findall(r"[\w/]+\.py", named))
    missing = []
    for path in sources():
        if path.name in ("__init__.py", "__main__.py"):
            continue
        parts = path.relative_to(ROOT).parts
        parts = parts[1:] if parts[0] == "autopipe" else parts
        mirror = ROOT.joinpath("tests", *parts[:-1], f"test_{parts[-1]}")
        short = "/".join(parts[-2:])
        names = {short, "/".join(parts), f"autopipe/{short}"}
        if not mirror.exists() and not names & covered:
            missing.append("/".join(parts))
    assert missing == []


def test_the_link_leads_to_the_passes() -> None:
    assert (ROOT / "autopipe" / "passes").resolve() == ROOT / "passes"


def test_tests_do_not_sleep() -> None:
    wrong = [
        where(path, n.lineno)
        for path in (ROOT / "tests").rglob("*.py")
        for n in ast.walk(tree(path))
        if isinstance(n, ast.Attribute) and dotted(n) in ("time.sleep", "asyncio.sleep")
    ]
    assert wrong == []
