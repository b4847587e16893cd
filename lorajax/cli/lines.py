"""The lines that `lorajax finetune` prints while it trains."""

import sys
from typing import Any

from tqdm import tqdm

from lorajax import finetune


class Lines(finetune.Observer):
    """Prints what a run tells, with a bar on a terminal; a context manager.

    Args:
      recipe: of the run.
      unit: what samples are called.
    """

    def __init__(self, recipe: finetune.Recipe, unit: str = "samples"):
        self.recipe, self.unit = recipe, unit
        self.bar = tqdm(total=recipe.steps, disable=None, leave=False, unit="step")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *reason: object) -> None:
        self.bar.close()

    def resumed(self, step: int) -> None:
        """Says where the run goes on."""
        self.bar.update(step)
        print(f"resumed at step {step} of {self.recipe.steps}", flush=True)

    def stepped(self, record: finetune.Record) -> None:
        """Moves the bar; its loss waits for the device, so that it is looked at now and then."""
        self.bar.update()
        if not self.bar.disable and record.step % 10 == 0:
            self.bar.set_postfix(loss=f"{float(record.metrics.loss):.4f}")

    def tested(self, step: int, metrics: Any, rate: float | None) -> None:
        """Prints a line."""
        line = (
            f"step {step:>{len(str(self.recipe.steps))}}/{self.recipe.steps}  test loss "
            f"{float(metrics.loss):.4f}  accuracy {100 * float(metrics.accuracy):.2f} %"
        )
        if rate is not None:
            left = (self.recipe.steps - step) * self.recipe.batch_size / rate
            line += f"  {rate:,.0f} {self.unit}/s  {left:.0f} s left"
        tqdm.write(line, file=sys.stderr)
