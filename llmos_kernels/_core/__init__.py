"""Shared basis of all ops: registration, the compiled extension, the error budget and timing."""
