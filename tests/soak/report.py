"""The report of a soak, in Markdown, without host names, paths or ports."""

from __future__ import annotations

import re
from pathlib import Path

from bench.report import Section
from tests.soak import checker
from tests.soak.chaos import FAULTS
from tests.soak.recovery import BURST_EVENTS, LIMIT_SECONDS, p50_and_max
from tests.soak.soak import Soak

_TAIL_LINES = 40

_INTRODUCTION = """\
Three workers, four writers, one server, and something breaks every few seconds; the invariants \
are looked at meanwhile. `python -m tests.soak` makes this report."""


def problems(soak: Soak) -> dict[str, int]:
    """What must all be zero, by name."""
    found = soak.checker.findings
    return {
        "events lost": found.count(checker.LOST),
        "stale embeddings": found.count(checker.STALE),
        "embeddings without an event": found.count(checker.ORPHAN),
        "duplicate embeddings": found.count(checker.DUPLICATE),
        "embeddings gone back to an older text": found.count(checker.GONE_BACK),
        "embeddings of a text never committed": found.count(checker.UNKNOWN_TEXT),
        "poison events not parked at the end": found.count(checker.UNPARKED),
        "good events parked": found.count(checker.GOOD_PARKED),
        "writer errors": len(soak.tally.errors),
        "connections idle in a transaction": len(soak.watcher.in_transaction),
        f"faults not recovered from in {LIMIT_SECONDS:.0f} s": len(soak.chaos.recoveries.overdue()),
        "workers that ended by themselves": len(soak.workers.endings),
        "workers that didn't leave with exit code 0": sum(
            code != 0 for code in soak.codes.values()
        ),
        "drain not complete": int(soak.drain_seconds is None),
        "errors of the harness": len(soak.failures()),
    }


def markdown(soak: Soak) -> str:
    """The whole report."""
    parts = [
        "# Soak",
        _INTRODUCTION,
        soak.machine,
        _verdict(soak).markdown(),
        _work(soak).markdown(),
        _faults(soak).markdown(),
    ]
    if any(problems(soak).values()):
        parts.append(_evidence(soak))
    return _anonymous("\n\n".join(parts) + "\n", soak)


def write_report(text: str, path: Path) -> None:
    """Replace the last report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _verdict(soak: Soak) -> Section:
    return Section(
        "What must be zero",
        f"{soak.checker.looks} looks, each in one repeatable-read snapshot, the slowest "
        f"{soak.checker.slowest_seconds:.1f} s; the last one at rest.",
        ("", "count"),
        tuple((name, str(count)) for name, count in problems(soak).items()),
    )


def _work(soak: Soak) -> Section:
    counts, minutes = soak.tally.counts, soak.seconds / 60
    events, embeddings, written, texts = soak.totals
    drain = "not complete" if soak.drain_seconds is None else f"{soak.drain_seconds:.1f} s"
    rows = {
        "duration": f"{minutes:.1f} min{', cut short' if soak.is_cut_short else ''}",
        "seed": str(soak.plan.seed),
        "inserted by writers": str(counts["inserted"]),
        "inserted in bursts before faults": str(soak.chaos.counts.total() * BURST_EVENTS),
        "updated": str(counts["updated"]),
        "deleted": str(counts["deleted"]),
        "transactions rolled back": str(counts["rolled back"]),
        "texts in all": str(texts),
        "embeddings written": str(written),
        "events at the end": str(events),
        "embeddings at the end": str(embeddings),
        "worker starts": str(soak.workers.starts),
        "most pending at once": str(soak.watcher.most_pending),
        "longest wait of a pending event": f"{soak.watcher.longest_wait_seconds:.1f} s",
        "slowest statement of a writer": f"{soak.tally.slowest_seconds:.1f} s",
        "writers cut by the harness": str(soak.tally.excused),
        "drain after the last fault": drain,
    }
    parked = [
        f"parked at the end: {count} with “{' '.join(error.split())}”"
        for error, count in soak.parked
    ]
    return Section(
        "What was done",
        "Writers insert one by one, in batches and by COPY, update texts and other columns, "
        "delete, insert again with the same id, roll back, and commit ids out of order. The "
        "workers have a model that costs next to nothing, leases of 10 s, polls of 60 s and no "
        "sweep.",
        ("", "value"),
        tuple(rows.items()),
        (
            "the longest wait counts from the begin of the writer's transaction, some of which are "
            "held open for seconds on purpose, one kind of fault for 25 s",
            "the slowest statement includes the locks that some faults take",
            *parked,
        ),
    )


def _faults(soak: Soak) -> Section:
    recoveries = soak.chaos.recoveries
    rows = []
    for fault in FAULTS:
        struck = soak.chaos.counts[fault.kind]
        alone, among = (recoveries.seconds(fault.kind, alone=alone) for alone in (True, False))
        rows.append((fault.kind, str(struck), *p50_and_max(alone), *p50_and_max(among)))
    total = str(soak.chaos.counts.total())
    alone, among = (recoveries.seconds(alone=alone) for alone in (True, False))
    rows.append(("all", total, *p50_and_max(alone), *p50_and_max(among)))
    return Section(
        "Faults and recovery",
        f"A burst of {BURST_EVENTS} events up to 60 ms before each fault. Recovery is the time "
        "until the last of them has its vector, from the fault; from the server's being up again "
        "where it was down, from the lock's release where there was one.",
        ("fault", "times", "p50 s", "max s", "p50 s, amid another", "max s, amid another"),
        tuple(rows),
        (
            "amid another: while a fault that lasts (SIGSTOP, black hole, latency, an open "
            "transaction) was under way as well",
        ),
    )


def _evidence(soak: Soak) -> str:
    blocks = {
        "Offending events": "\n\n".join(soak.checker.findings.evidence),
        "Writer errors": "\n".join(soak.tally.errors[:10]),
        "Idle in transaction": "\n".join(soak.watcher.in_transaction[:10]),
        "Not recovered from": "\n".join(map(str, soak.chaos.recoveries.overdue())),
        "Workers that ended": "\n\n".join(
            f"{ending.worker}, code {ending.code}:\n{ending.tail}"
            for ending in soak.workers.endings[:5]
        ),
        "Exit codes": "\n".join(f"{name}: {code}" for name, code in soak.codes.items()),
        "Errors of the harness": "\n".join(soak.failures()),
        **{f"Log of {worker.name}": worker.tail(_TAIL_LINES) for worker in soak.workers.all},
    }
    sections = [f"### {title}\n\n```\n{text}\n```" for title, text in blocks.items() if text]
    return "\n\n".join(["## Evidence", *sections])


def _anonymous(text: str, soak: Soak) -> str:
    repository = str(Path(__file__).parents[2])
    text = text.replace(str(soak.ground.cluster.folder), "FOLDER").replace(repository, "REPOSITORY")
    text = re.sub(r"\bport \d+", "port PORT", text)
    text = re.sub(r"PGSQL\.\d+", "PGSQL.PORT", text)
    text = re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", text)
    return re.sub(r'(?<=[\s"])/[\w./-]+/([\w.-]+)', r"\1", text)
