"""Load, benchmarks and fault accounting; takes addresses, starts nothing itself."""
