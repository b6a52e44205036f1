"""`python -m hf_epimer` is `hf-epimer`."""

from hf_epimer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
