"""Whatever NVML answers becomes a value that the node takes."""

import errno
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nodes import new_node
from vgpu_agent.errors import SHORTAGES, DriverError
from vgpu_agent.gpu.nvml import calls
from vgpu_agent.gpu.nvml.session import Found, Session
from vgpu_agent.model.devices import Excluded
from vgpu_agent.model.facts import EVENTS
from vgpu_agent.model.health import Probed
from vgpu_agent.model.rules import MpsLimits, SharingRules
from vgpu_agent.model.snapshot import Driver
from vgpu_agent.observe.report import to_json
from vgpu_agent.observe.reporting import make_report

pytestmark = pytest.mark.slow

CODES = [
    value
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_") and isinstance(value, int)
]
errors = st.sampled_from(CODES).map(pynvml.NVMLError) | st.sampled_from(
    [
        ValueError("odd"),
        UnicodeDecodeError("utf-8", b"\xf8", 0, 1, "odd"),
        OSError(5, "odd"),
        IndexError("a list longer than there is room for"),
    ]
)
nvml_errors = st.sampled_from(CODES).map(pynvml.NVMLError)
small, wide = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
texts = st.binary(max_size=96) | st.text(max_size=40) | st.sampled_from(["", "N/A", "::"])
handles = st.binary(min_size=8, max_size=8)


def pair(*fields: str) -> st.SearchStrategy[SimpleNamespace]:
    return st.builds(SimpleNamespace, **dict.fromkeys(fields, wide))


ANSWERS = {
    "nvmlDeviceGetHandleByIndex": handles,
    "nvmlDeviceGetUUID": texts | st.sampled_from(["GPU-a", "GPU-b"]),
    "nvmlDeviceGetName": texts,
    "nvmlDeviceGetPciInfo": st.builds(SimpleNamespace, busId=texts),
    "nvmlDeviceGetMemoryInfo": pair("total", "reserved", "used"),
    "nvmlDeviceGetCudaComputeCapability": st.tuples(small, small),
    "nvmlDeviceGetMigMode": st.tuples(small, small),
    "nvmlDeviceGetTotalEccErrors": wide,
    "nvmlDeviceGetTotalEnergyConsumption": wide,
    "nvmlDeviceGetComputeMode": small,
    "nvmlDeviceGetRemappedRows": st.tuples(small, small, small, small),
    "nvmlDeviceGetFieldValues": st.tuples(
        st.builds(
            SimpleNamespace,
            nvmlReturn=st.sampled_from([0, *CODES]),
            value=st.builds(SimpleNamespace, uiVal=small),
        )
    ),
}
PROCESSES = st.lists(st.builds(SimpleNamespace, pid=small, usedGpuMemory=st.none() | wide))
ANSWERS |= {
    f"nvmlDeviceGet{kind}RunningProcesses_{version}": PROCESSES
    for kind in ("Compute", "MPSCompute")
    for version in ("v2", "v3")
}
EVENT_ANSWERS = {
    "nvmlEventSetCreate": handles,
    "nvmlEventSetFree": st.none(),
    "nvmlDeviceGetSupportedEventTypes": wide,
    "nvmlDeviceRegisterEvents": st.none(),
    "nvmlEventSetWait_v2": st.builds(
        SimpleNamespace, device=handles, eventType=st.sampled_from([0, 8, 0x8000]), eventData=wide
    ),
}


def a_session() -> Session:
    def describe(index: int, uuid: str, gpu: calls.Asked):
        return calls.describe(index, uuid, gpu, numa_root=Path("/nowhere"))

    return Session(
        describe=describe,
        proc_root=Path("/nowhere"),
        reopen_seconds=30,
        wait_seconds=2,
        monotonic=lambda: 0.0,
    )


def answering(data: st.DataObject, stack: ExitStack) -> None:
    for name, answer in (ANSWERS | EVENT_ANSWERS).items():
        fails = nvml_errors if name in EVENT_ANSWERS else errors

        def ask(*_: object, drawn=answer | fails, **__: object) -> object:
            found = data.draw(drawn)
            if isinstance(found, Exception):
                raise found
            return found

        stack.enter_context(patch.object(pynvml, name, ask))


