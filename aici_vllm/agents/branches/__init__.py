"""Retries inside the engine: the samples of a round are branches of one request.

`condition` is what a check may say about a reply that is not finished, `prompt` makes a round's tokens extend
those of the sample it continues, `program` runs in the engine, and `sampler` is the client's side.
"""
