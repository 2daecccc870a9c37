"""Configurations: every one loads, every wrong field ends in one line that says what and where."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import ar, dvae
from tests.support import runs
from tortoise_jax.errors import UserError
from tortoise_jax.training import config, dvae_run, field_help, presets, schemas

SCHEMA = schemas.ar_schema(ar.get_config)
ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def command_line_of_its_own() -> Iterator[None]:
    with runs.fresh_flags():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads(name: str) -> None:
    settings = importlib.import_module(f"configs.{name}").get_config()
    codec = settings.get("trains") == "dvae"
    config.check(settings, schemas.dvae_schema(dvae.get_config) if codec else SCHEMA)
    (dvae_run.fill if codec else presets.fill)(settings, 100)
    assert None not in config.flat(settings).values()
    assert schemas.optimizer(settings).milestones == tuple(settings.optimizer.milestones)
    assert codec or schemas.compute(settings, "bfloat16", "plain", 1, "scatter").dtype == "bfloat16"


def test_which_schema_a_configuration_needs_is_read_from_it() -> None:
    assert config.trains(["train.py", "--config", "configs/dvae.py", "--config.seed=3"]) == "dvae"
    assert config.trains(["train.py", "--config=configs/dvae.py:x"]) == "dvae"
    assert config.trains(["train.py", "--config", "configs/ar.py"]) == ""
    assert config.trains(["train.py", "--config", "none.py"]) == ""
    assert config.trains(["train.py", "--config"]) == ""


def test_reviving_is_off_where_a_checkpoint_is_fine_tuned() -> None:
    scratch, tuned = dvae.get_config(), dvae.get_config()
    tuned.checkpoint = "checkpoints/tortoise"
    for settings in (scratch, tuned):
        dvae_run.fill(settings, 100)
    assert scratch.revive_below > 0
    assert tuned.revive_below == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 2.5, "expected int"),
        ("steps", True, "expected int"),
        ("seed", -1, "at least 0"),
        ("embed_dropout", 1.0, "0 to 0.99"),
        ("dtype", "float16", "one of auto, float32, bfloat16"),
        ("attention", "flash", "one of auto, plain, by_heads, xla, cudnn"),
        ("optimizer.name", "adam", "one of adamw, adafactor"),
        ("optimizer.schedule", "linear", "one of stepped, cosine, constant"),
        ("optimizer.learning_rate", 0.0, "1e-12 to 1"),
        ("optimizer.learning_rate", float("nan"), "1e-12 to 1"),
        ("optimizer.milestones", (5, 3), "rising step numbers"),
        ("optimizer.milestones", ("5",), "rising step numbers"),
        ("seed", None, "expected int"),
        ("seed", 2**31, "0 to 2147483647"),
        ("steps", 2**40, "1 to 2147483647"),
        ("text_weight", float("inf"), "0 to 2147483647"),
        ("stepps", 3, 'did you mean "steps"'),
        ("accumulation", 4, "is called gradient_accumulation_steps now"),
        ("optimizer.lerning_rate", 1e-5, 'did you mean "optimizer.learning_rate"'),
        ("optimizer.lr", 1e-5, 'did you mean "optimizer.learning_rate"'),
        ("learning_rate", 1e-5, 'did you mean "optimizer.learning_rate"'),
    ],
)
def test_wrong_fields_are_named(field: str, value: object, said: str) -> None:
    settings = ar.get_config()
    *parents, name = field.split(".")
    node = settings
    for parent in parents:
        node = node[parent]
    with settings.unlocked(), node.ignore_type():
        node[name] = value
    with pytest.raises(UserError, match=field) as raised:
        config.check(settings, SCHEMA)
    assert said in str(raised.value)


def test_missing_fields_and_impossible_pairs_are_named() -> None:
    settings = ar.get_config()
    with settings.unlocked():
        del settings.remat
    with pytest.raises(UserError, match="field remat is missing"):
        config.check(settings, SCHEMA)
    settings = ar.get_config()
    settings.attention, settings.attention_dropout = "xla", 0.1
    with pytest.raises(UserError, match="attention=xla has no dropout"):
        config.check(settings, SCHEMA)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which configuration"),
        (["--config", "configs/none.py"], "configs/none.py"),
        (["--config", "configs/ar.py", "--config.optimizer.learning_rte=1"], 'did you mean "optimizer.learning_rate"'),
        (["--config", "configs/ar.py", "--config.steps=many"], "many"),
        (["--config", "configs/ar.py", "--wokdir=x"], "wokdir"),
        (["--config", "configs/ar.py", "--config.accumulation=2"], "is called gradient_accumulation_steps now"),
        (["--config", "configs/ar.py", "stray"], "stray"),
        (["--config", "configs/ar.py", "--config.optimizer=3"], "optimizer is a group of fields: optimizer.beta1, "),
        (["--config", "configs/ar.py", "--config.remat=5"], "remat is '5', expected one of none, dots, full"),
        (["--config", "configs/ar.py", "--config.deterministic=5"], "--config.deterministic: '5' is neither true nor"),
        (["--config", "configs/ar.py", "--plan=5"], "--plan: '5' is no truth value (true or false)"),
        (["--config", "configs/ar.py", "--num_processes=x"], "--num_processes: 'x' is no whole number"),
        (["--config", "configs/ar.py", "--config.seed=None"], "--config.seed: 'None' is not a number"),
        (["--config", "configs/ar.py", "--config.steps"], "--config.steps: a value is missing"),
        (["--config", "README.md"], "README.md"),
    ],
)
def test_command_lines_end_in_one_line(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])  # ml_collections reads overrides from there
    with pytest.raises(UserError) as raised:
        config.parse(["train.py", *arguments], SCHEMA)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.remat = False", "Could not override field 'remat' .* casted to type <class 'str'>"),
        ("config.steps = clips", "name 'clips' is not defined"),
    ],
)
def test_a_files_own_error_is_told_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    start = "from configs import ar\n\n\ndef get_config():\n    config = ar.get_config()\n"
    (tmp_path / "own.py").write_text(f"{start}    {line}\n    return config\n")
    with pytest.raises(UserError, match=rf"^--config .*own\.py:6: {line}: {said}$"):
        config.parse(["train.py", "--config", str(tmp_path / "own.py")], SCHEMA)


OLD = """
from configs import ar

