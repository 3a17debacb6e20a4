"""Writes the log records of a training run as TensorBoard events, to watch it while it runs."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import ConfigError
from weights.errors import TrainingError


class TensorboardLog:
    """The curves of one run: losses, tokens per second, table usage, learning rates.

        tensorboard --logdir FOLDER

    shows them. Use it in a ``with`` block, which closes it.
    """

    def __init__(self, folder: Path, step: int, rates: Mapping[str, float]) -> None:
        """Append to the folder, which is created if it does not exist.

        Args:
            folder: only for these events; several runs are compared if they have one parent.
            step: steps done by the run, 0 for a new one; events of later steps are hidden.
            rates: peak learning rates by name, such as ``dense`` and ``tables``.

        Raises:
            ConfigError: tensorboard is not installed, or the folder cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tensorboard: is not installed; run `pip install 'memplus[tensorboard]'`"
            ) from None
        self._rates = dict(rates)
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            raise ConfigError(f"tensorboard: {folder}: {error.strerror}") from None

    def __enter__(self) -> "TensorboardLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record of ``RunLog``, each as a curve named ``kind/field``.

        A record with ``lr_share`` also gives the curves ``learning_rate/NAME``.

        Raises:
            TrainingError: the events cannot be written; the message names the step.
        """
        kind, step = record["kind"], record["step"]
        numbers = {f"{kind}/{name}": value for name, value in record.items() if name != "step"}
        if "lr_share" in record:
            rates = self._rates.items()
            numbers |= {f"learning_rate/{name}": rate * record["lr_share"] for name, rate in rates}
        try:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    # a curve's name may have no spaces
                    self._writer.add_scalar(name.replace(" ", "_"), value, step)
        except OSError as error:
            raise TrainingError(f"step {step}: tensorboard: {error.strerror}") from None

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
