"""vLLM's worker, which takes a step's masks out of the scheduler's message before sampling."""

from typing import Any

from aici_vllm.engine.compat import logits_processors, platform_worker_class
from aici_vllm.engine.logits import AiciLogitsProcessor
from aici_vllm.engine.masks import StepMasks

PlatformWorker: Any = platform_worker_class()


class Worker(PlatformWorker):
    """Use with `--worker-cls aici_vllm.Worker`, together with `--scheduler-cls aici_vllm.Scheduler`."""

    _mask_processor: AiciLogitsProcessor | None = None

    def sample_tokens(self, grammar_output: Any) -> Any:
        masks = None
        if isinstance(grammar_output, StepMasks):
            masks, grammar_output = grammar_output, grammar_output.grammar
        if masks is not None or self._mask_processor is not None:
            self._install(masks)
        return super().sample_tokens(grammar_output)

    def _install(self, masks: StepMasks | None) -> None:
        if self._mask_processor is None:
            found = [p for p in logits_processors(self.model_runner) if isinstance(p, AiciLogitsProcessor)]
            if not found:
                # Only the last pipeline stage samples.
                return
            self._mask_processor = found[0]
        self._mask_processor.install(masks)
