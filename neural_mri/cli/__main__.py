"""`python -m neural_mri.cli`."""

from neural_mri.cli import main

if __name__ == "__main__":
    main()
