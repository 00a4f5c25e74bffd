"""The vocabulary of the model that an engine runs."""

from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from constraints import ConstraintError, Vocabulary, prepare


def model_vocabulary(model_config: ModelConfig) -> Vocabulary:
    """`read_vocabulary` with what masks over it need, so that no request waits for it.

    Raises:
        ConstraintError: as `read_vocabulary`.
    """
    vocabulary = read_vocabulary(model_config)
    prepare(vocabulary)
    return vocabulary


def read_vocabulary(model_config: ModelConfig) -> Vocabulary:
    """The tokens of the model's tokenizer, as many as its output has rows.

    A sequence ends with the tokenizer's own end token, or with any that the model's generation
    configuration names, as for plain requests.

    Raises:
        ConstraintError: there is no such vocabulary; the message says what the tokenizer lacks.
    """
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        raise ConstraintError("controllers need the model's tokenizer: start without --skip-tokenizer-init")
    more = model_config.try_get_generation_config().get("eos_token_id") or []
    ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    found = list(dict.fromkeys(token for token in ends if token is not None))
    if not found:
        raise ConstraintError("controllers need an end-of-sequence token, and the model names none")
    size = model_config.get_vocab_size()
    return Vocabulary.from_tokenizer(tokenizer, size=size, eos_token_ids=found)
