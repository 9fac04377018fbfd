"""The documentation site: ``make docs`` builds it into ``docs/_build/html``, every warning an error."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # _sources.py

import sae_engine  # noqa: E402 - the installed one

project = "sae-engine"
author = "the sae-engine authors"
project_copyright = author
version = release = sae_engine.__version__

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
    "sphinx_copybutton", "_sources",
]  # fmt: skip
exclude_patterns = ["_build", "README.md"]
nitpicky = False

# Pages are notebooks in MyST's Markdown: what a block prints is printed by the build. `make docs DOCS_EXECUTE=off`
# leaves that out, where tests/test_docs.py has run them.
nb_execution_mode = os.environ.get("DOCS_EXECUTE", "cache")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"sae-engine {release}"
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
