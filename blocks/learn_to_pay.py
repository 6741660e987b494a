"""Learn to pay attention: class scores from local features that agree with the global one.

Paper: Jetley et al., "Learn To Pay Attention", ICLR 2018 (arXiv 1804.02391).
Code: https://github.com/saumya-jetley/cd_ICLR18_LearnToPayAttention, `VGGNet/models` (Torch7);
https://github.com/SaoYan/LearnToPayAttention, `blocks.py`, `model1.py`, `model2.py`;
https://github.com/KennCoder7/LearnToPayAttention-pytorch, `attention.py`.

    c_i = <u, l_i + g>  (parametrised)   or   <l_i, g>  (dot product)        local features l_i, global feature g
    pooled = sum_i softmax_i(c_i) l_i    or   mean_i sigmoid(c_i) l_i,       scores = classifier(pooled of all levels)

<u, g> is the same at every position, so that the softmax of the parametrised form does not depend on g: the layers that
compute g alone are not needed for the scores. Where a projection W comes before, <u, W l> = <W^T u, l> and the pooled
feature is W sum_i a_i l_i: it runs once per image instead of once per position.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.fixed_size import require_static
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

COMPATIBILITIES = ("parametrised", "dot")
METHODS = ("pc", "dp")
CLASSIFIERS = ("concat", "independent")
PROJECTED = ("local", "global")
LEVELS = (1, 2, 3)


def _checked(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an unknown choice."""
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")


def _pooled(local: torch.Tensor, energy: torch.Tensor, normalise: bool) -> torch.Tensor:
    """Return the features (batch, channels) that the energy (batch, 1, height, width) pools from the local ones.

    The mean's 1 / N is part of the weights, so that FP16 holds the sum.
    """
    flat, energies = local.flatten(2), energy.flatten(2)
    weights = energies.softmax(dim=2) if normalise else energies.sigmoid() * (1.0 / flat.shape[2])
    return torch.matmul(flat, weights.transpose(1, 2)).squeeze(2)


