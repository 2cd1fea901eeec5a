"""The rules of a contest: optimizers are tuned with equal effort and then compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from experiments.classification import Each, Metric, correct, cross_entropies, mean_of
from experiments.data import Dataset, Split
from experiments.history import History
from experiments.page import median
from experiments.runs import Runs
from experiments.stored import VALIDATION, label
from experiments.training import Augment, Step, shuffled_batches
from experiments.tuning import Tried, beyond, lowest, slower, summary, winner


class Parts(NamedTuple):
    """The images of a data set: to train on, to choose rates by, and to test."""

    train: Split
    validation: Split
    test: Split

    def evaluated(self, number: int | None) -> "Parts":
        """The same, with only so many images to choose rates by and to test."""
        few = (Split(*(array[:number] for array in part)) for part in self[1:])
        return Parts(self.train, *few)


class Task(NamedTuple):
    """What all entrants learn."""

    parts: Parts
    model: Any
    """The Flax network. Evaluation calls it with the images alone."""
    start: Callable[[int], tuple[Any, Any]]
    """Takes a seed to the first parameters and network state."""
    augment: Augment | None = None
    """What is done to each batch's images."""
    watched: Mapping[str, Metric] = {}
    """Further metrics that are evaluated during a run. Those named train_loss, validation_loss or
    as the score are taken instead of the means over examples."""
    losses: Each = cross_entropies
    """The loss is the mean of these."""
    score: str = "test_accuracy"
    """Name of the metric on the test examples."""
    scores: Each = correct
    """The score is the mean of these."""
    goal: str = "train_loss"
    """Name of the metric that is to become as low as the best baseline's is in the end."""


class Entrant(NamedTuple):
    """An optimizer, and the learning rates that are tried for it."""

    name: str
    at: Callable[..., tuple[optax.GradientTransformation, Step]]
    """Takes a rate, and those that won for the entrants before that are named in `given`, to the
    optimizer and its step. Where only the step is timed, it gets its own rate alone."""
    rates: Sequence[float]
    role: Literal["ours", "baseline", "other", "variant", "timed", "untuned"] = "baseline"
    """The best baseline sets the target. All variants are tuned, but only the best of them then
    runs. An entrant that is "timed" takes no part: only its step is timed. One that is "untuned"
    runs at its first rate, without tuning runs."""
    task: Task | None = None
    """What this entrant learns, if its network or its inputs are not those of the contest's task.
    It has the same number of images."""
    given: Sequence[str] = ()
    """The entrants before it whose rates it is told."""
    extended: bool = True
    """Whether its grid is extended, if the effort has extensions."""
    group: str = ""
    """The entrants of a group are tuned and run before those of the next. If a contest is stopped,
    its results are those of the groups that were finished."""

    def with_cached_steps(self) -> "Entrant":
        """The same, but it returns the same step each time for a rate: it is compiled once."""
        return self._replace(at=cache(self.at))


class Effort(NamedTuple):
    """How much is done for each entrant."""

    steps: int
    """Steps of a run."""
    tuning_steps: int
    """Steps of a tuning run."""
    seeds: int
    """Number of runs at the best rate."""
    seed: int
    """Seed of the tuning runs. The other runs have the seeds after it."""
    batch_size: int
    measured: int
    """The training loss is that of the first so many training images."""
    extensions: int = 0
    """While the winner is the least or the greatest of its rates, one more is tried beyond it, up
    to so many times: half a decade away."""

    def costs(self, entrants: Sequence[Entrant], seconds: Mapping[str, float]) -> list[float]:
        """Seconds of each run of a contest, in order.

        Args:
          entrants: Who takes part.
          seconds: Seconds of a step, by entrant. Variants were not timed, and count as the slowest.

        Returns:
          For each group, seconds of the tuning runs, then of the runs at the best rate, last the
          best variant's.
        """
        slowest, costs = max(seconds.values()), []
        for members in groups(entrants):
            tuned = [e for e in members if e.role != "untuned"]
            tuning = [seconds.get(e.name, slowest) for e in tuned for _ in e.rates]
            whole = [seconds[e.name] for e in members if e.role != "variant"] * self.seeds
            if any(e.role == "variant" for e in members):
                whole += [slowest] * self.seeds
            costs += [self.tuning_steps * s for s in tuning] + [self.steps * s for s in whole]
        return costs


def groups(entrants: Sequence[Entrant]) -> list[list[Entrant]]:
    """The entrants by group, in the order in which the groups appear."""
    names = dict.fromkeys(entrant.group for entrant in entrants)
    return [[entrant for entrant in entrants if entrant.group == name] for name in names]


