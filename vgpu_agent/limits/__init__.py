"""Memory limits that the driver enforces: the cgroups of containers, and what is set on them."""
