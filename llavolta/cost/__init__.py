"""What a step costs: counted, planned and timed."""
