"""Memory limits that the driver enforces for containers: looked at, and set where missing."""
