"""The diffusion decoder against torch: every method, gradients, padding; and that each known mistake shows."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.changes import edited, noise, swapped, transposed, un_interleaved
from tests.support.parity import MODULE, Change, Twin, assert_close, error, twin_of
from tests.support.released import PARAMETERS, torch_model
from tests.support.synthesis_models import Comparison, channels_last, diffusion_comparison
from tests.support.torch_reference import tiny_diffusion
from tests.support.torch_reference.diffusion import bucket
from tortoise_jax.checkpoints import parts
from tortoise_jax.models import diffusion
from tortoise_jax.models.diffusion import Attention, DiffusionDecoder, frames_of, position_bias, relative_buckets
from tortoise_jax.models.layers import Compute


@pytest.mark.parametrize(
    ("size", "codes"),
    [
        ({}, 7),
        (dict(model_channels=48, num_heads=3, num_layers=1), 11),
        (dict(model_channels=16, num_heads=1, num_layers=3, in_channels=20, out_channels=40), 1),
        (dict(model_channels=128), 40),  # wide: of two channels a group, the unconditional pass is ill-conditioned
    ],
    ids=["tiny", "width 48 with 3 heads", "width 16, one code", "far keys"],
)
def test_every_method(size: dict[str, int], codes: int) -> None:
    diffusion_comparison(tiny_diffusion(seed=2, **size).requires_grad_(False), codes).check()


def test_gradients() -> None:
    """A seed at which the constant rows of the unconditional pass do not amplify rounding."""
    diffusion_comparison(tiny_diffusion(seed=1).requires_grad_(False)).check_gradients(heads=4)


def test_rounding_is_no_more_than_torchs() -> None:
    """Where a pass is ill-conditioned, torch is as far from float64 as we are: the unconditional one at step 3999.

    The sampler multiplies this by 153 in its first step (trap 22): no bound on it can be tighter.
    """
    x, steps = noise(1, 100, 39, seed=7), torch.tensor([3999])

    @jax.jit
    def estimate(variables: Any, x: jax.Array) -> Any:
        call: Any = functools.partial(DiffusionDecoder(config).apply, variables)
        return call(x, jnp.array([3999]), call(1, 39, method="unconditioned"), method="estimate")

    ratios = []
    for seed in range(4):
        model = tiny_diffusion(seed=seed).requires_grad_(False)
        config = (twin := twin_of(parts.DIFFUSION, model)).config
        ours, theirs = estimate(twin.variables, channels_last(x)), model(x, steps, None).mT
        exact = model.double()(x.double(), steps, None).mT
        ratios.append(error(ours, exact) / error(theirs, exact))
    assert np.exp(np.mean(np.log(ratios))) < 2, ratios


def test_attention_through_jax_nn() -> None:
    twin = twin_of(parts.DIFFUSION, tiny_diffusion())
    x = jax.random.normal(jax.random.key(0), (2, 30, 100))
    steps, aligned = jnp.array([5, 900]), jax.random.normal(jax.random.key(1), (2, 30, 32))
    mask = jnp.arange(30)[None] < jnp.array([[30], [17]])
    estimate = lambda compute: jax.jit(
        lambda: DiffusionDecoder(twin.config, compute).apply(twin.variables, x, steps, aligned, mask, method="estimate")
    )()
    assert_close(estimate(Compute(attention="xla")), estimate(Compute()), MODULE)


@pytest.mark.parametrize("length", [1, 2, 9, 71])
def test_buckets_and_biases_of_every_pair(length: int) -> None:
    relative = np.arange(length)[None] - np.arange(length)[:, None]
    want = bucket(torch.from_numpy(relative)).numpy()
    assert np.array_equal(relative_buckets(length)[relative + length - 1], want)
    table = jax.random.normal(jax.random.key(0), (32, 3))
    assert np.array_equal(position_bias(table, length)[0], np.asarray(table)[want].transpose(2, 0, 1))


# Padding


CODES, MORE_CODES, MORE_FRAMES = (6, 9), 5, 30


@functools.cache
def padded() -> tuple[Twin, dict[str, jax.Array]]:
    """A decoder, and what two rows of 6 and 9 codes give it, padded with noise."""
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    frames = frames_of(max(CODES)) + MORE_FRAMES
    rows = {
        "latents": normal(0, 2, max(CODES) + MORE_CODES, 24),
        "x": normal(1, 2, frames, 100),
        "voice": normal(2, 2, 64),
        "steps": jnp.array([3998, 17]),
    }
    return twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1)), rows


def estimates(latents: jax.Array, x: jax.Array, voice: jax.Array, steps: jax.Array, lengths: Any, mask: Any) -> Any:
    """What is aligned, and the conditional and the unconditional pass (2, b, t, 2 m)."""
    twin, _ = padded()
    call = lambda method, *arguments: DiffusionDecoder(twin.config).apply(twin.variables, *arguments, method=method)
    aligned = call("align", latents, voice, x.shape[1], lengths)["aligned"]
    both = jnp.concatenate([aligned, call("unconditioned", *x.shape[:2])])
    twice = lambda rows: rows if rows is None else jnp.concatenate([rows, rows])
    return aligned, call("estimate", twice(x), twice(steps), both, twice(mask)).reshape(2, *x.shape[:2], -1)


@functools.cache
def alone(r: int) -> Any:
    """A row without its padding."""
    rows = {name: array[r : r + 1] for name, array in padded()[1].items()}
    rows |= {"latents": rows["latents"][:, : CODES[r]], "x": rows["x"][:, : frames_of(CODES[r])]}
    return jax.jit(lambda rows: estimates(**rows, lengths=None, mask=None))(rows)


def check_padding(more_codes: int, more_frames: int) -> None:
    """Both rows padded so far: each as the row alone, with and without conditioning."""
    want = [alone(r) for r in range(len(CODES))]
    t = frames_of(max(CODES)) + more_frames
    rows = padded()[1]
    rows = rows | {"latents": rows["latents"][:, : max(CODES) + more_codes], "x": rows["x"][:, :t]}
    mask = jnp.arange(t)[None] < jnp.array([[frames_of(n)] for n in CODES])
    aligned, out = jax.jit(lambda rows: estimates(**rows, lengths=jnp.array(CODES), mask=mask))(rows)
    for r, n in enumerate(CODES):
        row, t = slice(r, r + 1), frames_of(n)
        assert_close(aligned[row, :t], want[r][0], MODULE, "aligned")
        assert_close(out[0, row, :t], want[r][1][0], MODULE, "conditional")
        assert_close(out[1, row, :t], want[r][1][1], MODULE, "unconditional")
        assert not np.asarray(out[:, r, t:]).any()


@pytest.mark.parametrize(("codes", "frames"), [(0, 0), (MORE_CODES, MORE_FRAMES)])
def test_padding_changes_nothing(codes: int, frames: int) -> None:
    check_padding(codes, frames)


class Unmasked(diffusion.GroupNorm):
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return super().__call__(x, None)


attend = diffusion.attend


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("GroupNorm", Unmasked, id="trap 14: norms over the padding"),
        pytest.param("attend", lambda *a, mask, **o: attend(*a, **o), id="trap 14: padding attended to"),
        pytest.param("zero_padding", lambda x, mask: x, id="trap 14: convolutions that read the padding"),
    ],
)
def test_padding_that_is_seen_shows(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for r in range(len(CODES)):
        alone(r)
    monkeypatch.setattr(diffusion, name, wrong)
    with pytest.raises(AssertionError):
        check_padding(MORE_CODES, MORE_FRAMES)


# Mistakes


@pytest.fixture(scope="module")
def tiny() -> Comparison:
    return diffusion_comparison()


@pytest.mark.parametrize(
    "change",
    [
        edited("layers/attn/qkv/kernel", un_interleaved),
        edited("layers/attn/qkv/bias", un_interleaved),
        edited("contextual_embedder/attn/qkv/kernel", un_interleaved),
        transposed("conditioning_timestep_integrator/attn/proj_out/kernel"),
        edited("layers/attn/relative_attention_bias", lambda w: np.roll(w, 16, axis=1)),
        edited("inp_block/kernel", lambda w: w[::-1]),
        edited("unconditioned_embedding", lambda w: w[::-1]),
        edited("integrating_conv/kernel", lambda w: np.roll(w, 32, axis=0)),
        edited("layers/resblk/emb/kernel", lambda w: np.roll(w, 32, axis=-1)),
        edited("code_embedding/embedding", lambda w: w[::-1]),
        swapped("layers_2", "layers_3"),
        edited("latent_conditioner/attn/norm/scale", lambda w: w[::-1]),
    ],
    ids=[
        "trap 4: qkv in blocks",
        "trap 4: qkv bias in blocks",
        "trap 5: the embedder's qkv in blocks",
        "transposed",
        "trap 4: before and after swapped",
        "reversed in time",
        "unconditioned",
        "trap 8: [c, x]",
        "trap 6: shift before scale",
        "codes",
        "tail swapped",
        "layers in another order",
    ],
)
def test_parity_fires(tiny: Comparison, change: Change) -> None:
    with pytest.raises(AssertionError):
        tiny.check(change)


original = {name: getattr(diffusion, name) for name in ("position_bias", "relative_buckets", "time_embedding")}


class PlainScale(diffusion.ResidualBlock):
    """scale in place of 1 + scale."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, mask: jax.Array | None) -> jax.Array:
        d = x.shape[-1]
        h = nn.Dense(d, name="in_conv")(nn.silu(diffusion.GroupNorm(name="in_norm")(x, mask)))
        scale, shift = jnp.split(nn.Dense(2 * d, name="emb")(nn.silu(time)), 2, axis=-1)
        h = diffusion.GroupNorm(name="out_norm")(h, mask) * scale[:, None] + shift[:, None]
        return x + diffusion.conv(d, "out_conv", jnp.dtype("float32"))(nn.silu(h))


