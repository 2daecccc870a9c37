"""TorToiSe's diffusion decoder on torch.nn, with the released checkpoint's key names.

Axis letters: b batch, c channels, t frames, s codes, h heads. Layouts are (b, c, t).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.torch_reference.unified_voice import group_count

MEL_MIN, MEL_MAX = -11.512925148010254, 2.3143386840820312


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(group_count(width), width)


def bucket(relative: torch.Tensor) -> torch.Tensor:
    """Key minus query -> 0…31."""
    distance = relative.abs()
    far = 8 + (8 * (distance.clamp(min=1) / 8).log() / math.log(8)).floor().long()
    return torch.where(distance < 8, distance, far.clamp(max=15)) + 16 * (relative > 0)


class RelativePositions(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(32, heads)

    def forward(self, length: int) -> torch.Tensor:
        """(h, t, t): query, then key."""
        places = torch.arange(length)
        return self.relative_attention_bias(bucket(places[None] - places[:, None])).permute(2, 0, 1)


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        self.relative_pos_embeddings = RelativePositions(heads)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        b, c, t = x.shape
        each = c // self.heads
        q, k, v = self.qkv(self.norm(x)).reshape(b * self.heads, 3 * each, t).split(each, dim=1)
        scores = (q.mT @ k / each**0.5).reshape(b, self.heads, t, t) + each**0.5 * self.relative_pos_embeddings(t)
        mixed = v @ scores.softmax(-1).reshape(b * self.heads, t, t).mT
        return x + self.proj_out(mixed.reshape(b, c, t))


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Conv1d(width, width, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Identity(), nn.Conv1d(width, width, 3, padding=1))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.emb_layers(time)[..., None].chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        return x + self.out_layers[1:](h)


class DiffusionLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblk = ResBlock(width)
        self.attn = AttentionBlock(width, heads)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.attn(self.resblk(x, time))


def timestep_embedding(steps: torch.Tensor, width: int) -> torch.Tensor:
    """Steps (b,) -> (b, width): cosines, then sines."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = steps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiffusionTts(nn.Module):
    def __init__(
        self,
        model_channels: int = 1024,
        num_layers: int = 10,
        in_channels: int = 100,
        out_channels: int = 200,
        in_latent_channels: int = 1024,
        in_tokens: int = 8193,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        width, heads = model_channels, num_heads
        attention = lambda count, wide=width: [AttentionBlock(wide, heads) for _ in range(count)]
        self.width = width
        self.unconditioned_embedding = nn.Parameter(torch.randn(1, width, 1))
        self.inp_block = nn.Conv1d(in_channels, width, 3, padding=1)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.code_embedding = nn.Embedding(in_tokens, width)
        self.code_converter = nn.Sequential(*attention(3))
        self.code_norm = norm(width)
        self.latent_conditioner = nn.Sequential(nn.Conv1d(in_latent_channels, width, 3, padding=1), *attention(4))
        self.contextual_embedder = nn.Sequential(
            nn.Conv1d(in_channels, width, 3, padding=1, stride=2),
            nn.Conv1d(width, 2 * width, 3, padding=1, stride=2),
            *attention(5, 2 * width),
        )
        self.conditioning_timestep_integrator = nn.ModuleList(DiffusionLayer(width, heads) for _ in range(3))
        self.integrating_conv = nn.Conv1d(2 * width, width, 1)
        self.mel_head = nn.Conv1d(width, in_channels, 3, padding=1)
        layers = [DiffusionLayer(width, heads) for _ in range(num_layers)]
        self.layers = nn.ModuleList([*layers, *(ResBlock(width) for _ in range(3))])
        self.out = nn.Sequential(norm(width), nn.SiLU(), nn.Conv1d(width, out_channels, 3, padding=1))

    def conditioning(self, mels: torch.Tensor) -> torch.Tensor:
        """Clips (b, clips, m, t) -> (b, 2 c)."""
        return torch.cat([self.contextual_embedder(clip) for clip in mels.unbind(1)], dim=-1).mean(-1)

    def timestep_independent(self, given: torch.Tensor, conditioning: torch.Tensor, frames: int) -> torch.Tensor:
        """Latents (b, s, c) or codes (b, s), conditioning (b, 2 c) -> (b, c, frames)."""
        if given.is_floating_point():
            x = self.latent_conditioner(given.mT)
        else:
            x = self.code_converter(self.code_embedding(given).mT)
        scale, shift = conditioning[..., None].chunk(2, dim=1)
        return F.interpolate(self.code_norm(x) * (1 + scale) + shift, size=frames, mode="nearest")

    def forward(self, x: torch.Tensor, steps: torch.Tensor, aligned: torch.Tensor | None) -> torch.Tensor:
        """x (b, m, t), steps (b,), aligned (b, c, t) or None: without conditioning -> (b, 2 m, t)."""
        if aligned is None:
            aligned = self.unconditioned_embedding.expand(len(x), -1, x.shape[-1])
        time = self.time_embed(timestep_embedding(steps, self.width).to(x.dtype))
        for layer in self.conditioning_timestep_integrator:
            aligned = layer(aligned, time)
        x = self.integrating_conv(torch.cat([self.inp_block(x), aligned], dim=1))
        for layer in self.layers:
            x = layer(x, time)
        return self.out(x)
