"""Text and a voice to codes: `sample` draws candidates for prompts, shared out over this host's devices.

Prompts are read (reading.py); then one compiled program draws codes in a loop against a cache of fixed length, and one
copies keys and values into the cache. When the codes outgrow the cache it moves to the next length, so early codes do
not pay for late ones.

Axis letters: r prompts, c candidates of a prompt, b = r * c rows, d model width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.errors import UserError
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.synthesis import decoder, reading
from tortoise_jax.synthesis.decoder import Cache, Controls, DecoderWeights, State
from tortoise_jax.synthesis.prompts import max_codes, pair_voices_and_texts, prompt_arrays

Tree = Any

CACHE_LENGTHS = (64, 128, 192, 256, 384, 512, 640)
CODES_PER_CALL = 16  # of the compiled loop; after each call the host looks whether all rows have stopped


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How codes are drawn; tortoise's own settings by default. A temperature of 0 takes the likeliest code.

    repetition_penalty: 1 is none; covers the codes so far, the start token and code 1, as in tortoise.
    max_codes: where a row ends that does not stop by itself; 500 are 23.2 s. extra_text_stop: the text ends in two
    stops at synthesis, one in training. start_inside: the start token may be drawn, as in tortoise, though no row was
    trained to hold a second one. dtype: "float32", "bfloat16", or "auto" for what suits the hardware.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    repetition_penalty: float = 2.0
    max_codes: int = 500
    extra_text_stop: bool = True
    start_inside: bool = True
    dtype: str = "auto"

    def __post_init__(self) -> None:
        rules = {
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 up to 1 (1 is off)"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            "max_codes": (self.max_codes >= 1, "at least 1"),
            "dtype": (self.dtype in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        }
        for name, (fine, expected) in rules.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    def controls(self, first: int, end: int) -> Controls:
        """For the codes number `first` up to `end`."""
        return Controls(
            first=np.int32(first),
            end=np.int32(end),
            temperature=np.float32(self.temperature or 1.0),
            tail=np.float32(1 - self.top_p),
            repetition_penalty=np.float32(self.repetition_penalty),
            start_inside=np.bool_(self.start_inside),
        )


@dataclasses.dataclass(frozen=True)
class Samples:
    """Drawn codes, numpy. Rows are prompt by prompt, a prompt's candidates together.

    codes (b, n) int32, n of the longest row, filled up with the stop token; lengths (b,) without the stop; stopped (b,)
    bool, whether the stop came; log_likelihood (b,), the model's own mean log-probability of a row's codes and stop,
    before any filter.
    """

    codes: np.ndarray
    lengths: np.ndarray
    log_likelihood: np.ndarray
    stopped: np.ndarray

    @classmethod
    def of(cls, config: UnifiedVoiceConfig, state: State) -> Samples:
        """What a finished state (numpy arrays) holds. Raises UserError where the model's outputs were not finite."""
        if not np.isfinite(state.log_likelihood).all():
            raise UserError("the model's outputs are not finite: its weights are damaged, or training diverged")
        ended = state.codes == config.stop_mel
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1), state.codes.shape[1]).astype(np.int32)
        mean = (state.log_likelihood / (lengths + state.stopped)).astype(np.float32)
        return cls(state.codes[:, : max(1, int(lengths.max()))], lengths, mean, np.asarray(state.stopped))

    def row(self, i: int) -> np.ndarray:
        """The codes of one row (length,), without the stop."""
        return self.codes[i, : self.lengths[i]]


