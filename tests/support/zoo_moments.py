"""The zoo: second moments of its weights, and updates made from them, in float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from zoo_base import flatten, numpy_inputs, path_of

import cqjax

DAMPING = 0.3


class Moment(NamedTuple):
    """A site's [X, 1]ᵀ[X, 1], or XᵀX where no bias is added.

    Attributes:
      xx: (B, m, m).
      rows: n, those of all calls.
      weight: the weight's shape, (B, d, o).
      bias: the bias's path, or None.
    """

    xx: np.ndarray
    rows: int
    weight: tuple[int, ...]
    bias: str | None

    @property
    def spans(self):
        """Whether the rows are twice as many as the features."""
        return spans(self.rows, self.weight[1])


def spans(rows, features):
    """Whether statistics of so many rows are used for others. A bias is no feature here."""
    return rows >= 2 * features


def second_moment(x, bias):
    """Sum of the outer products of X's rows, for x (B, n, d)."""
    size = x.shape[2] + (bias is not None)
    total = np.zeros((len(x), size, size))
    for b, rows in enumerate(x):
        for row in rows:
            row = np.append(row, 1.0) if bias is not None else row
            total[b] += np.outer(row, row)
    return total


def second_moments(case, params, args):
    """{site: Moment}, of all calls of the site together."""
    params, args = numpy_inputs(case, params, args)
    calls, moments = {}, {}

    def linear(site, x, w):
        calls.setdefault(site, []).append((x, w.shape))
        return x @ w

    case.reference(params, args, linear)
    for site, entries in calls.items():
        bias = bias_of(case, site)
        if site in case.stacked:
            entries = [
                (np.concatenate([x for x, _ in entries]), (len(entries), *entries[0][1][1:]))
            ]
        rows = sum(x.shape[1] for x, _ in entries)
        xx = sum(second_moment(x, bias) for x, _ in entries)
        moments[site] = Moment(xx, rows, entries[0][1], bias)
    return moments


def bias_of(case, site):
    """The path of the bias that is added to a site's outputs: the one below the same keys."""
    owner = path_of(site).rpartition("/")[0]
    found = [p for p in case.biases if p.rpartition("/")[0] == owner]
    return found[0] if found else None


def to_matrix(case, site, kernel, shape):
    """What `case.to_kernel` makes a kernel of: (B, d, o)."""
    numbers = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    places = np.asarray(case.to_kernel(site, numbers, kernel.shape), int)
    matrix = np.zeros(np.prod(shape))
    matrix[places[places > 0] - 1] = kernel[places > 0]
    return matrix.reshape(shape)


def updates(case, moments, incoming, inverses):
    """{path: N (XᵀX + λI)⁻¹ H}, added up over the sites of each parameter.

    Args:
      case: the case.
      moments: {site: Moment}.
      incoming: H, by path.
      inverses: {site: N (XᵀX + λI)⁻¹}.
    """
    result = {}
    for site, moment in moments.items():
        path, (batch, d, o) = path_of(site), moment.weight
        h = to_matrix(case, site, incoming[path], moment.weight)
        if moment.bias is not None:
            h = np.concatenate([h, incoming[moment.bias].reshape(batch, 1, o)], 1)
        u = inverses[site] @ h
        if moment.bias is not None:
            shape = incoming[moment.bias].shape
            result[moment.bias] = result.get(moment.bias, 0) + u[:, d].reshape(shape)
        kernel = case.to_kernel(site, u[:, :d], incoming[path].shape)
        result[path] = result.get(path, 0) + kernel
    return result


def inverse_of(xx, size, damping):
    """N (XᵀX + λI)⁻¹."""
    return size * np.linalg.inv(xx + damping * np.eye(xx.shape[-1]))


def block_inverses(moments, size, parts, damping=DAMPING):
    """{site: N (XᵀX + λI)⁻¹}, XᵀX being zero between the `parts` of sites that have such.

    There a bias is a part of its own.
    """
    result = {}
    for site, moment in moments.items():
        xx = moment.xx
        if site in parts:
            part = np.append(parts[site], [-1] * (moment.bias is not None))
            xx = xx * (part[:, None] == part)
        result[site] = inverse_of(xx, size, damping)
    return result


def average(past, decay):
    """M̂: the bias-corrected moving average of a list of arrays, the latest last."""
    shares = [decay ** (len(past) - 1 - i) for i in range(len(past))]
    return sum(s * a for s, a in zip(shares, past, strict=True)) / sum(shares)


def batches(case, args, sizes, seed=0):
    """Arguments like `args`, all different, with so many examples each."""
    rng = np.random.default_rng(seed)

    def changed(array, size):
        taken = np.asarray(array)[np.arange(size) % len(array)]
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.asarray(taken * rng.normal(1.0, 0.5, taken.shape), array.dtype)
        return jnp.asarray(rng.permutation(taken.reshape(-1)).reshape(taken.shape))

    return [jax.tree.map(lambda a, n=n: changed(a, n), args) for n in sizes]


def flat(tree):
    """{path: array}, in float64 NumPy."""
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}


def updated(loss_fn, params, args, damping=DAMPING, **kwargs):
    """(gradients, updates), by path, in float64 NumPy."""
    tx = cqjax.scale_by_consequentialism(damping=damping, relative_damping=0.0)

    def run(params, *args):
        _, grads, captures = cqjax.value_and_grad(loss_fn, **kwargs)(params, *args)
        updates, state = tx.update(grads, tx.init(params), captures=captures)
        return grads, updates, state.fallbacks

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    grads, updates, fallbacks = jax.jit(run, compiler_options=options)(params, *args)
    assert fallbacks.sum() == 0
    return flat(grads), flat(updates)
