"""Kernels that move expert slabs."""
