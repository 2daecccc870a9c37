"""The sides of a training benchmark, ours and the torch reference: each a process of its own that steps when asked to.

The others wait meanwhile. A benchmark starts itself with `--side NAME` for each (`Side`), which makes the steps
(`our_step`, `torch_step`) and serves them (`serve`).
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

GIB = 2**30
NAMES = ("ours", "eager", "sdpa")
Batch = Mapping[str, np.ndarray]


class Side:
    """A process that makes steps when it is asked to.

    name: one of NAMES. module: the benchmark, as `python -m` knows it. threads: of XLA; torch is told in its process.
    """

    def __init__(self, name: str, module: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", module, *sys.argv[1:], "--side", name]
        environment = os.environ | {"NPROC": str(threads)}
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the sides share a card
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.steps: list[dict[str, Any]] = []

    def step(self, batch: int = 0) -> float:
        """The seconds that a step on this batch took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                self.steps.append(json.loads(line))
                return float(self.steps[-1]["seconds"])
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")

    def median(self, what: str, batch: int = 0) -> float:
        """Of a step: "seconds" on the clock or of the processors ("cpu"), without the batch's first, which compiles."""
        return statistics.median(step[what] for step in [s for s in self.steps if s["batch"] == batch][1:])

    def peak(self, what: str) -> str:
        return f"{max(step[what] for step in self.steps) / GIB:.2f} GiB" if self.steps[0][what] else "–"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(make: Callable[[], Callable[[int], None]], facts: Callable[[], dict[str, Any]]) -> None:
    """In a side's process: makes its step, then runs it on each batch it is sent and says how long that took."""
    started = time.perf_counter()
    run = make()
    for line in sys.stdin:
        before, worked = time.perf_counter(), time.process_time()
        run(int(line))
        now = time.perf_counter()
        found = {"seconds": now - before, "cpu": time.process_time() - worked, "since_start": now - started}
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"batch": int(line)} | found | facts()), flush=True)


def our_step(config: UnifiedVoiceConfig, filled: Any, rows: int) -> Callable[[Batch], None]:
    """The run's own step, as train.py makes it, from random weights. filled: configs/ar.py without open fields."""
    import jax

    from tortoise_jax import parallel
    from tortoise_jax.audio import default_mel_norms
    from tortoise_jax.checkpoints.parts import AR, Part, abstract_variables
    from tortoise_jax.checkpoints.pretrained import Pretrained
    from tortoise_jax.text.tokenizer import Tokenizer
    from tortoise_jax.training import ar_run
    from tortoise_jax.training.step import initial_state, train_step

    parallel.prepare_process()
    accumulation = filled.gradient_accumulation_steps
    shapes = Part(config, abstract_variables(config))
    pretrained = Pretrained({AR: shapes}, Tokenizer.default(), default_mel_norms(), {})
    step_config = ar_run.make_step_config(filled, pretrained, rows)
    random = np.random.default_rng(0)
    draw = lambda leaf: 0.02 * random.standard_normal(leaf.shape, np.float32)
    start = functools.partial(initial_state, optimizer=step_config.optimizer)
    state = parallel.mapped(start, donate=True)(parallel.replicate(jax.tree.map(draw, shapes.tree)))
    step = parallel.mapped(functools.partial(train_step, step_config), donate=True)

    def run(batch: Batch) -> None:
        nonlocal state
        state, metrics = parallel.call(
            step, state, parallel.rows_on_devices(parallel.split_rows(dict(batch), accumulation))
        )
        jax.block_until_ready(metrics)

    return run


def our_batch(
    texts: Iterable[np.ndarray], codes: Iterable[np.ndarray], wav: np.ndarray, length: int, config: UnifiedVoiceConfig
) -> Batch:
    """Rows of `length` positions. wav (b, n, t) int16: the conditioning clips of each."""
    from tortoise_jax.data import batches

    made = [batches.row(text, row, length, config) for text, row in zip(texts, codes, strict=True)]
    batch = {name: np.stack([one[name] for one in made]) for name in made[0]}
    return batch | {"example": np.arange(len(made), dtype=np.int32), "conditioning_wav": wav}


def torch_step(
    config: UnifiedVoiceConfig, filled: Any, threads: int, attention: str
) -> Callable[[Mapping[str, torch.Tensor]], None]:
    """The torch reference's step by DLAS's recipe, with the dropout of our configuration, on the default device.

    attention: "eager" or "sdpa", transformers' two.
    """
    import torch

    from benchmarks import torch_side
    from tests.support.torch_reference import Recipe, Trainer, UnifiedVoice

    device = torch_side.take_device(threads)
    model = UnifiedVoice(
        layers=config.layers,
        model_dim=config.width,
        heads=config.heads,
        number_mel_codes=config.mel_tokens,
        start_mel_token=config.start_mel,
        stop_mel_token=config.stop_mel,
        attention=attention,
    ).train()
    for block in model.gpt.h:
        block.attn.attn_dropout.p = filled.attention_dropout
    dtype = torch_side.best_dtype() if filled.dtype == "auto" else getattr(torch, filled.dtype)
    computing = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    trainer = Trainer(model, Recipe())

    def run(batch: Mapping[str, torch.Tensor]) -> None:
        with computing:
            trainer.step(batch, filled.gradient_accumulation_steps)
        torch_side.wait()

    return run


def filled_config(rows: int, changes: Iterable[str], clips: int, micro_batches: int = 1) -> Any:
    """configs/ar.py as a run on so many clips would fill it, with as many micro-batches as torch has.

    changes: "field=value".
    """
    from configs import ar
    from tortoise_jax.training import presets

    found = ar.get_config()
    found.batch_size, found.gradient_accumulation_steps = rows, micro_batches
    for change in changes:
        name, _, value = change.partition("=")
        found[name] = type(found[name])(value)
    presets.fill(found, clips)
    return found


def device_facts(side: str, filled: Any) -> dict[str, Any]:
    """Bytes taken on the device at most, None on CPUs; of our side also what the device is and what it computes in."""
    if side != "ours":
        from benchmarks import torch_side

        return {"device_peak": torch_side.peak_memory()}
    from tortoise_jax import parallel

    dtype = parallel.best_dtype() if filled.dtype == "auto" else filled.dtype
    return {"device_peak": parallel.peak_memory(), "device": parallel.describe(), "dtype": dtype}
