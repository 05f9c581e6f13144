"""The commands that look at a node, and those that try it: only they load what is in here."""
