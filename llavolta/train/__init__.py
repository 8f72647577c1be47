"""Training by stages: schemes, configurations, models, and the Trainer that runs them."""
