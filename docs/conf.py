"""The site: `make docs` builds it into out/site, strictly and without a network."""

import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "lorajax"
author = "the lorajax authors"
copyright = "the lorajax authors, Apache-2.0"
with open(HERE.parent / "pyproject.toml", "rb") as _file:
    release = version = tomllib.load(_file)["project"]["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinxcontrib.bibtex",
    "sphinx_copybutton",
    "mathml",
    "reference",
    "generated",
    "notebooks",
]
exclude_patterns = ["_ext"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# Pages are Markdown with formulas between dollars; every heading has an anchor.
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_fence_as_directive = ()

# Notebooks come with their outputs (`make notebooks`) or without any: nothing is executed here, and
# no widgets are asked for from elsewhere.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_merge_streams = True

# Docstrings: Google's form. Single backticks are names and formulas (the role is in reference.py).
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False
default_role = "soft"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# Strict: `-n` asks that every name of ours in a signature leads somewhere. Names of other packages
# would need their inventories from the network.
nitpick_ignore_regex = [("py:.*", r"(?!lorajax\.).*")]

copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.output) > div.highlight pre"

html_theme = "furo"
html_title = "lorajax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_theme_options = {"navigation_with_keys": True}
# Furo asks for no fonts, scripts or pictures from elsewhere; formulas are MathML.
html_math_renderer = "mathml"
