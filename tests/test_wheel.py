"""A built wheel, installed where the project's folder is not, does what the README promises."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from convert.tables import MODELS
from tests.support import hub, readme, runs, stand_ins
from tests.support.host_processes import free_port
from tests.support.readme import Command, replaced
from tests.support.torch_reference import tiny_unified_voice

ROOT = Path(__file__).parent.parent
PACKED = ("tortoise_jax", "convert", "configs")
SOURCES = (*PACKED, "train.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@dataclasses.dataclass(frozen=True)
class User:
    """An environment's Python and the folder that its commands are typed in."""

    python: Path
    folder: Path

    def type(self, command: Command, **environment: str) -> None:
        printed = self.run(*command.words(), **environment)
        assert command.says in printed, f"{command.text}\n{printed}"
        assert (self.folder / command.leaves).exists(), f"{command.text}\n{printed}"

    def run(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            [self.python, *words], cwd=self.folder, env=self.environment() | environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def environment(self) -> dict[str, str]:
        proxies = {"PYTHONPATH", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
        own = {name: value for name, value in os.environ.items() if name.upper() not in proxies}
        quick = {name: value for name, value in runs.environment().items() if name.startswith("JAX_")}
        return own | quick | {"HF_HOME": str(self.folder / "hub"), "HF_TOKEN": "hf_stand_in"}


QUICK = {
    "steps": 2, "eval_every": 2, "batch_size": 2, "sample_every": 0, "gradient_accumulation_steps": 1,
    "conditioning_clips": 1,
}  # fmt: skip
FAST = " ".join(f"--config.{name}={value}" for name, value in QUICK.items())
CONVERT, PREPARE, TRAIN, EXPORT = readme.lines(readme.marked("real use"))
OWN_TOKENIZER, PREPARE_OWN = readme.lines(readme.marked("another language"))
CHECK = "python -m tortoise_jax.prepare --data data --check"
SPEAK = 'python -m tortoise_jax.speak --checkpoint runs/voice --text "Hello." --voice clips/ --out draft.wav'
MAIN_WAY = (
    Command(CONVERT, leaves="checkpoints/tortoise/tortoise.json"),
    Command(PREPARE, leaves="data-prepared/dataset.json"),
    Command(TRAIN, FAST, leaves="runs/voice/voice.pth"),
    Command(EXPORT, leaves="voice.pth"),
    Command(SPEAK, "--max_codes 12", leaves="draft.wav"),
)
ANOTHER, OF_ALL = "runs/voice", {"runs/voice": "whole"}
OTHERS = (
    Command("python convert/inspect_checkpoint.py FILE", here={"FILE": "checkpoints/dvae.pth"}, says="dvae"),
    Command("python convert/torch_to_flax.py --download", "--out whole", leaves="whole/tortoise.json"),
    Command("python convert/torch_to_flax.py", "--models released --add --out checkpoints/tortoise"),
    Command(CHECK, "--format ljspeech --channel mix", says="data: 8 lines"),
    Command(PREPARE, "--trim_silence --cleaner english", {"data-prepared": "english"}, "english/dataset.json"),
    Command(
        PREPARE, "--transcribe whisper", {"data data": "data bare", "data-prepared": "heard"}, "heard/dataset.json"
    ),
    Command(OWN_TOKENIZER, "--size 100", leaves="own.json"),
    Command(PREPARE_OWN, leaves="data-own/dataset.json"),
    Command("python train.py", "--help", says="--config.optimizer.learning_rate"),
    Command(TRAIN, f"{FAST} --plan", {ANOTHER: "runs/none"}, says="it fits"),
    Command(TRAIN, f"{FAST} --plan --topology v5e:1x1", {ANOTHER: "runs/none"}, says="TPU v5e"),
    Command(
        TRAIN, f"{FAST} --config.lora.rank=2 --config.keep_last=1 --config.save_to=steps "
        "--config.optimizer.moments=bfloat16", {ANOTHER: "runs/lora"}, "runs/lora/summary.json",
    ),
    Command(
        TRAIN, f"{FAST} --config.wandb=voices --config.ema=0.9 --config.sample_every=2 --config.sample_preset=hifigan "
        "--config.lora.rank=2 --config.lora.also_train=mel_head.*",
        {"configs/ar.py": "configs/ar_small_gpu.py", ANOTHER: "runs/small"}, "runs/small/wandb.txt",
    ),
    Command(
        TRAIN, f"{FAST} --config.optimizer.name=adafactor --config.optimizer.freeze=text_.*",
        {ANOTHER: "runs/part"}, "runs/part/summary.json",
    ),
    Command("convert/flax_to_torch.py runs/voice --out voice.npz", "", {ANOTHER: "runs/lora"}, "voice.npz"),
    Command(
        "convert/flax_to_torch.py checkpoints/tortoise --adapters voice.npz --out voice.pth", "",
        {"voice.pth": "merged.pth"}, "merged.pth",
    ),
    Command(
        EXPORT, "--attn_masks --source checkpoints/autoregressive.pth --dtype float16 --push_to_hub ann/voice --public",
        {"voice.pth": "half.pth"}, "half.pth",
    ),
    Command(
        SPEAK, "--preset ultra_fast --mend --max_codes 12 --candidates 2 --steps 3",
        OF_ALL | {"draft": "fast"}, "fast.wav",
    ),
    Command(
        SPEAK, "--preset hifigan --seed 2 --max_codes 12", OF_ALL | {"clips/": "random", "draft": "quick"}, "quick.wav"
    ),
    Command("python -m tortoise_jax.evaluate --run runs/voice", "--clips 2", leaves="runs/voice/evaluation.json"),
    Command(
        "python train.py --config configs/dvae.py --config.data=data", "--config.checkpoint=checkpoints/tortoise "
        "--config.steps=1 --config.eval_every=1 --config.batch_size=2 --config.crop_codes=8 --config.sample_every=0 "
        "--workdir=runs/dvae", leaves="runs/dvae/summary.json",
    ),
)  # fmt: skip
# The blocks of Python by the comment before each, and what some of them is here.
PYTHON = {
    "python": {"clip.wav": "CLIP"},
    "python commands": {
        '"data-prepared"': '"data-python"',
        "runs/voice": "runs/python",
        "steps=200": f"**{QUICK}",
        "voice.pth": "python.pth",
    },
    "speech": {"checkpoints/tortoise": "whole", '"fast"': '"fast", candidates=2, steps=3, max_codes=12'},
}
TWO_HOSTS = Command(
    "python train.py --config configs/ar.py --config.data=/shared/data-prepared --workdir=/shared/runs/voice "
    "--coordinator HOST0:1234 --num_processes 2 --process_id 0",
    FAST, {"/shared/data": "data", "/shared/runs/voice": "runs/two"},
)  # fmt: skip
NOT_OF_A_WHEEL = {
    "make ": "of a checkout",
    "benchmarks/": "of a checkout",
    "pip ": "what the wheel's environment has by other ways",
    "gcloud ": "needs a pod; its train.py is run here on two hosts",
    "srun ": "needs SLURM; likewise",
    "whisper ": "another program",
}
OPTIONS_NOT_TYPED = {
    "--config.field": "stands for any",
    "--extra-index-url": "pip's",
    "--judges": "names another Python; tests/evaluation/test_judges.py",
}
STAND_INS = {
    "wandb.py": """
import json, types
class Error(Exception): pass
class Run:
    id = "abc123"
    def write(self, line):
        with open("wandb.jsonl", "a") as file: file.write(json.dumps(line) + "\\n")
    def log(self, values, step): self.write({name: str(value) for name, value in values.items()})
    def finish(self, exit_code): assert exit_code == 0
def Audio(waveform, sample_rate): return f"{len(waveform)} at {sample_rate}"
def init(project, **options):
    run = Run()
    run.write({"project": project})
    return run
""",
    "faster_whisper/__init__.py": """
import types
class WhisperModel:
    def __init__(self, folder, local_files_only): assert local_files_only
    def transcribe(self, part, **options):
        return [types.SimpleNamespace(text=" Something is said. ")], types.SimpleNamespace(language="en")
""",
    "faster_whisper/vad.py": """
import types
VadOptions = types.SimpleNamespace
def get_speech_timestamps(heard, options): return [{"start": 0, "end": len(heard)}]
""",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git holds, so that nothing built before can slip into it."""
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, copy)
    [file] = built.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and of this project nothing else.

    The packages the wheel needs are lent by the tests' own environment: a path file adds its folder, but does not read
    the path files in it, by which the project itself is installed there.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [site_packages] = folder.glob("lib/*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip("install", "--no-deps", "--target", site_packages, wheel)
    return folder / "bin" / "python"


def pip(*arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_with_code_and_the_assets_are_packed(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for top in PACKED for path in (ROOT / top).rglob("*.py")}
    assets = {f"tortoise_jax/assets/{name}" for name in ("mel_norms.txt", "tokenizer_merges.txt")}
    assert packed == code | assets | {"train.py"}


@pytest.fixture(scope="module")
def user(python: Path, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Who has the wheel, released files and recordings, and went the main way."""
    folder = tmp_path_factory.mktemp("user")
    stand_ins.write(folder / "released")
    (folder / "checkpoints").mkdir()
    for name in ("autoregressive.pth", "autoregressive.json", "dvae.pth"):
        shutil.copy(folder / "released" / name, folder / "checkpoints" / name)
    (folder / "clips").symlink_to(runs.write_recordings(folder / "data", clips=8) / "wavs")
    user = User(python, folder)
    where = user.run("-c", "import tortoise_jax, convert, train; print(tortoise_jax.__file__, train.__file__)")
    assert all(str(python.parents[1]) in path for path in where.split()), where
    for command in MAIN_WAY:
        user.type(command)
    return user


def test_the_main_way(user: User) -> None:
    """From torch files to a torch file and speech; each of its commands left what it makes."""
    exported = torch.load(user.folder / "voice.pth", weights_only=True)
    tiny_unified_voice(seed=2, **stand_ins.AR).load_state_dict(exported, strict=True)
    assert json.loads((user.folder / "runs" / "voice" / "summary.json").read_text())


@pytest.mark.slow
def test_every_other_command(user: User) -> None:
    """In their order: some need what others made. A server of this machine is the hub, a module of ours wandb."""
    [site_packages] = user.python.parents[1].glob("lib/*/site-packages")
    for name, code in STAND_INS.items():
        (site_packages / name).parent.mkdir(exist_ok=True)
        (site_packages / name).write_text(code)
    (user.folder / "bare").mkdir()
    shutil.copy(runs.VOICE / "wavs" / next((user.folder / "data" / "wavs").iterdir()).name, user.folder / "bare")
    (user.folder / "whisper").mkdir()
    (user.folder / "whisper" / "model.bin").write_bytes(b"weights")
    with hub.running() as server:
        for model in MODELS.values():
            content = (user.folder / "released" / model.file).read_bytes()
            server.files |= {location.url(""): content for location in model.locations}
        for command in OTHERS:
            user.type(command, HF_ENDPOINT=server.address)
        fetched = {path for path in server.asked if path.endswith(".pth")}
        assert len(fetched) == len(MODELS) - 2, "all but the two that are in the folder"
        assert server.private == {"ann/voice": False}
        assert set(server.uploaded) >= {"half.pth", "half.json", "tokenizer.json", "README.md"}
        assert server.uploaded["half.pth"] == (user.folder / "half.pth").read_bytes()
    sent = [json.loads(line) for line in (user.folder / "wandb.jsonl").read_text().splitlines()]
    assert sent[0]["project"] == "voices"
    assert {name for line in sent[1:] for name in line} >= {"loss/mel", "validation/total"}
    merged = torch.load(user.folder / "merged.pth", weights_only=True)
    tiny_unified_voice(seed=2, **stand_ins.AR).load_state_dict(merged, strict=True)


@pytest.mark.slow
def test_the_command_on_two_hosts(user: User) -> None:
    address = f"127.0.0.1:{free_port()}"
    hosts = [
        subprocess.Popen(
            [user.python, *TWO_HOSTS.words(**{"HOST0:1234": address, "process_id 0": f"process_id {host}"})],
            cwd=user.folder, env=user.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    for code, out, errors in runs.outputs(hosts):
        assert code == 0, out + errors
    assert (user.folder / "runs" / "two" / "summary.json").exists()


@pytest.mark.slow
def test_the_blocks_of_python(user: User) -> None:
    clip = sorted((user.folder / "data" / "wavs").iterdir())[0].name
    for name, here in PYTHON.items():
        code = replaced(readme.marked(name), {found: own.replace("CLIP", clip) for found, own in here.items()})
        user.run("-c", f"import tortoise_jax as tj\n{code}")
    for file in ("mine.pth", "python.pth", "speech.wav"):
        assert (user.folder / file).stat().st_size > 44


def test_every_command_and_option_of_the_readme_is_run() -> None:
    """By the tests above, or it is listed with the reason."""
    known = [command.text for command in (*MAIN_WAY, *OTHERS, TWO_HOSTS)]
    left = [line for line in readme.commands() if line not in known and not line.startswith(tuple(NOT_OF_A_WHEEL))]
    assert not left, "commands of the README that no test runs from the wheel"
    typed_somewhere = readme.options("\n".join(f"{c.text} {c.more}" for c in (*MAIN_WAY, *OTHERS, TWO_HOSTS)))
    of_the_text = [found for found in readme.inline() if not found.startswith(tuple(NOT_OF_A_WHEEL))]
    assert {readme.marked(name) for name in PYTHON} == set(readme.blocks("python"))
    missing = readme.options("\n".join(of_the_text)) - typed_somewhere - set(OPTIONS_NOT_TYPED)
    assert not missing, "options of the README that no test gives to the wheel's commands"


def test_what_the_code_imports_is_declared() -> None:
    """The tests' environment has more than a user's: a package that only the tests declare must not be needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [
        line
        for extra in ("convert", "download", "av", "datasets", "transcribe", "wandb", "evaluate")
        for line in extras[extra]
    ]
    declared = {name_of(line) for line in project["dependencies"] + optional}
    imported = set()
    for top in (*PACKED, "train.py"):
        for path in [ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"):
            imported |= {line.split()[1].split(".")[0] for line in path.read_text().splitlines() if is_import(line)}
    in_another_python = {"tortoise", "torchaudio"}  # convert/tortoise_reference.py
    others = imported - set(sys.stdlib_module_names) - {*PACKED, "train", "tests"} - in_another_python
    modules = {"absl": "absl-py", "orbax": "orbax-checkpoint", "jaxlib": "jax", "text_unidecode": "text-unidecode"}
    assert {modules.get(name, name).replace("_", "-").lower() for name in others} <= declared


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = [ROOT / "README.md", ROOT / "Makefile", *(path for top in PACKED for path in (ROOT / top).rglob("*.py"))]
    named = re.findall(r"(?:tortoise_jax|'\.)\[([a-z0-9,]+)\]", "".join(path.read_text() for path in places))
    assert len(named) > 15
    assert {extra for several in named for extra in several.split(",")} <= set(extras)


def name_of(requirement: str) -> str:
    return requirement.split(">")[0].split("[")[0].replace("_", "-").lower()


def is_import(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and (words[0] == "import" or (words[0] == "from" and "import" in words))
