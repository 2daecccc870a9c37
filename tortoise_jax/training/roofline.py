"""How long a step would take at a chip's published peaks: the work by formula, memory traffic, communication.

XLA's own count of operations takes the body of a loop once, so the work is counted here, from the model's dimensions.
All of it is per device. What is left out is small: the log-mel, norms, dropout, the loss.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from tortoise_jax.audio import CONDITIONING_FRAMES
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.training.topologies import Target

# How much of the peaks such programs reach. MaxText publishes 0.5 to 0.67 of v5e's for models of 16 to 128 billion
# parameters; this one's products are narrower. Links: what is lost to latency and to unequal pieces.
USUAL_SHARE_OF_PEAK = 0.4
USUAL_SHARE_OF_LINK = 0.8
COMMUNICATION_GOAL = 0.1
FLOAT32 = 4
UPDATE_PASSES = 8  # parameters and Adam's two moments read and written, the gradient read twice


@dataclasses.dataclass(frozen=True)
class Step:
    """A device's part of a step: `accumulation` micro-batches of `rows` rows of `length` positions."""

    length: int
    rows: int
    accumulation: int
    conditioning_clips: int

    @property
    def device_rows(self) -> int:
        return self.rows * self.accumulation


def attention_products(positions: int, width: int) -> int:
    """Operations of one attention's two products, all positions with all."""
    return 4 * positions**2 * width


def block_products(config: UnifiedVoiceConfig, step: Step, gpt: int = 12, conditioning: int = 4) -> int:
    """Operations of one row's forward pass through the blocks; the last one of the conditioning takes next to none.

    gpt, conditioning: weights of a block, in squares of the width; fewer where not all are multiplied with.
    """
    d, s, t = config.width, step.length, CONDITIONING_FRAMES
    gpt_blocks = config.layers * (2 * s * gpt * d**2 + attention_products(s, d))
    whole_blocks = config.conditioning_layers - 1
    conditioning_blocks = whole_blocks * (2 * t * conditioning * d**2 + attention_products(t, d))
    return gpt_blocks + step.conditioning_clips * conditioning_blocks


def head_products(config: UnifiedVoiceConfig, step: Step) -> int:
    """Operations of one row's logits."""
    return 2 * step.length * config.width * (config.text_tokens + config.mel_tokens)


def forward_products(config: UnifiedVoiceConfig, step: Step) -> int:
    """Operations of one row's whole forward pass."""
    frames = step.conditioning_clips * CONDITIONING_FRAMES * 2 * config.mel_channels * config.width
    return block_products(config, step) + head_products(config, step) + frames


def model_products(config: UnifiedVoiceConfig, step: Step) -> int:
    """Operations that a device's step needs: forward, and twice as much backward."""
    return step.device_rows * 3 * forward_products(config, step)


def computed_products(model: UnifiedVoice, step: Step) -> int:
    """Those, and what is computed again to save memory: the logits always.

    Of a block whatever a gradient needs and `remat` does not keep; none needs its last product.
    """
    weights = {"none": None, "dots": (0, 0), "full": (8, 3)}[str(model.compute.remat)]
    blocks = 0 if weights is None else block_products(model.config, step, *weights)
    return model_products(model.config, step) + step.device_rows * (blocks + head_products(model.config, step))


def memory_traffic(model: UnifiedVoice, step: Step, parameters: int) -> int:
    """Bytes that must be moved, if nothing but weights, gradients, block inputs and logits leaves the chip."""
    config, c = model.config, model.compute
    weights = (2 + (c.remat == "full")) * parameters * FLOAT32  # read in every pass
    gradients = 3 * parameters * FLOAT32  # written, read, added to what earlier micro-batches left
    positions = config.layers * step.length + step.conditioning_clips * config.conditioning_layers * CONDITIONING_FRAMES
    kept = 2 * positions * config.width * jnp.dtype(c.dtype).itemsize
    logits = 4 * step.length * (config.text_tokens + config.mel_tokens) * FLOAT32
    micro_batch = weights + gradients + step.rows * (kept + logits)
    return step.accumulation * micro_batch + UPDATE_PASSES * parameters * FLOAT32


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step: of products and of memory at the published peaks, of communication at full links."""

    products: float
    memory: float
    communication: float

    @property
    def bound(self) -> float:
        """What no program can beat, unless it communicates while it computes."""
        return max(self.products, self.memory) + self.communication

    @property
    def usual(self) -> float:
        """What a step may really take."""
        return max(self.products, self.memory) / USUAL_SHARE_OF_PEAK + self.usual_communication

    @property
    def usual_communication(self) -> float:
        return self.communication / USUAL_SHARE_OF_LINK

    @property
    def share(self) -> float:
        """Of communication in what a step may really take."""
        return self.usual_communication / self.usual

    @property
    def share_of_bound(self) -> float:
        return self.communication / self.bound


def communication(target: Target, size: int) -> float:
    """Seconds to sum `size` bytes over all devices: each sends all of them but its own share, twice."""
    n = target.device_count
    return 2 * size * (n - 1) / n / target.link


def roofline(target: Target, model: UnifiedVoice, step: Step, parameters: int, summed: int) -> Roofline:
    """Of one step. parameters: of the model; summed: bytes of what is summed over the devices per step."""
    return Roofline(
        computed_products(model, step) / target.peak(model.compute.dtype),
        memory_traffic(model, step, parameters) / target.bandwidth,
        communication(target, summed) if target.device_count > 1 else 0.0,
    )


def rows_for_goal(target: Target, model: UnifiedVoice, step: Step, parameters: int, summed: int) -> int:
    """Rows per device and step from which communication is under a tenth of it, by more micro-batches alone."""
    one = dataclasses.replace(step, accumulation=1)
    while roofline(target, model, one, parameters, summed).share > COMMUNICATION_GOAL:
        one = dataclasses.replace(one, accumulation=one.accumulation + 1)
    return one.device_rows
