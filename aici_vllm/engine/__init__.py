"""vLLM carries out what controllers decide: scheduler, KV blocks, masks, worker, entry points."""