def _dot(local: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """Return <l_i, g> (batch, 1, height, width) for g (batch, channels, 1, 1)."""
    energy = torch.matmul(feature.flatten(2).transpose(1, 2), local.flatten(2))
    return energy.unflatten(2, local.shape[2:])


def _matrix(convolution: nn.Module) -> torch.Tensor:
    """Return the weight of a 1x1 convolution as a matrix (out_channels, in_channels)."""
    return convolution.get_parameter("weight").flatten(1)


class LinearAttentionBlock(nn.Module):
    """Attention of one level.

    State name: `op.weight` (1, in_features, 1, 1), the vector u; none with the dot product.

    Args:
        in_features: channels of the local and of the global feature.
        normalize_attn: the weights are a softmax over positions and the result is their sum; otherwise they are
            sigmoids and the result is the mean.
        compatibility: "parametrised" or "dot".

    Raises:
        ValueError: an unknown compatibility.
    """

    def __init__(self, in_features: int, normalize_attn: bool = True, compatibility: str = "parametrised") -> None:
        super().__init__()
        _checked("compatibility", compatibility, COMPATIBILITIES)
        self.normalize_attn = normalize_attn
        self.op = nn.Conv2d(in_features, 1, kernel_size=1, bias=False) if compatibility == "parametrised" else None

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the local features.

        Args:
            local: (batch, in_features, height, width).
            g: (batch, in_features, 1, 1).

        Returns:
            The compatibility (batch, 1, height, width), not normalised, and the pooled feature (batch, in_features).
        """
        if self.op is None:
            score = _dot(local, g)
            return score, _pooled(local, score, self.normalize_attn)
        energy = self.op(local)
        score = energy + self.op(g)
        return score, _pooled(local, energy if self.normalize_attn else score, self.normalize_attn)


class ProjectedAttentionBlock(nn.Module):
    """KennCoder7's attention of one level, which projects g down where the local features have other channels.

    State names: `project.weight` (local_channels, global_channels) and `pc.weight` (1, local_channels). The port's are
    mangled (`_Attention__project`, `_Attention__pc`); it has both even where the form and the channels need one or
    none, and an export leaves out what has no effect. Its maps have a fixed size, here any.

    Args:
        local_channels: channels of the local features.
        global_channels: channels of the global feature.
        method: "pc", parametrised, where the result does not depend on g, or "dp", dot product.

    Raises:
        ValueError: an unknown method.
    """

    def __init__(self, local_channels: int, global_channels: int = 512, method: str = "pc") -> None:
        super().__init__()
        _checked("method", method, METHODS)
        self.dot = method == "dp"
        self.projects = local_channels != global_channels
        self.project: nn.Linear | None = nn.Linear(global_channels, local_channels, bias=False)
        self.pc: nn.Linear | None = nn.Linear(local_channels, 1, bias=False)

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the local features.

        Args:
            local: (batch, local_channels, height, width).
            g: (batch, global_channels).

        Returns:
            The pooled feature (batch, local_channels) and the attention (batch, height, width).
        """
        flat = local.flatten(2)
        weights = torch.matmul(self._query(g), flat).softmax(dim=2)
        pooled = torch.matmul(flat, weights.transpose(1, 2)).squeeze(2)
        return pooled, weights.squeeze(1).unflatten(1, local.shape[2:])

    def _query(self, g: torch.Tensor) -> torch.Tensor:
        """Return what the local features are compared with, (batch, 1, local_channels) or (1, local_channels)."""
        if not self.dot:
            assert self.pc is not None
            return self.pc.weight
        if not self.projects:
            return g.unsqueeze(1)
        assert self.project is not None
        projected: torch.Tensor = self.project(g)
        return projected.unsqueeze(1)

    def prepare_for_export(self) -> ProjectedAttentionBlock:
        """Return a copy without the matrices that have no effect."""
        folded = copy.deepcopy(self)
        if self.dot:
            folded.pc = None
        if not (self.dot and self.projects):
            folded.project = None
        return folded


class GridAttentionBlock(nn.Module):
    """Attention of one level with a global feature that is a coarse map.

    c = phi(relu(W_l l + upsampled W_g g)), where the upsampling is bilinear without aligned corners.

    State names are the official ones: `W_l.weight`, `W_g.weight`, `phi.weight`, `phi.bias`.

    Args:
        in_features_l: channels of the local features.
        in_features_g: channels of the global features.
        attn_features: channels in which they are compared.
        up_factor: size of the local map over that of the global one.
        normalize_attn: see `LinearAttentionBlock`.

    Raises:
        ValueError: `up_factor` below 1.
    """

    def __init__(
        self, in_features_l: int, in_features_g: int, attn_features: int, up_factor: int, normalize_attn: bool = False
    ) -> None:
        super().__init__()
        if up_factor < 1:
            raise ValueError(f"up_factor has to be at least 1, got {up_factor}")
        self.up_factor = up_factor
        self.normalize_attn = normalize_attn
        self.W_l = nn.Conv2d(in_features_l, attn_features, kernel_size=1, bias=False)
        self.W_g = nn.Conv2d(in_features_g, attn_features, kernel_size=1, bias=False)
        self.phi = nn.Conv2d(attn_features, 1, kernel_size=1)

    def forward(self, local: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the local features.

        Args:
            local: (batch, in_features_l, up_factor * h, up_factor * w).
            g: (batch, in_features_g, h, w).

        Returns:
            The compatibility (batch, 1, up_factor * h, up_factor * w), not normalised, and the pooled feature
            (batch, in_features_l).

        Raises:
            UserError: the sizes of the two maps do not differ by `up_factor`.
        """
        for axis, large, small in zip(("height", "width"), local.shape[2:], g.shape[2:], strict=True):
            if isinstance(large, int) and isinstance(small, int) and large != self.up_factor * small:
                raise UserError(
                    f"the {axis} of the local map must be {self.up_factor} times that of the global map ({small}), "
                    f"got {large}. Give maps whose sizes differ by up_factor."
                )
        coarse = self.W_g(g)
        if self.up_factor > 1:
            coarse = F.interpolate(coarse, size=local.shape[2:], mode="bilinear", align_corners=False)
        score = self.phi(torch.relu(self.W_l(local) + coarse))
        return score, _pooled(local, score, self.normalize_attn)


class ProjectorBlock(nn.Module):
    """A 1x1 convolution `op` without bias.

    Args:
        in_features: input channels.
        out_features: output channels.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(in_features, out_features, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_features, height, width) to (batch, out_features, height, width)."""
        result: torch.Tensor = self.op(x)
        return result


class _GlobalReduction(nn.Module):
    """Batch normalisation, ReLU, dropout and a linear layer for the global feature.

    Args:
        in_features: channels of the global feature.
        out_features: channels of the local features.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, g: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_features, 1, 1) to (batch, out_features, 1, 1)."""
        return self.linear(torch.relu(self.bn(g.flatten(1)))).unsqueeze(2).unsqueeze(3)


class AttentionHead(nn.Module):
    """Attention on three levels and the classifier, which sees the pooled features and never g itself.

    State names are those of the port: `projector.op`, `attn1.op` to `attn3.op`, `classify`. The Torch7 code has no
    torch names; its layers are `reducer.bn`, `reducer.linear` (g to level 1), `bn1` to `bn3` (in front of the
    classifier) and `classify1` to `classify3` (independent classifiers).

    Where the features of level 1 have other channels than g, the port projects them up, and pools the projected
    features; the Torch7 code projects g down. Independent classifiers are combined by the sum of their log
    probabilities; the scores are its softmax, the normalised product of their probabilities. As each normalisation adds
    the same to all classes, that is the softmax of the sum of their logits.

    Args:
        local_channels: channels of level 1.
        channels: channels of levels 2 and 3 and of g.
        num_classes: number of classes.
        compatibility: "parametrised" or "dot".
        normalize_attn: see `LinearAttentionBlock`.
        classifier: "concat", one classifier of all levels, or "independent".
        project: "local", level 1 is projected to `channels`, or "global", g is projected to `local_channels`.
        head_norm: batch normalisation and ReLU in front of the classifier, as in the Torch7 code.
        return_maps: return the compatibilities too. An export without them leaves out what only they need.

    Raises:
        ValueError: an unknown choice.
    """

    def __init__(
        self,
        local_channels: int = 256,
        channels: int = 512,
        num_classes: int = 100,
        compatibility: str = "parametrised",
        normalize_attn: bool = True,
        classifier: str = "concat",
        project: str = "local",
        head_norm: bool = False,
        return_maps: bool = True,
    ) -> None:
        super().__init__()
        _checked("compatibility", compatibility, COMPATIBILITIES)
        _checked("classifier", classifier, CLASSIFIERS)
        _checked("project", project, PROJECTED)
        self.normalize_attn = normalize_attn
        self.return_maps = return_maps
        self.independent = classifier == "independent"
        self.needs_global = compatibility == "dot" or not normalize_attn
        self.head_norm = head_norm
        pooled = [channels if project == "local" else local_channels, channels, channels]
        self.projector = ProjectorBlock(local_channels, channels) if project == "local" else None
        self.reducer = _GlobalReduction(channels, local_channels) if project == "global" else None
        for level, features in zip(LEVELS, pooled, strict=True):
            if compatibility == "parametrised":
                self.add_module(f"attn{level}", LinearAttentionBlock(features, normalize_attn))
            if head_norm:
                self.add_module(f"bn{level}", nn.BatchNorm1d(features))
            if self.independent:
                self.add_module(f"classify{level}", nn.Linear(features, num_classes))
        self.classify = None if self.independent else nn.Linear(sum(pooled), num_classes)
        self.vectors = compatibility == "parametrised"
        self.projected: nn.Conv2d | None = None

    def forward(
        self, l1: torch.Tensor, l2: torch.Tensor, l3: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Classify.

        Args:
            l1: level 1 (batch, local_channels, height, width).
            l2: level 2 (batch, channels, height_2, width_2).
            l3: level 3 (batch, channels, height_3, width_3).
            g: (batch, channels, 1, 1).

        Returns:
            The scores (batch, num_classes): logits, or probabilities of independent classifiers. With `return_maps`,
            also the compatibility of each level (batch, 1, height, width), not normalised.
        """
        return self._classified((l1, l2, l3), g)

    def _classified(
        self, levels: tuple[torch.Tensor, ...], g: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return what `forward` returns; g may be None where `_uses_global` is false."""
        maps, features = [], []
        for level, local in zip(LEVELS, levels, strict=True):
            energy, shift = self._energy(level, local, g)
            score = energy if shift is None else energy + shift
            pooled = _pooled(local, energy if self.normalize_attn else score, self.normalize_attn)
            if level == 1 and self.projector is not None:
                pooled = F.linear(pooled, _matrix(self.projector.op))
            features.append(torch.relu(self.get_submodule(f"bn{level}")(pooled)) if self.head_norm else pooled)
            maps.append(score)
        scores = self._scores(features)
        return (scores, *maps) if self.return_maps else scores

    def _uses_global(self) -> bool:
        """Say whether any output depends on g."""
        return self.return_maps or self.needs_global

    def _energy(
        self, level: int, local: torch.Tensor, g: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the energy of a level and what g adds to it at all positions, None for nothing."""
        feature = self.reducer(g) if level == 1 and self.reducer is not None and g is not None else g
        projector = self.projector if level == 1 else None
        if not self.vectors:
            assert feature is not None
            if projector is not None:
                feature = F.linear(feature.flatten(1), _matrix(projector.op).t()).unsqueeze(2).unsqueeze(3)
            return _dot(local, feature), None
        op = self.get_submodule(f"attn{level}.op")
        shift = None
        if feature is not None and self._uses_global():
            shift = F.linear(feature.flatten(1), _matrix(op)).unsqueeze(2).unsqueeze(3)
        if projector is None:
            return op(local), shift
        if self.projected is None:
            return F.conv2d(local, self._projected()), shift
        return self.projected(local), shift

    def _projected(self) -> torch.Tensor:
        """Return W^T u (1, local_channels, 1, 1), which gives level 1 its energy without projecting it."""
        assert self.projector is not None
        vector = torch.matmul(_matrix(self.get_submodule("attn1.op")), _matrix(self.projector.op))
        return vector.unsqueeze(2).unsqueeze(3)

    def _scores(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the class scores of the features of each level."""
        if self.classify is not None:
            scores: torch.Tensor = self.classify(torch.cat(features, dim=1))
            return scores.softmax(dim=1) if self.independent else scores
        logits = [self.get_submodule(f"classify{level}")(x) for level, x in zip(LEVELS, features, strict=True)]
        return (logits[0] + logits[1] + logits[2]).softmax(dim=1)

    def prepare_for_export(self) -> AttentionHead:
        """Return a copy with products of weights computed, without layers whose result no output needs."""
        folded = copy.deepcopy(self)
        if self.vectors and self.projector is not None:
            vector = self._projected().detach()
            folded.projected = nn.Conv2d(vector.shape[1], 1, kernel_size=1, bias=False)
            folded.projected.weight = nn.Parameter(vector)
        if self.independent and self.classify is None:
            layers = [getattr(folded, f"classify{level}") for level in LEVELS]
            weight = torch.cat([layer.weight.detach() for layer in layers], dim=1)
            merged = nn.Linear(weight.shape[1], weight.shape[0])
            merged.weight = nn.Parameter(weight)
            merged.bias = nn.Parameter(sum(layer.bias.detach() for layer in layers))
            folded.classify = merged
            for level in LEVELS:
                delattr(folded, f"classify{level}")
        if not self._uses_global():
            folded.reducer = None
        return folded


def _conv_block(in_channels: int, out_channels: int, convolutions: int, pool: bool = False) -> nn.Module:
    """Return a module whose `op` is a sequence of convolution, batch normalisation, ReLU and perhaps pooling."""
    layers: list[nn.Module] = []
    for index in range(convolutions):
        channels = out_channels if index else in_channels
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    block = nn.Sequential()
    block.add_module("op", nn.Sequential(*layers))
    return block


class AttnVGG(AttentionHead):
    """The VGG network of the port, with parametrised attention on three levels.

    State names are the port's: `conv_block1.op` to `conv_block6.op`, `dense`, `projector`, `attn1` to `attn3`,
    `classify`. With the softmax and without `return_maps`, an export has no `conv_block6` and no `dense`: a quarter of
    the parameters.

    Args:
        im_size: height and width of the image, a multiple of 32; `dense` covers what is left of it.
        num_classes: number of classes.
        normalize_attn: see `LinearAttentionBlock`.
        before: attend in front of the pooling of each level (`model1.py`), otherwise behind it (`model2.py`).
        base_channels: channels of the first block, 64 in the port.
        return_maps: return the compatibilities too.

    Raises:
        ValueError: `im_size` is no multiple of 32.
    """

    def __init__(
        self,
        im_size: int = 32,
        num_classes: int = 100,
        normalize_attn: bool = True,
        before: bool = True,
        base_channels: int = 64,
        return_maps: bool = True,
    ) -> None:
        super().__init__(
            4 * base_channels, 8 * base_channels, num_classes, normalize_attn=normalize_attn, return_maps=return_maps
        )
        if im_size < 32 or im_size % 32:
            raise ValueError(f"im_size has to be a multiple of 32, got {im_size}: the network halves it five times")
        self.im_size = im_size
        self.before = before
        self.conv_block1 = _conv_block(3, base_channels, 2)
        self.conv_block2 = _conv_block(base_channels, 2 * base_channels, 2)
        self.conv_block3 = _conv_block(2 * base_channels, 4 * base_channels, 3)
        self.conv_block4 = _conv_block(4 * base_channels, 8 * base_channels, 3)
        self.conv_block5 = _conv_block(8 * base_channels, 8 * base_channels, 3)
        self.conv_block6: nn.Module | None = _conv_block(8 * base_channels, 8 * base_channels, 2, pool=True)
        self.dense: nn.Module | None = nn.Conv2d(8 * base_channels, 8 * base_channels, kernel_size=im_size // 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Classify images.

        Args:
            x: (batch, 3, im_size, im_size).

        Returns:
            See `AttentionHead.forward`.

        Raises:
            UserError: another size than `im_size`, or a dynamic one.
        """
        for axis, size in zip(("height", "width"), x.shape[2:], strict=True):
            require_static("this network", axis, size, _DENSE)
            if size != self.im_size:
                raise UserError(f"the {axis} of the image must be {self.im_size}, got {size}: {_DENSE}. Resize it.")
        x = self.conv_block3(self.conv_block2(self.conv_block1(x)))
        levels = []
        for block in (self.conv_block4, self.conv_block5, None):
            pooled = F.max_pool2d(x, 2)
            levels.append(x if self.before else pooled)
            x = pooled if block is None else block(pooled)
        g = None if self.conv_block6 is None or self.dense is None else self.dense(self.conv_block6(x))
        return self._classified(tuple(levels), g)

    def prepare_for_export(self) -> AttnVGG:
        """Return a copy without the layers whose result no output needs."""
        folded = super().prepare_for_export()
        assert isinstance(folded, AttnVGG)
        if not self._uses_global():
            folded.conv_block6 = folded.dense = None
        return folded


_DENSE = "the last convolution covers the whole map"
_FIXED = {"height": _DENSE, "width": _DENSE}


def _positions(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the local features."""
    return sizes["batch"] * int(arguments["in_features"]) * sizes["height"] * sizes["width"]


def _maps(*sizes: tuple[int, int, int]) -> tuple[Sizes, ...]:
    """Return sizes of three levels from batch, height and width of the finest."""
    return tuple(
        {
            "batch": batch,
            "height": height,
            "width": width,
            "height_2": (height + 1) // 2,
            "width_2": (width + 1) // 2,
            "height_3": (height + 3) // 4,
            "width_3": (width + 3) // 4,
        }
        for batch, height, width in sizes
    )


def _grids(up_factor: int) -> tuple[Sizes, ...]:
    """Return sizes of a local and a global map."""
    return tuple(
        {
            "batch": batch,
            "height": up_factor * height,
            "width": up_factor * width,
            "grid_height": height,
            "grid_width": width,
        }
        for batch, height, width in ((2, 3, 5), (1, 5, 2), (3, 2, 3), (1, 1, 1))
    )


_KENN = {r"^(?:_VGG_Att__att[123]\.)?_Attention__(project|pc)\.": r"\1."}
_CODE = "https://github.com/saumya-jetley/cd_ICLR18_LearnToPayAttention, https://github.com/SaoYan/LearnToPayAttention"
_PAPER = "Learn To Pay Attention, ICLR 2018"
_SOFTMAX = "the softmax stays in FP32, with the energies where they are products; the mean's 1/N precedes its sum"
_GRID: Arguments = {"in_features_l": 8, "in_features_g": 6, "attn_features": 4}
_HEAD: Arguments = {"local_channels": 8, "channels": 16, "num_classes": 7}
_IMAGES = tuple({"batch": batch, "height": 32, "width": 32} for batch in (2, 1, 3))
_VECTORS = ("attn1", "attn2", "attn3", "projected")
_CIFAR = "VGG of the port, CIFAR-100"

BLOCKS.add(
    BlockSpec(
        name="learn-to-pay",
        title="attention to local features by agreement with a global one",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=LinearAttentionBlock,
        original="edgeattn.validation.originals.learn_to_pay:LinearAttentionBlock",
        variants=(
            Variant(
                "official",
                {"in_features": 16},
                key_map={r"^attn[123]\.": ""},
                listings={"l2pa_linear": {"in_features": 512}},
                references={"l2pa_linear": {"in_features": 8}},
                published=Published(_CIFAR, {"in_features": 512}, {"batch": 1, "height": 16, "width": 16}),
                overflow=Overflow(
                    15000.0, {"batch": 1, "height": 5, "width": 7}, {"in_features": 64}, state={r"op": 0.01}
                ),
            ),
            Variant(
                "sigmoid",
                {"in_features": 16, "normalize_attn": False},
                key_map={r"^attn[123]\.": ""},
                listings={"l2pa_linear_nonorm": {"in_features": 512, "normalize_attn": False}},
                references={"l2pa_linear_nonorm": {"in_features": 8, "normalize_attn": False}},
            ),
            Variant("dot", {"in_features": 16, "compatibility": "dot"}),
        ),
        largest=_positions,
        precision=f"{_SOFTMAX}; l + g, which may leave FP16, is never formed",
        int8="the convolution by u is not quantised, as one channel of energies decides all weights",
        int8_exclude=("op",),
        inputs=(
            TensorInput("local", ("batch", "in_features", "height", "width")),
            TensorInput("g", ("batch", "in_features", 1, 1)),
        ),
    )
)

BLOCKS.add(
    BlockSpec(
        name="learn-to-pay-projected",
        title="attention to local features by agreement with a projected global one",
        paper=_PAPER,
        year=2018,
        code="https://github.com/KennCoder7/LearnToPayAttention-pytorch",
        build=ProjectedAttentionBlock,
        original="edgeattn.validation.originals.learn_to_pay:ProjectedAttentionBlock",
        variants=(
            Variant(
                "port",
                {"local_channels": 8, "global_channels": 12},
                key_map=_KENN,
                references={"l2pa_kenn_pc": {"local_channels": 8, "global_channels": 12}},
            ),
            Variant(
                "port-dot",
                {"local_channels": 8, "global_channels": 12, "method": "dp"},
                key_map=_KENN,
                references={"l2pa_kenn_dp": {"local_channels": 8, "global_channels": 12, "method": "dp"}},
                published=Published(
                    "VGG of the port, CIFAR-10, first level",
                    {"local_channels": 256, "global_channels": 512, "method": "dp"},
                    {"batch": 1, "height": 16, "width": 16},
                ),
                overflow=Overflow(400.0, {"batch": 1, "height": 5, "width": 7}),
            ),
            Variant(
                "port-dot-same-channels",
                {"local_channels": 8, "global_channels": 8, "method": "dp"},
                key_map=_KENN,
                references={"l2pa_kenn_dp_same": {"local_channels": 8, "global_channels": 8, "method": "dp"}},
            ),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"] * int(arguments["local_channels"]) * sizes["height"] * sizes["width"]
        ),
        precision=_SOFTMAX,
        int8="none: the products have an activation or the vector u, which decides all weights, as one factor",
        inputs=(
            TensorInput("local", ("batch", "local_channels", "height", "width")),
            TensorInput("g", ("batch", "global_channels")),
        ),
    )
)

BLOCKS.add(
    BlockSpec(
        name="learn-to-pay-grid",
        title="attention to local features by agreement with a coarse map",
        paper=f"{_PAPER}; Attention-Gated Networks, arXiv 1808.08114",
        year=2018,
        code="https://github.com/SaoYan/LearnToPayAttention, https://github.com/ozan-oktay/Attention-Gated-Networks",
        build=GridAttentionBlock,
        original="edgeattn.validation.originals.learn_to_pay:GridAttentionBlock",
        variants=(
            Variant(
                "official",
                {**_GRID, "up_factor": 3, "normalize_attn": True},
                listings={
                    "l2pa_grid": {
                        "in_features_l": 256,
                        "in_features_g": 512,
                        "attn_features": 256,
                        "up_factor": 4,
                        "normalize_attn": True,
                    }
                },
                references={"l2pa_grid": {**_GRID, "up_factor": 2, "normalize_attn": True}},
                published=Published(
                    "VGG of the port, ISIC 2016",
                    {
                        "in_features_l": 256,
                        "in_features_g": 512,
                        "attn_features": 256,
                        "up_factor": 4,
                        "normalize_attn": True,
                    },
                    {"batch": 1, "height": 28, "width": 28, "grid_height": 7, "grid_width": 7},
                ),
                sizes=_grids(3),
            ),
            Variant(
                "sigmoid",
                {**_GRID, "up_factor": 1},
                references={"l2pa_grid_sigmoid": {**_GRID, "up_factor": 1}},
                sizes=_grids(1),
            ),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"]
            * sizes["height"]
            * sizes["width"]
            * max(arguments["in_features_l"], arguments["attn_features"])
        ),
        precision=_SOFTMAX,
        int8="the projections W_l and W_g; phi stays, as one channel of energies decides all weights",
        int8_exclude=("phi",),
        inputs=(
            TensorInput("local", ("batch", "in_features_l", "height", "width")),
            TensorInput("g", ("batch", "in_features_g", "grid_height", "grid_width")),
        ),
    )
)

BLOCKS.add(
    BlockSpec(
        name="learn-to-pay-head",
        title="attention on three levels with its classifier",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=AttentionHead,
        original="edgeattn.validation.originals.learn_to_pay:AttentionHead",
        variants=(
            Variant(
                "official",
                {
                    **_HEAD,
                    "classifier": "independent",
                    "project": "global",
                    "head_norm": True,
                    "compatibility": "dot",
                    "return_maps": False,
                },
                overflow=Overflow(400.0, _maps((1, 7, 10))[0]),
            ),
            Variant(
                "port",
                _HEAD,
                key_map={r"^(conv_block\d|dense)\..*$": ""},
                published=Published(
                    _CIFAR,
                    {"local_channels": 256, "channels": 512},
                    _maps((1, 32, 32))[0],
                ),
            ),
            Variant("port-dot", {**_HEAD, "compatibility": "dot"}),
            Variant(
                "sigmoid",
                {**_HEAD, "normalize_attn": False, "project": "global", "head_norm": True, "return_maps": False},
            ),
        ),
        largest=lambda arguments, sizes: (
            sizes["batch"]
            * max(
                arguments["local_channels"] * sizes["height"] * sizes["width"],
                arguments["channels"] * max(sizes["height_2"] * sizes["width_2"], 3),
            )
        ),
        precision=_SOFTMAX,
        int8="none: the convolutions by u have one channel of energies that decides all weights",
        int8_exclude=_VECTORS,
        inputs=(
            TensorInput("l1", ("batch", "local_channels", "height", "width")),
            TensorInput("l2", ("batch", "channels", "height_2", "width_2")),
            TensorInput("l3", ("batch", "channels", "height_3", "width_3")),
            TensorInput("g", ("batch", "channels", 1, 1)),
        ),
        sizes=_maps((2, 7, 10), (1, 10, 4), (3, 5, 14), (1, 1, 1)),
    )
)

BLOCKS.add(
    BlockSpec(
        name="learn-to-pay-vgg",
        title="VGG with learnt attention",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=AttnVGG,
        original="edgeattn.validation.originals.learn_to_pay:AttnVGG",
        variants=(
            Variant(
                "before",
                {"base_channels": 4, "num_classes": 7},
                references={"l2pa_vgg_before": {"base_channels": 4, "num_classes": 7}},
                fixed=_FIXED,
            ),
            Variant(
                "after-scores",
                {"base_channels": 4, "num_classes": 7, "before": False, "return_maps": False},
                references={
                    "l2pa_vgg_after": {"base_channels": 4, "num_classes": 7, "before": False, "return_maps": False}
                },
                published=Published(
                    _CIFAR, {"before": False, "return_maps": False}, {"batch": 1, "height": 32, "width": 32}
                ),
                fixed=_FIXED,
            ),
        ),
        largest=lambda arguments, sizes: (
            4 * int(arguments["base_channels"]) * sizes["batch"] * sizes["height"] * sizes["width"]
        ),
        precision=_SOFTMAX,
        int8="the convolutions of the network; those by u stay, as their one channel of energies decides all weights",
        int8_exclude=_VECTORS,
        inputs=(TensorInput("x", ("batch", 3, "height", "width")),),
        sizes=_IMAGES,
    )
)
