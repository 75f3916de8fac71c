"""Telemetry of each optimizer step: a row of train.parquet, a line of the log, a point on dashboards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from palio.errors import BadInput

if TYPE_CHECKING:
    from palio.training.trainer import StepReport

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("grad_norm", pa.float64(), nullable=False),
        pa.field("tokens_per_second", pa.float64(), nullable=False),
        pa.field("elapsed_seconds", pa.float64(), nullable=False),
        pa.field("memory_bytes", pa.int64(), nullable=False),
        pa.field("validation_loss", pa.float64()),
    ]
)
"""One row per optimizer step; `elapsed_seconds` counts the budget used over all attempts."""

console = Console(stderr=True)


# --- log -------------------------------------------------------------------------------------------


@contextmanager
def progress(steps: int, done: int) -> Iterator[Callable[[StepReport, float], None]]:
    """Show a bar on a terminal, and elsewhere a line for about every twentieth of the steps.

    Yields a function that takes a step's report and the seconds left of the budget.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=steps, completed=done, note="")

            def draw(report: StepReport, left: float) -> None:
                bar.update(task, completed=report.step, note=_line(report, left))

            yield draw
        return
    every = max(1, steps // 20)

    def write(report: StepReport, left: float) -> None:
        if report.step % every == 0 or report.step in (1, steps):
            console.print(f"step {report.step}/{steps} {_line(report, left)}", highlight=False)

    yield write


def _line(report: StepReport, left: float) -> str:
    speed = report.tokens / report.seconds
    return f"loss {report.loss:.3f} {speed:.0f} tokens/s budget left {left:.0f} s"


# --- dashboards ------------------------------------------------------------------------------------

Sink = Callable[[Mapping[str, float]], None]
"""Takes one row of telemetry."""


@contextmanager
def dashboards(
    names: Sequence[str], *, folder: Path, run: str, key: str, recipe: dict[str, Any]
) -> Iterator[Sink]:
    """Yield a function that sends a row to all dashboards in `names`.

    `run` is the run's title, `key` its identity over all attempts. A dashboard that fails is dropped: its
    outage must not end a training. Raises BadInput if its library is not installed.
    """
    with ExitStack() as stack:
        sinks: dict[str, Sink] = {}

        def drop(name: str, error: Exception) -> None:
            sinks.pop(name, None)
            console.print(f"{name} disabled: {error}", highlight=False, markup=False)

        for name in names:
            try:
                sinks[name] = stack.enter_context(_DASHBOARDS[name](folder / name, run, key, recipe))
            except ImportError as error:
                why, fix = f"it is not installed ({error})", f"pip install {name}, or leave it out"
                raise BadInput("config", "telemetry.report_to", name, why=why, fix=fix) from None
            except Exception as error:
                drop(name, error)

        def send(row: Mapping[str, float]) -> None:
            for name, sink in list(sinks.items()):
                try:
                    sink(row)
                except Exception as error:
                    drop(name, error)

        yield send


@contextmanager
def _tensorboard(folder: Path, run: str, key: str, recipe: dict[str, Any]) -> Iterator[Sink]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_text("recipe", str(recipe))

        def send(row: Mapping[str, float]) -> None:
            for name, value in _values(row).items():
                writer.add_scalar(name, value, int(row["step"]))

        yield send


@contextmanager
def _wandb(folder: Path, run: str, key: str, recipe: dict[str, Any]) -> Iterator[Sink]:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(name=run, id=key, resume="allow", config=recipe, dir=str(folder)) as open_run:
        yield lambda row: open_run.log(_values(row), step=int(row["step"]))


@contextmanager
def _mlflow(folder: Path, run: str, key: str, recipe: dict[str, Any]) -> Iterator[Sink]:
    import mlflow

    with mlflow.start_run(run_name=run, tags={"palio.fingerprint": key}):
        mlflow.log_params(recipe)
        yield lambda row: mlflow.log_metrics(_values(row), step=int(row["step"]))


@contextmanager
def _trackio(folder: Path, run: str, key: str, recipe: dict[str, Any]) -> Iterator[Sink]:
    import trackio

    # It tells runs by their names: an attempt goes on with the run that has this one.
    open_run = trackio.init(project="palio", name=f"{run} {key[:12]}", resume="allow", config=recipe)
    try:
        yield lambda row: open_run.log(_values(row), step=int(row["step"]))
    finally:
        open_run.finish()


def _values(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


_DASHBOARDS: dict[str, Callable[[Path, str, str, dict[str, Any]], AbstractContextManager[Sink]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
