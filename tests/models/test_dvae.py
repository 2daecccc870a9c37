"""The discrete VAE against torch: features, codes, reconstructions, one training forward with its gradients."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.tables.dvae import TABLE
from tests.support.changes import edited, noise, transposed
from tests.support.parity import (
    MODULE,
    Change,
    Tree,
    Twin,
    assert_close,
    assert_module_parity,
    assert_trees_close,
    dvae_tree,
    dvae_twin,
    gradients_of,
    numpy,
    part_tree,
)
from tests.support.released import PARAMETERS
from tests.support.torch_reference import tiny_dvae
from tortoise_jax.checkpoints.parts import abstract_variables, in_collections
from tortoise_jax.models import dvae as dvae_module
from tortoise_jax.models.dvae import RELEASED, Codebook, Decoder, DiscreteVAE, DVAEConfig, Encoder, move_codebook

COMMITMENT = 0.25
CODE_MARGIN = 1e-4  # codes must be equal where the best two distances are further apart than this (relative)


def unchanged(params: Tree) -> Tree:
    return params


def channels_last(mel: torch.Tensor) -> jax.Array:
    return jnp.asarray(numpy(mel).swapaxes(1, 2))


# Encoder and decoder


def check_part(name: str, torch_dvae: Any, config: DVAEConfig, x: torch.Tensor, change: Change = unchanged) -> None:
    module = Encoder(config) if name == "encoder" else Decoder(config)
    apply = jax.jit(lambda params, x: module.apply({"params": params}, x))
    part = torch_dvae.get_submodule(name)
    assert_module_parity(part, TABLE, name, apply, x, channels_first=True, change=change)


@pytest.mark.parametrize("frames", [64, 61])
def test_encoder(torch_dvae: Any, dvae: Twin, frames: int) -> None:
    check_part("encoder", torch_dvae, dvae.config, noise(2, 80, frames))


def test_decoder(torch_dvae: Any, dvae: Twin) -> None:
    check_part("decoder", torch_dvae, dvae.config, noise(2, 24, 9))


@pytest.mark.parametrize(
    "size",
    [
        dict(num_resnet_blocks=0, codebook_dim=10),
        dict(num_layers=1, num_resnet_blocks=1),
        dict(num_layers=3, num_resnet_blocks=3, num_tokens=20, hidden_dim=8, channels=40),
    ],
    ids=["no residual blocks", "one layer", "three layers"],
)
def test_other_dimensions(size: dict[str, int]) -> None:
    model = tiny_dvae(seed=2, **size).requires_grad_(False)
    twin = dvae_twin(model)
    check_part("encoder", model, twin.config, noise(1, twin.config.channels, 32))
    check_part("decoder", model, twin.config, noise(1, twin.config.codebook_dim, 5))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("encoder", transposed("res_2/net_4/kernel")),
        ("encoder", edited("conv_0/kernel", lambda w: w[::-1])),
        ("encoder", edited("conv_1/bias", np.negative)),
        ("decoder", transposed("res_1/net_2/kernel")),
        ("decoder", edited("conv_3/kernel", lambda w: w[::-1])),
    ],
)
def test_parity_fires(torch_dvae: Any, dvae: Twin, name: str, change: Change) -> None:
    with pytest.raises(AssertionError, match="output"):
        check_part(name, torch_dvae, dvae.config, noise(2, 80 if name == "encoder" else 24, 16), change)


def test_encoder_parity_fires_for_one_sided_padding(
    torch_dvae: Any, dvae: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What "SAME" does to a stride-2 convolution of an even length."""
    plain = dvae_module.nn.Conv
    strided = lambda *args, padding=0, strides=1, **options: plain(
        *args, padding="SAME" if strides == 2 else padding, strides=strides, **options
    )
    monkeypatch.setattr(dvae_module.nn, "Conv", strided)
    with pytest.raises(AssertionError, match="output"):
        check_part("encoder", torch_dvae, dvae.config, noise(2, 80, 64))


# Codes


def check_codes(torch_dvae: Any, twin: Twin, change: Change = unchanged) -> None:
    """Codes of enough frames, equal wherever the choice is no coin toss; such tosses counted and under 0.1 %."""
    mel = noise(16, 80, 256)
    features, want = torch_dvae.encode(mel)
    model = DiscreteVAE(twin.config)
    got = jax.jit(functools.partial(model.apply, method="encode"))(
        in_collections(twin.config, change(twin.params)), channels_last(mel)
    )
    distances = (features.double()[..., None] - torch_dvae.codebook.embed.double()).pow(2).sum(2)
    best, second = distances.topk(2, largest=False).values.unbind(-1)
    tossed = ((second - best) / best < CODE_MARGIN).numpy()
    assert tossed.mean() < 1e-3
    assert np.array_equal(np.asarray(got)[~tossed], want.numpy()[~tossed])
    assert len(np.unique(got)) > 32
    assert got.dtype == jnp.int32


