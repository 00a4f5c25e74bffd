"""Tests that run a real vLLM engine."""
