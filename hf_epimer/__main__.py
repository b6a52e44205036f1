"""`python -m hf_epimer` is `hf-epimer`."""

from hf_epimer.cli.main import console

if __name__ == "__main__":
    console()
