"""The grid of methods, ranks and alphas, judged on validation images."""
