"""The AR model's text tables for a tokenizer of another size or language."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tortoise_jax.checkpoints.parts import AR, Part
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.text.cleaners import clean
from tortoise_jax.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "text_embedding", "text_head"


def with_tokenizer(pretrained: Pretrained, tokenizer: Tokenizer) -> Pretrained:
    """The checkpoint with a row for each token of `tokenizer` in the text embedding and the text head.

    A token that both tokenizers have keeps its row, even if its id moves; so do [STOP], which is 0 in each, and start,
    which is the last row. The old tokenizer splits a new token into its own ("ü" is read as "u"): the new row is the
    mean of their rows, or the mean of all rows if there are none.
    """
    config, params = pretrained.ar.config, pretrained.ar.params
    sources = rows_of(pretrained.tokenizer, tokenizer, config.text_tokens)
    mixed = lambda table: np.stack([np.asarray(table)[list(rows)].mean(0, dtype=np.float32) for rows in sources])
    head = params[HEAD]
    grown = dict(params)
    grown[EMBEDDING] = {"embedding": mixed(params[EMBEDDING]["embedding"])}
    grown[HEAD] = {"kernel": np.ascontiguousarray(mixed(np.asarray(head["kernel"]).T).T), "bias": mixed(head["bias"])}
    part = Part.of_tree(dataclasses.replace(config, text_tokens=tokenizer.vocab_size + 1), grown)
    return dataclasses.replace(pretrained.with_part(AR, part), tokenizer=tokenizer)


def rows_of(old: Tokenizer, new: Tokenizer, old_rows: int) -> list[Sequence[int]]:
    """For each row of the new tables, the rows of the old ones it is the mean of; the last is start's."""
    start = old_rows - 1
    known = {old.token(id_): id_ for id_ in range(min(old.vocab_size, start))}

    def rows_of_token(token: str) -> Sequence[int]:
        if token in known:
            return [known[token]]
        ids = old.encode_cleaned(clean(token, "tortoise").strip()) if token else []
        return [id_ for id_ in ids if id_ < start and id_ != old.unknown_id] or range(start)

    return [*(rows_of_token(new.token(id_)) for id_ in range(new.vocab_size)), [start]]


def kept(old: Tokenizer, new: Tokenizer) -> int:
    """How many tokens both have."""
    return len({old.token(id_) for id_ in range(old.vocab_size)} & {new.token(id_) for id_ in range(new.vocab_size)})
