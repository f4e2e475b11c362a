"""The documentation: every example runs as it is printed, every page builds, every public name is in the reference.

How the blocks of a page run, in order and in one folder:

- ``python`` runs in one namespace for the page; with a title that ends in .py it is a file instead, as ``yaml`` with a
  title is.
- ``bash`` runs where a page is a tutorial or about migration: the lines that call ``cnmix``. ``<time>`` in one of
  them is the folder of the last run.
- ``text`` that follows at once is what the block prints, with ``...`` for what may be anything.

Tutorials and pages about migration begin with nothing, as their readers do. A block of another page finds a script's
usual objects, fresh for each block, and a checkpoint of theirs: ``given.py`` has them. ``documents.py`` has the
comments that say what a block takes as given beyond these, or why it does not run.
"""

import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from documents import Block, blocks, execute
from given import objects, save_checkpoint

import cnmix.torch_mlu

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_EXAMPLES = [
    page for page in PAGES if any(block.language in {"python", "bash"} for block in blocks(page.read_text()))
]

Command = Callable[..., tuple[Any, str, str]]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Reader:
    """Does what a page shows, block by block.

    Args:
        page: whose blocks.
        command: runs ``cnmix`` as a shell would.
        folder: where files go.
    """

    def __init__(self, page: Path, command: Command, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.page, self.command, self.folder, self.capture = page, command, folder, capture
        self.module = ModuleType("page")
        self.printed = ""
        self.given: dict[str, Any] = {}

    def read(self) -> None:
        is_whole = self.page.parent.name in {"tutorials", "migration"}
        for block in blocks(self.page.read_text()):
            if not is_whole:
                self.give()
            if block.given:
                self.python(block.given, block.line)
            if block.fragment:
                continue
            if block.title.endswith((".py", ".yaml")):
                (self.folder / block.title).write_text(block.source)
            elif block.language == "python":
                self.printed = self.python(block.source, block.line)
            elif block.language == "bash" and is_whole:
                self.printed = self.shell(block)
            elif block.language == "yaml":
                yaml.safe_load(block.source)
            elif block.language == "text" and block.follows:
                self.compare(block)

    def give(self) -> None:
        """Makes a script's objects anew, but for the names that the page has given to others."""
        names, fresh = vars(self.module), objects()
        self.given = {key: value for key, value in fresh.items() if names.get(key) is self.given.get(key)}
        names.update(self.given)

    def python(self, source: str, line: int) -> str:
        self.capture.readouterr()
        execute(source, name(self.page), vars(self.module), line)
        return self.capture.readouterr().out

    def shell(self, block: Block) -> str:
        printed = ""
        for line in block.source.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
            if words[len(variables) : len(variables) + 1] != ["cnmix"]:
                continue
            with pytest.MonkeyPatch.context() as patch:
                for variable in variables:
                    patch.setenv(*variable.split("=", 1))
                arguments = [self.resolve(word) for word in words[len(variables) + 1 :]]
                code, output, errors = self.run_script(arguments) if arguments[0] == "run" else self.command(*arguments)
            assert code == 0, f"{name(self.page)}:{block.line}: {line}\n{output}{errors}"
            printed += output
        return printed

    def run_script(self, arguments: list[str]) -> tuple[int, str, str]:
        """``cnmix run`` becomes the script's process."""
        done = subprocess.run(
            [sys.executable, "-m", "cnmix", *arguments], cwd=self.folder, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    def resolve(self, word: str) -> str:
        """Puts the folder of the last run in the place of ``<time>``, and the one file that a pattern means."""
        if "<time>" in word:
            before = word.partition("<time>")[0]
            word = word.replace("<time>", max(self.folder.joinpath(before).iterdir()).name)
        return word

    def compare(self, block: Block) -> None:
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(block.source, self.printed, flags):
            raise AssertionError(
                f"{name(self.page)}:{block.line} shows\n{block.source}\nand this is printed\n{self.printed}"
            )


@pytest.fixture
def reader(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[Path], Reader]]:
    """Puts a page into a folder with the repository's own beside it, on one thread."""
    for folder in ("recipes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    modules = set(sys.modules)
    emulated = False

    def make(page: Path) -> Reader:
        nonlocal emulated
        if emulated := "torch_mlu" in page.name or page.name == "vendor.md":
            cnmix.torch_mlu.install(cards=1, strict=False, card_name="MLU370")
        save_checkpoint(tmp_path / "checkpoint.pt")
        made = Reader(page, command, tmp_path, capsys)
        monkeypatch.setitem(sys.modules, "page", made.module)
        vars(made.module)["__name__"] = "page"
        return made

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.trace(_method)?` is deprecated")
        # What Lightning thinks of data as small as an example's.
        warnings.filterwarnings("ignore", message="The number of training batches|The .* does not have many workers")
        yield make
    if torch.distributed.is_initialized():  # as an example of several processes left it
        torch.distributed.destroy_process_group()
    if emulated:
        cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name)
def test_examples_run(page: Path, reader: Callable[[Path], Reader]) -> None:
    reader(page).read()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    """mkdocs checks the site's; these are the ones that the repository's browser follows."""
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", re.sub(r"`[^`]*`", "", page.read_text())):
        assert (page.parent / target).exists(), target


def test_pictures_are_drawn_by_the_script_and_described() -> None:
    script = "\n".join(file.read_text() for file in DOCS.glob("drawing/*.py"))
    drawn = set(re.findall(r"^@picture\ndef (\w+)\(", script, re.MULTILINE))
    assert {file.stem for file in DOCS.glob("figures/*.svg")} == drawn
    shown: set[str] = set()
    for page in PAGES:
        for description, file in re.findall(r"!\[([^\]]*)\]\((\S+?)\)", page.read_text()):
            assert len(description) > 30, f"{name(page)} says too little of {file}"
            shown.add(Path(file).name)
    assert shown >= {file.name for file in DOCS.glob("figures/*")}


PUBLIC = (
    "cnmix",
    *(f"cnmix.{module}" for module in ("benchmark", "debug", "huggingface", "inference", "lightning", "telemetry")),
)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference(module: str) -> None:
    reference = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    entries = set(re.findall(r"^::: (\S+)", reference, re.MULTILINE))
    if module in entries:
        return
    found = importlib.import_module(module)
    for public in found.__all__:
        value = getattr(found, public)
        if public == "__version__" or isinstance(value, ModuleType):
            continue
        assert {f"{module}.{public}", f"{value.__module__}.{public}"} & entries, (
            f"{module}.{public} is on no page of docs/api"
        )
