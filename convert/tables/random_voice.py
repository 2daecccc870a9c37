"""Random voices: which torch key is which Flax path. Two published files of different widths have the same names."""

from __future__ import annotations

from convert.mapping import LINEAR, Row, Shapes, shape_of, weights
from convert.tables.model import TorchModel, mirrors
from tortoise_jax.checkpoints.parts import RANDOM_AR, RANDOM_DIFFUSION
from tortoise_jax.models.random_voice import RandomVoiceConfig

TABLE: list[Row] = weights("layers.{i}", "layers_{i}", LINEAR)


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> RandomVoiceConfig:
    """The width from the shapes of the torch tensors. Raises UserError."""
    return RandomVoiceConfig(shape_of(shapes, "layers.0.weight", 2, where)[1])


def summary(config: RandomVoiceConfig) -> str:
    return f"vectors of {config.width}"


def model(part: str, file: str, size: int) -> TorchModel:
    return TorchModel(
        part=part,
        title="TorToiSe random latent generator",
        marks=(r"layers\.0\.weight$", r"layers\.5\.weight$"),
        file=file,
        size=size,
        locations=mirrors(file),
        table=TABLE,
        config=config_of,
        summary=summary,
    )


AUTO = model(RANDOM_AR, "rlg_auto.pth", 25_000_000)
DIFFUSER = model(RANDOM_DIFFUSION, "rlg_diffuser.pth", 101_000_000)
