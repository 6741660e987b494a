"""Actor-Transformer: the people of a clip attend to each other before their group activity is classified.

Paper: Gavrilyuk et al., "Actor-Transformers for Group Activity Recognition", CVPR 2020 (arXiv 2003.12737).
Code: no official code is public. The definition and the names are those of the re-implementation
https://github.com/JacobYuan7/DIN-Group-Activity-Recognition-Benchmark, `infer_module/AT_infer_module.py` and
`infer_model.py`; checkpoints of the paper itself are not known.

For the actors X (N, D) of one frame, or of a clip after the mean over its frames, with E the encoded box centres,

    S = X + E
    A = softmax(S W_q^T W_k S^T / sqrt(D))
    Y = LN1(S + A S W_v^T)        Z = LN2(Y + W_2 relu(W_1 Y + b_1) + b_2)
    actions = W_a Z + b_a         activities = W_g max over actors of Z + b_g

With j counting the D/2 channels of an axis, E is sin(c / w_j) for even and cos(c / w_j) for odd j, where
w_j = 10000^(4 floor(j / 2) / D): first of x, then of y. Scores are averaged over the frames.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from edgeattn.blocks.precision import Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant


class CentreEncoding(nn.Module):
    """Sinusoids of box centres; no parameters. A cosine is computed as a sine, a quarter of a turn ahead.

    Args:
        channels: channels D of the result, half of them per coordinate; a multiple of 4.

    Raises:
        ValueError: another number of channels.
    """

    period: torch.Tensor
    odd: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"{channels} channels: sines and cosines of x and y share them; give a multiple of 4")
        index = torch.arange(channels // 2, dtype=torch.float32)
        self.register_buffer("period", 10000 ** (2 * (index // 2) / (channels // 2)), persistent=False)
        self.register_buffer("odd", index % 2, persistent=False)

    def forward(self, centres: torch.Tensor) -> torch.Tensor:
        """Map (..., 2) coordinates to (..., D)."""
        return (centres.unsqueeze(-1) / self.period + self.odd * (math.pi / 2)).sin().flatten(-2)


class ActorEncoder(nn.Module):
    """One encoder layer with one head and without an output projection.

    State names are DIN's: `Q_W`, `K_W`, `V_W` (D, D) without bias, `layernorm1`, `FFN_linear1` and `FFN_linear2` (D, D)
    with bias, `layernorm2`.

    Args:
        in_dim: channels D.
    """

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.scale = in_dim**-0.5
        self.Q_W = nn.Linear(in_dim, in_dim, bias=False)
        self.K_W: nn.Module = nn.Linear(in_dim, in_dim, bias=False)
        self.V_W = nn.Linear(in_dim, in_dim, bias=False)
        self.layernorm1 = nn.LayerNorm(in_dim)
        self.FFN_linear1 = nn.Linear(in_dim, in_dim)
        self.FFN_linear2 = nn.Linear(in_dim, in_dim)
        self.layernorm2 = nn.LayerNorm(in_dim)

    def forward(self, actors: torch.Tensor) -> torch.Tensor:
        """Map the actors (..., actors, D) of each frame to the same shape."""
        query = self.Q_W(actors)
        if self.scale != 1:
            query = query * self.scale
        attention = torch.matmul(query, self.K_W(actors).transpose(-2, -1)).softmax(dim=-1)
        attended = self.layernorm1(actors + torch.matmul(attention, self.V_W(actors)))
        return self.layernorm2(attended + self.FFN_linear2(torch.relu(self.FFN_linear1(attended))))

    def prepare_for_export(self) -> ActorEncoder:
        """Return a copy with W_k^T W_q / sqrt(D) as the projection of the queries: actors are keys as they are."""
        folded = copy.deepcopy(self)
        if isinstance(self.K_W, nn.Linear):
            with torch.no_grad():
                folded.Q_W.weight.copy_(self.K_W.weight.t() @ self.Q_W.weight * self.scale)
            folded.K_W, folded.scale = nn.Identity(), 1.0
        return folded


class ActorTransformer(nn.Module):
    """What follows the actors' features in a network for group activities.

    State names are DIN's: `AT.*` (see `ActorEncoder`), `fc_activities` and `fc_actions`; the embedding of the features
    before the block (`fc_emb_1`, `nl_emb_1`) and `backbone` are no part of it. DIN returns activities only, although
    its checkpoints hold `fc_actions` too: leave `num_actions` out to drop the layer.

    The number of actors may vary between calls; all clips of a batch have the same.

    Args:
        in_dim: channels D of a feature, a multiple of 4; 1024 in DIN.
        num_activities: classes of the group; None for no such classifier.
        num_actions: classes of a single actor; None for no such classifier.
        temporal_pooled_first: average features and positions over the frames before the encoder; otherwise the encoder
            treats every frame by itself, and the scores are averaged.

    Raises:
        ValueError: in_dim is no multiple of 4, or there is a classifier without classes.
    """

    def __init__(
        self,
        in_dim: int,
        num_activities: int | None = None,
        num_actions: int | None = None,
        temporal_pooled_first: bool = False,
    ) -> None:
        super().__init__()
        for name, classes in (("num_activities", num_activities), ("num_actions", num_actions)):
            if classes is not None and classes < 1:
                raise ValueError(f"{name}={classes}: give at least 1 class, or None for no classifier")
        self.temporal_pooled_first = temporal_pooled_first
        self.PE = Fp32Step(CentreEncoding(in_dim))
        self.AT = ActorEncoder(in_dim)
        self.fc_activities = None if num_activities is None else nn.Linear(in_dim, num_activities)
        self.fc_actions = None if num_actions is None else nn.Linear(in_dim, num_actions)

    def forward(self, features: torch.Tensor, centres: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Classify clips.

        Args:
            features: (batch, frames, actors, D), one embedded feature per box.
            centres: (batch, frames, actors, 2), x and y of the boxes' centres in pixels of the image. DIN's boxes are
                in units of its feature map: multiply by the ratio of the sizes. Coordinates need FP32: FP16 has no
                fractions of a pixel beyond 1024.

        Returns:
            Scores of the activities (batch, num_activities), of the actions (batch, actors, num_actions), or both, in
            this order; without a classifier the encoded actors (batch, frames, actors, D), or (batch, actors, D) with
            `temporal_pooled_first`.
        """
        actors = features + self.PE(centres)
        actors = self.AT(actors.mean(dim=1) if self.temporal_pooled_first else actors)
        scores = []
        if self.fc_activities is not None:
            scores.append(self.fc_activities(self._over_frames(actors.amax(dim=-2))))
        if self.fc_actions is not None:
            scores.append(self.fc_actions(self._over_frames(actors)))
        if not scores:
            return actors
        return scores[0] if len(scores) == 1 else tuple(scores)

    def _over_frames(self, states: torch.Tensor) -> torch.Tensor:
        """Average over the frames, if they are still there; before a classifier, because it is linear."""
        return states if self.temporal_pooled_first else states.mean(dim=1)


