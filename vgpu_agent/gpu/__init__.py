"""The GPU side: where GPUs come from and what their faults mean."""
