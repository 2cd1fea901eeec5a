"""A physics-informed network: Poisson's equation on a square, by second derivatives in the loss."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from rich.progress import track

import cqjax


def init(key, widths=(2, 32, 32, 32, 1)):
    """A weight and a bias for each layer."""
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    weights = map(jax.nn.initializers.lecun_normal(), jax.random.split(key, len(shapes)), shapes)
    return [{"w": w, "b": jnp.zeros(w.shape[1])} for w in weights]


def network(params, x):
    """u(x), which is zero on the border of [0, 1]²: (n, 2) -> (n,)."""
    z = 2 * x - 1
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return 16 * jnp.prod(x * (1 - x), -1) * (z @ params[-1]["w"] + params[-1]["b"])[:, 0]


def laplacian(u, x):
    """The sum of second derivatives, in forward mode: each is a product with the same weights."""

    def second(direction):
        def first(x):
            return jax.jvp(u, (x,), (direction,))[1]

        return jax.jvp(first, (x,), (direction,))[1]

    return sum(second(jnp.broadcast_to(axis, x.shape)) for axis in jnp.eye(2))


def loss_fn(params, x):
    """The mean squared residual of -Δu = 5π² sin(πx) sin(2πy), over its scale."""
    residual = laplacian(lambda x: network(params, x), x) + 5 * jnp.pi**2 * exact(x)
    return jnp.mean(residual**2) / 600


def exact(x):
    """The solution."""
    return jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(2 * jnp.pi * x[:, 1])


def main(steps=400, figure="pinn.png", rate=1e-1, ours=3e-2):
    """Compares Adam and C-Adam, each at the best peak that was tried for the same schedule."""
    _, axes = plt.subplots()
    points, curves = jax.random.uniform(jax.random.key(2), (1000, 2)), {}
    for name, rule, peak in (("Adam", optax.adam, rate), ("C-Adam", cqjax.cadam, ours)):
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(steps // 20, 1), steps)
        tx = optax.with_extra_args_support(rule(schedule))

        @jax.jit
        def step(params, state, x, tx=tx):
            loss, grads, captures = cqjax.value_and_grad(loss_fn)(params, x)
            updates, state = tx.update(grads, state, params, captures=captures)
            return optax.apply_updates(params, updates), state, loss

        params, losses = init(jax.random.key(0)), []
        state = tx.init(params)
        for key in track(jax.random.split(jax.random.key(1), steps), name):
            params, state, loss = step(params, state, jax.random.uniform(key, (256, 2)))
            losses.append(float(loss))
        error = jnp.std(network(params, points) - exact(points)) / jnp.std(exact(points))
        print(f"{name}: loss {losses[-1]:.2g}, relative error of the solution {error:.1%}")
        curves[name] = losses
        axes.semilogy(losses, label=name)
    axes.set(xlabel="steps", ylabel="squared residual")
    axes.legend()
    axes.figure.savefig(figure)
    return curves


if __name__ == "__main__":
    main()
