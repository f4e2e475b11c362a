"""The Python of the vendor's documents, block by block, as they print it."""

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "documents"


def blocks(document: str) -> dict[str, str]:
    """Returns a document's blocks by what they are about."""
    parts = re.split(r"^%% (.*)\n", (FOLDER / f"{document}.txt").read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def run(
    document: str, names: list[str], given: dict[str, Any], corrections: dict[str, dict[str, str]] | None = None
) -> None:
    """Runs blocks in one namespace, which starts with what the document takes as given.

    Args:
        document: whose blocks.
        names: of the blocks, in order.
        given: the namespace.
        corrections: of the blocks that are no Python as they are printed: what replaces what.
    """
    of_document = blocks(document)
    for name in names:
        source = of_document[name]
        for wrong, right in (corrections or {}).get(name, {}).items():
            try:
                compile(source, name, "exec")
            except SyntaxError:
                assert wrong in source
                source = source.replace(wrong, right)
            else:
                raise AssertionError(f"{document}, {name!r} runs as it is printed")
        exec(compile(source, f"{document}: {name}", "exec"), given)
