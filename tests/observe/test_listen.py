"""Where the web side listens when a machine lacks an address family."""

import errno
import os
import socket

import pytest

from vgpu_agent.address import Address
from vgpu_agent.errors import ListenError
from vgpu_agent.observe import listen as listening
from vgpu_agent.observe.listen import listen, listen_when_possible

IPV4_ONLY = "no IPv6 on this machine: metrics are served by IPv4 only"


def without_ipv6(monkeypatch, number: int, at: str) -> None:
    """What a kernel without IPv6 answers: there is no such socket, or no such address."""
    real = socket.socket

    class Socket(real):
        def __init__(self, family=socket.AF_INET, *args, **others):
            if at == "socket" and family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().__init__(family, *args, **others)

        def bind(self, address):
            if self.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().bind(address)

    monkeypatch.setattr(listening.socket, "socket", Socket)


@pytest.mark.parametrize(
    ("number", "at"),
    [(errno.EAFNOSUPPORT, "socket"), (errno.EADDRNOTAVAIL, "bind")],
    ids=["no IPv6 in the kernel", "IPv6 switched off"],
)
async def test_without_ipv6_the_wildcard_is_that_of_ipv4(monkeypatch, caplog, number, at):
    without_ipv6(monkeypatch, number, at)
    caplog.set_level("INFO", "vgpu_agent")
    with await listen_when_possible(Address("::", 0)) as listener:
        host, port = listener.getsockname()
        assert host == "0.0.0.0"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert caplog.messages == [IPV4_ONLY]
    # What is no wildcard was meant as it is, and what is no lack of IPv6 is an error as ever.
    with pytest.raises(ListenError, match=r"VGPU_METRICS_ADDRESS=\[::1\]:0: cannot listen there"):
        listen(Address("::1", 0))


@pytest.mark.parametrize("number", [errno.EADDRINUSE, errno.EACCES, errno.EMFILE])
def test_other_trouble_of_the_ipv6_wildcard_stays_trouble(monkeypatch, number):
    without_ipv6(monkeypatch, number, "socket")
    with pytest.raises(ListenError, match=os.strerror(number)):
        listen(Address("::", 0))


async def test_with_ipv6_nothing_is_said_of_it(caplog):
    caplog.set_level("INFO", "vgpu_agent")
    with await listen_when_possible(Address("::", 0)) as listener:
        said = [] if listener.family == socket.AF_INET6 else [IPV4_ONLY]
        assert caplog.messages == said
