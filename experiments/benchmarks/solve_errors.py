"""Smallest eigenvalues and updates of a network's layers by each emulated format."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import cqjax
from cqjax.capture.captures import Capture
from cqjax.capture.matrix_form import Convolution, Product
from cqjax.capture.statistics import Inputs, Rows
from cqjax.linalg import gram, ridge
from cqjax.transforms import solves
from experiments.benchmarks.bars import Table
from experiments.benchmarks.rounding import FLOAT32, PATCHES, emulated, settings
from experiments.classification import cross_entropy

MOST = 5  # layers of a network that are looked at; the first and the last are among them
SHOWN = 3  # of these, in the table of eigenvalues

Found = dict[str, Any]
T = TypeVar("T")


def analyse(
    model: Any,
    start: Any,
    images: np.ndarray,
    labels: np.ndarray,
    damping: float,
    scopes: str,
) -> list[Found]:
    """Compare layers' Gram matrices and updates on a batch with float64's.

    Args:
      model: The network.
      start: Its parameters and state.
      images: The batch.
      labels: Their labels.
      damping: C-SGD's.
      scopes: What is rounded.

    Returns:
      For each layer: the smallest eigenvalue of the matrix that is inverted, and the relative
      errors of the update U and of its effect XU.
    """
    differentiate = cqjax.value_and_grad(cross_entropy(model), has_aux=True, batch_size=len(labels))
    _, _, captures = jax.jit(differentiate)(*start, images, labels)
    blocks = _some(captures.blocks, MOST)
    layers = [_Layer(capture, len(labels), damping) for capture in blocks]
    exact = (
        (FLOAT32, PATCHES)
        if any(isinstance(layer.form, Convolution) for layer in layers)
        else (FLOAT32,)
    )
    for format_, scope in settings(scopes, exact):
        with emulated(format_, scope):
            for layer in layers:
                layer.compare(format_, scope)
    return [layer.found for layer in layers]


class _Layer:
    """A layer's solve: in float64, by cqjax, and what was found of the differences."""

    def __init__(self, capture: Capture, n: int, damping: float):
        (statistic,), (site,), block = capture.sites, capture.block.sites, capture.block
        assert isinstance(statistic, Rows | Inputs)
        self.n, self.damping, self.inputs, self.h = n, damping, statistic.x, statistic.h
        self.form = None  # in the primal: the product, which knows how to make XᵀX
        if isinstance(statistic, Rows):
            x, self.right = statistic.x, statistic.dz
        else:
            assert isinstance(site.form, Convolution | Product)
            self.form = site.form
            x, self.right = self.form.rows(statistic.x), block.weight_matrix(capture.gradients)
            if block.bias is not None:
                bias = block.bias_matrix(capture.gradients)
                self.right = jnp.concatenate([self.right, bias[:, None]], 1)
        x = np.asarray(x[0], np.float64)
        if self.h is not None:
            x = np.c_[x, np.ones(len(x))]
        matrix = x.T @ x if self.form else x @ x.T
        damped = matrix + damping * np.eye(len(matrix))
        solution = n * np.linalg.solve(damped, np.asarray(self.right[0], np.float64))
        self.u = solution if self.form else x.T @ solution
        self.shape, (eigenvalues, vectors) = x.shape, np.linalg.eigh(matrix)
        root = np.sqrt(eigenvalues.clip(0))[:, None] * vectors.T
        self.x = root if self.form else x  # for |XU|
        self.found: Found = {
            "layer": block.name,
            "solver": block.solver,
            "rows, features": self.shape,
            "damping": damping,
            "largest": eigenvalues[-1].item(),
            "smallest": {"float64": eigenvalues[0].item()},
            "update": {},
            "effect": {},
            "fallbacks": [],
        }

    def compare(self, format_: str, scope: str) -> None:
        """Solve by cqjax's functions as they are now."""
        matrix, u, repaired = self._solve()
        key, norm = f"{format_} ({scope})", np.linalg.norm
        self.found["smallest"][format_] = np.linalg.eigvalsh(matrix)[0].item()
        self.found["update"][key] = float(norm(u - self.u) / norm(self.u))
        self.found["effect"][key] = float(norm(self.x @ (u - self.u)) / norm(self.x @ self.u))
        self.found["fallbacks"] += [key] if repaired else []

    def _solve(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """The matrix, the update, and whether a solve failed: as `cqjax.transforms.solves`."""
        if self.form:
            matrix = self.form.second_moment(self.inputs, self.h, 1, "highest")
        else:
            matrix = gram.outer(self.inputs, self.h)
        system = ridge.System(matrix, self.damping, min(self.shape), self.n)
        (inverse,) = ridge.inverses([system])
        u = ridge.solve(inverse.value, self.right)
        if not self.form:
            weight, bias = solves.product(self.inputs, u, self.h)
            u = weight if bias is None else jnp.concatenate([weight, bias[:, None]], 1)
        matrix, u = (np.asarray(array[0], np.float64) for array in (matrix, u))
        return matrix, u, bool(inverse.repaired.any())


def _some(layers: Sequence[T], most: int) -> list[T]:
    """No more than so many of them, evenly spread."""
    indices = np.linspace(0, len(layers) - 1, min(most, len(layers)))
    return [layers[round(index)] for index in indices]


def tables(layers: Mapping[str, Sequence[Found]]) -> list[Table]:
    """Eigenvalues of some layers; errors of all of them; by the network's name."""
    eigenvalues, errors = [], []
    for network, all_ in layers.items():
        for found in _some(all_, SHOWN):
            row = {"network": network, "layer": found["layer"], "λ": f"{found['damping']:g}"}
            row["largest"] = f"{found['largest']:.1e}"
            eigenvalues.append(
                row
                | {
                    f"smallest, {name}": f"{value:.3g}"
                    for name, value in found["smallest"].items()
                    if name != PATCHES
                }
            )
        for key in all_[0]["update"]:
            row = {"network": network, "products": key}
            for heading, of in (("U", "update"), ("XU", "effect")):
                values = [found[of][key] for found in all_]
                row[heading] = f"{np.median(values):.1e} / {max(values):.1e}"
            row["fallbacks"] = str(sum(key in found["fallbacks"] for found in all_))
            errors.append(row)
    return [
        Table("eigenvalues of the matrices that are inverted", eigenvalues),
        Table("relative errors against float64, median / largest of the layers", errors),
    ]
