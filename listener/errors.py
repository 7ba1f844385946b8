"""The error tree. A class says what happens next, never only what went wrong.

ListenerError            one clear line on stderr
├── ConfigError       exit 2: a setting or the model; a human must act
├── SchemaError       exit 3: something that `listener install` or the owner provides is missing
├── SweepGivenUp      exit 2: `run --once` ends without having seen all of the last N
├── ConnectionLost    back off, connect again, LISTEN, drain
│   ├── StatementTimeout  try less at a time where that can help, else the same
│   └── LostOverEvents    the same; several times over one event make it a suspect
├── EmbeddingError    one event's fault: try it again later, in the end park it
├── ModelFault        the model's fault: nothing is parked, leases are given back, wait
└── EncoderLost       exit 1: a hung model, a failed GPU; the process ends, to be started again
"""

from __future__ import annotations

from collections.abc import Sequence

from listener.claim import EventId

READ_ONLY = (
    "the server is read-only: a standby, a failed-over primary, or default_transaction_read_only "
    "is on"
)


class ListenerError(Exception):
    """Base of all errors whose message is written for the operator."""

    exit_code = 1


class ConfigError(ListenerError):
    """A setting, the model or the reach of the database must be put right by a human."""

    exit_code = 2


class SchemaError(ListenerError):
    """The database's objects or rights are not what the listener needs."""

    exit_code = 3


class SweepGivenUp(ListenerError):
    """Not all of the last N could be looked at; the service would try again at the next sweep."""

    exit_code = 2


class ConnectionLost(ListenerError):
    """The connection is gone or the server can't serve now; a new connection may work.

    A command that isn't the service ends with it; then reaching the database is a matter of
    configuration.
    """

    exit_code = 2


class StatementTimeout(ConnectionLost):
    """The server gave a statement up that ran for too long; the connection is as it was."""


class LostOverEvents(ConnectionLost):
    """Lost within a statement that reads the texts of events or stores their vectors.

    `event_ids` is empty where the statement was to find them.
    """

    def __init__(self, message: str, event_ids: Sequence[EventId]) -> None:
        super().__init__(message)
        self.event_ids = event_ids


class EmbeddingError(ListenerError):
    """This one event can't be embedded; its batch mates can."""


class ModelFault(ListenerError):
    """The model fails on a known text too, or gives another shape; no event is to blame."""


class EncoderLost(ListenerError):
    """The model doesn't return, or its GPU has failed; only a new process can go on.

    The events in hand keep their lease, so that the one to blame is found as one that kills is.
    """
