"""Checkpoints: every published container is read, no code runs, and every key is accounted for."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeattn.foundation import UserError
from edgeattn.models import MODELS
from edgeattn.models.checkpoint import (
    CheckpointMismatchError,
    LoadReport,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from edgeattn.models.load_report import explain

LISTINGS = Path(__file__).parents[1] / "data" / "state_dicts"


class Attention(nn.Module):
    """A small module with the kinds of entries that checkpoints differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv = nn.Conv2d(8, 1, 1)
        self.bn = nn.BatchNorm2d(8)


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A checkpoint of the module, with other values."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.tensor(7)
        for key, tensor in Attention().state_dict().items()
    }


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert torch.equal(actual[key], tensor), key


def one_paragraph(error: pytest.ExceptionInfo[UserError], *parts: object) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert str(part) in message
    return message


# Reading


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"net": {"model": s}, "epoch": 3}]
)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, state, wrap, prefix, zipped):
    path = tmp_path / "weights.pth"
    content = wrap({f"{prefix}{key}": tensor for key, tensor in state.items()})
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_equal(read_checkpoint(path), state)


def test_what_lies_beside_the_state_dict_is_ignored(tmp_path, model, state):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {"model": state, "optimizer": optimiser.state_dict(), "epoch": 12, "args": {"lr": 0.1}, "best": None}
    torch.save(content, tmp_path / "last.pt")
    assert_equal(read_checkpoint(tmp_path / "last.pt"), state)


def test_parameters_come_back_as_plain_tensors(tmp_path, model):
    torch.save(dict(model.named_parameters()), tmp_path / "weights.pth")
    assert all(type(tensor) is torch.Tensor for tensor in read_checkpoint(tmp_path / "weights.pth").values())
    assert not any(tensor.requires_grad for tensor in read_checkpoint(tmp_path / "weights.pth").values())


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights"])
def test_safetensors_are_told_by_content(tmp_path, state, name):
    safetensors.torch.save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / name)
    assert_equal(dict(sorted(read_checkpoint(tmp_path / name).items())), dict(sorted(state.items())))


def test_a_prefix_that_not_all_keys_share_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pth")
    assert_equal(read_checkpoint(tmp_path / "weights.pth"), state)


def test_a_key_that_is_only_a_prefix_stays(tmp_path):
    state = {"module.": torch.ones(1), "module.a": torch.ones(2)}
    torch.save(state, tmp_path / "weights.pth")
    assert_equal(read_checkpoint(tmp_path / "weights.pth"), state)


def test_nan_is_data(tmp_path):
    torch.save({"a": torch.tensor([float("nan"), float("inf")])}, tmp_path / "weights.pth")
    assert read_checkpoint(tmp_path / "weights.pth")["a"].isnan().tolist() == [True, False]


KEYS = st.text(alphabet="abcm.{}é\n_0", min_size=1, max_size=8)


