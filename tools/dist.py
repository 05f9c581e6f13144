"""Makes the files of a release in dist/, for `make dist`.

All but the image have the same bytes each time they are made from the same commit: they are made
from a copy of the tracked files, with the commit's time, by the locked programs.
"""

import argparse
import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from tools.sbom import sbom

ROOT = Path(__file__).parents[1]
NAMESPACE = "vgpu"
BUILDERS = ("docker", "podman", "buildah")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# Artifact Hub's kinds of changes are these, in lower case.
CHANGES = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def main() -> None:
    """Makes everything in a temporary directory, and then replaces dist/."""
    parser = argparse.ArgumentParser(
        prog="make dist", description="Arguments that are not listed go to the image's build."
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--registry", help="where the image will be, such as ghcr.io/OWNER")
    parser.add_argument("--source", help="address of the repository; goes into chart and SBOM")
    parser.add_argument("--base-image", help="the image below, instead of the Dockerfile's")
    parser.add_argument("--no-image", action="store_true", help="make no image")
    options, build_arguments = parser.parse_known_args()
    target: Path = options.output
    if target.exists() and any(target.iterdir()) and not (target / "SHA256SUMS").exists():
        sys.exit(f"{target} has other files: empty it first")
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory(prefix="vgpu-agent-dist-") as temporary:
        tree, made = Path(temporary, "tree"), Path(temporary, "dist")
        made.mkdir()
        copy_tracked(tree)
        version = only(r'^__version__ = "(.+)"', tree / "vgpu_agent/__init__.py")
        base = options.base_image or only(r"^ARG BASE_IMAGE=(.+)", tree / "Dockerfile")
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
        build = (sys.executable, "-m", "hatchling", "build", "-d", str(made))
        run(*build, cwd=tree, environment=environment)
        publish(tree / "charts/vgpu-agent", tree / "CHANGELOG.md", version, options)
        chart = package(tree / "charts/vgpu-agent", made, epoch)
        (made / "vgpu-agent.yaml").write_text(manifests(chart, version))
        requirements = (tree / "requirements/run.txt").read_text()
        bill = sbom(requirements, version, base, epoch, options.source)
        (made / f"vgpu-agent-{version}.cdx.json").write_text(bill)
        if not options.no_image:
            make_image(tree, made, version, base, build_arguments)
        sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(made.iterdir())]
        (made / "SHA256SUMS").write_text("".join(sums))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
    print(f"{target}:\n{''.join(sums)}", end="")


def run(*command: str, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """What a program printed; where it fails, its own words are the end of this one."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def helm(*arguments: str) -> str:
    """What the locked helm printed."""
    return run(shutil.which("helm", path=Path(sys.executable).parent) or "helm", *arguments)


def only(pattern: str, file: Path) -> str:
    """What the group of a pattern is, which the file has once."""
    (found,) = re.findall(pattern, file.read_text(), re.MULTILINE)
    return str(found)


def sha256(path: Path) -> str:
    """As `sha256sum` says it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_tracked(tree: Path) -> None:
    """What git tracks, with the two modes that it knows, whatever the umask."""
    for name in run("git", "ls-files", "-z").split("\0"):
        source, target = ROOT / name, tree / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
    if run("git", "status", "--porcelain", "--untracked-files=no"):
        print("not what is committed: tracked files have changes", file=sys.stderr)


def publish(chart: Path, changelog: Path, version: str, options: argparse.Namespace) -> None:
    """Adds to the chart what only a release knows: what changed, and where things are."""
    metadata: dict[str, Any] = yaml.safe_load((chart / "Chart.yaml").read_text())
    annotations = metadata["annotations"]
    annotations["artifacthub.io/changes"] = yaml.safe_dump(list(changes(changelog, version)))
    if options.source:
        metadata["home"], metadata["sources"] = options.source, [options.source]
    if options.registry:
        repository = f"{options.registry}/vgpu-agent"
        images = [{"name": "vgpu-agent", "image": f"{repository}:{version}"}]
        annotations["artifacthub.io/images"] = yaml.safe_dump(images)
        values = chart / "values.yaml"
        line = only(r"^(  repository: vgpu-agent)$", values)
        values.write_text(values.read_text().replace(line, f"  repository: {repository}"))
    (chart / "Chart.yaml").write_text(yaml.safe_dump(metadata, sort_keys=False))


def changes(changelog: Path, version: str) -> Iterator[dict[str, str]]:
    """The entries of a version in the changelog."""
    section = changelog.read_text().partition(f"\n## [{version}]")[2].partition("\n## ")[0]
    for part in section.split("\n### ")[1:]:
        kind, _, entries = part.partition("\n")
        if kind in CHANGES:
            for entry in re.split(r"^- ", entries, flags=re.MULTILINE)[1:]:
                yield {"kind": kind.lower(), "description": " ".join(entry.split())}


def package(chart: Path, made: Path, epoch: int) -> Path:
    """Helm's package, and then packed again: helm's has the time at which it was made."""
    helm("package", str(chart), "--destination", str(made))
    (archive,) = made.glob("*.tgz")
    with tarfile.open(archive) as packed:
        files = {each.name: packed.extractfile(each) for each in packed}
        contents = {name: file.read() for name, file in files.items() if file}
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as again,
    ):
        for name, content in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), epoch
            again.addfile(entry, BytesIO(content))
    return archive


def manifests(chart: Path, version: str) -> str:
    """The chart with its defaults and its namespace, for `kubectl apply -f`."""
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        # The pods mount directories of the host.
        "metadata": {
            "name": NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "privileged"},
        },
    }
    where = ("--namespace", NAMESPACE, "--skip-tests")
    return (
        f"# vgpu-agent {version}: the chart with its defaults, for those without Helm.\n"
        "# kubectl apply -f vgpu-agent.yaml\n"
        "# kubectl label node NODE k8s.amazonaws.com/accelerator=vgpu\n"
        f"---\n{yaml.safe_dump(namespace, sort_keys=False)}"
        f"{helm('template', 'vgpu-agent', str(chart), *where)}"
    )


def make_image(tree: Path, made: Path, version: str, base: str, arguments: list[str]) -> None:
    """The OCI archive of the image for this machine, by the builder that `make image` takes too.

    One line, and no archive, where there is no builder, or the builder has no image to build on.
    """

    def succeeds(*command: str) -> bool:
        return shutil.which(command[0]) is not None and not subprocess.call(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    tool = next((tool for tool in BUILDERS if succeeds(tool, "info")), None)
    if tool is None:
        print(f"no image: none of {', '.join(BUILDERS)} runs here", file=sys.stderr)
        return
    if not succeeds(tool, "inspect", "--type", "image", base) and not succeeds(tool, "pull", base):
        print(f"no image: {tool} cannot pull {base} (make dist BASE_IMAGE=...)", file=sys.stderr)
        return
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    archive = made / f"vgpu-agent-{version}-linux-{architecture}.oci.tar"
    name = f"localhost/vgpu-agent:{version}"
    environment = os.environ | {"DOCKER_BUILDKIT": "1"}
    build = (tool, "build", "--build-arg", f"BASE_IMAGE={base}", *arguments, "-t", name, ".")
    run(*build, cwd=tree, environment=environment)
    if tool == "buildah":
        run(tool, "push", name, f"oci-archive:{archive}:{version}")
    elif tool == "podman":
        run(tool, "save", "--format", "oci-archive", "-o", str(archive), name)
    else:
        # An OCI layout since Docker 25.
        run(tool, "save", "-o", str(archive), name)


if __name__ == "__main__":
    main()
