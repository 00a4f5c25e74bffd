"""vLLM's worker, which takes a step's masks out of the scheduler's message before sampling.

It also hands Model Runner V1 the output tokens of requests that come back to the batch.
"""

from typing import Any

from aici_vllm.engine.compat import OutputTokens, logits_processors, platform_worker_class
from aici_vllm.engine.logits import AiciLogitsProcessor
from aici_vllm.engine.masks import StepMasks

PlatformWorker: Any = platform_worker_class()


class Worker(PlatformWorker):
    """Use with `--worker-cls aici_vllm.Worker`, together with `--scheduler-cls aici_vllm.Scheduler`."""

    _mask_processor: AiciLogitsProcessor | None = None
    _output_tokens: OutputTokens | None = None

    def execute_model(self, scheduler_output: Any) -> Any:
        if not self.use_v2_model_runner:
            if self._output_tokens is None:
                self._output_tokens = OutputTokens(self.model_runner)
            self._output_tokens.expect(scheduler_output)
        return super().execute_model(scheduler_output)

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
