"""A run as it stands, again and again: followed incrementally, and laid out for a terminal. No torch in here."""
