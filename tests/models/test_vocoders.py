"""UnivNet, the fast path's decoder and random voices against torch: waveforms, gradients, padding, known mistakes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F

from tests.support.changes import edited, noise, swapped, transposed
from tests.support.parity import MODULE, Change, Tree, assert_close, twin_of
from tests.support.released import PARAMETERS, torch_model
from tests.support.synthesis_models import (
    Comparison,
    hifigan_comparison,
    random_voice_comparison,
    vocoder_comparison,
)
from tests.support.torch_reference import (
    tiny_hifigan,
    tiny_random_voice,
    tiny_vocoder,
)
from tortoise_jax.checkpoints import parts
from tortoise_jax.models import convolutions, hifigan, random_voice, vocoder


@pytest.fixture(scope="module")
def univnet() -> Comparison:
    return vocoder_comparison()


@pytest.fixture(scope="module")
def fast() -> Comparison:
    return hifigan_comparison()


# Values


@pytest.mark.parametrize(
    "size",
    [
        dict(norm="newer"),
        dict(norm="folded"),
        dict(strides=(5, 3), channel_size=4, n_mel_channels=7, noise_dim=5),
        dict(strides=(8, 8, 4), kpnet_width=3, channel_size=2),
    ],
    ids=["newer naming", "folded", "odd strides", "the released strides"],
)
def test_univnet(size: dict[str, Any]) -> None:
    vocoder_comparison(tiny_vocoder(seed=2, **size).requires_grad_(False)).check()


def test_univnet_gradients(univnet: Comparison) -> None:
    univnet.check()
    univnet.check_gradients()


@pytest.mark.parametrize(
    ("size", "codes"),
    [
        (dict(norm="newer"), 1),
        (dict(norm="folded"), 2),
        (dict(upsample_kernel_sizes=(16, 4), resblock_kernel_sizes=(3, 7, 11), in_channels=5), 3),
        (dict(upsample_kernel_sizes=(4,)), 300),
    ],
    ids=["newer naming, one code", "folded, two codes", "other kernels", "many codes"],
)
def test_the_fast_paths_decoder(size: dict[str, Any], codes: int) -> None:
    hifigan_comparison(tiny_hifigan(seed=2, **size).requires_grad_(False), codes).check()


def test_the_fast_paths_decoders_gradients(fast: Comparison) -> None:
    fast.check()
    fast.check_gradients()


@pytest.mark.parametrize("width", [24, 7])
def test_random_voices(width: int) -> None:
    comparison = random_voice_comparison(tiny_random_voice(channels=width).requires_grad_(False))
    comparison.check()
    comparison.check_gradients()


@pytest.mark.parametrize(("stride", "kernel"), [(2, 4), (3, 6), (5, 10), (4, 7), (3, 2), (1, 3)])
def test_trap_18_transposed_convolutions(stride: int, kernel: int) -> None:
    """Even and odd strides, kernels that are no multiple of them, torch's padding and output padding."""
    x, weight, bias = noise(2, 4, 7), noise(4, 3, kernel, seed=6), noise(3, seed=7)
    padding, extra = min(stride // 2 + stride % 2, kernel - 1), stride % 2 if stride > 1 else 0
    want = F.conv_transpose1d(x, weight, bias, stride, padding, extra)
    ours = convolutions.ConvTranspose(3, kernel, stride, padding, extra, weight_norm=False)
    params = {"kernel": weight.numpy().transpose(2, 0, 1), "bias": bias.numpy()}
    assert_close(ours.apply({"params": params}, x.mT.numpy()), want.mT, MODULE)
    flipped = params | {"kernel": params["kernel"][::-1]}
    with pytest.raises(AssertionError):
        assert_close(ours.apply({"params": flipped}, x.mT.numpy()), want.mT, MODULE)


# Padding


def check_univnet_padding() -> None:
    twin = twin_of(parts.VOCODER, tiny_vocoder())
    lengths = jnp.array([4, 9])
    mel, z = noise(2, 11, 10).numpy(), noise(2, 21, 8, seed=6).numpy()
    vocode = jax.jit(lambda *given: vocoder.UnivNet(twin.config).apply(twin.variables, *given, method="vocode"))
    padded = vocode(mel, z, lengths)
    for r, n in enumerate((4, 9)):
        alone = vocode(mel[r : r + 1, :n], z[r : r + 1, : n + 10])
        assert_close(padded[r : r + 1, : n * 24], alone, MODULE, f"row {r}")


def test_padding_changes_nothing_in_univnet() -> None:
    check_univnet_padding()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("zero_padding", lambda x, mask: x), ("reflected", lambda x, n, lengths: convolutions.reflected(x, n, None))],
)
def test_padding_that_univnet_sees_shows(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocoder, name, wrong)
    with pytest.raises(AssertionError):
        check_univnet_padding()


