"""Refinement: a merge trained, without labels, towards the features of the models it was made of."""
