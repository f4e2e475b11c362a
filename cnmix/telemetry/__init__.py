"""What the quantizers of a run decided, when and why, and what its operands look like: a file of lines of JSON."""

from .recorder import Recorder, record
from .rules import STATISTICS, TelemetryRule

__all__ = ["STATISTICS", "Recorder", "TelemetryRule", "record"]