def check_hifigan_padding() -> None:
    """Rows of 2 codes (torch copies where nothing is stretched) and of 7."""
    twin = twin_of(parts.HIFIGAN, tiny_hifigan())
    latents, voice = noise(2, 10, 12).numpy(), noise(2, 10, seed=6).numpy()
    flax = hifigan.Hifigan(twin.config)

    def decode(latents: Any, voice: Any, frames: int, lengths: Any) -> Any:
        run = jax.jit(lambda *given: flax.apply(twin.variables, *given, frames, lengths, method="decode"))
        return run(latents, voice)

    padded = decode(latents, voice, 50, jnp.array([2, 7]))
    for r, n in enumerate((2, 7)):
        frames = hifigan.frames_of(n)
        alone = decode(latents[r : r + 1, :n], voice[r : r + 1], frames, None)
        assert_close(padded[r : r + 1, : frames * 16], alone, MODULE, f"row {r}")


def test_padding_changes_nothing_in_the_fast_paths_decoder() -> None:
    check_hifigan_padding()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("zero_padding", lambda x, mask: x),
        ("interpolated", lambda x, *given: hifigan_interpolated(x, *given[:-1], jnp.full(2, x.shape[1]))),
    ],
)
def test_padding_that_the_fast_paths_decoder_sees_shows(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hifigan, name, wrong)
    with pytest.raises((AssertionError, ValueError)):
        check_hifigan_padding()


# Mistakes

hifigan_interpolated = hifigan.interpolated


def kernels_in_the_order(order: tuple[int, ...]) -> Change:
    """The predicted kernels' axes (j, in, out, k) taken as if they were in another order."""

    def change(params: Tree) -> Tree:
        stack = params["res_stack_1"]
        moved = {}
        for name, w in stack["kernel_predictor"]["kernel_conv"].items():
            shape = (*w.shape[:-1], 4, 3, 6, 3)
            axes = (*range(w.ndim - 1), *(w.ndim - 1 + axis for axis in order))
            moved[name] = np.asarray(w).reshape(shape).transpose(axes).reshape(w.shape)
        predictor = stack["kernel_predictor"] | {"kernel_conv": moved}
        return params | {"res_stack_1": stack | {"kernel_predictor": predictor}}

    return change


@pytest.mark.parametrize(
    "change",
    [
        edited("res_stack_0/convt_pre/kernel_v", lambda w: w[::-1]),
        transposed("res_stack_1/convt_pre/kernel_v"),
        edited("res_stack_0/convt_pre/kernel_g", lambda w: w[::-1]),
        transposed("res_stack_2/conv_blocks_1/kernel_v"),
        edited("res_stack_0", lambda s: s | {"conv_blocks_0": s["conv_blocks_1"]}),
        kernels_in_the_order((0, 2, 1, 3)),
        edited("res_stack_2/kernel_predictor/bias_conv/bias", lambda w: np.roll(w, 3)),
    ],
    ids=[
        "trap 18: kernel not flipped",
        "trap 18: in and out swapped",
        "trap 18: gains of outputs",
        "transposed",
        "dilations swapped",
        "trap 19: (out, in, k)",
        "gate and value swapped",
    ],
)
def test_univnet_parity_fires(univnet: Comparison, change: Change) -> None:
    with pytest.raises(AssertionError):
        univnet.check(change)


leaky_relu, kernel_of = nn.leaky_relu, convolutions.kernel_of


