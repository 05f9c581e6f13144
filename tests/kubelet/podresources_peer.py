"""A PodResources server made with grpcio, and what it tells of pods.

It runs in threads: start and stop it with `off_loop`, or with `serving`.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.kubelet.peers import started
from tests.kubelet.rig import RESOURCE
from tests.wire import pr

LIST = "/v1.PodResourcesLister/List"
NO_LIMIT = [("grpc.max_send_message_length", -1)]


@dataclass(frozen=True)
class Pod:
    """A pod, and what its containers hold: by container and resource the IDs of devices."""

    name: str
    containers: Mapping[str, Mapping[str, Iterable[str]]]
    namespace: str = "default"


def a_pod(name: str, *vgpus: str, namespace: str = "default") -> Pod:
    """A pod whose container `main` holds those vGPUs."""
    return Pod(name, {"main": {RESOURCE: vgpus}}, namespace)


def encoded(*pods: Pod) -> bytes:
    """As a kubelet answers List: an entry for each device, with its NUMA node."""
    answer = pr.ListPodResourcesResponse()
    for pod in pods:
        listed = answer.pod_resources.add(name=pod.name, namespace=pod.namespace)
        for name, held in pod.containers.items():
            container = listed.containers.add(name=name, cpu_ids=[1, 2])
            for resource, device_ids in held.items():
                for vgpu in device_ids:
                    entry = container.devices.add(resource_name=resource, device_ids=[vgpu])
                    entry.topology.nodes.add(ID=0)
    return answer.SerializeToString()


def entry(uid: str, *vgpus: str, container: str = "main", resource: str = RESOURCE) -> dict:
    """An entry of the checkpoint."""
    return {
        "PodUID": uid,
        "ContainerName": container,
        "ResourceName": resource,
        "DeviceIDs": {"0": list(vgpus[::2]), "1": list(vgpus[1::2])},
        "AllocResp": "AAAA",
    }


def checkpoint(*entries: dict) -> str:
    data = {"PodDeviceEntries": list(entries) or None, "RegisteredDevices": {}}
    return json.dumps({"Data": data, "Checksum": 1})


Answer = bytes | Callable[[grpc.ServicerContext], bytes]


class PodResourcesPeer(grpc.GenericRpcHandler):
    """Serves List in `kubelet_dir` with `answer`: bytes, or a function that makes them or aborts.

    `calls` counts the calls of List. Another `method` makes List UNIMPLEMENTED.
    """

    def __init__(self, kubelet_dir: Path, answer: Answer = b"", method: str = LIST) -> None:
        self.socket = kubelet_dir / "pod-resources" / "kubelet.sock"
        self.checkpoint = kubelet_dir / "device-plugins" / "kubelet_internal_checkpoint"
        self.answer = answer
        self.method = method
        self.calls = 0
        self.stopping = threading.Event()
        self._server: grpc.Server | None = None

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != self.method:
            return None
        return grpc.unary_unary_rpc_method_handler(self._list)

    def _list(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        self.calls += 1
        return self.answer(context) if callable(self.answer) else self.answer

    def start(self) -> None:
        self.stopping.clear()
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        server = grpc.server(ThreadPoolExecutor(4), handlers=[self], options=NO_LIMIT)
        assert server.add_insecure_port(f"unix:{self.socket}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Ends as a kubelet does: connections cut, the socket left behind, stale."""
        self.stopping.set()
        if self._server is not None:
            self._server.stop(None).wait()
        self._server = None
        if not self.socket.exists():
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(self.socket))


def serving(
    kubelet_dir: Path, answer: Answer = b"", **options: Any
) -> AbstractAsyncContextManager[PodResourcesPeer]:
    return started(PodResourcesPeer(kubelet_dir, answer, **options))
