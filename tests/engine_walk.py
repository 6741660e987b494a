"""Walks `build_engine` and the engine runner on real bindings over fakes; prints what TensorRT was asked for.

Run by the fixture `engine_walk` in a subprocess, once for each TensorRT version: every attribute and every call on the
way, Polygraphy's included, is held against the bindings' own classes and signatures by `tensorrt_fakes`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy.typing  # bindings 11.4 need it imported first with NumPy 1.26
import onnx
import tensorrt as trt
from onnx import TensorProto, helper
from tensorrt_fakes import REAL, constructor, fake

from edgeattn.export.engine import (
    BuildCancelled,
    BuildRequest,
    Configuration,
    PrecisionOptions,
    ProfileOptions,
    build,
    profiles_of,
)
from edgeattn.export.engine.machine import Gpu, Machine, release_of
from edgeattn.export.model_file import load_model
from edgeattn.foundation import UserError
from edgeattn.validation import engine_runner, runners

warnings.simplefilter("ignore")
HERE = Gpu("Fake", 87, "540.4, CUDA 12.6")


def write_model(path: Path, *, plugin: bool = False) -> Path:
    """Write a convolution with dynamic axes, or a plugin node."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, ["batch", 4, "height", "width"])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 3, 1, 1], [0.5] * 12)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["inner"], "conv"),
        helper.make_node("Relu", ["inner"], ["result"]),
    ]
    if plugin:
        nodes[1] = helper.make_node(
            "PixelAttention", ["inner", "inner", "inner"], ["result"], "core", domain="edgeattn"
        )
    graph = helper.make_graph(nodes, "graph", [image], [result], [weight])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("edgeattn", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


class Device:
    """TensorRT on an imagined device.

    Args:
        types: TensorRT's type of each tensor of the parsed network.
        inspected: type of each tensor as the engine inspector spells it.
        plugins: how many plugin layers the parser makes.
        errors: what the parser refuses.
        fails: the build returns nothing.
        interrupts: the user presses Ctrl-C during the build.
    """

    def __init__(self, types, inspected, *, plugins=0, errors=(), fails=False, interrupts=False) -> None:
        self.types, self.inspected, self.plugins, self.errors, self.fails = types, inspected, plugins, errors, fails
        self.interrupts = interrupts
        self.asked: dict[str, list] = {}
        self.config = None

    def note(self, what, *values):
        """Remember what was asked for."""
        self.asked.setdefault(what, []).append(values[0] if len(values) == 1 else list(values))

    def tensor(self, name):
        kind = getattr(trt.DataType, self.types[name])
        return fake(trt.ITensor, name=name, dtype=kind, shape=(-1, 3, -1, -1), is_shape_tensor=False)

    def network(self):
        kinds = [trt.LayerType.CONVOLUTION, *[trt.LayerType.PLUGIN_V3] * self.plugins]
        tensors = [self.tensor(name) for name in self.types if name != "image"]
        layers = [
            fake(trt.ILayer, type=kind, num_outputs=1, get_output=lambda index, tensor=tensor: tensor)
            for kind, tensor in zip(kinds + [trt.LayerType.ACTIVATION] * 9, tensors, strict=False)
        ]
        return fake(
            trt.INetworkDefinition,
            num_inputs=1,
            get_input=lambda index: self.tensor("image"),
            num_layers=len(layers),
            get_layer=lambda index: layers[index],
            __getitem__=layers.__getitem__,
        )

    def builder(self, logger):
        def create_network(flags=0):
            self.note(
                "network flags",
                [
                    flag
                    for flag in trt.NetworkDefinitionCreationFlag.__members__
                    if flags >> int(getattr(trt.NetworkDefinitionCreationFlag, flag)) & 1
                ],
            )
            return self.network()

        def profile():
            return fake(
                trt.IOptimizationProfile,
                set_shape=lambda name, low, usual, high: self.note("shapes", name, list(low), list(usual), list(high)),
            )

        def configuration():
            def cache(data):
                self.note("timing cache read", len(data))
                return fake(trt.ITimingCache, serialize=lambda: b"measured", combine=lambda *rest: True)

            current = []

            def set_cache(cache, ignore_mismatch):
                current.append(cache)
                return True

            self.config = fake(
                trt.IBuilderConfig,
                set_flag=lambda flag: self.note("set", flag.name),
                clear_flag=lambda flag: self.note("clear", flag.name),
                set_memory_pool_limit=lambda pool, size: self.note("pool", pool.name, size),
                add_optimization_profile=lambda profile: 0,
                create_timing_cache=cache,
                set_timing_cache=set_cache,
                get_timing_cache=lambda: current[-1],
            )
            return self.config

        return fake(
            REAL.Builder,
            create_network=create_network,
            create_optimization_profile=profile,
            create_builder_config=configuration,
            build_serialized_network=self.build,
        )

    def build(self, network, config):
        """Report phases as TensorRT does, from the thread that builds."""
        compatibility = config.hardware_compatibility_level
        self.note("level", config.builder_optimization_level)
        self.note("hardware", compatibility.name if compatibility else None)
        self.note("verbosity", config.profiling_verbosity.name)
        self.note("serialized", [Path(path).name for path in config.plugins_to_serialize or ()])
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 3)
        monitor.phase_start("Timing", "Building", 2)
        for step in range(3):
            if not monitor.step_complete("Building", step):
                return None
        if self.interrupts:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C, while TensorRT is at work
            deadline = time.monotonic() + 20
            while monitor.step_complete("Timing", 0):
                assert time.monotonic() < deadline, "the build was not cancelled"
                time.sleep(0.01)
            return None
        monitor.phase_finish("Timing")
        monitor.phase_finish("Building")
        return None if self.fails else b"engine of " + trt.__version__.encode()

    def parser(self, network, logger):
        errors = [
            fake(trt.ParserError, node_name=lambda: "conv", node_operator=lambda: "Conv", desc=lambda text=text: text)
            for text in self.errors
        ]

        def parse(path):
            self.note("parsed", Path(path).name)
            return not errors

        return fake(
            REAL.OnnxParser, parse_from_file=parse, num_errors=len(errors), get_error=lambda index: errors[index]
        )

    def runtime(self, logger):
        def engine(data):
            self.note("deserialized", len(data))
            names = ["image", "result"]
            layers = [
                {
                    "Name": "fused",
                    "Inputs": [{"Name": "image", "Format/Datatype": self.inspected["image"]}],
                    "Outputs": [
                        {"Name": name, "Format/Datatype": text}
                        for name, text in self.inspected.items()
                        if name != "image"
                    ],
                }
            ]
            inspector = fake(trt.EngineInspector, get_engine_information=lambda form: json.dumps({"Layers": layers}))
            return fake(
                trt.ICudaEngine,
                num_io_tensors=2,
                get_tensor_name=lambda index: names[index],
                get_tensor_dtype=lambda name: trt.DataType.FLOAT,
                get_tensor_mode=lambda name: trt.TensorIOMode.INPUT if name == "image" else trt.TensorIOMode.OUTPUT,
                get_tensor_shape=lambda name: (-1, 3, -1, -1),
                num_optimization_profiles=2,
                get_tensor_profile_shape=lambda name, index: (
                    [(1, 3, 8 + 32 * index, 8)] + [(4, 3, 32 + 32 * index, 32)] * 2
                ),
                create_engine_inspector=lambda: inspector,
            )

        return fake(REAL.Runtime, deserialize_cuda_engine=engine)

    def registry(self):
        return fake(trt.IPluginRegistry, load_library=lambda path: self.note("library", Path(path).name))

    def __enter__(self):
        self.patches = [
            mock.patch.object(trt, "Builder", constructor(REAL.Builder, self.builder)),
            mock.patch.object(trt, "OnnxParser", constructor(REAL.OnnxParser, self.parser)),
            mock.patch.object(trt, "Runtime", constructor(REAL.Runtime, self.runtime)),
            mock.patch.object(trt, "get_plugin_registry", self.registry),
            mock.patch("edgeattn.export.engine.machine.local_gpu", return_value=HERE),
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def refused(work):
    """Return the message of the refusal."""
    try:
        work()
    except UserError as error:
        return str(error)
    return None


FP32 = {"image": "FLOAT", "inner": "FLOAT", "result": "FLOAT"}
SPELLED = {"image": "Row major linear FP32", "inner": "Float", "result": "Row major linear FP32"}


def walk(folder: Path) -> dict:
    """Build in many ways and return what happened."""
    found: dict = {}
    folder.mkdir(parents=True, exist_ok=True)
    model = write_model(folder / "model.onnx")
    library = folder / "libplugin.so"
    library.write_bytes(b"library")
    options = ProfileOptions(
        optimum=("image:1x3x16x16", "image:2x3x48x48"),
        minimum=("image:1x3x8x8", "image:1x3x40x8"),
        maximum=("image:4x3x32x32", "image:4x3x64x64"),
    )
    newer = release_of(trt.__version__) >= (10, 9)
    thorough = Configuration(
        profiles=profiles_of(model, options),
        plugins=(library,),
        workspace_mib=512,
        builder_level=4,
        version_compatible=True,
        hardware_compatible="same-compute-capability" if newer else "ampere-plus",
        refit=True,
    )
    common = {"model": model, "output": folder / "model.engine", "timing_cache": folder / "timing"}
    request = BuildRequest(**common, configuration=thorough)
    phases: list = []
    with Device(FP32, SPELLED) as device:
        result = build.build_engine(request, lambda *step: phases.append(step))
        found["first"] = {"reasons": result.reasons, "record": result.record, "asked": device.asked, "phases": phases}
        found["again"] = build.build_engine(request).reasons
        library.write_bytes(b"another library")
        found["plugin changed"] = build.build_engine(request).reasons
        with mock.patch("edgeattn.export.engine.machine.local_gpu", return_value=Gpu("Fake", 87, "550.1, CUDA 12.6")):
            found["driver changed"] = build.build_engine(request).reasons
        (folder / "model.engine").write_bytes(b"tampered")
        found["tampered"] = build.build_engine(request).reasons
        found["files"] = sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")

    plain = Configuration(profiles=thorough.profiles, tf32=True)
    half = BuildRequest(
        **{**common, "output": folder / "half.engine"}, configuration=plain, precision=PrecisionOptions(fp16=True)
    )
    types = {"image": "FLOAT", "image_fp16": "HALF", "inner": "HALF", "result_fp16": "HALF", "result": "FLOAT"}
    with Device(types, {**SPELLED, "inner": "Row major linear FP16 format"}) as device:
        result = build.build_engine(half)
        found["half"] = {
            "precision": result.record["precision"],
            "asked": device.asked,
            "graph": result.record["graph"],
        }
    with Device({**types, "inner": "FLOAT"}, {**SPELLED, "inner": "Float"}):
        result = build.build_engine(BuildRequest(**{**vars(half), "force": True}))
        found["wrong precision"] = result.record["precision"]

    with Device(FP32, SPELLED, errors=["unsupported padding"]):
        found["refused"] = refused(lambda: build.build_engine(BuildRequest(**common, configuration=plain)))
    with Device(FP32, SPELLED, fails=True):
        found["failed"] = refused(lambda: build.build_engine(BuildRequest(**common, configuration=plain)))
    written = write_model(folder / "attention.onnx", plugin=True)
    with_plugins = BuildRequest(
        **{**common, "model": written, "output": folder / "plugin.engine"}, configuration=thorough
    )
    with Device(FP32, SPELLED):
        found["no plugin layer"] = refused(lambda: build.build_engine(with_plugins))
    with Device(FP32, SPELLED, plugins=1):
        found["plugin layer"] = build.build_engine(with_plugins).record["precision"]["verdict"]
    with mock.patch("edgeattn.export.engine.machine.local_gpu", return_value=HERE):
        found["no builder"] = refused(lambda: build.build_engine(BuildRequest(**common, configuration=plain)))
    cancelled = BuildRequest(**{**common, "timing_cache": folder / "cancelled"}, configuration=plain)
    before = (folder / "model.engine").read_bytes()
    with Device(FP32, SPELLED, interrupts=True):
        try:
            build.build_engine(cancelled)
        except BuildCancelled:
            kept = [path.read_bytes().decode() for path in (folder / "cancelled").glob("*.cache")]
            found["cancelled"] = {"engine kept": (folder / "model.engine").read_bytes() == before, "caches": kept}

    def broken(*step):
        raise RuntimeError("the terminal is gone")

    with Device(FP32, SPELLED):
        try:
            build.build_engine(cancelled, broken)
        except RuntimeError as error:
            found["broken progress"] = str(error)
    found["runner"] = walk_runner(folder, half, types)
    return found


def walk_runner(folder: Path, request: BuildRequest, types) -> dict:
    """Activate the runner, choose profiles, and refuse engines of other machines."""
    machine = Machine(trt.__version__, HERE)
    engine = folder / "half.engine"
    found: dict = {}
    runner = engine_runner.EngineRunner(engine, machine=lambda: machine)
    inner = mock.Mock()
    inner.last_inference_time.return_value = 0.001
    inner.infer.return_value = {"result": numpy.zeros((1, 4, 8, 8), numpy.float32)}
    with Device(types, SPELLED) as device, mock.patch.object(engine_runner, "TrtRunner") as made:
        made.return_value = inner
        inner.engine = device.runtime(None).deserialize_cuda_engine(b"x")
        with runner:
            found["measured"] = runner.description.measured
            form = runner.description.graph
            facts = runners.facts_of(load_model(form), form)
            sample = {"image": numpy.zeros((1, 3, 8, 8), numpy.float32)}
            with runners.onnx_runner(form, facts) as other_runner:
                outputs = [
                    {name: array.shape for name, array in each.infer(runners.feed_for(each, facts, sample)).items()}
                    for each in (runner, other_runner)
                ]
            found["same outputs"] = outputs[0] == outputs[1]
            found["accepts"] = runners.accepts(runner, sample)
            metadata = runner.get_input_metadata(use_numpy_dtypes=False)
            found["inputs"] = {name: [entry.dtype.name, list(entry.shape)] for name, entry in metadata.items()}
            for height in (16, 48):
                runner.infer({"image": numpy.zeros((1, 3, height, 8), numpy.float32)})
            found["profiles set"] = [call.args[0] for call in inner.set_profile.call_args_list]
            found["too large"] = refused(lambda: runner.infer({"image": numpy.zeros((1, 3, 500, 8), numpy.float32)}))
    other = Machine(trt.__version__, Gpu("Other", 90, HERE.driver))
    found["other machine"] = refused(lambda: engine_runner.describe_engine(engine, other))
    graph = folder / "half.engine.onnx"
    content = graph.read_bytes()
    graph.write_bytes(b"another graph")
    found["another graph"] = refused(lambda: engine_runner.describe_engine(engine, machine))
    graph.write_bytes(content)
    engine.write_bytes(b"tampered")
    found["tampered"] = refused(lambda: engine_runner.describe_engine(engine, machine))
    found["missing"] = refused(lambda: engine_runner.describe_engine(folder / "no.engine", machine))
    return found


if __name__ == "__main__":
    # A background job of a shell begins with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.write("\n" + json.dumps(walk(Path(sys.argv[1])), default=str) + "\n")
