"""The documentation site builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT, needs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        needs(module)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_part_of_the_documentation_has_a_page(site):
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    sources = {f"{path.stem}.html" for path in ROOT.glob("docs/*.md")}
    bundles = {f"bundles/{path.parent.parent.name}.html" for path in ROOT.glob("bundles/*/configs/metadata.json")}
    packages = {f"api/{path.parent.name}.html" for path in ROOT.glob("amkd_monai/*/__init__.py")}
    assert sources | bundles | packages | {"index.html", "api/index.html"} <= pages


def test_nothing_is_fetched_when_a_page_is_looked_at(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]+src=[\"']?(?:https?:)?//", text) == []
        assert re.findall(r"<link[^>]+href=[\"']?(?:https?:)?//[^>]*", text) == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\([\"']?|@import [\"'])(?:https?:)?//", sheet.read_text("utf-8")) == []


def test_docstrings_are_shown_with_shapes_and_without_roles(site):
    page = (site / "api" / "distillation.html").read_text()
    assert "DistillationOutput" in page and "(B, C, h, w)" in page
    assert ":class:<code>" not in page and ":class:`" not in page


def test_pictures_have_descriptions_and_are_small(site):
    for page in site.rglob("*.html"):
        assert re.findall(r"<img(?![^>]*alt=\"[^\"]+\")[^>]*>", page.read_text()) == [], page
    large = [
        f.name
        for pattern in ("*.svg", "*.jpg", "*.png")
        for f in ROOT.glob(f"docs/{pattern}")
        if f.stat().st_size > 1e5
    ]
    assert large == []
