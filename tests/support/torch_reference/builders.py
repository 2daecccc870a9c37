"""Small models with random weights of which every one changes the outputs, and random batches for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.support.torch_reference.dvae import DiscreteVAE
from tests.support.torch_reference.unified_voice import UnifiedVoice

TINY_DVAE = dict(hidden_dim=16, num_layers=2, num_resnet_blocks=2, codebook_dim=24, num_tokens=64)
TINY_UNIFIED_VOICE = dict(
    layers=3,
    model_dim=64,
    heads=4,
    max_text_tokens=30,
    max_mel_tokens=40,
    number_text_tokens=255,
    start_text_token=255,
    number_mel_codes=66,
    start_mel_token=64,
    stop_mel_token=65,
    max_conditioning_inputs=2,
)


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Gives each parameter random values at which it matters: no zero bias, no norm of ones, no zeroed projection."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                parameter.copy_((1.0 if name == "weight" else 0.0) + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
            else:
                # Linear and Conv1d keep (out, in, ...), GPT-2's layers (in, out).
                transposed = not isinstance(module, (nn.Linear, nn.Conv1d))
                fan_in = parameter.shape[0] if transposed else parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)


@torch.no_grad()
def tiny_dvae(seed: int = 0, **overrides: Any) -> DiscreteVAE:
    """A dVAE of TINY_DVAE's size, any of it overridden, whose codebook lies where its encoder's outputs do."""
    generator = torch.Generator().manual_seed(seed)
    model = DiscreteVAE(**{**TINY_DVAE, **overrides}).eval()
    randomize(model, generator)
    channels = model.encoder[0][0].in_channels
    probe = model.encoder(torch.randn(8, channels, 64, generator=generator))
    mean, deviation = probe.mean((0, 2))[:, None], probe.std((0, 2))[:, None]
    book = model.codebook
    book.embed.copy_(mean + deviation * torch.randn(book.embed.shape, generator=generator))
    book.cluster_size.copy_(0.5 + 4.0 * torch.rand(book.cluster_size.shape, generator=generator))
    book.embed_avg.copy_(book.embed * book.cluster_size)
    return model


def tiny_unified_voice(seed: int = 0, **overrides: Any) -> UnifiedVoice:
    """A UnifiedVoice of TINY_UNIFIED_VOICE's size, any of it overridden, without dropout until .train()."""
    model = UnifiedVoice(**{**TINY_UNIFIED_VOICE, **overrides}).eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def random_batch(
    model: UnifiedVoice,
    seed: int,
    text_lengths: tuple[int, ...] = (14, 9, 5),
    code_lengths: tuple[int, ...] = (20, 12, 7),
    clips: int = 2,
    frames: int = 37,
) -> dict[str, torch.Tensor]:
    """cond_mel (b, r, 80, frames), text (b, s), text_lengths, codes (b, n), code_lengths.

    Text is padded with 0. Codes are random up to the longest, past a row's own length too, as upstream stores them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = len(text_lengths)
    text = torch.randint(1, model.start_text_token, (rows, max(text_lengths)), generator=generator)
    for row, length in enumerate(text_lengths):
        text[row, length:] = 0
    return {
        "cond_mel": torch.randn(rows, clips, 80, frames, generator=generator),
        "text": text,
        "text_lengths": torch.tensor(text_lengths),
        "codes": torch.randint(0, model.start_mel_token, (rows, max(code_lengths)), generator=generator),
        "code_lengths": torch.tensor(code_lengths),
    }


@contextmanager
def record_outputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collects every submodule's tensor output under its name (`gpt.h.0`, `encoder.2.net.0`) while the block runs."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
