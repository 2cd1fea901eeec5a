"""What a tap brings out of the backward pass, for one site."""

import dataclasses

import jax

from cqjax.linalg import devices

_pytree = jax.tree_util.register_dataclass


@_pytree
@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows of a site: what the dual solution needs.

    Attributes:
      x: the activations X, (B, n, d), in the model's dtype.
      dz: the loss's gradient with respect to the outputs, (B, n, o).
      h: the homogeneous coordinate, (B, n): 1 in rows to which a bias is added, else 0; None where
        none is.
    """

    x: jax.Array
    dz: jax.Array
    h: jax.Array | None


@_pytree
@dataclasses.dataclass(frozen=True)
class Inputs:
    """A site's activations as they are: XᵀX is computed when somebody asks for it.

    Attributes:
      x: the activations, in the shape in which the equation has them.
      h: the homogeneous coordinate, (): 1 where a bias is added, else 0; None where none is.
    """

    x: jax.Array
    h: jax.Array | None


@_pytree
@dataclasses.dataclass(frozen=True)
class Gram:
    """The second moment of a site's rows: what the primal solution needs.

    Attributes:
      xx: XᵀX, (B, d, d), or [X, 1]ᵀ[X, 1], (B, d+1, d+1), where a bias is added; in float32, or
        in float64 for a float64 model.
    """

    xx: jax.Array


@_pytree
@dataclasses.dataclass(frozen=True)
class Counts:
    """The second moment of a lookup's one-hot rows, which is diagonal.

    Attributes:
      counts: how often each of the d entries was read, (B, d), as floating-point numbers.
    """

    counts: jax.Array


Statistic = Rows | Inputs | Gram | Counts


def of_all_devices(statistic: Statistic, axes: devices.Axes) -> Statistic:
    """What the devices along these mesh axes captured together; `Inputs` stay each one's own."""
    match statistic:
        case Rows():
            return devices.gathered(statistic, axes, 1)
        case Gram() | Counts():
            return devices.total(statistic, axes)
        case Inputs():
            return statistic
