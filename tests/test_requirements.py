"""The locked requirements: complete for every pip, and set up by `requirements/setup`."""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.agent_process import REPOSITORY

LOCKS = {path.stem: path.read_text() for path in (REPOSITORY / "requirements").glob("*.txt")}

Requires = Callable[[str, str], list[str] | None]
"""What a distribution of that name and version requires; None where its metadata is not here."""


class Locked(NamedTuple):
    name: str
    version: str
    extras: frozenset[str]
    marker: str


def locked(lock: str) -> Iterator[Locked]:
    """The distributions of a lock file."""
    for line in re.findall(r"^[A-Za-z0-9][^#\\\n]*", lock, re.MULTILINE):
        it = Requirement(line)
        extras = frozenset(canonicalize_name(extra) for extra in it.extras)
        (pin,) = it.specifier
        yield Locked(canonicalize_name(it.name), pin.version, extras, str(it.marker or ""))


def missing_extras(lock: str, requires: Requires) -> list[str]:
    """The extras that a locked distribution requires of another one and that are not locked.

    pip before 24 resolves such an extra outside of the lock, and then refuses what it finds. Every
    marker is taken for true, other than `extra == "x"` where x is not locked for the requirer.
    A distribution that is not locked at all is one that its marker excludes everywhere.
    """
    found = list(locked(lock))
    extras: dict[str, frozenset[str]] = {}
    for it in found:
        extras[it.name] = extras.get(it.name, frozenset()) | it.extras
    missing = set()
    for it in found:
        for required in map(Requirement, requires(it.name, it.version) or ()):

            def holds(atom: re.Match[str], it: Locked = it) -> str:
                named = re.fullmatch(r'extra == "(.*)"|"(.*)" == extra', atom[0])
                return str(not named or canonicalize_name(named[1] or named[2]) in it.extras)

            # A marker is atoms with `and`, `or` and parentheses: each atom becomes True or False.
            marker = re.sub(r'[^\s()]+ (?:not in|\S+) (?:"[^"]*"|\w+)', holds, str(required.marker))
            name = canonicalize_name(required.name)
            if name in extras and eval(marker) is not False:
                missing |= {
                    f"{it.name} requires {name}[{extra}]"
                    for extra in map(canonicalize_name, required.extras)
                    if extra not in extras[name]
                }
    return sorted(missing)


def installed(name: str, version: str) -> list[str] | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return (found.requires or []) if found.version == version else None


def elsewhere() -> list[Locked]:
    """What is locked and not installed here: its marker names another system or Python."""
    every = {it for lock in LOCKS.values() for it in locked(lock)}
    return sorted(it for it in every if installed(it.name, it.version) is None)


@pytest.mark.parametrize("name", LOCKS)
def test_every_extra_that_is_required_is_locked(name):
    assert missing_extras(LOCKS[name], installed) == []


def test_what_the_check_cannot_look_into_is_for_other_systems():
    """The test after this one looks into it."""
    assert [it.name for it in elsewhere() if not it.marker] == []


@pytest.mark.slow
def test_every_extra_that_other_systems_require_is_locked(tmp_path):
    requires = {}
    for it in elsewhere():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        wanted = f"{it.name}=={it.version}"
        chosen = ["--no-deps", "--only-binary=:all:", "--dest", tmp_path / it.name, wanted]
        done = subprocess.run([*pip, *chosen], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (wheel,) = (tmp_path / it.name).iterdir()
        requires[it.name, it.version] = metadata_of(wheel)
    for lock in LOCKS.values():
        assert missing_extras(lock, lambda *it: requires.get(it)) == []


def metadata_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(path).decode()).get_all("Requires-Dist", [])


def test_the_lock_that_broke_every_setup_is_found():
    assert "coverage[toml]==" in LOCKS["dev"]
    broken = LOCKS["dev"].replace("coverage[toml]==", "coverage==")
    assert missing_extras(broken, installed) == ["pytest-cov requires coverage[toml]"]


@pytest.mark.parametrize(
    ("lock", "requires", "missing"),
    [
        # A marker that is false here may be true elsewhere.
        ("a b", 'b[x]; sys_platform == "win32" and python_version < "3"', ["a requires b[x]"]),
        ("a b", 'b[x]; "win" in sys_platform', ["a requires b[x]"]),
        # An extra of the requirer counts where it is locked, and only there.
        ("a[e] b", 'b[x]; extra == "e"', ["a requires b[x]"]),
        ("a[e] b", 'b[x]; extra == "f"', []),
        ("a b", 'b[x]; extra == "e" and os_name == "nt"', []),
        ("a b", 'b[x]; extra == "e" or os_name == "nt"', ["a requires b[x]"]),
        ("a[e] b", 'b[x]; (os_name == "nt" or extra == "f") and extra == "f"', []),
        ("a[e-f] b", 'B[X_y]; extra == "E_F"', ["a requires b[x-y]"]),
        # Locked with it, or not at all.
        ("a b[x,z]", "b[x]", []),
        ("a b[z]", "b[x,z]", ["a requires b[x]"]),
        ("a", 'b[x]; python_version < "3"', []),
    ],
)
def test_extras_are_looked_for_under_every_marker(lock, requires, missing):
    text = "".join(f"{each}==1 \\\n    --hash=sha256:0\n    # via c\n" for each in lock.split())
    assert missing_extras(text, lambda name, _: [requires] if name == "a" else []) == missing
