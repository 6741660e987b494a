"""Times ours beside torch eager, `torch.compile` and SDPA, and measures the two ceilings of the roofline.

Every contestant computes the operation on the same inputs and is compared with FP64 too. Memory is the peak that a call
takes beside its inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu import clock
from gpu.bars import MACHINE, PLUGIN
from gpu.cases import LIMITS, Case, Record, Settings
from gpu.data import device_of, errors_of, layouts_of, random_inputs, sizes_for, sm_of
from gpu.operations import PUBLISHED, SDPA, as_tuple, core_of, reference_of
from gpu.workloads import BAR_ELEMENT, DRY_WORKLOADS, WORKLOADS, Workload

from edgeattn.plugins_trt import PLUGINS, PluginSpec
from edgeattn.plugins_trt.spec import ELEMENT_BYTES
from edgeattn.plugins_trt.torch_host import run as run_kernels
from edgeattn.plugins_trt.variants import cost_of

COMPILE_SECONDS = 100.0
"""Time that one compilation with its measurement may take."""

MATRIX_SIDE = 8192
COPY_BYTES = 2**32


@dataclass(frozen=True)
class Contestant:
    """One way to compute an operation.

    Attributes:
        name: what the bars call it.
        build: for an operation and a layout, a function of the operation's inputs; None where there is none.
        mode: mode of `torch.compile`; None where nothing is compiled.
        graph: whether its calls can be captured in a CUDA graph of ours.
        layouts: only these, of those that the operation has; all when None.
        turn: the lower, the earlier it runs; other data types than the bars' wait two turns more.
    """

    name: str
    build: Callable[[PluginSpec, str, Settings], Callable[..., Any] | None]
    mode: str | None = None
    graph: bool = True
    layouts: tuple[str, ...] | None = None
    turn: int = 0


def plugin_call(spec: PluginSpec, layout: str, settings: Settings) -> Callable[..., Any]:
    """Return a function of the operation's inputs that runs its kernels."""
    names = [tensor.name for tensor in spec.inputs]
    sm = sm_of(settings)
    return lambda *tensors: run_kernels(spec, dict(zip(names, tensors, strict=True)), layout=layout, sm=sm)


def _published(spec: PluginSpec, layout: str, settings: Settings) -> Callable[..., Any] | None:
    return PUBLISHED.get(spec.op_type)


def _sdpa(spec: PluginSpec, layout: str, settings: Settings) -> Callable[..., Any] | None:
    return SDPA.get(spec.op_type)


def _core(spec: PluginSpec, layout: str, settings: Settings) -> Callable[..., Any]:
    return core_of(spec)


CONTESTANTS = (
    Contestant(PLUGIN, plugin_call),
    Contestant("torch eager", _published),
    Contestant("scaled_dot_product_attention", _sdpa),
    # The same code twice: with torch's own CUDA graph, and without one, which our graph can then capture.
    Contestant("torch.compile", _published, "max-autotune-no-cudagraphs", layouts=("linear",), turn=1),
    Contestant("torch.compile", _published, "max-autotune", graph=False, layouts=("linear",), turn=3),
    Contestant("torch.compile", _published, "max-autotune-no-cudagraphs", layouts=("channels-last",), turn=4),
    Contestant("torch.compile of the block's core", _core, "max-autotune-no-cudagraphs", layouts=("linear",), turn=4),
)


def plan(settings: Settings, records: Sequence[Record]) -> list[Case]:
    """Return the machine's case, then every contestant at every workload; what bars need comes first."""
    cases = [Case(MACHINE)]
    runs = [
        (workload, element, index, layout)
        for workload in _workloads(settings)
        if workload.operation in PLUGINS and PLUGINS.get(workload.operation).launches
        for element in workload.elements
        for index, contestant in enumerate(CONTESTANTS)
        for layout in contestant.layouts or layouts_of(PLUGINS.get(workload.operation))
        if layout in layouts_of(PLUGINS.get(workload.operation))
        and contestant.build(PLUGINS.get(workload.operation), layout, settings) is not None
    ]
    runs.sort(key=lambda run: CONTESTANTS[run[2]].turn + 2 * (run[1] != BAR_ELEMENT))
    for workload, element, index, layout in runs:
        mode = CONTESTANTS[index].mode
        cases.append(
            Case(
                f"{workload.name}, {element}: {CONTESTANTS[index].name}{f' {mode}' if mode else ''}, {layout}",
                COMPILE_SECONDS if mode else 45.0,
                {"workload": workload.name, "element": element, "contestant": index, "layout": layout},
            )
        )
    return cases