@given(
    keys=st.lists(KEYS, min_size=1, max_size=6, unique=True),
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3),
    containers=st.lists(st.sampled_from(["state_dict", "model_state_dict", "model", "net"]), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_any_wrapping_reads_back(tmp_path_factory, keys, prefixes, containers, dtype, shape):
    state = {key: torch.full(shape, number).to(dtype) for number, key in enumerate(keys)}
    content = {"".join(prefixes) + key: tensor for key, tensor in state.items()}
    for container in containers:
        content = {container: content, "epoch": 1}
    path = tmp_path_factory.mktemp("wrapping") / "weights.pth"
    torch.save(content, path)
    assert_equal(read_checkpoint(path), state)


# Reading what is no checkpoint


class Hostile:
    """Pickles to a call of os.system that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("forced", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, zipped, forced):
    if forced:  # an environment variable must not open the door
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof, path = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"state_dict": {"a": torch.ones(1)}, "extra": Hostile(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    one_paragraph(error, path, "system", "safetensors")
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file does what this test says it does
    assert proof.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_bare_pickle_never_runs(tmp_path, protocol):
    proof, path = tmp_path / "ran", tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Hostile(proof), protocol=protocol))
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    one_paragraph(error, path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()


def test_code_in_a_legacy_tar_never_runs(tmp_path):
    proof, path = tmp_path / "ran", tmp_path / "weights.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(Hostile(proof))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    one_paragraph(error, path, "tar archive")
    assert not proof.exists()


def torch_bytes(content: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def zip_bytes() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("notes.txt", "no checkpoint")
    return stream.getvalue()


WEIGHTS = {"a": torch.arange(1000.0)}
LOOP: dict[str, object] = {}
LOOP["model"] = LOOP
BAD_FILES = {
    "empty": (b"", "is empty"),
    "page": (b"<!DOCTYPE html><html><title>404</title></html>", "web page"),
    "page after blanks": (b"\n  <html>", "web page"),
    "text": (b"epoch 1: mIoU 0.8\n", "is text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "noise": (bytes(range(255, 100, -1)), "is not a checkpoint"),
    "zip": (zip_bytes(), "truncated or damaged"),
    "cut zip": (torch_bytes(WEIGHTS)[:1500], "truncated or damaged"),
    "cut zip tail": (torch_bytes(WEIGHTS)[:-30], "truncated or damaged"),
    "cut pickle": (torch_bytes(WEIGHTS, zipped=False)[:1500], "truncated or damaged"),
    "cut safetensors": (safetensors.torch.save(WEIGHTS)[:-1], "not a complete safetensors file"),
    "module": (torch_bytes(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "arguments": (torch_bytes({"state_dict": WEIGHTS, "args": argparse.Namespace(a=1)}), "argparse.Namespace"),
    "list": (torch_bytes([torch.ones(1)]), "type list"),
    "number": (torch_bytes(3), "type int"),
    "no tensors": (torch_bytes({}), "no tensors"),
    "no tensors inside": (torch_bytes({"state_dict": {}}), "no tensors"),
    "mixed": (torch_bytes({"a": torch.ones(1), "lr": 0.1, "name": "x"}), "lr (float), name (str)"),
    "unknown container": (torch_bytes({"weights": WEIGHTS, "epoch": 1}), "weights (dict), epoch (int)"),
    "keys": (torch_bytes({1: torch.ones(1)}), "1 (Tensor)"),
    "sparse": (torch_bytes({"a": torch.eye(3).to_sparse()}), "a (Tensor)"),
    "two": (torch_bytes({"model": WEIGHTS, "state_dict": WEIGHTS}), "several state_dicts: state_dict, model"),
    "loop": (torch_bytes(LOOP), "nests more than"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path, name):
    content, reason = BAD_FILES[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    message = one_paragraph(error, path, reason)
    assert "weights_only" not in message  # torch's own hint would open the door


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    program = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    program.save(str(tmp_path / "model.pt"))
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "model.pt")
    one_paragraph(error, "TorchScript")


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "absent.pth",
        tmp_path / "absent" / "weights.pth",
        Path(os.devnull),
    ):
        with pytest.raises(UserError) as error:
            read_checkpoint(path)
        one_paragraph(error, path)


@given(cut=st.integers(0, 2000), flip=st.integers(0, 2000), zipped=st.booleans())
@settings(max_examples=60, deadline=None)
def test_damage_never_escapes_as_another_error(tmp_path_factory, cut, flip, zipped):
    content = bytearray(torch_bytes({"a": torch.ones(3)}, zipped))
    content[flip % len(content)] ^= 0xFF
    path = tmp_path_factory.mktemp("damage") / "weights.pth"
    path.write_bytes(content[: len(content) - cut])
    try:
        tensors = read_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017 - damage in unread bytes is no error
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


# Loading


def test_everything_is_used(model, state):
    report = load_checkpoint(model, state)
    assert_equal(dict(model.state_dict()), state)
    assert report == LoadReport(used=list(state))
    assert report.summary() == "8 used"


def test_absent_counters_are_tolerated_and_listed(model, state):
    model.bn.num_batches_tracked.fill_(5)
    del state["bn.num_batches_tracked"]
    report = load_checkpoint(model, state)
    assert list(report.ignored) == ["bn.num_batches_tracked"]
    assert "bn.num_batches_tracked" not in report.used
    assert model.bn.num_batches_tracked == 5
    assert torch.equal(model.bn.running_mean, state["bn.running_mean"])


def test_mmcv_names_and_shapes(state):
    """mmcv's criss-cross attention, by its listing, into a module with the official listing."""
    published = json.loads((LISTINGS / "mmcv_cca.json").read_text())["keys"]
    official = json.loads((LISTINGS / "ccnet_cca.json").read_text())["keys"]
    model = nn.Module()
    model.gamma = nn.Parameter(torch.zeros(official["gamma"]))
    for name, outputs in (("query_conv", 64), ("key_conv", 64), ("value_conv", 512)):
        model.add_module(name, nn.Conv2d(512, outputs, 1))
    state = {key: torch.full(shape, 0.5) for key, shape in published.items()}
    report = load_checkpoint(model, state, key_map={r"gamma\.scale$": "gamma"})
    assert report.renamed == {"gamma.scale": "gamma"}
    assert report.reshaped == {"gamma": ([], [1])}
    assert report.used == list(model.state_dict())
    assert model.gamma.tolist() == [0.5]


def test_a_vector_of_one_fills_a_scalar():
    model = nn.Module()
    model.gamma = nn.Parameter(torch.zeros(()))
    report = load_checkpoint(model, {"gamma": torch.tensor([2.0])})
    assert report.reshaped == {"gamma": ([1], [])}
    assert model.gamma.item() == 2.0


def test_the_first_pattern_found_rewrites_what_it_matches(model, state):
    published = {f"decode_head.{key.replace('bn', 'norm')}": tensor for key, tensor in state.items()}
    published["auxiliary_head.conv.weight"] = torch.ones(3)
    key_map = {r"^auxiliary_head\..*": "", r"^decode_head\.norm\.": "bn.", r"^decode_head\.": "", r"^gamma": "delta"}
    report = load_checkpoint(model, published, key_map=key_map)
    assert_equal(dict(model.state_dict()), state)
    assert report.renamed["decode_head.norm.weight"] == "bn.weight"
    assert report.renamed["decode_head.gamma"] == "gamma"
    assert list(report.ignored) == ["auxiliary_head.conv.weight"]
    assert report.summary() == "8 used, 8 renamed, 1 ignored"


def test_groups_in_templates(model, state):
    published = {key.replace("bn.", "0.bn."): tensor for key, tensor in state.items()}
    load_checkpoint(model, published, key_map={r"^\d+\.(bn)\.(.*)$": r"\1.\2"})
    assert_equal(dict(model.state_dict()), state)


def test_a_pattern_rewrites_once():
    model = nn.Module()
    model.b = nn.Module()
    model.b.a = nn.Parameter(torch.zeros(2))
    assert load_checkpoint(model, {"a.a": torch.ones(2)}, key_map={"a": "b"}).renamed == {"a.a": "b.a"}


def test_bad_key_maps(model, state):
    with pytest.raises(UserError, match="both become gamma"):
        load_checkpoint(model, state, key_map={r"^query_conv\.bias$": "gamma"})
    for key_map in ({"(": "a"}, {"gamma": r"\1"}):
        with pytest.raises(UserError, match="is not valid"):
            load_checkpoint(model, state, key_map=key_map)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
)
def test_other_widths_are_converted_and_listed(model, state, name, dtype):
    report = load_checkpoint(model, state | {"gamma": torch.tensor([1.5], dtype=dtype)})
    assert report.converted == {"gamma": (name, "float32")}
    assert model.gamma.dtype == torch.float32
    assert model.gamma.item() == 1.5


