"""Device code: CuTe DSL kernels and the frozen configs that describe them. Imports no torch."""
