"""How Sphinx builds these pages: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from qnewton_mpi import __version__

project = "qnewton_mpi"
author = "The qnewton_mpi developers"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax with the site, from no other host
    "numpydoc",
    "myst_parser",
    "extension",
]
exclude_patterns = ["_build"]
highlight_language = "none"  # of indented blocks: shell commands, tables that the program prints

myst_enable_extensions = ["amsmath", "dollarmath"]
mathjax3_config = {"chtml": {"matchFontHeight": False, "scale": 1.1}}  # as large as the text around it
# Links to a heading, as GitHub names it.
myst_heading_anchors = 3

# Backticks in docstrings are code, and a link where they name something that is documented.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", r"(collections\.abc|numpy)\..*")]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings tell them, with shapes
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"qnewton_mpi {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_context = {"author": author}
html_show_copyright = False  # the line below every page has it
