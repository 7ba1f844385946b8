"""A machine with a systemd of its own: a Debian root booted by systemd-nspawn, gone afterwards.

It shares network and kernel with this machine, and nothing that it writes stays. Python and the
packages that the listener needs are this machine's, mounted; the listener is installed from the
wheel.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.harness import wait_until

# python3-venv for the libraries that any Python needs, and where this one is the distribution's.
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3-venv")
_PROGRAMS = ("systemd-nspawn", "debootstrap", "nsenter", "apt-get")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
_ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")

SITE = Path(sysconfig.get_path("purelib"))
DEPENDENCIES = Path("/usr/local/dependencies")
WHEELS = Path("/usr/local/wheels")
_PYTHON = Path("/usr/local/python")


class CanNotBoot(Exception):
    """This machine lacks what it takes; the message says what."""


@dataclass
class Machine:
    """A booted one; `init` is its first process, as this machine numbers it."""

    init: int

    def run(self, *command: str, check: bool = True) -> str:
        """What the command prints, run there as root. Fails the test if the command fails."""
        enter = ("nsenter", "-t", str(self.init), "-m", "-p", "-n", "-u", "-i", "-C")
        finished = subprocess.run(
            [*enter, *_ENVIRONMENT, *command], capture_output=True, text=True, check=False
        )
        assert not check or finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout.strip()

    def shell(self, script: str) -> str:
        """The same for lines of a shell."""
        return self.run("bash", "-euc", script)

    def write(self, path: str, text: str, mode: str = "0600") -> None:
        """Make a file there; without a mode, one that only root can read."""
        self.run("install", "-D", "-m", mode, "/dev/null", path)
        Path(f"/proc/{self.init}/root{path}").write_text(text)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--property", name, "--value", unit)

    def journal(self, unit: str, since: float) -> str:
        """What the unit logged, and systemd about it, since this time in seconds since 1970."""
        return self.run("journalctl", "--output=cat", f"--since=@{since:.6f}", "--unit", unit)


@contextmanager
def booted(wheels: Path) -> Iterator[Machine]:
    """Boot, until the block ends. Raises CanNotBoot."""
    binds = {SITE: DEPENDENCIES, wheels: WHEELS}
    if sys.base_prefix != "/usr":
        binds[Path(sys.base_prefix)] = _PYTHON
    mounts = [f"--bind-ro={source}:{target}" for source, target in binds.items()]
    options = ["--quiet", "--register=no", "--keep-unit", "--volatile=overlay", "--console=pipe"]
    command = ["systemd-nspawn", *options, "-D", str(_root()), *mounts, "/lib/systemd/systemd"]
    with (wheels / "console.log").open("w+") as console:
        nspawn = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            machine = Machine(wait_until(lambda: _systemd_of(nspawn, console.name)))
            wait_until(lambda: _is_up(machine, nspawn, console.name), 60)
            yield machine
            # With the first process of the machine all others end; nothing there is worth a stop.
            os.kill(machine.init, signal.SIGKILL)
            nspawn.wait(30)
        finally:
            nspawn.kill()
            nspawn.wait()


def install_listener(machine: Machine) -> None:
    """A virtual environment in /opt/iot-event-listener with the wheel in it."""
    python = "/usr/bin/python3"
    if sys.base_prefix != "/usr":
        python = f"{_PYTHON}/bin/python3"
        machine.shell(f"echo {_PYTHON}/lib > /etc/ld.so.conf.d/python.conf; ldconfig")
    home = "/opt/iot-event-listener"
    machine.run(python, "-m", "venv", home)
    machine.shell(f"{home}/bin/pip install -q --no-deps --no-index {WHEELS}/*.whl")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = f"{home}/lib/{version}/site-packages/dependencies.pth"
    machine.write(path, f"{DEPENDENCIES}\n", mode="0644")


def _root() -> Path:
    """A minimal Debian or Ubuntu like this machine's own; made once, and kept as it was made."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        raise CanNotBoot(f"takes root and {', '.join(_PROGRAMS)}")
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    root = _CACHE / "iot-event-listener-tests" / "-".join([release, *_PACKAGES])
    if root.exists():
        return root
    unfinished = root.with_name(f"{root.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    packages = f"--include={','.join(_PACKAGES)}"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", packages, release, unfinished, _mirror(release)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise CanNotBoot(f"debootstrap failed: {(made.stdout + made.stderr)[-500:]}")
    return unfinished.rename(root)


def _mirror(release: str) -> str:
    """Where this machine takes its own packages from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    sites = [line.split()[0] for line in listed if line.endswith(f" {release}")]
    if not sites:
        raise CanNotBoot(f"apt names no mirror of {release}")
    return sites[0]


def _systemd_of(nspawn: subprocess.Popen[bytes], console: str) -> int:
    """0 while it has not begun: the first child of nspawn only prepares the machine."""
    _require_running(nspawn, console)
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
    for child in children:
        with suppress(OSError):  # it has ended meanwhile
            if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                return int(child)
    return 0


def _is_up(machine: Machine, nspawn: subprocess.Popen[bytes], console: str) -> bool:
    _require_running(nspawn, console)
    state = machine.run("systemctl", "is-system-running", check=False)
    return state in {"running", "degraded"}


def _require_running(nspawn: subprocess.Popen[bytes], console: str) -> None:
    if nspawn.poll() is not None:
        raise CanNotBoot(f"systemd-nspawn ended: {Path(console).read_text()[-500:]}")
