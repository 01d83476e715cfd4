"""Hooks of MkDocs: pages that lie outside of docs/, and links to files of the repository.

README.md is the site's first page, LOG.md and kernels/README.md are pages too. A link to any other
file of the repository leads to a copy of it in the site, so that links are right both there and
where the repository is browsed. A link to what does not exist is left as it is: `--strict` fails.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "LOG.md": "log.md", "kernels/README.md": "develop/kernels.md"}
"""File of the repository -> page of the site."""
COPIES = "files"
"""Folder of the site for copies of files."""
Copy = Callable[[str, str], None]
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
_SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files of the repository into links of the site; code blocks stay."""
    place = page.file.src_uri
    source = _SOURCES.get(place, f"docs/{place}")

    def copy(path: str, target: str) -> None:
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))

    def turn(found: re.Match[str]) -> str:
        return site_link(found[1], source, place, copy)

    parts = _FENCE.split(markdown)
    return "".join(x if x.startswith("```") else _LINK.sub(turn, x) for x in parts)


def site_link(link: str, source: str, place: str, copy: Copy) -> str:
    """Return what a link of a file of the repository is on its page of the site.

    Args:
        link: as it stands in the file.
        source: the file, from the root of the repository.
        place: its page, from the root of the site.
        copy: is called with the path of a file that needs a copy in the site, and of that copy.
    """
    parts = urlsplit(link)
    if parts.scheme or not parts.path:
        return link
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), parts.path))
    if path in PAGES:
        target = PAGES[path]
    elif path.startswith("docs/"):
        target = path.removeprefix("docs/")
    elif (ROOT / path).is_file():
        # As text, also where the name ends in .md: a copy is no page.
        target = f"{COPIES}/{path}{'.txt' * path.endswith('.md')}"
        copy(path, target)
    else:
        return link
    to = posixpath.relpath(target, posixpath.dirname(place) or ".")
    return f"{to}#{parts.fragment}" if parts.fragment else to
