"""The emulated card: PyTorch's private-use device on the host's memory, in C++.

The library is compiled against the PyTorch that is installed, when a process first asks for the card, and kept in the
user's cache for the next. ``cnmix.torch_mlu.install`` loads it.
"""

from .library import Memory, library
from .sources import build

__all__ = ["Memory", "build", "library"]
