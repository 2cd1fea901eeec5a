"""How much of people's models is covered whose losses use weights both ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax


class PhysicsInformed(nn.Module):
    """As in jaxpi: random Fourier features of the point, then layers with kernels of their own."""

    @nn.compact
    def __call__(self, point):
        directions = self.param("fourier", nn.initializers.normal(2.0), (2, 16))
        projected = point @ jax.lax.stop_gradient(directions)
        h = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], -1)
        for i in range(3):
            h = jnp.tanh(nn.Dense(24, name=f"layer{i}")(h))
        return nn.Dense(1, name="last")(h)[0]


def burgers(params, points, starts):
    """u_t + u u_x - ν u_xx, with jax.grad for all derivatives."""
    network = PhysicsInformed()

    def u(t, x):
        return network.apply({"params": params}, jnp.stack([t, x]))

    def residual(t, x):
        u_x = jax.grad(u, 1)
        return jax.grad(u)(t, x) + u(t, x) * u_x(t, x) - 0.01 * jax.grad(u_x, 1)(t, x)

    r = jax.vmap(residual)(points[:, 0], points[:, 1])
    at_start = jax.vmap(u)(jnp.zeros(len(starts)), starts)
    return jnp.mean(r**2) + jnp.mean((at_start + jnp.sin(np.pi * starts)) ** 2)


class DenseCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 32):
            x = nn.leaky_relu(nn.Dense(width)(x), 0.2)
        return nn.Dense(1)(x)[..., 0]


class ConvolutionalCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (8, 16):
            x = nn.leaky_relu(nn.Conv(channels, (4, 4), strides=2)(x), 0.2)
        return nn.Dense(1)(x.reshape(*x.shape[:-3], -1))[..., 0]


def wasserstein(critic):
    """Gulrajani et al. (2017): the critic's loss, with its gradient penalty."""

    def loss(params, real, generated, mix):
        def score(x):
            return critic.apply({"params": params}, x)

        mix = mix.reshape(-1, *(1,) * (real.ndim - 1))
        slopes = jax.grad(lambda x: score(x).sum())(mix * real + (1 - mix) * generated)
        norms = jnp.sqrt(jnp.sum(slopes**2, tuple(range(1, real.ndim))) + 1e-12)
        return jnp.mean(score(generated) - score(real) + 10 * (norms - 1) ** 2)

    return loss


class Transformer(nn.Module):
    """As in lm1b: one table for inputs and logits, sinusoidal positions, layers before norms."""

    scaled: bool

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(300, 32, name="table")
        x = table(tokens) * (32**0.5 if self.scaled else 1)
        for _ in range(2):
            h = nn.LayerNorm(use_bias=False)(x)
            mask = nn.make_causal_mask(tokens)
            x = x + nn.MultiHeadDotProductAttention(4, use_bias=False)(h, mask=mask)
            h = nn.LayerNorm(use_bias=False)(x)
            x = x + nn.Dense(32, use_bias=False)(nn.gelu(nn.Dense(64, use_bias=False)(h)))
        return table.attend(nn.LayerNorm(use_bias=False)(x)) / (1 if self.scaled else 32**0.5)


class Gemma(nn.Module):
    """As in gemma: the table's rows are scaled, gates, and RMS norms whose scales start at 0."""

    @nn.compact
    def __call__(self, tokens):
        table = self.param("input_embedding", nn.initializers.normal(), (300, 32))
        x = table[tokens] * jnp.sqrt(32.0)
        for i in range(2):
            heads = self.param(f"qkv{i}", nn.initializers.normal(), (3, 4, 32, 8))
            q, k, v = jnp.einsum("btd,sndh->sbtnh", self.norm(f"a{i}", x), heads)
            weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
            mixed = jnp.einsum("bnts,bsnh->btnh", weights, v)
            out = self.param(f"out{i}", nn.initializers.normal(), (4, 8, 32))
            x = x + jnp.einsum("btnh,nhd->btd", mixed, out)
            gates = self.param(f"gates{i}", nn.initializers.normal(), (2, 32, 64))
            h = self.norm(f"m{i}", x)
            h = nn.gelu(h @ gates[0]) * (h @ gates[1])
            x = x + h @ self.param(f"down{i}", nn.initializers.normal(), (64, 32))
        return self.norm("last", x) @ table.T

    def norm(self, name, x):
        scale = self.param(name, nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)


def language(model):
    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss


IMAGES, FEATURES = jnp.ones((4, 8, 8, 3)), jnp.ones((4, 6))
TOKENS = jnp.ones((2, 9), int)
MODELS = {
    "PINN": (PhysicsInformed(), burgers, (jnp.ones((8, 2)), jnp.ones(6)), 1.0),
    "WGAN-GP": (DenseCritic(), None, (FEATURES, 2 * FEATURES, jnp.ones(4)), 1.0),
    "WGAN-GP, images": (ConvolutionalCritic(), None, (IMAGES, 2 * IMAGES, jnp.ones(4)), 1.0),
    "lm1b": (Transformer(False), None, (TOKENS,), 0.98),
    "lm1b, scaled rows": (Transformer(True), None, (TOKENS,), 0.98),
    "gemma": (Gemma(), None, (TOKENS,), 0.98),
}


@pytest.mark.parametrize("name", MODELS)
def test_share_of_the_parameters_that_is_covered(name):
    model, loss, args, share = MODELS[name]
    kind = language if args[0] is TOKENS else wasserstein
    loss = loss or kind(model)
    given = TOKENS[:, :-1] if args[0] is TOKENS else args[0][0] if name == "PINN" else args[0]
    params = model.init(jax.random.key(0), given)["params"]
    plan = cqjax.plan(loss)(params, *args)
    sizes = {p.path: int(np.prod(p.shape)) for p in plan.parameters if p.path != "fourier"}
    covered = sum(sizes[p.path] for p in plan.parameters if p.status == "covered")
    assert covered >= share * sum(sizes.values()), plan
    assert any(block.solver == "both sides" for block in plan.blocks)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    network = eqx.nn.MLP(2, "scalar", 16, 2, jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_array)

    def loss(params, x):
        network = eqx.combine(params, static)
        values, slopes = jax.vmap(jax.value_and_grad(network))(x)
        return jnp.mean((jnp.linalg.norm(slopes, axis=-1) - 1) ** 2 + values**2)

    plan = cqjax.plan(loss)(params, jnp.ones((8, 2)))
    assert not plan.uncovered()
    assert {block.solver for block in plan.blocks} == {"both sides"}
