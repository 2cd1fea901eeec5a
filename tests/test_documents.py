"""The documents' code runs as pasted; the first pages read easily; the README is short.

Each block of Python runs by itself, unless its first line says what it continues: the block above,
or the first block of its page.
"""

import functools
import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FIRST_PAGES = (README, ROOT / "docs" / "getting-started.md", ROOT / "docs" / "choosing.md")
ABOVE, FIRST = "# Continues the block above.", "# Continues the first block."


@functools.cache
def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def session(path, number):
    """The names after a block of a page, and after what it continues."""
    code = blocks(path)[number]
    first = code.partition("\n")[0]
    if first == ABOVE:
        names = dict(session(path, number - 1))
    else:
        names = dict(session(path, 0)) if first == FIRST else {}
    exec(compile(code, f"{path.name}, block {number + 1}", "exec"), names)
    return names


BLOCKS = [
    pytest.param(path, number, id=f"{path.relative_to(ROOT)}-{number + 1}")
    for path in PAGES
    for number in range(len(blocks(path)))
]


@pytest.mark.parametrize(("path", "number"), BLOCKS)
def test_code_runs(path, number):
    session(path, number)


@pytest.mark.parametrize(
    ("rule", "rates", "least"),
    [
        (optax.sgd, (0.03, 0.05, 0.1, 0.15, 0.2), 500),
        (optax.adam, (0.003, 0.01, 0.03, 0.1), 95),
    ],
)
def test_others_take_longer(rule, rates, least):
    """Than the 80 steps of *Getting started*, at the best of these rates; at 0.4 SGD diverges."""
    names = session(ROOT / "docs" / "getting-started.md", 0)
    x, y, k1, k2 = (names[name] for name in ("x", "y", "k1", "k2"))
    initial = {
        "w1": jax.random.normal(k1, (8, 64)) / 2,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(k2, (64, 1)) / 8,
        "b2": jnp.zeros(1),
    }

    @jax.jit
    def losses(rate):
        tx = rule(rate)

        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(names["loss_fn"])(params, x, y)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (initial, tx.init(initial)), length=700)[1]

    curves = list(map(losses, rates))
    reached = [int(jnp.argmax(curve < 1e-4)) for curve in curves if jnp.any(curve < 1e-4)]
    assert min(reached) > least
    if rule is optax.sgd:
        assert not jnp.isfinite(losses(0.4)[-1])


def test_every_page_is_looked_at():
    assert len(BLOCKS) > 35
    marks = [code.count("# Continues") for path in PAGES for code in blocks(path)]
    right = [code.startswith((ABOVE, FIRST)) for path in PAGES for code in blocks(path)]
    assert marks == list(map(int, right))


def sentences(path):
    """The sentences of a page's running text, without code, tables and addresses."""
    text = re.sub(r"^(```|:::).*?^\1.*?$", "\n", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|!\[|<).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^ *[-*] |^ *\d+\. ", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?])\**\s+(?=[\"'*`A-Z0-9])", " ".join(paragraph.split()))


@pytest.mark.parametrize("path", FIRST_PAGES, ids=lambda path: path.name)
def test_sentences_are_short(path):
    found = list(sentences(path))
    assert len(found) > 20
    for sentence in found:
        assert len(sentence.split()) <= 35, sentence


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Within the repository: files, and headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        name, _, heading = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE))


def test_on_an_index_all_links_lead_to_the_repository():
    """README as the package's metadata have it, by the substitutions of pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = README.read_text()
    relative = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    assert len(relative) > 15
    for each in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"][
        "substitutions"
    ]:
        text = re.sub(each["pattern"], each["replacement"], text)
    source = settings["project"]["urls"]["Source"]
    for target in relative:
        picture = target.endswith(".png")
        root = "https://raw.githubusercontent.com" + source.removeprefix("https://github.com")
        assert f"]({root}/main/{target})" in text or f"]({source}/blob/main/{target})" in text
        assert picture == (f"]({root}/main/{target})" in text)


def anchor(heading):
    """GitHub's address of a heading, and MyST's."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
