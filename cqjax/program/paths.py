"""Parameters by their paths."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


def path_of(keys: Sequence[Any]) -> str:
    """A parameter's path: the keys that lead to it in its tree, joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def leaves_with_keys(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """A tree's leaves with the keys that lead to them, in its order. Boxes are looked through.

    What is in one of Flax's boxes (`nn.Partitioned`, say) has the keys that lead to the box: so
    a parameter's path is the same with a box as without.
    """

    def stops(node: Any) -> bool:
        return (node is not tree and _is_box(node)) or (is_leaf is not None and is_leaf(node))

    for keys, node in jax.tree.leaves_with_path(tree, is_leaf=stops):
        own = keys[1:] if _is_box(tree) else keys
        if node is tree or not _is_box(node):
            yield own, node
            continue
        for inner, leaf in leaves_with_keys(node, is_leaf):
            yield (*own, *inner), leaf


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """A tree's leaves by their paths, in its order. Boxes are looked through."""
    return {path_of(keys): leaf for keys, leaf in leaves_with_keys(tree, is_leaf)}


def _is_box(node: Any) -> bool:
    """Whether it is one of Flax's boxes (`flax.core.meta.AxisMetadata`), by its methods."""
    return hasattr(type(node), "unbox") and hasattr(type(node), "replace_boxed")
