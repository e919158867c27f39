"""Sphinx: offline, warnings are errors (`make docs`)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import docstrings  # noqa: E402
import fisher_docs  # noqa: E402
import running  # noqa: E402

project = "fisher_lab"
author = "fisher_lab contributors"
copyright = "fisher_lab contributors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "fisher_lab"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = [
    "_build",
    "benchmarks/**",
    "studies/results/**",
    "generated/parts/**",
    "auto_examples/*.md5",
    "gallery/**",
]

# A name in single backticks is a link where it is one of ours, and code where it is not.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 120
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["auto_examples"],
    "image_scrapers": ("fisher_docs",),
    "filename_pattern": r".*\.py",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # its page would load scripts from elsewhere
    "abort_on_example_error": True,
}


def setup(app):
    """Write the mechanical parts from the registries before the pages are read."""
    # one file with the glyphs in it: from a disk, browsers do not load fonts of another folder
    app.config.mathjax_path = "mathjax/tex-svg.js"
    app.connect("builder-inited", lambda app: fisher_docs.generate(Path(app.srcdir)), priority=1)
    # before napoleon, which has 500
    app.connect("autodoc-process-docstring", docstrings.to_markup, priority=400)
    app.connect("autodoc-process-docstring", fisher_docs.with_formula, priority=450)
    app.connect("source-read", running.insert_results)
