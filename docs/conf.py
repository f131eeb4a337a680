"""Sphinx configuration: ``nox -s docs``."""

from agc import __version__ as release

project = "agc-sam"
author = "The agc-sam authors"
project_copyright = author
version = release
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "agc-sam"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Napoleon takes words of a type, such as shape, for references, and several classes have a shape.
suppress_warnings = ["ref.python"]
