"""`python -m opd_megatron` is the `opd` command."""

from opd_megatron.cli.app import main

if __name__ == "__main__":
    main()
