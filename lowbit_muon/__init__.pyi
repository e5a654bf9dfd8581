"""Public names and where they live: for type checkers, and for `lazy_loader` at run time."""

from .distributed.agreement import ExchangeError
from .formats.auto import AutoFormat
from .formats.presets import PRESETS
from .formats.state_format import StateFormat
from .linalg.newton_schulz import orthogonalize
from .optimizers.diagnosis_logging import log_diagnoses
from .optimizers.family import (
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
from .optimizers.foreign_groups import from_groups
from .optimizers.gradient_release import GradientRelease, attach_gradient_release
from .optimizers.layer_inputs import LayerInputs, attach_layer_inputs
from .optimizers.muon import Muon
from .optimizers.muon_adamw import MuonWithAuxAdam
from .optimizers.param_groups import muon_param_groups
from .optimizers.qk_attention import HeadRows, QKProjections, find_projections
from .optimizers.qk_clip import QKClip, attach_qk_clip
from .optimizers.spectral_clip import SpectralClip, clip_grad_spectral_
from .optimizers.trainer import MuonFactory, release_gradients
from .state.diagnosis import Diagnosis
from .state.gradients import NonFiniteGradientError
from .state.stored import QuantizedMatrix, quantize
from .step.rules.recipes import RULES
from .step.rules.rule import UpdateRule

__version__: str

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
    "LayerInputs",
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
    "SpectralClip",
    "StateFormat",
    "UpdateRule",
    "__version__",
    "attach_gradient_release",
    "attach_layer_inputs",
    "attach_qk_clip",
    "clip_grad_spectral_",
    "find_projections",
    "from_groups",
    "log_diagnoses",
    "muon_param_groups",
    "orthogonalize",
    "quantize",
    "release_gradients",
]
