"""Muon with 4-bit momentum: a drop-in for `torch.optim.Muon`."""

import lazy_loader

__version__ = "0.1.0"

# Torch takes seconds to import, which `lowbit-muon --help` does not wait for: names are imported
# when they are first asked for, from where __init__.pyi says.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
