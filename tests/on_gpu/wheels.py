"""The wheels that a machine without a network needs, checked before anything is measured.

Needs nothing but Python itself. The folder's wheels are those of requirements/run.txt; nothing is
built, and no code is generated: grpcio-tools is not among them.
"""

import hashlib
import re
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LOCK = Path(__file__).parents[2] / "requirements" / "run.txt"


class Locked(NamedTuple):
    name: str
    version: str
    hashes: frozenset[str]


def locked(text: str) -> Iterator[Locked]:
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text):
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[.*?\])?==([^\s;]+)", entry)
        if match:
            hashes = frozenset(re.findall(r"--hash=sha256:([0-9a-f]{64})", entry))
            yield Locked(re.sub(r"[-_.]+", "-", match[1]).lower(), match[2], hashes)


def fits(wheel: Path, python: str) -> bool:
    """Whether CPython of that version takes the wheel on Linux, x86-64, by its name (PEP 427)."""
    pythons, abis, platforms = (part.split(".") for part in wheel.stem.split("-")[-3:])
    digits = python.replace(".", "")
    own = f"cp{digits}"
    works = any(
        (each in {"py3", own} and abis != ["abi3"])
        or (each.startswith("cp3") and "abi3" in abis and int(each[3:]) <= int(digits[1:]))
        for each in pythons
    )
    return works and any(
        each == "any" or re.fullmatch(r"(many)?linux\w*_x86_64", each) for each in platforms
    )


def judge(it: Locked, folder: Path, python: str) -> tuple[str | None, str]:
    """What is wrong with a requirement in that folder, None where nothing is, and its wheel."""
    named = [
        path
        for path in sorted(folder.glob("*.whl"))
        if re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower() == it.name
    ]
    found = [path for path in named if path.name.split("-")[1] == it.version]
    right = [path for path in found if fits(path, python)]
    if not found:
        others = ", ".join(path.name.split("-")[1] for path in named)
        return f"is missing{f' (found {others})' if others else ''}", "-"
    if not right:
        names = ", ".join(path.name for path in found)
        return f"has no wheel for CPython {python} on Linux x86-64 (found {names})", "-"
    for path in right:
        if hashlib.sha256(path.read_bytes()).hexdigest() in it.hashes:
            return None, path.name
    return f"is not the locked one: the SHA-256 of {right[0].name} is not in {LOCK.name}", "-"


def check(folder: Path, python: str) -> bool:
    """Prints a line for each requirement; whether all are there."""
    wrong = 0
    for it in locked(LOCK.read_text()):
        problem, wheel = judge(it, folder, python)
        wrong += problem is not None
        word = "ok     " if problem is None else "MISSING"
        print(f"{word} {it.name} {it.version} {problem or wheel}")
    if wrong:
        print(
            f"{wrong} missing. Where there is a network, with any Python:\n"
            f"  python3 -m pip download --require-hashes --no-deps --only-binary=:all:"
            f" --implementation cp --python-version {python}"
            f" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64"
            f" -r {LOCK} -d {folder}"
        )
    return wrong == 0


def install(folder: Path, place: Path) -> None:
    """A virtual environment of those wheels, in which this Python's own packages are found too."""
    venv.create(place, system_site_packages=True, with_pip=False, symlinks=True)
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    options = ["--no-index", "--find-links", folder, "--no-deps", "--require-hashes"]
    quiet = ["--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", *quiet, "install", *options, "-r", LOCK,
         "--target", packages],
        check=True,
    )  # fmt: skip
    # This Python may be of a virtual environment itself, whose packages that option does not reach.
    (packages / "machine.pth").write_text("\n".join(site.getsitepackages()) + "\n")
