"""The building blocks against torch: values, and gradients for the input and every parameter."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.tables import dvae, unified_voice
from tests.support.changes import edited, noise, swapped, transposed, un_interleaved
from tests.support.parity import MODULE, Change, assert_close, assert_module_parity, assert_trees_close, with_gradients
from tests.support.torch_reference import randomize
from tests.support.torch_reference.dvae import ResBlock
from tests.support.torch_reference.unified_voice import AttentionBlock, ConditioningEncoder, group_count
from tortoise_jax.models import layers
from tortoise_jax.models.layers import Compute, ConditioningAttention, GPT2Block, attend

PLAIN = Compute()
dropout = jax.jit(layers.dropout, static_argnums=(1, 3))  # rate and site


def with_random_weights(module: torch.nn.Module) -> torch.nn.Module:
    randomize(module, torch.Generator().manual_seed(7))
    return module


# The dVAE's residual block


def check_residual_block(change: Change = lambda params: params, width: int = 24) -> None:
    module = layers.ResidualBlock(width, jax.lax.Precision.HIGHEST)
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x))
    torch_module = with_random_weights(ResBlock(width))
    assert_module_parity(
        torch_module, dvae.TABLE, "encoder.2", apply, noise(2, width, 19), channels_first=True, change=change
    )


def test_residual_block() -> None:
    check_residual_block()


@pytest.mark.parametrize(
    "change",
    [
        transposed("net_0/kernel"),
        transposed("net_4/kernel"),
        swapped("net_0", "net_2"),
        edited("net_2/kernel", lambda w: w[::-1]),
    ],
    ids=["transposed 3", "transposed 1", "swapped", "reversed in time"],
)
def test_residual_block_parity_fires(change: Change) -> None:
    with pytest.raises(AssertionError, match="output"):
        check_residual_block(change)


# The GPT-2 block


def check_gpt2_block(
    torch_voice: Any, change: Change = lambda params: params, apply: Any = None, compute: Compute = PLAIN
) -> None:
    block = torch_voice.gpt.h[1]
    ours = GPT2Block(4, compute)
    layer = jnp.zeros((), jnp.int32)
    plain = jax.jit(lambda params, x: ours.apply({"params": params}, x, layer, None)[0])
    assert_module_parity(
        block,
        unified_voice.TABLE,
        "gpt.h.1",
        apply or plain,
        noise(2, 13, 64),
        channels_first=False,
        change=change,
        attention_mask=torch.full((13, 13), float("-inf")).triu(1),  # GPT2Model makes it; a block alone needs it
    )


@pytest.mark.parametrize("attention", ["plain", "by_heads", "xla"])
def test_gpt2_block(torch_voice: Any, attention: str) -> None:
    check_gpt2_block(torch_voice, compute=Compute(attention=attention))


def roll_thirds(w: np.ndarray) -> np.ndarray:
    return np.roll(w, w.shape[-1] // 3, axis=-1)


@pytest.mark.parametrize(
    "change",
    [
        edited("attn/c_proj/kernel", np.transpose),
        edited("attn/c_attn/kernel", roll_thirds),
        edited("attn/c_attn/bias", roll_thirds),
        swapped("ln_1", "ln_2"),
    ],
    ids=["transposed square", "[v | q | k]", "[v | q | k] bias", "norms swapped"],
)
def test_gpt2_block_parity_fires(torch_voice: Any, change: Change) -> None:
    with pytest.raises(AssertionError, match="output"):
        check_gpt2_block(torch_voice, change)


def test_gpt2_block_parity_fires_for_exact_gelu(torch_voice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = lambda x, approximate: jax.nn.gelu(x, approximate=False)
    monkeypatch.setattr(nn, "gelu", exact)
    with pytest.raises(AssertionError, match="output"):
        check_gpt2_block(torch_voice)


def test_gpt2_block_parity_fires_for_another_mask_or_scale(torch_voice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (
        lambda q, k, v, **options: attend(q, k, v, causal=False),
        lambda q, k, v, **options: attend(q * 1.01, k, v, causal=True),
    ):
        monkeypatch.setattr(layers, "attend", wrong)
        with pytest.raises(AssertionError, match="output"):
            check_gpt2_block(torch_voice)


def test_parity_fires_for_wrong_gradients_of_right_values(torch_voice: Any) -> None:
    block = GPT2Block(4, PLAIN)
    forward = lambda params, x: block.apply({"params": params}, x, jnp.zeros((), jnp.int32), None)[0]
    frozen = jax.lax.stop_gradient
    with pytest.raises(AssertionError, match="gradient of the input"):
        check_gpt2_block(torch_voice, apply=lambda params, x: forward(params, x) + frozen(x) - x)
    mlp_only = lambda params: params | {"attn": frozen(params["attn"])}
    with pytest.raises(AssertionError, match="attn/c_attn"):
        check_gpt2_block(torch_voice, apply=lambda params, x: forward(mlp_only(params), x))


# The conditioning encoder


def check_conditioning_attention(
    width: int, heads: int = 4, change: Change = lambda params: params, attention: str = "plain"
) -> None:
    module = ConditioningAttention(heads, Compute(attention=attention))
    assert_module_parity(
        with_random_weights(AttentionBlock(width, heads)),
        unified_voice.TABLE,
        "conditioning_encoder.attn.0",
        jax.jit(lambda params, x: module.apply({"params": params}, x, None)[0]),
        noise(2, width, 11),
        channels_first=True,
        heads=heads,
        change=change,
    )


@pytest.mark.parametrize("width", [16, 48, 64, 96, 512])
def test_conditioning_attention(width: int) -> None:
    check_conditioning_attention(width)


@pytest.mark.parametrize("attention", ["by_heads", "xla"])
def test_conditioning_attention_by_other_means(attention: str) -> None:
    check_conditioning_attention(64, attention=attention)


@pytest.mark.parametrize(
    "change",
    [
        edited("qkv/kernel", un_interleaved),
        edited("qkv/bias", un_interleaved),
        transposed("proj_out/kernel"),
        edited("norm/scale", lambda w: w[::-1]),
    ],
    ids=["qkv in blocks", "qkv bias in blocks", "transposed square", "reversed scale"],
)
def test_conditioning_attention_parity_fires(change: Change) -> None:
    with pytest.raises(AssertionError, match="output"):
        check_conditioning_attention(64, change=change)


@pytest.mark.parametrize("width", [16, 64, 96])
def test_conditioning_attention_parity_fires_for_other_groups(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "group_count", lambda channels: group_count(channels) // 2)
    with pytest.raises(AssertionError, match="output"):
        check_conditioning_attention(width)


def test_group_count_is_upstreams() -> None:
    assert {w: layers.group_count(w) for w in (8, 16, 20, 48, 64, 96, 100, 512, 1024)} == {
        8: 8, 16: 8, 20: 4, 48: 16, 64: 16, 96: 32, 100: 4, 512: 32, 1024: 32,
    }  # fmt: skip
    for width in range(1, 2049):
        assert layers.group_count(width) == group_count(width)


@pytest.mark.parametrize("width", [16, 96])
def test_the_first_frame_alone_is_the_first_of_all(width: int) -> None:
    """Of the last block: values, and gradients for all frames and parameters, without a key or a value of any frame."""
    check_first_frame(width, layers.first_frame)


def check_first_frame(width: int, ours: Any, heads: int = 4) -> None:
    block = ConditioningAttention(heads, PLAIN)
    x, weighting = noise(2, 11, width).numpy(), noise(2, width, seed=3).numpy()
    no_zeros = lambda leaf: np.asarray(leaf) + 0.1 * noise(*leaf.shape).numpy()
    params = jax.tree.map(no_zeros, jax.jit(block.init)(jax.random.key(0), x, None)["params"])
    first_of_all = lambda params, x: block.apply({"params": params}, x, None)[0][:, 0]
    want, (want_params, want_x) = with_gradients(first_of_all, weighting, params, x)
    alone = lambda params, x: ours(params, x, heads, jnp.float32)
    got, (of_params, of_x) = with_gradients(alone, weighting, params, x)
    assert_close(got, want, MODULE, "output")
    assert_close(of_x, want_x, MODULE, "gradient of the frames")
    assert_trees_close({"attn": of_params}, {"attn": want_params}, MODULE, heads)


def test_the_check_of_the_first_frame_fires() -> None:
    second = lambda params, x, *rest: layers.first_frame(params, jnp.roll(x, 1, axis=1), *rest)
    with pytest.raises(AssertionError, match="output"):
        check_first_frame(16, second)
    still = lambda params, x, *rest: layers.first_frame(
        params | {"norm": jax.lax.stop_gradient(params["norm"])}, x, *rest
    )
    with pytest.raises(AssertionError, match="attn/norm"):
        check_first_frame(16, still)


# Attention, dropout and settings by themselves


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["by_heads", "xla"])
def test_attention_implementations_agree(causal: bool, implementation: str) -> None:
    """Values and gradients."""
    q, k, v, weighting = (noise(2, 9, 4, 16, seed=i).numpy() for i in range(4))

    def found(**options: Any) -> Any:
        value, gradients = with_gradients(lambda *given: attend(*given, **options), weighting, q, k, v)
        return value, *gradients

    got, plain = found(causal=causal, implementation=implementation), found(causal=causal)
    for name, a, b in zip(("value", "q", "k", "v"), got, plain, strict=True):
        assert_close(a, b, MODULE, name)
    for a, b in zip(found(causal=not causal, implementation=implementation), plain, strict=True):
        with pytest.raises(AssertionError):
            assert_close(a, b, MODULE)


@pytest.mark.parametrize("implementation", ["by_heads", "xla", "cudnn"])
def test_where_attention_drops_it_is_plain(implementation: str) -> None:
    qkv = [noise(2, 9, 4, 16, seed=i).numpy() for i in range(3)]
    found = lambda **options: jax.jit(functools.partial(attend, causal=True, **options))(*qkv)
    got = found(drop=lambda weights: weights / 2, implementation=implementation)
    assert_close(got, np.asarray(found()) / 2, MODULE)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention is 'flash', expected one of"):
        Compute(attention="flash")


def test_remat_is_a_policy_or_a_truth_value() -> None:
    assert (Compute(remat=False), Compute(remat=True)) == (Compute(), Compute(remat="full"))
    with pytest.raises(ValueError, match="remat is 'half', expected one of"):
        Compute(remat="half")


def row_keys(*examples: int) -> jax.Array:
    return jax.jit(jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i)))(np.array(examples))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    x = np.ones((8, 50, 64), np.float32)
    dropped = np.asarray(dropout(x, rate, row_keys(*range(8)), 3))
    values = np.unique(dropped)
    np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)
    deviation = (rate * (1 - rate) / dropped.size) ** 0.5
    assert abs(np.mean(dropped == 0) - rate) < 4 * deviation
    per_row = np.mean(dropped == 0, axis=(1, 2))
    assert np.all(np.abs(per_row - rate) < 5 * deviation * 8**0.5)


def test_dropout_is_off_without_keys_or_rate() -> None:
    x = noise(2, 5, 8).numpy()
    assert np.array_equal(dropout(x, 0.5, None, 0), x)
    assert np.array_equal(dropout(x, 0.0, row_keys(0, 1), 0), x)
    assert not np.array_equal(dropout(x, 0.5, row_keys(0, 1), 0), x)


def test_a_rows_dropout_depends_on_its_key_and_the_site_only() -> None:
    x = np.ones((3, 20, 16), np.float32)
    draw = np.asarray(dropout(x, 0.5, row_keys(4, 7, 9), 2))
    assert np.array_equal(dropout(x, 0.5, row_keys(9, 4, 8), 2)[np.array([0, 1])], draw[[2, 0]])
    assert np.array_equal(dropout(x[:1], 0.5, row_keys(7), 2), draw[1:2])
    assert not np.array_equal(draw[0], draw[1])
    assert not np.array_equal(dropout(x, 0.5, row_keys(4, 7, 9), 3), draw)


def test_dropout_of_a_longer_row_begins_alike() -> None:
    short = dropout(np.ones((1, 20, 16), np.float32), 0.5, row_keys(4), 2)
    assert np.array_equal(dropout(np.ones((1, 37, 16), np.float32), 0.5, row_keys(4), 2)[:, :20], short)


def test_conditioning_encoder_of_a_torch_encoder() -> None:
    """All six blocks in a scan, of another width than the tiny model's; the first frame alone is read."""
    reference = with_random_weights(ConditioningEncoder(80, 32, 4)).requires_grad_(False)
    state = {f"conditioning_encoder.{key}": tensor.numpy() for key, tensor in reference.state_dict().items()}
    stack = lambda name: np.stack([state[f"conditioning_encoder.attn.{i}.{name}"].squeeze() for i in range(6)])
    matrices = lambda name: {"kernel": stack(f"{name}.weight").swapaxes(1, 2), "bias": stack(f"{name}.bias")}
    first = "conditioning_encoder.init"
    params = {
        "init": {"kernel": state[f"{first}.weight"].squeeze().T, "bias": state[f"{first}.bias"]},
        "attn": {
            "norm": {"scale": stack("norm.weight"), "bias": stack("norm.bias")},
            "qkv": matrices("qkv"),
            "proj_out": matrices("proj_out"),
        },
    }
    encode = jax.jit(layers.ConditioningEncoder(32, 6, 4, PLAIN).apply)
    mel = noise(2, 80, 23)
    want = reference(mel)
    got = encode({"params": params}, mel.numpy().swapaxes(1, 2))
    assert_close(got, want, MODULE)
    backwards = encode({"params": params}, mel.numpy().swapaxes(1, 2)[:, ::-1])
    with pytest.raises(AssertionError):
        assert_close(backwards, want, MODULE)


# Which products run in fused kernels


def test_cudnn_computes_the_gpt_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains on even lengths only, and the conditioning encoder sees 517 frames."""
    lengths: list[tuple[str, int]] = []

    def fused(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, implementation: str, **__: Any) -> jax.Array:
        lengths.append((implementation, q.shape[1]))
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    compute = Compute(attention="cudnn")
    encoder = layers.ConditioningEncoder(32, 2, 2, compute)
    jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 517, 80)))
    assert {implementation for implementation, _ in lengths} == {"xla"}
    lengths.clear()
    row = jnp.zeros((1, 64, 32))
    jax.eval_shape(GPT2Block(2, compute).init, jax.random.key(0), row, jnp.zeros((), jnp.int32), None)
    assert lengths == [("cudnn", 64)]
