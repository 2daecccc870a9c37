"""The AR model against torch: every part, and the whole stack with both losses and all gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.tables.unified_voice import TABLE
from tests.support import small
from tests.support.changes import edited, noise, swapped, transposed, un_interleaved
from tests.support.parity import (
    MODULE,
    STACK,
    Change,
    Tree,
    Twin,
    assert_close,
    assert_module_parity,
    assert_trees_close,
    gradients_of,
    numpy,
    voice_tree,
)
from tests.support.released import PARAMETERS
from tests.support.small import CONFIG, joined_batch
from tests.support.torch_reference import SAMPLES_PER_CODE, random_batch, record_outputs, tiny_unified_voice
from tests.support.upstream_layout import upstream_batch
from tortoise_jax.models import layers
from tortoise_jax.models.layers import Compute
from tortoise_jax.models.unified_voice import CONDITIONING, RELEASED, TEXT, UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.training.forward import dropout_keys
from tortoise_jax.training.losses import counts, loss_sums, means, total_loss

TEXT_WEIGHT = 0.01
PLAIN = Compute()


@dataclasses.dataclass(frozen=True)
class TorchRun:
    """What torch makes of one batch in its own layout, as Flax would hold it."""

    batch: dict[str, np.ndarray]  # for us
    outputs: dict[str, np.ndarray]  # (b, s, …), the conditioning's position included where torch has it
    losses: dict[str, float]
    gradients: Tree


@pytest.fixture(scope="module")
def run(torch_voice: Any, voice: Twin) -> TorchRun:
    model = tiny_unified_voice(seed=1)
    torch_batch = random_batch(model, seed=0)
    wav_lengths = torch_batch["code_lengths"] * SAMPLES_PER_CODE
    with record_outputs(model) as recorded:
        conditioning = model.conditioning_latent(torch_batch["cond_mel"])
        arguments = (torch_batch["text"], torch_batch["text_lengths"], torch_batch["codes"], wav_lengths)
        text_loss, mel_loss, _ = model(conditioning, *arguments)
    gradients = gradients_of(model, TEXT_WEIGHT * text_loss + mel_loss)
    batch = {name: value.numpy() for name, value in torch_batch.items()}
    return TorchRun(
        upstream_batch(
            voice.config, batch["cond_mel"], batch["text"], batch["text_lengths"], batch["codes"], numpy(wav_lengths)
        ),
        {
            "conditioning": numpy(conditioning)[:, None],
            "blocks": np.stack([numpy(recorded[f"gpt.h.{i}"]) for i in range(3)]),
            "normed": numpy(recorded["gpt.ln_f"]),
            "hidden": numpy(recorded["final_norm"]),
            "text_logits": numpy(recorded["text_head"]),
            "mel_logits": numpy(recorded["mel_head"]),
        },
        {"text": text_loss.item(), "mel": mel_loss.item()},
        voice_tree(voice.config, gradients),
    )


@functools.cache
def jitted(config: UnifiedVoiceConfig, compute: Compute) -> Any:
    return jax.jit(traced(config, compute))


def traced(config: UnifiedVoiceConfig, compute: Compute) -> Any:
    """(params, batch) -> (gradients, outputs, mean losses) of the training loss."""
    model = UnifiedVoice(config, compute)

    def forward(params: Tree, batch: Any) -> Any:
        outputs = model.apply(
            {"params": params}, *(batch[n] for n in ("conditioning_mel", "tokens", "token_types", "positions"))
        )
        sums, total = loss_sums(outputs, batch, config.stop_mel), counts(batch, config.stop_mel)
        return total_loss(sums, total, TEXT_WEIGHT), (outputs, means(sums, total))

    def all_of_it(params: Tree, batch: Any) -> Any:
        gradients, (outputs, losses) = jax.grad(forward, has_aux=True)(params, batch)
        return gradients, outputs, losses

    return all_of_it


def check_stack(run: TorchRun, twin: Twin, compute: Compute = PLAIN, change: Any = None, fresh: bool = False) -> None:
    """fresh: trace again, to see what a patched module does."""
    ours = jax.jit(traced(twin.config, compute)) if fresh else jitted(twin.config, compute)
    gradients, outputs, losses = ours(change(twin.params) if change else twin.params, run.batch)
    s = run.outputs["text_logits"].shape[1]
    assert_close(outputs["conditioning"], run.outputs["conditioning"], MODULE, "conditioning")
    for i, block in enumerate(run.outputs["blocks"]):
        assert_close(outputs["blocks"][i], block, STACK, f"block {i}")
    assert_close(outputs["hidden"], run.outputs["hidden"], STACK, "hidden")
    assert_close(outputs["text_logits"][:, 1 : 1 + s], run.outputs["text_logits"], STACK, "text_logits")
    assert_close(outputs["mel_logits"][:, 1 + s :], run.outputs["mel_logits"], STACK, "mel_logits")
    for name, value in run.losses.items():
        assert_close(losses[name], value, STACK, f"{name} loss")
    assert_trees_close(gradients, run.gradients, STACK, twin.heads)


@pytest.mark.parametrize(
    "compute",
    [
        PLAIN,
        Compute(unrolled=True, attention="by_heads", remat="dots"),
        Compute(attention="xla", remat="full", unrolled=True),
    ],
    ids=["plain", "unrolled, head by head, products kept", "attention of jax.nn, all again, unrolled"],
)
def test_stack_losses_and_all_gradients(run: TorchRun, voice: Twin, compute: Compute) -> None:
    check_stack(run, voice, compute)


CHANGES: dict[str, tuple[Change, str]] = {
    "norms swapped": (
        lambda p: p | {"final_norm": p["gpt"]["ln_f"], "gpt": p["gpt"] | {"ln_f": p["final_norm"]}},
        "hidden",
    ),
    "qkv of the conditioning encoder in blocks": (
        edited("conditioning_encoder/attn/qkv/kernel", un_interleaved),
        "conditioning",
    ),
    "a square matrix transposed": (transposed("gpt/h/attn/c_proj/kernel"), "block 0"),
    "the last block's matrix transposed": (
        edited("gpt/h/attn/c_proj/kernel", lambda w: np.stack([w[0], w[1], w[2].T])),
        "block 2",
    ),
    "blocks in another order": (lambda p: p | {"gpt": p["gpt"] | {"h": reordered(p["gpt"]["h"])}}, "block 0"),
    "text embedding one row down": (
        edited("text_embedding/embedding", lambda w: np.roll(w, 1, axis=0)),
        "block 0",
    ),
    "text positions one row down": (
        edited("text_pos_embedding/embedding", lambda w: np.roll(w, 1, axis=0)),
        "block 0",
    ),
    "mel positions one row down": (
        edited("mel_pos_embedding/embedding", lambda w: np.roll(w, 1, axis=0)),
        "block 0",
    ),
    "code embedding one row down": (edited("mel_embedding/embedding", lambda w: np.roll(w, 1, axis=0)), "block 0"),
    "text bias off": (edited("text_head/bias", lambda w: w + 0.01), "text_logits"),
    "mel bias off": (edited("mel_head/bias", lambda w: w + 0.01), "mel_logits"),
}


def reordered(blocks: Tree) -> Tree:
    return jax.tree.map(lambda w: w[::-1], blocks)


@pytest.mark.parametrize("name", CHANGES)
def test_stack_parity_fires(run: TorchRun, voice: Twin, name: str) -> None:
    change, where = CHANGES[name]
    with pytest.raises(AssertionError, match=f"^{where}"):
        check_stack(run, voice, change=change)


def test_stack_parity_fires_for_wrong_losses_and_gradients(run: TorchRun, voice: Twin) -> None:
    stopped = dict(run.batch, weights=run.batch["weights"] * (run.batch["targets"] != voice.config.stop_mel))
    with pytest.raises(AssertionError, match="mel loss"):
        check_stack(dataclasses.replace(run, batch=stopped), voice)
    halved = run.gradients | {"mel_head": jax.tree.map(lambda g: g / 2, run.gradients["mel_head"])}
    with pytest.raises(AssertionError, match="mel_head/"):
        check_stack(dataclasses.replace(run, gradients=halved), voice)


def test_stack_parity_fires_for_the_last_frame(run: TorchRun, voice: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    first = layers.ConditioningEncoder.__call__
    monkeypatch.setattr(layers.ConditioningEncoder, "__call__", lambda self, mel: first(self, mel[:, ::-1]))
    with pytest.raises(AssertionError, match="conditioning"):
        check_stack(run, voice, fresh=True)


# Parts that the stack's numbers could hide


def test_embeddings_and_heads(run: TorchRun, torch_voice: Any, voice: Twin) -> None:
    _, outputs, _ = jitted(voice.config, PLAIN)(voice.params, run.batch)
    torch_tokens = {name: torch.from_numpy(run.batch["tokens"]).long() for name in ("text", "mel")}
    s = run.outputs["text_logits"].shape[1]
    want = torch_voice.embed(
        torch.tensor(run.outputs["conditioning"][:, 0]),
        torch_tokens["text"][:, 1 : 1 + s],
        torch_tokens["mel"][:, 1 + s :],
    )
    assert_close(outputs["embedded"], want, MODULE, "embedded")
    hidden = torch.tensor(np.asarray(outputs["hidden"]))
    assert_close(outputs["text_logits"], torch_voice.text_head(hidden), MODULE, "text_head")
    assert_close(outputs["mel_logits"], torch_voice.mel_head(hidden), MODULE, "mel_head")
    assert_close(outputs["hidden"], torch_voice.final_norm(torch.tensor(run.outputs["normed"])), STACK, "final_norm")


@pytest.mark.parametrize("name", ["final_norm", "gpt.ln_f"])
def test_final_norms(torch_voice: Any, voice: Twin, name: str) -> None:
    norm = layers.layer_norm("norm", "float32")
    check = functools.partial(
        assert_module_parity,
        torch_voice.get_submodule(name),
        TABLE,
        name,
        lambda params, x: norm.apply({"params": params}, x),
        10 * noise(2, 5, 64),
        channels_first=False,
    )
    check()
    with pytest.raises(AssertionError, match="output"):
        check(change=swapped("scale", "bias"))


def test_released_dimensions() -> None:
    config = RELEASED
    row, mel = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 1, 8, 80))
    shapes = jax.eval_shape(lambda: UnifiedVoice(config).init(jax.random.key(0), mel, row, row, row))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS["ar"]
    assert (config.codes, config.start_mel, config.stop_mel, config.start_text) == (8192, 8192, 8193, 255)


# Joined rows


@pytest.fixture(scope="module")
def clips(torch_voice: Any) -> list[dict[str, np.ndarray]]:
    batch = random_batch(torch_voice, seed=4, text_lengths=(14, 9, 5, 1), code_lengths=(20, 12, 7, 30))
    return [
        {
            "conditioning_mel": batch["cond_mel"][i].numpy(),
            "text": batch["text"][i, : batch["text_lengths"][i]].numpy(),
            "codes": batch["codes"][i, : batch["code_lengths"][i]].numpy(),
        }
        for i in range(4)
    ]


def batch_of(config: UnifiedVoiceConfig, clips: list[dict[str, np.ndarray]], length: int = 0) -> dict[str, np.ndarray]:
    mels = np.stack([clip["conditioning_mel"] for clip in clips])
    return joined_batch(config, mels, [c["text"] for c in clips], [c["codes"] for c in clips], length)


def check_rows(torch_voice: Any, twin: Twin, clips: list[dict[str, np.ndarray]], batch: dict[str, np.ndarray]) -> None:
    """Each row's logits against torch's for the row alone, and the batch's losses against the sum of theirs."""
    _, outputs, losses = jitted(twin.config, PLAIN)(twin.params, batch)
    text_sum = mel_sum = 0.0
    for row, clip in enumerate(clips):
        text, codes = torch.tensor(clip["text"]), torch.tensor(clip["codes"])
        conditioning = torch_voice.conditioning_latent(torch.tensor(clip["conditioning_mel"])[None])[0]
        want_text, want_mel = torch_voice.row_logits(conditioning, text, codes)
        middle = 1 + len(want_text)
        assert_close(outputs["text_logits"][row, 1:middle], want_text, STACK, f"text logits {row}")
        assert_close(outputs["mel_logits"][row, middle : middle + len(want_mel)], want_mel, STACK, f"mel logits {row}")
        text_loss, mel_loss = torch_voice.row_losses(conditioning, text, codes)
        text_sum, mel_sum = text_sum + text_loss.item(), mel_sum + mel_loss.item()
    assert_close(losses["text"], text_sum / sum(len(c["text"]) + 1 for c in clips), STACK, "text loss")
    assert_close(losses["mel"], mel_sum / sum(len(c["codes"]) + 1 for c in clips), STACK, "mel loss")


