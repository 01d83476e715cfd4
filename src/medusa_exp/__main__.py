"""`python -m medusa_exp`: see cli.py."""

from medusa_exp.cli import main

if __name__ == "__main__":
    main()
