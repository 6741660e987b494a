"""Optimisation profiles: trtexec's syntax, named axes, and what is refused."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from edgeattn.export.engine.profiles import (
    ProfileOptions,
    input_axes,
    make_profiles,
    parse_shapes,
    shapes_text,
)
from edgeattn.foundation import UserError

INPUTS = {"image": ("batch", 3, "height", "width"), "mask": ("batch", "height", "width"), "scale": (1,)}


def model_of(inputs: dict[str, tuple | None]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    first = values[0].name
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", [first], ["y"])], "g", values, [output])
    return helper.make_model(graph)


def test_axes_are_read_from_the_model() -> None:
    model = model_of({"image": ("batch", 3, None, 8)})
    assert input_axes(model) == {"image": ("batch", 3, "?", 8)}


def test_an_input_without_a_shape_is_refused() -> None:
    with pytest.raises(UserError, match="'image' of the ONNX model has no shape"):
        input_axes(model_of({"image": None}))


def test_shapes_in_trtexec_syntax() -> None:
    assert parse_shapes("image:1x3x64x64,'a:b':5") == {"image": (1, 3, 64, 64), "a:b": (5,)}


@pytest.mark.parametrize(
    "text", ["", "image", "image:", "image:1x", "image:axb", "image:1x2,image:1x2", ":1x2", "x:-1"]
)
def test_malformed_shapes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="Write them so"):
        parse_shapes(text)


def test_usual_shapes_stand_in_for_the_others() -> None:
    (profile,) = make_profiles(INPUTS, ProfileOptions(optimum=("image:1x3x64x64,mask:1x64x64",)))
    assert [entry.name for entry in profile] == ["image", "mask"]
    assert profile[0].shapes == ((1, 3, 64, 64),) * 3


def test_axes_are_ranges_for_all_inputs() -> None:
    options = ProfileOptions(axes=("batch=1:1:4", "height=32:64:128", "width=32:96:128"))
    (profile,) = make_profiles(INPUTS, options)
    assert profile[0].shapes == ((1, 3, 32, 32), (1, 3, 64, 96), (4, 3, 128, 128))
    assert profile[1].shapes == ((1, 32, 32), (1, 64, 96), (4, 128, 128))
    assert shapes_text(profile, 2) == "image:4x3x128x128,mask:4x128x128"
    assert parse_shapes(shapes_text(profile, 0)) == {"image": (1, 3, 32, 32), "mask": (1, 32, 32)}


def test_several_profiles() -> None:
    inputs = {"image": ("batch", 3, 8, 8)}
    options = ProfileOptions(("image:1x3x8x8", "image:5x3x8x8"), ("image:2x3x8x8", "image:8x3x8x8"))
    small, large = make_profiles(inputs, options)
    assert small[0].shapes == ((1, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8))
    assert large[0].minimum == (5, 3, 8, 8)


def test_a_fixed_model_needs_no_profile() -> None:
    assert make_profiles({"image": (1, 3, 8, 8)}, ProfileOptions(optimum=("image:1x3x8x8",))) == ()
    assert make_profiles({"image": (1, 3, 8, 8)}, ProfileOptions()) == ()


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (INPUTS, ProfileOptions(), r"--axis batch=MIN:OPT:MAX --axis height=MIN:OPT:MAX --axis width=MIN:OPT:MAX"),
        ({"x": ("?", 3)}, ProfileOptions(), r"--opt-shapes x:Nx3"),
        ({"x": (1, 3)}, ProfileOptions(axes=("n=1:1:1",)), "no dynamic axis"),
        ({"x": (1, 3)}, ProfileOptions(optimum=("x:2x3",)), "does not fit"),
        ({"x": ("n", 3)}, ProfileOptions(optimum=("x:1x3",), axes=("n=1:1:1",)), "one or the other"),
        ({"x": ("n", 3)}, ProfileOptions(optimum=("y:1x3",)), "the model's inputs are x"),
        ({"x": ("n", 3)}, ProfileOptions(optimum=("x:1x4",)), "takes nx3"),
        ({"x": ("n", 3)}, ProfileOptions(optimum=("x:1x3x1",)), "takes nx3"),
        ({"x": ("n",), "y": ("n",)}, ProfileOptions(optimum=("x:1",)), "'y' has dynamic axes"),
        ({"x": ("n", 3)}, ProfileOptions(("x:2x3",), ("x:1x3",)), "out of order: 2x3 <= 1x3 <= 1x3"),
        ({"x": ("n", 3)}, ProfileOptions(optimum=("x:0x3",)), "from 1 up"),
        ({"x": ("n", 3)}, ProfileOptions(("x:1x3",) * 2, ("x:1x3",)), "Each profile takes one of each"),
        ({"x": ("n", "m")}, ProfileOptions(axes=("n=1:2:3",)), "'m' has no range"),
        ({"x": ("n", "m")}, ProfileOptions(axes=("k=1:2:3",)), "dynamic axes are m, n"),
        ({"x": ("n",)}, ProfileOptions(axes=("n=1:2:3", "n=1:2:3")), "none that is left"),
        ({"x": ("n",)}, ProfileOptions(axes=("n=1:2",)), "NAME=MIN:OPT:MAX"),
        ({"x": ("n",)}, ProfileOptions(axes=("n=4:2:8",)), "out of order"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(inputs, options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_profiles(inputs, options)
