"""``python -m cnmix``: the command ``cnmix``."""

from .cli import main

main()
