"""UnifiedVoice, the autoregressive model: [conditioning | text | codes] through a GPT-2 stack, two heads.

A row is described by three integer arrays (tokens, token_types, positions), so one forward serves our joined rows,
upstream's padded layout and generation alike. Follows tortoise's UnifiedVoice as released.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from tortoise_jax.models.heads import Head
from tortoise_jax.models.layers import GPT2, Array, Compute, ConditioningEncoder, Embedding, layer_norm

CONDITIONING, TEXT, MEL = 0, 1, 2  # types of what is at a position; padding is of type CONDITIONING
CONDITIONING_VECTORS = 1  # n: positions that every row begins with


@dataclasses.dataclass(frozen=True)
class UnifiedVoiceConfig:
    """Dimensions of an AR model, read from its tensors; heads alone cannot be.

    text_tokens, mel_tokens, text_positions and mel_positions are rows of the tables.
    """

    layers: int
    width: int
    heads: int
    text_tokens: int
    mel_tokens: int
    text_positions: int
    mel_positions: int
    conditioning_layers: int = 6
    mel_channels: int = 80
    stop_text: int = 0

    @property
    def codes(self) -> int:
        """Codes of the dVAE it was trained with: the table without start and stop."""
        return self.mel_tokens - 2

    @property
    def start_mel(self) -> int:
        return self.mel_tokens - 2

    @property
    def stop_mel(self) -> int:
        return self.mel_tokens - 1

    @property
    def start_text(self) -> int:
        return self.text_tokens - 1


RELEASED = UnifiedVoiceConfig(
    layers=30, width=1024, heads=16, text_tokens=256, mel_tokens=8194, text_positions=404, mel_positions=608
)


class UnifiedVoice(nn.Module):
    """The AR model; `compute` changes how it is computed, not what.

    Rows b of s positions: conditioning (b, n, d), text and codes -> hidden states (b, s, d), and logits for what
    follows each position: of text (b, s, text_tokens) and of codes (b, s, mel_tokens).
    """

    config: UnifiedVoiceConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        """Its layers, named after the torch keys."""
        c, dtype = self.config, jnp.dtype(self.compute.dtype)
        self.conditioning_encoder = ConditioningEncoder(c.width, c.conditioning_layers, c.heads, self.compute)
        self.text_embedding = Embedding(c.text_tokens, c.width, dtype=dtype, compute=self.compute)
        self.mel_embedding = Embedding(c.mel_tokens, c.width, dtype=dtype, compute=self.compute)
        self.text_pos_embedding = Embedding(c.text_positions, c.width, dtype=dtype, compute=self.compute)
        self.mel_pos_embedding = Embedding(c.mel_positions, c.width, dtype=dtype, compute=self.compute)
        self.gpt = GPT2(c.layers, c.heads, self.compute)
        self.final_norm = layer_norm("final_norm", dtype)
        self.text_head = Head(c.width, c.text_tokens, dtype)
        self.mel_head = Head(c.width, c.mel_tokens, dtype)

    def condition(self, conditioning_mel: Array) -> Array:
        """Mels of u clips per row (b, u, t, m) -> conditioning (b, 1, d): the mean of the clips' vectors."""
        b, u, t, m = conditioning_mel.shape
        vectors = self.conditioning_encoder(conditioning_mel.reshape(b * u, t, m))
        return vectors.reshape(b, u, -1).mean(axis=1, keepdims=True)

    def embed(self, conditioning: Array, tokens: Array, token_types: Array, positions: Array) -> Array:
        """conditioning (b, n, d); tokens, token_types, positions (b, s) int32 -> (b, s, d).

        The first n positions are the conditioning, whatever the arrays say there. Padding is embedded as zeros.
        """
        n = conditioning.shape[1]
        tokens, token_types, positions = tokens[:, n:], token_types[:, n:], positions[:, n:]
        is_text, is_mel = token_types == TEXT, token_types == MEL
        pick = lambda where, index: jnp.where(where, index, 0)  # an index of the other table may be out of range
        text = self.text_embedding(pick(is_text, tokens)) + self.text_pos_embedding(pick(is_text, positions))
        mel = self.mel_embedding(pick(is_mel, tokens)) + self.mel_pos_embedding(pick(is_mel, positions))
        read = jnp.where(is_text[..., None], text, jnp.where(is_mel[..., None], mel, jnp.zeros_like(mel)))
        return jnp.concatenate([conditioning.astype(read.dtype), read], axis=1)

    def from_conditioning(
        self,
        conditioning: Array,
        tokens: Array,
        token_types: Array,
        positions: Array,
        dropout_keys: Array | None = None,
    ) -> dict[str, Array]:
        """conditioning (b, n, d); tokens, token_types, positions (b, s); dropout_keys (b,) or None -> intermediates.

        embedded (b, s, d), blocks (layers, b, s, d), hidden (b, s, d) after ln_f and final_norm,
        text_logits (b, s, text_tokens) and mel_logits (b, s, mel_tokens) float32, the prediction of what follows.
        """
        embedded = self.embed(conditioning, tokens, token_types, positions)
        normed, blocks = self.gpt(embedded, dropout_keys)
        hidden = self.final_norm(normed)  # on top of GPT-2's own ln_f: upstream applies both
        return {
            "embedded": embedded,
            "blocks": blocks,
            "hidden": hidden,
            "text_logits": self.text_head(hidden),
            "mel_logits": self.mel_head(hidden),
        }

    def hidden_states(
        self,
        conditioning: Array,
        tokens: Array,
        token_types: Array,
        positions: Array,
        dropout_keys: Array | None = None,
    ) -> Array:
        """`hidden` (b, s, d) of `from_conditioning` alone: compiled, it computes no logits."""
        return self.from_conditioning(conditioning, tokens, token_types, positions, dropout_keys)["hidden"]

    def losses(
        self,
        conditioning_mel: Array,
        tokens: Array,
        token_types: Array,
        positions: Array,
        targets: dict[str, Array],
        dropout_keys: Array | None = None,
    ) -> dict[str, Array]:
        """targets of "text" and "mel", each (b, s) and in its table -> their negative log-likelihoods (b, s) float32.

        As from the logits, which never exist all at once.
        """
        conditioning = self.condition(conditioning_mel)
        hidden = self.hidden_states(conditioning, tokens, token_types, positions, dropout_keys)
        return {
            "text": self.text_head.losses(hidden, targets["text"]),
            "mel": self.mel_head.losses(hidden, targets["mel"]),
        }

    def __call__(
        self,
        conditioning_mel: Array,
        tokens: Array,
        token_types: Array,
        positions: Array,
        dropout_keys: Array | None = None,
    ) -> dict[str, Array]:
        """conditioning_mel (b, u, t, m), the arrays of `from_conditioning` -> its dict and `conditioning` (b, 1, d)."""
        conditioning = self.condition(conditioning_mel)
        return {
            "conditioning": conditioning,
            **self.from_conditioning(conditioning, tokens, token_types, positions, dropout_keys),
        }
