"""The web side's socket, which is there before what serves it is loaded."""

import errno
import logging
import socket
from contextlib import ExitStack

import anyio

from vgpu_agent.address import Address
from vgpu_agent.errors import SHORTAGES, ListenError, Once

log = logging.getLogger(__name__)

NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL})
"""Errors of a machine without IPv6, of whatever part it lacks."""


def listen(address: Address) -> socket.socket:
    """A listening socket; at [::] one of IPv6 and IPv4, or of IPv4 where the machine has no IPv6.

    Raises ListenError with the address and the reason.
    """
    try:
        try:
            return _open(address)
        except OSError as error:
            if address.host != "::" or error.errno not in NO_FAMILY:
                raise
            return _open(Address("0.0.0.0", address.port))  # noqa: S104
    except OSError as error:
        raise ListenError(
            f"VGPU_METRICS_ADDRESS={address}: cannot listen there: {error.strerror or error};"
            " set another host:port, or end what uses this one"
        ) from error


def _open(address: Address) -> socket.socket:
    """Not by `socket.create_server`: it takes a machine short of files for one without IPv6."""
    with ExitStack() as undone:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = undone.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
        # asyncio does not see that it is TCP; an answer would wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(64)
        undone.pop_all()
        return listener


async def listen_when_possible(address: Address, *, wait: float = 1.0) -> socket.socket:
    """A listening socket, once the machine has one to give. Raises ListenError as `listen`."""
    trouble = Once(log)
    while True:
        try:
            listener = listen(address)
        except ListenError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in SHORTAGES:
                raise
            trouble.warn(f"{error}; tried again")
        else:
            if ":" in address.host and listener.family == socket.AF_INET:
                log.info("no IPv6 on this machine: metrics are served by IPv4 only")
            return listener
        await anyio.sleep(wait)


def address_of(listener: socket.socket) -> Address:
    """Where it listens, with the port that was found for port 0."""
    return Address(*listener.getsockname()[:2])
