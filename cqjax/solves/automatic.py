"""Transformations of arrays whose mesh has explicit axes."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from cqjax.capture.origins import origin_of, record
from cqjax.linalg import devices


def with_automatic_axes(update: Callable[..., Any]) -> Callable[..., Any]:
    """A transformation's `update`, computed as along automatic axes of the mesh.

    Updates and state come back split as they came in. What is known of arrays by their identity
    stays known.
    """

    @functools.wraps(update)
    def wrapped(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        captures = extra_args.pop("captures", None)
        given = updates, state, params, captures
        origins = [origin_of(leaf) for leaf in jax.tree.leaves(given)]
        made = []

        def inside(updates: Any, state: Any, params: Any, captures: Any) -> Any:
            for leaf, origin in zip(
                jax.tree.leaves((updates, state, params, captures)), origins, strict=True
            ):
                if origin is not None:
                    record([leaf], origin)
            results = update(updates, state, params, captures=captures, **extra_args)
            made.extend(origin_of(leaf) for leaf in jax.tree.leaves(results))
            return results

        results = devices.automatic(inside, *given, like=(updates, state))
        for leaf, origin in zip(jax.tree.leaves(results), made, strict=True):
            if origin is not None:
                record([leaf], origin)
        return results

    return wrapped
