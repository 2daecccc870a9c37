"""The models as a person uses them from Python: one object, arrays in, arrays out.

    import tortoise_jax as tj
    model = tj.load("checkpoints/tortoise")
    codes = model.encode(model.log_mel(tj.read_audio("clip.wav")))

The parts it is made of (`model.params`, `tj.UnifiedVoice`, `tj.DiscreteVAE`, `tj.loss_sums`, …) are plain Flax modules,
trees and functions for those who want to build on them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax import audio, parallel
from tortoise_jax.checkpoints.parts import AR, CLVP, DIFFUSION, RANDOM_AR, RANDOM_DIFFUSION, VOCODER, Part
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, with_parts_of_origin
from tortoise_jax.data import batches
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.errors import UserError
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.dvae import DiscreteVAE
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.synthesis import presets, prompts, rendering, sampler, speech, voices
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.diffusion_inputs import DIFFUSION_CODES, diffusion_inputs
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.synthesis.voices import Voice
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training import losses


@dataclasses.dataclass(frozen=True)
class Tortoise:
    """The models of a converted checkpoint or a run.

    Axis letters: b rows, s positions, t frames, m = 80 bands, c codes, d width; samples are spelled out.

    Where a checkpoint holds one of them only, what needs the other raises UserError. So does every array that would
    give a plausible but wrong result: of another shape, out of range, not finite.
    """

    pretrained: Pretrained

    @property
    def params(self) -> Any:
        """The AR model's parameter tree."""
        return self.pretrained.ar.params

    @property
    def model(self) -> UnifiedVoice:
        return UnifiedVoice(self.pretrained.ar.config)

    @property
    def dvae(self) -> DiscreteVAE:
        return DiscreteVAE(self.pretrained.dvae.config)

    def text_ids(self, text: str, cleaner: str | None = None) -> list[int]:
        """Text, cleaned, as token ids, without start and stop. Raises UserError for characters that have no token.

        cleaner: "tortoise", "english", "basic" or "none"; None: as the run's data was cleaned, else "tortoise".
        """
        cleaner = cleaner or recorded(self.pretrained.source)
        unknown = self.pretrained.tokenizer.unknown_in_words(text, cleaner)
        if unknown:
            raise UserError(f"the tokenizer does not know {unknown}".replace("--cleaner english", 'cleaner="english"'))
        return self.pretrained.tokenizer.encode(text, cleaner)

    def log_mel(self, waveform: np.ndarray | Array) -> Array:
        """Waveform (…, samples) in [-1, 1] at 22050 Hz -> mel (…, 1 + samples // 256, m), mel norms applied."""
        check_waveform(waveform)
        return audio.log_mel(waveform, self.pretrained.mel_norms)

    def encode(self, mel: np.ndarray | Array) -> Array:
        """mel (t, m) or (b, t, m) -> codes (ceil(t / 4),) or (b, ceil(t / 4)) int32."""
        check_mel(mel, self.dvae.config.channels)
        return self._dvae("encode", mel, rank=3)

    def encode_clip(self, waveform: np.ndarray) -> Array:
        """Waveform (samples,) -> the codes (samples // 1024 + 1,) int32 that `prepare` stores for this clip.

        The last of them differ from those of `encode(log_mel(waveform))`: zeros follow the clip here, as in DLAS's
        trainer, where the other way reflects its end.
        """
        (codes,) = self._clip_encoder.encode([audio.int16_from_waveform(clip_of(waveform))])
        return jnp.asarray(codes, jnp.int32)

    @functools.cached_property
    def _clip_encoder(self) -> CodeEncoder:
        return CodeEncoder(self.dvae.config, self.pretrained.dvae.variables, self.pretrained.mel_norms, rows=1)

    def decode(self, codes: np.ndarray | Array) -> Array:
        """codes (c,) or (b, c), each below the codebook's size -> mel (4 c, m) or (b, 4 c, m)."""
        whole = whole_numbers(codes, "codes", self.dvae.config.codes)
        if whole.ndim not in (1, 2):
            raise UserError(f"codes have the shape {whole.shape}, expected (codes,) or (rows, codes)")
        return self._dvae("decode", whole.astype(np.int32), rank=2)

    def _dvae(self, method: str, x: np.ndarray | Array, rank: int) -> Array:
        batch = jnp.asarray(x)[None] if np.ndim(x) == rank - 1 else jnp.asarray(x)
        out = apply(self.dvae, method, self.pretrained.dvae.variables, batch)
        return out[0] if np.ndim(x) == rank - 1 else out

    def conditioning(self, waveforms: Sequence[np.ndarray]) -> Array:
        """Clips of one voice, each (samples,) in [-1, 1] or int16 -> conditioning (d,): the mean over their vectors.

        Each clip is cut or zero-padded to 132,300 samples, what synthesis gives the encoder: the vector depends on it.
        """
        if not len(waveforms):
            raise UserError("conditioning needs at least one clip")
        clips = [audio.crop_conditioning(clip_of(waveform)) for waveform in waveforms]
        return jnp.asarray(voices.condition(self.params, self.model.config, self.pretrained.mel_norms, clips))

    # Speech: all at once, or stage by stage.

    def speak(
        self,
        text: str,
        voice: str | Path | Voice,
        preset: str = "fast",
        *,
        cleaner: str | None = None,
        candidates: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        mend: bool = False,
        max_codes: int | None = None,
        seed: int = 0,
        dtype: str = "auto",
    ) -> tuple[np.ndarray, int]:
        """A text of any length said by a voice -> waveform (samples,) float32 in [-1, 1] and its rate in Hz.

        voice: a folder of clips, one clip, a saved .npz, "random", or what `voice` returns. preset: "ultra_fast",
        "fast", "standard", "high_quality", "hifigan" (each at 24 kHz) or "draft". candidates, steps, guidance,
        max_codes: in the place of the preset's. mend: no start token inside a row, no speech lost to a late stop, and
        candidates that never stop come last, in the place of what upstream does. dtype: "float32" or "bfloat16", of
        all but mels and vocoders; "auto": codes are drawn in what suits the hardware, all else is float32. What
        bfloat16 changes is measured in synthesis/rendering.py. Raises UserError.
        """
        chosen = presets.choose(preset, steps, guidance, mend, dtype)
        speech.check_seed(seed)
        cleaner = cleaner or recorded(self.pretrained.source)
        speech.check_text(self.pretrained, text, cleaner)
        texts = speech.split_text(self.pretrained, text, cleaner)
        count = whole_number(chosen.candidates if candidates is None else candidates, "candidates")
        options = speech.options_for(self.pretrained, chosen, max_codes=max_codes, dtype=dtype)
        parts = self._with(*chosen.needs(random_voice=False))
        presets.check_fit(parts, chosen)
        who = voice if isinstance(voice, Voice) else self.voice(voice, both=chosen.diffuses, seed=seed)
        self._check_voice(who, chosen.diffuses)
        weights = self._decoder_weights(dtype)
        said = speech.say(parts, weights, chosen, who.conditioning, texts, cleaner, seed, options, count)
        return speech.speech_of(parts, weights, chosen, said, who, seed)[0], chosen.rate

    def voice(self, source: str | Path, both: bool = True, seed: int = 0) -> Voice:
        """A folder of clips, one clip, a saved .npz, or "random" -> its vectors: conditioning (d,) and diffusion (e,).

        both: False for what draft and hifigan need, the first alone. seed: where long clips are cropped, or which
        random voice.
        """
        path = Path(source)
        halves = (RANDOM_AR, RANDOM_DIFFUSION)[: 1 + both] if voices.is_random(path) else ()
        made_by = halves or ((AR, DIFFUSION) if both else (AR,))
        found = voices.load(path, self._with(*made_by, AR), both, seed)
        self._check_voice(found, both)
        return found

    def sample(
        self, text_ids: Sequence[int], voice: Voice, candidates: int = 1, seed: int = 0, max_codes: int = 500
    ) -> list[np.ndarray]:
        """Text ids without start and stop -> the codes (c,) int32 of each candidate, without the stop."""
        self._check_voice(voice, both=False)
        room = min(max_codes, prompts.max_codes(self.model.config))
        options = SamplingOptions(max_codes=room)
        ids = self._ids_to_say(text_ids)
        count = whole_number(candidates, "candidates")
        drawn = sampler.sample(
            self._decoder_weights(), self.model.config, voice.conditioning, ids, seed, options, count
        )
        return [drawn.row(i) for i in range(len(drawn.lengths))]

    def score(self, text_ids: Sequence[int], codes: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
        """How well each row of codes, without stops, says the text, by the CLVP: (rows,) float32, higher is better."""
        clvp = self._with(CLVP).part(CLVP)
        ids = self._ids_to_say(text_ids, clvp.config.text_tokens)
        return rendering.scores(clvp, ids, self._rows(codes))

    def latents(self, text_ids: Sequence[int], codes: Sequence[int] | np.ndarray, voice: Voice) -> np.ndarray:
        """Codes (c,) without the stop -> what the diffusion decoder reads: the AR model's hidden states (s, d) at them.

        At the codes as TorToiSe repairs them, cut where they fall silent: s is mostly c + 8.
        """
        self._check_voice(voice, both=False)
        ids, (row,) = self._ids_to_say(text_ids), self._rows([codes])
        weights = self._decoder_weights("float32")
        return diffusion_inputs(weights, self.model.config, voice.conditioning, ids, row)[1]

    def diffuse(
        self, latents: np.ndarray, voice: Voice, steps: int = 80, guidance: float = 2.0, seed: int = 0
    ) -> np.ndarray:
        """Hidden states (s, d) -> a mel (t, 100) at 24 kHz, natural logarithms, t = s * 4 * 24000 // 22050."""
        diffusion = self._with(DIFFUSION).part(DIFFUSION)
        check_table(latents, "latents", diffusion.config.latent_width)
        self._check_voice(voice, both=True)
        presets.check_steps(steps)
        presets.check_guidance(guidance)
        states, vector = np.asarray(latents, np.float32), np.asarray(voice.diffusion)
        return rendering.diffuse(diffusion, [states], vector, steps, guidance or None, seed)[0]

    def vocode(self, mel: np.ndarray, seed: int = 0) -> np.ndarray:
        """A mel (t, 100) at 24 kHz, natural logarithms -> waveform (256 t,) float32 in [-1, 1]."""
        vocoder = self._with(VOCODER).part(VOCODER)
        check_table(mel, "a mel at 24 kHz", vocoder.config.mel_channels)
        return rendering.vocode(vocoder, [np.asarray(mel, np.float32)], seed)[0]

    @functools.cached_property
    def _laid_out(self) -> dict[str, DecoderWeights]:
        """What `_decoder_weights` has made."""
        return {}

    def _decoder_weights(self, dtype: str = "auto") -> DecoderWeights:
        """Laid out once of each dtype, for many texts."""
        dtype = parallel.best_dtype() if dtype == "auto" else dtype
        if dtype not in self._laid_out:
            self._laid_out[dtype] = DecoderWeights.of(self.params, self.model.config, dtype)
        return self._laid_out[dtype]

    @functools.cached_property
    def _lent(self) -> dict[str, Part]:
        """What a run lacks, of the checkpoint it began with, read when it is first needed."""
        return {}

    def _with(self, *names: str) -> Pretrained:
        """The checkpoint with these parts. Raises UserError where some are missing."""
        has = dataclasses.replace(self.pretrained, parts=self._lent | self.pretrained.parts)
        found = with_parts_of_origin(has, names)
        self._lent.update({name: found.part(name) for name in names})
        return found

    def _check_voice(self, voice: Voice, both: bool) -> None:
        """Raises UserError for a voice of another model, or one half of one where both are needed."""
        if not isinstance(voice, Voice):
            raise UserError(f"voice is a {type(voice).__name__}, expected what model.voice(…) returns")
        widths = {"conditioning": (voice.conditioning, self.model.config.width)}
        if both:
            if voice.diffusion is None:
                raise UserError("the voice has no vector for the diffusion decoder; make it with model.voice(clips)")
            widths["diffusion"] = (voice.diffusion, 2 * self._with(DIFFUSION).part(DIFFUSION).config.width)
        for name, (vector, width) in widths.items():
            if np.shape(vector) != (width,) or not is_finite(vector):
                raise UserError(
                    f"the voice's {name} has the shape {np.shape(vector)}, expected finite numbers of ({width},)"
                )

    def _ids_to_say(self, text_ids: Sequence[int], table: int | None = None) -> list[int]:
        config = self.model.config
        ids = stream(text_ids, "text ids", table or config.text_tokens - 1, config.text_positions - 1, config.stop_text)
        return ids.tolist()

    def _rows(self, codes: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """Rows of codes for the decoder, each at most as long as TorToiSe's."""
        if not len(codes):
            raise UserError("there are no codes: expected rows of them")
        config, longest = self.model.config, DIFFUSION_CODES + 2
        check = lambda i, row: stream(row, f"row {i}: codes", config.mel_tokens, longest, config.stop_mel)
        return [check(i, row) if len(row) else np.zeros(0, np.int32) for i, row in enumerate(codes)]

    # Training's side.

    def batch(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, np.ndarray]:
        """(text ids, codes) of b clips, without start and stop -> arrays (b, s).

        tokens, token_types, positions, targets int32, weights float32.

        A row is [conditioning | start text stop | start codes stop | padding]; see batches.py. Raises UserError for
        rows that the model has no embedding or position for.
        """
        if not len(rows):
            raise UserError("a batch needs at least one row: (text ids, codes)")
        config = self.model.config
        checked = [
            (
                stream(text, f"row {i}: text ids", config.text_tokens - 1, config.text_positions, config.stop_text),
                stream(codes, f"row {i}: codes", config.codes, config.mel_positions),
            )
            for i, (text, codes) in enumerate(rows)
        ]
        length = max(batches.row_length(len(text), len(codes)) for text, codes in checked)
        made = [batches.row(text, codes, length, config) for text, codes in checked]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}

    def outputs(self, conditioning: Array, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """conditioning (b, d), a batch's tokens, token_types, positions (b, s) -> the model's dict (text_logits, …)."""
        return self._outputs(self.params, conditioning, batch)

    def _outputs(self, params: Any, conditioning: Array, batch: Mapping[str, Any]) -> dict[str, Array]:
        b, d = len(batch["tokens"]), self.model.config.width
        if np.shape(conditioning) != (b, d) or not is_finite(conditioning):
            raise UserError(
                f"conditioning has the shape {np.shape(conditioning)}, expected finite numbers of ({b}, {d}): "
                "one voice per row of the batch"
            )
        rows = (batch[name] for name in ("tokens", "token_types", "positions"))
        return apply(self.model, "from_conditioning", {"params": params}, conditioning[:, None], *rows)

    def loss(self, params: Any, conditioning: Array, batch: Mapping[str, Any], text_weight: float = 0.01) -> Array:
        """What training minimises, float32 (): mel + text_weight * text, nats per token; `jax.grad` passes through.

        params: a tree like `model.params`, in their place. conditioning (b, d), and a batch with targets and weights.
        Without dropout. Raises UserError.
        """
        check_tree(params, self.params)
        if not 0 <= text_weight < np.inf:
            raise UserError(f"text_weight is {text_weight}, expected a number from 0")
        stop = self.model.config.stop_mel
        sums = losses.loss_sums(self._outputs(params, conditioning, batch), batch, stop)
        return losses.total_loss(sums, losses.counts(batch, stop), text_weight)

    def with_params(self, params: Any) -> Tortoise:
        """The same models with other weights of the AR model, a tree like `model.params`. Raises UserError."""
        check_tree(params, self.params)
        part = dataclasses.replace(self.pretrained.ar, variables={"params": params}, digest="")
        return Tortoise(dataclasses.replace(self.pretrained.with_part(AR, part), step=None))

    def export(self, path: str | Path, **options: Any) -> list[str]:
        """Writes a model as a torch file that TorToiSe loads, with its .json; returns what the command prints.

        options: part ("ar" where there is one, or "dvae", …), source, dtype and attn_masks, as the flags of
        convert/flax_to_torch.py. Needs torch (`tortoise_jax[convert]`). Raises UserError.
        """
        from tortoise_jax import commands  # all of training: not for those who only look at a model

        return commands.export(self.pretrained, path, **options)

    def losses(self, conditioning: Array, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean cross-entropies of a batch (with targets and weights too): text, mel, stop."""
        stop = self.model.config.stop_mel
        sums = losses.loss_sums(self.outputs(conditioning, batch), batch, stop)
        means = losses.means(sums, losses.counts(batch, stop))
        return {name: float(means[name]) for name in losses.STREAMS}


# --- what is given ----------------------------------------------------------------------------------------------------

LOUDEST = 8.0  # a float waveform beyond this is not scaled to [-1, 1]; resampling and mixing overshoot by less


def check_waveform(waveform: np.ndarray | Array) -> None:
    """Raises UserError for a waveform (..., samples) that is not sound in [-1, 1] or int16."""
    dtype = dtype_of(waveform)
    if dtype != np.int16 and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"a waveform is {dtype}, expected float32 in [-1, 1] or int16")
    if not np.size(waveform):
        raise UserError(f"a waveform has no samples (its shape is {np.shape(waveform)})")
    if not is_finite(waveform):
        raise UserError("a waveform has samples that are NaN or infinite")
    if dtype != np.int16 and not is_tracer(waveform) and (peak := float(np.abs(waveform).max())) > LOUDEST:
        raise UserError(f"a waveform of floats reaches {peak:g}, expected [-1, 1]; divide 16 bit samples by 32768")


def clip_of(waveform: np.ndarray | Array) -> np.ndarray:
    """A waveform (samples,) as float32 in [-1, 1]; int16 is scaled. Raises UserError."""
    check_waveform(waveform)
    if np.ndim(waveform) != 1:
        raise UserError(f"a clip has the shape {np.shape(waveform)}, expected (samples,); take one of its channels")
    clip = np.asarray(waveform)
    return np.asarray(audio.waveform_from_int16(clip) if clip.dtype == np.int16 else clip.astype(np.float32))


def check_mel(mel: np.ndarray | Array, bands: int) -> None:
    """Raises UserError for what is no mel (t, m) or (b, t, m) of at least one frame."""
    if np.ndim(mel) not in (2, 3) or np.shape(mel)[-1] != bands or not np.size(mel):
        raise UserError(f"a mel has the shape {np.shape(mel)}, expected (frames, {bands}) or (rows, frames, {bands})")
    if not jnp.issubdtype(dtype_of(mel), jnp.floating) or not is_finite(mel):
        raise UserError(f"a mel is {dtype_of(mel)}, expected floating-point numbers, all finite")


def whole_numbers(values: Any, what: str, end: int) -> np.ndarray:
    """Integers, each 0 to end - 1, of any shape but an empty one. Raises UserError."""
    numbers = np.asarray(values)
    if not numbers.size:
        raise UserError(f"{what} are empty")
    if numbers.dtype.kind not in "iu":
        raise UserError(f"{what} are {numbers.dtype}, expected integers")
    if not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise UserError(f"{what} must lie in 0..{end - 1}, found {numbers.min()}..{numbers.max()}")
    return numbers


def check_table(values: Any, what: str, width: int) -> None:
    """Raises UserError for what is no array (n, width) of finite floating-point numbers, n at least 1."""
    if np.ndim(values) != 2 or np.shape(values)[1] != width or not len(values):
        raise UserError(f"{what} of the shape {np.shape(values)}, expected (frames, {width})")
    if not jnp.issubdtype(dtype_of(values), jnp.floating) or not is_finite(values):
        raise UserError(f"{what} of {dtype_of(values)}, expected floating-point numbers, all finite")


def whole_number(value: Any, what: str) -> int:
    """A number of at least 1. Raises UserError."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is {value!r}, expected a whole number of at least 1")
    return int(value)


def stream(values: Any, what: str, end: int, positions: int, stop: int | None = None) -> np.ndarray:
    """The ids of a row's text or codes, (n,), without the start and stop that its positions hold too."""
    ids = whole_numbers(values, what, end)
    if ids.ndim != 1:
        raise UserError(f"{what} have the shape {ids.shape}, expected one axis")
    if len(ids) > positions - 2:
        raise UserError(f"{what} are {len(ids)}, the model has positions for {positions - 2}")
    if stop is not None and (ids == stop).any():
        raise UserError(f"{what} hold {stop}, which is stop; start and stop are added here")
    return ids.astype(np.int32)


def check_tree(params: Any, expected: Any) -> None:
    """Raises UserError for a tree of other names or shapes than the model's."""
    given, wanted = shapes_by_name(params), shapes_by_name(expected)
    other = sorted(name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name))
    if other:
        found, shape = (shapes.get(other[0], "none") for shapes in (given, wanted))
        raise UserError(f"params{other[0]} has the shape {found}, the model's has {shape}")


def shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}


def dtype_of(values: Any) -> np.dtype:
    return np.dtype(values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype)


def is_tracer(values: Any) -> bool:
    """Whether these are the arguments of a function that is being compiled, which have no values yet."""
    return isinstance(values, jax.core.Tracer)


def is_finite(values: Any) -> bool:
    return is_tracer(values) or bool(np.isfinite(values).all())


def load(path: str | Path, step: int | None = None) -> Tortoise:
    """A directory written by convert/torch_to_flax.py, or a run (its best step, or the one given)."""
    return Tortoise(load_pretrained(path, step=step))
