"""TorToiSe's UnivNet, the fast path's HiFi-GAN and the random latent converter on torch.nn, with upstream's key names.

Layouts are (b, c, t); l mel frames, s codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import weight_norm as older_weight_norm
from torch.nn.utils.parametrizations import weight_norm as newer_weight_norm

NORMS = {"older": older_weight_norm, "newer": newer_weight_norm, "folded": lambda module: module}


def use_norm(model: nn.Module, norm: str, without: tuple[str, ...] = ()) -> None:
    """Weight norm on every convolution but those named, in torch's older or newer naming, or folded."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and name not in without:
            NORMS[norm](module)


class KernelPredictor(nn.Module):
    def __init__(self, mel: int, channels: int, layers: int, width: int, slope: float) -> None:
        super().__init__()
        self.layers, self.channels = layers, channels
        act = lambda: nn.LeakyReLU(slope)
        conv = lambda size_in, size_out, kernel: nn.Conv1d(size_in, size_out, kernel, padding=kernel // 2)
        self.input_conv = nn.Sequential(conv(mel, width, 5), act())
        self.residual_convs = nn.ModuleList(
            nn.Sequential(nn.Identity(), conv(width, width, 3), act(), conv(width, width, 3), act()) for _ in range(3)
        )
        self.kernel_conv = conv(width, layers * channels * 2 * channels * 3, 3)
        self.bias_conv = conv(width, layers * 2 * channels, 3)

    def forward(self, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernels (b, j, in, out, 3, l), biases (b, j, out, l)."""
        x = self.input_conv(mel)
        for block in self.residual_convs:
            x = x + block(x)
        b, _, frames = x.shape
        kernels = self.kernel_conv(x).reshape(b, self.layers, self.channels, 2 * self.channels, 3, frames)
        return kernels, self.bias_conv(x).reshape(b, self.layers, 2 * self.channels, frames)


def local_convolution(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (b, in, l hop), kernel (b, in, out, 3, l), bias (b, out, l), one frame after another."""
    frames = kernel.shape[-1]
    hop = x.shape[-1] // frames
    padded = F.pad(x, (1, 1))
    out = []
    for i in range(frames):
        windows = padded[..., i * hop : (i + 1) * hop + 2].unfold(-1, 3, 1)  # (b, in, hop, 3)
        out.append(torch.einsum("bihm,biom->boh", windows, kernel[..., i]) + bias[..., i, None])
    return torch.cat(out, dim=-1)


class ResStack(nn.Module):
    def __init__(self, mel: int, channels: int, stride: int, dilations: tuple[int, ...], width: int, slope: float):
        super().__init__()
        act = lambda: nn.LeakyReLU(slope)
        self.kernel_predictor = KernelPredictor(mel, channels, len(dilations), width, slope)
        self.convt_pre = nn.Sequential(
            act(),
            nn.ConvTranspose1d(
                channels, channels, 2 * stride, stride, stride // 2 + stride % 2, output_padding=stride % 2
            ),
        )
        self.conv_blocks = nn.ModuleList(
            nn.Sequential(act(), nn.Conv1d(channels, channels, 3, padding=d, dilation=d), act()) for d in dilations
        )

    def forward(self, x: torch.Tensor, mel: torch.Tensor) -> torch.Tensor:
        kernels, biases = self.kernel_predictor(mel)
        x = self.convt_pre(x)
        for j, conv in enumerate(self.conv_blocks):
            gate, value = local_convolution(conv(x), kernels[:, j], biases[:, j]).chunk(2, dim=1)
            x = x + gate.sigmoid() * value.tanh()
        return x


class UnivNet(nn.Module):
    def __init__(
        self,
        channel_size: int = 32,
        noise_dim: int = 64,
        strides: tuple[int, ...] = (8, 8, 4),
        dilations: tuple[int, ...] = (1, 3, 9, 27),
        n_mel_channels: int = 100,
        kpnet_width: int = 64,
        slope: float = 0.2,
        norm: str = "older",
    ) -> None:
        super().__init__()
        self.hop = math.prod(strides)
        self.res_stack = nn.ModuleList(
            ResStack(n_mel_channels, channel_size, stride, dilations, kpnet_width, slope) for stride in strides
        )
        self.conv_pre = nn.Conv1d(noise_dim, channel_size, 7, padding=3, padding_mode="reflect")
        self.conv_post = nn.Sequential(
            nn.LeakyReLU(slope), nn.Conv1d(channel_size, 1, 7, padding=3, padding_mode="reflect"), nn.Tanh()
        )
        use_norm(self, norm)

    def forward(self, mel: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Mel (b, m, l), noise (b, z, l) -> (b, 1, l hop)."""
        x = self.conv_pre(z)
        for stack in self.res_stack:
            x = stack(x, mel)
        return self.conv_post(x)

    def inference(self, mel: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Mel (b, m, l), noise (b, z, l + 10) -> (b, 1, l hop)."""
        silence = torch.full((*mel.shape[:2], 10), -11.5129)
        return self(torch.cat([mel, silence], dim=-1), z)[..., : -10 * self.hop].clamp(-1, 1)


class HifiResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        conv = lambda d: nn.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2)
        self.convs1 = nn.ModuleList(conv(d) for d in (1, 3, 5))
        self.convs2 = nn.ModuleList(conv(1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class Hifigan(nn.Module):
    def __init__(
        self,
        in_channels: int = 1024,
        cond_channels: int = 1024,
        upsample_initial_channel: int = 512,
        upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4),
        resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11),
        norm: str = "older",
    ) -> None:
        super().__init__()
        first = upsample_initial_channel
        self.kernels = len(resblock_kernel_sizes)
        self.conv_pre = nn.Conv1d(in_channels, first, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(first // 2**i, first // 2 ** (i + 1), k, k // 2, padding=(k - k // 2) // 2)
            for i, k in enumerate(upsample_kernel_sizes)
        )
        self.resblocks = nn.ModuleList(
            HifiResBlock(first // 2 ** (i + 1), k) for i in range(len(self.ups)) for k in resblock_kernel_sizes
        )
        self.conv_post = nn.Conv1d(first // 2 ** len(self.ups), 1, 7, padding=3)
        self.cond_layer = nn.Conv1d(cond_channels, first, 1)
        use_norm(self, norm, without=("cond_layer",))

    def upsample(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, s, c) -> (b, c, l)."""
        x = F.interpolate(latents.mT, scale_factor=4.0, mode="linear")
        scale = 24000 / 22050
        return x if int(x.shape[-1] * scale) == x.shape[-1] else F.interpolate(x, scale_factor=scale, mode="linear")

    def forward(self, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """x (b, c, l), g (b, v) -> (b, 1, 256 l)."""
        h = self.conv_pre(x) + self.cond_layer(g[..., None])
        for i, up in enumerate(self.ups):
            h = up(F.leaky_relu(h, 0.1))
            stacks = [block(h) for block in self.resblocks[self.kernels * i : self.kernels * (i + 1)]]
            h = torch.stack(stacks).mean(0)
        return self.conv_post(F.leaky_relu(h)).tanh()

    def inference(self, latents: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return self(self.upsample(latents), g)


class EqualLinear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 0.1)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 0.1 / math.sqrt(len(self.bias))
        return 2**0.5 * F.leaky_relu(F.linear(x, self.weight * scale) + 0.1 * self.bias, 0.2)


class RandomLatentConverter(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EqualLinear(channels) for _ in range(5)), nn.Linear(channels, channels))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.layers(noise)
