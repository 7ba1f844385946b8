"""Behind a transaction pooler neither LISTEN nor session locks hold: the service polls."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from listener.embedded import Server
from tests.harness import (
    SERVICE_ROLE,
    Database,
    TinyEmbedder,
    free_port,
    listener,
    serving,
    wait_until,
)

# Debian puts it where only administrators look.
_PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")

pytestmark = pytest.mark.skipif(_PROGRAM is None, reason="no pgbouncer on this machine")


@pytest.fixture
def pooled(server: Server, database: Database, tmp_path: Path) -> Iterator[Database]:
    """The database as a real PgBouncer in transaction mode shows it, on two connections."""
    port = free_port()
    ini, users = tmp_path / "pgbouncer.ini", tmp_path / "users.txt"
    users.write_text(f'"{SERVICE_ROLE}" ""\n')
    ini.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\n"
        "default_pool_size = 2\nignore_startup_parameters = extra_float_digits\n"
    )
    # It refuses to run as root, and its account can't read a test's own folder.
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    account = "nobody" if os.geteuid() == 0 else None
    with (tmp_path / "pgbouncer.log").open("w") as log:
        process = subprocess.Popen(
            [str(_PROGRAM), str(ini)], stdout=log, stderr=subprocess.STDOUT, user=account
        )
    try:
        wait_until(lambda: _accepts(port))
        name = database.conn.info.dbname
        yield database.with_settings(
            database_url=f"postgresql://{SERVICE_ROLE}@127.0.0.1:{port}/{name}", poll_seconds=0.2
        )
    finally:
        process.terminate()
        process.wait()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_behind_a_transaction_pooler_events_are_found_by_polling(
    pooled: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The NOTIFY that doesn't come back is noticed, said once, and lived without."""
    with serving(pooled, TinyEmbedder()), serving(pooled, TinyEmbedder()):
        for number in range(200):
            pooled.insert(f"event {number}")
        pooled.wait_for_rest()

    assert len(pooled.embedded()) == 200
    pooled.assert_invariant()
    said = [record.message for record in caplog.records]
    assert said.count("notify_does_not_arrive") == 2


def test_behind_a_pooler_no_session_setting_reaches_the_other_clients(pooled: Database) -> None:
    """What the service would set for its own session stays unset there."""
    with serving(pooled):
        pooled.insert("a")
        wait_until(pooled.embedded)

    with pooled.service_session() as other:
        for _ in range(5):
            assert other.execute("show statement_timeout").fetchone() == ("0",)
            assert other.execute("show synchronous_commit").fetchone() == ("on",)


def test_check_names_the_pooler(pooled: Database) -> None:
    """By the NOTIFY that doesn't return, not by its port."""
    output = listener(pooled.settings, "check", check=False).stdout

    assert "pooler" in output
