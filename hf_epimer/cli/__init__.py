"""The subcommands of `hf-epimer`, one module each: their flags, and what they print."""
