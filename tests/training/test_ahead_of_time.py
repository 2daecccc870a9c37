"""Planning for machines that are not here: real compilers, the work by formula, what the lines say."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from configs import ar, ar_small_gpu
from tests.support import programs, runs
from tests.support.compilers import (
    BF16,
    LITTLE_EFFORT,
    assert_as_wanted,
    compiled_with,
    needs_compilers,
    recipe,
    with_nvidia,
)
from tortoise_jax.audio import CONDITIONING_FRAMES
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.checkpoints.pretrained import released_shapes
from tortoise_jax.errors import UserError
from tortoise_jax.models.layers import ATTENTION_IMPLEMENTATIONS, REMAT, TABLE_GRADIENTS, Compute
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoice
from tortoise_jax.training import ahead_of_time, ar_run, hlo, presets, roofline, topologies
from tortoise_jax.training.estimate import Epoch, assumed_lengths, size, state_shapes
from tortoise_jax.training.optimizer import split
from tortoise_jax.training.roofline import Step
from tortoise_jax.training.step import gradients
from tortoise_jax.training.topologies import DoesNotFit, Target, parse

ROOT = Path(__file__).parents[2]

# --- real compilers ---------------------------------------------------------------------------------------------------


@needs_compilers
@pytest.mark.usefixtures("compilers")
def test_a_step_of_two_layers_compiles_for_tpus() -> None:
    assert runs.AR.layers == 2
    assert_as_wanted(*compiled_with("v5e:2x4", BF16))


@needs_compilers
def test_a_step_of_two_layers_compiles_for_nvidia() -> None:
    """In a process of its own, see `with_nvidia`."""
    command = [sys.executable, "-m", "tests.support.compilers", "rtx3060-12g:2"]
    environment = with_nvidia(os.environ)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "as wanted" in done.stdout


@needs_compilers
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("target", ["v5e:1x1", pytest.param("a100-40g", marks=pytest.mark.slow)])
def test_codes_do_not_depend_on_fast_products(target: str) -> None:
    """The front end and the dVAE multiply in full float32: less would change codes. The model's products are fast."""
    small = 4096  # samples; a TPU's program of six seconds takes long to compile
    exact = {
        "mel": programs.mel(samples=small),
        "encode": programs.dvae(runs.DVAE, "encode"),
        "decode": programs.dvae(runs.DVAE, "decode"),
    }
    fast = {"prompts": programs.prompts(runs.AR, "bfloat16"), "decoding": programs.decoding(runs.AR, "bfloat16")}
    for name, (function, shapes) in (exact | fast).items():
        text = parse(target).compile(function, *shapes).as_text()
        precisions = programs.product_precisions(text)
        assert precisions, name
        assert (set(precisions) == {"highest"}) == (name in exact), (name, precisions)


VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "remat": REMAT,
    "unrolled": (False, True),
    "embed_dropout": (0.0, 0.1),
    "residual_dropout": (0.0, 0.1),
    "attention_dropout": (0.0, 0.1),
    "attention": ATTENTION_IMPLEMENTATIONS,
    "table_gradient": TABLE_GRADIENTS,
}


def variants() -> Iterator[tuple[str, Any, str]]:
    """Each value that BF16, which the quick tests compile, does not have; cuDNN's is for NVIDIA alone."""
    for target in ("v5e:2x4", "a100-40g:2"):
        for name, values in VALUES.items():
            for value in values:
                if value != getattr(BF16, name) and not (value == "cudnn" and target.startswith("v5e")):
                    yield name, value, target


def test_every_compute_option_is_compiled() -> None:
    assert VALUES.keys() == {field.name for field in dataclasses.fields(Compute)}


@pytest.mark.slow
@needs_compilers
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize(("name", "value", "target"), variants())
def test_every_value_of_every_compute_option_compiles(name: str, value: Any, target: str) -> None:
    assert_as_wanted(*compiled_with(target, dataclasses.replace(BF16, **{name: value})))


