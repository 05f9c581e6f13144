"""Values and pure decisions: no edge library, no I/O; `async` only to wait for a change."""
