"""The real process on the real pynvml, over four cards of the fake NVML, for a grpcio kubelet."""

from collections import Counter
from pathlib import Path

import pytest

from tests.agent_process import running
from tests.fake_nvml import FakeCard, FakeNvml
from tests.kubelet_peer import KubeletPeer

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-a000000{n}-1111-2222-3333-00000000000{n}" for n in range(4)]
CARDS = [
    FakeCard(uuid, bus=f"00000000:{n + 1:02X}:00.0", memory=24576) for n, uuid in enumerate(UUIDS)
]
SETTINGS = {
    "VGPU_GPU_DRIVER": "nvml",
    "VGPU_SHARING": "time-slicing",
    "VGPU_HEALTH_INTERVAL": "1",
}


def healthy_by_card(devices: list) -> Counter:
    return Counter(device.id.split("::")[0] for device in devices if device.health == "Healthy")


def test_a_reset_class_xid_on_one_of_four_cards_marks_its_ten_vgpus_in_one_update(
    kubelet_dir: Path, fake_nvml: FakeNvml
) -> None:
    fake_nvml.set_cards(*CARDS)
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        running(kubelet_dir, **SETTINGS, **fake_nvml.environment()) as agent,
    ):
        kubelet.wait_list(1)
        assert healthy_by_card(kubelet.lists[0].devices) == dict.fromkeys(UUIDS, 10)

        fake_nvml.xid(UUIDS[2], 79)
        kubelet.wait_list(2)

        assert healthy_by_card(kubelet.lists[1].devices) == {
            uuid: 10 for uuid in UUIDS if uuid != UUIDS[2]
        }
        assert len(kubelet.lists[1].devices) == 40
        # An application's own fault is counted and changes nothing; it was handled when it shows.
        fake_nvml.xid(UUIDS[1], 31)
        agent.wait_line("XID 31")
        assert len(kubelet.lists) == 2
        _, metrics = agent.get("/metrics")
        labels = f'gpu_index="2",gpu_uuid="{UUIDS[2]}"'
        assert f'vgpu_xid_errors_total{{{labels},xid="79"}} 1.0' in metrics
        assert f"vgpu_gpu_healthy{{{labels}}} 0.0" in metrics
        assert agent.end()[0] == 0


def test_a_card_that_fell_off_the_bus_is_whole_again_after_its_reset(
    kubelet_dir: Path, fake_nvml: FakeNvml
) -> None:
    fake_nvml.set_cards(*CARDS)
    settings = {**SETTINGS, "VGPU_RECOVERY_SECONDS": "1"}
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        running(kubelet_dir, **settings, **fake_nvml.environment()) as agent,
    ):
        kubelet.wait_list(1)
        fake_nvml.update(UUIDS[0], lost=True)
        fake_nvml.xid(UUIDS[0], 79)
        kubelet.wait_list(2)
        agent.wait_line("lost: ")

        fake_nvml.update(UUIDS[0], lost=False, epoch=1)

        kubelet.wait_list(3)
        counts = [sum(healthy_by_card(each.devices).values()) for each in kubelet.lists]
        assert counts == [40, 30, 40]


def test_without_any_driver_the_agent_registers_no_device_and_says_what_is_missing(
    kubelet_dir: Path,
) -> None:
    with (
        KubeletPeer(kubelet_dir) as kubelet,
        running(kubelet_dir, **SETTINGS) as agent,
    ):
        kubelet.wait_list(1)
        assert kubelet.lists[0].devices == []
        assert "libnvidia-ml.so.1" in agent.wait_line("no GPU can be used").string
        assert agent.get("/readyz")[0] == 200
