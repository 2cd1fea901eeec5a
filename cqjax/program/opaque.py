"""Operations whose body no tap can enter: their derivative is a rule of its own."""

from collections.abc import Mapping

from cqjax.program.jaxprs import Equation

_COVERED = (
    "(of ODE and fixed-point solvers these are covered: a `jax.lax.scan` of steps, diffrax's "
    "DirectAdjoint, jaxopt's implicit_diff=False with unroll=True)"
)
_REASONS: Mapping[str, str] = {
    "custom_jvp_call": f"a function with a derivative of its own, which no tap reaches {_COVERED}",
    "custom_vjp_call": f"a function with a gradient of its own, which no tap reaches {_COVERED}",
    "custom_linear_solve": f"an implicit solve, which no tap reaches {_COVERED}",
    "while": f"a loop of unknown length, which no tap reaches {_COVERED}",
}


def reason(equation: Equation) -> str | None:
    """Why a parameter that enters an equation is out of reach there; None if it is not opaque."""
    name = equation.primitive.name
    return f"enters `{name}`, {_REASONS[name]}" if name in _REASONS else None
