"""MkDocs hook: adds pages outside docs/ to the site, and keeps links between them and docs/ working."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def repository(config: Any) -> Path:
    return Path(config.config_file_path).parent


def on_files(files: Any, config: Any) -> Any:
    root = repository(config)
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links that cross the border of docs/; those to files that are not in the site become plain text."""
    here = page.file.src_uri
    folder = posixpath.dirname(here if here in OUTSIDE else f"docs/{here}")

    def within_site(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["target"]))
        if folder[:4] == "docs" and path[:5] == "docs/":
            return link[0]
        target = "index.md" if path == "README.md" else path.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            # What leads nowhere stays as it is, so that a strict build refuses it.
            return link["text"] if (repository(config) / path).exists() else link[0]
        return f"[{link['text']}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{link['anchor'] or ''})"

    return LINK.sub(within_site, markdown)
