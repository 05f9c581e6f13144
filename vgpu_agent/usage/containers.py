"""Which container a process runs in, and what it is called.

By the text of its /proc/<pid>/cgroup (cgroups(7)), and by the links that the kubelet keeps in
/var/log/containers: `<pod>_<namespace>_<container>-<container ID>.log`. Where a link leads is of no
interest: the logs themselves are never opened.

A container has a cgroup named after its ID, directly below the one of its pod; that one has the
pod's UID in its name, whatever the cgroup driver and the QoS class. A container may make cgroups of
any name below its own, so what is further down decides nothing.
"""

import os
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from vgpu_agent.model.holders import Holder

# A static pod from a file has a hash for a UID. Unit names of systemd have `_` for `-`.
_UID = r"([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"

_POD = re.compile(rf"(?:.*-)?pod{_UID}(?:\.slice)?")

# CRI-O's crio-conmon-<id> holds the container's monitor, not the container.
_CONTAINER = re.compile(r"(?:(?:cri-containerd|crio|docker)-)?([0-9a-f]{64})(?:\.scope)?")

_UP = ".."

LINKS = Path("/var/log/containers")

# Names as the API server takes them: a pod's is a DNS subdomain, the others are DNS labels.
_LINK = re.compile(r"([a-z0-9.-]+)_([a-z0-9-]+)_([a-z0-9-]+)-([0-9a-f]{64})\.log")


_LOG = re.compile(r"/([a-z0-9-]+)_([a-z0-9.-]+)_([0-9a-f-]+)/([a-z0-9-]+)/[^/]*$")
_LONGEST = 255


def container_id(text: str) -> str | None:
    """The ID of the pod's container that a process with that cgroup file runs in.

    None for a process of no pod. Under cgroup v1 there is a line for each hierarchy, and not every
    one of them has to name the container. Text that makes no sense is no container.
    """
    for line in text.split("\n"):  # names may hold anything else that ends a line
        fields = line.split(":", 2)  # of the hierarchy: number, controllers, path
        found = _of_path(fields[2]) if len(fields) == 3 else None
        if found is not None:
            return found
    return None


def _of_path(path: str) -> str | None:
    """The ID in a path of a cgroup, which may be relative to the cgroup that we are in ourselves.

    Of the pod that we are in too it may then show no more than `/..`. What is taken for one of its
    containers and is none has an ID that no pod has.
    """
    names = [name for each in path.removesuffix(" (deleted)").split("/") for name in parts(each)]
    for above, name in pairwise(names):
        of_pod = pod_uid(above) is not None
        container = in_pod(name) if of_pod or above == _UP else None
        if container is not None:
            return container
        if of_pod:
            return None
    return None


def parts(name: str) -> list[str]:
    """What a cgroup's name consists of, with what runtimes do to it undone: one part, mostly.

    Where the kubelet's cgroup driver is systemd and the runtime's is not, the three parts of what
    the one says become a single name of the other, slice:prefix:id: the pod's and the container's.
    """
    plain = name.replace("\\x2d", "-")  # as systemd escapes it
    split = plain.split(":")
    both = [split[0], "-".join(split[1:])] if len(split) == 3 else [plain]
    return [part for part in both if part]


def pod_uid(part: str) -> str | None:
    """The UID, as the API server writes it, of the pod that a cgroup of that name is of."""
    match = _POD.fullmatch(part)
    return None if match is None else match[1].replace("_", "-")


def in_pod(part: str) -> str | None:
    """The ID of the container that a cgroup of that name, directly below a pod's, is of."""
    match = _CONTAINER.fullmatch(part)
    return None if match is None else match[1]


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


def nameless(directory: Path = LINKS) -> dict[tuple[str, str], Holder]:
    """The containers whose link is cut, and so has no ID, by pod UID and name.

    Where the link leads has both: `<namespace>_<pod>_<UID>/<container>/`. Blocks. Raises OSError.
    """
    found = {}
    for link in os.listdir(directory):  # noqa: PTH208
        if len(link) == _LONGEST and named_by(link) is None:
            with suppress(OSError):
                match = _LOG.search(str((directory / link).readlink()))
                if match is not None:
                    namespace, pod, uid, container = match.groups()
                    found[uid, container] = Holder(namespace, pod, container)
    return found
