"""Packages import only from lower floors and from themselves."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "roundel"
FLOORS = (  # from the lowest; a part imports only from rows above its own, and from itself
    ("errors", "interruption", "memory"),
    ("scheme",),
    ("tensor",),
    ("regrid",),
    ("unit",),
    ("ops", "io", "families", "data"),
    ("formats", "algorithms", "transforms"),
    ("chain",),
    ("checkpoint", "fusion", "importance", "recipe", "support", "holding"),
    ("choosing", "calibration", "matrices", "notes", "cached"),
    ("planning", "inspection", "converting"),
    ("report", "card"),
    ("page",),
    ("verification", "output"),
    ("calibrated",),
    ("estimate",),
    ("pipeline",),
    ("api",),
    ("evaluation", "inference"),
    ("serving",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, top part below roundel) of every import of ours in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "roundel":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            found += [(node.lineno, n) for n in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, a.name.split(".")[1]) for a in node.names if a.name.startswith("roundel.")]
    return found


def test_every_part_has_a_floor() -> None:
    parts = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert parts - {"__init__", "__pycache__"} <= set(FLOOR_OF), parts - set(FLOOR_OF)


def test_imports_go_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for line, there in imports(path):
            if there == "__version__" or there == here:
                continue
            if FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{path}:{line}: {here} imports {there}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_formats_algorithms_do_not_know_each_other() -> None:
    apart = {"formats", "algorithms", "transforms"}
    for path in [p for name in apart for p in ROOT.glob(f"{name}/*.py")]:
        assert not apart - {path.parent.name} & {there for _, there in imports(path)}, path


def test_no_broad_except() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                assert "Exception" not in [getattr(each, "id", None) for each in caught], f"{path}:{node.lineno}"
                assert node.type is not None, f"{path}:{node.lineno}"
