"""The command line: one subcommand for each experiment."""

import sys
from collections.abc import Sequence

import tyro

from experiments.benchmarks.bench import Bench
from experiments.checkpoints import ResumeError
from experiments.conjugate_gradient import ConjugateGradient
from experiments.data import DataError
from experiments.everyday.experiment import Everyday
from experiments.index import Index
from experiments.kept import Kept
from experiments.lecture import Lecture
from experiments.lenet import LeNet
from experiments.loss_surface import LossSurface
from experiments.mlp import Mlp
from experiments.output_paths import OutputPaths
from experiments.quickstart import Quickstart
from experiments.rates import Rates
from experiments.resnet20 import Resnet20
from experiments.vgg import Vgg

EXPERIMENTS = {
    "quickstart": Quickstart,
    "lenet": LeNet,
    "rates": Rates,
    "loss_surface": LossSurface,
    "output_paths": OutputPaths,
    "mlp": Mlp,
    "resnet20": Resnet20,
    "vgg": Vgg,
    "lecture": Lecture,
    "conjugate_gradient": ConjugateGradient,
    "everyday": Everyday,
    "kept": Kept,
    "bench": Bench,
    "index": Index,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line names; without a name, print the help.

    Args:
      args: The command line's arguments; `sys.argv`'s by default.

    Raises:
      SystemExit: With status 2 and one clear message, if an option, a data file or what is to be
        resumed is wrong.
    """
    experiment = tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS,
        prog="python -m experiments",
        description="Experiments with cqjax: each has its own options, see NAME --help.",
        args=(sys.argv[1:] if args is None else list(args)) or ["--help"],
    )
    try:
        experiment.run()
    except (DataError, ResumeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
