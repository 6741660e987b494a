"""Where two forms of a network first differ by more than their arithmetic explains.

`bisect` compares two forms over the tensors that both have; `Search` does the same and keeps what a reduction needs.
"""

from edgeattn.validation.divergence.forms import Observed, RunnerForm, TorchForm
from edgeattn.validation.divergence.onnx_form import OnnxForm
from edgeattn.validation.divergence.records import Divergence, OutputCheck, Point, write_divergence
from edgeattn.validation.divergence.search import Search, bisect

__all__ = [
    "Divergence",
    "Observed",
    "OnnxForm",
    "OutputCheck",
    "Point",
    "RunnerForm",
    "Search",
    "TorchForm",
    "bisect",
    "write_divergence",
]
