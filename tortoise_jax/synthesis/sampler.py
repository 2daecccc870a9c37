"""Text and a voice to codes, with a key/value cache; codes to a draft waveform, or to what TorToiSe's decoder takes.

Sampling runs three kinds of compiled programs: one that lays the weights out for decoding, one that reads the prompts
(the training forward itself), and one that draws codes in a loop against a cache of fixed length. When the codes
outgrow the cache it moves to the next length, so early codes do not pay for late ones. Prompts come in a few padded
lengths too: a new text compiles nothing new, or little.

Axis letters beside those of layers.py: r prompts, c candidates of a prompt, b = r * c rows, p prompt positions,
s codes the cache has room for, l layers, v code table, o outputs of a product, i its inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.audio import griffin_lim
from tortoise_jax.errors import UserError
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.layers import LAYER_NORM_EPSILON, Array, Compute, layer_norm
from tortoise_jax.models.unified_voice import (
    CONDITIONING,
    CONDITIONING_VECTORS,
    MEL,
    TEXT,
    UnifiedVoice,
    UnifiedVoiceConfig,
)
from tortoise_jax.synthesis import logits as sampling

Tree = Any
KeysAndValues = tuple[Array, Array]

PROMPT_LENGTHS = (64, 128, 256, 512)
CACHE_LENGTHS = (64, 128, 192, 256, 384, 512, 640)
CODES_A_CALL = 16  # drawn by one run of the compiled loop; after each the host looks whether all rows have stopped
PROMPT_CODE = 1  # tortoise fills the prompt of its sampler with it, so the repetition penalty covers it

# tortoise's hand-over to its diffusion model (fix_autoregressive_output and the cut before diffusion).
HAND_OVER_CODES = 500
SILENCE_CODE = 83
ENDING_CODES = (45, 45, 248)
SILENCE_RUN = 9  # the latents end where so many silent codes in a row have been seen


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How codes are drawn; tortoise's own settings by default. A temperature of 0 takes the likeliest code.

    repetition_penalty: 1 is none; covers the codes so far, the start token and code 1, as in tortoise.
    max_codes: where a row ends that does not stop by itself; 500 are 23.2 s. extra_text_stop: the text ends in two
    stops at synthesis, one in training. dtype: "float32", "bfloat16", or "auto" for what suits the hardware.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.8
    repetition_penalty: float = 2.0
    max_codes: int = 500
    extra_text_stop: bool = True
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


@dataclasses.dataclass(frozen=True)
class Samples:
    """Drawn codes, numpy. Rows are prompt by prompt, a prompt's candidates together.

    codes (b, n) int32, filled up with the stop token; lengths (b,) without the stop; stopped (b,) bool, whether the
    stop came; log_likelihood (b,), the model's own mean log-probability of a row's codes and stop, before any filter.
    """

    codes: np.ndarray
    lengths: np.ndarray
    log_likelihood: np.ndarray
    stopped: np.ndarray

    def row(self, i: int) -> np.ndarray:
        """The codes of one row (length,), without the stop."""
        return self.codes[i, : self.lengths[i]]


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Weights on the devices, as the programs want them: `params` for the prompts, `layers` and `ends` for decoding."""

    dtype: str
    params: Tree
    layers: list[Tree]
    ends: Tree


def prepare(params: Tree, config: UnifiedVoiceConfig, dtype: str = "auto") -> Prepared:
    """Lays parameters out for decoding, once for many calls of `sample`; takes their size again in memory.

    Weights become (out, in), to be multiplied by activations (in, rows) from the right: on CPU that is twice to three
    times as fast for a few rows as any other order, elsewhere no order matters. Layers come apart, because a loop over
    stacked layers copies each layer's weights before it uses them.
    """
    dtype = parallel.best_dtype() if dtype == "auto" else dtype
    params = parallel.on_every_device(params)
    layers, ends = lay_out(params, config, dtype)
    return Prepared(dtype, params, layers, ends)


