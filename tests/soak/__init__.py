"""The whole thing under load and under faults, for as long as it is told; never part of a test run.

`python -m tests.soak` soaks, `... kills` and `... throughput` measure what a fault costs.
"""
