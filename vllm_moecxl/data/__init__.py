"""Data plane: banks, slab layouts, slots and device backends. Knows torch and Linux, not vLLM."""
