"""What a model linearized in its adapted kernels would have reached, with its certificate."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax import adapters, data, optima
from lorajax.environment.judging import POSITIVE, SEED, at_least, judged
from lorajax.optima.certificate import singular_values
from lorajax.tasks import Asks, Task

TOLERANCE = 1e-2
"""Gap at which the solver rests, relative to the loss before training."""
STEPS = 160


@judged
def check_linear(task: Task) -> None:
    """Raises ValueError for a task whose model does not give each sample one score a class.

    Args:
      task: what a batch means.

    Raises:
      ValueError: for a task without `asked`.
    """
    if not isinstance(task, Asks):
        raise ValueError(
            f"task is {type(task).__name__}; the linearized model needs one that offers `asked`, "
            "an input and a class for each sample."
        )


@judged(decay=POSITIVE, samples=at_least(2), max_steps=at_least(1), seed=SEED)
def linear_optimum(
    model: Any,
    tuned: Any,
    task: Task,
    train: data.Table,
    test: data.Table,
    *,
    decay: float = 1e-3,
    samples: int = 128,
    max_steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Any]:
    """The global minimum of `L̂(X) + w‖X‖_*` of a model linearized where it was adapted.

    Args:
      model: before `adapt`, its head fitted, as the run began. It is not changed.
      tuned: the adapted model after training, whose update is judged by the same problem.
      task: one that offers `tasks.Asks`; classes are not smoothed and samples not augmented.
      train: what the loss is of, a random part of it.
      test: what is predicted, a random part of it.
      decay: w, of LoRA's factors: (w/2)(‖A‖² + ‖B‖²) is what w‖X‖_* stands for.
      samples: of each table, at most. Time and memory grow with them.
      max_steps: of the solver.
      seed: of both draws: data are often sorted by class, and the first ones are then of one.

    Returns:
      Plain numbers: `decay`, `samples`; `loss` and `accuracy` at the optimum, without decay, and
      `test_loss`, `test_accuracy`; `objective`, `lower_bound` and `gap` of the certificate;
      `nuclear` norm and largest `rank` of X; `run_loss` and `run_objective` of the trained update
      in the same linearized problem; `converged`.

    Raises:
      ValueError: for another task, and as `adapters.linearized`.

    Source: theory section 5; that a global minimum of the linearized loss is reached is stated
    (Jang, Lee, Ryu 2024, arXiv:2402.11867), the certificate derived. It says nothing of how far the
    network is from its linearization: compare `run_loss` with the run's own training loss.
    """
    check_linear(task)
    assert isinstance(task, Asks)
    asked, prepare = task.asked, task.prepare
    frozen = nnx.clone(model)
    frozen.eval()
    updates = adapters.updates_of(tuned)

    def problem(table: data.Table) -> Any:
        rows = table[np.sort(data.Order(len(table), min(samples, len(table)), seed)(0))]
        inputs, right = asked(prepare({name: jnp.asarray(x) for name, x in rows.items()}))
        inputs = inputs.astype(jnp.float32)
        classes = frozen(inputs[:1]).shape[-1]
        targets = jax.nn.one_hot(right, classes, dtype=jnp.float32)
        return adapters.linearized(frozen, inputs, targets, list(updates))

    fit, held = problem(train), problem(test)
    found = optima.minimize(fit, decay, tolerance=TOLERANCE, max_steps=max_steps)
    values = [np.asarray(x) for x in singular_values(found.update)]
    ranks = [int((s > 1e-4 * max(s.max(), 1e-30)).sum()) if s.any() else 0 for s in values]
    norms = [np.asarray(x) for x in singular_values(updates)]
    run_loss = float(fit.loss(updates))
    return {
        "decay": float(decay),
        "samples": len(fit.targets),
        **_scores(fit, found.update, ""),
        **_scores(held, found.update, "test_"),
        **{
            name: float(getattr(found.certificate, name))
            for name in ("objective", "lower_bound", "gap")
        },
        "nuclear": float(sum(s.sum() for s in values)),
        "rank": max(ranks, default=0),
        "run_loss": run_loss,
        "run_objective": run_loss + float(decay) * float(sum(s.sum() for s in norms)),
        "steps": int(found.steps),
        "converged": bool(found.converged),
    }


def _scores(problem: Any, update: Mapping[str, Any], prefix: str) -> dict[str, float]:
    outputs = problem.predict(update)
    hits = outputs.argmax(-1) == problem.targets.argmax(-1)
    return {f"{prefix}loss": float(problem.loss(update)), f"{prefix}accuracy": float(hits.mean())}