def held_out(dataset: Dataset) -> Parts:
    """The images, with the last tenth of the training images for validation."""
    images, labels = dataset.train
    cut = len(labels) - max(1, round(0.1 * len(labels)))
    return Parts(Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:]), dataset.test)


def hold(
    runs: Runs, title: str, task: Task, entrants: Sequence[Entrant], effort: Effort
) -> dict[str, Any]:
    """Tune all entrants with equal effort, then let them run from the same starts.

    A tuning run takes `effort.tuning_steps` steps at one rate. The rate whose run ends with the
    lowest validation loss wins. A loss that is not a number loses. All grids are extended by the
    same rule (`effort.extensions`). Then, at each seed, all entrants start from the same weights
    and see the same batches. If a run diverges, the entrant's runs are made again at the best of
    its lower rates. The target is the lowest final training loss of the baselines, or what
    else the task has for its goal, in the median over the seeds.

    Where the runs are only those that were finished before, a group that lacks some is left out. So
    are all after one that lacks tuning runs, and seeds at which not all of the others have run.

    Args:
      runs: Makes the training runs, and shows their progress.
      title: Stands before the names of the runs, to tell them from those of another contest.
      task: What is learnt.
      entrants: Who takes part, each with as many rates as the others.
      effort: How much is done for each.

    Returns:
      The target, and every number by entrant. Variants have their tuning runs, and the best of
      them has its runs, too. The names of those that are not finished, and which of their runs
      are, to go on from. If no group with a baseline is finished, only these.

    Raises:
      ValueError: If some entrant has more rates than another.
    """
    counts = {entrant.name: len(entrant.rates) for entrant in entrants if entrant.role != "untuned"}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all entrants get the same number of tuning runs; rates: {counts}")
    tasks = {entrant.name: entrant.task or task for entrant in entrants}
    evaluated = {id(its): _evaluation(its, effort.measured) for its in tasks.values()}
    seeds = range(effort.seed + 1, effort.seed + 1 + effort.seeds)
    tuned: dict[str, Tried] = {}
    rates: dict[str, float] = {}
    taken: dict[str, list[float]] = {}  # the rates of the runs: all but the last diverged
    ran: dict[tuple[str, float], dict[int, History]] = {}
    unmade: list[str] = []  # runs that were to be made again
    made: list[dict[str, Any]] = []  # every run, also those of groups that are not finished

    def run(entrant: Entrant, rate: float, seed: int, tuning: bool) -> History:
        name = label(title, entrant.name, rate, None if tuning else seed)
        steps = effort.tuning_steps if tuning else effort.steps
        its = tasks[entrant.name]
        examples, validating, evaluating = evaluated[id(its)]
        history = runs.train(
            name,
            *entrant.at(rate, *(rates[name] for name in entrant.given)),
            its.start(seed),
            examples,
            shuffled_batches(seed, len(examples[1]), effort.batch_size, steps),
            {} if tuning else evaluating,
            validating if tuning else None,
            augment=its.augment,
        )
        its_seed = None if tuning else seed
        made.append({"entrant": entrant.name, "rate": rate, "seed": its_seed, "history": history})
        return history

    def tune(members: Sequence[Entrant]) -> bool:
        """Find the rates of a group. False if a run is not finished."""
        at_once = [e for e in members if e.role != "untuned" and not e.given]
        pairs = [(e, rate) for e in at_once for rate in e.rates]
        first = runs.several([partial(run, *pair, effort.seed, True) for pair in pairs])
        found = [(e.name, (r, h)) for (e, r), h in zip(pairs, first, strict=True) if h]
        if len(found) < len(pairs):
            return False
        for entrant in members:
            tried = [one for name, one in found if name == entrant.name]
            further = () if entrant.role == "untuned" else beyond(tried) if tried else entrant.rates
            most = len(entrant.rates) + effort.extensions * entrant.extended
            while further and len(tried) < most:
                if tried:
                    runs.expect_another()
                more = runs.several([partial(run, entrant, r, effort.seed, True) for r in further])
                tried += [(r, history) for r, history in zip(further, more, strict=True) if history]
                if not all(more):
                    return False
                further = beyond(tried)
            tuned[entrant.name] = tried
            rates[entrant.name] = winner(tried) if tried else entrant.rates[0]
        return True

    def run_whole(members: Sequence[Entrant]) -> None:
        """Make the runs of some entrants at their rates, and again where one of them diverges."""
        taken.update((entrant.name, [rates[entrant.name]]) for entrant in members)
        while members:
            pairs = [(entrant, seed) for seed in seeds for entrant in members]
            whole = [partial(run, e, taken[e.name][-1], seed, False) for e, seed in pairs]
            for (entrant, seed), history in zip(pairs, runs.several(whole), strict=True):
                its = ran.setdefault((entrant.name, taken[entrant.name][-1]), {})
                if history:
                    its[seed] = history
            members = [entrant for entrant in members if slow_down(entrant.name)]

    def slow_down(name: str) -> bool:
        """Whether an entrant's runs are to be made again, at a rate that is then the last taken."""
        last, its = taken[name][-1], ran[name, taken[name][-1]]
        if len(taken[name]) > 1 and not its:
            unmade.append(f"{name} at {taken[name].pop():g}")
        lower = slower(tuned[name], last, its.values())
        taken[name] += lower
        for _ in seeds if lower else ():
            runs.expect_another()
        return bool(lower)

    def ending(name: str) -> dict[int, History]:
        """An entrant's runs at the last rate that it took, by seed."""
        return ran[name, taken[name][-1]]

    finished, common = list[Entrant](), set(seeds)
    for members in groups(entrants):
        if not tune(members):
            break
        variants = [entrant for entrant in members if entrant.role == "variant"]
        run_whole([entrant for entrant in members if entrant not in variants])
        if variants:
            best = min(variants, key=lambda entrant: lowest(tuned[entrant.name]))
            run_whole([best])
        whole = [set(ending(entrant.name)) for entrant in members if entrant.name in taken]
        if theirs := common.intersection(*whole):
            finished, common = finished + members, theirs
    baselines = [entrant.name for entrant in finished if entrant.role == "baseline"]
    names = [entrant.name for entrant in finished if baselines]  # there is no target without
    unfinished = unmade + [entrant.name for entrant in entrants if entrant.name not in names]
    seeds = sorted(common)
    begun = [
        one | {"history": asdict(one["history"])}
        for one in made
        if one["entrant"] not in names or one["seed"] not in (None, *seeds)
    ]
    if not baselines:
        return {"unfinished": unfinished, "begun": begun}
    target = _target({n: [ending(n)[seed] for seed in seeds] for n in baselines}, task.goal)

    def results(name: str) -> dict[str, Any]:
        its = tasks[name]
        ended = [
            {
                "rate": rate,
                "runs": [
                    {"seed": seed, **history.summary()}
                    | {"to_target": reached(history, target, its.score, task.goal)}
                    for seed, history in ran[name, rate].items()
                    if seed in seeds
                ],
            }
            for rate in taken.get(name, ())
        ]
        tuning = {"tuning": summary(tuned[name]), "rate": rates[name]}
        return {**tuning, **ended[-1], "diverged": ended[:-1]} if ended else tuning

    return {
        "images": dict(zip(Parts._fields, (len(part.labels) for part in task.parts), strict=True))
        | {"training_loss": min(effort.measured, len(task.parts.train.labels))},
        "effort": effort._replace(seeds=len(seeds))._asdict(),
        "unfinished": unfinished,
        "begun": begun,
        "target": target,
        "entrants": {
            entrant.name: {"role": entrant.role, **results(entrant.name)}
            for entrant in finished
            if entrant.role != "variant"
        },
        "variants": {e.name: results(e.name) for e in finished if e.role == "variant"},
    }


