"""Imports run one way: a module imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

import diffopt

ROOT = Path(diffopt.__file__).parent
GROUND = {"errors", "living", "shapes", "precision", "modes", "packed", "solution", "cones", "linalg", "waiting"}
GROUND |= {"warm_start", "_version"}
GRADIENTS = {"gates", "active_system", "active_solve", "optimal_value"}
ALLOWED = {
    "problems": GROUND | {"problems"},
    "solvers": GROUND | {"solvers"},
    "kkt": GROUND | {"problems"},
    "backends": GROUND | {"problems", "solvers", "kkt", "backends"},
    "transforms": GROUND | {"problems"},
    "gates": GROUND | {"transforms"},
    "active_system": GROUND | {"kkt"},
    "active_solve": GROUND | {"kkt", "transforms", "active_system"},
    "optimal_value": GROUND | {"problems", "kkt", "gates"},
    "implicit": GROUND | {"problems", "kkt", "transforms"} | GRADIENTS,
    "pulled": GROUND | {"problems", "kkt", "transforms", "implicit"} | GRADIENTS,
    "transformed": GROUND | {"problems", "kkt", "transforms", "implicit"} | GRADIENTS,
    "relaxed": GROUND | {"problems", "solvers", "kkt", "backends", "transforms", "gates", "implicit"},
    "elastic": GROUND | {"problems", "transforms"},
    "closest": GROUND | {"problems", "kkt", "transforms", "gates"},
    "infeasible": GROUND | {"problems", "elastic", "closest"},
    "selected": GROUND | {"problems", "solvers", "kkt", "gates", "optimal_value", "implicit", "relaxed"},
    "failures": GROUND | {"transforms"},
    "operators": GROUND
    | {"problems", "solvers", "kkt", "backends", "transforms", "optimal_value", "pulled", "relaxed", "failures"},
    "dispatch": GROUND
    | {"problems", "solvers", "backends", "transforms", "implicit", "pulled", "transformed", "relaxed", "selected"}
    | {"operators", "failures"},
    "layer": GROUND | {"problems", "solvers", "backends", "infeasible", "operators", "failures", "dispatch"},
    "check": GROUND
    | {"problems", "solvers", "kkt", "backends", "implicit", "infeasible", "relaxed", "selected", "layer", "check"},
} | {name: GROUND for name in GROUND}


def imported(path: Path) -> set[str]:
    """Return the parts of diffopt that a file imports, as first names below the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "diffopt" else [f"diffopt.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("diffopt.")}
    return found


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_upward_import(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in ALLOWED, f"{path} belongs to no floor: add it to the table"
    upward = imported(path) - ALLOWED[part]
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}, which stand above it"


def test_optional_packages_are_not_imported():
    import subprocess
    import sys

    code = (
        "import sys, diffopt; diffopt.backends.names();"
        "heavy = {'cvxpy', 'scipy', 'hypothesis', 'networkx', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    assert sorted(diffopt.__all__) == diffopt.__all__
    missing = [name for name in diffopt.__all__ if not hasattr(diffopt, name)]
    assert not missing