def get_config():
    config = ar.get_config()
    with config.ignore_type():
        config.remat = False
    return config
"""


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (["--config.remat=True"], "full"),
        (["--config.remat=False"], "none"),
        (["--config.remat=dots"], "dots"),
        (["--config.remat", "dots"], "dots"),
    ],
)
@pytest.mark.parametrize("file", ["configs/ar.py", "old.py"])
def test_remat_may_be_a_truth_value_still(
    file: str, given: list[str], held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a user's own file."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "old.py").write_text(OLD)
    arguments = ["train.py", "--config", file if "/" in file else str(tmp_path / file), *given]
    monkeypatch.setattr(sys, "argv", arguments)
    assert config.parse(arguments, SCHEMA).remat == held


@pytest.mark.parametrize(
    ("given", "said"), [([], "field remat is missing; start from"), (["--config.remat=dots"], "has no field remat")]
)
def test_a_file_without_a_field_ends_in_one_line(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(OLD.replace("config.remat = False", "del config.remat"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "own.py"), *given])
    with pytest.raises(UserError, match=said) as caught:
        config.parse(sys.argv, SCHEMA)
    assert "\n" not in str(caught.value)


def test_attention_is_the_platforms_unless_one_is_asked_for() -> None:
    settings = ar.get_config()
    presets.fill(settings, 100)
    assert schemas.compute(settings, "bfloat16", "cudnn", 1, "scatter").attention == "cudnn"
    settings.attention = "xla"
    assert schemas.compute(settings, "bfloat16", "cudnn", 1, "scatter").attention == "xla"
    settings.attention, settings.attention_dropout = "auto", 0.1
    config.check(settings, SCHEMA)  # whatever "auto" is, it is plain where it drops


def test_what_help_shows_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """--help shows None for the fields that the size of the data set decides."""
    monkeypatch.chdir(ROOT)
    shown = [f"--config.{name}=None" for name, value in config.flat(ar.get_config()).items() if value is None]
    assert "--config.optimizer.learning_rate=None" in shown
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "configs/ar_demo.py", *shown])
    settings = config.parse(sys.argv, SCHEMA)
    assert {name for name, value in config.flat(settings).items() if value is None} == {
        name.removeprefix("--config.").removesuffix("=None") for name in shown
    }


def test_train_ends_in_one_line() -> None:
    done = subprocess.run([sys.executable, "train.py", "stray"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2
    assert runs.own_lines(done.stderr) == ["error: unexpected argument 'stray'; flags begin with --, see --help"]


def test_help_names_every_field() -> None:
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0
    shown = done.stdout.replace("'--config", "--config")
    assert not [name for name in config.flat(ar.get_config()) if f"\n  --config.{name}=" not in shown]
    assert "clips per step, over all devices" in shown
    prose = [line for line in done.stdout.splitlines() if "--config." not in line]
    assert max(map(len, prose)) <= 120


@pytest.mark.parametrize(
    ("made", "schema", "fill"),
    [(ar, SCHEMA, presets.fill), (dvae, schemas.dvae_schema(dvae.get_config), dvae_run.fill)],
)
def test_help_is_the_configurations_own_comments(
    made: Any, schema: config.Schema, fill: Callable[[ConfigDict, int], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for every field; and every line that is shown can be typed."""
    found = field_help.fields_help(made.get_config)
    fields = config.flat(made.get_config())
    assert found.keys() == fields.keys()
    assert not [name for name, about in found.items() if len(about.comment) < 10]
    source = Path(made.__file__).read_text()
    assert found["seed"].comment in source
    assert found["optimizer.name"].group.startswith("Optimiser")
    assert found["steps"].group == "How long, in which portions."
    assert found["batch_size"].group == ""
    chosen = made.get_config()
    fill(chosen, 300)
    page = field_help.page(made.get_config, fields, config.flat(chosen), 300)
    assert "Chosen by the data set; here for 300 clips." in page
    typed = [shlex.split(line)[0] for line in page.splitlines() if line.startswith(("  --config", "  '--config"))]
    assert f"--config.steps={chosen.steps}" in typed
    assert len(typed) == len(fields)
    monkeypatch.chdir(ROOT)
    config.check_overrides(["train.py", "--config", schema.file, *typed], schema)


