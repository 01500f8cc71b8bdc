"""transformers with accelerate's disk offload: layers that do not fit are read from disk, whole, at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Result
from benchmarks.peers.work import Generate, main


def make(model: str, offload_folder: str, weights_bytes_max: int) -> tuple[Generate, Callable[[], Result]]:
    """The engine for a checkpoint; what exceeds `weights_bytes_max` goes to `offload_folder`."""
    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": weights_bytes_max},
        offload_folder=offload_folder,
    )

    def generate(prompt: list[int], count: int) -> Iterator[int]:
        input_ids, cache = torch.tensor([prompt]), None
        for _ in range(count):
            with torch.inference_mode():
                output = loaded(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            input_ids = output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(input_ids)

    def figures() -> Result:
        places = {name: str(place) for name, place in getattr(loaded, "hf_device_map", {}).items()}
        layers = [place for name, place in places.items() if ".layers." in name]
        return {"layers_in_memory": len(layers) - layers.count("disk"), "layers_on_disk": layers.count("disk")}

    return generate, figures


if __name__ == "__main__":
    main(make)
