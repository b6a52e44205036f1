"""Calibration: the linear layers of a merge solved again in forward order, on images of every task."""
