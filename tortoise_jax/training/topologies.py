"""Machines that one can plan for without having them: what they are called, what their makers publish, a compiler.

TPU slices as Google names them ("v5e:16x16"), NVIDIA cards with their number in one box ("a100-40g", "h100:8").
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

from tortoise_jax import parallel
from tortoise_jax.errors import UserError, did_you_mean, first_line

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Card:
    """What XLA asks of an NVIDIA card to compile for it.

    capability: of CUDA. processors: streaming multiprocessors. clock: GHz, boosted. cache: MiB of L2.
    """

    capability: tuple[int, int]
    processors: int
    clock: float
    cache: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator, by its maker's published figures.

    memory: bytes. flops, bandwidth: peaks of bfloat16 products and of memory, per second. link: bytes per second that
    a chip sends to the others of its slice or box, in one direction, over all its links. dtype: what suits it.
    whole: on TPUs, the side from which on an axis of a slice is a ring. machine: the shape of one host. devices: that
    JAX sees in a chip. card: of NVIDIA's.
    """

    title: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    dtype: str = "bfloat16"
    whole: int = 0
    machine: tuple[int, ...] = (1,)
    devices: int = 1
    card: Card | None = None

    @property
    def platform(self) -> str:
        return "cuda" if self.card else "tpu"


# TPUs: https://cloud.google.com/tpu/docs/v3 (v4, v5e, v5p, v6e); link: all-reduce bandwidth per pod by its chips.
# NVIDIA: the data sheets of T4, L4, A100, H100 (SXM), the whitepapers of GA102 and AD102; dense bfloat16 products with
# float32 sums. Of the RTX 3060, which they leave out: 512 operations per processor and clock, as its larger sisters.
# link: NVLink, else PCIe, in one direction. The T4 has no bfloat16, so its figure is float32; of its 16 GB it shows 15.
CHIPS = {
    "v3": Chip("TPU v3", 32 * GIB, 123 * TERA, 900 * GIGA, 332 * GIGA, whole=32, machine=(2, 2), devices=2),
    "v4": Chip("TPU v4", 32 * GIB, 275 * TERA, 1200 * GIGA, 269 * GIGA, whole=4, machine=(2, 2, 1)),
    "v5e": Chip("TPU v5e", 16 * GIB, 197 * TERA, 819 * GIGA, 200 * GIGA, whole=16, machine=(2, 4)),
    "v5p": Chip("TPU v5p", 95 * GIB, 459 * TERA, 2765 * GIGA, 600 * GIGA, whole=4, machine=(2, 2, 1)),
    "v6e": Chip("TPU v6e", 32 * GIB, 918 * TERA, 1600 * GIGA, 400 * GIGA, whole=16, machine=(2, 4)),
    "t4-16g": Chip("NVIDIA T4", 15 * GIB, 8.1 * TERA, 320 * GIGA, 16 * GIGA, "float32", card=Card((7, 5), 40, 1.59, 4)),
    "l4-24g": Chip("NVIDIA L4", 24 * GIB, 121 * TERA, 300 * GIGA, 32 * GIGA, card=Card((8, 9), 58, 2.04, 48)),
    "rtx3070-8g": Chip("NVIDIA RTX 3070", 8 * GIB, 40.6 * TERA, 448 * GIGA, 32 * GIGA, card=Card((8, 6), 46, 1.725, 4)),
    "rtx3060-12g": Chip(
        "NVIDIA RTX 3060", 12 * GIB, 25.5 * TERA, 360 * GIGA, 32 * GIGA, card=Card((8, 6), 28, 1.777, 3)
    ),
    "rtx3090-24g": Chip("NVIDIA RTX 3090", 24 * GIB, 71 * TERA, 936 * GIGA, 32 * GIGA, card=Card((8, 6), 82, 1.695, 6)),
    "rtx4090-24g": Chip(
        "NVIDIA RTX 4090", 24 * GIB, 165 * TERA, 1008 * GIGA, 32 * GIGA, card=Card((8, 9), 128, 2.52, 72)
    ),
    "a100-40g": Chip("NVIDIA A100", 40 * GIB, 312 * TERA, 1555 * GIGA, 300 * GIGA, card=Card((8, 0), 108, 1.41, 40)),
    "a100-80g": Chip("NVIDIA A100", 80 * GIB, 312 * TERA, 2039 * GIGA, 300 * GIGA, card=Card((8, 0), 108, 1.41, 40)),
    "h100": Chip("NVIDIA H100", 80 * GIB, 989 * TERA, 3350 * GIGA, 450 * GIGA, card=Card((9, 0), 132, 1.98, 50)),
    "h200": Chip("NVIDIA H200", 141 * GIB, 989 * TERA, 4800 * GIGA, 450 * GIGA, card=Card((9, 0), 132, 1.98, 50)),
}
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # JAX's names of devices, where they are others
# From the CUDA programming guide, by compute capability: KiB of shared memory per processor, threads, float32 units.
PROCESSORS = {
    (7, 5): (64, 1024, 64),
    (8, 0): (164, 2048, 64),
    (8, 6): (100, 1536, 128),
    (8, 9): (100, 1536, 128),
    (9, 0): (228, 2048, 128),
}
# JAX takes so much of a card's memory at its start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CUDA_MEMORY_SHARE = 0.75
COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")}


