"""The card side: where GPUs come from and what their faults mean."""
