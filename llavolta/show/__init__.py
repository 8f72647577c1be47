"""What is seen: plots, widgets and the notebooks' parameters."""