def _workloads(settings: Settings) -> tuple[Workload, ...]:
    return DRY_WORKLOADS if settings.dry else WORKLOADS


def run(case: Case, settings: Settings) -> Iterator[Record]:
    """Yield the measurement of one contestant, or of the machine."""
    if case.name == MACHINE:
        yield machine(settings)
        return
    chosen = case.parameters
    workload = next(workload for workload in _workloads(settings) if workload.name == chosen["workload"])
    yield measure(workload, chosen["element"], CONTESTANTS[chosen["contestant"]], chosen["layout"], settings)


def machine(settings: Settings) -> Record:
    """Measure the memory bandwidth with a large copy and the matrix rates with a large product."""
    device = device_of(settings)
    count = 2**16 if settings.dry else COPY_BYTES // 4
    source = torch.empty(count, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)

    buffers = [(target, source)]
    clock.warm_up(torch.Tensor.copy_, buffers, settings)
    copied = clock.time_calls(torch.Tensor.copy_, buffers, settings, runs=30)
    del source, target, buffers
    side = 64 if settings.dry else MATRIX_SIDE
    rates = {}
    for element in ELEMENT_BYTES:
        left, right = (torch.randn(side, side, device=device).to(getattr(torch, element)) for _ in range(2))
        clock.warm_up(torch.matmul, [(left, right)], settings)
        taken = clock.time_calls(torch.matmul, [(left, right)], settings, runs=15)
        rates[element] = 2 * side**3 / (1e-6 * taken.median)
    return {
        "status": "ok",
        "bytes_per_second": 8 * count / (1e-6 * copied.median),
        "copied_bytes": 4 * count,
        "flops_per_second": rates,
        "matrix_side": side,
        "l2_bytes": clock.l2_bytes(settings),
    }


def measure(workload: Workload, element: str, contestant: Contestant, layout: str, settings: Settings) -> Record:
    """Time one contestant, check its result and take its memory."""
    spec = PLUGINS.get(workload.operation)
    sizes = sizes_for(spec, batch=workload.batch, static=workload.static, a=workload.a, b=workload.b)
    named = random_inputs(spec, sizes, element, layout, settings)
    inputs = tuple(named[tensor.name] for tensor in spec.inputs)
    function = contestant.build(spec, layout, settings)
    assert function is not None
    record: Record = {
        "workload": workload.name,
        "operation": spec.name,
        "element": element,
        "contestant": contestant.name,
        "layout": layout,
        "mode": contestant.mode,
        "sizes": sizes,
        "cost": asdict(cost_of(spec, element, sm_of(settings), sizes)),
    }
    if contestant.mode is not None:
        function, record["compile_seconds"] = compiled(function, contestant.mode, inputs, settings)
    result = as_tuple(function(*inputs))
    record["relative_l2"] = errors_of(result, reference_of(spec, named))
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in result)
    record["outputs_bytes"] = outputs
    record["lse_bytes"] = sum(4 * tensor.numel() // tensor.shape[1] for tensor in result)
    del result, named
    sets = clock.copies_of(inputs, outputs, settings)
    record["copies"] = len(sets)
    clock.warm_up(function, sets, settings)
    record["calls"] = asdict(clock.time_calls(function, sets, settings, keep=contestant.graph))
    record["calls_warm_l2"] = asdict(clock.time_calls(function, sets[:1], settings, keep=contestant.graph))
    record["extra_memory"] = clock.extra_memory(function, inputs, settings)
    if contestant.graph:
        record["graph"] = asdict(clock.time_graph(function, sets, settings))
        warm = clock.WARM_CALLS_PER_GRAPH
        record["graph_warm_l2"] = asdict(clock.time_graph(function, sets[:1], settings, repeats=warm))
    # Only ours has to be right: what others compute in 16 bits is theirs to answer for, and on record.
    wrong = contestant.name == PLUGIN and max(record["relative_l2"]) > LIMITS[element]
    return {"status": "failed" if wrong else "ok", **record}


def compiled(
    function: Callable[..., Any], mode: str, inputs: Sequence[torch.Tensor], settings: Settings
) -> tuple[Callable[..., Any], float]:
    """Compile with `torch.compile` and return the function with the seconds that its first two calls took."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager"} if settings.dry else {"mode": mode}
    inner = torch.compile(function, fullgraph=True, dynamic=False, **options)

    def call(*tensors: torch.Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return inner(*tensors)

    started = time.perf_counter()
    for _ in range(2):
        call(*inputs)
    if not settings.dry:
        torch.cuda.synchronize()
    return call, time.perf_counter() - started
