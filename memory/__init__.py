"""What remembers: state, bounds, rows, eviction, index, persistence."""
