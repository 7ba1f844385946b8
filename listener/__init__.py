"""Keeps a sentence embedding next to every IoT event in Postgres."""

from importlib.metadata import version

__version__ = version("iot-event-listener")
