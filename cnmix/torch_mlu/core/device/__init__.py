"""Queues and notifiers, as the vendor's ``torch_mlu.core.device`` has them."""

from .notifier import Notifier
from .queue import Queue

__all__ = ["Notifier", "Queue"]
