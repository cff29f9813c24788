"""The published networks in plain torch, with their parameters' names, for tests of conversion.

Transcribed from the description of DDPM's network (Ho et al. 2020, appendix B) in the numbering of
score_sde's port, in which layers are listed in the order in which they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NIN(nn.Module):
    """A linear map of the channels of each pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(channels, out))
        self.b = nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[:, None, None]


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, channels: int, out: int, embedding: int, shortcut: str) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        self.Conv_0 = nn.Conv2d(channels, out, 3, padding=1)
        self.Dense_0 = nn.Linear(embedding, out)
        self.GroupNorm_1 = norm(out)
        self.Conv_1 = nn.Conv2d(out, out, 3, padding=1)
        if channels != out and shortcut == "NIN_0":
            self.NIN_0 = NIN(channels, out)
        elif channels != out:
            size = int(shortcut)
            self.Conv_2 = nn.Conv2d(channels, out, size, padding=size // 2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.Conv_0(F.silu(self.GroupNorm_0(x)))
        h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        shortcuts = [part for name, part in self.named_children() if name in ("NIN_0", "Conv_2")]
        return h + (shortcuts[0](x) if shortcuts else x)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.GroupNorm_0 = norm(channels)
        for i in range(4):
            setattr(self, f"NIN_{i}", NIN(channels, channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (self.get_submodule(f"NIN_{i}")(h).flatten(2) for i in range(3))
        weight = torch.softmax(q.mT @ k / math.sqrt(x.shape[1]), dim=-1)
        return x + self.get_submodule("NIN_3")((v @ weight.mT).view_as(x))


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.Conv_0(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.Conv_0 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.Conv_0(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of t 10000^(-i/(width/2 - 1))."""
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1))
    phase = t.double()[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class PublishedNetwork(nn.Module):
    """The network with random weights of a sensible size.

    ``up_attention`` puts attention after "each" block of an upward level with attention, as
    published, or after the "last" one, as in score_sde.
    """

    def __init__(
        self,
        nf: int = 32,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        *,
        attention: Sequence[int] = (1,),
        channels: int = 3,
        up_attention: Literal["each", "last"] = "each",
        middle_attention: bool = True,
        shortcut: str = "NIN_0",
    ) -> None:
        super().__init__()
        self.nf, self.skip_after, self.join_before = nf, set[int](), set[int]()
        layers: list[nn.Module] = [nn.Linear(nf, 4 * nf), nn.Linear(4 * nf, 4 * nf)]
        layers.append(nn.Conv2d(channels, nf, 3, padding=1))
        skips, width = [nf], nf
        self.skip_after.add(2)

        def resnet(inner: int, out: int) -> None:
            layers.append(Resnet(inner, out, 4 * nf, shortcut))

        for level, factor in enumerate(ch_mult):
            for _ in range(blocks):
                resnet(width, nf * factor)
                width = nf * factor
                layers.extend([Attention(width)] if level in attention else [])
                skips.append(width)
                self.skip_after.add(len(layers) - 1)
            if level < len(ch_mult) - 1:
                layers.append(Down(width))
                skips.append(width)
                self.skip_after.add(len(layers) - 1)
        resnet(width, width)
        layers.extend([Attention(width)] if middle_attention else [])
        resnet(width, width)
        for level, factor in reversed(list(enumerate(ch_mult))):
            for block in range(blocks + 1):
                self.join_before.add(len(layers))
                resnet(width + skips.pop(), nf * factor)
                width = nf * factor
                if level in attention and (up_attention == "each" or block == blocks):
                    layers.append(Attention(width))
            layers.extend([Up(width)] if level else [])
        layers += [norm(width), nn.Conv2d(width, channels, 3, padding=1)]
        self.all_modules = nn.ModuleList(layers)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            with torch.no_grad():
                parameter.normal_(0.0, scale, generator=generator)

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
        dense_0, dense_1, conv_in, *body, norm_out, conv_out = self.all_modules
        if embedding is None:
            embedding = sinusoids(t, self.nf).to(x.dtype)
        embedding = dense_1(F.silu(dense_0(embedding)))
        h = conv_in(x)
        skips = [h]
        for number, layer in enumerate(body, start=3):
            if number in self.join_before:
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
            if number in self.skip_after:
                skips.append(h)
        return conv_out(F.silu(norm_out(h)))
