"""A real PgBouncer before the test's server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from listener.embedded import Server
from tests.harness import SERVICE_ROLE, free_port, wait_until

# Debian puts it where only administrators look.
_PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(_PROGRAM is None, reason="no pgbouncer on this machine")


@contextmanager
def pooled(
    server: Server, folder: Path, mode: str, *options: str, address: str = "127.0.0.1"
) -> Iterator[int]:
    """PgBouncer in this pool mode, two connections to the server each database; gives its port.

    Where the tests run as root, another account reads `folder`.
    """
    port = free_port()
    ini, users = folder / "pgbouncer.ini", folder / "users.txt"
    users.write_text(f'"postgres" ""\n"{SERVICE_ROLE}" ""\n')
    lines = [
        f"[databases]\n* = host=127.0.0.1 port={server.port}",
        f"[pgbouncer]\nlisten_addr = {address}\nlisten_port = {port}\nunix_socket_dir =",
        f"auth_type = trust\nauth_file = {users}\npool_mode = {mode}",
        "default_pool_size = 2\nignore_startup_parameters = extra_float_digits",
        *options,
    ]
    ini.write_text("\n".join(lines) + "\n")
    # It refuses to run as root.
    account = "nobody" if os.geteuid() == 0 else None
    with (folder / "pgbouncer.log").open("w") as log:
        process = subprocess.Popen(
            [str(_PROGRAM), str(ini)], stdout=log, stderr=subprocess.STDOUT, user=account
        )
    try:
        wait_until(lambda: _accepts(address, port))
        yield port
    finally:
        process.terminate()
        process.wait()


def _accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1).close()
    except OSError:
        return False
    return True
