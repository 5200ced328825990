"""`python -m meg_kernels.cli` is `meg`."""

from meg_kernels.cli import main

if __name__ == "__main__":
    main()
