"""Sphinx's settings: `make docs` builds the site, and takes every warning for an error."""

import importlib.metadata

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "cqjax"
author = "the cqjax developers"
copyright = "the cqjax developers, Apache-2.0"
version = release = importlib.metadata.version("cqjax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nitpicky = False

# Docstrings are Google's, with `names` in single backquotes.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
autodoc_type_aliases = {
    name: name
    for name in (
        "Argnums",
        "ArrayLike",
        "Axis",
        "Beta",
        "Factors",
        "Mask",
        "OnAscent",
        "Optimizer",
        "PyTree",
        "Schedule",
        "Signal",
        "ValueFn",
        "lax.PrecisionLike",
        "optax.ScalarOrSchedule",
    )
}
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"cqjax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5d8a", "color-brand-content": "#0b5d8a"},
    "dark_css_variables": {"color-brand-primary": "#6cc0ea", "color-brand-content": "#6cc0ea"},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


# Formulas are MathML, which browsers render without a script from elsewhere.
html_math_renderer = "mathml"


def setup(app):
    """Registers the renderer."""

    def inline(self, node):
        self.body.append(convert(node.astext()))
        raise SkipNode

    def block(self, node):
        formula = convert(node.astext(), display="block")
        self.body.append(f'<div class="formula">{formula}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