class TimeWithoutSilu(diffusion.ResidualBlock):
    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, mask: jax.Array | None) -> jax.Array:
        d = x.shape[-1]
        h = nn.Dense(d, name="in_conv")(nn.silu(diffusion.GroupNorm(name="in_norm")(x, mask)))
        scale, shift = jnp.split(nn.Dense(2 * d, name="emb")(time), 2, axis=-1)
        h = diffusion.GroupNorm(name="out_norm")(h, mask) * (1 + scale[:, None]) + shift[:, None]
        return x + diffusion.conv(d, "out_conv", jnp.dtype("float32"))(nn.silu(h))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param(
            "relative_buckets", lambda n: original["relative_buckets"](n)[::-1], id="trap 4: 16 more for keys before"
        ),
        pytest.param(
            "position_bias", lambda table, n: original["position_bias"](table, n) / 8**0.5, id="trap 4: bias unscaled"
        ),
        pytest.param(
            "position_bias",
            lambda table, n: original["position_bias"](table, n).swapaxes(-1, -2),
            id="trap 4: query and key swapped",
        ),
        pytest.param("ResidualBlock", PlainScale, id="trap 6: scale in place of 1 + scale"),
        pytest.param("ResidualBlock", TimeWithoutSilu, id="trap 6: no SiLU on the time vector"),
        pytest.param(
            "time_embedding",
            lambda t, w: jnp.roll(original["time_embedding"](t, w), w // 2, axis=-1),
            id="trap 7: sines first",
        ),
        pytest.param(
            "time_embedding",
            lambda t, w: original["time_embedding"](t.astype(jnp.float32) / 4, w),
            id="trap 7: steps scaled to 1000",
        ),
        pytest.param(
            "time_embedding",
            lambda t, w: original["time_embedding"](t.astype(jnp.bfloat16), w),
            id="trap 7: steps in bfloat16",
        ),
        pytest.param("group_count", lambda channels: 8, id="other groups"),
    ],
)
def test_parity_fires_for_mistakes(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, name, wrong)
    with pytest.raises(AssertionError):
        diffusion_comparison(tiny_diffusion(num_layers=1).requires_grad_(False)).check()


