"""The units as files: the same where they should be, understood by systemd, and shut tight."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from listener.config import Settings
from listener.errors import ConfigError, SchemaError
from listener.health import STALLED_SECONDS

_UNITS = Path(__file__).parents[1] / "systemd"
_PLAIN = _UNITS / "iot-event-listener.service"
_TEMPLATE = _UNITS / "iot-event-listener@.service"
_SWEEP = _UNITS / "iot-event-listener-sweep.service"
_TIMER = _UNITS / "iot-event-listener-sweep.timer"
_SERVICES = (_PLAIN, _TEMPLATE, _SWEEP)
_MOST_EXPOSED = 1.3
_PROGRAM = "opt/iot-event-listener/bin/listener"

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine"
)


def test_the_units_are_those_of_this_page() -> None:
    """None that no test looks at."""
    units = {path for path in _UNITS.iterdir() if path.is_file() and path.suffix != ".md"}
    assert units == {*_SERVICES, _TIMER}


def test_the_template_is_the_plain_unit_but_for_its_name() -> None:
    """What is changed in one is changed in the other."""

    def body(unit: Path) -> str:
        return unit.read_text().partition("\nDescription=")[2].partition("\n")[2]

    assert body(_TEMPLATE) == body(_PLAIN)


def test_the_sweep_has_the_settings_and_the_sandbox_of_the_service() -> None:
    """It is the same program."""

    def shared(unit: Path) -> str:
        return unit.read_text().partition("# --- settings ---")[2].partition("\n[Install]")[0]

    assert shared(_PLAIN)
    assert shared(_SWEEP).strip() == shared(_PLAIN).strip()


@pytest.mark.parametrize("unit", [*_SERVICES, _TIMER], ids=lambda unit: unit.name)
def test_every_line_says_why_it_is_there(unit: Path) -> None:
    """A comment above each directive, or above the lines that belong together with it."""
    unexplained, is_explained = [], False
    for line in unit.read_text().splitlines():
        if not line or line.startswith("["):
            is_explained = False
        elif line.startswith("#"):
            is_explained = True
        elif not is_explained:
            unexplained.append(line)

    assert [line.partition("=")[0] for line in unexplained] == ["Description"]


def directives(unit: Path) -> dict[str, str]:
    """Of each name the last value."""
    lines = [line for line in unit.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize("unit", _SERVICES, ids=lambda unit: unit.name)
def test_no_unit_is_killed_before_the_batch_in_hand_is_finished(unit: Path) -> None:
    """A stop waits as long as the service does for a batch; nor while it waits for a database."""
    found = directives(unit)

    assert found["KillSignal"] == "SIGTERM"
    assert float(found["TimeoutStopSec"]) > Settings().encode_seconds
    assert found["TimeoutStartSec"] == ("1h" if unit == _SWEEP else "infinity")


def test_the_unit_is_started_again_unless_a_human_must_act() -> None:
    """However often it ended, and whatever it ended with but these two."""
    found = directives(_PLAIN)

    assert (found["Restart"], found["StartLimitIntervalSec"]) == ("always", "0")
    needs_a_human = {str(ConfigError.exit_code), str(SchemaError.exit_code)}
    assert set(found["RestartPreventExitStatus"].split()) == needs_a_human
    # Or it would be killed where the endpoint does not even call it stalled.
    assert float(found["WatchdogSec"]) > STALLED_SECONDS


@needs_systemd_analyze
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """No unknown or misplaced directive, no program that isn't there."""
    program = tmp_path / _PROGRAM
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o755)
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    for unit in (*_SERVICES, _TIMER):
        shutil.copy(unit, folder)
    paths = [f"/etc/systemd/system/{unit.name}" for unit in (*_SERVICES, _TIMER)]

    command = ["systemd-analyze", "verify", "--recursive-errors=no", f"--root={tmp_path}", *paths]
    found = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@needs_systemd_analyze
@pytest.mark.parametrize("unit", _SERVICES, ids=lambda unit: unit.name)
def test_the_sandbox_leaves_little_open(unit: Path) -> None:
    """As systemd counts it, from 0 to 10."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)

    assert exposure is not None
    assert float(exposure[1]) <= _MOST_EXPOSED


@pytest.mark.parametrize("unit", _SERVICES, ids=lambda unit: unit.name)
def test_what_a_unit_leaves_on_the_disk_is_closed_to_others(unit: Path) -> None:
    """Reports have texts in them, and a dump of its memory the password, too."""
    found = directives(unit)

    assert (found["UMask"], found["StateDirectoryMode"]) == ("0077", "0700")
    assert found["LimitCORE"] == "0"
