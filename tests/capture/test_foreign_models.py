"""Small models as others write them: their updates are those of float64 NumPy.

In the reference every layer's output has zeros added to it, of which `jax.grad` gives Z̄; X is
handed out beside the loss. Nothing of cqjax is used.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cqjax

RELATIVE, ABSOLUTE = 0.1, 1e-2
RNG = np.random.default_rng(0)


def normal(*shape, scale=0.5):
    return jnp.asarray(scale * RNG.normal(size=shape))


def dense(name, p, x, live=None):
    del live
    z = x @ p[name]
    return z + p[f"{name}_b"] if f"{name}_b" in p else z


class Recorded:
    """Layers that hand out X and take zeros to be added to Z."""

    def __init__(self, zeros=None):
        self.zeros = zeros
        self.rows, self.shapes = {}, {}

    def __call__(self, name, p, x, live=None):
        """A dense layer; `live` selects the rows that the loss has a term for."""
        z = dense(name, p, x)
        calls = self.rows.setdefault(name, [])
        key = f"{name}/{len(calls)}"
        self.shapes[key] = z.shape
        calls.append((key, x, live))
        return z if self.zeros is None else z + self.zeros[key]


def reference(loss, p, args, terms):
    """The updates of a loss that is `loss(layer, p, *args)`."""
    first = Recorded()
    loss(first, p, *args)
    zeros = {key: jnp.zeros(shape) for key, shape in first.shapes.items()}

    def tapped(zeros):
        layer = Recorded(zeros)
        return loss(layer, p, *args), {k: [x for _, x, _ in v] for k, v in layer.rows.items()}

    signals, inputs = jax.grad(tapped, has_aux=True)(zeros)
    updates = {}
    for name, calls in first.rows.items():
        xs, dzs = [], []
        for (key, _, live), x in zip(calls, inputs[name], strict=True):
            pick = (lambda a: a) if live is None else live
            xs.append(np.asarray(pick(x)).reshape(-1, x.shape[-1]))
            dz = signals[key]
            dzs.append(np.asarray(pick(dz)).reshape(-1, dz.shape[-1]))
        x, dz = np.concatenate(xs), np.concatenate(dzs)
        if f"{name}_b" in p:
            x = np.hstack([x, np.ones((len(x), 1))])
        gram = x.T @ x
        damping = ABSOLUTE + RELATIVE * np.trace(gram) / min(x.shape)
        u = terms * np.linalg.solve(gram + damping * np.eye(len(gram)), x.T @ dz)
        updates[name] = u[: p[name].shape[0]]
        if f"{name}_b" in p:
            updates[f"{name}_b"] = u[-1]
    return updates


def assert_equal(loss, written, p, args, terms):
    """The updates of a loss as people write it equal the reference's, traced or not."""

    def update(p, *args):
        _, grads, captures = cqjax.value_and_grad(written)(p, *args)
        tx = cqjax.scale_by_consequentialism(damping=ABSOLUTE, relative_damping=RELATIVE)
        return tx.update(grads, tx.init(p), captures=captures)[0]

    want = reference(loss, p, args, terms)
    for got in (update(p, *args), jax.jit(update)(p, *args)):
        for name, u in want.items():
            np.testing.assert_allclose(got[name], u, rtol=1e-7, atol=1e-9, err_msg=name)
    return want


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def attention(layer, p, x, name, live=None):
    q, k, v = (layer(f"{name}_{part}", p, x) for part in "qkv")
    scores = jnp.einsum("...td,...sd->...ts", q, k) / q.shape[-1] ** 0.5
    return layer(f"{name}_o", p, jax.nn.softmax(scores, -1) @ v, live)


def transformer_params(width, hidden, blocks, **more):
    p = dict(more)
    for i in range(blocks):
        p |= {f"a{i}_{part}": normal(width, width) for part in "qkvo"}
        p |= {f"u{i}": normal(width, hidden), f"u{i}_b": normal(hidden)}
        p |= {f"d{i}": normal(hidden, width), f"d{i}_b": normal(width)}
    return p


