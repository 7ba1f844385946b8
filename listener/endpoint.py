"""The HTTP side of metrics and health: /metrics, /healthz, /readyz, each request on a thread."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from listener.config import Settings
from listener.errors import ConfigError, ListenerError
from listener.health import STALLED_SECONDS, health
from listener.logs import log

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

# How long a client may take to say what it wants.
_CLIENT_SECONDS = 10.0
# serve_forever would look twice a second whether it shall end; the process ends it.
_NEVER_SECONDS = 86_400.0
# With those of the service.
_MOST_THREADS = 64


def require_metrics() -> None:
    """Raise ConfigError if the extra is missing; imports nothing of it."""
    if find_spec("prometheus_client") is None:
        raise ConfigError(
            "the package prometheus-client is not installed; "
            "pip install 'iot-event-listener[metrics]' or set METRICS_PORT=0"
        )


def start_endpoint(settings: Settings) -> None:
    """Answer on METRICS_HOST and METRICS_PORT from now on, until the process ends.

    Raises ConfigError if the port is taken or the extra is missing, ListenerError if the host is
    none of this machine yet.
    """
    require_metrics()
    from prometheus_client import make_wsgi_app

    from listener.metrics import make_registry

    server = _listen(settings, _application(make_wsgi_app(make_registry(settings))))
    threading.Thread(
        target=server.serve_forever, args=(_NEVER_SECONDS,), name="endpoint", daemon=True
    ).start()
    host, port = settings.metrics_host, settings.metrics_port
    log(logging.INFO, "metrics_served", host=host, port=port)


def _listen(settings: Settings, application: WSGIApplication) -> WSGIServer:
    host, port = settings.metrics_host, settings.metrics_port
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server_class = type("_Server", (_Server,), {"address_family": family})
        return make_server(host, port, application, server_class, _Handler)
    except (OSError, OverflowError, UnicodeError) as error:
        # When a machine starts, a tunnel's address may come later; exit 1 is started again.
        kind = ListenerError if _may_pass(error) else ConfigError
        raise kind(
            f"METRICS_HOST={host} METRICS_PORT={port} can't be listened on ({error}); "
            "name an address of this machine and a free port"
        ) from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    return isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002  the base's
        """Refused where there are many: each has a thread for as long as its client likes."""
        return threading.active_count() < _MOST_THREADS

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that says nothing, or leaves, is worth no traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log(logging.DEBUG, "client_lost", cause=repr(error))
        else:
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        # Without the base class's look-up of the host's name, which may take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class's name
        """A scrape is not worth a line."""


def _application(metrics: WSGIApplication) -> WSGIApplication:
    def application(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        pages: dict[str, Callable[[], tuple[str, str]]] = {"/healthz": _healthz, "/readyz": _readyz}
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start)
        status, text = pages.get(path, _not_found)()
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return application


def _healthz() -> tuple[str, str]:
    if health.is_stalled:
        return "503 Service Unavailable", f"no progress for {STALLED_SECONDS:.0f} s"
    return "200 OK", "ok"


def _readyz() -> tuple[str, str]:
    if not health.is_ready:
        return "503 Service Unavailable", "not ready: no model, no connection, or no progress"
    return "200 OK", "ready"


def _not_found() -> tuple[str, str]:
    return "404 Not Found", "see /metrics, /healthz, /readyz"
