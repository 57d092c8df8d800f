"""MkDocs hook: pages that lie outside `docs/`, pages of the API, and links that work in both places.

The README is the first page, the README of a bundle the page of that bundle; none is copied into `docs/`.
Links are written for the repository. On the site a link to a module leads to its API page, and a link to a file that
has no page is shown as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "amkd_monai"
FENCE_OR_LINK = re.compile(r"^```.*?^```|\[(?P<text>[^\]\n]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE)
ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?(?:[\w.]*\.)?(\w+)</code>")
"""A reference as docstrings write it, after Markdown has seen its backticks."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in `docs/`."""
    for source in (*ROOT.glob("*.md"), *ROOT.glob("bundles/*/docs/README.md")):
        files.append(File.generated(config, page_of(source), abs_src_path=str(source)))
    for package in (PACKAGE, *sorted(p.parent for p in PACKAGE.glob("*/__init__.py"))):
        files.append(File.generated(config, page_of(package / "__init__.py"), content=api_page(package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    if page.file.abs_src_path is None:
        return markdown
    folder = Path(page.file.abs_src_path).parent

    def rewrite(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target is None or "://" in target or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if not file.exists():
            raise PluginError(f"{page.file.abs_src_path} links to {target}, which is not there.")
        uri = page_of(file)
        if uri is None:
            return text
        if file.suffix == ".py":
            anchor = module_name(file)
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor and '#'}{anchor})"

    return FENCE_OR_LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the roles of docstrings as names."""
    return ROLE.sub(r"<code>\1</code>", html)


def page_of(file: Path) -> str | None:
    """Return the page that shows a file of the repository; None if none does."""
    parts = file.relative_to(ROOT).parts
    if len(parts) == 1 and file.suffix == ".md":
        return "index.md" if parts[0] == "README.md" else parts[0].lower()
    if parts[0] == "docs":
        return "/".join(parts[1:])
    if parts[0] == "bundles" and parts[2:] == ("docs", "README.md"):
        return f"bundles/{parts[1]}.md"
    if parts[0] == PACKAGE.name and file.suffix == ".py":
        return f"api/{parts[1] if len(parts) > 2 else 'index'}.md"
    return None


def api_page(package: Path) -> str:
    """Return a page with the docstrings of a package's modules."""
    found = package.glob("*.py") if package == PACKAGE else package.rglob("*.py")
    modules = sorted(
        module_name(file)
        for file in found
        if not file.name.startswith("_") or (file.parent != package and "\ndef " in file.read_text(encoding="utf-8"))
    )
    return "\n\n".join([f"# {module_name(package)}", *(f"::: {name}" for name in modules)])


def module_name(file: Path) -> str:
    """Return the dotted name of a module's file or a package's folder."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
