"""How it is computed: pure functions, arrays in, arrays out. No state, no files, no globals."""
