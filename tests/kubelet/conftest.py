"""What the tests of the kubelet's side share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kubelet.peers import started
from tests.kubelet_peer import KubeletPeer


@pytest.fixture
async def kubelet(kubelet_dir: Path) -> AsyncIterator[KubeletPeer]:
    """A kubelet that was started; its options are attributes that a test may set at any time."""
    async with started(KubeletPeer(kubelet_dir)) as peer:
        yield peer