@pytest.mark.slow
@needs_compilers
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize(
    "target", ["v3:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x4", "t4-16g:2", "rtx3060-12g:2", "h100:2"]
)
def test_other_machines(target: str) -> None:
    compute = dataclasses.replace(BF16, dtype=parse(target).chip.dtype)
    assert_as_wanted(*compiled_with(target, compute))
    assert_as_wanted(*compiled_with(target, compute, optimizer="adafactor", freeze="conditioning_encoder/.*"))


def small_settings(rank: int) -> Any:
    settings = ar_small_gpu.get_config()
    settings.lora.rank = rank
    presets.fill(settings, 300)
    return settings


@pytest.mark.parametrize(("rank", "most"), [(0, 3.2), (16, 1.7)])
def test_on_a_small_card_parameters_gradients_and_state_are_little(rank: int, most: float) -> None:
    settings, released = small_settings(rank), released_shapes()
    config = ar_run.make_step_config(settings, released, settings.batch_size, parse("rtx3070-8g"))
    state = state_shapes(config, released.ar.params)
    assert size(state) + size(split(state.params, config.freeze)[0]) < most * 2**30


@pytest.mark.slow
@needs_compilers
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize(("rank", "most"), [(0, 5.5), (16, 2.5)])
def test_the_released_model_is_trained_on_a_card_of_8_gb(rank: int, most: float) -> None:
    """Rows as long as any of LJSpeech's."""
    settings, released, target = small_settings(rank), released_shapes(), parse("rtx3070-8g")
    config = ar_run.make_step_config(settings, released, settings.batch_size, target)
    epoch = Epoch.of(settings, assumed_lengths(), 1)
    step = Step(epoch.longest, epoch.rows, epoch.accumulation, settings.conditioning_clips)
    assert (epoch.rows, epoch.accumulation) == (2, 16)
    compiled = ahead_of_time.compile_step(target, config, released.ar.params, step)
    assert compiled.needed < most * 2**30 < target.memory
    assert compiled.donated >= compiled.state


# --- the compiled text ------------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%deep (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} all-reduce(%p), to_apply=%add
}

%body (p: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %all-reduce.1 = (bf16[4,2]{1,0:T(8,128)}, /*index=1*/f32[]) all-reduce(%x, %y), to_apply=%add
  %f = f32[8]{0} fusion(%all-reduce.1), kind=kLoop, calls=%deep
}

