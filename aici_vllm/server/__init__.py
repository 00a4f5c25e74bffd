"""Controllers over HTTP: routes that vLLM's server takes in as the endpoint plugin `aici`."""
