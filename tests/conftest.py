"""Settings for the whole test run; imported before any test module, and so before vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.regimes import load_shim_here

# Tests use the embedded model and what they make themselves: nothing is fetched, nothing is reported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

load_shim_here()


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The folder of the embedded model, made on first use."""
    from aici_vllm.model import embedded_model

    return embedded_model()