class DoesNotFit(Exception):
    """The compiler says that the program needs more memory than a device has; the message is its own."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice or a box of chips. shape: chips along each axis of the slice, or (number of cards,)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def device_count(self) -> int:
        return math.prod(self.shape) * self.chip.devices

    @property
    def flops(self) -> float:
        """Peak of one device for bfloat16 products, per second."""
        return self.chip.flops / self.chip.devices

    @property
    def bandwidth(self) -> float:
        """Of one device's memory, bytes per second."""
        return self.chip.bandwidth / self.chip.devices

    @property
    def memory(self) -> float:
        """Bytes that a program can use on one device, without asking for more."""
        share = CUDA_MEMORY_SHARE if self.chip.card else 1.0
        return share * self.chip.memory / self.chip.devices

    @property
    def link(self) -> float:
        """Bytes per second that a chip sends to the others: half of all, where the slice is too small for rings."""
        rings = all(side == 1 or side >= self.chip.whole for side in self.shape)
        return self.chip.link if self.chip.card or rings else self.chip.link / 2

    def peak(self, dtype: str) -> float:
        """Operations per second of one device's products; float32 runs as TF32 at half the rate on NVIDIA's.

        TPUs multiply float32 as bfloat16, unless more is asked for.
        """
        halved = self.chip.card and dtype == "float32" and self.chip.dtype == "bfloat16"
        return self.flops / 2 if halved else self.flops

    def describe(self) -> str:
        chips = math.prod(self.shape)
        cores = f" ({self.device_count} devices)" if self.chip.devices > 1 else ""
        c = self.chip
        return (
            f"{chips} x {c.title}{cores}, each {c.memory / GIB:.0f} GiB, {c.flops / TERA:g} TFLOP/s, "
            f"{c.bandwidth / GIGA:g} GB/s"
        )

    @functools.cached_property
    def devices(self) -> list[Any]:
        """For the compiler. Raises UserError where that is not installed, or knows no such slice."""
        check_compiler(self.chip.platform)
        try:
            if self.chip.card:
                options = {"target_config": target_config(self.chip), "topology": f"1x1x{self.device_count}"}
                return parallel.described_devices("cuda", "", **options)
            return parallel.described_devices("tpu", self.name, **tpu_options(self.chip, self.shape))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--topology {self.name}: the compiler says: {first_line(error)}") from None

    def compile(self, step: Callable[..., Any], *arguments: Any, donate: bool = False) -> Any:
        """A per-device function for all devices; arguments: shapes of one device. Raises DoesNotFit."""
        try:
            return parallel.compile_ahead(step, self.devices, *arguments, donate=donate)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(first_line(error)) from None
            if "cuDNN" in str(error):
                line = "attention=cudnn cannot be compiled without cuDNN; pip install --no-deps nvidia-cudnn-cu12"
                raise UserError(line) from None
            raise


def parse(name: str) -> Target:
    """ "v5e:16x16", "v5e" for one host of them, "a100-40g", "h100:8". Raises UserError for any other name."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology {name}: no such chip{did_you_mean(kind, CHIPS)}; known are {', '.join(CHIPS)}")
    chip = CHIPS[kind]
    axes = len(chip.machine)
    if not re.fullmatch(r"([1-9]\d*(x[1-9]\d*)*)?", shape) or (shape.count("x") + 1 != axes and shape):
        example = "x".join(map(str, chip.machine))
        raise UserError(f"--topology {name}: after the colon, {kind} takes a shape such as {kind}:{example}")
    sides = tuple(int(side) for side in shape.split("x")) if shape else chip.machine
    return Target(f"{kind}:{'x'.join(map(str, sides))}", chip, sides)


def chip_of(kind: str) -> Chip | None:
    """What is published of a device that is here, by JAX's name for it, e.g. "NVIDIA H100 80GB HBM3"."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]]
    return next((chip for chip in CHIPS.values() if re.match(rf"{chip.title}\b", kind)), None)


def check_compiler(platform: str) -> None:
    for module in COMPILERS[platform]:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UserError(
                f"--topology: the compiler is not installed ({module}); pip install 'tortoise_jax[plan]', "
                "on Linux with an x86-64 processor"
            )


def tpu_options(chip: Chip, shape: tuple[int, ...]) -> dict[str, Any]:
    """A slice of at most one host is one host; a v4's two cores are one device, as on Cloud TPU."""
    sides = (*shape, 1, 1)[:3]
    one_host = math.prod(shape) <= math.prod(chip.machine)
    options: dict[str, Any] = {"chips_per_host_bounds": sides} if one_host else {}
    if chip.title == "TPU v4":
        options = {"chip_config_name": "megacore", "num_slices": 1, "chips_per_host_bounds": (2, 2, 1)} | options
    return options


def target_config(chip: Chip) -> str:
    """XLA's description of a card (a GpuTargetConfigProto as text), from public figures."""
    assert chip.card is not None
    shared, threads, units = PROCESSORS[chip.card.capability]
    major, minor = chip.card.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {chip.card.processors}
  fpus_per_core: {units}
  clock_rate_ghz: {chip.card.clock}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {chip.memory:.0f}
  l2_cache_size: {chip.card.cache * 2**20}
  shared_memory_per_core: {shared * 1024}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {(shared - (shared > 64)) * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: {threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.title}"
"""