@functools.partial(jax.jit, static_argnums=(1, 2))  # keeps the copies where the parameters are: on every device
def lay_out(params: Tree, config: UnifiedVoiceConfig, dtype: str) -> tuple[list[Tree], Tree]:
    """Stacked parameters -> one tree a layer, and what comes before and after the layers."""
    product = lambda p: {"weight": p["kernel"].T.astype(dtype), "bias": p["bias"][:, None].astype(dtype)}
    norm = lambda p: {"scale": p["scale"][:, None], "bias": p["bias"][:, None]}
    layers = []
    for i in range(config.layers):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], params["gpt"]["h"])
        layers.append(
            {
                "ln_1": norm(block["ln_1"]),
                "c_attn": product(block["attn"]["c_attn"]),
                "attn_proj": product(block["attn"]["c_proj"]),
                "ln_2": norm(block["ln_2"]),
                "c_fc": product(block["mlp"]["c_fc"]),
                "mlp_proj": product(block["mlp"]["c_proj"]),
            }
        )
    ends = {
        "mel_embedding": params["mel_embedding"]["embedding"].astype(dtype),
        "mel_pos_embedding": params["mel_pos_embedding"]["embedding"].astype(dtype),
        "ln_f": norm(params["gpt"]["ln_f"]),
        "final_norm": norm(params["final_norm"]),
        "mel_head": product(params["mel_head"]),
    }
    return layers, ends


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompt_arrays(
    config: UnifiedVoiceConfig, text_ids: Sequence[Sequence[int]], extra_text_stop: bool
) -> dict[str, np.ndarray]:
    """Text ids of r prompts -> tokens, token_types, positions (r, p) int32 and lengths (r,), padded to a common length.

    A prompt is [conditioning | start, text, stop (twice with the extra one)]. Raises UserError for a text that is
    empty, too long for the position table, or has ids outside the text table.
    """
    stops = [config.stop_text] * (2 if extra_text_stop else 1)
    limit = max_text_ids(config, extra_text_stop)
    rows = []
    for ids in text_ids:
        if not len(ids):
            raise UserError("the text is empty: there is nothing to say")
        if len(ids) > limit:
            raise UserError(f"the text has {len(ids)} tokens, the model has room for {limit}; split it")
        if min(ids) < 0 or max(ids) >= config.text_tokens:
            raise UserError(f"text ids must be 0 to {config.text_tokens - 1}, found {min(ids)} to {max(ids)}")
        rows.append([config.start_text, *ids, *stops])
    n = CONDITIONING_VECTORS
    lengths = np.array([n + len(row) for row in rows], np.int32)
    p = next((length for length in PROMPT_LENGTHS if length >= lengths.max()), int(lengths.max()))
    tokens = np.full((len(rows), p), config.stop_text, np.int32)
    for i, row in enumerate(rows):
        tokens[i, n : n + len(row)] = row
    places = np.arange(p) - n
    positions = np.where(np.arange(p) < lengths[:, None], places, 0).clip(0).astype(np.int32)
    token_types = np.broadcast_to(np.where(places < 0, CONDITIONING, TEXT), tokens.shape).astype(np.int32)
    return {"tokens": tokens, "token_types": token_types, "positions": positions, "lengths": lengths}


def max_text_ids(config: UnifiedVoiceConfig, extra_text_stop: bool = True) -> int:
    """Text tokens one prompt has room for beside its start and stops."""
    return config.text_positions - (3 if extra_text_stop else 2)


def max_codes(config: UnifiedVoiceConfig) -> int:
    """Codes one row has room for beside its start and stop."""
    return config.mel_positions - 2


