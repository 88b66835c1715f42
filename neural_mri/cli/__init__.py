"""The command line: `neural-mri scan activation "The Eiffel Tower is located in the city of"`.

Built on `neural_mri.client` alone. Answers go to standard output, everything else to standard error.
"""

__all__ = ("main",)


def main() -> None:
    """Run the command in `sys.argv` and leave with its exit code."""
    import sys

    from neural_mri.cli.app import run

    sys.exit(run(sys.argv[1:]))
