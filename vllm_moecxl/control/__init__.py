"""Control plane: residency, eviction, passes and the byte account. Plain Python and numpy, no torch, no vLLM."""
