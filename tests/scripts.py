"""Scripts under ``cnmix run``, for tests."""

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``cnmix run`` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "cnmix", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **env},
    )
