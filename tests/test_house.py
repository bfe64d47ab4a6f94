"""The house: who may import whom; how large and how documented files are. Read off the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = 400


def sources() -> list[Path]:
    """Every file of the package, once: the link autopipe/passes is left out."""
    found = [*(ROOT / "passes").rglob("*.py")]
    found += [p for p in (ROOT / "autopipe").rglob("*.py") if "passes" not in p.parts]
    return sorted(found)


def module(path: Path) -> str:
    """``passes/ir.py`` → ``autopipe.passes.ir``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "autopipe" else ("autopipe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module, line) for everything that a file imports, at whatever depth; relative ones resolved.

    ``from a import b`` counts as ``a`` and as ``a.b``, whichever of them is the module.
    """
    package = module(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.Import):
            yield from ((alias.name, n.lineno) for alias in n.names)
        elif isinstance(n, ast.ImportFrom):
            base = package[: len(package) - n.level + 1] if n.level else []
            whole = ".".join([*base, *([n.module] if n.module else [])])
            yield whole, n.lineno
            yield from ((f"{whole}.{alias.name}", n.lineno) for alias in n.names)


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


each_file = pytest.mark.parametrize("path", sources(), ids=module)


def test_the_sources_are_found() -> None:
    names = {module(p) for p in sources()}
    assert {"autopipe", "autopipe.api", "autopipe.passes.ir", "autopipe.runtime.executor"} <= names
    assert len(names) == len(sources())
    assert ("autopipe.passes.staged.Split", 1) not in list(imports(ROOT / "passes" / "staged.py"))
    assert "autopipe.passes.staged.Split" in {n for n, _ in imports(ROOT / "passes" / "split.py")}


# ------------------------------------------------------------------------------- who imports whom

FORBIDDEN = {
    # within: what it must not import. The generated text, not the passes, imports the runtime.
    "autopipe.passes": [
        "autopipe.api",
        "autopipe.batch",
        "autopipe.call",
        "autopipe.cli",
        "autopipe.compiled",
        "autopipe.module",
        "autopipe.options",
        "autopipe.planner",
        "autopipe.plans",
        "autopipe.profile",
        "autopipe.report",
        "autopipe.runtime",
        "autopipe.target",
    ],
    "autopipe.runtime": [
        "autopipe.api",
        "autopipe.batch",
        "autopipe.call",
        "autopipe.cli",
        "autopipe.compiled",
        "autopipe.module",
        "autopipe.options",
        "autopipe.passes",
        "autopipe.planner",
        "autopipe.plans",
        "autopipe.profile",
        "autopipe.report",
        "autopipe.target",
    ],
    "autopipe.errors": ["autopipe", "torch"],
    "autopipe.batch": ["autopipe.api", "autopipe.module", "autopipe.compiled", "autopipe.call"],
    "autopipe.options": ["autopipe.api", "autopipe.module", "autopipe.compiled", "autopipe.call"],
    "autopipe.plans": [
        *("autopipe.api", "autopipe.module", "autopipe.compiled", "autopipe.call", "torch"),
        *("autopipe.options", "autopipe.planner"),
    ],
    "autopipe.report": [
        *("autopipe.api", "autopipe.cli", "autopipe.module", "autopipe.compiled", "autopipe.call"),
        "autopipe.planner",
    ],
    # data in, text out: a page is drawn where there is no torch
    **{
        f"autopipe.report.{room}": ["torch", "sympy", "numpy", "autopipe.runtime"]
        for room in (
            *("page", "style", "svg", "facts", "tables", "table"),
            *("graph_figure", "bars_figure", "timeline_figure", "chunks_figure"),
        )
    },
    "autopipe.cli": ["torch", "autopipe.module", "autopipe.planner", "autopipe.runtime"],
    "autopipe.target": ["autopipe.api", "autopipe.cli", "autopipe.module", "autopipe.passes"],
    "autopipe.api": ["autopipe.cli", "autopipe.target"],
    "autopipe.profile": [
        *("autopipe.api", "autopipe.module", "autopipe.compiled", "autopipe.call"),
        *("autopipe.options", "autopipe.planner", "autopipe.report", "autopipe.runtime"),
    ],
    "autopipe.compiled": ["autopipe.api", "autopipe.module", "autopipe.call"],
    "autopipe.call": ["autopipe.api", "autopipe.module"],
    "autopipe.module": ["autopipe.api"],
    # plain arrays and lists: no tensors
    **{
        f"autopipe.passes.{room}": ["torch", "autopipe.passes.ir", "autopipe.passes.graphs"]
        for room in (
            *("bounds", "contiguous", "costgraph", "crossing", "cuts", "dag", "ideals", "lists"),
            *("mincut", "reach", "unequal"),
        )
    },
    "autopipe.passes.devices": ["torch", "autopipe.passes"],
    "autopipe.passes.partition": ["torch", "autopipe.passes.ir", "autopipe.passes.graphs"],
    "autopipe.passes.orders": ["torch", "autopipe"],
    "autopipe.passes.scheduled": [
        "torch",
        *(f"autopipe.passes.{p}" for p in ("ir", "graphs", "orders", "schedule", "simulate")),
    ],
    "autopipe.passes.timeline": [
        "torch",
        *(f"autopipe.passes.{p}" for p in ("ir", "graphs", "orders", "schedule", "simulate")),
    ],
    "autopipe.passes.schedule": [
        "torch",
        *(f"autopipe.passes.{p}" for p in ("ir", "graphs", "timeline", "simulate")),
    ],
    "autopipe.passes.solve": [
        "torch",
        *(f"autopipe.passes.{p}" for p in ("ir", "graphs", "costgraph", "crossing", "partition")),
    ],
    "autopipe.passes.simulate": ["torch", "autopipe.passes.ir", "autopipe.passes.graphs"],
    # the passes themselves: only the driver knows the line they stand in
    "autopipe.passes.spec": ["autopipe.passes"],
    "autopipe.passes.ir": [
        f"autopipe.passes.{p}"
        for p in ("staged", "graphs", "capture", "gradients", "cost", "totals", "split", "driver")
    ],
    "autopipe.passes._torch": ["autopipe"],
    # how a call is costed knows nothing of the graph around it
    **{
        f"autopipe.passes.{p}": [
            f"autopipe.passes.{q}" for q in ("gradients", "cost", "totals", "split", "driver")
        ]
        for p in ("meter", "runs", "distinct")
    },
    "autopipe.passes.graphs": [
        f"autopipe.passes.{p}" for p in ("capture", "cost", "split", "phases", "codegen", "driver")
    ],
}


@each_file
def test_imports_run_in_one_direction(path: Path) -> None:
    name = module(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}"
        for package, forbidden in FORBIDDEN.items()
        if within(name, package)
        for imported, line in imports(path)
        if within(imported, *forbidden) and not within(imported, name)
    ]
    assert wrong == []


@each_file
def test_passes_are_imported_through_the_package(path: Path) -> None:
    assert [n for n, _ in imports(path) if within(n, "passes")] == []


def test_tests_import_passes_through_the_package() -> None:
    wrong = [
        f"{path}:{line}"
        for path in (ROOT / "tests").rglob("*.py")
        for n in ast.walk(tree(path))
        for line in [getattr(n, "lineno", 0)]
        if (isinstance(n, ast.Import) and any(within(a.name, "passes") for a in n.names))
        or (isinstance(n, ast.ImportFrom) and not n.level and within(n.module or "", "passes"))
    ]
    assert wrong == []


def dotted(n: ast.expr) -> str:
    """``torch._ops.OpOverload`` of an attribute's expression; "" for anything else."""
    parts: list[str] = []
    while isinstance(n, ast.Attribute):
        parts.append(n.attr)
        n = n.value
    return ".".join([n.id, *reversed(parts)]) if isinstance(n, ast.Name) else ""


@each_file
def test_what_torch_does_not_promise_is_used_in_one_room(path: Path) -> None:
    """``torch._anything``, imported or written out, stands in passes/_torch.py only.

    (``torch.utils._pytree`` is documented as a name to import, its underscore notwithstanding.)
    """
    if module(path) == "autopipe.passes._torch":
        assert [n for n, _ in imports(path) if n.startswith("torch._")]
        return
    used = [(n, line) for n, line in imports(path)]
    used += [(dotted(n), n.lineno) for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)]
    wrong = [f"{path.relative_to(ROOT)}:{line} uses {n}" for n, line in used if _private(n)]
    assert wrong == []


