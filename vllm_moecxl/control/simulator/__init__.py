"""The simulator: the engine's control plane in virtual time. Only the clock, the links and the kernels are modelled."""
