"""What every op stands on: its registration, the compiled extension, the error budget, timing."""
