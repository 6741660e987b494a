"""Bilinear attention networks (BAN): attention maps over pairs of image regions and words, pooling, counting.

Paper: Kim et al., "Bilinear Attention Networks", NeurIPS 2018 (arXiv 1805.07932); the counter: Zhang et al., "Learning
to Count Objects in Natural Images for Visual Question Answering", ICLR 2018 (arXiv 1802.05766).
Code: https://github.com/jnhwkim/ban-vqa, `bc.py`, `attention.py`, `base_model.py`, `counting.py`.

    logit_g[i, j] = sum_k h[g, k] relu(W_v v_i)_k relu(W_q q_j)_k + b_g        regions i, words j, glimpses g
    p_g           = softmax over all pairs (i, j)
    pooled_g      = sum_ij p_g[i, j] relu(V_g v_i) * relu(Q_g q_j)
    q            <- q + P_g pooled_g + relu(C_g counter(boxes, max_j logit_g))  for g = 0, 1, ...

Every product has the order that keeps tensors small: h multiplies the words, of which there are fewer than regions, and
pooling first gathers regions per word. Weight normalisation (one norm per matrix) is part of the weights in an export.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.precision import LOWEST, Fp32Step
from edgeattn.blocks.spec import BLOCKS, Arguments, BlockSpec, Overflow, Published, Sizes, TensorInput, Variant
from edgeattn.foundation import UserError

MAX_MAPS = 32
"""Up to this many outputs, a bilinear network stores `h_mat`; beyond, the linear layer `h_net`."""

_PIECES = 16

_BOX_SCALE = 1024.0
"""Factor of boxes and root of the factor of areas, exact; torch's ONNX optimizer drops additions of less than 1e-8."""


def _checked(**sizes: int) -> None:
    """Refuse sizes below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} has to be at least 1, got {value}")


def _normalised(scale: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return the direction with the norm `scale`, over all its elements."""
    return direction * (scale / direction.norm())


class WeightNormLinear(nn.Module):
    """Linear layer whose whole matrix is g v / |v|, as weight normalisation with `dim=None` stores it.

    State names: `weight_g` (), `weight_v` (out_features, in_features), `bias`.

    Args:
        in_features: inputs.
        out_features: outputs.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features)
        self.weight_v = nn.Parameter(plain.weight.detach())
        self.weight_g = nn.Parameter(self.weight_v.detach().norm())
        self.bias = nn.Parameter(plain.bias.detach())

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out_features, in_features)."""
        return _normalised(self.weight_g, self.weight_v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def prepare_for_export(self) -> nn.Linear:
        """Return the plain linear layer."""
        return _linear(self.weight, self.bias)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    """Return a linear layer with copies of a weight and a bias."""
    plain = nn.Linear(1, 1)
    plain.in_features, plain.out_features = weight.shape[1], weight.shape[0]
    plain.weight = nn.Parameter(weight.detach().clone())
    plain.bias = nn.Parameter(bias.detach().clone())
    return plain


class _Projection(nn.Module):
    """A linear layer inside `main`, behind dropout where training uses it, and in front of ReLU where there is one."""

    def __init__(self, in_features: int, out_features: int, *, dropout: bool = True, relu: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(0.2)] if dropout else []
        layers.append(WeightNormLinear(in_features, out_features))
        self.main = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))

    @property
    def linear(self) -> WeightNormLinear:
        """The linear layer, plain after preparation for export."""
        return next(layer for layer in self.main if hasattr(layer, "bias"))  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        result: torch.Tensor = self.main(x)
        return result


