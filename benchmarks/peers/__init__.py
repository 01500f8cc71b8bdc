"""The engines that are compared when a model exceeds memory, each run in a process of its own with the same work.

The peers, llama.cpp and accelerate, are installed on demand outside the tree (`install`).
"""
