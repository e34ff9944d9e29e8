"""How fast what a run does is on this machine, beside what the machine could do."""
