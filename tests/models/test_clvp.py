"""CLVP against torch: latents, scores, masks, gradients; and that each known mistake shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.support.changes import edited, swapped, transposed
from tests.support.parity import MODULE, Change, assert_close, twin_of
from tests.support.released import PARAMETERS, torch_model
from tests.support.synthesis_models import Comparison, clvp_comparison
from tests.support.torch_reference import tiny_clvp
from tortoise_jax.checkpoints import parts
from tortoise_jax.models import clvp


@pytest.mark.parametrize(
    "size",
    [
        {},
        dict(dim_text=20, text_heads=3, text_enc_depth=1, dim_latent=8),
        dict(dim_text=64, dim_speech=64, text_heads=1, speech_heads=4, speech_enc_depth=1),
    ],
    ids=["tiny", "width 20 with 3 heads", "other heads"],
)
def test_latents_and_scores(size: dict[str, int]) -> None:
    clvp_comparison(tiny_clvp(seed=2, **size).requires_grad_(False)).check()


def test_gradients() -> None:
    clvp_comparison().check_gradients()


def test_a_masked_row_is_the_row_alone() -> None:
    twin = twin_of(parts.CLVP, tiny_clvp())
    flax = clvp.CLVP(twin.config)
    codes = jax.random.randint(jax.random.key(0), (2, 12), 0, 70)
    mask = jnp.arange(12)[None] < jnp.array([[7], [12]])
    latent = jax.jit(lambda *arguments: flax.apply(twin.variables, *arguments, method="speech")["latent"])
    assert_close(latent(codes, mask)[0], latent(codes[:1, :7])[0], MODULE)
    assert_close(latent(codes, mask)[1], latent(codes)[1], MODULE)


@pytest.fixture(scope="module")
def square() -> Comparison:
    sizes = dict(dim_text=64, dim_speech=64, dim_latent=64, text_heads=1)
    return clvp_comparison(tiny_clvp(**sizes).requires_grad_(False))


@pytest.mark.parametrize(
    "change",
    [
        swapped("to_text_latent", "to_speech_latent"),
        edited("temperature", lambda w: w * 1.001),
        edited("text_frequencies", lambda w: w[::-1]),
        transposed("speech_transformer/layers/attention/to_out/kernel"),
        edited("text_transformer/layers/feed_forward_norm/g", lambda w: w[::-1]),
    ],
    ids=["sides swapped", "temperature", "frequencies", "transposed", "norms of other layers"],
)
def test_parity_fires(square: Comparison, change: Change) -> None:
    with pytest.raises(AssertionError):
        square.check(change)


# Mistakes that every shape check passes

rotated, rotary_angles = clvp.rotated, clvp.rotary_angles


def values_do_not_turn() -> Callable[..., Any]:
    """Traced in threes: queries, keys, values."""
    calls: list[int] = []

    def wrong(x: jax.Array, angles: jax.Array) -> jax.Array:
        calls.append(1)
        return x if len(calls) % 3 == 0 else rotated(x, angles)

    return wrong


def turned_in_pairs(x: jax.Array, angles: jax.Array) -> jax.Array:
    moving = x[..., : clvp.ROTARY_WIDTH]
    other = jnp.stack([-moving[..., 1::2], moving[..., 0::2]], axis=-1).reshape(moving.shape)
    angles = jnp.repeat(angles[:, : clvp.ROTARY_WIDTH // 2], 2, axis=-1)[None, :, None]
    return jnp.concatenate([moving * jnp.cos(angles) + other * jnp.sin(angles), x[..., clvp.ROTARY_WIDTH :]], axis=-1)


class WithEpsilon(nn.Module):
    """The other RMS norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        g = self.param("g", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * g[None, None]


class GateFirst(clvp.FeedForward):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = jnp.split(nn.Dense(2 * self.inner, name="proj")(x), 2, axis=-1)
        return nn.Dense(x.shape[-1], name="out")(value * nn.gelu(gate, approximate=False))


gelu, attend = nn.gelu, clvp.attend


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("rotated", values_do_not_turn, id="trap 1: values do not turn"),
        pytest.param("rotated", lambda: turned_in_pairs, id="trap 1: pairs, not halves"),
        pytest.param("RMSNorm", lambda: WithEpsilon, id="trap 2: an epsilon in place of a floor"),
        pytest.param("FeedForward", lambda: GateFirst, id="trap 2: the gate before the value"),
        pytest.param("nn.gelu", lambda: lambda x, approximate: gelu(x, approximate=True), id="trap 2: tanh GELU"),
        pytest.param("attend", lambda: lambda q, *r, **o: attend(q * 1.01, *r, **o), id="scores of another scale"),
        pytest.param("rotary_angles", lambda: lambda f, n: rotary_angles(f, n + 1)[1:], id="positions that begin at 1"),
    ],
)
def test_parity_fires_for_mistakes(name: str, wrong: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"tortoise_jax.models.clvp.{name}", wrong())
    with pytest.raises(AssertionError):
        clvp_comparison(tiny_clvp(text_enc_depth=1, speech_enc_depth=1).requires_grad_(False)).check()


def test_trap_3_padding_and_the_texts_extra_zero_are_part_of_the_score() -> None:
    """Scored are the fixed codes with all calm padding; without a mask they change the score."""
    twin = twin_of(parts.CLVP, tiny_clvp())
    flax = clvp.CLVP(twin.config)
    both = jax.jit(lambda text, codes: flax.apply(twin.variables, text, codes)["similarity"][0])
    score = lambda text, codes: float(both(jnp.array([text]), jnp.array([codes])))
    tight = score([5, 9, 3], [7, 8, 9, 10])
    assert abs(score([5, 9, 3, 0], [7, 8, 9, 10]) - tight) > 1e-3
    assert abs(score([5, 9, 3], [7, 8, 9, 10, 63, 63, 63]) - tight) > 1e-3


def test_released_size() -> None:
    state = torch_model("clvp").state_dict()
    assert len(state) == 451
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS["clvp"]