PADDED = 60


@pytest.mark.parametrize(("chosen", "length"), [((0, 1, 2), PADDED), ((3, 2, 0), PADDED), ((3,), 0)])
def test_joined_rows_equal_torchs_single_rows(
    torch_voice: Any, voice: Twin, clips: list[dict[str, np.ndarray]], chosen: tuple[int, ...], length: int
) -> None:
    picked = [clips[i] for i in chosen]
    check_rows(torch_voice, voice, picked, batch_of(voice.config, picked, length))


@pytest.mark.parametrize(("name", "edit"), [("weights", np.roll), ("positions", np.add), ("tokens", np.roll)])
def test_parity_of_joined_rows_fires(
    torch_voice: Any, voice: Twin, clips: list[dict[str, np.ndarray]], name: str, edit: Any
) -> None:
    batch = batch_of(voice.config, clips[:3], PADDED)
    moved = np.roll(batch[name], 1, axis=1) if edit is np.roll else batch[name] + 1
    with pytest.raises(AssertionError):
        check_rows(torch_voice, voice, clips[:3], batch | {name: moved})


def test_padding_may_hold_anything(voice: Twin, clips: list[dict[str, np.ndarray]]) -> None:
    """Values at weight 0 change neither logits of real positions nor losses nor gradients."""
    batch = batch_of(voice.config, clips[:3], PADDED)
    padding = np.cumsum(batch["weights"][:, ::-1], axis=1)[:, ::-1] == 0
    noisy = dict(batch)
    for name, below in (("tokens", 60), ("targets", 60), ("token_types", 3), ("positions", 20)):
        random = np.random.default_rng(0).integers(0, below, padding.shape).astype(np.int32)
        noisy[name] = np.where(padding, random, batch[name])
    gradients, _, losses = jitted(voice.config, PLAIN)(voice.params, batch)
    noisy_gradients, _, noisy_losses = jitted(voice.config, PLAIN)(voice.params, noisy)
    for name in ("text", "mel", "stop"):
        assert_close(noisy_losses[name], losses[name], MODULE, name)
    assert_trees_close(noisy_gradients, gradients, MODULE, voice.heads)
    changed = ("tokens", "targets", "token_types", "positions")
    assert all(not np.array_equal(noisy[name], batch[name]) for name in changed)


