"""The tables between torch names and Flax paths: values, the way back, completeness; and that each error in them shows.

MUTATIONS lists what is done to every row of both tables. Each mutated table must fail `check`, which the real ones
pass. The models are square wherever a model can be, so that shapes cannot show an error and only values can.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from torch import nn

from convert import mapping
from convert.mapping import CONV, CONV_TRANSPOSE, GAIN, LINEAR, POINTWISE, SAME, Operation, Row, to_flax, to_torch
from convert.source import expected_shapes
from convert.tables import MODELS, clvp, diffusion, dvae, hifigan, random_voice, unified_voice, vocoder
from tests.support import checkpoint_files as files
from tests.support.layer_values import check_values, layer_outputs
from tests.support.released import PARAMETERS, torch_model
from tests.support.synthesis_models import (
    Comparison,
    clvp_comparison,
    diffusion_comparison,
    hifigan_comparison,
    random_voice_comparison,
    vocoder_comparison,
)
from tests.support.torch_reference import (
    CLVP,
    DiffusionTts,
    DiscreteVAE,
    Hifigan,
    UnifiedVoice,
    UnivNet,
    tiny_clvp,
    tiny_diffusion,
    tiny_dvae,
    tiny_hifigan,
    tiny_unified_voice,
    tiny_vocoder,
)
from tortoise_jax.checkpoints.parts import PART_TYPES
from tortoise_jax.errors import UserError
from tortoise_jax.models import clvp as clvp_model
from tortoise_jax.models import diffusion as diffusion_model
from tortoise_jax.models import dvae as dvae_model
from tortoise_jax.models import hifigan as hifigan_model
from tortoise_jax.models import random_voice as random_voice_model
from tortoise_jax.models import unified_voice as unified_voice_model
from tortoise_jax.models import vocoder as vocoder_model

Table = list[Row]
SQUARE = 80
HEADS = 4


# --- the check --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch model, what is saved of it, and what each of its layers computes."""

    model: nn.Module
    state: dict[str, np.ndarray]  # as saved, with everything that is dropped
    expected: dict[str, tuple[int, ...]]
    check_values: Callable[[dict[str, Any]], None]  # fails unless the Flax tree computes what the model does

    @staticmethod
    def of(model: nn.Module, extra: Callable[[files.State], files.State]) -> Case:
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        is_dvae = isinstance(model, DiscreteVAE)
        config = dvae.config_of(shapes, "test") if is_dvae else unified_voice.config_of(shapes, "test", HEADS)
        state = {key: value.numpy() for key, value in extra(files.state_of(model)).items()}
        outputs = dict(layer_outputs(model))
        return Case(model, state, expected_shapes(config), lambda params: check_values(model, params, outputs))

    @staticmethod
    def whole(comparison: Comparison) -> Case:
        """Compared by the whole model's outputs, which every parameter changes."""
        state = {key: value.numpy() for key, value in files.state_of(comparison.model).items()}
        check = lambda params: comparison.check(lambda _: params)
        return Case(comparison.model, state, expected_shapes(comparison.twin.config), check)


def check(table: Table, case: Case) -> None:
    """Fails unless every layer computes what torch's does, the way back is exact, and every key is accounted for."""
    planned = mapping.plan(table, shapes_of(case.state), case.expected, "test")
    params = to_flax(planned, case.state)
    case.check_values(params)

    original = {key: value.numpy() for key, value in case.model.state_dict().items()}
    original = {older_name(key): value for key, value in original.items()}
    back = to_torch(table, params)
    assert list(back) == list(original)
    for key, value in original.items():
        assert mapping.same_bits(back[key], value), key
        assert back[key].flags.c_contiguous, key

    leaves = flatten_dict(params, sep="/")
    assert {path: leaf.shape for path, leaf in leaves.items()} == case.expected
    assert all(leaf.dtype == np.float32 and leaf.flags.owndata for leaf in leaves.values())
    assert planned.shapes == case.expected
    assert sorted(map(older_name, planned.keys)) == sorted(original)
    assert sorted([*planned.keys, *planned.dropped]) == sorted(case.state)
    assert all(found.row.reason for found in planned.dropped.values())
    check_copies(planned, case)


