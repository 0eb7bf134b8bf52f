"""`python -m ray_merge`: the command line."""

from ray_merge.cli import main

if __name__ == "__main__":
    main()
