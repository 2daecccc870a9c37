"""The ways from drawn codes to sound: which parts of a checkpoint each needs, and upstream's numbers for it."""

from __future__ import annotations

import dataclasses
import math

from tortoise_jax.audio import DIFFUSION_RATE, SAMPLE_RATE
from tortoise_jax.checkpoints.parts import AR, CLVP, DIFFUSION, DVAE, HIFIGAN, RANDOM_AR, RANDOM_DIFFUSION, VOCODER
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.errors import UserError
from tortoise_jax.synthesis.diffusion_inputs import DIFFUSION_CODES, check_diffusion_inputs
from tortoise_jax.synthesis.schedule import TRAINED_STEPS

RENDERED = (CLVP, DIFFUSION, VOCODER)
DRAFT = "draft"
MENDED = "no start token inside a row, no speech lost to a late stop, candidates that never stop come last"


@dataclasses.dataclass(frozen=True)
class Preset:
    """parts: what it needs beside the AR model. candidates: drawn of each part of a text, the best is kept.

    max_codes: where a candidate ends that does not stop by itself. steps, guidance: of the diffusion decoder; its
    strength, None for none. mend: what upstream does badly is done better, see `MENDED`. dtype: of the products after
    the codes, see rendering.py: "float32" or "bfloat16".
    """

    parts: tuple[str, ...]
    candidates: int
    max_codes: int = DIFFUSION_CODES
    steps: int = 0
    guidance: float | None = None
    mend: bool = False
    dtype: str = "float32"

    @property
    def diffuses(self) -> bool:
        return DIFFUSION in self.parts

    @property
    def rate(self) -> int:
        """Of its sound, in Hz."""
        return SAMPLE_RATE if DVAE in self.parts else DIFFUSION_RATE

    def without_candidates(self) -> Preset:
        """The same way to sound of what was drawn, without any choice among candidates."""
        return dataclasses.replace(self, candidates=1, parts=tuple(part for part in self.parts if part != CLVP))

    def needs(self, random_voice: bool) -> tuple[str, ...]:
        """All parts that it takes to say something, by a random voice or by one that is given."""
        halves = (RANDOM_AR, RANDOM_DIFFUSION) if self.diffuses else (RANDOM_AR,)
        return (AR, *self.parts, *(halves if random_voice else ()))


PRESETS = {
    DRAFT: Preset((DVAE,), candidates=4),
    "hifigan": Preset((HIFIGAN,), candidates=1, max_codes=603),
    "ultra_fast": Preset(RENDERED, candidates=16, steps=30),
    "fast": Preset(RENDERED, candidates=96, steps=80, guidance=2.0),
    "standard": Preset(RENDERED, candidates=256, steps=200, guidance=2.0),
    "high_quality": Preset(RENDERED, candidates=256, steps=400, guidance=2.0),
}


def choose(
    name: str, steps: int | None = None, guidance: float | None = None, mend: bool = False, dtype: str = "auto"
) -> Preset:
    """The preset of this name, with what is given in the place of its own numbers; a guidance of 0 is none.

    mend: `MENDED`, in the place of what upstream does. dtype: as in `SamplingOptions`, which checks it; "auto" leaves
    what comes after the codes in float32.

    Raises UserError.
    """
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}, expected {', '.join(PRESETS)}")
    preset = dataclasses.replace(PRESETS[name], mend=mend, dtype="float32" if dtype == "auto" else dtype)
    for what, value in (("steps", steps), ("guidance", guidance)):
        if value is not None and not preset.diffuses:
            raise UserError(f"{what} is of the diffusion decoder, which preset {name} has not")
    if steps is not None:
        check_steps(steps)
        preset = dataclasses.replace(preset, steps=steps)
    if guidance is not None:
        check_guidance(guidance)
        preset = dataclasses.replace(preset, guidance=guidance or None)
    return preset


def check_steps(steps: int) -> None:
    if not 2 <= steps <= TRAINED_STEPS:
        raise UserError(f"steps is {steps}, expected 2 to {TRAINED_STEPS}")


def check_guidance(guidance: float) -> None:
    if not 0 <= guidance < math.inf:
        raise UserError(f"guidance is {guidance}, expected at least 0 (0 is off)")


def check_fit(pretrained: Pretrained, preset: Preset, random_voice: bool = False) -> None:
    """Raises UserError for parts whose widths, codes or mels are not each other's. pretrained: has what it needs."""
    needed = preset.needs(random_voice)
    config = {name: pretrained.part(name).config for name in needed}
    ar = config[AR]
    pairs: dict[str, tuple[int, int]] = {}
    if preset.diffuses:
        check_diffusion_inputs(ar)
        diffusion, vocoder = config[DIFFUSION], config[VOCODER]
        pairs |= {
            "the AR model's width and the diffusion decoder's latents": (ar.width, diffusion.latent_width),
            "the mel bands of diffusion decoder and vocoder": (diffusion.mel_channels, vocoder.mel_channels),
        }
    if CLVP in needed:
        pairs["the AR model's codes and CLVP's"] = (ar.codes, config[CLVP].speech_tokens)
    if HIFIGAN in needed:
        pairs["the AR model's width and the fast path's latents"] = (ar.width, config[HIFIGAN].latent_width)
        pairs["the AR model's width and the fast path's voices"] = (ar.width, config[HIFIGAN].voice_width)
    if RANDOM_AR in needed:
        pairs["the widths of AR model and random voices"] = (ar.width, config[RANDOM_AR].width)
    if RANDOM_DIFFUSION in needed:
        want = 2 * config[DIFFUSION].width
        pairs["the voices of diffusion decoder and random voices"] = (want, config[RANDOM_DIFFUSION].width)
    for what, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{pretrained.path}: {what} differ, {one} and {other}: they do not belong together")
    if CLVP in needed and ar.text_tokens > config[CLVP].text_tokens:
        raise UserError(
            f"{pretrained.path}: the AR model has {ar.text_tokens} text tokens, CLVP {config[CLVP].text_tokens}: it "
            "cannot read this model's text"
        )
