"""Plain float64 references ("oracles") of the update rules of the Muon family.

Written from the published equations, for one matrix at a time, with nothing but torch: slow, and
short enough to be checked by eye. `ORACLES[name](weight, ...)` makes one, `step(grad)` takes a
step, `weight` is what the rule made of it. Parameters not given have their published values; where
none is published or read, the docstring says so.

Notation: W, G [rows m, columns n]; M momentum, mu its decay; u what enters the map, O what leaves
it; eta the learning rate, lambda the weight decay; s the shape scale; ||.|| Frobenius.
"""

from __future__ import annotations

from collections.abc import Callable

from oracles.base import DionMuon, Moonlight, Muon, MuonClip, Oracle
from oracles.constraints import (
    HardCap,
    MuonBall,
    MuonH,
    SoftCap,
    SpectralBall,
    SpectralDecay,
    SpectralHammer,
    SpectralSphere,
)
from oracles.directions import (
    RMNP,
    AuON,
    AuONHybrid,
    CautiousMuon,
    Lion,
    MuonEq,
    MuonPlus,
    Pion,
    PolarGrad,
    PolarGradPolarFirst,
    Scion,
    ScionCol,
    ScionSign,
    Signum,
    Spectra,
    TurboMuon,
)
from oracles.gains import GAINS
from oracles.gradients import Dion2, MarsM, NewtonMuon, NorDion2
from oracles.moments import (
    AdaGO,
    AdaMuon,
    Muon2,
    Namo,
    NamoD,
    Nanochat,
    NorMuon,
    NorMuonPaper,
    NorMuonSpeedrun,
)
from oracles.sampling import DropMuon
from oracles.subspace import Aro, Conda, Cosmos, Fismo, Mousse, Soap, SoapMuon

ORACLES: dict[str, Callable[..., Oracle]] = {
    "muon": Muon,
    "moonlight": Moonlight,
    "muonclip": MuonClip,
    "dion_muon": DionMuon,
    "normuon": NorMuon,
    "normuon_paper": NorMuonPaper,
    "normuon_speedrun": NorMuonSpeedrun,
    "nanochat": Nanochat,
    "adamuon": AdaMuon,
    "namo": Namo,
    "namo_d": NamoD,
    "adago": AdaGO,
    "polargrad": PolarGrad,
    "polargrad_polar_first": PolarGradPolarFirst,
    "rmnp": RMNP,
    "auon": AuON,
    "auon_hybrid": AuONHybrid,
    "scion": Scion,
    "scion_sign": ScionSign,
    "scion_col": ScionCol,
    "lion": Lion,
    "signum": Signum,
    "muoneq": MuonEq,
    "muon_plus": MuonPlus,
    "muonh": MuonH,
    "turbo_muon": TurboMuon,
    "pion": Pion,
    "spectra": Spectra,
    "cautious_muon": CautiousMuon,
    "muon2": Muon2,
    "mars_m": MarsM,
    "newton_muon": NewtonMuon,
    "dion2": Dion2,
    "nordion2": NorDion2,
    "soft_cap": SoftCap,
    "hard_cap": HardCap,
    "spectral_hammer": SpectralHammer,
    "spectral_ball": SpectralBall,
    "spectral_decay": SpectralDecay,
    "muon_ball": MuonBall,
    "spectral_sphere": SpectralSphere,
    **GAINS,
    "drop_muon": DropMuon,
    "cosmos": Cosmos,
    "aro": Aro,
    "mousse": Mousse,
    "soap": Soap,
    "soap_muon": SoapMuon,
    "fismo": Fismo,
    "conda": Conda,
}
