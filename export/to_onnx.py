"""From a torch module to ONNX, attention cores as nodes of domain `edgeattn`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx
import torch
from torch import nn

from edgeattn.export.exact_rules import make_no_op_rules_exact
from edgeattn.export.metadata import NAME_SCOPES
from edgeattn.export.opaque import hide_cores, translation_table
from edgeattn.export.opsets import DEFAULT_OPSET, IR_VERSION
from edgeattn.export.surgery import attach_plugins, fold_conv_batchnorm
from edgeattn.foundation import UserError

_OPSETS = range(18, 23)  # 23 brings Attention and RMSNormalization, which TensorRT's parser up to 10.10 rejects


def prepare_for_export(model: nn.Module) -> nn.Module:
    """Return a copy of a model in evaluation mode with every exact folding done that a block declares.

    A module with a `prepare_for_export` method is replaced by what it returns, innermost first. The given model and
    its parameters are left alone.
    """
    prepared = copy.deepcopy(model).eval()
    for parent in reversed(list(prepared.modules())):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _folded(child))
    return _folded(prepared).eval()


def _folded(module: nn.Module) -> nn.Module:
    """Return what a module declares as its exact folding, or the module itself."""
    fold: Callable[[nn.Module], nn.Module] | None = getattr(type(module), "prepare_for_export", None)
    return fold(module) if fold else module


class _Refusals:
    """Remembers the error with which a block refused its input.

    After an error, torch's exporter traces the model again by a method that sees dynamic sizes as plain integers.
    """

    def __init__(self) -> None:
        self.first: UserError | None = None

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise the refusal, also when the exporter went on without it."""
        try:
            yield
        finally:
            if self.first is not None:
                raise self.first from None


class _Selected(nn.Module):
    """Calls a method of a model and returns chosen outputs, so that the rest is never exported."""

    def __init__(self, model: nn.Module, method: str, chosen: Sequence[int] | None) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.chosen = chosen
        self.refusals = _Refusals()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            result = getattr(self.model, self.method)(*inputs)
        except UserError as error:
            self.refusals.first = self.refusals.first or error
            raise
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        return tuple(outputs if self.chosen is None else (outputs[index] for index in self.chosen))


def to_onnx(
    model: nn.Module,
    example: Sequence[torch.Tensor],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    outputs: Sequence[int] | None = None,
    dynamic_axes: Sequence[Mapping[int, str]] | None = None,
    opset: int = DEFAULT_OPSET,
    method: str = "forward",
) -> onnx.ModelProto:
    """Export a model in its plugin form.

    Args:
        model: any module; blocks inside it are prepared (folded) on a copy.
        example: one tensor per input of the method, in order.
        input_names: ONNX names of the inputs.
        output_names: ONNX names of the outputs that are kept.
        outputs: indices of the model's outputs that are kept; all when None.
        dynamic_axes: per input, the axes that may vary with their names; equal names are equal sizes. Static when
            None. An axis whose example size is 1 should not be dynamic; use 2 or more in the example.
        opset: version of the standard operators, 18 to 22.
        method: what to call on the model.

    Returns:
        A checked ONNX model in which every attention core is one node of domain `edgeattn` with its local function,
        every node carries the path of the torch module it came from in its metadata, and every inference
        BatchNormalization is folded into its convolution.

    Raises:
        UserError: an opset outside the range, names that do not match the tensors, or a dynamic axis that a block's
            mathematics fixes.
    """
    if opset not in _OPSETS:
        raise UserError(
            f"opset {opset} is not supported. Use {_OPSETS[0]} to {_OPSETS[-1]}; {DEFAULT_OPSET} suits all."
        )
    if len(input_names) != len(example):
        raise UserError(f"{len(input_names)} input names were given for {len(example)} example inputs: {input_names}.")
    # torch.export takes one tensor given twice for one input.
    example = [tensor.clone() for tensor in example]
    wrapped = _Selected(hide_cores(prepare_for_export(model)), method, outputs)
    dynamic = None if dynamic_axes is None else (tuple(dict(axes) for axes in dynamic_axes),)
    with torch.no_grad():
        produced = wrapped(*example)  # registers the opaque operators
    if len(produced) != len(output_names):
        raise UserError(f"the model gives {len(produced)} outputs, but these names were given: {list(output_names)}.")
    make_no_op_rules_exact()
    with _quiet(), wrapped.refusals.raised(), torch.no_grad():
        program = torch.onnx.export(
            wrapped,
            tuple(example),
            dynamo=True,
            opset_version=opset,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic,
            custom_translation_table=translation_table(),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    finished = attach_plugins(fold_conv_batchnorm(_drop_wrapper_scope(proto)))
    # ONNX Runtime's peak memory while it loads is lower, by up to the largest constant, when small ones come first.
    finished.graph.initializer.sort(key=lambda tensor: tensor.ByteSize())
    return finished


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's progress messages; its errors still propagate."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _drop_wrapper_scope(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the output selector's "model." from the module paths, so that they are the user's own."""
    for node in model.graph.node:
        for entry in node.metadata_props:
            if entry.key == NAME_SCOPES:
                entry.value = entry.value.replace("'model.", "'").replace("'model'", "''").replace("'', '', ", "'', ")
    return model
