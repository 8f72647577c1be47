"""Count, plan and time what training and inference cost."""
