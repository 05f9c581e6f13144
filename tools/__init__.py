"""Programs for those who work on vgpu-agent. Nothing of it is in the wheel."""
