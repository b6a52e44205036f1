"""The Hugging Face Hub: references, the files behind them, and pushing. The only room that talks to it."""
