"""grpclib's protocol with its transport in reach: grpclib itself never closes a connection."""

import asyncio
from typing import Self, cast

from grpclib.protocol import H2Protocol


class Connection(H2Protocol):
    """A connection of a grpclib server or channel that can be cut."""

    transport: asyncio.Transport | None = None

    @classmethod
    def like(cls, base: H2Protocol) -> Self:
        """With the handler and the settings of what grpclib's own factory makes."""
        return cls(base.handler, base.config, base.h2_config)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)

    @property
    def ended(self) -> bool:
        """Whether it was made and is over, or about to be."""
        return self.transport is not None and self.transport.is_closing()

    def abort(self) -> None:
        """Cuts the connection, also where the peer reads nothing."""
        if self.transport is not None:
            self.transport.abort()
