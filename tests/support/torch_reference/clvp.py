"""TorToiSe's CLVP on torch.nn, with the released checkpoint's key names.

Axis letters: b batch, n positions, d width, h heads of 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64
TURNING = 32


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / norm.clamp(min=1e-8) * self.g


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, TURNING, 2).float() / TURNING))

    def forward(self, positions: int) -> torch.Tensor:
        """Angles (n, 32)."""
        angles = torch.outer(torch.arange(positions, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.cat([angles, angles], dim=-1)


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x (b, h, n, 64)."""
    moving, rest = x[..., :TURNING], x[..., TURNING:]
    half = TURNING // 2
    other = torch.cat([-moving[..., half:], moving[..., :half]], dim=-1)
    return torch.cat([moving * angles.cos() + other * angles.sin(), rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_k = nn.Linear(width, heads * HEAD, bias=False)
        self.to_v = nn.Linear(width, heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        split = lambda t: t.unflatten(-1, (-1, HEAD)).transpose(1, 2)
        q, k, v = (turn(split(project(x)), angles) for project in (self.to_q, self.to_k, self.to_v))
        scores = q @ k.mT / 8
        if mask is not None:
            both = mask[:, None, :, None] & mask[:, None, None, :]
            scores = scores.masked_fill(~both, torch.finfo(scores.dtype).min)
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.net(x)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.wrap = block


class AttentionLayers(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, inner: int) -> None:
        super().__init__()
        blocks = [kind for _ in range(depth) for kind in (Attention(width, heads), FeedForward(width, inner))]
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.ModuleList([RMSNorm(width)]), Wrapped(block)]) for block in blocks
        )
        self.rotary_pos_emb = Rotary()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        angles = self.rotary_pos_emb(x.shape[1])
        for (norm,), block in self.layers:
            x = x + block.wrap(norm(x), angles, mask)
        return x


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attn_layers = AttentionLayers(width, depth, heads, inner)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.norm(self.attn_layers(x, mask))


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, inner: int) -> None:
        super().__init__()
        self.transformer = Transformer(width, depth, heads, inner)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The mean (b, d) over what is not masked."""
        encoded = self.transformer(x, mask)
        if mask is None:
            return encoded.mean(1)
        return (encoded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class CLVP(nn.Module):
    def __init__(
        self,
        dim_text: int = 768,
        dim_speech: int = 768,
        dim_latent: int = 768,
        num_text_tokens: int = 256,
        text_enc_depth: int = 20,
        text_heads: int = 12,
        num_speech_tokens: int = 8192,
        speech_enc_depth: int = 20,
        speech_heads: int = 12,
    ) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.text_emb = nn.Embedding(num_text_tokens, dim_text)
        self.to_text_latent = nn.Linear(dim_text, dim_latent, bias=False)
        self.speech_emb = nn.Embedding(num_speech_tokens, dim_speech)
        self.to_speech_latent = nn.Linear(dim_speech, dim_latent, bias=False)
        self.text_transformer = Encoder(dim_text, text_enc_depth, text_heads, 2 * dim_text)
        self.speech_transformer = Encoder(dim_speech, speech_enc_depth, speech_heads, 2 * dim_speech)

    def latents(
        self,
        text: torch.Tensor,
        codes: torch.Tensor,
        text_mask: torch.Tensor | None = None,
        code_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text ids (b, n) and codes (b, n) -> latents (b, l) of length 1."""
        text_mean = self.text_transformer(self.text_emb(text), text_mask)
        speech_mean = self.speech_transformer(self.speech_emb(codes), code_mask)
        projected = self.to_text_latent(text_mean), self.to_speech_latent(speech_mean)
        return tuple(F.normalize(one, dim=-1) for one in projected)

    def forward(self, text: torch.Tensor, codes: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        """The scores (b,), row by row."""
        text_latent, speech_latent = self.latents(text, codes, *masks)
        return self.temperature.exp() * (text_latent * speech_latent).sum(-1)
