"""Checkpoints: read without running code in them, load strictly with a report of every key, save safely."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from edgeattn.foundation import UserError, atomic_path
from edgeattn.models.load_report import CheckpointMismatch, LoadReport

# Where training scripts put the state_dict, beside optimiser, epoch and arguments, which are not read.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
# Prefixes that wrappers put before every key: DataParallel, DistributedDataParallel, torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
