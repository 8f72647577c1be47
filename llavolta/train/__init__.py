"""Training by stages: schemes, configurations, models and their trainer."""
