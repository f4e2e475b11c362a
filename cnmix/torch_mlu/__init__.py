"""The vendor's package ``torch_mlu``, emulated: scripts that ask for an MLU run where there is none.

``cnmix run SCRIPT`` runs one with it in place; from code, ``cnmix.torch_mlu.install()`` does, before anything imports
``torch_mlu``. Importing this module changes nothing.
"""

from .installation import install, is_installed

__all__ = ["install", "is_installed"]
