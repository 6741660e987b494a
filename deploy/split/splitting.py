"""From a checkpoint to the files of its two graphs, with the record that proves them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgeattn.deploy.calibration_data import calibration_data, unmeasured_note
from edgeattn.deploy.evidence import BUNDLED, EvaluationSamples, checkpoint_path, load_original
from edgeattn.deploy.pipeline import Progress, save_model
from edgeattn.deploy.sizes import refuse_size
from edgeattn.deploy.split.chain import Episode, joined
from edgeattn.deploy.split.schemes import SCHEMES, Scheme
from edgeattn.deploy.two_graphs import (
    Arrays,
    GraphFile,
    TypicalUse,
    reduced_graphs,
    remove_others,
    save_graphs,
    typical_ranges,
)
from edgeattn.export.model_file import load_model
from edgeattn.export.opsets import DEFAULT_OPSET
from edgeattn.export.run_directory import versions
from edgeattn.foundation import UserError, remove_leftovers, sha256_of, write_text
from edgeattn.models import MODELS, ModelSpec, Sample
from edgeattn.models.checkpoint import read_checkpoint
from edgeattn.models.published import load_published
from edgeattn.validation.parity import Form, Parity, compare_forms

RECORD = "split.json"
"""Name of the record beside the graphs."""

FORMAT = 1
"""Version of the record's layout."""


@dataclass(frozen=True)
class SplitRequest:
    """What to split and how.

    Attributes:
        model: name of the model's declaration, whose network has two graphs.
        checkpoint: path of the trained weights, or "bundled".
        layout: published layout of the weights; the one whose names fit when None.
        size: (height, width) of the images; the model's own when None.
        fp16: write FP16 graphs too.
        int8: write INT8 graphs too, with FP16 around the INT8 layers.
        calibration: folder of images or .npz on which INT8 is calibrated and it is measured what FP16 cannot hold; the
            model's bundled training images when None. INT8 needs one of them.
        references: number of references that COSNet's attention takes; any number when None.
        combination: how COSNet's references make one mask, a name of `COMBINATIONS`; the mean when None.
        images: folder of images to judge parity on; the model's held-out samples when None.
        sample_count: how many samples to judge on, at most.
        opset: version of the standard operators.
        threads: threads that run the original and the graphs.
    """

    model: str
    checkpoint: str = BUNDLED
    layout: str | None = None
    size: tuple[int, int] | None = None
    fp16: bool = False
    int8: bool = False
    calibration: Path | None = None
    references: int | None = None
    combination: str | None = None
    images: Path | None = None
    sample_count: int = 200
    opset: int | None = None
    threads: int = 1


