"""Settings: one frozen class, read from the environment and `.env`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

from dotenv import load_dotenv
from dotenv.parser import parse_stream
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from listener.errors import ConfigError

# The numbers in a vector of event_embeddings.
DIMENSION = 384
# As they stand in a connection string.
_PASSWORDS = re.compile(r"//[^/?@]*?:([^/?@]+)@|password=([^&\s]+)")
# listener.page counts one more, in an integer.
MOST_EVENTS = 2**31 - 2
GTE_SMALL = "thenlper/gte-small"
GTE_SMALL_REVISION = "17e1f347d17fe144873b1201da91788898c639cd"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        # What Debian gives an account that has none.
        return Path("/nonexistent")


def _setting(
    default: Any,
    meaning: str,
    *,
    at_least: float = 0,
    at_most: float = math.inf,
    choices: tuple[str, ...] = (),
    is_secret: bool = False,
) -> Any:
    metadata = {"help": meaning, "at_least": at_least, "at_most": at_most, "choices": choices}
    return field(default=default, repr=not is_secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting; the environment variable is the field's name in capitals."""

    database_url: str = _setting(
        "", "Connection string. Empty: libpq's own PG* variables.", is_secret=True
    )
    embedding_model: str = _setting(GTE_SMALL, "Hub name or directory of a 384-D model.")
    embedding_revision: str = _setting(
        GTE_SMALL_REVISION, "Commit of the hub model; not used with a directory."
    )
    engine: str = _setting(
        "auto",
        "auto: OpenVINO where installed and converted, else torch; torch; openvino.",
        choices=("auto", "torch", "openvino"),
    )
    precision: str = _setting(
        "fp32", "fp32, or bf16 with OpenVINO: other vectors.", choices=("fp32", "bf16")
    )
    model_cache: Path = _setting(
        Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "iot-event-listener",
        "Where `listener model convert` keeps what it made.",
    )
    backfill_last_n: int = _setting(
        10_000,
        "Scope of the sweep at start-up and on its timer: the last N events; 0 for none.",
        at_most=MOST_EVENTS,
    )
    batch_events: int = _setting(256, "Most events in one claim.", at_least=1)
    batch_tokens: int = _setting(16384, "Most tokens in one pass of the model.", at_least=1)
    cache_texts: int = _setting(
        10_000, "Texts whose vectors are kept in memory for reuse (about 2 kB each)."
    )
    lease_seconds: float = _setting(
        60.0, "How long a claim holds without a sign of life.", at_least=1, at_most=86_400
    )
    encode_seconds: float = _setting(
        120.0, "A batch that takes longer hangs: the process ends, to be started again.", at_least=1
    )
    max_attempts: int = _setting(
        5, "Attempts after which an event is parked.", at_least=1, at_most=1000
    )
    retry_seconds: float = _setting(
        5.0,
        "Wait after an event's first failure; doubles up to an hour.",
        at_least=0.01,
        at_most=3600,
    )
    poll_seconds: float = _setting(
        15.0, "Look at the queue this often even if no NOTIFY comes.", at_least=0.1
    )
    sweep_seconds: float = _setting(
        900.0, "Repeat the sweep of the last N this often; 0 for never."
    )
    notify: str = _setting(
        "gated",
        "gated: writers NOTIFY only while the service has little to do; always; never: poll only.",
        choices=("gated", "always", "never"),
    )
    metrics_port: int = _setting(
        0,
        "Port of /metrics, /healthz and /readyz; 0 for none. Needs the extra `metrics`.",
        at_most=65535,
    )
    metrics_host: str = _setting("127.0.0.1", "Address that this port is opened on.")
    reports_dir: Path = _setting(Path("_reports"), "Where commands leave their reports.")
    demo_dir: Path = _setting(
        Path("/var/lib/iot-event-listener-demo")
        if os.geteuid() == 0
        else _home() / ".local/share/iot-event-listener",
        "Where the demo keeps its Postgres.",
    )
    log_format: str = _setting("logfmt", "logfmt or json.", choices=("logfmt", "json"))
    log_level: str = _setting(
        "info", "debug, info, warning or error.", choices=("debug", "info", "warning", "error")
    )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read and check all settings; an empty variable counts as unset.

        Raises ConfigError naming the variable, what was found and what is allowed.
        """
        types = get_type_hints(cls)
        values = {
            spec.name: _parse(spec, types[spec.name], environment[spec.name.upper()])
            for spec in fields(cls)
            if environment.get(spec.name.upper(), "").strip()
        }
        settings = cls(**values)
        settings.connection_parameters()
        return settings

    def connection_parameters(self) -> dict[str, Any]:
        """The parts of DATABASE_URL. libpq's complaints quote it, so they are not passed on."""
        try:
            parameters = conninfo_to_dict(self.database_url)
        except (ProgrammingError, UnicodeDecodeError):
            raise ConfigError(
                "DATABASE_URL is not a connection string; write "
                "postgresql://user:password@host:5432/database with special characters of the "
                "password percent-encoded in UTF-8 (@ is %40, : is %3A, / is %2F), and after a ? "
                "only parameters of libpq (pgbouncer=true is none)"
            ) from None
        # A password that isn't encoded ends up in these parts, and they would be quoted in errors.
        astray = any("@" in str(parameters.get(part, "")) for part in ("host", "port", "dbname"))
        # Of several hosts each has its own, and may leave it out.
        ports = str(parameters.get("port", "")).replace(",", "")
        if astray or (ports and not ports.isdigit()):
            raise ConfigError(
                "DATABASE_URL has a port that is no number or an @ too many; percent-encode the "
                "special characters of the password (@ is %40, : is %3A, / is %2F)"
            )
        return parameters

    def secrets(self) -> set[str]:
        """Every form of a password that a message could carry: bare, as in a URL, as in a repr."""
        parameters = self.connection_parameters()
        found = {str(parameters.get(name, "")) for name in ("password", "sslpassword")}
        found.add(os.environ.get("PGPASSWORD", ""))
        forms = {
            form
            for bare in found
            for form in (bare, quote(bare, safe="", errors="surrogateescape"), repr(bare)[1:-1])
        }
        forms |= {form for pair in _PASSWORDS.findall(self.database_url) for form in pair}
        return {form for form in (self.database_url, *forms) if form}


