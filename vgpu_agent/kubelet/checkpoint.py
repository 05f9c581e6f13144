"""The kubelet's checkpoint: which container, by the UID of its pod, was given which devices.

A file in the kubelet's directory of device plugins, which the kubelet replaces whenever it gives
devices. Of it nothing but the devices of one resource is read.
"""

import json
from pathlib import Path
from typing import Any

from vgpu_agent import store
from vgpu_agent.errors import KubeletError, StoreError
from vgpu_agent.model.holders import Recorded

CHECKPOINT = "kubelet_internal_checkpoint"
"""In the directory of device plugins, which `--root-dir` does not move."""
MAX_BYTES = 16 * 2**20
"""Most bytes of a checkpoint that are read."""
MAX_VALUES = 2**17
"""Most values of a checkpoint: while json decodes it, nothing else runs. Takes 20 ms."""


def read_checkpoint(
    path: Path, resource_name: str, max_bytes: int = MAX_BYTES
) -> list[Recorded] | None:
    """What the kubelet's checkpoint has of a resource; None where there is no checkpoint.

    Raises KubeletError where it cannot be read or understood.
    """
    try:
        content = store.read_bytes(path, max_bytes)
    except StoreError as error:
        raise KubeletError(str(error)) from error
    if content is None:
        return None
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise KubeletError(f"{path} has more than {MAX_VALUES} values")
    try:
        return [
            Recorded(
                _text(entry["PodUID"]),
                _text(entry["ContainerName"]),
                tuple(_text(vgpu) for vgpu in _device_ids(entry["DeviceIDs"])),
            )
            for entry in json.loads(content)["Data"]["PodDeviceEntries"] or ()
            if entry["ResourceName"] == resource_name
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise KubeletError(f"{path} is no checkpoint: {error!r}") from error


def _device_ids(found: Any) -> list[Any]:
    """The IDs, by NUMA node as kubelets write them, or in a plain list as those before 1.20 did."""
    if isinstance(found, dict):
        return [vgpu for ids in found.values() for vgpu in ids or ()]
    return found or []


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
