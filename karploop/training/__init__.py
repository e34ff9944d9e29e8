"""Training on selected rows."""
