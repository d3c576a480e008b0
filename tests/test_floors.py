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
    ("ops", "io", "families", "data", "step"),
    ("formats", "algorithms", "transforms"),
    ("chain", "matrix"),
    ("checkpoint", "fusion", "importance", "recipe", "support", "holding"),
    ("choosing", "calibration", "matrices", "notes", "cached"),
    ("planning", "inspection", "converting", "calibrating", "parts"),
    ("report", "card"),
    ("page",),
    ("verification", "output", "committer"),
    ("calibrated", "standalone"),
    ("estimate",),
    ("pipeline",),
    ("api",),
    ("inference",),
    ("evaluation",),
    ("serving",),
    ("cli",),
    ("__main__",),
)
FILES = sorted(ROOT.rglob("*.py"))
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
    for path in FILES:
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for line, there in imports(path):
            if there == "__version__" or there == here:
                continue
            if FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{path}:{line}: {here} imports {there}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_is_public() -> None:
    """A file of ours takes from another what stands in that one's __all__."""
    modules = {path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
    public = {name: set(_exported(path)) for name, path in modules.items()}
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in public:
                missing = {alias.name for alias in node.names} - public[node.module]
                wrong += [f"{path}:{node.lineno}: {node.module} has no public {name}" for name in sorted(missing)]
    assert not wrong, "\n".join(wrong)


def _exported(path: Path) -> list[str]:
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if getattr(node.targets[0], "id", None) == "__all__"]
    return [name for each in lists for name in ast.literal_eval(each)]


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
