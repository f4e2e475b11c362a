"""The examples of documents: fenced blocks of Markdown, found in one way for tests, CI and whoever else runs them.

A comment in front of a block, which no reader sees, says what the block does not:

    <!-- ci: NAME -->         a name to find the block by; the command below prints it
    <!-- fragment: WHY -->    the block is no example to run, and why
    <!-- given                what the next block takes as given: Python, which runs before it
    ... -->

    python tests/documents.py README.md train

prints the block that ``ci: train`` names. It needs nothing but Python.
"""

import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+)(?P<language>\w*) *(?P<more>.*)$")
_TITLE = re.compile(r'title="([^"]*)"')
_MARK = re.compile(r"(ci|fragment): *(.*)", re.DOTALL)


@dataclass
class Block:
    """A fenced block.

    Attributes:
        source: its text.
        language: the word behind the fence: python, bash, yaml, text.
        title: of the block, mostly the file's name that it shows; empty where there is none.
        heading: the last one before it.
        line: of the first line of the source in the document, from 1.
        given: Python that runs before it.
        name: what a ``ci`` comment calls it.
        fragment: why it does not run; empty where it does.
        follows: whether nothing stands between it and the block before.
    """

    source: str
    language: str
    title: str
    heading: str
    line: int
    given: str = ""
    name: str = ""
    fragment: str = ""
    follows: bool = False


@dataclass
class _Reader:
    found: list[Block] = field(default_factory=list)
    heading: str = ""
    marks: dict[str, str] = field(default_factory=dict)
    text_between: bool = True

    def comment(self, text: str) -> None:
        text = text.strip()
        if text.startswith("given"):
            self.marks["given"] = self.marks.get("given", "") + text.removeprefix("given") + "\n"
        elif mark := _MARK.fullmatch(text):
            self.marks["name" if mark[1] == "ci" else "fragment"] = mark[2]

    def block(self, opened: re.Match[str], lines: list[str], line: int) -> None:
        title = _TITLE.search(opened["more"])
        source = textwrap.dedent("\n".join(lines)) + "\n"
        marks = {"title": title[1] if title else "", "heading": self.heading, **self.marks}
        self.found.append(Block(source, opened["language"], line=line, follows=not self.text_between, **marks))
        self.marks, self.text_between = {}, False


def blocks(text: str) -> list[Block]:
    """Returns the blocks of a document in Markdown, in order."""
    reader, lines, at = _Reader(), text.splitlines(), 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.lstrip().startswith("<!--"):
            start = at - 1
            while "-->" not in lines[at - 1]:
                at += 1
            comment = "\n".join(lines[start:at])
            reader.comment(comment[comment.index("<!--") + 4 : comment.rindex("-->")])
        elif opened := _FENCE.match(line):
            start = at
            while lines[at].strip() != opened["fence"]:
                at += 1
            reader.block(opened, lines[start:at], start + 1)
            at += 1
        elif line.startswith("#"):
            reader.heading, reader.text_between = line.lstrip("# "), True
        elif line.strip():
            reader.text_between = True
    if "given" in reader.marks:  # checks at the end of a page
        reader.found.append(Block("", "python", "", reader.heading, at, given=reader.marks["given"]))
    return reader.found


def execute(source: str, where: str, namespace: dict[str, Any], line: int = 1) -> None:
    """Runs Python, whose errors name the document and its line."""
    exec(compile("\n" * (line - 1) + source, where, "exec"), namespace)


if __name__ == "__main__":
    path, wanted = sys.argv[1:]
    named = [block.source for block in blocks(Path(path).read_text()) if block.name == wanted]
    if len(named) != 1:
        sys.exit(f"{path} has {len(named)} commands marked <!-- ci: {wanted} -->, and should have one")
    print(named[0], end="")
