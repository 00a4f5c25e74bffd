"""Retries inside the engine: the samples of a round are branches of one request.

`condition` is what a check may say about a reply that is not finished, `prompt` makes a round's tokens extend
those of the sample it continues, `kept` is what the engine has of them already, `program` runs in the engine,
`replies` reads what came of it, and `sampler` is the client's side.
"""
