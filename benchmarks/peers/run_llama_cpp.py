"""llama.cpp with its default of memory-mapped weights: pages that do not fit are read again when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.common import Result
from benchmarks.peers.work import Generate, main


def make(model: str, max_model_len: int) -> tuple[Generate, Callable[[], Result]]:
    """The engine for a GGUF file."""
    from llama_cpp import Llama, llama_print_system_info

    llama = Llama(model, n_ctx=max_model_len, n_threads=1, n_threads_batch=1, use_mmap=True, seed=0, verbose=False)

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        llama.reset()
        for _, token in zip(range(count), llama.generate(prompt, temp=0.0, repeat_penalty=1.0), strict=False):
            yield token

    def figures() -> Result:
        return {"system_info": llama_print_system_info().decode()}

    return generate, figures


if __name__ == "__main__":
    main(make)
