"""`python3 -m course WORD`: needs nothing but Python until the word needs the environment."""

import sys


def main() -> None:
    """Run one word of the command line and exit with its status."""
    from course import bootstrap

    bootstrap.require_python()
    from course import cli

    sys.exit(cli.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
