"""Where a re-implementation of TorToiSe's synthesis goes wrong, and the tests that fail for each such mistake.

Most of them make the mistake on purpose and see the comparison with torch fail; the others hold the numbers that it
would change.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLVP, DIFFUSION, VOCODERS = "models/test_clvp.py", "models/test_diffusion.py", "models/test_vocoders.py"
DENOISING, RENDERING, VOICES = "synthesis/test_denoising.py", "synthesis/test_rendering.py", "synthesis/test_voices.py"
AUDIO = "test_audio_24k.py"

# What is easily mistaken -> the file, and words of the tests in it: their names, or the ids of their parameters.
TRAPS: dict[int, tuple[str, dict[str, tuple[str, ...]]]] = {
    1: (
        "CLVP turns values too, 32 of 64 dimensions, halves and not pairs",
        {CLVP: ("trap 1: values do not turn", "trap 1: pairs, not halves")},
    ),
    2: (
        "its RMS norm has a floor, its gate comes second, its GELU is exact",
        {CLVP: ("trap 2: an epsilon in place of", "trap 2: the gate before the value", "trap 2: tanh GELU")},
    ),
    3: (
        "scored are repaired codes with all padding, and the text with an extra 0",
        {CLVP: ("test_trap_3_padding_and",), RENDERING: ("test_trap_3_scores_are_of_repaired",)},
    ),
    4: (
        "qkv by head; the bias is scaled after the scores; 16 more for keys that come after",
        {
            DIFFUSION: (
                *("trap 4: qkv in blocks", "trap 4: qkv bias in blocks", "trap 4: before and after swapped"),
                *("trap 4: 16 more for keys before", "trap 4: bias unscaled", "trap 4: query and key swapped"),
            )
        },
    ),
    5: (
        "the contextual embedder has the same heads, each twice as wide",
        {DIFFUSION: ("trap 5: the embedder's qkv in blocks", "test_trap_5_the_embedders_heads")},
    ),
    6: (
        "residual block: (1 + scale), then shift; SiLU on the time vector",
        {
            DIFFUSION: (
                *("trap 6: shift before scale", "trap 6: scale in place of 1 + scale"),
                "trap 6: no SiLU on the time vector",
            )
        },
    ),
    7: (
        "cosines first, of unscaled steps, in float32",
        {
            DIFFUSION: ("trap 7: sines first", "trap 7: steps scaled to 1000", "trap 7: steps in bfloat16"),
            DENOISING: ("trap 7: steps of 1000",),
        },
    ),
    8: (
        "integrating_conv takes [x, c]; the integrator depends on the step",
        {DIFFUSION: ("trap 8: [c, x]", "test_trap_8_the_integrator")},
    ),
    9: (
        "guidance grows towards the end, by the spaced index; the variance is the conditional pass's",
        {
            DENOISING: (
                *("test_trap_9_guidance_grows", "trap 9: the ramp turned round", "trap 9: no ramp"),
                "test_trap_9_the_variance",
            )
        },
    ),
    10: (
        "the first log variance is the second's; x0 is clipped; the first noise alone has a temperature",
        {
            DENOISING: (
                *("test_trap_10_the_first_log_variance", "test_trap_10_without_clipping"),
                *("test_trap_10_the_temperature", "trap 10: noise at the last step"),
            )
        },
    ),
    11: ("all is derived from the spaced betas", {DENOISING: ("test_trap_11_everything_is_derived",)}),
    12: ("steps are rounded half to even, on accumulated sums", {DENOISING: ("test_trap_12_kept_steps",)}),
    13: ("stretching takes the floor, not half-pixel centres", {DIFFUSION: ("test_trap_13_stretching",)}),
    14: (
        "padding is seen by norms, attention and convolutions unless each is masked",
        {
            DIFFUSION: (
                *("trap 14: norms over the padding", "trap 14: padding attended to"),
                "trap 14: convolutions that read the padding",
            )
        },
    ),
    15: ("both passes as one batch are the two passes", {DENOISING: ("test_the_loop_is_the_plain_one",)}),
    16: ("the diffusion decoder's clip is cut from the start, padded as a waveform", {AUDIO: ("test_trap_16_clips",)}),
    17: ("two mels: another scale, power, bands and norms", {AUDIO: ("test_trap_17_the_other_front_end",)}),
    18: (
        "transposed convolutions: flipped kernels, odd strides, the gain of each input channel",
        {
            VOCODERS: (
                *("test_trap_18_transposed_convolutions", "trap 18: kernel not flipped", "trap 18: in and out swapped"),
                *("trap 18: gains of outputs", "trap 18: norm over the other axes"),
            )
        },
    ),
    19: (
        "UnivNet's ends reflect, its slope is 0.2, its kernels are (in, out, k)",
        {VOCODERS: ("trap 19: (out, in, k)", "trap 19: slope 0.1", "trap 19: zeros")},
    ),
    20: ("a .pth beside clips may be their waveforms, no voice", {VOICES: ("test_trap_20_waveforms",)}),
    21: ("fine-tuning makes one half of a voice stale, not the other", {VOICES: ("test_trap_21_after_fine_tuning",)}),
    22: ("the loop amplifies rounding by 153", {DENOISING: ("test_trap_22_the_first_step",)}),
}


def test_there_are_22() -> None:
    assert list(TRAPS) == list(range(1, 23))


@pytest.mark.parametrize("number", TRAPS)
def test_the_tests_of_each_trap_are_there(number: int) -> None:
    _, tests = TRAPS[number]
    for file, names in tests.items():
        text = (TESTS / file).read_text(encoding="utf-8")
        for name in names:
            assert f"def {name}" in text or f'"{name}' in text, f"{file}: {name}"
