"""`value_and_grad` and `plan` for losses of `flax.nnx` modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from cqjax.capture import value_and_grad as functions
from cqjax.capture.argnums import Which
from cqjax.capture.captures import Captures
from cqjax.capture.plan import Plan
from cqjax.frameworks import nnx_modules as modules

PyTree = Any


class ValueAndGrad:
    """A loss of modules that also says what it met: the result of `value_and_grad`.

    Call it with the loss's arguments.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        has_aux: bool,
        argnums: Any,
        wrt: Any,
        options: dict[str, Any],
    ):
        functools.update_wrapper(self, loss_fn, updated=())  # its attributes are not ours
        self._loss_fn = loss_fn
        self._has_aux = has_aux
        numbers, self._wrt = modules.argnums_and_filter(argnums, wrt)
        self._which = Which.of(numbers)
        of_models = self._which.loss(loss_fn)
        pure = modules.functional(of_models, has_aux)
        self._differentiate = functions.value_and_grad(pure, has_aux=True, **options)
        # A plan ignores auxiliary results, whether or not `has_aux` says that there are some.
        self._plan = functions.plan(modules.functional(of_models, None), **options)

    def plan(self, /, *args: Any, **kwargs: Any) -> Plan:
        """What a call with these arguments captures, and what it costs.

        Runs nothing, and changes no module.

        Args:
          *args: the loss's arguments: the model, which may be abstract, made by `nnx.eval_shape`;
            and others: each an array, or a `jax.ShapeDtypeStruct`.
          **kwargs: those passed by name.

        Returns:
          A `Plan`, which prints as a table.

        Raises:
          ValueError: as for `cqjax.value_and_grad`.
          TypeError: as for `cqjax.value_and_grad`.
        """
        with nnx.update_context(modules.CONTEXT):
            params, rest, args, kwargs = self._split(args, kwargs)
            return self._plan(nnx.as_pure(params), rest, *args, **kwargs)

    def __call__(self, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree, Captures]:
        """The loss, its gradients, and the captures. Updates the modules' state in place."""
        with nnx.update_context(modules.CONTEXT):
            params, rest, args, kwargs = self._split(args, kwargs)
            (loss, (state, aux)), grads, captures = self._differentiate(
                nnx.as_pure(params), rest, *args, **kwargs
            )
            modules.update(rest, state)
        grads = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads))
        if self._which.several:
            grads = tuple(grads[i] for i in range(len(self._which.numbers)))
        return (loss, aux) if self._has_aux else loss, grads, captures

    def _split(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[nnx.State, modules.Modules, tuple, dict[str, Any]]:
        """The parameters among the arguments, the rest of all modules, and other arguments."""
        model, args, kwargs = self._which.split(self._loss_fn, args, kwargs)
        return modules.split(model, self._wrt, args, kwargs)


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    wrt: Any = nnx.Param,
    **options: Any,
) -> ValueAndGrad:
    """`flax.nnx.value_and_grad`, and what it met on the way.

    The captures are those of `cqjax.value_and_grad`, keyed by the parameters' NNX paths
    ("layers/0/kernel"). State that the loss changes is updated in place, once: batch statistics,
    random streams, counts, new variables and attributes; in the first argument and in all modules
    among the others. Call it under `nnx.jit`, or under `jax.jit` between `nnx.merge` and
    `nnx.split`.

    Args:
      loss_fn: `loss_fn(model, *args, **kwargs)` -> scalar loss, or `(loss, aux)` if `has_aux`.
        `model` is an `nnx.Module`, or a tuple, list or dictionary of some.
      has_aux: whether `loss_fn` returns auxiliary data beside the loss.
      argnums: which arguments are models: the place of one, or those of several. An
        `nnx.DiffState` has a filter of its own, in the place of `wrt`. The gradients of several are
        a tuple. The paths of their variables begin with the place in this tuple ("0/kernel"), so
        they are for an `nnx.Optimizer` of the tuple of models.
      wrt: filter of the variables to differentiate with respect to, as for `nnx.Optimizer`, which
        must have the same: `nnx.LoRAParam`, say.
      **options: those of `cqjax.value_and_grad`: `only` and `skip` take patterns for NNX paths and
        classes of NNX layers; N is read off the loss's program, and only where that cannot be done
        inferred from `args` and `kwargs`, of which modules do not count.

    Returns:
      A function with `loss_fn`'s arguments, whose results are those of
      `nnx.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)` and a `Captures`, last: for
      `nnx.Optimizer.update(model, grads, captures=captures)`. Its method `plan`, with the same
      arguments, says what is captured and at what cost; it runs nothing and changes no module.

    Raises:
      ValueError: as for `cqjax.value_and_grad`.
      TypeError: as for `cqjax.value_and_grad`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> def loss_fn(model, x, y):
      ...     return 0.5 * jnp.mean(jnp.sum((model(x) - y) ** 2, -1))
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> tx = cqjax.csgd(1.0, relative_damping=0.0, max_change=None)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x, y):
      ...     loss, grads, captures = cqjax.nnx.value_and_grad(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads, captures=captures)
      >>> x, y = jnp.array([[3.0, 1.0, 0.0], [1.0, 2.0, 1.0]]), jnp.array([[1.0], [-1.0]])
      >>> step(model, optimizer, x, y)
      >>> print(f"{loss_fn(model, x, y):.6f}")
      0.000000

    References:
      Paeedeh and Ghiasi-Shirazi, Improving the backpropagation algorithm with consequentialism
      weight updates over mini-batches (2020), Algorithms 1 to 3.
    """
    return ValueAndGrad(loss_fn, has_aux, argnums, wrt, options)


def plan(loss_fn: Callable[..., Any], **options: Any) -> Callable[..., Plan]:
    """What `value_and_grad` captures: `cqjax.nnx.value_and_grad(loss_fn, **options).plan`.

    Args:
      loss_fn: as for `value_and_grad`; auxiliary results are ignored.
      **options: those of `value_and_grad`.

    Returns:
      A function with `loss_fn`'s arguments that returns a `Plan`, which prints as a table.

    Raises:
      ValueError: as for `cqjax.value_and_grad`.
      TypeError: as for `cqjax.value_and_grad`.

    Examples:
      >>> import cqjax, jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> model = nnx.eval_shape(lambda: nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> plan = cqjax.nnx.plan(loss_fn)(model, jax.ShapeDtypeStruct((32, 8), jnp.float32))
      >>> [(p.path, p.layer, p.status) for p in plan.parameters]
      [('bias', 'Linear', 'covered'), ('kernel', 'Linear', 'covered')]
    """
    return value_and_grad(loss_fn, **options).plan
