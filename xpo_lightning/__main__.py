"""`python -m xpo_lightning` is `xpo`."""

from xpo_lightning.cli.main import main

if __name__ == "__main__":
    main()
