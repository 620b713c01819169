"""Configuration of the documentation: ``make docs`` builds it into ``docs/_build/html``.

Warnings are errors and notebooks are run. The pages work from a file:// address with the network off: nothing in them
is loaded from elsewhere, which ``frames`` checks at the end.
"""

import logging
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import frames
import generated

import mech

# Each kernel would warn that it listens on a local port, and its client say that it runs.
ipython = Path(__file__).parent / "_build" / "ipython"
(ipython / "profile_default").mkdir(parents=True, exist_ok=True)
(ipython / "profile_default" / "ipython_kernel_config.py").write_text('c.IPKernelApp.log_level = "ERROR"\n')
os.environ["IPYTHONDIR"] = str(ipython)
logging.getLogger("traitlets").setLevel(logging.WARNING)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project, author, version, release = "mech", "the authors of mech", mech.__version__, mech.__version__
copyright = f"the authors of mech. Version {release}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_parts", "guide.md"]
nitpicky = True
# Types of other packages (their inventories could only be had over the network) and of inner modules.
nitpick_ignore_regex = [("py:.*", r"(?!mech\.[A-Za-z_]+$).*")]
suppress_warnings = ["mystnb.unknown_mime_type"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("MECH_DOCS_EXECUTION", "force")  # "cache" while writing pages
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of packages about packages that are not there
nb_ipywidgets_js = {}  # they would come from a CDN

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "mech"
html_static_path = ["_static"]
html_css_files = ["docs.css"]
html_js_files = ["docs.js"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def moved(app, docname: str, source: list[str]) -> None:
    """Links to what lies elsewhere in the repository: notebooks are copied in here, the guide is cut into pages."""
    text = source[0].replace("](../notebooks/", "](notebooks/").replace("](../../notebooks/", "](../notebooks/")
    source[0] = re.sub(r"\]\(((?:\.\./)*)guide\.md(#[^)]*)?\)", r"](\1howto/index.md)", text)


def setup(app):
    app.connect("source-read", moved)
    app.connect("builder-inited", generated.write)
    app.connect("autodoc-process-docstring", generated.readable)
    app.connect("autodoc-process-signature", generated.signature)
    app.connect("build-finished", frames.share)
