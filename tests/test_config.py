"""Settings: read once, checked, and never a secret in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from listener import config
from listener.config import Settings, load_settings
from listener.errors import ConfigError
from tests.harness import listener
from tests.test_docs import ROOT


def test_an_empty_environment_gives_the_defaults() -> None:
    """Every setting has a sane default."""
    assert Settings.from_environment({"BATCH_EVENTS": " "}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("BATCH_EVENTS", "many", "'many'; it must be a whole number of at least 1"),
        ("BATCH_EVENTS", "0", "'0'; it must be a whole number of at least 1"),
        ("LEASE_SECONDS", "nan", "a number of at least 1"),
        ("LEASE_SECONDS", "1e13", "at least 1 and at most 86400"),
        ("RETRY_SECONDS", "1e308", "at least 0.01 and at most 3600"),
        ("BACKFILL_LAST_N", "9999999999", "at least 0 and at most 2147483646"),
        ("MAX_ATTEMPTS", "1000000", "at least 1 and at most 1000"),
        ("METRICS_PORT", "65536", "at least 0 and at most 65535"),
        ("ENCODE_SECONDS", "0", "a number of at least 1"),
        ("POLL_SECONDS", "0", "a number of at least 0.1"),
        ("NOTIFY", "sometimes", "one of gated, always, never"),
        ("ENGINE", "onnx", "one of auto, torch, openvino"),
        ("PRECISION", "int8", "one of fp32, bf16"),
        ("LOG_FORMAT", "xml", "one of logfmt, json"),
        ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
        ("MODEL_CACHE", "~nobody-has-this-name/x", "no such home directory"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name: str, value: str, says: str) -> None:
    """Subject, finding, remedy."""
    with pytest.raises(ConfigError, match=f"{name} is .*{says}"):
        Settings.from_environment({name: value})


@pytest.mark.parametrize("name", ["POLL_SECONDS", "SWEEP_SECONDS", "ENCODE_SECONDS"])
def test_infinity_is_no_number_of_seconds(name: str) -> None:
    """No wait of the system takes it."""
    with pytest.raises(ConfigError, match=f"{name} is 'inf'"):
        Settings.from_environment({name: "inf"})


@pytest.mark.parametrize("hosts", ["h1,h2", "h1:5432,h2", "h1:5432,h2:5433"])
def test_several_hosts_may_leave_their_ports_out(hosts: str) -> None:
    """As a pair of which one is the primary."""
    url = f"postgresql://u:p@{hosts}/db?target_session_attrs=read-write"

    assert Settings.from_environment({"DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:s3cret@db..example.com/x", "postgresql://u:s3cret@h/x?connect_timeout=10s"],
)
def test_what_the_driver_can_not_use_is_one_clear_line(tmp_path: Path, url: str) -> None:
    """Exit 2: to try again would help nobody."""
    settings = Settings(database_url=url, reports_dir=tmp_path)

    finished = listener(settings, "status", check=False)

    assert finished.returncode == 2
    assert finished.stderr.startswith("listener: a part of DATABASE_URL, or of libpq's own")
    assert "s3cret" not in finished.stderr
    assert "s3cret" not in listener(settings, "check", check=False).stdout


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@ss:w@host/db",
        "nonsense s3cret",
        "postgresql://u:s3cret@h:port/db",
        "postgresql://u:s3cret@h/db?pgbouncer=true",
        "postgresql://u:s3cret%FC@h/db",
    ],
)
def test_a_bad_connection_string_is_not_quoted(url: str) -> None:
    """libpq's complaints would print parts of the password."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({"DATABASE_URL": url})

    assert "s3cret" not in str(caught.value)
    assert "ss:w" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_a_connection_string_looks_like_is_said_whole(tmp_path: Path) -> None:
    """The password of the example is nobody's."""
    settings = Settings(database_url="mysql://u:s3cret@host/db", reports_dir=tmp_path)

    said = listener(settings, "status", check=False).stderr

    assert "write postgresql://user:password@host:5432/database with special" in said
    assert "s3cret" not in said