def test_conditioning_of_several_vectors_is_a_prefix_of_every_row(voice: Twin) -> None:
    """Two vectors: the second takes the place of a position, so text after it sees both and the first sees one."""
    model, random = UnifiedVoice(voice.config), np.random.default_rng(0)
    vectors = random.standard_normal((1, 2, voice.config.width), np.float32)
    tokens = np.array([[0, 0, voice.config.start_text, 5, 0]], np.int32)
    token_types = np.array([[CONDITIONING, CONDITIONING, TEXT, TEXT, TEXT]], np.int32)
    positions = np.array([[0, 0, 0, 1, 2]], np.int32)
    apply = functools.partial(model.apply, {"params": voice.params}, method=UnifiedVoice.from_conditioning)
    both = apply(vectors, tokens, token_types, positions)
    np.testing.assert_array_equal(both["embedded"][:, :2], vectors)
    alone = apply(vectors[:, :1], tokens[:, 1:], token_types[:, 1:], positions[:, 1:])
    np.testing.assert_array_equal(both["embedded"][:, 2:], alone["embedded"][:, 1:])
    assert_close(both["hidden"][:, 0], alone["hidden"][:, 0], MODULE)
    with pytest.raises(AssertionError):
        assert_close(both["hidden"][:, 2], alone["hidden"][:, 1], 1e-2)


