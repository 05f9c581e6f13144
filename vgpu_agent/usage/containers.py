"""Which container has which ID, by the links that the kubelet keeps in /var/log/containers.

The name of a link says it all: `<pod>_<namespace>_<container>-<container ID>.log`. Where it leads
is of no interest: the logs themselves are never opened.
"""

import os
import re
from pathlib import Path

from vgpu_agent.model.holders import Holder

LINKS = Path("/var/log/containers")

# Names as the API server takes them: a pod's is a DNS subdomain, the others are DNS labels.
_LINK = re.compile(r"([a-z0-9.-]+)_([a-z0-9-]+)_([a-z0-9-]+)-([0-9a-f]{64})\.log")


def named_by(link: str) -> tuple[str, Holder] | None:
    """The container ID and the container that a link is named after; None where it is none.

    The kubelet cuts names at 255 characters, and with them the ID: such a container has no name.
    """
    match = _LINK.fullmatch(link)
    if match is None:
        return None
    pod, namespace, container, container_id = match.groups()
    return container_id, Holder(namespace, pod, container)


def holders_by_id(directory: Path = LINKS) -> dict[str, Holder]:
    """All containers of the node by their ID. Blocks. Raises OSError."""
    return dict(filter(None, map(named_by, os.listdir(directory))))  # noqa: PTH208
