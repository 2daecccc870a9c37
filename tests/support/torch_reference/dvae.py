"""TorToiSe's discrete VAE on torch.nn, with the released checkpoint's key names.

Axis letters: b batch, t frames, n codes of one clip, m mel bands, d codebook width, k codes in the codebook.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ResBlock(nn.Module):
    """x + conv1(relu(conv3(relu(conv3(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(width, width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


class UpsampledConv(nn.Module):
    """Nearest-neighbour doubling, then a convolution of width 3."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Codebook(nn.Module):
    """Vector quantiser whose codebook follows its inputs by exponential moving averages (van den Oord 2017, A.1)."""

    decay = 0.99
    eps = 1e-5

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        embed = torch.randn(dim, size)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed_avg", embed.clone())

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (...): the index of the nearest column of `embed`, by squared distance."""
        distance = x.pow(2).sum(-1, keepdim=True) - 2 * x @ self.embed + self.embed.pow(2).sum(0)
        return distance.argmin(-1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., d)."""
        return F.embedding(codes, self.embed.T)

    @torch.no_grad()
    def update(self, x: torch.Tensor, codes: torch.Tensor) -> None:
        """Moves the averages, and the codebook with them, towards the vectors x (..., d) assigned to `codes` (...)."""
        size = self.embed.shape[1]
        chosen = F.one_hot(codes.flatten(), size).to(x.dtype)
        self.cluster_size.lerp_(chosen.sum(0), 1 - self.decay)
        self.embed_avg.lerp_(x.flatten(0, -2).T @ chosen, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + size * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed)


class DiscreteVAE(nn.Module):
    """Mel (b, m, t) <-> codes (b, n), n = ceil(t / 2**num_layers).

    `num_resnet_blocks=0` also drops the decoder's first convolution, as upstream does.
    """

    def __init__(
        self,
        hidden_dim: int = 512,
        num_layers: int = 2,
        num_resnet_blocks: int = 3,
        codebook_dim: int = 512,
        num_tokens: int = 8192,
        channels: int = 80,
    ) -> None:
        super().__init__()
        widths = [hidden_dim * 2**i for i in range(num_layers)]
        deepest = widths[-1]

        encoder: list[nn.Module] = []
        for width_in, width_out in zip([channels, *widths], widths, strict=False):
            encoder.append(nn.Sequential(nn.Conv1d(width_in, width_out, 3, stride=2, padding=1), nn.ReLU()))
        encoder += [ResBlock(deepest) for _ in range(num_resnet_blocks)]
        encoder.append(nn.Conv1d(deepest, codebook_dim, 1))

        decoder: list[nn.Module] = []
        if num_resnet_blocks:
            decoder.append(nn.Conv1d(codebook_dim, deepest, 1))
            decoder += [ResBlock(deepest) for _ in range(num_resnet_blocks)]
        mirrored = widths[::-1]
        first = deepest if num_resnet_blocks else codebook_dim
        for width_in, width_out in zip([first, *mirrored], mirrored, strict=False):
            decoder.append(nn.Sequential(UpsampledConv(width_in, width_out), nn.ReLU()))
        decoder.append(nn.Conv1d(hidden_dim, channels, 1))

        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)
        self.codebook = Codebook(codebook_dim, num_tokens)

    def encode(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mel (b, m, t) -> the encoder's output (b, n, d) and its codes (b, n)."""
        encoder_out = self.encoder(mel).transpose(1, 2)
        return encoder_out, self.codebook.codes(encoder_out)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, n) -> mel (b, m, n * 2**num_layers)."""
        return self.decode_vectors(self.codebook.lookup(codes))

    def decode_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Codebook vectors (b, n, d) -> mel (b, m, n * 2**num_layers)."""
        return self.decoder(vectors.transpose(1, 2))

    def train_forward(
        self, mel: torch.Tensor, smooth_l1: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One training forward, which also moves the codebook.

        Returns the mean reconstruction loss, the mean commitment loss (not yet weighted) and the reconstruction
        (b, m, t). The losses are those of the codebook before its update.
        """
        encoder_out, codes = self.encode(mel)
        quantized = self.codebook.lookup(codes)
        commit_loss = F.mse_loss(encoder_out, quantized)
        self.codebook.update(encoder_out.detach(), codes)
        straight_through = encoder_out + (quantized - encoder_out).detach()
        out = self.decode_vectors(straight_through)
        recon_loss = (F.smooth_l1_loss if smooth_l1 else F.mse_loss)(out, mel)
        return recon_loss, commit_loss, out
