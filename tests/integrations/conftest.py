"""Tests of other libraries' training loops; nothing here may look for a network."""

from __future__ import annotations

import os

# Read when huggingface_hub is first imported.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