def test_trap_5_the_embedders_heads_are_twice_as_wide() -> None:
    """As many heads as elsewhere, each twice as wide: with heads of the same width another function."""
    twin = twin_of(parts.DIFFUSION, tiny_diffusion())
    first = jax.tree.map(lambda w: w[0], twin.params["contextual_embedder"]["attn"])
    x = jax.random.normal(jax.random.key(0), (1, 9, 64))
    right = Attention(4, Compute()).apply({"params": first}, x, None)
    doubled = first | {"relative_attention_bias": np.repeat(first["relative_attention_bias"], 2, axis=1)}
    wrong = Attention(8, Compute()).apply({"params": doubled}, x, None)
    assert np.abs(right - wrong).max() > 1e-2


def test_trap_8_the_integrator_depends_on_the_step() -> None:
    twin = twin_of(parts.DIFFUSION, tiny_diffusion())
    x = jnp.zeros((2, 9, 100))
    aligned = jnp.repeat(jax.random.normal(jax.random.key(0), (1, 9, 32)), 2, axis=0)
    flax = DiffusionDecoder(twin.config)
    call = jax.jit(lambda steps: flax.apply(twin.variables, x, steps, aligned, method="evaluate")["integrator"])
    once = call(jnp.array([10, 3000]))[-1, 1]
    assert np.abs(once[0] - once[1]).max() > 1e-2


def test_trap_13_stretching_takes_the_floor() -> None:
    """Source of frame t: floor(t s / frames), which half-pixel centres would move."""
    twin = twin_of(parts.DIFFUSION, tiny_diffusion())
    latents, voice = jax.random.normal(jax.random.key(0), (1, 107, 24)), jnp.zeros((1, 64))
    out = DiffusionDecoder(twin.config).apply(twin.variables, latents, voice, 465, method="align")
    index = np.arange(465) * 107 // 465
    assert np.array_equal(out["aligned"][0], out["normed"][0][index])
    centres = np.floor((np.arange(465) + 0.5) * 107 / 465).astype(int)
    assert (centres != index).sum() > 50


def test_frames_of_codes() -> None:
    assert [frames_of(n) for n in (1, 2, 7, 107, 108, 333, 500)] == [4, 8, 30, 465, 470, 1449, 2176]


def test_released_size() -> None:
    state = torch_model("diffusion").state_dict()
    assert len(state) == 359
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS["diffusion"]
