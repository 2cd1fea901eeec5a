"""What a zoo case is, how its inputs are made, and its captures by finite differences."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references as ref


@dataclasses.dataclass(frozen=True)
class Case:
    """A JAX loss and the same loss in NumPy.

    Paths are "params/Dense_0/kernel": dict keys, list indices and attribute names joined by "/".
    A *site* is a path, with a suffix ("#attend") where one parameter is used in several forms.

    Attributes:
      name: the case's name.
      make: `make(dtype=jnp.float32)` gives (loss_fn, params, args), in JAX;
        `loss_fn(params, *args)` is a loss, or (loss, aux). For float64, call it and the loss
        under `jax.enable_x64(True)`.
      reference: `reference(params_np, args_np, linear)`, the loss in NumPy float64; it calls
        `linear(site, x, w) -> z` at each site, with x (B, n, d), w (B, d, o), z (B, n, o).
      covered: paths of the weights that are met at a matrix site.
      biases: paths of the parameters that are added to a covered site's output.
      partly: paths that are met at a site and used elsewhere too, and by what.
      uncovered: the other paths, and why.
      has_aux: whether the loss returns (loss, aux).
      kwargs: what cqjax.value_and_grad must be told besides the loss.
      rtol: the tolerance in float32, relative to the largest element.
      low_precision: the model computes in less than its parameters' precision.
      layouts: per site, (matrix (B, d, o), the parameter's shape) -> an array of that shape;
        by default a reshape.
      stacked: per site, how many successive calls of `linear` are the slices of one stack: its
        captures are concatenated along B. Otherwise successive calls share the weight.
      direct: per path, the gradient that the loss has besides its sites, from the weight.
      to_numpy: (loss_fn's params, args) -> args_np, where conversion is not enough.
    """

    name: str
    make: Callable[..., tuple[Callable, Any, tuple]]
    reference: Callable[[Any, tuple, Callable], float]
    covered: frozenset[str]
    biases: frozenset[str] = frozenset()
    partly: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uncovered: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_aux: bool = False
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rtol: float = 1e-4
    low_precision: bool = False
    layouts: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    stacked: Mapping[str, int] = dataclasses.field(default_factory=dict)
    direct: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    to_numpy: Callable[[Any, tuple], tuple] | None = None

    def to_kernel(self, site, matrix, shape):
        """A site's (B, d, o) matrix in the layout of its parameter, which has this shape."""
        if site in self.layouts:
            return self.layouts[site](matrix, shape)
        return np.reshape(matrix, shape)


def path_of(site):
    """The parameter's path of a site."""
    return site.split("#")[0]


def flatten(tree):
    """{path: leaf}, with paths as in Case."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in leaves}


def numpy_tree(tree):
    """The tree in NumPy: floating leaves as float64, others as they are."""

    def convert(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf, np.float64 if floating else None)

    return jax.tree.map(convert, tree)


def numpy_inputs(case, params, args):
    """(params_np, args_np), as `case.reference` takes them."""
    args_np = case.to_numpy(params, args) if case.to_numpy else args
    return numpy_tree(params), numpy_tree(args_np)


# Captures by central differences.


class Tape:
    """A `linear` that records (site, x, w, z's shape), and shifts one element of one z."""

    def __init__(self, call=-1, element=0, shift=0.0):
        self.call, self.element, self.shift = call, element, shift
        self.calls = []

    def __call__(self, site, x, w):
        z = x @ w
        if len(self.calls) == self.call:
            z.reshape(-1)[self.element] += self.shift
        self.calls.append((site, x, w, z.shape))
        return z


def _output_gradient(case, params, args, call, shape, step):
    dz = np.zeros(shape)
    for element in range(dz.size):
        above, below = (
            case.reference(params, args, Tape(call, element, shift)) for shift in (step, -step)
        )
        dz.reshape(-1)[element] = (above - below) / (2 * step)
    return dz


def _stack(captures, count):
    groups = [captures[i : i + count] for i in range(0, len(captures), count)]
    return [tuple(np.concatenate(parts) for parts in zip(*group, strict=True)) for group in groups]


def reference_captures(case, params, args, step=1e-5):
    """{site: [(x, dz, w), one for each call in order]}, float64, by finite differences.

    x (B, n, d), dz (B, n, o), w (B, d, o). `params` and `args` come from numpy_inputs. Several
    entries share one weight (a loop's trips, a layer used twice): their rows belong together.
    A weight that is not reached (the other branch of a cond) has no entry.
    """
    tape = Tape()
    case.reference(params, args, tape)
    captures = {}
    for call, (site, x, w, shape) in enumerate(tape.calls):
        dz = _output_gradient(case, params, args, call, shape, step)
        captures.setdefault(site, []).append((x, dz, w))
    for site, count in case.stacked.items():
        captures[site] = _stack(captures[site], count)
    return captures


def site_gradients(case, params, captures):
    """{path: sum over its sites and calls of xᵀ dz, in the parameter's layout}."""
    shapes = {path: np.shape(leaf) for path, leaf in flatten(params).items()}
    total = {}
    for site, entries in captures.items():
        path = path_of(site)
        for x, dz, _ in entries:
            kernel = case.to_kernel(site, x.transpose(0, 2, 1) @ dz, shapes[path])
            total[path] = total.get(path, 0.0) + kernel
    return total


# Making cases.


def kernels(*layers, root="params", leaf="kernel"):
    """{"params/<layer>/kernel", ...}; `layers` are names, or names separated by spaces."""
    names = " ".join(layers).split()
    return frozenset(f"{root}/{name}/{leaf}" for name in names)


def biases(*layers, root="params"):
    return kernels(*layers, root=root, leaf="bias")


def normal(rng, shape, dtype, scale=1.0):
    """Normal numbers, rounded to float32 so that every dtype starts from the same values."""
    return jnp.asarray((scale * rng.normal(size=shape)).astype(np.float32), dtype)


def fill(shapes, rng, dtype):
    """A tree of random arrays: scales near 1, variances positive, the rest around 0."""

    def leaf(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        if name == "scale":
            return 1.0 + normal(rng, spec.shape, dtype, 0.2)
        if name == "var":
            return jnp.exp(normal(rng, spec.shape, dtype, 0.3))
        return normal(rng, spec.shape, dtype, 0.5)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def squared_error(apply):
    """The loss (params, *inputs, y) -> squared error of apply(params, *inputs)."""

    def loss(params, *args):
        *inputs, y = args
        return jnp.sum((apply(params, *inputs) - y) ** 2) / y.shape[0]

    return loss


def regression(shapes_of, apply, *x_shapes, seed=0, loss=squared_error):
    """`make` for a squared error. `shapes_of(inputs)` gives the parameters' shapes."""

    def make(dtype=jnp.float32):
        rng = np.random.default_rng(seed)
        inputs = tuple(normal(rng, shape, dtype) for shape in x_shapes)
        params = fill(shapes_of(*inputs), rng, dtype)
        y = normal(rng, jax.eval_shape(apply, params, *inputs).shape, dtype)
        return loss(apply), params, (*inputs, y)

    return make


def flax_regression(model, *x_shapes, seed=0, loss=squared_error):
    """`make` for the squared error of a Linen module."""

    def shapes_of(*inputs):
        return jax.eval_shape(model.init, jax.random.key(0), *inputs)

    return regression(shapes_of, model.apply, *x_shapes, seed=seed, loss=loss)


def plain_regression(shapes, apply, *x_shapes, seed=0, loss=squared_error):
    """`make` for the squared error of a function of parameters of these shapes (tuples)."""
    specs = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return regression(lambda *_: specs, apply, *x_shapes, seed=seed, loss=loss)


def squared_reference(forward, inputs=1):
    """The reference of a squared error; `forward(params, *inputs, linear)`."""

    def reference(params, args, linear):
        return ref.squared_error(forward(params, *args[:inputs], linear), args[-1])

    return reference


def dense_stack(*layers, activation=np.tanh):
    """The NumPy forward pass of Flax Dense layers with an activation in between."""

    def forward(params, x, linear):
        for i, name in enumerate(layers):
            x = activation(x) if i else x
            x = ref.dense(linear, f"params/{name}", x, params["params"][name])
        return x

    return forward


class Mlp(nn.Module):
    """Dense layers with an activation in between."""

    features: tuple[int, ...] = (4, 3)
    use_bias: bool = True
    activation: Callable = nn.tanh
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate(self.features):
            x = self.activation(x) if i else x
            x = nn.Dense(features, use_bias=self.use_bias, dtype=self.dtype)(x)
        return x