def older_name(key: str) -> str:
    """Weight norm's two tensors under torch's newer names go back under the older ones."""
    for newer, older in (("0", "g"), ("1", "v")):
        key = key.replace(f"parametrizations.weight.original{newer}", f"weight_{older}")
    return key


def shapes_of(state: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in state.items()}


def check_copies(planned: mapping.KeyPlan, case: Case) -> None:
    """Whatever is dropped as a copy must have been compared."""
    for key in case.state:
        if key.startswith("inference_model.") or key == "gpt.wte.weight":
            changed = case.state | {key: case.state[key] + 1}
            with pytest.raises(
                UserError, match=rf"test: {re.escape(key)} differs from .*, of which it should be a copy"
            ):
                to_flax(planned, changed)


# --- the real tables --------------------------------------------------------------------------------------------------


def everything(state: files.State) -> files.State:
    return files.with_inference_model(files.with_masks(files.with_solo_embeddings(files.with_alignment_head(state))))


def square_voice() -> UnifiedVoice:
    return tiny_unified_voice(
        layers=2,
        model_dim=SQUARE,
        heads=HEADS,
        max_text_tokens=SQUARE - 2,
        max_mel_tokens=SQUARE - 4,
        number_text_tokens=SQUARE - 1,
        start_text_token=SQUARE - 1,
        number_mel_codes=SQUARE,
        start_mel_token=SQUARE - 2,
        stop_mel_token=SQUARE - 1,
    ).requires_grad_(False)


def square_dvae() -> DiscreteVAE:
    return tiny_dvae(
        hidden_dim=SQUARE, num_layers=1, num_resnet_blocks=2, codebook_dim=SQUARE, num_tokens=SQUARE
    ).requires_grad_(False)


def square_clvp() -> CLVP:
    sizes = dict(dim_text=64, dim_speech=64, dim_latent=64, text_heads=1, num_text_tokens=64, num_speech_tokens=64)
    return tiny_clvp(**sizes, speech_enc_depth=2).requires_grad_(False)


def square_diffusion() -> DiffusionTts:
    sizes = dict(model_channels=SQUARE, in_channels=SQUARE, out_channels=SQUARE, in_latent_channels=SQUARE)
    return tiny_diffusion(**sizes, in_tokens=SQUARE, num_heads=HEADS).requires_grad_(False)


NORMS = ("older", "newer", "folded")


def small_vocoder(norm: str) -> UnivNet:
    """Square but for its ends and the kernel predictor's."""
    return tiny_vocoder(norm=norm, strides=(4, 2), noise_dim=3, kpnet_width=6, n_mel_channels=6).requires_grad_(False)


def small_hifigan(norm: str) -> Hifigan:
    sizes = dict(in_channels=16, cond_channels=16, upsample_kernel_sizes=(4, 4))
    return tiny_hifigan(norm=norm, **sizes).requires_grad_(False)


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Table, Case]]:
    return {
        "voice": (unified_voice.TABLE, Case.of(square_voice(), everything)),
        "dvae": (dvae.TABLE, Case.of(square_dvae(), files.with_statistics)),
        "clvp": (clvp.TABLE, Case.whole(clvp_comparison(square_clvp()))),
        "diffusion": (diffusion.TABLE, Case.whole(diffusion_comparison(square_diffusion()))),
        **{f"vocoder, {norm}": (vocoder.TABLE, Case.whole(vocoder_comparison(small_vocoder(norm)))) for norm in NORMS},
        **{f"hifigan, {norm}": (hifigan.TABLE, Case.whole(hifigan_comparison(small_hifigan(norm)))) for norm in NORMS},
        "random": (random_voice.TABLE, Case.whole(random_voice_comparison())),
    }


