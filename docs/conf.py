"""Sphinx: offline, warnings are errors (`make docs`)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fisher_docs  # noqa: E402

project = "fisher_lab"
author = "fisher_lab contributors"
copyright = "fisher_lab contributors"
extensions = ["myst_parser", "sphinx_gallery.gen_gallery"]
html_theme = "furo"
html_title = "fisher_lab"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = [
    "_build",
    "benchmarks/**",
    "studies/results/**",
    "generated/parts/**",
    "auto_examples/*.md5",
    "gallery/**",
]
# Formulas are plain text (Unicode), so that every page can be read offline and in the terminal.
sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["auto_examples"],
    "image_scrapers": ("fisher_docs",),
    "filename_pattern": r".*\.py",
    "download_all_examples": False,
    "show_memory": False,
    "abort_on_example_error": True,
}


def setup(app):
    """Write the mechanical parts from the registries before the pages are read."""
    app.connect("builder-inited", lambda app: fisher_docs.generate(Path(app.srcdir)), priority=1)
