"""Back-matching's backward rules (Zhang, Chen and Liu).

A layer receives a signal δb on its output: how the output should change. It hands its input the
signal δ'a. Each entry of δ'a is the change of that entry alone which comes closest, in the least
squares' sense, to changing the output by δb (Eq. 11). Products with a weight and normalisations do
so. Any other equation hands on its ordinary gradient.

The rules belong to equations, not to Flax's layers, so hand-written layers are matched too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from cqjax.linalg import devices
from cqjax.linalg.gram import accumulator
from cqjax.program import jaxprs
from cqjax.program.flow import Flow, Node
from cqjax.program.forms import Product
from cqjax.program.jaxprs import Equation
from cqjax.program.sites import Site
from cqjax.program.steps import Position
from cqjax.program.taps import Body, Rule


def rules(flow: Flow) -> dict[Position, Rule]:
    """The rules of all products and normalisations that the loss depends on, by position.

    A lookup has none, nor has a product with integers: its input gets no signal.
    """
    return {
        node.position: _product(node.site) if node.site else _normalisation(node)
        for node in flow.nodes
        if node.site is None or jnp.issubdtype(node.site.x.dtype, jnp.floating)
    }


def _product(site: Site) -> Rule:
    """Z = XW with δ'x = (δz Wᵀ) / ‖w‖² (Eqs. 12 and 22)."""

    def rule(eqn: core.JaxprEqn, args: list[Any], body: Body) -> list[Any]:
        del body
        args = list(args)
        weight, x = args[1 - site.operand], args[site.operand]
        like = x if isinstance(site.form, Product) else None  # of a convolution, of one example
        norms = devices.automatic(
            functools.partial(squared_norms, site, eqn), lax.stop_gradient(weight), like=like
        )
        args[site.operand] = _divided(x, norms)
        return jaxprs.evaluate(eqn, args)

    return rule


def squared_norms(site: Site, eqn: core.JaxprEqn, weight: jax.Array) -> jax.Array:
    """‖w‖² of the weights that touch each entry of a site's input, shaped to broadcast to it.

    Of a convolution that is the transpose of the same convolution, with squared weights, applied to
    ones. So it is right at borders, and for all strides, dilations and groups.
    """
    form, shape = site.form, site.x.shape
    squares = jnp.square(weight.astype(accumulator(weight.dtype)))
    if isinstance(form, Product):
        once = squares[tuple(map(slice, form.weight.sizes))]  # of a repeated weight, one
        norms = form.weight.pack(once).sum(-1)
        spread = jnp.broadcast_to(norms[:, None], form.inputs.shape)
        return form.inputs.unpack(spread, shape)
    params = eqn.params
    batch, *_ = params["dimension_numbers"].lhs_spec
    axes = devices.varying(squares)
    one = devices.struct((*shape[:batch], 1, *shape[batch + 1 :]), squares.dtype, axes)

    def convolve(x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            squares,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            params["dimension_numbers"],
            params["feature_group_count"],
            precision=lax.Precision.HIGHEST,
        )

    ones = jnp.ones(jax.eval_shape(convolve, one).shape, squares.dtype)
    (norms,) = jax.linear_transpose(convolve, one)(devices.vary(ones, axes))
    return norms


def _normalisation(node: Node) -> Rule:
    """Of b = r (a - E[a]) + β, with r and E[a] held constant: δ'a = δb / r (Eq. 26).

    Between the two marks everything is linear in the input but for the statistics. Those are known
    by their size: they are smaller than the input, or results of a reduction. With them constant,
    the derivative in the direction of ones is r.
    """

    def rule(eqn: core.JaxprEqn, args: list[Any], body: Body) -> list[Any]:
        del args
        mark = body.eqns[node.start]
        (marked,), (result,) = mark.outvars, eqn.invars

        def normalised(x: jax.Array, constant: bool) -> jax.Array:
            inside, values = {marked}, {**body.values, marked: x}
            for step in body.eqns[node.start + 1 : node.position[-1]]:
                # One without results was evaluated for its effect already: it has printed.
                if step.outvars and any(
                    not jaxprs.is_literal(v) and v in inside for v in step.invars
                ):
                    inputs = [jaxprs.value(v, values) for v in step.invars]
                    outputs = jaxprs.evaluate(step, inputs)
                    if constant and _is_statistic(jaxprs.equation(step), x.size):
                        outputs = [lax.stop_gradient(out) for out in outputs]
                    inside.update(step.outvars)
                    values.update(zip(step.outvars, outputs, strict=True))
            return values[result]

        x = body.values[marked]
        fixed = lax.stop_gradient(x)
        _, slope = jax.jvp(lambda x: normalised(x, True), (fixed,), (jnp.ones_like(fixed),))
        return [_matched(x, normalised(fixed, False), lax.stop_gradient(slope))]

    return rule


def _is_statistic(equation: Equation, size: int) -> bool:
    name = equation.primitive.name
    reduces = name.startswith("reduce_") and name != "reduce_precision"
    return reduces or all(out.size < size for out in equation.outputs)


@jax.custom_vjp
def _divided(x: jax.Array, norms: jax.Array) -> jax.Array:
    """The identity on x; divides its signal by the norms, 0 where they are 0."""
    del norms
    return x


def _divided_backward(norms: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
    return _quotient(dx, norms), None


_divided.defvjp(lambda x, norms: (x, norms), _divided_backward)


@jax.custom_vjp
def _matched(x: jax.Array, y: jax.Array, slope: jax.Array) -> jax.Array:
    """y, whose signal goes to x too, divided by the slope."""
    del x, slope
    return y


def _matched_backward(
    residual: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, slope = residual
    return _quotient(dy, slope).astype(x.dtype), dy, None


_matched.defvjp(lambda x, y, slope: (y, (x, slope)), _matched_backward)


def _quotient(signal: jax.Array, divisor: jax.Array) -> jax.Array:
    """The least-squares solution of divisor · q = signal, of least norm: 0 where the divisor is."""

    def quotient(signal: jax.Array, divisor: jax.Array) -> jax.Array:
        safe = jnp.where(divisor == 0, 1, divisor)
        return jnp.where(divisor == 0, 0, signal.astype(divisor.dtype) / safe).astype(signal.dtype)

    return devices.automatic(quotient, signal, divisor, like=signal)
