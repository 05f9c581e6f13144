"""The SBOM of the image, as CycloneDX: what the Dockerfile puts into it, and the image below it."""

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

# Where the markers of locked requirements are decided.
IMAGE = {
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "python_version": "3.13",
    "python_full_version": "3.13.0",
}


def locked(requirements: str) -> Iterator[tuple[str, str]]:
    """Name and version of each library that the image installs from these locked requirements."""
    for line in requirements.splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            if not requirement.marker or requirement.marker.evaluate(IMAGE):
                (pin,) = requirement.specifier
                yield requirement.name, pin.version


def license_of(name: str) -> str | None:
    """As the installed package says it: an expression, or the first line of its words."""
    said = metadata.metadata(name).json
    words = str(said.get("license_expression") or said.get("license") or "")
    if not words:
        for each in said.get("classifier", ()):
            if each.startswith("License :: "):
                words = each.rpartition(" :: ")[2]
    return words.partition("\n")[0] or None


def component(
    kind: ComponentType, name: str, version: str | None, purl: PackageURL, words: str | None
) -> Component:
    """One thing in the image, which other tools know by its package URL."""
    licenses = [LicenseFactory().make_from_string(words)] if words else []
    return Component(
        type=kind, name=name, version=version, purl=purl, bom_ref=str(purl), licenses=licenses
    )


def sbom(requirements: str, version: str, base: str, epoch: int, source: str | None) -> str:
    """The document. `base` is the image below, whose packages are known to its publisher only."""
    repository, tag = (
        base.rsplit(":", 1) if ":" in base.rpartition("/")[2] and "@" not in base else (base, None)
    )
    namespace, _, name = repository.rpartition("/")
    agent = PackageURL("pypi", name="vgpu-agent", version=version)
    below = PackageURL("docker", namespace=namespace or None, name=name, version=tag)
    components = [
        component(ComponentType.APPLICATION, "vgpu-agent", version, agent, "Apache-2.0"),
        component(ComponentType.CONTAINER, repository, tag, below, None),
    ]
    for library, pin in locked(requirements):
        purl = PackageURL("pypi", name=library, version=pin)
        words = license_of(library)
        components.append(component(ComponentType.LIBRARY, library, pin, purl, words))
    image = Component(
        type=ComponentType.CONTAINER, name="vgpu-agent", version=version, bom_ref="image"
    )
    if source:
        image.external_references.add(
            ExternalReference(type=ExternalReferenceType.VCS, url=XsUri(source))
        )
    # The number is that of the content, for equal bytes; a random one is the library's default.
    content = "\n".join([str(epoch), *(str(each.purl) for each in components)])
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, content),
        components=components,
        metadata=BomMetaData(component=image, timestamp=datetime.fromtimestamp(epoch, UTC)),
    )
    bom.register_dependency(image, components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"
