"""Show results, changelog, contributing guide and images in the documentation from their one copy in the repository.

A page links to such a file as on a code-hosting site, by its path from ``docs/``. This hook adds the file to the site
and points the link there. It also prepares the sources for the API reference.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Path in the repository -> path in the site.
PAGES = {
    "scripts/benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
IMAGE_FOLDERS = ("cogview/models/cogview-emoji", "scripts/benchmarks")
_LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)(?=[)#])")


def on_startup(**_: object) -> None:
    """Copy the sources to ``build/api`` as regular packages.

    ``kernels``, ``tokenizers`` and ``vqvae`` are links without ``__init__.py``, which the reader of docstrings ignores.
    """
    sys.path.insert(0, str(ROOT))  # for the reference of commands, where cogview is not installed
    copy = ROOT / "build" / "api"
    shutil.rmtree(copy, ignore_errors=True)
    for folder, _, names in os.walk(ROOT / "cogview", followlinks=True):
        sources = [name for name in names if name.endswith(".py")]
        if sources:
            target = copy / Path(folder).relative_to(ROOT)
            target.mkdir(parents=True)
            (target / "__init__.py").touch()
            for name in sources:
                shutil.copy(Path(folder) / name, target)


def targets() -> dict[str, str]:
    """Return the path in the site of every file that is shown, by its path in the repository."""
    images = {
        f"{folder}/{path.name}": f"images/{path.name}"
        for folder in IMAGE_FOLDERS
        for path in sorted((ROOT / folder).glob("*.png"))
    }
    return PAGES | images


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository to those of ``docs/``."""
    for source, target in targets().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave ``docs/`` to the files that were added."""
    shown = targets()
    sources = {target: source for source, target in shown.items()}
    where = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def point(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(where, match[1]))
        target = shown.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return match[1] if target is None else posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(point, markdown)
