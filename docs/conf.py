"""How the documents become a site: `make docs`."""

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "mpips"
author = copyright = "the authors of mpips"
version = release = metadata.version("mpips")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = []
suppress_warnings = []
nitpicky = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
autodoc_class_signature = "mixed"
autodoc_default_options = {"exclude-members": "__new__"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # a colon in "Returns:" is a colon

html_theme = "furo"
html_title = "mpips"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_sphinx = False
html_copy_source = False
