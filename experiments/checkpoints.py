"""What an experiment writes while it runs: metrics, and checkpoints to go on from after a kill."""

import importlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from experiments import report
from experiments.history import Evaluation, History
from experiments.training import State

FOLDER = "checkpoints"
SETTINGS = "settings.json"
_AFRESH = "Leave out --resume to start afresh, or name another --output"

CLAIMED = "claimed"  # ends the name of the file of a run that one of several sessions makes
WAIT = 1.0  # seconds, from one look at another session's run to the next

Write = Callable[[str, Evaluation], None]
"""Takes a training run's label and an evaluation of it."""


class ResumeError(Exception):
    """An experiment cannot be resumed. The message says why, and what to do."""


class Session(ExitStack):
    """One attempt at an experiment: at all of it, or at what an earlier session did not finish.

    A session writes checkpoints and metrics into the folder of the results. A checkpoint has the
    state and the history of a training run. It is saved as a whole or not at all. Of a finished
    run only the history remains. Each session writes the metrics file again from the histories, so
    that no line stands there twice.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        seconds: float,
        tensorboard: bool,
        shared: bool = False,
    ):
        """Open the folder. Without `resume`, remove what an earlier session kept in it.

        Args:
          output: The folder of the results.
          settings: Everything that the results depend on.
          resume: Go on where the last session stopped, if there was one.
          seconds: The least time between two checkpoints of a run.
          tensorboard: Write the metrics for TensorBoard, too.
          shared: Whether it is one of several sessions in the folder at once. Each training run is
            made by the first that claims it; the others wait for it. They write no metrics: the
            session that comes after them does.

        Raises:
          ResumeError: If the last session had other settings.
        """
        super().__init__()
        self._folder, self._seconds, self.shared = output / FOLDER, seconds, shared
        self._mine: set[int] = set()
        self._known: Mapping[str, History] = {}
        if not resume or not _found(self._folder, settings):
            _empty(self._folder, settings)
        self._write: list[Write] = []
        if shared:
            return
        for claim in self._folder.glob(f"*.{CLAIMED}"):  # of sessions that were stopped
            claim.unlink()
        self._write.append(self.enter_context(_json_lines(output / "metrics.jsonl")))
        if tensorboard:
            self._write.append(self.enter_context(_tensorboard(output / "tensorboard")))

    def know(self, finished: Mapping[str, History]) -> None:
        """Take these training runs, by label, for finished, where there is no checkpoint."""
        self._known = finished

    def claims(self, number: int) -> bool:
        """Whether this session makes the training run with this number: the first to ask does."""
        if self.shared and number not in self._mine:
            try:
                (self._folder / f"{number}.{CLAIMED}").touch(exist_ok=False)
            except FileExistsError:
                return False
            self._mine.add(number)
        return True

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned to the first session in the folder, as JSON has it.

        Args:
          name: The name of the file in which it is kept.
          make: Called if there is none.

        Raises:
          ResumeError: If the file is damaged.
        """
        path = self._folder / f"{name}.json"
        if not path.exists():
            report.write_json(path, make())
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ResumeError(f"{path} cannot be read: {error}. Remove it to go on") from error

    def run(self, number: int, label: str, steps: int) -> "Run":
        """What is kept of the training run with this number, this label and so many steps.

        If another of the sessions at once makes the run, this waits until it is finished.
        """
        name = "".join(c if c.isalnum() or c in ".-" else "-" for c in f"{number}-{label}")
        if not self.claims(number):
            # A checkpoint gets its name once it is whole.
            while not (self._folder / name / str(steps)).exists():
                time.sleep(WAIT)
        known = self._known.get(label, History())
        known = known if known.steps == steps else History()
        run = Run(self._folder / name, self._seconds, label, self._write, known)
        self.callback(run.close)
        return run


