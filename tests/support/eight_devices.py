"""Goes on with each optimizer's training on all devices: FOLDER, STEP to stop at, their NAMES."""

import json
import sys
from pathlib import Path

import chex
import jax
from checkpointed_training import problem, restore, save, train, training
from jax.sharding import AxisType, NamedSharding, PartitionSpec

DEVICES = jax.device_count()
MESH = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))


def sharding_of(shape):
    """By the first axis, where that is possible."""
    spec = PartitionSpec("devices") if shape and shape[0] % DEVICES == 0 else PartitionSpec()
    return NamedSharding(MESH, spec)


def main(folder, stop, names):
    batch_sharding, report = NamedSharding(MESH, PartitionSpec(None, "devices")), {}
    for name in names:
        tx, step = training(name)
        at, state = restore(folder / name, tx, sharding_of)
        _, alone = restore(folder / name, tx, lambda _: sharding_of(()))
        chex.assert_trees_all_equal(state, alone)
        w1 = state[0]["w1"]
        report[name] = {
            "devices": len(w1.devices()),
            "w1": w1.addressable_shards[0].data.shape,
            "step": at,
        }
        batches = jax.device_put(problem()[1][at:stop], batch_sharding)
        save(folder / name, stop, train(step, state, batches))
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
