"""A dump, restored: what waited goes on, and `listener install` brings the rights back."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from listener import install
from listener.catalogue import read_facts
from listener.database import connect
from listener.embedded import Server
from tests.harness import Database, NewDatabase, serving
from tests.test_install import install_in
from tests.test_least_privilege import GRANTS

# What hosters tell their users to restore with.
BARE = ("--no-owner", "--no-privileges")


def restore(server: Server, source: str, target: str, *options: str) -> None:
    """All of one database into an empty one."""
    dump = subprocess.run(
        [server.programs / "pg_dump", *options, source], capture_output=True, check=True
    )
    subprocess.run(
        [server.programs / "psql", "-qX", "-v", "ON_ERROR_STOP=1", target],
        input=dump.stdout,
        capture_output=True,
        check=True,
    )


@pytest.mark.parametrize("options", [(), BARE], ids=["as it was", "bare"])
def test_a_restored_dump_goes_on_where_it_stood(
    database: Database, server: Server, new_database: NewDatabase, options: tuple[str, ...]
) -> None:
    """With what was embedded, what waited, what was parked, and the rights."""
    with serving(database):
        database.insert("pump running hot", "door left open")
        database.wait_for_rest()
    (parked,) = database.insert("parked")
    database.park(parked)
    database.insert("pending")
    rights = sorted(database.rows(GRANTS))

    with new_database() as url:
        restore(server, database.owner.database_url, url, *options)
        settings = replace(database.owner, database_url=url)
        with connect(settings, "listener-test") as conn:
            install_in(conn)
            copy = Database.owned(settings, conn)
            again = install.plan_install(conn, read_facts(conn), None)
            with serving(copy):
                copy.insert("after it")
                copy.wait_for_rest()
            copy.assert_invariant()

            assert again.steps == ()
            assert len(copy.embedded()) == 4
            assert copy.parked() == [parked]
            assert sorted(copy.rows(GRANTS)) == rights
