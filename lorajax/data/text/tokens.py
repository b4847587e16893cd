"""A tokenizer from a Hugging Face folder: texts as numbers, by the `tokenizers` package."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorajax.environment import files
from lorajax.environment.judging import judged

_EXTRA = "pip install 'lorajax[text]'"
LARGEST = 2**27
"""Bytes of the largest tokenizer, or of the settings beside one: the largest known have 35 MB."""
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


class Encoded(NamedTuple):
    """A text as numbers.

    Attributes:
      tokens: int32 of shape (t,).
      types: int32 of shape (t,): 0 in the first text of a pair, 1 in the second.
      spans: int32 of shape (t, 2): where in the text each token begins and ends, in characters;
        None where they were not asked for.
    """

    tokens: np.ndarray
    types: np.ndarray
    spans: np.ndarray | None


class Tokenizer:
    """Texts to numbers and back, as the model of a folder was trained with.

    Args:
      folder: with `tokenizer.json`, and `tokenizer_config.json` or `special_tokens_map.json` for
        the names of special tokens; or a `tokenizer.json` itself.

    Attributes:
      folder: as given.
      settings: of `tokenizer_config.json`; empty if there is none.
      special: special tokens by their names, such as "bos_token".

    Padding needs no token of its own: what fills a text up is masked, so that its number is free,
    and `fill` is 0 where the tokenizer has no token for it.

    Raises:
      ValueError: for a folder without `tokenizer.json`, or one that is none.
      ImportError: where the package `tokenizers` is missing.
    """

    @judged
    def __init__(self, folder: str | os.PathLike):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"texts need the package tokenizers, which is not installed; {_EXTRA} brings it."
            ) from error
        path = Path(folder)
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"tokenizer is {str(folder)!r}, which has no tokenizer.json; name a Hugging Face "
                "folder that has one."
            )
        self.folder = file.parent
        files.regular(file, LARGEST)
        try:
            self._rust = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"{file} is no tokenizer: {error}.") from error
        # What a file asks for in passing would cut and fill texts without being asked.
        self._rust.no_truncation()
        self._rust.no_padding()
        self.settings = read_json(self.folder / "tokenizer_config.json")
        named = {**read_json(self.folder / "special_tokens_map.json"), **self.settings}
        self.special = {name: text for name in _SPECIAL if (text := _content(named.get(name)))}

    @property
    def size(self) -> int:
        """One more than the largest number that a text can become, added tokens among them."""
        return 1 + max(self._rust.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def fill(self) -> int:
        """What fills texts up; always masked."""
        return self.number("pad_token") or 0

    def number(self, name: str) -> int | None:
        """The number of a special token by its name, such as "eos_token"; None if it has none."""
        text = self.special.get(name)
        return None if text is None else self._rust.token_to_id(text)

    def check(self, vocabulary: int | None) -> None:
        """Raises ValueError unless a model of so many words knows every token."""
        if vocabulary is not None and self.size > vocabulary:
            raise ValueError(
                f"tokenizer {self.folder} has numbers up to {self.size - 1}, but the model's "
                f"vocabulary has {vocabulary} words; take the tokenizer that belongs to the model."
            )

    def encode(
        self,
        texts: Sequence[str],
        second: Sequence[str] | None = None,
        *,
        special: bool = True,
        spans: bool = False,
        max_length: int | None = None,
    ) -> list[Encoded]:
        """Texts, or pairs of them, as numbers.

        Args:
          texts: to encode.
          second: the other of each pair.
          special: whether what the model expects around a text is put there.
          spans: whether places in the text are told; finding them takes half of the time.
          max_length: to cut at, special tokens counted; of a pair the longer one is cut first.

        Returns:
          One Encoded a text.

        Raises:
          ValueError: for a length that leaves no room for a word.
        """
        self._rust.no_truncation()
        if max_length is not None:
            least = self._rust.num_special_tokens_to_add(second is not None) if special else 0
            if max_length <= least:
                raise ValueError(
                    f"max_length is {max_length}; with {least} special tokens it must be at least "
                    f"{least + 1}."
                )
            self._rust.enable_truncation(max_length)
        given = list(texts) if second is None else list(zip(texts, second, strict=True))
        found = self._rust.encode_batch(given, add_special_tokens=special)
        return [
            Encoded(
                np.array(each.ids, np.int32),
                np.array(each.type_ids, np.int32),
                np.array(each.offsets, np.int32).reshape(-1, 2) if spans else None,
            )
            for each in found
        ]

    def decode(self, tokens: Any) -> str:
        """The text of numbers, special tokens among them."""
        return self._rust.decode([int(each) for each in tokens], skip_special_tokens=False)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; empty if there is no such file.

    Raises:
      ValueError: for a file that is no JSON object.
    """
    if not path.is_file():
        return {}
    files.regular(path, LARGEST)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(found).__name__}.")
    return found


def _content(token: Any) -> str | None:
    """A special token's text, which newer files wrap in an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
