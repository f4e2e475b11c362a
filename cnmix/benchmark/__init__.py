"""Timed runs as the vendor's model zoo has them: what its variables say, its collector of times, and its log."""

from .collector import MetricCollector, Timer, append_average_log, append_benchmark_log
from .protocol import Plan, make_plan, strategy_count

__all__ = [
    "MetricCollector",
    "Plan",
    "Timer",
    "append_average_log",
    "append_benchmark_log",
    "make_plan",
    "strategy_count",
]