def split_network(request: SplitRequest, output: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write both graphs of a network and the record `split.json`, which judges them against the PyTorch original.

    The record is written last: a folder without it holds the graphs of a run that did not end.

    Args:
        request: model and settings.
        output: folder of the files.
        progress: told about stages and samples.

    Returns:
        The content of `split.json`.

    Raises:
        UserError: something given cannot be used.
    """
    move = progress or (lambda stage, done, total: None)
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is a file. Give a folder with -o.")
    spec = MODELS.get(request.model)
    scheme = _scheme(spec)
    choices = _choices(request, spec, scheme)
    size = request.size or spec.size
    refuse_size(spec, size)
    checkpoint = checkpoint_path(spec, request.checkpoint)
    network = spec.build()
    loaded = load_published(spec, network, read_checkpoint(checkpoint), request.layout)
    samples = EvaluationSamples(spec, request.images, size, request.sample_count)
    episodes = tuple(scheme.episodes(spec, load_original(spec, checkpoint, loaded.layout), **choices))
    groups = list(_typical_images(request, spec, size))
    precisions = [name for name, asked in (("fp16", request.fp16), ("int8", request.int8)) if asked]
    move("export", 0, 1)
    graphs = scheme.export(network, size, request.opset or DEFAULT_OPSET, **choices)
    move("export", 1, 1)
    (output / RECORD).unlink(missing_ok=True)
    remove_leftovers(output)
    files = save_graphs(graphs, output, "fp32")
    notes: list[str] = []
    use = _typical_use(graphs, groups, episodes)
    ranges = typical_ranges(graphs, use) if precisions else {}
    for precision in precisions:
        move(precision, 0, 1)
        reduced, found = reduced_graphs(precision, graphs, use, ranges, network)
        files += save_graphs(reduced, output, precision)
        notes += [*(() if groups else (unmeasured_note(spec),)), *found]
        move(precision, 1, 1)
    remove_others(output, graphs, files)
    parities = {episode.name: _judge(episode, files, samples, request.threads, move) for episode in episodes}
    record = {
        "format": FORMAT,
        "verdict": _VERDICT[all(parity.passed for parity in parities.values())],
        "model": spec.name,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "layout": loaded.layout,
        "size": list(size),
        "preprocessing": _preprocessing(spec),
        "choices": choices,
        "graphs": list(_described(files, scheme, parities)),
        "evaluation": request.images.name if request.images else "held-out samples",
        "parity": {name: parity.as_dict() for name, parity in parities.items()},
        "measured_on": next(iter(parities.values())).status,
        "notes": list(dict.fromkeys(notes)),
        "versions": versions(),
    }
    write_text(output / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def _scheme(spec: ModelSpec) -> Scheme:
    if spec.network not in SCHEMES:
        able = ", ".join(other.name for other in MODELS if other.network in SCHEMES)
        raise UserError(f"{spec.name} has no form of two graphs. {able} have; `edgeattn export` writes one graph.")
    return SCHEMES[spec.network]


def _choices(request: SplitRequest, spec: ModelSpec, scheme: Scheme) -> dict[str, int | str | None]:
    """Return value by name of the options that only some networks have."""
    given = {"references": request.references, "combination": request.combination}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if name not in scheme.choices:
            raise UserError(f"--{name} {value} is given, but the graphs of {spec.name} have no such choice. Drop it.")
    return {**scheme.choices, **chosen}


def _typical_images(request: SplitRequest, spec: ModelSpec, size: tuple[int, int]) -> Iterator[Sequence[np.ndarray]]:
    """Yield the network inputs of calibration samples; none where there are no such data or FP32 alone is asked for."""
    if not (request.fp16 or request.int8):
        if request.calibration is not None:
            raise UserError(
                f"calibration data is given ({request.calibration}), but no FP16 or INT8 form. Add --fp16 or --int8, "
                "or drop it."
            )
        return
    batches = calibration_data(spec, request.calibration, size, spec.input_shape(1, size), int8=request.int8)
    for batch in batches or ():
        yield [batch[name] for name in spec.inputs]


def _typical_use(
    graphs: Mapping[str, onnx.ModelProto], groups: Sequence[Sequence[np.ndarray]], episodes: Sequence[Episode]
) -> TypicalUse | None:
    _, second = graphs.values()

    def feeds(features: np.ndarray) -> Iterator[Arrays]:
        return (episode.feed(second, features) for episode in episodes)

    return TypicalUse(groups, feeds) if groups else None


def _judge(
    episode: Episode, files: Sequence[GraphFile], samples: EvaluationSamples, threads: int, move: Progress
) -> Parity:
    """Compare the chains of both graphs, by precision and with or without plugin nodes, with the original."""
    stage = f"compare, {episode.name}"
    with tempfile.TemporaryDirectory() as folder:
        forms = []
        for name, parts in _chains(files).items():
            first, second = (load_model(part.path) for part in parts)
            path = Path(folder) / "+".join((parts[0].path.stem, parts[1].path.name))
            forms.append(
                Form(
                    name,
                    save_model(joined(first, second, episode), path),
                    parts[0].precision,
                    plugin=any(part.plugin for part in parts),
                )
            )
        move(stage, 0, len(samples))
        return compare_forms(
            episode.spec,
            episode.original,
            forms,
            (_of_first_image(sample) for sample in samples),
            progress=lambda done: move(stage, done, len(samples)),
            threads=threads,
            latency_runs=1,  # not for its time: ONNX Runtime has to take the FP16 files themselves, not only emulations
            pictures=0,
        )


def _chains(files: Sequence[GraphFile]) -> dict[str, tuple[GraphFile, GraphFile]]:
    """Return which two files make a chain, by its name, such as "fp16 plugin"; each file is in one at least."""
    chains = {}
    for precision in dict.fromkeys(file.precision for file in files):
        alike = [file for file in files if file.precision == precision]
        plain = {file.graph: file for file in alike if not file.plugin}
        first, second = plain.values()
        chains[precision] = (first, second)
        if plugins := {file.graph: file for file in alike if file.plugin}:
            first, second = {**plain, **plugins}.values()
            chains[f"{precision} plugin"] = (first, second)
    return chains


def _of_first_image(sample: Sample) -> Sample:
    """Return a sample with the truth of its first image alone, which is what the graphs label."""
    return sample if sample.target is None else replace(sample, target=sample.target[:1])


def _preprocessing(spec: ModelSpec) -> dict[str, object]:
    """Return what makes a network input of an image: `(pixel * scale - mean) / std`, channels first."""
    given = spec.preprocessing
    return {
        "colour_order": given.colour_order,
        "scale": given.scale,
        "mean": list(given.mean),
        "std": list(given.std),
    }


def _described(files: Sequence[GraphFile], scheme: Scheme, parities: Mapping[str, Parity]) -> Iterator[dict[str, Any]]:
    """Yield what the record says of each file."""
    roles = {role.name: role for role in scheme.roles}
    chains = _chains(files)
    for file in files:
        names = [name for name, parts in chains.items() if file in parts]
        judged = [entry for parity in parities.values() for entry in parity.forms if entry.form.name in names]
        graph = load_model(file.path).graph
        yield {
            "graph": file.graph,
            "file": file.path.name,
            "precision": file.precision,
            "plugin": file.plugin,
            "bytes": file.path.stat().st_size,
            "sha256": sha256_of(file.path),
            "inputs": [_declared(value) for value in graph.input],
            "outputs": [_declared(value) for value in graph.output],
            "does": roles[file.graph].does,
            "run": roles[file.graph].run,
            "chains": names,
            "verdict": _VERDICT[all(entry.passed for entry in judged)],
        }


def _declared(value: onnx.ValueInfoProto) -> dict[str, object]:
    """Return name, type and shape of an input or output; axes that may vary by name."""
    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "type": helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "shape": [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim],
    }


_VERDICT = {True: "PASS", False: "FAIL"}
