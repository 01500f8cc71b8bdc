"""Runtime: one object per worker that wires everything, and dispatch, the hot path. Knows torch, not vLLM."""