class Run:
    """A training run's last checkpoint."""

    def __init__(
        self, folder: Path, seconds: float, label: str, write: Sequence[Write], known: History
    ):
        """Open the folder, and remove what an interrupted save has left there.

        Args:
          folder: Where the checkpoint is.
          seconds: The least time between two checkpoints.
          label: The run's name.
          write: Each of these takes the run's evaluations.
          known: How the training went, if there is no checkpoint.
        """
        # A save in the background would read arrays that the next step overwrites.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._folder, self._seconds, self._saved = folder, seconds, time.monotonic()
        with self._readable():
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._label, self._write, self._written, self._known = label, write, 0, known

    def history(self) -> History:
        """How the training went so far.

        Raises:
          ResumeError: If the checkpoint is damaged.
        """
        if self._manager.latest_step() is None:
            return self._known
        with self._readable():
            return History.of(self._restore("history", ocp.args.JsonRestore()))

    def state(self, start: State) -> State:
        """The state after these steps, if the run is not finished.

        Args:
          start: Its first state, for the shapes, dtypes and devices.

        Returns:
          The state.

        Raises:
          ResumeError: If the checkpoint is damaged.
        """
        with self._readable():
            return self._restore("state", ocp.args.StandardRestore(start))

    def keep(self, state: State, history: History, *, finished: bool) -> None:
        """Write the new evaluations. Save, if the time has come or the run is finished."""
        evaluations = history.evaluations()
        for evaluation in evaluations[self._written :]:
            for write in self._write:
                write(self._label, evaluation)
        self._written = len(evaluations)
        due = finished or time.monotonic() - self._saved >= self._seconds
        if due and history.steps > (self._manager.latest_step() or 0):
            items: dict[str, Any] = {"history": ocp.args.JsonSave(asdict(history))}
            if not finished:
                items["state"] = ocp.args.StandardSave(state)
            self._manager.save(history.steps, args=ocp.args.Composite(**items))
            self._saved = time.monotonic()

    def close(self) -> None:
        """Close the folder."""
        self._manager.close()

    def _restore(self, item: str, args: Any) -> Any:
        """An item of the last checkpoint."""
        step = self._manager.latest_step()
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Says what to do where a checkpoint cannot be read.

        Raises:
          ResumeError: If so.
        """
        try:
            yield
        except Exception as error:  # a damaged file can fail in any way
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ResumeError(
                f"the checkpoint in {self._folder} cannot be read: {first[:200]}. Remove this "
                "folder to start the run afresh, or leave out --resume to start all of them"
            ) from error


def _found(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is a session to resume.

    Raises:
      ResumeError: If it has other settings.
    """
    if not (folder / SETTINGS).exists():
        return False
    try:
        old = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ResumeError(f"{folder / SETTINGS} cannot be read: {error}. {_AFRESH}") from error
    if not isinstance(old, dict):
        raise ResumeError(f"{folder / SETTINGS} holds no settings. {_AFRESH}")
    new = report.plain(settings)
    changed = [
        f"{key} was {old.get(key)} and is {new.get(key)}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ResumeError(f"{folder} is of other settings: {'; '.join(changed)}. {_AFRESH}")
    return True


def _empty(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a session. Checkpoints never stand beside the settings of another session."""
    (folder / SETTINGS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    report.write_json(folder / SETTINGS, settings)


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    """A new file with a line for each evaluation, written as soon as it is made."""
    with path.open("w", encoding="utf-8") as file:

        def write(run: str, evaluation: Evaluation) -> None:
            step, seconds, values = evaluation
            line = {"run": run, "step": step, "seconds": seconds, **values}
            print(json.dumps(report.plain(line), allow_nan=False), file=file, flush=True)

        yield write


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Write]:
    """A new folder for TensorBoard, with one in it for each training run."""
    if folder.exists():
        shutil.rmtree(folder)
    writers: dict[str, Any] = {}

    def write(run: str, evaluation: Evaluation) -> None:
        if run not in writers:
            module = importlib.import_module("tensorboardX")
            writers[run] = module.SummaryWriter(str(folder / run))
        for metric, value in evaluation.values.items():
            writers[run].add_scalar(metric, value, evaluation.step)
        writers[run].flush()

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


def check_tensorboard() -> None:
    """Refuse to write for TensorBoard where its writer is missing.

    Raises:
      ValueError: If it is.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--tensorboard needs tensorboardX, which is missing: install it with pip")