%condition (p: (s32[], bf16[4,2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %while.1 = (s32[], bf16[4,2]) while(%t), condition=%condition, body=%body
  %all-gather-start.1 = s32[6]{0} all-gather-start(%p), dimensions={0}
  %all-gather-done.1 = s32[6]{0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce = f32[10]{0} all-reduce(%q), to_apply=%add
}
"""


def test_what_is_summed_in_loops_is_told_from_what_is_not() -> None:
    assert list(hlo.collectives(PROGRAM)) == [
        hlo.Collective("all-reduce", ("f32",), 32, in_loop=True),
        hlo.Collective("all-reduce", ("bf16", "f32"), 20, in_loop=True),
        hlo.Collective("all-gather", ("s32",), 24, in_loop=False),
        hlo.Collective("all-reduce", ("f32",), 40, in_loop=False),
    ]


def test_sums_in_loops_are_said() -> None:
    sums = tuple(hlo.Collective("all-reduce", ("bf16",), 2**20, in_loop) for in_loop in (False, True, True))
    lines = list(ahead_of_time.describe_sums(ahead_of_time.Compiled({}, 2**30, 2**30, sums, 0)))
    assert "sums over devices: 1 of gradients, 1 MiB together in bf16, outside all loops, once per step" in lines
    assert "sums over devices: 2 of gradients, 2 MiB together in bf16, in a loop, many times per step" in lines


# --- the work by formula ----------------------------------------------------------------------------------------------


def products_of(jaxpr: Any) -> int:
    """Operations of all matrix products of a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = jaxprs_in_params(equation.params)
        total += times * sum(products_of(one) for one in inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return total


@pytest.mark.parametrize("remat", REMAT)
def test_the_formula_counts_the_products_of_the_step(remat: str) -> None:
    compute = Compute(remat=remat)
    model = dataclasses.replace(RELEASED, layers=3)
    config = dataclasses.replace(recipe(compute, config=model), axis=None)
    step = Step(length=96, rows=2, accumulation=3, conditioning_clips=2)
    batch = config.batch_shapes(step.length, step.rows, step.accumulation)
    del batch["conditioning_wav"]  # the log-mel is not in the formula
    mel = (step.accumulation, step.rows, step.conditioning_clips, CONDITIONING_FRAMES, model.mel_channels)
    batch["conditioning_mel"] = jax.ShapeDtypeStruct(mel, np.float32)
    params, zero = abstract_tree(model), np.int32(0)
    counted = products_of(jax.make_jaxpr(functools.partial(gradients, config))(params, batch, zero).jaxpr)
    # No gradient is computed of the mel.
    assert counted == pytest.approx(roofline.computed_products(config.model, step), rel=0.02)


def test_communication_takes_less_of_a_step_with_more_rows() -> None:
    target, model = parse("v5e:16x16"), UnifiedVoice(RELEASED, BF16)
    line = lambda rows: roofline.roofline(target, model, Step(320, 1, rows, 2), 421_526_786, 4 * 421_526_786)
    assert line(1).communication == line(8).communication == pytest.approx(2 * 4 * 421_526_786 * 255 / 256 / 200e9)
    assert line(1).share > line(8).share
    enough = roofline.rows_for_goal(target, model, Step(320, 1, 1, 2), 421_526_786, 4 * 421_526_786)
    assert line(enough).share <= 0.1 < line(enough - 1).share


def test_a_slice_without_rings_has_half_the_links() -> None:
    assert parse("v5e:16x16").link == 2 * parse("v5e:8x16").link
    assert parse("v4:4x4x4").link == 2 * parse("v4:2x2x4").link
    assert parse("h100:8").link == parse("h100:2").link


# --- names and what is said -------------------------------------------------------------------------------------------


def test_machines_are_what_their_names_say() -> None:
    assert parse("v5e").name == "v5e:2x4"
    assert [parse(name).device_count for name in ("v5e:16x16", "v3:2x2", "v4:2x2x2", "h100:8", "rtx3060-12g")] == [
        256,
        8,
        8,
        8,
        1,
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h10:2", 'no such chip (did you mean "h100"?); known are v3, v4,'),
        ("v5e:2x2x2", "v5e takes a shape such as v5e:2x4"),
        ("v5e:8", "v5e takes a shape such as v5e:2x4"),
        ("v5e:2x", "v5e takes a shape such as v5e:2x4"),
        ("h100:0", "h100 takes a shape such as h100:1"),
    ],
)
def test_other_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        parse(name)


@needs_compilers
@pytest.mark.usefixtures("compilers")
def test_a_slice_that_google_does_not_make_is_refused() -> None:
    with pytest.raises(UserError, match=r"--topology v5e:3x5: the compiler says: .*divisible"):
        _ = parse("v5e:3x5").devices


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies, "COMPILERS", {"tpu": ("no_such.module",)})
    with pytest.raises(UserError, match=r"not installed \(no_such.module\); pip install 'tortoise_jax\[plan\]'"):
        _ = parse("v5e").devices


def plan(monkeypatch: pytest.MonkeyPatch, target: Target, needed: float, **fields: Any) -> list[str]:
    """The lines where every program needs `needed` bytes; a negative number: where the compiler refuses it."""

    def compile_step(*_: Any) -> ahead_of_time.Compiled:
        if needed < 0:
            raise DoesNotFit("RESOURCE_EXHAUSTED: used 22.17G of 15.75G")
        return ahead_of_time.Compiled({"activations": int(needed)}, 1, 1, (), 0)

    monkeypatch.setattr(ahead_of_time, "compile_step", compile_step)
    settings = ar.get_config()
    settings.update(fields)
    lengths = np.full(400, 30)
    presets.fill(settings, len(lengths))
    return list(ahead_of_time.describe(target, recipe(BF16), abstract_tree(runs.AR), settings, lengths))


def test_what_does_not_fit_comes_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = plan(monkeypatch, parse("v5e"), -1, batch_size=64)
    assert "it does not fit: RESOURCE_EXHAUSTED: used 22.17G of 15.75G; in this order:" in refused
    assert any("gradient_accumulation_steps=8" in line for line in refused)
    card = plan(monkeypatch, parse("rtx3060-12g"), 10 * 2**30)
    assert "it does not fit in the 75% of the card that JAX takes; in this order:" in card
    assert any(line.startswith("  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95") for line in card)
    too_large = plan(monkeypatch, parse("rtx3060-12g"), 12 * 2**30)
    assert not any(line.startswith("  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95") for line in too_large)
    assert not any("estimated" in line for line in refused + card)


def test_rows_without_a_clip_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    wasteful = plan(monkeypatch, parse("v5e:16x16"), 2**30, batch_size=128)
    assert any("only 128 of the 1024 rows of a step hold a clip" in line for line in wasteful)
    assert not any("hold a clip" in line for line in plan(monkeypatch, parse("v5e"), 2**30, batch_size=128))


# --- the real command -------------------------------------------------------------------------------------------------


def show_plan(
    project: Path, *flags: str, effort: str = LITTLE_EFFORT, **fields: Any
) -> subprocess.CompletedProcess[str]:
    environment = runs.environment() | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": effort,
    }
    command = runs.command(project, project / "run", *flags, **fields)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)


