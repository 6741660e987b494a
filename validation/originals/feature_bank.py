"""Feature bank operators, originals.

Paper: Wu et al., "Long-Term Feature Banks for Detailed Video Understanding", CVPR 2019, section 3.3.
Behaviour: facebookresearch/video-long-term-feature-banks, `lib/models/lfb_helper.py`; open-mmlab/mmaction2,
`fbo_head.py`. Features are laid out there as (N, C, slots, 1, 1) and every projection is a 1x1x1 convolution.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class _ConvModule(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.conv(x)
        return projected


class FeatureBankLayer(nn.Module):
    """One non-local layer: every slot gets a key and a value.

    Args:
        st_feat_channels: channels of a short-term feature.
        lt_feat_channels: channels of a slot.
        latent_channels: channels of theta, phi and g.
        pre_activate: LayerNorm and ReLU before the output convolution instead of LayerNorm after it.
        affine: LayerNorm has weight and bias.
    """

    def __init__(
        self,
        st_feat_channels: int,
        lt_feat_channels: int,
        latent_channels: int,
        pre_activate: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.pre_activate = pre_activate
        self.st_feat_conv = _ConvModule(st_feat_channels, latent_channels)
        self.lt_feat_conv = _ConvModule(lt_feat_channels, latent_channels)
        self.global_conv = _ConvModule(lt_feat_channels, latent_channels)
        self.out_conv = _ConvModule(latent_channels, st_feat_channels)
        self.ln = nn.LayerNorm(
            [latent_channels if pre_activate else st_feat_channels, 1, 1, 1], eps=1e-5, elementwise_affine=affine
        )

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Return the gain (R, C) of short-term features (R, C) from their banks (R, M, D)."""
        gain = self.convolved(short_term[:, :, None, None, None], bank.permute(0, 2, 1)[..., None, None])
        return gain[:, :, 0, 0, 0]

    def convolved(self, st_feat: torch.Tensor, lt_feat: torch.Tensor) -> torch.Tensor:
        """Return the gain (R, C, 1, 1, 1) from features (R, C, 1, 1, 1) and slots (R, D, M, 1, 1)."""
        rois, channels, slots = st_feat.shape[0], self.latent_channels, lt_feat.shape[2]
        theta = self.st_feat_conv(st_feat).view(rois, channels, 1)
        phi = self.lt_feat_conv(lt_feat).view(rois, channels, slots)
        g = self.global_conv(lt_feat).view(rois, channels, slots)
        affinity = torch.matmul(theta.permute(0, 2, 1), phi) / channels**0.5  # (R, 1, M)
        p = affinity.softmax(dim=-1)
        out = torch.matmul(g, p.permute(0, 2, 1)).view(rois, channels, 1, 1, 1)
        gain: torch.Tensor = self.out_conv(F.relu(self.ln(out))) if self.pre_activate else self.ln(self.out_conv(out))
        return gain


class FeatureBankNonLocal(nn.Module):
    """Reduce both sides, stack residual non-local layers over the same bank, put the result behind the input.

    Args:
        st_feat_channels: channels of a short-term feature.
        lt_feat_channels: channels of a slot.
        latent_channels: channels of everything between.
        num_non_local_layers: number of layers.
        pre_activate: see `FeatureBankLayer`; without it, ReLU follows each residual.
        affine: LayerNorm has weight and bias.
    """

    def __init__(
        self,
        st_feat_channels: int,
        lt_feat_channels: int,
        latent_channels: int,
        num_non_local_layers: int = 2,
        pre_activate: bool = True,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.pre_activate = pre_activate
        self.num_non_local_layers = num_non_local_layers
        self.st_feat_conv = nn.Conv3d(st_feat_channels, latent_channels, 1)
        self.lt_feat_conv = nn.Conv3d(lt_feat_channels, latent_channels, 1)
        for number in range(1, num_non_local_layers + 1):
            layer = FeatureBankLayer(latent_channels, latent_channels, latent_channels, pre_activate, affine)
            self.add_module(f"non_local_layer_{number}", layer)

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Return (R, C + latent) for features (R, C) and banks (R, M, D); a bank (1, M, D) is shared."""
        return self.attend(short_term, self.encode_bank(bank))

    def encode_bank(self, bank: torch.Tensor) -> torch.Tensor:
        """Return B (R, M, latent), what the layers compute keys and values from."""
        encoded: torch.Tensor = self.lt_feat_conv(bank.permute(0, 2, 1)[..., None, None])
        return encoded[..., 0, 0].permute(0, 2, 1)

    def attend(self, short_term: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """Return (R, C + latent) for features (R, C) and encoded banks (R or 1, M, latent)."""
        encoded = encoded.expand(short_term.shape[0], -1, -1).permute(0, 2, 1)[..., None, None]
        identity = short_term[:, :, None, None, None]
        st_feat = self.st_feat_conv(identity)
        for number in range(1, self.num_non_local_layers + 1):
            st_feat = st_feat + getattr(self, f"non_local_layer_{number}").convolved(st_feat, encoded)
            if not self.pre_activate:
                st_feat = F.relu(st_feat)
        return torch.cat([identity, st_feat], dim=1)[:, :, 0, 0, 0]


class FeatureBankPool(nn.Module):
    """Pool the bank over its slots, put it behind the input.

    Args:
        pool: "avg" or "max".
    """

    def __init__(self, pool: str = "avg") -> None:
        super().__init__()
        size = (1, None, None)
        self.pooling = nn.AdaptiveAvgPool3d(size) if pool == "avg" else nn.AdaptiveMaxPool3d(size)

    def forward(self, short_term: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Return (R, C + D) for features (R, C) and banks (R, M, D)."""
        pooled: torch.Tensor = self.pooling(bank.permute(0, 2, 1)[..., None, None])
        return torch.cat([short_term[:, :, None, None, None], pooled], dim=1)[:, :, 0, 0, 0]
