"""A pair as tensor operations: recorded, rewritten, compiled, and compared with the pair itself."""