@pytest.mark.usefixtures("float64")
def test_recurrent_encoder_and_decoder():
    """The states go through a scan; the reference unrolls it."""
    batch, source, target, width, words = 5, 4, 3, 6, 7
    p = {name: normal(width, width) for name in ("ex", "eh", "dx", "dh")}
    p |= {"ex_b": normal(width), "dx_b": normal(width)}
    p |= {"out": normal(width, words), "out_b": normal(words)}
    x, y = normal(batch, source, width), normal(batch, target, width)
    labels = jnp.asarray(RNG.integers(0, words, (batch, target)))

    def cell(layer, p, side, h, x):
        return jnp.tanh(layer(f"{side}x", p, x) + layer(f"{side}h", p, h))

    def loss(layer, p, x, y, labels):
        h, states = jnp.zeros((batch, width)), []
        for t in range(source):
            h = cell(layer, p, "e", h, x[:, t])
        for t in range(target):
            h = cell(layer, p, "d", h, y[:, t])
            states.append(h)
        logits = layer("out", p, jnp.stack(states, 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def written(p, x, y, labels):
        def over(side, h, xs):
            return jax.lax.scan(lambda h, x: (cell(dense, p, side, h, x),) * 2, h, xs)

        h, _ = over("e", jnp.zeros((batch, width)), x.swapaxes(0, 1))
        _, states = over("d", h, y.swapaxes(0, 1))
        logits = dense("out", p, states.swapaxes(0, 1))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    assert_equal(loss, written, p, (x, y, labels), batch * target)


@pytest.mark.usefixtures("float64")
def test_language_model_of_one_sequence_that_is_vmapped():
    """As Equinox has it: the model is of one sequence, and looks its tokens up one by one."""
    batch, length, width, words = 4, 6, 8, 11
    p = transformer_params(width, 12, 2, head=normal(width, words), table=normal(words, width))
    tokens = jnp.asarray(RNG.integers(0, words, (batch, length + 1)))
    valid = jnp.asarray(RNG.uniform(size=(batch, length)) < 0.7).at[0].set(False)

    def model(layer, p, x, live=None):
        for i in range(2):
            last = live if i == 1 else None
            x = x + attention(layer, p, norm(x), f"a{i}", last)
            x = x + layer(f"d{i}", p, jax.nn.relu(layer(f"u{i}", p, norm(x), last)), last)
        return layer("head", p, norm(x), live)

    def loss(layer, p, tokens, valid):
        picked = np.asarray(valid)
        logits = model(layer, p, p["table"][tokens[:, :-1]], lambda a: a[picked])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(each * valid) / jnp.sum(valid)

    def written(p, tokens, valid):
        def of_one(sequence, valid):
            x = jax.vmap(lambda token: p["table"][token])(sequence[:-1])
            logits = model(dense, p, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, sequence[1:]) * valid

        return jnp.sum(jax.vmap(of_one)(tokens, valid)) / jnp.sum(valid)

    # Queries see their own row's term alone; in the first block, keys, values and all that feeds
    # them count for the sequences that have a term.
    some = np.asarray(valid.any(1))

    class Counted(Recorded):
        def __call__(self, name, p, x, live=None):
            if live is None:
                own = name == "a1_q"
                live = (lambda a: a[np.asarray(valid)]) if own else (lambda a: a[some])
            return super().__call__(name, p, x, live)

    def counted(layer, p, tokens, valid):
        layer.__class__ = Counted
        return loss(layer, p, tokens, valid)

    assert_equal(counted, written, p, (tokens, valid), float(valid.sum()))


@pytest.mark.usefixtures("float64")
def test_vision_transformer_with_a_class_token():
    """Behind the last attention, the class token's rows are all that the loss sees."""
    batch, patches, pixels, width, classes = 5, 4, 10, 8, 3
    p = transformer_params(
        width,
        12,
        1,
        patch=normal(pixels, width),
        patch_b=normal(width),
        cls=normal(1, 1, width),
        positions=normal(1, patches + 1, width),
        head=normal(width, classes),
        head_b=normal(classes),
    )
    x = normal(batch, patches, pixels)
    labels = jnp.asarray(RNG.integers(0, classes, batch))

    def loss(layer, p, x, labels):
        def first(a):
            return a[:, :1]

        x = layer("patch", p, x)
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (batch, 1, width)), x], 1)
        x = norm(x + p["positions"])
        q = layer("a0_q", p, x, first)
        k, v = layer("a0_k", p, x), layer("a0_v", p, x)
        scores = jnp.einsum("btd,bsd->bts", q, k) / width**0.5
        x = x + layer("a0_o", p, jax.nn.softmax(scores, -1) @ v, first)
        x = x + layer("d0", p, jax.nn.gelu(layer("u0", p, norm(x), first)), first)
        logits = layer("head", p, norm(x)[:, 0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def written(p, x, labels):
        return loss(dense, p, x, labels)

    assert_equal(loss, written, p, (x, labels), batch)
