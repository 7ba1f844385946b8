"""A TCP proxy before the test's server, and the ways in which a network fails."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

_CHUNK = 65_536
_LOOK_SECONDS = 0.02
# Closing with a linger of zero seconds sends RST instead of FIN.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class _Link:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket
    is_open: bool = True
    is_black_hole: bool = False

    def reset(self) -> None:
        self.is_open = False
        for end in (self.client, self.server):
            with suppress(OSError):  # closed already
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.close()


@dataclass
class Proxy:
    """Listens on `port` of 127.0.0.1 and forwards to `target_port` until told otherwise."""

    target_port: int
    delay_seconds: float = 0.0
    # Sees what the client sends; True cuts that link once the server has answered, reply unseen.
    swallow_reply_to: Callable[[bytes], bool] | None = None
    # Connections are accepted and closed at once.
    refuses: bool = False
    refused: int = 0
    port: int = 0
    _links: list[_Link] = field(default_factory=list)
    _is_black_hole: bool = False
    _is_closed: bool = False

    def black_hole(self, port: int | None = None) -> None:
        """From now on nothing passes, in either direction, and nobody is told.

        `port`: only on the open connection that the server knows as its client's port.
        """
        self._is_black_hole = port is None
        for link in self._links:
            if link.is_open and port in (None, link.server.getsockname()[1]):
                link.is_black_hole = True

    def heal(self) -> None:
        """New connections pass. Those that fell into the black hole stay there."""
        self._is_black_hole = False

    def reset(self) -> None:
        """RST to both ends of every connection."""
        for link in list(self._links):
            link.reset()

    def serve(self, listening: socket.socket) -> None:
        """Accept until closed; a thread for each connection."""
        while not self._is_closed:
            if not select.select([listening], [], [], _LOOK_SECONDS)[0]:
                continue
            client = listening.accept()[0]
            if self.refuses:
                self.refused += 1
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:  # the server is down
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server, is_black_hole=self._is_black_hole)
            self._links.append(link)
            threading.Thread(target=self._forward, args=(link,), daemon=True).start()

    def _forward(self, link: _Link) -> None:
        swallow = False
        while link.is_open and not self._is_closed:
            if link.is_black_hole:
                time.sleep(_LOOK_SECONDS)
                continue
            try:
                ready = select.select([link.client, link.server], [], [], _LOOK_SECONDS)[0]
                for source in ready:
                    data = source.recv(_CHUNK)
                    if not data or (source is link.server and swallow):
                        link.reset()
                        break
                    if source is link.client and self.swallow_reply_to is not None:
                        swallow = swallow or self.swallow_reply_to(data)
                    time.sleep(self.delay_seconds)
                    other = link.server if source is link.client else link.client
                    if not link.is_black_hole:
                        other.sendall(data)
            except (OSError, ValueError):
                # One end is gone, or was closed under us by reset().
                link.reset()

    def close(self) -> None:
        """Reset what is open and accept no more."""
        self._is_closed = True
        self.reset()


@contextmanager
def proxied(target_port: int) -> Iterator[Proxy]:
    """A proxy on a free port for the length of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        proxy = Proxy(target_port, port=listening.getsockname()[1])
        thread = threading.Thread(target=proxy.serve, args=(listening,), name="proxy")
        thread.start()
        try:
            yield proxy
        finally:
            proxy.close()
            thread.join()
