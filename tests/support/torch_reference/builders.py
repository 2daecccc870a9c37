"""Small models with random weights of which every one changes the outputs, and random batches for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.support.torch_reference.clvp import CLVP
from tests.support.torch_reference.diffusion import DiffusionTts
from tests.support.torch_reference.dvae import DiscreteVAE
from tests.support.torch_reference.unified_voice import UnifiedVoice
from tests.support.torch_reference.vocoders import EqualLinear, Hifigan, RandomLatentConverter, UnivNet

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
            elif isinstance(module, EqualLinear):  # stored ten times as large as it is used
                parameter.copy_((10.0 if name == "weight" else 2.0) * noise)
            elif name in ("g", "weight_g", "original0", "temperature"):
                parameter.copy_(1.0 + 0.2 * noise)
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


TINY_CLVP = dict(
    dim_text=32,
    dim_speech=24,
    dim_latent=40,
    num_text_tokens=50,
    text_enc_depth=2,
    text_heads=2,
    num_speech_tokens=70,
    speech_enc_depth=3,
    speech_heads=1,
)
TINY_DIFFUSION = dict(model_channels=32, num_layers=2, in_latent_channels=24, in_tokens=50, num_heads=4)
TINY_VOCODER = dict(channel_size=3, noise_dim=8, strides=(4, 3, 2), n_mel_channels=10, kpnet_width=6)
TINY_HIFIGAN = dict(
    in_channels=12,
    cond_channels=10,
    upsample_initial_channel=16,
    upsample_kernel_sizes=(8, 4, 4),
    resblock_kernel_sizes=(3, 5),
)


@torch.no_grad()
def tiny_clvp(seed: int = 0, **overrides: Any) -> CLVP:
    """A CLVP of TINY_CLVP's size, any of it overridden, whose sides have frequencies of their own.

    Its embeddings are small, so that an epsilon in a norm shows.
    """
    model = CLVP(**{**TINY_CLVP, **overrides}).eval()
    randomize(model, torch.Generator().manual_seed(seed))
    model.text_emb.weight.mul_(0.05)
    model.speech_emb.weight.mul_(0.05)
    model.speech_transformer.transformer.attn_layers.rotary_pos_emb.inv_freq.mul_(1.1)
    return model


def tiny_diffusion(seed: int = 0, **overrides: Any) -> DiffusionTts:
    """A diffusion decoder of TINY_DIFFUSION's size, any of it overridden."""
    model = DiffusionTts(**{**TINY_DIFFUSION, **overrides}).eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def tiny_vocoder(seed: int = 0, **overrides: Any) -> UnivNet:
    """A UnivNet of TINY_VOCODER's size, any of it overridden.

    Its predicted kernels are small: the mel of silence is large, and large kernels would amplify rounding.
    """
    model = quietly(lambda: UnivNet(**{**TINY_VOCODER, **overrides}).eval())
    randomize(model, torch.Generator().manual_seed(seed))
    for stack in model.res_stack:
        for name, parameter in stack.kernel_predictor.kernel_conv.named_parameters():
            if name not in ("weight_v", "parametrizations.weight.original1"):
                parameter.mul_(0.1)
    return model


def tiny_hifigan(seed: int = 0, **overrides: Any) -> Hifigan:
    """The fast path's decoder of TINY_HIFIGAN's size, any of it overridden."""
    model = quietly(lambda: Hifigan(**{**TINY_HIFIGAN, **overrides}).eval())
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def tiny_random_voice(seed: int = 0, channels: int = 24) -> RandomLatentConverter:
    model = RandomLatentConverter(channels).eval()
    randomize(model, torch.Generator().manual_seed(seed))
    return model


def quietly(build: Callable[[], Any]) -> Any:
    """torch calls the naming that TorToiSe's files have deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return build()


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
