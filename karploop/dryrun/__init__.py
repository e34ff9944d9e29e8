"""What a run's programs take on devices that are not here."""