# Half precision


def test_bfloat16_is_close_and_gives_float32_logits_and_gradients(run: TorchRun, voice: Twin) -> None:
    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote bfloat16 to float32 implicitly
        gradients, outputs, losses = jitted(voice.config, Compute(dtype="bfloat16"))(voice.params, run.batch)
    s = run.outputs["text_logits"].shape[1]
    for got, name in (
        (outputs["text_logits"][:, 1 : 1 + s], "text_logits"),
        (outputs["mel_logits"][:, 1 + s :], "mel_logits"),
    ):
        assert got.dtype == jnp.float32
        assert_close(got, run.outputs[name], BFLOAT16, name)
        with pytest.raises(AssertionError):  # it did compute in bfloat16
            assert_close(got, run.outputs[name], STACK, name)
    for name, value in run.losses.items():
        assert_close(losses[name], value, BFLOAT16 / 4, name)
    assert outputs["blocks"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


BFLOAT16 = 4e-2  # ten of its roundings (2^-8); float32 is 2^-24


# Dropout


@functools.cache
def dropped(**rates: float) -> Any:
    """(batch, dropout keys) -> mel logits of the small model."""
    model = UnifiedVoice(CONFIG, Compute(**rates))
    names = ("conditioning_mel", "tokens", "token_types", "positions")
    apply = jax.jit(lambda params, batch, keys: model.apply({"params": params}, *(batch[n] for n in names), keys))
    return lambda batch, keys: np.asarray(apply(small.params(), batch, keys)["mel_logits"])


ALL = dict(embed_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1)


def keys_of(seed: int, step: int, *examples: int) -> jax.Array:
    return dropout_keys(seed, jnp.int32(step), jnp.array(examples))


def test_dropout_is_off_without_keys_or_rates() -> None:
    batch = small.clips(0, rows=3)
    plain = dropped()(batch, None)
    assert np.array_equal(dropped(**ALL)(batch, None), plain)
    assert np.array_equal(dropped()(batch, keys_of(0, 0, 0, 1, 2)), plain)


@pytest.mark.parametrize("kind", ALL)
def test_each_dropout_acts(kind: str) -> None:
    batch = small.clips(0, rows=3)
    with pytest.raises(AssertionError):
        assert_close(dropped(**{kind: 0.1})(batch, keys_of(0, 0, 0, 1, 2)), dropped()(batch, None), 1e-2)


def test_a_rows_dropout_is_its_own() -> None:
    """The same in any batch and at any place; another for another seed, step or example."""
    batch, apply = small.clips(0, rows=3), dropped(**ALL)
    want = apply(batch, keys_of(0, 5, 10, 11, 12))[1]
    backwards = {name: value[::-1] for name, value in batch.items()}
    assert_close(apply(backwards, keys_of(0, 5, 12, 11, 10))[1], want, MODULE)
    alone = {name: value[1:2] for name, value in batch.items()}
    assert_close(apply(alone, keys_of(0, 5, 11))[0], want, MODULE)
    for other in (keys_of(1, 5, 10, 11, 12), keys_of(0, 6, 10, 11, 12), keys_of(0, 5, 10, 12, 11)):
        with pytest.raises(AssertionError):
            assert_close(apply(batch, other)[1], want, 1e-2)


def test_dropout_does_not_change_with_padding() -> None:
    """But attention's: its weights are (s, s), so their draws move with the length."""
    short, long, keys = small.clips(0, rows=3), small.clips(0, rows=3, length=60), keys_of(0, 5, 10, 11, 12)
    s = short["tokens"].shape[1]
    apply = dropped(embed_dropout=0.1, residual_dropout=0.1)
    assert_close(apply(long, keys)[:, :s], apply(short, keys), MODULE)
    with pytest.raises(AssertionError):
        assert_close(dropped(**ALL)(long, keys)[:, :s], dropped(**ALL)(short, keys), 1e-2)
