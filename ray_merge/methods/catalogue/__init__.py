"""What every method declares, one file per family, torch-free: parameters, rules, references, kernels by name."""