def test_the_report_becomes_json(model, state):
    report = load_checkpoint(model, state | {"gamma": torch.tensor(1.0, dtype=torch.float16)})
    fields = json.loads(json.dumps(report.as_dict()))
    assert fields["reshaped"] == {"gamma": [[], [1]]}
    assert fields["converted"] == {"gamma": ["float16", "float32"]}
    assert fields["missing"] == {}


def mismatch(model: nn.Module, state: dict[str, torch.Tensor], **options) -> tuple[str, LoadReport]:
    """Load a checkpoint that does not fit, and check that the model stays as it is."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError) as error:
        load_checkpoint(model, state, **options)
    assert_equal(dict(model.state_dict()), before)
    return one_paragraph(error, "Nothing was loaded"), error.value.report


def test_missing_unexpected_and_misshaped_are_all_listed(model, state):
    state["query_konv.weight"] = state.pop("query_conv.weight")
    state["query_conv.bias"] = torch.ones(3)
    state["other"] = torch.ones(4, 4)
    message, report = mismatch(model, state)
    assert report.missing == {"query_conv.weight": "float32 (1, 8, 1, 1)"}
    assert report.unexpected == {"query_konv.weight": "float32 (1, 8, 1, 1)", "other": "float32 (4, 4)"}
    assert report.mismatched == {"query_conv.bias": ("float32 (3,)", "float32 (1,)")}
    assert "Missing (1): query_conv.weight." in message
    assert "Unexpected (2): other, query_konv.weight." in message
    assert "Mis-shaped (1): query_conv.bias is float32 (3,), but float32 (1,) here." in message
    assert "query_konv.weight for query_conv.weight" in message


@pytest.mark.parametrize(
    "wrong", [torch.ones(2), torch.ones(1, 1), torch.ones(0), torch.tensor([1]), torch.tensor([True])]
)
def test_other_shapes_and_kinds_are_refused(model, state, wrong):
    _, report = mismatch(model, state | {"gamma": wrong})
    assert list(report.mismatched) == ["gamma"]


def test_values_beyond_the_models_type_are_refused(model, state):
    message, report = mismatch(model.half(), state | {"gamma": torch.tensor([70000.0])})
    assert list(report.mismatched) == ["gamma"]
    assert "beyond the range" in message


def test_infinities_and_nan_of_the_checkpoint_are_kept(model, state):
    state["bn.running_mean"] = torch.tensor([float("inf"), float("nan")] * 4)
    load_checkpoint(model.half(), state)
    assert model.bn.running_mean.isinf().tolist() == [True, False] * 4


def test_a_forgotten_prefix_is_named(model, state):
    message, _ = mismatch(model, {f"backbone.{key}": tensor for key, tensor in state.items()})
    assert "with the prefix backbone.: remove it with a key map" in message


def test_a_prefix_that_explains_only_some_keys_is_not_named(model, state):
    state["backbone.gamma"] = state.pop("gamma")
    state["bn.wait"] = state.pop("bn.weight")
    message, _ = mismatch(model, state)
    assert "prefix" not in message
    assert "bn.wait for bn.weight" in message


def test_the_nearest_name_has_the_right_shape(model, state):
    state |= {"query_conv.weigh": torch.ones(3), "query_con.weight": state.pop("query_conv.weight")}
    message, _ = mismatch(model, state)
    assert "query_con.weight for query_conv.weight" in message
    assert "query_conv.weigh for" not in message


def expanded(listing: str) -> set[str]:
    """Undo the braces of a listing."""
    item = re.compile(r"(\{[^}]*\}|[^,{}]+?)(?:\.(\{[^}]*\}|(?<=\}\.)[^,{}]+))?(?:, |$)")
    keys = []
    for owners, leaves in item.findall(listing):
        for owner in owners.strip("{}").split(", "):
            keys += [f"{owner}.{leaf}" for leaf in leaves.strip("{}").split(", ")] if leaves else [owner]
    assert len(keys) == len(set(keys))
    return set(keys)


NAMES = st.lists(st.sampled_from(["a", "b", "c", "0", "1"]), min_size=1, max_size=4).map(".".join)


@given(missing=st.sets(NAMES, min_size=1, max_size=12))
def test_compact_listings_are_complete(missing):
    message = explain("Net", 12, LoadReport(missing=dict.fromkeys(sorted(missing), "float32 (1,)")))
    listing = message.split(f"Missing ({len(missing)}): ")[1].split(". Nothing was loaded")[0]
    assert expanded(listing) == missing


def test_a_whole_network_that_is_missing_stays_readable_and_quick():
    keys = MODELS.get("ccnet-r101").layouts[0].published_shapes()
    report = LoadReport(
        missing={key: f"float32 {shape}" for key, shape in keys.items()},
        unexpected={key.replace("bn", "norm"): f"float32 {shape}" for key, shape in keys.items()},
    )
    message = explain("CCNet", len(keys), report)
    listing = message.split(f"Missing ({len(keys)}): ")[1].split(". Unexpected (")[0]
    assert expanded(listing) == set(keys)
    assert len(listing) < 6000  # the plain list has about 20000 characters


def test_hostile_names_do_not_reach_the_terminal(model, state):
    message, _ = mismatch(model, state | {"\x1b[2Jgone\n": torch.ones(1)})
    assert "\x1b" not in message


# Saving


def test_save_and_read_back(tmp_path, model):
    path = save_checkpoint(model, tmp_path / "new" / "weights.safetensors", {"task": "digits", "note": 'größer "2"'})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"task": "digits", "note": 'größer "2"'}
    twin = Attention()
    report = load_checkpoint(twin, read_checkpoint(path))
    assert report.summary() == "8 used"
    assert_equal(dict(twin.state_dict()), dict(model.state_dict()))
    assert [item.name for item in path.parent.iterdir()] == ["weights.safetensors"]


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=6), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5
    ),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=8), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_any_state_survives_saving(tmp_path_factory, shapes, dtype, metadata):
    state = {key: torch.full(shape, 3).to(dtype) for key, shape in shapes.items()}
    path = save_checkpoint(state, tmp_path_factory.mktemp("save") / "weights.safetensors", metadata)
    read = read_checkpoint(path)
    assert_equal({key: read[key] for key in sorted(read)}, {key: state[key] for key in sorted(state)})
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata


def test_equal_input_gives_equal_bytes(tmp_path, state):
    metadata = {name: name for name in "abcdefghij"}
    files = [save_checkpoint(state, tmp_path / f"{n}.safetensors", metadata).read_bytes() for n in range(4)]
    assert files.count(files[0]) == 4


def test_tied_and_strided_tensors_are_saved(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"a": weight, "b": weight, "c": weight.T, "d": weight[1]}
    path = save_checkpoint(state, tmp_path / "weights.safetensors", {})
    assert_equal(dict(sorted(read_checkpoint(path).items())), {key: value.contiguous() for key, value in state.items()})


def test_a_failed_save_leaves_the_old_file(tmp_path, state):
    path = save_checkpoint(state, tmp_path / "weights.safetensors", {})
    before = path.read_bytes()
    with pytest.raises(UserError, match="must map text to text"):
        save_checkpoint(state, path, {"epoch": 3})
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["weights.safetensors"]


def test_paths_that_cannot_be_saved_to(tmp_path, state):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for path in ("weights.pth", "folder.safetensors", "file/weights.safetensors"):
        with pytest.raises(UserError) as error:
            save_checkpoint(state, tmp_path / path, {})
        one_paragraph(error, tmp_path)
