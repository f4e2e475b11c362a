"""The vendor's ``catch_perf``: what each operator of a card takes, with which inputs."""

from . import profiler

__all__ = ["profiler"]
