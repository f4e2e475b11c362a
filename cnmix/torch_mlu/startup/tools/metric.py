"""What the scripts of the vendor's model zoo import as ``metric``, from a folder of that zoo."""

from cnmix.benchmark import MetricCollector

__all__ = ["MetricCollector"]
