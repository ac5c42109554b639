"""New weights for a model that vLLM holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def take_weights(worker: Any, state: Mapping[str, Any]) -> list[str]:
    """Load the tensors of `state` as if they came from the checkpoint's files; called in each rank of an engine.

    Gives the names of vLLM's parameters that nothing filled. vLLM keeps weights in the layout of its kernels, so
    copying into its parameters would not do, or not act.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.model_runner.get_model()
    wanted = {name for name, _ in model.named_parameters()}
    with set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(state.items())
        finalize_layerwise_reload(model, worker.model_runner.model_config)
    for module in model.modules():
        # A head that is tied to the embeddings gets no weight of its own, and on a CPU it reads a copy of theirs.
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)
    return sorted(wanted - loaded)
