"""Sphinx configuration: ``nox -s docs``."""

import re
from pathlib import Path

from sphinx.application import Sphinx

from agc import __version__ as release

project = "agc-sam"
author = "The agc-sam authors"
project_copyright = author
version = release
extensions = [
    "autoapi.extension",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "agc-sam"
html_static_path = ["site"]
html_css_files = ["style.css"]
html_search_scorer = str(Path(__file__).parent / "site" / "search.js")
exclude_patterns = ["_build"]
# The adapters' docstrings are read without importing them, since frameworks are large.
autoapi_dirs = ["../adapters"]
autoapi_generate_api_docs = False
autoapi_options = ["members", "imported-members", "show-inheritance"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Napoleon takes words of a type, such as shape, for references, and several classes have a shape.
# What an adapter passes on from the core stands with the core.
suppress_warnings = ["ref.python", "autoapi.python_import_resolution"]
# Attributes in one list, since dataclasses and named tuples would have each described twice.
napoleon_use_ivar = True

PAGES = {
    "conformance/README": "conformance",
    "benchmarks/README": "benchmarks",
    "CONTRIBUTING": "contributing",
}
"""Pages that stand elsewhere in the repository, and their names here."""


def link_to_pages(_app: Sphinx, _document: str, _path: Path, content: list[str]) -> None:
    """Turn links of an included page into links of this site; other files have no page here."""
    text = content[0].replace("(../docs/", "(docs/")
    for file, page in PAGES.items():
        text = text.replace(f"({file}.md", f"(docs/{page}.md")
    content[0] = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|docs/|#)[^)]+\)", r"\1", text)


def setup(app: Sphinx) -> None:
    """Register the function above."""
    app.connect("include-read", link_to_pages)
