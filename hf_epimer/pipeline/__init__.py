"""One merge from a recipe to a pushed folder: plan, inputs, merge, calibration, card."""
