"""The documentation: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``."""

import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from gvsl_lightning import __version__

HERE = Path(__file__).parent
TUTORIALS = HERE / "tutorials"

# Sphinx reads nothing above its source folder
shutil.rmtree(TUTORIALS, ignore_errors=True)
TUTORIALS.mkdir()
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy2(notebook, TUTORIALS)

project = "gvsl_lightning"
author = "gvsl_lightning maintainers"
project_copyright = author
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
if not any(TUTORIALS.iterdir()):
    exclude_patterns.append("tutorials.*")
html_theme = "furo"
html_title = f"gvsl_lightning {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# outputs are not in git: a build runs each notebook that has changed since the last one
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 1800
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
# pictures in place of widgets, which need a kernel
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

autosummary_generate = True
add_module_names = False
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what a class of PyTorch says of itself is not ours
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"

# every reference to this package has to resolve; others would need their projects' sites
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!gvsl_lightning\.).*"), (r"py:(class|obj)", r".*\._\w+")]
suppress_warnings = ["toc.excluded"]  # tutorials, where there are no notebooks


def setup(app: Sphinx) -> None:
    """Leave out what named tuples say of their fields, which their docstrings describe."""

    def skip(app: Sphinx, what: str, name: str, member: Any, *_: Any) -> bool | None:
        return True if str(member.__doc__).startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)