def test_the_environment_wins_over_the_env_file(tmp_path: Path) -> None:
    """`.env` fills in, never overrides."""
    (tmp_path / ".env").write_text("BATCH_EVENTS=zero\nMAX_ATTEMPTS=none\n")
    settings = Settings(reports_dir=tmp_path)

    # Settings are read in their order, and BATCH_EVENTS comes first.
    finished = listener(settings, "status", check=False, cwd=tmp_path, BATCH_EVENTS="3")

    assert finished.returncode == 2
    assert "MAX_ATTEMPTS is 'none'" in finished.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize(
    ("variables", "env_file", "command"),
    [
        ({}, None, "demo"),
        *(({name: "x"}, None, "run") for name in ("DATABASE_URL", "PGHOST", "PGSERVICE")),
        ({}, "LOG_LEVEL=debug\nDATABASE_URL=postgresql:///x\n", "run"),
        ({}, "  export PGHOST = x\n", "run"),
        ({}, "# DATABASE_URL=x\nDATABASE_URL=\nPGHOST= # x\nPGHOSTNAME=x\n", "demo"),
    ],
)
def test_make_run_is_the_service_where_a_database_is_named_and_the_demo_elsewhere(
    tmp_path: Path, variables: dict[str, str], env_file: str | None, command: str
) -> None:
    """In the environment or in `.env`; the demo would be taken for the service."""
    for name in ("pyproject.toml", "constraints.txt", ".demo"):
        (tmp_path / name).touch()
    if env_file is not None:
        (tmp_path / ".env").write_text(env_file)
    program = tmp_path / "listener"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)

    made = subprocess.run(
        ["make", "-s", "-f", ROOT / "Makefile", "run", f"VENV={tmp_path}", f"BIN={tmp_path}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )

    assert (made.stdout, made.stderr) == (f"{command}\n", "")


def test_an_empty_variable_hides_none_of_the_env_file(tmp_path: Path) -> None:
    """It counts as unset; the command would else take another database."""
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://nobody@127.0.0.1:1/of_the_file\n")
    settings = Settings(database_url="", reports_dir=tmp_path)

    finished = listener(settings, "status", check=False, cwd=tmp_path, PGHOST="192.0.2.1")

    assert finished.returncode == 2
    assert "127.0.0.1" in finished.stderr


def test_an_empty_variable_of_libpq_hides_none_of_the_env_file_either(tmp_path: Path) -> None:
    """An empty PGHOST is the server of this machine, which may be another one."""
    (tmp_path / ".env").write_text("PGHOST=127.0.0.1\nPGPORT=1\n")
    settings = Settings(database_url="", reports_dir=tmp_path)

    finished = listener(settings, "status", check=False, cwd=tmp_path, PGHOST="", PGPORT="")

    assert finished.returncode == 2
    assert "127.0.0.1" in finished.stderr


def test_an_env_file_that_is_a_link_to_nowhere_is_not_none(tmp_path: Path) -> None:
    """The command would else take the database of this machine."""
    (tmp_path / ".env").symlink_to("of-the-service.env")

    finished = listener(Settings(reports_dir=tmp_path), "status", check=False, cwd=tmp_path)

    assert finished.returncode == 2
    assert "can't be read (FileNotFoundError)" in finished.stderr


def test_an_env_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    """Exit 2, and nothing of what is in it."""
    (tmp_path / ".env").write_bytes(b"DATABASE_URL=postgresql://u:s3cr\xfct@h/db\n")

    finished = listener(Settings(reports_dir=tmp_path), "status", check=False, cwd=tmp_path)

    assert finished.returncode == 2
    assert finished.stderr.startswith("listener: .env in the current directory can't be read")
    assert len(finished.stderr.splitlines()) == 1
    assert "s3cr" not in finished.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("DATABASE_URL='postgresql://u:s3cret@h/db\n", "(line 1 is no NAME=value)"),
        ("DATABASE_URL\n", "(line 1 is no NAME=value)"),
        ("# ours\nPGPASSWORD=s3cret\0\n", "(ValueError)"),
    ],
)
def test_an_env_file_with_a_line_that_is_none_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    """To go on without that line could mean to go on with another database."""
    (tmp_path / ".env").write_text(text)

    finished = listener(Settings(reports_dir=tmp_path), "status", check=False, cwd=tmp_path)

    assert finished.returncode == 2
    assert says in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert "s3cret" not in finished.stderr


def test_an_env_file_is_read_as_systemd_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dollar in a password stays one, and a mark at the beginning is none of the first name."""
    (tmp_path / ".env").write_text("PRECISION=bf16\nREPORTS_DIR='a${HOME}b'\n", "utf-8-sig")
    monkeypatch.chdir(tmp_path)
    for name in ("PRECISION", "REPORTS_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    settings = load_settings()

    assert (settings.precision, settings.reports_dir) == ("bf16", Path("a${HOME}b"))


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        (["search", "k\udcfchl"], {}, "an argument is not in UTF-8"),
        (["status"], {"EMBEDDING_MODEL": "/models/k\udcfchl"}, "EMBEDDING_MODEL is not in UTF-8"),
        (["status"], {"DATABASE_URL": "postgresql://u:s3cr\udcfct@h/db"}, "DATABASE_URL is not in"),
        (["status"], {"PGPASSWORD": "s3cr\udcfct", "PGPORT": "1"}, "no connection to Postgres"),
    ],
)
def test_what_is_not_in_utf8_is_one_clear_line(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], says: str
) -> None:
    """Exit 2; a password alone is libpq's, in whatever encoding the server knows it."""
    settings = Settings(reports_dir=tmp_path)

    finished = listener(settings, *arguments, check=False, cwd=tmp_path, **variables)

    assert finished.returncode == 2
    assert finished.stderr.startswith(f"listener: {says}")
    assert "s3cr" not in finished.stderr


def test_settings_do_not_show_the_password() -> None:
    """Whoever prints them by accident."""
    settings = Settings(database_url="postgresql://u:s3cret@h/db")

    assert "s3cret" not in repr(settings)
    assert "s3cret" in settings.secrets()


def test_xdg_cache_home_moves_the_converted_models(tmp_path: Path) -> None:
    """Where MODEL_CACHE is not set."""
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "from listener.config import Settings; print(Settings().model_cache)",
        ],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert shown.stdout.strip() == str(tmp_path / "iot-event-listener")


def test_an_account_without_a_home_has_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a service may be."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)

    assert config._home() == Path("/nonexistent")