def load_settings() -> Settings:
    """Settings from the environment, then from `.env` in the current directory.

    Raises ConfigError if a setting is out of range or `.env` can't be read.
    """
    try:
        _load(Path.cwd() / ".env")
    # Also what is not in UTF-8, or has a zero byte.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f".env in the current directory can't be read ({type(error).__name__}); it must be a "
            "file in UTF-8 that this account may read"
        ) from None
    return Settings.from_environment(os.environ)


def _load(path: Path) -> None:
    # A link to nowhere is not none: whoever made it means a file.
    if not path.exists() and not path.is_symlink():
        return
    text = path.read_text("utf-8-sig")
    # python-dotenv would skip the line with a warning, and it may be the one of DATABASE_URL.
    lines = list(parse_stream(StringIO(text)))
    if wrong := [
        one.original.line for one in lines if one.error or (one.key and one.value is None)
    ]:
        raise ConfigError(
            f".env in the current directory can't be read (line {wrong[0]} is no NAME=value); most "
            "often a quote is not closed"
        )
    # Or an empty variable would win over the file's, and another database be taken.
    ours = {spec.name.upper() for spec in fields(Settings)}
    for name in [name for name, value in os.environ.items() if not value.strip()]:
        if name in ours or name.startswith("PG"):
            del os.environ[name]
    # As systemd reads it: a $ in a password is a $.
    load_dotenv(stream=StringIO(text), override=False, interpolate=False)


def expanded(name: str, path: str) -> Path:
    """The path that the setting `name` means. Raises ConfigError if its `~` is nobody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name} is {path!r}; no such home directory is known here") from None


def is_utf8(text: str) -> bool:
    """Whether it was UTF-8 before Python read it from the environment or the command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(spec: Field[Any], kind: type, raw: str) -> Any:
    name, text = spec.name.upper(), raw.strip()
    if not is_utf8(text):
        raise ConfigError(f"{name} is not in UTF-8")
    if kind is Path:
        return expanded(name, text)
    if kind is str:
        choices = spec.metadata["choices"]
        if choices and text not in choices:
            raise ConfigError(f"{name} is {text!r}; it must be one of {', '.join(choices)}")
        return text
    at_least, at_most = spec.metadata["at_least"], spec.metadata["at_most"]
    noun = "a whole number" if kind is int else "a number"
    limits = f"{at_least}" if at_most == math.inf else f"{at_least} and at most {at_most}"
    complaint = f"{name} is {text!r}; it must be {noun} of at least {limits}"
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(complaint) from None
    # NaN is in no range.
    if not at_least <= value <= at_most or value == math.inf:
        raise ConfigError(complaint)
    return value
