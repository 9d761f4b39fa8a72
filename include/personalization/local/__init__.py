"""The embedded stack: real servers out of wheels, for a machine without docker or root."""
