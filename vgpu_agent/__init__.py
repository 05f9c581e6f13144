"""Turns each NVIDIA GPU of a Kubernetes node into many virtual GPUs that pods request."""

__version__ = "0.2.0"