def test_comments_of_several_lines_and_above_a_field() -> None:
    found = field_help.fields_help(dvae.get_config)["revive_below"]
    assert found.group == ""
    assert found.comment.startswith("A code picked less often per step than this, on average, is moved onto")
    assert found.comment.endswith("0 from a checkpoint, whose codes have a meaning.")
    assert field_help.fields_help(ar.get_config)["prompts"].comment.startswith("what the drafts say")


@pytest.mark.parametrize("clips", [1, 8, 40, 180, 700, 5000, 50_000])
def test_presets_keep_what_is_given(clips: int) -> None:
    settings = ar.get_config()
    settings.optimizer.learning_rate = 3e-6
    chosen = presets.fill(settings, clips)
    assert settings.optimizer.learning_rate == 3e-6
    assert not [line for line in chosen if "learning_rate" in line]
    assert settings.steps >= 20
    assert settings.eval_every <= settings.steps
    assert all(0 < step <= settings.steps for step in settings.optimizer.milestones)
    config.check(settings, SCHEMA)


def test_presets_are_for_at_least_one_clip() -> None:
    with pytest.raises(AssertionError, match="the train split is empty"):
        presets.fill(ar.get_config(), 0)


def test_dlas_numbers_stand_for_thousands_of_clips() -> None:
    values = presets.values(presets.choose(5000), 5000)
    assert (values["batch_size"], values["optimizer.learning_rate"]) == (128, 1e-5)
    assert presets.values(presets.choose(200), 200)["optimizer.milestones"][0] <= 10 * -(-200 // 32)
