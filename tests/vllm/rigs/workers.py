"""Worker classes for the tests, named on the command line as a user names his own."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineWorker(CPUWorker):
    """Makes eager pipeline stages run on CPU.

    vLLM 0.32 allocates a stage's input buffers in a warm-up that its CPU worker leaves out.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )
