"""What watches the loop: held-out measurement and per-round monitors."""
