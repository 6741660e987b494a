"""The user's own models: what their file may say, and what is made of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from edgeattn.cli.main import main
from edgeattn.deploy.evidence import model_of_run
from edgeattn.foundation import UserError
from edgeattn.models import MODELS, Preprocessing
from edgeattn.models.checkpoint import save_checkpoint
from edgeattn.models.inspection import guess_model
from edgeattn.models.own import VARIABLE
from edgeattn.validation.randomise import randomise

PARTS = """
[model.parts]
base = "ccnet-digits:recurrence=1"
classes = ["background", "screw", "nut"]
size = [64, 96]
colour_order = "BGR"
scale = 1
mean = [104, 117, 123.5]
std = [1, 2, 3]
summary = "CCNet on machine parts"
"""


@pytest.fixture
def declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes the user's file; each has a name of its own, because files are read once."""

    def write(text: str) -> Path:
        file = tmp_path / f"models{len(list(tmp_path.iterdir()))}.toml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv(VARIABLE, str(file))
        return file

    return write


def test_what_a_table_says_replaces_what_the_base_declares(declare):
    known = len(MODELS)
    declare(PARTS)
    spec, base = MODELS.get("parts"), MODELS.get("ccnet-digits")
    assert spec.name == "parts"
    assert spec.classes == ("background", "screw", "nut")
    assert spec.size == (64, 96)
    assert spec.preprocessing == Preprocessing("BGR", 1.0, (104.0, 117.0, 123.5), (1.0, 2.0, 3.0))
    assert dict(spec.arguments) == {**base.arguments, "num_classes": 3, "recurrence": 1}
    assert (spec.checkpoint, spec.samples, spec.calibration) == (None, None, None)
    assert spec.outputs == base.outputs
    assert len(MODELS) == known + 1
    assert "parts" in MODELS
    assert [*MODELS][-1] is spec
    assert MODELS.get("parts:recurrence=2").classes == spec.classes
    assert spec.fingerprint != MODELS.get("ccnet-digits:recurrence=1,num_classes=3").fingerprint


def test_what_a_table_leaves_out_is_as_in_the_base(declare):
    declare('[model.other]\nbase = "se-resnet50-timm"\nsize = [96, 96]\n')
    spec, base = MODELS.get("other"), MODELS.get("se-resnet50-timm")
    assert (spec.classes, spec.preprocessing, spec.layouts) == (base.classes, base.preprocessing, base.layouts)
    assert spec.summary == "own model, after se-resnet50-timm"


def test_a_checkpoint_is_recognised_as_an_own_model(declare, tmp_path):
    declare(PARTS.replace(":recurrence=1", ""))
    file = save_checkpoint(randomise(MODELS.get("parts").build(), seed=1), tmp_path / "w.safetensors", {})
    assert guess_model(file).model == "parts"


def test_the_example_of_the_readme(declare):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(\[model\..*?)^```", readme, re.DOTALL | re.MULTILINE)
    declare(example)
    assert MODELS.get("parts").arguments["num_classes"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model.x]\n", "[model.x] in {file} lacks the key 'base'"),
        ('[model.x]\nbase = "ccnet-r102"\n', "[model.x] in {file}: unknown model 'ccnet-r102'"),
        (
            '[model.x]\nbase = "ccnet-r101"\nclases = ["a"]\n',
            "unknown key 'clases' in [model.x] in {file}. Did you mean",
        ),
        ('[model.x]\nbase = "ccnet-r101"\nclasses = ["a", "a"]\n', "not a list of different texts"),
        ('[model.x]\nbase = "ccnet-r101"\nstd = [1, 0, 1]\n', "not a list of three numbers above 0"),
        ('[model.x]\nbase = "ccnet-r101"\nmean = [1, 2]\n', "not a list of three numbers"),
        ('[model.x]\nbase = "ccnet-r101"\ncolour_order = "RGB"\n', "Give mean and std in the new order too"),
        ('[model.x]\nbase = "ccnet-r101"\ncolour_order = "GRB"\n', 'not "RGB" or "BGR"'),
        ('[model.x]\nbase = "cosnet-r101"\nclasses = ["a"]\n', "cosnet-r101 has 2 classes, not 1"),
        ('[model.ccnet-r101]\nbase = "ccnet-r101"\n', "has the name of a declared network"),
        ('[model."a b"]\nbase = "ccnet-r101"\n', "up to 64 letters"),
        ('[[model]]\nbase = "ccnet-r101"\n', "Write [model.NAME]"),
        ("[models.x]\n", "unknown key 'models' in {file}. Did you mean 'model'?"),
        ("model", "{file} is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used(declare, text, message):
    file = declare(text)
    with pytest.raises(UserError) as error:
        MODELS.get("x")
    assert message.format(file=file) in str(error.value)
    assert MODELS.get("ccnet-r101").name == "ccnet-r101"  # declared networks do not need the file


def test_own_models_are_listed(declare, monkeypatch, capsys):
    declare(PARTS)
    monkeypatch.setattr(sys, "argv", ["edgeattn", "list", "models"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "CCNet on machine parts" in capsys.readouterr().out


def test_a_run_of_a_model_that_was_declared_otherwise_is_refused(declare):
    declare(PARTS)
    facts = {"model": "parts", "declaration": MODELS.get("parts").fingerprint}
    assert model_of_run(facts).name == "parts"
    declare(PARTS.replace("117", "116"))
    with pytest.raises(UserError, match="parts is declared otherwise than when the run was made"):
        model_of_run(facts)
