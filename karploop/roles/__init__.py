"""Roles: named models, on the mesh or behind an address. Their verbs are `complete` and `score`."""