NAMES = [
    *("voice", "dvae", "clvp", "diffusion", "random"),
    *(f"{model}, {norm}" for model in ("vocoder", "hifigan") for norm in NORMS),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_what_torch_computes_and_the_way_back_is_exact(cases, name: str) -> None:
    check(*cases[name])


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_dvaes_of_other_depths(layers: int, blocks: int) -> None:
    model = tiny_dvae(num_layers=layers, num_resnet_blocks=blocks, codebook_dim=12).requires_grad_(False)
    check(dvae.TABLE, Case.of(model, files.with_statistics))


def test_square_models_are_square() -> None:
    for case, rectangular in ((square_voice(), {"c_attn", "c_fc", "c_proj", "qkv"}), (square_dvae(), set())):
        for key, value in case.state_dict().items():
            if value.ndim > 1 and not rectangular & set(key.split(".")):
                assert value.shape[:2] == (SQUARE, SQUARE), key


# --- mutations --------------------------------------------------------------------------------------------------------

REVERSED = Operation(lambda w: w[::-1], lambda w: w[::-1], None)
TRANSPOSED = Operation(lambda w: w.T, lambda w: w.T, 2)
KERNEL_REVERSED = Operation(lambda w: w.transpose(2, 1, 0)[::-1], lambda w: w[::-1].transpose(2, 1, 0), 3)
CONV_TRANSPOSED = Operation(lambda w: w.transpose(2, 0, 1), lambda w: w.transpose(1, 2, 0), 3)
POINTWISE_TRANSPOSED = Operation(lambda w: w[:, :, 0], lambda w: w[:, :, None], 3)
OF_ONE_NUMBER = ("conv_post/bias", "conv_post/kernel_g")  # reversed it is the same
WRONG_OPERATION = {
    LINEAR: [SAME],
    POINTWISE: [POINTWISE_TRANSPOSED],
    CONV: [KERNEL_REVERSED, CONV_TRANSPOSED],
    CONV_TRANSPOSE: [
        Operation(lambda w: w.transpose(2, 0, 1)[::-1], lambda w: w[::-1].transpose(1, 2, 0), 3),
        CONV,
    ],
    GAIN: [Operation(lambda w: w[::-1, 0, 0], lambda w: w[::-1, None, None], 3)],
}
# The same in one direction only: conversion is right, export is wrong.
WRONG_INVERSE = {
    LINEAR: Operation(LINEAR.to_flax, lambda w: w, 2),
    POINTWISE: Operation(POINTWISE.to_flax, lambda w: w[:, :, None], 3),
    CONV: Operation(CONV.to_flax, lambda w: w.transpose(1, 2, 0), 3),
    CONV_TRANSPOSE: Operation(CONV_TRANSPOSE.to_flax, lambda w: w.transpose(2, 1, 0), 3),
    GAIN: Operation(GAIN.to_flax, lambda w: w[::-1, None, None], 3),
}


def columns_reordered(order: np.ndarray, row: Row) -> Row:
    """The row with the fused output columns in another order, undone exactly on the way back."""
    back = np.argsort(order)
    there = row.operation
    return dataclasses.replace(
        row,
        operation=Operation(
            lambda w: there.to_flax(w)[..., order],
            lambda w: there.to_torch(np.ascontiguousarray(w[..., back])),
            there.rank,
        ),
    )


# Column numbers of [q | k | v], each of HEADS heads, taken head by head; and the other way round.
INTERLEAVED = np.arange(3 * SQUARE).reshape(3, HEADS, -1).swapaxes(0, 1).reshape(-1)
BLOCKED = np.arange(3 * SQUARE).reshape(HEADS, 3, -1).swapaxes(0, 1).reshape(-1)


def without(table: Table, index: int) -> Iterator[Table]:
    """The row is left out."""
    yield [*table[:index], *table[index + 1 :]]


def not_converted(table: Table, index: int) -> Iterator[Table]:
    """What should be converted is dropped."""
    if table[index].flax:
        yield replaced(table, index, Row(table[index].torch, reason="by mistake"))


def wrong_operation(table: Table, index: int) -> Iterator[Table]:
    """A transposed square matrix, a reversed kernel, a reversed vector; each with its exact inverse."""
    row = table[index]
    if row.flax:
        for operation in WRONG_OPERATION.get(row.operation, [REVERSED, TRANSPOSED]):
            if operation is KERNEL_REVERSED and any(name in row.flax for name in ("point", "net_4", "cond_layer")):
                continue  # of width 1
            if row.flax in OF_ONE_NUMBER and operation in (REVERSED, *WRONG_OPERATION[GAIN]):
                continue
            yield replaced(table, index, dataclasses.replace(row, operation=operation))


def wrong_inverse(table: Table, index: int) -> Iterator[Table]:
    """Right to Flax, wrong back."""
    row = table[index]
    if row.flax:
        operation = WRONG_INVERSE.get(row.operation, Operation(row.operation.to_flax, lambda w: w[::-1], None))
        if row.flax in OF_ONE_NUMBER or row.flax in [other.flax for other in table[:index]]:
            return  # the way back is by the first row of a path
        yield replaced(table, index, dataclasses.replace(row, operation=operation))


def swapped(table: Table, index: int) -> Iterator[Table]:
    """Two rows of the same operation fill each other's paths."""
    row = table[index]
    for other in range(index + 1, len(table)):
        partner = table[other]
        alike = partner.operation == row.operation and partner.stacked == row.stacked
        if row.flax and partner.flax and partner.flax != row.flax and alike:
            table = replaced(table, index, dataclasses.replace(row, flax=partner.flax))
            yield replaced(table, other, dataclasses.replace(partner, flax=row.flax))
            return


def filled_twice(table: Table, index: int) -> Iterator[Table]:
    """The row fills the path of the row before it."""
    if table[index].flax and table[index - 1].flax:
        yield replaced(table, index, dataclasses.replace(table[index], flax=table[index - 1].flax))


def fused_wrongly(table: Table, index: int) -> Iterator[Table]:
    """q, k and v interleaved where torch has blocks, and the reverse; undone exactly on the way back."""
    if ".c_attn." in table[index].torch:
        yield replaced(table, index, columns_reordered(INTERLEAVED, table[index]))
    if ".qkv." in table[index].torch:
        yield replaced(table, index, columns_reordered(BLOCKED, table[index]))


def not_compared(table: Table, index: int) -> Iterator[Table]:
    """A copy is dropped unseen."""
    if table[index].copy_of:
        yield replaced(table, index, dataclasses.replace(table[index], copy_of=""))


def too_greedy(table: Table, index: int) -> Iterator[Table]:
    """A rule that drops takes all that begins alike: `.attn.bias` by its ending also eats `c_attn.bias`."""
    row = table[index]
    if not row.flax and row.torch.endswith("attn.bias") and row.torch.startswith("gpt."):
        yield [Row("gpt.*", reason=row.reason), *table]


MUTATIONS = [
    without,
    not_converted,
    wrong_operation,
    wrong_inverse,
    swapped,
    filled_twice,
    fused_wrongly,
    not_compared,
    too_greedy,
]


def replaced(table: Table, index: int, row: Row) -> Table:
    return [*table[:index], row, *table[index + 1 :]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_each_mutation_of_each_row_shows(cases, name: str, mutation: Callable[[Table, int], Iterator[Table]]) -> None:
    table, case = cases[name]
    rows = {row.torch for row in table if any(row.pattern.fullmatch(key) for key in case.state)}
    count = 0
    for index, row in enumerate(table):
        for mutated in mutation(table, index) if row.torch in rows else ():
            with pytest.raises((AssertionError, UserError, ValueError, IndexError, pytest.fail.Exception)):
                check(mutated, case)
            count += 1
    nothing_to_do = (fused_wrongly, not_compared, too_greedy, *([swapped] if name == "random" else []))
    assert count or (name != "voice" and mutation in nothing_to_do)


def test_mutations_reach_every_row(cases) -> None:
    for name, (table, _) in cases.items():
        keys = [key for other, case in cases.values() if other is table for key in case.state]
        unused = [row.torch for row in table if not any(row.pattern.fullmatch(key) for key in keys)]
        assert unused == (["aligned_head.*"] if name == "voice" else [])


@pytest.mark.parametrize("name", ["voice", "clvp", "diffusion"])
def test_swapped_layers_show(cases, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, case = cases[name]
    plan = mapping.plan
    for path, assignment in plan(table, shapes_of(case.state), case.expected, "").filled.items():
        if not assignment.row.stacked:
            continue

        def with_layers_swapped(*arguments: Any, path: str = path) -> mapping.KeyPlan:
            planned = plan(*arguments)
            old = planned.filled[path]
            new = dataclasses.replace(old, keys=(old.keys[1], old.keys[0], *old.keys[2:]))
            return dataclasses.replace(planned, filled=planned.filled | {path: new})

        monkeypatch.setattr(mapping, "plan", with_layers_swapped)
        with pytest.raises(AssertionError):
            check(table, case)
        monkeypatch.setattr(mapping, "plan", plan)


# --- dimensions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "released"),
    [
        ("ar", unified_voice_model.RELEASED),
        ("dvae", dvae_model.RELEASED),
        ("clvp", clvp_model.RELEASED),
        ("diffusion", diffusion_model.RELEASED),
        ("vocoder", vocoder_model.RELEASED),
        ("hifigan", hifigan_model.RELEASED),
        ("random_ar", random_voice_model.RELEASED_AUTO),
        ("random_diffusion", random_voice_model.RELEASED_DIFFUSER),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dimensions_of_the_released_models(part: str, released: Any) -> None:
    shapes = {key: tuple(value.shape) for key, value in torch_model(part).state_dict().items()}
    config = MODELS[part].config(shapes, "test", None)
    assert config == released
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert sum(int(np.prod(shape)) for shape in expected_shapes(config).values()) == PARAMETERS[part]


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("decoder.3.0.weight", (32, 32, 4), "transposed convolutions (decoder.3.0.weight)"),
        ("codebook.codebooks", (1, 64, 24), "learned quantizer, no EMA codebook (codebook.codebooks)"),
        ("encoder.4.weight", (32,), "normalises its encoder (encoder.4.weight)"),
        ("encoder.0.0.weight", (16, 80, 3, 3), "works on images (encoder.0.0.weight)"),
        ("codebook.embed", (24,), "codebook.embed has shape (24,), expected 2 axes"),
        ("encoder.1.0.weight", None, "key encoder.1.0.weight is missing"),
        ("encoder.2.net.0.weight", None, "key encoder.2.net.0.weight is missing"),
    ],
)
def test_dvaes_that_are_not_supported_are_named(key: str, shape: tuple[int, ...] | None, says: str) -> None:
    model = tiny_dvae()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shape is None:
        del shapes[key]
    else:
        shapes[key] = shape
    with pytest.raises(UserError) as caught:
        mapping.plan(dvae.TABLE, shapes, expected_shapes(dvae.config_of(shapes, "d.pth")), "d.pth")
    assert says in str(caught.value)
    assert str(caught.value).startswith("d.pth: ")


def test_heads_must_divide_the_width_and_are_asked_for_below_512() -> None:
    shapes = {key: tuple(value.shape) for key, value in tiny_unified_voice().state_dict().items()}
    with pytest.raises(UserError, match=r"width 64 is below .* --heads N"):
        unified_voice.config_of(shapes, "a.pth")
    with pytest.raises(UserError, match="5 heads do not divide the width 64"):
        unified_voice.config_of(shapes, "a.pth", heads=5)
    assert unified_voice.config_of(shapes, "a.pth", heads=8).heads == 8


def test_a_key_is_matched_as_a_whole_and_its_number_without_leading_zeros() -> None:
    assert mapping.match(unified_voice.TABLE, "gpt.h.12.attn.bias").row.reason == unified_voice.MASK
    assert mapping.match(unified_voice.TABLE, "gpt.h.12.attn.c_attn.bias").row.flax == "gpt/h/attn/c_attn/bias"
    for key in ("gpt.h.012.attn.bias", "xgpt.h.1.attn.bias", "gpt.h.1.attn.bias.x", "gpt_h.1.attn.bias"):
        with pytest.raises(UserError, match="no known part"):
            mapping.match(unified_voice.TABLE, key)


def test_a_parameter_without_a_row_is_named() -> None:
    with pytest.raises(UserError, match="parameter gpt/h/ln_9/scale has no place"):
        to_torch(unified_voice.TABLE, {"gpt": {"h": {"ln_9": {"scale": np.zeros((2, 3), np.float32)}}}})


def test_mapping_and_tables_need_no_torch() -> None:
    """They may be read where only the package is installed; `convert.torch_files` is where torch begins."""
    folder = Path(mapping.__file__).parent
    files_ = [folder / "mapping.py", *(folder / "tables").glob("*.py")]
    assert len(files_) == 3 + len({id(model.table) for model in MODELS.values()})
    for path in files_:
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in imported:
            assert name.split(".")[0] not in ("torch", "transformers"), path
            assert not name.startswith("convert") or name.startswith(("convert.mapping", "convert.tables")), path


def test_every_model_is_registered_under_its_part() -> None:
    assert MODELS.keys() == PART_TYPES.keys()
    for part, model in MODELS.items():
        assert model.part == part
        assert model.file.endswith(".pth")
        assert model.locations