def read_prompts(
    params: Tree,
    conditioning: Array,
    tokens: Array,
    token_types: Array,
    positions: Array,
    *,
    config: UnifiedVoiceConfig,
    dtype: str,
) -> list[KeysAndValues]:
    """Runs the prompts, conditioning (r, n, d) first -> keys and values (r, h, p, k) of every layer."""
    r, p, d = *tokens.shape, config.width
    outputs: Any = UnifiedVoice(config, Compute(dtype=dtype)).apply(
        {"params": params}, conditioning, tokens, token_types, positions, method=UnifiedVoice.from_conditioning
    )
    inputs = jnp.concatenate([outputs["embedded"][None], outputs["blocks"][:-1]])  # (l, r, p, d)

    def keys_and_values(layer: tuple[Tree, Array]) -> Array:
        block, x = layer
        normed: Any = layer_norm("ln_1", jnp.dtype(dtype)).apply({"params": block["ln_1"]}, x)
        c_attn = nn.Dense(3 * d, dtype=jnp.dtype(dtype))
        qkv: Any = c_attn.apply({"params": block["attn"]["c_attn"]}, normed.reshape(r * p, d))
        return qkv[:, d:].reshape(r, p, 2, config.heads, d // config.heads).transpose(2, 0, 3, 1, 4)

    cache = jax.lax.map(keys_and_values, (params["gpt"]["h"], inputs))
    return [(cache[i, 0], cache[i, 1]) for i in range(config.layers)]


# --- decoding ---------------------------------------------------------------------------------------------------------


def normalise(x: Array, weights: Tree) -> Array:
    """Layer norm over the features of x (d, b), in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=0)
    variance = jnp.square(centred).mean(axis=0)
    return (centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * weights["scale"] + weights["bias"]).astype(x.dtype)


def product(weights: Tree, x: Array) -> Array:
    """x (i, b) -> (o, b)."""
    return weights["weight"] @ x + weights["bias"]


def attend_cached(
    q: Array,
    prompt: KeysAndValues,
    cache: KeysAndValues,
    recent: KeysAndValues,
    allowed: Array,
) -> Array:
    """q (b, h, k) over keys and values of prompts (r, h, p, k), earlier codes (b, h, s, k), recent ones (b, h, n, k).

    allowed (b, p + s + n) says of which. -> (b, h, k). Candidates of a prompt read its keys once, as one product.
    """
    r, h, p, k = prompt[0].shape
    b, _, s, _ = cache[0].shape
    shared = lambda x: x.reshape(r, b // r, h, x.shape[-1])
    scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * q.shape[-1] ** -0.5
    to_prompt = scores("rchk,rhpk->rchp", shared(q), prompt[0]).reshape(b, h, p)
    to_codes = [scores("bhk,bhsk->bhs", q, keys) for keys in (cache[0], recent[0])]
    lowest = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(allowed[:, None], jnp.concatenate([to_prompt, *to_codes], axis=-1), lowest))
    weights = weights.astype(q.dtype)
    mixed = jnp.einsum("rchp,rhpk->rchk", shared(weights[..., :p]), prompt[1]).reshape(b, h, k)
    for share, values in ((weights[..., p : p + s], cache[1]), (weights[..., p + s :], recent[1])):
        mixed = mixed + jnp.einsum("bhs,bhsk->bhk", share, values)
    return mixed


def block(
    weights: Tree,
    x: Array,
    prompt: KeysAndValues,
    cache: KeysAndValues,
    recent: KeysAndValues,
    allowed: Array,
    place: Array,
    heads: int,
) -> tuple[Array, KeysAndValues]:
    """One GPT-2 block for one new position a row: x (d, b) -> (d, b), and `recent` with its key and value in place."""
    d, b = x.shape
    qkv = product(weights["c_attn"], normalise(x, weights["ln_1"]))
    q, k, v = qkv.reshape(3, heads, d // heads, b).transpose(0, 3, 1, 2)  # three of (b, h, k)
    recent = jax.tree.map(lambda old, new: write_codes(old, new[:, :, None], place), recent, (k, v))
    mixed = attend_cached(q, prompt, cache, recent, allowed)
    x = x + product(weights["attn_proj"], mixed.reshape(b, d).T)
    wide = nn.gelu(product(weights["c_fc"], normalise(x, weights["ln_2"])), approximate=True)
    return x + product(weights["mlp_proj"], wide), recent


def write_codes(old: Array, new: Array, place: Array) -> Array:
    """Keys or values (b, h, s, k) with newer ones (b, h, n, k) from a place on."""
    zero = jnp.zeros_like(place)
    return jax.lax.dynamic_update_slice(old, new, (zero, zero, place, zero))


def decode(
    layers: list[Tree],
    ends: Tree,
    controls: Tree,
    prompts: list[KeysAndValues],
    cache: list[KeysAndValues],
    earlier: Array,
    state: Tree,
    *,
    config: UnifiedVoiceConfig,
    top_k: int,
    greedy: bool,
    longest: int,
) -> tuple[Tree, list[KeysAndValues]]:
    """Draws codes, at most `longest`, from step controls["first"] to controls["end"], or until all rows have stopped.

    earlier (b, p + s): which keys of prompts and cache there are. Returns the state and the keys and values of these
    codes (b, h, n, k), for `remember`. They are apart from the cache because what a compiled loop changes it may copy
    at every step; the cache stays as it is.
    """
    keys = jax.random.wrap_key_data(state["keys"].reshape(-1, state["keys"].shape[-1]))
    first = controls["first"]
    blank = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], longest, x.shape[3]), x.dtype), cache)

    def unfinished(carry: tuple[Array, Tree, Any]) -> Array:
        step, state, _ = carry
        return (step < controls["end"]) & ~jnp.all(state["stopped"])

    def one_code(carry: tuple[Array, Tree, Any]) -> tuple[Array, Tree, Any]:
        step, state, recent = carry
        x = (ends["mel_embedding"][state["token"]] + ends["mel_pos_embedding"][step]).T
        now = jnp.broadcast_to(jnp.arange(longest) <= step - first, (len(earlier), longest))
        allowed = jnp.concatenate([earlier, now], axis=1)
        grown = []
        for weights, prompt, old, new in zip(layers, prompts, cache, recent, strict=True):
            x, new = block(weights, x, prompt, old, new, allowed, step - first, config.heads)
            grown.append(new)
        hidden = normalise(normalise(x, ends["ln_f"]), ends["final_norm"])
        logits = product(ends["mel_head"], hidden).astype(jnp.float32).T
        penalised = sampling.penalise(logits, state["seen"], controls["repetition_penalty"])
        if greedy:
            drawn = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            drawn = sampling.draw(step_keys, penalised, controls["temperature"], top_k, controls["tail"])
        drawn = jnp.where(state["stopped"], config.stop_mel, drawn)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)[:, 0]
        rows = jnp.arange(len(drawn))
        state = state | {
            "token": drawn,
            "codes": jax.lax.dynamic_update_slice(state["codes"], drawn[:, None], (jnp.zeros_like(step), step)),
            "seen": state["seen"].at[rows, drawn].set(True),
            "stopped": state["stopped"] | (drawn == config.stop_mel),
            "log_likelihood": state["log_likelihood"] + jnp.where(state["stopped"], 0.0, likelihood),
        }
        return step + 1, state, grown

    _, state, recent = jax.lax.while_loop(unfinished, one_code, (first, state, blank))
    return state, recent


def remember(place: Array, cache: list[KeysAndValues], recent: list[KeysAndValues]) -> list[KeysAndValues]:
    """The cache with the keys and values of a finished call, of prompts, or of a shorter cache."""
    return jax.tree.map(lambda old, new: write_codes(old, new, place), cache, recent)


def start_state(config: UnifiedVoiceConfig, keys: np.ndarray, codes: int) -> Tree:
    """Nothing drawn yet: the start token is to be read; it and code 1 count as seen. keys (b, 2) uint32."""
    b = len(keys)
    seen = np.zeros((b, config.mel_tokens), bool)
    seen[:, [PROMPT_CODE, config.start_mel]] = True
    return {
        "keys": keys,
        "token": np.full(b, config.start_mel, np.int32),
        "codes": np.full((b, codes), config.stop_mel, np.int32),
        "seen": seen,
        "stopped": np.zeros(b, bool),
        "log_likelihood": np.zeros(b, np.float32),
    }


@functools.cache
def _read_prompts(config: UnifiedVoiceConfig, dtype: str) -> Callable[..., Any]:
    return parallel.by_rows(functools.partial(read_prompts, config=config, dtype=dtype), replicated=1, sharded=4)


@functools.cache
def _decode(config: UnifiedVoiceConfig, top_k: int, greedy: bool, longest: int) -> Callable[..., Any]:
    loop = functools.partial(decode, config=config, top_k=top_k, greedy=greedy, longest=longest)
    return parallel.by_rows(loop, replicated=3, sharded=4, donate=(6,))


@functools.cache
def _remember() -> Callable[..., Any]:
    return parallel.by_rows(remember, replicated=1, sharded=2, donate=(1,))


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample(
    params: Tree | Prepared,
    config: UnifiedVoiceConfig,
    conditioning: np.ndarray | Array,
    text_ids: Sequence[int] | Sequence[Sequence[int]],
    seed: int = 0,
    options: SamplingOptions | None = None,
    candidates: int = 1,
    first_candidate: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Samples:
    """Draws codes for every prompt, `candidates` of each: r * candidates rows, a prompt's candidates together.

    conditioning (d,) or (r, d); text_ids without stops, one list for all prompts or one a prompt. The rows are shared
    out over this host's devices. A row depends on the seed, its prompt's number and its own number among the
    candidates, which are counted from first_candidate; on nothing else. progress(n) is called now and then, when n
    codes a row are drawn. For many calls pass what `prepare` returns.

    Raises UserError for texts and settings the model has no room for, and if the model's outputs are not finite.
    """
    options = options or SamplingOptions()
    if candidates < 1:
        raise UserError(f"{candidates} candidates were asked for, expected at least 1")
    if options.max_codes > max_codes(config):
        raise UserError(f"max_codes is {options.max_codes}, the model has room for {max_codes(config)}")
    voices, texts = one_a_prompt(config, conditioning, text_ids)
    prompts = prompt_arrays(config, texts, options.extra_text_stop)
    prepared = params if isinstance(params, Prepared) else prepare(params, config, options.dtype)

    layout = Layout.of(len(texts), candidates, parallel.local_device_count())
    keys = layout.keys(seed, first_candidate)
    spread = lambda array: parallel.rows_on_devices(array[layout.prompt])
    read = _read_prompts(config, prepared.dtype)
    shared = read(
        prepared.params, spread(voices[:, None]), *(spread(prompts[n]) for n in ("tokens", "token_types", "positions"))
    )
    in_prompt = np.arange(prompts["tokens"].shape[1]) < prompts["lengths"][layout.prompt_of_rows(), None]
    state = jax.tree.map(parallel.rows_on_devices, start_state(config, keys, options.max_codes))
    loop = _decode(config, options.top_k, options.temperature == 0, CODES_A_CALL)

    cache, before = None, 0  # the cache's places before those of codes
    if layout.share == 1:  # no candidates read a prompt together: one product with it and its codes is quicker than two
        cache, shared, before = shared, jax.tree.map(lambda x: x[:, :, :0], shared), in_prompt.shape[1]
    for first in range(0, options.max_codes, CODES_A_CALL):
        end = min(first + CODES_A_CALL, options.max_codes)
        room = next((length for length in CACHE_LENGTHS if length >= first + CODES_A_CALL), first + CODES_A_CALL)
        if cache is None or cache[0][0].shape[2] < before + room:
            longer = empty_cache(config, len(keys), before + room, prepared.dtype)
            cache = _remember()(np.int32(0), longer, cache) if cache else longer
        earlier = np.hstack([in_prompt, np.broadcast_to(np.arange(room) < first, (len(keys), room))])
        controls = {
            "first": np.int32(first),
            "end": np.int32(end),
            "temperature": np.float32(options.temperature or 1.0),
            "tail": np.float32(1 - options.top_p),
            "repetition_penalty": np.float32(options.repetition_penalty),
        }
        state, recent = loop(
            prepared.layers, prepared.ends, controls, shared, cache, parallel.rows_on_devices(earlier), state
        )
        if progress:
            progress(end)
        if np.all(np.asarray(state["stopped"])):
            break
        if end < options.max_codes:
            cache = _remember()(np.int32(before + first), cache, recent)
    return collect(config, jax.tree.map(lambda leaf: np.asarray(leaf)[layout.rows()], state))


def one_a_prompt(
    config: UnifiedVoiceConfig, conditioning: np.ndarray | Array, text_ids: Sequence[Any]
) -> tuple[np.ndarray, list[list[int]]]:
    """Conditioning (r, d) and r lists of text ids, from one of either for all, or one a prompt."""
    voices = np.atleast_2d(np.asarray(conditioning, np.float32))
    texts = [list(map(int, ids)) for ids in text_ids] if len(text_ids) and np.ndim(text_ids[0]) else [list(text_ids)]
    if voices.ndim != 2 or voices.shape[1] != config.width:
        raise UserError(
            f"the voice is a vector of {voices.shape[-1]}, the model's width is {config.width}: another model's"
        )
    r = max(len(voices), len(texts))
    if {len(voices), len(texts)} - {1, r}:
        raise UserError(f"{len(voices)} voices do not go with {len(texts)} texts; give one of either, or as many")
    return np.broadcast_to(voices, (r, config.width)), texts * (r // len(texts))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where r * c rows stand on the devices: m rows of prompts a prompt, each with n of its candidates.

    prompt (r * m, padded to the devices): which prompt stands there. A prompt is read on as many devices as are needed
    to share its candidates out.
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
        """Which prompt each row is of (b,)."""
        return np.repeat(self.prompt, self.share)

    def candidate(self) -> np.ndarray:
        """Which candidate of its prompt each row is; beyond the last where the share does not come out even."""
        part = np.arange(len(self.prompt)) % self.parts
        return (part[:, None] * self.share + np.arange(self.share)).reshape(-1)

    def keys(self, seed: int, first_candidate: int) -> np.ndarray:
        """Each row's key (b, 2) uint32, from the seed, its prompt and its candidate number."""
        fold = jax.vmap(jax.random.fold_in)
        candidate = first_candidate + self.candidate()
        keys = jnp.broadcast_to(jax.random.key(seed), candidate.shape)
        keys = fold(fold(keys, jnp.asarray(self.prompt_of_rows())), jnp.asarray(candidate))
        return np.asarray(jax.random.key_data(keys))

    def rows(self) -> np.ndarray:
        """Where the rows that were asked for stand, prompt by prompt."""
        candidate = self.candidate()[: self.prompts * self.parts * self.share]
        return np.flatnonzero(candidate < self.candidates)


def empty_cache(config: UnifiedVoiceConfig, rows: int, room: int, dtype: str) -> list[KeysAndValues]:
    """Keys and values (b, h, room, k) of every layer."""
    shape = (rows, config.heads, room, config.width // config.heads)
    return parallel.rows_on_devices([(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)])


def collect(config: UnifiedVoiceConfig, state: Tree) -> Samples:
    codes, stopped = state["codes"], state["stopped"]
    ended = codes == config.stop_mel
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1), codes.shape[1]).astype(np.int32)
    if not np.isfinite(state["log_likelihood"]).all():
        raise UserError("the model's outputs are not finite: its weights are damaged, or training diverged")
    mean = (state["log_likelihood"] / (lengths + stopped)).astype(np.float32)
    return Samples(codes[:, : max(1, int(lengths.max()))], lengths, mean, stopped)


