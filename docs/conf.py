"""Sphinx settings: ``make docs`` writes README, these pages and the experiments into ``build/docs``."""

from __future__ import annotations

from fedpers import __version__

project = "fedpers"
release = __version__
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md", "experiments/*.md", "experiments/**/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "fedpers"