def reached(
    history: History,
    target: Mapping[str, Any],
    score: str = "test_accuracy",
    goal: str = "train_loss",
) -> dict[str, float] | None:
    """The first evaluation at which the goal's metric is not above the target, if there is one."""
    first = history.metrics[goal].first_at_most(target[goal])
    if first is None:
        return None
    step, seconds = first
    curve = history.metrics[score]
    return {
        "step": step,
        "seconds": seconds,
        "seconds_with_compilation": history.compile_seconds + seconds,
        score: curve.value[curve.step.index(step)],
    }


def _target(ran: Mapping[str, Sequence[History]], goal: str) -> dict[str, Any]:
    """The entrant with the lowest final value of a metric in the median, and this value."""
    ends = {
        name: median([history.last(goal) for history in histories])
        for name, histories in ran.items()
    }
    best = min(ends, key=ends.__getitem__)
    return {"entrant": best, goal: ends[best]}


def _evaluation(task: Task, measured: int) -> tuple[Any, dict[str, Metric], dict[str, Metric]]:
    """The training images and labels; the metrics of tuning runs; the metrics of the others."""
    (images, labels), validation, test = task.parts
    model, losses = task.model, task.losses
    evaluating = {
        "train_loss": mean_of(model, losses, images[:measured], labels[:measured]),
        VALIDATION: mean_of(model, losses, *validation),
        task.score: mean_of(model, task.scores, *test),
        **task.watched,
    }
    validating = {VALIDATION: evaluating[VALIDATION]}
    return (jnp.asarray(images), jnp.asarray(labels)), validating, evaluating