@needs_compilers
@pytest.mark.parametrize(
    ("name", "title", "memory", "fits"),
    [
        ("v5e:2x2", "4 x TPU v5e, each 16 GiB", "of 16.0 GiB", "it fits"),
        pytest.param(
            *("rtx3060-12g:2", "2 x NVIDIA RTX 3060, each 12 GiB", "of 9.0 GiB"),
            "it fits in the 75% of the card that JAX takes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_plan_for_a_machine_that_is_not_here(tmp_path: Path, name: str, title: str, memory: str, fits: str) -> None:
    runs.write_checkpoint(tmp_path / "checkpoint")
    done = show_plan(tmp_path, "--plan", "--topology", name, data="no such data")
    assert done.returncode == 0, done.stderr
    for part in (
        "config.data=no such data does not exist: planning for 13100 clips of usual lengths",
        "computing in bfloat16",
        f"planning for {title}",
        "these are facts of the program that would run:",
        memory,
        fits,
        "state updated in place: ",
        "sums over devices: 1 of gradients, 0 MiB together in f32, outside all loops, once per step",
        "rows of a micro-batch that fit: about ",
        "estimated from the published peaks:",
        "  communication: ",
        "the run: 6 steps, ",
    ):
        assert part in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_compilers
def test_the_plan_for_a_pod_needs_no_checkpoint(tmp_path: Path) -> None:
    """And at 256 chips, the sums of gradients take less than a tenth of a step of 16 clips per chip."""
    fields = dict(checkpoint="none", batch_size=4096, gradient_accumulation_steps=4, steps=100, remat=True)
    done = show_plan(tmp_path, "--plan", "--topology", "v5e:16x16", effort="0", conditioning_clips=2, **fields)
    assert done.returncode == 0, done.stderr
    assert "config.checkpoint=none does not exist: planning for the released model" in done.stdout
    assert "parameters: 421,526,786" in done.stdout
    assert "planning for 256 x TPU v5e, each 16 GiB" in done.stdout
    once = r"sums over devices: \d+ of gradients, 1608 MiB together in f32, outside all loops, once per step"
    assert re.search(once, done.stdout), done.stdout
    share = re.search(r"communication: (\d+)% of such a step", done.stdout)
    assert share
    assert int(share[1]) < 10


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--plan", "--topology", "v5f:2x4"), 'no such chip (did you mean "v5p"?)'),
        (("--topology", "v5e:2x4"), "--topology v5e:2x4 is for --plan; a run uses the devices that are here"),
    ],
)
def test_what_is_asked_wrongly_ends_in_one_line(tmp_path: Path, flags: tuple[str, ...], says: str) -> None:
    done = show_plan(tmp_path, *flags)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
