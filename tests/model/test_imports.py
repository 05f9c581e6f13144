import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vgpu_agent.model

PACKAGE = Path(vgpu_agent.model.__file__).parent
REPOSITORY = PACKAGE.parent.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(source.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for source in SOURCES
]


def run_bare(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the standard library and the repository, and nothing else."""
    return subprocess.run(
        [sys.executable, "-S", "-s", "-P", "-W", "error", "-c", code],
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def foreign_imports(source: str, package: str = "vgpu_agent.model") -> list[str]:
    """What a module of `package` imports that is neither standard nor the model's to know."""
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            whole = module == "vgpu_agent"  # then the names themselves are the modules
            imported += [f"{module}.{alias.name}" for alias in node.names] if whole else [module]
    return [name for name in imported if not _allowed(name)]


def _allowed(name: str) -> bool:
    own = ("vgpu_agent.model", "vgpu_agent.errors")
    return name.split(".")[0] in sys.stdlib_module_names or any(
        name == module or name.startswith(f"{module}.") for module in own
    )


def test_the_model_is_found():
    names = {"container", "devices", "health", "node", "placement", "share", "snapshot"}
    assert {f"vgpu_agent.model.{name}" for name in names} <= set(MODULES)


@pytest.mark.slow
def test_the_model_imports_with_nothing_but_the_standard_library():
    assert "No module named 'hypothesis'" in run_bare("import hypothesis").stderr
    done = run_bare(
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "print('imported', *sorted(n for n in sys.modules if n.startswith('vgpu_agent')))"
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split()[1:])
    assert loaded >= set(MODULES)
    assert loaded - set(MODULES) <= {"vgpu_agent", "vgpu_agent.errors"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_module_of_the_model_imports_only_the_model_and_errors(source):
    assert foreign_imports(source.read_text()) == []
