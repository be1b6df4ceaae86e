"""What the kernels are made of, one idea a file."""
