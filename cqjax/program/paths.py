"""Parameters by their paths."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def path_of(keys: Sequence[Any]) -> str:
    """A parameter's path: the keys that lead to it in its tree, joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """A tree's leaves by their paths, in its order."""
    keyed = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {path_of(keys): leaf for keys, leaf in keyed}