def _private(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "torch" or parts[:3] == ["torch", "utils", "_pytree"]:
        return False
    if parts[1:2] == ["ops"]:  # operators may have any name: torch.ops.aten._log_softmax
        return False
    return any(p.startswith("_") and not p.startswith("__") for p in parts[1:])


# ------------------------------------------------------------------------------- size and words


@each_file
def test_files_are_small(path: Path) -> None:
    count = len(path.read_text().splitlines())
    name = str(path.relative_to(ROOT))
    assert count <= LINES, f"{name} has {count} lines"


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for n in body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_"):
            yield n


@each_file
def test_modules_functions_and_classes_are_documented(path: Path) -> None:
    """Every module that holds code, every public function and class in it."""
    source = tree(path)
    if not source.body:
        return
    assert ast.get_docstring(source), path
    wrong = [
        f"{path.relative_to(ROOT)}:{n.lineno} {n.name}"
        for n in public(source.body)
        if not ast.get_docstring(n)
    ]
    assert wrong == []


OBVIOUS = {"verify", "forward", "backward", "train"}
"""Methods whose meaning the class's docstring or their base class gives."""


@each_file
def test_public_methods_are_documented(path: Path) -> None:
    """But for properties and overrides of one statement, which say all with their body."""
    wrong = [
        f"{path.relative_to(ROOT)}:{m.lineno} {c.name}.{m.name}"
        for c in public(tree(path).body)
        if isinstance(c, ast.ClassDef)
        for m in public(c.body)
        if isinstance(m, ast.FunctionDef)
        and not ast.get_docstring(m)
        and m.name not in OBVIOUS
        and len(m.body) > 2
    ]
    assert wrong == []


@each_file
def test_no_pass_keeps_state(path: Path) -> None:
    """No ``global``, anywhere."""
    assert [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.Global)] == []


def test_the_link_leads_to_the_passes() -> None:
    assert (ROOT / "autopipe" / "passes").resolve() == ROOT / "passes"


def test_tests_do_not_sleep() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{n.lineno}"
        for path in (ROOT / "tests").rglob("*.py")
        for n in ast.walk(tree(path))
        if isinstance(n, ast.Attribute) and dotted(n) in ("time.sleep", "asyncio.sleep")
    ]
    assert wrong == []
