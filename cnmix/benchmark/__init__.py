"""Timed runs as the vendor's model zoo has them: what its variables say, its collector of times, and its log."""

from ..closing import strategy_count
from .collector import MetricCollector, Timer, append_average_log, append_benchmark_log
from .protocol import Plan, make_plan

__all__ = [
    "MetricCollector",
    "Plan",
    "Timer",
    "append_average_log",
    "append_benchmark_log",
    "make_plan",
    "strategy_count",
]
