"""Layers that the device serves by itself: what is queued for it, what it tells, and what the host may do beside it."""
