"""Who may import what: no import runs from a lower room to a higher one."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import vgpu_agent

PACKAGE = Path(vgpu_agent.__file__).parent
SOURCES = {
    source.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): source
    for source in PACKAGE.rglob("*.py")
    if "_proto" not in source.parts
}

LEAVES = ("address", "errors", "pace", "store", "threads", "unixsocket")
"""Small modules beside the rooms, which import nothing of ours but each other."""

ROOMS = {
    **dict.fromkeys(LEAVES, LEAVES),
    "model": ("errors",),
    "gpu": ("model", *LEAVES),
    "mps": ("model", "gpu.driver", *LEAVES),
    "kubelet": ("model", *LEAVES),
    "limits": ("model", "gpu.driver", "kubelet.checkpoint", "usage.containers", *LEAVES),
    "usage": ("model", "gpu.driver", *LEAVES),
    "observe": ("model", *LEAVES),
    "control": LEAVES,
    "signals": (),
    "settings_kinds": ("model.rules", *LEAVES),
    "aside": (),
    "settings": ("settings_kinds", "model.rules", "observe.logs", *LEAVES),
    "settings_reading": ("settings", *LEAVES),
    "settings_unknown": ("settings",),
}
"""What each room may import of ours beside itself. `HIGHEST` may import everything."""

HIGHEST = {
    *("__init__", "__main__", "agent", "arguments", "beside", "cli", "commands", "endless"),
    *("drivers", "limiting", "requests", "running"),
}

LIBRARIES = {
    "pydantic": ("settings_reading",),
    "pydantic_settings": ("settings_reading",),
    "pynvml": ("gpu.nvml",),
    "betterproto": ("kubelet",),
    "grpclib": ("kubelet",),
    "prometheus_client": ("observe",),
    "rich": ("commands",),
    "h11": ("observe",),
    "h2": ("kubelet",),
    "uvicorn": ("observe",),
    "yaml": ("gpu.cdi",),
}
"""Where each library of an edge may be imported. anyio is not one: it is how all of it runs."""


@cache
def nodes(name: str) -> list[ast.AST]:
    """What that module is made of."""
    return list(ast.walk(ast.parse(SOURCES[name].read_text())))


@cache
def imported(name: str) -> set[str]:
    """The modules and names that a module imports, in full."""
    found: set[str] = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def importers(library: str) -> set[str]:
    return {name for name in SOURCES if any(within(each, (library,)) for each in imported(name))}


def test_every_module_has_its_room():
    assert {name.split(".")[0] for name in SOURCES} == ROOMS.keys() | HIGHEST


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_lower_ones(room):
    allowed = tuple(f"vgpu_agent.{each}" for each in (room, "__version__", *ROOMS[room]))
    assert {
        f"{name}: {each}"
        for name in SOURCES
        if within(name, (room,))
        for each in imported(name)
        if within(each, ("vgpu_agent",)) and not within(each, allowed)
    } == set()


def test_only_those_who_wire_the_parts_know_the_settings():
    users = importers("vgpu_agent.settings")
    assert {name.split(".")[0] for name in users} == {
        "agent",
        "beside",
        "cli",
        "commands",
        "drivers",
        "limiting",
        "settings_reading",
        "settings_unknown",
    }


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_edge_library_stays_at_its_edge(library):
    users = importers(library)
    assert {name for name in users if not within(name, LIBRARIES[library])} == set()
    assert users, "nobody uses it any more; take it off the list"


def test_no_library_is_without_a_place():
    libraries = {each.split(".")[0] for name in SOURCES for each in imported(name)}
    own = {"vgpu_agent", "anyio"}
    assert libraries - set(sys.stdlib_module_names) - own == LIBRARIES.keys()


def test_only_the_settings_and_the_command_line_touch_the_environment():
    words = {
        *("os.environ", "os.environb", "os.getenv", "os.getenvb"),
        *("os.putenv", "os.unsetenv"),
    }
    touching = {
        name
        for name in SOURCES
        if words & imported(name)
        or any(
            isinstance(node, ast.Attribute) and f"os.{node.attr}" in words for node in nodes(name)
        )
    }
    # The programs of MPS get this environment and the directories of their daemon.
    assert touching == {"settings_reading", "cli", "mps.programs", "mps.serve"}


@pytest.mark.slow
def test_the_model_imports_with_nothing_but_the_standard_library():
    def run_bare(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-s", "-P", "-W", "error", "-c", code],
            env={"PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    assert "No module named 'anyio'" in run_bare("import anyio").stderr
    names = [name for name in SOURCES if within(name, ("model",)) and name != "model.__init__"]
    imports = "\n".join(f"import vgpu_agent.{name}" for name in names)
    done = run_bare(f"{imports}\nimport sys; print(*(n for n in sys.modules if 'vgpu_agent' in n))")
    assert done.returncode == 0, done.stderr
    loaded = {name.removeprefix("vgpu_agent.") for name in done.stdout.split()}
    assert loaded >= set(names)
    assert loaded - set(names) == {"vgpu_agent", "model", "errors"}
