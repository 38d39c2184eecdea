"""Every part of vLLM that is not its public interface and that this package relies on."""

from __future__ import annotations

from typing import NamedTuple

Release = tuple[int, int]

EXECUTED_ON: tuple[Release, ...] = ((0, 30), (0, 31), (0, 32))
"""Releases of vLLM on which the tests ran; every entry below that applies there was found."""

READ_ON: tuple[Release, ...] = ((0, 26), (0, 27), (0, 28), (0, 29), (0, 33))
"""Releases in whose sources every entry below that applies there was found; nothing ran on them."""


class Seam(NamedTuple):
    """One symbol of vLLM that we touch.

    Attributes:
        symbol: ``module:attribute.attribute``.
        what: what we do with it.
        why: what needs it.
        gone_when: what would let us drop it.
        attributes: of the instances of ``symbol``, where it is a class.
        parameters: the first ones of ``symbol``, where it is called or wrapped with them.
        since: the first release that we need it on.
        until: the last one.

    """

    symbol: str
    what: str
    why: str
    gone_when: str
    attributes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    since: Release = (0, 0)
    until: Release = (9999, 0)

    def applies_to(self, release: Release) -> bool:
        """Whether we touch it on that release of vLLM."""
        return self.since <= release <= self.until


_UPSTREAM = "vLLM's own routed-experts output runs in every configuration"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_MOE = "vllm.model_executor.layers.fused_moe"

