"""Muon with 4-bit momentum: a drop-in for `torch.optim.Muon`."""

from lowbit_muon.auto_format import AutoFormat
from lowbit_muon.aux_adam import MuonWithAuxAdam
from lowbit_muon.diagnosis import Diagnosis
from lowbit_muon.distributed.agreement import ExchangeError
from lowbit_muon.formats import StateFormat
from lowbit_muon.integrations.diagnosis_logging import log_diagnoses
from lowbit_muon.integrations.gradient_release import GradientRelease, attach_gradient_release
from lowbit_muon.momentum_state import NonFiniteGradientError
from lowbit_muon.muon import Muon
from lowbit_muon.newton_schulz import orthogonalize
from lowbit_muon.param_groups import muon_param_groups
from lowbit_muon.presets import PRESETS
from lowbit_muon.quantized_matrix import QuantizedMatrix, quantize

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "AutoFormat",
    "Diagnosis",
    "ExchangeError",
    "GradientRelease",
    "Muon",
    "MuonWithAuxAdam",
    "NonFiniteGradientError",
    "QuantizedMatrix",
    "StateFormat",
    "__version__",
    "attach_gradient_release",
    "log_diagnoses",
    "muon_param_groups",
    "orthogonalize",
    "quantize",
]