_INPUTS = (
    TensorInput("features", ("batch", "frames", "actors", "in_dim")),
    TensorInput("centres", ("batch", "frames", "actors", 2)),
)
_AROUND = {r"^(?:backbone|fc_emb_1|nl_emb_1)\..*$": ""}
_ACTIVITIES = {**_AROUND, r"^fc_actions\..*$": ""}
_POOLED: Arguments = {"in_dim": 12, "num_activities": 5, "num_actions": 7, "temporal_pooled_first": True}
_OVERFLOW = Overflow(300.0, {"batch": 1, "frames": 2, "actors": 5}, arguments={"in_dim": 32})
_VOLLEYBALL: Sizes = {"batch": 1, "frames": 10, "actors": 12}


def _largest(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the features and the energies."""
    return sizes["batch"] * sizes["frames"] * sizes["actors"] * max(arguments["in_dim"], sizes["actors"])


BLOCKS.add(
    BlockSpec(
        name="actor-transformer",
        title="Actor-Transformer",
        paper="Actor-Transformers for Group Activity Recognition, CVPR 2020",
        year=2020,
        code="https://github.com/JacobYuan7/DIN-Group-Activity-Recognition-Benchmark (re-implementation)",
        build=ActorTransformer,
        original="edgeattn.validation.originals.actor_transformer:ActorTransformer",
        variants=(
            Variant(
                "official",
                {"in_dim": 12, "num_activities": 5},
                key_map=_ACTIVITIES,
                references={"actor_transformer": {"in_dim": 12, "num_activities": 5}},
                published=Published("DIN benchmark, Volleyball", {"in_dim": 1024, "num_activities": 8}, _VOLLEYBALL),
                overflow=_OVERFLOW,
            ),
            Variant(
                "pooled-first",
                _POOLED,
                key_map=_AROUND,
                references={"actor_transformer_pooled": _POOLED},
                overflow=_OVERFLOW,
            ),
            Variant("encoder", {"in_dim": 8}, key_map=_ACTIVITIES),
        ),
        largest=_largest,
        precision=(
            "box centres and their angles (a sine of 1280 pixels needs more digits than FP16 has), energies, softmax, "
            "layer normalisations and means over frames stay in FP32; the projections, what is gathered, the "
            "feed-forward network and the classifiers run in FP16"
        ),
        int8="the linear layers; the attention products stay in FP16",
        inputs=_INPUTS,
        sizes=(
            {"batch": 2, "frames": 3, "actors": 5},
            {"batch": 1, "frames": 2, "actors": 12},
            {"batch": 3, "frames": 5, "actors": 2},
            {"batch": 3, "frames": 1, "actors": 7},
            {"batch": 1, "frames": 1, "actors": 1},
        ),
    )
)
