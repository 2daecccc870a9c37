"""Fine-tuning for the TorToiSe text-to-speech model in JAX/Flax."""

__version__ = "0.1.0"
