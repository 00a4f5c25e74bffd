"""Tests of `aici_vllm.agents`; no network, no engine."""
