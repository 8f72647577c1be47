"""Plots, widgets, and the parameters of the notebooks."""
