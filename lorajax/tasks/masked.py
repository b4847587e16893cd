"""Which words were hidden in a text: what BERT was pretrained on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lorajax.environment.judging import SHARE, at_least, judged
from lorajax.tasks.base import Batch, PRNGKey, Scores


@judged(vocabulary=at_least(1), mask=at_least(0), share=SHARE)
@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Which tokens stood where some were hidden, by BERT's recipe.

    Of the tokens that may be asked for, each is chosen with probability `share`; of those 80 % are
    replaced by the mask, 10 % by a random token, and 10 % stay. The columns are `tokens` (integers,
    shape (b, t)), `mask` (bool: where a token stands) and `types` (may be missing). The model is
    called as `model(tokens, mask=mask, types=types)` and returns logits of all words, of shape
    (b, t, vocabulary).

    A sample's scores are sums over its chosen tokens, and its count is how many there are; a batch
    in which none is chosen scores 0. Training draws anew at every step; where no key is given, as
    in an evaluation, the draw depends on the batch's shape alone.

    Attributes:
      vocabulary: number of tokens, of which random ones are drawn.
      mask: the token that hides another.
      special: tokens that are never chosen, such as those that begin and end a text.
      share: of the tokens that are chosen, in (0, 1).
      unit: "texts".

    Raises:
      ValueError: for a mask or a special token outside the vocabulary, or a share out of range.

    Source: Devlin et al. 2018 (arXiv:1810.04805), section 3.1, recalled.
    """

    vocabulary: int
    mask: int
    special: tuple[int, ...] = ()
    share: float = 0.15
    unit: str = "texts"

    def __post_init__(self):
        for name, tokens in (("mask", (self.mask,)), ("special", self.special)):
            for token in tokens:
                if not 0 <= token < self.vocabulary:
                    raise ValueError(
                        f"{name} is {token}; it must be a token below vocabulary = "
                        f"{self.vocabulary}."
                    )
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it must lie in (0, 1).")

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """Hides tokens; what stood there is in the column `wanted`, and where in `chosen`."""
        columns = {name: jnp.asarray(column) for name, column in batch.items()}
        tokens, free = columns["tokens"], columns["mask"].astype(bool)
        for token in self.special:
            free = free & (tokens != token)
        which, how, other = jax.random.split(jax.random.key(0) if key is None else key, 3)
        chosen = free & (jax.random.uniform(which, tokens.shape, jnp.float32) < self.share)
        fate = jax.random.uniform(how, tokens.shape, jnp.float32)
        drawn = jax.random.randint(other, tokens.shape, 0, self.vocabulary, tokens.dtype)
        hidden = jnp.where(fate < 0.8, jnp.asarray(self.mask, tokens.dtype), tokens)
        hidden = jnp.where(fate >= 0.9, drawn, hidden)
        shown = jnp.where(chosen, hidden, tokens)
        return {**columns, "tokens": shown, "wanted": tokens, "chosen": chosen}

    def stands(self, batch: Batch) -> Array:
        """Where a token stands; see `Padded`."""
        return batch["mask"].astype(bool)

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross-entropy of the chosen tokens; see `Task.scores`."""
        options = {"types": batch["types"]} if "types" in batch else {}
        logits: Array = model(batch["tokens"], mask=batch["mask"], **options)
        wanted, chosen = batch["wanted"], batch["chosen"]
        # Where nothing is chosen logits may be no numbers, and so may their derivative times zero.
        logits = jnp.where(chosen[:, :, None], logits.astype(jnp.float32), 0)
        asked = chosen.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        loss = (loss * asked).sum(-1)
        right = (logits.argmax(-1).astype(wanted.dtype) == wanted).astype(jnp.float32)
        return Scores(loss, loss, (right * asked).sum(-1), asked.sum(-1))