# --- after sampling ---------------------------------------------------------------------------------------------------


def decode_mel(dvae_variables: Tree, config: DVAEConfig, codes: np.ndarray) -> np.ndarray:
    """Codes (b, c) -> log-mel (b, 4 c, m), mel norms applied."""
    return np.asarray(_dvae_decode(config)(dvae_variables, np.asarray(codes, np.int32)))


@functools.cache
def _dvae_decode(config: DVAEConfig) -> Callable[..., Any]:
    model = DiscreteVAE(config)
    return jax.jit(lambda variables, codes: model.apply(variables, codes, method=DiscreteVAE.decode))


def draft(dvae_variables: Tree, config: DVAEConfig, mel_norms: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes (c,) -> a draft waveform float32 (1024 c - 256,), whose code count is c: dVAE decoder, then Griffin-Lim.

    No codes give no samples. What is no code of the dVAE (a model may draw its own start token) is left out.
    """
    codes = codes[(codes >= 0) & (codes < config.codes)]
    if not len(codes):
        return np.zeros(0, np.float32)
    return griffin_lim(decode_mel(dvae_variables, config, codes[None])[0], mel_norms)


def hand_over(
    params: Tree,
    config: UnifiedVoiceConfig,
    conditioning: np.ndarray,
    text_ids: Sequence[int],
    codes: np.ndarray,
    total: int = HAND_OVER_CODES,
    silence: int = SILENCE_CODE,
    ending: tuple[int, int, int] = ENDING_CODES,
) -> tuple[np.ndarray, np.ndarray]:
    """What tortoise gives its diffusion model: the codes (total,) it repairs, and hidden states (kept, d) float32.

    conditioning (d,), text_ids and codes (c,) without stops. As tortoise does it: codes that have not filled `total`
    are filled up with silence from the stop on, the last three of all become `ending`; the text has its extra stop;
    hidden states are those at the start token and the codes but the last, cut before the ninth silence in a row. Codes
    that fill `total` never stopped and are not repaired.
    """
    if len(codes) > total:
        raise UserError(
            f"{len(codes)} codes, but TorToiSe's decoder is handed at most {total}: sample with max_codes {total}"
        )
    check_hand_over(config, total, max(silence, *ending))
    repaired = np.concatenate([codes, np.full(total - len(codes), silence)]).astype(np.int32)
    if len(codes) < total:
        repaired[-3:] = ending
    prompt = prompt_arrays(config, [text_ids], extra_text_stop=True)
    p = int(prompt["lengths"][0])
    tokens, token_types, positions = (prompt[name][:, :p] for name in ("tokens", "token_types", "positions"))
    read = np.concatenate([[config.start_mel], repaired[:-1]])[None].astype(np.int32)
    hidden = _hidden(config)(
        params,
        np.asarray(conditioning, np.float32)[None, None],
        np.concatenate([tokens, read], axis=1),
        np.concatenate([token_types, np.full_like(read, MEL)], axis=1),
        np.concatenate([positions, np.arange(total, dtype=np.int32)[None]], axis=1),
    )
    return repaired, np.asarray(hidden)[0, p : p + silent_from(repaired, silence)]


def check_hand_over(config: UnifiedVoiceConfig, total: int = HAND_OVER_CODES, highest: int = max(ENDING_CODES)) -> None:
    """Raises UserError for a model whose codes or room TorToiSe's decoder cannot have been trained for."""
    if highest >= config.codes:
        raise UserError(
            f"this model has {config.codes} codes, but TorToiSe's decoder was trained with 8192 and is handed code "
            f"{highest}: it does not fit this model"
        )
    if total > max_codes(config):
        raise UserError(f"the model has room for {max_codes(config)} codes, TorToiSe's decoder is handed {total}")


def silent_from(codes: np.ndarray, silence: int) -> int:
    """Where the ninth silent code in a row stands, or the number of codes."""
    run = 0
    for place, code in enumerate(codes.tolist()):
        run = run + 1 if code == silence else 0
        if run == SILENCE_RUN:
            return place
    return len(codes)


@functools.cache
def _hidden(config: UnifiedVoiceConfig) -> Callable[..., Array]:
    def hidden(params: Tree, *arrays: Array) -> Array:
        outputs: Any = UnifiedVoice(config).apply({"params": params}, *arrays, method=UnifiedVoice.from_conditioning)
        return outputs["hidden"]

    return jax.jit(hidden)
