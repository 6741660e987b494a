"""Graphs to recognise attention in, exported once for each test session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime
import pytest
import torch


def _load() -> ModuleType:
    path = Path(__file__).with_name("rewrite_corpus.py")
    spec = importlib.util.spec_from_file_location("edgeattn_rewrite_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ZOO = _load()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the tests of near misses one case for each fault."""
    for fixture, faults in (("line_fault", ZOO.NEAR_CRISS_CROSS), ("map_fault", ZOO.NEAR_CO_ATTENTION)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(faults), ids=[fault.replace(" ", "-") for fault in faults])


class Corpus:
    """Makes graphs by name, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zoo = ZOO
        self._graphs: dict[str, onnx.ModelProto] = {}

    def recipes(self):
        """Return how every graph is made, by name."""
        zoo = self.zoo
        network, co = zoo.Network, zoo.CoAttention
        export = zoo.export
        free = {"dynamic": True}
        raw = {"dynamic": True, "optimize": False}
        return {
            "bmm": lambda: export(network(zoo.BatchedMatmul())),
            "bmm-dynamic": lambda: export(network(zoo.BatchedMatmul(), stride=8), size=(40, 56), **free),
            "bmm-unoptimised": lambda: export(network(zoo.BatchedMatmul()), **raw),
            "einsum-dynamic": lambda: export(network(zoo.Einsum()), **free),
            "einsum-legacy": lambda: export(network(zoo.Einsum()), legacy=True, **free),
            "matmul-filled": lambda: export(network(zoo.FourD())),
            "matmul-filled-unoptimised": lambda: export(network(zoo.FourD()), **raw),
            "matmul-filled-legacy": lambda: export(network(zoo.FourD()), legacy=True),
            "where-legacy": lambda: export(network(zoo.WhereArange()), legacy=True),
            "where-legacy-dynamic": lambda: export(network(zoo.WhereArange()), legacy=True, **free),
            "scaled-axis-one": lambda: export(network(zoo.ScaledAxisOne()), **free),
            "fused-projection": lambda: export(network(zoo.FusedProjection()), legacy=True, **free),
            "channels-last": lambda: export(network(zoo.ChannelsLast()), **free),
            "text": lambda: onnx.parser.parse_model(zoo.TEXT_GRAPH),
            "co-bmm": lambda: export(co(form="bmm")),
            "co-bmm-dynamic": lambda: export(co(form="bmm"), **free),
            "co-bmm-ungated": lambda: export(co(form="bmm", gate=False), legacy=True, **free),
            "co-bilinear": lambda: export(co(form="bilinear"), **free),
            "co-einsum": lambda: export(co(form="einsum"), legacy=True, **free),
            "co-one-way": lambda: export(co(form="one_way"), legacy=True, **free),
            "co-one-way-tokens": lambda: export(co(form="one_way_tokens"), legacy=True),
            "co-group": lambda: export(co(form="group", gate=False), legacy=True, **free),
        }

    def graph(self, name: str) -> onnx.ModelProto:
        """Return a graph; `<name>+basic` is the graph that ONNX Runtime's basic optimisation makes of it."""
        if name not in self._graphs:
            base, _, optimised = name.partition("+")
            torch.manual_seed(0)
            self._graphs[name] = self._optimise(self.graph(base)) if optimised else self.recipes()[base]()
        return self._graphs[name]

    def _optimise(self, model: onnx.ModelProto) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(self.folder / "optimised.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """All graphs of the tests, made when asked for."""
    return Corpus(tmp_path_factory.mktemp("corpus"))
