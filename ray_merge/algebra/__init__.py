"""Mathematics on the factors of one site: torch only, no files, no Ray, no globals, no hidden randomness."""
