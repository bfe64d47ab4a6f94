"""The packages of the code base and what they import, as text for docs/architecture.md.

``python -m tests.support.package_map`` prints it; a test holds the page against it.
"""

from __future__ import annotations

from collections import defaultdict

from tests.test_house import FLOORS, LAYERS, modules, needed

WIDTH = 96


def arrows(root: str) -> dict[str, set[str]]:
    """For each package or file right below `root`, the others there that it imports."""
    depth = root.count(".") + 1
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in modules().items():
        parts = name.split(".")
        if not name.startswith(f"{root}.") or parts[depth] in ("passes", "__main__") * (depth == 1):
            continue
        own = found[parts[depth]]
        for target in needed(path, at_once=False):
            if target.startswith(f"{root}."):
                own.add(target.split(".")[depth])
    return {name: to - {name} for name, to in found.items()}


def picture() -> str:
    """Both maps: a line per floor or layer, highest first, then who imports whom."""
    lines: list[str] = []
    for title, root, levels in (
        ("autopipe/", "autopipe", LAYERS),
        ("passes/ (imported as autopipe.passes)", "autopipe.passes", FLOORS),
    ):
        found = arrows(root)
        lines += [title, ""]
        for i in range(len(levels) - 1, -1, -1):
            names = [name for name in sorted(levels[i]) if name in found or name == "passes"]
            lines += [f"  {i}  {'   '.join(names)}"]
        lines += [""]
        for i in range(len(levels) - 1, -1, -1):
            for name in sorted(levels[i]):
                if found.get(name):
                    lines += _wrapped(f"  {name:16} -> ", sorted(found[name]))
        count = sum(map(len, found.values()))
        lines += ["", f"  {len(found)} packages and files, {count} arrows", ""]
    return "\n".join(lines).rstrip() + "\n"


def _wrapped(head: str, names: list[str]) -> list[str]:
    lines, line = [], head
    for i, name in enumerate(names):
        part = name + ", " * (i < len(names) - 1)
        if len(line) + len(part) > WIDTH:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += part
    return [*lines, line]


if __name__ == "__main__":
    print(picture(), end="")
