"""Which matrix form an equation has."""

import itertools

import jax.numpy as jnp
from jax.extend.core import primitives

from cqjax.linalg.windows import Window
from cqjax.program import lookups, opaque
from cqjax.program.forms import Convolution, Form, Product, Shape
from cqjax.program.jaxprs import Equation
from cqjax.program.layout import Layout
from cqjax.program.ragged import RAGGED, ragged


def matrix_form(equation: Equation, weight: int, sizes: Shape | None = None) -> Form | str:
    """The matrix form of an equation in which operand number `weight` is a parameter's view.

    A new kind of product is one more class, and one more case here. It has what `Product` has. For
    back-matching to match it, `matched.squared_norms` needs a case as well.

    Args:
      equation: the equation.
      weight: the operand's number.
      sizes: where the view has been broadcast, its size along each axis, 1 where it is repeated.

    Returns:
      The form, or why the equation is not a product with that operand in the weight's place.
    """
    arrays = (*equation.inputs, *equation.outputs)
    if any(jnp.issubdtype(array.dtype, jnp.complexfloating) for array in arrays):
        return f"enters `{equation.primitive.name}` of complex numbers"
    if equation.primitive is primitives.dot_general_p:
        return _product(equation, weight, sizes or equation.inputs[weight].shape)
    if sizes is not None and equation.primitive is primitives.conv_general_dilated_p:
        return "is broadcast before a product"
    if equation.primitive is primitives.conv_general_dilated_p:
        return _convolution(equation, weight)
    if equation.primitive.name == RAGGED and sizes is None:
        return ragged(equation, weight)
    if equation.primitive in lookups.READS and weight == 0 and sizes is None:
        return lookups.lookup(equation)
    opaquely = opaque.reason(equation)
    return opaquely or f"enters `{equation.primitive.name}`, which is no matrix product"


def _product(equation: Equation, weight: int, sizes: Shape) -> Form | str:
    contracting, batching = equation.params["dimension_numbers"]
    other = 1 - weight
    w, x = equation.inputs[weight].shape, equation.inputs[other].shape
    batch_w, batch_x = tuple(batching[weight]), tuple(batching[other])
    features_w, features_x = tuple(contracting[weight]), tuple(contracting[other])
    outputs = _other_axes(w, batch_w, features_w)
    rows = _other_axes(x, batch_x, features_x)
    z = equation.outputs[0].shape
    # The result has the batch axes first, then the free axes of the first operand, then those of
    # the second.
    batch_z = tuple(range(len(batch_w)))
    end = len(batch_z) + len(rows if weight == 1 else outputs)
    middle, last = tuple(range(len(batch_z), end)), tuple(range(end, len(z)))
    rows_z, outputs_z = (middle, last) if weight == 1 else (last, middle)
    # Along a batch axis, a repeated weight is one weight with more rows.
    repeated = [i for i, axis in enumerate(batch_w) if sizes[axis] != w[axis]]
    if any(sizes[axis] != w[axis] for axis in (*features_w, *outputs)):
        return "is broadcast before a product"
    rows = (*(batch_x[i] for i in repeated), *rows)
    rows_z = (*repeated, *rows_z)
    batch_x = tuple(axis for i, axis in enumerate(batch_x) if i not in repeated)
    batch_z = tuple(i for i in batch_z if i not in repeated)
    return Product(
        weight=Layout(sizes, (batch_w, features_w, outputs)),
        output=Layout(z, (batch_z, rows_z, outputs_z)),
        axes=tuple((i,) for i in range(len(z))),
        inputs=Layout(x, (batch_x, rows, features_x)),
    )


def _other_axes(shape: Shape, *known: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(len(shape)) if i not in itertools.chain(*known))


def _convolution(equation: Equation, weight: int) -> Form | str:
    params = equation.params
    if weight != 1:
        return "is the input of a convolution, not its kernel"
    if params["batch_group_count"] != 1:
        return "is the kernel of a convolution with `batch_group_count`"
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel, z = equation.inputs[1].shape, equation.outputs[0].shape
    w_sizes, w_axes = _grouped(kernel, numbers.rhs_spec[0], groups)
    (group, outputs), features = w_axes[numbers.rhs_spec[0]], w_axes[numbers.rhs_spec[1]]
    window = [w_axes[i] for i in numbers.rhs_spec[2:]]
    z_sizes, z_axes = _grouped(z, numbers.out_spec[1], groups)
    group_z, outputs_z = z_axes[numbers.out_spec[1]]
    rows_z = [z_axes[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:])]
    return Convolution(
        weight=Layout(w_sizes, ((group,), (*itertools.chain(*window), *features), (outputs,))),
        output=Layout(z_sizes, ((group_z,), tuple(itertools.chain(*rows_z)), (outputs_z,))),
        axes=z_axes,
        window=Window(
            shape=tuple(kernel[i] for i in numbers.rhs_spec[2:]),
            strides=tuple(params["window_strides"]),
            padding=tuple((int(low), int(high)) for low, high in params["padding"]),
            lhs_dilation=tuple(params["lhs_dilation"]),
            rhs_dilation=tuple(params["rhs_dilation"]),
        ),
        lhs=tuple(numbers.lhs_spec),
        positions=tuple(numbers.out_spec[2:]),
    )


def _grouped(shape: Shape, axis: int, groups: int) -> tuple[Shape, tuple[tuple[int, ...], ...]]:
    """Shape with `axis` replaced by (groups, the rest), and the new axes of each old one."""
    sizes = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    axes = tuple(
        (i,) if i < axis else (i, i + 1) if i == axis else (i + 1,) for i in range(len(shape))
    )
    return sizes, axes
