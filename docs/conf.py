"""The site, for `make docs`: pages in Markdown, a reference that is made from the docstrings."""

import fastbn

project = "fastbn"
author = "the fastbn maintainers"
copyright = f"2026, {author}"
version = release = fastbn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
]
templates_path = ["_templates"]
myst_heading_anchors = 3
exclude_patterns = ["performance/*.md"]  # what other pages include
nitpicky = True  # a reference that leads nowhere is a warning, and warnings are errors
nitpick_ignore = [("py:func", "numpy.show_config")]

autodoc_typehints = "none"  # the docstrings have the types, with shapes
autodoc_default_options = {"inherited-members": "BatchNorm, OpRun, tuple, object"}
numpydoc_show_class_members = False  # the template of classes lists them

html_theme = "pydata_sphinx_theme"
html_title = "fastbn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"index": [], "fit": [], "performance": [], "benchmarks": []}  # pages without any below them
html_theme_options = {
    "github_url": "https://github.com/fastbn/fastbn",
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
