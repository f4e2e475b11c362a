"""Takes what pages link to outside of docs/ into the site, so that one link works there and in the repository.

A page says ``[the script](../examples/plain_pytorch.py)`` as the repository's browser wants it. The site gets a page
for each file that is linked to so: Markdown as it is, code as a block. mkdocs calls the functions by their names.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

FOLDER = "repository"
"""Where files from outside of docs/ stand in the site."""

_LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}
_PICTURES = {".png", ".svg", ".jpg"}
_COMMENT = re.compile(r"^<!--.*?-->\n+", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of the repository that a page links to, and for those that these link to."""
    root = Path(config.docs_dir).parent
    unread = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    taken: set[str] = set()
    while unread:
        source, text = unread.pop()
        targets = {_target(source, link[1], root) for link in _LINK.finditer(text)}
        for target in sorted(targets - taken - {""}):
            if _is_of_the_site(target):
                continue
            taken.add(target)
            suffix = PurePosixPath(target).suffix
            if suffix in _PICTURES:
                files.append(File.generated(config, _uri(target), abs_src_path=str(root / target)))
                continue
            content = (root / target).read_text(encoding="utf-8")
            if suffix == ".md":
                unread.append((target, content))
            else:
                content = f"# {target}\n\n``````{_LANGUAGES.get(suffix, 'text')}\n{content}\n``````\n"
            made = File.generated(config, _uri(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files outside of docs/ into links to their pages, and the links of these back to docs/.

    Comments, which are there for the tests of examples, are left out.
    """
    root, uri = Path(config.docs_dir).parent, page.file.src_uri
    source = uri.removeprefix(f"{FOLDER}/").removesuffix(".md") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}"

    def rewrite(link: re.Match[str]) -> str:
        target = _target(source, link[1], root)
        if not target:
            return link[0]  # mkdocs says that there is no such file
        return f"]({posixpath.relpath(_uri(target), posixpath.dirname(uri))}{link[2] or ''})"

    return _LINK.sub(rewrite, _COMMENT.sub("", markdown) if not uri.startswith(FOLDER) else markdown)


def _target(source: str, link: str, root: Path) -> str:
    """Returns the file that a link of the file ``source`` leads to, from the root; empty where there is none."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if (root / target).is_dir():
        target = f"{target}/README.md"
    return target if (root / target).is_file() and not target.startswith("../") else ""


def _is_of_the_site(target: str) -> bool:
    """Whether mkdocs takes the file by itself; the scripts in docs/ it leaves out."""
    return target.startswith("docs/") and not target.endswith(".py")


def _uri(target: str) -> str:
    """Returns where a file of the repository stands in the site."""
    if _is_of_the_site(target):
        return target.removeprefix("docs/")
    is_as_it_is = PurePosixPath(target).suffix in {".md", *_PICTURES}
    return f"{FOLDER}/{target}" if is_as_it_is else f"{FOLDER}/{target}.md"
