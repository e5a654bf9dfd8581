"""Sphinx's settings for the site that `make docs` builds (`tests/documentation.py`)."""

project = "lowbit_muon"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
# Dashes alone: quotes in docstrings are mostly those of code.
smartquotes_action = "D"
html_theme = "furo"
html_title = "lowbit_muon"
# Nothing beside the pages: no sources, no index of every name.
html_copy_source = False
html_use_index = False
html_domain_indices = False
# Headings can be linked to, as on forges.
myst_heading_anchors = 3
# A name in backticks in a docstring is a link where the site shows it, and code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
# Lists of our own in place of Sphinx's fields, in which no two arguments can share a description.
napoleon_use_param = False
napoleon_custom_sections = [("Attributes", "params_style")]
# One line for each argument where all of them would not fit one line of a page.
python_maximum_signature_line_length = 80