def sample(
    params: Tree | DecoderWeights,
    config: UnifiedVoiceConfig,
    conditioning: np.ndarray | Array,
    text_ids: Sequence[int] | Sequence[Sequence[int]],
    seed: int | Sequence[int] = 0,
    options: SamplingOptions | None = None,
    candidates: int = 1,
    first_candidate: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Draws codes for every prompt, `candidates` of each: r * candidates rows, a prompt's candidates together.

    params: a parameter tree, or for many calls DecoderWeights. conditioning (d,) or (r, d); text_ids without stops, one
    list for all prompts or one per prompt. A row depends on the seed, its prompt's number and its own number among the
    candidates, which are counted from first_candidate; on nothing else. A seed per prompt takes the place of the
    prompt's number: each draws what it would alone. progress(n) is called now and then, when n codes per row are drawn.

    Raises UserError for texts and settings the model has no room for, and if the model's outputs are not finite.
    """
    options = options or SamplingOptions()
    if candidates < 1:
        raise UserError(f"{candidates} candidates were asked for, expected at least 1")
    if options.max_codes > max_codes(config):
        raise UserError(f"max_codes is {options.max_codes}, the model has room for {max_codes(config)}")
    voices, texts = pair_voices_and_texts(config, conditioning, text_ids)
    arrays = prompt_arrays(config, texts, options.extra_text_stop)
    weights = params if isinstance(params, DecoderWeights) else DecoderWeights.of(params, config, options.dtype)

    layout = Layout.of(len(texts), candidates, parallel.local_device_count())
    spread = lambda array: parallel.rows_on_devices(array[layout.prompt])
    inputs = [voices[:, None], *(arrays[name] for name in ("tokens", "token_types", "positions"))]
    prompts = reading.read_prompts(weights, config, *map(spread, inputs))
    in_prompt = np.arange(arrays["tokens"].shape[1]) < arrays["lengths"][layout.prompt_of_rows(), None]
    keys = layout.keys(seed, first_candidate)
    state = parallel.rows_on_devices(State.start(config, keys, options.max_codes))
    decode = _decode(config, options.top_k, options.temperature == 0, CODES_PER_CALL)

    # Where no rows share a prompt, its keys move into the cache, and no positions are left of it: one product over the
    # prompt and the codes is faster than two.
    cache: Cache | None = None
    before = 0  # positions of the cache that the prompt takes
    if layout.share == 1:
        cache, before = prompts, in_prompt.shape[1]
        prompts = []  # empty arrays on several devices end JAX 0.11 with SIGSEGV
    for first in range(0, options.max_codes, CODES_PER_CALL):
        end = min(first + CODES_PER_CALL, options.max_codes)
        room = next((length for length in CACHE_LENGTHS if length >= first + CODES_PER_CALL), first + CODES_PER_CALL)
        if cache is None or cache[0].positions < before + room:
            longer = parallel.rows_on_devices(decoder.empty_cache(config, len(keys), before + room, weights.dtype))
            cache = _write_cache()(np.int32(0), longer, cache) if cache else longer
        readable = np.hstack([in_prompt, np.broadcast_to(np.arange(room) < first, (len(keys), room))])
        state, recent = decode(
            weights, options.controls(first, end), prompts, cache, parallel.rows_on_devices(readable), state
        )
        if progress:
            progress(end)
        if np.all(np.asarray(state.stopped)):
            break
        if end < options.max_codes:
            cache = _write_cache()(np.int32(before + first), cache, recent)
    return Samples.of(config, jax.tree.map(lambda leaf: np.asarray(leaf)[layout.rows()], state))


@functools.cache
def _decode(config: UnifiedVoiceConfig, top_k: int, greedy: bool, longest: int) -> Callable[..., Any]:
    loop = functools.partial(decoder.decode, config=config, top_k=top_k, greedy=greedy, longest=longest)
    return parallel.by_rows(loop, replicated=2, sharded=4, donate=(5,))


@functools.cache
def _write_cache() -> Callable[..., Any]:
    return parallel.by_rows(decoder.write_cache, replicated=1, sharded=2, donate=(1,))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where r * c rows stand on the devices: a prompt is read `parts` times, each time for `share` of its candidates.

    prompt (r * parts, padded to a multiple of the devices): which prompt is read there. A prompt is read on as many
    devices as are needed to share its candidates out.
    """

    prompt: np.ndarray
    prompts: int
    candidates: int
    parts: int
    share: int

    @classmethod
    def of(cls, prompts: int, candidates: int, devices: int) -> Layout:
        parts = min(candidates, math.ceil(devices / prompts))
        used = prompts * parts
        prompt = np.repeat(np.arange(prompts), parts)
        padding = np.zeros(-used % devices, np.int64)
        return cls(np.concatenate([prompt, padding]), prompts, candidates, parts, math.ceil(candidates / parts))

    def prompt_of_rows(self) -> np.ndarray:
        """Which prompt each row is of (rows,)."""
        return np.repeat(self.prompt, self.share)

    def candidate(self) -> np.ndarray:
        """Which candidate of its prompt each row is (rows,); beyond the last where the shares are not equal."""
        part = np.arange(len(self.prompt)) % self.parts
        return (part[:, None] * self.share + np.arange(self.share)).reshape(-1)

    def keys(self, seed: int | Sequence[int], first_candidate: int) -> np.ndarray:
        """Each row's key (rows, 2) uint32, from the seed, its prompt and its candidate number; see `sample`."""
        fold = jax.vmap(jax.random.fold_in)
        prompt, candidate = self.prompt_of_rows(), first_candidate + self.candidate()
        if np.ndim(seed):
            seeds, number = np.asarray(seed)[prompt], np.zeros_like(prompt)
        else:
            seeds, number = np.full(prompt.shape, seed), prompt
        keys = fold(fold(jax.vmap(jax.random.key)(seeds), jnp.asarray(number)), jnp.asarray(candidate))
        return np.asarray(jax.random.key_data(keys))

    def rows(self) -> np.ndarray:
        """Where the rows that were asked for stand (b,), prompt by prompt."""
        candidate = self.candidate()[: self.prompts * self.parts * self.share]
        return np.flatnonzero(candidate < self.candidates)
