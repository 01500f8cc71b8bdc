"""Integration: the only part that knows vLLM's internals."""

#: Loaded into every worker of an engine that offloads, and of no other.
WORKER_EXTENSION = "vllm_moecxl.integration.worker.MoeOffloadWorker"