@given(
    st.data(),
    st.builds(SharingRules, mps=st.booleans(), mps_limits=st.sampled_from(list(MpsLimits))),
)
@settings(max_examples=150, deadline=None)
def test_whatever_nvml_answers_becomes_a_value_that_the_node_takes(data, rules):
    session, node = a_session(), new_node(sharing=rules)
    with ExitStack() as stack:
        answering(data, stack)
        for _ in range(3):
            looked = {index: session.look(index, lambda _: None) for index in range(3)}
            assert all(
                each is None or isinstance(each, Found | Excluded) for each in looked.values()
            )
            scan = session.scanned("1", looked, data.draw(st.just({}) | st.just({3: "name"})))
            readings = {gpu.uuid: session.probe(gpu.uuid) for gpu in scan.gpus}
            events = {uuid: (Probed(reading),) for uuid, reading in readings.items()}
            node.driver_looked(Driver("1", None), scan, events)
            for uuid in session.wait(lambda _: None):
                session.register(uuid, lambda _: None)
            session.wait(lambda _: None)
            node.driver_events(session.events.take())
            inventory = node.snapshot.inventory
            assert len(set(inventory.device_ids)) == sum(each.replicas for each in inventory.gpus)
            assert all(map(inventory.gpu_of, inventory.device_ids))
            for gpu in scan.gpus:
                assert (found := session.processes(gpu.uuid)) is None or isinstance(found, tuple)
            assert all(
                (share := each.share_bytes(1)) is None or share >= 2**20 for each in inventory.gpus
            )
            assert to_json(make_report(node.snapshot, node.rules, 0.0))
            missing = {what for of in node.snapshot.missing.values() for what in of}
            assert missing <= {EVENTS, *map(calls.subject, QUESTIONS)}


QUESTIONS = (
    calls.remapped_rows,
    calls.ecc_errors,
    calls.recovery_action,
    calls.compute_mode,
    calls.energy,
)


@given(nvml_errors, errors)
def test_opening_raises_what_is_documented_and_nothing_else(nvml_error, error):
    calls_ = {"nvmlInit": nvml_error, "nvmlDeviceGetCount": error}
    for name, raised in (calls_ | {"nvmlSystemGetDriverVersion": nvml_error}).items():
        session = a_session()
        with ExitStack() as stack:
            for each in ("nvmlInit", "nvmlShutdown", "nvmlSystemGetDriverVersion"):
                stack.enter_context(patch.object(pynvml, each, lambda: "1"))
            stack.enter_context(patch.object(pynvml, "nvmlDeviceGetCount", lambda: 1))
            stack.enter_context(patch.object(pynvml, name, side_effect=raised))
            with pytest.raises(DriverError):
                session.open()


@pytest.mark.parametrize("count", [257, 2**32 - 1])
def test_more_gpus_than_can_be_are_none(monkeypatch, count):
    for name, answer in (("nvmlInit", None), ("nvmlShutdown", None), ("nvmlDeviceGetCount", count)):
        monkeypatch.setattr(pynvml, name, lambda answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "1")
    with pytest.raises(DriverError, match=f"it counts {count}; 256 are possible"):
        a_session().open()


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ((7, 2, 1), (7, 2, 1)),
        ((7, 2**64 - 1, 2**64 - 1), (7, 0, None)),
        ((2**64 - 1, 2, 2**64 - 1), (None, 2, None)),
    ],
)
def test_memory_that_is_not_available_is_no_number(monkeypatch, info, expected):
    answer = SimpleNamespace(**dict(zip(("total", "reserved", "used"), info, strict=True)))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda *_, **__: answer)
    assert calls.memory(None) == expected


def test_what_cannot_be_read_for_want_of_descriptors_is_as_it_was(monkeypatch, tmp_path):
    """Neither is a session given up, nor a NUMA node taken back."""
    (tmp_path / "0000:3b:00.0").mkdir()
    now, opened = [0.0], []
    session = Session(
        describe=lambda *_: None,
        proc_root=tmp_path,
        reopen_seconds=30,
        wait_seconds=2,
        monotonic=lambda: now[0],
    )
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: opened.append(now[0]))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "1")
    for code in (None, errno.EMFILE, errno.ENFILE, None, errno.EACCES):
        with monkeypatch.context() as patched:
            if code is not None:
                fail = Mock(side_effect=OSError(code, "odd"))
                patched.setattr(Path, "iterdir", fail)
                patched.setattr(Path, "read_text", fail)
            session.open()
            now[0] += 31
            if code in SHORTAGES:
                with pytest.raises(OSError, match="odd"):
                    calls.numa_node(tmp_path)
            else:
                assert calls.numa_node(tmp_path) is None
    assert opened == [0, 124]