def test_codes_are_equal(torch_dvae: Any, dvae: Twin) -> None:
    check_codes(torch_dvae, dvae)


def test_codes_of_an_odd_length(torch_dvae: Any, dvae: Twin) -> None:
    mel = noise(2, 80, 61)
    codes = DiscreteVAE(dvae.config).apply(dvae.variables, channels_last(mel), method="encode")
    assert np.array_equal(codes, torch_dvae.encode(mel)[1])
    assert codes.shape == (2, 16)


def test_equality_of_codes_fires(torch_dvae: Any, dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_codes(torch_dvae, dvae, edited("codebook/embed", lambda w: w * 1.01))
    dots_only = lambda self, x: jnp.argmax(jnp.einsum("bce,en->bcn", x, self.embed), axis=-1).astype(jnp.int32)
    monkeypatch.setattr(Codebook, "nearest", dots_only)
    with pytest.raises(AssertionError):
        check_codes(torch_dvae, dvae)


def test_decode(torch_dvae: Any, dvae: Twin) -> None:
    codes = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    decode = functools.partial(DiscreteVAE(dvae.config).apply, method="decode")
    want = torch_dvae.decode(codes).transpose(1, 2)
    assert_close(decode(dvae.variables, jnp.asarray(codes.numpy())), want, MODULE)
    with pytest.raises(AssertionError):
        assert_close(decode(dvae.variables, jnp.asarray(codes.numpy()[:, ::-1])), want, MODULE)


# One training forward


def check_training_forward(torch_dvae: Any, twin: Twin, change: Change = unchanged) -> None:
    """Losses, output, gradients of reconstruction + 0.25 commitment, and the codebook after its update."""
    mel = noise(2, 80, 64)
    model = copy.deepcopy(torch_dvae).requires_grad_(True)
    want_recon, want_commit, want_out = model.train_forward(mel)
    want_gradients = gradients_of(model, want_recon + COMMITMENT * want_commit)

    @jax.jit
    def ours(params: Tree, codebook: Tree) -> Any:
        def loss(params: Tree) -> Any:
            outputs = DiscreteVAE(twin.config).apply({"params": params, "codebook": codebook}, channels_last(mel))
            recon = jnp.mean((outputs["out"] - channels_last(mel)) ** 2)
            commit = jnp.mean((outputs["quantized"] - outputs["features"]) ** 2)
            picked = jax.nn.one_hot(outputs["codes"], twin.config.codes)
            features = jnp.einsum("bce,bcn->en", outputs["features"], picked, precision=jax.lax.Precision.HIGHEST)
            moved = move_codebook(codebook["codebook"], picked.sum((0, 1)), jax.lax.stop_gradient(features))
            return recon + COMMITMENT * commit, (recon, commit, outputs["out"], moved)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (recon, commit, out, moved)), gradients = ours(**in_collections(twin.config, change(twin.params)))
    assert_close(out, want_out.transpose(1, 2), MODULE, "out")
    assert_close(recon, want_recon, MODULE, "recon_loss")
    assert_close(commit, want_commit, MODULE, "commit_loss")
    assert gradients.keys() == {"encoder", "decoder"}  # the codebook is no parameter: it moves by averages alone
    for name in ("encoder", "decoder"):
        named = {key.removeprefix(f"{name}."): g for key, g in want_gradients.items() if key.startswith(name)}
        assert_trees_close(gradients[name], part_tree(TABLE, name, named), MODULE, heads=1)
    want_book = dvae_tree(twin.config, model.state_dict())["codebook"]
    for name, value in want_book.items():
        assert_close(moved[name], value, MODULE, f"codebook {name}")


def test_training_forward(torch_dvae: Any, dvae: Twin) -> None:
    check_training_forward(torch_dvae, dvae)


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [("CODEBOOK_DECAY", 0.98, "codebook"), ("CODEBOOK_EPSILON", 1e-2, "codebook embed")],
)
def test_training_forward_parity_fires_for_another_update(
    torch_dvae: Any, dvae: Twin, monkeypatch: pytest.MonkeyPatch, setting: str, value: float, what: str
) -> None:
    monkeypatch.setattr(dvae_module, setting, value)
    with pytest.raises(AssertionError, match=what):
        check_training_forward(torch_dvae, dvae)


def test_training_forward_parity_fires_without_straight_through(
    torch_dvae: Any, dvae: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)  # then all gradients go to the codebook's entries
    with pytest.raises(AssertionError):
        check_training_forward(torch_dvae, dvae)


def test_released_dimensions() -> None:
    shapes = abstract_variables(RELEASED)
    assert shapes.keys() == {"params", "codebook"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS["dvae"]
    assert RELEASED.frames_per_code == 4
