"""The import rules of the package, and its public names."""

import ast
import graphlib
import pathlib
import re

import pytest

import cqjax

ROOT = pathlib.Path(cqjax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EXPERIMENTS = sorted((ROOT.parent / "experiments").rglob("*.py"))
FLOORS = (
    "linalg",
    "program",
    "frameworks",
    "capture",
    "solves",
    "transforms",
    "back_matching",
    "chains",
    "aliases",
    "layerwise_aliases",
    "losses",
    "training",
    "nnx",
    "diagnostics",
)
"""A module may import from its own floor and from those before it."""
FLAX = ("frameworks/linen.py", "frameworks/nnx_modules.py", "nnx.py", "training.py")
"""What may import Flax."""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path):
    return str(path.relative_to(ROOT if path.is_relative_to(ROOT) else ROOT.parent))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if floor == "__init__":
        return
    for module in imports(path):
        if module.startswith("cqjax."):
            assert FLOORS.index(module.split(".")[1]) <= FLOORS.index(floor), module
        if module.startswith("cqjax.transforms.") and floor == "transforms":
            raise AssertionError(f"transforms import one another: {module}")


def test_imports_go_in_no_circle():
    """Files can be put in an order in which each imports only those before it."""
    names = {".".join(("cqjax", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES}
    graph = {}
    for path in FILES:
        if path.name != "__init__.py":
            own = ".".join(("cqjax", *path.relative_to(ROOT).with_suffix("").parts))
            graph[own] = {module for module in imports(path) if module in names}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_flax_is_for_its_interface_alone(path):
    if name(path) not in FLAX:
        assert not any(module.split(".")[0] == "flax" for module in imports(path))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_public_jax(path):
    for module in imports(path):
        assert not module.startswith("jax._src") and "._src" not in module
        assert not module.startswith("jax.interpreters")


@pytest.mark.parametrize("path", FILES + EXPERIMENTS, ids=name)
def test_files_are_one_thing(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_experiments_use_public_names(path):
    allowed = ("cqjax.linalg",) if path.parent.name == "benchmarks" else ()
    for module in imports(path):
        assert not module.startswith("cqjax.") or module.startswith(allowed), module


def test_public_names_are_documented():
    public = {n: v for n, v in vars(cqjax).items() if not n.startswith("_")}
    objects = [v for v in public.values() if getattr(v, "__module__", "").startswith("cqjax")]
    assert len(objects) >= 18
    for thing in objects:
        doc = thing.__doc__ or ""
        assert len(doc.splitlines()) > 3, thing


def test_public_names_are_in_the_reference():
    """Each of them once, on a page of docs/api."""
    pages = (ROOT.parent / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    listed = re.findall(r"^\.\. auto(?:function|class):: (\w+)", text, re.MULTILINE)
    flax = ["value_and_grad", "plan", "ValueAndGrad", "TrainState"]
    diagnostics = ["report", "Report", "LayerReport"]
    expected = [*set(cqjax.__all__) - {"nnx", "training", "diagnostics"}, *flax, *diagnostics]
    assert sorted(listed) == sorted(expected)
