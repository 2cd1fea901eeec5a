"""The command line: one subcommand for each experiment."""

import contextlib
import io
import signal
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from experiments import options
from experiments.benchmarks.bench import Bench
from experiments.checkpoints import ResumeError
from experiments.conjugate_gradient import ConjugateGradient
from experiments.data import DataError
from experiments.everyday.experiment import Everyday
from experiments.index import Index
from experiments.kept import Kept
from experiments.lecture import Lecture
from experiments.lenet import LeNet
from experiments.locks import InUseError, claimed
from experiments.loss_surface import LossSurface
from experiments.mlp import Mlp
from experiments.output_paths import OutputPaths
from experiments.paper import Paper
from experiments.pinn.experiment import Pinn
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
    "pinn": Pinn,
    "paper": Paper,
    "bench": Bench,
    "index": Index,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment that the command line names; without a name, print the help.

    Args:
      args: The command line's arguments; `sys.argv`'s by default.

    Raises:
      SystemExit: With status 2 and one clear message, if an option, a data file or what is to be
        resumed is wrong, another run is in the folder, or the memory is too small; with status
        130 after Ctrl-C.
    """
    experiment = tyro.extras.subcommand_cli_from_dict(
        EXPERIMENTS,
        prog="python -m experiments",
        description="Experiments with cqjax: each has its own options, see NAME --help.",
        args=(sys.argv[1:] if args is None else list(args)) or ["--help"],
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII alone shows "?"
    output = getattr(experiment, "output", None)
    try:
        with contextlib.nullcontext() if output is None else claimed(output):
            experiment.run()
    except (DataError, ResumeError, InUseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError as error:
        print(f"error: these settings need more memory than there is: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"stopped{_how_to_go_on(experiment)}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _how_to_go_on(experiment: Any) -> str:
    if not hasattr(experiment, "resume"):
        return ""
    names = {kind: name for name, kind in EXPERIMENTS.items()}
    return f"; to go on: {options.command(names[type(experiment)], experiment)} --resume"


def _unraisable(about: Any) -> None:
    """Says what went wrong where nobody could be told; not what Orbax's threads say at their end.

    They have more to tell of a damaged checkpoint when nobody listens any more.
    """
    if str(about.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(about)


if __name__ == "__main__":
    sys.unraisablehook = _unraisable
    main()
