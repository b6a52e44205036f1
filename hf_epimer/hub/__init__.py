"""The Hugging Face Hub: references, the files behind them, rights and pushes. The only room that talks to it."""