SEAMS = (
    Seam(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrapped",
        "every way to start an engine passes here; sets our worker and scheduler",
        "a plugin can set worker_cls and scheduler_cls by itself",
        parameters=("self",),
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        "wrapped",
        "the engine core asks all workers what they capture, before warm-up",
        "a start-up hook between engine core and workers",
        parameters=("self", "vllm_config"),
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore.abort_requests",
        "called by a method that we add to the class, moe_r3_abort",
        "an abort by a client must return the rows that the engine core holds",
        "the front end waits for the engine core's last output of an aborted request",
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore.step",
        "wrapped",
        "large rows follow the step's other outputs in messages of their own",
        "vLLM copies arrays of outputs where it sends them, request by request",
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
        "wrapped",
        "as EngineCore.step",
        "see above",
    ),
    Seam(
        "vllm.v1.engine.core:EngineCore",
        "given the methods moe_r3_abort, moe_r3_fetch and moe_r3_layout; read",
        "the front ends of all processes can call them, and they reach our scheduler",
        "plugins can add methods to the engine core",
        ("scheduler",),
    ),
    Seam(
        "vllm.v1.engine.core:EngineCoreProc",
        "read, and outputs are put into its queue by another thread",
        "large rows follow the step's other outputs in messages of their own",
        "vLLM copies arrays of outputs where it sends them, request by request",
        ("output_queue",),
    ),
    Seam(
        "vllm.v1.engine.core:EngineCoreProc._invoke_utility_method",
        "returns to the front end what a future holds that a method returned",
        "fetched rows are read while the engine core goes on",
        "nothing: used as vLLM does",
    ),
    Seam(
        "vllm.v1.engine.core_client:AsyncMPClient",
        "read",
        "addresses the engine core that holds a ticket's rows",
        "a call of one engine core by its index",
        ("core_engines", "engine_ranks_managed"),
    ),
    Seam(
        "vllm.v1.engine.core_client:InprocClient",
        "read",
        "calls the engine core in the same process",
        "utility calls to an engine core in the same process",
        ("engine_core",),
    ),
    Seam(
        "vllm.config:ParallelConfig.data_parallel_index",
        "read",
        "a ticket names the engine core that holds its rows",
        "nothing: used as vLLM does",
    ),
    Seam(
        "vllm.entrypoints.generate.api_router:register_generate_api_routers",
        "wrapped",
        "adds the path from which rows are fetched",
        "endpoint plugins that need not be named to be loaded",
    ),
    Seam(
        "vllm.v1.engine.core:EngineCoreProc._send_finish_outputs_to_client",
        "wrapped",
        "a pause aborts requests and builds their outputs outside the scheduler",
        "the scheduler builds the outputs of aborted requests",
        parameters=("self", "req_ids", "client_index", "finish_reason"),
    ),
    Seam(
        "vllm.v1.engine.async_llm:AsyncLLM.abort",
        "wrapped",
        "fetches the rows of a request before its end is reported to the client",
        "the front end waits for the engine core's last output of an aborted request",
        parameters=("self", "request_id", "internal"),
    ),
    Seam(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        "wrapped",
        "a request's wrong options are refused before a streaming answer begins",
        "a check of extra_args by plugins",
        parameters=("self", "prompt", "sampling_params"),
    ),
    Seam(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "wrapped",
        "a request's options are checked against its prompt, and defaults filled in",
        "a check of extra_args by plugins",
        parameters=("self", "request_id"),
    ),
    Seam(
        "vllm.v1.engine:EngineCoreRequest",
        "read",
        "the length of a prompt bounds the first row that can be asked for",
        "a check of extra_args by plugins",
        ("prompt_embeds", "prompt_token_ids", "resumable", "sampling_params"),
    ),
    Seam(
        "vllm.exceptions:VLLMValidationError",
        "extended",
        "the error that becomes status 400",
        "nothing: meant for this",
    ),
    Seam(
        "vllm.v1.engine.output_processor:OutputProcessor.add_request",
        "wrapped",
        "keeps what a request asked for; of n completions one carries the prompt's rows",
        "routed experts can be encoded by a plugin",
    ),
    Seam(
        "vllm.v1.engine.parallel_sampling:ParentRequest",
        "read",
        "the n completions of a prompt are asked for by its parameters",
        "routed experts can be encoded by a plugin",
        ("sampling_params",),
    ),
    Seam(
        "vllm.v1.engine.output_processor:RequestState._new_completion_output",
        "wrapped",
        "the rows that arrived are kept until they get the form that was asked for",
        "routed experts can be encoded by a plugin",
    ),
    Seam(
        "vllm.v1.engine.llm_engine:LLMEngine.step",
        "wrapped",
        "gives the rows of completions that have ended the form that was asked for",
        "routed experts can be encoded by a plugin",
    ),
    Seam(
        "vllm.v1.engine.core_client:SyncMPClient.call_utility",
        "called, with that of AsyncMPClient",
        "asks the engine core which layers the rows are of",
        "model configurations say which layers have experts",
    ),
    Seam(
        "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.create_completion",
        "wrapped",
        "puts routed experts, or the path to fetch them from, into choices and streams",
        "CompletionOutput has fields for plugins, which all answers carry",
    ),
    Seam(
        "vllm.outputs:RequestOutput.add",
        "wrapped",
        "keeps rows that arrive while a client has earlier chunks still to read",
        "support for vLLM 0.30, the last release that loses them, is dropped",
        parameters=("self", "next_output", "aggregate"),
    ),
    Seam(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
        "wrapped",
        "the same for chat completions",
        "see above",
    ),
    Seam(
        "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
        "wrapped",
        "the same for vLLM's own generate",
        "see above",
    ),
    Seam(
        "vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateTokensChoice",
        "allowed to take further fields, with GenerateTextChoice and the answers that hold them",
        "the same for vLLM's own generate",
        "see above",
        since=(0, 32),
    ),
    Seam(
        "vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateResponseChoice",
        "allowed to take further fields, with GenerateResponse, which holds them",
        "the same for vLLM's own generate",
        "see above",
        until=(0, 31),
    ),
    Seam(f"{_SCHEDULER}.schedule", "extended", "follows which requests begin or resume", _UPSTREAM),
    Seam(
        f"{_SCHEDULER}.update_from_output",
        "extended",
        "stores a step's rows and fills the outputs",
        _UPSTREAM,
        parameters=("self", "scheduler_output", "model_runner_output"),
    ),
    Seam(
        f"{_SCHEDULER}._preempt_request",
        "extended",
        "rows of emitted tokens are kept, later ones are taken anew",
        "the scheduler reports preemptions",
        parameters=("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._handle_stopped_request",
        "extended",
        "a request's rows are collected where it ends, before a session changes its tokens",
        "the scheduler reports the end of requests",
        parameters=("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._free_request",
        "extended",
        "a request's pages are given up after its last step",
        "the scheduler reports the end of requests",
        parameters=("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}.reset_prefix_cache",
        "extended",
        "rows kept for prefix-cache hits end with the cache",
        _UPSTREAM,
    ),
    Seam(
        f"{_SCHEDULER}._handle_invalid_blocks",
        "extended",
        "a KV load failed and its tokens are fed after all: their rows are taken anew",
        _UPSTREAM,
    ),
    Seam(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.update_state_after_alloc",
        "replaced on the scheduler's connector by a function that calls it",
        "says how many tokens of a request were not computed here",
        "the scheduler reports loaded tokens",
    ),
    Seam(
        f"{_MOE}.router.base_router:BaseRouter.set_capture_fn",
        "called",
        "hears a router's logical expert ids",
        "nothing: meant for this",
    ),
    Seam(f"{_MOE}.layer:MoERunner.layer_id", "read", "the decoder layer of a router", "see above"),
    Seam(
        f"{_MOE}.layer:MoERunner",
        "read; routing_sink of its routed_experts is set",
        "leads to a layer's router or kernel, and says its top-k",
        "see above",
        ("moe_config", "routed_experts", "router"),
    ),
    Seam(
        f"{_MOE}.layer:MoERunner.is_monolithic",
        "read",
        "tells kernels that route by themselves",
        "see above",
    ),
    Seam(
        f"{_MOE}.modular_kernel:FusedMoEExpertsMonolithic.supports_routing_replay_capture",
        "called",
        "whether such a kernel reports its choice",
        "see above",
        since=(0, 27),
    ),
    Seam(
        f"{_MOE}.routed_experts_capturer:RoutedExpertsSink",
        "constructed",
        "the buffer through which such a kernel reports",
        "see above",
        since=(0, 32),
    ),
    Seam(
        f"{_MOE}.modular_kernel:FusedMoEExpertsMonolithic.set_capture_fn",
        "called",
        "the buffer through which such a kernel reports",
        "see above",
        since=(0, 27),
        until=(0, 31),
    ),
    Seam(
        f"{_MOE}.routed_experts_capturer:RoutedExpertsCaptureSource",
        "tested for",
        "modules that route without a router object",
        "see above",
        since=(0, 28),
    ),
    Seam(
        "vllm.config:ModelConfig",
        "read",
        "the numbers of experts and layers, and whether the model has experts at all",
        "nothing: used as vLLM does",
        ("get_num_experts", "get_total_num_hidden_layers", "is_moe", "runner_type"),
    ),
    Seam(
        "vllm.config:ModelConfig.get_num_experts_per_tok",
        "called",
        "the model's top-k, for modules and pipeline stages that do not say theirs",
        "nothing: used as vLLM does",
        since=(0, 28),
    ),
    Seam(
        _RUNNER,
        "read, after a forward",
        "which request's rows a step holds, and their positions (V1)",
        "the batch is part of ModelRunnerOutput",
        ("input_batch", "num_scheduled_tokens", "positions", "max_num_tokens", "device"),
    ),
    Seam(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "read, after a forward",
        "the requests of a step in batch order (V1)",
        "the batch is part of ModelRunnerOutput",
        ("req_ids", "num_reqs"),
    ),
    Seam(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "read, after a forward, in the runner's execute_model_state",
        "the same for the V2 runner",
        "the batch is part of ModelRunnerOutput",
        ("req_ids", "num_reqs", "num_scheduled_tokens", "positions"),
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner:ExecuteModelState.input_batch",
        "read, after a forward",
        "tells a V2 runner, and leads to its batch",
        "the batch is part of ModelRunnerOutput",
    ),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler",
        "read",
        "looks up requests, and sizes the store",
        _UPSTREAM,
        (
            "connector",
            "hash_block_size",
            "kv_cache_manager",
            "max_model_len",
            "max_num_running_reqs",
            "requests",
            "vllm_config",
        ),
    ),
    Seam(
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "read",
        "tells which of several KV blocks with the same tokens a page of rows belongs to",
        _UPSTREAM,
        ("block_pool", "coordinator"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        "read, from single_type_managers of the coordinator",
        "tells which of several KV blocks with the same tokens a page of rows belongs to",
        _UPSTREAM,
        ("block_size", "req_to_blocks"),
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "compared with the classes of single_type_managers",
        "finds the group that has a KV block for every token",
        _UPSTREAM,
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        "read",
        "tells which of several KV blocks with the same tokens a page of rows belongs to",
        _UPSTREAM,
        ("block_id", "is_null"),
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool.get_cached_block",
        "called",
        "tells which of several KV blocks with the same tokens a page of rows belongs to",
        _UPSTREAM,
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
        "wrapped on the instance",
        "tells when a KV block no longer holds the tokens that its page of rows belongs to",
        _UPSTREAM,
    ),
    Seam(
        "vllm.v1.core.block_pool:BlockPool",
        "read",
        "how many KV blocks there are",
        _UPSTREAM,
        ("blocks",),
    ),
    Seam(
        "vllm.v1.request:Request",
        "read",
        "which rows belong to emitted tokens, and the block hashes",
        _UPSTREAM,
        (
            "block_hashes",
            "num_computed_tokens",
            "num_output_tokens",
            "num_tokens",
            "sampling_params",
        ),
    ),
    Seam(
        "vllm.v1.request:Request",
        "read",
        "which steps vLLM discards",
        _UPSTREAM,
        ("drop_stale_output", "num_stale_output_tokens"),
        since=(0, 27),
    ),
    Seam(
        "vllm.v1.request:Request",
        "read",
        "which steps vLLM discards",
        _UPSTREAM,
        ("async_tokens_to_discard",),
        until=(0, 26),
    ),
    Seam(
        "vllm.v1.core.sched.output:SchedulerOutput",
        "read",
        "which requests a step begins, resumes or drafts for",
        _UPSTREAM,
        (
            "num_scheduled_tokens",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    Seam(
        "vllm.v1.core.sched.output:CachedRequestData",
        "read",
        "which requests a step resumes",
        _UPSTREAM,
        ("resumed_req_ids",),
    ),
    Seam(
        "vllm.v1.engine.output_processor:OutputProcessor",
        "read",
        "finds the requests that a client aborts",
        "the front end waits for the engine core's last output of an aborted request",
        ("external_req_ids", "request_states"),
    ),
    Seam(
        "vllm.v1.engine.output_processor:RequestState",
        "read; routed_experts_chunks is set",
        "gives an aborted request its rows",
        "the front end waits for the engine core's last output of an aborted request",
        ("detokenizer", "prompt_len", "routed_experts_chunks"),
    ),
    Seam(
        "vllm.v1.worker.worker_base:WorkerBase.load_model",
        "extended, with reload_weights",
        "listens to the routers before any graph is captured or compiled",
        _UPSTREAM,
    ),
    Seam(
        f"{_RUNNER}.execute_model",
        "wrapped on the runner, with sample_tokens",
        "takes a snapshot after each forward and attaches it to the step's output",
        _UPSTREAM,
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
        "wrapped on the runner, with sample_tokens",
        "the same for the V2 runner",
        _UPSTREAM,
    ),
    Seam(
        "vllm.distributed.parallel_state:get_pp_group",
        "called; its cpu_group once, at start-up",
        "the stages of a pipeline tell each other what they capture and where to send it",
        _UPSTREAM,
    ),
    Seam(
        "vllm.distributed.parallel_state:get_tp_group",
        "called; its all_gather in the forward, under sequence parallelism",
        "one worker of each tensor-parallel group is heard, and needs the others' rows",
        _UPSTREAM,
    ),
    Seam(
        "vllm.forward_context:get_forward_context",
        "called in the forward, under data and expert parallelism",
        "a router may see other ranks' rows, or some of its own",
        _UPSTREAM,
    ),
    Seam(
        "vllm.forward_context:ForwardContext",
        "read; additional_kwargs is given one more entry",
        "says how many tokens this step has, and holds where a micro-batch begins",
        _UPSTREAM,
        ("dp_metadata", "batch_descriptor", "additional_kwargs"),
    ),
    Seam(
        "vllm.forward_context:DPMetadata",
        "read",
        "says how many tokens every data-parallel rank has, and how they were gathered",
        _UPSTREAM,
        ("num_tokens_across_dp_cpu", "local_sizes"),
    ),
    Seam(
        "vllm.v1.worker.ubatching:dbo_current_ubatch_id",
        "called, with dbo_enabled; the module's _CURRENT_CONTEXTS is read",
        "under dual-batch overlap a router sees one micro-batch at a time",
        "the forward context says where its micro-batch begins",
    ),
    Seam(
        "vllm.v1.worker.ubatching:UBatchContext",
        "read",
        "the sizes of earlier micro-batches say where a later one begins",
        "the forward context says where its micro-batch begins",
        ("forward_context",),
    ),
    Seam(
        "vllm.config:ParallelConfig.use_ubatching",
        "read",
        "tells whether routers see one micro-batch at a time",
        _UPSTREAM,
    ),
    Seam(
        "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
        "called for each of core_engines",
        "asks every data-parallel engine core for the rows of aborted requests",
        "the front end waits for the engine core's last output of an aborted request",
    ),
    Seam(
        "vllm.utils.network_utils:get_ip",
        "called",
        "where the last stage of a pipeline over several hosts listens",
        "nothing: used as vLLM does",
    ),
    Seam(
        "vllm.v1.outputs:ModelRunnerOutput",
        "given one more attribute, moe_r3_step_rows",
        "carries a step's rows from the worker to the engine core",
        "a field for plugins",
    ),
    Seam(
        "vllm.v1.outputs:AsyncModelRunnerOutput.get_output",
        "wrapped on each object",
        "rows are awaited where vLLM awaits the sampled tokens",
        "a field for plugins",
    ),
    Seam(
        "vllm.v1.engine:EngineCoreOutputs",
        "read",
        "leads to the statistics that leave with a step's outputs; large rows leave in a copy",
        "a place for plugins' own statistics",
        ("outputs", "scheduler_stats", "finished_requests"),
    ),
    Seam(
        "vllm.v1.metrics.stats:SchedulerStats",
        "an entry of our own, moe_r3, is put into kv_connector_stats and taken out again",
        "counts reach the metrics without a message of their own",
        "a place for plugins' own statistics",
        ("kv_connector_stats",),
    ),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "wrapped, with __init__",
        "shows the counts beside vLLM's own metrics",
        "a place for plugins' own statistics",
    ),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager",
        "read",
        "finds the Prometheus loggers",
        "a place for plugins' own statistics",
        ("stat_loggers",),
    ),
    Seam(
        "vllm.v1.metrics.loggers:PrometheusStatLogger",
        "read",
        "metrics of the same kind and labels as vLLM's own, under Ray too",
        "a place for plugins' own statistics",
        ("_counter_cls", "_gauge_cls", "per_engine_labelvalues"),
    ),
    Seam(
        "vllm.v1.engine:EngineCoreOutput",
        "its field routed_experts is filled",
        "vLLM returns it from there, offline and over HTTP",
        "nothing: meant for this",
    ),
)
