"""Measurements of the listener, each against a baseline taken in the same run."""
