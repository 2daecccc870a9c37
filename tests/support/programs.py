"""What is compiled beside the training step: functions of one device, with the shapes they are called on."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import monitoring

from tortoise_jax.audio import CONDITIONING_SAMPLES, default_mel_norms, log_mel
from tortoise_jax.checkpoints.parts import abstract_variables
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.parallel import COMPILED, LITTLE_MEMORY
from tortoise_jax.synthesis import decoder
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.reading import read_layer
from tortoise_jax.synthesis.sampler import SamplingOptions

CPU_OPTIONS = dict(flag.removeprefix("--").split("=") for flag in LITTLE_MEMORY)  # of the compiler, as in runs on CPU
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def array(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def mel(rows: int = 2, samples: int = CONDITIONING_SAMPLES) -> Program:
    return lambda waveform: log_mel(waveform, default_mel_norms()), (array((rows, samples), np.int16),)


def dvae(config: DVAEConfig, method: str, rows: int = 2, codes: int = 40) -> Program:
    """method: "encode" of mels, or "decode" of codes."""
    mels = array((rows, codes * config.frames_per_code, config.channels))
    apply = functools.partial(DiscreteVAE(config).apply, method=method)
    return apply, (abstract_variables(config), mels if method == "encode" else array((rows, codes), np.int32))


def prompts(config: UnifiedVoiceConfig, dtype: str, rows: int = 2, positions: int = 16) -> Program:
    """A layer of prompts."""
    (layer, *_) = decoder_weights(config, dtype).blocks
    return functools.partial(read_layer, heads=config.heads), (layer, array((rows, positions, config.width), dtype))


def decoder_weights(config: UnifiedVoiceConfig, dtype: str) -> Any:
    return jax.eval_shape(lambda tree: DecoderWeights.of(tree, config, dtype), abstract_variables(config)["params"])


def decoding(config: UnifiedVoiceConfig, dtype: str, rows: int = 2, positions: int = 16, room: int = 32) -> Program:
    """Sixteen codes of a candidate for each of `rows` prompts."""
    weights = decoder_weights(config, dtype)
    cache = lambda length: jax.eval_shape(lambda: decoder.empty_cache(config, rows, length, dtype))
    state = decoder.State.start(config, np.zeros((rows, 2), np.uint32), room)
    controls = SamplingOptions().controls(0, 16)
    shapes = jax.tree.map(lambda leaf: array(np.shape(leaf), leaf.dtype), (controls, state))
    function = functools.partial(decoder.decode, config=config, top_k=50, greedy=False, longest=16)
    readable = array((rows, positions + room), bool)
    return function, (weights, shapes[0], cache(positions), cache(room), readable, shapes[1])


PRODUCT = re.compile(r" (?:dot|convolution)\(| custom-call\(.*custom_call_target=\"__(?:cublas|cudnn)")
PRECISION = re.compile(r"operand_precision\"?[=:][{\[]\"?(\w+)\"?,\"?(\w+)")


def product_precisions(text: str) -> list[str]:
    """Of every matrix product and convolution in a compiled program: "highest", "default", or "mixed"."""
    found = []
    for line in text.splitlines():
        if PRODUCT.search(line):
            stated = PRECISION.search(line)
            operands = {operand.lower() for operand in stated.groups()} if stated else {"default"}
            found.append(operands.pop() if len(operands) == 1 else "mixed")
    return found


@contextlib.contextmanager
def compiled_meanwhile() -> Iterator[list[str]]:
    """The names of the programs that JAX compiles in this process until the end."""
    names: list[str] = []

    def listen(event: str, _: float, **about: str | int) -> None:
        if event == COMPILED:
            names.append(str(about.get("fun_name")))

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(listen)
