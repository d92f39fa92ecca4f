"""How the nearest keys of a row are found: each index follows the row's ring, and can be rebuilt from it."""