def gain_of_the_other_axis(module: nn.Module, shape: Any, weight_norm: bool, gain_axis: int) -> Any:
    """The norm over all axes but the other one: what is right for an ordinary convolution."""
    v = module.param("kernel_v", nn.initializers.ones, shape)
    g = module.param("kernel_g", nn.initializers.ones, (shape[gain_axis],))
    gain = jnp.expand_dims(g, tuple(axis for axis in range(3) if axis != gain_axis))
    return v * gain / jnp.sqrt(jnp.sum(v**2, axis=(0, gain_axis), keepdims=True))


def within_frames(x: Any, kernels: Any, bias: Any) -> Any:
    """Zeros at every frame's borders in place of the neighbours' samples."""
    b, samples, c = x.shape
    frames = kernels.shape[1]
    one = vocoder_lvc(
        x.reshape(b * frames, samples // frames, c),
        *(part.reshape(b * frames, 1, *part.shape[2:]) for part in (kernels, bias)),
    )
    return one.reshape(b, samples, -1)


vocoder_lvc = vocoder.location_variable_convolution


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("vocoder.SLOPE", 0.1, id="trap 19: slope 0.1"),
        pytest.param(
            "vocoder.reflected", lambda x, n, lengths: jnp.pad(x, ((0, 0), (n, n), (0, 0))), id="trap 19: zeros"
        ),
        pytest.param(
            "vocoder.location_variable_convolution", within_frames, id="frames that do not see their neighbours"
        ),
        pytest.param("vocoder.SILENT_MEL", 0.0, id="another tail"),
        pytest.param("convolutions.kernel_of", gain_of_the_other_axis, id="trap 18: norm over the other axes"),
    ],
)
def test_univnet_parity_fires_for_mistakes(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"tortoise_jax.models.{name}", wrong)
    with pytest.raises(AssertionError):
        vocoder_comparison(tiny_vocoder(strides=(4, 2)).requires_grad_(False)).check()


def one_step(latents: Any, frames: int, lengths: Any = None) -> Any:
    s = latents.shape[1]
    return None, hifigan_interpolated(latents, 640 / 147, frames, jnp.full(len(latents), s))


def by_length_ratio(x: Any, scale: float, frames: int, lengths: Any) -> Any:
    return hifigan_interpolated(x, frames / x.shape[1], frames, lengths)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("hifigan.LAST_SLOPE", 0.1),
        ("hifigan.SLOPE", 0.01),
        ("hifigan.upsampled", one_step),
        ("hifigan.interpolated", by_length_ratio),
        ("hifigan.DILATIONS", (1, 1, 5)),
    ],
)
def test_the_fast_paths_parity_fires_for_mistakes(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"tortoise_jax.models.{name}", wrong)
    with pytest.raises(AssertionError):
        hifigan_comparison(tiny_hifigan(upsample_kernel_sizes=(4, 4)).requires_grad_(False)).check()


@pytest.mark.parametrize(
    "change",
    [
        edited("ups_0/kernel_v", lambda w: w[::-1]),
        edited("resblocks_1", swapped("convs1_0", "convs1_1")),
        edited("resblocks_2", lambda s: s | {"convs1_0": s["convs2_0"]}),
        edited("cond_layer/kernel", lambda w: w[:, ::-1]),
        edited("conv_post/kernel_g", lambda w: 1.01 * w),
    ],
)
def test_the_fast_paths_parity_fires(fast: Comparison, change: Change) -> None:
    with pytest.raises(AssertionError):
        fast.check(change)


@pytest.mark.parametrize(("name", "wrong"), [("LEARNING_RATE_SCALE", 1.0), ("SLOPE", 0.01), ("LAYERS", 5)])
def test_random_voices_parity_fires_for_mistakes(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = random_voice_comparison()
    assert comparison.twin
    monkeypatch.setattr(random_voice, name, wrong)
    with pytest.raises(AssertionError):
        comparison.check()


# Sizes


@pytest.mark.parametrize(
    ("part", "tensors"), [("vocoder", 132), ("hifigan", 236), ("random_ar", 12), ("random_diffusion", 12)]
)
def test_released_sizes(part: str, tensors: int) -> None:
    state = torch_model(part).state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, PARAMETERS[part])


def test_lengths_of_the_fast_path() -> None:
    assert [hifigan.frames_of(n) for n in (1, 2, 3, 107, 108, 500, 604)] == [4, 8, 13, 465, 470, 2176, 2629]
