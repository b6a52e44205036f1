"""A small zoo of CLIP vision models, drawn and trained on the spot, to try merging without network or downloads."""
