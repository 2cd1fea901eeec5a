"""Trains by C-Nesterov on many devices in three ways, and compares them with a single device.

On one host it takes all accelerators, or eight simulated CPU devices if there is one device only:

    python tests/support/multi_device.py

On several hosts, run it on each of them, with the address of the first host (number 0):

    python tests/support/multi_device.py --coordinator HOST0:1234 --processes 2 --process-id 0
    python tests/support/multi_device.py --coordinator HOST0:1234 --processes 2 --process-id 1

Both may be the same machine. HOST0 is 127.0.0.1 then, and each process has `--cpu-devices`
simulated devices of its own. On Cloud TPU and Slurm, `jax.distributed.initialize()` needs no
arguments.
"""

import argparse
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cqjax

BATCH, WIDTHS = 256, (32, 64, 64, 64, 8)


def init(key):
    """The parameters of a fully-connected network."""
    shapes = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.random.normal(k, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def batch(step):
    """All inputs and targets of a step. A real program would load only those of its own devices."""
    x = np.random.default_rng(step).normal(size=(BATCH, WIDTHS[0])).astype(np.float32)
    return x, np.sin(x[:, : WIDTHS[-1]])


def loss_fn(params, x, y):
    """Half the squared error: its mean over the examples that are passed."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return 0.5 * jnp.mean(jnp.sum((x @ last["w"] + last["b"] - y) ** 2, -1))


def mean_loss(params, x, y):
    """The mean of `loss_fn` over all devices, within `jax.shard_map`."""
    return jax.lax.pmean(loss_fn(params, x, y), "data")


def train_step(loss, tx, params, state, x, y):
    """One step of training: the new parameters, the optimizer's new state, and the loss."""
    value, grads, captures = cqjax.value_and_grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params, captures=captures)
    return optax.apply_updates(params, updates), state, value


def optimizer(**options):
    """C-Nesterov: consequentialism, then SGD with Nesterov momentum."""
    tx = cqjax.scale_by_consequentialism(damping=1e-2, relative_damping=1e-2, **options)
    return optax.chain(tx, optax.sgd(0.1, momentum=0.9, nesterov=True))


def fully_sharded(mesh, tree):
    """Splits every array along its first axis whose length is a multiple of the devices."""

    def sharding(array):
        shape = jnp.shape(array)
        axis = next((i for i, n in enumerate(shape) if n % mesh.size == 0), None)
        return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, "data"))

    return jax.tree.map(sharding, tree)


def ways(mesh, params):
    """Yields for each way to train its name, its step, the optimizer's state, and the shardings."""
    copied, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    tx = optimizer()
    state = tx.init(params)
    trees = params, state
    everywhere = jax.tree.map(lambda _: copied, trees)
    step = functools.partial(train_step, loss_fn, tx)

    def jitted(step, shardings):
        in_shardings, out_shardings = (*shardings, split, split), (*shardings, copied)
        return jax.jit(step, in_shardings=in_shardings, out_shardings=out_shardings)

    yield "data parallel, jit", jitted(step, everywhere), state, everywhere
    shards = fully_sharded(mesh, trees)
    yield "FSDP, jit", jitted(step, shards), state, shards
    shared_out = optimizer(spread_over=split)
    mapped = jax.shard_map(
        functools.partial(train_step, mean_loss, shared_out),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    yield "shard_map, inversions shared out", jax.jit(mapped), state, everywhere


def run(step, params, state, split, steps):
    """Trains for some steps: the parameters, the loss, and the collectives in a compiled step."""
    for number in range(steps):
        x, y = (global_array(part, split) for part in batch(number))
        if not number:
            text = step.lower(params, state, x, y).compile().as_text()
        params, state, value = step(params, state, x, y)
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return params, value, ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def global_array(part, sharding):
    """The array over all devices, to which each process contributes its own devices' rows."""
    return jax.make_array_from_callback(part.shape, sharding, part.__getitem__)


def on_this_host(mesh, tree):
    """The tree with whole arrays, as NumPy arrays of this process."""
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(tree)
    return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), whole)


def main():
    """Trains in all ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cpu-devices", type=int, default=8, help="simulated, in each process")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, default=0)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    params, tx = init(jax.random.key(0)), optimizer()
    alone, state = params, tx.init(params)
    step = jax.jit(functools.partial(train_step, loss_fn, tx))
    for number in range(args.steps):
        alone, state, value = step(alone, state, *batch(number))
    rows = [("one device", "", f"{value:.6f}", "")]
    for name, step, state, shardings in ways(mesh, params):
        trees = jax.tree.map(jax.device_put, (params, state), shardings)
        split = NamedSharding(mesh, P("data"))
        trained, value, collectives = run(step, *trees, split, args.steps)
        trained = on_this_host(mesh, trained)
        errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), trained, alone)
        value = float(on_this_host(mesh, value))
        rows.append((name, f"{max(jax.tree.leaves(errors)):.1e}", f"{value:.6f}", collectives))
    if jax.process_index() == 0:
        kind = devices[0].device_kind
        print(f"{len(devices)} devices ({kind}), {jax.process_count()} processes")
        print("| way | differs from one device by | loss | collectives in a step |")
        print("| --- | --- | --- | --- |")
        for row in rows:
            print("| " + " | ".join(row) + " |")
    if args.coordinator:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
