"""Muon with 4-bit momentum: a drop-in for `torch.optim.Muon`."""

from lowbit_muon.distributed.agreement import ExchangeError
from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.newton_schulz import orthogonalize
from lowbit_muon.optimizers.diagnosis_logging import log_diagnoses
from lowbit_muon.optimizers.family import (
    NAMO,
    NAMOD,
    RMNP,
    AdaMuon,
    Lion,
    MuonH,
    NorMuon,
    PolarGrad,
    Scion,
)
from lowbit_muon.optimizers.foreign_groups import from_groups
from lowbit_muon.optimizers.gradient_release import GradientRelease, attach_gradient_release
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.optimizers.qk_attention import HeadRows, QKProjections, find_projections
from lowbit_muon.optimizers.qk_clip import QKClip, attach_qk_clip
from lowbit_muon.optimizers.trainer import MuonFactory, release_gradients
from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.state.gradients import NonFiniteGradientError
from lowbit_muon.state.stored import QuantizedMatrix, quantize
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule

__version__ = "0.1.0"

__all__ = [
    "NAMO",
    "NAMOD",
    "PRESETS",
    "RMNP",
    "RULES",
    "AdaMuon",
    "AutoFormat",
    "Diagnosis",
    "ExchangeError",
    "GradientRelease",
    "HeadRows",
    "Lion",
    "Muon",
    "MuonFactory",
    "MuonH",
    "MuonWithAuxAdam",
    "NonFiniteGradientError",
    "NorMuon",
    "PolarGrad",
    "QKClip",
    "QKProjections",
    "QuantizedMatrix",
    "Scion",
    "StateFormat",
    "UpdateRule",
    "__version__",
    "attach_gradient_release",
    "attach_qk_clip",
    "find_projections",
    "from_groups",
    "log_diagnoses",
    "muon_param_groups",
    "orthogonalize",
    "quantize",
    "release_gradients",
]
