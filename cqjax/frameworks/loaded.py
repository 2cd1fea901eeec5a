"""Flax, where the user's program has imported it. Without Flax, there is nothing to ask of it.

So plain JAX, Equinox and Haiku need no Flax. A loss whose modules are Flax's has imported it.
"""

import contextlib
import sys
from typing import Any


def intercepted() -> contextlib.AbstractContextManager[None]:
    """Records the Linen modules that are called within the context, if there can be some."""
    if "flax.linen" not in sys.modules:
        return contextlib.nullcontext()
    from cqjax.frameworks import linen

    return linen.intercepted()


def refuse(params: Any) -> None:
    """Refuses NNX modules among parameters that are taken for plain trees.

    Raises:
      TypeError: says what to do instead.
    """
    if "flax.nnx" in sys.modules:
        from cqjax.frameworks import nnx_modules

        nnx_modules.refuse(params)