def _pool(regions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return sum_j of the products of (batch, words, features): (batch, features)."""
    return (regions * words).sum(dim=1)


class BCNet(nn.Module):
    """Low-rank bilinear form of every pair of a region and a word.

    State names are the official ones: `v_net.main.1`, `q_net.main.1` (weight normalised), then `h_mat` (1, h_out, 1, K)
    and `h_bias` (1, h_out, 1, 1) up to 32 outputs, `h_net` beyond; nothing with `h_out=None`. K is h_dim * k.

    Args:
        v_dim: features of a region.
        q_dim: features of a word.
        h_dim: rank; also the outputs of `forward_with_weights`.
        h_out: outputs per pair; None to return all K products.
        k: the rank is multiplied by it; `forward_with_weights` sums each k neighbours.
        norm_h_mat: `h_mat` is weight normalised (`h_mat_g`, `h_mat_v`), as inside the attention.

    Raises:
        ValueError: a size below 1, or `norm_h_mat` where there is no `h_mat`.
    """

    def __init__(
        self, v_dim: int, q_dim: int, h_dim: int, h_out: int | None, k: int = 3, norm_h_mat: bool = False
    ) -> None:
        super().__init__()
        _checked(v_dim=v_dim, q_dim=q_dim, h_dim=h_dim, h_out=1 if h_out is None else h_out, k=k)
        if norm_h_mat and (h_out is None or h_out > MAX_MAPS):
            raise ValueError(f"norm_h_mat needs h_out from 1 to {MAX_MAPS}, got h_out={h_out}: others have no h_mat")
        rank = h_dim * k
        self.h_dim = h_dim
        self.h_out = h_out
        self.k = k
        self.norm_h_mat = norm_h_mat
        self.v_net = _Projection(v_dim, rank)
        self.q_net = _Projection(q_dim, rank)
        self.pool = Fp32Step(_pool)
        if h_out is not None and h_out <= MAX_MAPS:
            h_mat = torch.randn(1, h_out, 1, rank)
            self.h_bias = nn.Parameter(torch.randn(1, h_out, 1, 1))
            if norm_h_mat:
                self.h_mat_g = nn.Parameter(h_mat.norm())
                self.h_mat_v = nn.Parameter(h_mat)
            else:
                self.h_mat = nn.Parameter(h_mat)
        elif h_out is not None:
            self.h_net = WeightNormLinear(rank, h_out)

    def forward(self, v: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Return the form of every pair.

        Args:
            v: (batch, regions, v_dim).
            q: (batch, words, q_dim).

        Returns:
            (batch, h_out, regions, words), or (batch, regions, words, h_dim * k) with `h_out=None`.
        """
        regions, words = self.v_net(v), self.q_net(q)
        if self.h_out is None or self.h_out > MAX_MAPS:
            pairs: torch.Tensor = regions.unsqueeze(2) * words.unsqueeze(1)
            return pairs if self.h_out is None else self.h_net(pairs).permute(0, 3, 1, 2)
        h_mat = _normalised(self.h_mat_g, self.h_mat_v) if self.norm_h_mat else self.h_mat
        keys = (words.unsqueeze(1) * h_mat).flatten(1, 2)
        logits = torch.matmul(regions, keys.transpose(1, 2))
        return logits.unflatten(2, (self.h_out, -1)).permute(0, 2, 1, 3) + self.h_bias

    def forward_with_weights(self, v: torch.Tensor, q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Sum the products of all pairs with weights.

        Args:
            v: (batch, regions, v_dim).
            q: (batch, words, q_dim).
            w: (batch, regions, words).

        Returns:
            (batch, h_dim).
        """
        gathered = torch.matmul(w.transpose(1, 2), self.v_net(v))
        pooled: torch.Tensor = self.pool(gathered, self.q_net(q))
        return pooled if self.k == 1 else pooled.unflatten(1, (self.h_dim, self.k)).sum(dim=2)

    def prepare_for_export(self) -> BCNet:
        """Return a copy with the norm of `h_mat` in its weights."""
        folded = copy.deepcopy(self)
        if self.norm_h_mat:
            folded.h_mat = nn.Parameter(_normalised(self.h_mat_g, self.h_mat_v).detach())
            del folded.h_mat_g, folded.h_mat_v
            folded.norm_h_mat = False
        return folded


class BiAttention(nn.Module):
    """Bilinear attention maps: for every glimpse, one softmax over all pairs of regions and words.

    State names are the official ones: `logits.*`, a `BCNet` with a weight normalised `h_mat`.

    The published code takes a region for padding where all its features are 0, and masks through `.data`, an edit that
    an export loses. Here the mask is an input: `(v == 0).all(2)` gives the published one. Padded regions get the
    logit -65504, which the logits keep, instead of minus infinity. Padded words are not masked, as published.

    Args:
        x_dim: features of a region.
        y_dim: features of a word.
        z_dim: a third of the rank.
        glimpse: number of maps, up to 32.

    Raises:
        ValueError: a size below 1, or more than 32 glimpses.
    """

    def __init__(self, x_dim: int, y_dim: int, z_dim: int, glimpse: int) -> None:
        super().__init__()
        if not 1 <= glimpse <= MAX_MAPS:
            raise ValueError(f"glimpse has to be from 1 to {MAX_MAPS}, got {glimpse}; published networks have up to 8")
        self.logits = BCNet(x_dim, y_dim, z_dim, glimpse, k=3, norm_h_mat=True)

    def forward(self, v: torch.Tensor, q: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention and its logits.

        Args:
            v: regions (batch, regions, x_dim).
            q: words (batch, words, y_dim).
            mask: boolean (batch, regions), true for padding; not true everywhere.

        Returns:
            Attention and masked logits, each (batch, glimpse, regions, words).
        """
        logits = self.logits(v, q).masked_fill(mask.bool().unsqueeze(1).unsqueeze(3), LOWEST)
        return logits.flatten(2).softmax(dim=2).view(logits.shape), logits


class _PiecewiseLinear(nn.Module):
    """The stored weights of a monotonous function with 16 linear pieces, of which the shares count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.zeros(1), torch.ones(_PIECES)]))


def _places(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where numbers from 0 to 1 lie on the pieces: 16 x, and the index of the piece."""
    place = (x * _PIECES).clamp(0.0, float(_PIECES))
    return place, place.to(torch.int64)


def _product(x: torch.Tensor) -> torch.Tensor:
    """Return the product over axis 1, by halves."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        paired = x[:, :half] * x[:, half : 2 * half]
        x = torch.cat([paired, x[:, 2 * half :]], dim=1) if x.shape[1] % 2 else paired
    return x.squeeze(1)


def _overlap_distance(boxes: torch.Tensor) -> torch.Tensor:
    """Return 1 - intersection over union of all pairs of boxes (batch, 4, n): (batch, n, n)."""
    scaled = boxes * _BOX_SCALE
    low, high = scaled[:, :2], scaled[:, 2:]
    sides = (high - low).clamp(min=0.0)
    area = sides[:, 0] * sides[:, 1]
    shared_high = torch.minimum(high.unsqueeze(3), high.unsqueeze(2))
    shared_low = torch.maximum(low.unsqueeze(3), low.unsqueeze(2))
    shared = (shared_high - shared_low).clamp(min=0.0)
    intersection = shared[:, 0] * shared[:, 1]
    return 1.0 - intersection / (area.unsqueeze(2) + area.unsqueeze(1) - intersection + 1e-12 * _BOX_SCALE**2)


def _count(boxes: torch.Tensor, a: torch.Tensor, lines: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the counts (batch, n + 1) of boxes (batch, 4, n) with relevance a (batch, n); f_k is row k of lines."""

    def f(index: int, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        line = F.embedding(places[1], lines[index])
        return line[..., 0] + line[..., 1] * places[0]

    relevance = _places(a.unsqueeze(2) * a.unsqueeze(1))
    distance = _places(_overlap_distance(boxes))
    dedup = f(3, relevance) * f(4, distance)
    unlike = (dedup.unsqueeze(3) - dedup.unsqueeze(2)).abs()
    alike = f(2, _places(1.0 - (a.unsqueeze(2) - a.unsqueeze(1)).abs()))
    similar = alike * _product(f(2, _places(1.0 - unlike)))
    rows = similar.sum(dim=2)
    edges = f(0, relevance) * f(1, distance) / (rows.unsqueeze(2) * rows.unsqueeze(1))
    score = edges.sum(dim=(1, 2)) + (f(0, _places(a * a)) / rows).sum(dim=1)
    score = score.sqrt().clamp(max=float(a.shape[1])).unsqueeze(1)
    doubt = (f(5, _places(a)) - 0.5).abs().mean(dim=1) + (f(6, distance) - 0.5).abs().mean(dim=(1, 2))
    return (1.0 - (score - levels).abs()).relu() * f(7, _places(doubt)).unsqueeze(1)


class Counter(nn.Module):
    """Counts objects from relevances and boxes, counting overlapping boxes once; the result is a soft one-hot vector.

    State names are the official ones: `f.0.weight` to `f.15.weight`, 17 each. Functions 8 to 15 are stored and never
    used; an export leaves them out.

    Args:
        objects: how many boxes count: those with the largest relevance.
        already_sigmoided: the relevance is between 0 and 1 already, instead of a logit.

    Raises:
        ValueError: `objects` below 1.
    """

    lines: torch.Tensor | None
    levels: torch.Tensor

    def __init__(self, objects: int = 10, already_sigmoided: bool = False) -> None:
        super().__init__()
        _checked(objects=objects)
        self.objects = objects
        self.already_sigmoided = already_sigmoided
        self.f = nn.ModuleList(_PiecewiseLinear() for _ in range(16))
        self.step = Fp32Step(_count)
        self.register_buffer("lines", None, persistent=False)
        self.register_buffer("levels", torch.arange(objects + 1).float(), persistent=False)

    def forward(self, boxes: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Count.

        Args:
            boxes: (batch, 4, regions), each x1, y1, x2, y2.
            attention: relevance of each box (batch, regions). Where several boxes share the lowest relevance that is
                taken, any of them may be taken: give padding equal boxes.

        Returns:
            (batch, objects + 1): weights of the counts 0 to `objects`, times the confidence.

        Raises:
            UserError: fewer regions than `objects`.
        """
        regions = attention.shape[1]
        if isinstance(regions, int) and regions < self.objects:
            raise UserError(
                f"the counter takes the {self.objects} most relevant boxes, but there are only {regions}. "
                "Pad the regions with zero boxes and mask them."
            )
        relevance, index = attention.topk(self.objects, dim=1)
        chosen = boxes.gather(2, index.unsqueeze(1).expand(-1, 4, -1))
        lines = self._lines() if self.lines is None else self.lines
        probability = relevance if self.already_sigmoided else relevance.sigmoid()
        counts: torch.Tensor = self.step(chosen, probability, lines, self.levels)
        return counts

    def _lines(self) -> torch.Tensor:
        """Return, for the functions in use and every piece, its line in 16 x: offset and slope (8, 17, 2)."""
        weights = torch.stack([function.get_parameter("weight") for function in list(self.f)[:8]]).abs()
        shares = weights / weights.sum(dim=1, keepdim=True)
        slopes = F.pad(shares[:, 1:], (0, 1))
        pieces = torch.arange(_PIECES + 1, dtype=shares.dtype, device=shares.device)
        return torch.stack([shares.cumsum(dim=1) - pieces * slopes, slopes], dim=2)

    def prepare_for_export(self) -> Counter:
        """Return a copy with the lines of the functions in use, and no parameters."""
        folded = copy.deepcopy(self)
        folded.lines = self._lines().detach()
        folded.f = nn.ModuleList()
        return folded


class _Classifier(nn.Module):
    """Two linear layers in `main`."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            WeightNormLinear(in_features, hidden), nn.ReLU(), nn.Dropout(0.5), WeightNormLinear(hidden, out_features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_features) to (batch, out_features)."""
        result: torch.Tensor = self.main(x)
        return result


class BilinearAttentionNetwork(nn.Module):
    """Visual question answering from regions and encoded words: glimpses, counts and the classifier.

    State names are the official ones: `v_att`, `b_net`, `q_prj`, `c_prj`, `counter`, `classifier`. Word embedding and
    GRU (`w_emb`, `q_emb`) are outside; the key map leaves them out. All maps come from the words as given, before any
    glimpse changes them. Boxes of padded regions count as zeros, which is what the published loader pads with.

    The projections of the regions do not depend on earlier glimpses: one matrix product computes all of them, and one
    counter runs for all glimpses.

    Args:
        v_dim: features of a region.
        num_hid: features of a word, and hidden features.
        glimpses: number of attention maps.
        answers: number of answers.
        objects: number of boxes that count.

    Raises:
        ValueError: a size below 1, or more than 32 glimpses.
    """

    def __init__(
        self, v_dim: int = 2048, num_hid: int = 1280, glimpses: int = 8, answers: int = 3129, objects: int = 10
    ) -> None:
        super().__init__()
        _checked(v_dim=v_dim, num_hid=num_hid, glimpses=glimpses, answers=answers, objects=objects)
        self.num_hid = num_hid
        self.glimpses = glimpses
        self.v_att = BiAttention(v_dim, num_hid, num_hid, glimpses)
        self.b_net = nn.ModuleList(BCNet(v_dim, num_hid, num_hid, None, k=1) for _ in range(glimpses))
        self.q_prj = nn.ModuleList(_Projection(num_hid, num_hid, relu=False) for _ in range(glimpses))
        self.c_prj = nn.ModuleList(_Projection(objects + 1, num_hid, dropout=False) for _ in range(glimpses))
        self.classifier = _Classifier(num_hid, 2 * num_hid, answers)
        self.counter = Counter(objects)
        self.visual: nn.Linear | None = None
        self.pool = Fp32Step(_pool)

    def forward(
        self, v: torch.Tensor, boxes: torch.Tensor, q: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer.

        Args:
            v: regions (batch, regions, v_dim).
            boxes: their boxes (batch, regions, 4), each x1, y1, x2, y2.
            q: encoded words (batch, words, num_hid).
            mask: boolean (batch, regions), true for padding; not true everywhere.

        Returns:
            Answer logits (batch, answers) and attention (batch, glimpses, regions, words).

        Raises:
            UserError: fewer regions than the counter takes.
        """
        attention, logits = self.v_att(v, q, mask)
        counts = self._counts(boxes, logits, mask)
        regions = self._regions(v).unflatten(2, (self.glimpses, self.num_hid)).permute(0, 2, 1, 3)
        gathered = torch.matmul(attention.transpose(2, 3), regions)
        for index in range(self.glimpses):
            words = self.b_net[index].get_submodule("q_net")(q)
            update = self.q_prj[index](self.pool(gathered[:, index], words))
            q = q + (update + self.c_prj[index](counts[:, index])).unsqueeze(1)
        answers: torch.Tensor = self.classifier(q.sum(dim=1))
        return answers, attention

    def _counts(self, boxes: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the counts of every glimpse (batch, glimpses, objects + 1)."""
        placed = boxes.masked_fill(mask.bool().unsqueeze(2), 0.0).transpose(1, 2)
        repeated = placed.unsqueeze(1).expand(-1, self.glimpses, -1, -1).flatten(0, 1)
        counts: torch.Tensor = self.counter(repeated, logits.amax(dim=3).flatten(0, 1))
        return counts.unflatten(0, (-1, self.glimpses))

    def _regions(self, v: torch.Tensor) -> torch.Tensor:
        """Return the regions' features for all glimpses (batch, regions, glimpses * num_hid)."""
        return torch.relu(F.linear(v, *self._merged()) if self.visual is None else self.visual(v))

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias of the regions' projections of all glimpses."""
        layers = [net.v_net.linear for net in self.b_net if isinstance(net, BCNet)]
        return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])

    def prepare_for_export(self) -> BilinearAttentionNetwork:
        """Return a copy with one projection of the regions for all glimpses."""
        folded = copy.deepcopy(self)
        folded.visual = _linear(*self._merged())
        for net in folded.b_net:
            del net.v_net
        return folded


def _pairs(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the features and the words multiplied by h."""
    rank: int = arguments["z_dim"] * 3
    return sizes["batch"] * rank * max(sizes["regions"], sizes["words"] * arguments["glimpse"])


def _form(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the largest of features, words multiplied by h, products and results."""
    rank: int = arguments["h_dim"] * arguments.get("k", 3)
    outputs: int = arguments["h_out"] or 1
    pairs = sizes["regions"] * sizes["words"] * max(rank, outputs) if outputs > MAX_MAPS else 0
    return sizes["batch"] * max(rank * sizes["regions"], rank * sizes["words"] * min(outputs, MAX_MAPS), pairs)


def _network(arguments: Arguments, sizes: Sizes) -> int:
    """Return the elements of the larger of the attention's, the counter's and the glimpses' tensors."""
    glimpses: int = arguments["glimpses"]
    hidden: int = arguments["num_hid"]
    features = hidden * max(3 * sizes["regions"], 3 * sizes["words"] * glimpses, sizes["regions"] * glimpses)
    return sizes["batch"] * max(features, 2 * glimpses * arguments["objects"] ** 3)


def _sizes(*sizes: tuple[int, int, int]) -> tuple[Sizes, ...]:
    """Return sizes from batch, regions and words."""
    return tuple({"batch": batch, "regions": regions, "words": words} for batch, regions, words in sizes)


_REGIONS = TensorInput("v", ("batch", "regions", "v_dim"))
_WORDS = TensorInput("q", ("batch", "words", "q_dim"))
_MASK = TensorInput("mask", ("batch", "regions"), "mask")
_PAIR = (_REGIONS, _WORDS)
_WEIGHTED = (*_PAIR, TensorInput("w", ("batch", "regions", "words")))
_SOME = _sizes((2, 7, 5), (1, 9, 4), (3, 5, 6), (1, 5, 1))
_TINY = _sizes((2, 5, 3), (1, 4, 6), (3, 3, 2), (1, 1, 1))
_FORM: Arguments = {"v_dim": 6, "q_dim": 5, "h_dim": 4}
_BUTD: Sizes = {"batch": 1, "regions": 36, "words": 14}
_CODE = "https://github.com/jnhwkim/ban-vqa"
_PAPER = "Bilinear Attention Networks, NeurIPS 2018"
_INT8 = "the linear layers; the bilinear products stay in FP16"

BLOCKS.add(
    BlockSpec(
        name="bilinear-attention",
        title="bilinear attention maps",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=BiAttention,
        original="edgeattn.validation.originals.bilinear_attention:BiAttention",
        variants=(
            Variant(
                "official",
                {"x_dim": 6, "y_dim": 5, "z_dim": 4, "glimpse": 3},
                key_map={r"^v_att\.": "", r"^(w_emb|q_emb|b_net|q_prj|c_prj|classifier|counter)\..*$": ""},
                listings={"ban_biattention": {"x_dim": 2048, "y_dim": 1280, "z_dim": 1280, "glimpse": 8}},
                references={"ban_biattention": {"x_dim": 6, "y_dim": 5, "z_dim": 4, "glimpse": 3}},
                published=Published(
                    "BAN-8, VQA 2.0, bottom-up features",
                    {"x_dim": 2048, "y_dim": 1280, "z_dim": 1280, "glimpse": 8},
                    _BUTD,
                ),
                overflow=Overflow(
                    1.0,
                    {"batch": 2, "regions": 7, "words": 5},
                    state={r"v_net.*weight_g": 2e4, r"h_mat_g": 100.0, r"q_net": 5e-5},
                ),
            ),
        ),
        largest=_pairs,
        precision=(
            "softmax and logits stay in FP32: large features times h leave FP16 although the logits fit; h multiplies "
            "the words; padding has the logit -65504, which FP16 holds"
        ),
        int8=_INT8,
        inputs=(
            TensorInput("v", ("batch", "regions", "x_dim")),
            TensorInput("q", ("batch", "words", "y_dim")),
            _MASK,
        ),
        sizes=_TINY,
    )
)

BLOCKS.add(
    BlockSpec(
        name="bilinear-form",
        title="low-rank bilinear network (BCNet)",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=BCNet,
        original="edgeattn.validation.originals.bilinear_attention:BCNet",
        variants=(
            Variant(
                "pooling",
                {**_FORM, "h_out": None, "k": 1},
                listings={"ban_bcnet_none": {"v_dim": 2048, "q_dim": 1280, "h_dim": 1280, "h_out": None, "k": 1}},
                references={"ban_bcnet_none": {**_FORM, "h_out": None, "k": 1}},
                published=Published(
                    "BAN-8, VQA 2.0, bottom-up features",
                    {"v_dim": 2048, "q_dim": 1280, "h_dim": 1280, "h_out": None, "k": 1},
                    _BUTD,
                ),
                inputs=_WEIGHTED,
                method="forward_with_weights",
            ),
            Variant(
                "pooling-neighbours",
                {**_FORM, "h_out": None, "k": 3},
                references={"ban_bcnet_neighbours": {**_FORM, "h_out": None, "k": 3}},
                inputs=_WEIGHTED,
                method="forward_with_weights",
            ),
            Variant("products", {**_FORM, "h_out": None}, references={"ban_bcnet_products": {**_FORM, "h_out": None}}),
            Variant("maps", {**_FORM, "h_out": 2}, references={"ban_bcnet_maps": {**_FORM, "h_out": 2}}),
            Variant("linear", {**_FORM, "h_out": 33}, references={"ban_bcnet_linear": {**_FORM, "h_out": 33}}),
        ),
        largest=_form,
        precision="the weighted sum over words stays in FP32, with the products it adds",
        int8=_INT8,
        inputs=_PAIR,
        sizes=_TINY,
    )
)

BLOCKS.add(
    BlockSpec(
        name="object-counter",
        title="counter of overlapping boxes",
        paper="Learning to Count Objects in Natural Images for Visual Question Answering, ICLR 2018",
        year=2018,
        code=f"{_CODE}, https://github.com/Cyanogenoid/vqa-counting",
        build=Counter,
        original="edgeattn.validation.originals.bilinear_attention:Counter",
        variants=(
            Variant(
                "official",
                {"objects": 5},
                key_map={r"^counter\.": "", r"^(w_emb|q_emb|v_att|b_net|q_prj|c_prj|classifier)\..*$": ""},
                references={"ban_counter": {"objects": 5}},
                published=Published("BAN-8, VQA 2.0, bottom-up features", {}, _BUTD),
                overflow=Overflow(1.0, {"batch": 2, "regions": 7}),
            ),
        ),
        largest=lambda arguments, sizes: 2 * sizes["batch"] * arguments["objects"] ** 3,
        precision=(
            "all of it but the choice of boxes stays in FP32: it is tiny, and the 1e-12 that keeps boxes without area "
            "from 0 / 0 is 0 in FP16"
        ),
        int8=_INT8,
        inputs=(
            TensorInput("boxes", ("batch", 4, "regions"), "fraction"),
            TensorInput("attention", ("batch", "regions")),
        ),
        sizes=_SOME,
    )
)

BLOCKS.add(
    BlockSpec(
        name="bilinear-attention-network",
        title="bilinear attention network with glimpses and counter",
        paper=_PAPER,
        year=2018,
        code=_CODE,
        build=BilinearAttentionNetwork,
        original="edgeattn.validation.originals.bilinear_attention:BilinearAttentionNetwork",
        variants=(
            Variant(
                "official",
                {"v_dim": 6, "num_hid": 5, "glimpses": 3, "answers": 7, "objects": 3},
                key_map={r"^(w_emb|q_emb)\..*$": ""},
                references={"ban_network": {"v_dim": 6, "num_hid": 5, "glimpses": 3, "answers": 7, "objects": 10}},
                published=Published("BAN-8, VQA 2.0, bottom-up features", {"v_dim": 2048, "num_hid": 1280}, _BUTD),
            ),
        ),
        largest=_network,
        precision="softmax, logits, weighted sums and the counter stay in FP32",
        int8=_INT8,
        inputs=(
            _REGIONS,
            TensorInput("boxes", ("batch", "regions", 4), "fraction"),
            TensorInput("q", ("batch", "words", "num_hid")),
            _MASK,
        ),
        sizes=_SOME,
    )
)
