"""Reads the logs of timed runs."""

import json
from pathlib import Path
from typing import Any


def records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a log, one after the other without a comma, as the vendor's scripts append them."""
    text, found = path.read_text(), []
    while text.strip():
        record, end = json.JSONDecoder().raw_decode(text)
        found.append(record)
        assert text[end] == "\n"
        text = text[end + 1 :]
    return found
