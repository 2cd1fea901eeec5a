"""What each experiment's page says, and its figures: from its results alone."""
