"""What commands leave in REPORTS_DIR: before, steps, after and the undo of each change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

from listener.catalogue import Facts
from listener.config import Settings
from listener.errors import ConfigError
from listener.logs import redact


@dataclass(frozen=True)
class Report:
    """One run of one command; each part is a list of lines."""

    command: str
    before: Sequence[str]
    steps: Sequence[str]
    after: Sequence[str]
    undo: str


def require_reports_dir(settings: Settings) -> None:
    """Raise ConfigError if no report could be written; asked before anything is changed."""
    folder = settings.reports_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"REPORTS_DIR {folder} can't be written ({error.strerror}); name another directory"
        ) from error


def report_path(settings: Settings, now: datetime, command: str, suffix: str) -> Path:
    """Where a report of this command goes."""
    return settings.reports_dir / f"{now:%Y-%m-%dT%H-%M-%S-%f}_{command}.{suffix}"


def write_report(settings: Settings, report: Report) -> Path:
    """Write the report as Markdown, without secrets. Returns its path."""
    now = datetime.now().astimezone()
    parts = [f"# listener {report.command}, {now.isoformat(timespec='seconds')}"]
    sections = {"Before": report.before, "Steps": report.steps, "After": report.after}
    for title, lines in sections.items():
        parts.append(f"## {title}")
        parts.append("\n".join(f"- {' '.join(line.split())}" for line in lines) or "- nothing")
    parts.append(f"## Undo\n\n{report.undo}")
    path = report_path(settings, now, report.command, "md")
    write_page(path, redact("\n\n".join(parts) + "\n", settings.secrets()))
    return path


def write_page(path: Path, text: str) -> None:
    """Raises ConfigError if it can't be written; what the command did is done all the same."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(
            f"REPORTS_DIR {path.parent} can't be written ({error.strerror}); what the command did "
            "is done, but there is no report of it"
        ) from error


def facts_lines(facts: Facts) -> list[str]:
    """The facts that an installation rests on, a line each."""
    key = facts.key.type if facts.key else "missing"
    vector = f"{facts.vector_version} in schema {facts.vector_schema}"
    return [
        f"server: PostgreSQL {facts.server_version // 10000}.{facts.server_version % 10000}",
        f"database: {facts.database} as role {facts.role}",
        f"pgvector: {vector if facts.vector_schema else 'not created'}",
        f"iot_events.id: {key}",
        f"schema listener: {'there' if facts.installed else 'not there'}",
        f"event_embeddings.embedding: {facts.embeddings_type or 'not there'}",
        f"triggers on iot_events: {facts.triggers or 'none'}",
    ]
