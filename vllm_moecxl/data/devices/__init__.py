"""Device backends: memory for slots, copies into it, and the streams and events that order copies and kernels."""
